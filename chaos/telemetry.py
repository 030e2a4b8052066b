"""The telemetry path: door, broker, historian and database are killed under load; nothing acknowledged may be missing or twice."""

import asyncio
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import numpy as np
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from bench.plant import SIGNALS, Plant, register
from chaos import rollups
from chaos.gateway import frames
from chaos.stage import Outcome, Round, Scenario, Stage, poll
from localstack.hub import Hub
from services.common import topics
from services.common.database import Connection
from services.common.errors import TryAgain
from services.common.kafka import DEAD_LETTERS_IN_A_ROW_MAX, Cluster, Message, Publisher
from services.ingest.historian.binarycopy import Ints

MACHINES = 30
FAULTS_A_ROUND = 3
SILENT_S = 30.0
DRAINED_WITHIN_S = 60.0
GATEWAY_DEADLINE_S = 180.0
READ_DEADLINE_S = 60.0
HISTORY_S = 5 * 86_400  # how far back the frames' own clock begins,
BEFORE_THE_HOUR_S = 300  # a little before the end of an hour, so that hours are closed in each round


def start_of_history_s() -> int:
    return (int(time.time()) - HISTORY_S) // 3600 * 3600 + 3600 - BEFORE_THE_HOUR_S


class _Load:
    """A gateway that sends until it is told to stop."""

    def __init__(self, process: asyncio.subprocess.Process, ledger: Path) -> None:
        self._process = process
        self.ledger = ledger

    async def stop(self) -> dict[str, Any]:
        """No new frames; returns what the gateway says when the rest is acknowledged."""
        async with asyncio.timeout(GATEWAY_DEADLINE_S):
            output, _ = await self._process.communicate(b"stop\n")
        if self._process.returncode:
            raise RuntimeError("the gateway failed")
        found: dict[str, Any] = json.loads(output)
        return found


def load(hub: Hub, plant: Plant, start_s: int, seed: int) -> AbstractAsyncContextManager[_Load]:
    door = hub.processes["door"]
    return load_to(door.grpc, plant, start_s, seed, http=door.http, ca=hub.ca)


@asynccontextmanager
async def load_to(
    target: str, plant: Plant, start_s: int, seed: int, *, http: str = "", ca: Path | None = None
) -> AsyncIterator[_Load]:
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder) / "ledger"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "chaos.gateway", target, f"{plant.machine_ids[0]}:{plant.machine_ids[-1]}"),
            *(str(start_s), str(seed), str(ledger), *([http] if http else [])),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"SMDIH_KEY": plant.key, "SMDIH_TLS_CA": str(ca) if ca else ""},
        )
        try:
            yield _Load(process, ledger)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


Fault = Callable[[Stage, Hub, random.Random], Awaitable[None]]


async def kill_door(_: Stage, hub: Hub, rng: random.Random) -> None:
    hub.kill("door")
    await asyncio.sleep(rng.uniform(0.5, 2))
    await hub.wait_ready("door")


async def kill_historian(_: Stage, hub: Hub, rng: random.Random) -> None:
    hub.kill("historian")
    await asyncio.sleep(rng.uniform(0.5, 2))
    await hub.wait_ready("historian")


async def kill_broker(stage: Stage, _: Hub, rng: random.Random) -> None:
    stage.local.kill_kafka()
    await asyncio.sleep(rng.uniform(0.2, 4))
    await stage.local.restart_kafka()


async def kill_database(stage: Stage, _: Hub, rng: random.Random) -> None:
    stage.local.kill_postgres()
    await asyncio.sleep(rng.uniform(0.2, 4))
    await stage.local.restart_postgres()


async def silence_broker(stage: Stage, _: Hub, __: random.Random) -> None:
    stage.local.pause_kafka(True)
    try:
        await asyncio.sleep(SILENT_S)
    finally:
        stage.local.pause_kafka(False)


async def rebalance(_: Stage, hub: Hub, rng: random.Random) -> None:
    """A second historian joins and dies, some of the times while it loads its positions, and at last leaves politely."""
    for _again in range(3):
        hub.resume("historian-2")
        await asyncio.sleep(rng.uniform(0.5, 3))
        hub.kill("historian-2")
        await hub.pause("historian-2")
    hub.resume("historian-2")
    await hub.wait_ready("historian-2")
    await asyncio.sleep(rng.uniform(0, 1))
    await hub.pause("historian-2")


