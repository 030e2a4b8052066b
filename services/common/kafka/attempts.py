"""Liveness of a loop that works through a topic: that it tries, not that it gets on."""

import asyncio
import time
from collections.abc import Awaitable, Callable

# An attempt to store records that takes longer is broken off, and one with fewer of them is made.
ATTEMPT_S_MAX = 120
# Longer than an attempt, with what it takes to end a broken off one.
SILENCE_S_MAX = 180
ANSWER_TIMEOUT_S = 2


class Attempts:
    """When the loop last came to an end of what it tried, well or not.

    Being started anew costs a rebalance and what was under way, and brings back neither a database nor a broker: so work that
    fails again and again is no reason for it, and neither is silence while no broker answers. An alert tells of both
    (`smdih_kafka_stalled_seconds`).
    """

    def __init__(self, brokers_answer: Callable[[], Awaitable[bool]], *, silence_s_max: float = SILENCE_S_MAX) -> None:
        self._brokers_answer = brokers_answer
        self._silence_s_max = silence_s_max
        self._ended_at = time.monotonic()

    def ended(self) -> None:
        """An attempt ended, or there was nothing to try."""
        self._ended_at = time.monotonic()

    async def go_on(self) -> bool:
        """False: the loop hangs, or the client library gives it nothing of what there is. A new start helps."""
        if time.monotonic() - self._ended_at < self._silence_s_max:
            return True
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return not await self._brokers_answer()
        except TimeoutError:
            return True
