"""The foundation on real servers: publish, consume with the position in the database, outbox, dead letters."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import asyncpg
import httpx
import pytest
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from services.common import outbox, topics
from services.common.database import Connection, Pool, create_pool, transaction
from services.common.errors import TooLarge, TryAgain
from services.common.kafka import (
    REQUEST_BYTES_MAX,
    Cluster,
    MadeAnew,
    Message,
    PositionedConsumer,
    Publisher,
    TooManyDeadLetters,
    topic_ids,
)
from services.common.kafka.deadletters import dead_letters_total
from services.common.outbox import OutboxRelay
from tests.polling import eventually


async def test_an_event_in_the_outbox_reaches_a_consumer_once_though_it_is_published_twice(
    cluster: Cluster, dsn: str, publisher: Publisher
) -> None:
    pool = await create_pool(dsn, schema="matching", size_max=4)
    owner = await asyncpg.connect(dsn)
    await owner.execute("CREATE TABLE matching.seen (value text); GRANT ALL ON matching.seen TO smdih_matching")
    await owner.close()
    calls = 0

    async def handle(connection: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        nonlocal calls
        calls += 1
        for record in records:
            await connection.execute("INSERT INTO seen VALUES ($1)", record.value.decode())
        if calls == 1:
            raise asyncpg.PostgresConnectionError("the database went away before the commit")
        if calls == 2:  # as the server says it when its disk is full
            await connection.execute("DO $$ BEGIN RAISE 'could not extend file' USING ERRCODE = '53100'; END $$")
        return []

    async with pool.acquire() as connection, connection.transaction():
        for number in range(5):
            await outbox.write(connection, topics.ALARMS, key="k", value=str(number).encode())
    relay = asyncio.create_task(OutboxRelay(pool, publisher, schema="matching").run())
    consumer = PositionedConsumer(
        cluster, pool, publisher, topic_names=[topics.ALARMS], group="smdih.test.once", handler=handle
    )
    running = asyncio.create_task(consumer.run())

    async def all_seen() -> bool:
        return bool(await pool.fetchval("SELECT count(*) >= 5 FROM seen"))

    await eventually(all_seen)
    assert [row["value"] for row in await pool.fetch("SELECT value FROM seen")] == ["0", "1", "2", "3", "4"]
    assert calls >= 3
    assert await pool.fetchval("SELECT count(*) FROM outbox") == 0
    for task in (relay, running):
        task.cancel()
    await asyncio.gather(relay, running, return_exceptions=True)
    await pool.close()


async def test_an_outbox_of_large_events_leaves_in_batches_that_the_brokers_can_take_in_time(dsn: str) -> None:
    pool = await create_pool(dsn, schema="matching", size_max=2)
    sizes: list[int] = []
    values: list[bytes | None] = []

    class Slow:
        async def publish_all(self, messages: Sequence[Message]) -> list[int]:
            sizes.append(sum(len(message.value or b"") for message in messages))
            if sizes[-1] > 9_000_000:
                raise TryAgain("The message log does not answer.")
            values.extend(message.value for message in messages)
            return [0] * len(messages)

    events = [None if number % 3 == 0 else bytes([number]) * 1_000_000 for number in range(30)]
    async with pool.acquire() as connection, connection.transaction():
        await outbox.write_all(connection, topics.DIRECTORY, [("machine/1", value) for value in events])
        with pytest.raises(TooLarge):
            await outbox.write(connection, topics.DIRECTORY, key="machine/1", value=bytes(REQUEST_BYTES_MAX))
    relay = asyncio.create_task(OutboxRelay(pool, Slow(), schema="matching").run())  # type: ignore[arg-type]

    async def is_empty() -> bool:
        return bool(await pool.fetchval("SELECT count(*) = 0 FROM outbox"))

    await eventually(is_empty)
    assert values == events
    assert len(sizes) == 3
    relay.cancel()
    await asyncio.gather(relay, return_exceptions=True)
    await pool.close()


async def test_an_event_that_no_broker_takes_is_told_and_what_follows_leaves_once_it_is_gone(
    cluster: Cluster, dsn: str, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of a release that had no limit for events."""
    pool = await create_pool(dsn, schema="matching", size_max=2)
    async with pool.acquire() as connection, connection.transaction():
        await outbox.write_all(connection, topics.DIRECTORY, [("machine/1", b"1"), ("machine/1", b"2")])
        await connection.execute(
            "UPDATE outbox SET value = $1 WHERE id = (SELECT min(id) FROM outbox)", bytes(REQUEST_BYTES_MAX + 1)
        )
    relay = asyncio.create_task(OutboxRelay(pool, publisher, schema="matching").run())

    async def is_told() -> bool:
        return "outbox waits" in capsys.readouterr().out

    await eventually(is_told)
    assert await pool.fetchval("SELECT count(*) FROM outbox") == 2
    await pool.execute("DELETE FROM outbox WHERE octet_length(value) > 1")

    async def is_empty() -> bool:
        return bool(await pool.fetchval("SELECT count(*) = 0 FROM outbox"))

    await eventually(is_empty)
    relay.cancel()
    await asyncio.gather(relay, return_exceptions=True)
    await pool.close()


