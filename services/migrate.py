"""Brings the databases and topics of all services to this release. Safe to repeat: `python -m services.migrate`."""

import asyncio
from pathlib import Path

from services.common import logs
from services.common.database import migrate
from services.common.kafka import Cluster, create_topics
from services.common.settings import Settings

SCHEMAS = ("ingest", "anomaly", "matching", "funding")


async def migrate_all(settings: Settings) -> None:
    """Apply every service's migrations and create missing topics."""
    for schema in SCHEMAS:
        await migrate(settings.database_dsn, schema=schema, folder=Path(__file__).parent / schema / "migrations")
    await create_topics(
        Cluster.of(settings),
        partitions=settings.kafka_partitions,
        replication=settings.kafka_replication,
    )


if __name__ == "__main__":
    environment = Settings()
    logs.configure("migrate", environment.log_level)
    asyncio.run(migrate_all(environment))
