"""Group commit: one publish in flight a partition; whatever arrives meanwhile becomes the next record.

A record so carries the batches of many machines when the door is busy and one when it is not, without a timer. Order within a
partition is the order of `put`: a later batch is never durable before an earlier one.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from prometheus_client import Counter

from services.common.errors import HubError, SlowDown, TooLarge, TryAgain
from services.common.kafka import REQUEST_BYTES_MAX, Message, Publisher
from services.common.logs import get_logger
from services.common.metrics import watch_queue_bytes
from services.common.topics import QUARANTINE, SAMPLES
from services.ingest.numbering import Numbering
from smdih.ingest.v1 import records_pb2

log = get_logger(__name__)

RECORD_BYTES_MAX = 1024 * 1024
# What is put in at once, less room for a record's own; the door makes nothing that is as large.
PAYLOAD_BYTES_MAX = REQUEST_BYTES_MAX - 64 * 1024
WAITING_BYTES_MAX = 64 * 1024 * 1024
QUARANTINE_AT_ONCE_MAX = 200
RETRY_AFTER_S = 2

# Records that the door has published, and the batches in them: their ratio shows how full the group commit is.
records_total = Counter("smdih_ingest_door_records_total", "Records published by the door", ["topic"])
batches_total = Counter("smdih_ingest_door_batches_total", "Batches in published records", ["topic"])


class Commit:
    """One publish, for everyone whose batches are in it."""

    def __init__(self) -> None:
        self._future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # A sender that went away leaves nobody to look at a failure.
        self._future.add_done_callback(lambda future: future.cancelled() or future.exception())
        self.is_settled = False

    def check(self) -> None:
        """Of a commit that is settled: raise what the publish raised."""
        self._future.result()

    async def wait(self) -> None:
        """Return once it is durable. Raises what the publish raised."""
        await asyncio.shield(self._future)

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call back once it is durable or has failed."""
        self._future.add_done_callback(lambda _: callback())

    def succeed(self) -> None:
        self.is_settled = True
        self._future.set_result(None)

    def fail(self, error: BaseException) -> None:
        self.is_settled = True
        self._future.set_exception(error)


class Share(NamedTuple):
    """What one batch has in a publish."""

    commit: Commit
    bytes: int


class _Queue:
    """Collects payloads while `send` publishes the ones before."""

    def __init__(
        self, send: Callable[[Sequence[bytes], Numbering], Awaitable[None]], bytes_max: int, items_max: int
    ) -> None:
        self._send = send
        self._numbering = Numbering()
        self._bytes_max = bytes_max
        self._items_max = items_max
        self._waiting: list[tuple[bytes, Commit]] = []
        self._open = Commit()
        self._open_bytes = 0
        self._open_items = 0
        self._sender: asyncio.Task[None] | None = None
        self.waiting_bytes = 0

    def put(self, payload: bytes) -> Commit:
        """The publish that will carry it; one that has failed where no record could."""
        if len(payload) > PAYLOAD_BYTES_MAX:
            refused = Commit()
            refused.fail(TooLarge())
            return refused
        if self._open_items and (
            self._open_bytes + len(payload) > self._bytes_max or self._open_items >= self._items_max
        ):
            self._open, self._open_bytes, self._open_items = Commit(), 0, 0
        self._open_bytes += len(payload)
        self._open_items += 1
        self._waiting.append((payload, self._open))
        self.waiting_bytes += len(payload)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_all())
        return self._open

    async def close(self) -> None:
        """Publish what waits."""
        if self._sender is not None:
            await self._sender

    async def _send_all(self) -> None:
        try:
            while self._waiting:
                commit = self._waiting[0][1]
                payloads = [payload for payload, of in self._waiting if of is commit]
                del self._waiting[: len(payloads)]
                if commit is self._open:
                    self._open, self._open_bytes, self._open_items = Commit(), 0, 0
                try:
                    await self._send(payloads, self._numbering)
                except Exception as error:  # whatever it was, nobody may wait for ever
                    self._numbering.renew()
                    if not isinstance(error, HubError):
                        log.exception("publish failed in an unknown way")
                        error = HubError(retry_after_s=RETRY_AFTER_S)
                    if isinstance(error, TooLarge) and len(payloads) > 1:
                        error = _behind()  # what is too large is their record, not what they sent
                    commit.fail(error)
                    self._fail_rest()
                else:
                    commit.succeed()
                finally:
                    self.waiting_bytes -= sum(map(len, payloads))
        finally:
            self._sender = None

    def _fail_rest(self) -> None:
        # What waited behind a failure must not become durable before it: its senders send both again, in order.
        error = _behind()
        for payload, commit in self._waiting:
            self.waiting_bytes -= len(payload)
            if not commit.is_settled:
                commit.fail(error)
        self._waiting.clear()
        self._open, self._open_bytes, self._open_items = Commit(), 0, 0


