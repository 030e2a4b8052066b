"""The fund's money, by its doors and commands: claims paid once, budgets moved, and what is published of it."""

import asyncio
import math
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg
import grpc
import httpx
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from localstack.servers import free_port
from services.common.database import create_pool
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from services.funding.domain import uk_day
from services.funding.gauges import ProgressGauges
from services.funding.rules.calendar import add_months
from smdih.funding.v1 import (
    agreement_pb2,
    agreement_pb2_grpc,
    notice_pb2,
    notice_pb2_grpc,
)
from tests.integration.funding_hub import (
    FIRM,
    LARGE_AWARDS,
    OTHER_FIRM,
    PROCESSES,
    Hub,
    call_body,
    running_fund,
    started,
)
from tests.polling import eventually

REQUIRED_BY_360GIVING = {
    *("id", "title", "description", "currency", "amountAwarded", "awardDate"),
    *("recipientOrganization", "fundingOrganization"),
}


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, cluster: Cluster, publisher: Publisher) -> AsyncIterator[Hub]:
    async with running_fund(settings, cluster, publisher) as running:
        yield running


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
