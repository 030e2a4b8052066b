"""Queries of one key wait for one another, so that a board with a hundred panels leaves room for everybody else."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from services.common.errors import SlowDown
from services.common.identity import Caller

# Of one key: half of the connections that a process has by default.
AT_ONCE_MAX = 4
WAITING_MAX = 100
RETRY_AFTER_S = 2


class Turns:
    def __init__(self, *, at_once: int = AT_ONCE_MAX, waiting: int = WAITING_MAX) -> None:
        self._at_once = at_once
        self._waiting = waiting
        self._lanes: dict[int, _Lane] = {}

    @asynccontextmanager
    async def of(self, caller: Caller) -> AsyncIterator[None]:
        """Wait for this key's turn. Raises SlowDown when too many wait already."""
        lane = self._lanes.setdefault(caller.credential_id, _Lane(self._at_once))
        if lane.queries >= self._at_once + self._waiting:
            raise SlowDown(
                f"{self._waiting} queries of this key are waiting already; let some end first.",
                reason="TOO_MANY_QUERIES",
                retry_after_s=RETRY_AFTER_S,
            )
        lane.queries += 1
        try:
            async with lane.turn:
                yield
        finally:
            lane.queries -= 1
            if not lane.queries:
                del self._lanes[caller.credential_id]


class _Lane:
    """Of one key: how many queries there are, waiting ones too, and whose turn it is."""

    def __init__(self, at_once: int) -> None:
        self.queries = 0
        self.turn = asyncio.Semaphore(at_once)
