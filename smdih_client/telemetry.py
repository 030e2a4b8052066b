"""Sends telemetry over the gRPC stream and keeps what is not acknowledged yet, so that a lost connection loses nothing."""

import asyncio
import contextlib
import logging
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
from smdih_client.buffer import RECORD_BYTES_MAX, DiskBuffer
from smdih_client.tls import Tls, open_channel

log = logging.getLogger(__name__)

UNACKNOWLEDGED_MAX = 1_000
RECONNECT_DELAY_S = 0.2
RECONNECT_DELAY_S_MAX = 5.0
BATCHES_PER_MESSAGE_MAX = 200
# Below what the hub takes in one message, whatever the size of the last batch in it.
MESSAGE_BYTES_MAX = 1024 * 1024
# How fast a client with a buffer sends at most, so that all gateways coming back at once do not overrun the hub.
BUFFERED_SAMPLES_PER_S_MAX = 200_000.0

# A hub that refuses a gateway with a buffer (its key has ended) is asked again after this.
REFUSED_DELAY_S = 30.0

# What a new connection can mend, but for what is too large.
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

    sent = acknowledged + waiting + lost; acknowledged = accepted + quarantined.
    """

    sent: int = 0
    acknowledged: int = 0
    quarantined: int = 0
    # Damaged on the buffer's disk, or never taken by the hub; kept beside the buffer.
    lost: int = 0
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
    the batch, whatever the hub says or does not say, and raises BufferFull when it takes no more. A hub that refuses the key is
    asked again every REFUSED_DELAY_S; `refusal` says why. Leaving the context does not wait for the hub; what it did not get is
    sent when the buffer is opened again (keep the source the same), in order and at most `samples_per_s_max`.

    `key`: as a file it is read anew for every connection, so that it can be changed while the gateway runs. `credentials`: for a
    door with TLS; as Tls its files are read anew likewise.
    """

    def __init__(
        self,
        target: str,
        key: str | Path,
        *,
        source: str,
        credentials: grpc.ChannelCredentials | Tls | None = None,
        buffer: Path | DiskBuffer | None = None,
        samples_per_s_max: float = BUFFERED_SAMPLES_PER_S_MAX,
    ) -> None:
        self._target = target
        self._key = key
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
        # Batches go one by one, so that the hub says which of them is too large.
        self._is_one_by_one = False
        self.refusal: Exception | None = None
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
        Raises ValueError for more than RECORD_BYTES_MAX at once, and Refused; with a buffer instead of it BufferFull (the samples
        were not kept) and OSError (the disk is failing).
        """
        batch, samples = batch_of(machine, times_us, values, signals)
        if batch.ByteSize() > RECORD_BYTES_MAX:
            raise ValueError(f"a batch of {batch.ByteSize()} bytes; send at most {RECORD_BYTES_MAX} at once")
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
            batch.sequence = buffer.next_sequence()
            buffer.append(batch.sequence, samples, batch.SerializeToString())
            self.totals.sent += samples
            self._changed.notify_all()
        if buffer.is_sync_due():
            await asyncio.to_thread(buffer.sync)

    async def flush(self) -> None:
        """Return when everything sent is durable in the hub. Raises Refused."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._failure is not None or self.refusal is not None or self._is_drained()
            )
            self._raise_failure()
            if self.refusal is not None and not self._is_drained():
                raise self.refusal

    def _is_drained(self) -> bool:
        return not self._unacknowledged and (self._buffer is None or not self._buffer.has_unread)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _run(self) -> None:
        delay_s = RECONNECT_DELAY_S
        while True:
            acknowledged = self.totals.acknowledged
            final: Exception | None = None
            try:
                await self._connection()
            except grpc.aio.AioRpcError as error:
                metadata = dict(error.trailing_metadata() or ())
                reason = str(metadata.get("reason", error.code().name))
                if reason == "TOO_LARGE" and self._buffer is not None:
                    final = await self._find_too_large(self._buffer)
                elif error.code() not in _TRANSIENT or reason == "TOO_LARGE":
                    final = Refused(reason, error.details() or "")
                if self.totals.acknowledged > acknowledged:
                    delay_s = RECONNECT_DELAY_S
                with contextlib.suppress(ValueError, TypeError):
                    delay_s = max(delay_s, float(str(metadata.get("retry-after", 0))))
            except Exception as error:
                final = error
            if final is not None:
                if self._buffer is None:
                    await self._fail(final)
                    return
                log.error("nothing is sent; kept on disk, next try in %.0f s: %s", REFUSED_DELAY_S, final)
                await self._refuse(final)
                delay_s = REFUSED_DELAY_S
            self.totals.reconnects += 1
            # Not all at the same moment: a hub that comes back meets every gateway that it had.
            await asyncio.sleep(delay_s * random.uniform(1, 1.5))  # noqa: S311  spreads, hides nothing
            delay_s = min(delay_s * 2, RECONNECT_DELAY_S_MAX)

    async def _fail(self, error: Exception) -> None:
        async with self._changed:
            self._failure = error
            self._changed.notify_all()

    async def _refuse(self, error: Exception | None) -> None:
        async with self._changed:
            self.refusal = error
            self._changed.notify_all()

    async def _find_too_large(self, buffer: DiskBuffer) -> OSError | None:
        """A batch that the hub cannot hold would keep back everything behind it: it goes aside. Returns what hinders that."""
        async with self._changed:
            if self._is_one_by_one and self._unacknowledged:
                waiting = self._unacknowledged[0]
                log.error("batch %d is too large for the hub and is set aside", waiting.batch.sequence)
                try:
                    buffer.set_aside(waiting.batch.sequence, waiting.samples, waiting.batch.SerializeToString())
                except OSError as error:  # such as a full disk: it waits, and is found again
                    return error
                self._unacknowledged.popleft()
                self.totals.lost += waiting.samples
                self._changed.notify_all()
            self._is_one_by_one = not self._is_one_by_one
        return None

    async def _connection(self) -> None:
        async with open_channel(self._target, self._credentials) as channel:
            stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
            self._next = 0
            self._connections += 1
            batches = quarantined = 0
            key = self._key if isinstance(self._key, str) else self._key.read_text().strip()
            broken: list[Exception] = []
            requests = self._requests(self._connections, broken)
            async for answer in stub.StreamBatches(requests, metadata=(("authorization", f"Bearer {key}"),)):
                async with self._changed:
                    self.refusal = None
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
                    self._is_one_by_one = self._is_one_by_one and bool(self._unacknowledged)
                    for result in answer.problems:
                        for problem in result.problems:
                            self.problems[problem.reason] = self.problems.get(problem.reason, 0) + problem.samples
                    self._changed.notify_all()
            if broken:
                raise broken[0]
            raise grpc.aio.AioRpcError(  # the hub closed the stream in good order, as it does when it stops
                grpc.StatusCode.UNAVAILABLE,
                grpc.aio.Metadata(),
                grpc.aio.Metadata(),
                details="the hub closed the stream",
            )

    async def _requests(
        self, connection: int, broken: list[Exception]
    ) -> AsyncIterator[telemetry_pb2.StreamBatchesRequest]:
        """What a connection sends; ends when it is not the present one any more, or with what is `broken`."""
        while True:
            async with self._changed:
                try:
                    await self._changed.wait_for(lambda: connection != self._connections or self._has_more())
                except Exception as error:  # grpc would take it for a call that somebody cancelled
                    broken.append(error)
                    return
                # A connection that broke may still ask for more; what it took would be missing in the one after it.
                if connection != self._connections:
                    return
                batches: list[telemetry_pb2.Batch] = []
                samples = size = 0
                while (
                    self._next < len(self._unacknowledged)
                    and len(batches) < (1 if self._is_one_by_one else BATCHES_PER_MESSAGE_MAX)
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
        if self._is_one_by_one and self._next > 0:
            return False
        if self._next == len(self._unacknowledged) < UNACKNOWLEDGED_MAX and self._buffer is not None:
            lost = self._buffer.lost_samples
            records = self._buffer.read(records_max=BATCHES_PER_MESSAGE_MAX, bytes_max=MESSAGE_BYTES_MAX)
            if self._buffer.lost_samples > lost:
                self.totals.lost += self._buffer.lost_samples - lost
                self._changed.notify_all()
            self._unacknowledged += [
                _Waiting(telemetry_pb2.Batch.FromString(record.payload), record.samples) for record in records
            ]
        return self._next < len(self._unacknowledged)

    async def _pace(self, samples: int) -> None:
        now_s = time.monotonic()
        await asyncio.sleep(self._paced_until_s - now_s)
        self._paced_until_s = max(now_s, self._paced_until_s) + samples / self._samples_per_s_max
