"""The detector alone, the worker from the topic, and how soon an alarm is there; what is asked for stands as the limit."""

import asyncio
import re
import time
from pathlib import Path

import asyncpg
import httpx
import numpy as np
import psutil

from bench.ingest import known, send
from bench.plant import SIGNALS, Plant, frames, register
from bench.report import tell
from localstack.hub import Hub
from localstack.servers import LOCAL, Servers
from services.anomaly.detector import Detector
from services.anomaly.scorer import compile_kernel
from services.common.database import Connection
from services.common.kafka import Cluster
from smdih_client import TelemetryClient

DETECTOR_MACHINES, DETECTOR_ROWS, DETECTOR_WARM_ROWS, DETECTOR_BATCH_ROWS = 100, 1_000, 500, 25
MACHINES, ROWS, ROWS_A_BATCH, CONNECTIONS = 200, 1_000, 25, 4
SMALL_MACHINES, SMALL_ROUNDS, SMALL_CONNECTIONS = 10_000, 15, 50
PACED_MACHINES, PACED_GROUPS, PACED_ROUNDS = 5_000, 5, 25
PROBES, PROBE_WARM_ROWS, PROBE_FROM_S, PROBE_TO_S, POLL_S = 200, 400, 3.0, 22.0, 0.01
FAULTY = 5_000.0
SERIES = 100_000
DEADLINE_S = 180
REPEATS = 3

US_PER_SAMPLE_MAX, BYTES_PER_SERIES_MAX = 1.5, 4096
WORKER_MIN, WORKER_SMALL_MIN, ALARM_S_MAX, RECOVERY_S_MAX = 400_000, 200_000, 1.0, 10.0


def detector() -> None:
    """Batches of machines with 20 signals through the detector, in memory."""
    compile_kernel()
    made = Detector()
    slots = np.array([made.add(SIGNALS) for _ in range(DETECTOR_MACHINES)], dtype=np.int32)
    rows = DETECTOR_WARM_ROWS + DETECTOR_ROWS
    values = frames(rows)
    best = np.inf
    for first in range(0, rows, DETECTOR_BATCH_ROWS):
        times = np.tile((1 + first + np.arange(DETECTOR_BATCH_ROWS)) * 1_000_000, DETECTOR_MACHINES)
        batch = np.tile(values[first : first + DETECTOR_BATCH_ROWS], (DETECTOR_MACHINES, 1))
        began = time.perf_counter()
        made.score(np.repeat(slots, DETECTOR_BATCH_ROWS), times, batch.ravel())
        if first >= DETECTOR_WARM_ROWS:
            best = min(best, (time.perf_counter() - began) / batch.size * 1e6)
    tell("detector_us_per_sample", best, "us", US_PER_SAMPLE_MAX)
    tell("detector_bytes_per_series", made.nbytes / (DETECTOR_MACHINES * SIGNALS), "bytes", BYTES_PER_SERIES_MAX)


async def scored(hub: Hub, client: httpx.AsyncClient) -> int:
    """Samples that the worker has scored since it started; 0 while it does not answer."""
    try:
        text = (await client.get(f"{hub.processes['anomaly-worker'].http}/metrics")).text
    except httpx.HTTPError:
        return 0
    found = re.search(r"^smdih_anomaly_samples_scored_total (\S+)$", text, re.MULTILINE)
    return int(float(found[1])) if found else 0


def worker_process(hub: Hub) -> psutil.Process:
    process = hub.processes["anomaly-worker"].process
    assert process is not None
    return psutil.Process(process.pid)


async def drained(hub: Hub, samples: int) -> tuple[float, float]:
    """(samples/s, seconds of processor time a second) of a worker that finds so many samples in the topic and is just started."""
    async with httpx.AsyncClient(timeout=10) as client:
        hub.resume("anomaly-worker")
        until = time.monotonic() + DEADLINE_S
        while not (first := await scored(hub, client)):
            await asyncio.sleep(0.02)
        began, process = time.monotonic(), worker_process(hub)
        spent = sum(process.cpu_times()[:2])
        while (now := await scored(hub, client)) < samples:
            if time.monotonic() > until:
                raise TimeoutError(f"{now} of {samples} samples scored")
            await asyncio.sleep(0.05)
        took_s = time.monotonic() - began
        return (samples - first) / took_s, (sum(process.cpu_times()[:2]) - spent) / took_s


async def worker(hub: Hub) -> None:
    """From a topic that the door filled with 500-sample batches while the worker was stopped."""
    runs = []
    for _ in range(REPEATS):
        plant = await registered(hub, MACHINES)
        await hub.pause("anomaly-worker")
        sent = await send(hub, plant, CONNECTIONS, ROWS, ROWS_A_BATCH)
        runs.append(await drained(hub, sent["samples"]))
    rate, busy = max(runs)
    detail = {"samples": sent["samples"], "runs": [round(one) for one, _ in runs], "core_share": round(busy, 2)}
    tell("anomaly_worker", rate, "samples/s", WORKER_MIN, **detail)


async def worker_small(hub: Hub) -> Plant:
    """The same with 10,000 machines that sent one frame of 20 signals a message."""
    plant = await registered(hub, SMALL_MACHINES)
    await hub.pause("anomaly-worker")
    sent = await send(hub, plant, SMALL_CONNECTIONS, SMALL_ROUNDS, 1)
    rate, busy = await drained(hub, sent["samples"])
    tell(
        "anomaly_worker_small", rate, "samples/s", WORKER_SMALL_MIN, samples=sent["samples"], core_share=round(busy, 2)
    )
    return plant


