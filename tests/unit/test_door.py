"""The door keeps one sender from taking the room of the others."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from services.common.directory import Directory
from services.common.errors import HubError, SlowDown, TooLarge
from services.common.identity import Caller, Role
from services.common.kafka import Cluster, Publisher
from services.common.rpc import _caller
from services.ingest.diagnosis.sightings import Sightings
from services.ingest.domain import Sender
from services.ingest.telemetry import door
from services.ingest.telemetry.buckets import Buckets
from services.ingest.telemetry.door import Door, Unread
from services.ingest.telemetry.groupcommit import PAYLOAD_BYTES_MAX, GroupCommit
from services.ingest.telemetry.rpc import STREAM_BATCHES_MAX, STREAM_BYTES_MAX, TelemetryServicer
from smdih.directory.v1 import directory_pb2
from smdih.ingest.v1 import records_pb2, telemetry_pb2
from tests.unit.test_frames import NOW_US, FixedClock


class HeldPublisher:
    """A message log that answers when told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.error: Exception | None = None
        self.published: list[Any] = []

    async def publish(self, *what: Any, **_: Any) -> None:
        self.published.append(what)
        await self.go.wait()
        if self.error is not None:
            raise self.error

    async def publish_all(self, messages: Any) -> None:
        await self.publish(messages, b"")


def door_with(publisher: HeldPublisher) -> Door:
    directory = Directory(Cluster("nowhere"), clock=FixedClock(), kinds=("machine",))
    signals = [directory_pb2.Signal(id=1, name="a"), directory_pb2.Signal(id=2, name="b", range_max=1)]
    machine = directory_pb2.Machine(id=5, firm_id=1, path="acme/works/press", signals=signals)
    for machine.id in (5, 6):
        directory.machines.entries[machine.id] = directory_pb2.DirectoryEntry(machine=machine).SerializeToString()
    directory.firms[1] = directory_pb2.Firm(id=1, quota=directory_pb2.Quota(samples_per_s=10_000_000))
    group_commit = GroupCommit(cast(Publisher, publisher), partitions=2)
    return Door(directory, group_commit, FixedClock(), Sightings(FixedClock()), Buckets(directory))


def sender(credential_id: int) -> Sender:
    return Sender(firm_id=1, credential_id=credential_id, source="s", door="grpc", correlation_id="c")


def batch(value: float = 0.0) -> telemetry_pb2.Batch:
    return telemetry_pb2.Batch(machine_id=5, times_us=[NOW_US], values=[1.0, value])


@pytest.mark.parametrize("error", [None, ValueError("unknown")])
async def test_a_credential_with_too_much_on_its_way_is_told_to_wait_and_others_are_not(
    error: Exception | None,
) -> None:
    publisher = HeldPublisher()
    publisher.error = error
    one = door_with(publisher)
    taken = one.take(sender(1), [batch()] * 9_999)
    taken += one.take(sender(1), [batch(2.0)] * 9_999)  # half of each of these goes to quarantine
    taken += one.take(sender(1), [batch()] * 2)
    with pytest.raises(SlowDown) as refused:
        one.take(sender(1), [batch()])
    assert refused.value.retry_after_s
    taken += one.take(sender(2), [batch()])
    publisher.go.set()
    settled = await asyncio.gather(*(each.durable() for each in taken), return_exceptions=True)
    if error is None:
        assert set(settled) == {None}
    else:
        assert all(isinstance(each, HubError) and each.retry_after_s for each in settled)
    await asyncio.sleep(0)  # callbacks run after those who waited
    one.take(sender(1), [batch()] * 10_000)


