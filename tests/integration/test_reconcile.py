"""What follows from a restore or a lost Kafka, case by case, on a real database and real topics."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import pytest_asyncio
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from services import reconcile
from services.anomaly.rebase import rebase
from services.common import topics
from services.common.clock import to_us
from services.common.database import Pool
from services.common.directory import entity_key
from services.common.errors import Conflict
from services.common.identity import Role
from services.common.kafka import Cluster, Message, Publisher, create_topics, topic_ids
from services.common.settings import Settings
from services.ingest.domain import NewSite
from services.ingest.registry import credential_store, rebuild, store
from services.ingest.registry.credentials import make_credential
from services.matching import room_rebuild
from services.matching.messages import room_event
from services.matching.rooms import Room, RoomState
from services.matching.store import rooms as rooms_store
from services.reconcile import ReconcileError, after_kafka_loss, after_restore
from smdih.directory.v1 import directory_pb2 as pb
from tests.polling import eventually

NOW_US = 1_790_000_000_000_000
NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)


def owner(dsn: str, schema: str) -> "asyncpg.pool.Pool[asyncpg.Record]":
    """As operators come."""
    return asyncpg.create_pool(dsn, min_size=1, max_size=2, server_settings={"search_path": f"{schema},public"})


@pytest_asyncio.fixture
async def ingest(dsn: str) -> AsyncIterator[Pool]:
    async with owner(dsn, "ingest") as pool:
        yield pool
        await pool.execute("TRUNCATE credential, outbox CASCADE")


async def test_a_key_that_either_side_says_is_revoked_stays_revoked(ingest: Pool) -> None:
    topic: dict[str, bytes | None] = {}
    ids = {}
    async with ingest.acquire() as connection:
        for name in ("both", "revoked_here", "revoked_since", "unsent"):
            _, credential = make_credential(Role.OPERATOR, 0, 0, name, NOW_US)
            made = await credential_store.create(connection, credential, Role.OPERATOR, NOW_US)
            ids[name] = made.id
            entry = pb.DirectoryEntry(credential=made, changed_us=NOW_US)
            topic[entity_key("credential", made.id)] = entry.SerializeToString()
        await connection.execute("DELETE FROM outbox")
        topic[entity_key("credential", ids["revoked_since"])] = None
        await credential_store.revoke(connection, ids["revoked_here"])
        # Its end was brought forward, and the dump was taken before anybody was told.
        await credential_store.end_at(
            connection, await credential_store.locked(connection, ids["unsent"]), NOW_US + 5_000_000, NOW_US + 1
        )
        async with connection.transaction():
            adopted = await rebuild.adopt(connection, topic, NOW_US + 10)
        rows = await connection.fetch("SELECT id, revoked IS NOT NULL AS revoked, valid_to FROM credential ORDER BY id")
        last = await connection.fetchval("SELECT last_value FROM credential_id_seq")
    state = {row["id"]: row["revoked"] for row in rows}
    assert {name: state[ids[name]] for name in ids} == {
        "both": False,
        "revoked_here": True,
        "revoked_since": True,
        "unsent": False,
    }
    published = {(message.key or b"").decode(): message.value for message in adopted.messages}
    assert published.keys() == {entity_key("credential", ids[name]) for name in ("revoked_here", "unsent")}
    assert published[entity_key("credential", ids["revoked_here"])] is None
    told = pb.DirectoryEntry.FromString(published[entity_key("credential", ids["unsent"])] or b"").credential
    assert told.valid_to_us == NOW_US + 5_000_000
    assert last >= max(ids.values())


async def test_keys_and_sites_of_a_firm_have_a_number_and_ended_keys_are_forgotten(ingest: Pool) -> None:
    async with ingest.acquire() as connection:
        firm_id = await connection.fetchval(
            "INSERT INTO firm (name, slug, sic, region, size) VALUES ('Many', 'many', '25.62', 'Wales', 'small') RETURNING id"
        )
        await connection.execute(
            "INSERT INTO credential (prefix, sha256, role, firm_id, label, valid_from, valid_to) SELECT 'p', "
            "sha256(n::text::bytea), 'device', $1, 'l', now() - interval '9 days', now() - interval '8 days' + interval '1 s' * n "
            "FROM generate_series(1, $2) n",
            *(firm_id, credential_store.KEYS_PER_FIRM_MAX - 1),
        )

        async def issue() -> pb.Credential:
            _, credential = make_credential(Role.DEVICE, firm_id, 0, "one more", NOW_US)
            return await credential_store.create(connection, credential, Role.DEVICE, NOW_US)

        first = await issue()
        with pytest.raises(Conflict) as told:
            await issue()
        assert told.value.reason == "TOO_MANY_KEYS"
        await connection.execute("DELETE FROM outbox")
        ended = to_us(await connection.fetchval("SELECT now()")) - 7 * 86_400_000_000
        forgotten = await credential_store.forget_ended(connection, ended, 2)
        assert await connection.fetchval("SELECT count(*) FROM outbox WHERE value IS NULL") == len(forgotten) == 2
        # Nobody revoked them.
        now = datetime.now(UTC)
        assert (await credential_store.locked(connection, forgotten[0])).state(now) == "expired"
        second = await issue()
        await credential_store.revoke(connection, second.id)
        assert (await credential_store.locked(connection, second.id)).state(now) == "revoked"
        assert (await credential_store.locked(connection, first.id)).state(now) != "revoked"

        await connection.execute(
            "INSERT INTO site (firm_id, slug, name, timezone) SELECT $1, 's' || n, 's', 'UTC' FROM generate_series(2, $2) n",
            *(firm_id, store.SITES_PER_FIRM_MAX),
        )
        await store.create_site(connection, NewSite(firm_id, "s1", "s", "UTC"), NOW_US)
        with pytest.raises(Conflict) as told:
            async with connection.transaction():
                await store.create_site(connection, NewSite(firm_id, "other", "s", "UTC"), NOW_US)
        assert told.value.reason == "TOO_MANY_SITES"
        # One that is there may be sent again.
        await store.create_site(connection, NewSite(firm_id, "s1", "s", "UTC"), NOW_US)
        for table in ("credential", "site"):
            await connection.execute(f"DELETE FROM {table} WHERE firm_id = $1", firm_id)
        await connection.execute("DELETE FROM firm WHERE id = $1", firm_id)


async def test_what_was_registered_since_comes_back_with_its_ids(ingest: Pool) -> None:
    firm = pb.Firm(id=70, name="New", slug="new", sic="25.62", region="Wales", size="small", quota=pb.Quota(signals=9))
    site = pb.Site(id=71, firm_id=70, slug="works", name="Works", timezone="UTC")
    signals = [pb.Signal(id=701, name="t", unit="degC", range_min=-5), pb.Signal(id=702, name="u", unit="V")]
    machine = pb.Machine(id=72, firm_id=70, site_id=71, path="new/works/m", name="M", kind="press", signals=signals)
    partner = pb.Partner(id=73, name="Centre", region="Wales")
    # In the order of nothing, as compaction leaves them.
    entries = {
        "machine/72": pb.DirectoryEntry(machine=machine, changed_us=1),
        "partner/73": pb.DirectoryEntry(partner=partner, changed_us=2),
        "site/71": pb.DirectoryEntry(site=site, changed_us=3),
        "firm/70": pb.DirectoryEntry(firm=firm, changed_us=4),
    }
    topic = {key: entry.SerializeToString() for key, entry in entries.items()}
    async with ingest.acquire() as connection:
        async with connection.transaction():
            adopted = await rebuild.adopt(connection, topic, NOW_US)
        assert adopted.taken == {"firm": 1, "partner": 1, "site": 1, "machine": 1}
        assert adopted.messages == []
        async with connection.transaction():
            again = await rebuild.adopt(connection, topic, NOW_US)
        assert (again.taken, again.messages) == ({}, [])
        signal_id = await connection.fetchval(
            "INSERT INTO signal (firm_id, machine_id, position, name, unit) VALUES (70, 72, 2, 'w', '') RETURNING id"
        )
        assert signal_id > 702


async def test_an_entry_that_does_not_fit_is_told_in_a_sentence(
    settings: Settings, cluster: Cluster, publisher: Publisher
) -> None:
    """A firm that was registered after the restore has the address of one that the topic knows."""
    firm = pb.Firm(id=990, name="Theirs", slug="the-same", size="small")
    entry = pb.DirectoryEntry(firm=firm, changed_us=NOW_US)
    database = await asyncpg.connect(settings.database_dsn)
    try:
        await database.execute(
            "INSERT INTO ingest.firm (name, slug, sic, region, size) VALUES ('Ours', 'the-same', '', '', 'small')"
        )
        await publisher.publish(topics.DIRECTORY, entry.SerializeToString(), key=b"firm/990")
        with pytest.raises(ReconcileError, match=r"the-same.*nothing was changed"):
            await after_restore(settings, accept_lost=False)
        assert await database.fetchval("SELECT count(*) FROM ingest.firm WHERE id = 990") == 0
    finally:
        await publisher.publish(topics.DIRECTORY, None, key=b"firm/990")
        await database.execute("DELETE FROM ingest.firm WHERE slug = 'the-same'")
        await database.close()


async def test_nothing_is_lent_again_by_a_restore(dsn: str) -> None:
    def room(name: str, state: RoomState) -> Room:
        return Room(
            id=name,
            match_id="m",
            firm_id=1,
            partner_id=2,
            provider_id="p",
            machine_ids=(3,),
            signal_ids=(4,),
            purpose="look",
            data_from=NOW,
            data_until=NOW + timedelta(days=1),
            opens=NOW,
            closes=NOW + timedelta(days=1),
            opened_by=1,
            correlation_id="c",
            state=state,
            ended=None if state is RoomState.OPEN else NOW + timedelta(hours=1),
        )

    pool = await owner(dsn, "matching")
    try:
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SET LOCAL session_replication_role = replica")  # a room without its match
            for name in ("recalled_since", "unsent"):
                await rooms_store.add_room(connection, room(name, RoomState.OPEN), request_id="", request_sha256=b"")
            ended = room("recalled_unsent", RoomState.RECALLED)
            await rooms_store.add_room(
                connection, replace(ended, state=RoomState.OPEN, ended=None), request_id="", request_sha256=b""
            )
            await rooms_store.end_room(connection, ended, by=1)
            topic: dict[str, bytes | None] = {
                "recalled_since": room_event(room("recalled_since", RoomState.RECALLED)),
                "recalled_unsent": room_event(room("recalled_unsent", RoomState.OPEN)),
                "opened_since": room_event(room("opened_since", RoomState.OPEN)),
                "gone": None,
            }
            count, messages = await room_rebuild.adopt(connection, topic)
            kept = await rooms_store.room(connection, "recalled_since")
    finally:
        await pool.close()
    assert count == 1
    assert kept is not None
    assert kept.state is RoomState.RECALLED
    published = {(message.key or b"").decode(): message.value for message in messages}
    assert published == {
        "unsent": room_event(room("unsent", RoomState.OPEN)),
        "recalled_unsent": room_event(ended),
        "opened_since": None,
    }


async def test_tunings_that_a_state_holds_stay_below_the_new_beginning(dsn: str) -> None:
    pool = await owner(dsn, "anomaly")
    try:
        async with pool.acquire() as connection:
            await connection.execute(
                "INSERT INTO tuning (id, kind, firm_id, machine_id, cause, reason, made, actor, credential_id) OVERRIDING SYSTEM "
                "VALUE SELECT n, 'relearn', 1, CASE WHEN n < 3 THEN 10 ELSE 11 END, 'sensor_changed', '', now(), 'firm', 1 "
                "FROM generate_series(1, 3) n"
            )
            await connection.execute("INSERT INTO tuning_start VALUES (5, 1, 40), (5, 2, 60), (5, 3, 20), (6, 1, 7)")
            await connection.execute("INSERT INTO detector_state VALUES (5, 10, 0, 50, '', '')")
            await connection.execute("INSERT INTO horizon VALUES (5, 61), (6, 8)")
            await rebase(connection, {5: 0})
            starts = await connection.fetch("SELECT partition, tuning_id, from_offset FROM tuning_start ORDER BY 1, 2")
            assert [tuple(row) for row in starts] == [(5, 1, -1), (5, 2, 0), (5, 3, 0), (6, 1, 7)]
            assert await connection.fetchval("SELECT next_offset FROM detector_state") == 0
            horizons = await connection.fetch("SELECT partition, next_offset FROM horizon ORDER BY 1")
            assert [tuple(row) for row in horizons] == [(5, 0), (6, 8)]
    finally:
        await pool.close()


async def test_positions_that_do_not_fit_the_topics_are_told_apart(
    settings: Settings, cluster: Cluster, publisher: Publisher
) -> None:
    name = cluster.name(topics.ALARMS)
    await publisher.publish_all([Message(topics.ALARMS, b"x", b"k", partition=0)] * 10)
    database = await asyncpg.connect(settings.database_dsn)
    admin = AIOKafkaAdminClient(bootstrap_servers=settings.kafka_bootstrap)
    await admin.start()

    async def stand_at(offset: int) -> None:
        await database.execute(
            "INSERT INTO matching.position (topic, partition, next_offset) VALUES ($1, 0, $2) "
            "ON CONFLICT (topic, partition) DO UPDATE SET next_offset = excluded.next_offset",
            *(name, offset),
        )

    async def position() -> int:
        found: int = await database.fetchval("SELECT next_offset FROM matching.position WHERE topic = $1", name)
        return found

    try:
        async with reconcile._alone(settings.database_dsn):
            with pytest.raises(ReconcileError, match="Another reconcile"):
                await after_kafka_loss(settings)
        await stand_at(11)
        with pytest.raises(ReconcileError, match="after-kafka-loss"):
            await after_restore(settings, accept_lost=True)
        assert await position() == 11
        await stand_at(2)
        assert (await after_restore(settings, accept_lost=False))["records_to_take_in"] == 8
        await admin.delete_records({TopicPartition(name, 0): RecordsToDelete(before_offset=5)})
        with pytest.raises(ReconcileError, match="--accept-lost"):
            await after_restore(settings, accept_lost=False)
        assert await position() == 2
        told = await after_restore(settings, accept_lost=True)
        assert (told["records_lost"], told["records_to_take_in"], await position()) == (3, 5, 5)
        await stand_at(99)
        assert (await after_kafka_loss(settings))["positions_begun_anew"] == 1
        assert await position() == 5

        # Where the directory topic knows little of what the database has, it is a new one, and so are the others: doors that still
        # ran have filled it past the old position, and what they were acknowledged must not be skipped.
        await stand_at(7)
        await database.execute(
            "INSERT INTO ingest.firm (name, slug, sic, region, size) "
            "SELECT 'Unheard ' || n, 'unheard-' || n, '', '', 'small' FROM generate_series(1, 20) n"
        )
        assert (await after_kafka_loss(settings))["positions_begun_anew"] == 1
        assert await position() == 5
        await stand_at(7)
        assert (await after_kafka_loss(settings))["positions_begun_anew"] == 0
        assert await position() == 7

        # One topic that was made anew and filled past the old position is known by its id, though the directory is whole.
        noted = "UPDATE matching.position SET topic_id = $1 WHERE topic = $2"
        await database.execute(noted, (await topic_ids(cluster, [name]))[name], name)
        assert (await after_restore(settings, accept_lost=False))["records_to_take_in"] == 3
        await admin.delete_topics([name])

        async def is_gone() -> bool:
            return name not in await admin.list_topics()

        await eventually(is_gone)
        await create_topics(cluster, partitions=settings.kafka_partitions, replication=settings.kafka_replication)
        await publisher.publish_all([Message(topics.ALARMS, b"x", b"k", partition=0)] * 9)
        with pytest.raises(ReconcileError, match="after-kafka-loss"):
            await after_restore(settings, accept_lost=True)
        assert (await after_kafka_loss(settings))["positions_begun_anew"] == 1
        assert await position() == 0
        assert (await after_kafka_loss(settings))["positions_begun_anew"] == 0

        # A database that was restored as well is older than a directory that is whole: what was revoked since stays revoked, and
        # what was made since is taken in.
        async with owner(settings.database_dsn, "ingest") as ingest_pool, ingest_pool.acquire() as ingest:
            _, credential = make_credential(Role.OPERATOR, 0, 0, "stolen", NOW_US)
            stolen = (await credential_store.create(ingest, credential, Role.OPERATOR, NOW_US)).id
            await ingest.execute("DELETE FROM outbox")
        since = pb.DirectoryEntry(partner=pb.Partner(id=900, name="New", region="Wales"), changed_us=NOW_US)
        await publisher.publish(topics.DIRECTORY, since.SerializeToString(), key=b"partner/900")
        await publisher.publish(topics.DIRECTORY, None, key=entity_key("credential", stolen).encode())
        await stand_at(99)
        told = await after_kafka_loss(settings)
        assert (told["taken_from_directory"], told["keys_revoked"]) == ({"partner": 1}, 1)
        assert await position() == 0
        async with reconcile._consumer(cluster) as consumer:
            newest = await reconcile._newest(consumer, cluster.name(topics.DIRECTORY))
        assert newest[entity_key("credential", stolen)] is None
        assert await database.fetchval("SELECT revoked IS NOT NULL FROM ingest.credential WHERE id = $1", stolen)
        assert (await after_kafka_loss(settings))["taken_from_directory"] == {}

        # And a process that an autoscaler starts meanwhile is seen before anything is kept.
        async with owner(settings.database_dsn, "matching") as pool, pool.acquire() as other:
            await other.execute("SET application_name TO 'smdih-matching'")
            async with database.transaction():
                with pytest.raises(ReconcileError, match="smdih-matching"):
                    await reconcile._check_alone(database)
    finally:
        await admin.close()
        await database.close()