async def recovery(hub: Hub, database: Connection, plant: Plant) -> None:
    """From the start of a worker to its being ready, with the states of 100,000 series in the database."""
    await hub.pause("anomaly-worker")  # its last checkpoint holds everything
    await database.execute(
        "DELETE FROM anomaly.detector_state WHERE machine_id NOT BETWEEN $1 AND $2",
        plant.machine_ids[0],
        plant.machine_ids[SERIES // SIGNALS - 1],
    )
    bytes_ = await database.fetchval("SELECT sum(octet_length(state)) FROM anomaly.detector_state")
    began = time.monotonic()
    hub.resume("anomaly-worker")
    await hub.wait_ready("anomaly-worker")
    took_s = time.monotonic() - began
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{hub.processes['anomaly-worker'].http}/metrics")).text
    loaded = re.search(r"^smdih_anomaly_load_seconds_sum (\S+)$", text, re.MULTILINE)
    tell(
        "anomaly_recovery_s",
        took_s,
        "s",
        RECOVERY_S_MAX,
        series=SERIES,
        bytes=bytes_,
        of_it_loading_s=round(float(loaded[1]), 2) if loaded else None,
    )


async def sample_to_alarm(hub: Hub, database: Connection) -> None:
    """From the call that sends a faulty frame to the alarm in the database, at half of what anomaly_worker_small asks for."""
    plant = await registered(hub, PACED_MACHINES + PROBES)
    groups = [
        Plant(plant.firm_id, plant.machine_ids[first : first + PACED_MACHINES // PACED_GROUPS], plant.key)
        for first in range(0, PACED_MACHINES, PACED_MACHINES // PACED_GROUPS)
    ]
    probed = Plant(plant.firm_id, plant.machine_ids[PACED_MACHINES:], plant.key)
    values = frames(PROBE_WARM_ROWS, seed=7)
    now_us = time.time_ns() // 1000
    target = hub.processes["door"].grpc
    async with TelemetryClient(target, probed.key, source="probe-warm") as client:
        times = now_us - (PROBE_WARM_ROWS - np.arange(PROBE_WARM_ROWS)) * 1_000_000
        for machine_id in probed.machine_ids:
            await client.send(machine_id, times, values)
        await client.flush()
    sent: dict[int, float] = {}
    late_s: dict[int, float] = {}

    async def group(number: int) -> int:
        # Machines tick all over the second, not all at once.
        await asyncio.sleep(number / PACED_GROUPS)
        sent = await send(hub, groups[number], SMALL_CONNECTIONS // PACED_GROUPS, PACED_ROUNDS, 1, rate=1.0)
        return int(sent["samples"] / sent["seconds"])

    loading = asyncio.gather(*(group(number) for number in range(PACED_GROUPS)))
    began = time.monotonic()

    async def fault(number: int, machine_id: int, client: TelemetryClient) -> None:
        await asyncio.sleep(PROBE_FROM_S + (PROBE_TO_S - PROBE_FROM_S) * number / PROBES)
        frame = values[-1:].copy()
        frame[0, 0] = FAULTY
        sent[machine_id] = time.monotonic()
        await client.send(machine_id, np.array([time.time_ns() // 1000]), frame)

    async def watch() -> None:
        while len(late_s) < PROBES and time.monotonic() - began < DEADLINE_S:
            rows = await database.fetch(
                "SELECT DISTINCT machine_id FROM anomaly.alarm WHERE machine_id = ANY($1::bigint[]) AND value = $2",
                [machine_id for machine_id in sent if machine_id not in late_s],
                FAULTY,
            )
            now = time.monotonic()
            late_s.update({row["machine_id"]: now - sent[row["machine_id"]] for row in rows})
            await asyncio.sleep(POLL_S)

    async with TelemetryClient(target, probed.key, source="probe-fault") as client:
        await asyncio.gather(watch(), *(fault(n, id_, client) for n, id_ in enumerate(probed.machine_ids)))
    rates = await loading
    seconds = list(late_s.values())
    tell(
        "sample_to_alarm_p99_s",
        float(np.quantile(seconds, 0.99)),
        "s",
        ALARM_S_MAX,
        p50=round(float(np.median(seconds)), 3),
        alarms=len(seconds),
        faults=PROBES,
        samples_per_s=sum(rates),
    )


async def registered(hub: Hub, machines: int) -> Plant:
    cluster = Cluster(hub.settings.kafka_bootstrap, hub.settings.kafka_topic_prefix)
    plant = await register(hub.settings.database_dsn, cluster, machines)
    await known(hub, plant)
    return plant


async def run(servers: Servers) -> None:
    detector()
    folder: Path = LOCAL / "log" / "bench"
    hub = Hub(servers, folder, roles=("door", "anomaly-worker"), topic_prefix="anomaly.")
    try:
        await hub.start()
        database = await asyncpg.connect(hub.settings.database_dsn)
        await worker(hub)
        plant = await worker_small(hub)
        await recovery(hub, database, plant)
        await sample_to_alarm(hub, database)
        await database.close()
    finally:
        await hub.stop()
