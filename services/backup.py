"""Backups that can be trusted: `python -m services.backup dump FILE`, `... restore FILE`, and `... keep FOLDER` for every night;
`... list FOLDER` and `... print FILE` hand them out of a volume.

A dump is one file of pg_dump, and beside it FILE.json: what stood in every table at that moment (rows and a digest of their
content) and every sequence. A restore goes into an empty database and counts all of it again. See docs/operations.md.
"""

import asyncio
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg
from pydantic import Field

from services.common.database import CONNECT_TIMEOUT_S, Connection
from services.common.settings import DatabaseSettings
from services.migrate import SCHEMAS

USAGE = "usage: python -m services.backup dump|restore|print FILE, or keep|restore|list FOLDER"
READ_BYTES = 1024 * 1024


class BackupError(Exception):
    """A dump or a restore that did not come about; the text says why and what to do."""


class BackupSettings(DatabaseSettings):
    """From the environment, as the services have it."""

    pg_prefix: str = Field("", description="words before pg_dump and pg_restore, to run them elsewhere: `chroot ROOT`")
    pg_folder: str = Field("", description="where these two are, if not in the path")
    backup_keep: int = Field(7, ge=1, le=1_000, description="dumps that a folder keeps; older ones are removed")


@dataclass(frozen=True)
class Content:
    """What stands in the hub's schemas."""

    # Name with schema -> rows, digest.
    tables: Mapping[str, tuple[int, str]]
    # Name with schema -> last value. They are of no snapshot: pg_dump takes them as they are a little later.
    sequences: Mapping[str, int | None]

    def differences(self, other: "Content") -> list[str]:
        """What a database with the `other` content lacks of the dump, in words. Its sequences may have gone on."""
        found: list[str] = []
        for name in sorted(self.tables.keys() | other.tables.keys()):
            mine, theirs = self.tables.get(name), other.tables.get(name)
            if mine != theirs:
                found.append(f"table {name}: {_table(mine)} in the dump, {_table(theirs)} in the database")
        found += [
            f"sequence {name}: {self.sequences.get(name)} in the dump, {other.sequences.get(name)} in the database"
            for name in sorted(self.sequences.keys() | other.sequences.keys())
            if name not in self.sequences
            or name not in other.sequences
            or (other.sequences[name] or 0) < (self.sequences[name] or 0)
        ]
        return found


@dataclass(frozen=True)
class Manifest:
    """What is written beside a dump."""

    made: str
    postgres: str
    timescaledb: str
    bytes: int
    sha256: str
    # Whom rights were given to; roles are not part of a dump.
    roles: tuple[str, ...]
    content: Content

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.content.tables.values())

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Raises BackupError when it is not there or not one of ours."""
        try:
            found = json.loads(path.read_text())
            tables = {name: (int(rows), str(digest)) for name, (rows, digest) in found["content"]["tables"].items()}
            content = Content(tables, found["content"]["sequences"])
            return cls(**found | {"roles": tuple(found["roles"]), "content": content})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BackupError(f"{path} cannot be read: {error}. It is written by `dump` beside the file.") from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def manifest_of(file: Path) -> Path:
    return file.with_name(file.name + ".json")


async def _tables(connection: Connection) -> dict[str, tuple[int, str]]:
    """Count and digest every table of the hub, in the caller's transaction: one moment. Reads everything once."""
    names = await connection.fetch(
        "SELECT format('%I.%I', n.nspname, c.relname) AS name, "
        # PostgreSQL has no hash for json, which keeps its text as it came.
        "string_agg(format(CASE a.atttypid WHEN 'json'::regtype THEN '%I::text' ELSE '%I' END, a.attname), ', ' ORDER BY a.attnum) "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
        "WHERE n.nspname = ANY($1::text[]) AND c.relkind IN ('r', 'p') AND NOT c.relispartition GROUP BY 1 ORDER BY 1",
        list(SCHEMAS),
    )
    tables: dict[str, tuple[int, str]] = {}
    for name, columns in names:
        # A sum of the rows' hashes: in whatever order they are read, it is the same.
        row = await connection.fetchrow(
            f"SELECT count(*), coalesce(sum(hash_record_extended(ROW({columns}), 0)::numeric), 0)::text FROM {name}",  # noqa: S608
            timeout=None,
        )
        assert row is not None
        tables[name] = (row[0], row[1])
    return tables


async def _sequences(connection: Connection) -> dict[str, int | None]:
    rows = await connection.fetch(
        "SELECT format('%I.%I', schemaname, sequencename) AS name, last_value FROM pg_sequences WHERE schemaname = ANY($1::text[])",
        list(SCHEMAS),
    )
    return {row["name"]: row["last_value"] for row in rows}


