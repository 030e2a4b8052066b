"""No service can find, or write, rows of a firm that it does not work for, whatever its statements forget.

Looks at every table, view, function and role of a migrated database; a new table without its place here fails.
"""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import grpc
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services import migrate as migrating
from services.common import tenancy
from services.common.database import READER_ROLE, Connection, Pool, create_pool, migrate, role_of, transaction
from services.common.errors import Forbidden
from services.common.identity import Caller, Role
from services.common.settings import Settings
from services.migrate import SCHEMAS
from smdih.ingest.v1 import registry_pb2, registry_pb2_grpc
from tests.integration.registry_hub import created, running

# Views for dashboards, in no service's schema.
DASHBOARDS = "shopfloor"
# In every schema.
_EVERYWHERE = {
    "migration": "what release the schema is of; no service may read it",
    "outbox": "events on their way out, for minutes; only the relay reads it",
    "position": "how far topics have been read",
}
# By schema: tables that hold no firm's data, or that row-level security cannot guard, each with the reason.
WITHOUT = {
    "ingest": {
        "frame": "written by COPY, which row-level security refuses; people reach it by the view samples, services by machine",
        "rollup_1m": "written by COPY; by machine, after its owner was checked",
        "rollup_1h": "written by COPY; by machine, after its owner was checked",
        "backup_run": "when dumps of the whole database ended",
        "carbon_factor": "of regions",
        "door_numbers": "how far each door's numbers have come",
        "partner": "names of partners, which every firm may know",
        "retention_run": "runs over everything: counts only",
    },
    "anomaly": {
        "delivery_plan": "one row, for the release before: until when deliveries are planned",
        "detector_state": "written and read by the worker alone",
        "horizon": "offsets of partitions",
        "tuning_start": "offsets from which tunings hold",
    },
    "matching": {
        "place": "places of providers; whose need holds one is in the offer",
        "provider": "profiles, which every firm may know",
        "provider_change": "one number",
        "provider_quarter": "counts of providers",
        "round": "counts of a round over all needs",
        "session": "courses of providers",
    },
    "funding": {
        "call": "open to all firms",
        "enterprise_group": "the group itself; who belongs to it is in firm_group",
        "ledger_account": "the fund's own books, by call",
        "ledger_event": "the fund's own books",
        "ledger_head": "the fund's own books",
        "ledger_transfer": "the fund's own books",
        "pool_pledge": "promises of co-investors to a call",
    },
}


@pytest_asyncio.fixture(scope="module")
async def owner(settings: Settings) -> AsyncIterator[Connection]:
    connection = await asyncpg.connect(settings.database_dsn)
    yield connection
    await connection.close()


async def test_every_table_has_a_policy_or_a_reason_why_not(owner: Connection) -> None:
    rows = await owner.fetch(
        "SELECT n.nspname AS schema, c.relname AS name, c.relrowsecurity AS is_on, "
        "  EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND p.polcmd IN ('*', 'r')) AS has_policy, "
        "  EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attname = 'firm_id') AS has_firm "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p', 'm', 'f')",
        list(SCHEMAS),
    )
    found = {(row["schema"], row["name"]): row for row in rows}
    without = {(schema, name) for schema in SCHEMAS for name in {**_EVERYWHERE, **WITHOUT[schema]}}
    assert without <= found.keys(), "a table in the list that is no more"
    for table, row in found.items():
        if table in without:
            assert not row["has_firm"], table
            assert not row["is_on"], f"{table} is guarded: take it from the list"
        else:
            assert (row["is_on"], row["has_policy"]) == (True, True), f"{table} needs row-level security, or a reason"


async def test_policies_look_at_the_firm_and_nothing_widens_them(owner: Connection) -> None:
    policies = await owner.fetch("SELECT * FROM pg_policies WHERE schemaname = ANY($1)", list(SCHEMAS))
    assert len(policies) > 40
    for policy in policies:
        where = f"{policy['schemaname']}.{policy['tablename']}"
        assert policy["permissive"] == "PERMISSIVE", where
        if policy["policyname"] == "recorded":  # records of deeds, to which everybody's work appends
            assert policy["cmd"] == "INSERT", where
            assert where == "funding.audit" or where.endswith(".change_log")
        else:
            assert policy["policyname"] == "firm", where
            assert "sees_all_firms()" in policy["qual"], where


