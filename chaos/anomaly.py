"""The anomaly worker is killed again and again, and another joins and leaves: the alarms must be those of an undisturbed run.

Meanwhile people tune: thresholds, changed sensors, rules. What they do holds from an offset on, so the undisturbed run can be made
afterwards, in this process, of the same records.
"""

import asyncio
import contextlib
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from numpy.typing import NDArray

from chaos.stage import Outcome, Round, Scenario, Stage, poll
from localstack.servers import LOCAL
from services import anomaly
from services.anomaly import settings as anomaly_settings
from services.anomaly.domain import Severity
from services.anomaly.raiser import AlarmRaiser
from services.anomaly.scorer import Frames, Scorer, decode
from services.anomaly.store import Actor, AlarmStore
from services.anomaly.tuning_store import HorizonStore, NewTuning, TuningStore
from services.anomaly.tunings import Rule, RuleKind, TuningKind
from services.common import topics
from services.common.clock import SystemClock
from services.common.database import Pool, create_pool, migrate, transaction
from services.common.directory import Directory
from services.common.kafka import Cluster, Poison, Publisher
from services.common.settings import Settings
from services.migrate import migrate_all
from tests import anomaly_plant as plant

KILLS = 20
MACHINES, ROWS, STEP = 8, 4_000, 4
FAULTS_FROM_ROW, FAULT_EVERY, FAULT_ROWS = 500, 350, 20
PARTITIONS = Settings.model_fields["kafka_partitions"].default
FIRM = 1
# From ready to the next kill: a worker that is ready has what it missed before it.
LIFE_S_MAX = 2.0
SENDING_S = 90.0
DRAINED_WITHIN_S = 120.0

ALARMS = (
    "SELECT id, machine_id, position, started, ended, severity, component, explanation, score, rule_id, rule_version, episode_id, "
    "(SELECT count(*) FROM alarm_change c WHERE c.alarm_id = a.id) AS changes FROM alarm a "
    "WHERE machine_id BETWEEN $1 AND $2 ORDER BY id"
)


def values(dice: random.Random) -> NDArray[np.float64]:
    """A machine that works as usual but for a fault now and then, each plainer than the one before."""
    made = plant.calm(dice.randrange(2**31), ROWS)
    for number, row in enumerate(range(FAULTS_FROM_ROW, ROWS - FAULT_ROWS, FAULT_EVERY)):
        made[row : row + FAULT_ROWS, dice.randrange(3)] += 20.0 * 1.6**number
    return made


class _Records:
    """What is sent in a round, in order, each with its partition, and where each partition ends."""

    def __init__(self, dice: random.Random, first_id: int) -> None:
        self.first_id = first_id
        of: list[list[tuple[int, bytes]]] = []
        for partition in range(PARTITIONS):
            machines = {
                first_id + number: values(dice) for number in range(MACHINES) if number % PARTITIONS == partition
            }
            of.append([(partition, record) for record in plant.records_of(machines, firm_id=FIRM, step=STEP)])
        self.all = [one for together in zip(*of, strict=True) for one in together]
        self.ends: dict[int, int] = {}

    @property
    def machines(self) -> tuple[int, int]:
        return self.first_id, self.first_id + 99

    def stored(self) -> Mapping[int, Sequence[tuple[int, bytes]]]:
        """By partition, with their offsets, once all are sent."""
        of: dict[int, Sequence[tuple[int, bytes]]] = {}
        for partition, end in self.ends.items():
            mine = [record for number, record in self.all if number == partition]
            of[partition] = list(enumerate(mine, end - len(mine)))
        return of

    async def send(self, publisher: Publisher) -> None:
        pause_s = SENDING_S / len(self.all)
        for partition, record in self.all:
            self.ends[partition] = 1 + await publisher.publish(topics.SAMPLES, record, partition=partition)
            await asyncio.sleep(pause_s)

    async def taken(self, pool: Pool, topic: str) -> bool:
        rows = await pool.fetch("SELECT partition, next_offset FROM position WHERE topic = $1", topic)
        positions = {row["partition"]: row["next_offset"] for row in rows}
        return all(positions.get(partition) == end for partition, end in self.ends.items())


async def tune(pool: Pool, dice: random.Random, first_id: int) -> None:
    """Until cancelled: what people do."""
    rule_id = uuid.UUID(int=dice.getrandbits(128)).hex
    version = 0
    while True:
        await asyncio.sleep(dice.uniform(0.05, 1.0))
        kind = dice.choices(list(TuningKind), weights=(6, 1, 3))[0]
        new = NewTuning(
            kind=kind,
            firm_id=FIRM,
            machine_id=first_id + dice.randrange(MACHINES),
            position=dice.randrange(3),
            cause="chaos",
            reason="",
        )
        if kind is TuningKind.THRESHOLD:
            new = replace(new, threshold_offset=dice.choice([-0.6, 0.0, 0.6, 1.5]))
        elif kind is TuningKind.RULE:
            version += 1
            rule = Rule(
                id=rule_id,
                version=version,
                firm_id=FIRM,
                machine_id=new.machine_id,
                position=0,
                kind=dice.choice([RuleKind.ABOVE, RuleKind.BELOW]),
                name="chaos",
                severity=Severity.LOW,
                limit=61.0 if version % 2 else 59.0,
                hysteresis=0.3,
            )
            new = replace(new, position=0, rule_id=rule_id, rule=rule if dice.random() < 0.9 else None)
        async with transaction(pool) as connection:
            await TuningStore().lock(connection)
            await TuningStore().add(connection, new, now_us=plant.START_US, actor=Actor())