async def dump(settings: BackupSettings, file: Path, before: Sequence[Path] = ()) -> Manifest:
    """Write the dump and its manifest; neither is there under its name before it is whole. Raises BackupError, also where it is
    written but has far less in it than one of the dumps `before`: it does not count as a backup then.

    The services may run meanwhile: it is what the database held at one moment.
    """
    partial = file.with_name(file.name + ".partial")
    async with _connected(settings.database_dsn) as connection:
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                snapshot = await connection.fetchval("SELECT pg_export_snapshot()")
                sequences = await _sequences(connection)  # before pg_dump reads them
                arguments = ["--format=custom", "--no-password", f"--snapshot={snapshot}"]
                # Both at once, of the same moment.
                dumping = asyncio.create_task(_run(settings, "pg_dump", arguments, to=partial))
                try:
                    content = Content(await _tables(connection), sequences)
                    await dumping
                finally:
                    dumping.cancel()
                    await asyncio.gather(dumping, return_exceptions=True)
                manifest = Manifest(
                    made=datetime.now(UTC).isoformat(timespec="seconds"),
                    postgres=await connection.fetchval("SHOW server_version"),
                    timescaledb=await _timescaledb(connection),
                    bytes=partial.stat().st_size,
                    sha256=await asyncio.to_thread(_sha256, partial),
                    roles=tuple(await _roles(connection)),
                    content=content,
                )
            manifest.write(manifest_of(file))
            partial.replace(file)
            for path in (file, manifest_of(file), file.parent):
                _sync(path)
            fuller = _fuller(manifest, before)
            if fuller is not None:
                raise BackupError(
                    f"{file} is whole, but {_fewer(manifest, fuller)}: no dump was removed. If the database was lost, restore "
                    "that one by its name; if rows were meant to go, move the dumps before elsewhere."
                )
            await _note(connection, manifest)
        except OSError as error:
            raise BackupError(f"{file} cannot be written: {error}. Look at the disk and dump again.") from error
        finally:
            partial.unlink(missing_ok=True)
    return manifest


