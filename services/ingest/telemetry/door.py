"""The door: takes batches, answers only for what the message log holds."""

import asyncio
import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from prometheus_client import Counter

from services.common import tracing
from services.common.clock import Clock
from services.common.directory import Directory
from services.common.errors import Forbidden, HubError, Invalid, SlowDown, TooLarge, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import current_correlation_id, get_logger
from services.ingest.diagnosis.sightings import Sightings
from services.ingest.domain import BATCHES_PER_REQUEST_MAX, Reason, Sender, check_text
from services.ingest.telemetry.buckets import Bucket, Buckets
from services.ingest.telemetry.frames import Checked, FrameCheck, quarantined
from services.ingest.telemetry.groupcommit import RETRY_AFTER_S, WAITING_BYTES_MAX, Commit, GroupCommit, Share
from services.ingest.telemetry.lineprotocol import Fault, TooMany, batches, by_reason, read
from smdih.ingest.v1 import telemetry_pb2

log = get_logger(__name__)

# Of one credential. Ten streams, each as full as it may be; and a quarter of the room that all share.
BATCHES_IN_FLIGHT_MAX = 20_000
BYTES_IN_FLIGHT_MAX = WAITING_BYTES_MAX // 4
LINES_BYTES_AT_ONCE = 64 * 1024
# Parts of a body that no batch could be made of: so many go on their way together.
UNREAD_AT_ONCE = 100
# A row of one sample grows when it is spread over all signals of its machine; this bounds what stands in memory at a time.
ROWS_AT_ONCE = 10_000

# What came in at the door, in samples, by what became of it. sent = accepted + quarantined + refused.
samples_total = Counter("smdih_ingest_door_samples_total", "Samples at the door", ["door", "outcome"])
# Requests and stream messages with telemetry, and those of them that were sent back, by reason; their senders keep what was in
# them. TRY_AGAIN, SLOW_DOWN and INTERNAL are the hub's fault, the others the sender's.
requests_total = Counter("smdih_ingest_door_requests_total", "Requests with telemetry", ["door"])
refusals_total = Counter("smdih_ingest_door_refusals_total", "Telemetry sent back", ["reason"])
for _reason in (HubError.REASON, SlowDown.REASON, TryAgain.REASON):
    refusals_total.labels(_reason)
# Quarantined samples by reason.
quarantined_total = Counter("smdih_ingest_door_quarantined_samples_total", "Samples put into quarantine", ["reason"])


@functools.cache  # a door's name is one of a few, and looking the counter up took longer than counting
def _accepted_total(door: str) -> Counter:
    return samples_total.labels(door, "accepted")


@functools.cache
def _requests_total(door: str) -> Counter:
    for outcome in ("accepted", "quarantined", "refused"):
        samples_total.labels(door, outcome)
    return requests_total.labels(door)


@dataclass(slots=True)  # not frozen, which would cost more: there is one for every batch
class Taken:
    """A batch on its way; durable when every publish that carries a share of it has succeeded."""

    checked: Checked
    shares: Sequence[Share]

    @property
    def is_settled(self) -> bool:
        return all(share.commit.is_settled for share in self.shares)

    @property
    def bytes(self) -> int:
        return sum([share.bytes for share in self.shares])

    def check(self) -> None:
        """Of a batch that is settled: raise what kept it from becoming durable."""
        for share in self.shares:
            share.commit.check()

    async def durable(self) -> None:
        """Raises what kept it from becoming durable."""
        for share in self.shares:
            await share.commit.wait()

    def result(self) -> telemetry_pb2.BatchResult:
        return _result(self.checked)


async def durable(taken: Sequence[Taken]) -> None:
    """Return once all are. Raises what kept one of them from it."""
    commits = dict.fromkeys(share.commit for one in taken for share in one.shares)
    await asyncio.gather(*(commit.wait() for commit in commits))


def _result(checked: Checked) -> telemetry_pb2.BatchResult:
    problems = [
        telemetry_pb2.Problem(reason=record.reason, detail=record.detail, samples=record.samples)
        for record in checked.quarantine
    ]
    return telemetry_pb2.BatchResult(
        sequence=checked.sequence,
        accepted=checked.accepted,
        quarantined=sum(record.samples for record in checked.quarantine),
        problems=problems,
    )


def parts(batches: Sequence[telemetry_pb2.Batch]) -> Iterator[Sequence[telemetry_pb2.Batch]]:
    """As many at a time as may be taken together, in order; a batch is never split."""
    first = rows = 0
    for number, batch in enumerate(batches):
        rows += len(batch.times_us)
        if number > first and (rows > ROWS_AT_ONCE or number - first >= BATCHES_PER_REQUEST_MAX):
            yield batches[first:number]
            first, rows = number, len(batch.times_us)
    if first < len(batches):
        yield batches[first:]


