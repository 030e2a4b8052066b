"""A door and a historian for the tests of the registry, with a firm of its own for each test."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from localstack.hub import Hub
from localstack.servers import Servers
from services.common.settings import Settings

SIGNALS = [
    {"name": "temperature", "unit": "degC", "range_min": -50, "range_max": 300},
    {"name": "current", "unit": "A"},
]


@dataclass
class FirmAtHub:
    """A firm with a site and keys, and HTTP clients that use them."""

    hub: Hub
    operator: httpx.AsyncClient
    id: int
    slug: str
    site_id: int
    admin: httpx.AsyncClient
    device: httpx.AsyncClient
    device_key: str
    device_credential_id: int

    async def machine(self, name: str = "press-1", signals: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        body = {
            "site_id": self.site_id,
            "path": name,
            "name": name,
            "kind": "press",
            "signals": SIGNALS if signals is None else signals,
        }
        return await created(self.admin, "/v1/machines", body)

    async def send(
        self, machine: str | int, values: dict[str, Any] | None = None, *, ts: int = 0, key: str = ""
    ) -> httpx.Response:
        """One frame, now if `ts` (milliseconds) is not given."""
        frame = {"ts": ts or int(time.time() * 1000), "values": {"temperature": 21.5} if values is None else values}
        body = {"source": "gateway-1", "batches": [{"machine": machine, "frames": [frame]}]}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return await self.device.post("/v1/telemetry", json=body, headers=headers)

    async def diagnosis(self, machine_id: int) -> dict[str, Any]:
        answer = await self.admin.get(f"/v1/machines/{machine_id}/diagnosis")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@dataclass
class RegistryHub:
    """The hub; every firm made on it is another tenant."""

    hub: Hub
    operator: httpx.AsyncClient
    _open: list[httpx.AsyncClient] = field(default_factory=list)

    @property
    def http(self) -> str:
        return self.hub.processes["door"].http

    @property
    def grpc(self) -> str:
        return self.hub.processes["door"].grpc

    def client(self, key: str) -> httpx.AsyncClient:
        made = httpx.AsyncClient(
            base_url=self.http, headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30
        )
        self._open.append(made)
        return made

    async def firm(self) -> FirmAtHub:
        slug = f"firm-{secrets.token_hex(3)}"
        firm = await created(
            self.operator,
            "/v1/firms",
            {"name": slug, "slug": slug, "sic": "25.62", "region": "Northern Ireland", "size": "small"},
        )
        site = await created(self.operator, "/v1/sites", {"firm_id": firm["id"], "slug": "leeds", "name": "Leeds"})
        admin = await created(self.operator, "/v1/credentials", {"role": "firm", "firm_id": firm["id"]})
        device = await created(self.operator, "/v1/credentials", {"role": "device", "firm_id": firm["id"]})
        return FirmAtHub(
            self.hub,
            self.operator,
            firm["id"],
            slug,
            site["id"],
            self.client(admin["key"]),
            self.client(device["key"]),
            device["key"],
            device["id"],
        )

    async def close(self) -> None:
        for client in self._open:
            await client.aclose()


async def created(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = await client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    found: dict[str, Any] = answer.json()
    return found


@asynccontextmanager
async def running(servers: Servers, settings: Settings, folder: Path) -> AsyncIterator[RegistryHub]:
    own = Servers(settings.kafka_bootstrap, settings.database_dsn)
    hub = Hub(own, folder, topic_prefix=settings.kafka_topic_prefix, roles=("door", "historian"))
    try:
        await hub.start()
        made = RegistryHub(hub, httpx.AsyncClient())
        made.operator = made.client(hub.operator_key)
        yield made
        await made.close()
    finally:
        await hub.stop()


async def set_quota(firm: FirmAtHub, **quota: int) -> dict[str, Any]:
    answer = await firm.operator.put(f"/v1/firms/{firm.id}/quota", json=quota)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def import_table(
    firm: FirmAtHub, text: str | bytes, *, preview: bool = False, client: httpx.AsyncClient | None = None
) -> httpx.Response:
    return await (client or firm.admin).post(
        f"/v1/firms/{firm.id}/machines.csv",
        content=text,
        params={"preview": "true"} if preview else {},
        headers={"Content-Type": "text/csv"},
    )
