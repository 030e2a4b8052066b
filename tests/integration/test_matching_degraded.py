"""Without the sentence model words alone rank, and say so; changes of providers reach other processes within a second."""

import time
from collections.abc import AsyncIterator

import pytest_asyncio

from services.common.kafka import Publisher
from services.common.settings import Settings
from smdih.matching.v1 import matching_pb2
from tests.integration.matching_hub import KEYS, Hub, publish_world, running_hub
from tests.polling import eventually

VISIBLE_S_MAX = 1.0
GEARS = "Noise of gears, bearings and lubricants."


@pytest_asyncio.fixture(scope="module")
async def hubs(settings: Settings, publisher: Publisher) -> AsyncIterator[tuple[Hub, Hub]]:
    """Two processes' worth on one database."""
    await publish_world(publisher)
    async with (
        running_hub(settings, with_model=False) as one,
        running_hub(settings, with_model=False, taking_alarms=False) as other,
    ):
        yield one, other


async def test_words_alone_rank_and_every_offer_says_so(hubs: tuple[Hub, Hub]) -> None:
    hub, _ = hubs
    await hub.put_providers()
    opened = await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS})
    best = opened["offers"][0]
    assert best["provider_id"] == "gear-rigs"
    assert best["parts"]["meaning"] == 0
    assert best["parts"]["words"] > 0
    assert best["ranker_version"].endswith("/none")
    waiting = (await hub.ok("firm", "POST", "/v1/needs", {"text": GEARS, "wait_for_round": True}))["need"]["id"]
    await hub.ok("operator", "POST", "/v1/rounds", {"round_id": "words"})
    assert await hub.matching.rounds.carry_out()
    [placed] = (await hub.ok("firm", "GET", f"/v1/needs/{waiting}/offers"))["offers"]
    assert placed["provider_id"] == "gear-rigs"
    expert = {"kind": "expert", "title": "Dr Gear", "text": "Gears.", "assesses": "only", "capacity_per_quarter": 1}
    await hub.ok("partner", "PUT", "/v1/providers/dr-gear", expert)
    proposed = await hub.stub.ProposeAssessors(
        matching_pb2.ProposeAssessorsRequest(text=GEARS), metadata=(("authorization", f"Bearer {KEYS['operator']}"),)
    )
    assert proposed.degraded
    assert [each.provider_id for each in proposed.assessors] == ["dr-gear"]
    metrics = (await hub.client.get("/metrics")).text
    assert "smdih_matching_degraded 1.0" in metrics


async def test_a_changed_provider_shows_in_another_process_within_a_second(hubs: tuple[Hub, Hub]) -> None:
    one, other = hubs
    shown_s: list[float] = []
    gone_s: list[float] = []
    for number in range(3):
        name = f"new-{number}"
        words = f"Quenching{number} of springs"
        await one.ok(
            "partner",
            "PUT",
            f"/v1/providers/{name}",
            {"kind": "expert", "title": "Springs", "text": words, "capacity_per_quarter": 9},
        )
        began = time.monotonic()

        async def offered(words: str = words, name: str = name) -> bool:
            opened = await other.ok("firm", "POST", "/v1/needs", {"text": words})
            return bool(opened["offers"] and opened["offers"][0]["provider_id"] == name)

        await eventually(offered, deadline_s=10)
        shown_s.append(time.monotonic() - began)
        await one.ok("partner", "POST", f"/v1/providers/{name}/withdraw")
        began = time.monotonic()

        async def gone(words: str = words, name: str = name) -> bool:
            opened = await other.ok("firm", "POST", "/v1/needs", {"text": words})
            return name not in {each["provider_id"] for each in opened["offers"]}

        await eventually(gone, deadline_s=10)
        gone_s.append(time.monotonic() - began)
    # The best of three: a machine that is busy with other things may be late once.
    assert min(shown_s) < VISIBLE_S_MAX
    assert min(gone_s) < VISIBLE_S_MAX
