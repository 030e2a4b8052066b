"""One key's queries wait for one another and for nobody else's."""

import asyncio

import pytest

from services.common.errors import SlowDown
from services.common.identity import Caller, Role
from services.ingest.queries.turns import Turns

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
