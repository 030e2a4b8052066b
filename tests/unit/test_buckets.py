"""Quotas of samples a second: a firm that goes over is told when to come back, wherever its gateways connect."""

import pytest

from services.common.directory import Directory
from services.common.errors import SlowDown
from services.common.kafka import Cluster
from services.ingest.domain import QUOTA_BURST_S, QUOTA_SAMPLES_PER_S_DEFAULT
from services.ingest.registry.quota_store import Others
from services.ingest.telemetry.buckets import SHARE_INTERVAL_S, Buckets
from smdih.directory.v1 import directory_pb2
from tests.unit.test_frames import FixedClock

QUOTA = 100


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def buckets_with(time: Time) -> Buckets:
    directory = Directory(Cluster("nowhere"), clock=FixedClock(), kinds=("firm",))
    directory.firms[1] = directory_pb2.Firm(id=1, quota=directory_pb2.Quota(samples_per_s=QUOTA))
    return Buckets(directory, time)


def test_a_burst_is_taken_and_then_the_rate_holds() -> None:
    time = Time()
    buckets = buckets_with(time)
    buckets.checked(1).spend(QUOTA * QUOTA_BURST_S + 500)
    with pytest.raises(SlowDown) as refused:
        buckets.checked(1)
    assert (refused.value.reason, refused.value.retry_after_s) == ("QUOTA_SAMPLES", 6)
    time.now_s += 6
    buckets.checked(1).spend(QUOTA)
    with pytest.raises(SlowDown):
        buckets.checked(1)
    taken = 0
    for _ in range(1000):
        time.now_s += 0.1
        try:
            buckets.checked(1).spend(20)
            taken += 20
        except SlowDown:
            pass
    assert taken == pytest.approx(QUOTA * 100, rel=0.01)


def test_other_firms_are_not_touched_and_have_the_default() -> None:
    buckets = buckets_with(Time())
    buckets.checked(1).spend(10**9)
    buckets.checked(2).spend(QUOTA_SAMPLES_PER_S_DEFAULT * QUOTA_BURST_S - 1)
    buckets.checked(2)


def test_the_wait_that_is_asked_for_is_bounded() -> None:
    buckets = buckets_with(Time())
    buckets.checked(1).spend(10**12)
    with pytest.raises(SlowDown) as refused:
        buckets.checked(1)
    assert refused.value.retry_after_s == 60


def test_a_debt_is_not_forgiven_to_those_who_wait() -> None:
    time = Time()
    buckets = buckets_with(time)
    buckets.checked(1).spend(QUOTA * QUOTA_BURST_S * 3)  # two minutes' worth of debt
    for _ in range(23):
        buckets.measured()
        time.now_s += SHARE_INTERVAL_S
    with pytest.raises(SlowDown):
        buckets.checked(1)
    for _ in range(13):
        buckets.measured()
        time.now_s += SHARE_INTERVAL_S
    assert buckets.measured() == {1: 0.0}  # full again
    assert buckets.measured() == {}


@pytest.mark.parametrize("wishes", [(1000, 1000), (1000, 0), (1000, 30), (40, 40), (1000, 1000, 1000)])
def test_several_doors_together_keep_the_quota(wishes: tuple[int, ...]) -> None:
    """Each door wants so many samples a second; what they take together settles at the quota, or at what is wanted."""
    time = Time()
    doors = [buckets_with(time) for _ in wishes]
    for door in doors:
        door.checked(1).tokens = 0.001  # the burst is used up
    taken = [0.0] * len(doors)
    rounds = []
    for _ in range(60):
        begun = sum(taken)
        for _ in range(int(SHARE_INTERVAL_S * 100)):
            time.now_s += 0.01
            for number, (door, wish) in enumerate(zip(doors, wishes, strict=True)):
                try:
                    door.checked(1).spend(wish / 100)
                    taken[number] += wish / 100
                except SlowDown:
                    pass
        rates = [door.measured().get(1, 0.0) for door in doors]
        for number, door in enumerate(doors):
            others = [rate for other, rate in enumerate(rates) if other != number and rate > 0]
            door.share({1: Others(sum(others), len(others))} if others else {})
        rounds.append((sum(taken) - begun) / SHARE_INTERVAL_S)
    assert sum(rounds[30:]) / 30 == pytest.approx(min(QUOTA, sum(wishes)), rel=0.1)