def _check_number(batches: Sequence[telemetry_pb2.Batch]) -> None:
    if len(batches) > BATCHES_PER_REQUEST_MAX:
        raise Invalid(f"{len(batches)} batches in one request; send at most {BATCHES_PER_REQUEST_MAX}.")


class _InFlight:
    """What each credential has on its way, so that one sender cannot take the room of all others."""

    def __init__(self) -> None:
        self._batches: dict[int, int] = {}
        self._bytes: dict[int, int] = {}

    def check_room(self, credential_id: int) -> None:
        """Raise SlowDown where as much is on its way as one credential may have. What is taken then may go past it, once."""
        batches, size = self._batches.get(credential_id, 0), self._bytes.get(credential_id, 0)
        if batches >= BATCHES_IN_FLIGHT_MAX or size >= BYTES_IN_FLIGHT_MAX:
            raise SlowDown(
                f"This key has {batches} batches ({size} bytes) on their way; nothing was taken, send again.",
                retry_after_s=RETRY_AFTER_S,
            )

    def add(self, credential_id: int, batches: Iterable[Sequence[Share]]) -> None:
        """Count batches until they are settled. A batch in several publishes counts with the last of them."""
        of_commit: dict[Commit, list[int]] = {}
        for shares in batches:
            for share in shares:
                of_commit.setdefault(share.commit, [0, 0])[1] += share.bytes
            if shares:
                of_commit[shares[-1].commit][0] += 1
        for commit, (count, size) in of_commit.items():
            self._change(credential_id, count, size)
            commit.when_settled(functools.partial(self._change, credential_id, -count, -size))

    def _change(self, credential_id: int, count: int, size: int) -> None:
        self._batches[credential_id] = self._batches.get(credential_id, 0) + count
        self._bytes[credential_id] = self._bytes.get(credential_id, 0) + size
        if not self._bytes[credential_id]:
            del self._batches[credential_id], self._bytes[credential_id]


@dataclass(frozen=True)
class Unread:
    """Part of what was sent that no batch could be made of."""

    reason: str
    detail: str
    raw: bytes
    samples: int = 0
    machine_id: int = 0


@dataclass(frozen=True)
class LinesResult:
    """What became of line protocol. `faults`: what no batch could be made of; it is in quarantine."""

    results: list[telemetry_pb2.BatchResult]
    faults: list[Fault]

    @property
    def accepted(self) -> int:
        return sum(result.accepted for result in self.results)

    @property
    def quarantined(self) -> int:
        """Samples; a line that could not be read at all counts none."""
        return sum(result.quarantined for result in self.results) + sum(fault.samples for fault in self.faults)


