"""What firms say and write themselves: ratings, changed sensors, rules, and what shows an alarm; on all real processes."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from localstack.hub import Hub
from localstack.servers import Servers
from services.anomaly.domain import Alarm, Severity, alarm_id
from services.anomaly.rules import RULES_OF_SIGNAL_MAX
from services.anomaly.store import Actor, AlarmStore
from services.anomaly.tuning_store import NewTuning, TuningStore
from services.anomaly.tunings import (
    MACHINE_POSITION,
    STEP_NOT_USEFUL,
    THRESHOLD_OFFSET_MAX,
    THRESHOLD_OFFSET_MIN,
    Rule,
    RuleKind,
    TuningKind,
)
from services.common.database import Pool, create_pool, transaction
from services.common.settings import Settings
from smdih.anomaly.v1 import anomaly_pb2 as pb
from smdih.anomaly.v1 import anomaly_pb2_grpc as pb_grpc
from smdih.anomaly.v1 import rules_pb2, rules_pb2_grpc
from smdih_client import TelemetryClient
from tests.alarms import ALARM
from tests.polling import eventually

S = 1_000_000


@dataclass
class Works:
    """A firm with machines of two signals on a running hub."""

    hub: Hub
    http: httpx.AsyncClient  # of the alarms, by the firm's key
    operator: httpx.AsyncClient  # of the registry
    channel: grpc.aio.Channel
    pool: Pool
    firm_id: int
    site_id: int
    key: str
    device: str
    other: str
    machines: int = 0

    async def machine(self) -> dict[str, Any]:
        self.machines += 1
        signals = [{"name": "temperature", "unit": "degC"}, {"name": "current", "unit": "A"}]
        name = f"press-{self.machines}"
        body = {"site_id": self.site_id, "path": name, "name": name, "kind": "press", "signals": signals}
        answer = await self.operator.post("/v1/machines", json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def send(self, machine: dict[str, Any], values: NDArray[np.float64], *, start_us: int) -> None:
        """A frame a second."""
        times = start_us + np.arange(len(values)) * S
        async with TelemetryClient(self.hub.processes["door"].grpc, self.device, source=f"g-{start_us}") as client:
            for at in range(0, len(values), 20):
                await client.send(machine["path"], times[at : at + 20], values[at : at + 20])
            await client.flush()
            assert client.totals.quarantined == 0

    async def call(self, method: str, path: str, *, status: int = 200, key: str = "", **body: Any) -> Any:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        given: dict[str, Any] = {"json": body} if method in ("POST", "PUT") else {"params": body}
        answer = await self.http.request(method, path, headers=headers, **given)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def alarms(self, machine: dict[str, Any]) -> list[dict[str, Any]]:
        page = await self.call("GET", "/v1/alarms", machine_id=machine["id"])
        return list(reversed(page["alarms"]))

    async def raised(self, machine: dict[str, Any], *, started_us: int = 0) -> Alarm:
        """An alarm as the worker stores it."""
        started_us = started_us or time.time_ns() // 1000
        alarm = replace(
            ALARM,
            id=alarm_id(machine_id=machine["id"], position=0, started_us=started_us),
            firm_id=self.firm_id,
            machine_id=machine["id"],
            signal_id=machine["signals"][0]["id"],
            machine_path=machine["path"],
            started_us=started_us,
            component="record",
            explanation="too high",
            figures=(("expected", 1.5),),
        )
        async with transaction(self.pool) as connection:
            stored = await AlarmStore().raise_alarm(connection, alarm, now_us=time.time_ns() // 1000)
        assert stored is not None
        return stored


@pytest_asyncio.fixture(scope="module")
async def works(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Works]:
    own = Servers(settings.kafka_bootstrap, settings.database_dsn)
    roles = ("door", "historian", "anomaly-worker", "anomaly")
    hub = Hub(own, Path(tmp_path_factory.mktemp("hub")), topic_prefix=settings.kafka_topic_prefix, roles=roles)
    try:
        await hub.start()
        door = hub.processes["door"].http
        operator = httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {hub.operator_key}"})

        async def made(path: str, **body: Any) -> Any:
            answer = await operator.post(path, json=body)
            assert answer.status_code == 201, answer.text
            return answer.json()

        firms = [
            (await made("/v1/firms", name=name, slug=name, sic="25.62", region="Wales", size="small"))["id"]
            for name in ("acme", "other")
        ]
        site = await made("/v1/sites", firm_id=firms[0], slug="leeds", name="Leeds")
        keys = [
            (await made("/v1/credentials", role=role, firm_id=firm))["key"]
            for role, firm in (("firm", firms[0]), ("device", firms[0]), ("firm", firms[1]))
        ]
        pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=2)
        client = httpx.AsyncClient(
            base_url=hub.processes["anomaly"].http, headers={"Authorization": f"Bearer {keys[0]}"}, timeout=30
        )
        async with client, grpc.aio.insecure_channel(hub.processes["anomaly"].grpc) as channel:

            async def keys_known() -> bool:
                return (
                    await client.get("/v1/alarms", headers={"authorization": f"Bearer {keys[2]}"})
                ).status_code == 200

            await eventually(keys_known)
            yield Works(hub, client, operator, channel, pool, firms[0], site["id"], *keys)
        await operator.aclose()
        await pool.close()
    finally:
        await hub.stop()


def minute_ago_us(minutes: int) -> int:
    return int(time.time()) // 60 * 60 * S - minutes * 60 * S


def calm(rows: int, seed: int = 1) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.array([60.0, 10.0]) + np.random.default_rng(seed).normal(
        size=(rows, 2)
    ) * np.array([0.5, 0.3])
    return values


async def test_ratings_move_the_threshold_and_are_taken_back(works: Works) -> None:
    machine = await works.machine()
    alarm = await works.raised(machine)
    rating = f"/v1/alarms/{alarm.id}/rating"
    for _ in range(2):  # a repeat changes nothing
        now = await works.call("POST", rating, useful=False, comment="was cleaning")
    assert now["threshold"]["offset"] == STEP_NOT_USEFUL
    assert now["threshold"]["signal_name"] == "temperature"
    assert [(entry["cause"], entry["reason"]) for entry in now["history"]] == [("rated_not_useful", "was cleaning")]
    now = await works.call("POST", rating, useful=True)
    assert now["threshold"]["offset"] < 0
    now = await works.call("POST", rating, useful=None)
    assert now["threshold"]["offset"] == 0
    assert now["useful"] is None
    others = [await works.raised(machine, started_us=alarm.started_us + n * S) for n in range(1, 8)]
    for other in others:
        now = await works.call("POST", f"/v1/alarms/{other.id}/rating", useful=False)
    assert now["threshold"]["offset"] == now["threshold"]["offset_max"] == THRESHOLD_OFFSET_MAX
    (listed,) = (await works.call("GET", "/v1/alarms/thresholds", machine_id=machine["id"]))["thresholds"]
    assert listed["not_useful"] == 7
    now = await works.call("POST", f"/v1/alarms/{alarm.id}/threshold/reset", comment="too quiet now")
    assert (now["threshold"]["offset"], now["threshold"]["not_useful"]) == (0, 0)
    assert now["history"][0]["cause"] == "reset"
    assert (await works.call("GET", "/v1/alarms/thresholds", machine_id=machine["id"]))["thresholds"] == []
    # What was said before a reset counts no more; what is said again does.
    now = await works.call("POST", f"/v1/alarms/{others[0].id}/rating", useful=True)
    assert now["threshold"]["offset"] > THRESHOLD_OFFSET_MIN
    assert now["threshold"]["useful"] == 1

    stub: Any = pb_grpc.AlarmServiceStub(works.channel)
    by = (("authorization", f"Bearer {works.key}"),)
    answer = await stub.RateAlarm(pb.RateAlarmRequest(id=alarm.id, usefulness=pb.USEFULNESS_NOT_USEFUL), metadata=by)
    assert answer.threshold.not_useful == 1
    answer = await stub.GetThreshold(pb.GetThresholdRequest(alarm_id=alarm.id), metadata=by)
    assert answer.usefulness == pb.USEFULNESS_NOT_USEFUL
    assert answer.history[0].cause == "rated_not_useful"


async def test_nobody_else_may_rate_relearn_write_rules_or_look(works: Works) -> None:
    machine = await works.machine()
    alarm = await works.raised(machine)
    rule = {"machine_id": machine["id"], "signal_id": machine["signals"][0]["id"], "kind": "above", "name": "x"}
    made = await works.call("POST", "/v1/rules", status=201, limit=99, **rule)
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", f"/v1/alarms/{alarm.id}/rating", {"useful": True}),
        ("GET", f"/v1/alarms/{alarm.id}/threshold", {}),
        ("POST", f"/v1/alarms/{alarm.id}/threshold/reset", {}),
        ("GET", f"/v1/alarms/{alarm.id}/explain", {}),
        ("GET", f"/v1/alarms/{alarm.id}/picture", {}),
        ("POST", "/v1/alarms/relearn", {"machine_id": machine["id"], "reason": "new sensor"}),
        (
            "GET",
            "/v1/alarms/tunings",
            {"machine_id": machine["id"], "signal_id": machine["signals"][0]["id"]},
        ),
        ("POST", "/v1/rules", rule),
        ("POST", "/v1/rules/preview", rule),
        ("GET", f"/v1/rules/{made['id']}", {}),
        ("PUT", f"/v1/rules/{made['id']}", rule),
        ("POST", f"/v1/rules/{made['id']}/stop", {}),
    ]
    for method, path, body in calls:
        await works.call(method, path, key=works.other, status=404, **body)
        await works.call(method, path, key=works.device, status=403, **body)
        await works.call(method, path, key="nobody", status=401, **body)
    for path in ("/v1/rules", "/v1/alarms/thresholds"):
        await works.call("GET", path, key=works.device, status=403)
        await works.call("GET", path, key=works.other, status=403, firm_id=works.firm_id)
    assert (await works.call("GET", "/v1/rules", key=works.other))["rules"] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "above", "window_s": 5},
        {"kind": "above", "delay_s": 100_000},
        {"kind": "above", "hysteresis": -1},
        {"kind": "above", "signal_id": 0},
        {"kind": "rise", "limit": 1},
        {"kind": "rise", "limit": 0, "window_s": 60},
        {"kind": "fall", "limit": 1, "window_s": 60, "delay_s": 1},
        {"kind": "no_data", "window_s": 1},
        {"kind": "no_data", "window_s": 60, "limit": 1},
        {"name": " "},
    ],
)
async def test_a_rule_that_makes_no_sense_is_refused_with_the_reason(works: Works, wrong: dict[str, Any]) -> None:
    machine = await works.machine()
    body = {"machine_id": machine["id"], "signal_id": machine["signals"][0]["id"], "kind": "above", "name": "x"}
    answer = await works.call("POST", "/v1/rules", status=400, **(body | wrong))
    assert len(answer["detail"]) > 20


async def test_a_rule_is_tried_written_changed_and_stopped(works: Works) -> None:
    machine = await works.machine()
    signal = machine["signals"][0]["id"]
    values = calm(600)
    values[200:230, 0] += 10
    values[400:420, 0] += 10
    await works.send(machine, values, start_us=minute_ago_us(30))
    rule = {
        "machine_id": machine["id"],
        "signal_id": signal,
        "kind": "above",
        "name": "too hot",
        "limit": 65,
        "hysteresis": 2,
        "delay_s": 5,
        "severity": "high",
    }

    async def would_have_raised_two() -> bool:
        return bool((await works.call("POST", "/v1/rules/preview", **rule))["count"] == 2)

    await eventually(would_have_raised_two)
    tried = await works.call("POST", "/v1/rules/preview", **rule)
    assert tried["samples"] == 600
    start = tried["alarms"][0]["started_us"]
    assert start == minute_ago_us(30) + 200 * S or start == minute_ago_us(31) + 200 * S

    made = await works.call("POST", "/v1/rules", status=201, **rule)
    hot = calm(60, seed=2)
    hot[20:, 0] += 10
    await works.send(machine, hot, start_us=minute_ago_us(15))

    async def by_rule() -> list[dict[str, Any]]:
        return [alarm for alarm in await works.alarms(machine) if alarm["rule_id"]]

    async def is_raised() -> bool:
        return bool(await by_rule())

    await eventually(is_raised)
    (alarm,) = await by_rule()
    assert (alarm["rule_id"], alarm["rule_version"], alarm["component"]) == (made["id"], 1, "above")
    assert (alarm["severity"], alarm["active"], alarm["signal_name"]) == ("high", True, "temperature")
    assert "is above 65 degC for 5 s: rule too hot" in alarm["explanation"]
    refused = await works.call("POST", f"/v1/alarms/{alarm['id']}/rating", status=409, useful=False)
    assert refused["reason"] == "ALARM_OF_A_RULE"

    changed = await works.call("PUT", f"/v1/rules/{made['id']}", **(rule | {"limit": 80, "version": 1}))
    assert changed["version"] == 2
    assert (await works.call("PUT", f"/v1/rules/{made['id']}", **(rule | {"limit": 80})))["version"] == 2
    await works.call("PUT", f"/v1/rules/{made['id']}", status=409, **(rule | {"limit": 90, "version": 1}))

    async def has_ended() -> bool:  # with its version, though no sample follows
        return [alarm["active"] for alarm in await by_rule()] == [False]

    await eventually(has_ended)
    for _ in range(2):
        stopped = await works.call("POST", f"/v1/rules/{made['id']}/stop", reason="not needed")
    assert not stopped["enabled"]
    detail = await works.call("GET", f"/v1/rules/{made['id']}")
    assert [entry["cause"] for entry in detail["history"]] == ["rule_stopped", "rule_written", "rule_written"]
    stub: Any = rules_pb2_grpc.RuleServiceStub(works.channel)
    by = (("authorization", f"Bearer {works.key}"),)
    found = await stub.ListRules(rules_pb2.ListRulesRequest(machine_id=machine["id"]), metadata=by)
    assert [(one.id, one.version, one.enabled) for one in found.rules] == [(made["id"], 2, False)]
    text = found.rules[0].text
    text.limit = 65
    answer = await stub.PreviewRule(rules_pb2.PreviewRuleRequest(text=text), metadata=by)
    assert answer.count == 3


async def test_silence_is_told_without_any_record_and_ends_with_the_next(works: Works) -> None:
    machine = await works.machine()
    await works.send(machine, calm(20), start_us=minute_ago_us(5))
    # Past the service, which asks for half a minute at least: that is long for a test.
    rule = Rule(
        id=uuid.uuid4().hex,
        version=1,
        firm_id=works.firm_id,
        machine_id=machine["id"],
        position=MACHINE_POSITION,
        kind=RuleKind.NO_DATA,
        name="silent",
        severity=Severity.LOW,
        window_s=1,
    )
    new = NewTuning(
        kind=TuningKind.RULE,
        firm_id=works.firm_id,
        machine_id=machine["id"],
        position=MACHINE_POSITION,
        cause="rule_written",
        reason="",
        rule_id=rule.id,
        rule=rule,
    )
    async with transaction(works.pool) as connection:
        await TuningStore().lock(connection)
        await TuningStore().add(connection, new, now_us=time.time_ns() // 1000, actor=Actor())

    async def silent() -> bool:
        return [alarm["component"] for alarm in await works.alarms(machine)] == ["no_data"]

    await eventually(silent)
    await works.send(machine, calm(1), start_us=minute_ago_us(1))

    async def heard_again() -> bool:
        return [alarm["active"] for alarm in await works.alarms(machine)] == [False]

    await eventually(heard_again)


async def test_an_alarm_is_explained_and_drawn(works: Works) -> None:
    machine = await works.machine()
    start = minute_ago_us(20)
    values = calm(600)
    values[500:, 0] += 20
    await works.send(machine, values, start_us=start)

    async def is_raised() -> bool:
        return bool(await works.alarms(machine))

    await eventually(is_raised)
    alarm = (await works.alarms(machine))[0]

    async def is_stored() -> bool:
        found = await works.call("GET", f"/v1/alarms/{alarm['id']}/explain", minutes=20)
        return bool(found["tracks"] and len(found["tracks"][0]["times_us"]) == 600)

    await eventually(is_stored)
    found = await works.call("GET", f"/v1/alarms/{alarm['id']}/explain", minutes=20)
    (track,) = found["tracks"]
    assert track["signal_name"] == "temperature"
    np.testing.assert_allclose(track["values"], values[:, 0])
    assert {"expected", "distance"} <= set(found["figures"])
    assert found["alarm"]["component"]
    picture = await works.http.get(f"/v1/alarms/{alarm['id']}/picture", params={"minutes": 20})
    assert picture.headers["content-type"].startswith("image/svg+xml")
    assert picture.text.count("L") > 500
    stub: Any = pb_grpc.AlarmServiceStub(works.channel)
    by = (("authorization", f"Bearer {works.key}"),)
    answer = await stub.ExplainAlarm(pb.ExplainAlarmRequest(id=alarm["id"], minutes=5), metadata=by)
    assert 300 <= len(answer.tracks[0].values) <= 600
    assert not answer.samples_missing

    await works.call(
        "POST", "/v1/alarms/relearn", status=204, machine_id=machine["id"], signal_id=track["signal_id"], reason="new"
    )

    async def has_ended() -> bool:
        return not any(alarm["active"] for alarm in await works.alarms(machine))

    await eventually(has_ended)
    told = await works.call("GET", "/v1/alarms/tunings", machine_id=machine["id"], signal_id=track["signal_id"])
    assert [(entry["cause"], entry["reason"]) for entry in told["tunings"]] == [("sensor_changed", "new")]


async def test_whoever_watches_again_misses_nothing(works: Works) -> None:
    machine = await works.machine()
    stub: Any = pb_grpc.AlarmServiceStub(works.channel)
    by = (("authorization", f"Bearer {works.key}"),)

    async def published() -> bool:
        async with works.pool.acquire() as connection:
            return not await connection.fetchval("SELECT count(*) FROM outbox")

    await eventually(published)
    start = time.time_ns() // 1000
    watching = stub.WatchAlarms(pb.WatchAlarmsRequest(), metadata=by)
    await watching.initial_metadata()
    first = await works.raised(machine, started_us=start)
    heard = await watching.read()
    assert heard.event.alarm.id == first.id
    watching.cancel()
    missed = [await works.raised(machine, started_us=start + n * S) for n in range(1, 4)]

    await eventually(published)
    again = stub.WatchAlarms(pb.WatchAlarmsRequest(resume_token=heard.resume_token), metadata=by)
    got = [(await asyncio.wait_for(again.read(), 10)).event.alarm.id for _ in missed]
    assert sorted(got) == sorted(alarm.id for alarm in missed)
    live = await works.raised(machine, started_us=start + 9 * S)
    assert (await asyncio.wait_for(again.read(), 10)).event.alarm.id == live.id
    again.cancel()

    headers = {"last-event-id": heard.resume_token}
    async with works.http.stream("GET", "/v1/alarms/watch", headers=headers) as answer:
        seen: list[tuple[str, str]] = []
        id_ = ""
        async for line in answer.aiter_lines():
            if line.startswith("id: "):
                id_ = line[4:]
            if line.startswith("data: "):
                seen.append((id_, json.loads(line[6:])["alarm"]["id"]))
            if len(seen) == 4:
                break
    assert sorted(alarm for _, alarm in seen) == sorted(alarm.id for alarm in [*missed, live])
    assert seen[-1][0] != heard.resume_token
    for wrong in ("x", "1.2", "1." * 5000 + "1"):
        answer = await works.http.get("/v1/alarms/watch", headers={"last-event-id": wrong})
        assert answer.status_code == 400, answer.text


async def test_a_signal_has_a_limited_number_of_rules(works: Works) -> None:
    """The worker looks at each of them for every sample of it."""
    machine = await works.machine()
    rule = {"machine_id": machine["id"], "kind": "above", "name": "many", "limit": 1e6}
    for number in range(RULES_OF_SIGNAL_MAX):
        await works.call("POST", "/v1/rules", status=201, signal_id=machine["signals"][0]["id"], **rule)
        if number == 0:
            await works.call("POST", "/v1/rules", status=201, signal_id=machine["signals"][1]["id"], **rule)
    refused = await works.call("POST", "/v1/rules", status=409, signal_id=machine["signals"][0]["id"], **rule)
    assert refused["reason"] == "TOO_MANY_RULES"
