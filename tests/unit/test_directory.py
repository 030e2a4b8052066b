"""The copy of the directory in memory, while its topic is read anew."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaError

from services.common.clock import SystemClock
from services.common.directory import Directory
from services.common.errors import Unauthenticated
from services.common.identity import key_sha256
from services.common.kafka import Cluster
from smdih.directory.v1 import directory_pb2 as pb

KEY = "smdih_firm_key"


class _Topic:
    """A topic with one partition, read by one consumer at a time, record by record as it is let."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes, bytes | None]] = []
        self.end = 0
        self.let = asyncio.Semaphore(0)
        self.breaks = False
        self.readings = 0

    def put(self, key: str, entry: pb.DirectoryEntry | None) -> None:
        self.records.append((self.end, key.encode(), None if entry is None else entry.SerializeToString()))
        self.end += 1
        self.let.release()

    def read_from_its_beginning(self) -> None:
        for _ in self.records:
            self.let.release()

    def consumer(self, **_: Any) -> "_Consumer":
        return _Consumer(self)


class _Consumer:
    def __init__(self, topic: _Topic) -> None:
        self._topic = topic
        self._next = 0

    async def start(self) -> None:
        self._topic.readings += 1

    async def stop(self) -> None: ...

    def assign(self, _: object) -> None: ...

    async def seek_to_beginning(self, _: object) -> None: ...

    async def end_offsets(self, partitions: list[Any]) -> dict[Any, int]:
        return {partitions[0]: self._topic.end}

    async def position(self, _: object) -> int:
        return self._next

    async def getmany(self, *, timeout_ms: int) -> dict[str, list[Any]]:
        try:
            async with asyncio.timeout(0.02):
                await self._topic.let.acquire()
        except TimeoutError:
            if self._topic.breaks:
                self._topic.breaks = False
                raise KafkaError("topic authorization failed") from None
            return {}
        offset, key, value = next(record for record in self._topic.records if record[0] >= self._next)
        self._next = offset + 1
        return {"": [SimpleNamespace(offset=offset, key=key, value=value)]}


@asynccontextmanager
async def _followed(topic: _Topic, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Directory]:
    monkeypatch.setattr("services.common.directory.AIOKafkaConsumer", topic.consumer)
    monkeypatch.setattr("services.common.directory.RETRY_DELAY_S", 0)
    directory = Directory(Cluster("nowhere"), clock=SystemClock(), kinds=("firm",))
    following = asyncio.create_task(directory.run())
    try:
        yield directory
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


def _credential() -> pb.DirectoryEntry:
    return pb.DirectoryEntry(credential=pb.Credential(id=7, sha256=key_sha256(KEY), role=pb.ROLE_FIRM, firm_id=1))


async def test_a_revoked_key_stays_revoked_while_the_directory_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = _Topic()
    topic.put("firm/1", pb.DirectoryEntry(firm=pb.Firm(id=1)))
    topic.put("firm/2", pb.DirectoryEntry(firm=pb.Firm(id=2)))
    topic.put("credential/7", _credential())
    async with _followed(topic, monkeypatch) as directory:
        await directory.wait_caught_up()
        assert directory.caller_of(KEY).firm_id == 1
        topic.put("credential/7", None)
        topic.put("firm/2", None)
        await _until(lambda: 2 not in directory.firms)
        del topic.records[1], topic.records[0]  # compaction took a firm away, and another's end stands for it
        topic.breaks = True
        await _until(lambda: topic.readings == 2)
        for _ in range(3):
            topic.let.release()
            for _ in range(5):
                with pytest.raises(Unauthenticated):
                    directory.caller_of(KEY)
                await asyncio.sleep(0.005)
        await _until(lambda: not directory.firms)
        assert await directory.is_caught_up()


async def test_a_topic_that_lost_records_does_not_replace_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = _Topic()
    topic.put("credential/7", _credential())
    async with _followed(topic, monkeypatch) as directory:
        await directory.wait_caught_up()
        topic.records.clear()
        topic.end = 0
        topic.breaks = True
        await _until(lambda: topic.readings > 2)
        assert directory.caller_of(KEY).firm_id == 1
