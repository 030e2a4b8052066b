"""gRPC edge of the proposals of signals."""

from typing import Any

from services.common.clock import to_us
from services.common.rpc import current_caller
from services.ingest.domain import NewSignal
from services.ingest.proposals import signalguess
from services.ingest.proposals.service import Proposals
from services.ingest.telemetry.quarantine import Quarantine, Replayed
from smdih.ingest.v1 import proposal_pb2, proposal_pb2_grpc


class ProposalServicer(proposal_pb2_grpc.ProposalServiceServicer):
    def __init__(self, proposals: Proposals, quarantine: Quarantine) -> None:
        self._proposals = proposals
        self._quarantine = quarantine

    async def SetUnknownSignalPolicy(
        self, request: proposal_pb2.SetUnknownSignalPolicyRequest, context: Any
    ) -> proposal_pb2.SetUnknownSignalPolicyResponse:
        policy = "propose" if request.propose else "refuse"
        await self._proposals.set_policy(current_caller(), request.firm_id, policy)
        return proposal_pb2.SetUnknownSignalPolicyResponse()

    async def ListSignalProposals(
        self, request: proposal_pb2.ListSignalProposalsRequest, context: Any
    ) -> proposal_pb2.ListSignalProposalsResponse:
        found, token = await self._proposals.page(
            current_caller(),
            request.firm_id,
            request.machine_id,
            request.page_size,
            request.page_token,
            with_dismissed=request.with_dismissed,
        )
        response = proposal_pb2.ListSignalProposalsResponse(next_page_token=token)
        for one in found:
            response.proposals.add(
                id=one.id,
                firm_id=one.firm_id,
                machine_id=one.machine_id,
                machine_path=one.path,
                name=one.name,
                guessed_unit=signalguess.unit(one.name),
                guessed_kind=signalguess.kind(lowest=one.lowest, highest=one.highest, is_whole=one.whole),
                samples=one.samples,
                first_us=to_us(one.first),
                last_us=to_us(one.last),
                example=one.example,
                lowest=one.lowest,
                highest=one.highest,
                source=one.source,
                dismissed_us=to_us(one.dismissed) if one.dismissed else None,
            )
        return response

    async def AcceptSignalProposal(
        self, request: proposal_pb2.AcceptSignalProposalRequest, context: Any
    ) -> proposal_pb2.AcceptSignalProposalResponse:
        signal = NewSignal(
            "",
            request.unit,
            request.range_min if request.HasField("range_min") else None,
            request.range_max if request.HasField("range_max") else None,
        )
        done = await self._proposals.accept(current_caller(), request.id, signal)
        return proposal_pb2.AcceptSignalProposalResponse(machine=done.machine, replayed=_said(done.replayed))

    async def DismissSignalProposal(
        self, request: proposal_pb2.DismissSignalProposalRequest, context: Any
    ) -> proposal_pb2.DismissSignalProposalResponse:
        await self._proposals.dismiss(current_caller(), request.id)
        return proposal_pb2.DismissSignalProposalResponse()

    async def ReplayMachine(
        self, request: proposal_pb2.ReplayMachineRequest, context: Any
    ) -> proposal_pb2.ReplayMachineResponse:
        return _said(
            await self._quarantine.replay_all(current_caller(), request.machine_id, request.reason, request.page_token)
        )


def _said(replayed: Replayed) -> proposal_pb2.ReplayMachineResponse:
    return proposal_pb2.ReplayMachineResponse(
        items=replayed.items,
        accepted=replayed.accepted,
        quarantined=replayed.quarantined,
        left=replayed.left,
        complete=replayed.is_complete,
        next_page_token=replayed.next_page_token,
    )
