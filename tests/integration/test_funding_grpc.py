"""The fund by gRPC: groups, allocations, co-investors' pools, milestones, changes and impact, each as over HTTP."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any

import asyncpg
import grpc
import pytest
import pytest_asyncio

from services.common.clock import from_us
from services.common.evidence import Statement
from services.common.kafka import Publisher
from services.common.settings import Settings
from services.funding.checker import check_allocation
from services.funding.domain import uk_day
from smdih.funding.v1 import (
    agreement_pb2,
    agreement_pb2_grpc,
    allocation_pb2,
    allocation_pb2_grpc,
    audit_pb2,
    audit_pb2_grpc,
    change_pb2,
    change_pb2_grpc,
    funding_pb2,
    funding_pb2_grpc,
    group_pb2,
    group_pb2_grpc,
    impact_pb2,
    impact_pb2_grpc,
    milestone_pb2,
    milestone_pb2_grpc,
    pool_pb2,
    pool_pb2_grpc,
)
from tests.integration.funding_world import ALL_KEYS, SECOND, World, running_world
from tests.integration.matching_hub import FIRM, OTHER_FIRM, machine_id

MACHINE = machine_id(FIRM, 0)

Call = Callable[..., Awaitable[Any]]


@pytest_asyncio.fixture(scope="module")
async def world(settings: Settings, publisher: Publisher) -> AsyncIterator[World]:
    async with running_world(settings, publisher) as running:
        yield running


def bearer(who: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {ALL_KEYS[who]}"),) if who else ()


async def refused(call: Call, request: Any, who: str, status: str, reason: str) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call(request, metadata=bearer(who))
    said = (error.value.code().name, dict(error.value.trailing_metadata() or ())["reason"])
    assert said == (status, reason), (request, who, error.value.details())
    return error.value.details() or ""


async def forbidden(call: Call, request: Any, *whos: str) -> None:
    for who in whos:
        await refused(call, request, who, "PERMISSION_DENIED", "FORBIDDEN")
    await refused(call, request, "", "UNAUTHENTICATED", "UNAUTHENTICATED")


async def awarded(world: World, grant: int = 40_00) -> str:
    """An award of the firm, accepted today for 90 days."""
    made = await world.submitted(await world.call(1_000_00), FIRM, grant)
    decided = await world.done("POST", f"/v1/applications/{made}/decide", {"award": True, "reason": "good"})
    award_id: str = decided["award"]["id"]
    today = uk_day(from_us(world.clock.now_us()))
    accept = agreement_pb2.AcceptOfferRequest(
        award_id=award_id, project_start=str(today), project_end=str(today + timedelta(days=90))
    )
    agreements = agreement_pb2_grpc.AgreementServiceStub(world.channel)
    accepted = (await agreements.AcceptOffer(accept, metadata=bearer("firm"))).agreement
    assert (accepted.state, accepted.project_start) == (agreement_pb2.AGREEMENT_STATE_ACCEPTED, str(today))
    return award_id


async def test_groups_by_grpc(world: World) -> None:
    groups, pb = group_pb2_grpc.GroupServiceStub(world.channel), group_pb2
    put = pb.SetGroupRequest(group_id="by-wire", firm_ids=[102, 101], source="filing of 3 March")
    await forbidden(groups.SetGroup, put, "firm", "partner", "device")
    group = (await groups.SetGroup(put, metadata=bearer("operator"))).group
    assert (group.id, list(group.firm_ids), group.source) == ("by-wire", [101, 102], "filing of 3 March")
    get = pb.GetGroupRequest(group_id="by-wire")
    assert (await groups.GetGroup(get, metadata=bearer("operator"))).group == group
    await forbidden(groups.GetGroup, get, "firm", "partner")
    other = pb.SetGroupRequest(group_id="other", firm_ids=[102, 103], source="x")
    await refused(groups.SetGroup, other, "operator", "FAILED_PRECONDITION", "FIRM_IN_OTHER_GROUP")
    alone = pb.SetGroupRequest(group_id="other", firm_ids=[102], source="x")
    await refused(groups.SetGroup, alone, "operator", "INVALID_ARGUMENT", "GROUP_INVALID")
    unknown = pb.SetGroupRequest(group_id="other", firm_ids=[102, 2**62], source="x")
    await refused(groups.SetGroup, unknown, "operator", "NOT_FOUND", "FIRM_UNKNOWN")
    for odd in ("none", "", "\0"):
        await refused(groups.GetGroup, pb.GetGroupRequest(group_id=odd), "operator", "NOT_FOUND", "GROUP_UNKNOWN")
    of_firm = pb.GetAssistanceRequest(firm_id=101)
    left = await groups.GetAssistance(of_firm, metadata=bearer("operator"))
    by_http = await world.done("GET", "/v1/assistance?firm_id=101")
    assert (list(left.firm_ids), left.headroom_pence) == ([101, 102], by_http["headroom_pence"])
    assert (left.window_start, left.counted_pence) == (by_http["window_start"], by_http["counted_pence"])
    await forbidden(groups.GetAssistance, of_firm, "firm", "partner")
    own = await groups.GetAssistance(pb.GetAssistanceRequest(), metadata=bearer("firm"))
    assert list(own.firm_ids) == [FIRM]
    gone = await groups.SetGroup(pb.SetGroupRequest(group_id="by-wire", source="sold"), metadata=bearer("operator"))
    assert list(gone.group.firm_ids) == []


async def enterprise(world: World, firm_id: int) -> dict[str, Any]:
    found: dict[str, Any] = await world.done("GET", f"/v1/enterprise?firm_id={firm_id}")
    return found


async def test_firms_are_one_enterprise_by_what_they_own_of_each_other(world: World) -> None:
    def holding(owner: int, owned: int, percent: str, **more: Any) -> tuple[str, dict[str, Any]]:
        return f"/v1/holdings/{owner}/{owned}", {"percent": percent, "source": "filing of 3 March", **more}

    made = await world.submitted(await world.call(1_000_00), 103, 40_00)
    await world.done("POST", f"/v1/applications/{made}/decide", {"award": True, "reason": "good"})
    draft = await world.submitted(await world.call(1_000_00), 101)
    # Half and less is a partner, not one enterprise; a hair more is a link. Links go on from firm to firm.
    for percent, relation, kin in (
        ("24.99", "autonomous", [101]),
        ("25", "partner", [101]),
        ("50.00", "partner", [101]),
        ("50.000001", "linked", [FIRM, 101]),
    ):
        found = await world.done("PUT", *holding(FIRM, 101, percent))
        [stated] = found["holdings"]
        seen = await world.done("GET", f"/v1/applications/{draft}")
        (size,) = [one["text"] for one in seen["assessment"]["findings"] if one["rule"] == "SME"]
        assert (f"its group has firm {FIRM} ({percent} %)" in size) == (relation != "autonomous")
        assert (stated["relation"], stated["percent"], found["firm_ids"]) == (relation, percent, kin)
    await world.done("PUT", *holding(102, 101, "10", dominant_influence=True))
    await world.done("PUT", *holding(102, 103, "100"))
    assert (await enterprise(world, FIRM))["firm_ids"] == [FIRM, 101, 102, 103]
    assert len((await enterprise(world, 103))["holdings"]) == 3
    # A declared group joins in, and all of them share what was given to one.
    await world.done("PUT", "/v1/groups/family", {"firm_ids": [OTHER_FIRM, 102], "source": "one owner"})
    seen = await enterprise(world, OTHER_FIRM)
    assert (seen["firm_ids"], seen["groups"]) == ([FIRM, OTHER_FIRM, 101, 102, 103], ["family"])
    before = (await world.done("GET", "/v1/assistance?firm_id=103"))["counted_pence"]
    assert before >= 40_00
    of_firm = await world.done("GET", "/v1/assistance", who="firm")
    assert (of_firm["counted_pence"], of_firm["firm_ids"]) == (before, seen["firm_ids"])
    # By gRPC.
    groups, pb = group_pb2_grpc.GroupServiceStub(world.channel), group_pb2
    own = (await groups.GetEnterprise(pb.GetEnterpriseRequest(), metadata=bearer("firm"))).enterprise
    assert list(own.firm_ids) == seen["firm_ids"]
    assert {(each.owner_firm_id, each.owned_firm_id): each.relation for each in own.holdings} == {
        (FIRM, 101): pb.FIRM_RELATION_LINKED,
        (102, 101): pb.FIRM_RELATION_LINKED,
        (102, 103): pb.FIRM_RELATION_LINKED,
    }
    give_up = pb.SetHoldingRequest(owner_firm_id=102, owned_firm_id=101, percent="0", source="sold on 1 June")
    await forbidden(groups.SetHolding, give_up, "firm", "partner", "device")
    after = (await groups.SetHolding(give_up, metadata=bearer("operator"))).enterprise
    assert list(after.firm_ids) == [FIRM, 101]
    assert (await world.done("GET", "/v1/assistance", who="firm"))["firm_ids"] == [FIRM, 101]
    others = pb.GetEnterpriseRequest(firm_id=OTHER_FIRM)
    await forbidden(groups.GetEnterprise, others, "firm", "partner")
    # What makes no sense, or is not theirs.
    refusals: list[tuple[int, str, int, int, str]] = [
        (400, "HOLDING_INVALID", FIRM, FIRM, "60"),
        (404, "FIRM_UNKNOWN", FIRM, 2**62, "60"),
        (400, "DECIMAL_INVALID", FIRM, 101, "-1"),
        (400, "DECIMAL_INVALID", FIRM, 101, "100.01"),
        (400, "DECIMAL_INVALID", FIRM, 101, "half"),
    ]
    for status, reason, owner, owned, percent in refusals:
        await world.refused(status, reason, "PUT", *holding(owner, owned, percent))
    for who in ("firm", "partner", "device"):
        await world.refused(403, "FORBIDDEN", "PUT", *holding(FIRM, 101, "0"), who=who)
    await world.refused(401, "UNAUTHENTICATED", "PUT", *holding(FIRM, 101, "0"), who="")
    await world.refused(403, "FORBIDDEN", "GET", f"/v1/enterprise?firm_id={OTHER_FIRM}", who="firm")
    await world.refused(403, "FORBIDDEN", "GET", "/v1/enterprise", who="partner")
    note = await world.pool.fetchval("SELECT detail FROM audit WHERE action = 'holding_set' ORDER BY at DESC LIMIT 1")
    assert json.loads(note)["source"] == "sold on 1 June"
    for owner, owned in ((FIRM, 101), (102, 103)):
        await world.done("PUT", *holding(owner, owned, "0"))
    await world.done("PUT", "/v1/groups/family", {"firm_ids": [], "source": "split"})
    assert await enterprise(world, FIRM) == {"firm_id": FIRM, "firm_ids": [FIRM], "groups": [], "holdings": []}


async def test_an_allocation_by_grpc_from_the_run_to_the_second_person(world: World) -> None:
    allocations, pb = allocation_pb2_grpc.AllocationServiceStub(world.channel), allocation_pb2
    limits = [{"pot": "region:wales", "ceiling_pence": 40_00}]
    call_id = await world.call(80_00, method="top_down_skip", limits=limits)
    first, wales = await world.submitted(call_id, FIRM, 40_00), await world.submitted(call_id, 102, 30_00)
    low = await world.submitted(call_id, 101, 10_00)
    for made, score in ((first, "80"), (wales, "79"), (low, "60")):
        await world.scored(made, score, score, score)
    run = pb.RunAllocationRequest(call_id=call_id)
    await refused(allocations.RunAllocation, run, "operator", "FAILED_PRECONDITION", "CALL_NOT_CLOSED")
    world.close_calls()
    await forbidden(allocations.RunAllocation, run, "firm", "partner", "device")
    proposed = (await allocations.RunAllocation(run, metadata=bearer("operator"))).allocation
    assert (proposed.state, proposed.method) == (
        pb.PROPOSAL_STATE_PROPOSED,
        funding_pb2.ALLOCATION_METHOD_TOP_DOWN_SKIP,
    )
    assert (proposed.spent_pence, proposed.left_pence, proposed.budget_pence) == (70_00, 10_00, 80_00)
    assert dict(proposed.spent_by_pot)["region:wales"] == 30_00
    assert {each.application_id: each.code for each in proposed.reasons} == {
        first: "FUNDED",
        wales: "FUNDED",
        low: "BELOW_THRESHOLD",
    }
    assert (proposed.checker_agrees, proposed.checker_proof, proposed.HasField("confirmed_us")) == (
        True,
        "ranking",
        False,
    )
    ask = pb.GetAllocationDocumentsRequest(allocation_id=proposed.id)
    documents = await allocations.GetAllocationDocuments(ask, metadata=bearer("operator"))
    assert check_allocation(json.loads(documents.input_json), json.loads(documents.certificate_json)).holds
    confirm = pb.ConfirmAllocationRequest(allocation_id=proposed.id, reason="panel")
    for call, request in (
        (allocations.GetAllocation, pb.GetAllocationRequest(allocation_id=proposed.id)),
        (allocations.GetAllocationDocuments, ask),
        (allocations.ConfirmAllocation, confirm),
    ):
        await forbidden(call, request, "firm", "partner", "device")
    await refused(allocations.ConfirmAllocation, confirm, "operator", "PERMISSION_DENIED", "SECOND_PERSON")
    done = (await allocations.ConfirmAllocation(confirm, metadata=bearer(SECOND))).allocation
    assert (done.state, list(done.pending), dict(done.refused)) == (pb.PROPOSAL_STATE_CONFIRMED, [], {})
    assert done.confirmed_us > 0
    get = pb.GetAllocationRequest(allocation_id=proposed.id)
    assert (await allocations.GetAllocation(get, metadata=bearer("operator"))).allocation == done
    assert [await world.state(made) for made in (first, wales, low)] == [
        ("awarded", "FUNDED"),
        ("awarded", "FUNDED"),
        ("rejected", "BELOW_THRESHOLD"),
    ]
    for odd in ("none", "\0"):
        unknown = pb.GetAllocationRequest(allocation_id=odd)
        await refused(allocations.GetAllocation, unknown, "operator", "NOT_FOUND", "ALLOCATION_UNKNOWN")


async def test_co_investors_money_is_spread_by_grpc(world: World) -> None:
    pools, pb = pool_pb2_grpc.PoolServiceStub(world.channel), pool_pb2
    call_id = await world.call(1_000_00)
    made = await world.submitted(call_id, FIRM, 40_00, pledge=False)
    add = pb.AddPoolPledgeRequest(
        request_id="ash", call_id=call_id, co_investor="Ash", amount_pence=70_00, supports=[made], evidence="letter"
    )
    await forbidden(pools.AddPoolPledge, add, "firm", "partner", "device")
    for _ in range(2):  # the second is a repeat
        [pledge] = (await pools.AddPoolPledge(add, metadata=bearer("operator"))).pledges
    assert (pledge.co_investor, pledge.amount_pence, list(pledge.supports)) == ("Ash", 70_00, [made])
    other = pb.AddPoolPledgeRequest()
    other.CopyFrom(add)
    other.amount_pence += 1
    await refused(pools.AddPoolPledge, other, "operator", "FAILED_PRECONDITION", "REQUEST_ID_REUSED")
    listing = pb.ListPoolPledgesRequest(call_id=call_id)
    assert list((await pools.ListPoolPledges(listing, metadata=bearer("operator"))).pledges) == [pledge]
    await forbidden(pools.ListPoolPledges, listing, "firm", "partner")
    unknown = pb.ListPoolPledgesRequest(call_id="\0")
    await refused(pools.ListPoolPledges, unknown, "operator", "NOT_FOUND", "CALL_UNKNOWN")
    spread = pb.SpreadPoolRequest(call_id=call_id)
    await refused(pools.SpreadPool, spread, "operator", "FAILED_PRECONDITION", "CALL_NOT_CLOSED")
    world.close_calls()
    await forbidden(pools.SpreadPool, spread, "firm", "partner")
    proposed = (await pools.SpreadPool(spread, metadata=bearer("operator"))).spread
    assert (proposed.state, proposed.checker_agrees) == (allocation_pb2.PROPOSAL_STATE_PROPOSED, True)
    [purchase] = json.loads(proposed.certificate_json)["purchases"]
    assert (purchase["project"], purchase["payments_p"]) == (made, {pledge.id: 60_00})
    confirm = pb.ConfirmPoolSpreadRequest(spread_id=proposed.id, reason="agreed")
    await refused(pools.ConfirmPoolSpread, confirm, "operator", "PERMISSION_DENIED", "SECOND_PERSON")
    await forbidden(pools.ConfirmPoolSpread, confirm, "firm", "partner")
    done = (await pools.ConfirmPoolSpread(confirm, metadata=bearer(SECOND))).spread
    assert (done.state, dict(done.refused)) == (allocation_pb2.PROPOSAL_STATE_CONFIRMED, {})
    get = pb.GetPoolSpreadRequest(spread_id=proposed.id)
    assert (await pools.GetPoolSpread(get, metadata=bearer(SECOND))).spread == done
    await forbidden(pools.GetPoolSpread, get, "firm", "partner")
    counted = (await world.done("GET", f"/v1/applications/{made}"))["assessment"]["match_counted_pence"]
    assert counted == 60_00


def signed(world: World, start_us: int, **changes: Any) -> str:
    """Evidence of 900 kWh of the firm's machine in a week, as the ingest service gives it out."""
    fields: dict[str, Any] = {
        "measure": "energy_kwh",
        "firm_id": FIRM,
        "machine_id": MACHINE,
        "machine_path": "acme/site/secret-0",
        "from_us": start_us,
        "to_us": start_us + 7 * 86_400_000_000,
        "value": "900.00",
        "unit": "kWh",
        "coverage": "0.95",
        "method": "sum over minutes",
        "issued_us": start_us,
        **changes,
    }
    return json.dumps(world.signer.sign(Statement(**fields)))