async def undisturbed(
    settings: Settings, tuned: Pool, of: Mapping[int, Sequence[tuple[int, bytes]]], machines: tuple[int, int]
) -> Sequence[Any]:
    """The alarms that one worker without any fault makes of these records, with the tunings from the same offsets.

    `of`: partition -> offset and value of each record, without a gap; `machines`: the first and the last id that count.
    """
    # In a database of its own: not all that the migrations make is in the schema.
    name = f"undisturbed_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(settings.database_dsn)
    await admin.execute(f"CREATE DATABASE {name}")
    dsn = settings.database_dsn.rpartition("/")[0] + f"/{name}"
    await migrate(dsn, schema=anomaly_settings.SCHEMA, folder=Path(anomaly.__file__).parent / "migrations")
    pool = await create_pool(dsn, schema=anomaly_settings.SCHEMA, size_max=1)
    directory = Directory(cluster_of(settings), clock=SystemClock(), kinds=("machine",))
    following = asyncio.create_task(directory.run())
    try:
        await directory.wait_caught_up()
        raiser = AlarmRaiser(AlarmStore(), pool, directory, SystemClock())
        for partition, records in of.items():
            if not records:
                continue
            scorer = Scorer(partition, position=records[0][0])
            scorer.tune((await HorizonStore(tuned).load(partition, position=scorer.next_offset)).tunings)
            for offset, record in records:
                await raiser.store(scorer.take([(offset, _frames(record))]).found)
            await raiser.store(scorer.settle().found)
        return await pool.fetch(ALARMS, *machines)
    finally:
        following.cancel()
        await pool.close()
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


def _frames(record: bytes) -> Sequence[Frames]:
    try:
        return decode(record)
    except Poison:
        return ()


async def kill_again_and_again(settings: Settings, logs: Path, dice: random.Random) -> None:
    """One worker, killed KILLS times; half-way another joins, and leaves politely."""

    def start(name: str, number: int) -> Any:
        environment = {"SMDIH_ANOMALY_INSTANCE": name, "SMDIH_ANOMALY_CHECKPOINT_INTERVAL_S": "0.3"}
        return plant.start_process("worker", settings, logs / f"{name}-{number}.log", **environment)

    for number in range(KILLS):
        worker = await start("one", number)
        await asyncio.sleep(dice.uniform(0, LIFE_S_MAX))
        if number == KILLS // 2:
            other = await start("other", number)
            await asyncio.sleep(dice.uniform(0, LIFE_S_MAX))
            other.process.terminate()
            await other.ended(deadline_s=60)
        await worker.kill()


def cluster_of(settings: Settings) -> Cluster:
    return Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix)


@asynccontextmanager
async def anomaly_worker(stage: Stage) -> AsyncIterator[Round]:
    settings = Settings(
        kafka_bootstrap=stage.servers.kafka_bootstrap,
        database_dsn=stage.servers.database_dsn,
        kafka_topic_prefix="anomaly.",
    )
    await migrate_all(settings)
    logs = LOCAL / "log" / "chaos" / "anomaly"
    logs.mkdir(parents=True, exist_ok=True)
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=2)
    topic = cluster_of(settings).name(topics.SAMPLES)

    async def play(dice: random.Random) -> Outcome:
        outcome = Outcome(faults=["kill_worker"] * KILLS + ["second_worker"])
        records = _Records(dice, first_id=100 * (1 + int(time.time()) % 1_000_000_000))
        async with Publisher(cluster_of(settings)) as publisher:
            for number in range(MACHINES):
                await plant.publish_machine(publisher, machine_id=records.first_id + number, firm_id=FIRM)
            sending = asyncio.create_task(records.send(publisher))
            tuning = asyncio.create_task(tune(pool, random.Random(dice.random()), records.first_id))
            try:
                await kill_again_and_again(settings, logs, dice)
                await sending
            finally:
                for task in (sending, tuning):
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
        async with plant.running("worker", settings, logs / "last.log", SMDIH_ANOMALY_INSTANCE="one"):
            await poll("drained", lambda: records.taken(pool, topic), deadline_s=DRAINED_WITHIN_S)
            expected = await undisturbed(settings, pool, records.stored(), records.machines)

            async def settled() -> bool:  # the last tunings hold without a record
                return await pool.fetch(ALARMS, *records.machines) == expected

            with contextlib.suppress(TimeoutError):
                await poll("settled", settled, deadline_s=15)
        found = await pool.fetch(ALARMS, *records.machines)
        outcome.acknowledged = len(expected)
        outcome.lost = len({row["id"] for row in expected} - {row["id"] for row in found})
        outcome.duplicated = len({row["id"] for row in found} - {row["id"] for row in expected})
        differing = sum(one != other for one, other in zip(expected, found, strict=False))
        if differing and not outcome.lost and not outcome.duplicated:
            outcome.broken.append(f"{differing} alarms differ from those of an undisturbed run")
        unsent = await pool.fetchval(
            "SELECT sum(changes) - (SELECT count(*) FROM outbox o JOIN alarm a "  # noqa: S608  # fixed texts
            "ON o.key = convert_to(a.id, 'UTF8') "
            f"WHERE a.machine_id BETWEEN $1 AND $2) FROM ({ALARMS}) AS all_",
            *records.machines,
        )
        if unsent:
            outcome.broken.append(f"{unsent} changes more than events on their way")
        tunings = "SELECT count(*) FROM tuning WHERE machine_id BETWEEN $1 AND $1 + 99"
        outcome.detail = {"tunings": await pool.fetchval(tunings, records.first_id), "records": len(records.all)}
        return outcome

    try:
        yield play
    finally:
        await pool.close()


SCENARIOS = (Scenario("anomaly", 1, anomaly_worker),)
