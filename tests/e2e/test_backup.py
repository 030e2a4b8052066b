"""A backup is worth what its restore is: dump under load, destroy, restore, compare; then the same with Kafka lost."""

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import numpy as np
import pytest
import pytest_asyncio
from aiokafka.admin import AIOKafkaAdminClient

from localstack.hub import Hub
from localstack.servers import ROOT, Servers, named_in_environment, pg_prefix
from services import logins
from services.common.database import create_pool
from services.common.settings import Settings
from services.migrate import migrate_all
from smdih_client import TelemetryClient
from tests import anomaly_plant as plant
from tests.integration import funding_ledger
from tests.polling import eventually

SIGNALS = [{"name": name, "unit": unit} for name, unit in plant.SIGNALS]
ROLES = ("door", "historian", "anomaly-worker")
COMMAND_DEADLINE_S = 120

pytestmark = pytest.mark.skipif(
    named_in_environment() is not None and not os.environ.get("SMDIH_PG_PREFIX"),
    reason="pg_dump of the named server's version is needed: say in SMDIH_PG_PREFIX how it is reached",
)


async def command(settings: Settings, module: str, *arguments: str) -> tuple[int, str, str]:
    """As an operator types it: python -m MODULE ARGUMENTS."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ
        | {
            "SMDIH_DATABASE_DSN": settings.database_dsn,
            "SMDIH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
            "SMDIH_KAFKA_TOPIC_PREFIX": settings.kafka_topic_prefix,
            "SMDIH_PG_PREFIX": os.environ.get("SMDIH_PG_PREFIX") or pg_prefix(),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}",
        },
    )
    async with asyncio.timeout(COMMAND_DEADLINE_S):
        output, told = await process.communicate()
    return process.returncode or 0, output.decode(), told.decode()


async def done(settings: Settings, module: str, *arguments: str) -> dict[str, Any]:
    code, output, told = await command(settings, module, *arguments)
    assert code == 0, told
    found: dict[str, Any] = json.loads(output)
    return found


@dataclass
class Works:
    """A firm's works: machines that send, and what was acknowledged of each."""

    hub: Hub
    firm: dict[str, Any] = field(default_factory=dict)
    site: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    sent: dict[int, int] = field(default_factory=dict)

    def client(self, key: str) -> httpx.AsyncClient:
        door = self.hub.processes["door"].http
        return httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    async def make(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self.client(self.hub.operator_key) as operator:
            answer = await operator.post(path, json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def open(self) -> None:
        body = {"name": "Acme", "slug": "acme", "sic": "25.62", "region": "Wales", "size": "small"}
        self.firm = await self.make("/v1/firms", body)
        self.site = await self.make("/v1/sites", {"firm_id": self.firm["id"], "slug": "leeds", "name": "Leeds"})
        self.key = (await self.device())["key"]

    async def device(self) -> dict[str, Any]:
        return await self.make("/v1/credentials", {"role": "device", "firm_id": self.firm["id"]})

    async def machine(self, name: str) -> int:
        body = {"site_id": self.site["id"], "path": name, "name": name, "kind": "press", "signals": SIGNALS}
        machine_id: int = (await self.make("/v1/machines", body))["id"]
        self.sent[machine_id] = 0
        return machine_id

    async def send(self, machine_id: int, *, rows: int = 1_500) -> None:
        """So many frames more, with a fault among them; returns once all are acknowledged."""
        first = self.sent[machine_id]
        values = plant.calm(machine_id * 1_000 + first, rows)
        values[rows // 2 : rows // 2 + 20, 0] += 60.0
        async with TelemetryClient(self.hub.processes["door"].grpc, self.key, source=f"gateway-{machine_id}") as client:
            for start in range(0, rows, 50):
                times = START_US + (first + start + np.arange(50)) * 1_000_000
                await client.send(machine_id, times, values[start : start + 50])
                await client.flush()  # records enough, so that a dump falls between two
            assert client.totals.acknowledged == 3 * rows
            assert client.totals.quarantined == 0
        self.sent[machine_id] = first + rows


START_US = (time.time_ns() // 1_000_000_000 // 3600 * 3600 - 4 * 3600) * 1_000_000


async def stored(database: "asyncpg.Connection[asyncpg.Record]") -> dict[int, int]:
    """Frames of each machine; a frame that were there twice would count twice."""
    rows = await database.fetch("SELECT machine_id, count(*) AS n FROM ingest.frame GROUP BY 1")
    return {row["machine_id"]: row["n"] for row in rows}


async def content(database: "asyncpg.Connection[asyncpg.Record]") -> str:
    found: str = await database.fetchval(
        "SELECT sum(hash_record_extended((machine_id, first_position, ts, values), 0)::numeric)::text FROM ingest.frame"
    )
    return found


async def alarms(database: "asyncpg.Connection[asyncpg.Record]") -> set[tuple[Any, ...]]:
    rows = await database.fetch("SELECT id, machine_id, position, started, ended, explanation FROM anomaly.alarm")
    return {tuple(row) for row in rows}


async def all_taken_in(works: Works, database: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Every acknowledged frame is stored, and the detector has come as far as the historian."""

    async def is_so() -> bool:
        if await stored(database) != {machine: sent for machine, sent in works.sent.items() if sent}:
            return False
        rows = await database.fetch(
            "SELECT i.next_offset = coalesce(a.next_offset, 0) AS same FROM ingest.position i LEFT JOIN anomaly.position a "
            "USING (topic, partition) WHERE i.topic LIKE '%samples.v1'"
        )
        return bool(rows) and all(row["same"] for row in rows)

    await eventually(is_so, deadline_s=90)


@pytest_asyncio.fixture
async def by_login(settings: Settings) -> AsyncIterator[dict[str, Settings]]:
    """The settings of who dumps and who reconciles: each comes by a login that may do no more."""
    at = urlsplit(settings.database_dsn)
    dsns = {
        name: at._replace(netloc=f"{at.path[1:]}_{name}:{secrets.token_hex(12)}@{at.hostname}:{at.port}")
        for name in ("backup", "reconcile")
    }
    admin = await asyncpg.connect(settings.database_dsn)
    await logins.make(
        admin, {name: logins.Identity(dsn.username or "", dsn.password or "") for name, dsn in dsns.items()}
    )
    await admin.close()
    yield {name: settings.model_copy(update={"database_dsn": dsn.geturl()}) for name, dsn in dsns.items()}
    admin = await asyncpg.connect(settings.database_dsn)
    for dsn in dsns.values():
        await admin.execute(f"DROP ROLE {dsn.username}")
    await admin.close()


@pytest.mark.timeout(600)  # half a minute on a quiet machine; three hubs are started, one after the other
async def test_what_was_dumped_comes_back_and_the_rest_from_the_surviving_side(
    servers: Servers,
    settings: Settings,
    by_login: dict[str, Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SMDIH_ANOMALY_CHECKPOINT_INTERVAL_S", "0.5")
    own = Servers(settings.kafka_bootstrap, settings.database_dsn)
    hub = Hub(own, tmp_path, topic_prefix=settings.kafka_topic_prefix, roles=ROLES)
    works, file = Works(hub), tmp_path / "hub.dump"
    await hub.start()
    try:
        await works.open()
        first = await works.machine("press-1")
        stolen = await works.device()
        await _spend_money(settings)
        # The dump is taken while samples come in and ids are given out: of each partition it has rows and position of one moment.
        watching = await asyncpg.connect(settings.database_dsn)
        dumping = asyncio.create_task(done(by_login["backup"], "services.backup", "dump", str(file)))
        sending = asyncio.create_task(works.send(first))
        while not dumping.done():
            await watching.execute("SELECT nextval(pg_get_serial_sequence('ingest.audit', 'id'))")
            await asyncio.sleep(0.01)
        await sending
        dumped = dumping.result()
        assert dumped["rows"] > 0
        assert await watching.fetchval("SELECT bytes FROM ingest.backup_run ORDER BY finished DESC") == dumped["bytes"]
        await watching.close()

        # What becomes of the hub after the dump.
        second = await works.machine("press-2")
        await asyncio.gather(works.send(first), works.send(second))
        async with works.client(hub.operator_key) as operator:
            assert (await operator.delete(f"/v1/credentials/{stolen['id']}")).status_code in (200, 204)
        new_key = (await works.device())["key"]
        database = await asyncpg.connect(settings.database_dsn)
        await all_taken_in(works, database)
        before = await content(database), await alarms(database)
        assert {alarm[1] for alarm in before[1]} == {first, second}
        await database.close()
        code, _, told = await command(by_login["reconcile"], "services.reconcile", "after-restore")
        assert code == 1
        assert "stop them, and whatever starts them" in told
    finally:
        await hub.stop()

    await _destroy_database(servers, settings)
    restored = await done(settings, "services.backup", "restore", str(file))
    assert (restored["rows"], restored["sha256"]) == (dumped["rows"], dumped["sha256"])
    code, _, told = await command(settings, "services.backup", "restore", str(file))
    assert code == 1
    assert "nothing was changed" in told
    pool = await create_pool(settings.database_dsn, schema="funding", size_max=1)
    await funding_ledger.assert_in_order(pool)
    await pool.close()
    reconciled = await done(by_login["reconcile"], "services.reconcile", "after-restore")
    assert reconciled["taken_from_directory"] == {"machine": 1, "credential": 1}
    assert (reconciled["keys_revoked"], reconciled["records_lost"]) == (1, 0)
    assert reconciled["records_to_take_in"] > 0

    hub = works.hub = Hub(own, tmp_path, topic_prefix=settings.kafka_topic_prefix, roles=ROLES)
    await hub.start()
    try:
        database = await asyncpg.connect(settings.database_dsn)
        await all_taken_in(works, database)
        assert (await content(database), await alarms(database)) == before
        async with works.client(stolen["key"]) as thief, works.client(new_key) as device:
            path = f"/v1/machines/{second}/latest"
            assert ((await thief.get(path)).status_code, (await device.get(path)).status_code) == (401, 200)
        # An id that was given out after the dump is not given to another machine.
        third = await works.machine("press-3")
        assert third > second
        await works.send(third)
        await all_taken_in(works, database)
        before = await content(database), await alarms(database)
        await database.close()
    finally:
        await hub.stop()

    await _lose_kafka(settings)
    begun = await done(by_login["reconcile"], "services.reconcile", "after-kafka-loss")
    assert begun["positions_begun_anew"] > 0

    hub = works.hub = Hub(own, tmp_path, topic_prefix=settings.kafka_topic_prefix, roles=ROLES)
    await hub.start()
    try:
        database = await asyncpg.connect(settings.database_dsn)
        async with works.client(stolen["key"]) as thief, works.client(new_key) as device:
            assert ((await thief.get(path)).status_code, (await device.get(path)).status_code) == (401, 200)
        await asyncio.gather(works.send(first), works.send(third))
        await all_taken_in(works, database)
        assert await stored(database) == works.sent
        found = await alarms(database)
        # The detector knew the machines still: it found the new faults, and nothing else.
        assert {alarm[1] for alarm in found - before[1]} == {first, third}
        await database.close()
    finally:
        await hub.stop()


async def test_a_dump_that_is_damaged_is_not_restored(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "hub.dump"
    await done(settings, "services.backup", "dump", str(file))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    code, _, told = await command(settings, "services.backup", "restore", str(file))
    assert (code, "Take another copy" in told, "Traceback" in told) == (1, True, False)


async def test_a_dump_that_cannot_be_written_leaves_nothing_behind(settings: Settings, tmp_path: Path) -> None:
    code, _, told = await command(settings, "services.backup", "dump", str(tmp_path / "no-folder" / "hub.dump"))
    assert (code, "cannot be written" in told, "Traceback" in told) == (1, True, False)
    nowhere = settings.model_copy(update={"database_dsn": "postgresql://nobody:x@127.0.0.1:1/none"})
    code, _, told = await command(nowhere, "services.backup", "dump", str(tmp_path / "hub.dump"))
    assert (code, "SMDIH_DATABASE_DSN" in told, "Traceback" in told) == (1, True, False)
    assert list(tmp_path.iterdir()) == []


async def _spend_money(settings: Settings) -> None:
    pool = await create_pool(settings.database_dsn, schema="funding", size_max=1)
    call_id = await funding_ledger.new_call(pool, 1_000_000_00)
    for number in range(20):
        await funding_ledger.post(pool, funding_ledger.commitment(call_id, 1_000_00 + number, str(number)))
    await pool.close()


async def _destroy_database(servers: Servers, settings: Settings) -> None:
    admin = await asyncpg.connect(servers.database_dsn)
    await admin.execute(f"DROP DATABASE {settings.database_dsn.rpartition('/')[2]} WITH (FORCE)")
    await admin.close()


async def _lose_kafka(settings: Settings) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()
    try:
        mine = [name for name in await admin.list_topics() if name.startswith(settings.kafka_topic_prefix)]
        await admin.delete_topics(mine)

        async def are_gone() -> bool:
            return not set(mine) & set(await admin.list_topics())

        await eventually(are_gone)
    finally:
        await admin.close()
    await migrate_all(settings)
