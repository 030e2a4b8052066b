"""The fund as two real processes on one database: from a match to an award, races between the two, and who may do what."""

import asyncio
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition

from localstack.servers import free_port
from services.common import topics
from services.common.directory import entity_key
from services.common.identity import Role, key_prefix, key_sha256, new_key
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.funding.domain import uk_day
from services.funding.ledger_replay import replay
from services.funding.rules.calendar import add_months
from smdih.directory.v1 import directory_pb2
from smdih.funding.v1 import agreement_pb2, agreement_pb2_grpc, events_pb2, funding_pb2, funding_pb2_grpc
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


def offer_event(match_id: str, firm_id: int, change: Any = matching_pb2.OFFER_CHANGE_ACCEPTED) -> bytes:
    offer = matching_pb2.Offer(
        id=f"offer-{match_id}",
        need_id=f"need-{match_id}",
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


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, cluster: Cluster, publisher: Publisher) -> AsyncIterator[Hub]:
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


async def test_from_a_match_to_an_award_with_money_matched_and_ledger_balanced(hub: Hub) -> None:
    call = await hub.call()
    assert (call["state"], call["left_pence"]) == ("open", 100_000_00)
    application = await hub.application(call["id"])
    assert application["state"] == "draft"
    path = f"/v1/applications/{application['id']}"
    asked = application["assessment"]
    assert (asked["size"], asked["max_grant_pence"], asked["grant_pence"]) == ("small", 45_000_00, 40_000_00)
    assert (asked["match_required_pence"], asked["match_counted_pence"]) == (60_000_00, 0)

    pledge = await hub.done("POST", f"{path}/pledges", pledge_body(60_000_00), who="firm")
    await hub.done("POST", f"{path}/submit", who="firm")
    assert (await hub.decide(application["id"])).json()["reason"] == "MATCH_SHORTFALL"
    await hub.done("POST", f"{path}/pledges/{pledge['id']}/confirm", {"evidence": "letter of 3 November"})
    awarded = (await hub.decide(application["id"])).json()

    assert awarded["state"] == "awarded"
    award = awarded["award"]
    assert (award["grant_pence"], award["co_investment_pence"]) == (40_000_00, 60_000_00)
    assert all(finding["met"] for finding in award["findings"])
    assert award["database_entry_due"] is None
    again = await hub.decide(application["id"], process=1)
    assert again.json() == awarded
    await hub.refused(409, "ALREADY_DECIDED", "POST", f"{path}/decide", {"award": False, "reason": "no"})
    call = await hub.done("GET", f"/v1/calls/{call['id']}", who="firm")
    assert (call["committed_pence"], call["left_pence"]) == (40_000_00, 60_000_00)
    trial = await hub.trial_balance()
    balances = {row["kind"]: row["balance_pence"] for row in trial["accounts"] if row["call_id"] == call["id"]}
    assert balances == {
        "public_budget": 60_000_00,
        "public_committed": 40_000_00,
        "public_held": 0,
        "public_paid": 0,
        "public_recovered": 0,
        "co_investment_source": -60_000_00,
        "co_investment_pledged": 0,
        "co_investment_committed": 60_000_00,
        "co_investment_paid": 0,
    }
    await hub.assert_replay_agrees()

    event = await published_award(hub, award["id"])
    assert event.event_id == f"{award['id']}:awarded"
    assert (event.award.grant_pence, event.award.co_investment_pence) == (40_000_00, 60_000_00)
    assert event.award.parameters_version == award["parameters_version"]
    # One thread from the machine's samples to the money.
    correlation_id = f"corr-{application['match_id']}"
    assert event.award.correlation_id == correlation_id
    connection = await asyncpg.connect(hub.dsn, server_settings={"search_path": "funding"})
    try:
        kinds = await connection.fetch(
            "SELECT kind FROM ledger_event WHERE correlation_id = $1 ORDER BY sequence", correlation_id
        )
        assert [row["kind"] for row in kinds] == ["pledge_confirmed", "application_awarded"]
        actions = await connection.fetch(
            "SELECT action FROM audit WHERE correlation_id = $1 ORDER BY id", correlation_id
        )
        assert [row["action"] for row in actions] == [
            "application_created",
            "pledge_added",
            "application_submitted",
            "pledge_confirmed",
            "application_awarded",
        ]
        for statement in ("DELETE FROM award", "UPDATE award SET grant_pence = 1"):
            with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="append-only"):
                await connection.execute(statement)
    finally:
        await connection.close()


async def published_award(hub: Hub, award_id: str) -> events_pb2.AwardEvent:
    consumer = AIOKafkaConsumer(bootstrap_servers=hub.cluster.bootstrap, group_id=None)
    await consumer.start()
    try:
        partition = TopicPartition(hub.cluster.name(topics.AWARDS), 0)
        consumer.assign([partition])
        await consumer.seek_to_beginning(partition)
        async with asyncio.timeout(20):
            async for record in consumer:
                if record.key == award_id.encode():
                    return events_pb2.AwardEvent.FromString(record.value)
    finally:
        await consumer.stop()
    raise AssertionError("the award was not published")


async def test_of_ten_decisions_that_race_for_the_last_budget_exactly_one_wins(hub: Hub) -> None:
    call = await hub.call(budget_pence=1_000_00)
    waiting = [await hub.submitted(call["id"], grant=1_000_00, cost=4_000_00, pledged=3_000_00) for _ in range(10)]
    answers = await asyncio.gather(
        *(hub.decide(application_id, process=number % PROCESSES) for number, application_id in enumerate(waiting))
    )
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 9
    assert {answer.json()["reason"] for answer in answers if answer.status_code == 409} == {"BUDGET_EXHAUSTED"}
    assert (await hub.done("GET", f"/v1/calls/{call['id']}"))["left_pence"] == 0
    await hub.trial_balance()
    await hub.assert_replay_agrees()


