"""gRPC edge of the queries and the quarantine."""

from typing import Any

from services.common.clock import to_us
from services.common.rpc import current_caller
from services.ingest.queries.queries import Queries
from services.ingest.telemetry.quarantine import Quarantine
from smdih.ingest.v1 import query_pb2, query_pb2_grpc

_RESOLUTIONS = {
    query_pb2.RESOLUTION_UNSPECIFIED: "raw",
    query_pb2.RESOLUTION_RAW: "raw",
    query_pb2.RESOLUTION_MINUTE: "minute",
    query_pb2.RESOLUTION_HOUR: "hour",
}


class QueryServicer(query_pb2_grpc.QueryServiceServicer):
    def __init__(self, queries: Queries, quarantine: Quarantine) -> None:
        self._queries = queries
        self._quarantine = quarantine

    async def Latest(self, request: query_pb2.LatestRequest, context: Any) -> query_pb2.LatestResponse:
        response = query_pb2.LatestResponse()
        for one in await self._queries.latest(current_caller(), request.machine_id):
            response.values.add(
                signal_id=one.signal_id, name=one.name, unit=one.unit, time_us=to_us(one.ts), value=one.value
            )
        return response

    async def History(self, request: query_pb2.HistoryRequest, context: Any) -> query_pb2.HistoryResponse:
        history = await self._queries.history(
            current_caller(),
            request.signal_id,
            request.from_us,
            request.to_us,
            _RESOLUTIONS.get(request.resolution, "unknown"),
            request.page_size,
            request.page_token,
        )
        response = query_pb2.HistoryResponse(next_page_token=history.next_page_token)
        for time_us, value in history.samples:
            response.samples.add(time_us=time_us, value=value)
        for b in history.buckets:
            response.buckets.add(time_us=to_us(b.ts), count=b.count, sum=b.sum, min=b.min, max=b.max, last=b.last)
        return response

    async def ListQuarantine(
        self, request: query_pb2.ListQuarantineRequest, context: Any
    ) -> query_pb2.ListQuarantineResponse:
        items, token = await self._quarantine.page(
            current_caller(), request.firm_id, request.page_size, request.page_token
        )
        response = query_pb2.ListQuarantineResponse(next_page_token=token)
        for item in items:
            response.items.add(
                id=item.id,
                firm_id=item.firm_id,
                source=item.source,
                door=item.door,
                reason=item.reason,
                detail=item.detail,
                samples=item.samples,
                received_us=to_us(item.received),
                replayed_us=to_us(item.replayed) if item.replayed else None,
            )
        return response

    async def ReplayQuarantine(
        self, request: query_pb2.ReplayQuarantineRequest, context: Any
    ) -> query_pb2.ReplayQuarantineResponse:
        result = await self._quarantine.replay(current_caller(), request.id, request.machine_id)
        return query_pb2.ReplayQuarantineResponse(accepted=result.accepted, quarantined=result.quarantined)
