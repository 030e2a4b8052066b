"""Awards after the decision, over gRPC: the same abilities as over HTTP."""

from typing import Any

from services.common.errors import Invalid
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.agreement import Agreement, CostLine
from services.funding.agreements import AgreementService
from services.funding.balances import BalanceService, FundView
from services.funding.claims import ClaimService
from services.funding.domain import CostCategory
from services.funding.milestone_rpc import evidence_of
from services.funding.rules.exact import fixed_down
from services.funding.rules.match import FundRatio
from services.funding.words import word_of
from smdih.funding.v1 import agreement_pb2 as pb
from smdih.funding.v1 import funding_pb2
from smdih.funding.v1.agreement_pb2_grpc import AgreementServiceServicer


class AgreementRpc(AgreementServiceServicer):
    """Translates; what is right and who may do it is the services' business."""

    def __init__(self, *, agreements: AgreementService, claims: ClaimService, balances: BalanceService) -> None:
        self._agreements = agreements
        self._claims = claims
        self._balances = balances

    async def GetAgreement(self, request: pb.GetAgreementRequest, context: Any) -> pb.GetAgreementResponse:
        agreement = await self._agreements.get_agreement(current_caller(), request.award_id)
        return pb.GetAgreementResponse(agreement=_agreement(agreement))

    async def AcceptOffer(self, request: pb.AcceptOfferRequest, context: Any) -> pb.AcceptOfferResponse:
        agreement = await self._agreements.accept(
            current_caller(),
            request.award_id,
            project_start=request.project_start,
            project_end=request.project_end,
        )
        return pb.AcceptOfferResponse(agreement=_agreement(agreement))

    async def ConfirmAssistance(
        self, request: pb.ConfirmAssistanceRequest, context: Any
    ) -> pb.ConfirmAssistanceResponse:
        agreement = await self._agreements.confirm_assistance(
            current_caller(),
            request.award_id,
            elsewhere_pence=request.elsewhere_pence,
            statement=request.statement,
        )
        return pb.ConfirmAssistanceResponse(agreement=_agreement(agreement))

    async def SubmitClaim(self, request: pb.SubmitClaimRequest, context: Any) -> pb.SubmitClaimResponse:
        agreement = await self._claims.submit_claim(
            current_caller(),
            request.award_id,
            request_id=request.request_id,
            period_start=request.period_start,
            period_end=request.period_end,
            costs=[
                CostLine(
                    category=word_of(CostCategory, funding_pb2.CostCategory, line.category),
                    amount_pence=line.amount_pence,
                    evidence=line.evidence,
                )
                for line in request.costs
            ],
            is_final=request.is_final,
            evidence=[(shown.milestone_id, evidence_of(shown.evidence_json)) for shown in request.evidence],
        )
        return pb.SubmitClaimResponse(agreement=_agreement(agreement))

    async def DecideClaim(self, request: pb.DecideClaimRequest, context: Any) -> pb.DecideClaimResponse:
        if request.verdict not in (pb.CLAIM_VERDICT_ACCEPT, pb.CLAIM_VERDICT_REJECT):
            raise Invalid("verdict is CLAIM_VERDICT_ACCEPT or CLAIM_VERDICT_REJECT.", reason="VERDICT_MISSING")
        agreement = await self._claims.decide_claim(
            current_caller(),
            request.award_id,
            request.claim_id,
            accept=request.verdict == pb.CLAIM_VERDICT_ACCEPT,
            reason=request.reason,
        )
        return pb.DecideClaimResponse(agreement=_agreement(agreement))

    async def SettleClaim(self, request: pb.SettleClaimRequest, context: Any) -> pb.SettleClaimResponse:
        if request.settlement not in (pb.SETTLEMENT_RELEASE, pb.SETTLEMENT_RETURN):
            raise Invalid("settlement is SETTLEMENT_RELEASE or SETTLEMENT_RETURN.", reason="SETTLEMENT_MISSING")
        agreement = await self._claims.settle_claim(
            current_caller(),
            request.award_id,
            request.claim_id,
            release=request.settlement == pb.SETTLEMENT_RELEASE,
            reason=request.reason,
        )
        return pb.SettleClaimResponse(agreement=_agreement(agreement))

    async def RecordReports(self, request: pb.RecordReportsRequest, context: Any) -> pb.RecordReportsResponse:
        agreement = await self._agreements.record_reports(
            current_caller(),
            request.award_id,
            final_report=request.final_report,
            accountant_report=request.accountant_report,
        )
        return pb.RecordReportsResponse(agreement=_agreement(agreement))

    async def WithdrawAward(self, request: pb.WithdrawAwardRequest, context: Any) -> pb.WithdrawAwardResponse:
        agreement = await self._agreements.withdraw(current_caller(), request.award_id, reason=request.reason)
        return pb.WithdrawAwardResponse(agreement=_agreement(agreement))

    async def CloseAward(self, request: pb.CloseAwardRequest, context: Any) -> pb.CloseAwardResponse:
        agreement = await self._agreements.close(current_caller(), request.award_id, reason=request.reason)
        return pb.CloseAwardResponse(agreement=_agreement(agreement))

    async def RecoverGrant(self, request: pb.RecoverGrantRequest, context: Any) -> pb.RecoverGrantResponse:
        agreement = await self._agreements.recover(
            current_caller(),
            request.award_id,
            request_id=request.request_id,
            amount_pence=request.amount_pence,
            reason=request.reason,
        )
        return pb.RecoverGrantResponse(agreement=_agreement(agreement))

    async def GetFund(self, request: pb.GetFundRequest, context: Any) -> pb.GetFundResponse:
        return pb.GetFundResponse(fund=_fund(await self._balances.get_fund(current_caller())))


def _agreement(agreement: Agreement) -> pb.Agreement:
    award = agreement.award
    return message_of(
        pb.Agreement,
        agreement,
        award_id=award.id,
        application_id=award.application_id,
        call_id=award.call_id,
        firm_id=award.firm_id,
        grant_pence=award.grant_pence,
        co_investment_pence=award.co_investment_pence,
    )


def _fund(view: FundView) -> pb.Fund:
    return message_of(
        pb.Fund,
        view,
        on_promises=_ratio(view.on_promises, view.public_promised_pence, view.business_promised_pence),
        on_payments=_ratio(view.on_payments, view.public_paid_pence, view.business_paid_pence),
    )


def _ratio(ratio: FundRatio, public_pence: int, business_pence: int) -> pb.FundRatio:
    return pb.FundRatio(
        public_pence=public_pence,
        business_pence=business_pence,
        ratio="" if ratio.ratio is None else fixed_down(ratio.ratio),
        met=ratio.met,
        text=" ".join(ratio.reasons),
    )
