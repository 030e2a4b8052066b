"""A small world (firms, partners, machines, keys) and a matching service in it, on real servers."""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition

from services.common import topics
from services.common.clock import SystemClock, today
from services.common.database import Pool, create_pool
from services.common.directory import Directory, entity_key
from services.common.http import application
from services.common.http import serve as serve_http
from services.common.identity import key_sha256
from services.common.kafka import Cluster, Publisher
from services.common.outbox import OutboxRelay
from services.common.rpc import serve as serve_rpc
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.matching import edges, upkeep
from services.matching.index import ProviderIndex
from services.matching.needs import Limits
from services.matching.ranking import Ranker
from services.matching.service import Matching
from services.matching.stream import alarm_consumer
from services.matching.text import Embedder
from smdih.anomaly.v1 import events_pb2 as anomaly_pb
from smdih.directory.v1 import directory_pb2
from smdih.matching.v1 import events_pb2, matching_pb2_grpc, sessions_pb2_grpc

FIRM, OTHER_FIRM = 1, 2
PARTNER, OTHER_PARTNER = 1, 2
MACHINES_OF_A_FIRM = 40
SHARE_ALL = ["fault", "figures", "profile"]
KEYS = {name: f"smdih_test_{name}" for name in ("firm", "other_firm", "partner", "other_partner", "operator", "device")}


class ShiftedClock(SystemClock):
    """The real time, moved."""

    shift = timedelta(0)

    def now_us(self) -> int:
        return super().now_us() + self.shift // timedelta(microseconds=1)


def machine_id(firm_id: int, number: int) -> int:
    return firm_id * 100 + number


async def publish_world(publisher: Publisher) -> None:
    pb = directory_pb2
    entries: list[tuple[str, int, pb.DirectoryEntry]] = []
    for firm_id, slug, sic, region in (
        (FIRM, "acme", "28.15", "East Midlands"),
        (OTHER_FIRM, "other", "10.71", "Wales"),
    ):
        firm = pb.Firm(id=firm_id, name=slug.title(), slug=slug, sic=sic, region=region, size="small")
        entries.append(("firm", firm_id, pb.DirectoryEntry(firm=firm)))
        for number in range(MACHINES_OF_A_FIRM):
            machine = pb.Machine(
                id=machine_id(firm_id, number),
                firm_id=firm_id,
                path=f"{slug}/site/secret-{number}",
                kind="gearbox stand",
            )
            entries.append(("machine", machine.id, pb.DirectoryEntry(machine=machine)))
    partners = [
        pb.Partner(id=PARTNER, name="University", region="East Midlands"),
        pb.Partner(id=OTHER_PARTNER, name="Enterprise Scotland", region="Scotland"),
    ]
    entries += [("partner", partner.id, pb.DirectoryEntry(partner=partner)) for partner in partners]
    roles: Mapping[str, Any] = {
        "firm": {"role": pb.ROLE_FIRM, "firm_id": FIRM},
        "other_firm": {"role": pb.ROLE_FIRM, "firm_id": OTHER_FIRM},
        "partner": {"role": pb.ROLE_PARTNER, "partner_id": PARTNER},
        "other_partner": {"role": pb.ROLE_PARTNER, "partner_id": OTHER_PARTNER},
        "operator": {"role": pb.ROLE_OPERATOR},
        "device": {"role": pb.ROLE_DEVICE, "firm_id": FIRM},
    }
    for number, (name, fields) in enumerate(roles.items(), start=1):
        credential = pb.Credential(id=number, sha256=key_sha256(KEYS[name]), **fields)
        entries.append(("credential", number, pb.DirectoryEntry(credential=credential)))
    for kind, entity_id, entry in entries:
        await publisher.publish(
            topics.DIRECTORY, entry.SerializeToString(), key=entity_key(kind, entity_id).encode(), partition=0
        )


def alarm_event(alarm_id: str, machine: int, *, firm_id: int = FIRM, raised_us: int = 0, **fields: Any) -> bytes:
    """A raised alarm about iron in a gearbox's oil; `raised_us` 0: now."""
    alarm = anomaly_pb.Alarm(
        id=alarm_id,
        firm_id=firm_id,
        machine_id=machine,
        signal_id=5,
        machine_path="acme/site/secret-path",
        machine_kind="gearbox test stand",
        signal_name="oil_iron_particles",
        unit="ppm",
        severity=anomaly_pb.SEVERITY_HIGH,
        component="step",
        explanation="oil_iron_particles 84 ppm jumped from 20 ppm, 9.1 times its usual spread at once",
        active=True,
        correlation_id=f"samples-{alarm_id}",
    )
    alarm.MergeFrom(anomaly_pb.Alarm(**fields))
    return anomaly_pb.AlarmEvent(
        event_id=f"raised-{alarm_id}",
        change=anomaly_pb.ALARM_CHANGE_RAISED,
        changed_us=raised_us or SystemClock().now_us(),
        alarm=alarm,
    ).SerializeToString()


