"""Each part of the hub comes to the real database by a login of its own, which is refused what is another's."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
import pytest_asyncio

from localstack.servers import Servers, pg_prefix
from services import migrate as migrating
from services.backup import BackupError, BackupSettings, keep
from services.common import tenancy
from services.common.database import create_pool, migrate, role_of, transaction
from services.logins import LOGINS, OWNER, Identity, LoginError, main, make, make_from, read
from services.migrate import SCHEMAS


@dataclass
class World:
    """A database of its own, migrated by its owner's login."""

    administrator: str
    dsns: dict[str, str]
    folder: Path
    names: list[str]

    def dsn(self, name: str, password: str | None = None) -> str:
        parts = urlsplit(self.dsns[name])
        secret = password or parts.password
        return parts._replace(netloc=f"{parts.username}:{secret}@{parts.hostname}:{parts.port}").geturl()


@pytest_asyncio.fixture(scope="module")
async def world(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    name = f"smdih_logins_{secrets.token_hex(4)}"
    admin = await asyncpg.connect(servers.database_dsn)
    await admin.execute(f"CREATE DATABASE {name}")
    at = urlsplit(servers.database_dsn)._replace(path=f"/{name}")
    folder = Path(tmp_path_factory.mktemp("logins"))
    dsns = {
        one: at._replace(netloc=f"{name}_{one}:{secrets.token_hex(12)}@{at.hostname}:{at.port}").geturl()
        for one in LOGINS
    }
    for one, dsn in dsns.items():
        (folder / one).write_text(dsn)
    made = World(at.geturl(), dsns, folder, [])
    try:
        made.names = await make_from(folder, administrator=made.administrator)
        for schema in SCHEMAS:
            await migrate(dsns[OWNER], schema=schema, folder=Path(migrating.__file__).parent / schema / "migrations")
        yield made
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        for one in LOGINS:
            await admin.execute(f"DROP ROLE IF EXISTS {name}_{one}")
        await admin.close()


async def test_each_service_reaches_its_own_schema_and_is_refused_every_other(world: World) -> None:
    assert set(world.names) == set(LOGINS)
    for schema in SCHEMAS:
        pool = await create_pool(world.dsns[schema], schema=schema, size_max=1)
        async with transaction(pool) as connection:
            assert await connection.fetchval("SELECT current_user") == role_of(schema)
            assert await connection.fetchval("SELECT count(*) FROM outbox") == 0
        bare = await asyncpg.connect(world.dsns[schema])
        for other in SCHEMAS:
            statements = [f"SELECT * FROM {other}.outbox", f"CREATE TABLE {other}.mine (x int)"]
            if other != schema:
                statements.append(f"SET ROLE {role_of(other)}")
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await pool.execute(f"SELECT * FROM {other}.outbox")
            for statement in statements:  # its own as well, until it takes its role
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await bare.execute(statement)
        for role in ("smdih_setter", "pg_read_all_data", urlsplit(world.dsns[OWNER]).username):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await bare.execute(f"SET ROLE {role}")
        await bare.close()
        await pool.close()


async def test_the_owner_is_no_superuser_and_owns_what_it_migrated(world: World) -> None:
    owner = await asyncpg.connect(world.dsns[OWNER])
    row = await owner.fetchrow(
        "SELECT rolsuper, rolbypassrls, rolcreaterole FROM pg_roles WHERE rolname = current_user"
    )
    assert row is not None
    assert not any(row.values())
    assert await owner.fetchval(
        "SELECT bool_and(nspowner::regrole::text = current_user) FROM pg_namespace WHERE nspname = ANY($1)",
        list(SCHEMAS),
    )
    await owner.close()


async def test_the_backup_dumps_every_firm_and_writes_nothing(world: World, tmp_path: Path) -> None:
    owner = await asyncpg.connect(world.dsns[OWNER])
    await owner.execute(
        "INSERT INTO ingest.firm (name, slug, sic, region, size) VALUES ('Leeds Presses', 'leeds', '25.62', 'Wales', 'small')"
    )
    # json has no hash of its own.
    await owner.execute(
        "INSERT INTO matching.maturity_assessment "
        "(id, firm_id, version, answers, share, level, topics, need_draft, taken, taken_by, correlation_id) "
        """VALUES ('a', 1, '1', '{"b": 1, "a": [2]}', 0.5, 'x', '[]', '', now(), 1, 'c')"""
    )
    await owner.close()
    for old in ("hub-20200101T021700Z.dump", "hub-20200102T021700Z.dump"):
        (tmp_path / old).touch()
        (tmp_path / f"{old}.json").touch()
    (tmp_path / "notes.txt").touch()
    settings = BackupSettings(database_dsn=world.dsns["backup"], pg_prefix=pg_prefix(), backup_keep=2)
    manifest = await keep(settings, tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    made = kept[2]
    assert kept == ["hub-20200102T021700Z.dump", "hub-20200102T021700Z.dump.json", made, f"{made}.json", "notes.txt"]
    assert manifest.content.tables["ingest.firm"][0] == 1
    # The night after a loss: nothing is removed, and it does not count.
    content = replace(manifest.content, tables={"ingest.frame": (3 * manifest.rows, "1")})
    replace(manifest, content=content).write(tmp_path / kept[1])
    with pytest.raises(BackupError, match="no dump was removed"):
        await keep(settings.model_copy(update={"backup_keep": 1}), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {*kept}
    admin = await asyncpg.connect(world.administrator)
    assert await admin.fetchval("SELECT count(*) FROM ingest.backup_run WHERE bytes > 0") == 1
    await admin.close()
    assert manifest.content.tables["matching.maturity_assessment"][0] == 1
    backup = await asyncpg.connect(world.dsns["backup"])
    await backup.execute("SET default_transaction_read_only = off")
    for statement in ("DELETE FROM ingest.firm", "UPDATE funding.award SET id = id", "SET ROLE smdih_ingest"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await backup.execute(statement)
    await backup.close()


async def test_reconcile_sets_sequences_and_changes_rows_and_no_structure(world: World) -> None:
    reconcile = await asyncpg.connect(world.dsns["reconcile"])
    await reconcile.execute("UPDATE ingest.firm SET name = name")
    assert await reconcile.fetchval("SELECT setval(pg_get_serial_sequence('ingest.firm', 'id'), 100)") == 100
    assert await reconcile.fetchval("SELECT count(*) FROM funding.audit") == 0
    for statement in ("ALTER TABLE ingest.firm DISABLE ROW LEVEL SECURITY", "DROP TABLE ingest.firm"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await reconcile.execute(statement)
    # So that it knows whether processes still run.
    pool = await create_pool(world.dsns["ingest"], schema="ingest", size_max=1)
    seen = await reconcile.fetch("SELECT application_name FROM pg_stat_activity WHERE datname = current_database()")
    assert "smdih-ingest" in {row[0] for row in seen}
    await pool.close()
    await reconcile.close()


async def test_grafana_sees_all_firms_through_views_only(world: World) -> None:
    grafana = await asyncpg.connect(world.dsns["grafana"])
    assert await grafana.fetchval("SELECT count(*) FROM shopfloor.firm") >= 0
    assert await grafana.fetchval("SHOW smdih.firm_id") == tenancy.ALL
    for statement in ("SELECT * FROM ingest.firm", "SELECT * FROM funding.award", "SET ROLE smdih_ingest"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await grafana.execute(statement)
    await grafana.close()


async def test_made_again_a_login_has_its_new_password_and_loses_what_somebody_gave_it(world: World) -> None:
    admin = await asyncpg.connect(world.administrator)
    user, password = urlsplit(world.dsns["funding"]).username, secrets.token_hex(12)
    await admin.execute(f"GRANT smdih_matching TO {user}")
    assert user is not None
    assert await make(admin, {"funding": Identity(user, password)}) == []
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(world.dsns["funding"])
    funding = await asyncpg.connect(world.dsn("funding", password))
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await funding.execute("SET ROLE smdih_matching")
    await funding.close()
    await admin.execute(f"ALTER ROLE {user} CREATEROLE")
    with pytest.raises(LoginError, match="CREATEROLE"):
        await make(admin, {"funding": Identity(user, password)})
    await admin.close()


async def test_what_cannot_be_made_is_said(world: World, tmp_path: Path) -> None:
    for text, why in (
        ("postgresql://smdih_ingest:0123456789abc@db/smdih", "name of a role"),
        ("postgresql://smdih_firm_7:0123456789abc@db/smdih", "name of a role"),
        ("postgresql://door:0123456789@db/smdih", "12 ASCII"),
    ):
        (tmp_path / "ingest").write_text(text)
        with pytest.raises(LoginError, match=why):
            read(tmp_path)
    (tmp_path / "ingest").write_text("postgresql://door:0123456789abc@db/smdih")
    (tmp_path / "funding").write_text("postgresql://door:0123456789abc@db/smdih")
    with pytest.raises(LoginError, match="another's"):
        read(tmp_path)
    (tmp_path / "funding").unlink()
    for administrator, why in (
        (world.dsns["ingest"], "may not make"),
        (world.dsn("ingest", "wrong"), "does not answer"),
    ):
        with pytest.raises(LoginError, match=why):
            await make_from(tmp_path, administrator=administrator)


def test_where_logins_are_made_elsewhere_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SMDIH_DATABASE_DSN", raising=False)
    assert main([str(tmp_path)]) == 0
    assert "nothing" in capsys.readouterr().out
