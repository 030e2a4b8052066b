"""What people do with alarms, on a real database and broker, through the real API process."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from services.anomaly.domain import Alarm, Return, alarm_id
from services.anomaly.retention import AlarmRetention
from services.anomaly.service import BULK_MAX, CHANGES_MAX, CHANGES_PAGE
from services.anomaly.store import Actor, AlarmStore
from services.anomaly.suppression import SHELVE_S_MAX, WINDOW_S_MAX
from services.anomaly.tuning import TUNINGS_AN_HOUR_MAX
from services.anomaly.tuning_store import HorizonStore, NewTuning, TuningStore
from services.anomaly.tunings import TuningKind
from services.common.clock import SystemClock, from_us
from services.common.database import Pool, create_pool, transaction
from services.common.identity import Role
from services.common.kafka import Publisher
from services.common.settings import Settings
from smdih.anomaly.v1 import anomaly_pb2 as pb
from smdih.anomaly.v1 import anomaly_pb2_grpc as pb_grpc
from smdih.anomaly.v1 import events_pb2 as events_pb
from tests import anomaly_plant as plant
from tests.alarms import ALARM
from tests.polling import eventually

FIRM, OTHER_FIRM, MEASURED_FIRM = 7, 8, 9
SECOND_US = 1_000_000

_machines = itertools.count(1)


def now_us() -> int:
    return time.time_ns() // 1000


@dataclass
class Hub:
    api: plant.Process
    http: httpx.AsyncClient
    alarms: Any
    pool: Pool
    publisher: Publisher
    firm: str
    other_firm: str
    operator: str
    device: str
    measured_firm: str

    async def machine(self, firm_id: int = FIRM) -> int:
        machine_id = next(_machines)
        await plant.publish_machine(self.publisher, machine_id=machine_id, firm_id=firm_id)
        return machine_id

    async def raised(self, machine_id: int, *, position: int = 0, started_us: int = 0, firm_id: int = FIRM) -> Alarm:
        """An alarm as the worker stores it."""
        started_us = started_us or now_us()
        alarm = replace(
            ALARM,
            id=alarm_id(machine_id=machine_id, position=position, started_us=started_us),
            firm_id=firm_id,
            machine_id=machine_id,
            position=position,
            signal_id=machine_id * 1000 + position,
            machine_path=f"firm-{firm_id}/leeds/press-{machine_id}",
            signal_name=f"signal-{position}",
            started_us=started_us,
            correlation_id=f"samples-{machine_id}-{position}",
        )
        async with transaction(self.pool) as connection:
            stored = await AlarmStore().raise_alarm(connection, alarm, now_us=now_us())
        assert stored is not None
        return stored

    async def returned(self, alarm: Alarm) -> Alarm | None:
        change = Return(alarm_id=alarm.id, ended_us=alarm.started_us + 5 * SECOND_US, correlation_id="later")
        async with transaction(self.pool) as connection:
            return await AlarmStore().end_alarm(connection, change, now_us=now_us())

    async def post(self, path: str, *, key: str = "", status: int = 200, **body: Any) -> Any:
        answer = await self.http.post(f"/v1/alarms{path}", headers=by(key or self.firm), json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def get(self, path: str, *, key: str = "", status: int = 200) -> Any:
        answer = await self.http.get(f"/v1/alarms{path}", headers=by(key or self.firm))
        assert answer.status_code == status, answer.text
        return answer.json()

    async def alarm(self, alarm: Alarm) -> Any:
        return (await self.get(f"/{alarm.id}"))["alarm"]

    async def history(self, alarm: Alarm) -> list[tuple[str, str, str]]:
        changes = (await self.get(f"/{alarm.id}"))["changes"]
        return [(entry["change"], entry["actor"], entry["comment"]) for entry in changes]

    async def listed(self, machine_id: int, suppressed: str = "hidden") -> list[str]:
        page = await self.get(f"?machine_id={machine_id}&suppressed={suppressed}")
        return [alarm["id"] for alarm in page["alarms"]]

    async def becomes(self, alarm: Alarm, state: str) -> None:
        async def has_become() -> bool:
            return bool((await self.alarm(alarm))["state"] == state)

        await eventually(has_become)


def by(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, publisher: Publisher, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hub]:
    keys = {
        "firm": await plant.publish_key(publisher, credential_id=1, role=Role.FIRM, firm_id=FIRM),
        "other_firm": await plant.publish_key(publisher, credential_id=2, role=Role.FIRM, firm_id=OTHER_FIRM),
        "operator": await plant.publish_key(publisher, credential_id=3, role=Role.OPERATOR),
        "device": await plant.publish_key(publisher, credential_id=4, role=Role.DEVICE, firm_id=FIRM),
        "measured_firm": await plant.publish_key(publisher, credential_id=5, role=Role.FIRM, firm_id=MEASURED_FIRM),
    }
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=2)
    async with (
        plant.running("api", settings, tmp_path_factory.mktemp("logs") / "api.log") as api,
        httpx.AsyncClient(base_url=api.http, timeout=30) as client,
        grpc.aio.insecure_channel(api.grpc) as channel,
    ):
        yield Hub(api, client, pb_grpc.AlarmServiceStub(channel), pool, publisher, **keys)
    await pool.close()


async def test_comments_and_assignments_are_kept_once_each(hub: Hub) -> None:
    alarm = await hub.raised(await hub.machine())
    for _ in range(2):
        await hub.post(f"/{alarm.id}/comment", comment="sounds rough")
        assigned = await hub.post(f"/{alarm.id}/assign", assignee="Mary Quant", comment="please look")
        assert assigned["assignee"] == "Mary Quant"
    await hub.post(f"/{alarm.id}/assign", assignee=" Mary Quant ")
    for _ in range(2):
        request = pb.CommentAlarmRequest(id=alarm.id, comment="new bearing ordered")
        await hub.alarms.CommentAlarm(request, metadata=metadata(hub.operator))
    free = await hub.alarms.AssignAlarm(pb.AssignAlarmRequest(id=alarm.id), metadata=metadata(hub.operator))
    assert free.alarm.assignee == ""
    assert await hub.history(alarm) == [
        ("raised", "detector", ""),
        ("commented", "firm", "sounds rough"),
        ("assigned", "firm", "please look"),
        ("commented", "operator", "new bearing ordered"),
        ("assigned", "operator", ""),
    ]
    details = [entry["detail"] for entry in (await hub.get(f"/{alarm.id}"))["changes"]]
    assert details == ["", "", "Mary Quant", "", ""]


async def test_a_long_history_comes_in_pages_and_has_an_end(hub: Hub) -> None:
    alarm = await hub.raised(await hub.machine())
    await hub.pool.execute(
        "INSERT INTO alarm_change (event_id, alarm_id, change, changed, actor, credential_id, comment) "
        "SELECT md5($1 || n), $1, 'commented', now(), 'firm', 1, n::text FROM generate_series(1, $2::int) n",
        alarm.id,
        CHANGES_MAX - 1,
    )
    newest = await hub.get(f"/{alarm.id}")
    numbers = [entry["comment"] for entry in newest["changes"]]
    assert numbers == [str(n) for n in range(CHANGES_MAX - CHANGES_PAGE, CHANGES_MAX)]
    token = newest["next_page_token"]
    before = await hub.get(f"/{alarm.id}?page_token={token}")
    assert before["changes"][-1]["comment"] == str(CHANGES_MAX - CHANGES_PAGE - 1)
    seen = len(numbers)
    while token:
        request = pb.GetAlarmRequest(id=alarm.id, page_token=token)
        page = await hub.alarms.GetAlarm(request, metadata=metadata(hub.firm))
        seen, token = seen + len(page.changes), page.next_page_token
    assert seen == CHANGES_MAX
    assert page.changes[0].change == events_pb.ALARM_CHANGE_RAISED
    await hub.get(f"/{alarm.id}?page_token=x", status=400)
    await hub.post(f"/{alarm.id}/comment", comment="one more", status=409)
    await hub.post(f"/{alarm.id}/assign", assignee="Mary Quant", status=409)
    await hub.post(f"/{alarm.id}/take-out-of-service", reason="why not", status=409)
    await hub.post(f"/{alarm.id}/clear", comment="enough")


async def test_a_shelved_source_is_off_the_list_with_its_next_alarms_until_it_is_put_back(hub: Hub) -> None:
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    neighbour = await hub.raised(machine, position=1)
    until_us = now_us() + 3600 * SECOND_US
    for _ in range(2):
        shelved = await hub.post(f"/{alarm.id}/shelve", reason="sensor loose", until_us=until_us)
        assert (shelved["state"], shelved["shelved"], shelved["suppressed_or_shelved"]) == ("shelved", True, True)
    assert await hub.listed(machine) == [neighbour.id]
    assert await hub.listed(machine, "only") == [alarm.id]
    assert set(await hub.listed(machine, "included")) == {alarm.id, neighbour.id}
    standing = [s for s in (await hub.get("/suppressions"))["suppressions"] if s["machine_id"] == machine]
    assert [(s["alarm_id"], s["ends_us"], s["reason"], s["out_of_service"]) for s in standing] == [
        (alarm.id, until_us, "sensor loose", False)
    ]
    await hub.returned(alarm)
    again = await hub.raised(machine, started_us=alarm.started_us + 60 * SECOND_US)
    assert (await hub.alarm(again))["state"] == "shelved", "timed: it lasts whatever the transitions"
    for _ in range(2):
        back = await hub.post(f"/{again.id}/unshelve", comment="fixed")
        assert back["state"] == "unacknowledged"
    assert await hub.listed(machine) == [again.id, neighbour.id]
    assert (await hub.alarm(alarm))["state"] == "normal"
    assert await hub.history(alarm) == [
        ("raised", "detector", ""),
        ("shelved", "firm", "sensor loose"),
        ("returned", "detector", ""),
    ]
    assert await hub.history(again) == [("raised", "detector", ""), ("unshelved", "firm", "fixed")]


async def test_one_shot_ends_when_the_condition_returns(hub: Hub) -> None:
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    for _ in range(2):
        request = pb.ShelveAlarmRequest(id=alarm.id, reason="start-up", one_shot=True)
        answer = await hub.alarms.ShelveAlarm(request, metadata=metadata(hub.firm))
        assert answer.alarm.shelved
    await hub.returned(alarm)
    again = await hub.raised(machine, started_us=alarm.started_us + 60 * SECOND_US)
    assert again.suppression == 0
    assert [change for change, _, _ in await hub.history(alarm)] == ["raised", "shelved", "returned", "unshelved"]

    # Of one that is normal it covers the next activation.
    await hub.returned(again)
    await hub.post(f"/{again.id}/shelve", reason="start-up", one_shot=True)
    third = await hub.raised(machine, started_us=alarm.started_us + 120 * SECOND_US)
    assert (await hub.alarm(third))["state"] == "shelved"
    await hub.returned(third)
    fourth = await hub.raised(machine, started_us=alarm.started_us + 180 * SECOND_US)
    assert (await hub.alarm(fourth))["state"] == "unacknowledged"


async def test_shelving_ends_by_itself_also_over_a_restart(hub: Hub, settings: Settings, tmp_path: Path) -> None:
    alarm = await hub.raised(await hub.machine())
    await hub.post(f"/{alarm.id}/shelve", reason="a moment", until_us=now_us() + 2 * SECOND_US)
    await hub.becomes(alarm, "unacknowledged")
    assert (await hub.history(alarm))[-1] == ("unshelved", "schedule", "The time was over.")

    survivor = await hub.raised(await hub.machine())
    async with plant.running("api", settings, tmp_path / "other.log") as other:
        async with httpx.AsyncClient(base_url=other.http) as client:
            answer = await client.post(
                f"/v1/alarms/{survivor.id}/shelve",
                headers=by(hub.firm),
                json={"reason": "a moment", "until_us": now_us() + 3 * SECOND_US},
            )
            assert answer.status_code == 200, answer.text
        await other.kill()
        assert (await hub.alarm(survivor))["state"] == "shelved"
    await hub.becomes(survivor, "unacknowledged")
    assert [change for change, _, _ in await hub.history(survivor)] == ["raised", "shelved", "unshelved"]


async def test_out_of_service_lasts_until_it_is_put_back(hub: Hub) -> None:
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    for _ in range(2):
        out = await hub.post(f"/{alarm.id}/take-out-of-service", reason="sensor sent in")
        assert out["state"] == "out_of_service"
    await hub.post(f"/{alarm.id}/acknowledge")
    assert (await hub.alarm(alarm))["state"] == "out_of_service", "the facets do not know of each other"
    assert await hub.listed(machine) == []
    for _ in range(2):
        request = pb.ReturnToServiceRequest(id=alarm.id, reason="sensor back")
        back = await hub.alarms.ReturnToService(request, metadata=metadata(hub.operator))
        assert back.alarm.state == events_pb.ALARM_STATE_ACKNOWLEDGED
    assert await hub.history(alarm) == [
        ("raised", "detector", ""),
        ("taken_out_of_service", "firm", "sensor sent in"),
        ("acknowledged", "firm", ""),
        ("returned_to_service", "operator", "sensor back"),
    ]


async def test_alarms_in_maintenance_are_recorded_and_marked_but_off_the_list(hub: Hub) -> None:
    machine = await hub.machine()
    before = await hub.raised(machine)
    start_us = now_us()
    body: dict[str, Any] = {
        "machine_id": machine,
        "starts_us": start_us,
        "ends_us": start_us + 3600 * SECOND_US,
        "reason": "new belt",
    }
    window = await hub.post("/windows", **body)
    assert await hub.post("/windows", **body) == window, "the same window again is the same window"
    assert [found["id"] for found in (await hub.get(f"/windows?machine_id={machine}"))["windows"]] == [window["id"]]
    assert (await hub.alarm(before))["state"] == "suppressed_by_design"
    during = await hub.raised(machine, position=1)
    passing = await hub.raised(machine, position=2)
    await hub.returned(passing)
    assert await hub.listed(machine) == []
    assert len(await hub.listed(machine, "only")) == 3
    for _ in range(2):
        request = pb.EndMaintenanceWindowRequest(id=window["id"], reason="done early")
        ended = await hub.alarms.EndMaintenanceWindow(request, metadata=metadata(hub.operator))
        assert (ended.window.ended_actor, ended.window.ended_reason) == ("operator", "done early")
    assert set(await hub.listed(machine)) == {before.id, during.id}
    assert (await hub.alarm(passing))["state"] == "normal"
    assert await hub.history(before) == [
        ("raised", "detector", ""),
        ("suppressed", "firm", "new belt"),
        ("unsuppressed", "operator", "done early"),
    ]
    assert (await hub.get(f"/windows?machine_id={machine}"))["windows"] == []


async def test_a_window_begins_and_ends_by_the_clock(hub: Hub) -> None:
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    start_us = now_us() + SECOND_US
    request = pb.CreateMaintenanceWindowRequest(
        machine_id=machine, starts_us=start_us, ends_us=start_us + 3 * SECOND_US, reason="oil"
    )
    await hub.alarms.CreateMaintenanceWindow(request, metadata=metadata(hub.firm))
    assert (await hub.alarm(alarm))["state"] == "unacknowledged"
    await hub.becomes(alarm, "suppressed_by_design")
    await hub.becomes(alarm, "unacknowledged")
    assert await hub.history(alarm) == [
        ("raised", "detector", ""),
        ("suppressed", "firm", "oil"),
        ("unsuppressed", "schedule", "The time was over."),
    ]


async def test_an_alarm_that_missed_its_mark_gets_it_and_one_that_kept_it_loses_it(hub: Hub) -> None:
    """As after a worker of the release before, a lost race, or a database that was put back."""
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    await hub.post(f"/{alarm.id}/take-out-of-service", reason="sensor sent in")
    unmarked = await hub.raised(machine, started_us=alarm.started_us + SECOND_US)
    await hub.pool.execute("UPDATE alarm SET suppression = 0 WHERE id = $1", unmarked.id)
    await hub.becomes(unmarked, "out_of_service")
    assert (await hub.history(unmarked))[-1] == ("taken_out_of_service", "firm", "sensor sent in")
    await hub.pool.execute("DELETE FROM suppression WHERE machine_id = $1", machine)
    await hub.becomes(alarm, "unacknowledged")
    await hub.becomes(unmarked, "unacknowledged")


async def test_what_ended_long_ago_is_removed_and_what_lasts_is_kept(hub: Hub) -> None:
    machine = await hub.machine()
    long_us = 101 * 86_400 * SECOND_US
    ages = {"over": long_us, "hidden": long_us, "lasting": long_us, "late": 0, "recent": 0}
    alarms = {
        name: await hub.raised(machine, position=position, started_us=now_us() - long_us)
        for position, name in enumerate(ages)
    }
    for name, alarm in alarms.items():
        await hub.pool.execute("UPDATE alarm SET raised = $2 WHERE id = $1", alarm.id, from_us(now_us() - ages[name]))
        await hub.post(f"/{alarm.id}/rating", useful=True)
        if name != "lasting":
            await hub.returned(alarm)
    await hub.pool.execute("UPDATE alarm SET ended = now() WHERE id = $1", alarms["recent"].id)
    await hub.post(f"/{alarms['hidden'].id}/take-out-of-service", reason="sensor sent in")
    await AlarmRetention(hub.pool, SystemClock(), kept_days=100, topic="samples").remove()
    left = await hub.pool.fetch("SELECT id FROM alarm WHERE machine_id = $1", machine)
    assert {row["id"] for row in left} == {alarm.id for name, alarm in alarms.items() if name != "over"}
    await hub.get(f"/{alarms['over'].id}", status=404)
    parts = "SELECT (SELECT count(*) FROM alarm_change WHERE alarm_id = $1), (SELECT count(*) FROM rating WHERE alarm_id = $1)"
    assert tuple(await hub.pool.fetchrow(parts, alarms["over"].id) or ()) == (0, 0)


async def test_what_is_cleared_can_be_left_out(hub: Hub) -> None:
    machine = await hub.machine()
    cleared, other = [await hub.raised(machine, position=position) for position in range(2)]
    await hub.post(f"/{cleared.id}/clear", comment="the machine is gone")
    listed = await hub.get(f"?machine_id={machine}&active=true&uncleared=true")
    assert [alarm["id"] for alarm in listed["alarms"]] == [other.id]
    request = pb.ListAlarmsRequest(machine_id=machine, uncleared=True)
    answer = await hub.alarms.ListAlarms(request, metadata=metadata(hub.firm))
    assert [alarm.id for alarm in answer.alarms] == [other.id]


async def test_words_on_tunings_that_nobody_reads_again_are_removed(hub: Hub) -> None:
    machine = await hub.machine()
    store, partition = TuningStore(), 900
    horizons = HorizonStore(hub.pool)
    await horizons.load(partition, position=0)
    position = 100
    await hub.pool.execute(
        "INSERT INTO position (topic, partition, next_offset) VALUES ('samples', $1, $2)", partition, position
    )
    for from_offset in (10, 20, position):
        await hub.pool.execute("UPDATE horizon SET next_offset = $2 WHERE partition = $1", partition, from_offset)
        for kind, offset in ((TuningKind.THRESHOLD, float(from_offset)), (TuningKind.RELEARN, None)):
            new = NewTuning(
                kind=kind,
                firm_id=FIRM,
                machine_id=machine,
                position=0,
                cause="test",
                reason="test",
                threshold_offset=offset,
            )
            async with transaction(hub.pool) as connection:
                await store.lock(connection)
                await store.add(
                    connection, new, now_us=now_us() - (200 - from_offset) * 86_400 * SECOND_US, actor=Actor()
                )
    before = await horizons.load(partition, position=position)
    assert [(t.kind, t.from_offset) for t in before.tunings if t.machine_id == machine] == [
        (TuningKind.THRESHOLD, 20),
        (TuningKind.THRESHOLD, position),
        (TuningKind.RELEARN, position),
    ]
    await AlarmRetention(hub.pool, SystemClock(), kept_days=100, topic="samples").remove()
    assert await horizons.load(partition, position=position) == before
    query = "SELECT count(*) FROM tuning_start s JOIN tuning t ON t.id = s.tuning_id WHERE partition = $1 AND machine_id = $2"
    assert await hub.pool.fetchval(query, partition, machine) == 3
    # Those that still hold in another partition stay.
    await hub.pool.execute("DELETE FROM tuning_start WHERE partition <> $1", partition)
    await AlarmRetention(hub.pool, SystemClock(), kept_days=100, topic="samples").remove()
    assert await hub.pool.fetchval("SELECT count(*) FROM tuning WHERE machine_id = $1", machine) == 3
    await hub.pool.execute("DELETE FROM tuning_start WHERE partition = $1", partition)
    await hub.pool.execute("DELETE FROM horizon WHERE partition = $1", partition)


async def test_a_firm_changes_so_much_an_hour_and_others_go_on(hub: Hub) -> None:
    alarm = await hub.raised(await hub.machine())
    foreign = await hub.raised(await hub.machine(OTHER_FIRM), firm_id=OTHER_FIRM)
    await hub.pool.execute(
        "INSERT INTO tuning (kind, firm_id, machine_id, cause, reason, made, actor, credential_id) "
        "SELECT 'relearn', $1, 0, 'test', '', now(), 'firm', 1 FROM generate_series(1, $2::int)",
        FIRM,
        TUNINGS_AN_HOUR_MAX,
    )
    await hub.post(f"/{alarm.id}/rating", useful=True, status=429)
    await hub.post(f"/{foreign.id}/rating", useful=True, key=hub.other_firm)
    await hub.pool.execute("DELETE FROM tuning WHERE cause = 'test' AND machine_id = 0")
    await hub.post(f"/{alarm.id}/rating", useful=True)


async def test_every_change_is_published_with_the_mark(hub: Hub) -> None:
    alarm = await hub.raised(await hub.machine())
    watched = hub.alarms.WatchAlarms(pb.WatchAlarmsRequest(), metadata=metadata(hub.firm))
    await watched.initial_metadata()
    await hub.post(f"/{alarm.id}/shelve", reason="why not", one_shot=True)
    await hub.post(f"/{alarm.id}/unshelve")
    await hub.post(f"/{alarm.id}/shelve", reason="once more", one_shot=True)
    seen: list[events_pb.AlarmEvent] = []
    async with asyncio.timeout(10):
        while len(seen) < 3:
            event = (await watched.read()).event
            if event.alarm.id == alarm.id and event.change != events_pb.ALARM_CHANGE_RAISED:
                seen.append(event)
    watched.cancel()
    assert [(event.change, event.alarm.suppressed_or_shelved) for event in seen] == [
        (events_pb.ALARM_CHANGE_SHELVED, True),
        (events_pb.ALARM_CHANGE_UNSHELVED, False),
        (events_pb.ALARM_CHANGE_SHELVED, True),
    ]
    assert len({event.event_id for event in seen}) == 3
    assert {event.alarm.correlation_id for event in seen} == {alarm.correlation_id}


async def test_five_thousand_alarms_are_cleared_in_one_call_with_audit(hub: Hub) -> None:
    machine = await hub.machine()
    first = await hub.raised(machine)
    await hub.pool.execute(
        "INSERT INTO alarm SELECT (jsonb_populate_record(a, jsonb_build_object('id', md5($2 || n), 'started', "
        "a.started + n * interval '1 s'))).* FROM alarm a, generate_series(1, $3::int) n WHERE a.id = $1",
        first.id,
        f"{machine}-",
        BULK_MAX - 1,
    )
    rows = await hub.pool.fetch("SELECT id FROM alarm WHERE machine_id = $1", machine)
    ids = [row["id"] for row in rows]
    foreign = await hub.raised(await hub.machine(OTHER_FIRM), firm_id=OTHER_FIRM)
    assert len(ids) == BULK_MAX

    request = pb.AcknowledgeAlarmsRequest(ids=ids[:10], comment="seen")
    acknowledged = await hub.alarms.AcknowledgeAlarms(request, metadata=metadata(hub.firm))
    assert (acknowledged.changed, list(acknowledged.not_found)) == (10, [])
    started = time.monotonic()
    cleared = await hub.post("/clear", ids=[*ids[:-1], foreign.id], comment="the line stood still")
    print(f"{BULK_MAX} alarms cleared in {time.monotonic() - started:.2f} s")
    assert cleared == {"changed": BULK_MAX - 1, "not_found": [foreign.id]}
    assert (await hub.post("/clear", ids=ids, comment="the line stood still"))["changed"] == 1
    assert (await hub.post("/clear", ids=ids, comment="the line stood still"))["changed"] == 0
    audited = await hub.pool.fetchval(
        "SELECT count(*) FROM alarm_change c JOIN alarm a ON a.id = c.alarm_id WHERE machine_id = $1 "
        "AND change = 'cleared' AND c.actor = 'firm' AND credential_id = 1 AND comment = 'the line stood still'",
        machine,
    )
    assert audited == BULK_MAX
    assert not (await hub.get(f"/{foreign.id}", key=hub.operator))["alarm"]["cleared"]
    for bad in ([], [*ids, "0" * 32]):
        await hub.post("/clear", ids=bad, comment="x", status=400)
    await hub.post("/clear", ids=ids[:1], comment=" ", status=400)
    assert (await hub.post("/acknowledge", ids=["x", "é", "\0"]))["not_found"] == ["x", "é", "\0"]


def _requests(alarm: Alarm) -> Sequence[tuple[str, dict[str, Any]]]:
    return (
        (f"/{alarm.id}/comment", {"comment": "x"}),
        (f"/{alarm.id}/assign", {"assignee": "x"}),
        (f"/{alarm.id}/shelve", {"reason": "x", "one_shot": True}),
        (f"/{alarm.id}/unshelve", {}),
        (f"/{alarm.id}/take-out-of-service", {"reason": "x"}),
        (f"/{alarm.id}/return-to-service", {"reason": "x"}),
    )


async def test_other_firms_and_devices_cannot_touch_anything(hub: Hub) -> None:
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    window: dict[str, Any] = {
        "machine_id": machine,
        "starts_us": now_us(),
        "ends_us": now_us() + 3600 * SECOND_US,
        "reason": "x",
    }
    ends = await hub.post("/windows", **window)
    for key, status in ((hub.other_firm, 404), (hub.device, 403), ("wrong", 401)):
        for path, body in _requests(alarm):
            await hub.post(path, key=key, status=status, **body)
        await hub.post("/windows", key=key, status=status, **window)
        await hub.post(f"/windows/{ends['id']}/end", key=key, status=status, reason="x")
    assert (await hub.get("/windows", key=hub.other_firm))["windows"] == []
    assert (await hub.get("/suppressions", key=hub.other_firm))["suppressions"] == []
    await hub.get(f"/windows?firm_id={FIRM}", key=hub.other_firm, status=403)
    assert [change for change, _, _ in await hub.history(alarm)] == ["raised", "suppressed"]


async def test_bad_requests_are_refused_plainly(hub: Hub) -> None:
    machine = await hub.machine()
    alarm = await hub.raised(machine)
    now = now_us()
    hour = 3600 * SECOND_US
    for path, body in (
        (f"/{alarm.id}/comment", {"comment": " "}),
        (f"/{alarm.id}/comment", {"comment": "x" * 2001}),
        (f"/{alarm.id}/comment", {"comment": "\0"}),
        (f"/{alarm.id}/assign", {"assignee": "x" * 201}),
        (f"/{alarm.id}/shelve", {"reason": "", "one_shot": True}),
        (f"/{alarm.id}/shelve", {"reason": "x"}),
        (f"/{alarm.id}/shelve", {"reason": "x", "until_us": now - 1}),
        (f"/{alarm.id}/shelve", {"reason": "x", "until_us": now + SHELVE_S_MAX * SECOND_US + hour}),
        (f"/{alarm.id}/shelve", {"reason": "x", "until_us": 2**63}),
        (f"/{alarm.id}/take-out-of-service", {"reason": ""}),
        (f"/{alarm.id}/take-out-of-service", {"reason": "x", "more": 1}),
        ("/windows", {"machine_id": machine, "starts_us": now, "ends_us": now, "reason": "x"}),
        ("/windows", {"machine_id": machine, "starts_us": now - hour, "ends_us": now - 1, "reason": "x"}),
        ("/windows", {"machine_id": machine, "starts_us": now, "ends_us": now + hour, "reason": ""}),
        (
            "/windows",
            {"machine_id": machine, "starts_us": now, "ends_us": now + WINDOW_S_MAX * SECOND_US + 1, "reason": "x"},
        ),
        ("/windows", {"machine_id": machine, "starts_us": -(2**80), "ends_us": now + hour, "reason": "x"}),
    ):
        assert "reason" in await hub.post(path, status=400, **body), (path, body)
    for machine_id in (0, -1, 2**70, 999_999):
        await hub.post("/windows", status=404, machine_id=machine_id, starts_us=now, ends_us=now + hour, reason="x")
    await hub.post("/windows/x/end", status=404, reason="x")
    for path in ("/windows?machine_id=-1", "/suppressions?firm_id=-1", "?suppressed=perhaps"):
        await hub.get(path, key=hub.operator, status=400)
    request = pb.ListAlarmsRequest(suppressed=pb.SuppressedFilter.ValueType(9))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await hub.alarms.ListAlarms(request, metadata=metadata(hub.firm))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert [change for change, _, _ in await hub.history(alarm)] == ["raised"]


async def test_people_and_the_worker_at_once_lose_nothing(hub: Hub) -> None:
    """Shelving, returning and clearing the same alarms from all sides: every answer is 200 or "send again"."""
    machine = await hub.machine()
    alarms = [await hub.raised(machine, position=position) for position in range(10)]

    async def press(alarm: Alarm) -> None:
        for path, body in _requests(alarm):
            answer = await hub.http.post(f"/v1/alarms{path}", headers=by(hub.firm), json=body)
            assert answer.status_code in (200, 503), answer.text

    async def clear_all() -> None:
        ids = [alarm.id for alarm in alarms]
        answer = await hub.http.post("/v1/alarms/clear", headers=by(hub.firm), json={"ids": ids, "comment": "all"})
        assert answer.status_code in (200, 503), answer.text

    await asyncio.gather(*(press(alarm) for alarm in alarms), clear_all(), *(hub.returned(alarm) for alarm in alarms))
    await clear_all()
    for alarm in alarms:
        now = await hub.alarm(alarm)
        assert now["cleared"]
        assert not now["active"]
        assert [change for change, _, _ in await hub.history(alarm)].count("cleared") == 1


async def test_the_measures_show_floods_chattering_stale_alarms_and_the_worst_sources(hub: Hub) -> None:
    empty = await hub.get("/measures", key=hub.measured_firm)
    assert (empty["alarms"], empty["worst_sources_share"], empty["hours"]) == (0, 0.0, 24)
    now = now_us()
    machine = next(_machines)

    async def raised(position: int, started_us: int) -> Alarm:
        return await hub.raised(machine, position=position, started_us=started_us, firm_id=MEASURED_FIRM)

    for second in (0, 20, 59):  # three within a minute
        await hub.returned(await raised(0, now - (100 - second) * SECOND_US))
    for second in (0, 30, 60):  # three, but not within one
        await hub.returned(await raised(1, now - (100 - second) * SECOND_US))
    old = await raised(2, now - 25 * 3600 * SECOND_US)
    for position in range(3, 12):
        await raised(position, now)
    hidden = await raised(12, now - 25 * 3600 * SECOND_US)
    await hub.post(f"/{hidden.id}/shelve", key=hub.measured_firm, reason="known", one_shot=True)
    earlier = await raised(13, now - 7200 * SECOND_US)
    await hub.pool.execute("UPDATE alarm SET raised = raised - interval '3 h' WHERE id = $1", earlier.id)

    found = await hub.get("/measures", key=hub.measured_firm)
    assert (found["alarms"], found["low"], found["medium"], found["high"]) == (17, 17, 0, 0)
    assert (found["alarms_10_minutes"], found["flooded"], found["stale"]) == (16, True, 1)
    assert found["alarms_10_minutes_max"] >= 8  # the clock's interval may have changed meanwhile
    assert [source["signal_name"] for source in found["chattering"]] == ["signal-0"]
    assert len(found["worst_sources"]) == 10
    assert found["worst_sources"][0] == {
        "machine_id": machine,
        "machine_path": f"firm-{MEASURED_FIRM}/leeds/press-{machine}",
        "signal_name": "signal-0",
        "alarms": 3,
        "share": 3 / 17,
    }
    assert found["worst_sources_share"] == 14 / 17
    request = pb.GetAlarmMeasuresRequest(firm_id=MEASURED_FIRM, hours=2)
    later = await hub.alarms.GetAlarmMeasures(request, metadata=metadata(hub.operator))
    assert (later.alarms, later.hours, later.flooded, later.stale) == (16, 2, True, 1)
    await hub.post(f"/{old.id}/clear", key=hub.measured_firm, comment="known for long")
    assert (await hub.get("/measures", key=hub.measured_firm))["stale"] == 0

    async def is_shown() -> bool:
        async with httpx.AsyncClient(base_url=hub.api.http) as client:
            text = (await client.get("/metrics")).text
        most = [line for line in text.splitlines() if 'alarms_10_minutes{quantile="1.0"}' in line]
        assert "firm_id" not in text
        return bool(most) and float(most[0].split()[-1]) >= 16

    await eventually(is_shown, deadline_s=30)


async def test_measures_are_refused_plainly_and_only_of_the_own_firm(hub: Hub) -> None:
    await hub.get("/measures", key=hub.operator, status=400)
    await hub.get(f"/measures?firm_id={2**70}", key=hub.operator, status=400)
    await hub.get("/measures?hours=169", status=400)
    await hub.get(f"/measures?firm_id={FIRM}", key=hub.other_firm, status=403)
    await hub.get("/measures", key=hub.device, status=403)
