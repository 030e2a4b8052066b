"""The fund as two real processes on one database: from a match to an award, races between the two, kills, the ledger."""

import asyncio
import math
import re
import secrets
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition
from prometheus_client import REGISTRY

from localstack.servers import free_port
from services.common import topics
from services.common.database import create_pool
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.funding.domain import uk_day
from services.funding.gauges import ProgressGauges
from services.funding.rules.calendar import add_months
from smdih.funding.v1 import (
    agreement_pb2,
    agreement_pb2_grpc,
    events_pb2,
    funding_pb2,
    funding_pb2_grpc,
    notice_pb2,
    notice_pb2_grpc,
)
from smdih.matching.v1 import events_pb2 as matching_pb2
from tests.integration.funding_hub import (
    DAY_US,
    FIRM,
    LARGE_AWARDS,
    OTHER_FIRM,
    OTHER_SISTER,
    PROCESSES,
    SISTER,
    TOOLMAKER,
    Hub,
    application_body,
    call_body,
    declaration,
    offer_event,
    pledge_body,
    running_fund,
    started,
)
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, cluster: Cluster, publisher: Publisher) -> AsyncIterator[Hub]:
    async with running_fund(settings, cluster, publisher) as running:
        yield running


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
    # A provider may be a person, and its title his name.
    assert "Spindle bearing clinic" not in answer.text
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


async def test_a_pledge_that_was_stated_wrongly_is_taken_back(hub: Hub) -> None:
    call = await hub.call()
    made = await hub.application(call["id"])
    path = f"/v1/applications/{made['id']}"
    wrong = await hub.pledge(made["id"], 50_000_00, confirm=False, public_body=True)
    # As public money it takes the whole grant away.
    assert "take_pledge_back" in (await hub.done("GET", path, who="firm"))["may"]
    assert (await hub.done("GET", path))["assessment"]["max_grant_pence"] == 0
    reason = {"reason": "it is a private company"}
    await hub.refused(
        404, "APPLICATION_UNKNOWN", "POST", f"{path}/pledges/{wrong['id']}/take-back", reason, who="other"
    )
    await hub.refused(404, "PLEDGE_UNKNOWN", "POST", f"{path}/pledges/none/take-back", reason, who="firm")
    for _ in range(2):  # the second is a repeat
        seen = await hub.done("POST", f"{path}/pledges/{wrong['id']}/take-back", reason, who="firm")
        assert (seen["pledges"], seen["assessment"]["max_grant_pence"]) == ([], 45_000_00)
    right = await hub.pledge(made["id"], 60_000_00)
    await hub.refused(409, "PLEDGE_CONFIRMED", "POST", f"{path}/pledges/{right['id']}/take-back", reason, who="firm")
    for _ in range(2):
        seen = await hub.done("POST", f"{path}/pledges/{right['id']}/take-back", reason)
        assert seen["assessment"]["match_counted_pence"] == 0
    await hub.pledge(made["id"], 60_000_00)
    await hub.done("POST", f"{path}/submit", who="firm")
    assert (await hub.decide(made["id"])).json()["award"]["co_investment_pence"] == 60_000_00
    await hub.refused(404, "PLEDGE_UNKNOWN", "POST", f"{path}/pledges/{made['id']}/take-back", reason)
    trial = await hub.trial_balance()
    left = {row["kind"]: row["balance_pence"] for row in trial["accounts"] if row["call_id"] == call["id"]}
    assert (left["co_investment_source"], left["co_investment_pledged"]) == (-60_000_00, 0)
    await hub.assert_replay_agrees()


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


async def test_an_application_without_its_match_waits_for_another_of_the_same_need(hub: Hub) -> None:
    call = await hub.call()
    made = await hub.application(call["id"])
    path, first = f"/v1/applications/{made['id']}", made["match_id"]
    await hub.pledge(made["id"], 60_000_00)
    need_id = f"need-{first}"

    async def published(match_id: str, change: Any) -> None:
        await hub.publisher.publish(topics.OFFERS, offer_event(match_id, FIRM, change, need_id), key=b"need")

    async def rests_on(match_id: str, *, standing: bool) -> None:
        async def seen() -> bool:
            found = await hub.done("GET", path)
            met = next(one["met"] for one in found["assessment"]["findings"] if one["rule"] == "PROVIDER")
            return (found["match_id"], met) == (match_id, standing)

        await eventually(seen, deadline_s=40)

    accepted, cancelled = matching_pb2.OFFER_CHANGE_ACCEPTED, matching_pb2.OFFER_CHANGE_CANCELLED
    await published(first, cancelled)
    await rests_on(first, standing=False)
    why = await hub.refused(409, "MATCH_ENDED", "POST", f"{path}/submit", who="firm")
    assert "Accept another offer for the same need" in why
    body = application_body(call["id"], first)
    assert "apply for that match" in await hub.refused(409, "MATCH_ENDED", "POST", "/v1/applications", body, who="firm")
    # Another provider for the same need, and the draft goes on with its pledge; what was submitted waits in the same way.
    for _ in range(2):  # the second is a repeat
        await published("second-match", accepted)
        await published(first, cancelled)
    await rests_on("second-match", standing=True)
    await hub.done("POST", f"{path}/submit", who="firm")
    await published("second-match", cancelled)
    await rests_on("second-match", standing=False)
    assert (await hub.decide(made["id"])).json()["reason"] == "MATCH_ENDED"
    await published("third-match", accepted)
    await rests_on("third-match", standing=True)
    awarded = (await hub.decide(made["id"])).json()
    assert (awarded["state"], awarded["match_id"]) == ("awarded", "third-match")
    # An award stands: what becomes of it is a change of its project.
    await published("third-match", cancelled)
    await hub.match()
    assert (await hub.done("GET", path))["state"] == "awarded"


