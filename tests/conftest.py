"""Real servers for the tests: those named in the environment, else our own on free ports, removed at the end."""

import os
import secrets
from collections.abc import AsyncIterator

import asyncpg
import hypothesis
import pytest_asyncio

from localstack.servers import LocalServers, Servers, named_in_environment
from services.common.kafka import Cluster, Publisher, create_topics
from services.common.settings import Settings
from services.migrate import migrate_all
from tests.polling import eventually

# A busy machine is no fault of the code.
hypothesis.settings.register_profile(
    "smdih", hypothesis.settings(), deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("smdih")


@pytest_asyncio.fixture(scope="session")
async def servers() -> AsyncIterator[Servers]:
    """A broker and a database that tests may use but not break."""
    named = named_in_environment()
    if named is not None:
        yield named
        return
    local = LocalServers(f"test-{os.getpid()}", outlives_power=False)
    try:
        yield await local.start()
    finally:
        await local.remove()


@pytest_asyncio.fixture(scope="session")
async def migrated(servers: Servers) -> AsyncIterator[str]:
    """A database with every service's migrations that is never used but to be copied, which takes a tenth of the time."""
    name = f"smdih_test_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(servers.database_dsn)
    await admin.execute(f"CREATE DATABASE {name}")
    try:
        await migrate_all(_beside(servers, name))
        # TimescaleDB has a worker in every database that takes connections, and a database in use cannot be copied.
        await admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")

        async def is_unused() -> bool:
            query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1"
            return bool(await admin.fetchval(query, name) == 0)

        await eventually(is_unused)
        yield name
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


def _beside(servers: Servers, name: str) -> Settings:
    """For the database of this name, and topics of their own."""
    return Settings(
        kafka_bootstrap=servers.kafka_bootstrap,
        kafka_topic_prefix=f"{name}.",
        database_dsn=servers.database_dsn.rpartition("/")[0] + "/" + name,
    )


@pytest_asyncio.fixture(scope="module")
async def settings(servers: Servers, migrated: str) -> AsyncIterator[Settings]:
    """A fresh database and topics of its own for a test module, with every service's migrations applied."""
    name = f"smdih_test_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(servers.database_dsn)
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {migrated}")
    try:
        made = _beside(servers, name)
        await create_topics(Cluster.of(made), partitions=made.kafka_partitions, replication=made.kafka_replication)
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
