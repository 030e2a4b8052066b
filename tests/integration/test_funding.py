"""The fund as two real processes on one database: from a match to an award, races between the two, kills, the ledger."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition

from localstack.servers import free_port
from services.common import topics
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from smdih.funding.v1 import (
    events_pb2,
    funding_pb2,
    funding_pb2_grpc,
)
from smdih.matching.v1 import events_pb2 as matching_pb2
from tests.integration.funding_hub import (
    DAY_US,
    FIRM,
    OTHER_FIRM,
    OTHER_SISTER,
    PROCESSES,
    SISTER,
    TOOLMAKER,
    Hub,
    application_body,
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
