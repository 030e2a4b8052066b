"""The copy of the directory in memory, while its topic is read anew."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.errors import KafkaError

from services.common.clock import SystemClock
from services.common.directory import Directory, age_seconds
from services.common.errors import TryAgain, Unauthenticated
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
        self.is_away = False
        self.readings = 0
        self.closed = 0

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

        self._answers = 0

    async def start(self) -> None:
        if self._topic.is_away:
            raise KafkaError("no broker answers")
        self._topic.readings += 1

    async def stop(self) -> None:
        # As the library does when it has a fetch that waits to be sent again.
        if self._topic.is_away:
            raise asyncio.CancelledError

    @property
    def _client(self) -> "_Consumer":
        return self

    async def close(self) -> None:
        self._topic.closed += 1

    def assign(self, _: object) -> None: ...

    async def seek_to_beginning(self, _: object) -> None: ...

    async def end_offsets(self, partitions: list[Any]) -> dict[Any, int]:
        return {partitions[0]: self._topic.end}

    async def position(self, _: object) -> int:
        return self._next

    def highwater(self, _: object) -> int:
        return self._topic.end

    def last_poll_timestamp(self, _: object) -> int:
        self._answers += not self._topic.is_away
        return self._answers

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
async def _followed(
    topic: _Topic, monkeypatch: pytest.MonkeyPatch, *, age_s_max: float = 3600, kinds: Collection[str] = ("firm",)
) -> AsyncIterator[Directory]:
    monkeypatch.setattr("services.common.kafka.following.AIOKafkaConsumer", topic.consumer)
    monkeypatch.setattr("services.common.kafka.following.RETRY_DELAY_S", 0.01)
    directory = Directory(Cluster("nowhere"), clock=SystemClock(), kinds=kinds, age_s_max=age_s_max)
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


def _credential(number: int = 7, key: str = KEY, role: pb.Role.ValueType = pb.ROLE_FIRM) -> pb.DirectoryEntry:
    return pb.DirectoryEntry(credential=pb.Credential(id=number, sha256=key_sha256(key), role=role, firm_id=1))


def _age_s() -> float:
    return next(iter(age_seconds.collect())).samples[0].value


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


async def test_who_has_not_heard_of_revocations_for_long_takes_telemetry_only(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = _Topic()
    topic.put("credential/7", _credential())
    topic.put("credential/8", _credential(8, "device", pb.ROLE_DEVICE))
    async with _followed(topic, monkeypatch, age_s_max=0.3) as directory:
        await directory.wait_caught_up()
        for _ in range(20):
            assert directory.caller_of(KEY).firm_id == 1
            await asyncio.sleep(0.02)
        topic.is_away = True
        await _until(lambda: _age_s() > 0.3)
        for asked in (lambda: directory.caller_of(KEY), lambda: directory.check_still_valid(7)):
            with pytest.raises(TryAgain):
                asked()
        with pytest.raises(TryAgain):
            directory.caller_of("made meanwhile")
        assert directory.caller_of("device").firm_id == 1
        topic.is_away = False
        await _until(lambda: _age_s() < 0.3)
        assert directory.caller_of(KEY).firm_id == 1


async def test_a_broker_that_falls_silent_is_asked_on_a_new_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.kafka.following.SILENCE_S_MAX", 0.2)
    topic = _Topic()
    topic.put("credential/7", _credential())
    async with _followed(topic, monkeypatch) as directory:
        await directory.wait_caught_up()
        await asyncio.sleep(0.5)
        assert topic.readings == 1
        topic.is_away = True
        await asyncio.sleep(0.5)
        assert directory.caller_of(KEY).firm_id == 1
        topic.is_away = False
        topic.put("credential/7", None)
        topic.read_from_its_beginning()
        await _until(lambda: topic.readings == 2 and not directory.prefix_of(7))
        assert topic.closed >= 1
        with pytest.raises(Unauthenticated):
            directory.caller_of(KEY)


async def test_a_cancellation_that_the_library_lets_out_does_not_end_the_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    topic = _Topic()
    topic.put("credential/7", _credential())
    async with _followed(topic, monkeypatch) as directory:
        await directory.wait_caught_up()
        topic.is_away = topic.breaks = True
        await _until(lambda: topic.closed >= 2)
        topic.is_away = False
        topic.put("firm/1", pb.DirectoryEntry(firm=pb.Firm(id=1)))
        topic.read_from_its_beginning()
        await _until(lambda: 1 in directory.firms)


async def test_each_kind_is_known_until_it_is_taken_away_and_no_other_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    topic = _Topic()
    kept = ("firm", "site", "machine")
    entries = {
        "firm": pb.DirectoryEntry(firm=pb.Firm(id=1)),
        "site": pb.DirectoryEntry(site=pb.Site(id=1)),
        "machine": pb.DirectoryEntry(machine=pb.Machine(id=1, path="A/b")),
        "partner": pb.DirectoryEntry(partner=pb.Partner(id=1)),
    }
    for kind, entry in entries.items():
        topic.put(f"{kind}/1", entry)
    async with _followed(topic, monkeypatch, kinds=kept) as directory:
        await directory.wait_caught_up()
        for kind in entries:
            assert await directory.wait_for(kind, 1, timeout_s=0.05) is (kind in kept)
        assert directory.firms[1].id == directory.sites[1].id == directory.machines[1].id == directory.machine_id("a/B")
        for kind in entries:
            topic.put(f"{kind}/1", None)
        await _until(lambda: not (directory.firms or directory.sites or directory.machines))
        assert directory.machine_id("A/b") == 0
