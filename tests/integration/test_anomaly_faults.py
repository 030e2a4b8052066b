"""Killing, moving and poisoning the worker: the alarms and the detector's state must be those of an undisturbed run."""

import asyncio
import os
import random
import signal
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import asyncpg
import httpx
import pytest
import pytest_asyncio
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from numpy.typing import NDArray
from prometheus_client import REGISTRY

from services.anomaly.domain import Severity
from services.anomaly.measures import FloodGauge
from services.anomaly.raiser import AlarmRaiser
from services.anomaly.scorer import Scorer, decode
from services.anomaly.store import Actor, AlarmStore
from services.anomaly.tuning_store import HorizonStore, NewTuning, TuningStore
from services.anomaly.tunings import Rule, RuleKind, TuningKind
from services.common import topics
from services.common.clock import SystemClock
from services.common.database import Pool, create_pool, transaction
from services.common.directory import Directory
from services.common.kafka import DEAD_LETTERS_IN_A_ROW_MAX, Cluster, Message, Publisher
from services.common.settings import Settings
from tests import anomaly_plant as plant
from tests.polling import eventually

FIRM = 7
ROUNDS = int(os.environ.get("SMDIH_TEST_KILLS", "3"))
SEED = int(os.environ.get("SMDIH_TEST_SEED", "0")) or random.SystemRandom().randrange(1, 1_000_000)
MACHINES = range(6)
PARTITIONS = 4

ALARMS = (
    "SELECT machine_id - $1 AS number, position, started, ended, severity, component, explanation, value, score, "
    "(SELECT count(*) FROM alarm_change c WHERE c.alarm_id = a.id) AS changes, "
    "(SELECT e.position FROM alarm e WHERE e.id = a.episode_id) AS episode "
    "FROM alarm a WHERE machine_id BETWEEN $1 AND $1 + 99 ORDER BY machine_id, started, position, component"
)

Database: TypeAlias = "asyncpg.Connection[asyncpg.Record]"


@pytest_asyncio.fixture(scope="module")
async def database(settings: Settings) -> AsyncIterator[Database]:
    connection = await asyncpg.connect(settings.database_dsn, server_settings={"search_path": "anomaly"})
    yield connection
    await connection.close()


class Run:
    """The same six machines under other ids, so that two runs can be compared."""

    def __init__(self, publisher: Publisher, database: Database, *, first_id: int) -> None:
        self._publisher = publisher
        self._database = database
        self.first_id = first_id
        self.ends: dict[int, int] = {}

    def machine(self, number: int) -> int:
        return self.first_id + number

    def records(self) -> Sequence[tuple[int, bytes]]:
        """In order, each with its partition."""
        made: list[list[tuple[int, bytes]]] = []
        for partition in range(PARTITIONS):
            machines: dict[int, NDArray[Any]] = {
                self.first_id + number: plant.with_fault(number, column=number % 3)
                for number in MACHINES
                if number % PARTITIONS == partition
            }
            made.append([(partition, record) for record in plant.records_of(machines, firm_id=FIRM, step=4)])
        return [one for together in zip(*made, strict=True) for one in together]

    async def announce(self) -> None:
        for number in MACHINES:
            await plant.publish_machine(self._publisher, machine_id=self.first_id + number, firm_id=FIRM)

    async def send(self, records: Sequence[tuple[int, bytes]]) -> None:
        for partition, record in records:
            self.ends[partition] = 1 + await self._publisher.publish(topics.SAMPLES, record, partition=partition)

    async def taken(self) -> bool:
        rows = await self._database.fetch("SELECT partition, next_offset FROM position")
        positions = {row["partition"]: row["next_offset"] for row in rows}
        return all(positions.get(partition) == end for partition, end in self.ends.items())

    async def alarms(self) -> list[tuple[Any, ...]]:
        rows = await self._database.fetch(ALARMS, self.first_id)
        return [tuple(row) for row in rows]

    async def events(self) -> int:
        """Changes on their way out; no relay runs in these tests."""
        count: int = await self._database.fetchval(
            "SELECT count(*) FROM outbox o JOIN alarm a ON o.key = convert_to(a.id, 'UTF8') "
            "WHERE machine_id BETWEEN $1 AND $1 + 99",
            self.first_id,
        )
        return count

    async def states(self) -> dict[int, bytes]:
        rows = await self._database.fetch(
            "SELECT machine_id - $1 AS number, state FROM detector_state WHERE machine_id BETWEEN $1 AND $1 + 99",
            self.first_id,
        )
        return {row["number"]: row["state"] for row in rows}