async def test_a_firm_is_told_what_was_decided_while_it_was_not_there(hub: Hub) -> None:
    newest = (await hub.done("GET", "/v1/notices?page_size=1", who="firm"))["notices"]
    before = newest[0]["id"] if newest else 0
    call = await hub.call()
    award_id, claim_id = await decided_claim(hub, call["id"])
    rejected = await hub.submitted(call["id"], grant=1_000_00, cost=4_000_00, pledged=3_000_00)
    await hub.decide(rejected, award=False)
    others = await hub.submitted(call["id"], grant=100_00, cost=400_00, pledged=300_00, firm_id=OTHER_FIRM)
    await hub.decide(others, award=False)
    assert (await settle(hub, award_id, claim_id)).status_code == 200
    new = f"/v1/notices?after_id={before}"
    told = (await hub.done("GET", new, who="firm"))["notices"]
    assert [one["kind"] for one in told] == [
        "claim_paid",
        "application_rejected",
        "pledge_confirmed",
        "claim_decided",
        "application_awarded",
        "pledge_confirmed",
    ]
    assert told[0]["text"] == "The claim is settled: GBP 50.00 is paid."
    assert (told[0]["award_id"], told[1]["application_id"], told[1]["award_id"]) == (award_id, rejected, "")
    assert told[1]["text"].startswith("The application is rejected: best value. ")
    pages, token = list[int](), ""
    while token or not pages:
        page = await hub.done("GET", f"{new}&page_size=4&page_token={token}", who="firm")
        pages, token = pages + [one["id"] for one in page["notices"]], page["next_page_token"]
    assert pages == [one["id"] for one in told]
    async with grpc.aio.insecure_channel(hub.grpc_addresses[0]) as channel:
        notices = notice_pb2_grpc.NoticeServiceStub(channel)
        request = notice_pb2.ListNoticesRequest(after_id=before)
        answer = await notices.ListNotices(request, metadata=(("authorization", f"Bearer {hub.keys['firm']}"),))
        assert [(one.id, one.text) for one in answer.notices] == [(one["id"], one["text"]) for one in told]
        assert answer.notices[0].kind == notice_pb2.NOTICE_KIND_CLAIM_PAID
    for wrong, reason in (("after_id=-1", "AFTER_ID_INVALID"), ("page_token=x", "PAGE_TOKEN_INVALID")):
        await hub.refused(400, reason, "GET", f"/v1/notices?{wrong}", who="firm")
    await hub.refused(403, "FORBIDDEN", "GET", "/v1/notices", who="partner")


async def test_the_commands_tell_by_their_exit_code_whether_the_ledger_is_in_order(hub: Hub) -> None:
    await hub.call()
    connection = await asyncpg.connect(hub.dsn, server_settings={"search_path": "funding"})
    tamper = "UPDATE ledger_transfer SET amount_pence = amount_pence + $1 WHERE event_sequence = 1"
    award_id, claim_id = await decided_claim(hub, (await hub.call())["id"])
    await settle(hub, award_id, claim_id)
    promise = "UPDATE agreement SET paid_pence = paid_pence + $2 WHERE award_id = $1"

    async def outcomes(*commands: str) -> list[tuple[int, str]]:
        return await asyncio.gather(*(asyncio.to_thread(hub.command, command) for command in commands))

    try:
        await connection.execute("SET session_replication_role = replica")
        await connection.execute(tamper, 1)
        await connection.execute(promise, award_id, 1)
        (balance_code, balance_output), (replay_code, replay_output) = await outcomes("trial-balance", "replay")
        await connection.execute(tamper, -1)
        await connection.execute(promise, award_id, -1)
    finally:
        await connection.close()
    assert (balance_code, replay_code) == (1, 1)
    assert "DIFFERS FROM ITS TRANSFERS" in balance_output
    assert "event 1 or one of its transfers was altered" in replay_output
    assert f"award {award_id} shows 5001 pence as paid_pence, its transfers make 5000" in replay_output
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
    pool = await create_pool(hub.dsn, schema="funding", size_max=1)

    async def next_due_s() -> float | None:
        await ProgressGauges(pool).measure()
        return REGISTRY.get_sample_value("smdih_funding_subsidy_entry_due_timestamp_seconds")

    try:
        last_day = datetime.fromisoformat(entry["due"]).replace(tzinfo=ZoneInfo("Europe/London"))
        assert await next_due_s() == (last_day + timedelta(days=1)).timestamp()
        for _ in range(2):
            assert (await hub.ask("POST", f"{where}/{due['id']}", {"reference": "SC10001"})).status_code == 204
        left = [entry["award_id"] for entry in (await hub.done("GET", where))["entries"]]
        assert due["id"] not in left
        assert await next_due_s() == math.inf
    finally:
        await pool.close()


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
