"""Samples in, alarms out, on a real broker and database, through the real processes."""

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import asyncpg
import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition

from services.anomaly.domain import Severity
from services.anomaly.raiser import AlarmRaiser
from services.anomaly.rulebook import RuleEvent
from services.anomaly.scorer import Found, Frames
from services.anomaly.store import AlarmStore, Checkpoint, SavedState, StateStore
from services.anomaly.tunings import Rule, RuleKind
from services.common import topics
from services.common.clock import SystemClock
from services.common.database import create_pool
from services.common.directory import Directory, entity_key
from services.common.identity import Role
from services.common.kafka import Cluster, Fenced, MadeAnew, Position, Publisher
from services.common.settings import Settings
from smdih.anomaly.v1 import anomaly_pb2 as pb
from smdih.anomaly.v1 import anomaly_pb2_grpc as pb_grpc
from smdih.anomaly.v1 import events_pb2 as events_pb
from tests import anomaly_plant as plant
from tests.polling import eventually

FIRM, OTHER_FIRM = 7, 8
MACHINE, SIBLING = 1, 2

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@dataclass
class Hub:
    """The service at work, and the keys of those who use it."""

    worker: plant.Process
    api: plant.Process
    http: httpx.AsyncClient
    alarms: Any
    firm: str
    other_firm: str
    operator: str
    device: str


@pytest_asyncio.fixture(scope="module")
async def database(settings: Settings) -> AsyncIterator[Database]:
    connection = await asyncpg.connect(settings.database_dsn, server_settings={"search_path": "anomaly"})
    yield connection
    await connection.close()


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, publisher: Publisher, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hub]:
    logs = tmp_path_factory.mktemp("logs")
    for machine in (MACHINE, SIBLING):
        await plant.publish_machine(publisher, machine_id=machine, firm_id=FIRM)
    keys = {
        "firm": await plant.publish_key(publisher, credential_id=1, role=Role.FIRM, firm_id=FIRM),
        "other_firm": await plant.publish_key(publisher, credential_id=2, role=Role.FIRM, firm_id=OTHER_FIRM),
        "operator": await plant.publish_key(publisher, credential_id=3, role=Role.OPERATOR),
        "device": await plant.publish_key(publisher, credential_id=4, role=Role.DEVICE, firm_id=FIRM),
    }
    async with (
        plant.running("worker", settings, logs / "worker.log") as worker,
        plant.running("api", settings, logs / "api.log") as api,
        httpx.AsyncClient(base_url=api.http) as client,
        grpc.aio.insecure_channel(api.grpc) as channel,
    ):
        yield Hub(worker, api, client, pb_grpc.AlarmServiceStub(channel), **keys)