async def test_the_same_decision_sent_many_times_at_once_is_one_award(hub: Hub) -> None:
    call = await hub.call()
    application_id = await hub.submitted(call["id"], grant=1_000_00, cost=4_000_00, pledged=3_000_00)
    answers = await asyncio.gather(*(hub.decide(application_id, process=number % PROCESSES) for number in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["award"]["id"] for answer in answers}) == 1
    assert (await hub.done("GET", f"/v1/calls/{call['id']}"))["committed_pence"] == 1_000_00


async def test_a_process_killed_amid_its_decisions_leaves_each_made_wholly_or_not_at_all(hub: Hub) -> None:
    call = await hub.call()
    waiting = [await hub.submitted(call["id"], grant=100_00, cost=400_00, pledged=300_00) for _ in range(12)]
    port = free_port()
    doomed = started({**hub.environment, "SMDIH_HTTP_PORT": str(port)})
    hub.urls.append(f"http://127.0.0.1:{port}")
    try:

        async def ready() -> bool:
            try:
                return (await hub.client.get(f"{hub.urls[-1]}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(ready, deadline_s=40)
        decisions = [asyncio.create_task(hub.decide(one, process=PROCESSES)) for one in waiting]
        await asyncio.wait(decisions, return_when=asyncio.FIRST_COMPLETED)
        doomed.kill()
        outcomes = await asyncio.gather(*decisions, return_exceptions=True)
    finally:
        doomed.kill()
        doomed.wait()
        hub.urls.pop()
    answered = {one.json()["id"]: one.json()["award"]["id"] for one in outcomes if isinstance(one, httpx.Response)}
    assert answered
    # Whoever got no answer asks again, elsewhere.
    again = [(await hub.decide(one)).json() for one in waiting]
    awards = {one["id"]: one["award"]["id"] for one in again}
    assert awards | answered == awards
    assert (await hub.done("GET", f"/v1/calls/{call['id']}"))["committed_pence"] == 12 * 100_00
    for award_id in awards.values():
        assert (await published_award(hub, award_id)).award.call_id == call["id"]
    await hub.trial_balance()
    await hub.assert_replay_agrees()


async def decided_claim(hub: Hub, call_id: str) -> tuple[str, str]:
    """Award and claim that only wait for the second person. The project is of today, and so is its claim."""
    application_id = await hub.submitted(call_id, grant=100_00, cost=400_00, pledged=300_00)
    award_id = (await hub.decide(application_id)).json()["award"]["id"]
    path, day = f"/v1/awards/{award_id}", uk_day(datetime.now(UTC))
    dates = {"project_start": day.isoformat(), "project_end": (day + timedelta(days=30)).isoformat()}
    await hub.done("POST", f"{path}/accept", dates, who="firm")
    statement = {"elsewhere_pence": 0, "statement": "None was given to us or our group. The directors."}
    await hub.done("POST", f"{path}/confirm-assistance", statement, who="firm")
    claim = {
        "request_id": "first",
        "period_start": day.isoformat(),
        "period_end": day.isoformat(),
        "costs": [{"category": "materials", "amount_pence": 200_00, "evidence": f"INV-{award_id}"}],
    }
    claimed = await hub.done("POST", f"{path}/claims", claim, who="firm")
    claim_id = claimed["claims"][0]["id"]
    await hub.done("POST", f"{path}/claims/{claim_id}/decide", {"accept": True, "reason": "papers seen"})
    return award_id, claim_id


async def settle(hub: Hub, award_id: str, claim_id: str, *, process: int = 0) -> httpx.Response:
    body = {"release": True, "reason": "checked"}
    path = f"/v1/awards/{award_id}/claims/{claim_id}/settle"
    return await hub.ask("POST", path, body, who="second operator", process=process)


async def test_payments_asked_of_two_processes_and_of_one_that_is_killed_are_made_once(hub: Hub) -> None:
    call = await hub.call()
    waiting = [await decided_claim(hub, call["id"]) for _ in range(6)]
    port = free_port()
    doomed = started({**hub.environment, "SMDIH_HTTP_PORT": str(port)})
    hub.urls.append(f"http://127.0.0.1:{port}")
    try:

        async def ready() -> bool:
            try:
                return (await hub.client.get(f"{hub.urls[-1]}/readyz")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(ready, deadline_s=40)
        payments = [asyncio.create_task(settle(hub, *one, process=PROCESSES)) for one in waiting]
        await asyncio.wait(payments, return_when=asyncio.FIRST_COMPLETED)
        doomed.kill()
        await asyncio.gather(*payments, return_exceptions=True)
    finally:
        doomed.kill()
        doomed.wait()
        hub.urls.pop()
    again = await asyncio.gather(*(settle(hub, *one, process=number % 2) for number, one in enumerate(waiting * 2)))
    assert {(answer.status_code, answer.json()["paid_pence"]) for answer in again} == {(200, 50_00)}
    trial = await hub.trial_balance()
    rows = {row["kind"]: row["balance_pence"] for row in trial["accounts"] if row["call_id"] == call["id"]}
    assert (rows["public_paid"], rows["public_committed"], rows["co_investment_paid"]) == (300_00, 300_00, 900_00)
    seen = await hub.done("GET", f"/v1/calls/{call['id']}")
    assert (seen["committed_pence"], seen["left_pence"]) == (600_00, 100_000_00 - 600_00)
    fund = await hub.done("GET", "/v1/fund", who="partner")
    assert fund["programme_pence"] == 20_000_000_00
    assert fund["on_payments"]["met"]
    await hub.assert_replay_agrees()


async def test_an_award_is_claimed_and_paid_by_grpc(hub: Hub) -> None:
    call = await hub.call()
    award_id, claim_id = await decided_claim(hub, call["id"])

    def bearer(who: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {hub.keys[who]}"),)

    async with grpc.aio.insecure_channel(hub.grpc_addresses[1]) as channel:
        agreements = agreement_pb2_grpc.AgreementServiceStub(channel)
        release = agreement_pb2.SettleClaimRequest(
            award_id=award_id, claim_id=claim_id, settlement=agreement_pb2.SETTLEMENT_RELEASE, reason="checked"
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agreements.SettleClaim(release, metadata=bearer("operator"))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert dict(refused.value.trailing_metadata() or ())["reason"] == "SECOND_PERSON"
        paid = (await agreements.SettleClaim(release, metadata=bearer("second operator"))).agreement
        assert (paid.paid_pence, paid.claims[0].state) == (50_00, agreement_pb2.CLAIM_STATE_PAID)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agreements.GetAgreement(
                agreement_pb2.GetAgreementRequest(award_id=award_id), metadata=bearer("other")
            )
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        ended = await agreements.WithdrawAward(
            agreement_pb2.WithdrawAwardRequest(award_id=award_id, reason="sold"), metadata=bearer("firm")
        )
        assert (ended.agreement.state, ended.agreement.restored_pence) == (
            agreement_pb2.AGREEMENT_STATE_WITHDRAWN,
            50_00,
        )
        back = await agreements.RecoverGrant(
            agreement_pb2.RecoverGrantRequest(award_id=award_id, request_id="r", amount_pence=50_00, reason="sold"),
            metadata=bearer("operator"),
        )
        assert back.agreement.recovered_pence == 50_00
        fund = (await agreements.GetFund(agreement_pb2.GetFundRequest(), metadata=bearer("partner"))).fund
        assert (fund.programme_pence, fund.on_promises.met) == (20_000_000_00, True)


REQUIRED_BY_360GIVING = {
    *("id", "title", "description", "currency", "amountAwarded", "awardDate"),
    *("recipientOrganization", "fundingOrganization"),
}


async def test_everybody_can_read_the_awards_in_the_360giving_standard(hub: Hub) -> None:
    call = await hub.call()
    application_id = await hub.submitted(call["id"], grant=1_234_56, cost=4_000_00, pledged=3_000_00)
    award_id = (await hub.decide(application_id)).json()["award"]["id"]
    answer = await hub.ask("GET", "/v1/open-data/360giving", who="")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "public, max-age=300"
    unchanged = await hub.client.get(
        f"{hub.urls[1]}/v1/open-data/360giving", headers={"If-None-Match": answer.headers["etag"]}
    )
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    grants = answer.json()["grants"]
    for grant in grants:
        assert grant.keys() >= REQUIRED_BY_360GIVING
        assert all(grant[name] for name in REQUIRED_BY_360GIVING)
        assert re.fullmatch(r"360G-[a-z]+-.+", grant["id"])
        for side in ("recipientOrganization", "fundingOrganization"):
            assert [organization.keys() for organization in grant[side]] == [{"id", "name"}]
    assert len({grant["id"] for grant in grants}) == len(grants)
    made = next(grant for grant in grants if grant["id"].endswith(award_id))
    assert (made["currency"], made["amountAwarded"], made["awardDate"]) == (
        "GBP",
        1234.56,
        uk_day(datetime.now(UTC)).isoformat(),
    )
    assert '"amountAwarded":1234.56,' in answer.text
    assert made["recipientOrganization"] == [{"id": f"360G-smdih-ORG:firm-{FIRM}", "name": f"Firm {FIRM}"}]
    # What was given up before anything was paid is no grant.
    await hub.done("POST", f"/v1/awards/{award_id}/withdraw", {"reason": "sold"}, who="firm")
    grants = (await hub.done("GET", "/v1/open-data/360giving", who="device"))["grants"]
    assert not [grant for grant in grants if grant["id"].endswith(award_id)]
    # A tap that everybody may open has a narrow pipe.
    answers = [await hub.ask("GET", "/v1/open-data/360giving", who="") for _ in range(90)]
    (full, *_) = [answer for answer in answers if answer.status_code != 200]
    assert (full.status_code, full.json()["reason"], full.headers["retry-after"]) == (429, "SLOW_DOWN", "60")


async def test_two_calls_cannot_both_use_the_same_headroom_of_a_firm(hub: Hub) -> None:
    """Minimal financial assistance is limited per group, over all calls: the second decision sees the first."""
    earlier = [{"given_on": "2026-05-01", "amount_pence": 310_000_00, "kind": "MFA"}]
    waiting = []
    for _ in range(2):
        call = await hub.call()
        made = await hub.application(
            call["id"],
            OTHER_FIRM,
            costs=[{"category": "labour", "amount_pence": 20_000_00}],
            requested_pence=4_000_00,
            declaration=declaration(earlier_assistance=earlier),
        )
        await hub.pledge(made["id"], 16_000_00)
        await hub.done("POST", f"/v1/applications/{made['id']}/submit", who="other")
        waiting.append(made["id"])
    answers = await asyncio.gather(*(hub.decide(one, process=number) for number, one in enumerate(waiting)))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert next(answer.json()["reason"] for answer in answers if answer.status_code == 409) == "MFA_LIMIT"


async def test_sister_firms_share_one_limit_and_of_two_that_race_for_it_one_wins(hub: Hub) -> None:
    path = "/v1/groups/hammersmith-holdings"
    group = {"firm_ids": [SISTER, OTHER_SISTER], "source": "persons with significant control, 3 November"}
    assert (await hub.done("PUT", path, group))["firm_ids"] == [SISTER, OTHER_SISTER]
    earlier = [{"given_on": "2026-05-01", "amount_pence": 311_000_00, "kind": "SPEI"}]
    waiting = []
    for firm_id in (SISTER, OTHER_SISTER):
        call = await hub.call()
        made = await hub.application(
            call["id"],
            firm_id,
            costs=[{"category": "labour", "amount_pence": 20_000_00}],
            requested_pence=4_000_00,
            declaration=declaration(earlier_assistance=earlier),
        )
        await hub.pledge(made["id"], 16_000_00)
        await hub.done("POST", f"/v1/applications/{made['id']}/submit")
        waiting.append(made["id"])
    answers = await asyncio.gather(*(hub.decide(one, process=number) for number, one in enumerate(waiting)))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert next(answer.json()["reason"] for answer in answers if answer.status_code == 409) == "MFA_LIMIT"
    for firm_id in (SISTER, OTHER_SISTER):
        seen = await hub.done("GET", f"/v1/assistance?firm_id={firm_id}")
        assert (seen["firm_ids"], seen["counted_pence"], seen["headroom_pence"]) == (
            [SISTER, OTHER_SISTER],
            4_000_00,
            311_000_00,
        )
    # Once the group is given up each stands for itself.
    loser = next(one for one, answer in zip(waiting, answers, strict=True) if answer.status_code == 409)
    await hub.done("PUT", path, {**group, "firm_ids": []})
    assert (await hub.decide(loser)).status_code == 200


async def test_a_group_that_makes_no_sense_is_refused_and_is_for_operators(hub: Hub) -> None:
    body = {"firm_ids": [FIRM, TOOLMAKER], "source": "filing"}
    for who in ("firm", "partner", "device"):
        await hub.refused(403, "FORBIDDEN", "PUT", "/v1/groups/g1", body, who=who)
        await hub.refused(403, "FORBIDDEN", "GET", "/v1/groups/g1", who=who)
    await hub.refused(401, "UNAUTHENTICATED", "PUT", "/v1/groups/g1", body, who="")
    await hub.refused(404, "FIRM_UNKNOWN", "PUT", "/v1/groups/g1", {**body, "firm_ids": [FIRM, 999]})
    for odd in ([FIRM], [FIRM, FIRM], list(range(1, 202))):
        await hub.refused(400, "GROUP_INVALID", "PUT", "/v1/groups/g1", {**body, "firm_ids": odd})
    await hub.refused(404, "GROUP_UNKNOWN", "GET", "/v1/groups/g1")
    await hub.done("PUT", "/v1/groups/g1", body)
    await hub.refused(409, "FIRM_IN_OTHER_GROUP", "PUT", "/v1/groups/g2", {**body, "firm_ids": [FIRM, OTHER_FIRM]})
    await hub.done("PUT", "/v1/groups/g1", {**body, "firm_ids": []})
    assert (await hub.done("GET", "/v1/assistance", who="firm"))["firm_ids"] == [FIRM]
    await hub.refused(403, "FORBIDDEN", "GET", f"/v1/assistance?firm_id={OTHER_FIRM}", who="firm")
    await hub.refused(403, "FORBIDDEN", "GET", "/v1/assistance", who="partner")


async def test_an_award_below_the_programme_ratio_needs_two_different_operators(hub: Hub) -> None:
    call = await hub.call(category="feasibility", budget_pence=70_000_00)
    waiting = await hub.submitted(call["id"], grant=70_000_00, cost=100_000_00, pledged=30_000_00, firm_id=TOOLMAKER)
    path = f"/v1/applications/{waiting}"
    assert (await hub.decide(waiting)).json()["reason"] == "FUND_RATIO"
    waiver = {"reason": "first of a series"}
    await hub.done("POST", f"{path}/waive-ratio", waiver)
    twice = await hub.done("POST", f"{path}/waive-ratio", waiver)
    assert twice["ratio_waivers"] == 1
    assert (await hub.decide(waiting)).json()["reason"] == "FUND_RATIO"
    await hub.refused(403, "FORBIDDEN", "POST", f"{path}/waive-ratio", waiver, who="firm")
    both = await hub.done("POST", f"{path}/waive-ratio", waiver, who="second operator")
    assert both["ratio_waivers"] == 2
    assert (await hub.decide(waiting)).json()["state"] == "awarded"
    # Business money again, so that the tests after this one meet a fund in its ratio.
    call = await hub.call()
    more = await hub.submitted(call["id"], grant=1_00, cost=100_000_00, pledged=200_000_00, firm_id=TOOLMAKER)
    assert (await hub.decide(more)).json()["state"] == "awarded"


async def test_a_rejected_or_withdrawn_application_releases_its_pledges_and_its_match(hub: Hub) -> None:
    call = await hub.call()
    rejected = await hub.submitted(call["id"], grant=1_000_00, cost=4_000_00, pledged=3_000_00)
    assert (await hub.decide(rejected, award=False)).json()["state"] == "rejected"
    assert (await hub.decide(rejected, award=False)).json()["state"] == "rejected"
    draft = await hub.application(call["id"])
    await hub.pledge(draft["id"], 500_00)
    await hub.pledge(draft["id"], 700_00, kind="in_kind")
    match_id, path = draft["match_id"], f"/v1/applications/{draft['id']}"
    body = application_body(call["id"], match_id)
    await hub.refused(409, "MATCH_IN_USE", "POST", "/v1/applications", body, who="firm")
    for _ in range(2):
        assert (await hub.done("POST", f"{path}/withdraw", who="firm"))["state"] == "withdrawn"
    await hub.refused(409, "APPLICATION_WITHDRAWN", "POST", f"{path}/submit", who="firm")
    await hub.refused(409, "APPLICATION_WITHDRAWN", "POST", f"{path}/pledges", pledge_body(1), who="firm")
    assert (await hub.done("POST", "/v1/applications", body, who="firm"))["state"] == "draft"
    trial = await hub.trial_balance()
    left = {row["kind"]: row["balance_pence"] for row in trial["accounts"] if row["call_id"] == call["id"]}
    assert {kind: pence for kind, pence in left.items() if pence} == {"public_budget": 100_000_00}
    await hub.assert_replay_agrees()


async def test_only_confirmed_private_cash_is_match_unless_the_call_admits_goods(hub: Hub) -> None:
    strict, open_to_goods = await hub.call(), await hub.call(in_kind_allowed=True)
    for call, counted in ((strict, 1_000_00), (open_to_goods, 3_000_00)):
        made = await hub.application(call["id"])
        await hub.pledge(made["id"], 1_000_00)
        await hub.pledge(made["id"], 2_000_00, kind="in_kind")
        await hub.pledge(made["id"], 4_000_00, public_body=True, co_investor="County council")
        await hub.pledge(made["id"], 8_000_00, confirm=False)
        seen = (await hub.done("GET", f"/v1/applications/{made['id']}", who="firm"))["assessment"]
        assert seen["match_counted_pence"] == counted
        # The council's money is public: 45 % of 100,000.00 less 4,000.00 is left for a grant.
        assert seen["max_grant_pence"] == 41_000_00


async def test_a_pre_check_says_yes_or_no_with_every_reason_and_stores_nothing(hub: Hub) -> None:
    call = await hub.call(size_definition="EU_2003_361", budget_pence=30_000_00)
    size = {"headcount": "60", "turnover_minor": 900_000_000, "balance_minor": 700_000_000}
    body = {"call_id": call["id"], "declaration": declaration(size=size), "planned_cost_pence": 100_000_00}
    seen = await hub.done("POST", "/v1/pre-check", body, who="firm")
    assert (seen["eligible"], seen["size"], seen["max_grant_pence"]) == (True, "medium", 30_000_00)
    assert [finding["rule"] for finding in seen["findings"]][:5] == ["ELIG-1", "SME", "INT-5", "MFA-1", "BUDGET"]
    parent = {
        "percent": "51.00",
        "upstream": True,
        "investor": "company",
        "headcount": "190",
        "turnover_minor": 4_500_000_000,
        "balance_minor": 3_800_000_000,
    }
    owned = {**body, "declaration": declaration(size={**size, "relations": [parent]}, insolvent=True), "sic": "62.01"}
    seen = await hub.done("POST", "/v1/pre-check", owned, who="partner")
    assert (seen["eligible"], seen["size"], seen["max_grant_pence"]) == (False, "large", 0)
    assert seen["findings"][0]["code"] == "NOT_MANUFACTURING"
    assert "insolvent" in seen["findings"][0]["text"]


async def test_the_same_request_id_gets_the_first_answer_and_other_content_is_refused(hub: Hub) -> None:
    body = call_body()
    calls = await asyncio.gather(*(hub.done("POST", "/v1/calls", body, process=n % PROCESSES) for n in range(6)))
    assert len({call["id"] for call in calls}) == 1
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", "/v1/calls", {**body, "budget_pence": 1})

    body = application_body(calls[0]["id"], await hub.match())
    made = await asyncio.gather(
        *(hub.done("POST", "/v1/applications", body, who="firm", process=n % PROCESSES) for n in range(6))
    )
    assert len({one["id"] for one in made}) == 1
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", "/v1/applications", {**body, "requested_pence": 7}, who="firm")
    # Another firm's request of the same name is its own.
    others = application_body(calls[0]["id"], await hub.match(OTHER_FIRM), request_id=body["request_id"])
    assert (await hub.done("POST", "/v1/applications", others, who="other"))["id"] != made[0]["id"]

    path = f"/v1/applications/{made[0]['id']}/pledges"
    body = pledge_body(100)
    pledges = await asyncio.gather(*(hub.done("POST", path, body, who="firm") for _ in range(6)))
    assert len({pledge["id"] for pledge in pledges}) == 1
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", path, {**body, "amount_pence": 101}, who="firm")
    confirm = f"{path}/{pledges[0]['id']}/confirm"
    confirmed = await asyncio.gather(*(hub.done("POST", confirm, {"evidence": "letter"}) for _ in range(6)))
    assert len({pledge["confirmed_us"] for pledge in confirmed}) == 1
    await hub.trial_balance()


async def test_a_firm_neither_sees_nor_touches_what_is_anothers(hub: Hub) -> None:
    call = await hub.call()
    mine = await hub.application(call["id"])
    pledge = await hub.pledge(mine["id"], 5_00, confirm=False)
    path = f"/v1/applications/{mine['id']}"
    for method, where, body in (
        ("GET", path, None),
        ("POST", f"{path}/pledges", pledge_body(1)),
        ("POST", f"{path}/submit", None),
        ("POST", f"{path}/withdraw", None),
    ):
        await hub.refused(404, "APPLICATION_UNKNOWN", method, where, body, who="other")
        await hub.refused(403, "FORBIDDEN", method, where, body, who="device")
        await hub.refused(403, "FORBIDDEN", method, where, body, who="partner")
        await hub.refused(401, "UNAUTHENTICATED", method, where, body, who="")
    for where, body in (
        (f"{path}/decide", {"award": True, "reason": "mine"}),
        (f"{path}/pledges/{pledge['id']}/confirm", {"evidence": "trust me"}),
        (f"{path}/waive-ratio", {"reason": "mine"}),
        ("/v1/calls", call_body()),
    ):
        await hub.refused(403, "FORBIDDEN", "POST", where, body, who="firm")
    await hub.refused(403, "FORBIDDEN", "GET", "/v1/ledger/trial-balance", who="firm")
    await hub.refused(403, "FORBIDDEN", "GET", f"/v1/applications?firm_id={FIRM}", who="other")
    listed = await hub.done("GET", "/v1/applications?page_size=100", who="other")
    assert {one["firm_id"] for one in listed["applications"]} <= {OTHER_FIRM}
    body = application_body(call["id"], await hub.match(FIRM))
    detail = await hub.refused(404, "MATCH_UNKNOWN", "POST", "/v1/applications", body, who="other")
    assert "may take a moment" in detail


async def test_pages_follow_each_other_without_gap_or_repeat(hub: Hub) -> None:
    call = await hub.call()
    made = [(await hub.application(call["id"]))["id"] for _ in range(5)]
    seen: list[str] = []
    token = ""
    while True:
        where = f"/v1/applications?call_id={call['id']}&page_size=2&page_token={token}"
        page = await hub.done("GET", where, who="firm")
        seen += [one["id"] for one in page["applications"]]
        token = page["next_page_token"]
        if not token:
            break
    assert seen == made[::-1]


HUGE = 2**63


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"budget_pence": 0}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": -1}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": HUGE - 1}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": HUGE}, "AMOUNT_OUT_OF_RANGE"),
        ({"budget_pence": 10.0}, "INVALID"),
        ({"budget_pence": "10"}, "INVALID"),
        ({"title": " "}, "TITLE_MISSING"),
        ({"title": "a\x00b"}, "TEXT_UNPRINTABLE"),
        ({"title": "x" * 201}, "TEXT_TOO_LONG"),
        ({"opens_us": HUGE}, "TIME_OUT_OF_RANGE"),
        ({"closes_us": 1_000_000_000_000_000}, "CLOSES_BEFORE_OPENS"),
        ({"category": "CATEGORY_X"}, "INVALID"),
        ({"rate_max": "1.01"}, "RATE_INVALID"),
        ({"rate_max": "1e-3"}, "RATE_INVALID"),
        ({"rate_max": "0." + "3" * 5_000}, "RATE_INVALID"),
        ({"request_id": ""}, "REQUEST_ID_INVALID"),
        ({"request_id": "a b"}, "REQUEST_ID_INVALID"),
        ({"state": "open"}, "INVALID"),
    ],
)
async def test_a_call_that_makes_no_sense_is_refused_with_a_reason(
    hub: Hub, changes: dict[str, Any], reason: str
) -> None:
    await hub.refused(400, reason, "POST", "/v1/calls", call_body(**changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"costs": []}, "COSTS_MISSING"),
        ({"costs": [{"category": "travel", "amount_pence": 1}] * 2}, "COSTS_INVALID"),
        ({"costs": [{"category": "travel", "amount_pence": HUGE}]}, "AMOUNT_OUT_OF_RANGE"),
        (
            {"costs": [{"category": one, "amount_pence": 100_000_000_000} for one in ("travel", "labour")]},
            "AMOUNT_OUT_OF_RANGE",
        ),
        ({"requested_pence": -1}, "AMOUNT_OUT_OF_RANGE"),
        ({"other_public_pence": HUGE}, "AMOUNT_OUT_OF_RANGE"),
        ({"declaration": declaration(size={**declaration()["size"], "headcount": "9" * 5_000})}, "DECIMAL_INVALID"),
        ({"declaration": declaration(size={**declaration()["size"], "headcount": "many"})}, "DECIMAL_INVALID"),
        ({"declaration": declaration(size={**declaration()["size"], "turnover_minor": HUGE})}, "AMOUNT_OUT_OF_RANGE"),
        ({"declaration": declaration(size={**declaration()["size"], "period_start": ""})}, "INVALID_FACT"),
        (
            {"declaration": declaration(size={**declaration()["size"], "period_start": "1999-01-01"})},
            "PARAMETER_MISSING",
        ),
        ({"declaration": declaration(size={**declaration()["size"], "period_start": "2026-02-30"})}, "DATE_INVALID"),
        (
            {"declaration": declaration(earlier_assistance=[{"given_on": "soon", "amount_pence": 1, "kind": "MFA"}])},
            "DATE_INVALID",
        ),
    ],
)
async def test_an_application_that_makes_no_sense_is_refused_with_a_reason(
    hub: Hub, changes: dict[str, Any], reason: str
) -> None:
    call = await hub.call()
    body = application_body(call["id"], await hub.match(), **changes)
    await hub.refused(400, reason, "POST", "/v1/applications", body, who="firm")


