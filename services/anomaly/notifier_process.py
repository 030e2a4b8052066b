"""The process that tells contacts of alarms."""

import ipaddress

from services.anomaly.contact_store import ContactStore
from services.anomaly.delivery import ContactKind
from services.anomaly.notifier import Notifier, Sender
from services.anomaly.senders import MailSender, WebhookSender
from services.anomaly.settings import SCHEMA, AnomalySettings
from services.common.clock import SystemClock
from services.common.database import can_write, create_pool
from services.common.entrance import open_entrance
from services.common.runtime import Runtime
from services.common.sealing import Seal


async def start(runtime: Runtime, settings: AnomalySettings) -> None:
    """A process of its own: it alone talks to the outside, so a network policy can keep all others from it."""
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await entrance.serve_probes("SMDIH alarm notifier")
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    seal = Seal(settings.anomaly_seal_keys)
    webhooks = WebhookSender([ipaddress.ip_network(one) for one in settings.anomaly_webhook_networks], seal)
    runtime.on_stop(webhooks.close)
    mail = MailSender(
        seal,
        host=settings.anomaly_smtp_host,
        port=settings.anomaly_smtp_port,
        sender=settings.anomaly_smtp_sender,
        username=settings.anomaly_smtp_username,
        password=settings.anomaly_smtp_password,
        tls=settings.anomaly_smtp_tls,
    )
    senders: dict[ContactKind, Sender] = {ContactKind.WEBHOOK: webhooks, ContactKind.EMAIL: mail}
    runtime.ready_when("database", lambda: can_write(pool))
    runtime.background("notifier", Notifier(ContactStore(), pool, SystemClock(), senders=senders, seal=seal).run())
