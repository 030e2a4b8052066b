from contextlib import ExitStack

import pytest

from services.anomaly.service import WATCHER_QUEUE_MAX, WATCHERS_MAX, WATCHERS_OF_A_FIRM_MAX, AlarmFeed
from services.common.errors import Forbidden, SlowDown
from services.common.identity import Caller, Role
from smdih.anomaly.v1 import events_pb2 as pb

OPERATOR = Caller(credential_id=1, role=Role.OPERATOR)


def event(number: int, firm_id: int = 7) -> pb.AlarmEvent:
    return pb.AlarmEvent(event_id=str(number), alarm=pb.Alarm(firm_id=firm_id))


async def test_a_firm_hears_only_of_its_own_alarms() -> None:
    feed = AlarmFeed()
    with feed.watch(Caller(credential_id=2, role=Role.FIRM, firm_id=7), firm_id=0) as events:
        feed.tell(event(1, firm_id=8))
        feed.tell(event(2, firm_id=7))
        assert (await anext(events))[0].event_id == "2"


async def test_a_slow_reader_gets_what_waits_and_is_then_told_and_ended() -> None:
    feed = AlarmFeed()
    with feed.watch(OPERATOR, firm_id=0) as slow, feed.watch(OPERATOR, firm_id=0) as quick:
        for number in range(WATCHER_QUEUE_MAX + 1):
            feed.tell(event(number))
            assert (await anext(quick))[0].event_id == str(number)
        for number in range(WATCHER_QUEUE_MAX):
            assert (await anext(slow))[0].event_id == str(number)
        with pytest.raises(SlowDown, match="watch again"):
            await anext(slow)


async def test_one_firm_does_not_take_all_places() -> None:
    feed = AlarmFeed()
    firm = Caller(credential_id=2, role=Role.FIRM, firm_id=7)
    with ExitStack() as watching:
        for _ in range(WATCHERS_OF_A_FIRM_MAX):
            watching.enter_context(feed.watch(OPERATOR, firm_id=7))
            watching.enter_context(feed.watch(firm, firm_id=0))
        with pytest.raises(SlowDown, match="end one first"):
            feed.admit(firm, firm_id=7)
        feed.admit(Caller(credential_id=3, role=Role.FIRM, firm_id=8), firm_id=0)
        feed.admit(OPERATOR, firm_id=7)
        for _ in range(WATCHERS_MAX - 2 * WATCHERS_OF_A_FIRM_MAX):
            watching.enter_context(feed.watch(OPERATOR, firm_id=0))
        with pytest.raises(SlowDown, match="Too many"):
            feed.admit(OPERATOR, firm_id=0)
    feed.admit(firm, firm_id=0)


async def test_who_may_not_see_alarms_may_not_watch_them() -> None:
    feed = AlarmFeed()
    with (
        pytest.raises(Forbidden),
        feed.watch(Caller(credential_id=3, role=Role.DEVICE, firm_id=7), firm_id=0),
    ):
        pass
    with (
        pytest.raises(Forbidden),
        feed.watch(Caller(credential_id=2, role=Role.FIRM, firm_id=7), firm_id=8),
    ):
        pass