def _sync(path: Path) -> None:
    """Onto the disk, before anybody is told that it is there."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


async def _note(connection: Connection, manifest: Manifest) -> None:
    """In the database, for who watches how old the newest dump is; the login only reads but for this."""
    try:
        await connection.execute("SET default_transaction_read_only TO off")
        await connection.execute("SELECT ingest.note_backup($1, $2)", manifest.bytes, manifest.sha256)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        print(f"backup: the dump is whole, but could not be noted in the database: {error}", file=sys.stderr)


async def keep(settings: BackupSettings, folder: Path) -> Manifest:
    """Dump into a folder under the time's name, then remove the oldest dumps above `backup_keep`. Raises BackupError.

    Nothing is removed where the hub has lost most of what it had: the dumps before may be all that there is.
    """
    if not folder.is_dir():
        raise BackupError(f"{folder} is no folder. Mount it, or make it.")
    for path in folder.glob("hub-*.dump.partial"):  # of runs that were killed; only one runs at a time
        path.unlink()
    file = folder / f"hub-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.dump"
    manifest = await dump(settings, file, _dumps_in(folder))
    for path in _dumps_in(folder)[: -settings.backup_keep]:
        path.unlink()
        manifest_of(path).unlink()
    return manifest


def _dumps_in(folder: Path) -> list[Path]:
    """Oldest first, by the time in their names."""
    return sorted(path for path in folder.glob("hub-*.dump") if manifest_of(path).exists())


def _newest_in(folder: Path) -> Path:
    dumps = _dumps_in(folder)
    if not dumps:
        raise BackupError(f"{folder} holds no dump with its manifest; put both there, or name another folder or file.")
    newest = Manifest.read(manifest_of(dumps[-1]))
    fuller = _fuller(newest, dumps[:-1])
    if fuller is not None:
        raise BackupError(
            f"Of {dumps[-1]}, the newest, {_fewer(newest, fuller)}, and nothing was changed. Name the one to restore."
        )
    return dumps[-1]


def _fuller(manifest: Manifest, before: Sequence[Path]) -> Path | None:
    """The dump with the most rows of those before, if this one has less than half of them: the database was lost meanwhile."""
    fullest = max(before, key=_rows_in, default=None)
    return fullest if fullest is not None and 2 * manifest.rows < _rows_in(fullest) else None


def _fewer(manifest: Manifest, fuller: Path) -> str:
    return f"there are {manifest.rows} rows in it and {_rows_in(fuller)} in {fuller}"


def _rows_in(dump: Path) -> int:
    try:
        return Manifest.read(manifest_of(dump)).rows
    except BackupError:
        return 0  # of no use to a restore


async def restore(settings: BackupSettings, file: Path) -> Manifest:
    """Put a dump into the database of the settings, which is made if it is not there, and compare. Of a folder the newest dump
    that is whole. Raises BackupError.

    What is there already is never touched: a database with anything of the hub in it is refused.
    """
    if file.is_dir():
        file = _newest_in(file)
    manifest = Manifest.read(manifest_of(file))
    if not file.exists():
        raise BackupError(f"{file} is not there.")
    if await asyncio.to_thread(_sha256, file) != manifest.sha256:
        raise BackupError(f"{file} is not what was dumped (its SHA-256 differs). Take another copy of it.")
    await _make_database(settings.database_dsn)
    async with _connected(settings.database_dsn) as connection:
        await _check_empty(connection)
        await _prepare(connection, manifest)
        # While these rules hold, TimescaleDB takes its catalogue and its chunks as plain tables, and runs nothing of its own.
        await connection.execute("SELECT public.timescaledb_pre_restore()")
    await _run(settings, "pg_restore", ["--exit-on-error", "--no-password", f"--dbname={_database(settings)}"], of=file)
    async with _connected(settings.database_dsn) as connection:
        await connection.execute("SELECT public.timescaledb_post_restore()")
    async with _connected(settings.database_dsn) as connection:
        await connection.execute("ANALYZE", timeout=None)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            restored = Content(await _tables(connection), await _sequences(connection))
    differences = manifest.content.differences(restored)
    if differences:
        raise BackupError("What was restored is not what was dumped: " + "; ".join(differences[:20]))
    return manifest


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    try:
        connection = await asyncpg.connect(
            dsn, timeout=CONNECT_TIMEOUT_S, server_settings={"application_name": "smdih-backup", "timezone": "UTC"}
        )
    except (OSError, asyncpg.PostgresError) as error:
        raise BackupError(f"The database does not answer: {error}. Look at SMDIH_DATABASE_DSN.") from error
    try:
        yield connection
    except (asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise BackupError(f"The database refused: {error}") from error
    finally:
        await connection.close()


async def _make_database(dsn: str) -> None:
    name = urlsplit(dsn).path.lstrip("/")
    async with _connected(urlsplit(dsn)._replace(path="/postgres").geturl()) as admin:
        if not await admin.fetchval("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", unquote(name)):
            quoted = await admin.fetchval("SELECT quote_ident($1)", unquote(name))
            await admin.execute(f"CREATE DATABASE {quoted}")


async def _check_empty(connection: Connection) -> None:
    schemas = await connection.fetch("SELECT nspname FROM pg_namespace WHERE nspname = ANY($1::text[])", list(SCHEMAS))
    if schemas:
        raise BackupError(
            f"The database has the schema {schemas[0][0]} already; nothing was changed. Name an empty database, or one that is not "
            "there yet, in SMDIH_DATABASE_DSN."
        )


async def _prepare(connection: Connection, manifest: Manifest) -> None:
    have = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")
    if have is None:
        try:
            await connection.execute(
                f"CREATE EXTENSION timescaledb WITH SCHEMA public VERSION '{manifest.timescaledb}'"
            )
        except asyncpg.PostgresError as error:
            raise BackupError(
                f"The dump is of TimescaleDB {manifest.timescaledb}, which this server does not offer ({error}). Restore on a "
                "server of that version, then update the extension there."
            ) from error
    elif have != manifest.timescaledb:
        raise BackupError(
            f"The database has TimescaleDB {have} and the dump is of {manifest.timescaledb}: it must be the same."
        )
    for role in manifest.roles:
        if not await connection.fetchval("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", role):
            quoted = await connection.fetchval("SELECT quote_ident($1)", role)
            await connection.execute(f"CREATE ROLE {quoted} NOLOGIN")
            print(f"backup: made the role {role} without a login; give it one if it had one", file=sys.stderr)


async def _roles(connection: Connection) -> list[str]:
    rows = await connection.fetch(
        "WITH mine AS (SELECT oid, nspowner, nspacl FROM pg_namespace "
        " WHERE nspname !~ '^(pg_|_?timescaledb|information_schema)'), named AS ("
        " SELECT nspowner AS role FROM mine"
        " UNION SELECT (aclexplode(nspacl)).grantee FROM mine"
        " UNION SELECT relowner FROM pg_class WHERE relnamespace IN (SELECT oid FROM mine)"
        " UNION SELECT (aclexplode(relacl)).grantee FROM pg_class WHERE relnamespace IN (SELECT oid FROM mine)"
        " UNION SELECT proowner FROM pg_proc WHERE pronamespace IN (SELECT oid FROM mine)"
        " UNION SELECT (aclexplode(proacl)).grantee FROM pg_proc WHERE pronamespace IN (SELECT oid FROM mine)"
        " UNION SELECT unnest(p.polroles) FROM pg_policy p JOIN pg_class c ON c.oid = p.polrelid"
        "  WHERE c.relnamespace IN (SELECT oid FROM mine)"
        ") SELECT rolname FROM named JOIN pg_roles r ON r.oid = named.role WHERE rolname NOT LIKE 'pg\\_%' ORDER BY 1"
    )
    return [row["rolname"] for row in rows]


async def _timescaledb(connection: Connection) -> str:
    version: str | None = await connection.fetchval("SELECT extversion FROM pg_extension WHERE extname = 'timescaledb'")
    if version is None:
        raise BackupError("The database has no TimescaleDB: it is not the hub's. Look at SMDIH_DATABASE_DSN.")
    return version


async def _run(
    settings: BackupSettings, program: str, arguments: list[str], *, to: Path | None = None, of: Path | None = None
) -> None:
    command = [*shlex.split(settings.pg_prefix), os.path.join(settings.pg_folder, program), *arguments]
    with (
        (to or Path(os.devnull)).open("wb") as output,
        (of or Path(os.devnull)).open("rb") as source,
    ):
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=source,
                stdout=output,
                stderr=asyncio.subprocess.PIPE,
                env=os.environ | _libpq(settings.database_dsn),
            )
        except OSError as error:
            raise BackupError(
                f"{program} cannot be run: {error}. Install PostgreSQL's client programs of the server's version, or say in "
                "SMDIH_PG_PREFIX how they are reached."
            ) from error
        try:
            _, told = await process.communicate()
        except BaseException:
            process.kill()
            await process.wait()
            raise
    if process.returncode:
        raise BackupError(f"{program} failed: {told.decode(errors='replace').strip()[-2000:]}")


def _libpq(dsn: str) -> dict[str, str]:
    """Of a DSN, as libpq's programs take it: not on their command line, where others could read it."""
    parts = urlsplit(dsn)
    found = {
        "PGHOST": parts.hostname or "",
        "PGPORT": str(parts.port or ""),
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": unquote(parts.path.lstrip("/")),
    }
    told = dict(parse_qsl(parts.query))
    found |= {"PGSSLMODE": told.get("sslmode", ""), "PGSSLROOTCERT": told.get("sslrootcert", "")}
    return {name: value for name, value in found.items() if value}


