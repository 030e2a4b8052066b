"""What those who watch are told of what is stored, what is missing and what waits."""

import struct
import time

import asyncpg
import pytest
from aiokafka import ConsumerRecord
from prometheus_client import REGISTRY

from services.common import outbox, topics
from services.common.clock import SystemClock
from services.common.database import create_pool, transaction
from services.common.kafka import Publisher
from services.common.logs import correlated
from services.common.outbox import OutboxRelay
from services.ingest.historian.historian import Historian, StoredGauges
from services.ingest.numbering import Numbering
from smdih.ingest.v1 import records_pb2

SECOND_US = 1_000_000


def samples(offset: int, numbers: tuple[str, bytes], machine_id: int, time_us: int) -> ConsumerRecord:
    batch = records_pb2.FrameBatch(
        firm_id=1,
        machine_id=machine_id,
        width=1,
        times_us=struct.pack("<q", time_us),
        values=struct.pack("<d", 1.0),
        received_us=time_us,
    )
    value = records_pb2.SamplesRecord(batches=[batch]).SerializeToString()
    return ConsumerRecord(topics.SAMPLES, 0, offset, 0, 0, None, value, None, 0, len(value), [numbers])


async def test_the_rest_of_a_batch_that_comes_with_another_poll_corrects_as_its_beginning_did(dsn: str) -> None:
    pool = await create_pool(dsn, schema="ingest", size_max=2)
    try:
        clock = SystemClock()
        historian, now_us = Historian(clock), clock.now_us()

        def frames(sequence: int, value: float, at_us: int, *, more: bool = False) -> ConsumerRecord:
            batch = records_pb2.FrameBatch(
                firm_id=1,
                machine_id=77,
                width=1,
                source="split",
                sequence=sequence,
                more=more,
                times_us=struct.pack("<q", at_us),
                values=struct.pack("<d", value),
                received_us=now_us,
            )
            value_bytes = records_pb2.SamplesRecord(batches=[batch]).SerializeToString()
            return ConsumerRecord(topics.SAMPLES, 0, 0, 0, 0, None, value_bytes, None, 0, len(value_bytes), [])

        first_us, second_us = now_us - 2 * SECOND_US, now_us - SECOND_US
        corrections = [frames(2, 2.0, first_us, more=True), frames(2, 2.0, second_us)]
        again = [frames(2, 9.0, first_us, more=True), frames(2, 9.0, second_us)]
        for record in (frames(1, 1.0, first_us), frames(1, 1.0, second_us), *corrections, *again):
            async with transaction(pool) as connection:
                assert await historian.store(connection, [record]) == []
        rows = await pool.fetch("SELECT values FROM frame WHERE machine_id = 77 ORDER BY ts")
        assert [row["values"] for row in rows] == [[2.0], [2.0]]
    finally:
        await pool.close()


async def test_a_record_that_was_acknowledged_and_never_came_is_counted_once(dsn: str) -> None:
    pool = await create_pool(dsn, schema="ingest", size_max=2)
    try:
        clock = SystemClock()
        historian, now_us = Historian(clock), clock.now_us()
        numbering, other = Numbering(), Numbering()
        of_door = [numbering.take(1) for _ in range(6)]
        gauges = StoredGauges([historian], pool, clock)

        async def store(*records: ConsumerRecord) -> float | None:
            async with transaction(pool) as connection:
                await historian.note_numbers(topics.SAMPLES, connection, records)
                assert await historian.store(connection, records) == []
            await gauges.measure()
            return REGISTRY.get_sample_value("smdih_ingest_missing_batches")

        assert await store(samples(0, of_door[0], 1, now_us - 100 * SECOND_US)) == 0
        # Of a door that is new to this historian nothing is missed, wherever it stands.
        other.take(7)
        assert await store(samples(1, other.take(1), 2, now_us - 10 * SECOND_US)) == 0
        await historian.forget()  # as after a restart
        assert await store(samples(2, of_door[1], 1, now_us - 90 * SECOND_US)) == 0
        # The third and fourth record are gone.
        assert await store(samples(3, of_door[4], 1, now_us - 80 * SECOND_US)) == 2
        await historian.forget()
        # What came already and comes again is no hole, nor does the hole count again.
        assert await store(samples(1, of_door[1], 1, now_us - 90 * SECOND_US)) == 2
        assert await store(samples(4, of_door[5], 1, now_us - 70 * SECOND_US)) == 2
        numbering.renew()
        assert await store(samples(5, numbering.take(1), 2, now_us - 5 * SECOND_US)) == 2
        furthest_behind = REGISTRY.get_sample_value("smdih_ingest_freshness_seconds", {"quantile": "1.0"})
        middle = REGISTRY.get_sample_value("smdih_ingest_freshness_seconds", {"quantile": "0.5"})
        assert furthest_behind == pytest.approx(70, abs=20)
        assert middle == pytest.approx((70 + 5) / 2, abs=20)
        assert REGISTRY.get_sample_value("smdih_ingest_machines") == 2
    finally:
        await pool.close()


async def test_what_waits_in_the_outbox_is_counted_until_it_has_left(dsn: str, publisher: Publisher) -> None:
    pool = await create_pool(dsn, schema="funding", size_max=2)
    try:
        relay = OutboxRelay(pool, publisher, schema="funding")
        with correlated("4bf92f3577b34da6a3ce929d0e0e4736"):
            async with transaction(pool) as connection:
                await outbox.write(connection, topics.AWARDS, key="a", value=b"1")
                await connection.execute("UPDATE outbox SET created = created - INTERVAL '90 seconds'")
        before = time.monotonic()
        await relay._measure()
        assert REGISTRY.get_sample_value("smdih_outbox_events", {"schema": "funding"}) == 1
        oldest = REGISTRY.get_sample_value("smdih_outbox_oldest_seconds", {"schema": "funding"})
        assert oldest == pytest.approx(90, abs=time.monotonic() - before + 5)
        assert not await relay._relay_some(), "nothing is left"
        labels = {"schema": "funding", "topic": topics.AWARDS}
        assert REGISTRY.get_sample_value("smdih_outbox_published_total", labels) == 1
    finally:
        await pool.close()


async def test_a_pool_shows_what_is_used_and_how_many_it_may_have(dsn: str) -> None:
    pool: asyncpg.Pool[asyncpg.Record] = await create_pool(dsn, schema="matching", size_max=3)
    try:
        used = {"schema": "matching", "state": "used"}
        async with pool.acquire(), pool.acquire():
            assert REGISTRY.get_sample_value("smdih_database_pool_connections", used) == 2
        assert REGISTRY.get_sample_value("smdih_database_pool_connections", used) == 0
        assert REGISTRY.get_sample_value("smdih_database_pool_connections_limit", {"schema": "matching"}) == 3
    finally:
        await pool.close()
    assert REGISTRY.get_sample_value("smdih_database_pool_connections", used) is None
