"""Real servers for the tests: those named in the environment, else our own on free ports, removed at the end."""

import os
import secrets
from collections.abc import AsyncIterator

import asyncpg
import pytest_asyncio

from localstack.servers import LocalServers, Servers, named_in_environment
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.migrate import migrate_all


@pytest_asyncio.fixture(scope="session")
async def servers() -> AsyncIterator[Servers]:
    """A broker and a database that tests may use but not break."""
    named = named_in_environment()
    if named is not None:
        yield named
        return
    local = LocalServers(f"test-{os.getpid()}")
    try:
        yield await local.start()
    finally:
        await local.remove()


@pytest_asyncio.fixture(scope="module")
async def settings(servers: Servers) -> AsyncIterator[Settings]:
    """A fresh database and topics of its own for a test module, with every service's migrations applied."""
    name = f"smdih_test_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(servers.database_dsn)
    await admin.execute(f"CREATE DATABASE {name}")
    try:
        made = Settings(
            kafka_bootstrap=servers.kafka_bootstrap,
            kafka_topic_prefix=f"{name}.",
            database_dsn=servers.database_dsn.rpartition("/")[0] + "/" + name,
        )
        await migrate_all(made)
        yield made
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


@pytest_asyncio.fixture(scope="module")
async def cluster(settings: Settings) -> Cluster:
    return Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix)


@pytest_asyncio.fixture(scope="module")
async def dsn(settings: Settings) -> str:
    return settings.database_dsn


@pytest_asyncio.fixture(scope="module")
async def publisher(cluster: Cluster) -> AsyncIterator[Publisher]:
    async with Publisher(cluster) as made:
        yield made
