"""What is kept for how long: shown, decided by operators, and enforced by a loop in the historian."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

import asyncpg
from prometheus_client import Counter, Gauge

from services.common.clock import Clock, from_us, to_us
from services.common.database import AWAY, Connection, Pool, transaction
from services.common.errors import Invalid, NotFound, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.ingest.asked import check_id
from services.ingest.domain import QUARANTINE_BYTES_PER_FIRM_MAX, BadName, check_text
from services.ingest.registry import audit_store
from services.ingest.retention import store as db
from services.ingest.retention.rules import (
    DAY_US,
    GRACE_DAYS,
    KNOWN_DAYS_MIN,
    QUARANTINE,
    QUARANTINE_DAYS,
    QUARANTINE_GROWTH_DAYS,
    STORES,
    Rule,
    Store,
    cutoffs,
    growth_bytes_a_day,
)

log = get_logger(__name__)

INTERVAL_S = 6 * 3600
# After a failure, and at the start, when whatever failed or started is still busy.
RETRY_S = 60
MEASURE_INTERVAL_S = 300.0
MACHINES_PER_STEP = 200
# In one transaction: a tenth of a second of work, and no lock is held for longer.
ROWS_PER_STEP = 20_000
# Between two steps, so that removing never takes more than half of the database's time.
PAUSE_SHARE = 1.0
RUNS_SHOWN = 10

# Rows and chunks that retention removed, by resolution.
rows_removed_total = Counter("smdih_ingest_retention_rows_total", "Rows removed by retention", ["resolution"])
chunks_dropped_total = Counter("smdih_ingest_retention_chunks_total", "Chunks dropped by retention", ["resolution"])
# When retention last ran to its end, in seconds since 1970; 0: not yet since this process started.
last_run_seconds = Gauge("smdih_ingest_retention_finished_timestamp_seconds", "When retention last finished")
# Size of the telemetry tables, and for how many days the disk lasts (NaN: not known or for ever).
storage_bytes = Gauge("smdih_ingest_storage_bytes", "Size of a telemetry table with its indexes", ["resolution"])
storage_left_days = Gauge("smdih_ingest_storage_left_days", "Days until the database's disk is full")
# The whole database, and the disk that it may fill (0: nobody said).
database_bytes = Gauge("smdih_ingest_database_bytes", "In the database: its size")
disk_bytes_set = Gauge("smdih_ingest_database_disk_bytes", "Disk that the database may fill")


@dataclass(frozen=True)
class StoreSize:
    store: Store
    size_bytes: int
    chunks: int
    # None: too little is known.
    growth_bytes_a_day: float | None
    # The longest that any firm's data are kept; None: somebody's are on hold.
    days_kept: int | None
    # What it grows to before as much is removed as arrives; None: not known, or it grows on.
    full_bytes: float | None


@dataclass(frozen=True)
class Forecast:
    database_bytes: int
    # 0: not set.
    disk_bytes: int
    stores: list[StoreSize]
    growth_bytes_a_day: float | None
    # None: `reason` says why.
    days_left: float | None
    reason: str


@dataclass(frozen=True)
class Overview:
    rules: dict[int, Rule]
    runs: list[db.Run]


class Retention:
    """The rules, for those who ask and those who decide."""

    def __init__(self, pool: Pool, clock: Clock, *, disk_bytes: int) -> None:
        self._pool = pool
        self._clock = clock
        self._disk_bytes = disk_bytes

    async def overview(self, caller: Caller) -> Overview:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return Overview(await db.rules(connection), await db.last_runs(connection, RUNS_SHOWN))

    async def of_firm(self, caller: Caller, firm_id: int) -> Rule:
        """Raises NotFound."""
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(firm_id, "firm_id")
        caller.check_sees_firm(firm_id)
        async with transaction(self._pool) as connection:
            if firm_id not in await db.firm_ids(connection):
                raise NotFound(f"There is no firm {firm_id}.")
            return (await db.rules(connection)).get(firm_id, Rule())

    async def decide(self, caller: Caller, firm_id: int, rule: Rule) -> Rule:
        """Set a firm's rule. What is already removed does not come back. Raises NotFound, Invalid."""
        caller.require(Role.OPERATOR)
        before = await self.of_firm(caller, firm_id)
        rule = replace(rule, quota_days=before.quota_days)
        try:
            rule.check()
            check_text(rule.reason, what="reason", length_max=500)
        except (ValueError, BadName) as error:
            raise Invalid(f"{error}.") from error
        async with transaction(self._pool) as connection:
            await db.set_rule(connection, firm_id, rule, caller.credential_id)
            await audit_store.note(
                connection,
                self._clock.now_us(),
                firm_id=firm_id,
                credential_id=caller.credential_id,
                action="retention changed",
                detail=f"{before} -> {rule}",
            )
        return rule

    async def forecast(self, caller: Caller) -> Forecast:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await forecast(connection, self._clock.now_us(), self._disk_bytes)