@pytest.mark.parametrize("odd", ["nothing", "%00", "a%20b", "x" * 300, "%F0%9F%94%A5", "'; DROP TABLE call; --"])
async def test_an_odd_id_is_simply_not_found(hub: Hub, odd: str) -> None:
    for where in (f"/v1/calls/{odd}", f"/v1/applications/{odd}"):
        answer = await hub.ask("GET", where)
        assert answer.status_code == 404, answer.text
    decision = {"award": True, "reason": "x"}
    assert (await hub.ask("POST", f"/v1/applications/{odd}/decide", decision)).status_code == 404
    body = application_body("nothing", await hub.match())
    await hub.refused(404, "CALL_UNKNOWN", "POST", "/v1/applications", body, who="firm")
    for where, reason in (
        ("?page_token=%00", "PAGE_TOKEN_INVALID"),
        ("?page_token=999999999999999999-a", "PAGE_TOKEN_INVALID"),
        ("?page_size=101", "PAGE_SIZE_OUT_OF_RANGE"),
        (f"?firm_id={HUGE}", "FIRM_ID_INVALID"),
    ):
        await hub.refused(400, reason, "GET", f"/v1/applications{where}")


async def test_a_call_takes_applications_only_between_its_times(hub: Hub) -> None:
    now_us = time.time_ns() // 1000
    announced = await hub.call(opens_us=now_us + DAY_US, closes_us=now_us + 2 * DAY_US)
    closed = await hub.call(opens_us=now_us - 2 * DAY_US, closes_us=now_us - DAY_US)
    assert (announced["state"], closed["state"]) == ("announced", "closed")
    match_id = await hub.match()
    for call in (announced, closed):
        body = application_body(call["id"], match_id)
        await hub.refused(409, "CALL_NOT_OPEN", "POST", "/v1/applications", body, who="firm")


