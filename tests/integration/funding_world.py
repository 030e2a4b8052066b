"""The fund in one loop, by HTTP and gRPC, with a real matching service behind it."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import grpc
import httpx

from services.common import http, rpc, topics
from services.common.database import Pool, create_pool, transaction
from services.common.directory import Directory, entity_key
from services.common.evidence import Signer, Verifier, new_key
from services.common.identity import key_sha256
from services.common.kafka import Cluster, Publisher
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.common.tls import PeerChannel
from services.funding import call_store, edges
from services.funding.assessor_finder import AssessorFinder
from services.funding.domain import Match
from services.funding.journal import Journal
from services.funding.parameters import load_parameters
from services.funding.use_cases import UseCases
from services.matching.rpc import MatchingServicer
from smdih.directory.v1 import directory_pb2
from smdih.matching.v1 import matching_pb2_grpc
from tests.integration.matching_hub import FIRM, KEYS, ShiftedClock, publish_world, running_hub

DAY_US = 86_400_000_000
FIRMS = {FIRM: "East Midlands", 101: "East Midlands", 102: "Wales", 103: "Wales"}
ASSESSORS = ("gears", "vibration", "oil", "presses")
SECOND = "second operator"
ALL_KEYS = {**KEYS, SECOND: "smdih_test_second_operator", "device of 101": "smdih_test_device_101"}


@dataclass
class World:
    client: httpx.AsyncClient
    clock: ShiftedClock
    pool: Pool
    # For stubs of gRPC.
    channel: grpc.aio.Channel
    # Of evidence, as the ingest service signs it.
    signer: Signer
    # Asks the matching service.
    finder: AssessorFinder
    matches: int = 0

    async def ask(self, method: str, path: str, body: Any = None, *, who: str = "operator") -> httpx.Response:
        headers = {"authorization": f"Bearer {ALL_KEYS[who]}"} if who else {}
        return await self.client.request(method, path, json=body, headers=headers)

    async def done(self, method: str, path: str, body: Any = None, *, who: str = "operator") -> Any:
        answer = await self.ask(method, path, body, who=who)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()

    async def refused(self, status: int, reason: str, method: str, path: str, body: Any = None, **how: Any) -> str:
        answer = await self.ask(method, path, body, **how)
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text
        return str(answer.json()["detail"])

    async def call(self, budget: int, **terms: Any) -> str:
        now_us = self.clock.now_us()
        body = {
            "request_id": f"call-{now_us}",
            "title": "Gearboxes that report themselves",
            "budget_pence": budget,
            "opens_us": now_us - 1,
            "closes_us": now_us + DAY_US,
            "category": "experimental_development",
            "size_definition": "COMPANIES_ACT_2006",
            "terms": terms,
        }
        return str((await self.done("POST", "/v1/calls", body))["id"])

    async def submitted(
        self, call_id: str, firm_id: int, grant: int = 40_00, *, pledge: bool = True, **more: Any
    ) -> str:
        self.matches += 1
        name = f"match-{self.matches}"
        match = Match(
            id=name,
            event_id=name,
            firm_id=firm_id,
            need_id=name,
            offer_id=name,
            provider_id="helper",
            provider_title="Gears, oil debris and vibration",
            accepted_us=self.clock.now_us(),
            correlation_id=f"corr-{name}",
        )
        async with transaction(self.pool) as connection:
            await call_store.add_match(connection, match)
        size = {"headcount": "9", "turnover_minor": 1, "balance_minor": 1, "period_start": "2026-01-01"}
        body = {
            "request_id": name,
            "call_id": call_id,
            "match_id": name,
            "costs": [{"category": "labour", "amount_pence": grant * 5 // 2}],
            "declaration": {"size": size, "uk_registered": True},
            "requested_pence": grant,
            **more,
        }
        made = str((await self.done("POST", "/v1/applications", body))["id"])
        if pledge:
            promise = {"request_id": name, "co_investor": "Northgate", "kind": "cash", "amount_pence": grant * 3 // 2}
            path = f"/v1/applications/{made}/pledges"
            pledged = await self.done("POST", path, promise)
            await self.done("POST", f"{path}/{pledged['id']}/confirm", {"evidence": "letter"})
        await self.done("POST", f"/v1/applications/{made}/submit")
        return made

    async def scored(self, application_id: str, *scores: str, in_scope: bool = True) -> None:
        invited = {"provider_ids": list(ASSESSORS[: len(scores)])}
        judged = await self.done("POST", f"/v1/applications/{application_id}/assessors", invited)
        for review, score in zip(judged["reviews"], scores, strict=True):
            await self.accepted(review["id"])
            body = {"percent": score, "in_scope": in_scope, "justification": "sound plan"}
            await self.done("POST", f"/v1/reviews/{review['id']}/score", body, who="partner")

    async def accepted(self, review_id: str) -> None:
        body = {"no_conflict": True, "declaration": "I have no part in this. Dr X"}
        await self.done("POST", f"/v1/reviews/{review_id}/accept", body, who="partner")

    def close_calls(self) -> None:
        self.clock.shift += timedelta(days=2)

    async def state(self, application_id: str) -> tuple[str, str]:
        found = await self.done("GET", f"/v1/applications/{application_id}")
        return found["state"], found["decision_reason"].partition(":")[0]


@asynccontextmanager
async def running_world(settings: Settings, publisher: Publisher) -> AsyncIterator[World]:
    """The parts of the fund's process in this loop, with a clock that can be moved, and a matching service."""
    await publish_world(publisher)
    pb = directory_pb2
    more = []
    for firm_id, region in FIRMS.items():
        firm = pb.Firm(id=firm_id, name=f"=Firm {firm_id}", sic="25.62", region=region)
        more.append((entity_key("firm", firm_id), pb.DirectoryEntry(firm=firm)))
    for number, (who, role, firm_id) in enumerate(
        ((SECOND, pb.ROLE_OPERATOR, 0), ("device of 101", pb.ROLE_DEVICE, 101)), start=90
    ):
        credential = pb.Credential(id=number, sha256=key_sha256(ALL_KEYS[who]), role=role, firm_id=firm_id)
        more.append((entity_key("credential", number), pb.DirectoryEntry(credential=credential)))
    for key, entry in more:
        await publisher.publish(topics.DIRECTORY, entry.SerializeToString(), key=key.encode(), partition=0)
    async with AsyncExitStack() as stack:
        matching = await stack.enter_async_context(running_hub(settings))
        for name in ASSESSORS:
            expert = {"kind": "expert", "title": f"Dr {name}", "assesses": "also", "capacity_per_quarter": 2}
            await matching.ok("partner", "PUT", f"/v1/providers/{name}", {**expert, "text": f"{name}; gears and oil"})
        declared = {"kind": "expert", "title": "Dr Kin", "assesses": "also", "capacity_per_quarter": 2, "text": "gears"}
        await matching.ok("partner", "PUT", "/v1/providers/kin", {**declared, "conflict_firm_ids": [FIRM]})
        clock = matching.clock
        directory = Directory(
            Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix),
            clock=clock,
            kinds=("firm", "partner", "machine"),
        )
        runtime = Runtime()
        runtime.background("directory", directory.run())
        stack.push_async_callback(runtime._stack.aclose)
        await directory.wait_caught_up()
        port = await stack.enter_async_context(
            rpc.serve(
                host="127.0.0.1",
                port=0,
                directory=directory,
                register=[
                    (matching_pb2_grpc.add_MatchingServiceServicer_to_server, MatchingServicer(matching.matching))
                ],
            )
        )
        pool = await create_pool(settings.database_dsn, schema="funding", size_max=6)
        stack.push_async_callback(pool.close)
        finder = AssessorFinder(PeerChannel(f"127.0.0.1:{port}"))
        stack.push_async_callback(finder.close)
        signer = Signer(new_key())
        fund = UseCases(
            pool,
            journal=Journal(pool, clock),
            table=load_parameters(),
            directory=directory,
            verifier=Verifier([signer.public_key]),
            finder=finder,
            clock=clock,
            kick=lambda: None,
        )
        await fund.calls.open_programme()
        app = http.application("fund", runtime=runtime, directory=directory, routers=edges.routers(fund))
        served = await stack.enter_async_context(http.serve(app, host="127.0.0.1", port=0))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=f"http://127.0.0.1:{served}", timeout=200))
        by_grpc = await stack.enter_async_context(
            rpc.serve(
                host="127.0.0.1",
                port=0,
                directory=directory,
                register=edges.servicers(fund),
            )
        )
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{by_grpc}"))
        yield World(client, clock, pool, channel, signer, finder)
