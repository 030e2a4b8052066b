"""What a publisher gives up is not sent later, when something newer may stand in the topic."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.structs import TopicPartition

from services.common.errors import TryAgain
from services.common.kafka import Cluster, Publisher
from services.common.kafka.publishing import _Producer

NOT_ENOUGH_REPLICAS = 19


class _Brokers:
    """Answer every request to publish with this code, after a moment."""

    def __init__(self) -> None:
        self.code = NOT_ENOUGH_REPLICAS
        self.asked = 0

    async def send(self, node_id: int, request: Any, group: Any = None) -> Any:
        self.asked += 1
        await asyncio.sleep(0)
        return SimpleNamespace(API_VERSION=7, topics=[("t", [(0, self.code, 5, -1, 0)])])


async def _publisher(brokers: _Brokers) -> tuple[Publisher, _Producer]:
    publisher = Publisher(Cluster("127.0.0.1:1"), timeout_s=0.3)
    producer = _Producer(bootstrap_servers="127.0.0.1:1", acks="all", enable_idempotence=True)
    cluster = SimpleNamespace(leader_for_partition=lambda _: 0)
    producer._message_accumulator._cluster = cluster
    producer._txn_manager.set_pid_and_epoch(1, 0)
    producer.client.send = brokers.send

    async def send(topic: str, value: bytes | None, **_: Any) -> Any:
        return await producer._message_accumulator.add_message(TopicPartition("t", 0), b"key", value, 10)

    producer.send = send
    await producer._sender.start()
    publisher._producer = producer
    return publisher, producer


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_what_was_given_up_while_replicas_were_missing_is_not_sent_when_they_are_back() -> None:
    brokers = _Brokers()
    publisher, producer = await _publisher(brokers)
    others = asyncio.create_task(publisher.publish("t", b"of another caller"))
    with pytest.raises(TryAgain):
        await publisher.publish("t", b"key issued")
    brokers.code, asked = 0, brokers.asked
    assert asked > 1
    assert producer._sender.sender_task.done()
    await asyncio.sleep(0.3)  # it tried ten times a second
    assert brokers.asked == asked
    with pytest.raises(TryAgain):
        await others


async def test_a_publisher_ends_though_the_brokers_refuse_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.kafka.publishing.FLUSH_TIMEOUT_S", 0.1)
    brokers = _Brokers()
    publisher, producer = await _publisher(brokers)
    async with asyncio.timeout(5):
        async with publisher:
            waiting = asyncio.create_task(publisher.publish("t", b"x"))
            await _until(lambda: brokers.asked > 0)
            publisher._timeout_s = 60
        with pytest.raises(TryAgain):
            await waiting
    assert producer._sender.sender_task.done()
