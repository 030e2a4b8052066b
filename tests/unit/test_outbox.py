"""The relay of the outbox, with a publisher that is slow."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from services.common.errors import TooLarge
from services.common.kafka import Message
from services.common.outbox import EVENT_BYTES_MAX, OutboxRelay


class _Box:
    """A database with one lock, and events in it."""

    def __init__(self, values: Sequence[bytes]) -> None:
        self.values = dict(enumerate(values))
        self.is_locked = False

    @asynccontextmanager
    async def acquire(self, timeout: float) -> AsyncIterator["_Box"]:
        yield self

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        self.is_locked = True
        try:
            yield
        finally:
            self.is_locked = False

    async def fetchval(self, *_: object) -> bool:
        return True

    async def fetchrow(self, *_: object) -> dict[str, int]:
        return {"events": len(self.values), "oldest": 0}

    async def fetch(self, *_: object) -> list[dict[str, Any]]:
        event = {"topic": "t", "key": b"k", "correlation_id": "", "traceparent": "", "waiting": len(self.values)}
        return [{"id": number, "value": value, **event} for number, value in self.values.items()]

    async def execute(self, _: str, ids: Sequence[int]) -> None:
        for each in ids:
            del self.values[each]


async def test_a_relay_that_is_stopped_keeps_its_lock_until_nothing_is_on_its_way() -> None:
    box = _Box([b"key issued"])
    sending, acknowledged = asyncio.Event(), asyncio.Event()
    locked_at_the_end: list[bool] = []

    class Slow:
        async def publish_all(self, messages: Sequence[Message]) -> list[int]:
            sending.set()
            await acknowledged.wait()
            locked_at_the_end.append(box.is_locked)
            return [0]

    relay = asyncio.create_task(OutboxRelay(box, Slow(), schema="ingest").run())  # type: ignore[arg-type]
    await sending.wait()
    relay.cancel()
    await asyncio.sleep(0)
    assert not relay.done()
    acknowledged.set()
    with pytest.raises(asyncio.CancelledError):
        await relay
    assert locked_at_the_end == [True]


async def test_what_stands_before_an_event_that_no_broker_takes_leaves_and_the_rest_waits() -> None:
    large = bytes(EVENT_BYTES_MAX + 1)
    box = _Box([b"key issued", large, b"key revoked"])
    left: list[bytes | None] = []
    refused = asyncio.Event()

    class Careful:
        async def publish_all(self, messages: Sequence[Message]) -> list[int]:
            if any(len(message.value or b"") > EVENT_BYTES_MAX for message in messages):
                refused.set()
                raise TooLarge()
            left.extend(message.value for message in messages)
            return [0] * len(messages)

    relay = asyncio.create_task(OutboxRelay(box, Careful(), schema="ingest").run())  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        await refused.wait()
    relay.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relay
    assert left == [b"key issued"]
    assert list(box.values.values()) == [large, b"key revoked"]
