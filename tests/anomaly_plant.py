"""Machines, keys and samples for the tests of the anomaly service, as ingest would publish them; and its processes."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from services.common import topics
from services.common.directory import entity_key
from services.common.identity import Role, key_sha256
from services.common.kafka import Publisher
from services.common.settings import Settings
from smdih.directory.v1 import directory_pb2 as directory_pb
from smdih.ingest.v1 import records_pb2 as records_pb

ROOT = Path(__file__).resolve().parents[1]
SECOND_US = 1_000_000
START_US = 1_760_000_000 * SECOND_US
ROWS = 600
FAULT_ROW = 500
SIGNALS = (("temperature", "degC"), ("vibration", "mm/s"), ("current", "A"))
START_TIMEOUT_S = 90
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}

_ROLES = {
    Role.DEVICE: directory_pb.ROLE_DEVICE,
    Role.FIRM: directory_pb.ROLE_FIRM,
    Role.OPERATOR: directory_pb.ROLE_OPERATOR,
}


async def publish_machine(publisher: Publisher, *, machine_id: int, firm_id: int) -> None:
    machine = directory_pb.Machine(
        id=machine_id,
        firm_id=firm_id,
        site_id=1,
        path=f"firm-{firm_id}/leeds/press-{machine_id}",
        name=f"Press {machine_id}",
        kind="press",
        signals=[
            directory_pb.Signal(id=machine_id * 1000 + position, name=name, unit=unit)
            for position, (name, unit) in enumerate(SIGNALS)
        ],
    )
    entry = directory_pb.DirectoryEntry(machine=machine)
    await publisher.publish(topics.DIRECTORY, entry.SerializeToString(), key=entity_key("machine", machine_id).encode())


async def publish_key(publisher: Publisher, *, credential_id: int, role: Role, firm_id: int = 0) -> str:
    key = f"smdih_{role}_{'k' * 30}{credential_id}"
    credential = directory_pb.Credential(
        id=credential_id, sha256=key_sha256(key), role=_ROLES[role], firm_id=firm_id, valid_from_us=1
    )
    entry = directory_pb.DirectoryEntry(credential=credential)
    await publisher.publish(
        topics.DIRECTORY, entry.SerializeToString(), key=entity_key("credential", credential_id).encode()
    )
    return key


def calm(seed: int, rows: int = ROWS) -> NDArray[np.float64]:
    """Rows of a machine that works as usual."""
    random = np.random.default_rng(seed)
    values: NDArray[np.float64] = np.array([60.0, 2.0, 10.0]) + random.normal(size=(rows, 3)) * np.array(
        [0.5, 0.1, 0.3]
    )
    return values


def with_fault(seed: int, *, column: int = 0, rows: int = ROWS) -> NDArray[np.float64]:
    """The same with one signal far off from FAULT_ROW on."""
    values = calm(seed, rows)
    values[FAULT_ROW:, column] += 40.0 * values[:100, column].std()
    return values


def batch(
    machine_id: int,
    values: NDArray[np.float64],
    *,
    firm_id: int,
    first_row: int = 0,
    correlation_id: str = "test",
    received_us: int = 0,  # 0: now
) -> records_pb.FrameBatch:
    times_us = START_US + (first_row + np.arange(len(values), dtype=np.int64)) * SECOND_US
    return records_pb.FrameBatch(
        firm_id=firm_id,
        machine_id=machine_id,
        width=values.shape[1],
        times_us=times_us.astype("<i8").tobytes(),
        values=values.astype("<f8").tobytes(),
        received_us=received_us or time.time_ns() // 1000,
        correlation_id=correlation_id,
    )


def records_of(machines: dict[int, NDArray[np.float64]], *, firm_id: int, step: int) -> Sequence[bytes]:
    """Records of `step` rows of each machine, in order of time."""
    rows = max(len(values) for values in machines.values())
    return [
        records_pb.SamplesRecord(
            batches=[
                batch(machine_id, values[row : row + step], firm_id=firm_id, first_row=row)
                for machine_id, values in machines.items()
            ]
        ).SerializeToString()
        for row in range(0, rows, step)
    ]


@dataclass
class Process:
    """A process of the anomaly service."""

    process: asyncio.subprocess.Process
    http: str
    grpc: str
    log: Path

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()

    async def ended(self, *, deadline_s: float) -> int:
        async with asyncio.timeout(deadline_s):
            return await self.process.wait()


async def start_process(role: str, settings: Settings, log: Path, **environment: str) -> Process:
    """Start a role and wait until it is ready. The caller ends it."""
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "services.anomaly.main",
            role,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env={
                **ENVIRONMENT,
                "SMDIH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
                "SMDIH_KAFKA_TOPIC_PREFIX": settings.kafka_topic_prefix,
                "SMDIH_DATABASE_DSN": settings.database_dsn,
                "SMDIH_ANOMALY_INSTANCE": "test",
                "SMDIH_ANOMALY_CHECKPOINT_INTERVAL_S": "0.3",
                **environment,
            },
        )
    until = time.monotonic() + START_TIMEOUT_S
    http = grpc = ""
    async with httpx.AsyncClient() as client:
        while True:
            text = log.read_text()
            assert process.returncode is None, text
            assert time.monotonic() < until, text
            http = _address(text, "HTTP serves") or http
            grpc = _address(text, "gRPC serves") or grpc
            if http and await _is_ready(client, http):
                return Process(process, f"http://{http}", grpc, log)
            await asyncio.sleep(0.05)


@asynccontextmanager
async def running(role: str, settings: Settings, log: Path, **environment: str) -> AsyncIterator[Process]:
    """A role that is ready; ended politely, which must work."""
    started = await start_process(role, settings, log, **environment)
    try:
        yield started
    finally:
        if started.process.returncode is None:
            started.process.terminate()
            code = await started.ended(deadline_s=30)
            assert code == 0, started.log.read_text()


async def _is_ready(client: httpx.AsyncClient, address: str) -> bool:
    try:
        return (await client.get(f"http://{address}/readyz")).status_code == 200
    except httpx.TransportError:
        return False


def _address(text: str, event: str) -> str:
    for line in text.splitlines():
        if f'"{event}"' in line:
            host, port = re.search(r'"host": "([^"]+)"', line), re.search(r'"port": (\d+)', line)
            if host and port:
                return f"{host[1]}:{port[1]}"
    return ""
