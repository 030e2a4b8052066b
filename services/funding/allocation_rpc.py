"""Allocations and pool pledges over gRPC, for operators' programs: the same abilities as over HTTP."""

from typing import Any

from services.common.messages import message_of
from services.common.rpc import current_caller
from services.funding.allocations import AllocationService, Carried
from services.funding.pools import Outcome, PoolService
from services.funding.selection import Method
from smdih.funding.v1 import allocation_pb2, pool_pb2
from smdih.funding.v1.allocation_pb2_grpc import AllocationServiceServicer
from smdih.funding.v1.pool_pb2_grpc import PoolServiceServicer


class AllocationRpc(AllocationServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: AllocationService) -> None:
        self._service = service

    async def RunAllocation(
        self, request: allocation_pb2.RunAllocationRequest, context: Any
    ) -> allocation_pb2.RunAllocationResponse:
        proposed = await self._service.run(current_caller(), request.call_id)
        return allocation_pb2.RunAllocationResponse(allocation=_allocation(proposed))

    async def GetAllocation(
        self, request: allocation_pb2.GetAllocationRequest, context: Any
    ) -> allocation_pb2.GetAllocationResponse:
        found = await self._service.get(current_caller(), request.allocation_id)
        return allocation_pb2.GetAllocationResponse(allocation=_allocation(found))

    async def GetAllocationDocuments(
        self, request: allocation_pb2.GetAllocationDocumentsRequest, context: Any
    ) -> allocation_pb2.GetAllocationDocumentsResponse:
        stored = (await self._service.get(current_caller(), request.allocation_id)).allocation
        return allocation_pb2.GetAllocationDocumentsResponse(
            input_json=stored.input, certificate_json=stored.certificate
        )

    async def ConfirmAllocation(
        self, request: allocation_pb2.ConfirmAllocationRequest, context: Any
    ) -> allocation_pb2.ConfirmAllocationResponse:
        carried = await self._service.confirm(current_caller(), request.allocation_id, reason=request.reason)
        return allocation_pb2.ConfirmAllocationResponse(allocation=_allocation(carried))


class PoolRpc(PoolServiceServicer):
    """Translates; what is right and who may do it is the service's business."""

    def __init__(self, service: PoolService) -> None:
        self._service = service

    async def AddPoolPledge(
        self, request: pool_pb2.AddPoolPledgeRequest, context: Any
    ) -> pool_pb2.AddPoolPledgeResponse:
        pledges = await self._service.add(
            current_caller(),
            request.call_id,
            request_id=request.request_id,
            co_investor=request.co_investor,
            amount_pence=request.amount_pence,
            supports=list(request.supports),
            evidence=request.evidence,
        )
        return pool_pb2.AddPoolPledgeResponse(pledges=[message_of(pool_pb2.PoolPledge, each) for each in pledges])

    async def ListPoolPledges(
        self, request: pool_pb2.ListPoolPledgesRequest, context: Any
    ) -> pool_pb2.ListPoolPledgesResponse:
        pledges = await self._service.list(current_caller(), request.call_id)
        return pool_pb2.ListPoolPledgesResponse(pledges=[message_of(pool_pb2.PoolPledge, each) for each in pledges])

    async def SpreadPool(self, request: pool_pb2.SpreadPoolRequest, context: Any) -> pool_pb2.SpreadPoolResponse:
        return pool_pb2.SpreadPoolResponse(
            spread=_spread(await self._service.spread(current_caller(), request.call_id))
        )

    async def GetPoolSpread(
        self, request: pool_pb2.GetPoolSpreadRequest, context: Any
    ) -> pool_pb2.GetPoolSpreadResponse:
        return pool_pb2.GetPoolSpreadResponse(
            spread=_spread(await self._service.get(current_caller(), request.spread_id))
        )

    async def ConfirmPoolSpread(
        self, request: pool_pb2.ConfirmPoolSpreadRequest, context: Any
    ) -> pool_pb2.ConfirmPoolSpreadResponse:
        outcome = await self._service.confirm(current_caller(), request.spread_id, reason=request.reason)
        return pool_pb2.ConfirmPoolSpreadResponse(spread=_spread(outcome))


def _allocation(carried: Carried) -> allocation_pb2.Allocation:
    allocation, spend = carried.allocation, carried.certificate["spend_p"]
    return message_of(
        allocation_pb2.Allocation,
        allocation,
        state=carried.state,
        method=Method(carried.certificate["method"]),
        certificate_sha256=allocation.certificate_sha256.hex(),
        budget_pence=spend["total"] + spend["left"],
        spent_pence=spend["total"],
        left_pence=spend["left"],
        spent_by_pot=spend["pots"],
        reasons=carried.reasons,
        checker_agrees=not allocation.problems,
        checker_problems=allocation.problems,
        checker_proof=allocation.proof,
        pending=carried.pending,
        refused=carried.refused,
    )


def _spread(outcome: Outcome) -> pool_pb2.PoolSpread:
    spread = outcome.spread
    return message_of(
        pool_pb2.PoolSpread,
        spread,
        state=outcome.state,
        input_json=spread.input,
        certificate_json=spread.certificate,
        checker_agrees=not spread.problems,
        checker_problems=spread.problems,
        refused=outcome.refused,
    )
