"""Sends telemetry over the gRPC stream and keeps what is not acknowledged yet, so that a lost connection loses nothing."""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import numpy as np
import numpy.typing as npt

from smdih.ingest.v1 import telemetry_pb2, telemetry_pb2_grpc
from smdih_client.buffer import DiskBuffer
from smdih_client.tls import Tls, open_channel

UNACKNOWLEDGED_MAX = 1_000
RECONNECT_DELAY_S = 0.2
RECONNECT_DELAY_S_MAX = 5.0
BATCHES_PER_MESSAGE_MAX = 200
# Below what the hub takes in one message, whatever the size of the last batch in it.
MESSAGE_BYTES_MAX = 1024 * 1024
# How fast a client with a buffer sends at most, so that all gateways coming back at once do not overrun the hub.
BUFFERED_SAMPLES_PER_S_MAX = 200_000.0

# What a new connection can mend; anything else is the caller's to see.
_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.INTERNAL,
)


class Refused(Exception):
    """The hub will not take this, however often it is sent: a wrong key, a wrong request. The message says why."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(f"{reason}: {detail}")


@dataclass
class Totals:
    """Samples since the client was opened (those that its buffer held then are in `sent`).

    sent = acknowledged + waiting; acknowledged = accepted + quarantined.
    """

    sent: int = 0
    acknowledged: int = 0
    quarantined: int = 0
    reconnects: int = 0


@dataclass(frozen=True)
class _Waiting:
    batch: telemetry_pb2.Batch
    samples: int


def batch_of(
    machine: str | int, times_us: npt.ArrayLike, values: npt.ArrayLike, signals: Sequence[str]
) -> tuple[telemetry_pb2.Batch, int]:
    """A batch without its sequence, and how many samples it holds."""
    matrix = np.asarray(values, dtype=np.float64)
    absent = np.isnan(matrix)
    batch = telemetry_pb2.Batch(
        machine_id=machine if isinstance(machine, int) else 0,
        machine_path=machine if isinstance(machine, str) else "",
        times_us=np.asarray(times_us, dtype=np.int64).tolist(),
        signals=signals,
        values=np.where(absent, 0.0, matrix).ravel().tolist(),
        absent=np.packbits(absent.ravel(), bitorder="little").tobytes() if absent.any() else b"",
    )
    return batch, int(matrix.size - absent.sum())


class TelemetryClient:
    """One gateway's connection to the door.

    `send` returns as soon as the batch is kept here (waiting while UNACKNOWLEDGED_MAX are); `flush` returns when everything is
    durable in the hub. Connections that break are opened anew and what was not acknowledged is sent again, in order; the hub
    recognises repeats by (source, sequence). Sequences begin at the present time in microseconds, so they grow over restarts.

    With `buffer`, a folder (or a DiskBuffer, for limits of your own), batches are kept on disk: `send` returns when the buffer has
    the batch, whether the hub answers or not, and raises BufferFull when it takes no more. Leaving the context does not wait for
    the hub; what it did not get is sent when the buffer is opened again (keep the source the same), in order and at most
    `samples_per_s_max`.

    `credentials`: for a door with TLS; as Tls its files are read anew for every connection.
    """

    def __init__(
        self,
        target: str,
        key: str,
        *,
        source: str,
        credentials: grpc.ChannelCredentials | Tls | None = None,
        buffer: Path | DiskBuffer | None = None,
        samples_per_s_max: float = BUFFERED_SAMPLES_PER_S_MAX,
    ) -> None:
        self._target = target
        self._metadata = (("authorization", f"Bearer {key}"),)
        self._source = source
        self._credentials = credentials
        self._sequence = time.time_ns() // 1000
        self._buffer_folder = buffer if isinstance(buffer, Path) else None
        self._buffer = buffer if isinstance(buffer, DiskBuffer) else None
        self._samples_per_s_max = samples_per_s_max
        self._paced_until_s = 0.0
        self._unacknowledged: deque[_Waiting] = deque()
        self._next = 0  # index in _unacknowledged of what this connection sends next
        self._connections = 0
        self._changed = asyncio.Condition()
        self._failure: BaseException | None = None
        self._task: asyncio.Task[None] | None = None
        self.totals = Totals()
        self.problems: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        """Raises BufferInUse, OSError."""
        if self._buffer_folder is not None:
            self._buffer = await asyncio.to_thread(DiskBuffer, self._buffer_folder)
        if self._buffer is not None:
            self.totals.sent += self._buffer.waiting_samples
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self._buffer is None:
                await self.flush()
        finally:
            assert self._task is not None
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            if self._buffer is not None:
                await asyncio.to_thread(self._buffer.close)

    async def send(
        self,
        machine: str | int,
        times_us: npt.ArrayLike,
        values: npt.ArrayLike,
        *,
        signals: Sequence[str] = (),
        sequence: int = 0,
    ) -> None:
        """Send a times x signals matrix of one machine (path or id); NaN: no value.

        `sequence`: for a sender that numbers its batches itself, alike in every run; without buffer.
        Raises Refused; with a buffer also BufferFull (the samples were not kept) and OSError (the disk is failing).
        """
        batch, samples = batch_of(machine, times_us, values, signals)
        if self._buffer is not None:
            await self._keep(self._buffer, batch, samples)
            return
        self._sequence = sequence or self._sequence + 1
        batch.sequence = self._sequence
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._failure is not None or len(self._unacknowledged) < UNACKNOWLEDGED_MAX
            )
            self._raise_failure()
            self._unacknowledged.append(_Waiting(batch, samples))
            self.totals.sent += samples
            self._changed.notify_all()

    async def _keep(self, buffer: DiskBuffer, batch: telemetry_pb2.Batch, samples: int) -> None:
        async with self._changed:
            self._raise_failure()
            batch.sequence = buffer.next_sequence()
            buffer.append(batch.sequence, samples, batch.SerializeToString())
            self.totals.sent += samples
            self._changed.notify_all()
        if buffer.is_sync_due():
            await asyncio.to_thread(buffer.sync)

    async def flush(self) -> None:
        """Return when everything sent is durable in the hub. Raises Refused."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or self._is_drained())
            self._raise_failure()

    def _is_drained(self) -> bool:
        return not self._unacknowledged and (self._buffer is None or not self._buffer.has_unread)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        delay_s = RECONNECT_DELAY_S
        while True:
            acknowledged = self.totals.acknowledged
            try:
                await self._connection()
                return
            except grpc.aio.AioRpcError as error:
                metadata = dict(error.trailing_metadata() or ())
                if error.code() not in _TRANSIENT:
                    await self._fail(Refused(str(metadata.get("reason", error.code().name)), error.details() or ""))
                    return
                if self.totals.acknowledged > acknowledged:
                    delay_s = RECONNECT_DELAY_S
                with contextlib.suppress(ValueError, TypeError):
                    delay_s = max(delay_s, float(str(metadata.get("retry-after", 0))))
            except Exception as error:
                await self._fail(error)
                raise
            self.totals.reconnects += 1
            # Not all at the same moment: a hub that comes back meets every gateway that it had.
            await asyncio.sleep(delay_s * random.uniform(1, 1.5))  # noqa: S311  spreads, hides nothing
            delay_s = min(delay_s * 2, RECONNECT_DELAY_S_MAX)

    async def _fail(self, error: BaseException) -> None:
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    async def _connection(self) -> None:
        async with open_channel(self._target, self._credentials) as channel:
            stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
            self._next = 0
            self._connections += 1
            batches = quarantined = 0
            call = stub.StreamBatches(self._requests(self._connections), metadata=self._metadata)
            async for answer in call:
                async with self._changed:
                    acknowledged = [
                        self._unacknowledged.popleft() for _ in range(answer.acknowledged_batches - batches)
                    ]
                    self._next -= len(acknowledged)
                    samples = sum(waiting.samples for waiting in acknowledged)
                    self.totals.acknowledged += samples
                    if self._buffer is not None and acknowledged:
                        self._buffer.acknowledge(acknowledged[-1].batch.sequence, samples)
                    self.totals.quarantined += answer.quarantined - quarantined
                    batches, quarantined = answer.acknowledged_batches, answer.quarantined
                    for result in answer.problems:
                        for problem in result.problems:
                            self.problems[problem.reason] = self.problems.get(problem.reason, 0) + problem.samples
                    self._changed.notify_all()
            raise grpc.aio.AioRpcError(  # the hub closed the stream in good order, as it does when it stops
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details="the hub closed the stream",
            )

    async def _requests(self, connection: int) -> AsyncIterator[telemetry_pb2.StreamBatchesRequest]:
        # A connection that broke may still ask for more; what it took would be missing in the one after it.
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: connection != self._connections or self._has_more())
                if connection != self._connections:
                    return
                batches: list[telemetry_pb2.Batch] = []
                samples = size = 0
                while (
                    self._next < len(self._unacknowledged)
                    and len(batches) < BATCHES_PER_MESSAGE_MAX
                    and size < MESSAGE_BYTES_MAX
                ):
                    waiting = self._unacknowledged[self._next]
                    if batches and size + waiting.batch.ByteSize() > MESSAGE_BYTES_MAX:
                        break
                    batches.append(waiting.batch)
                    samples += waiting.samples
                    size += waiting.batch.ByteSize()
                    self._next += 1
            if self._buffer is not None:
                await self._pace(samples)
            yield telemetry_pb2.StreamBatchesRequest(source=self._source, batches=batches)

    def _has_more(self) -> bool:
        """Whether there is a batch to send; takes some out of the buffer when there is none at hand."""
        if self._next == len(self._unacknowledged) < UNACKNOWLEDGED_MAX and self._buffer is not None:
            records = self._buffer.read(records_max=BATCHES_PER_MESSAGE_MAX, bytes_max=MESSAGE_BYTES_MAX)
            self._unacknowledged += [
                _Waiting(telemetry_pb2.Batch.FromString(record.payload), record.samples) for record in records
            ]
        return self._next < len(self._unacknowledged)

    async def _pace(self, samples: int) -> None:
        now_s = time.monotonic()
        await asyncio.sleep(self._paced_until_s - now_s)
        self._paced_until_s = max(now_s, self._paced_until_s) + samples / self._samples_per_s_max