async def test_milestones_by_grpc_shown_alone_or_with_a_claim(world: World) -> None:
    milestones, pb = milestone_pb2_grpc.MilestoneServiceStub(world.channel), milestone_pb2
    award_id = await awarded(world)
    today = uk_day(from_us(world.clock.now_us()))
    wanted = [
        pb.Milestone(
            id=name,
            title="A week at 900 kWh or less",
            measure="energy_kwh",
            machine_id=MACHINE,
            comparison=pb.COMPARISON_AT_MOST,
            threshold="900",
            days_min=7,
            due=str(today + timedelta(days=60)),
        )
        for name in ("saves", "saves-more")
    ]
    put = pb.SetMilestonesRequest(award_id=award_id, milestones=wanted)
    await forbidden(milestones.SetMilestones, put, "firm", "partner", "device")
    stored = (await milestones.SetMilestones(put, metadata=bearer("operator"))).milestones
    assert [(each.id, each.coverage_min, each.HasField("met_us")) for each in stored] == [
        ("saves", "0.9", False),
        ("saves-more", "0.9", False),
    ]
    nothing = pb.Milestone(id="x", title="x", measure="x", threshold="1", days_min=1, due="2026-01-01")
    vague = pb.SetMilestonesRequest(award_id=award_id, milestones=[nothing])
    await refused(milestones.SetMilestones, vague, "operator", "INVALID_ARGUMENT", "COMPARISON_MISSING")
    vague.milestones[0].comparison, vague.milestones[0].due = pb.COMPARISON_AT_LEAST, "soon"
    await refused(milestones.SetMilestones, vague, "operator", "INVALID_ARGUMENT", "DATE_INVALID")
    listing = pb.ListMilestonesRequest(award_id=award_id)
    assert (await milestones.ListMilestones(listing, metadata=bearer("firm"))).milestones == stored
    await refused(milestones.ListMilestones, listing, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    await forbidden(milestones.ListMilestones, listing, "partner")
    start_us = world.clock.now_us() + 86_400_000_000
    shown = pb.ShowMilestoneRequest(award_id=award_id, milestone_id="saves", evidence_json=signed(world, start_us))
    for who in ("operator", "partner"):
        await refused(milestones.ShowMilestone, shown, who, "PERMISSION_DENIED", "FORBIDDEN")
    await refused(milestones.ShowMilestone, shown, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    for odd in ("", "not json", "[]", "[" * 100_000, "{}"):
        no_evidence = pb.ShowMilestoneRequest(award_id=award_id, milestone_id="saves", evidence_json=odd)
        await refused(milestones.ShowMilestone, no_evidence, "firm", "INVALID_ARGUMENT", "BAD_EVIDENCE")
    for _ in range(2):  # the second is a repeat
        met = (await milestones.ShowMilestone(shown, metadata=bearer("firm"))).milestones
    assert [(each.id, each.value, each.HasField("met_us")) for each in met] == [
        ("saves", "900.00", True),
        ("saves-more", "", False),
    ]
    put.milestones[0].threshold = "901"
    await refused(milestones.SetMilestones, put, "operator", "FAILED_PRECONDITION", "MILESTONE_MET")
    # With a claim, in one step.
    agreements = agreement_pb2_grpc.AgreementServiceStub(world.channel)
    day = today + timedelta(days=1)
    world.clock.shift += timedelta(days=20)
    evidence = agreement_pb2.ShownMilestone(
        milestone_id="saves-more", evidence_json=signed(world, start_us, value="899.00")
    )
    claim = agreement_pb2.SubmitClaimRequest(
        award_id=award_id,
        request_id="first",
        period_start=str(today),
        period_end=str(day),
        costs=[
            agreement_pb2.CostLine(category=funding_pb2.COST_CATEGORY_LABOUR, amount_pence=1_00, evidence="invoice 1")
        ],
        evidence=[evidence] * 21,
    )
    await refused(agreements.SubmitClaim, claim, "firm", "INVALID_ARGUMENT", "TOO_MUCH_EVIDENCE")
    del claim.evidence[1:]
    claimed = (await agreements.SubmitClaim(claim, metadata=bearer("firm"))).agreement
    assert (claimed.claims[0].state, claimed.claims[0].costs[0].evidence) == (
        agreement_pb2.CLAIM_STATE_SUBMITTED,
        "invoice 1",
    )
    after = (await milestones.ListMilestones(listing, metadata=bearer("operator"))).milestones
    assert [each.value for each in after] == ["900.00", "899.00"]


async def test_a_milestone_that_no_machine_shows_is_confirmed_by_an_operator_on_a_document(world: World) -> None:
    milestones, pb = milestone_pb2_grpc.MilestoneServiceStub(world.channel), milestone_pb2
    award_id = await awarded(world)
    today = uk_day(from_us(world.clock.now_us()))
    path = f"/v1/awards/{award_id}/milestones"
    paper = {"id": "trained", "title": "Ten people are trained", "due": str(today)}
    figure: dict[str, Any] = {
        "id": "saves",
        "title": "x",
        "due": str(today + timedelta(days=80)),
        "measure": "energy_kwh",
    }
    figure |= {"comparison": "at_most", "threshold": "1", "days_min": 1}
    for odd, reason in (
        ({**paper, "threshold": "5"}, "MILESTONE_INVALID"),
        ({**paper, "machine_id": MACHINE}, "MILESTONE_INVALID"),
        ({**paper, "comparison": "at_least"}, "MILESTONE_INVALID"),
        ({**figure, "comparison": None}, "COMPARISON_MISSING"),
    ):
        await world.refused(400, reason, "PUT", path, {"milestones": [odd]})
    stored = (await world.done("PUT", path, {"milestones": [paper, figure]}))["milestones"]
    assert [(each["id"], each["measure"], each["comparison"], each["coverage_min"]) for each in stored] == [
        ("trained", "", None, ""),
        ("saves", "energy_kwh", "at_most", "0.9"),
    ]
    first, second = "0" * 64, "a" * 64
    send = pb.SendMilestoneDocumentRequest(
        award_id=award_id, milestone_id="trained", reference="file 17/26", sha256=first
    )
    for who in ("operator", "partner", "device"):
        await refused(milestones.SendMilestoneDocument, send, who, "PERMISSION_DENIED", "FORBIDDEN")
    await refused(milestones.SendMilestoneDocument, send, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    for _ in range(2):  # the second is a repeat
        there = (await milestones.SendMilestoneDocument(send, metadata=bearer("firm"))).milestones
    assert (there[0].document, there[0].document_sha256, there[0].HasField("met_us")) == ("file 17/26", first, False)
    assert there[0].comparison == pb.COMPARISON_UNSPECIFIED
    # Another one takes its place; who confirms says which one was looked at.
    newer = {"reference": "file 18/26", "sha256": second}
    await world.done("POST", f"{path}/trained/document", newer, who="firm")
    confirm = pb.ConfirmMilestoneRequest(award_id=award_id, milestone_id="trained", sha256=first, reason="list seen")
    await refused(milestones.ConfirmMilestone, confirm, "operator", "FAILED_PRECONDITION", "DOCUMENT_OTHER")
    confirm.sha256 = second
    await forbidden(milestones.ConfirmMilestone, confirm, "firm", "partner", "device")
    # Until it is met a claim of its days waits.
    body: dict[str, Any] = {"request_id": "c", "period_start": str(today), "period_end": str(today), "is_final": False}
    body |= {"costs": [{"category": "labour", "amount_pence": 1_00, "evidence": "invoice 9"}]}
    world.clock.shift += timedelta(days=2)
    claim = (await world.done("POST", f"/v1/awards/{award_id}/claims", body, who="firm"))["claims"][0]["id"]
    decide, accept = f"/v1/awards/{award_id}/claims/{claim}/decide", {"accept": True, "reason": "papers seen"}
    await world.refused(409, "MILESTONE_UNMET", "POST", decide, accept)
    for _ in range(2):  # the second is a repeat
        met = (await milestones.ConfirmMilestone(confirm, metadata=bearer("operator"))).milestones
    assert (met[0].HasField("met_us"), met[0].document) == (True, "file 18/26")
    await world.done("POST", decide, accept)
    await world.refused(
        409, "MILESTONE_MET", "POST", f"{path}/trained/document", {**newer, "sha256": first}, who="firm"
    )
    await world.refused(409, "MILESTONE_MET", "PUT", path, {"milestones": [figure]})
    # Each kind is shown in its own way.
    await world.refused(409, "MILESTONE_MEASURED", "POST", f"{path}/saves/document", newer, who="firm")
    evidence = {"evidence": json.loads(signed(world, world.clock.now_us()))}
    await world.refused(409, "MILESTONE_OF_DOCUMENT", "POST", f"{path}/trained/evidence", evidence, who="firm")
    await world.refused(404, "MILESTONE_UNKNOWN", "POST", f"{path}/none/document", newer, who="firm")
    bad = {**newer, "sha256": "A" * 64}
    await world.refused(400, "SHA256_INVALID", "POST", f"{path}/trained/document", bad, who="firm")
    for who, status, reason in (("other_firm", 404, "AWARD_UNKNOWN"), ("operator", 403, "FORBIDDEN")):
        await world.refused(status, reason, "POST", f"{path}/trained/document", newer, who=who)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await world.pool.execute("UPDATE milestone_document SET sha256 = 'x' WHERE award_id = $1", award_id)


async def test_changes_by_grpc_take_effect_once_approved(world: World) -> None:
    changes, pb = change_pb2_grpc.ChangeServiceStub(world.channel), change_pb2
    award_id = await awarded(world)
    ask = pb.RequestChangeRequest(
        award_id=award_id, request_id="less", kind=pb.CHANGE_KIND_REDUCTION, reason="cheaper", reduction_pence=10_00
    )
    for who in ("operator", "partner"):
        await refused(changes.RequestChange, ask, who, "PERMISSION_DENIED", "FORBIDDEN")
    await refused(changes.RequestChange, ask, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    for _ in range(2):  # the second is a repeat
        [asked] = (await changes.RequestChange(ask, metadata=bearer("firm"))).changes
    assert (asked.state, asked.kind, asked.reduction_pence, asked.HasField("decided_us")) == (
        pb.CHANGE_STATE_REQUESTED,
        pb.CHANGE_KIND_REDUCTION,
        10_00,
        False,
    )
    later = pb.RequestChangeRequest(
        award_id=award_id,
        request_id="costs",
        kind=pb.CHANGE_KIND_COSTS,
        reason="more travel",
        costs=[
            funding_pb2.Cost(category=funding_pb2.COST_CATEGORY_LABOUR, amount_pence=90_00),
            funding_pb2.Cost(category=funding_pb2.COST_CATEGORY_TRAVEL, amount_pence=10_00),
        ],
    )
    await refused(changes.RequestChange, later, "firm", "FAILED_PRECONDITION", "CHANGE_OPEN")
    kindless = pb.RequestChangeRequest(award_id=award_id, request_id="x", reason="x")
    await refused(changes.RequestChange, kindless, "firm", "INVALID_ARGUMENT", "CHANGE_KIND_MISSING")
    decide = pb.DecideChangeRequest(award_id=award_id, change_id=asked.id, reason="fine")
    await refused(changes.DecideChange, decide, "operator", "INVALID_ARGUMENT", "VERDICT_MISSING")
    decide.verdict = pb.CHANGE_VERDICT_APPROVE
    await forbidden(changes.DecideChange, decide, "firm", "partner", "device")
    [approved] = (await changes.DecideChange(decide, metadata=bearer("operator"))).changes
    assert (approved.state, approved.decision_reason) == (pb.CHANGE_STATE_APPROVED, "fine")
    agreements = agreement_pb2_grpc.AgreementServiceStub(world.channel)
    get = agreement_pb2.GetAgreementRequest(award_id=award_id)
    agreement = (await agreements.GetAgreement(get, metadata=bearer("firm"))).agreement
    assert (agreement.grant_pence - agreement.restored_pence, agreement.restored_pence) == (30_00, 10_00)
    assert len((await changes.RequestChange(later, metadata=bearer("firm"))).changes) == 2
    listing = pb.ListChangesRequest(award_id=award_id)
    listed = (await changes.ListChanges(listing, metadata=bearer("operator"))).changes
    assert [(each.kind, len(each.costs)) for each in listed] == [
        (pb.CHANGE_KIND_REDUCTION, 0),
        (pb.CHANGE_KIND_COSTS, 2),
    ]
    await refused(changes.ListChanges, listing, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    await forbidden(changes.ListChanges, listing, "partner")
    decide.change_id = "\0"
    await refused(changes.DecideChange, decide, "operator", "NOT_FOUND", "CHANGE_UNKNOWN")


async def test_impact_by_grpc_and_its_sums_for_partners(world: World) -> None:
    impacts, pb = impact_pb2_grpc.ImpactServiceStub(world.channel), impact_pb2
    award_id = await awarded(world)
    today = uk_day(from_us(world.clock.now_us()))
    figures = pb.ImpactFigures(
        jobs_fte="38.5",
        value_added_pence=2_000_000_00,
        hours_worked="50000",
        energy_kwh="1000.5",
        carbon_kg_co2e="200",
    )
    report = pb.ReportImpactRequest(
        award_id=award_id,
        kind=pb.IMPACT_KIND_BASELINE,
        year_ending=str(today - timedelta(days=30)),
        figures=figures,
        uncertainty_percent="5",
        method="meters",
    )
    for who in ("operator", "partner", "device"):
        await refused(impacts.ReportImpact, report, who, "PERMISSION_DENIED", "FORBIDDEN")
    await refused(impacts.ReportImpact, report, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    for _ in range(2):  # the second is a repeat
        impact = (await impacts.ReportImpact(report, metadata=bearer("firm"))).impact
    assert [(each.kind, each.version, each.figures) for each in impact.reports] == [
        (pb.IMPACT_KIND_BASELINE, 1, figures)
    ]
    kindless = pb.ReportImpactRequest(award_id=award_id)
    await refused(impacts.ReportImpact, kindless, "firm", "INVALID_ARGUMENT", "IMPACT_KIND_MISSING")
    bare = pb.ReportImpactRequest(award_id=award_id, kind=pb.IMPACT_KIND_FOLLOW_UP, year_ending="2030-01-01")
    await refused(impacts.ReportImpact, bare, "firm", "INVALID_ARGUMENT", "DECIMAL_INVALID")
    get = pb.GetImpactRequest(award_id=award_id)
    assert (await impacts.GetImpact(get, metadata=bearer("operator"))).impact == impact
    await refused(impacts.GetImpact, get, "other_firm", "NOT_FOUND", "AWARD_UNKNOWN")
    await forbidden(impacts.GetImpact, get, "partner")
    world.clock.shift += timedelta(days=480)
    year_after = str(today + timedelta(days=92 + 365))
    follow_up = pb.ReportImpactRequest()
    follow_up.CopyFrom(report)
    follow_up.kind, follow_up.year_ending, follow_up.figures.energy_kwh = pb.IMPACT_KIND_FOLLOW_UP, year_after, "900"
    await impacts.ReportImpact(follow_up, metadata=bearer("firm"))
    ask = pb.GetProgrammeImpactRequest()
    found = await impacts.GetProgrammeImpact(ask, metadata=bearer("partner"))
    assert (found.baselines, found.follow_ups, found.totals.projects) == (1, 1, 1)
    assert (found.totals.jobs_fte, found.totals.energy_kwh) == ("0.00", "-100.50")
    assert found.totals.value_added_pounds_an_hour_before == "40.00"
    # The other awards of this world that were accepted have reported nothing.
    assert {each.kind for each in found.overdue} <= {pb.IMPACT_KIND_BASELINE, pb.IMPACT_KIND_FOLLOW_UP}
    assert award_id not in {each.award_id for each in found.overdue}
    await forbidden(impacts.GetProgrammeImpact, ask, "firm", "device")


async def test_an_application_by_grpc_begins_with_what_the_hub_knows_and_says_what_may_be_done(world: World) -> None:
    fund, pb = funding_pb2_grpc.FundingServiceStub(world.channel), funding_pb2
    call_id = await world.call(1_000_00)
    made = await world.submitted(call_id, FIRM)
    match_id = f"match-{world.matches}"
    ask = pb.PrefillRequest(call_id=call_id, match_id=match_id)
    known = await fund.Prefill(ask, metadata=bearer("firm"))
    by_http = await world.done("GET", f"/v1/applications/prefill?call_id={call_id}&match_id={match_id}", who="firm")
    assert (known.firm_name, known.sic, known.region, known.provider_title, known.call.id) == (
        *(by_http[name] for name in ("firm_name", "sic", "region", "provider_title")),
        call_id,
    )
    assert [(each.id, each.path) for each in known.machines] == [
        (one["id"], one["path"]) for one in by_http["machines"]
    ]
    assert known.declaration.size.headcount == "9"
    await refused(fund.Prefill, ask, "other_firm", "NOT_FOUND", "MATCH_UNKNOWN")
    await forbidden(fund.Prefill, ask, "partner", "device")
    get = pb.GetApplicationRequest(application_id=made)
    mine = (await fund.GetApplication(get, metadata=bearer("firm"))).application
    assert list(mine.may) == [
        pb.APPLICATION_ACTION_ADD_PLEDGE,
        pb.APPLICATION_ACTION_TAKE_PLEDGE_BACK,
        pb.APPLICATION_ACTION_WITHDRAW,
    ]
    of_operator = (await fund.GetApplication(get, metadata=bearer("operator"))).application
    assert pb.APPLICATION_ACTION_DECIDE in of_operator.may


async def test_an_auditor_reads_who_did_what_newest_first_page_by_page(world: World) -> None:
    audits, pb = audit_pb2_grpc.AuditServiceStub(world.channel), audit_pb2
    call_id = await world.call(1_000_00)
    made = await world.submitted(call_id, FIRM)
    await world.done("POST", f"/v1/applications/{made}/decide", {"award": False, "reason": "no room, \u00a3 or time"})
    entries: list[dict[str, Any]] = []
    token, pages = "", 0
    while True:
        page = await world.done("GET", f"/v1/audit?call_id={call_id}&page_size=2&page_token={token}")
        entries, token, pages = entries + page["entries"], page["next_page_token"], pages + 1
        if not token:
            break
    assert pages == (len(entries) + 1) // 2 >= 2
    assert [each["id"] for each in entries] == sorted({each["id"] for each in entries}, reverse=True)
    newest = entries[0]
    assert (newest["application_id"], newest["detail"]["reason"]) == (made, "no room, \u00a3 or time")
    operator = next(number for number, name in enumerate(ALL_KEYS, start=1) if name == "operator")
    assert newest["credential_id"] == operator
    assert {"call_created", "application_submitted"} <= {each["action"] for each in entries}
    ask = pb.ListAuditEntriesRequest(application_id=made, page_size=1)
    by_grpc = await audits.ListAuditEntries(ask, metadata=bearer("operator"))
    [entry] = by_grpc.entries
    assert (entry.id, entry.action, entry.at_us, json.loads(entry.detail_json)) == (
        *(newest[name] for name in ("id", "action", "at_us")),
        newest["detail"],
    )
    assert by_grpc.next_page_token == str(entry.id)
    for odd in ("none", "\0"):
        nothing = pb.ListAuditEntriesRequest(application_id=odd)
        assert not (await audits.ListAuditEntries(nothing, metadata=bearer("operator"))).entries
    await forbidden(audits.ListAuditEntries, ask, "firm", "partner", "device")
    for who in ("firm", "partner", "device"):
        await world.refused(403, "FORBIDDEN", "GET", "/v1/audit", who=who)
    await world.refused(401, "UNAUTHENTICATED", "GET", "/v1/audit", who="")
    await world.refused(400, "PAGE_TOKEN_INVALID", "GET", "/v1/audit?page_token=x")
    await world.refused(400, "PAGE_SIZE_OUT_OF_RANGE", "GET", "/v1/audit?page_size=101")
