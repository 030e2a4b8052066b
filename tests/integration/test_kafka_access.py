"""Each process is refused, by a real broker, every topic and group that services/common/access.py does not give it."""

import asyncio
import inspect
import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    KafkaError,
    TopicAuthorizationFailedError,
)

from localstack.hub import ROLES
from localstack.secured import SecuredKafka
from localstack.servers import KAFKA_LIBS, named_in_environment
from services.common import topics
from services.common.access import ACCESSES, Access, access_of
from services.common.kafka import Cluster, create_topics

PREFIX = "refused."
ANSWER_TIMEOUT_S = 10


@pytest_asyncio.fixture(scope="module")
async def broker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SecuredKafka]:
    if not KAFKA_LIBS.is_dir():
        reason = "a broker with access rules of its own needs the local servers: run `make setup`"
        # Whoever names servers may have no right to install others; anywhere else a skip would hide a broken set-up.
        pytest.skip(reason) if named_in_environment() else pytest.fail(reason)
    made = SecuredKafka(Path(tmp_path_factory.mktemp("secured")) / "kafka")
    try:
        await made.start()
        await made.admit(prefix=PREFIX)
        # As the process that is there for it: its rights are enough.
        migrate = Cluster(made.bootstrap, PREFIX, made.identities()["migrate"])
        await create_topics(migrate, partitions=2, replication=1)
        yield made
    finally:
        made.remove()


def test_every_process_and_every_topic_has_its_place_in_the_list() -> None:
    assert {access.process for access in ACCESSES} == {role.name for role in ROLES} | {"migrate", "reconcile"}
    named = {value for name, value in inspect.getmembers(topics) if name.isupper() and str(value).startswith("smdih.")}
    made = {topic.name for topic in topics.TOPICS}
    assert named <= made
    assert {name for access in ACCESSES for name in access.reads | access.writes} <= made
    assert access_of("migrate").creates == made
    written = {name for access in ACCESSES for name in access.writes}
    assert named <= written, "a topic that nobody writes"
    assert all(
        access.schema == access.process.partition("-")[0]
        for access in ACCESSES
        if access.schema != "ingest" and access.schema
    )


async def _may_write(cluster: Cluster, topic: str) -> bool:
    async with AIOKafkaProducer(**cluster.client(), acks="all") as producer:
        try:
            await asyncio.wait_for(
                producer.send_and_wait(cluster.name(topic), b"x", key=b"x", partition=0), ANSWER_TIMEOUT_S
            )
        except TopicAuthorizationFailedError:
            return False
    return True


async def _may_read(cluster: Cluster, topic: str) -> bool:
    partition = TopicPartition(cluster.name(topic), 0)
    async with AIOKafkaConsumer(
        **cluster.client(), group_id=None, auto_offset_reset="earliest", fetch_max_wait_ms=100
    ) as consumer:
        consumer.assign([partition])
        try:
            await asyncio.wait_for(consumer.getone(partition), ANSWER_TIMEOUT_S)
        except TopicAuthorizationFailedError:
            return False
    return True


async def _may_see(cluster: Cluster) -> set[str]:
    """Topics whose existence the brokers admit: what is not among them can be neither read nor written."""
    admin = AIOKafkaAdminClient(**cluster.client())
    try:
        await admin.start()
        asked = [cluster.name(topic.name) for topic in topics.TOPICS]
        described = await admin.describe_topics(asked)
    finally:
        await admin.close()
    codes = {found["topic"].removeprefix(PREFIX): found["error_code"] for found in described}
    assert codes.keys() == {topic.name for topic in topics.TOPICS}
    assert set(codes.values()) <= {0, TopicAuthorizationFailedError.errno}
    return {name for name, code in codes.items() if code == 0}


async def test_each_process_writes_and_reads_its_own_topics_and_no_other(broker: SecuredKafka) -> None:
    everything = Cluster(broker.bootstrap, PREFIX, broker.identity("admin"))
    for topic in topics.TOPICS:  # so that there is something to read
        assert await _may_write(everything, topic.name)
    for access in ACCESSES:
        cluster = Cluster(broker.bootstrap, PREFIX, broker.identity(access.user))
        seen = await _may_see(cluster)
        assert seen == access.reads | access.writes | access.creates, access.process
        assert {name for name in seen if await _may_write(cluster, name)} == access.writes, access.process
        assert {name for name in seen if await _may_read(cluster, name)} == access.reads, access.process


async def test_what_the_brokers_do_not_show_cannot_be_written(broker: SecuredKafka) -> None:
    cluster = Cluster(broker.bootstrap, PREFIX, broker.identities()["funding"])
    assert not await _may_write(cluster, topics.SAMPLES)


async def _may_join(admin: AIOKafkaAdminClient, group: str) -> bool:
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        while True:
            try:
                await admin.find_coordinator(group)
            except GroupAuthorizationFailedError:
                return False
            except GroupCoordinatorNotAvailableError:  # a fresh broker makes its topic of offsets first
                await asyncio.sleep(0.1)
            else:
                return True


async def test_each_process_has_its_own_groups_and_no_other(broker: SecuredKafka) -> None:
    groups = {group for access in ACCESSES for group in access.groups}
    for access in ACCESSES:
        cluster = Cluster(broker.bootstrap, PREFIX, broker.identity(access.user))
        admin = AIOKafkaAdminClient(**cluster.client())
        try:
            await admin.start()
            assert {g for g in groups if await _may_join(admin, cluster.name(g))} == access.groups, access.process
        finally:
            await admin.close()


@pytest.mark.parametrize("wrong", ["nobody", "password", "authority"])
async def test_who_cannot_prove_who_they_are_is_refused(broker: SecuredKafka, wrong: str) -> None:
    identity = broker.identities()["door"]
    identity = {
        "nobody": replace(identity, protocol="SSL"),
        "password": replace(identity, password=secrets.token_hex(16)),
        "authority": replace(identity, ca_file=""),
    }[wrong]
    client = AIOKafkaConsumer(**Cluster(broker.bootstrap, PREFIX, identity).client(), request_timeout_ms=2_000)
    with pytest.raises((KafkaError, OSError)):
        await asyncio.wait_for(client.start(), ANSWER_TIMEOUT_S)
    await client.stop()


def test_a_user_is_named_after_its_process() -> None:
    assert Access("door", "ingest").user == "smdih-door"
