"""A database of the fund alone, for one round."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from chaos.stage import Stage
from services.common.database import migrate

MIGRATIONS = Path(__file__).resolve().parents[1] / "services/funding/migrations"


@asynccontextmanager
async def database(stage: Stage, name: str) -> AsyncIterator[str]:
    """A database of the fund alone; yields its DSN."""
    async with stage.database(name) as dsn:
        await migrate(dsn, schema="funding", folder=MIGRATIONS)
        yield dsn
