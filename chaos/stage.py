"""What a scenario stands on: servers of its own that may be broken, and the form of its result."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from localstack.hub import Hub
from localstack.mosquitto import Mosquitto
from localstack.servers import LOCAL, LocalServers, Servers


@dataclass
class Outcome:
    """What a round came to. What is counted is the scenario's: samples, alarms, places or ledger operations."""

    faults: list[str] = field(default_factory=list)
    acknowledged: int = 0
    lost: int = 0
    duplicated: int = 0
    # Anything else that must hold and did not, in words.
    broken: list[str] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.acknowledged > 0 and not self.lost and not self.duplicated and not self.broken


class Stage:
    """A broker and a database that scenarios may kill, and hubs on them."""

    def __init__(self, local: LocalServers, servers: Servers, *, seconds: float | None = None) -> None:
        self.local = local
        self.servers = servers
        # How long faults are to go on, where a scenario goes by time; None: as long as it does by itself.
        self.seconds = seconds

    @asynccontextmanager
    async def hub(
        self,
        name: str,
        roles: Collection[str],
        *,
        copies: Mapping[str, int] | None = None,
        mqtt: Mosquitto | None = None,
        database_dsn: str = "",
    ) -> AsyncIterator[Hub]:
        """Processes of the hub, with topics of their own; they share the database if none of their own is named."""
        hub = Hub(
            Servers(self.servers.kafka_bootstrap, database_dsn or self.servers.database_dsn),
            LOCAL / "log" / "chaos" / name,
            topic_prefix=f"{name}.",
            roles=roles,
            copies=copies or {},
            mqtt=mqtt,
        )
        try:
            await hub.start()
            yield hub
        finally:
            await hub.stop()

    @asynccontextmanager
    async def database(self, name: str) -> AsyncIterator[str]:
        """A fresh database of that name, removed afterwards; yields its DSN."""
        admin = await asyncpg.connect(self.servers.database_dsn)
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        try:
            yield self.servers.database_dsn.rpartition("/")[0] + f"/{name}"
        finally:
            admin = await asyncpg.connect(self.servers.database_dsn)
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
            await admin.close()


class NotHere(Exception):
    """A scenario that cannot be played on this machine; the text says why. It is left out, unless it was asked for."""


Round = Callable[[random.Random], Awaitable[Outcome]]


@dataclass(frozen=True)
class Scenario:
    """A name, how many rounds it has by default, and what makes a round ready to run."""

    name: str
    rounds: int
    prepare: Callable[[Stage], AbstractAsyncContextManager[Round]]
    # A round that hangs is not well either.
    deadline_s: float = 600.0


async def poll(what: str, check: Callable[[], Awaitable[bool]], *, deadline_s: float, interval_s: float = 0.1) -> float:
    """Wait until `check` holds and return after how many seconds it did. Raises TimeoutError, which names what was missing."""
    began = time.monotonic()
    while not await check():
        if time.monotonic() - began > deadline_s:
            raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")
        await asyncio.sleep(interval_s)
    return time.monotonic() - began
