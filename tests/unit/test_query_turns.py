"""One key's queries wait for one another and for nobody else's."""

import asyncio
from typing import cast

import pytest

from services.common.database import Pool
from services.common.directory import Directory
from services.common.errors import SlowDown
from services.common.identity import Caller, Role
from services.common.kafka import Cluster
from services.ingest.queries.absent import ABSENT_S, Absent
from services.ingest.queries.access import Access
from services.ingest.queries.queries import Queries
from services.ingest.queries.turns import Turns
from smdih.directory.v1 import directory_pb2
from tests.unit.test_frames import FixedClock

START_US, END_US = 1_760_000_000_000_000, 1_760_000_001_000_000
BUSY, OTHER = Caller(1, Role.FIRM, firm_id=1), Caller(2, Role.FIRM, firm_id=2)


async def test_a_key_with_many_queries_waits_and_is_refused_in_the_end_while_another_goes_on() -> None:
    turns, go_on, running = Turns(at_once=2, waiting=3), asyncio.Event(), []

    async def query(number: int) -> None:
        async with turns.of(BUSY):
            running.append(number)
            await go_on.wait()

    tasks = [asyncio.create_task(query(number)) for number in range(5)]
    await asyncio.sleep(0)
    assert running == [0, 1]
    with pytest.raises(SlowDown) as caught:
        await query(5)
    assert caught.value.reason == "TOO_MANY_QUERIES"
    async with turns.of(OTHER):
        assert running == [0, 1]
    tasks.pop().cancel()  # one that waits goes away
    go_on.set()
    await asyncio.gather(*tasks)
    assert sorted(running) == [0, 1, 2, 3]
    await query(6)
    assert turns._lanes == {}


async def test_the_newest_values_and_pages_of_history_wait_for_their_turn_as_well() -> None:
    directory = Directory(Cluster("nowhere"), clock=FixedClock(), kinds=("machine",))
    machine = directory_pb2.Machine(id=5, firm_id=1)
    directory.machines.entries[5] = directory_pb2.DirectoryEntry(machine=machine).SerializeToString()
    turns = Turns(at_once=1, waiting=0)
    no_pool, no_access = cast(Pool, None), cast(Access, None)
    queries = Queries(no_pool, directory, no_access, turns)
    async with turns.of(BUSY):
        with pytest.raises(SlowDown):
            await queries.latest(BUSY, 5)
        with pytest.raises(SlowDown):
            await queries.history(BUSY, 1, START_US, END_US, "raw", 0, "")


def test_what_was_not_found_is_looked_for_again_after_a_while() -> None:
    now_s = 0.0
    absent = Absent(lambda: now_s)
    assert absent.of((5, 0)) == []
    absent.note((5, 0), {2, 3})
    assert absent.of((5, 0)) == [2, 3]
    assert absent.of((5, 200)) == []
    now_s = ABSENT_S / 2
    absent.note((5, 0), {3})  # the other has come, which puts nothing off
    assert absent.of((5, 0)) == [3]
    now_s = ABSENT_S
    assert absent.of((5, 0)) == []
    absent.note((5, 0), {3})
    assert absent.of((5, 0)) == [3]