def _database(settings: BackupSettings) -> str:
    return _libpq(settings.database_dsn)["PGDATABASE"]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            digest.update(part)
    return digest.hexdigest()


def _table(found: tuple[int, str] | None) -> str:
    return "not there" if found is None else f"{found[0]} rows ({found[1]})"


def _told(command: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "done": command,
        "made": manifest.made,
        "tables": len(manifest.content.tables),
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "sha256": manifest.sha256,
    }


def _show(path: Path) -> None:
    """The dumps of a folder with their sizes, or a file as it is, on standard output. Raises BackupError."""
    try:
        if path.is_dir():
            for dump in _dumps_in(path):
                print(dump.name, dump.stat().st_size)
            return
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, READ_BYTES)
    except OSError as error:
        raise BackupError(f"{path} cannot be read: {error}.") from error


async def _unless_told_to_stop(work: Coroutine[Any, Any, Manifest]) -> Manifest:
    """As the first process of a container nothing ends it by itself, and what is killed leaves its files."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        raise BackupError("It was told to stop before it was done.") from None


def main(arguments: list[str]) -> int:
    commands = {"dump": dump, "restore": restore, "keep": keep}
    if len(arguments) != 2 or arguments[0] not in {*commands, "list", "print"}:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        if arguments[0] in ("list", "print"):  # the image has no shell to do this with
            _show(Path(arguments[1]))
            return 0
        manifest = asyncio.run(_unless_told_to_stop(commands[arguments[0]](BackupSettings(), Path(arguments[1]))))
    except BackupError as error:
        print(f"backup: {error}", file=sys.stderr)
        return 1
    print(json.dumps(_told(arguments[0], manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
