"""A firm with one machine on a hub of doors and historian, and what the tests ask of it."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from localstack.hub import Hub
from localstack.servers import Servers
from services.common.settings import Settings
from smdih_client import TelemetryClient

SIGNALS: list[dict[str, Any]] = [
    {"name": "temperature", "unit": "degC", "range_min": -50, "range_max": 300},
    {"name": "current", "unit": "A"},
    {"name": "speed", "unit": "1/min"},
]


@dataclass
class Plant:
    """A firm with one machine on a running hub."""

    hub: Hub
    http: httpx.AsyncClient
    operator: httpx.AsyncClient
    firm: dict[str, Any]
    site: dict[str, Any]
    machine: dict[str, Any]
    device_key: str
    database: "asyncpg.Pool[asyncpg.Record]"

    async def new_machine(self, path: str, signals: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        body = {"site_id": self.site["id"], "path": path, "name": path, "kind": "press", "signals": signals or SIGNALS}
        answer = await self.operator.post("/v1/machines", json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def frames(self, machine_id: int) -> list[tuple[int, list[float | None]]]:
        rows = await self.database.fetch(
            "SELECT extract(epoch FROM ts)::bigint AS ts, values FROM ingest.frame WHERE machine_id = $1 "
            "ORDER BY first_position, ts",
            machine_id,
        )
        return [(row["ts"], row["values"]) for row in rows]

    async def quarantined(self, reason: str) -> list[dict[str, Any]]:
        items = (await self.http.get("/v1/quarantine")).json()["items"]
        return [item for item in items if item["reason"] == reason]

    def client(self, source: str) -> TelemetryClient:
        return TelemetryClient(self.hub.processes["door"].grpc, self.device_key, source=source)


@asynccontextmanager
async def running_plant(settings: Settings, logs: Path) -> AsyncIterator[Plant]:
    servers = Servers(settings.kafka_bootstrap, settings.database_dsn)
    hub = Hub(servers, logs, topic_prefix=settings.kafka_topic_prefix, roles=("door", "historian"))
    try:
        await hub.start()
        door = hub.processes["door"].http
        operator = httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {hub.operator_key}"})
        firm = (
            await operator.post(
                "/v1/firms", json={"name": "Acme", "slug": "acme", "sic": "25.62", "region": "Wales", "size": "small"}
            )
        ).json()
        site = (await operator.post("/v1/sites", json={"firm_id": firm["id"], "slug": "leeds", "name": "Leeds"})).json()
        key = (await operator.post("/v1/credentials", json={"role": "device", "firm_id": firm["id"]})).json()["key"]
        device = httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {key}"})
        database = await asyncpg.create_pool(settings.database_dsn, min_size=1, max_size=3)
        made = Plant(hub, device, operator, firm, site, {}, key, database)
        made.machine = await made.new_machine("press-1")
        yield made
        await asyncio.gather(operator.aclose(), device.aclose(), database.close())
    finally:
        await hub.stop()


def two_hours_ago_s() -> int:
    """On the hour."""
    return int(time.time()) // 3600 * 3600 - 7200
