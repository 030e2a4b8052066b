"""What a firm may use and does use."""

from dataclasses import dataclass

from services.common.clock import Clock
from services.common.database import Pool, transaction
from services.common.errors import Invalid
from services.common.identity import Caller, Role
from services.common.outbox import OutboxRelay
from services.ingest.asked import check_id
from services.ingest.domain import (
    QUOTA_SAMPLES_PER_S_DEFAULT,
    QUOTA_SAMPLES_PER_S_MAX,
    QUOTA_SIGNALS_DEFAULT,
    QUOTA_SIGNALS_MAX,
    QUOTA_STORED_DAYS_DEFAULT,
    QUOTA_STORED_DAYS_MAX,
    STORED_DAYS_MIN,
)
from services.ingest.registry import audit_store
from services.ingest.registry import quota_store as store
from services.ingest.registry import store as registry_store
from services.ingest.registry.quota_store import Quota, Use


@dataclass(frozen=True)
class QuotaInForce:
    """The numbers that hold, those of them that an operator has set, and what is used now."""

    samples_per_s: int
    signals: int
    stored_days: int
    own: Quota
    use: Use


class Quotas:
    """Shows quotas to their firms; operators change them."""

    def __init__(self, pool: Pool, relay: OutboxRelay, clock: Clock) -> None:
        self._pool = pool
        self._relay = relay
        self._clock = clock

    async def of_firm(self, caller: Caller, firm_id: int) -> QuotaInForce:
        """Raises NotFound."""
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(firm_id, "firm_id")
        caller.check_sees_firm(firm_id)
        async with transaction(self._pool) as connection:
            own = await store.quota_of(connection, firm_id)
            use = await store.use_of(connection, firm_id, self._clock.now_us())
        return QuotaInForce(
            own.samples_per_s or QUOTA_SAMPLES_PER_S_DEFAULT,
            own.signals or QUOTA_SIGNALS_DEFAULT,
            own.stored_days or QUOTA_STORED_DAYS_DEFAULT,
            own,
            use,
        )

    async def change(self, caller: Caller, firm_id: int, quota: Quota) -> None:
        """Set a firm's quota; None: the default. The doors know it within a second. Raises NotFound, Invalid."""
        caller.require(Role.OPERATOR)
        check_id(firm_id, "firm_id")
        for number, least, most, what in (
            (quota.samples_per_s, 1, QUOTA_SAMPLES_PER_S_MAX, "samples_per_s"),
            (quota.signals, 1, QUOTA_SIGNALS_MAX, "signals"),
            (quota.stored_days, STORED_DAYS_MIN, QUOTA_STORED_DAYS_MAX, "stored_days"),
        ):
            if number is not None and not least <= number <= most:
                raise Invalid(f"{what}: from {least} to {most}, or leave it out for the default.")
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            before = await store.quota_of(connection, firm_id)
            if quota == before:
                return
            await store.change_quota(connection, firm_id, quota, now_us)
            await registry_store.publish_firm(connection, firm_id, now_us)
            await audit_store.note(
                connection,
                now_us,
                firm_id=firm_id,
                credential_id=caller.credential_id,
                action="quota changed",
                detail=f"{before} -> {quota}",
            )
        self._relay.kick()
