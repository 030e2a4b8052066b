"""The fund over gRPC, for partners and for firms' programs: the same abilities as over HTTP."""

from typing import Any

from services.common.errors import Invalid
from services.common.identity import Caller
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding import domain, terms_rpc
from services.funding.applications import ApplicationService
from services.funding.balances import BalanceService
from services.funding.calls import CallService
from services.funding.decisions import DecisionService
from services.funding.judging import View
from services.funding.permissions import allowed
from services.funding.rules.assistance import AssistanceKind
from services.funding.rules.intensity import Category
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition
from services.funding.words import word_of
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
            category=word_of(Category, pb.Category, request.category),
            size_definition=word_of(Definition, pb.SizeDefinition, request.size_definition),
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
        return pb.PreCheckResponse(assessment=message_of(pb.Assessment, assessment))

    async def Prefill(self, request: pb.PrefillRequest, context: Any) -> pb.PrefillResponse:
        found = await self._applications.prefill(current_caller(), call_id=request.call_id, match_id=request.match_id)
        match = found.match
        return message_of(
            pb.PrefillResponse,
            found,
            call=self._call(found.call),
            match_id=match.id,
            need_id=match.need_id,
            provider_title=match.provider_title,
            firm_id=match.firm_id,
            machines=[pb.PrefilledMachine(id=id_, path=path) for id_, path in found.machines],
        )

    async def CreateApplication(
        self, request: pb.CreateApplicationRequest, context: Any
    ) -> pb.CreateApplicationResponse:
        view = await self._applications.create_application(
            current_caller(),
            request_id=request.request_id,
            call_id=request.call_id,
            match_id=request.match_id,
            costs=terms_rpc.costs_of(request.costs),
            declaration=_declared(request.declaration),
            requested_pence=request.requested_pence,
            other_public_pence=request.other_public_pence,
            content=terms_rpc.content_of(request),
        )
        return pb.CreateApplicationResponse(application=_view(current_caller(), view))

    async def GetApplication(self, request: pb.GetApplicationRequest, context: Any) -> pb.GetApplicationResponse:
        view = await self._applications.get_application(current_caller(), request.application_id)
        return pb.GetApplicationResponse(application=_view(current_caller(), view))

    async def ListApplications(self, request: pb.ListApplicationsRequest, context: Any) -> pb.ListApplicationsResponse:
        found, token = await self._applications.list_applications(
            current_caller(),
            firm_id=request.firm_id,
            call_id=request.call_id,
            state=word_of(domain.ApplicationState, pb.ApplicationState, request.state) if request.state else None,
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
            kind=word_of(PledgeKind, pb.PledgeKind, request.kind),
            public_body=request.public_body,
            amount_pence=request.amount_pence,
        )
        return pb.AddPledgeResponse(pledge=message_of(pb.Pledge, pledge))

    async def ConfirmPledge(self, request: pb.ConfirmPledgeRequest, context: Any) -> pb.ConfirmPledgeResponse:
        pledge = await self._applications.confirm_pledge(
            current_caller(), request.application_id, request.pledge_id, evidence=request.evidence
        )
        return pb.ConfirmPledgeResponse(pledge=message_of(pb.Pledge, pledge))

    async def TakePledgeBack(self, request: pb.TakePledgeBackRequest, context: Any) -> pb.TakePledgeBackResponse:
        view = await self._applications.take_pledge_back(
            current_caller(), request.application_id, request.pledge_id, reason=request.reason
        )
        return pb.TakePledgeBackResponse(application=_view(current_caller(), view))

    async def SubmitApplication(
        self, request: pb.SubmitApplicationRequest, context: Any
    ) -> pb.SubmitApplicationResponse:
        view = await self._applications.submit(current_caller(), request.application_id)
        return pb.SubmitApplicationResponse(application=_view(current_caller(), view))

    async def ReplaceMatch(self, request: pb.ReplaceMatchRequest, context: Any) -> pb.ReplaceMatchResponse:
        view = await self._applications.replace_match(
            current_caller(), request.application_id, match_id=request.match_id, reason=request.reason
        )
        return pb.ReplaceMatchResponse(application=_view(current_caller(), view))

    async def WithdrawApplication(
        self, request: pb.WithdrawApplicationRequest, context: Any
    ) -> pb.WithdrawApplicationResponse:
        view = await self._applications.withdraw(current_caller(), request.application_id)
        return pb.WithdrawApplicationResponse(application=_view(current_caller(), view))

    async def WaiveRatio(self, request: pb.WaiveRatioRequest, context: Any) -> pb.WaiveRatioResponse:
        view = await self._decisions.waive_ratio(current_caller(), request.application_id, reason=request.reason)
        return pb.WaiveRatioResponse(application=_view(current_caller(), view))

    async def Decide(self, request: pb.DecideRequest, context: Any) -> pb.DecideResponse:
        if request.decision not in (pb.DECISION_AWARD, pb.DECISION_REJECT):
            raise Invalid("decision is DECISION_AWARD or DECISION_REJECT.", reason="DECISION_MISSING")
        view = await self._decisions.decide(
            current_caller(),
            request.application_id,
            award=request.decision == pb.DECISION_AWARD,
            reason=request.reason,
        )
        return pb.DecideResponse(application=_view(current_caller(), view))

    async def TrialBalance(self, request: pb.TrialBalanceRequest, context: Any) -> pb.TrialBalanceResponse:
        trial = await self._balances.trial_balance(current_caller())
        return message_of(pb.TrialBalanceResponse, trial)

    def _call(self, call: domain.Call) -> pb.Call:
        return message_of(pb.Call, call, state=self._calls.state_of(call), terms=terms_rpc.terms_message(call.terms))


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
                kind=word_of(AssistanceKind, pb.AssistanceKind, item.kind),
            )
            for item in message.earlier_assistance
        ),
    )


def _application(application: domain.Application, **given: Any) -> pb.Application:
    content = application.content
    return message_of(
        pb.Application,
        application,
        **{"assessment": None, "may": (), **given},
        answers=dict(content.answers),
        partners=content.partners,
        attachments=content.attachments,
        machine_ids=content.machine_ids,
    )


def _view(caller: Caller, view: View) -> pb.Application:
    return _application(view.application, assessment=view.assessment, may=allowed(caller, view.application))