async def forecast(connection: Connection, now_us: int, disk_bytes: int) -> Forecast:
    """What there is, how fast it grows, and when the disk is full."""
    rules = await db.rules(connection)
    first_us = await db.first_machine_us(connection)
    sizes = []
    for store in STORES:
        chunks = await db.chunk_sizes(connection, store)
        growth = growth_bytes_a_day(chunks, now_us if first_us is None else first_us, now_us)
        is_held = any(rule.is_on_hold for rule in rules.values())
        days = None if is_held else max([store.days_default, *(rule.days(store) for rule in rules.values())])
        full = None if growth is None or days is None else growth * (days + store.chunk_days)
        size = sum(chunk.size_bytes for chunk in chunks)
        sizes.append(StoreSize(store, size, len(chunks), growth, days, full))
        storage_bytes.labels(store.name).set(size)
    sizes.append(await _quarantine(connection, rules, now_us if first_us is None else first_us, now_us))
    database = await db.database_bytes(connection)
    database_bytes.set(database)
    disk_bytes_set.set(disk_bytes)
    known = [size.growth_bytes_a_day for size in sizes if size.growth_bytes_a_day is not None]
    total = sum(known) if len(known) == len(sizes) else None
    days_left, reason = _days_left(sizes, total, database, disk_bytes)
    storage_left_days.set(float("nan") if days_left is None else days_left)
    return Forecast(database, disk_bytes, sizes, total, days_left, reason)


