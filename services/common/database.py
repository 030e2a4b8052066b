"""Connections, transactions and migrations."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import asyncpg

from services.common import metrics
from services.common.errors import Invalid, TryAgain
from services.common.logs import get_logger

log = get_logger(__name__)

CONNECT_TIMEOUT_S = 10
COMMAND_TIMEOUT_S = 60
START_DEADLINE_S = 60
LOCK_TIMEOUT_MS = 5_000
RETRY_AFTER_S = 2

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

# What asyncpg raises when the server is away, stopping, or no longer the one that takes writes.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # the server ended the connection just as a query began (0.31)
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.ReadOnlySQLTransactionError,
    # A connection whose server was killed amid a query may be handed out once more, and then says that it is still busy.
    asyncpg.InternalClientError,
)


async def create_pool(dsn: str, *, schema: str, size_max: int) -> Pool:
    """A pool whose connections look into `schema` first. Raises one of AWAY when the server cannot be reached."""
    pool = await asyncpg.create_pool(
        dsn,
        min_size=1,
        max_size=size_max,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=COMMAND_TIMEOUT_S,
        server_settings={"search_path": f"{schema},public", "application_name": f"smdih-{schema}", "timezone": "UTC"},
    )
    metrics.watch_pool(pool, schema=schema)
    return pool


async def create_pool_when_it_answers(dsn: str, *, schema: str, size_max: int) -> Pool:
    """The same for the start of a process, which may come before its database. Raises TryAgain after START_DEADLINE_S."""
    until = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            return await create_pool(dsn, schema=schema, size_max=size_max)
        except AWAY as error:
            if time.monotonic() > until:
                raise TryAgain(f"No database answered in {START_DEADLINE_S} s.") from error
            log.warning("no database answers yet", error=repr(error))
            await asyncio.sleep(1)


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """A transaction for one request. Raises TryAgain when the database is away, Invalid for a value that no column can hold.

    A lost connection during COMMIT leaves the outcome open: only work that may safely be repeated goes inside.
    """
    try:
        async with pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection, connection.transaction():
            yield connection
    except AWAY as error:
        await pool.expire_connections()
        raise TryAgain("The database does not answer; send again.", retry_after_s=RETRY_AFTER_S) from error
    except asyncpg.DataError as error:  # a NUL in a text, a number beyond its column: the sender's, not ours
        log.warning("value refused by the database", error=repr(error))
        raise Invalid("A value is one that cannot be stored: a number too large, or a text with a NUL.") from error


async def can_write(pool: Pool) -> bool:
    """Readiness: the server takes a write (rolled back), which `SELECT 1` does not show after a failover."""
    try:
        async with pool.acquire(timeout=2) as connection:
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute("CREATE TEMPORARY TABLE ready () ON COMMIT DROP", timeout=2)
            await transaction.rollback()
    except (*AWAY, asyncpg.PostgresError):
        await pool.expire_connections()
        return False
    return True


_MIGRATION_NAME = re.compile(r"(\d{4})_(pre|post)_[a-z0-9_]+\.sql")


_COMMON_MIGRATIONS = Path(__file__).parent / "migrations"


async def migrate(dsn: str, *, schema: str, folder: Path) -> Sequence[str]:
    """Apply the migrations that `schema` has not seen, in order, each in a transaction: first those that every service has
    (outbox, positions), then those of `folder`. Returns their names.

    Safe to run from several processes at once. Raises ValueError when an applied file has been changed since.
    """
    connection = await asyncpg.connect(dsn, timeout=CONNECT_TIMEOUT_S)
    applied: list[str] = []
    try:
        await connection.execute("SELECT pg_advisory_lock(hashtext('smdih-migrate'))")
        await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
        await connection.execute(f"SET search_path TO {schema}, public")
        await connection.execute(f"SET lock_timeout TO {LOCK_TIMEOUT_MS}")
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS migration "
            "(name text PRIMARY KEY, sha256 text NOT NULL, applied timestamptz NOT NULL DEFAULT now())"
        )
        seen = {row["name"]: row["sha256"] for row in await connection.fetch("SELECT name, sha256 FROM migration")}
        for path in [*sorted(_COMMON_MIGRATIONS.glob("*.sql")), *sorted(folder.glob("*.sql"))]:
            name = f"{path.parent.parent.name}/{path.name}"
            if not _MIGRATION_NAME.fullmatch(path.name):
                raise ValueError(f"{path}: a migration is called NNNN_pre_words.sql or NNNN_post_words.sql")
            text = path.read_text()
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            if name in seen:
                if seen[name] != sha256:
                    raise ValueError(f"{schema}: {name} was applied and then changed; write a new migration instead")
                continue
            async with connection.transaction():
                await connection.execute(text)
                await connection.execute("INSERT INTO migration (name, sha256) VALUES ($1, $2)", name, sha256)
            applied.append(name)
            log.info("migration applied", schema=schema, migration=name)
    finally:
        await connection.close()
    return applied
