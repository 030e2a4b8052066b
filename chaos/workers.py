"""Processes that work on the matching service's tables while they, their connections and the database die."""

import asyncio
import contextlib
import json
import random
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from chaos.batches import BATCHES_AT_ONCE, Batch
from chaos.stage import Stage
from services.common.settings import Settings
from services.migrate import migrate_all

ROUND_DEADLINE_S = 900.0
FAULT_PAUSE_S = (0.2, 1.5)
SCHEMA = "matching"


@dataclass
class Worker:
    """A worker process, started again with what it has not told of."""

    # The module and what it is called with, but for the first batch.
    command: Sequence[str]
    batches: Sequence[Batch]
    answers: dict[int, Any] = field(default_factory=dict)
    restarts: int = -1
    repeats: int = 0
    process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        try:
            while len(self.answers) < len(self.batches):
                self.restarts += 1
                await self._work()
        finally:
            self.kill()

    async def _work(self) -> None:
        # Whole groups are told together.
        first = len(self.answers) // BATCHES_AT_ONCE * BATCHES_AT_ONCE
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", *self.command, str(first)),
            stdout=asyncio.subprocess.PIPE,
            limit=16 * 1024 * 1024,
        )
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                for told in json.loads(line):
                    self.answers[told["batch"]] = told["answer"]
                    self.repeats += told["attempts"] - 1
        if await self.process.wait() > 0:
            raise RuntimeError(f"{self.command[0]} failed")

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()


Fault = Callable[[Stage, list[Worker], random.Random], Awaitable[None]]


async def kill_worker(_: Stage, workers: list[Worker], rng: random.Random) -> None:
    rng.choice(workers).kill()


async def cut_connections(stage: Stage, _: list[Worker], rng: random.Random) -> None:
    async with connected(stage) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'smdih-matching' "
            "AND pid <> pg_backend_pid() AND random() < 0.5"
        )


async def kill_database(stage: Stage, _: list[Worker], rng: random.Random) -> None:
    stage.local.kill_postgres()
    await asyncio.sleep(rng.uniform(0.1, 1))
    await stage.local.restart_postgres()


# Workers and connections die several times a round, the database once.
FAULTS: tuple[Fault, ...] = (kill_worker, cut_connections, kill_worker, cut_connections, kill_worker)


@asynccontextmanager
async def connected(stage: Stage) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(stage.servers.database_dsn, server_settings={"search_path": f"{SCHEMA},public"})
    try:
        yield connection
    finally:
        await connection.close()


async def migrated(stage: Stage) -> None:
    """Every table, as the hub would have them."""
    servers = stage.servers
    await migrate_all(
        Settings(
            kafka_bootstrap=servers.kafka_bootstrap, kafka_topic_prefix="places.", database_dsn=servers.database_dsn
        )
    )


async def under_fire(
    stage: Stage, workers: list[Worker], rng: random.Random, look: Callable[[], Awaitable[int]]
) -> tuple[list[str], int]:
    """Let them work while things die. Returns what died, and the most that a look found meanwhile."""
    faults: list[str] = []
    most = 0
    async with asyncio.timeout(ROUND_DEADLINE_S), asyncio.TaskGroup() as group:
        running = [group.create_task(worker.run()) for worker in workers]
        database_at = rng.randrange(2, 6)
        while not all(task.done() for task in running):
            await asyncio.sleep(rng.uniform(*FAULT_PAUSE_S))
            fault: Fault = kill_database if len(faults) == database_at else rng.choice(FAULTS)
            faults.append(fault.__name__)
            await fault(stage, workers, rng)
            most = max(most, await look())
    return faults, most
