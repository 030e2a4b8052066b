"""Needs that alarms open under a firm's consent, and what ends with it."""

import asyncio
import functools
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from services.common import topics
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.matching.messages import raised_alarm
from smdih.matching.v1 import events_pb2
from tests.integration.matching_hub import (
    FIRM,
    PROVIDERS,
    SHARE_ALL,
    Hub,
    alarm_event,
    events_of,
    machine_id,
    offers_of,
    publish_world,
    running_hub,
    told,
)
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    await one_hub.empty()
    yield one_hub
    one_hub.clock.shift = timedelta(0)


async def give_consent(hub: Hub, **fields: Any) -> dict[str, Any]:
    # From an hour ago: the clocks of the tests' alarms and of the hub need not agree to the microsecond.
    began_us = hub.clock.now_us() - 3_600_000_000
    given: dict[str, Any] = await hub.ok(
        "firm", "POST", "/v1/consents", {"shared": SHARE_ALL, "from_us": began_us, **fields}
    )
    return given


async def opened_need(hub: Hub, machine: int) -> dict[str, Any]:
    async def is_open() -> bool:
        return bool(await hub.needs_of(machine))

    await eventually(is_open)
    return (await hub.needs_of(machine))[0]


async def all_taken_in(hub: Hub, cluster: Cluster) -> None:
    await eventually(functools.partial(hub.alarms_taken_in, cluster))


async def test_an_alarm_under_consent_becomes_a_need_with_offers_and_an_accepted_one_a_match(
    hub: Hub, cluster: Cluster
) -> None:
    await hub.put_providers()
    consent = await give_consent(hub)
    await hub.raise_alarm("journey", machine_id(FIRM, 0))
    need = await opened_need(hub, machine_id(FIRM, 0))
    assert need["source"] == "anomaly"
    assert need["text"].startswith("Anomaly on gearbox test stand: oil iron particles jumps suddenly.")
    assert "secret" not in need["text"]
    assert (need["sic"], need["region"], need["size"], need["urgency"]) == ("28.15", "East Midlands", "small", "high")
    assert (need["alarm_ids"], need["consent_id"]) == (["journey"], consent["id"])
    offers = await offers_of(hub, need["id"])
    assert [offer["rank"] for offer in offers] == [1, 2, 3, 4]
    assert offers[0]["provider_id"] == "gear-rigs"
    assert offers[0]["reasons"]
    assert "It has 3 of 3 places free this quarter." in offers[0]["reasons"]
    assert all(offer["score"] == pytest.approx(sum(offer["parts"].values())) for offer in offers)

    accepted = await hub.ok("firm", "POST", f"/v1/offers/{offers[0]['id']}/accept")
    assert accepted["match"]["provider_id"] == "gear-rigs"
    assert accepted["offer"]["match_id"] == accepted["match"]["id"]
    assert await hub.ok("firm", "POST", f"/v1/offers/{offers[0]['id']}/accept") == accepted
    need = await hub.ok("firm", "GET", f"/v1/needs/{need['id']}")
    assert (need["state"], need["match_id"]) == ("matched", accepted["match"]["id"])
    assert [offer["state"] for offer in await offers_of(hub, need["id"])] == ["accepted", "lapsed", "lapsed", "lapsed"]
    assert (await hub.ok("partner", "GET", "/v1/providers/gear-rigs"))["taken_this_quarter"] == 1

    async def published() -> bool:
        return len(await events_of(cluster, need["id"])) >= 8

    await eventually(published)
    events = await events_of(cluster, need["id"])
    assert len({event.event_id for event in events}) == 8
    assert [event.change for event in events[:4]] == [events_pb2.OFFER_CHANGE_MADE] * 4
    assert events[4].change == events_pb2.OFFER_CHANGE_ACCEPTED
    assert events[4].offer.match_id == accepted["match"]["id"]
    assert [event.change for event in events[5:]] == [events_pb2.OFFER_CHANGE_LAPSED] * 3
    # One thread from the samples to the match.
    assert {event.offer.correlation_id for event in events} == {"samples-journey"}
    assert {event.offer.alarm_id for event in events} == {"journey"}
    assert accepted["match"]["correlation_id"] == "samples-journey"