@pytest_asyncio.fixture(scope="module")
async def undisturbed(
    settings: Settings, publisher: Publisher, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    run = Run(publisher, database, first_id=100)
    await run.announce()
    async with plant.running("worker", settings, tmp_path_factory.mktemp("logs") / "worker.log"):
        await run.send(run.records())
        await eventually(run.taken)
    alarms = await run.alarms()
    assert {(row[0], row[1]) for row in alarms} >= {(number, number % 3) for number in MACHINES}
    return run


async def assert_same(run: Run, undisturbed: Run) -> None:
    assert await run.alarms() == await undisturbed.alarms()
    assert await run.events() == await undisturbed.events()
    assert await run.states() == await undisturbed.states()


async def test_killing_the_worker_changes_nothing(
    settings: Settings, publisher: Publisher, database: Database, undisturbed: Run, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    dice = random.Random(SEED)
    run = Run(publisher, database, first_id=200)
    await run.announce()
    records = run.records()
    cuts = sorted(dice.sample(range(1, len(records)), ROUNDS - 1))
    fast = {"SMDIH_ANOMALY_CHECKPOINT_INTERVAL_S": "0.02"}
    for round_, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(records)], strict=True)):
        worker = await plant.start_process("worker", settings, tmp_path / f"worker-{round_}.log", **fast)
        sending = asyncio.create_task(run.send(records[start:end]))
        # A random moment of this round's work: what is not taken yet stays for the next.
        await asyncio.wait([sending], timeout=dice.uniform(0.0, 0.8))
        await worker.kill()
        await sending
    async with plant.running("worker", settings, tmp_path / "worker-last.log"):
        await eventually(run.taken, deadline_s=60)
    await assert_same(run, undisturbed)


class Firm:
    """What people do while samples flow, past the API: thresholds, changed sensors and rules, at once or after each other."""

    def __init__(self, pool: Pool, run: Run, dice: random.Random) -> None:
        self._pool = pool
        self._run = run
        self._dice = dice
        self._rule_id = uuid.uuid4().hex
        self.done = 0

    async def begin(self) -> None:
        """One rule from the start, so that there is something to see."""
        rule = self._rule(self._run.machine(0), uuid.uuid4().hex, RuleKind.ABOVE)
        await self._add(self._tuning(TuningKind.RULE, rule.machine_id, 0, rule_id=rule.id, rule=rule))

    async def act(self) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(0.0, 0.05))
            self.done += 1
            await self._add(self._anything())

    async def _add(self, new: NewTuning) -> None:
        async with transaction(self._pool) as connection:
            await TuningStore().lock(connection)
            await TuningStore().add(connection, new, now_us=plant.START_US, actor=Actor())

    def _anything(self) -> NewTuning:
        dice = self._dice
        machine_id, position = self._run.machine(dice.choice(MACHINES)), dice.choice([0, 1, 2])
        # Seldom is a sensor changed: what learns anew all the time has no alarms.
        match dice.choices(["threshold", "rule", "stop", "relearn"], weights=(20, 16, 4, 1))[0]:
            case "threshold":
                offset = dice.choice([-0.6, 0.0, 1.5])
                return self._tuning(TuningKind.THRESHOLD, machine_id, position, threshold_offset=offset)
            case "rule":
                rule = self._rule(machine_id, self._rule_id, dice.choice([RuleKind.ABOVE, RuleKind.BELOW]))
                return self._tuning(TuningKind.RULE, machine_id, 0, rule_id=rule.id, rule=rule)
            case "stop":
                return self._tuning(TuningKind.RULE, machine_id, 0, rule_id=self._rule_id)
        return self._tuning(TuningKind.RELEARN, machine_id, position)

    def _rule(self, machine_id: int, rule_id: str, kind: RuleKind) -> Rule:
        return Rule(
            id=rule_id,
            version=self.done + 1,
            firm_id=FIRM,
            machine_id=machine_id,
            position=0,
            kind=kind,
            name="test",
            severity=Severity.LOW,
            limit=60.5,
        )

    def _tuning(self, kind: TuningKind, machine_id: int, position: int, **fields: Any) -> NewTuning:
        return NewTuning(
            kind=kind, firm_id=FIRM, machine_id=machine_id, position=position, cause="test", reason="", **fields
        )


