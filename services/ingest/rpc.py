"""gRPC edges of ingest."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.identity import Role
from services.common.rpc import current_caller
from services.ingest.domain import NewFirm, NewMachine, NewSignal, NewSite
from services.ingest.door import Door, Taken
from services.ingest.service import Queries, Registry
from services.ingest.store import ROLE_NUMBERS
from smdih.ingest.v1 import (
    query_pb2,
    query_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)

# Batches of one stream that may be on their way; past it the stream is not read, which its sender feels as back-pressure.
STREAM_BATCHES_MAX = 2_000

_ROLES = {number: role for role, number in ROLE_NUMBERS.items()}
_RESOLUTIONS = {
    query_pb2.RESOLUTION_UNSPECIFIED: "raw",
    query_pb2.RESOLUTION_RAW: "raw",
    query_pb2.RESOLUTION_MINUTE: "minute",
    query_pb2.RESOLUTION_HOUR: "hour",
}


class TelemetryServicer(telemetry_pb2_grpc.TelemetryServiceServicer):
    def __init__(self, door: Door) -> None:
        self._door = door

    async def SendBatches(
        self, request: telemetry_pb2.SendBatchesRequest, context: Any
    ) -> telemetry_pb2.SendBatchesResponse:
        sender = self._door.sender(current_caller(), request.source, "grpc")
        if not request.batches:
            raise Invalid("The request holds no batches.", reason="EMPTY_REQUEST")
        return telemetry_pb2.SendBatchesResponse(results=await self._door.send(sender, request.batches))

    async def CheckBatches(
        self, request: telemetry_pb2.CheckBatchesRequest, context: Any
    ) -> telemetry_pb2.CheckBatchesResponse:
        sender = self._door.sender(current_caller(), "", "grpc")
        return telemetry_pb2.CheckBatchesResponse(results=self._door.check(sender, request.batches))

    async def StreamBatches(
        self, request_iterator: AsyncIterator[telemetry_pb2.StreamBatchesRequest], context: Any
    ) -> AsyncIterator[telemetry_pb2.StreamBatchesResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        sender = self._door.sender(current_caller(), first.source, "grpc")
        window = _Window()

        async def read() -> None:
            try:
                request: telemetry_pb2.StreamBatchesRequest | None = first
                while request is not None:
                    await window.room()
                    window.add(self._door.take(sender, request.batches))
                    request = await anext(request_iterator, None)
            finally:
                window.end()

        reading = asyncio.create_task(read())
        try:
            async for answer in window.answers():
                yield answer
            await reading  # what ended the reading with an error ends the stream with it
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


class _Window:
    """The batches of one stream that are on their way, in order."""

    def __init__(self) -> None:
        self._taken: deque[Taken] = deque()
        self._changed = asyncio.Event()
        self._roomy = asyncio.Event()
        self._ended = False

    def add(self, taken: list[Taken]) -> None:
        self._taken.extend(taken)
        self._changed.set()

    async def room(self) -> None:
        while len(self._taken) >= STREAM_BATCHES_MAX:
            self._roomy.clear()
            await self._roomy.wait()

    def end(self) -> None:
        self._ended = True
        self._changed.set()

    async def answers(self) -> AsyncIterator[telemetry_pb2.StreamBatchesResponse]:
        """One answer for all that has become durable since the one before. Raises what kept a batch from it."""
        answer = telemetry_pb2.StreamBatchesResponse()
        while True:
            if not self._taken:
                if self._ended:
                    return
                self._changed.clear()
                await self._changed.wait()
                continue
            await self._taken[0].durable()
            del answer.problems[:]
            while self._taken and self._taken[0].is_settled:
                one = self._taken.popleft()
                await one.durable()
                answer.acknowledged_sequence = max(answer.acknowledged_sequence, one.checked.sequence)
                answer.acknowledged_batches += 1
                answer.accepted += one.checked.accepted
                if one.checked.quarantine:
                    result = one.result()
                    answer.quarantined += result.quarantined
                    answer.problems.append(result)
            self._roomy.set()
            yield answer


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def CreateFirm(
        self, request: registry_pb2.CreateFirmRequest, context: Any
    ) -> registry_pb2.CreateFirmResponse:
        new = NewFirm(request.name, request.slug, request.sic, request.region, request.size)
        return registry_pb2.CreateFirmResponse(firm=await self._registry.create_firm(current_caller(), new))

    async def CreatePartner(
        self, request: registry_pb2.CreatePartnerRequest, context: Any
    ) -> registry_pb2.CreatePartnerResponse:
        partner = await self._registry.create_partner(current_caller(), request.name, request.region)
        return registry_pb2.CreatePartnerResponse(partner=partner)

    async def CreateSite(
        self, request: registry_pb2.CreateSiteRequest, context: Any
    ) -> registry_pb2.CreateSiteResponse:
        new = NewSite(request.firm_id, request.slug, request.name, request.timezone or NewSite.timezone)
        return registry_pb2.CreateSiteResponse(site=await self._registry.create_site(current_caller(), new))

    async def CreateMachine(
        self, request: registry_pb2.CreateMachineRequest, context: Any
    ) -> registry_pb2.CreateMachineResponse:
        new = NewMachine(request.site_id, request.path, request.name, request.kind, _signals(request.signals))
        return registry_pb2.CreateMachineResponse(machine=await self._registry.create_machine(current_caller(), new))

    async def AddSignals(
        self, request: registry_pb2.AddSignalsRequest, context: Any
    ) -> registry_pb2.AddSignalsResponse:
        machine = await self._registry.add_signals(current_caller(), request.machine_id, _signals(request.signals))
        return registry_pb2.AddSignalsResponse(machine=machine)

    async def ListMachines(
        self, request: registry_pb2.ListMachinesRequest, context: Any
    ) -> registry_pb2.ListMachinesResponse:
        machines, token = await self._registry.list_machines(
            current_caller(), request.firm_id, request.page_size, request.page_token
        )
        return registry_pb2.ListMachinesResponse(machines=machines, next_page_token=token)

    async def IssueCredential(
        self, request: registry_pb2.IssueCredentialRequest, context: Any
    ) -> registry_pb2.IssueCredentialResponse:
        role = _ROLES.get(request.role)
        if role is None:
            raise Invalid(f"role: one of {', '.join(Role)}.")
        key, credential = await self._registry.issue_credential(
            current_caller(),
            role,
            firm_id=request.firm_id,
            partner_id=request.partner_id,
            label=request.label,
            valid_from_us=request.valid_from_us,
            valid_to_us=request.valid_to_us,
        )
        return registry_pb2.IssueCredentialResponse(key=key, credential=credential)

    async def RevokeCredential(
        self, request: registry_pb2.RevokeCredentialRequest, context: Any
    ) -> registry_pb2.RevokeCredentialResponse:
        await self._registry.revoke_credential(current_caller(), request.credential_id)
        return registry_pb2.RevokeCredentialResponse()


def _signals(signals: Any) -> list[NewSignal]:
    return [
        NewSignal(
            signal.name,
            signal.unit,
            signal.range_min if signal.HasField("range_min") else None,
            signal.range_max if signal.HasField("range_max") else None,
        )
        for signal in signals
    ]


class QueryServicer(query_pb2_grpc.QueryServiceServicer):
    def __init__(self, queries: Queries) -> None:
        self._queries = queries

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
        items, token = await self._queries.quarantine(
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
        result = await self._queries.replay(current_caller(), request.id, request.machine_id)
        return query_pb2.ReplayQuarantineResponse(accepted=result.accepted, quarantined=result.quarantined)