async def _quarantine(connection: Connection, rules: Mapping[int, Rule], first_us: int, now_us: int) -> StoreSize:
    since_us = (now_us // DAY_US - QUARANTINE_GROWTH_DAYS) * DAY_US
    days_seen = (now_us - max(since_us, first_us)) / DAY_US
    size, came = await db.quarantine_size(connection, from_us(since_us))
    growth = came / days_seen if days_seen >= KNOWN_DAYS_MIN else None
    full: float = len(await db.firm_ids(connection)) * QUARANTINE_BYTES_PER_FIRM_MAX
    is_held = any(rule.is_on_hold for rule in rules.values())
    if not is_held and growth is not None:
        full = min(full, growth * QUARANTINE_DAYS)
    storage_bytes.labels(QUARANTINE.name).set(size)
    return StoreSize(QUARANTINE, size, 0, growth, None if is_held else QUARANTINE_DAYS, max(size, full))


def _days_left(
    sizes: list[StoreSize], growth: float | None, database: int, disk_bytes: int
) -> tuple[float | None, str]:
    if not disk_bytes:
        return None, "NO_DISK_SIZE"
    if growth is None:
        return None, "NOT_ENOUGH_DATA"
    full = [size.full_bytes for size in sizes if size.full_bytes is not None]
    others = database - sum(size.size_bytes for size in sizes)
    if len(full) == len(sizes) and sum(full) + others <= disk_bytes:
        return None, "FITS"
    return max(0, disk_bytes - database) / growth if growth else None, "" if growth else "FITS"


class _RuleChanged(Exception):
    """An operator has decided something else than this run began with; the next run goes by it."""


@contextmanager
def _ends_where_changed(firm_id: int) -> Iterator[None]:
    try:
        yield
    except _RuleChanged:
        log.info("a rule has changed, nothing more is removed by the old one", firm_id=firm_id)


class Enforcer:
    """Removes what no rule keeps. Cut off at any moment, the next run goes on: every step stands for itself."""

    def __init__(
        self,
        pool: Pool,
        clock: Clock,
        *,
        disk_bytes: int = 0,
        rows_per_step: int = ROWS_PER_STEP,
        grace_days: int = GRACE_DAYS,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._disk_bytes = disk_bytes
        self._rows_per_step = rows_per_step
        self._grace_us = grace_days * DAY_US
        self._now_us = 0
        self._chunks = 0
        self._rows = 0

    async def run(self) -> None:
        """Until cancelled."""
        wait_s = RETRY_S
        while True:
            await asyncio.sleep(wait_s)
            try:
                wait_s = INTERVAL_S if await self.once() else RETRY_S
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("retention failed, trying again", error=repr(error))
                wait_s = RETRY_S

    async def once(self) -> bool:
        """One run; False: another process is at it."""
        async with self._pool.acquire(timeout=10) as keeper:
            if not await db.try_lock(keeper):
                return False
            try:
                await self._locked()
            finally:
                if not keeper.is_closed():
                    await db.unlock(keeper)
        return True

    async def _locked(self) -> None:
        self._chunks = self._rows = 0
        self._now_us = now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            run_id = await db.begin_run(connection, now_us, self._settled_before())
            firm_ids, rules = await db.firm_ids(connection), await db.rules(connection)
        problem = "It was cut off."
        try:
            for store in STORES:
                due = cutoffs(store, firm_ids, rules, now_us)
                firms_us = due.firms_us
                if due.everybody_us is not None:
                    held_us = await self._drop_chunks(store, due.everybody_us)
                    if held_us:
                        # Loaded history, or a clock that goes back, holds the rows of its own machine and of no other.
                        firms_us = {firm_id: firms_us.get(firm_id, held_us) for firm_id in firm_ids}
                for firm_id, cutoff_us in firms_us.items():
                    with _ends_where_changed(firm_id):
                        await self._remove_rows(store, firm_id, rules.get(firm_id, Rule()), from_us(cutoff_us))
            quarantine_cutoff = from_us(now_us - QUARANTINE_DAYS * DAY_US)
            for firm_id in firm_ids:
                rule = rules.get(firm_id, Rule())
                if not rule.is_on_hold:
                    with _ends_where_changed(firm_id):
                        await self._remove_quarantined(firm_id, rule, quarantine_cutoff)
            problem = ""
        except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
            problem = repr(error)
            raise
        finally:
            finished_us = self._clock.now_us()
            async with transaction(self._pool) as connection:
                await db.note_run(
                    connection,
                    run_id,
                    chunks=self._chunks,
                    rows=self._rows,
                    finished_us=None if problem else finished_us,
                    problem=problem or None,
                )
        last_run_seconds.set(finished_us / 1_000_000)
        log.info("retention finished", chunks=self._chunks, rows=self._rows)

    async def measure(self) -> None:
        """Set the gauges of storage. Raises TryAgain."""
        async with transaction(self._pool) as connection:
            await forecast(connection, self._clock.now_us(), self._disk_bytes)

    def _settled_before(self) -> datetime:
        """What was made or loaded before is there for long enough for its age to count."""
        return from_us(self._clock.now_us() - self._grace_us)

    async def _drop_chunks(self, store: Store, cutoff_us: int) -> int:
        """Returns the end of the last one that has to stay for loaded history; 0: none has."""
        held_us = 0
        async with transaction(self._pool) as connection:
            chunks = await db.chunks_before(connection, store, cutoff_us, self._settled_before())
        if chunks and store.table == "frame":
            await self._close_buckets(chunks[-1][1])
        for start, end in chunks:
            async with transaction(self._pool) as connection:
                await db.keep_rules(connection)
                due = cutoffs(store, await db.firm_ids(connection), await db.rules(connection), self._now_us)
                if due.everybody_us is None or end > from_us(due.everybody_us):
                    return 0  # decided meanwhile
                if await db.holds_loaded(connection, store, start, end):
                    held_us = to_us(end)
                    continue
                dropped = await db.drop_chunks(connection, store, start, end)
            self._chunks += dropped
            chunks_dropped_total.labels(store.name).inc(dropped)
        return held_us

    async def _close_buckets(self, end: datetime) -> None:
        after = 0
        while True:
            async with transaction(self._pool) as connection:
                groups = await db.groups_page(connection, 0, after, MACHINES_PER_STEP)
                if not groups:
                    return
                await db.close_buckets(connection, groups, end)
            after = groups[-1].machine_id

    @asynccontextmanager
    async def _step(self, firm_id: int, rule: Rule) -> AsyncIterator[Connection]:
        """A transaction during which the firm's rule does not change. Raises _RuleChanged where it has."""
        async with transaction(self._pool) as connection:
            await db.keep_rules(connection)
            if (await db.rules(connection)).get(firm_id, Rule()) != rule:
                raise _RuleChanged
            yield connection

    async def _remove_rows(self, store: Store, firm_id: int, rule: Rule, cutoff: datetime) -> None:
        after = 0
        while True:
            async with transaction(self._pool) as connection:
                groups = await db.groups_page(connection, firm_id, after, MACHINES_PER_STEP)
            for group in groups:
                removed = self._rows_per_step
                while removed >= self._rows_per_step:
                    started = time.monotonic()
                    async with self._step(firm_id, rule) as connection:
                        until = await db.settled_until(connection, group.machine_id, cutoff)
                        if store.table == "frame":
                            await db.close_buckets(connection, [group], until)
                        removed = await db.remove_rows(connection, store, group, until, self._rows_per_step)
                    await self._removed(store.name, removed, started)
            if not groups:
                return
            after = groups[-1].machine_id

    async def _remove_quarantined(self, firm_id: int, rule: Rule, cutoff: datetime) -> None:
        removed = self._rows_per_step
        while removed >= self._rows_per_step:
            started = time.monotonic()
            async with self._step(firm_id, rule) as connection:
                removed = await db.remove_quarantined(connection, firm_id, cutoff, self._rows_per_step)
            await self._removed("quarantine", removed, started)

    async def _removed(self, what: str, rows: int, started: float) -> None:
        if rows:
            self._rows += rows
            rows_removed_total.labels(what).inc(rows)
            await asyncio.sleep((time.monotonic() - started) * PAUSE_SHARE)
