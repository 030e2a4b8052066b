"""A worker in one of five shapes: python -m tests.integration.faust_shapes SHAPE BROKER TOPIC FILE LIFE.

Writes the number of each message that it has done to FILE. In its first life it meets the fault of its shape.
"""

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faust
from aiokafka import AIOKafkaConsumer, TopicPartition

SHAPES = ("concurrency", "take_raises", "loop_raises", "acknowledged_by_hand", "plain_consumer")


async def main(shape: str, broker: str, topic: str, file: Path, first_life: bool) -> None:
    def done(messages: Sequence[bytes]) -> None:
        with file.open("a") as lines:
            lines.writelines(f"{message.decode()}\n" for message in messages)

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    if shape == "plain_consumer":
        await consume(broker, topic, done, never, first_life)
        return
    app = faust.App(
        f"{topic}-group",
        broker=f"kafka://{broker}",
        store="memory://",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        consumer_group_instance_id="one",  # a killed worker's partitions come back to it at once
        broker_commit_interval=0.2,
        stream_wait_empty=False,
    )
    messages = app.topic(topic, key_serializer="raw", value_serializer="raw")

    async def in_two_at_once(stream: Any) -> None:
        async for value in stream:
            if value == b"0" and first_life:
                await never()
            done([value])

    async def in_batches_that_raise(stream: Any) -> None:
        async for values in stream.take(4, within=0.5):
            if first_life:
                raise RuntimeError("database down")
            done(values)

    async def in_a_loop_that_raises(stream: Any) -> None:
        async for value in stream:
            if value == b"3" and first_life:
                raise RuntimeError("database down")
            done([value])

    async def acknowledged_by_hand(stream: Any) -> None:
        stream = stream.noack()
        async for events in stream.noack_take(4, within=0.5):
            if events[0].value == b"4" and first_life:
                await never()
            done([event.value for event in events])
            for event in events:
                await stream.ack(event)

    agents = {
        "concurrency": in_two_at_once,
        "take_raises": in_batches_that_raise,
        "loop_raises": in_a_loop_that_raises,
        "acknowledged_by_hand": acknowledged_by_hand,
    }
    app.agent(messages, concurrency=2 if shape == "concurrency" else 1, name="agent")(agents[shape])
    await app.start()
    await never()


async def consume(broker: str, topic: str, done: Any, never: Any, first_life: bool) -> None:
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=broker,
        group_id=f"{topic}-group",
        group_instance_id="one",
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    await consumer.start()
    while True:
        for partition, records in (await consumer.getmany(timeout_ms=500, max_records=4)).items():
            done([record.value for record in records])
            if records[0].value == b"4" and first_life:
                await never()
            await consumer.commit({TopicPartition(topic, partition.partition): records[-1].offset + 1})


if __name__ == "__main__":
    logging.basicConfig(level="ERROR")
    shape, broker, topic, file, life = sys.argv[1:]
    asyncio.run(main(shape, broker, topic, Path(file), life == "1"))
