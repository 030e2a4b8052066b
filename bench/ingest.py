"""Ingest: from the doors to rows and rollups in the database, beside the database's own COPY of the same samples."""

import asyncio
import io
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import asyncpg
import httpx
import numpy as np
import orjson
import psutil
from aiokafka import AIOKafkaConsumer

from bench.plant import SIGNALS, Plant, frames, register, seconds
from bench.report import tell
from localstack.hub import Hub
from localstack.servers import LOCAL, Servers
from services.common import topics
from services.common.database import Connection
from services.common.kafka import Cluster
from services.ingest.historian.binarycopy import HEADER, POSTGRES_EPOCH_US, TRAILER, keyed_rows

COPY_MACHINES, COPY_ROWS = 200, 1_000
DOOR_MACHINES, DOOR_ROWS, DOOR_ROWS_A_BATCH, DOOR_CONNECTIONS = 200, 1_000, 25, 4
SMALL_MACHINES, SMALL_ROUNDS, SMALL_CONNECTIONS = 10_000, 15, 50
PACED_MACHINES, PACED_ROUNDS = 5_000, 20
PROBES, PROBE_EVERY_S = 100, 0.02
TEXT_MACHINES, TEXT_REQUESTS = 10, 101
JSON_ROWS, LINES_ROWS = 25, 100
REGISTERED_SIGNALS = 1_000_000
# Many of the historian's polls: the first ones are not counted.
HISTORIAN_ROWS, LATE_ROWS = 2_000, 1_000
FRESH_S, LATE_S = 60, 2 * 86_400
REPEATS = 3
STORED_DEADLINE_S = 180
POLL_S = 0.01


async def copy_frames(database: Connection) -> float:
    """Samples a second by binary COPY of ready-made frames into the historian's own table: the limit."""
    start_us = (time.time_ns() // 1_000_000_000 - 40 * 86_400) * 1_000_000
    best = 0.0
    for repeat in range(REPEATS):
        machines = np.repeat(np.arange(COPY_MACHINES, dtype=np.int64) + 10_000_000 * (repeat + 1), COPY_ROWS)
        times = np.tile(seconds(COPY_ROWS, start_us), COPY_MACHINES)
        values = np.tile(frames(COPY_ROWS), (COPY_MACHINES, 1))
        payload = HEADER + keyed_rows(machines, np.zeros_like(machines), times, [values]) + TRAILER
        began = time.monotonic()
        columns = ["machine_id", "first_position", "ts", "values"]
        await database.copy_to_table(
            "frame", schema_name="ingest", columns=columns, source=io.BytesIO(payload), format="binary"
        )
        best = max(best, values.size / (time.monotonic() - began))
    return best


async def copy_narrow(database: Connection) -> float:
    """Samples a second by binary COPY of the same samples as narrow rows with the usual index."""
    await database.execute(
        "CREATE TABLE narrow (signal_id bigint NOT NULL, ts timestamptz NOT NULL, value float8 NOT NULL)"
    )
    await database.execute(
        "SELECT create_hypertable('narrow', by_range('ts', INTERVAL '7 days'), create_default_indexes => false)"
    )
    await database.execute("CREATE UNIQUE INDEX ON narrow (signal_id, ts)")
    start_us = (time.time_ns() // 1_000_000_000 - 40 * 86_400) * 1_000_000
    row = np.dtype(
        [
            *(("columns", ">i2"), ("id_len", ">i4"), ("id", ">i8"), ("ts_len", ">i4"), ("ts", ">i8")),
            *(("value_len", ">i4"), ("value", ">f8")),
        ]
    )
    rows = np.empty(COPY_MACHINES * SIGNALS * COPY_ROWS // 4, dtype=row)
    count = len(rows) // COPY_ROWS
    rows["columns"], rows["id_len"], rows["ts_len"], rows["value_len"] = 3, 8, 8, 8
    rows["id"] = np.repeat(np.arange(count), COPY_ROWS)
    rows["ts"] = np.tile(seconds(COPY_ROWS, start_us), count) - POSTGRES_EPOCH_US
    rows["value"] = np.resize(frames(COPY_ROWS).T.ravel(), len(rows))
    payload = HEADER + rows.tobytes() + TRAILER
    began = time.monotonic()
    await database.copy_to_table("narrow", source=io.BytesIO(payload), format="binary")
    took_s = time.monotonic() - began
    await database.execute("DROP TABLE narrow")
    return len(rows) / took_s


async def stored_samples(database: Connection, plant: Plant) -> int:
    """Frames of the plant times signals; every frame of the bench is full."""
    found = await database.fetchval(
        "SELECT count(*) FROM ingest.frame WHERE machine_id BETWEEN $1 AND $2",
        plant.machine_ids[0],
        plant.machine_ids[-1],
    )
    return int(found) * SIGNALS


@dataclass
class Progress:
    """How far the historian has come in the topic, asked of its positions: counting rows would take its time."""

    database: Connection
    consumer: AIOKafkaConsumer
    topic: str

    @classmethod
    @asynccontextmanager
    async def of(cls, hub: Hub, database: Connection) -> AsyncIterator["Progress"]:
        topic = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix).name(topics.SAMPLES)
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=hub.settings.kafka_bootstrap, enable_auto_commit=False)
        await consumer.start()
        try:
            yield cls(database, consumer, topic)
        finally:
            await consumer.stop()

    async def position(self) -> int:
        """Records taken in, of all partitions."""
        return int(
            await self.database.fetchval(
                "SELECT coalesce(sum(next_offset), 0)::bigint FROM ingest.position WHERE topic = $1", self.topic
            )
        )

    async def end(self) -> int:
        """Records in the topic, of all partitions."""
        return sum((await self.consumer.end_offsets(list(self.consumer.assignment()))).values())

    async def wait_stored(self, plant: Plant, samples: int) -> float:
        """When all of the topic is stored (monotonic time). Raises TimeoutError, and RuntimeError if samples are missing."""
        until, end = time.monotonic() + STORED_DEADLINE_S, await self.end()
        while await self.position() < end:
            if time.monotonic() > until:
                raise TimeoutError(f"{await stored_samples(self.database, plant)} of {samples} samples stored")
            await asyncio.sleep(POLL_S)
        at = time.monotonic()
        stored = await stored_samples(self.database, plant)
        if stored != samples:
            raise RuntimeError(f"{stored} of {samples} samples stored")
        return at


async def send(
    hub: Hub, plant: Plant, connections: int, rows: int, rows_a_batch: int, *, age_s: int = FRESH_S, rate: float = 0.0
) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "bench.sender", hub.processes["door"].grpc, plant.key, str(connections)),
        *(f"{plant.machine_ids[0]}:{plant.machine_ids[-1]}", str(rows), str(rows_a_batch), str(age_s), str(rate)),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RuntimeError("the sender failed")
    found: dict[str, Any] = json.loads(output)
    return found