def by(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def metadata(key: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"),)


async def published(cluster: Cluster, topic: str) -> Sequence[Any]:
    """Everything in a topic."""
    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        name = cluster.name(topic)
        await consumer._client.force_metadata_update()
        partitions = [TopicPartition(name, number) for number in consumer.partitions_for_topic(name) or ()]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ends = await consumer.end_offsets(partitions)
        records: list[Any] = []
        while len(records) < sum(ends.values()):
            for found in (await consumer.getmany(timeout_ms=200)).values():
                records.extend(found)
        return records
    finally:
        await consumer.stop()


async def send(publisher: Publisher, records: Sequence[bytes], *, partition: int = 1) -> None:
    for record in records:
        await publisher.publish(topics.SAMPLES, record, partition=partition)


@pytest_asyncio.fixture(scope="module")
async def alarm(hub: Hub, publisher: Publisher, database: Database) -> Any:
    """The alarm of a fault in one signal of one of two machines, watched from before it happened."""
    watched = hub.alarms.WatchAlarms(pb.WatchAlarmsRequest(), metadata=metadata(hub.firm))
    await watched.initial_metadata()
    values = {MACHINE: plant.with_fault(1), SIBLING: plant.calm(2)}
    await send(publisher, plant.records_of(values, firm_id=FIRM, step=20))
    async with asyncio.timeout(30):
        event = (await watched.read()).event
    watched.cancel()
    return event


async def test_a_fault_becomes_one_alarm_with_its_explanation(
    hub: Hub, alarm: events_pb.AlarmEvent, cluster: Cluster, database: Database
) -> None:
    async def all_taken() -> bool:
        return bool(await database.fetchval("SELECT next_offset = 30 FROM position WHERE partition = 1"))

    await eventually(all_taken)
    assert await database.fetchval("SELECT count(*) FROM alarm") == 1
    raised = [
        event
        for record in await published(cluster, topics.ALARMS)
        if (event := events_pb.AlarmEvent.FromString(record.value)).change == events_pb.ALARM_CHANGE_RAISED
    ]
    assert raised == [alarm]
    assert alarm.alarm.machine_id == MACHINE
    assert alarm.alarm.machine_path == f"firm-{FIRM}/leeds/press-{MACHINE}"
    assert alarm.alarm.signal_id == MACHINE * 1000
    assert alarm.alarm.started_us == plant.START_US + plant.FAULT_ROW * plant.SECOND_US
    assert alarm.alarm.explanation.startswith("temperature ")
    assert "degC" in alarm.alarm.explanation
    assert alarm.alarm.correlation_id == "test"
    assert alarm.alarm.episode_id == alarm.alarm.id
    assert alarm.alarm.active
    async with httpx.AsyncClient(base_url=hub.worker.http) as client:
        metrics = (await client.get("/metrics")).text
    samples = 2 * plant.ROWS * len(plant.SIGNALS)
    assert f"smdih_anomaly_samples_scored_total {float(samples)}" in metrics


async def test_alarms_are_listed_with_filters_and_pages(hub: Hub, alarm: events_pb.AlarmEvent) -> None:
    for query, count in (
        ("", 1),
        (f"machine_id={MACHINE}", 1),
        (f"machine_id={SIBLING}", 0),
        ("unacknowledged=true", 1),
        (f"since_us={alarm.alarm.started_us}", 1),
        (f"since_us={alarm.alarm.started_us + 1}", 0),
        ("page_size=1", 1),
    ):
        answer = await hub.http.get(f"/v1/alarms?{query}", headers=by(hub.firm))
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["alarms"]) == count, query
        assert answer.json()["next_page_token"] == ""
    listed = await hub.alarms.ListAlarms(pb.ListAlarmsRequest(), metadata=metadata(hub.operator))
    assert [found.id for found in listed.alarms] == [alarm.alarm.id]


@pytest.mark.parametrize(
    "query",
    [
        "machine_id=-1",
        f"machine_id={2**63}",
        "machine_id=x",
        "page_size=1001",
        "page_size=-1",
        "page_token=x",
        f"page_token={'9' * 18}.{'a' * 32}",
        f"since_us={2**63 - 1}",
        f"since_us={-(2**63)}",
        "active=perhaps",
    ],
)
async def test_a_bad_question_is_refused_plainly(hub: Hub, query: str) -> None:
    answer = await hub.http.get(f"/v1/alarms?{query}", headers=by(hub.operator))
    assert answer.status_code == 400, answer.text
    assert answer.json()["reason"] == "INVALID"


async def test_alarms_of_other_firms_cannot_be_seen_or_changed(hub: Hub, alarm: events_pb.AlarmEvent) -> None:
    path = f"/v1/alarms/{alarm.alarm.id}"
    for key, status in ((hub.other_firm, 404), (hub.device, 403), ("wrong", 401)):
        answers = [
            await hub.http.get(path, headers=by(key)),
            await hub.http.post(f"{path}/acknowledge", headers=by(key), json={}),
            await hub.http.post(f"{path}/clear", headers=by(key), json={"comment": "mine now"}),
        ]
        assert [answer.status_code for answer in answers] == [status] * 3
    assert (await hub.http.get("/v1/alarms", headers=by(hub.other_firm))).json()["alarms"] == []
    assert (await hub.http.get(f"/v1/alarms?firm_id={FIRM}", headers=by(hub.other_firm))).status_code == 403
    for call, request in (
        (hub.alarms.GetAlarm, pb.GetAlarmRequest(id=alarm.alarm.id)),
        (hub.alarms.AcknowledgeAlarm, pb.AcknowledgeAlarmRequest(id=alarm.alarm.id)),
        (hub.alarms.ClearAlarm, pb.ClearAlarmRequest(id=alarm.alarm.id, comment="mine now")),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request, metadata=metadata(hub.other_firm))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("alarm_id", ["0" * 32, "x", "%00", "a" * 300, "é"])
async def test_an_unknown_alarm_is_not_found(hub: Hub, alarm_id: str) -> None:
    assert (await hub.http.get(f"/v1/alarms/{alarm_id}", headers=by(hub.operator))).status_code == 404


async def test_people_acknowledge_and_clear_once_and_it_is_recorded(
    hub: Hub, alarm: events_pb.AlarmEvent, cluster: Cluster, database: Database, publisher: Publisher
) -> None:
    id_ = alarm.alarm.id
    passing = await plant.publish_key(publisher, credential_id=9, role=Role.FIRM, firm_id=FIRM)

    async def answers(status: int) -> bool:
        return (await hub.http.get("/v1/alarms", headers=by(passing))).status_code == status

    await eventually(lambda: answers(200))
    async with (
        hub.http.stream("GET", "/v1/alarms/watch", headers=by(hub.firm)) as stream,
        hub.http.stream("GET", "/v1/alarms/watch", headers=by(passing)) as stale,
    ):
        lines, stale_lines = stream.aiter_lines(), stale.aiter_lines()
        assert await anext(lines) == await anext(stale_lines) == ": watching"
        await publisher.publish(topics.DIRECTORY, None, key=entity_key("credential", 9).encode())
        await eventually(lambda: answers(401))
        for _ in range(2):
            request = pb.AcknowledgeAlarmRequest(id=id_, comment="on my way")
            answer = await hub.alarms.AcknowledgeAlarm(request, metadata=metadata(hub.firm))
            assert answer.alarm.acknowledged
            assert not answer.alarm.cleared
        async with asyncio.timeout(10):
            while "data:" not in (line := await anext(lines)):
                pass
        assert '"change":"acknowledged"' in line
        assert id_ in line
        async with asyncio.timeout(10):
            told = [line async for line in stale_lines if line]
    # A watcher hears nothing more once its key is revoked.
    assert told[0] == "event: problem"
    assert told[1].startswith("data: KEY_REVOKED")
    assert len(told) == 2
    refused = await hub.http.post(f"/v1/alarms/{id_}/clear", headers=by(hub.firm), json={"comment": " "})
    assert refused.json()["reason"] == "COMMENT_MISSING"
    for _ in range(2):
        cleared = await hub.http.post(
            f"/v1/alarms/{id_}/clear", headers=by(hub.operator), json={"comment": "bearing changed"}
        )
        assert cleared.status_code == 200
        assert cleared.json()["cleared"]
    detail = (await hub.http.get(f"/v1/alarms/{id_}", headers=by(hub.firm))).json()
    history = [
        (entry["change"], entry["actor"], entry["credential_id"], entry["comment"]) for entry in detail["changes"]
    ]
    assert history[0] == ("raised", "detector", 0, "")
    assert [entry for entry in history if entry[0] in ("acknowledged", "cleared")] == [
        ("acknowledged", "firm", 1, "on my way"),
        ("cleared", "operator", 3, "bearing changed"),
    ]

    async def all_published() -> bool:
        return not await database.fetchval("SELECT count(*) FROM outbox")

    await eventually(all_published)
    events = [events_pb.AlarmEvent.FromString(record.value) for record in await published(cluster, topics.ALARMS)]
    assert len({event.event_id for event in events}) == len(history)
    assert {record.key for record in await published(cluster, topics.ALARMS)} == {id_.encode()}


async def test_a_fault_in_several_signals_is_one_episode(hub: Hub, publisher: Publisher, database: Database) -> None:
    machine = 3
    await plant.publish_machine(publisher, machine_id=machine, firm_id=FIRM)
    values = plant.with_fault(3, column=0)
    values[plant.FAULT_ROW + 3 :, 1] += 8.0
    await send(publisher, plant.records_of({machine: values}, firm_id=FIRM, step=20))

    async def both() -> bool:
        positions = await database.fetch("SELECT position FROM alarm WHERE machine_id = $1", machine)
        return {0, 1} <= {row["position"] for row in positions}

    await eventually(both)
    episodes = await database.fetch("SELECT DISTINCT episode_id FROM alarm WHERE machine_id = $1", machine)
    first = await database.fetchval("SELECT id FROM alarm WHERE machine_id = $1 AND position = 0", machine)
    assert [row["episode_id"] for row in episodes] == [first]


async def test_a_poisoned_record_goes_to_the_dead_letters_and_work_goes_on(
    hub: Hub, publisher: Publisher, cluster: Cluster, database: Database
) -> None:
    await publisher.publish(topics.SAMPLES, b"\xff\xff\xff", partition=2)
    record = plant.records_of({4: plant.calm(4, rows=10)}, firm_id=FIRM, step=10)
    await send(publisher, record, partition=2)

    async def passed() -> bool:
        return bool(await database.fetchval("SELECT next_offset = 2 FROM position WHERE partition = 2"))

    await eventually(passed)
    dead = (await published(cluster, topics.SAMPLES + topics.DEAD_LETTERS_SUFFIX))[0]
    assert dead.value == b"\xff\xff\xff"
    headers = {name: value.decode() for name, value in dead.headers}
    assert headers["partition"] == "2"
    assert headers["offset"] == "0"
    assert headers["reason"] == "MALFORMED"


async def test_the_largest_number_there_is_stops_nobody(hub: Hub, publisher: Publisher, database: Database) -> None:
    """Drivers say "none" by it; squared it is no number any more, and no alarm can be stored with that."""
    await plant.publish_machine(publisher, machine_id=31, firm_id=FIRM)
    values = plant.with_fault(31, column=2)
    values[400, 1], values[401, 0] = 1.7e308, 1e160
    await send(publisher, plant.records_of({31: values}, firm_id=FIRM, step=50), partition=3)

    async def raised() -> bool:
        return bool(await database.fetchval("SELECT count(*) FROM alarm WHERE machine_id = 31 AND position = 2"))

    await eventually(raised)


async def test_an_alarm_that_the_database_refuses_holds_up_no_other(settings: Settings, database: Database) -> None:
    sound = Rule(
        id="f" * 32, version=1, firm_id=FIRM, machine_id=32, position=0, kind=RuleKind.ABOVE, name="test", severity=Severity.LOW
    )  # fmt: skip
    of_none: Any = None
    beyond: Any = 4
    wrong = [
        replace(sound, id="1" * 32, severity=beyond),  # breaks a check
        replace(sound, id="2" * 32, firm_id=of_none),
        replace(sound, id="3" * 32, version=2**40),  # is more than its column holds
    ]
    frames = Frames(FIRM, 32, 0, np.zeros(0, dtype=np.int64), np.zeros((0, 1)), 0, "test")
    found = [Found(frames, RuleEvent(rule, True, 2, 1, 60.0, 50.0)) for rule in (*wrong, sound)]
    cluster = Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix)
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=1)
    try:
        clock = SystemClock()
        raiser = AlarmRaiser(AlarmStore(), pool, Directory(cluster, clock=clock, kinds=("machine",)), clock)
        stored = await raiser.store(found)
    finally:
        await pool.close()
    assert [event.alarm.rule_id for event in stored] == [sound.id]
    assert await database.fetchval("SELECT count(*) FROM alarm WHERE machine_id = 32") == 1


