"""The process that serves alarms to people and programs."""

from services.anomaly import api, contact_api, contact_rpc, rpc, rule_api, rule_rpc, tuning_api
from services.anomaly.contact_store import ContactStore
from services.anomaly.contacts import ContactService
from services.anomaly.evidence import EvidenceService
from services.anomaly.feed import AlarmFeedConsumer, AlarmRecall
from services.anomaly.measures import GAUGE_INTERVAL_S, FloodGauge, MeasureService
from services.anomaly.retention import AlarmRetention
from services.anomaly.rules import RuleService
from services.anomaly.samples import Samples
from services.anomaly.service import AlarmFeed, AlarmService
from services.anomaly.settings import SCHEMA, AnomalySettings
from services.anomaly.store import AlarmStore
from services.anomaly.suppression import SuppressionClock, SuppressionService
from services.anomaly.suppression_store import SuppressionStore
from services.anomaly.tuning import TuningService
from services.anomaly.tuning_store import TuningStore
from services.common import topics
from services.common.clock import SystemClock
from services.common.database import can_write, create_pool
from services.common.directory import Directory
from services.common.entrance import open_entrance
from services.common.kafka import Cluster, Publisher
from services.common.metrics import keep_measuring
from services.common.outbox import OutboxRelay
from services.common.runtime import Runtime
from services.common.sealing import Seal
from smdih.anomaly.v1 import anomaly_pb2_grpc, notification_pb2_grpc, rules_pb2_grpc


async def start(runtime: Runtime, settings: AnomalySettings) -> None:
    entrance = open_entrance(runtime, settings, takes_keys=True)
    clock = SystemClock()
    cluster = Cluster.of(settings)
    publisher = await runtime.enter(Publisher(cluster))
    directory = Directory(cluster, clock=clock, kinds=("machine",))
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    alarms = AlarmStore()
    suppressions = SuppressionStore(alarms)
    service = AlarmService(alarms, pool, clock)
    suppression = SuppressionService(service, alarms, suppressions, pool, directory, clock)
    measuring = MeasureService(pool, clock)
    samples = Samples(entrance.peer(settings.ingest_grpc))
    runtime.on_stop(samples.close)
    tuning = TuningService(service, TuningStore(), pool, directory, clock)
    rules = RuleService(TuningStore(), pool, directory, samples, clock)
    evidence = EvidenceService(service, directory, samples, clock)
    contacts = ContactService(
        ContactStore(),
        pool,
        clock,
        mail=bool(settings.anomaly_smtp_host),
        seal=Seal(settings.anomaly_seal_keys),
    )
    feed = AlarmFeed(AlarmRecall(cluster))
    feed_consumer = AlarmFeedConsumer(cluster, feed)
    runtime.background("directory", directory.run())
    runtime.background("feed", feed_consumer.run())
    runtime.background("suppression", SuppressionClock(alarms, suppressions, pool, clock).run())
    retention = AlarmRetention(
        pool, clock, kept_days=settings.anomaly_alarms_kept_days, topic=cluster.name(topics.SAMPLES)
    )
    runtime.background("retention", retention.run())
    runtime.background("measures", keep_measuring(FloodGauge(pool, clock).measure, interval_s=GAUGE_INTERVAL_S))
    runtime.background("outbox", OutboxRelay(pool, publisher, schema=SCHEMA).run())
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("database", lambda: can_write(pool))
    runtime.ready_when("directory", directory.is_caught_up)
    runtime.ready_when("feed", feed_consumer.is_reading)
    await entrance.serve(
        "SMDIH alarms",
        directory=directory,
        pool=pool,
        servicers=[
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
        routers=[
            tuning_api.router(tuning, evidence, directory),
            api.router(service, suppression, measuring, feed),
            rule_api.router(rules, directory),
            contact_api.router(contacts),
        ],
    )