async def door_to_stored(hub: Hub, database: Connection, progress: Progress, limits: dict[str, float]) -> None:
    """500-sample batches from the gRPC door to rows and rollups, sender included, on the cores that all of it shares."""
    cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
    rates = []
    bytes_before = await database.fetchval(_STORED_BYTES)
    for _ in range(REPEATS):
        plant = await register(hub.settings.database_dsn, cluster, DOOR_MACHINES)
        await known(hub, plant)
        sent = await send(hub, plant, DOOR_CONNECTIONS, DOOR_ROWS, DOOR_ROWS_A_BATCH)
        rates.append(sent["samples"] / (await progress.wait_stored(plant, sent["samples"]) - sent["began"]))
    best = max(rates)
    detail = {"samples": sent["samples"], "runs": [round(rate) for rate in rates]}
    tell(
        "door_to_stored",
        best,
        "samples/s",
        limits["copy_frames"],
        to_copy_narrow=round(best / limits["copy_narrow"], 3),
        **detail,
    )
    await database.execute("CHECKPOINT")
    stored = (await database.fetchval(_STORED_BYTES) - bytes_before) / (sent["samples"] * REPEATS)
    tell("bytes_per_sample", stored, "B", tables="frames with index, minutes and hours", signals=SIGNALS, every_s=1)


_STORED_BYTES = """
SELECT (hypertable_size('ingest.frame') + hypertable_size('ingest.rollup_1m') + hypertable_size('ingest.rollup_1h'))::bigint
"""


async def door_to_stored_small(hub: Hub, progress: Progress) -> None:
    """10,000 machines with one frame of 20 signals a message, from 50 connections, as fast as it is acknowledged."""
    cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
    plant = await register(hub.settings.database_dsn, cluster, SMALL_MACHINES)
    await known(hub, plant)
    sent = await send(hub, plant, SMALL_CONNECTIONS, SMALL_ROUNDS, 1)
    stored = await progress.wait_stored(plant, sent["samples"])
    tell(
        "door_to_stored_small",
        sent["samples"] / (stored - sent["began"]),
        "samples/s",
        samples=sent["samples"],
    )