async def test_bytes_count_as_well_as_batches() -> None:
    publisher = HeldPublisher()
    one = door_with(publisher)
    rows = 100_000
    large = telemetry_pb2.Batch(machine_id=5, times_us=range(NOW_US - rows, NOW_US), values=[0.5] * rows * 2)
    for _ in range(door.BYTES_IN_FLIGHT_MAX // (rows * 24) + 1):
        one.take(sender(1), [large])
    with pytest.raises(SlowDown):
        one.take(sender(1), [large])
    one.take(sender(2), [large])
    publisher.go.set()


async def test_many_parts_that_could_not_be_read_need_few_publishes() -> None:
    publisher = HeldPublisher()
    publisher.go.set()
    unread = [Unread("WRONG_TYPE", "a text", b"%d" % number, samples=1) for number in range(1_000)]
    await door_with(publisher).send(sender(1), [batch()], unread)
    assert len(publisher.published) <= 30


async def test_a_body_that_nothing_could_be_read_of_counts_and_has_its_limits() -> None:
    publisher = HeldPublisher()
    publisher.go.set()
    one = door_with(publisher)
    await one.send(sender(1), [], [Unread("WRONG_TYPE", "a text", b"x", samples=2**31 - 1)])
    with pytest.raises(SlowDown) as refused:
        await one.send(sender(1), [], [Unread("WRONG_TYPE", "a text", b"y", samples=1)])
    assert refused.value.reason == "QUOTA_SAMPLES"


async def test_a_batch_in_several_parts_ends_with_its_last_frames_in_each_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where no frames end it the historian takes what is sent again for a correction."""

    def part(sequence: int, machine_id: int, value: float = 0.0) -> telemetry_pb2.Batch:
        return telemetry_pb2.Batch(
            sequence=sequence, machine_id=machine_id, times_us=[NOW_US], positions=[1], values=[value]
        )

    parts = [
        part(17, 5),
        part(17, 6),
        part(17, 5),
        part(17, 5, 9.0),
        part(17, 999),
        part(18, 6),
        part(0, 6),
        part(0, 6),
    ]
    publisher = HeldPublisher()
    publisher.go.set()
    for rows in (10_000, 1):
        monkeypatch.setattr(door, "ROWS_AT_ONCE", rows)
        publisher.published.clear()
        await door_with(publisher).send(sender(1), parts if rows > 1 else [parts[n] for n in (0, 1, 2, 5)])
        records = [records_pb2.SamplesRecord.FromString(value) for topic, value in publisher.published if value]
        found = [(one.machine_id, one.sequence, one.more) for record in records for one in record.batches]
        assert [one for one in found if one[0] == 5] == [(5, 17, True), (5, 17, False)]
        assert [one for one in found if one[0] == 6 and one[1]] == [(6, 17, False), (6, 18, False)]
    publisher.published.clear()
    rows = 50_000  # more than go as one
    large = telemetry_pb2.Batch(
        sequence=19, machine_id=5, times_us=range(NOW_US - rows, NOW_US), values=[0.5] * rows * 2
    )
    await door_with(publisher).send(sender(1), [large])
    records = [records_pb2.SamplesRecord.FromString(value) for _, value in publisher.published]
    assert [one.more for record in records for one in record.batches] == [True, False]


async def test_what_no_record_can_hold_fails_alone() -> None:
    publisher = HeldPublisher()
    group_commit = GroupCommit(cast(Publisher, publisher), partitions=1)
    before = group_commit.put_frames(records_pb2.FrameBatch(machine_id=1))
    large = group_commit.put_frames(records_pb2.FrameBatch(machine_id=1, values=bytes(PAYLOAD_BYTES_MAX)))
    after = group_commit.put_frames(records_pb2.FrameBatch(machine_id=1))
    publisher.go.set()
    with pytest.raises(TooLarge):
        await large.commit.wait()
    await asyncio.gather(before.commit.wait(), after.commit.wait())


async def test_nobody_is_told_that_another_senders_batch_is_too_large() -> None:
    """As from a broker that takes less than we think."""
    publisher = HeldPublisher()
    publisher.error = TooLarge()
    group_commit = GroupCommit(cast(Publisher, publisher), partitions=1)
    shares = [group_commit.put_frames(records_pb2.FrameBatch(machine_id=1)) for _ in range(2)]
    await asyncio.sleep(0)  # they are on their way together
    shares.append(group_commit.put_frames(records_pb2.FrameBatch(machine_id=1)))
    publisher.go.set()
    settled = await asyncio.gather(*(share.commit.wait() for share in shares), return_exceptions=True)
    assert [getattr(each, "reason", "") for each in settled] == ["TRY_AGAIN"] * 3


def test_rows_are_taken_some_at_a_time_and_none_is_left_out() -> None:
    sent = [telemetry_pb2.Batch(sequence=n, times_us=range(rows)) for n, rows in enumerate((1, 9_999, 1, 30_000, 2, 3))]
    assert [[one.sequence for one in part] for part in door.parts(sent)] == [[0, 1], [2], [3], [4, 5]]
    assert list(door.parts([])) == []
    assert [len(part) for part in door.parts([batch()] * 20_001)] == [10_000, 10_000, 1]


@pytest.mark.parametrize(("rows", "a_message", "read_most"), [(1, 100, STREAM_BATCHES_MAX // 100), (10_000, 1, 35)])
async def test_a_stream_is_read_no_further_than_may_be_on_its_way_and_goes_on_once_it_is_durable(
    rows: int, a_message: int, read_most: int
) -> None:
    """By batches or by bytes, which are 24 a row here."""
    assert 34 * 10_000 * 24 < STREAM_BYTES_MAX <= 35 * 10_000 * 24
    publisher = HeldPublisher()
    servicer = TelemetryServicer(door_with(publisher))
    _caller.set(Caller(1, Role.DEVICE, firm_id=1))
    large = telemetry_pb2.Batch(machine_id=5, times_us=range(NOW_US - rows, NOW_US), values=[0.5] * rows * 2)
    messages, read = read_most * 2, 0

    async def requests() -> AsyncIterator[telemetry_pb2.StreamBatchesRequest]:
        nonlocal read
        while read < messages:
            read += 1
            batches = [large] * a_message
            for number, one in enumerate(batches):
                one.sequence = read * a_message + number
            yield telemetry_pb2.StreamBatchesRequest(source="s", batches=batches)

    last = telemetry_pb2.StreamBatchesResponse()

    async def listen() -> None:
        async for answer in servicer.StreamBatches(requests(), None):
            last.CopyFrom(answer)

    listening = asyncio.create_task(listen())
    for _ in range(messages * 3):
        await asyncio.sleep(0)
    assert read == read_most + 1  # one more is in hand, and not taken
    assert last.acknowledged_batches == 0
    publisher.go.set()
    await asyncio.wait_for(listening, 30)
    assert (read, last.acknowledged_batches) == (messages, messages * a_message)
    assert last.accepted == messages * a_message * rows * 2
