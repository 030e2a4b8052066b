"""Tells contacts of alarms: plans what has to be told, claims what is due, sends, notes what came of it."""

import asyncio
import time
from typing import Protocol

import asyncpg
from prometheus_client import Counter, Gauge, Histogram

from services.anomaly.contact_store import Claimed, ContactStore
from services.anomaly.delivery import ContactKind, NotDelivered, retry_after_s
from services.common.clock import Clock
from services.common.database import AWAY, Pool, transaction
from services.common.errors import TryAgain
from services.common.logs import correlated, get_logger
from services.common.sealing import Seal, Unreadable

log = get_logger(__name__)

PLAN_INTERVAL_S = 1.0
RETRY_DELAY_S = 1.0
# Deliveries claimed together, and tried at once by one process.
CLAIM_MAX = 20
FORGET_INTERVAL_S = 3600.0
FORGET_MAX = 1_000
# Of contacts, looked at together when the process starts.
SECRETS_MAX = 500

# Tries by way and what came of them: sent, failed (to be tried again), dead.
deliveries_total = Counter("smdih_anomaly_deliveries_total", "Tries to deliver a message", ["kind", "outcome"])
# From the alarm's change (or the step's time) to the contact's answer.
delivery_seconds = Histogram(
    "smdih_anomaly_delivery_seconds",
    "Time from planning to delivery",
    ["kind"],
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 14400),
)
# In the database, of all processes.
deliveries_pending = Gauge("smdih_anomaly_deliveries_pending", "Deliveries that wait")
deliveries_dead = Gauge("smdih_anomaly_deliveries_dead", "Deliveries that were given up and wait for a person")
delivery_oldest_seconds = Gauge("smdih_anomaly_delivery_oldest_seconds", "Age of the oldest delivery that waits")


class Sender(Protocol):
    async def send(self, claimed: Claimed, *, now_us: int) -> None:
        """Raises NotDelivered."""
        ...


class Notifier:
    """Any number of processes may do this: one plans at a time, and each delivery is claimed by one.

    A process that dies after a message went out and before that was noted lets it go out twice, never not at all: the claim runs
    out and another sends it with the same id.
    """

    def __init__(
        self, store: ContactStore, pool: Pool, clock: Clock, *, senders: dict[ContactKind, Sender], seal: Seal
    ) -> None:
        self._store = store
        self._pool = pool
        self._clock = clock
        self._senders = senders
        self._seal = seal
        self._is_sealed = False

    async def run(self) -> None:
        forget_at = 0.0
        while True:
            try:
                if not self._is_sealed:
                    await self._seal_anew()
                await self._plan()
                if time.monotonic() >= forget_at:
                    await self._forget()
                    forget_at = time.monotonic() + FORGET_INTERVAL_S
                while await self._deliver() >= CLAIM_MAX:
                    pass
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("the notifier waits", error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)
            await asyncio.sleep(PLAN_INTERVAL_S)

    async def _seal_anew(self) -> None:
        """Secrets that stand there readable, or sealed with a key that is on its way out."""
        after_id, changed, unreadable = "", 0, 0
        while True:
            async with transaction(self._pool) as connection:
                found = await self._store.secrets(connection, after_id=after_id, limit=SECRETS_MAX)
                sealed = []
                for contact_id, secret in found:
                    if self._seal.is_current(secret):
                        continue
                    try:
                        opened = self._seal.open(secret, of=contact_id)
                    except Unreadable as error:
                        unreadable += 1
                        log.error("secret of a contact cannot be read", contact=contact_id, error=str(error))
                        continue
                    sealed.append((contact_id, self._seal.seal(opened, of=contact_id)))
                await self._store.put_secrets(connection, sealed)
            changed += len(sealed)
            if len(found) < SECRETS_MAX:
                break
            after_id = found[-1][0]
        self._is_sealed = True
        log.info("secrets sealed anew", changed=changed, unreadable=unreadable)

    async def _plan(self) -> None:
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            await self._store.plan(connection, now_us=now_us)
            pending, dead, oldest_s = await self._store.backlog(connection, now_us=now_us)
        deliveries_pending.set(pending)
        deliveries_dead.set(dead)
        delivery_oldest_seconds.set(oldest_s)

    async def _forget(self) -> None:
        removed = FORGET_MAX
        while removed == FORGET_MAX:
            async with transaction(self._pool) as connection:
                removed = await self._store.forget(connection, now_us=self._clock.now_us(), limit=FORGET_MAX)

    async def _deliver(self) -> int:
        async with transaction(self._pool) as connection:
            claimed = await self._store.claim(connection, now_us=self._clock.now_us(), limit=CLAIM_MAX)
        # Committed: the claim holds while we send, and no transaction waits for the outside.
        await asyncio.gather(*(self._try(one) for one in claimed))
        return len(claimed)

    async def _try(self, claimed: Claimed) -> None:
        delivery, kind = claimed.delivery, claimed.contact.kind
        with correlated(delivery.correlation_id):
            try:
                await self._senders[kind].send(claimed, now_us=self._clock.now_us())
            except NotDelivered as error:
                wait_s = retry_after_s(delivery.attempts)
                async with transaction(self._pool) as connection:
                    dead = await self._store.failed(
                        connection, delivery, now_us=self._clock.now_us(), error=str(error), retry_after_s=wait_s
                    )
                deliveries_total.labels(kind.value, "dead" if dead else "failed").inc()
                log.warning(
                    "alarm not delivered",
                    delivery_id=delivery.id,
                    contact_id=delivery.contact_id,
                    attempts=delivery.attempts,
                    dead=dead,
                    error=str(error),
                )
                return
            now_us = self._clock.now_us()
            async with transaction(self._pool) as connection:
                await self._store.sent(connection, delivery, now_us=now_us)
            deliveries_total.labels(kind.value, "sent").inc()
            delivery_seconds.labels(kind.value).observe(max(0.0, (now_us - delivery.made_us) / 1e6))
            log.info("alarm delivered", delivery_id=delivery.id, contact_id=delivery.contact_id, kind=kind.value)