async def door_to_stored_p99(hub: Hub, database: Connection) -> None:
    """From the moment a frame is due to the moment a query finds it, at half of the load that door_to_stored_small asks for."""
    cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
    plant = await register(hub.settings.database_dsn, cluster, PACED_MACHINES)
    await known(hub, plant)
    probes = plant.machine_ids[:: PACED_MACHINES // PROBES]
    seen = dict.fromkeys(probes, datetime.now(UTC))
    late_s: list[float] = []
    sending = asyncio.create_task(send(hub, plant, SMALL_CONNECTIONS, PACED_ROUNDS, 1, rate=1.0))
    until = None
    while until is None or (len(late_s) < PROBES * PACED_ROUNDS and time.monotonic() < until):
        found = await database.fetch(_SINCE, list(seen), list(seen.values()))
        now = datetime.now(UTC)
        for row in found:
            seen[row["machine_id"]] = max(seen[row["machine_id"]], row["ts"])
            late_s.append((now - row["ts"]).total_seconds())
        if until is None and sending.done():
            until = time.monotonic() + STORED_DEADLINE_S
        await asyncio.sleep(PROBE_EVERY_S)
    sent = await sending
    if len(late_s) < PROBES * PACED_ROUNDS:
        raise RuntimeError(f"{PROBES * PACED_ROUNDS - len(late_s)} of the probed frames were never found")
    tell(
        "door_to_stored_p99_s",
        float(np.quantile(late_s, 0.99)),
        "s",
        p50=round(float(np.median(late_s)), 3),
        frames_probed=len(late_s),
        samples_a_second=PACED_MACHINES * SIGNALS,
        samples=sent["samples"],
    )


_SINCE = """
SELECT asked.machine_id, f.ts FROM unnest($1::bigint[], $2::timestamptz[]) AS asked (machine_id, after),
LATERAL (SELECT ts FROM ingest.frame f WHERE f.machine_id = asked.machine_id AND f.first_position = 0 AND f.ts > asked.after) f
"""


async def json_door(hub: Hub) -> None:
    """CPU time of the door a sample, 500-sample batches as JSON."""

    def body(plant: Plant, start_us: int) -> bytes:
        values = frames(JSON_ROWS).tolist()
        names = [f"s{number}" for number in range(SIGNALS)]
        rows = [
            {"ts": start_us // 1_000 + number * 1_000, "values": dict(zip(names, row, strict=True))}
            for number, row in enumerate(values)
        ]
        batches = [{"machine": machine, "frames": rows} for machine in plant.machine_ids]
        return orjson.dumps({"source": "bench", "batches": batches})

    await _text_door(hub, "json_us_per_sample", "/v1/telemetry", "application/json", JSON_ROWS, body)


async def line_protocol_door(hub: Hub) -> None:
    """CPU time of the door a sample, as Telegraf writes by default: 1,000 lines a request, each a machine's fields at a second."""

    def body(plant: Plant, start_us: int) -> bytes:
        lines = []
        for machine in plant.machine_ids:
            for number, row in enumerate(frames(LINES_ROWS).tolist()):
                fields = ",".join(f"s{column}={value}" for column, value in enumerate(row))
                lines.append(f"bench,machine={plant.path(machine)} {fields} {(start_us // 1_000_000 + number) * 10**9}")
        return "\n".join(lines).encode()

    await _text_door(hub, "line_protocol_us_per_sample", "/api/v2/write", "text/plain", LINES_ROWS, body)


async def _text_door(
    hub: Hub, measure: str, path: str, content_type: str, rows: int, body: Callable[[Plant, int], bytes]
) -> None:
    cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
    plant = await register(hub.settings.database_dsn, cluster, TEXT_MACHINES)
    await known(hub, plant)
    start_us = (time.time_ns() // 1_000_000_000 - 86_400) * 1_000_000
    bodies = [body(plant, start_us + number * rows * 1_000_000) for number in range(TEXT_REQUESTS)]
    running = hub.processes["door"].process
    assert running is not None
    door = psutil.Process(running.pid)
    headers = {"Authorization": f"Bearer {plant.key}", "Content-Type": content_type}
    async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers, timeout=60) as client:
        (await client.post(path, content=bodies[0])).raise_for_status()  # what is made once is not measured
        before = door.cpu_times()
        for one in bodies[1:]:
            (await client.post(path, content=one)).raise_for_status()
        after = door.cpu_times()
    samples = (TEXT_REQUESTS - 1) * TEXT_MACHINES * rows * SIGNALS
    used_s = after.user + after.system - before.user - before.system
    tell(measure, used_s * 1e6 / samples, "us CPU", samples=samples, samples_a_request=samples // (TEXT_REQUESTS - 1))


async def memory(servers: Servers) -> None:
    """What each process holds with 1,000,000 registered signals: started anew, and after a load from 200,000 of them."""
    hub = Hub(servers, LOCAL / "log" / "bench", topic_prefix="memory.")
    try:
        await hub.start()
        cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
        for _ in range(REGISTERED_SIGNALS // SIGNALS // SMALL_MACHINES):
            plant = await register(hub.settings.database_dsn, cluster, SMALL_MACHINES)
        for name in hub.processes:
            hub.kill(name)
        await asyncio.sleep(1)
        for name in hub.processes:
            await hub.wait_ready(name)
        await known(hub, plant)
        held = _held(hub)
        tell("memory_mb", max(held.values()), "MB", registered_signals=REGISTERED_SIGNALS, **held)
        database = await asyncpg.connect(hub.settings.database_dsn)
        async with Progress.of(hub, database) as progress:
            sent = await send(hub, plant, SMALL_CONNECTIONS, SMALL_ROUNDS, 1)
            await progress.wait_stored(plant, sent["samples"])
        await database.close()
        held = _held(hub)
        tell("memory_loaded_mb", max(held.values()), "MB", live_signals=SMALL_MACHINES * SIGNALS, **held)
    finally:
        await hub.stop()


def _held(hub: Hub) -> dict[str, int]:
    """Resident memory of each process in MB."""
    held = {}
    for name, running in hub.processes.items():
        assert running.process is not None
        held[name] = round(psutil.Process(running.process.pid).memory_info().rss / 1e6)
    return held


async def historian(hub: Hub, progress: Progress, limits: dict[str, float]) -> None:
    """The historian alone, from a topic that was filled while it was stopped."""
    runs = []
    for _ in range(REPEATS):
        plant = await _registered(hub)
        runs.append(await _from_a_full_topic(hub, progress, plant, rows=HISTORIAN_ROWS, age_s=FRESH_S))
    samples = DOOR_MACHINES * SIGNALS * HISTORIAN_ROWS
    tell(
        "historian", max(runs), "samples/s", limits["copy_frames"], samples=samples, runs=[round(rate) for rate in runs]
    )


async def historian_late(hub: Hub, progress: Progress, limits: dict[str, float]) -> None:
    """The same with the history of machines that have newer samples: merged, and the buckets made anew."""
    plant = await _registered(hub)
    sent = await send(hub, plant, DOOR_CONNECTIONS, 1, 1)
    await progress.wait_stored(plant, sent["samples"])
    rate = await _from_a_full_topic(hub, progress, plant, rows=LATE_ROWS, age_s=LATE_S)
    tell("historian_late", rate, "samples/s", limits["copy_frames"], samples=DOOR_MACHINES * SIGNALS * LATE_ROWS)


async def _registered(hub: Hub) -> Plant:
    cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
    plant = await register(hub.settings.database_dsn, cluster, DOOR_MACHINES)
    await known(hub, plant)
    return plant


async def _from_a_full_topic(hub: Hub, progress: Progress, plant: Plant, *, rows: int, age_s: int) -> float:
    """Samples a second from the end of the historian's first poll to that of its last."""
    await hub.pause("historian")
    before, stored = await progress.position(), await stored_samples(progress.database, plant)
    sent = await send(hub, plant, DOOR_CONNECTIONS, rows, DOOR_ROWS_A_BATCH, age_s=age_s)
    hub.resume("historian")
    while await progress.position() == before:
        await asyncio.sleep(POLL_S)
    already, began = await stored_samples(progress.database, plant), time.monotonic()
    stored += sent["samples"]
    took_s = await progress.wait_stored(plant, stored) - began
    return float((stored - already) / took_s)


async def known(hub: Hub, plant: Plant) -> None:
    """Wait until the door knows the last machine and the key."""
    headers = {"Authorization": f"Bearer {plant.key}"}
    async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers) as client:
        while (await client.get(f"/v1/machines/{plant.machine_ids[-1]}")).status_code != 200:
            await asyncio.sleep(0.1)


async def run(servers: Servers) -> None:
    """All measures of ingest, on a hub of its own."""
    hub = Hub(servers, LOCAL / "log" / "bench", roles=("door", "historian"))
    try:
        await hub.start()
        database = await asyncpg.connect(hub.settings.database_dsn)
        limits = {"copy_frames": await copy_frames(database), "copy_narrow": await copy_narrow(database)}
        for name, value in limits.items():
            tell(name, value, "samples/s")
        async with Progress.of(hub, database) as progress:
            await door_to_stored(hub, database, progress, limits)
            await historian(hub, progress, limits)
            await historian_late(hub, progress, limits)
            await door_to_stored_small(hub, progress)
        await door_to_stored_p99(hub, database)
        await json_door(hub)
        await line_protocol_door(hub)
        await database.close()
    finally:
        await hub.stop()
    await memory(servers)
