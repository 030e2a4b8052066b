"""Reports for operators."""

from datetime import datetime, timedelta

from services.common.clock import Clock, from_us
from services.common.database import Pool, transaction
from services.common.errors import Invalid
from services.common.identity import Caller, Role
from services.matching.fairness import Fairness, without_small_groups
from services.matching.store import fairness as fairness_store

PERIOD_DEFAULT = timedelta(days=90)
PERIOD_MAX = timedelta(days=3 * 366)


class Reports:
    def __init__(self, pool: Pool, *, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def fairness(self, caller: Caller, opened_from: datetime | None, opened_until: datetime | None) -> Fairness:
        """Of needs opened in the period, by default the last 90 days."""
        caller.require(Role.OPERATOR)
        end = opened_until or from_us(self._clock.now_us())
        if end < from_us(0) + PERIOD_DEFAULT:
            raise Invalid("until_us is too early.", reason="BAD_TIME")
        start = opened_from or end - PERIOD_DEFAULT
        if not timedelta(0) < end - start <= PERIOD_MAX:
            raise Invalid(f"The period ends after it begins, within {PERIOD_MAX.days} days.", reason="BAD_TIME")
        async with transaction(self._pool) as connection:
            by_size = await fairness_store.figures(connection, "size", opened_from=start, opened_until=end)
            by_region = await fairness_store.figures(connection, "region", opened_from=start, opened_until=end)
        return Fairness(without_small_groups(by_size), without_small_groups(by_region))
