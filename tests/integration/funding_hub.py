"""The fund as two real processes on one database, and a way to speak to them."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import httpx

from localstack.servers import free_port
from services.common import topics
from services.common.directory import entity_key
from services.common.identity import Role, key_prefix, key_sha256, new_key
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.funding.ledger_replay import replay
from smdih.directory.v1 import directory_pb2
from smdih.matching.v1 import events_pb2 as matching_pb2
from tests.polling import eventually

FIRM, OTHER_FIRM, SOFTWARE_FIRM, TOOLMAKER, LARGE_AWARDS, SISTER, OTHER_SISTER = 11, 12, 13, 14, 15, 16, 17
FIRMS = {
    FIRM: "25.62",
    OTHER_FIRM: "28.99",
    SOFTWARE_FIRM: "62.01",
    TOOLMAKER: "25.73",
    LARGE_AWARDS: "28.41",
    SISTER: "25.11",
    OTHER_SISTER: "25.12",
}
DAY_US = 86_400_000_000
PROCESSES = 2


@dataclass
class Hub:
    """Two processes of the fund, keys, and a way to speak to them."""

    urls: list[str]
    grpc_addresses: list[str]
    keys: dict[str, str]
    publisher: Publisher
    cluster: Cluster
    dsn: str
    client: httpx.AsyncClient
    environment: dict[str, str]

    async def ask(
        self, method: str, path: str, body: Any = None, *, who: str = "operator", process: int = 0
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[who]}"} if who else {}
        return await self.client.request(method, self.urls[process] + path, json=body, headers=headers)

    async def done(self, method: str, path: str, body: Any = None, *, who: str = "operator", process: int = 0) -> Any:
        answer = await self.ask(method, path, body, who=who, process=process)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    async def refused(self, status: int, reason: str, method: str, path: str, body: Any = None, **how: Any) -> str:
        answer = await self.ask(method, path, body, **how)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text
        detail: str = answer.json()["detail"]
        return detail

    async def match(self, firm_id: int = FIRM) -> str:
        """An accepted offer, published as matching does; waits until the fund knows it."""
        match_id = secrets.token_hex(8)
        await self.publisher.publish(topics.OFFERS, offer_event(match_id, firm_id), key=b"need")
        connection = await asyncpg.connect(self.dsn)

        async def known() -> bool:
            return bool(await connection.fetchval("SELECT count(*) FROM funding.match WHERE id = $1", match_id))

        try:
            # Partitions of a killed process are given to the others after its session's 10 s.
            await eventually(known, deadline_s=40)
        finally:
            await connection.close()
        return match_id

    async def call(self, **changes: Any) -> Any:
        return await self.done("POST", "/v1/calls", call_body(**changes))

    async def application(self, call_id: str, firm_id: int = FIRM, **changes: Any) -> Any:
        who = {FIRM: "firm", OTHER_FIRM: "other"}.get(firm_id, "operator")
        body = application_body(call_id, await self.match(firm_id), **changes)
        return await self.done("POST", "/v1/applications", body, who=who)

    async def pledge(self, application_id: str, pence: int, *, confirm: bool = True, **changes: Any) -> Any:
        path = f"/v1/applications/{application_id}/pledges"
        pledge = await self.done("POST", path, pledge_body(pence, **changes))
        if confirm:
            pledge = await self.done("POST", f"{path}/{pledge['id']}/confirm", {"evidence": "letter of 3 November"})
        return pledge

    async def submitted(self, call_id: str, *, grant: int, cost: int, pledged: int, firm_id: int = FIRM) -> str:
        """An application that only waits for the decision."""
        made = await self.application(
            call_id, firm_id, costs=[{"category": "materials", "amount_pence": cost}], requested_pence=grant
        )
        if pledged:
            await self.pledge(made["id"], pledged)
        await self.done("POST", f"/v1/applications/{made['id']}/submit")
        return str(made["id"])

    async def decide(self, application_id: str, *, award: bool = True, process: int = 0) -> httpx.Response:
        body = {"award": award, "reason": "best value"}
        return await self.ask("POST", f"/v1/applications/{application_id}/decide", body, process=process)

    async def trial_balance(self) -> Any:
        trial = await self.done("GET", "/v1/ledger/trial-balance")
        assert (trial["total_pence"], trial["in_order"]) == (0, True)
        return trial

    async def assert_replay_agrees(self) -> None:
        connection = await asyncpg.connect(self.dsn, server_settings={"search_path": "funding"})
        try:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                assert (await replay(connection)).faults == ()
        finally:
            await connection.close()

    def command(self, name: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "services.funding.main", name],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr


def offer_event(
    match_id: str, firm_id: int, change: Any = matching_pb2.OFFER_CHANGE_ACCEPTED, need_id: str = ""
) -> bytes:
    offer = matching_pb2.Offer(
        id=f"offer-{match_id}",
        need_id=need_id or f"need-{match_id}",
        firm_id=firm_id,
        provider_id="provider-1",
        provider_title="Spindle bearing clinic",
        match_id=match_id,
        correlation_id=f"corr-{match_id}",
    )
    event = matching_pb2.OfferEvent(
        event_id=f"event-{match_id}", change=change, changed_us=time.time_ns() // 1000, offer=offer
    )
    return event.SerializeToString()


def call_body(**changes: Any) -> dict[str, Any]:
    now_us = time.time_ns() // 1000
    return {
        "request_id": secrets.token_hex(8),
        "title": "Digital spindles",
        "budget_pence": 100_000_00,
        "opens_us": now_us - DAY_US,
        "closes_us": now_us + DAY_US,
        "category": "experimental_development",
        "size_definition": "COMPANIES_ACT_2006",
        **changes,
    }


def declaration(**changes: Any) -> dict[str, Any]:
    # A small firm: fewer than 50 people, below GBP 15m of turnover.
    size = {
        "headcount": "38",
        "turnover_minor": 420_000_000,
        "balance_minor": 210_000_000,
        "period_start": "2026-01-01",
    }
    return {"size": size, "uk_registered": True, **changes}


def application_body(call_id: str, match_id: str, **changes: Any) -> dict[str, Any]:
    return {
        "request_id": secrets.token_hex(8),
        "call_id": call_id,
        "match_id": match_id,
        "costs": [
            {"category": "labour", "amount_pence": 60_000_00},
            {"category": "capital_usage", "amount_pence": 40_000_00},
        ],
        "declaration": declaration(),
        "requested_pence": 40_000_00,
        **changes,
    }


def pledge_body(pence: int, **changes: Any) -> dict[str, Any]:
    body = {"request_id": secrets.token_hex(8), "co_investor": "Northgate Capital", "kind": "cash"}
    return {**body, "amount_pence": pence, **changes}


def credential(number: int, key: str, role: Role, firm_id: int = 0) -> directory_pb2.DirectoryEntry:
    roles = {
        Role.FIRM: directory_pb2.ROLE_FIRM,
        Role.OPERATOR: directory_pb2.ROLE_OPERATOR,
        Role.PARTNER: directory_pb2.ROLE_PARTNER,
        Role.DEVICE: directory_pb2.ROLE_DEVICE,
    }
    made = directory_pb2.Credential(
        id=number,
        prefix=key_prefix(key),
        sha256=key_sha256(key),
        role=roles[role],
        firm_id=firm_id,
        partner_id=5 if role is Role.PARTNER else 0,
    )
    return directory_pb2.DirectoryEntry(credential=made)


def started(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "services.funding.main", "api"], env=environment)


@contextmanager
def process(environment: dict[str, str]) -> Iterator[None]:
    running = started(environment)
    try:
        yield
    finally:
        running.terminate()
        assert running.wait(30) == 0


@asynccontextmanager
async def running_fund(settings: Settings, cluster: Cluster, publisher: Publisher) -> AsyncIterator[Hub]:
    """The processes of the fund, ready, with firms and keys in the directory."""
    for firm_id, sic in FIRMS.items():
        entry = directory_pb2.DirectoryEntry(firm=directory_pb2.Firm(id=firm_id, name=f"Firm {firm_id}", sic=sic))
        key = entity_key("firm", firm_id).encode()
        await publisher.publish(topics.DIRECTORY, entry.SerializeToString(), key=key, partition=0)
    people = {
        "operator": (Role.OPERATOR, 0),
        "second operator": (Role.OPERATOR, 0),
        "firm": (Role.FIRM, FIRM),
        "other": (Role.FIRM, OTHER_FIRM),
        "partner": (Role.PARTNER, 0),
        "device": (Role.DEVICE, FIRM),
    }
    keys = {}
    for number, (who, (role, firm_id)) in enumerate(people.items(), start=1):
        keys[who] = new_key(role)
        await publisher.publish(
            topics.DIRECTORY,
            credential(number, keys[who], role, firm_id).SerializeToString(),
            key=entity_key("credential", number).encode(),
            partition=0,
        )
    ports = [(free_port(), free_port()) for _ in range(PROCESSES)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "SMDIH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "SMDIH_KAFKA_TOPIC_PREFIX": settings.kafka_topic_prefix,
        "SMDIH_DATABASE_DSN": settings.database_dsn,
    }
    with (
        process({**environment, "SMDIH_HTTP_PORT": str(ports[0][0]), "SMDIH_GRPC_PORT": str(ports[0][1])}),
        process({**environment, "SMDIH_HTTP_PORT": str(ports[1][0]), "SMDIH_GRPC_PORT": str(ports[1][1])}),
    ):
        async with httpx.AsyncClient(timeout=30) as client:
            made = Hub(
                urls=[f"http://127.0.0.1:{http}" for http, _ in ports],
                grpc_addresses=[f"127.0.0.1:{port}" for _, port in ports],
                keys=keys,
                publisher=publisher,
                cluster=cluster,
                dsn=settings.database_dsn,
                client=client,
                environment=environment,
            )

            async def ready() -> bool:
                try:
                    answers = [await client.get(f"{url}/readyz") for url in made.urls]
                except httpx.TransportError:
                    return False
                return all(answer.status_code == 200 for answer in answers)

            await eventually(ready, deadline_s=40)
            yield made
