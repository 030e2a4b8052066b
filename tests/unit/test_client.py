"""What the client makes of a hub that refuses, on a small gRPC server of the same contract."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from smdih.ingest.v1 import telemetry_pb2, telemetry_pb2_grpc
from smdih_client import DiskBuffer, Refused, TelemetryClient, telemetry
from tests.polling import eventually


class Answers(telemetry_pb2_grpc.TelemetryServiceServicer):
    """Refuses the first streams, and a sequence that is too large for it; acknowledges every batch of the next ones."""

    def __init__(self, code: grpc.StatusCode, reason: str, *, refused: int = 1, too_large: int = 0) -> None:
        self._code = code
        self._reason = reason
        self._refused = refused
        self._too_large = too_large
        self.keys: list[str] = []
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
        self.keys.append(dict(context.invocation_metadata())["authorization"])
        if self.streams <= self._refused:
            metadata = (("reason", self._reason), ("retry-after", "0.1"))
            await context.abort(self._code, "not now", trailing_metadata=metadata)
        batches = 0
        async for request in request_iterator:
            if self._too_large in [batch.sequence for batch in request.batches]:
                code, too_large = grpc.StatusCode.RESOURCE_EXHAUSTED, (("reason", "TOO_LARGE"),)
                await context.abort(code, "too large", trailing_metadata=too_large)
            batches += len(request.batches)
            self.sequences += [batch.sequence for batch in request.batches]
            yield telemetry_pb2.StreamBatchesResponse(acknowledged_batches=batches)


@asynccontextmanager
async def _serving(answers: Answers) -> AsyncIterator[str]:
    server = grpc.aio.server()
    telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(answers, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)


async def _sent(answers: Answers) -> TelemetryClient:
    async with _serving(answers) as target, TelemetryClient(target, "key", source="s") as client:
        for number in range(20):
            await client.send("a/b/c", [number], [[1.0]])
        await client.flush()
        return client


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


async def test_more_at_once_than_the_hub_takes_is_an_error_of_the_caller() -> None:
    async with TelemetryClient("127.0.0.1:1", "key", source="s") as client:
        with pytest.raises(ValueError, match="at most 3145728 at once"):
            await client.send("a/b/c", range(1000), np.ones((1000, 500)))


async def test_a_gateway_with_a_buffer_keeps_what_it_is_given_while_its_key_is_refused_and_takes_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "REFUSED_DELAY_S", 0.05)
    key = tmp_path / "smdih.key"
    key.write_text("old\n")
    answers = Answers(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", refused=3)
    async with (
        _serving(answers) as target,
        TelemetryClient(target, key, source="s", buffer=tmp_path / "buffer") as client,
    ):
        for number in range(10):
            await client.send("a/b/c", [number], [[1.0]])
        with pytest.raises(Refused, match="UNAUTHENTICATED"):
            await client.flush()
        await client.send("a/b/c", [10], [[1.0]])
        key.write_text("new\n")

        async def drained() -> bool:
            return client.totals.acknowledged == client.totals.sent == 11

        await eventually(drained)
        assert client.refusal is None
    assert (answers.keys[0], answers.keys[-1]) == ("Bearer old", "Bearer new")
    assert answers.sequences == sorted(set(answers.sequences))


async def test_a_batch_that_the_hub_can_never_take_goes_aside_and_what_is_behind_it_is_sent(tmp_path: Path) -> None:
    buffer = DiskBuffer(tmp_path / "buffer")
    first = buffer.next_sequence()
    answers = Answers(grpc.StatusCode.OK, "", refused=0, too_large=first + 7)
    async with _serving(answers) as target, TelemetryClient(target, "key", source="s", buffer=buffer) as client:
        for number in range(20):
            await client.send("a/b/c", [number], [[1.0]])
        await client.flush()
        totals = client.totals
        assert (totals.sent, totals.acknowledged, totals.lost) == (20, 19, 1)
    assert set(answers.sequences) == {first + n for n in range(20) if n != 7}
    (aside,) = (tmp_path / "buffer").glob("*.refused")
    assert telemetry_pb2.Batch.FromString(aside.read_bytes()).sequence == first + 7


async def test_a_full_disk_beside_a_batch_that_is_too_large_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "REFUSED_DELAY_S", 0.05)
    buffer = DiskBuffer(tmp_path / "buffer")
    first = buffer.next_sequence()
    # A folder in the place of the file stands in for the full disk.
    in_the_way = tmp_path / "buffer" / f"{first + 3:020d}.refused"
    in_the_way.mkdir()
    answers = Answers(grpc.StatusCode.OK, "", refused=0, too_large=first + 3)
    async with _serving(answers) as target, TelemetryClient(target, "key", source="s", buffer=buffer) as client:
        for number in range(10):
            await client.send("a/b/c", [number], [[1.0]])
        with pytest.raises(OSError, match="Is a directory"):
            await asyncio.wait_for(client.flush(), 10)
        assert buffer.waiting_samples == 7
        in_the_way.rmdir()

        async def drained() -> bool:
            return client.totals.acknowledged == 9

        await eventually(drained)
        assert (client.totals.lost, client.refusal, buffer.waiting_samples) == (1, None, 0)
    assert telemetry_pb2.Batch.FromString(in_the_way.read_bytes()).sequence == first + 3


async def test_damage_on_the_buffers_disk_does_not_keep_back_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "buffer"
    async with TelemetryClient("127.0.0.1:1", "key", source="s", buffer=folder) as cut_off:
        for number in range(20):
            await cut_off.send("a/b/c", [number], [[1.0, 2.0]])
    buffer = DiskBuffer(folder)
    (segment,) = folder.glob("*.log")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2 + 20] ^= 1
    segment.write_bytes(content)
    answers = Answers(grpc.StatusCode.OK, "", refused=0)
    async with _serving(answers) as target, TelemetryClient(target, "key", source="s", buffer=buffer) as client:
        await client.flush()
        totals = client.totals
        assert (totals.sent, totals.acknowledged, totals.lost) == (40, 38, 2)
    assert len(answers.sequences) == 19