POISON_RECORDS = 5
POISON = b"\xff\xff unreadable "


async def poison(stage: Stage, hub: Hub, rng: random.Random) -> None:
    """Records that nobody can read, between good ones. A broker that is away at the moment gets them later."""
    async with Publisher(cluster_of(hub)) as publisher:
        for _ in range(POISON_RECORDS):
            while True:
                try:
                    await publisher.publish(topics.SAMPLES, POISON + rng.randbytes(100), key=rng.randbytes(4))
                    break
                except TryAgain as error:
                    await asyncio.sleep(error.retry_after_s or 1)
            await asyncio.sleep(rng.uniform(0.05, 0.3))


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (kill_door, kill_historian, kill_broker, kill_database, silence_broker, rebalance, poison)
}


@asynccontextmanager
async def telemetry(stage: Stage) -> AsyncIterator[Round]:
    """Load all the time, three kinds of faults one after the other, two of them overlapping in some rounds."""
    async with stage.hub("telemetry", ("door", "historian"), copies={"historian": 2}) as hub:
        await hub.pause("historian-2")

        async def play(rng: random.Random) -> Outcome:
            plant = await register(hub.settings.database_dsn, cluster_of(hub), MACHINES)
            await asyncio.sleep(1)  # the door's directory follows
            outcome = Outcome(faults=rng.sample(sorted(FAULTS), FAULTS_A_ROUND))
            start_s = start_of_history_s()
            async with load(hub, plant, start_s, rng.randrange(2**31)) as sender:
                await asyncio.sleep(rng.uniform(1, 3))
                first, *others = (FAULTS[name](stage, hub, random.Random(rng.random())) for name in outcome.faults)
                overlap = asyncio.create_task(_after(rng.uniform(0, 3), first))
                for fault in others:
                    await fault
                    await asyncio.sleep(rng.uniform(0, 2))
                await overlap
                healed = time.monotonic()
                await asyncio.sleep(1)
                sent = await sender.stop()
                ledger = np.loadtxt(sender.ledger, dtype=np.int64, ndmin=2)
            outcome.detail = sent
            outcome.broken.extend(sent["problems"])
            if sent["sent"] != sent["acknowledged"]:
                outcome.broken.append(f"{sent['sent'] - sent['acknowledged']} batches were never acknowledged")
            await judge(hub, plant, ledger, start_s, healed, outcome)
            unreadable, buried = await unreadable_in(hub), await _buried(hub)
            outcome.detail["dead_letters"] = len(buried)
            if unreadable != buried:
                outcome.broken.append(f"{len(unreadable)} unreadable records, {len(buried)} dead letters")
            return outcome

        yield play


async def _after(delay_s: float, work: Awaitable[None]) -> None:
    await asyncio.sleep(delay_s)
    await work


async def judge(
    hub: Hub,
    plant: Plant,
    ledger: Ints,
    start_s: int,
    healed: float,
    outcome: Outcome,
    drained_within_s: float = DRAINED_WITHIN_S,
) -> None:
    """Compare the ledger (machine, first row, rows) with the database, once the historian has taken everything in."""
    rows = np.repeat(ledger[:, 1], ledger[:, 2]) + _counts_up(ledger[:, 2])
    acknowledged = np.unique(np.stack([np.repeat(ledger[:, 0], ledger[:, 2]), rows], axis=1), axis=0)
    outcome.acknowledged = len(acknowledged) * SIGNALS
    database = await asyncpg.connect(hub.settings.database_dsn)
    try:
        span = (plant.machine_ids[0], plant.machine_ids[-1])

        async def all_stored() -> bool:
            count = "SELECT count(*) FROM ingest.frame WHERE machine_id BETWEEN $1 AND $2"
            return int(await database.fetchval(count, *span)) >= len(acknowledged) and not await _lag(hub, database)

        try:
            await poll("stored", all_stored, deadline_s=drained_within_s)
        except TimeoutError as error:
            outcome.broken.append(str(error))
        drained_s = time.monotonic() - healed
        outcome.detail["drained_s"] = round(drained_s, 1)
        if drained_s > drained_within_s:
            outcome.broken.append(f"lag 0 only {drained_s:.0f} s after the last fault")
        stored = await database.fetch(
            "SELECT machine_id, extract(epoch FROM ts)::bigint AS s, values FROM ingest.frame WHERE machine_id BETWEEN $1 AND $2",
            *span,
        )
        keys = np.array([(row["machine_id"], row["s"] - start_s) for row in stored], dtype=np.int64).reshape(-1, 2)
        values = np.array([row["values"] for row in stored], dtype=np.float64).reshape(-1, SIGNALS)
        wrong = int(
            sum((frames(m, keys[keys[:, 0] == m, 1]) != values[keys[:, 0] == m]).sum() for m in np.unique(keys[:, 0]))
        )
        if wrong:
            outcome.broken.append(f"{wrong} values are not those that were sent")
        known = {tuple(key) for key in keys.tolist()}
        missing: list[tuple[int, int]] = [
            (machine, row) for machine, row in acknowledged.tolist() if (machine, row) not in known
        ]
        outcome.lost = len(missing) * SIGNALS
        if missing:
            outcome.detail["first_missing"] = dict(reversed(missing))
        await rollups.judge(database, plant.machine_ids, outcome)
    finally:
        await database.close()