async def test_asking_for_more_than_a_rule_allows_is_refused_on_submission(hub: Hub) -> None:
    call = await hub.call(rate_max="0.40")
    for changes, reason in (
        ({"requested_pence": 40_000_01}, "INTENSITY_EXCEEDED"),
        ({"requested_pence": 0, "other_public_pence": 40_000_00}, "NOTHING_TO_GRANT"),
        ({"declaration": declaration(uk_registered=False)}, "NOT_UK_REGISTERED"),
        (
            {
                "declaration": declaration(
                    earlier_assistance=[{"given_on": "2026-05-01", "amount_pence": 315_000_00, "kind": "SAFA"}]
                )
            },
            "MFA_LIMIT",
        ),
    ):
        made = await hub.application(call["id"], OTHER_FIRM, **changes)
        await hub.refused(409, reason, "POST", f"/v1/applications/{made['id']}/submit", who="other")
    made = await hub.application(call["id"], SOFTWARE_FIRM)
    detail = await hub.refused(409, "NOT_MANUFACTURING", "POST", f"/v1/applications/{made['id']}/submit")
    assert "62.01" in detail
    small = await hub.call(budget_pence=39_999_99)
    made = await hub.application(small["id"], OTHER_FIRM)
    await hub.refused(409, "BUDGET_EXHAUSTED", "POST", f"/v1/applications/{made['id']}/submit", who="other")