async def test_views_over_firms_data_are_barriers(owner: Connection) -> None:
    views = await owner.fetch(
        "SELECT n.nspname AS schema, c.relname AS name, c.reloptions AS options FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = ANY($1) AND c.relkind = 'v'",
        [*SCHEMAS, DASHBOARDS],
    )
    assert {("ingest", "samples"), (DASHBOARDS, "alarm")} <= {(view["schema"], view["name"]) for view in views}
    for view in views:
        assert {"security_barrier=true", "security_barrier=on"} & set(view["options"] or ()), view["name"]


async def test_services_own_nothing_and_nothing_lets_them_past_the_policies(
    owner: Connection,
) -> None:
    roles = [*(role_of(schema) for schema in SCHEMAS), READER_ROLE]
    found = await owner.fetch("SELECT * FROM pg_roles WHERE rolname = ANY($1)", roles)
    assert {row["rolname"] for row in found} == set(roles)
    for row in found:
        for right in ("rolsuper", "rolbypassrls", "rolcreaterole", "rolcreatedb", "rolreplication", "rolcanlogin"):
            assert not row[right], (row["rolname"], right)
    assert not await owner.fetch(
        "SELECT c.relname FROM pg_class c JOIN pg_roles r ON r.oid = c.relowner WHERE r.rolname = ANY($1)", roles
    )
    for role in roles:
        for schema in SCHEMAS:
            own = role == role_of(schema)
            reads = role == READER_ROLE and schema == "ingest"
            assert await owner.fetchval("SELECT has_schema_privilege($1, $2, 'USAGE')", role, schema) == (own or reads)
            assert not await owner.fetchval("SELECT has_schema_privilege($1, $2, 'CREATE')", role, schema)
    # What runs with the owner's rights.
    definers = await owner.fetch(
        "SELECT p.oid::regprocedure::text AS name, p.proconfig AS config, "
        "has_function_privilege('public', p.oid, 'EXECUTE') AS is_open "
        "FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = ANY($1) AND p.prosecdef ORDER BY 1",
        list(SCHEMAS),
    )
    assert [row["name"] for row in definers] == [
        "ingest.drop_stored(text,timestamp with time zone,timestamp with time zone)",
        "ingest.lock_stored(text,timestamp with time zone,timestamp with time zone)",
        "ingest.note_backup(bigint,text)",  # adds a row of no firm, for the login that may only read
    ]
    for definer in definers:
        assert not definer["is_open"]
        assert any(setting.startswith("search_path=") for setting in definer["config"])


async def _two_firms(owner: Connection) -> None:
    """A row of firm 7 and one of firm 8 in every table with a firm, as far as keys allow it: here those that need no other."""
    for firm_id in (7, 8):
        await owner.execute(
            "INSERT INTO ingest.firm (id, name, slug, sic, region, size) OVERRIDING SYSTEM VALUE "
            "VALUES ($1, $2, $2, '25.62', 'Wales', 'small') ON CONFLICT DO NOTHING",
            firm_id,
            f"firm-{firm_id}",
        )
        await owner.execute(
            "INSERT INTO ingest.site (id, firm_id, slug, name, timezone) OVERRIDING SYSTEM VALUE "
            "VALUES ($1, $1, 'leeds', 'Leeds', 'Europe/London') "
            "ON CONFLICT DO NOTHING",
            firm_id,
        )
        await owner.execute(
            "INSERT INTO ingest.machine (id, firm_id, site_id, path, name, kind) OVERRIDING SYSTEM VALUE "
            "SELECT $1, $1, $1, $2, $2, 'press' ON CONFLICT DO NOTHING",
            firm_id,
            f"firm-{firm_id}/press",
        )
        await owner.execute(
            "INSERT INTO ingest.signal (id, firm_id, machine_id, position, name, unit) OVERRIDING SYSTEM VALUE "
            "VALUES ($1, $1, $1, 0, 'x', 'A') ON CONFLICT DO NOTHING",
            firm_id,
        )
        await owner.execute(
            "INSERT INTO ingest.frame (machine_id, first_position, ts, values) "
            "VALUES ($1::bigint, 0, '2026-11-01', ARRAY[$1::bigint]::float8[]) ON CONFLICT DO NOTHING",
            firm_id,
        )
        await owner.execute(
            "INSERT INTO ingest.kpi_setting (machine_id, revision, settings, changed, changed_by) "
            "VALUES ($1, 1, '{}', now(), 1) ON CONFLICT DO NOTHING",
            firm_id,
        )


