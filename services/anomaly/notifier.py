"""Tells contacts of alarms: plans what has to be told, claims what is due, sends, notes what came of it."""

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import asyncpg
from prometheus_client import Counter, Gauge, Histogram

from services.anomaly.contact_store import Claimed, ContactStore
from services.anomaly.delivery import ContactKind, NotDelivered
from services.common.clock import Clock
from services.common.database import AWAY, Pool, transaction
from services.common.errors import HubError, TryAgain
from services.common.logs import correlated, get_logger
from services.common.sealing import Seal, Unreadable

log = get_logger(__name__)

PLAN_INTERVAL_S = 0.5
RETRY_DELAY_S = 1.0
# Contacts that one process sends to at once.
SENDING_MAX = 50
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
        forget_at = plan_at = 0.0
        sending: set[asyncio.Task[None]] = set()
        try:
            while True:
                try:
                    if not self._is_sealed:
                        await self._seal_anew()
                    if time.monotonic() >= plan_at:
                        await self._plan()
                        plan_at = time.monotonic() + PLAN_INTERVAL_S
                    if time.monotonic() >= forget_at:
                        await self._forget()
                        forget_at = time.monotonic() + FORGET_INTERVAL_S
                    for claimed in await self._claim(SENDING_MAX - len(sending)):
                        sending.add(asyncio.create_task(self._try(claimed)))
                except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                    log.warning("the notifier waits", error=repr(error))
                    await asyncio.sleep(RETRY_DELAY_S)
                if sending:  # whoever is done makes room: nobody waits for the slowest
                    _, sending = await asyncio.wait(
                        sending, timeout=PLAN_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
                    )
                else:
                    await asyncio.sleep(PLAN_INTERVAL_S)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)

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
        while True:
            now_us = self._clock.now_us()
            async with transaction(self._pool) as connection:
                if not await self._store.plan(connection, now_us=now_us):
                    break
        async with transaction(self._pool) as connection:
            pending, dead, oldest_s = await self._store.backlog(connection, now_us=now_us)
        deliveries_pending.set(pending)
        deliveries_dead.set(dead)
        delivery_oldest_seconds.set(oldest_s)

    async def _forget(self) -> None:
        removed = FORGET_MAX
        while removed == FORGET_MAX:
            async with transaction(self._pool) as connection:
                removed = await self._store.forget(connection, now_us=self._clock.now_us(), limit=FORGET_MAX)

    async def _claim(self, limit: int) -> Sequence[Claimed]:
        if not limit:
            return ()
        async with transaction(self._pool) as connection:
            return await self._store.claim(connection, now_us=self._clock.now_us(), limit=limit)

    async def _try(self, claimed: Claimed) -> None:
        """The claim is committed: it holds while we send, and no transaction waits for the outside."""
        with correlated(claimed.delivery.correlation_id):
            error = await self._error_of(claimed)
            try:
                await self._note(claimed, error)
            except (*AWAY, asyncpg.PostgresError, HubError) as why:  # it is sent again when the claim has run out
                log.warning("outcome not noted", delivery_id=claimed.delivery.id, error=repr(why))

    async def _note(self, claimed: Claimed, error: str) -> None:
        delivery, kind = claimed.delivery, claimed.contact.kind
        now_us = self._clock.now_us()
        if error:
            async with transaction(self._pool) as connection:
                dead = await self._store.failed(connection, delivery, now_us=now_us, error=error)
            deliveries_total.labels(kind.value, "dead" if dead else "failed").inc()
            log.warning(
                "alarm not delivered",
                delivery_id=delivery.id,
                contact_id=delivery.contact_id,
                attempts=delivery.attempts,
                dead=dead,
                error=error,
            )
            return
        async with transaction(self._pool) as connection:
            await self._store.sent(connection, delivery, now_us=now_us)
        deliveries_total.labels(kind.value, "sent").inc()
        delivery_seconds.labels(kind.value).observe(max(0.0, (now_us - delivery.made_us) / 1e6))
        log.info("alarm delivered", delivery_id=delivery.id, contact_id=delivery.contact_id, kind=kind.value)

    async def _error_of(self, claimed: Claimed) -> str:
        """Send it; returns what was in the way, nothing when it went out."""
        try:
            await self._senders[claimed.contact.kind].send(claimed, now_us=self._clock.now_us())
        except NotDelivered as error:
            return str(error)
        except Exception:  # one message must not keep all others from being sent
            log.exception("alarm cannot be sent", delivery_id=claimed.delivery.id)
            return "The hub could not send it; its operator finds the cause in the notifier's log."
        return ""
