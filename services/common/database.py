"""Connections, transactions and migrations."""

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import asyncpg

from services.common import metrics, tenancy
from services.common.errors import Forbidden, Invalid, TryAgain
from services.common.logs import get_logger

log = get_logger(__name__)

CONNECT_TIMEOUT_S = 10
COMMAND_TIMEOUT_S = 60
START_DEADLINE_S = 60
LOCK_TIMEOUT_MS = 5_000
RETRY_AFTER_S = 2

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record] | asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"

# What asyncpg raises when the server is away, stopping, full, or no longer the one that takes writes.
AWAY = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.InterfaceError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.ReadOnlySQLTransactionError,
    # A migration came between a connection's first and next use of a statement; the next try makes it anew.
    asyncpg.InvalidCachedStatementError,
    # The server ended the connection just as a query began (0.31); or it was killed amid a query, and the connection is handed
    # out once more and says that it is still busy.
    asyncpg.InternalClientError,
    # Its disk, its memory or its connections are used up: somebody makes room, and what was asked is asked again.
    asyncpg.InsufficientResourcesError,
)

# What it raises for content that it will never take, such as a NUL in a text or a number beyond its column.
REFUSED = (
    asyncpg.DataError,
    asyncpg.CheckViolationError,
    asyncpg.NotNullViolationError,
    asyncpg.ProgramLimitExceededError,
)


# The setting that policies and views look at: a firm's id, or tenancy.ALL.
FIRM_SETTING: Final = "smdih.firm_id"
# Reads what a firm may see, through views; for Grafana.
READER_ROLE: Final = "smdih_reader"
# Sets sequences, where there is one (services/logins.py makes it); for services/reconcile.py.
SETTER_ROLE: Final = "smdih_setter"


def role_of(service: str) -> str:
    """As whom the service's processes work in the database: it owns nothing and no row-level policy leaves it out."""
    return f"smdih_{service}"


if TYPE_CHECKING:
    _AnyConnection = asyncpg.Connection[asyncpg.Record]
else:  # cannot be subscripted at run time
    _AnyConnection = asyncpg.Connection


class _Connection(_AnyConnection):
    """Its transactions are for the firm that the current work is for."""

    async def execute(self, query: str, *args: Any, timeout: float | None = None) -> str:
        # asyncpg begins its transactions through here: the firm goes along in the same round trip.
        if query.startswith("BEGIN") and (firm_id := tenancy.current_firm_id()):
            query = f"{query.rstrip(';')}; SET LOCAL {FIRM_SETTING} TO '{firm_id}';"
        return await super().execute(query, *args, timeout=timeout)


async def create_pool(dsn: str, *, schema: str, size_max: int) -> Pool:
    """A pool whose connections look into `schema` first.

    They work in the role of the schema's service, whoever the DSN names: the owner, or a login that may do no more than take this
    role. A server that is away may come later: what asks the pool meanwhile raises one of AWAY. Raises asyncpg.PostgresError when
    the server refuses who comes.
    """
    pool = await asyncpg.create_pool(
        dsn,
        min_size=0,
        max_size=size_max,
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=COMMAND_TIMEOUT_S,
        connection_class=_Connection,
        server_settings={
            "search_path": f"{schema},public",
            "application_name": f"smdih-{schema}",
            "timezone": "UTC",
            "role": role_of(schema),
            FIRM_SETTING: tenancy.ALL,
        },
    )
    try:
        await pool.release(await pool.acquire())
    except AWAY as error:
        log.warning("no database answers yet", error=repr(error))
    except BaseException:
        pool.terminate()
        raise
    metrics.watch_pool(pool, schema=schema)
    return pool


async def create_pool_when_it_answers(dsn: str, *, schema: str, size_max: int) -> Pool:
    """The same for a process that reads at its start and may come before its database. Raises TryAgain after START_DEADLINE_S."""
    until = time.monotonic() + START_DEADLINE_S
    pool = await create_pool(dsn, schema=schema, size_max=size_max)
    while not await can_write(pool):
        if time.monotonic() > until:
            pool.terminate()
            raise TryAgain(f"No database answered in {START_DEADLINE_S} s.")
        await asyncio.sleep(1)
    return pool