async def _lag(hub: Hub, database: Connection) -> int:
    """Records of the samples topic behind the historian's stored position."""
    name = cluster_of(hub).name(topics.SAMPLES)
    stored = await database.fetchval("SELECT coalesce(sum(next_offset), 0) FROM ingest.position WHERE topic = $1", name)
    async with reading(hub, topics.SAMPLES) as (consumer, partitions):
        ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
    return sum(ends.values()) - int(stored)


async def unreadable_in(hub: Hub) -> set[tuple[int, int]]:
    """Partition and offset of the poison in the samples topic."""
    return {
        (record.partition, record.offset)
        async for record in records_of(hub, topics.SAMPLES)
        if record.value.startswith(POISON)
    }


async def _buried(hub: Hub) -> set[tuple[int, int]]:
    """Partition and offset of what stands in the dead letters; a crash may put a record there twice."""
    headers = [dict(record.headers) async for record in records_of(hub, topics.SAMPLES + topics.DEAD_LETTERS_SUFFIX)]
    return {(int(header["partition"]), int(header["offset"])) for header in headers}


async def records_of(hub: Hub, topic: str) -> AsyncIterator[ConsumerRecord]:
    async with reading(hub, topic) as (consumer, partitions):
        ends = await consumer.end_offsets(partitions)
        await consumer.seek_to_beginning(*partitions)
        left = {partition for partition, end in ends.items() if end}
        until = time.monotonic() + READ_DEADLINE_S
        while left:
            if time.monotonic() > until:
                raise TimeoutError(f"{topic} could not be read to its end: {sorted(left)} are missing")
            for records in (await consumer.getmany(timeout_ms=200)).values():
                for record in records:
                    yield record
            left = {partition for partition in left if await consumer.position(partition) < ends[partition]}


@asynccontextmanager
async def reading(hub: Hub, topic: str) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    name = cluster_of(hub).name(topic)
    consumer = AIOKafkaConsumer(
        name,
        bootstrap_servers=hub.settings.kafka_bootstrap,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    try:
        yield consumer, list(consumer.assignment())
    finally:
        await consumer.stop()


def _counts_up(lengths: Ints) -> Ints:
    """0..n-1 for each n."""
    return np.concatenate([np.arange(length) for length in lengths]) if len(lengths) else np.zeros(0, dtype=np.int64)


def cluster_of(hub: Hub) -> Cluster:
    return Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)