async def test_without_consent_nothing_of_an_alarm_is_kept(hub: Hub, cluster: Cluster) -> None:
    await hub.put_providers("gear-rigs")
    await hub.raise_alarm("never-agreed", machine_id(FIRM, 1))
    await all_taken_in(hub, cluster)
    await give_consent(hub, machine_ids=[machine_id(FIRM, 2)])
    await hub.raise_alarm("other-machine", machine_id(FIRM, 1))
    await all_taken_in(hub, cluster)
    await give_consent(hub, severity_min="high")
    await hub.raise_alarm("too-mild", machine_id(FIRM, 1), severity=1)
    await all_taken_in(hub, cluster)
    await give_consent(hub, until_us=hub.clock.now_us() - 60_000_000)
    await hub.raise_alarm("too-late", machine_id(FIRM, 1))
    await all_taken_in(hub, cluster)
    await give_consent(hub)
    await hub.ok("firm", "POST", "/v1/consents/revoke")
    await hub.raise_alarm("revoked", machine_id(FIRM, 1))
    await all_taken_in(hub, cluster)
    assert await hub.needs_of(machine_id(FIRM, 1)) == []
    assert await hub.pool.fetchval("SELECT count(*) FROM need_alarm WHERE alarm_id = 'revoked'") == 0
    history = await hub.ok("firm", "GET", "/v1/consents")
    assert history["current"] is None
    assert [consent["replaced"] for consent in history["history"]][:4] == [False, True, True, True]


async def test_what_the_firm_does_not_share_is_not_in_the_need(hub: Hub) -> None:
    await hub.put_providers("gear-rigs")
    await give_consent(hub, shared=["fault"])
    await hub.raise_alarm("private", machine_id(FIRM, 3))
    need = await opened_need(hub, machine_id(FIRM, 3))
    assert need["text"] == "Anomaly on gearbox test stand: oil iron particles jumps suddenly."
    assert (need["sic"], need["region"], need["size"], need["shown_to_partners"]) == ("", "", "", False)
    await give_consent(hub, shared=["fault", "partners"])
    await hub.raise_alarm("shown", machine_id(FIRM, 11))
    assert (await opened_need(hub, machine_id(FIRM, 11)))["shown_to_partners"] is True


async def test_a_repeated_event_and_more_alarms_of_the_machine_open_no_second_need(hub: Hub, cluster: Cluster) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    await give_consent(hub)
    machine = machine_id(FIRM, 4)
    repeated = alarm_event("ten-0", machine)
    for _ in range(3):
        await hub.publisher.publish(topics.ALARMS, repeated, key=b"ten-0")
    for number in range(1, 10):
        await hub.raise_alarm(f"ten-{number}", machine)
    await all_taken_in(hub, cluster)
    needs = await hub.needs_of(machine)
    assert len(needs) == 1
    assert sorted(needs[0]["alarm_ids"]) == [f"ten-{number}" for number in range(10)]
    assert len(await offers_of(hub, needs[0]["id"])) == 2


async def test_alarms_of_one_machine_taken_in_by_two_processes_at_once_open_one_need(hub: Hub) -> None:
    await hub.put_providers("iot-basics")
    await give_consent(hub)
    machines = [machine_id(FIRM, number) for number in range(20, 30)]

    async def take(process: int, machines: list[int]) -> None:
        events = [alarm_event(f"process-{process}-{machine}", machine) for machine in machines]
        alarms = [alarm for alarm in map(raised_alarm, events) if alarm is not None]
        async with hub.pool.acquire() as connection, connection.transaction():
            await hub.matching.needs.take_alarms(connection, alarms)

    await asyncio.gather(take(1, machines), take(2, machines[::-1]), take(3, machines))
    for machine in machines:
        assert [len(need["alarm_ids"]) for need in await hub.needs_of(machine)] == [3]