async def test_unreadable_records_go_to_the_dead_letters_and_too_many_in_a_row_stop_the_consumer(
    cluster: Cluster, dsn: str, publisher: Publisher
) -> None:
    pool = await create_pool(dsn, schema="funding", size_max=4)

    async def refuse_all(connection: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        return [(record, "UNREADABLE") for record in records]

    for number in range(150):
        await publisher.publish(topics.AWARDS, f"bad {number}".encode(), partition=0)
    # Started again and again, as an orchestrator would, it stays where it stopped.
    for _ in range(3):
        consumer = PositionedConsumer(
            cluster,
            pool,
            publisher,
            topic_names=[topics.AWARDS],
            group="smdih.test.bad",
            handler=refuse_all,
            records_max=20,
        )
        with pytest.raises(TooManyDeadLetters):
            await asyncio.wait_for(consumer.run(), 30)
        stored = await pool.fetchval("SELECT next_offset FROM position WHERE topic = $1", cluster.name(topics.AWARDS))
        assert stored == 100
    await pool.close()


async def test_a_topic_that_was_made_anew_is_not_read_at_the_old_ones_position(
    cluster: Cluster, dsn: str, publisher: Publisher
) -> None:
    pool = await create_pool(dsn, schema="funding", size_max=2)
    name = cluster.name(topics.BOOKINGS)

    async def take(_: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        return []

    consumer = PositionedConsumer(
        cluster, pool, publisher, topic_names=[topics.BOOKINGS], group="smdih.test.anew", handler=take
    )
    running = asyncio.create_task(consumer.run())
    await eventually(consumer.is_assigned)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    noted = {row["topic_id"] for row in await pool.fetch("SELECT topic_id FROM position WHERE topic = $1", name)}
    assert noted == set((await topic_ids(cluster, [name])).values())
    await pool.execute("UPDATE position SET topic_id = $1, next_offset = 1 WHERE topic = $2", "0" * 32, name)
    with pytest.raises(RuntimeError) as told:
        await asyncio.wait_for(consumer.run(), 30)
    assert isinstance(told.value.__cause__, MadeAnew)
    assert "after-kafka-loss" in str(told.value.__cause__)
    await pool.close()


async def test_who_comes_to_a_topic_after_its_first_records_were_deleted_begins_at_those_that_are_left(
    cluster: Cluster, dsn: str, publisher: Publisher
) -> None:
    pool = await create_pool(dsn, schema="funding", size_max=2)
    seen: list[bytes] = []

    async def take(_: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        seen.extend(record.value for record in records)
        return []

    first = await publisher.publish(topics.ALARMS, b"deleted", partition=0)
    await publisher.publish(topics.ALARMS, b"left", partition=0)
    admin = AIOKafkaAdminClient(**cluster.client())
    await admin.start()
    at = TopicPartition(cluster.name(topics.ALARMS), 0)
    await admin.delete_records({at: RecordsToDelete(before_offset=first + 1)})
    await admin.close()
    consumer = PositionedConsumer(
        cluster, pool, publisher, topic_names=[topics.ALARMS], group="smdih.test.late", handler=take
    )
    running = asyncio.create_task(consumer.run())

    async def has_begun() -> bool:
        return running.done() or b"left" in seen

    await eventually(has_begun)
    assert not running.done(), running.exception()
    assert b"deleted" not in seen
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()


async def test_a_record_that_the_database_refuses_goes_to_the_dead_letters_and_those_beside_it_are_stored(
    cluster: Cluster, dsn: str, publisher: Publisher
) -> None:
    pool = await create_pool(dsn, schema="anomaly", size_max=4)
    owner = await asyncpg.connect(dsn)
    await owner.execute("CREATE TABLE anomaly.kept (value text); GRANT ALL ON anomaly.kept TO smdih_anomaly")
    noted: list[int] = []

    async def note(_: Connection, records: Sequence[ConsumerRecord]) -> None:
        noted.extend(record.offset for record in records)

    async def keep(connection: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        await connection.executemany("INSERT INTO kept VALUES ($1)", [(record.value.decode(),) for record in records])
        return []

    before = dead_letters_total.labels(topics.QUARANTINE)._value.get()
    for value in (b"one", b"a\0b", b"two"):
        await publisher.publish(topics.QUARANTINE, value, key=b"k", partition=0)
    consumer = PositionedConsumer(
        cluster, pool, publisher, topic_names=[topics.QUARANTINE], group="smdih.test.nul", handler=keep, note=note
    )
    running = asyncio.create_task(consumer.run())

    async def all_taken() -> bool:
        query = "SELECT sum(next_offset) FROM position WHERE topic = $1"
        return bool(running.done() or await pool.fetchval(query, cluster.name(topics.QUARANTINE)) == 3)

    await eventually(all_taken)
    assert not running.done(), running.exception()
    assert [row["value"] for row in await owner.fetch("SELECT value FROM anomaly.kept")] == ["one", "two"]
    assert dead_letters_total.labels(topics.QUARANTINE)._value.get() == before + 1
    assert set(noted) == {0, 1, 2}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await owner.close()
    await pool.close()


async def test_a_poll_that_takes_too_long_is_stored_in_parts(cluster: Cluster, dsn: str, publisher: Publisher) -> None:
    pool = await create_pool(dsn, schema="ingest", size_max=4)
    sizes: list[int] = []
    alive: list[bool] = []

    async def slow(_: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        sizes.append(len(records))
        await asyncio.sleep(0.3)
        alive.append(await consumer.is_turning())
        if len(records) > 2:
            raise TimeoutError
        return []

    for _ in range(7):
        await publisher.publish(topics.OFFERS, b"x", partition=1)
    consumer = PositionedConsumer(
        cluster, pool, publisher, topic_names=[topics.OFFERS], group="smdih.test.slow", handler=slow, silence_s_max=0.5
    )
    running = asyncio.create_task(consumer.run())

    async def all_taken() -> bool:
        query = "SELECT sum(next_offset) FROM position WHERE topic = $1"
        return bool(running.done() or await pool.fetchval(query, cluster.name(topics.OFFERS)) == 7)

    await eventually(all_taken)
    assert not running.done(), running.exception()
    assert sum(size for size in sizes if size <= 2) == 7
    # Not stuck, though nothing was stored for longer than a loop may be silent.
    assert all(alive)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()


class Busy:
    """A pool that has no connection for some who ask."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.refusals = 0

    def acquire(self, **more: Any) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise TimeoutError
        return self._pool.acquire(**more)

    async def release(self, connection: Any) -> None:
        await self._pool.release(connection)


async def test_a_store_that_gets_no_connection_has_not_taken_too_long(
    cluster: Cluster, dsn: str, publisher: Publisher, capsys: pytest.CaptureFixture[str]
) -> None:
    pool = await create_pool(dsn, schema="ingest", size_max=4)
    busy, taken = Busy(pool), 0

    async def take(_: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        nonlocal taken
        taken += len(records)
        return []

    consumer = PositionedConsumer(
        *(cluster, cast(Pool, busy), publisher),
        topic_names=[topics.BOOKINGS],
        group="smdih.test.busy",
        handler=take,
    )
    running = asyncio.create_task(consumer.run())
    await eventually(consumer.is_assigned)
    busy.refusals = 2
    await publisher.publish(topics.BOOKINGS, b"x", partition=0)

    async def all_taken() -> bool:
        return bool(running.done() or taken == 1)

    await eventually(all_taken)
    assert not running.done(), running.exception()
    told = capsys.readouterr().out
    assert "store failed, trying again" in told
    assert "store took too long" not in told
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await pool.close()


async def test_a_database_with_no_connection_left_is_asked_again(dsn: str) -> None:
    owner = await asyncpg.connect(dsn)
    role = f"few_{secrets.token_hex(4)}"
    await owner.execute(
        f"CREATE ROLE {role} LOGIN PASSWORD 'few' CONNECTION LIMIT 1; GRANT smdih_funding TO {role} WITH SET TRUE"
    )
    few = str(httpx.URL(dsn).copy_with(username=role, password="few"))
    pool = await create_pool(few, schema="funding", size_max=2)
    try:
        async with transaction(pool):
            with pytest.raises(TryAgain):
                async with transaction(pool):
                    pass
        async with transaction(pool) as connection:
            assert await connection.fetchval("SELECT 1") == 1
    finally:
        await pool.close()
        await owner.execute(f"DROP ROLE {role}")
        await owner.close()


async def test_a_rebalance_while_positions_are_loaded_loses_nothing_and_repeats_nothing(
    cluster: Cluster, dsn: str, publisher: Publisher
) -> None:
    pool = await create_pool(dsn, schema="anomaly", size_max=4)
    owner = await asyncpg.connect(dsn, server_settings={"search_path": "anomaly"})
    await owner.execute("CREATE TABLE seen (value text); GRANT ALL ON seen TO smdih_anomaly")
    mark = secrets.token_bytes(8)  # other tests' records may stand in the topic
    holder = await asyncpg.connect(dsn, server_settings={"search_path": "anomaly"})

    async def keep(connection: Connection, records: Sequence[ConsumerRecord]) -> list[tuple[ConsumerRecord, str]]:
        mine = [(record.value.removeprefix(mark).decode(),) for record in records if record.value.startswith(mark)]
        await connection.executemany("INSERT INTO seen VALUES ($1)", mine)
        return []

    def member() -> PositionedConsumer:
        return PositionedConsumer(
            cluster, pool, publisher, topic_names=[topics.OFFERS], group="smdih.test.loading", handler=keep
        )

    async def publish(numbers: range) -> None:
        values = [mark + str(number).encode() for number in numbers]
        await publisher.publish_all([Message(topics.OFFERS, value, key=value) for value in values])

    async def seen() -> list[int]:
        return sorted(int(row["value"]) for row in await owner.fetch("SELECT value FROM seen"))

    async def is_loading() -> bool:
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'INSERT INTO position%'"
        return bool(await owner.fetchval(waiting))

    async def is_rebalancing() -> bool:
        (answer,) = await admin.describe_consumer_groups([cluster.name("smdih.test.loading")])
        return "PreparingRebalance" in str(answer)

    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    await admin.start()
    first = asyncio.create_task(member().run())
    running = [first]
    try:
        await publish(range(100))
        await eventually(lambda: _equals(seen, list(range(100))))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await publish(range(100, 200))
        lock = holder.transaction()
        await lock.start()
        of_topic = "SELECT next_offset FROM position WHERE topic = $1 FOR UPDATE"
        await holder.execute(of_topic, cluster.name(topics.OFFERS))
        running = [asyncio.create_task(member().run())]
        await eventually(is_loading)
        running.append(asyncio.create_task(member().run()))
        await eventually(is_rebalancing)
        await lock.rollback()
        await publish(range(200, 300))
        await eventually(lambda: _equals(seen, list(range(300))))
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await admin.close()
        await holder.close()
        await owner.close()
        await pool.close()


async def _equals(ask: Callable[[], Awaitable[object]], expected: object) -> bool:
    return await ask() == expected