@asynccontextmanager
async def all_poison(stage: Stage) -> AsyncIterator[Round]:
    """Only unreadable records in a partition: the historian stops there, however often it is started, and goes on when told."""
    async with stage.hub("all_poison", ("door", "historian")) as hub:
        so_far = 0

        async def play(rng: random.Random) -> Outcome:
            nonlocal so_far
            outcome = Outcome(faults=["all_poison"])
            plant = await register(hub.settings.database_dsn, cluster_of(hub), MACHINES)
            database = await asyncpg.connect(hub.settings.database_dsn)
            start_s = start_of_history_s()
            try:
                await asyncio.sleep(1)
                async with load(hub, plant, start_s, rng.randrange(2**31)) as sender:
                    await asyncio.sleep(rng.uniform(1, 3))
                    records = rng.randint(2, 4) * DEAD_LETTERS_IN_A_ROW_MAX
                    async with Publisher(cluster_of(hub)) as publisher:
                        message = Message(
                            topics.SAMPLES, POISON, partition=rng.randrange(hub.settings.kafka_partitions)
                        )
                        await publisher.publish_all([message] * records)
                    starts = hub.processes["historian"].starts

                    async def started_again() -> bool:
                        return hub.processes["historian"].starts >= starts + 3

                    await poll("the historian stops", started_again, deadline_s=60)
                    sent = await sender.stop()
                    ledger = np.loadtxt(sender.ledger, dtype=np.int64, ndmin=2)
                buried = len(await _buried(hub))
                before = outcome.detail["buried_by_itself"] = buried - so_far
                if before > DEAD_LETTERS_IN_A_ROW_MAX:
                    outcome.broken.append(f"{before} records buried without anybody saying so")

                # A person looks and says so.
                await database.execute("UPDATE ingest.position SET unreadable_in_a_row = -$1::int", records)

                async def has_gone_on() -> bool:
                    return not await _lag(hub, database)

                await poll("lag 0 after the word to go on", has_gone_on, deadline_s=60)
                unreadable, dead = await unreadable_in(hub), await _buried(hub)
                so_far = len(dead)
                if unreadable != dead:
                    outcome.broken.append(f"{len(unreadable)} unreadable records, {len(dead)} dead letters")
                outcome.detail |= {**sent, "poison": records}
                await judge(hub, plant, ledger, start_s, time.monotonic(), outcome)
            finally:
                await database.close()
            return outcome

        yield play


BUFFER_DISK_BYTES = 6 * 1024 * 1024


@asynccontextmanager
async def full_disk(stage: Stage) -> AsyncIterator[Round]:
    """A gateway is cut off until the disk of its buffer is full, is killed then, and later delivers all that it kept."""
    async with stage.hub("full_disk", ("door", "historian")) as hub:

        async def play(rng: random.Random) -> Outcome:
            outcome = Outcome(faults=["cut_off", "full_disk", "kill_gateway"])
            plant = await register(hub.settings.database_dsn, cluster_of(hub), 1)
            await asyncio.sleep(1)
            start_s = start_of_history_s()
            with small_disk(BUFFER_DISK_BYTES) as disk, tempfile.TemporaryDirectory() as folder:
                ledger = Path(folder) / "ledger"
                gateway = await _buffered_gateway(hub, plant, disk, start_s, ledger)
                await asyncio.sleep(rng.uniform(0.5, 2))
                await hub.pause("door")

                async def is_full() -> bool:
                    return ledger.with_suffix(".full").exists()

                await poll("the disk is full", is_full, deadline_s=60)
                await asyncio.sleep(rng.uniform(0, 1))
                gateway.kill()
                await gateway.wait()
                gateway = await _buffered_gateway(hub, plant, disk, start_s, ledger)
                await asyncio.sleep(rng.uniform(0.5, 2))
                hub.resume("door")
                await hub.wait_ready("door")
                healed = time.monotonic()
                async with asyncio.timeout(GATEWAY_DEADLINE_S):
                    output, _ = await gateway.communicate(b"stop\n")
                outcome.detail = json.loads(output)
                await judge(hub, plant, np.loadtxt(ledger, dtype=np.int64, ndmin=2), start_s, healed, outcome)
            return outcome

        yield play


async def _buffered_gateway(
    hub: Hub, plant: Plant, disk: Path, start_s: int, ledger: Path
) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "chaos.buffered_gateway", hub.processes["door"].grpc, str(plant.machine_ids[0])),
        *(str(disk / "buffer"), str(start_s), str(ledger)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"SMDIH_KEY": plant.key},
    )


@contextlib.contextmanager
def small_disk(size: int) -> Iterator[Path]:
    """A small file system of its own (needs root, as the local servers do)."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", folder], check=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


SCENARIOS = (
    Scenario("telemetry", 20, telemetry),
    Scenario("full_disk", 20, full_disk),
    Scenario("all_poison", 20, all_poison),
)
