"""Where the brokers are, as whom to come to them, and the topics that there must be."""

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any, Self

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    KafkaError,
    TopicAlreadyExistsError,
)

from services.common import topics
from services.common.errors import TryAgain
from services.common.settings import Settings

REQUEST_BYTES_MAX = 8 * 1024 * 1024


@dataclass(frozen=True)
class Identity:
    """As whom we come to the brokers, and how the connection is guarded; the default is nobody, in the clear."""

    protocol: str = "PLAINTEXT"
    mechanism: str = "SCRAM-SHA-512"
    username: str = ""
    password: str = field(default="", repr=False)
    ca_file: str = ""
    certificate_file: str = ""
    key_file: str = ""

    @property
    def is_sasl(self) -> bool:
        return self.protocol.startswith("SASL")

    def tls(self) -> ssl.SSLContext | None:
        """None: the connection is in the clear. Raises OSError when a file cannot be read."""
        if not self.protocol.endswith("SSL"):
            return None
        context = ssl.create_default_context(cafile=self.ca_file or None)
        if self.certificate_file:
            context.load_cert_chain(self.certificate_file, self.key_file)
        return context


@dataclass(frozen=True)
class Cluster:
    """Where the brokers are, and the prefix that keeps this hub's topics and groups apart on a shared cluster."""

    bootstrap: str
    prefix: str = ""
    identity: Identity = Identity()

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(
            settings.kafka_bootstrap,
            settings.kafka_topic_prefix,
            Identity(
                settings.kafka_security_protocol,
                settings.kafka_sasl_mechanism,
                settings.kafka_username,
                settings.kafka_password,
                settings.kafka_ca_file,
                settings.kafka_certificate_file,
                settings.kafka_key_file,
            ),
        )

    def name(self, topic_or_group: str) -> str:
        return self.prefix + topic_or_group

    def client(self) -> dict[str, Any]:
        """What every client of aiokafka is made with: where the brokers are, and as whom to come."""
        identity = self.identity
        made: dict[str, Any] = {"bootstrap_servers": self.bootstrap, "security_protocol": identity.protocol}
        if (tls := identity.tls()) is not None:
            made["ssl_context"] = tls
        if identity.is_sasl:
            made["sasl_mechanism"] = identity.mechanism
            made["sasl_plain_username"], made["sasl_plain_password"] = identity.username, identity.password
        return made


async def create_topics(cluster: Cluster, *, partitions: int, replication: int, deadline_s: float = 60) -> None:
    """Create the topics that are missing. Raises TryAgain when no broker answers by the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        admin = AIOKafkaAdminClient(**cluster.client())
        try:
            await admin.start()
            existing = set(await admin.list_topics())
            missing = [
                _new_topic(cluster, topic, partitions=partitions, replication=replication)
                for topic in topics.TOPICS
                if cluster.name(topic.name) not in existing
            ]
            response = await admin.create_topics(missing)
            for name, code, *rest in response.topic_errors:
                if code not in (0, TopicAlreadyExistsError.errno):
                    raise TryAgain(f"Topic {name} could not be created: error {code} {rest}")
            return
        except (KafkaError, OSError) as error:
            if time.monotonic() > until:
                raise TryAgain(f"No broker answers at {cluster.bootstrap}: {error}") from error
            await asyncio.sleep(0.2)
        finally:
            await admin.close()


def _new_topic(cluster: Cluster, topic: topics.Topic, *, partitions: int, replication: int) -> NewTopic:
    config = {"cleanup.policy": "compact"} if topic.retention_ms is None else {"retention.ms": str(topic.retention_ms)}
    config["max.message.bytes"] = str(REQUEST_BYTES_MAX)
    return NewTopic(cluster.name(topic.name), topic.partitions or partitions, replication, topic_configs=config)


async def stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer of aiokafka, whatever it is doing.

    It cancels its fetches, and one that waits to be sent again lets that out of `stop`, before the connections are closed: whoever
    stopped it would end as cancelled, which nobody had asked for.
    """
    try:
        await consumer.stop()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
    finally:
        await consumer._client.close()
