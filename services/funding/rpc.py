"""The fund over gRPC, for partners and for firms' programs: the same abilities as over HTTP."""

from collections.abc import Iterable
from typing import Any

from services.common.errors import Invalid
from services.common.rpc import current_caller
from services.funding import domain, terms_rpc
from services.funding.applications import ApplicationService
from services.funding.balances import BalanceService
from services.funding.calls import CallService
from services.funding.decisions import DecisionService
from services.funding.judging import View
from services.funding.rules.assistance import AssistanceKind
from services.funding.rules.intensity import Category
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition
from services.funding.words import number_of, word_of
from smdih.funding.v1 import funding_pb2 as pb
from smdih.funding.v1.funding_pb2_grpc import FundingServiceServicer


class FundingRpc(FundingServiceServicer):
    """Translates; what is right and who may do it is the services' business."""

    def __init__(
        self,
        *,
        calls: CallService,
        applications: ApplicationService,
        decisions: DecisionService,
        balances: BalanceService,
    ) -> None:
        self._calls = calls
        self._applications = applications
        self._decisions = decisions
        self._balances = balances

    async def CreateCall(self, request: pb.CreateCallRequest, context: Any) -> pb.CreateCallResponse:
        call = await self._calls.create_call(
            current_caller(),
            request_id=request.request_id,
            title=request.title,
            budget_pence=request.budget_pence,
            opens_us=request.opens_us,
            closes_us=request.closes_us,
            category=word_of(Category, pb.Category, "CATEGORY", request.category),
            size_definition=word_of(Definition, pb.SizeDefinition, "SIZE_DEFINITION", request.size_definition),
            rate_max=request.rate_max,
            in_kind_allowed=request.in_kind_allowed,
            terms=terms_rpc.terms_of(request.terms),
        )
        return pb.CreateCallResponse(call=self._call(call))

    async def ListCalls(self, request: pb.ListCallsRequest, context: Any) -> pb.ListCallsResponse:
        calls, token = await self._calls.list_calls(
            current_caller(), page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListCallsResponse(calls=[self._call(call) for call in calls], next_page_token=token)

    async def GetCall(self, request: pb.GetCallRequest, context: Any) -> pb.GetCallResponse:
        return pb.GetCallResponse(call=self._call(await self._calls.get_call(current_caller(), request.call_id)))

    async def MoveBudget(self, request: pb.MoveBudgetRequest, context: Any) -> pb.MoveBudgetResponse:
        call = await self._calls.move_budget(
            current_caller(),
            request.call_id,
            request_id=request.request_id,
            change_pence=request.change_pence,
            reason=request.reason,
        )
        return pb.MoveBudgetResponse(call=self._call(call))

    async def PreCheck(self, request: pb.PreCheckRequest, context: Any) -> pb.PreCheckResponse:
        assessment = await self._applications.pre_check(
            current_caller(),
            call_id=request.call_id,
            declaration=_declared(request.declaration),
            sic=request.sic,
            planned_cost_pence=request.planned_cost_pence,
            requested_pence=request.requested_pence,
            other_public_pence=request.other_public_pence,
        )
        return pb.PreCheckResponse(assessment=_assessment(assessment))

    async def CreateApplication(
        self, request: pb.CreateApplicationRequest, context: Any
    ) -> pb.CreateApplicationResponse:
        view = await self._applications.create_application(
            current_caller(),
            request_id=request.request_id,
            call_id=request.call_id,
            match_id=request.match_id,
            costs=[
                domain.Cost(
                    category=word_of(domain.CostCategory, pb.CostCategory, "COST_CATEGORY", cost.category),
                    amount_pence=cost.amount_pence,
                )
                for cost in request.costs
            ],
            declaration=_declared(request.declaration),
            requested_pence=request.requested_pence,
            other_public_pence=request.other_public_pence,
            content=terms_rpc.content_of(request),
        )
        return pb.CreateApplicationResponse(application=_view(view))

    async def GetApplication(self, request: pb.GetApplicationRequest, context: Any) -> pb.GetApplicationResponse:
        view = await self._applications.get_application(current_caller(), request.application_id)
        return pb.GetApplicationResponse(application=_view(view))

    async def ListApplications(self, request: pb.ListApplicationsRequest, context: Any) -> pb.ListApplicationsResponse:
        found, token = await self._applications.list_applications(
            current_caller(),
            firm_id=request.firm_id,
            call_id=request.call_id,
            state=word_of(domain.ApplicationState, pb.ApplicationState, "APPLICATION_STATE", request.state)
            if request.state
            else None,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListApplicationsResponse(
            applications=[_application(application) for application in found], next_page_token=token
        )

    async def AddPledge(self, request: pb.AddPledgeRequest, context: Any) -> pb.AddPledgeResponse:
        pledge = await self._applications.add_pledge(
            current_caller(),
            request.application_id,
            request_id=request.request_id,
            co_investor=request.co_investor,
            kind=word_of(PledgeKind, pb.PledgeKind, "PLEDGE_KIND", request.kind),
            public_body=request.public_body,
            amount_pence=request.amount_pence,
        )
        return pb.AddPledgeResponse(pledge=_pledge(pledge))

    async def ConfirmPledge(self, request: pb.ConfirmPledgeRequest, context: Any) -> pb.ConfirmPledgeResponse:
        pledge = await self._applications.confirm_pledge(
            current_caller(), request.application_id, request.pledge_id, evidence=request.evidence
        )
        return pb.ConfirmPledgeResponse(pledge=_pledge(pledge))

    async def SubmitApplication(
        self, request: pb.SubmitApplicationRequest, context: Any
    ) -> pb.SubmitApplicationResponse:
        view = await self._applications.submit(current_caller(), request.application_id)
        return pb.SubmitApplicationResponse(application=_view(view))

    async def WithdrawApplication(
        self, request: pb.WithdrawApplicationRequest, context: Any
    ) -> pb.WithdrawApplicationResponse:
        view = await self._applications.withdraw(current_caller(), request.application_id)
        return pb.WithdrawApplicationResponse(application=_view(view))

    async def WaiveRatio(self, request: pb.WaiveRatioRequest, context: Any) -> pb.WaiveRatioResponse:
        view = await self._decisions.waive_ratio(current_caller(), request.application_id, reason=request.reason)
        return pb.WaiveRatioResponse(application=_view(view))

    async def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        if request.decision not in (pb.DECISION_AWARD, pb.DECISION_REJECT):
            raise Invalid("decision is DECISION_AWARD or DECISION_REJECT.", reason="DECISION_MISSING")
        view = await self._decisions.decide(
            current_caller(),
            request.application_id,
            award=request.decision == pb.DECISION_AWARD,
            reason=request.reason,
        )
        return pb.DecideResponse(application=_view(view))

    async def TrialBalance(self, request: pb.TrialBalanceRequest, context: Any) -> pb.TrialBalanceResponse:
        trial = await self._balances.trial_balance(current_caller())
        return pb.TrialBalanceResponse(
            accounts=[
                pb.AccountBalance(
                    call_id=account.call_id,
                    kind=account.kind,
                    debits_pence=account.debits_pence,
                    credits_pence=account.credits_pence,
                    balance_pence=account.balance_pence,
                )
                for account in trial.accounts
            ],
            total_pence=trial.total_pence,
            in_order=trial.in_order,
            events=trial.events,
            head_hash=trial.head_hash,
        )

    def _call(self, call: domain.Call) -> pb.Call:
        return pb.Call(
            id=call.id,
            title=call.title,
            state=number_of(pb.CallState, "CALL_STATE", self._calls.state_of(call)),
            opens_us=call.opens_us,
            closes_us=call.closes_us,
            category=number_of(pb.Category, "CATEGORY", call.category),
            size_definition=number_of(pb.SizeDefinition, "SIZE_DEFINITION", call.size_definition),
            rate_max=call.rate_max,
            in_kind_allowed=call.in_kind_allowed,
            budget_pence=call.budget_pence,
            committed_pence=call.committed_pence,
            left_pence=call.left_pence,
            created_us=call.created_us,
            terms=terms_rpc.terms_message(call.terms),
        )


def _declared(message: pb.Declaration) -> domain.Declaration:
    return domain.Declaration(
        size=terms_rpc.size_of(message.size),
        uk_registered=message.uk_registered,
        insolvent=message.insolvent,
        ailing=message.ailing,
        recovery_order_outstanding=message.recovery_order_outstanding,
        earlier_project_open=message.earlier_project_open,
        earlier_assistance=tuple(
            domain.EarlierAssistance(
                given_on=item.given_on,
                amount_pence=item.amount_pence,
                kind=word_of(AssistanceKind, pb.AssistanceKind, "ASSISTANCE_KIND", item.kind),
            )
            for item in message.earlier_assistance
        ),
    )


def _declaration(declaration: domain.Declaration) -> pb.Declaration:
    return pb.Declaration(
        size=terms_rpc.size_message(declaration.size),
        uk_registered=declaration.uk_registered,
        insolvent=declaration.insolvent,
        ailing=declaration.ailing,
        recovery_order_outstanding=declaration.recovery_order_outstanding,
        earlier_project_open=declaration.earlier_project_open,
        earlier_assistance=[
            pb.EarlierAssistance(
                given_on=item.given_on,
                amount_pence=item.amount_pence,
                kind=number_of(pb.AssistanceKind, "ASSISTANCE_KIND", item.kind),
            )
            for item in declaration.earlier_assistance
        ],
    )


def _findings(findings: Iterable[domain.Finding]) -> list[pb.Finding]:
    return [pb.Finding(rule=item.rule, met=item.met, code=item.code, text=item.text) for item in findings]


def _assessment(assessment: domain.Assessment) -> pb.Assessment:
    return pb.Assessment(
        eligible=assessment.eligible,
        size=assessment.size or "",
        eligible_pence=assessment.eligible_pence,
        max_grant_pence=assessment.max_grant_pence,
        grant_pence=assessment.grant_pence,
        match_required_pence=assessment.match_required_pence,
        match_counted_pence=assessment.match_counted_pence,
        findings=_findings(assessment.findings),
    )


def _pledge(pledge: domain.Pledge) -> pb.Pledge:
    return pb.Pledge(
        id=pledge.id,
        application_id=pledge.application_id,
        co_investor=pledge.co_investor,
        kind=number_of(pb.PledgeKind, "PLEDGE_KIND", pledge.kind),
        public_body=pledge.public_body,
        amount_pence=pledge.amount_pence,
        added_us=pledge.added_us,
        confirmed_us=pledge.confirmed_us,
        evidence=pledge.evidence,
    )


def _award(award: domain.Award) -> pb.AwardDetail:
    return pb.AwardDetail(
        id=award.id,
        grant_pence=award.grant_pence,
        co_investment_pence=award.co_investment_pence,
        awarded_us=award.awarded_us,
        parameters_version=award.parameters_version,
        database_entry_due=award.database_entry_due.isoformat() if award.database_entry_due else "",
        findings=_findings(award.findings),
    )


def _application(application: domain.Application) -> pb.Application:
    content = application.content
    return pb.Application(
        id=application.id,
        call_id=application.call_id,
        match_id=application.match_id,
        firm_id=application.firm_id,
        state=number_of(pb.ApplicationState, "APPLICATION_STATE", application.state),
        costs=[
            pb.Cost(category=number_of(pb.CostCategory, "COST_CATEGORY", cost.category), amount_pence=cost.amount_pence)
            for cost in application.costs
        ],
        declaration=_declaration(application.declaration),
        sic=application.sic,
        requested_pence=application.requested_pence,
        other_public_pence=application.other_public_pence,
        grant_pence=application.grant_pence,
        pledges=[_pledge(pledge) for pledge in application.pledges],
        ratio_waivers=application.ratio_waivers,
        award=_award(application.award) if application.award else None,
        decision_reason=application.decision_reason,
        created_us=application.created_us,
        submitted_us=application.submitted_us,
        decided_us=application.decided_us,
        correlation_id=application.correlation_id,
        answers=dict(content.answers),
        partners=[terms_rpc.partner_message(partner) for partner in content.partners],
        attachments=[terms_rpc.attachment_message(attachment) for attachment in content.attachments],
        machine_ids=content.machine_ids,
    )


def _view(view: View) -> pb.Application:
    message = _application(view.application)
    if view.assessment is not None:
        message.assessment.CopyFrom(_assessment(view.assessment))
    return message
