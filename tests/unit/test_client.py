"""What the client makes of a hub that refuses, on a small gRPC server of the same contract."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from smdih.ingest.v1 import telemetry_pb2, telemetry_pb2_grpc
from smdih_client import Refused, TelemetryClient


class Answers(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Refuses the first stream, acknowledges every batch of the next ones."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        self._code = code
        self._reason = reason
        self.streams = 0
        self.sequences: list[int] = []

    async def SendBatches(
        self, request: telemetry_pb2.SendBatchesRequest, context: Any
    ) -> telemetry_pb2.SendBatchesResponse:
        raise NotImplementedError

    async def CheckBatches(
        self, request: telemetry_pb2.CheckBatchesRequest, context: Any
    ) -> telemetry_pb2.CheckBatchesResponse:
        raise NotImplementedError

    async def StreamBatches(
        self, request_iterator: AsyncIterator[telemetry_pb2.StreamBatchesRequest], context: Any
    ) -> AsyncIterator[telemetry_pb2.StreamBatchesResponse]:
        self.streams += 1
        if self.streams == 1:
            metadata = (("reason", self._reason), ("retry-after", "0.1"))
            await context.abort(self._code, "not now", trailing_metadata=metadata)
        batches = 0
        async for request in request_iterator:
            batches += len(request.batches)
            self.sequences += [batch.sequence for batch in request.batches]
            yield telemetry_pb2.StreamBatchesResponse(acknowledged_batches=batches)


async def _sent(answers: Answers) -> TelemetryClient:
    server = grpc.aio.server()
    telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(answers, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with TelemetryClient(f"127.0.0.1:{port}", "key", source="s") as client:
            for number in range(20):
                await client.send("a/b/c", [number], [[1.0]])
            await client.flush()
            return client
    finally:
        await server.stop(0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, "STARTING"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_DOWN"),
        (grpc.StatusCode.UNAVAILABLE, "TRY_AGAIN"),
    ],
)
async def test_what_passes_is_waited_for_and_everything_sent_once_in_order(code: grpc.StatusCode, reason: str) -> None:
    answers = Answers(code, reason)
    client = await _sent(answers)
    assert (client.totals.acknowledged, client.totals.reconnects, answers.streams) == (20, 1, 2)
    assert answers.sequences == sorted(set(answers.sequences))
    assert len(answers.sequences) == 20


async def test_what_does_not_pass_is_raised() -> None:
    with pytest.raises(Refused, match="UNAUTHENTICATED"):
        await _sent(Answers(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"))
