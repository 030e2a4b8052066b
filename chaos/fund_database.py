"""A database of the fund alone, for one round."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from chaos.stage import Stage
from services.common.database import migrate

MIGRATIONS = Path(__file__).resolve().parents[1] / "services/funding/migrations"


@asynccontextmanager
async def database(stage: Stage, name: str) -> AsyncIterator[str]:
    """A database of the fund alone; yields its DSN."""
    admin = await asyncpg.connect(stage.servers.database_dsn)
    await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
    await admin.execute(f"CREATE DATABASE {name}")
    await admin.close()
    dsn = stage.servers.database_dsn.rpartition("/")[0] + f"/{name}"
    await migrate(dsn, schema="funding", folder=MIGRATIONS)
    try:
        yield dsn
    finally:
        admin = await asyncpg.connect(stage.servers.database_dsn)
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()
