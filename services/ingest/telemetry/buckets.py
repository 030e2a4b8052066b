"""Samples a second of each firm, kept below its quota by a token bucket.

Each door has its own buckets. Every SHARE_INTERVAL_S the doors tell each other through the database how much they take, and each
fills its bucket with what the others leave over, at least an equal share: so a firm has its quota once, wherever its gateways
connect, and for some seconds at most as often as there are doors. While the database is away the last shares hold.
"""

import asyncio
import math
import secrets
import time
from collections.abc import Callable

import asyncpg

from services.common.clock import Clock
from services.common.database import AWAY, Pool, transaction
from services.common.directory import Directory
from services.common.errors import HubError, SlowDown
from services.common.logs import get_logger
from services.ingest.domain import QUOTA_BURST_S, QUOTA_SAMPLES_PER_S_DEFAULT, Reason
from services.ingest.registry import quota_store as store

log = get_logger(__name__)

SHARE_INTERVAL_S = 5.0
RETRY_AFTER_S_MAX = 60


class Bucket:
    """Of one firm. It may be overdrawn by what one request holds; the debt is waited for before the next."""

    __slots__ = ("at_s", "doors", "others_per_s", "spent", "tokens")

    def __init__(self, tokens: float, at_s: float) -> None:
        self.tokens = tokens
        self.at_s = at_s
        self.spent = 0.0
        self.others_per_s = 0.0
        self.doors = 1

    def fill(self, quota: int, now_s: float) -> float:
        """Put in what time has brought, up to the brim; how much a second brings."""
        per_s = max(quota - self.others_per_s, quota / self.doors)
        self.tokens = min(quota * QUOTA_BURST_S, self.tokens + (now_s - self.at_s) * per_s)
        self.at_s = now_s
        return per_s

    def spend(self, samples: float) -> None:
        self.tokens -= samples
        self.spent += samples


class Buckets:
    """One door's buckets."""

    def __init__(self, directory: Directory, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._directory = directory
        self._monotonic_s = monotonic_s
        self._buckets: dict[int, Bucket] = {}
        self._measured_s = monotonic_s()

    def checked(self, firm_id: int) -> Bucket:
        """The firm's bucket, to be spent from. Raises SlowDown where it is empty."""
        now_s = self._monotonic_s()
        quota = self._quota(firm_id)
        bucket = self._buckets.get(firm_id)
        if bucket is None:
            bucket = self._buckets[firm_id] = Bucket(quota * QUOTA_BURST_S, now_s)
        per_s = bucket.fill(quota, now_s)
        if bucket.tokens <= 0:
            wait_s = min(RETRY_AFTER_S_MAX, math.ceil(-bucket.tokens / per_s) + 1)
            raise SlowDown(
                f"The firm sends more than its quota of {quota} samples a second; nothing was taken, send again in {wait_s} s, "
                "or ask an operator for more.",
                reason=Reason.QUOTA_SAMPLES,
                retry_after_s=wait_s,
            )
        return bucket

    def spend(self, firm_id: int, samples: float) -> None:
        """More of a request that was let in."""
        bucket = self._buckets.get(firm_id)
        if bucket is not None:
            bucket.spend(samples)

    def measured(self) -> dict[int, float]:
        """Samples a second of each firm since the last measurement; a firm that has stopped is told once, as 0."""
        now_s = self._monotonic_s()
        elapsed_s = max(now_s - self._measured_s, 0.001)
        self._measured_s = now_s
        rates = {firm_id: bucket.spent / elapsed_s for firm_id, bucket in self._buckets.items()}
        for firm_id, bucket in list(self._buckets.items()):
            quota = self._quota(firm_id)
            bucket.fill(quota, now_s)
            if not bucket.spent and bucket.tokens >= quota * QUOTA_BURST_S:
                del self._buckets[firm_id]
            bucket.spent = 0.0
        return rates

    def _quota(self, firm_id: int) -> int:
        firm = self._directory.firms.get(firm_id)
        return (firm.quota.samples_per_s if firm is not None else 0) or QUOTA_SAMPLES_PER_S_DEFAULT

    def share(self, others: dict[int, store.Others]) -> None:
        """Leave to other doors what they take."""
        for firm_id, bucket in self._buckets.items():
            other = others.get(firm_id)
            bucket.others_per_s, bucket.doors = (other.samples_per_s, other.doors + 1) if other else (0.0, 1)


class BucketsSharer:
    """Tells the other doors what this one takes, and hears of them."""

    def __init__(self, pool: Pool, buckets: Buckets, clock: Clock) -> None:
        self._pool = pool
        self._buckets = buckets
        self._clock = clock
        self._door = secrets.token_hex(8)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(SHARE_INTERVAL_S)
            rates = self._buckets.measured()
            if not rates:
                continue
            try:
                async with transaction(self._pool) as connection:
                    await store.write_use(connection, self._door, rates, self._clock.now_us())
                    self._buckets.share(
                        await store.use_of_others(connection, self._door, list(rates), self._clock.now_us())
                    )
            except (*AWAY, asyncpg.PostgresError, HubError) as error:
                log.warning("quotas are not shared", error=repr(error))