PROVIDERS: Mapping[str, Mapping[str, Any]] = {
    "gear-rigs": {
        "kind": "facility",
        "title": "Gear and transmission test rigs",
        "text": "Load, noise and efficiency rigs for gears, bearings and lubricants with oil-debris monitoring.",
        "region": "East Midlands",
        "sic_divisions": ["28", "29"],
        "capacity_per_quarter": 3,
    },
    "forming": {
        "kind": "expert",
        "title": "Hydraulic press and forming specialist",
        "text": "Deep drawing, blanking and hydroforming; tonnage monitoring, die wear, split-part troubleshooting.",
        "region": "Wales",
        "sic_divisions": ["24", "25"],
        "capacity_per_quarter": 3,
    },
    "dashboards": {
        "kind": "workshop",
        "title": "Spreadsheets to dashboards",
        "text": "One-day workshop turning production spreadsheets into live dashboards.",
        "region": "South West",
        "capacity_per_quarter": 20,
    },
    "iot-basics": {
        "kind": "course",
        "title": "Internet of things basics for factories",
        "text": "Self-paced course: sensors, gateways, data storage and simple alerts.",
        "region": "Online",
    },
}


@dataclass
class Hub:
    matching: Matching
    index: ProviderIndex
    pool: Pool
    clock: ShiftedClock
    publisher: Publisher
    client: httpx.AsyncClient
    stub: "matching_pb2_grpc.MatchingServiceAsyncStub"
    sessions: "sessions_pb2_grpc.SessionServiceAsyncStub"
    # For the stubs of the other services.
    channel: grpc.aio.Channel

    async def call(self, who: str, method: str, path: str, json: Any = None) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEYS[who]}"} if who else {}
        return await self.client.request(method, path, json=json, headers=headers)

    async def ok(self, who: str, method: str, path: str, json: Any = None) -> Any:
        response = await self.call(who, method, path, json)
        assert response.status_code < 300, response.text
        return response.json()

    async def put_providers(self, *names: str, **changes: Any) -> None:
        for name in names or PROVIDERS:
            await self.ok("partner", "PUT", f"/v1/providers/{name}", {**PROVIDERS[name], **changes})

    async def empty(self) -> None:
        """Without open needs, live providers, places taken or consent: what a test finds does not depend on those before it."""
        await self.close_all()
        await self.withdraw_all()
        await self.clear_places()
        await self.index.refresh()
        await self.ok("firm", "POST", "/v1/consents/revoke")

    async def close_all(self) -> None:
        """Every open need; what a firm may have in the search is limited."""
        while needs := (await self.ok("operator", "GET", "/v1/needs?state=open&page_size=200"))["needs"]:
            for need in needs:
                await self.ok("operator", "POST", f"/v1/needs/{need['id']}/close", {"reason": "The test is over."})

    async def withdraw_all(self) -> None:
        for provider in (await self.ok("operator", "GET", "/v1/providers?page_size=500"))["providers"]:
            if provider["active"]:
                await self.ok("operator", "POST", f"/v1/providers/{provider['id']}/withdraw")

    async def clear_places(self) -> None:
        """As if nobody had ever accepted; matches made by then cannot be cancelled any more."""
        await self.pool.execute("DELETE FROM place; DELETE FROM provider_quarter")

    async def matched(self, provider_id: str, text: str = "Our gears whine.", who: str = "firm") -> dict[str, Any]:
        """A new need of the firm whose offer of this provider is accepted; returns the match."""
        opened = await self.ok(who, "POST", "/v1/needs", {"text": text})
        offer = next(each for each in opened["offers"] if each["provider_id"] == provider_id)
        accepted = await self.ok(who, "POST", f"/v1/offers/{offer['id']}/accept")
        match: dict[str, Any] = accepted["match"]
        return match

    async def raise_alarm(self, alarm_id: str, machine: int, **fields: Any) -> None:
        await self.publisher.publish(topics.ALARMS, alarm_event(alarm_id, machine, **fields), key=alarm_id.encode())

    async def needs_of(self, machine: int, who: str = "firm") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.ok(who, "GET", f"/v1/needs?machine_id={machine}"))["needs"]
        return found

    async def alarms_taken_in(self, cluster: Cluster) -> bool:
        """Everything in the topic has been taken in."""
        consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap, group_id=None)
        await consumer.start()
        try:
            name = cluster.name(topics.ALARMS)
            ends = await consumer.end_offsets([TopicPartition(name, number) for number in range(4)])
        finally:
            await consumer.stop()
        rows = await self.pool.fetch("SELECT partition, next_offset FROM position WHERE topic = $1", name)
        positions = {row["partition"]: row["next_offset"] for row in rows}
        return all(positions.get(partition.partition, 0) >= end for partition, end in ends.items())