class Door:
    """Checks batches and commits them to the message log; every protocol's edge calls this one."""

    def __init__(
        self, directory: Directory, group_commit: GroupCommit, clock: Clock, sightings: Sightings, buckets: Buckets
    ) -> None:
        self._check = FrameCheck(directory, clock)
        self._sightings = sightings
        self._buckets = buckets
        self._group_commit = group_commit
        self._in_flight = _InFlight()
        self._clock = clock

    def sender(self, caller: Caller, source: str, door: str) -> Sender:
        """Who sends, after a check that it may. Raises Forbidden, Invalid."""
        if caller.role not in (Role.DEVICE, Role.FIRM):
            detail = f"A key of role {caller.role} sends no telemetry; give the gateway a device key."
            unnamed = Sender(caller.firm_id, caller.credential_id, "", door, "")
            self._sightings.refused(unnamed, Reason.FORBIDDEN, detail)
            raise Forbidden(detail)
        try:
            source = (
                check_text(source, what="source", length_max=128) if source else f"credential-{caller.credential_id}"
            )
        except ValueError as error:
            invalid = Invalid(str(error))
            self.note_refused(Sender(caller.firm_id, caller.credential_id, "", door, ""), invalid)
            raise invalid from error
        return Sender(caller.firm_id, caller.credential_id, source, door, current_correlation_id())

    def check(self, sender: Sender, batches: Sequence[telemetry_pb2.Batch]) -> list[telemetry_pb2.BatchResult]:
        """What would become of batches; nothing is kept or counted. Raises Invalid."""
        _check_number(batches)
        return [_result(self._check.check(sender, batch)) for batch in batches]

    def check_number(self, sender: Sender, batches: Sequence[telemetry_pb2.Batch]) -> None:
        """Raise Invalid for more batches than one request may have."""
        try:
            _check_number(batches)
        except Invalid as error:
            self._count_refused(sender, batches)
            self.note_refused(sender, error)
            raise

    def take(
        self,
        sender: Sender,
        batches: Sequence[telemetry_pb2.Batch],
        *,
        following: Sequence[telemetry_pb2.Batch] = (),
    ) -> list[Taken]:
        """Check batches and put them on their way, in order. Raises SlowDown (nothing was taken), Invalid.

        `following`: what is taken next, if that is known.
        """
        bucket = self._admit(sender, batches)
        checked = [self._check.check(sender, batch) for batch in batches]
        self._note_more(sender, checked, following)
        taken = [self._take(sender, batch, one) for batch, one in zip(batches, checked, strict=True)]
        accepted = sum([one.checked.accepted for one in taken])
        bucket.spend(accepted + sum([record.samples for one in taken for record in one.checked.quarantine]))
        _accepted_total(sender.door).inc(accepted)
        self._in_flight.add(sender.credential_id, [one.shares for one in taken])
        if tracing.is_on():
            tracing.note("door take", [sender.correlation_id], seconds=0, kind="producer")
        return taken

    async def send(
        self, sender: Sender, batches: Sequence[telemetry_pb2.Batch], unread: Iterable[Unread] = ()
    ) -> list[telemetry_pb2.BatchResult]:
        """Take any number of batches and wait until they are durable, and `unread` in quarantine. Raises SlowDown, TryAgain.

        Batches of one sequence after each other are one batch of the sender's. Many rows are taken part by part: after an error
        some may be durable already; sent again they are stored once.
        """
        if not batches:
            self._admit(sender, batches)
        results: list[telemetry_pb2.BatchResult] = []
        for part in parts(batches):
            rest = batches[len(results) + len(part) :]
            try:
                taken = self.take(sender, part, following=rest)
            except HubError:
                self._count_refused(sender, rest)
                raise
            try:
                await durable(taken)
            except HubError as error:
                self.note_refused(sender, error)
                raise
            results += [one.result() for one in taken]
        await self._put_aside(sender, unread)
        return results

    async def send_lines(self, sender: Sender, body: bytes, precision: str) -> LinesResult:
        """Take line protocol and wait until it is durable. Raises SlowDown, TryAgain, TooLarge (too many machines or faults).

        After an error a part may be durable already: sent again it is stored once.
        """
        now_us = self._clock.now_us()
        try:
            if len(body) > LINES_BYTES_AT_ONCE:
                # Reading many lines takes long; other senders are served meanwhile.
                reading = await asyncio.to_thread(read, body, precision=precision, now_us=now_us)
            else:
                reading = read(body, precision=precision, now_us=now_us)
        except TooMany as error:
            too_large = TooLarge(f"The body has {error}; nothing was taken, send it in smaller parts.")
            self.note_refused(sender, too_large)
            raise too_large from error
        to_send = batches(reading.blocks, lambda machine, path: self._check.signals_of(sender, machine, path))
        if len(to_send) > BATCHES_PER_REQUEST_MAX:
            too_many = TooLarge(
                f"The lines make {len(to_send)} batches; send at most {BATCHES_PER_REQUEST_MAX} at once."
            )
            self.note_refused(sender, too_many)
            raise too_many
        results = await self.send(sender, to_send, map(_unread, by_reason(reading.faults)))
        return LinesResult(results, reading.faults)

    def machine_id(self, sender: Sender, machine_id: int, path: str) -> int:
        """The machine of the sender's firm that is named so; 0: there is none."""
        return self._check.machine_id(sender, machine_id, path)

    def note_refused(self, sender: Sender, error: HubError) -> None:
        """Telemetry was sent back with this error and is not kept: whoever looks for it shall find out."""
        refusals_total.labels(error.reason).inc()
        self._sightings.refused(sender, error.reason, error.detail)

    def note_offline(self, sender: Sender, machine_id: int, detail: str) -> None:
        """The sender says that this machine sends no more: whoever looks for its data shall find out."""
        self._sightings.refused(sender, Reason.NODE_OFFLINE, detail, machine_id=machine_id)

    async def set_aside(
        self, sender: Sender, reason: str, detail: str, raw: bytes, samples: int = 0, *, machine_id: int = 0
    ) -> None:
        """Quarantine input of a valid sender that no batch could be read from. Raises TryAgain."""
        await self._put_aside(sender, [Unread(reason, detail, raw, samples, machine_id)])

    async def keep_aside(
        self, sender: Sender, reason: str, detail: str, batches: Sequence[telemetry_pb2.Batch]
    ) -> None:
        """Quarantine batches that can be replayed, of a sender that nobody can tell to wait. Raises TryAgain."""
        commits = []
        for batch in batches:
            absent = sum(byte.bit_count() for byte in batch.absent)
            samples, now_us = len(batch.values) - absent, self._clock.now_us()
            whole, machine_id = batch.SerializeToString(), batch.machine_id
            record = quarantined(sender, reason, detail, samples, now_us, batch=whole, machine_id=machine_id)
            self._sightings.refused(sender, reason, detail, machine_id=machine_id, samples=samples)
            samples_total.labels(sender.door, "quarantined").inc(samples)
            quarantined_total.labels(reason).inc(samples)
            commits.append(self._group_commit.put_quarantine(record).commit)
        await asyncio.gather(*(commit.wait() for commit in dict.fromkeys(commits)))

    async def note_malformed(self, caller: Caller, method: str, raw: bytes) -> None:
        """A gRPC body that is no message: quarantine it if it was meant as telemetry."""
        if "TelemetryService" in method and caller.firm_id:
            sender = self.sender(caller, "", "grpc")
            await self.set_aside(sender, Reason.MALFORMED, f"The body is not a message of {method}.", raw)

    async def _put_aside(self, sender: Sender, unread: Iterable[Unread]) -> None:
        """Quarantine it, some at a time. Raises TryAgain."""
        rest = iter(unread)
        while some := list(islice(rest, UNREAD_AT_ONCE)):
            shares = []
            for one in some:
                record = quarantined(sender, one.reason, one.detail, one.samples, self._clock.now_us(), raw=one.raw)
                samples_total.labels(sender.door, "quarantined").inc(one.samples)
                quarantined_total.labels(one.reason).inc(one.samples)
                self._sightings.refused(sender, one.reason, one.detail, machine_id=one.machine_id, samples=one.samples)
                size = len(one.raw)
                log.info("input set aside", reason=one.reason, firm_id=sender.firm_id, source=sender.source, bytes=size)
                shares.append(self._group_commit.put_quarantine(record))
            self._buckets.spend(sender.firm_id, sum(one.samples for one in some))
            self._in_flight.add(sender.credential_id, [shares])
            await asyncio.gather(*(commit.wait() for commit in dict.fromkeys(share.commit for share in shares)))

    def _admit(self, sender: Sender, batches: Sequence[telemetry_pb2.Batch]) -> Bucket:
        """The firm's bucket, to be spent from, where there is room for more. Raises SlowDown, Invalid."""
        _requests_total(sender.door).inc()
        try:
            _check_number(batches)
            self._group_commit.check_room()
            self._in_flight.check_room(sender.credential_id)
            return self._buckets.checked(sender.firm_id)
        except HubError as error:
            self._count_refused(sender, batches)
            self.note_refused(sender, error)
            raise

    @staticmethod
    def _count_refused(sender: Sender, batches: Sequence[telemetry_pb2.Batch]) -> None:
        samples_total.labels(sender.door, "refused").inc(sum(len(batch.values) for batch in batches))

    def _note_more(self, sender: Sender, checked: Sequence[Checked], following: Sequence[telemetry_pb2.Batch]) -> None:
        """Batches of one sequence after each other are one batch of the sender's: in each partition its last frames end it."""
        sequence, ended = 0, set[int]()
        for batch in following:
            sequence = sequence or batch.sequence
            if batch.sequence != sequence or not sequence:
                break
            if machine_id := self._check.machine_id(sender, batch.machine_id, batch.machine_path):
                ended.add(self._group_commit.partition_of(machine_id))
        for one in reversed(checked):
            if one.sequence != sequence:
                sequence, ended = one.sequence, set()
            for frames in reversed(one.frames) if sequence else ():
                partition = self._group_commit.partition_of(frames.machine_id)
                if partition in ended:
                    frames.more = True
                ended.add(partition)

    def _take(self, sender: Sender, batch: telemetry_pb2.Batch, checked: Checked) -> Taken:
        shares = [self._group_commit.put_frames(frames) for frames in checked.frames]
        if checked.accepted and sender.is_live:
            self._sightings.taken(sender, checked.machine_id, checked.received_us, checked.newest_us)
        if checked.unknown:
            self._sightings.proposed(sender, checked.machine_id, checked.unknown)
        for record in checked.quarantine:
            shares.append(self._group_commit.put_quarantine(record))
            samples_total.labels(sender.door, "quarantined").inc(record.samples)
            quarantined_total.labels(record.reason).inc(record.samples)
            self._sightings.refused(
                sender,
                record.reason,
                record.detail,
                machine_id=checked.machine_id,
                subject="" if checked.machine_id else batch.machine_path or f"id {batch.machine_id}",
                samples=record.samples,
                clock_off_us=checked.clock_off_us if record.reason == Reason.TIME_OUT_OF_WINDOW else 0,
            )
            log.info(
                "samples quarantined",
                reason=record.reason,
                samples=record.samples,
                firm_id=sender.firm_id,
                source=sender.source,
                quarantine_id=record.id,
            )
        return Taken(checked, shares)


def _unread(faults: Sequence[Fault]) -> Unread:
    """Lines that were refused for one reason."""
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    detail = f"line {faults[0].line}: {faults[0].detail}{more}"
    raw = b"\n".join(dict.fromkeys(fault.raw for fault in faults))
    return Unread(faults[0].reason, detail, raw, sum(fault.samples for fault in faults))