async def test_after_a_match_the_same_fault_opens_no_need_but_a_later_one_does(hub: Hub, cluster: Cluster) -> None:
    await hub.put_providers("iot-basics")
    await give_consent(hub)
    machine, day_us = machine_id(FIRM, 5), 86_400_000_000
    now_us = hub.clock.now_us()
    await give_consent(hub, from_us=now_us - 10 * day_us)
    await hub.raise_alarm("fault-1", machine, raised_us=now_us - 3 * day_us)
    need = await opened_need(hub, machine)
    [offer] = await offers_of(hub, need["id"])
    await hub.ok("firm", "POST", f"/v1/offers/{offer['id']}/accept")
    await hub.raise_alarm("fault-1-again", machine, raised_us=now_us - 3 * day_us + 1_000_000)
    await all_taken_in(hub, cluster)
    assert [need["alarm_ids"] for need in await hub.needs_of(machine)] == [["fault-1", "fault-1-again"]]
    await hub.raise_alarm("fault-2", machine, raised_us=now_us)
    await all_taken_in(hub, cluster)
    assert [need["alarm_ids"] for need in await hub.needs_of(machine)] == [["fault-2"], ["fault-1", "fault-1-again"]]


async def test_what_a_consent_shared_ends_with_it(hub: Hub) -> None:
    await hub.put_providers("gear-rigs", "iot-basics")
    shares = [*SHARE_ALL, "partners"]
    machine = machine_id(FIRM, 30)

    async def raised(alarm_id: str, machine: int, **consent: Any) -> str:
        await give_consent(hub, shared=shares, **consent)
        await hub.raise_alarm(alarm_id, machine)

        async def is_open() -> bool:
            return [alarm_id] in [each["alarm_ids"] for each in await hub.needs_of(machine)]

        await eventually(is_open)
        need_id: str = (await hub.needs_of(machine))[0]["id"]
        return need_id

    async def seen_by_partner(need_id: str) -> tuple[bool, set[str]]:
        desk = {each["id"] for each in (await hub.ok("partner", "GET", "/v1/desk/needs"))["needs"]}
        return need_id in desk, {each["need_text"] for each in await offers_of(hub, need_id, "partner")}

    async def closed(need_id: str) -> bool:
        return bool((await hub.ok("firm", "GET", f"/v1/needs/{need_id}"))["close_reason"] == "CONSENT_ENDED")

    # Revoked.
    need_id = await raised("shared-1", machine)
    shown, texts = await seen_by_partner(need_id)
    assert shown
    assert "" not in texts
    await hub.ok("firm", "POST", "/v1/consents/revoke")
    assert await closed(need_id)
    assert await seen_by_partner(need_id) == (False, {""})
    assert {each["state"] for each in await offers_of(hub, need_id)} == {"lapsed"}
    assert (await told(hub, need_id))[0] == "need_closed"
    # Under a new consent the same fault is a new need. One that shares the same goes on with it, one that shares less hides or ends
    # it.
    need_id = await raised("shared-2", machine)
    await give_consent(hub, shared=SHARE_ALL, machine_ids=[machine])
    assert (await hub.ok("firm", "GET", f"/v1/needs/{need_id}"))["state"] == "open"
    assert (await seen_by_partner(need_id))[0] is False
    await give_consent(hub, shared=["fault"])
    assert await closed(need_id)
    # Run out.
    need_id = await raised("shared-3", machine_id(FIRM, 31), until_us=hub.clock.now_us() + 3_600_000_000)
    hub.clock.shift = timedelta(hours=1, seconds=1)
    await eventually(functools.partial(closed, need_id))


