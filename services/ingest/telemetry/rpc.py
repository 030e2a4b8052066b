"""gRPC edges of ingest."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from services.common.errors import Invalid, TryAgain
from services.common.rpc import current_caller
from services.ingest.telemetry.door import Door, Taken, parts
from smdih.ingest.v1 import (
    telemetry_pb2,
    telemetry_pb2_grpc,
)

# Batches of one stream that may be on their way; past it the stream is not read, which its sender feels as back-pressure.
STREAM_BATCHES_MAX = 2_000
STREAM_BYTES_MAX = 8 * 1024 * 1024


class TelemetryServicer(telemetry_pb2_grpc.TelemetryServiceServicer):
    def __init__(self, door: Door) -> None:
        self._door = door

    async def SendBatches(
        self, request: telemetry_pb2.SendBatchesRequest, context: Any
    ) -> telemetry_pb2.SendBatchesResponse:
        sender = self._door.sender(current_caller(), request.source, "grpc")
        if not request.batches:
            raise Invalid("The request holds no batches.", reason="EMPTY_REQUEST")
        self._door.check_number(sender, request.batches)
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
                    self._door.check_number(sender, request.batches)
                    for part in parts(request.batches):
                        await window.room()
                        window.add(self._door.take(sender, part))
                    request = await anext(request_iterator, None)
            finally:
                window.end()

        reading = asyncio.create_task(read())
        try:
            async for answer in window.answers():
                yield answer
            await reading  # what ended the reading with an error ends the stream with it
        except TryAgain as error:
            self._door.note_refused(sender, error)
            raise
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
        self._bytes = 0

    def add(self, taken: list[Taken]) -> None:
        self._taken.extend(taken)
        self._bytes += sum([one.bytes for one in taken])
        self._changed.set()

    async def room(self) -> None:
        while len(self._taken) >= STREAM_BATCHES_MAX or self._bytes >= STREAM_BYTES_MAX:
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
                self._bytes -= one.bytes
                one.check()
                answer.acknowledged_sequence = max(answer.acknowledged_sequence, one.checked.sequence)
                answer.acknowledged_batches += 1
                answer.accepted += one.checked.accepted
                if one.checked.quarantine:
                    result = one.result()
                    answer.quarantined += result.quarantined
                    answer.problems.append(result)
            self._roomy.set()
            yield answer
