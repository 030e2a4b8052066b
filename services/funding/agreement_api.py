"""Awards after the decision, over HTTP: acceptance, claims, payments, and the figures of the whole fund."""

from datetime import date
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from services.common.http import Authenticated
from services.funding.agreement import Agreement, AgreementState, ClaimState, CostLine
from services.funding.agreements import AgreementService
from services.funding.balances import BalanceService, FundView
from services.funding.claims import ClaimService
from services.funding.domain import CostCategory
from services.funding.rules.exact import fixed_down
from services.funding.rules.match import FundRatio


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AcceptIn(_In):
    project_start: str = Field(description="ISO date, from the day of the award on")
    project_end: str


class AssistanceIn(_In):
    elsewhere_pence: StrictInt = Field(description="given to the firm's group in the window by others than this fund")
    statement: str = Field(description="the words of the confirmation, and who gives it")


class CostLineIn(_In):
    category: CostCategory
    amount_pence: StrictInt
    evidence: str = Field(description="such as the number of the invoice; one paper is claimed once")


class ShownIn(_In):
    milestone_id: str
    evidence: dict[str, Any] = Field(description="exactly as GET /v1/machines/{id}/evidence gave it out")


class ClaimIn(_In):
    request_id: str
    period_start: str
    period_end: str
    costs: list[CostLineIn]
    is_final: StrictBool = Field(False, description="its period ends with the project")
    evidence: list[ShownIn] = Field([], description="signed evidence of milestones, at most 20")


class ClaimDecisionIn(_In):
    accept: StrictBool = Field(description="true: what the rule makes of it, false: reject")
    reason: str


class SettlementIn(_In):
    release: StrictBool = Field(description="true: release the money, false: send the claim back")
    reason: str


class ReportsIn(_In):
    final_report: str = Field(description="where it is kept")
    accountant_report: str


class EndIn(_In):
    reason: str


class RecoveryIn(_In):
    request_id: str
    amount_pence: StrictInt
    reason: str


