"""Wait for something by asking, with a deadline."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def eventually(condition: Callable[[], Awaitable[bool]], *, deadline_s: float = 20) -> None:
    """Return as soon as the condition holds; fail the test when it does not by the deadline."""
    until = time.monotonic() + deadline_s
    while not await condition():
        assert time.monotonic() < until, f"{getattr(condition, '__name__', 'it')} did not happen in {deadline_s} s"
        await asyncio.sleep(0.05)