async def undisturbed_alarms(
    settings: Settings, migrated: str, records: Sequence[tuple[int, bytes]], run: Run
) -> list[Any]:
    """What one worker without any fault stores of these records, with tunings from the same records on."""
    # In a database of its own: not all that the migrations make is in the schema.
    name = f"undisturbed_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(settings.database_dsn)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {migrated}")
    dsn = settings.database_dsn.rpartition("/")[0] + f"/{name}"
    own = await create_pool(dsn, schema="anomaly", size_max=1)
    tuned = await create_pool(settings.database_dsn, schema="anomaly", size_max=1)
    cluster = Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix)
    clock = SystemClock()
    directory = Directory(cluster, clock=clock, kinds=("machine",))
    following = asyncio.create_task(directory.run())
    await directory.wait_caught_up()
    raiser = AlarmRaiser(AlarmStore(), own, directory, clock)
    for partition in range(PARTITIONS):
        mine = [record for number, record in records if number == partition]
        first = run.ends[partition] - len(mine)
        scorer = Scorer(partition, position=first)
        scorer.tune((await HorizonStore(tuned).load(partition, position=first)).tunings)
        for offset, record in enumerate(mine, first):
            taken = scorer.take([(offset, decode(record))])
            if taken.found:
                await raiser.store(taken.found)
        await raiser.store(scorer.settle().found)
    following.cancel()
    rows = await own.fetch(ALARMS, run.first_id)
    await own.close()
    await tuned.close()
    await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    await admin.close()
    return [tuple(row) for row in rows]


