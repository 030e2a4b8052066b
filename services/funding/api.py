"""The fund over HTTP, for the hub's own pages and for firms' programs. Money is integer pence, times microseconds since 1970."""

from datetime import date
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, TypeAdapter

from services.common.http import Authenticated
from services.common.identity import Caller
from services.funding.applications import ApplicationService
from services.funding.balances import BalanceService
from services.funding.calls import CallService
from services.funding.decisions import DecisionService
from services.funding.domain import (
    AnswerKind,
    Application,
    ApplicationState,
    Call,
    CallState,
    Content,
    Cost,
    CostCategory,
    Declaration,
    Terms,
)
from services.funding.judging import View
from services.funding.permissions import Action, allowed
from services.funding.rules.assistance import AssistanceKind
from services.funding.rules.intensity import Category, Organisation
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition, Investor, Size
from services.funding.selection import Method

_declaration = TypeAdapter(Declaration)
_terms = TypeAdapter(Terms)
_content = TypeAdapter(Content)


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RelationIn(_In):
    """A holding between the applicant and another firm, with that firm's figures."""

    percent: str = Field(description='the higher of capital and votes, such as "30.00"')
    upstream: StrictBool = Field(description="the other firm owns the applicant")
    investor: Investor
    headcount: str
    turnover_minor: StrictInt
    balance_minor: StrictInt
    dominant_influence: StrictBool = False


class SizeFiguresIn(_In):
    """Yearly figures: the firm's own in euro cents under the EU definition, the whole group's in pence under the Companies Act."""

    headcount: str = Field(description="decimal text: parts of a person count")
    turnover_minor: StrictInt
    balance_minor: StrictInt
    period_start: str = Field("", description="first day of the accounting period; needed under the Companies Act")
    relations: list[RelationIn] = []


class EarlierAssistanceIn(_In):
    given_on: str
    amount_pence: StrictInt
    kind: AssistanceKind


class DeclarationIn(_In):
    """What a firm states about itself and answers for."""

    size: SizeFiguresIn
    uk_registered: StrictBool
    insolvent: StrictBool = False
    ailing: StrictBool = False
    recovery_order_outstanding: StrictBool = False
    earlier_project_open: StrictBool = False
    earlier_assistance: list[EarlierAssistanceIn] = []

    def declared(self) -> Declaration:
        return _declaration.validate_python(self.model_dump())


class CostIn(_In):
    category: CostCategory
    amount_pence: StrictInt


class QuestionIn(_In):
    id: str = Field(description="lower case letters, digits and _, by which answers name it")
    text: str
    kind: AnswerKind
    required: StrictBool = True
    characters_max: StrictInt = Field(2_000, description="of a text")
    least: StrictInt | None = Field(None, description="of a whole number")
    most: StrictInt | None = None
    choices: list[str] = []


class PotLimitIn(_In):
    pot: str = Field(description="region:NAME, size:NAME or first-time, in lower case")
    floor_pence: StrictInt | None = None
    ceiling_pence: StrictInt | None = None
    share_min: str | None = Field(None, description="of all money awarded, such as 0.30")
    share_max: str | None = None


class TermsIn(_In):
    """What a call declares before it opens; it does not change afterwards."""

    scope: str = ""
    questions: list[QuestionIn] = []
    method: Method = Method.TOP_DOWN_SKIP
    limits: list[PotLimitIn] = Field([], description="floors and shares need the method portfolio")
    adoption_max_pence: StrictInt = Field(
        0, description="above zero: an adoption call, for small manufacturers, with this much for each at most"
    )

    def declared(self) -> Terms:
        return _terms.validate_python(self.model_dump())


class CallIn(_In):
    request_id: str
    title: str
    budget_pence: StrictInt
    opens_us: StrictInt
    closes_us: StrictInt
    category: Category
    size_definition: Definition
    rate_max: str = Field("", description="the call's own maximum rate; it lowers the lawful rate, never raises it")
    in_kind_allowed: StrictBool = False
    terms: TermsIn = TermsIn()


class BudgetIn(_In):
    request_id: str
    change_pence: StrictInt = Field(description="above zero: from the programme, below zero: back to it")
    reason: str


class PreCheckIn(_In):
    call_id: str
    declaration: DeclarationIn
    sic: str = Field("", description="for a firm's key the one in the directory, if left out")
    planned_cost_pence: StrictInt
    requested_pence: StrictInt = Field(0, description="0: the most that the rules allow")
    other_public_pence: StrictInt = 0


class ProjectPartnerIn(_In):
    name: str
    organisation: Organisation
    costs: list[CostIn]
    size: SizeFiguresIn | None = Field(None, description="of a business, by the call's definition")
    other_public_pence: StrictInt = 0


class AttachmentIn(_In):
    """A document kept elsewhere; the hash says which."""

    name: str
    sha256: str
    size_bytes: StrictInt
    media_type: str


