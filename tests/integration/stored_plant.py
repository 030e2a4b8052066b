"""A firm whose machines' data stand in the database already, and a door that answers for them."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import numpy as np
import numpy.typing as npt

from localstack.hub import Hub
from localstack.servers import Servers
from services.common.settings import Settings
from services.ingest.domain import CHANNEL_GROUP
from services.ingest.historian.binarycopy import HEADER, TRAILER, keyed_rows


class Wire:
    """Between the hub and its database; it can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_cut = False

    def cut(self) -> None:
        self._is_cut = True
        for writer in self._writers:
            writer.transport.abort()

    def mend(self) -> None:
        self._is_cut = False

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        inner_reader, inner_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, inner_writer}
        try:
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        finally:
            self._writers -= {writer, inner_writer}
            for one in (writer, inner_writer):
                one.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


@dataclass
class StoredPlant:
    hub: Hub
    wire: Wire
    operator: httpx.AsyncClient
    firm: dict[str, Any]
    site: dict[str, Any]
    firm_key: str
    http: httpx.AsyncClient
    stranger: httpx.AsyncClient
    database: "asyncpg.Pool[asyncpg.Record]"

    async def machine(self, path: str, signals: list[dict[str, Any]]) -> dict[str, Any]:
        body = {"site_id": self.site["id"], "path": path, "name": path, "kind": "press", "signals": signals}
        answer = await self.operator.post("/v1/machines", json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def store(
        self,
        machine: dict[str, Any],
        times_us: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64],
        *,
        rollups: bool = True,
    ) -> None:
        """Frames and their closed buckets, as the historian leaves them."""
        async with self.database.acquire() as connection:
            for first in range(0, values.shape[1], CHANNEL_GROUP):
                group = np.ascontiguousarray(values[:, first : first + CHANNEL_GROUP])
                for start in range(0, len(times_us), 50_000):
                    part = slice(start, start + 50_000)
                    count = len(times_us[part])
                    rows = keyed_rows(
                        np.full(count, machine["id"]), np.full(count, first), times_us[part], [group[part]]
                    )
                    await connection.copy_to_table(
                        "frame",
                        schema_name="ingest",
                        columns=["machine_id", "first_position", "ts", "values"],
                        source=io.BytesIO(HEADER + rows + TRAILER),
                        format="binary",
                    )
                if not rollups:
                    continue
                for table, width in (("rollup_1m", "1 minute"), ("rollup_1h", "1 hour")):
                    await connection.execute(
                        f"INSERT INTO {table} SELECT $1, $2, b.* FROM buckets_from_frames($1, $2, '-infinity', (SELECT "
                        f"time_bucket('{width}', max(ts)) FROM frame WHERE machine_id = $1 AND first_position = $2), "
                        f"'{width}') AS b",
                        machine["id"],
                        first,
                    )

    async def key(self, role: str, **owner: int) -> str:
        made: str = (await self.operator.post("/v1/credentials", json={"role": role, **owner})).json()["key"]
        return made

    def memory_bytes(self) -> int:
        """Resident memory of the door now."""
        process = self.hub.processes["door"].process
        assert process is not None
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024


@asynccontextmanager
async def stored_plant(
    servers: Servers,
    settings: Settings,
    folder: Path,
    *,
    roles: tuple[str, ...] = ("door",),
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[StoredPlant]:
    direct = urlsplit(settings.database_dsn)
    assert direct.hostname
    assert direct.port
    wire = Wire(direct.hostname, direct.port)
    carrier = await asyncio.start_server(wire.carry, "127.0.0.1", 0)
    port = carrier.sockets[0].getsockname()[1]
    netloc = f"{direct.netloc.rpartition('@')[0]}@127.0.0.1:{port}".lstrip("@")
    own = Servers(settings.kafka_bootstrap, urlunsplit(direct._replace(netloc=netloc)))
    hub = Hub(own, folder, topic_prefix=settings.kafka_topic_prefix, roles=roles, environment=environment)
    try:
        await hub.start()
        door = hub.processes["door"].http

        def client(key: str) -> httpx.AsyncClient:
            return httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {key}"}, timeout=60)

        async with client(hub.operator_key) as operator:
            firms = []
            for slug in ("acme", "other"):
                body = {"name": slug, "slug": slug, "sic": "25.62", "region": "Northern Ireland", "size": "small"}
                firms.append((await operator.post("/v1/firms", json=body)).json())
            site = (
                await operator.post("/v1/sites", json={"firm_id": firms[0]["id"], "slug": "derry", "name": "Derry"})
            ).json()
            keys = [
                (await operator.post("/v1/credentials", json={"role": "firm", "firm_id": firm["id"]})).json()["key"]
                for firm in firms
            ]
            async with (
                client(keys[0]) as http,
                client(keys[1]) as stranger,
                asyncpg.create_pool(
                    settings.database_dsn, min_size=1, max_size=3, server_settings={"search_path": "ingest,public"}
                ) as database,
            ):
                yield StoredPlant(hub, wire, operator, firms[0], site, keys[0], http, stranger, database)
    finally:
        await hub.stop()
        wire.cut()
        carrier.close()