@pytest_asyncio.fixture
async def pool(settings: Settings, owner: Connection) -> AsyncIterator[Pool]:
    await _two_firms(owner)
    made = await create_pool(settings.database_dsn, schema="ingest", size_max=1)
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("table", "key", "other"),
    [
        ("firm", "id", "name"),
        ("machine", "firm_id", "name"),
        ("signal", "firm_id", "name"),
        ("kpi_setting", "machine_id", "revision"),
    ],
)
async def test_a_statement_that_forgot_the_firm_finds_that_of_the_request(
    pool: Pool, table: str, key: str, other: str
) -> None:
    tenancy.narrow_to(Caller(1, Role.FIRM, firm_id=7))
    async with transaction(pool) as connection:
        assert [row[key] for row in await connection.fetch(f"SELECT {key} FROM {table}")] == [7]
        assert await connection.execute(f"UPDATE {table} SET {other} = {other}") == "UPDATE 1"
        assert await connection.execute(f"DELETE FROM {table} WHERE {key} = 8") == "DELETE 0"
    tenancy.narrow_to(Caller(1, Role.OPERATOR))
    async with transaction(pool) as connection:
        assert [row[key] for row in await connection.fetch(f"SELECT {key} FROM {table} ORDER BY 1")] == [7, 8]


async def test_a_row_cannot_be_written_into_another_firm(pool: Pool) -> None:
    tenancy.narrow_to(Caller(1, Role.DEVICE, firm_id=7))
    for statement in (
        "INSERT INTO site (firm_id, slug, name, timezone) VALUES (8, 'york', 'York', 'Europe/London')",
        "UPDATE machine SET firm_id = 8",
    ):
        with pytest.raises(Forbidden):
            async with transaction(pool) as connection:
                await connection.execute(statement)


async def test_who_set_no_firm_sees_nothing_and_what_one_request_set_is_gone_at_the_next(
    pool: Pool, settings: Settings
) -> None:
    for firm_id in (7, 8):
        tenancy.narrow_to(Caller(1, Role.FIRM, firm_id=firm_id))
        async with transaction(pool) as connection:
            assert await connection.fetchval("SELECT array_agg(id) FROM machine") == [firm_id]
        with tenancy.for_all_firms():
            async with transaction(pool) as connection:
                assert await connection.fetchval("SELECT count(*) FROM machine") == 2
    bare = await asyncpg.connect(settings.database_dsn, server_settings={"role": "smdih_ingest"})
    try:
        for setting in (None, "", "7; SELECT", "-1", "ALL"):
            if setting is not None:
                await bare.execute("SELECT set_config('smdih.firm_id', $1, false)", setting)
            assert await bare.fetchval("SELECT count(*) FROM ingest.machine") == 0
            assert await bare.fetchval("SELECT count(*) FROM ingest.samples") == 0
    finally:
        await bare.close()


async def test_a_service_cannot_touch_the_structure_nor_what_is_anothers(pool: Pool) -> None:
    for statement in (
        "ALTER TABLE machine DISABLE ROW LEVEL SECURITY",
        "DROP POLICY firm ON machine",
        "TRUNCATE machine",
        "CREATE TABLE extra (x int)",
        "DELETE FROM migration",
        "SELECT * FROM funding.award",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await pool.execute(statement)


def _with_login(dsn: str, user: str, password: str) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}"))


