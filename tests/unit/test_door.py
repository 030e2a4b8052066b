"""The door keeps one sender from taking the room of the others."""

import asyncio
from typing import Any, cast

import pytest

from services.common.directory import Directory
from services.common.errors import HubError, SlowDown
from services.common.kafka import Cluster, Publisher
from services.ingest.diagnosis.sightings import Sightings
from services.ingest.domain import Sender
from services.ingest.telemetry import door
from services.ingest.telemetry.buckets import Buckets
from services.ingest.telemetry.door import Door
from services.ingest.telemetry.groupcommit import GroupCommit
from smdih.directory.v1 import directory_pb2
from smdih.ingest.v1 import telemetry_pb2
from tests.unit.test_frames import NOW_US, FixedClock


class HeldPublisher:
    """A message log that answers when told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.error: Exception | None = None

    async def publish(self, *_: Any, **__: Any) -> None:
        await self.go.wait()
        if self.error is not None:
            raise self.error

    publish_all = publish


def door_with(publisher: HeldPublisher) -> Door:
    directory = Directory(Cluster("nowhere"), clock=FixedClock(), kinds=("machine",))
    signals = [directory_pb2.Signal(id=1, name="a"), directory_pb2.Signal(id=2, name="b", range_max=1)]
    machine = directory_pb2.Machine(id=5, firm_id=1, path="acme/works/press", signals=signals)
    directory.machines.entries[5] = directory_pb2.DirectoryEntry(machine=machine).SerializeToString()
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
