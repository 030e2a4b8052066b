"""The processes of the anomaly service: `python -m services.anomaly.main worker|api|notifier`."""

import asyncio
import ipaddress
import sys
from collections.abc import Awaitable, Callable
from typing import Literal

from pydantic import Field

from services.anomaly import api, contact_api, contact_rpc, rpc, rule_api, rule_rpc, tuning_api
from services.anomaly.contact_store import ContactStore
from services.anomaly.contacts import ContactService
from services.anomaly.delivery import ContactKind
from services.anomaly.evidence import EvidenceService
from services.anomaly.measures import FloodGauge, MeasureService
from services.anomaly.rules import RuleService
from services.anomaly.samples import Samples
from services.anomaly.scorer import compile_kernel
from services.anomaly.service import AlarmFeed, AlarmRaiser, AlarmService
from services.anomaly.store import AlarmStore, StateStore
from services.anomaly.stream import CHECKPOINT_INTERVAL_S, AlarmFeedConsumer, AlarmRecall, Worker
from services.anomaly.suppression import SuppressionClock, SuppressionService
from services.anomaly.suppression_store import SuppressionStore
from services.anomaly.tuning import TuningService
from services.anomaly.tuning_store import HorizonStore, TuningStore
from services.common import http, logs, topics
from services.common import rpc as common_rpc
from services.common.clock import SystemClock
from services.common.database import can_write, create_pool_when_it_answers
from services.common.directory import Directory
from services.common.kafka import Cluster, DeadLetters, Publisher
from services.common.outbox import OutboxRelay
from services.common.runtime import Runtime, run
from services.common.settings import Settings
from smdih.anomaly.v1 import (
    anomaly_pb2,
    anomaly_pb2_grpc,
    notification_pb2,
    notification_pb2_grpc,
    rules_pb2,
    rules_pb2_grpc,
)

SCHEMA = "anomaly"


class AnomalySettings(Settings):
    """The compiled kernel is kept in NUMBA_CACHE_DIR, where that is set (numba reads it itself)."""

    # Name of this worker that outlives a restart, such as a pod's: its partitions then come back to it at once.
    anomaly_instance: str = ""
    anomaly_checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    # host:port of ingest's gRPC: explanations and previews of rules show samples from there, asked for with the caller's own key.
    ingest_grpc: str = ""
    # Networks that webhooks may call though they are not public, such as ["10.2.0.0/16"]; there also without TLS, by number.
    anomaly_webhook_networks: list[str] = []
    # The mail server of alarm messages; empty: no mail. anomaly_smtp_tls: starttls, tls or none.
    anomaly_smtp_host: str = ""
    anomaly_smtp_port: int = Field(587, ge=1, le=65535)
    anomaly_smtp_sender: str = "SMDIH alarms <alarms@localhost>"
    anomaly_smtp_username: str = ""
    anomaly_smtp_password: str = Field("", repr=False)
    anomaly_smtp_tls: Literal["starttls", "tls", "none"] = "starttls"


def worker(settings: AnomalySettings) -> Callable[[Runtime], Awaitable[None]]:
    async def start(runtime: Runtime) -> None:
        clock = SystemClock()
        cluster = Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix)
        publisher = Publisher(cluster)
        directory = Directory(cluster, clock=clock, kinds=("machine",))
        app = http.application("SMDIH anomaly worker", runtime=runtime, directory=None)
        await runtime.enter(http.serve(app, host=settings.http_host, port=settings.http_port))
        runtime.background("directory", directory.run())
        pool = await create_pool_when_it_answers(
            settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max
        )
        runtime.on_stop(pool.close)
        runtime.on_stop(lambda: publisher.__aexit__(None, None, None))
        await asyncio.to_thread(compile_kernel)
        await directory.wait_caught_up()
        made = Worker(
            cluster,
            states=StateStore(pool, topic=cluster.name(topics.SAMPLES)),
            horizons=HorizonStore(pool),
            raiser=AlarmRaiser(AlarmStore(), pool, directory, clock),
            dead_letters=DeadLetters(publisher),
            clock=clock,
            instance=settings.anomaly_instance,
            checkpoint_interval_s=settings.anomaly_checkpoint_interval_s,
        )
        runtime.ready_when("kafka", publisher.answers)
        runtime.ready_when("database", lambda: can_write(pool))
        runtime.ready_when("partitions", made.is_assigned)
        runtime.alive_when("scoring", made.is_turning)
        await runtime.enter(made.consuming())
        runtime.background("worker", made.run())

    return start


