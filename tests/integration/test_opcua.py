"""The OPC UA gateway against a real server that is killed, with a hub that is killed as well."""

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import httpx
import pytest
import pytest_asyncio

from localstack.hub import Hub
from localstack.servers import ROOT, Servers, free_port
from services.common.settings import Settings
from tests.integration.opcua_server import PASSWORD, USER
from tests.polling import eventually

MACHINE = "acme/leeds/press-3"


@dataclass
class Plant:
    hub: Hub
    operator: httpx.AsyncClient
    firm_id: int
    key: str
    database: "asyncpg.Pool[asyncpg.Record]"

    async def start(self, *arguments: str, log: Path | None = None, **environment: str) -> asyncio.subprocess.Process:
        """Its output goes to `log`, or can be read."""
        with (log or Path(os.devnull)).open("ab") as file:
            out = file if log else asyncio.subprocess.PIPE
            return await asyncio.create_subprocess_exec(
                *(sys.executable, *arguments),
                cwd=ROOT,
                env=os.environ | {"SMDIH_KEY": self.key, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"} | environment,
                stdout=out,
                stderr=file if log else None,
            )

    async def stored(self, signal: str) -> dict[int, float]:
        """Microseconds to value."""
        rows = await self.database.fetch(
            "SELECT (extract(epoch FROM f.ts) * 1000000)::bigint AS us, f.values[s.position + 1] AS value "
            "FROM ingest.signal s JOIN ingest.frame f USING (machine_id) WHERE s.name = $1",
            signal,
        )
        return {row["us"]: row["value"] for row in rows if row["value"] is not None}


@pytest_asyncio.fixture(scope="module")
async def plant(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    hub = Hub(
        Servers(settings.kafka_bootstrap, settings.database_dsn),
        Path(tmp_path_factory.mktemp("hub")),
        topic_prefix=settings.kafka_topic_prefix,
        roles=("door", "historian"),
    )
    try:
        await hub.start()
        headers = {"Authorization": f"Bearer {hub.operator_key}"}
        async with (
            httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers) as operator,
            asyncpg.create_pool(settings.database_dsn, min_size=1, max_size=2) as database,
        ):
            firm = {"name": "Acme", "slug": "acme", "sic": "25.62", "region": "Wales", "size": "small"}
            firm_id = (await operator.post("/v1/firms", json=firm)).json()["id"]
            await operator.post("/v1/sites", json={"firm_id": firm_id, "slug": "leeds", "name": "Leeds"})
            key = (await operator.post("/v1/credentials", json={"role": "device", "firm_id": firm_id})).json()["key"]
            yield Plant(hub, operator, firm_id, key, database)
    finally:
        await hub.stop()


@dataclass
class Press:
    """The server's process, and what it has said."""

    plant: Plant
    port: int
    secured: Path | None = None
    # Microseconds to value.
    said: dict[int, float] = field(default_factory=dict)
    process: asyncio.subprocess.Process | None = None
    reading: asyncio.Task[None] | None = None

    async def start(self, first: int) -> None:
        more = [str(self.secured)] if self.secured else []
        self.process = await self.plant.start("-m", "tests.integration.opcua_server", str(self.port), str(first), *more)
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line == b"serves\n":
                break
        self.reading = asyncio.create_task(self._read(self.process.stdout))

    async def kill(self) -> None:
        assert self.process is not None
        assert self.reading is not None
        self.process.kill()
        await asyncio.gather(self.process.wait(), self.reading)

    async def _read(self, lines: asyncio.StreamReader) -> None:
        async for line in lines:
            number, _, at = line.partition(b" ")
            if at:
                self.said[int(at)] = float(number)


@pytest_asyncio.fixture(scope="module")
async def press(plant: Plant) -> AsyncIterator[Press]:
    made = Press(plant, free_port())
    await made.start(1)
    try:
        yield made
    finally:
        await made.kill()


async def test_what_browse_proposes_is_what_the_gateway_reads_for_ever(
    plant: Plant, press: Press, tmp_path: Path
) -> None:
    config = tmp_path / "gateway.toml"
    url = f"opc.tcp://127.0.0.1:{press.port}"
    door = plant.hub.processes["door"].grpc
    command = ("-m", "smdih_client", "opcua")
    browsing = await plant.start(
        *command, "browse", url, "--machine", MACHINE, "--target", door, "--config", str(config)
    )
    out, _ = await browsing.communicate()
    assert browsing.returncode == 0, out
    table = out.decode().splitlines()
    assert table == [
        "machine,machine_name,kind,signal,unit,range_min,range_max",
        f"{MACHINE},press-3,machine,Press 3.Axis-1.Speed,,,",
        f"{MACHINE},,,Press 3.Broken,,,",
        f"{MACHINE},,,Press 3.Running,,,",
        f"{MACHINE},,,Press 3.Temperature,degC,-50.0,1000000.0",
    ]
    imported = await plant.operator.post(f"/v1/firms/{plant.firm_id}/machines.csv", content="\r\n".join(table).encode())
    assert imported.status_code == 200, imported.text
    config.write_text(config.read_text().replace("interval_ms = 1000", "interval_ms = 100"))

    log = tmp_path / "gateway.log"
    gateway = await plant.start(*command, "run", "--config", str(config), log=log)
    try:

        async def flows() -> bool:
            newest = max(press.said)
            return max(await plant.stored("Press 3.Temperature"), default=0) > newest - 3_000_000

        await eventually(flows, deadline_s=60)
        # The hub is away for a while, and the gateway killed and started again meanwhile: what it had kept is sent afterwards.
        await plant.hub.pause("door")
        away_us = max(press.said)
        await asyncio.sleep(2.5)
        gateway.kill()
        await gateway.wait()
        killed_us = max(press.said)
        gateway = await plant.start(*command, "run", "--config", str(config), log=log)
        plant.hub.resume("door")
        await eventually(flows, deadline_s=60)
        # The server dies and comes back.
        await press.kill()
        await press.start(100_000)

        async def flows_again() -> bool:
            return max((await plant.stored("Press 3.Temperature")).values()) >= 100_000

        await eventually(flows_again, deadline_s=60)
        gateway.terminate()
        assert await asyncio.wait_for(gateway.wait(), 60) == 0
    finally:
        if gateway.returncode is None:
            gateway.kill()
            await gateway.wait()

    stored = await plant.stored("Press 3.Temperature")
    assert stored.items() <= press.said.items()
    assert {value // 100_000 for value in stored.values()} == {0, 1}
    # Every change but those while the gateway or the server was dead; the last second before a kill had not been kept.
    kept = [at for at in press.said if min(stored) <= at < killed_us - 1_500_000]
    assert [at for at in kept if at not in stored] == []
    assert away_us < killed_us - 1_500_000
    assert set((await plant.stored("Press 3.Running")).values()) == {0.0, 1.0}
    assert set((await plant.stored("Press 3.Axis-1.Speed")).values()) == {7.0}
    assert await plant.stored("Press 3.Broken") == {}
    assert await plant.database.fetchval("SELECT count(*) FROM ingest.quarantine") == 0


async def test_polling_reads_all_variables_at_one_time(plant: Plant, press: Press, tmp_path: Path) -> None:
    site = await plant.database.fetchval("SELECT id FROM ingest.site")
    body = {"site_id": site, "path": "press-polled", "name": "Polled", "kind": "press"}
    made = await plant.operator.post("/v1/machines", json=body | {"signals": [{"name": "a"}, {"name": "b"}]})
    (tmp_path / "gateway.toml").write_text(
        f'''
        target = "{plant.hub.processes["door"].grpc}"
        [[server]]
        url = "opc.tcp://127.0.0.1:{press.port}"
        mode = "poll"
        interval_ms = 100
        [[server.machine]]
        path = "acme/leeds/press-polled"
        signals = {{ a = "ns=2;s=Press3.Axis.Speed", b = "ns=2;s=Press3.Temperature" }}
        '''
    )
    gateway = await plant.start("-m", "smdih_client", "opcua", "run", "--config", str(tmp_path / "gateway.toml"))
    try:

        async def several() -> bool:
            rows = await plant.database.fetch(
                "SELECT values FROM ingest.frame WHERE machine_id = $1", made.json()["id"]
            )
            assert all(row["values"][0] == 7.0 and row["values"][1] is not None for row in rows)
            return len(rows) >= 10

        await eventually(several, deadline_s=60)
    finally:
        gateway.terminate()
        out, _ = await gateway.communicate()
    assert gateway.returncode == 0, out


def make_certificate(folder: Path, name: str, purpose: str) -> None:
    """By the command that the page on OPC UA shows."""
    page = (ROOT / "docs/opcua.md").read_text()
    command = page.partition("openssl req")[2].partition("```")[0].replace("\\\n", " ")
    for given, wanted in (
        ("gateway", name),
        ("clientAuth", purpose),
        ("certificate.der", f"{name}.der"),
        ("key.pem", f"{name}.pem"),
    ):
        assert given in command
        command = command.replace(given, wanted)
    subprocess.run(["openssl", "req", *shlex.split(command)], cwd=folder, check=True, capture_output=True)


async def test_a_server_that_wants_encryption_a_known_gateway_and_a_login_is_read(plant: Plant, tmp_path: Path) -> None:
    for name, purpose in (("server", "serverAuth"), ("gateway", "clientAuth"), ("stranger", "clientAuth")):
        make_certificate(tmp_path, name, purpose)
    shutil.copy(tmp_path / "gateway.der", tmp_path / "trusted.der")
    site = await plant.database.fetchval("SELECT id FROM ingest.site")
    body = {"site_id": site, "path": "press-safe", "name": "Safe", "kind": "press"}
    signals = [
        {"name": one} for one in ("Press 3.Axis-1.Speed", "Press 3.Broken", "Press 3.Running", "Press 3.Temperature")
    ]
    made = await plant.operator.post("/v1/machines", json=body | {"signals": signals})
    press = Press(plant, free_port(), secured=tmp_path)
    await press.start(1)
    config = tmp_path / "gateway.toml"

    async def browse(security: str, password: str) -> tuple[int, str]:
        command = ["-m", "smdih_client", "opcua", "browse", f"opc.tcp://127.0.0.1:{press.port}"]
        command += [
            "--machine",
            "acme/leeds/press-safe",
            "--target",
            plant.hub.processes["door"].grpc,
            "--config",
            str(config),
        ]
        command += ["--user", USER, "--password-env", "PLC_PASSWORD"]
        process = await plant.start(*command, *(["--security", security] if security else []), PLC_PASSWORD=password)
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    try:
        safe = "Basic256Sha256,SignAndEncrypt,{0}.der,{0}.pem,server.der"
        # A server that is not whom it should be is noticed by its silence, which takes 10 s.
        refused = asyncio.gather(
            browse("", PASSWORD),
            browse(safe.format("stranger"), PASSWORD),
            browse(safe.format("gateway"), "wrong"),
            browse(safe.format("gateway").replace("server.der", "stranger.der"), PASSWORD),
            browse(safe.format("missing"), PASSWORD),
        )
        code, out = await browse(safe.format("gateway"), PASSWORD)
        assert code == 0, out
        gateway = await plant.start(
            "-m", "smdih_client", "opcua", "run", "--config", str(config), log=tmp_path / "log", PLC_PASSWORD=PASSWORD
        )

        async def flows() -> bool:
            count = "SELECT count(*) FROM ingest.frame WHERE machine_id = $1"
            return bool(await plant.database.fetchval(count, made.json()["id"]) >= 5)

        try:
            await eventually(flows, deadline_s=60)
        finally:
            gateway.terminate()
            wrong, _ = await asyncio.gather(refused, gateway.wait())
        assert [code for code, _ in wrong] == [1] * len(wrong), wrong
    finally:
        await press.kill()
    assert gateway.returncode == 0, (tmp_path / "log").read_text()
