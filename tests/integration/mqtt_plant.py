"""A Mosquitto with two bridges, two firms of different shares, and what an edge node does, by another MQTT client than ours."""

import asyncio
import json
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
import asyncpg
import httpx
import psutil

from localstack.hub import Hub
from localstack.mosquitto import Mosquitto
from localstack.servers import named_in_environment
from smdih.sparkplug.v1 import payload_pb2
from tests.polling import eventually

PASSWORD = "a gateway's password"
# Shares 6 and 1 of 8: of two bridges each has one.
FIRMS = ("acme", "birch")
SIGNALS = [{"name": "temperature", "unit": "degC"}, {"name": "current", "unit": "A"}, {"name": "Drive.speed"}]


@dataclass
class Plant:
    hub: Hub
    mosquitto: Mosquitto
    operator: httpx.AsyncClient
    database: "asyncpg.Pool[asyncpg.Record]"
    # A machine of each firm: acme/works/press-1 and so on.
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)

    async def add_firm(self, slug: str) -> None:
        firm = await self._made(
            "/v1/firms", {"name": slug, "slug": slug, "sic": "25.62", "region": "Wales", "size": "small"}
        )
        site = await self._made("/v1/sites", {"firm_id": firm["id"], "slug": "works", "name": "Works"})
        self.machines[slug] = await self.add_machine(site["id"], "press-1")

    async def add_machine(self, site_id: int, path: str) -> dict[str, Any]:
        body = {"site_id": site_id, "path": path, "name": path, "kind": "press", "signals": SIGNALS}
        return await self._made("/v1/machines", body)

    async def device_key(self, firm_id: int) -> str:
        made = await self._made("/v1/credentials", {"role": "device", "firm_id": firm_id})
        return str(made["key"])

    async def _made(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self.operator.post(path, json=body)
        assert answer.status_code == 201, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def client(self, user: str, **options: Any) -> aiomqtt.Client:
        return aiomqtt.Client("127.0.0.1", self.mosquitto.port, username=user, password=PASSWORD, **options)

    async def is_subscribed(self) -> bool:
        """The bridges read the topics of every firm."""
        found = 0.0
        async with httpx.AsyncClient() as client:
            for name, running in self.hub.processes.items():
                if name.startswith("mqtt"):
                    lines = (await client.get(f"{running.http}/metrics")).text.splitlines()
                    found += sum(
                        float(line.split()[-1]) for line in lines if line.startswith("smdih_ingest_mqtt_firms{")
                    )
        return found == len(FIRMS)

    async def stored(self, machine_id: int) -> dict[tuple[int, int], float]:
        """(position, time in ms) to value."""
        rows = await self.database.fetch(
            "SELECT (extract(epoch FROM ts) * 1000)::bigint AS ms, values FROM ingest.frame WHERE machine_id = $1",
            machine_id,
        )
        return {
            (position, row["ms"]): value
            for row in rows
            for position, value in enumerate(row["values"])
            if value is not None
        }

    async def quarantined(self, firm_id: int) -> list[tuple[str, int]]:
        """(reason, samples) of a firm's items."""
        rows = await self.database.fetch(
            "SELECT reason, samples FROM ingest.quarantine WHERE firm_id = $1 ORDER BY received, reason", firm_id
        )
        return [(row["reason"], row["samples"]) for row in rows]


def now_ms() -> int:
    return int(time.time() * 1000)


def metric(
    value: float | str | None, *, name: str = "", alias: int | None = None, kind: int = 10, **more: Any
) -> payload_pb2.Metric:
    """A metric of a Sparkplug type (10: double), encoded as the specification says."""
    made = payload_pb2.Metric(alias=alias, datatype=kind, **more)
    if name:
        made.name = name
    if isinstance(value, str):
        made.string_value = value.encode()
    elif value is None:
        made.is_null = True
    elif kind == 11:
        made.boolean_value = bool(value)
    elif kind == 9:
        made.float_value = value
    elif kind == 10:
        made.double_value = value
    elif kind in (4, 8):
        made.long_value = int(value) % 2**64
    else:
        made.int_value = int(value) % 2**32
    return made


class EdgeNode:
    """An edge node: births with aliases, data by alias, the sequence rule, a will."""

    def __init__(self, client: aiomqtt.Client, group: str, node: str) -> None:
        self._client = client
        self._base = (group, node)
        self._seq = 0
        self._time_ms = 0
        self.death_sequence = 0

    async def birth(self, metrics: Iterable[payload_pb2.Metric] = (), *, seq: int = 0) -> None:
        self._seq = seq
        await self.send("NBIRTH", [metric(self.death_sequence, name="bdSeq", kind=8), *metrics])

    async def death(self, death_sequence: int) -> None:
        body = payload_pb2.Payload(timestamp=now_ms(), metrics=[metric(death_sequence, name="bdSeq", kind=8)])
        await self._client.publish(self._topic("NDEATH"), body.SerializeToString(), qos=1)

    async def send(
        self, kind: str, metrics: Iterable[payload_pb2.Metric], *, device: str = "", timestamp: int = 0
    ) -> None:
        self._time_ms = timestamp or max(now_ms(), self._time_ms + 1)
        body = payload_pb2.Payload(timestamp=self._time_ms, metrics=metrics, seq=self._seq)
        self._seq = (self._seq + 1) % 256
        await self._client.publish(self._topic(kind, device), body.SerializeToString(), qos=0)

    async def publish(self, topic: str, body: bytes) -> None:
        """A plain message of the same account, acknowledged by the broker."""
        await self._client.publish(topic, body, qos=1)

    def skip(self) -> None:
        """As if a message had been lost on the way."""
        self._seq = (self._seq + 1) % 256

    async def rebirth_asked(self, deadline_s: float = 10) -> None:
        """Return when the host has asked for a rebirth."""
        received = await anext(aiter(self._client.messages))
        body = payload_pb2.Payload.FromString(bytes(received.payload))
        assert [(m.name, m.boolean_value) for m in body.metrics] == [("Node Control/Rebirth", True)]

    def _topic(self, kind: str, device: str = "") -> str:
        group, node = self._base
        return f"spBv1.0/{group}/{kind}/{node}" + (f"/{device}" if device else "")


@asynccontextmanager
async def edge_node(plant: Plant, firm: str, node: str) -> AsyncIterator[EdgeNode]:
    async with plant.client(firm) as client:
        await client.subscribe(f"spBv1.0/{firm}/NCMD/{node}", qos=0)
        yield EdgeNode(client, firm, node)


class TahuEdge:
    """An edge node of Eclipse Tahu, the reference implementation of Sparkplug."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def born(self) -> None:
        """Return when it has sent its births, once more for each call."""
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), 20)
        assert line == b"births\n", line

    async def send(self, device: str, at_ms: int, metrics: dict[str, float]) -> None:
        await self._say(json.dumps({"device": device, "ts": at_ms, "metrics": metrics}))

    async def stop(self) -> None:
        """Say goodbye."""
        await self._say("stop")
        await asyncio.wait_for(self._process.wait(), 20)

    async def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        await self._process.stdin.drain()


@asynccontextmanager
async def tahu_edge(
    plant: Plant, firm: str, node: str, devices: dict[str, dict[str, tuple[str, Any]]]
) -> AsyncIterator[TahuEdge]:
    """It waits for the hub's STATE before it sends; `devices`: device to metric to (Sparkplug's type, value at birth)."""
    options = {"port": plant.mosquitto.port, "password": PASSWORD, "group": firm, "node": node, "devices": devices}
    command = (sys.executable, "-m", "tests.integration.tahu_edge", json.dumps(options | {"host_id": "smdih"}))
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    try:
        yield TahuEdge(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def plain(value: float, at_ms: int) -> bytes:
    return json.dumps({"timestamp_ms": at_ms, "value": value}).encode()


@contextmanager
def paused(kafka_bootstrap: str) -> Iterator[None]:
    """The broker of the message log answers nothing, if it is one that these tests have started."""
    port = int(kafka_bootstrap.rpartition(":")[2])
    found = [] if named_in_environment() else [c.pid for c in psutil.net_connections("tcp") if _listens(c, port)]
    processes = [psutil.Process(pid) for pid in found if pid]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


def _listens(connection: Any, port: int) -> bool:
    return bool(connection.status == psutil.CONN_LISTEN and connection.laddr.port == port)


@asynccontextmanager
async def running_plant(hub: Hub, mosquitto: Mosquitto, dsn: str) -> AsyncIterator[Plant]:
    await hub.start()
    headers = {"Authorization": f"Bearer {hub.operator_key}"}
    async with (
        httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers) as operator,
        asyncpg.create_pool(dsn, min_size=1, max_size=3) as database,
    ):
        plant = Plant(hub, mosquitto, operator, database)
        for slug in FIRMS:
            await plant.add_firm(slug)
        await eventually(plant.is_subscribed)
        yield plant