async def test_partners_reach_the_fund_by_grpc(hub: Hub) -> None:
    match_id = await hub.match()
    now_us = time.time_ns() // 1000

    def bearer(who: str) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {hub.keys[who]}"),)

    stated = funding_pb2.Declaration(
        size=funding_pb2.SizeFigures(
            headcount="38", turnover_minor=420_000_000, balance_minor=210_000_000, period_start="2026-01-01"
        ),
        uk_registered=True,
    )
    async with grpc.aio.insecure_channel(hub.grpc_addresses[1]) as channel:
        fund = funding_pb2_grpc.FundingServiceStub(channel)
        create = funding_pb2.CreateCallRequest(
            request_id=secrets.token_hex(8),
            title="By wire",
            budget_pence=50_000_00,
            opens_us=now_us - DAY_US,
            closes_us=now_us + DAY_US,
            category=funding_pb2.CATEGORY_EXPERIMENTAL_DEVELOPMENT,
            size_definition=funding_pb2.SIZE_DEFINITION_COMPANIES_ACT_2006,
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fund.CreateCall(create, metadata=bearer("partner"))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        call = (await fund.CreateCall(create, metadata=bearer("operator"))).call
        assert call.state == funding_pb2.CALL_STATE_OPEN
        listed = await fund.ListCalls(funding_pb2.ListCallsRequest(page_size=1), metadata=bearer("partner"))
        assert listed.calls[0] == call
        assert (await fund.GetCall(funding_pb2.GetCallRequest(call_id=call.id), metadata=bearer("firm"))).call == call
        checked = await fund.PreCheck(
            funding_pb2.PreCheckRequest(
                call_id=call.id, declaration=stated, sic="25.62", planned_cost_pence=100_000_00
            ),
            metadata=bearer("partner"),
        )
        assert (checked.assessment.eligible, checked.assessment.max_grant_pence) == (True, 45_000_00)
        apply = funding_pb2.CreateApplicationRequest(
            request_id=secrets.token_hex(8),
            call_id=call.id,
            match_id=match_id,
            costs=[funding_pb2.Cost(category=funding_pb2.COST_CATEGORY_MATERIALS, amount_pence=5_000_00)],
            declaration=stated,
            requested_pence=1_000_00,
        )
        application = (await fund.CreateApplication(apply, metadata=bearer("firm"))).application
        assert application.declaration == stated
        pledge = (
            await fund.AddPledge(
                funding_pb2.AddPledgeRequest(
                    request_id="p1",
                    application_id=application.id,
                    co_investor="The firm itself",
                    kind=funding_pb2.PLEDGE_KIND_CASH,
                    amount_pence=4_000_00,
                ),
                metadata=bearer("firm"),
            )
        ).pledge
        await fund.ConfirmPledge(
            funding_pb2.ConfirmPledgeRequest(application_id=application.id, pledge_id=pledge.id, evidence="statement"),
            metadata=bearer("operator"),
        )
        await fund.SubmitApplication(
            funding_pb2.SubmitApplicationRequest(application_id=application.id), metadata=bearer("firm")
        )
        decide = funding_pb2.DecideRequest(application_id=application.id, reason="good")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fund.Decide(decide, metadata=bearer("operator"))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        decide.decision = funding_pb2.DECISION_AWARD
        awarded = (await fund.Decide(decide, metadata=bearer("operator"))).application
        assert awarded.state == funding_pb2.APPLICATION_STATE_AWARDED
        assert (awarded.award.grant_pence, awarded.award.co_investment_pence) == (1_000_00, 4_000_00)
        found = await fund.ListApplications(
            funding_pb2.ListApplicationsRequest(call_id=call.id, state=funding_pb2.APPLICATION_STATE_AWARDED),
            metadata=bearer("operator"),
        )
        assert [one.id for one in found.applications] == [application.id]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fund.GetApplication(
                funding_pb2.GetApplicationRequest(application_id=application.id), metadata=bearer("other")
            )
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
        trial = await fund.TrialBalance(funding_pb2.TrialBalanceRequest(), metadata=bearer("operator"))
        assert (trial.total_pence, trial.in_order) == (0, True)


async def test_offers_that_make_no_match_and_records_that_cannot_be_read_do_not_stop_the_rest(hub: Hub) -> None:
    declined = matching_pb2.OFFER_CHANGE_DECLINED
    await hub.publisher.publish(topics.OFFERS, offer_event("declined", FIRM, declined), key=b"need")
    bad = [b"\xff\xff", b"", offer_event("a b", FIRM), offer_event("no-firm", 0)]
    for value in bad:
        await hub.publisher.publish(topics.OFFERS, value, key=b"need")
    match_id = await hub.match()
    await hub.publisher.publish(topics.OFFERS, offer_event(match_id, OTHER_FIRM), key=b"need")
    await hub.match()
    connection = await asyncpg.connect(hub.dsn)
    try:
        assert await connection.fetchval("SELECT firm_id FROM funding.match WHERE id = $1", match_id) == FIRM
        assert not await connection.fetchval("SELECT count(*) FROM funding.match WHERE id IN ('declined', 'no-firm')")
    finally:
        await connection.close()
    consumer = AIOKafkaConsumer(bootstrap_servers=hub.cluster.bootstrap, group_id=None)
    await consumer.start()
    try:
        partition = TopicPartition(hub.cluster.name(topics.OFFERS + topics.DEAD_LETTERS_SUFFIX), 0)
        assert (await consumer.end_offsets([partition]))[partition] == len(bad)
    finally:
        await consumer.stop()


async def test_the_commands_tell_by_their_exit_code_whether_the_ledger_is_in_order(hub: Hub) -> None:
    await hub.call()
    connection = await asyncpg.connect(hub.dsn, server_settings={"search_path": "funding"})
    tamper = "UPDATE ledger_transfer SET amount_pence = amount_pence + $1 WHERE event_sequence = 1"

    async def outcomes(*commands: str) -> list[tuple[int, str]]:
        return await asyncio.gather(*(asyncio.to_thread(hub.command, command) for command in commands))

    try:
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(tamper, 1)
        (balance_code, balance_output), (replay_code, replay_output) = await outcomes("trial-balance", "replay")
        await connection.execute(tamper, -1)
    finally:
        await connection.close()
    assert (balance_code, replay_code) == (1, 1)
    assert "DIFFERS FROM ITS TRANSFERS" in balance_output
    assert "event 1 or one of its transfers was altered" in replay_output
    *in_order, (usage_code, usage) = await outcomes("trial-balance", "replay", "nonsense")
    assert [code for code, _ in in_order] == [0, 0], in_order
    assert (usage_code, usage.count("\n")) == (2, 1)


async def test_the_fund_shows_its_balances_to_prometheus(hub: Hub) -> None:
    async def shown() -> bool:
        text = (await hub.client.get(f"{hub.urls[0]}/metrics")).text
        return 'smdih_funding_balance_pence{account="public_budget"}' in text and "decisions_total" in text

    await eventually(shown, deadline_s=30)
    text = (await hub.client.get(f"{hub.urls[0]}/metrics")).text
    assert "smdih_funding_trial_balance_pence 0.0" in text
    assert 'smdih_funding_decisions_total{result="awarded"}' in text


async def test_an_award_above_the_limit_is_listed_until_its_subsidy_entry_is_made(hub: Hub) -> None:
    call = await hub.call(budget_pence=300_000_00)

    async def awarded(grant: int) -> Any:
        waiting = await hub.submitted(
            call["id"], grant=grant, cost=400_000_00, pledged=350_000_00, firm_id=LARGE_AWARDS
        )
        return (await hub.decide(waiting)).json()["award"]

    # Equal to the limit needs no entry, a penny more does.
    free, due = await awarded(100_000_00), await awarded(100_000_01)
    where = "/v1/open-data/subsidy-entries"
    entries = {entry["award_id"]: entry for entry in (await hub.done("GET", where))["entries"]}
    assert free["id"] not in entries
    entry = entries[due["id"]]
    assert (entry["due"], entry["grant_pence"]) == (due["database_entry_due"], 100_000_01)
    assert entry["due"] == add_months(uk_day(datetime.now(UTC)), 3).isoformat()
    assert 88 <= entry["days_left"] <= 92
    await hub.refused(403, "FORBIDDEN", "GET", where, who="firm")
    await hub.refused(404, "AWARD_UNKNOWN", "POST", f"{where}/{free['id']}", {"reference": "SC1"})
    for _ in range(2):
        assert (await hub.ask("POST", f"{where}/{due['id']}", {"reference": "SC10001"})).status_code == 204
    left = [entry["award_id"] for entry in (await hub.done("GET", where))["entries"]]
    assert due["id"] not in left


async def test_a_budget_moves_between_programme_and_call_as_far_as_it_is_free(hub: Hub) -> None:
    call = await hub.call(budget_pence=1_000_00)
    path, fund = f"/v1/calls/{call['id']}/budget", await hub.done("GET", "/v1/fund")
    back = {"request_id": "back", "change_pence": -400_00, "reason": "less demand than planned"}
    for process in (0, 1):  # the second is a repeat, to the other process
        moved = await hub.done("POST", path, back, process=process)
        assert (moved["budget_pence"], moved["left_pence"], moved["committed_pence"]) == (600_00, 600_00, 0)
    assert (await hub.done("GET", "/v1/fund"))["unallotted_pence"] == fund["unallotted_pence"] + 400_00
    more = await hub.done("POST", path, {**back, "request_id": "more", "change_pence": 100_00})
    assert more["budget_pence"] == 700_00
    await hub.refused(409, "BUDGET_EXHAUSTED", "POST", path, {**back, "request_id": "all", "change_pence": -700_01})
    await hub.refused(409, "REQUEST_ID_REUSED", "POST", path, {**back, "change_pence": -400_01})
    await hub.refused(400, "AMOUNT_OUT_OF_RANGE", "POST", path, {**back, "request_id": "none", "change_pence": 0})
    await hub.refused(404, "CALL_UNKNOWN", "POST", "/v1/calls/none/budget", back)
    for who in ("firm", "partner", "device"):
        await hub.refused(403, "FORBIDDEN", "POST", path, back, who=who)
    await hub.refused(401, "UNAUTHENTICATED", "POST", path, back, who="")
    connection = await asyncpg.connect(hub.dsn)
    noted = "SELECT count(*) FROM funding.audit WHERE call_id = $1 AND action = 'budget_moved'"
    assert await connection.fetchval(noted, call["id"]) == 2
    await connection.close()
    await hub.trial_balance()
    await hub.assert_replay_agrees()


async def test_calls_that_race_for_the_last_of_the_programme_get_no_more_than_there_is(hub: Hub) -> None:
    """The last test here: afterwards there is little left for calls."""

    async def left() -> int:
        trial = await hub.trial_balance()
        rows = {row["kind"]: row["balance_pence"] for row in trial["accounts"] if row["call_id"] == "programme"}
        assert rows["public_source"] == -20_000_000_00
        return int(rows["programme_budget"])

    before = await left()
    # One penny too much for three.
    budget = before // 3 + 1
    bodies = [call_body(budget_pence=budget) for _ in range(8)]
    answers = await asyncio.gather(
        *(hub.ask("POST", "/v1/calls", body, process=number % PROCESSES) for number, body in enumerate(bodies))
    )
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [409] * 6
    refused = [answer.json() for answer in answers if answer.status_code == 409]
    assert {answer["reason"] for answer in refused} == {"PROGRAMME_EXHAUSTED"}
    assert "is not allotted yet" in refused[0]["detail"]
    assert await left() == before - 2 * budget
    # A repeat of one that was made is no new one, and what is left can be given to the penny.
    first = next(body for body, answer in zip(bodies, answers, strict=True) if answer.status_code == 201)
    await hub.done("POST", "/v1/calls", first)
    await hub.call(budget_pence=await left())
    await hub.refused(409, "PROGRAMME_EXHAUSTED", "POST", "/v1/calls", call_body(budget_pence=1))
    await hub.assert_replay_agrees()