async def test_what_a_consent_shared_does_not_come_back_with_the_end_of_a_match(hub: Hub, cluster: Cluster) -> None:
    await hub.put_providers("gear-rigs")
    other = {**PROVIDERS["gear-rigs"], "title": "Other gear rigs"}
    await hub.ok("other_partner", "PUT", "/v1/providers/other-rigs", other)
    shares = [*SHARE_ALL, "partners"]

    async def matched(alarm_id: str, machine: int) -> tuple[str, dict[str, Any]]:
        await give_consent(hub, shared=shares)
        await hub.raise_alarm(alarm_id, machine)
        need_id: str = (await opened_need(hub, machine))["id"]
        offer = next(each for each in await offers_of(hub, need_id) if each["provider_id"] == "gear-rigs")
        return need_id, (await hub.ok("firm", "POST", f"/v1/offers/{offer['id']}/accept"))["match"]

    async def texts_for(who: str, need_id: str) -> set[tuple[str, tuple[str, ...]]]:
        return {(each["need_text"], tuple(each["reasons"])) for each in await offers_of(hub, need_id, who)}

    async def cancelled(match: dict[str, Any]) -> None:
        await hub.ok("partner", "POST", f"/v1/matches/{match['id']}/cancel", {"reason": "ill"})

    # It is not shown to partners any more.
    need_id, match = await matched("back-1", machine_id(FIRM, 32))
    await give_consent(hub)
    await cancelled(match)
    need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
    assert (need["state"], need["shown_to_partners"]) == ("open", False)
    desk = (await hub.ok("partner", "GET", "/v1/desk/needs"))["needs"]
    assert need_id not in {each["id"] for each in desk}
    # Nothing is shared any more: who won goes on, who lost reads nothing, and the need is not opened again.
    need_id, match = await matched("back-2", machine_id(FIRM, 33))
    [before] = await texts_for("other_partner", need_id)
    assert all(before)
    await hub.ok("firm", "POST", "/v1/consents/revoke")
    assert await texts_for("other_partner", need_id) == {("", ())}
    assert ("", ()) not in await texts_for("partner", need_id)
    await cancelled(match)
    need = await hub.ok("firm", "GET", f"/v1/needs/{need_id}")
    assert (need["state"], need["close_reason"], need["close_note"]) == ("closed", "CONSENT_ENDED", "ill")
    assert await texts_for("partner", need_id) == {("", ())}
    # An alarm that arrives when the consent has run out opens nothing.
    await give_consent(hub, until_us=hub.clock.now_us() + 3_600_000_000)
    raised_us = hub.clock.now_us()
    hub.clock.shift = timedelta(hours=1, seconds=1)
    await hub.raise_alarm("back-3", machine_id(FIRM, 34), raised_us=raised_us)
    await all_taken_in(hub, cluster)
    assert await hub.needs_of(machine_id(FIRM, 34)) == []


async def test_a_machine_that_goes_on_alarming_gets_a_need_anew_once_the_first_has_ended(
    hub: Hub, cluster: Cluster
) -> None:
    await give_consent(hub)
    closed, finished = machine_id(FIRM, 35), machine_id(FIRM, 36)
    await hub.raise_alarm("daily-0", closed)
    need = await opened_need(hub, closed)
    await hub.ok("firm", "POST", f"/v1/needs/{need['id']}/close", {"reason": "A false alarm."})
    await hub.put_providers("gear-rigs")
    await hub.raise_alarm("weekly-0", finished)
    [offer] = await offers_of(hub, (await opened_need(hub, finished))["id"])
    match = (await hub.ok("firm", "POST", f"/v1/offers/{offer['id']}/accept"))["match"]
    began_us = hub.clock.now_us()

    async def alarm_every_20_hours(first: int, last: int) -> None:
        for number in range(first, last):
            raised_us = began_us + number * 20 * 3_600_000_000
            await hub.raise_alarm(f"daily-{number}", closed, raised_us=raised_us)
            await hub.raise_alarm(f"weekly-{number}", finished, raised_us=raised_us)
            await all_taken_in(hub, cluster)

    await alarm_every_20_hours(1, 4)
    assert [each["alarm_ids"] for each in await hub.needs_of(closed)] == [
        ["daily-2", "daily-3"],
        ["daily-0", "daily-1"],
    ]
    # While the work goes on, the fault is in hands.
    assert [len(each["alarm_ids"]) for each in await hub.needs_of(finished)] == [4]
    await hub.ok("firm", "POST", f"/v1/matches/{match['id']}/engage")
    await hub.ok("firm", "POST", f"/v1/matches/{match['id']}/finish", {"result": "not_solved"})
    await alarm_every_20_hours(4, 6)
    assert [len(each["alarm_ids"]) for each in await hub.needs_of(finished)] == [2, 4]


async def test_an_unreadable_alarm_goes_to_the_dead_letters_and_holds_nothing_up(hub: Hub, cluster: Cluster) -> None:
    await hub.put_providers("gear-rigs")
    await give_consent(hub)
    await hub.publisher.publish(topics.ALARMS, b"\xff\xff\xff", key=b"bad")
    await hub.raise_alarm("after-the-bad-one", machine_id(FIRM, 8))
    assert (await opened_need(hub, machine_id(FIRM, 8)))["alarm_ids"] == ["after-the-bad-one"]
    await all_taken_in(hub, cluster)