@asynccontextmanager
async def transaction(pool: Pool) -> AsyncIterator[Connection]:
    """A transaction for one request. Raises TryAgain when the database is away, Invalid for a value that no column can hold.

    A lost connection during COMMIT leaves the outcome open: only work that may safely be repeated goes inside.
    """
    try:
        async with pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection, connection.transaction():
            yield connection
    except AWAY as error:
        log.warning("the database does not do its part", error=repr(error))
        await pool.expire_connections()
        raise TryAgain("The database does not answer; send again.", retry_after_s=RETRY_AFTER_S) from error
    except asyncpg.DataError as error:  # a NUL in a text, a number beyond its column: the sender's, not ours
        log.warning("value refused by the database", error=repr(error))
        raise Invalid("A value is one that cannot be stored: a number too large, or a text with a NUL.") from error
    except asyncpg.InsufficientPrivilegeError as error:  # a check before it is missing
        log.exception("refused by the database's own rules")
        raise Forbidden("This would touch what is not yours.") from error


@asynccontextmanager
async def transaction_for_all_firms(pool: Pool) -> AsyncIterator[Connection]:
    """The same where what a firm asks for moves things that firms share; the use case checks what is whose."""
    with tenancy.for_all_firms():
        async with transaction(pool) as connection:
            yield connection


@asynccontextmanager
async def all_firms_within(connection: Connection) -> AsyncIterator[None]:
    """For a question in a firm's own transaction whose answer depends on others; say beside the call why. An error that
    leaves the context must end the transaction."""
    firm_id = tenancy.current_firm_id()
    if not firm_id:
        yield
        return
    await connection.execute(f"SET LOCAL {FIRM_SETTING} TO '{tenancy.ALL}'")
    yield
    await connection.execute(f"SET LOCAL {FIRM_SETTING} TO '{firm_id}'")


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
        service = folder.parent.name
        await make_role(connection, role_of(service))
        await make_role(connection, READER_ROLE)
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
        await _grant(connection, schema, role_of(service))
    finally:
        await connection.close()
    return applied


async def make_role(connection: Connection, role: str) -> None:
    """Roles belong to the whole server: another hub on it may have made them, or be making them now."""
    found = await connection.fetchrow(
        "SELECT rolsuper OR rolbypassrls AS is_above, pg_has_role(current_user, oid, 'SET') AS is_ours FROM pg_roles "
        "WHERE rolname = $1",
        role,
    )
    if found is None:
        try:
            await connection.execute(f"CREATE ROLE {role} NOLOGIN")
        except (asyncpg.DuplicateObjectError, asyncpg.UniqueViolationError):
            log.info("role was made meanwhile", role=role)
        except asyncpg.InsufficientPrivilegeError as error:
            raise PermissionError(
                f"The role {role} is missing and this login may not make it: as one that may, "
                f"`CREATE ROLE {role} NOLOGIN; GRANT {role} TO <this login>;`, then migrate again."
            ) from error
        await make_role(connection, role)
    elif found["is_above"]:
        raise PermissionError(
            f"The role {role} would pass over row-level security; take SUPERUSER and BYPASSRLS from it."
        )
    elif not found["is_ours"]:
        await connection.execute(f"GRANT {role} TO CURRENT_USER")


async def _grant(connection: Connection, schema: str, role: str) -> None:
    """What the service's role may do in its schema: use everything, change no structure. Anew after each release's migrations."""
    async with connection.transaction():
        for statement in (
            f"GRANT USAGE ON SCHEMA {schema} TO {role}",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}",
            f"REVOKE ALL ON {schema}.migration FROM {role}",
            f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA {schema} TO {role}",
            f"GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} TO {role}",
        ):
            await connection.execute(statement)
        if await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", SETTER_ROLE):
            await connection.execute(f"GRANT UPDATE ON ALL SEQUENCES IN SCHEMA {schema} TO {SETTER_ROLE}")