@asynccontextmanager
async def running_hub(
    settings: Settings,
    *,
    publishing: bool = True,
    taking_alarms: bool = True,
    upkeep_runs: bool = True,
    limits: Limits | None = None,
    with_model: bool = True,
) -> AsyncIterator[Hub]:
    """The parts of the api process in this loop, with a clock that can be moved."""
    cluster, clock = Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix), ShiftedClock()
    async with AsyncExitStack() as stack:
        tasks: list[asyncio.Task[None]] = []

        async def stop_tasks() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        pool = await create_pool(settings.database_dsn, schema="matching", size_max=10)
        stack.push_async_callback(pool.close)
        publisher = await stack.enter_async_context(Publisher(cluster))
        stack.push_async_callback(stop_tasks)
        directory = Directory(cluster, clock=clock, kinds=("firm", "machine", "partner"))
        tasks.append(asyncio.create_task(directory.run()))
        embedder = await asyncio.to_thread(Embedder.installed) if with_model else None
        index = ProviderIndex(pool, Ranker(embedder, today=functools.partial(today, clock)), embedder, clock=clock)
        stack.push_async_callback(index.close)
        relay = OutboxRelay(pool, publisher, schema="matching")
        matching = Matching(pool, index, relay, directory, clock=clock, limits=limits or Limits())
        await directory.wait_caught_up()
        await index.refresh()
        tasks.append(asyncio.create_task(index.run()))
        if publishing:
            tasks.append(asyncio.create_task(relay.run()))
        if taking_alarms:
            tasks.append(asyncio.create_task(alarm_consumer(cluster, pool, publisher, matching).run()))
        if upkeep_runs:
            tasks.append(asyncio.create_task(upkeep.run(matching, interval_s=0.1)))
        app = application("SMDIH matching", runtime=Runtime(), directory=directory, routers=edges.routers(matching))
        http_port = await stack.enter_async_context(serve_http(app, host="127.0.0.1", port=0))
        grpc_port = await stack.enter_async_context(
            serve_rpc(
                host="127.0.0.1",
                port=0,
                directory=directory,
                register=edges.servicers(matching),
            )
        )
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{http_port}", timeout=30)
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}"))
        stub = matching_pb2_grpc.MatchingServiceStub(channel)
        sessions = sessions_pb2_grpc.SessionServiceStub(channel)
        yield Hub(matching, index, pool, clock, publisher, client, stub, sessions, channel)


def bearer(who: str) -> tuple[tuple[str, str], ...]:
    """Metadata with the key of this name; none for no name."""
    return (("authorization", f"Bearer {KEYS[who]}"),) if who else ()


async def refused_by_grpc(call: Callable[..., Awaitable[Any]], request: Any, who: str) -> str:
    """The status with which a call is refused."""
    try:
        await call(request, metadata=bearer(who))
    except grpc.aio.AioRpcError as error:
        return error.code().name
    return "OK"


async def offer_events(cluster: Cluster) -> list[events_pb2.OfferEvent]:
    """Every event in the topic by now, in order within a need."""
    consumer = AIOKafkaConsumer(bootstrap_servers=cluster.bootstrap, group_id=None, auto_offset_reset="earliest")
    await consumer.start()
    try:
        partitions = [TopicPartition(cluster.name(topics.OFFERS), number) for number in range(4)]
        consumer.assign(partitions)
        ends = await consumer.end_offsets(partitions)
        await consumer.seek_to_beginning(*partitions)
        events: list[events_pb2.OfferEvent] = []
        for partition in partitions:
            while await consumer.position(partition) < ends[partition]:
                for records in (await consumer.getmany(*partitions, timeout_ms=200)).values():
                    events += [events_pb2.OfferEvent.FromString(record.value) for record in records]
        return events
    finally:
        await consumer.stop()


async def offers_of(hub: Hub, need_id: str, who: str = "firm") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await hub.ok(who, "GET", f"/v1/needs/{need_id}/offers"))["offers"]
    return found


async def open_need(hub: Hub, text: str = "Our gears whine and the oil is full of debris.", **fields: Any) -> Any:
    return await hub.ok("firm", "POST", "/v1/needs", {"text": text, **fields})


async def told(hub: Hub, need_id: str) -> list[str]:
    """What the firm was told of the need, newest first."""
    found = (await hub.ok("firm", "GET", "/v1/notices?page_size=500"))["notices"]
    return [each["kind"] for each in found if each["subject_id"] == need_id]


async def events_of(cluster: Cluster, need_id: str) -> list[events_pb2.OfferEvent]:
    return [event for event in await offer_events(cluster) if event.offer.need_id == need_id]