def api_process(settings: AnomalySettings) -> Callable[[Runtime], Awaitable[None]]:
    async def start(runtime: Runtime) -> None:
        clock = SystemClock()
        cluster = Cluster(settings.kafka_bootstrap, settings.kafka_topic_prefix)
        publisher = Publisher(cluster)
        directory = Directory(cluster, clock=clock, kinds=("machine",))
        pool = await create_pool_when_it_answers(
            settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max
        )
        runtime.on_stop(pool.close)
        runtime.on_stop(lambda: publisher.__aexit__(None, None, None))
        alarms = AlarmStore()
        suppressions = SuppressionStore(alarms)
        service = AlarmService(alarms, pool, clock)
        suppression = SuppressionService(service, alarms, suppressions, pool, directory, clock)
        measuring = MeasureService(pool, clock)
        samples = Samples(settings.ingest_grpc)
        runtime.on_stop(samples.close)
        tuning = TuningService(service, TuningStore(), pool, directory, clock)
        rules = RuleService(TuningStore(), pool, directory, samples, clock)
        evidence = EvidenceService(service, directory, samples, clock)
        contacts = ContactService(ContactStore(), pool, clock, mail=bool(settings.anomaly_smtp_host))
        feed = AlarmFeed(AlarmRecall(cluster))
        feed_consumer = AlarmFeedConsumer(cluster, feed)
        runtime.background("directory", directory.run())
        runtime.background("feed", feed_consumer.run())
        runtime.background("suppression", SuppressionClock(alarms, suppressions, pool, clock).run())
        runtime.background("measures", FloodGauge(pool, clock).run())
        runtime.background("outbox", OutboxRelay(pool, publisher, schema=SCHEMA).run())
        runtime.ready_when("kafka", publisher.answers)
        runtime.ready_when("database", lambda: can_write(pool))
        runtime.ready_when("directory", directory.is_caught_up)
        runtime.ready_when("feed", feed_consumer.is_reading)
        await runtime.enter(
            common_rpc.serve(
                host=settings.grpc_host,
                port=settings.grpc_port,
                directory=directory,
                register=[
                    (
                        anomaly_pb2_grpc.add_AlarmServiceServicer_to_server,
                        rpc.AlarmServicer(service, suppression, tuning, evidence, measuring, feed, directory),
                    ),
                    (rules_pb2_grpc.add_RuleServiceServicer_to_server, rule_rpc.RuleServicer(rules, directory)),
                    (
                        notification_pb2_grpc.add_NotificationServiceServicer_to_server,
                        contact_rpc.NotificationServicer(contacts),
                    ),
                ],
                service_names=[
                    anomaly_pb2.DESCRIPTOR.services_by_name["AlarmService"].full_name,
                    rules_pb2.DESCRIPTOR.services_by_name["RuleService"].full_name,
                    notification_pb2.DESCRIPTOR.services_by_name["NotificationService"].full_name,
                ],
            )
        )
        app = http.application(
            "SMDIH alarms",
            runtime=runtime,
            directory=directory,
            routers=[
                tuning_api.router(tuning, evidence, directory),
                api.router(service, suppression, measuring, feed),
                rule_api.router(rules, directory),
                contact_api.router(contacts),
            ],
        )
        await runtime.enter(http.serve(app, host=settings.http_host, port=settings.http_port))

    return start


def notifier(settings: AnomalySettings) -> Callable[[Runtime], Awaitable[None]]:
    """A process of its own: it alone talks to the outside, so a network policy can keep all others from it."""

    async def start(runtime: Runtime) -> None:
        # Only here: other roles need neither.
        from services.anomaly.notifier import Notifier, Sender
        from services.anomaly.senders import MailSender, WebhookSender

        app = http.application("SMDIH alarm notifier", runtime=runtime, directory=None)
        await runtime.enter(http.serve(app, host=settings.http_host, port=settings.http_port))
        pool = await create_pool_when_it_answers(
            settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max
        )
        runtime.on_stop(pool.close)
        webhooks = WebhookSender([ipaddress.ip_network(one) for one in settings.anomaly_webhook_networks])
        runtime.on_stop(webhooks.close)
        mail = MailSender(
            host=settings.anomaly_smtp_host,
            port=settings.anomaly_smtp_port,
            sender=settings.anomaly_smtp_sender,
            username=settings.anomaly_smtp_username,
            password=settings.anomaly_smtp_password,
            tls=settings.anomaly_smtp_tls,
        )
        senders: dict[ContactKind, Sender] = {ContactKind.WEBHOOK: webhooks, ContactKind.EMAIL: mail}
        runtime.ready_when("database", lambda: can_write(pool))
        runtime.background("notifier", Notifier(ContactStore(), pool, SystemClock(), senders=senders).run())

    return start


ROLES = {"worker": worker, "api": api_process, "notifier": notifier}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        print("usage: python -m services.anomaly.main worker|api|notifier", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    settings = AnomalySettings()
    logs.configure(f"anomaly-{sys.argv[1]}", settings.log_level)
    run(ROLES[sys.argv[1]](settings))


if __name__ == "__main__":
    main()