async def test_a_process_may_come_by_a_login_that_can_only_take_its_role(settings: Settings, owner: Connection) -> None:
    login = settings.database_dsn.rpartition("/")[2] + "_door"
    await owner.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'secret' NOINHERIT IN ROLE smdih_ingest")
    try:
        pool = await create_pool(_with_login(settings.database_dsn, login, "secret"), schema="ingest", size_max=1)
        async with transaction(pool) as connection:
            assert await connection.fetchval("SELECT current_user") == "smdih_ingest"
            await connection.fetchval("SELECT count(*) FROM machine")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await pool.execute("SET ROLE smdih_funding")
        await pool.close()
    finally:
        await owner.execute(f"DROP ROLE {login}")


async def test_a_reader_sees_the_view_of_its_firm_and_no_table(settings: Settings, owner: Connection) -> None:
    await _two_firms(owner)
    await owner.execute("CREATE ROLE smdih_firm_7 LOGIN PASSWORD 'secret' IN ROLE smdih_reader")
    reader = await asyncpg.connect(_with_login(settings.database_dsn, "smdih_firm_7", "secret"))
    try:
        for setting in ("8", "all", ""):  # the login decides, not what it says
            await reader.execute("SELECT set_config('smdih.firm_id', $1, false)", setting)
            seen: list[Any] = await reader.fetch("SELECT signal_id, value FROM ingest.samples")
            assert [(row["signal_id"], row["value"]) for row in seen] == [(7, 7.0)]
        for table in ("machine", "frame", "rollup_1m", "credential"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await reader.fetch(f"SELECT * FROM ingest.{table}")
        with pytest.raises(asyncpg.PostgresError):
            await reader.fetch("SELECT * FROM funding.award")
    finally:
        await reader.close()
        await owner.execute("DROP ROLE smdih_firm_7")


async def test_a_request_of_a_firm_is_narrowed_at_both_edges_and_an_operators_is_not(
    servers: Servers, settings: Settings, owner: Connection, tmp_path: Path
) -> None:
    """As the database itself sees it: a trigger writes down for whom each site was made."""
    await owner.execute(
        """
        CREATE TABLE public.made_for (site_id bigint, firm text);
        GRANT ALL ON public.made_for TO smdih_ingest;
        CREATE FUNCTION public.note_made_for() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO public.made_for VALUES (NEW.id, current_setting('smdih.firm_id', true));
            RETURN NULL;
        END $$;
        CREATE TRIGGER made_for AFTER INSERT ON ingest.site FOR EACH ROW EXECUTE FUNCTION public.note_made_for();
        """
    )
    try:
        async with running(servers, settings, tmp_path) as hub:
            firm = await hub.firm()
            by_http = await created(firm.admin, "/v1/sites", {"slug": "york", "name": "York"})
            async with grpc.aio.insecure_channel(hub.grpc) as channel:
                made = await registry_pb2_grpc.RegistryServiceStub(channel).CreateSite(
                    registry_pb2.CreateSiteRequest(slug="hull", name="Hull"),
                    metadata=(("authorization", firm.admin.headers["authorization"]),),
                )
        noted = {row["site_id"]: row["firm"] for row in await owner.fetch("SELECT * FROM public.made_for")}
        assert noted[firm.site_id] == tenancy.ALL
        assert noted[by_http["id"]] == noted[made.site.id] == str(firm.id)
    finally:
        await owner.execute(
            "DROP TRIGGER made_for ON ingest.site; DROP FUNCTION public.note_made_for; DROP TABLE public.made_for"
        )


async def test_migrating_again_changes_no_right(settings: Settings, owner: Connection) -> None:
    rights = (
        "SELECT c.oid::regclass::text, c.relacl::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = ANY($1) ORDER BY 1"
    )
    before = await owner.fetch(rights, list(SCHEMAS))
    for schema in SCHEMAS:
        assert (
            await migrate(
                settings.database_dsn, schema=schema, folder=Path(migrating.__file__).parent / schema / "migrations"
            )
            == []
        )
    assert await owner.fetch(rights, list(SCHEMAS)) == before