class ApplicationIn(_In):
    request_id: str
    call_id: str
    match_id: str
    costs: list[CostIn]
    declaration: DeclarationIn
    requested_pence: StrictInt = Field(0, description="0: the most that the rules allow")
    other_public_pence: StrictInt = 0
    answers: dict[str, str] = Field({}, description="to the call's questions, by their ids")
    partners: list[ProjectPartnerIn] = []
    attachments: list[AttachmentIn] = []
    machine_ids: list[StrictInt] = Field([], description="machines of the firm that the project is about")

    def content(self) -> Content:
        plain = self.model_dump(include={"partners", "attachments", "machine_ids"})
        return _content.validate_python({**plain, "answers": list(self.answers.items())})


class PledgeIn(_In):
    request_id: str
    co_investor: str
    kind: PledgeKind
    public_body: StrictBool = False
    amount_pence: StrictInt


class EvidenceIn(_In):
    evidence: str


class ReasonIn(_In):
    reason: str


class MatchIn(_In):
    match_id: str = Field(description="one that stands, of the firm of the application")
    reason: str


class DecisionIn(_In):
    award: StrictBool = Field(description="true: award, false: reject")
    reason: str


class _Out(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class CallOut(_Out):
    id: str
    title: str
    state: CallState
    opens_us: int
    closes_us: int
    category: Category
    size_definition: Definition
    rate_max: str
    in_kind_allowed: bool
    budget_pence: int
    committed_pence: int
    left_pence: int
    created_us: int
    terms: Any = Field(description="as the call declared them")


class CallPageOut(_Out):
    calls: list[CallOut]
    next_page_token: str


class FindingOut(_Out):
    rule: str
    met: bool
    code: str
    text: str


class AssessmentOut(_Out):
    eligible: bool
    size: Size | None
    eligible_pence: int
    max_grant_pence: int
    grant_pence: int
    match_required_pence: int
    match_counted_pence: int
    findings: list[FindingOut]


class PledgeOut(_Out):
    id: str
    application_id: str
    co_investor: str
    kind: PledgeKind
    public_body: bool
    amount_pence: int
    added_us: int
    confirmed_us: int | None
    evidence: str


class AwardOut(_Out):
    id: str
    grant_pence: int
    co_investment_pence: int
    awarded_us: int
    parameters_version: str
    database_entry_due: date | None
    findings: list[FindingOut]


class CostOut(_Out):
    category: CostCategory
    amount_pence: int


class ApplicationOut(_Out):
    id: str
    call_id: str
    match_id: str
    firm_id: int
    state: ApplicationState
    costs: list[CostOut]
    declaration: Any
    sic: str
    requested_pence: int
    other_public_pence: int
    grant_pence: int | None
    pledges: list[PledgeOut]
    ratio_waivers: int
    award: AwardOut | None
    decision_reason: str
    created_us: int
    submitted_us: int | None
    decided_us: int | None
    correlation_id: str
    content: Any = Field(description="answers, partners, attachments and machines")
    assessment: AssessmentOut | None = None
    may: list[Action] = Field([], description="what this key may do with it now")


class MachineOut(_Out):
    id: int
    path: str


class PrefillOut(_Out):
    call: CallOut
    match_id: str
    need_id: str
    provider_title: str
    firm_id: int
    firm_name: str
    sic: str
    region: str
    machines: list[MachineOut]
    declaration: Any = Field(description="as the firm declared it last time; none the first time")


class ApplicationPageOut(_Out):
    applications: list[ApplicationOut]
    next_page_token: str


class AccountBalanceOut(_Out):
    call_id: str
    kind: str
    debits_pence: int
    credits_pence: int
    balance_pence: int


class TrialBalanceOut(_Out):
    accounts: list[AccountBalanceOut]
    total_pence: int
    in_order: bool
    events: int
    head_hash: str


PageSize = Annotated[int, Query(description="at most 100; 0 means 50")]


def router(
    *, calls: CallService, applications: ApplicationService, decisions: DecisionService, balances: BalanceService
) -> APIRouter:
    """Calls, pre-check, applications and the trial balance."""
    routes = APIRouter(prefix="/v1")

    def call_out(call: Call) -> CallOut:
        fields = {name: getattr(call, name) for name in CallOut.model_fields if name != "state"}
        return CallOut(state=calls.state_of(call), **fields)

    @routes.post("/calls", status_code=201)
    async def create_call(caller: Authenticated, body: CallIn) -> CallOut:
        fields = body.model_dump(exclude={"terms"})
        return call_out(await calls.create_call(caller, terms=body.terms.declared(), **fields))

    @routes.get("/calls")
    async def list_calls(caller: Authenticated, page_size: PageSize = 0, page_token: str = "") -> CallPageOut:
        found, token = await calls.list_calls(caller, page_size=page_size, page_token=page_token)
        return CallPageOut(calls=[call_out(call) for call in found], next_page_token=token)

    @routes.get("/calls/{call_id}")
    async def get_call(caller: Authenticated, call_id: str) -> CallOut:
        return call_out(await calls.get_call(caller, call_id))

    @routes.post("/calls/{call_id}/budget")
    async def move_budget(caller: Authenticated, call_id: str, body: BudgetIn) -> CallOut:
        """Operators: more from the programme, or, below zero, back to it."""
        return call_out(await calls.move_budget(caller, call_id, **body.model_dump()))

    @routes.post("/pre-check")
    async def pre_check(caller: Authenticated, body: PreCheckIn) -> AssessmentOut:
        fields = body.model_dump(exclude={"declaration"})
        return AssessmentOut.model_validate(
            await applications.pre_check(caller, declaration=body.declaration.declared(), **fields)
        )

    @routes.post("/applications", status_code=201)
    async def create_application(caller: Authenticated, body: ApplicationIn) -> ApplicationOut:
        said = {"declaration", "costs", "answers", "partners", "attachments", "machine_ids"}
        fields = body.model_dump(exclude=said)
        costs = [Cost(category=cost.category, amount_pence=cost.amount_pence) for cost in body.costs]
        view = await applications.create_application(
            caller, declaration=body.declaration.declared(), costs=costs, content=body.content(), **fields
        )
        return _application_out(caller, view)

    @routes.get("/applications")
    async def list_applications(
        caller: Authenticated,
        firm_id: int = 0,
        call_id: str = "",
        state: ApplicationState | None = None,
        page_size: PageSize = 0,
        page_token: str = "",
    ) -> ApplicationPageOut:
        """Without pledges and assessment: a single application has them."""
        found, token = await applications.list_applications(
            caller, firm_id=firm_id, call_id=call_id, state=state, page_size=page_size, page_token=page_token
        )
        outs = [_out(application) for application in found]
        return ApplicationPageOut(applications=outs, next_page_token=token)

    @routes.get("/applications/prefill")
    async def prefill(caller: Authenticated, call_id: str, match_id: str) -> PrefillOut:
        """What the hub knows already: the form asks for the rest only."""
        found = await applications.prefill(caller, call_id=call_id, match_id=match_id)
        return PrefillOut(
            call=call_out(found.call),
            match_id=found.match.id,
            need_id=found.match.need_id,
            provider_title=found.match.provider_title,
            firm_id=found.match.firm_id,
            firm_name=found.firm_name,
            sic=found.sic,
            region=found.region,
            machines=[MachineOut(id=id_, path=path) for id_, path in found.machines],
            declaration=found.declaration,
        )

    @routes.get("/applications/{application_id}")
    async def get_application(caller: Authenticated, application_id: str) -> ApplicationOut:
        return _application_out(caller, await applications.get_application(caller, application_id))

    @routes.post("/applications/{application_id}/pledges", status_code=201)
    async def add_pledge(caller: Authenticated, application_id: str, body: PledgeIn) -> PledgeOut:
        return PledgeOut.model_validate(await applications.add_pledge(caller, application_id, **body.model_dump()))

    @routes.post("/applications/{application_id}/pledges/{pledge_id}/confirm")
    async def confirm_pledge(caller: Authenticated, application_id: str, pledge_id: str, body: EvidenceIn) -> PledgeOut:
        return PledgeOut.model_validate(
            await applications.confirm_pledge(caller, application_id, pledge_id, evidence=body.evidence)
        )

    @routes.post("/applications/{application_id}/pledges/{pledge_id}/take-back")
    async def take_pledge_back(
        caller: Authenticated, application_id: str, pledge_id: str, body: ReasonIn
    ) -> ApplicationOut:
        return _application_out(
            caller, await applications.take_pledge_back(caller, application_id, pledge_id, reason=body.reason)
        )

    @routes.post("/applications/{application_id}/submit")
    async def submit(caller: Authenticated, application_id: str) -> ApplicationOut:
        return _application_out(caller, await applications.submit(caller, application_id))

    @routes.post("/applications/{application_id}/match")
    async def replace_match(caller: Authenticated, application_id: str, body: MatchIn) -> ApplicationOut:
        return _application_out(caller, await applications.replace_match(caller, application_id, **body.model_dump()))

    @routes.post("/applications/{application_id}/withdraw")
    async def withdraw(caller: Authenticated, application_id: str) -> ApplicationOut:
        return _application_out(caller, await applications.withdraw(caller, application_id))

    @routes.post("/applications/{application_id}/waive-ratio")
    async def waive_ratio(caller: Authenticated, application_id: str, body: ReasonIn) -> ApplicationOut:
        return _application_out(caller, await decisions.waive_ratio(caller, application_id, reason=body.reason))

    @routes.post("/applications/{application_id}/decide")
    async def decide(caller: Authenticated, application_id: str, body: DecisionIn) -> ApplicationOut:
        return _application_out(
            caller, await decisions.decide(caller, application_id, award=body.award, reason=body.reason)
        )

    @routes.get("/ledger/trial-balance")
    async def trial_balance(caller: Authenticated) -> TrialBalanceOut:
        return TrialBalanceOut.model_validate(await balances.trial_balance(caller))

    return routes


def _application_out(caller: Caller, view: View) -> ApplicationOut:
    out = _out(view.application)
    out.may = allowed(caller, view.application)
    if view.assessment is not None:
        out.assessment = AssessmentOut.model_validate(view.assessment)
    return out


def _out(application: Application) -> ApplicationOut:
    return ApplicationOut.model_validate(application)