async def test_only_the_owner_of_the_position_can_save_states(settings: Settings, database: Database) -> None:
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=2)
    try:
        store = StateStore(pool, topic="test")
        asked: list[TopicPartition] = []

        async def first_offsets(partitions: Collection[TopicPartition]) -> dict[TopicPartition, int]:
            asked.extend(partitions)
            return dict.fromkeys(partitions, 0)

        async def position() -> Position:
            return (await store.positions([0], topic_id="the first", first_offsets=first_offsets))[0]

        assert await position() == Position(0, 0)

        def checkpoint(position: int, state: bytes) -> Checkpoint:
            saved = SavedState(machine_id=1, channel_group=0, next_offset=position, state=state)
            return Checkpoint(partition=0, position=position, states=[saved])

        await store.save(checkpoint(10, b"ten"), expected=0)
        await store.save(checkpoint(10, b"ten"), expected=0)  # the answer to the COMMIT was lost
        with pytest.raises(Fenced):
            await store.save(checkpoint(7, b"seven"), expected=0)  # a process that was thought dead
        assert await position() == Position(10, 0)
        assert asked == [TopicPartition("test", 0)]
        with pytest.raises(MadeAnew):
            await store.positions([0], topic_id="made again", first_offsets=first_offsets)
        for _ in range(2):
            await store.save(checkpoint(12, b"ten"), expected=10, records_lost=2)
        assert await database.fetchval("SELECT records_lost FROM position WHERE topic = 'test'") == 2
        older = SavedState(machine_id=1, channel_group=0, next_offset=9, state=b"nine")
        await store.save(Checkpoint(partition=0, position=12, states=[older]), expected=12)
        assert [saved.state async for saved in store.states(0)] == [b"ten"]
    finally:
        await pool.execute("DELETE FROM detector_state WHERE machine_id = 1 AND state = 'ten'")
        await pool.close()


async def test_probes_and_usage(hub: Hub) -> None:
    for process in (hub.worker, hub.api):
        async with httpx.AsyncClient(base_url=process.http) as client:
            for path in ("/livez", "/readyz", "/metrics"):
                assert (await client.get(path)).status_code == 200
    wrong = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.anomaly.main", "both"),
        cwd=plant.ROOT,
        env=plant.ENVIRONMENT,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await wrong.communicate()
    assert wrong.returncode == 2
    assert said.decode().startswith("usage:")
