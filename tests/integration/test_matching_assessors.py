"""Assessors for applications, proposed by the ranker without those who have a conflict."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio

from services.common.kafka import Publisher
from services.common.settings import Settings
from smdih.matching.v1 import events_pb2, matching_pb2
from tests.integration.matching_hub import FIRM, KEYS, OTHER_FIRM, Hub, publish_world, running_hub

TEXT = "We will detect worn gears on our test stands from oil debris and vibration, before they fail."
ASSESSORS: dict[str, dict[str, Any]] = {
    "gears": {"text": "Gears, bearings and lubricants; oil debris and vibration monitoring."},
    "vibration": {"text": "Vibration analysis of rotating machinery and gears."},
    "declared": {"text": "Gears and oil debris monitoring.", "conflict_firm_ids": [FIRM]},
    "same-house": {"text": "Gears and vibration.", "conflict_organisations": ["Acme Gears Limited"]},
    "bakery": {"text": "Ovens, dough and food hygiene.", "assesses": "only"},
}


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        for name, fields in ASSESSORS.items():
            expert = {"kind": "expert", "title": f"Dr {name}", "assesses": "also", "capacity_per_quarter": 2, **fields}
            await running.ok("partner", "PUT", f"/v1/providers/{name}", expert)
        plain = {"kind": "expert", "title": "No assessor", "text": "Gears and oil debris.", "capacity_per_quarter": 1}
        await running.ok("partner", "PUT", "/v1/providers/helper", plain)
        yield running


async def propose(hub: Hub, who: str = "operator", **fields: Any) -> matching_pb2.ProposeAssessorsResponse:
    request = matching_pb2.ProposeAssessorsRequest(**{"text": TEXT, **fields})
    answer: matching_pb2.ProposeAssessorsResponse = await hub.stub.ProposeAssessors(
        request, metadata=(("authorization", f"Bearer {KEYS[who]}"),)
    )
    return answer


def names(answer: matching_pb2.ProposeAssessorsResponse) -> list[str]:
    return [each.provider_id for each in answer.assessors]


async def test_the_nearest_assessors_without_conflict_are_proposed_and_the_others_named_with_why(hub: Hub) -> None:
    answer = await propose(
        hub, conflict_firm_ids=[FIRM], conflict_organisations=["ACME GEARS"], sic="28.15", region="East Midlands"
    )
    assert names(answer) == ["gears", "vibration", "bakery"]
    best = answer.assessors[0]
    assert best.name == "Dr gears"
    assert best.score == pytest.approx(sum(part.points for part in best.parts))
    assert any("same words" in reason and "gears" in reason for reason in best.reasons)
    assert not any("places" in reason for reason in best.reasons)
    assert {each.provider_id: list(each.codes) for each in answer.excluded} == {
        "declared": ["CONFLICT_OF_INTEREST"],
        "same-house": ["CONFLICT_ORGANISATION"],
    }
    assert all(each.reasons[0].startswith("It") for each in answer.excluded)
    assert answer.excluded_count == 2
    assert not answer.degraded
    assert len(names(await propose(hub, count=1))) == 1
    assert len(names(await propose(hub))) == 5


async def test_whoever_works_for_the_firm_and_whoever_belongs_to_a_named_partner_is_left_out(hub: Hub) -> None:
    opened = await hub.ok("other_firm", "POST", "/v1/needs", {"text": "Gears and vibration analysis."})
    offer = next(each for each in opened["offers"] if each["provider_id"] == "vibration")
    match = (await hub.ok("other_firm", "POST", f"/v1/offers/{offer['id']}/accept"))["match"]
    answer = await propose(hub, conflict_firm_ids=[OTHER_FIRM])
    # Every assessor of this world belongs to the partner called University, which works for the firm now.
    assert names(answer) == []
    codes = {each.provider_id: list(each.codes) for each in answer.excluded}
    assert "WORKED_FOR_FIRM" in codes["vibration"]
    assert codes["gears"] == ["CONFLICT_ORGANISATION"]
    # Of a match that came to nothing only the provider itself is left out.
    await hub.ok("partner", "POST", f"/v1/matches/{match['id']}/cancel", {"reason": "ill"})
    answer = await propose(hub, conflict_firm_ids=[OTHER_FIRM])
    assert names(answer)
    assert [(each.provider_id, list(each.codes)) for each in answer.excluded] == [("vibration", ["WORKED_FOR_FIRM"])]
    assert names(await propose(hub, conflict_organisations=["The University"])) == []


async def test_who_only_assesses_is_never_offered_to_firms(hub: Hub) -> None:
    opened = await hub.ok("firm", "POST", "/v1/needs", {"text": "Our dough sticks to the ovens."})
    assert "bakery" not in {each["provider_id"] for each in opened["offers"]}


async def test_only_operators_ask_and_bad_requests_say_why(hub: Hub) -> None:
    for who in ("firm", "partner", "device"):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await propose(hub, who=who)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
    bad: list[tuple[dict[str, Any], str]] = [
        ({"text": " "}, "TEXT_MISSING"),
        ({"text": "x" * 20_001}, "TEXT_TOO_LONG"),
        ({"count": 51}, "BAD_COUNT"),
        ({"conflict_firm_ids": range(201)}, "TOO_MANY"),
        ({"conflict_organisations": ["a\x00b"]}, "NOT_TEXT"),
    ]
    for fields, reason in bad:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await propose(hub, **fields)
        assert ("reason", reason) in tuple(refused.value.trailing_metadata())
    workshop = {"kind": "workshop", "title": "W", "text": "W", "assesses": "also", "capacity_per_quarter": 1}
    answer = await hub.call("partner", "PUT", "/v1/providers/workshop", workshop)
    assert (answer.status_code, answer.json()["reason"]) == (400, "NOT_AN_EXPERT")
    # Conflicts are for its partner and operators only.
    for who, seen in (("partner", ["Acme Gears Limited"]), ("firm", []), ("other_partner", [])):
        assert (await hub.ok(who, "GET", "/v1/providers/same-house"))["conflict_organisations"] == seen
    stored = await hub.stub.GetProvider(
        matching_pb2.GetProviderRequest(provider_id="bakery"),
        metadata=(("authorization", f"Bearer {KEYS['partner']}"),),
    )
    assert stored.provider.assesses == matching_pb2.ASSESSES_ONLY
    assert stored.provider.kind == events_pb2.PROVIDER_KIND_EXPERT