def _behind() -> TryAgain:
    return TryAgain("What goes with it was not acknowledged; send again.", retry_after_s=RETRY_AFTER_S)


class GroupCommit:
    """The way from the door into the message log."""

    def __init__(self, publisher: Publisher, *, partitions: int) -> None:
        self._publisher = publisher
        self._samples = [
            _Queue(functools.partial(self._publish_samples, partition), RECORD_BYTES_MAX, 100_000)
            for partition in range(partitions)
        ]
        self._quarantine = _Queue(self._publish_quarantine, RECORD_BYTES_MAX, QUARANTINE_AT_ONCE_MAX)
        watch_queue_bytes("door", self._waiting_bytes, limit=WAITING_BYTES_MAX)
        for topic in (SAMPLES, QUARANTINE):
            records_total.labels(topic)
            batches_total.labels(topic)

    def check_room(self) -> None:
        """Raise SlowDown when too much waits already: memory stays bounded however slow the message log is."""
        if self._waiting_bytes() > WAITING_BYTES_MAX:
            raise SlowDown("The hub is busy; nothing was taken, send again.", retry_after_s=RETRY_AFTER_S)

    def partition_of(self, machine_id: int) -> int:
        return machine_id % len(self._samples)

    def put_frames(self, frames: records_pb2.FrameBatch) -> Share:
        """Frames of one machine always go to one partition, in order."""
        payload = frames.SerializeToString()
        return Share(self._samples[self.partition_of(frames.machine_id)].put(payload), len(payload))

    def put_quarantine(self, record: records_pb2.QuarantineRecord) -> Share:
        payload = record.SerializeToString()
        return Share(self._quarantine.put(payload), len(payload))

    def _waiting_bytes(self) -> int:
        return sum(queue.waiting_bytes for queue in (*self._samples, self._quarantine))

    async def close(self) -> None:
        await asyncio.gather(*(queue.close() for queue in (*self._samples, self._quarantine)))

    async def _publish_samples(self, partition: int, payloads: Sequence[bytes], numbering: Numbering) -> None:
        # SamplesRecord { repeated FrameBatch batches = 1 }: the parts are serialized already, only their tags are missing.
        record = b"".join(part for payload in payloads for part in (b"\x0a", _varint(len(payload)), payload))
        numbers = numbering.take(len(payloads))
        await self._publisher.publish(SAMPLES, record, partition=partition, headers=[numbers])
        records_total.labels(SAMPLES).inc()
        batches_total.labels(SAMPLES).inc(len(payloads))

    async def _publish_quarantine(self, payloads: Sequence[bytes], numbering: Numbering) -> None:
        await self._publisher.publish_all(
            [Message(QUARANTINE, payload, partition=0, headers=(numbering.take(1),)) for payload in payloads]
        )
        records_total.labels(QUARANTINE).inc(len(payloads))
        batches_total.labels(QUARANTINE).inc(len(payloads))


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)
