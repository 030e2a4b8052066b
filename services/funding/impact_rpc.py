"""Impact forms over gRPC: the same abilities as over HTTP."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.impact import Figures, ImpactKind
from services.funding.impacts import ImpactService
from services.funding.words import word_of
from smdih.funding.v1 import impact_pb2 as pb
from smdih.funding.v1.impact_pb2_grpc import ImpactServiceServicer


class ImpactRpc(ImpactServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: ImpactService) -> None:
        self._service = service

    async def ReportImpact(self, request: pb.ReportImpactRequest, context: Any) -> pb.ReportImpactResponse:
        stated = request.figures
        impact = await self._service.report(
            current_caller(),
            request.award_id,
            word_of(ImpactKind, pb.ImpactKind, request.kind),
            year_ending=request.year_ending,
            figures=Figures(
                jobs_fte=stated.jobs_fte,
                value_added_pence=stated.value_added_pence,
                hours_worked=stated.hours_worked,
                energy_kwh=stated.energy_kwh,
                carbon_kg_co2e=stated.carbon_kg_co2e,
            ),
            uncertainty_percent=request.uncertainty_percent,
            method=request.method,
        )
        return pb.ReportImpactResponse(impact=message_of(pb.Impact, impact))

    async def GetImpact(self, request: pb.GetImpactRequest, context: Any) -> pb.GetImpactResponse:
        impact = await self._service.get(current_caller(), request.award_id)
        return pb.GetImpactResponse(impact=message_of(pb.Impact, impact))

    async def GetProgrammeImpact(
        self, request: pb.GetProgrammeImpactRequest, context: Any
    ) -> pb.GetProgrammeImpactResponse:
        found = await self._service.overview(current_caller())
        return message_of(pb.GetProgrammeImpactResponse, found, totals=found.totals.shown())