class _Out(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class CostLineOut(_Out):
    category: CostCategory
    amount_pence: int
    evidence: str


class ClaimDecisionOut(_Out):
    claimed_grant_pence: int
    payable_pence: int
    held_pence: int
    over_grant_pence: int
    business_pence: int
    days_after_period_end: int
    code: str
    reasons: list[str]


class ClaimOut(_Out):
    id: str
    number: int
    period_start: date
    period_end: date
    costs: list[CostLineOut]
    defrayed_pence: int
    is_final: bool
    state: ClaimState
    submitted_us: int
    decided_us: int | None
    decision: ClaimDecisionOut | None
    decision_reason: str
    paid_us: int | None


class AgreementOut(_Out):
    award_id: str
    application_id: str
    call_id: str
    firm_id: int
    state: AgreementState
    grant_pence: int
    co_investment_pence: int
    retention_rate: str
    project_start: date | None
    project_end: date | None
    accepted_us: int | None
    assistance_confirmed_us: int | None
    assistance_elsewhere_pence: int | None
    final_report: str
    accountant_report: str
    paid_pence: int
    held_pence: int
    left_pence: int
    restored_pence: int
    recovered_pence: int
    business_paid_pence: int
    ended_us: int | None
    end_reason: str
    claims: list[ClaimOut]


class FundRatioOut(_Out):
    public_pence: int
    business_pence: int
    ratio: str | None = Field(description="two digits, rounded down; none while there is no public money")
    met: bool
    text: str


class FundOut(_Out):
    programme_pence: int
    unallotted_pence: int
    unpromised_pence: int
    public_promised_pence: int
    public_held_pence: int
    public_paid_pence: int
    public_recovered_pence: int
    business_promised_pence: int
    business_paid_pence: int
    on_promises: FundRatioOut
    on_payments: FundRatioOut


def router(*, agreements: AgreementService, claims: ClaimService, balances: BalanceService) -> APIRouter:
    """Awards, claims and the fund."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/fund")
    async def get_fund(caller: Authenticated) -> FundOut:
        return _fund(await balances.get_fund(caller))

    @routes.get("/awards/{award_id}")
    async def get_agreement(caller: Authenticated, award_id: str) -> AgreementOut:
        return _out(await agreements.get_agreement(caller, award_id))

    @routes.post("/awards/{award_id}/accept")
    async def accept(caller: Authenticated, award_id: str, body: AcceptIn) -> AgreementOut:
        return _out(await agreements.accept(caller, award_id, **body.model_dump()))

    @routes.post("/awards/{award_id}/confirm-assistance")
    async def confirm_assistance(caller: Authenticated, award_id: str, body: AssistanceIn) -> AgreementOut:
        return _out(await agreements.confirm_assistance(caller, award_id, **body.model_dump()))

    @routes.post("/awards/{award_id}/claims", status_code=201)
    async def submit_claim(caller: Authenticated, award_id: str, body: ClaimIn) -> AgreementOut:
        costs = [CostLine(**line.model_dump()) for line in body.costs]
        shown = [(one.milestone_id, one.evidence) for one in body.evidence]
        fields = body.model_dump(exclude={"costs", "evidence"})
        return _out(await claims.submit_claim(caller, award_id, costs=costs, evidence=shown, **fields))

    @routes.post("/awards/{award_id}/claims/{claim_id}/decide")
    async def decide_claim(caller: Authenticated, award_id: str, claim_id: str, body: ClaimDecisionIn) -> AgreementOut:
        return _out(await claims.decide_claim(caller, award_id, claim_id, **body.model_dump()))

    @routes.post("/awards/{award_id}/claims/{claim_id}/settle")
    async def settle_claim(caller: Authenticated, award_id: str, claim_id: str, body: SettlementIn) -> AgreementOut:
        return _out(await claims.settle_claim(caller, award_id, claim_id, **body.model_dump()))

    @routes.post("/awards/{award_id}/reports")
    async def record_reports(caller: Authenticated, award_id: str, body: ReportsIn) -> AgreementOut:
        return _out(await agreements.record_reports(caller, award_id, **body.model_dump()))

    @routes.post("/awards/{award_id}/withdraw")
    async def withdraw(caller: Authenticated, award_id: str, body: EndIn) -> AgreementOut:
        return _out(await agreements.withdraw(caller, award_id, reason=body.reason))

    @routes.post("/awards/{award_id}/close")
    async def close(caller: Authenticated, award_id: str, body: EndIn) -> AgreementOut:
        return _out(await agreements.close(caller, award_id, reason=body.reason))

    @routes.post("/awards/{award_id}/recover")
    async def recover(caller: Authenticated, award_id: str, body: RecoveryIn) -> AgreementOut:
        return _out(await agreements.recover(caller, award_id, **body.model_dump()))

    return routes


def _out(agreement: Agreement) -> AgreementOut:
    award = agreement.award
    of_award = ("application_id", "call_id", "firm_id", "grant_pence", "co_investment_pence")
    fields = {name: getattr(award, name) for name in of_award}
    fields |= {
        name: getattr(agreement, name) for name in AgreementOut.model_fields if name not in (*of_award, "award_id")
    }
    return AgreementOut.model_validate({"award_id": award.id, **fields})


def _fund(view: FundView) -> FundOut:
    fields = {name: getattr(view, name) for name in FundOut.model_fields if name.endswith("_pence")}
    return FundOut(
        on_promises=_ratio(view.on_promises, view.public_promised_pence, view.business_promised_pence),
        on_payments=_ratio(view.on_payments, view.public_paid_pence, view.business_paid_pence),
        **fields,
    )


def _ratio(ratio: FundRatio, public_pence: int, business_pence: int) -> FundRatioOut:
    return FundRatioOut(
        public_pence=public_pence,
        business_pence=business_pence,
        ratio=None if ratio.ratio is None else fixed_down(ratio.ratio),
        met=ratio.met,
        text=" ".join(ratio.reasons),
    )