async def test_tunings_under_load_and_killing_the_worker_give_the_alarms_of_an_undisturbed_run(
    settings: Settings, migrated: str, publisher: Publisher, database: Database, undisturbed: Run, tmp_path: Path
) -> None:
    print(f"seed {SEED}")
    dice = random.Random(SEED + 1)
    run = Run(publisher, database, first_id=600)
    await run.announce()
    records = run.records()
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=1)
    firm = Firm(pool, run, dice)
    await firm.begin()
    acting = asyncio.create_task(firm.act())
    cuts = sorted(dice.sample(range(1, len(records)), ROUNDS // 2))
    fast = {"SMDIH_ANOMALY_CHECKPOINT_INTERVAL_S": "0.02"}
    for round_, (start, end) in enumerate(zip([0, *cuts], [*cuts, len(records)], strict=True)):
        worker = await plant.start_process("worker", settings, tmp_path / f"worker-{round_}.log", **fast)
        sending = asyncio.create_task(run.send(records[start:end]))
        await asyncio.wait([sending], timeout=dice.uniform(0.0, 0.8))
        await worker.kill()
        await sending
    acting.cancel()
    await asyncio.gather(acting, return_exceptions=True)
    async with plant.running("worker", settings, tmp_path / "worker-last.log", **fast):
        await eventually(run.taken, deadline_s=60)

        async def tuned() -> bool:
            # Tunings of a quiet partition take effect without a record; then nothing changes any more.
            return await run.alarms() == await undisturbed_alarms(settings, migrated, records, run)

        await eventually(tuned)
    await pool.close()
    alarms = await run.alarms()
    print(f"{firm.done} tunings, {len(alarms)} alarms")
    by_rule = [row for row in alarms if row[5] in ("above", "below")]
    assert 0 < len(by_rule) < len(alarms)


async def test_a_second_worker_that_comes_and_goes_changes_nothing(
    settings: Settings, publisher: Publisher, database: Database, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(publisher, database, first_id=300)
    await run.announce()
    records = run.records()
    third = len(records) // 3
    async with plant.running("worker", settings, tmp_path / "first.log"):
        await run.send(records[:third])
        sending = asyncio.create_task(run.send(records[third : 2 * third]))
        other = {"SMDIH_ANOMALY_INSTANCE": "other"}
        async with plant.running("worker", settings, tmp_path / "second.log", **other):
            await sending
            await eventually(run.taken, deadline_s=60)
        await run.send(records[2 * third :])
        await eventually(run.taken, deadline_s=60)
    await assert_same(run, undisturbed)


async def test_losing_the_database_again_and_again_changes_nothing(
    settings: Settings, publisher: Publisher, database: Database, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(publisher, database, first_id=400)
    await run.announce()
    async with plant.running("worker", settings, tmp_path / "worker.log"):
        sending = asyncio.create_task(run.send(run.records()))
        lost = 0
        while not sending.done():
            lost += await database.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE application_name = 'smdih-anomaly' AND datname = current_database()"
            )
            await asyncio.wait([sending], timeout=0.2)
        await sending
        await eventually(run.taken, deadline_s=60)
    assert lost > 1
    await assert_same(run, undisturbed)


async def test_a_worker_that_was_thought_dead_stores_nothing(
    settings: Settings, publisher: Publisher, database: Database, undisturbed: Run, tmp_path: Path
) -> None:
    run = Run(publisher, database, first_id=500)
    await run.announce()
    records = run.records()
    half = len(records) // 2
    # It never saves by itself, so all that it has taken is unsaved when it falls asleep.
    zombie = await plant.start_process(
        "worker",
        settings,
        tmp_path / "zombie.log",
        SMDIH_ANOMALY_INSTANCE="zombie",
        SMDIH_ANOMALY_CHECKPOINT_INTERVAL_S="3600",
    )
    await run.send(records[:half])

    async def has_taken() -> bool:
        async with httpx.AsyncClient(base_url=zombie.http) as client:
            text = (await client.get("/metrics")).text
        samples = half // PARTITIONS * 4 * len(MACHINES) * len(plant.SIGNALS)
        return f"smdih_anomaly_samples_scored_total {float(samples)}" in text

    await eventually(has_taken)
    zombie.process.send_signal(signal.SIGSTOP)
    async with plant.running("worker", settings, tmp_path / "heir.log"):
        await run.send(records[half:])
        await eventually(run.taken, deadline_s=60)
        zombie.process.send_signal(signal.SIGCONT)

        async def was_refused() -> bool:
            return "is not at" in zombie.log.read_text()

        await eventually(was_refused, deadline_s=30)
        await assert_same(run, undisturbed)
        if zombie.process.returncode is None:
            zombie.process.terminate()
        await zombie.ended(deadline_s=30)


async def test_records_that_were_gone_before_they_were_scored_are_told_once_and_not_forgotten(
    settings: Settings, publisher: Publisher, database: Database, cluster: Cluster, undisturbed: Run, tmp_path: Path
) -> None:
    """The worker sees the hole with its first record, before anybody has asked for its metrics: a counter would tell nobody."""
    name, lost, kept = cluster.name(topics.SAMPLES), 7, 2
    begun = await database.fetchval("SELECT next_offset FROM position WHERE topic = $1 AND partition = 3", name)
    calm = plant.records_of({400: plant.calm(1)}, firm_id=FIRM, step=20)[0]
    await publisher.publish_all([Message(topics.SAMPLES, calm, partition=3)] * (lost + kept))
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    await admin.delete_records({TopicPartition(name, 3): RecordsToDelete(before_offset=begun + lost)})
    await admin.close()

    async def told() -> bool:
        row = await database.fetchrow(
            "SELECT next_offset, records_lost FROM position WHERE topic = $1 AND partition = 3", name
        )
        return row is not None and (row["next_offset"], row["records_lost"]) == (begun + lost + kept, lost)

    async with plant.running("worker", settings, tmp_path / "worker.log"):
        await eventually(told, deadline_s=30)
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=1)
    await FloodGauge(pool, SystemClock()).measure()
    await pool.close()
    assert REGISTRY.get_sample_value("smdih_anomaly_records_lost") == lost


async def test_a_topic_full_of_poison_stops_the_worker_and_is_not_emptied(
    settings: Settings, publisher: Publisher, database: Database, undisturbed: Run, tmp_path: Path
) -> None:
    before = await database.fetchval("SELECT next_offset FROM position WHERE partition = 0")
    poisoned = DEAD_LETTERS_IN_A_ROW_MAX * 3
    await publisher.publish_all([Message(topics.SAMPLES, b"\xff\xff\xff", partition=0)] * poisoned)
    for start in range(2):  # started again, as an orchestrator would, it stays where it stopped
        log = tmp_path / f"worker-{start}.log"
        worker = asyncio.create_task(plant.start_process("worker", settings, log))
        await asyncio.wait([worker])
        if worker.exception() is None:  # it may have been ready for a moment
            assert await worker.result().ended(deadline_s=30) == 1
        assert "TooManyDeadLetters" in log.read_text()
        after = await database.fetchval("SELECT next_offset FROM position WHERE partition = 0")
        assert after - before <= DEAD_LETTERS_IN_A_ROW_MAX
