"""The historian: frames from the message log into the database, with their rollups, in one transaction with the position.

Frames newer than everything stored for their machine (one writer a partition knows it) go in by COPY and cannot collide. The
rest, late, repeated or corrected, are merged value by value, many at a time, and the closed buckets that they touch are made anew.
"""

import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg
import numpy as np
from aiokafka import ConsumerRecord
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge, Histogram

from services.common import tracing
from services.common.clock import Clock, from_us, to_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import TryAgain
from services.common.logs import get_logger
from services.common.texts import showable
from services.ingest.domain import PATH_LENGTH_MAX, QUARANTINE_BYTES_PER_FIRM_MAX, STORED_DAYS_MIN
from services.ingest.historian.binarycopy import HEADER, TRAILER, Floats, Ints, keyed_rows
from services.ingest.historian.rollups import Bools, OpenBuckets, Stats
from services.ingest.numbering import numbers_of
from smdih.ingest.v1 import records_pb2, telemetry_pb2

log = get_logger(__name__)

MINUTE_US = 60 * 1_000_000
MINUTES_AN_HOUR = 60
DAY_US = 24 * 3600 * 1_000_000
# Buckets of one statement times the chunks that each is looked for in. Five years of one row a minute, 131,072 rows in a poll: 6 s
# in any order; one statement for all of them took 11 s in order, and more than COMMAND_TIMEOUT_S where each hour had one row.
LOOKUPS_MAX = 4_000
HISTORY_AGE_US = STORED_DAYS_MIN * 86_400 * 1_000_000
NOTHING_STORED_US = np.iinfo(np.int64).min

# Samples taken out of the message log, by the way they went: in_order (new rows by COPY) or merged (late, repeated, corrected).
samples_total = Counter("smdih_ingest_historian_samples_total", "Samples stored by the historian", ["way"])
# Buckets written, by resolution and how: closed (from memory) or remade (from the frames).
buckets_total = Counter("smdih_ingest_historian_buckets_total", "Rollup buckets written", ["resolution", "how"])
# One poll's work, from bytes to rows, without the commit.
store_seconds = Histogram(
    "smdih_ingest_historian_store_seconds",
    "Time to store what one poll brought",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
# From the receipt at the door to the database, of the oldest samples that a poll brought.
delay_seconds = Histogram(
    "smdih_ingest_historian_delay_seconds",
    "Time from the receipt of the oldest samples of a poll until they are stored",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800),
)
# Quarantined items stored, and those that were refused because their firm's quarantine is full.
quarantine_items_total = Counter("smdih_ingest_historian_quarantine_items_total", "Quarantined items stored")
quarantine_refused_total = Counter("smdih_ingest_historian_quarantine_refused_total", "Items refused: quarantine full")
# Now minus the time of the newest stored sample, over the machines whose partitions are held here and that sent within
# STILL_SENDING_S: quantiles, 1.0 is the machine that is furthest behind. And how many machines these are.
freshness_seconds = Gauge(
    "smdih_ingest_freshness_seconds", "Age of the newest stored sample of a machine", ["quantile"]
)
machines_stored = Gauge("smdih_ingest_machines", "Machines with samples of the last 24 hours, of this process")
# Acknowledged batches that never came out of the message log, by the doors' own numbers.
missing_batches = Gauge(
    "smdih_ingest_missing_batches", "In the database: acknowledged batches that never came; must be 0"
)

STILL_SENDING_S = 24 * 3600
FRESHNESS_QUANTILES = (0.5, 0.9, 0.99, 1.0)
MEASURE_INTERVAL_S = 5.0

_KEY_COLUMNS = ("machine_id", "first_position", "ts")
_BUCKET_COLUMNS = (*_KEY_COLUMNS, "counts", "sums", "mins", "maxs", "lasts")

# Late frames on their way into the table of frames; a connection keeps it, empty between transactions.
_LATE_TABLE = "CREATE TEMPORARY TABLE IF NOT EXISTS late_frame (LIKE frame) ON COMMIT DELETE ROWS"
_MERGE = """
INSERT INTO frame AS f (machine_id, first_position, ts, values) SELECT machine_id, first_position, ts, values FROM late_frame
ON CONFLICT (machine_id, first_position, ts) DO UPDATE SET values = {merged}
"""
# What was sent again fills what is missing; everything else corrects what is there.
_MERGE_REPEATED = _MERGE.format(merged="merged(f.values, excluded.values)")
_MERGE_CORRECTING = _MERGE.format(merged="merged(excluded.values, f.values)")

_REMAKE = """
INSERT INTO {table} (machine_id, first_position, ts, counts, sums, mins, maxs, lasts)
SELECT touched.machine_id, touched.first_position, b.ts, b.counts, b.sums, b.mins, b.maxs, b.lasts
FROM unnest($1::bigint[], $2::int[], $3::timestamptz[]) AS touched (machine_id, first_position, ts),
     LATERAL {source} AS b
ON CONFLICT (machine_id, first_position, ts) DO UPDATE SET
    counts = excluded.counts, sums = excluded.sums, mins = excluded.mins, maxs = excluded.maxs, lasts = excluded.lasts
-- Fewer samples than before: retention has removed frames, and the bucket knows more than what is left of them.
WHERE total(excluded.counts) >= total({table}.counts)
"""

_QUARANTINE = """
INSERT INTO quarantine AS q (id, firm_id, credential_id, source, door, reason, detail, samples, received, correlation_id, batch,
    raw, machine_id, machine_path)
SELECT id, firm_id, credential_id, source, door, reason, detail, samples, received, correlation_id, batch,
    raw, machine_id, machine_path
FROM unnest($1::text[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[], $9::timestamptz[],
    $10::text[], $11::bytea[], $12::bytea[], $13::bigint[], $14::text[]) AS n (id, firm_id, credential_id, source, door, reason,
    detail, samples, received, correlation_id, batch, raw, machine_id, machine_path)
ON CONFLICT (id) DO UPDATE SET credential_id = excluded.credential_id, door = excluded.door, detail = excluded.detail,
    received = excluded.received, correlation_id = excluded.correlation_id, batch = excluded.batch, raw = excluded.raw,
    machine_path = excluded.machine_path, replayed = NULL
WHERE q.replayed IS NOT NULL
"""

# Of a machine whose frames retention has removed, the buckets say how far it had come.
_NEWEST = """
SELECT asked.machine_id, asked.first_position, greatest(
    (SELECT f.ts FROM frame f WHERE f.machine_id = asked.machine_id AND f.first_position = asked.first_position
     ORDER BY f.ts DESC LIMIT 1),
    (SELECT r.ts + INTERVAL '1 minute' - INTERVAL '1 microsecond' FROM rollup_1m r
     WHERE r.machine_id = asked.machine_id AND r.first_position = asked.first_position ORDER BY r.ts DESC LIMIT 1),
    (SELECT r.ts FROM rollup_1h r
     WHERE r.machine_id = asked.machine_id AND r.first_position = asked.first_position ORDER BY r.ts DESC LIMIT 1)
) AS ts
FROM unnest($1::bigint[], $2::int[]) AS asked (machine_id, first_position)
"""


@dataclass(frozen=True)
class _Resolution:
    name: str
    table: str
    width_us: int
    # What a bucket is made anew from: the minute from frames, the hour from its minutes, which are closed and written before it.
    source: str
    source_chunk_us: int


_MINUTE = _Resolution(
    "minute",
    "rollup_1m",
    MINUTE_US,
    "buckets_from_frames(touched.machine_id, touched.first_position, touched.ts, touched.ts + INTERVAL '1 minute', "
    "INTERVAL '1 minute', {lo}, {hi})",
    source_chunk_us=7 * DAY_US,
)
_HOUR = _Resolution(
    "hour",
    "rollup_1h",
    MINUTE_US * MINUTES_AN_HOUR,
    "hours_from_minutes(touched.machine_id, touched.first_position, touched.ts, touched.ts + INTERVAL '1 hour', {lo}, {hi})",
    source_chunk_us=30 * DAY_US,
)


class _Lane:
    """Machines (channel groups) of one width, in arrays: slot i is one of them."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.machine_ids: Ints = np.zeros(0, dtype=np.int64)
        self.first_positions: Ints = np.zeros(0, dtype=np.int64)
        self.newest_us: Ints = np.zeros(0, dtype=np.int64)
        self.minutes = OpenBuckets(width)
        self.hours = OpenBuckets(width)
        self._slots = 0

    def add(self, machine_id: int, first_position: int, newest_us: int) -> int:
        slot, self._slots = self._slots, self._slots + 1
        if slot == len(self.machine_ids):
            size = max(64, slot * 2)
            for name in ("machine_ids", "first_positions", "newest_us"):
                grown = np.zeros(size, dtype=np.int64)
                grown[:slot] = getattr(self, name)[:slot]
                setattr(self, name, grown)
            self.minutes.make_room(size)
            self.hours.make_room(size)
        self.machine_ids[slot], self.first_positions[slot], self.newest_us[slot] = machine_id, first_position, newest_us
        if newest_us != NOTHING_STORED_US:
            self.minutes.mark_partial(slot, newest_us // _MINUTE.width_us)
            self.hours.mark_partial(slot, newest_us // _HOUR.width_us)
        return slot


@dataclass(frozen=True)
class _Part:
    """A frame batch with what has been found out about it."""

    batch: records_pb2.FrameBatch
    # The sender has sent this before: it may fill what is missing, but not change what is there.
    is_repeat: bool


class Historian:
    """Stores the records of one poll; owned by one consumer, used by one task at a time."""

    def __init__(self, clock: Clock, *, quarantine_bytes_max: int = QUARANTINE_BYTES_PER_FIRM_MAX) -> None:
        self._clock = clock
        self._quarantine_bytes_max = quarantine_bytes_max
        self._next_numbers: dict[tuple[str, int, str], int] = {}
        self._lanes: dict[int, _Lane] = {}
        self._slots: dict[tuple[int, int], tuple[_Lane, int]] = {}
        self._heads: dict[tuple[int, int, str], int] = {}

    async def forget(self) -> None:
        """Drop what is held in memory; the database has it, and it is read again when needed.

        Needed whenever a transaction did not commit or partitions changed hands: memory may then be ahead or behind.
        """
        self._lanes.clear()
        self._slots.clear()
        self._heads.clear()
        self._next_numbers.clear()

    def newest(self) -> tuple[Ints, Ints]:
        """Machines (some more than once) and the times of their newest stored samples, of those that have any."""
        lanes = self._lanes.values()
        nothing: Ints = np.zeros(0, dtype=np.int64)
        machine_ids = np.concatenate([nothing, *(lane.machine_ids for lane in lanes)])
        newest_us = np.concatenate([nothing, *(lane.newest_us for lane in lanes)])
        known = (machine_ids > 0) & (newest_us != NOTHING_STORED_US)
        return machine_ids[known], newest_us[known]

    async def store(
        self, connection: Connection, records: Sequence[ConsumerRecord]
    ) -> list[tuple[ConsumerRecord, str]]:
        """Store samples records in the caller's transaction; return the unreadable ones, each with its reason.

        The commit does not wait for the disk: what a crash of the server takes back it takes back with the position, and the
        records are read again.
        """
        started = time.perf_counter()
        await connection.execute("SET LOCAL synchronous_commit TO off")
        bad: list[tuple[ConsumerRecord, str]] = []
        read: list[tuple[int, records_pb2.FrameBatch]] = []
        oldest_us = self._clock.now_us()
        for record in records:
            try:
                batches = records_pb2.SamplesRecord.FromString(record.value).batches
            except DecodeError:
                bad.append((record, "UNREADABLE"))
                continue
            if not all(_fits(batch) for batch in batches):
                bad.append((record, "SHAPE_MISMATCH"))
                continue
            read.extend((record.partition, batch) for batch in batches)
            if batches:
                oldest_us = min(oldest_us, batches[0].received_us)
        parts = await self._recognise_repeats(connection, read)
        await self._learn_machines(connection, (part.batch for part in parts))
        by_lane: dict[int, tuple[_Lane, list[_Part]]] = {}
        for part in parts:
            lane, _ = self._slots[part.batch.machine_id, part.batch.first_position]
            by_lane.setdefault(lane.width, (lane, []))[1].append(part)
        for lane, lane_parts in by_lane.values():
            await self._store_lane(connection, lane, lane_parts)
        store_seconds.observe(time.perf_counter() - started)
        delay_seconds.observe((self._clock.now_us() - oldest_us) / 1e6)
        if tracing.is_on():
            seconds = time.perf_counter() - started
            tracing.note("historian store", (batch.correlation_id for _, batch in read), seconds=seconds)
        return bad

    async def store_quarantine(
        self, connection: Connection, records: Sequence[ConsumerRecord]
    ) -> list[tuple[ConsumerRecord, str]]:
        """The same for quarantine records; those of a firm that has as much there as it may are counted only."""
        bad: list[tuple[ConsumerRecord, str]] = []
        items: dict[str, tuple[records_pb2.QuarantineRecord, datetime]] = {}
        for record in records:
            try:
                item = records_pb2.QuarantineRecord.FromString(record.value)
                items.setdefault(item.id, (item, from_us(item.received_us)))
            except (DecodeError, OverflowError):
                bad.append((record, "UNREADABLE"))
        # What comes again while it waits is the same item. What comes again after it was replayed waits again.
        waiting = await connection.fetch(
            "SELECT id FROM quarantine WHERE id = ANY($1::text[]) AND replayed IS NULL", list(items)
        )
        for row in waiting:
            del items[row["id"]]
        used = await connection.fetch(
            "SELECT firm_id, sum(bytes)::bigint AS bytes FROM quarantine_day WHERE firm_id = ANY($1::bigint[]) GROUP BY firm_id",
            list({item.firm_id for item, _ in items.values()}),
        )
        size: dict[int, int] = {row["firm_id"]: row["bytes"] for row in used}
        rows: list[tuple[object, ...]] = []
        refused: dict[int, list[records_pb2.QuarantineRecord]] = {}
        for item, received in items.values():
            if size.get(item.firm_id, 0) >= self._quarantine_bytes_max:
                refused.setdefault(item.firm_id, []).append(item)
                continue
            size[item.firm_id] = size.get(item.firm_id, 0) + len(item.batch) + len(item.raw)
            rows.append(
                (
                    *(item.id, item.firm_id, item.credential_id, item.source, item.door, item.reason, item.detail),
                    *(item.samples, received, item.correlation_id, item.batch or None, item.raw or None),
                    *(item.machine_id, _path_of(item)),
                )
            )
        if rows:
            await connection.execute(_QUARANTINE, *(list(column) for column in zip(*rows, strict=True)))
        await self._note_refused(connection, refused)
        quarantine_items_total.inc(len(rows))
        return bad

    async def _note_refused(
        self, connection: Connection, refused: Mapping[int, Sequence[records_pb2.QuarantineRecord]]
    ) -> None:
        for firm_id, items in sorted(refused.items()):
            samples = sum(item.samples for item in items)
            await connection.execute(
                "INSERT INTO quarantine_use AS u (firm_id, refused_items, refused_samples, refused_last) "
                "VALUES ($1, $2, $3, $4) ON CONFLICT (firm_id) DO UPDATE SET "
                "refused_items = u.refused_items + excluded.refused_items, "
                "refused_samples = u.refused_samples + excluded.refused_samples, refused_last = excluded.refused_last",
                *(firm_id, len(items), samples, self._now()),
            )
            quarantine_refused_total.inc(len(items))
            log.warning("quarantine is full", firm_id=firm_id, items=len(items), samples=samples)

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())

    async def note_numbers(self, topic: str, connection: Connection, records: Sequence[ConsumerRecord]) -> None:
        """Note how far each door has come in the topic (named without prefix), and what is missing."""
        numbered = [(record.partition, found) for record in records if (found := numbers_of(record.headers))]
        if not numbered:
            return
        unknown = {
            (partition, found.door)
            for partition, found in numbered
            if (topic, partition, found.door) not in self._next_numbers
        }
        if unknown:
            rows = await connection.fetch(
                "SELECT n.partition, n.door, n.next_number FROM door_numbers n JOIN unnest($2::int[], $3::text[]) AS asked "
                "(partition, door) USING (partition, door) WHERE n.topic = $1",
                *(topic, [partition for partition, _ in unknown], [door for _, door in unknown]),
            )
            self._next_numbers.update({(topic, row["partition"], row["door"]): row["next_number"] for row in rows})
        moved: dict[tuple[str, int, str], int] = {}
        for partition, found in numbered:
            key = (topic, partition, found.door)
            # Of a door that nobody has heard of: it may have been read before its numbers were kept.
            expected = self._next_numbers.get(key, found.first)
            missing = max(0, found.first - expected)
            if missing:
                log.error("acknowledged batches are missing", topic=topic, partition=partition, batches=missing)
            moved[key] = moved.get(key, 0) + missing
            self._next_numbers[key] = max(expected, found.first + found.batches)
        await connection.execute(
            "INSERT INTO door_numbers AS n (topic, partition, door, next_number, missing) "
            "SELECT * FROM unnest($1::text[], $2::int[], $3::text[], $4::bigint[], $5::bigint[]) "
            "ON CONFLICT (topic, partition, door) DO UPDATE SET "
            "next_number = excluded.next_number, missing = n.missing + excluded.missing, noted = now()",
            *(list(column) for column in zip(*moved, strict=True)),
            [self._next_numbers[key] for key in moved],
            list(moved.values()),
        )

    async def _recognise_repeats(
        self, connection: Connection, read: Sequence[tuple[int, records_pb2.FrameBatch]]
    ) -> list[_Part]:
        numbered = [(partition, batch.firm_id, batch.source) for partition, batch in read if batch.sequence]
        unknown = [key for key in dict.fromkeys(numbered) if key not in self._heads]
        if unknown:
            rows = await connection.fetch(
                "SELECT h.partition, h.firm_id, h.source, h.sequence::text AS sequence FROM source_head h "
                "JOIN unnest($1::int[], $2::bigint[], $3::text[]) AS asked (partition, firm_id, source) "
                "USING (partition, firm_id, source)",
                *(list(column) for column in zip(*unknown, strict=True)),
            )
            self._heads.update(dict.fromkeys(unknown, 0))
            self._heads.update(
                {(row["partition"], row["firm_id"], row["source"]): int(row["sequence"]) for row in rows}
            )
        before = {key: self._heads[key] for key in numbered}
        parts = []
        for partition, batch in read:
            key = (partition, batch.firm_id, batch.source)
            is_repeat = False
            if batch.sequence:
                # Of this poll's own batches those behind their head: a batch of several channel groups is not behind itself.
                is_repeat = batch.sequence <= before[key] or batch.sequence < self._heads[key]
                if not batch.more:  # the rest of a batch that was split may come in the next poll
                    self._heads[key] = max(self._heads[key], batch.sequence)
            parts.append(_Part(batch, is_repeat))
        moved = [(*key, str(self._heads[key])) for key, was in before.items() if self._heads[key] > was]
        if moved:
            await connection.execute(
                "INSERT INTO source_head (partition, firm_id, source, sequence) "
                "SELECT p, f, s, n::numeric FROM unnest($1::int[], $2::bigint[], $3::text[], $4::text[]) AS moved (p, f, s, n) "
                "ON CONFLICT (partition, firm_id, source) DO UPDATE SET sequence = excluded.sequence",
                *(list(column) for column in zip(*moved, strict=True)),
            )
        return parts

    async def _learn_machines(self, connection: Connection, batches: Iterable[records_pb2.FrameBatch]) -> None:
        widths: dict[tuple[int, int], int] = {}
        for batch in batches:
            key = (batch.machine_id, batch.first_position)
            known = self._slots.get(key)
            widest = max(batch.width, widths.get(key, 0), known[0].width if known else 0)
            if known is None or known[0].width < widest:
                widths[key] = widest
        if not widths:
            return
        rows = await connection.fetch(_NEWEST, [key[0] for key in widths], [key[1] for key in widths])
        newest = {(row["machine_id"], row["first_position"]): to_us(row["ts"]) for row in rows if row["ts"]}
        for key, width in widths.items():
            lane = self._lanes.setdefault(width, _Lane(width))
            self._slots[key] = (lane, lane.add(*key, newest.get(key, NOTHING_STORED_US)))

    async def _store_lane(self, connection: Connection, lane: _Lane, parts: Sequence[_Part]) -> None:
        slots, times, values, repeats = _rows(self._slots, lane, parts)
        order = np.lexsort((times, slots))  # stable: of equal (slot, time) the one delivered first comes first
        slots, times, values, repeats = slots[order], times[order], values[order], repeats[order]
        again = np.concatenate([[False], (np.diff(slots) == 0) & (np.diff(times) == 0)])
        fresh = (times > lane.newest_us[slots]) & ~again
        if fresh.any():
            await self._append(connection, lane, slots[fresh], times[fresh], values[fresh])
        if not fresh.all():
            late = np.flatnonzero(~fresh)
            await self._merge(connection, lane, slots[late], times[late], values[late], repeats[late])
        history = times < self._clock.now_us() - HISTORY_AGE_US
        if history.any():
            await self._note_history(connection, lane.machine_ids[slots[history]], times[history])

    async def _note_history(self, connection: Connection, of: Ints, times: Ints) -> None:
        """Retention would remove at its next run what has just been loaded."""
        machine_ids, numbers = np.unique(of, return_inverse=True)
        oldest = np.full(len(machine_ids), np.iinfo(np.int64).max)
        np.minimum.at(oldest, numbers, times)
        await connection.execute(
            "INSERT INTO history_load AS h (machine_id, day, loaded, oldest) "
            "SELECT machine_id, ($3::timestamptz AT TIME ZONE 'UTC')::date, $3, oldest "
            "FROM unnest($1::bigint[], $2::timestamptz[]) AS n (machine_id, oldest) "
            "ON CONFLICT (machine_id, day) DO UPDATE SET loaded = excluded.loaded, oldest = least(h.oldest, excluded.oldest)",
            *(machine_ids.tolist(), [from_us(time_us) for time_us in oldest.tolist()], self._now()),
        )

    async def _append(self, connection: Connection, lane: _Lane, slots: Ints, times: Ints, values: Floats) -> None:
        rows = keyed_rows(lane.machine_ids[slots], lane.first_positions[slots], times, [values])
        await _copy(connection, "frame", (*_KEY_COLUMNS, "values"), rows)
        samples_total.labels("in_order").inc(int(np.count_nonzero(~np.isnan(values))))
        is_last = np.concatenate([np.diff(slots) != 0, [True]])
        lane.newest_us[slots[is_last]] = times[is_last]
        minutes = Stats.of_frames(slots, times, values, _MINUTE.width_us).reduced()
        hours = minutes.rebucketed(MINUTES_AN_HOUR).reduced()
        for resolution, opened, stats in ((_MINUTE, lane.minutes, minutes), (_HOUR, lane.hours, hours)):
            complete, partial = opened.add(stats)
            if len(complete.slots):
                rows = keyed_rows(
                    lane.machine_ids[complete.slots],
                    lane.first_positions[complete.slots],
                    complete.buckets * resolution.width_us,
                    [complete.counts, complete.sums, complete.mins, complete.maxs, complete.lasts],
                )
                await _copy(connection, resolution.table, _BUCKET_COLUMNS, rows)
                buckets_total.labels(resolution.name, "closed").inc(len(complete.slots))
            await _remake(connection, lane, resolution, partial.slots, partial.buckets)

    async def _merge(
        self, connection: Connection, lane: _Lane, slots: Ints, times: Ints, values: Floats, repeats: Bools
    ) -> None:
        await connection.execute(_LATE_TABLE)
        # A statement takes each frame once. Of corrections the last value counts; what was sent again fills what is missing still.
        for merge, chosen in ((_MERGE_CORRECTING, ~repeats), (_MERGE_REPEATED, repeats)):
            if not chosen.any():
                continue
            of, at, merged = _one_each(slots[chosen], times[chosen], values[chosen], last=merge is _MERGE_CORRECTING)
            rows = keyed_rows(lane.machine_ids[of], lane.first_positions[of], at, [merged])
            await _copy(connection, "late_frame", (*_KEY_COLUMNS, "values"), rows)
            await connection.execute(merge)
            await connection.execute("DELETE FROM late_frame")
        samples_total.labels("merged").inc(int(np.count_nonzero(~np.isnan(values))))
        for resolution, opened in ((_MINUTE, lane.minutes), (_HOUR, lane.hours)):
            touched = np.unique(np.stack([slots, times // resolution.width_us]), axis=1)
            open_buckets = lane.newest_us[touched[0]] // resolution.width_us
            for slot, bucket in touched[:, touched[1] == open_buckets].T:
                opened.mark_partial(int(slot), int(bucket))
            closed = touched[:, touched[1] < open_buckets]
            await _remake(connection, lane, resolution, closed[0], closed[1])


class StoredGauges:
    """What is stored of the machines, and what is missing, for those who watch. No label names a machine."""

    def __init__(self, historians: Sequence[Historian], pool: Pool, clock: Clock) -> None:
        self._historians = historians
        self._pool = pool
        self._clock = clock

    async def measure(self) -> None:
        """Raises TryAgain."""
        ages = self._ages_s()
        machines_stored.set(len(ages))
        for quantile in FRESHNESS_QUANTILES:
            freshness_seconds.labels(str(quantile)).set(np.quantile(ages, quantile) if len(ages) else np.nan)
        async with transaction(self._pool) as connection:
            missing_batches.set(await connection.fetchval("SELECT coalesce(sum(missing), 0)::bigint FROM door_numbers"))

    def _ages_s(self) -> Floats:
        found = [historian.newest() for historian in self._historians]
        machine_ids = np.concatenate([one[0] for one in found])
        newest_us = np.concatenate([one[1] for one in found])
        if not len(machine_ids):
            return np.zeros(0)
        order = np.argsort(machine_ids, kind="stable")
        starts = np.flatnonzero(np.diff(machine_ids[order], prepend=-1))
        ages = (self._clock.now_us() - np.maximum.reduceat(newest_us[order], starts)) / 1e6
        return ages[ages < STILL_SENDING_S]


async def _remake(connection: Connection, lane: _Lane, resolution: _Resolution, slots: Ints, buckets: Ints) -> None:
    times = buckets * resolution.width_us
    for some in _lookups(times, resolution.source_chunk_us):
        starts = [from_us(time_us) for time_us in times[some].tolist()]
        lo, hi = f"'{starts[0]}'::timestamptz", f"'{from_us(int(times[some[-1]]) + resolution.width_us)}'::timestamptz"
        await connection.execute(
            _REMAKE.format(table=resolution.table, source=resolution.source.format(lo=lo, hi=hi)),
            lane.machine_ids[slots[some]].tolist(),
            lane.first_positions[slots[some]].tolist(),
            starts,
        )
    buckets_total.labels(resolution.name, "remade").inc(len(slots))


def _lookups(times: Ints, chunk_us: int) -> Iterator[Ints]:
    """Which of these buckets to look for together, in order of time: a few may lie far apart, many only close to each other."""
    order = np.argsort(times, kind="stable")
    chunks = times[order] // chunk_us
    first = 0
    while first < len(order):
        rest = chunks[first : first + LOOKUPS_MAX]
        lookups = np.arange(1, len(rest) + 1) * (rest - rest[0] + 1)
        count = int(np.searchsorted(lookups, LOOKUPS_MAX, side="right"))  # they only grow
        yield order[first : first + count]
        first += count


async def _copy(connection: Connection, table: str, columns: Sequence[str], rows: bytes) -> None:
    try:
        await connection.copy_to_table(
            table, columns=list(columns), source=io.BytesIO(HEADER + rows + TRAILER), format="binary"
        )
    except asyncpg.UniqueViolationError as error:
        # Retention closed a bucket that is still open in memory. Read again how far each machine has come.
        raise TryAgain("What is held in memory is behind the database.") from error


def _one_each(slots: Ints, times: Ints, values: Floats, *, last: bool) -> tuple[Ints, Ints, Floats]:
    """Of frames sorted by (slot, time) one each: cell by cell the last value that there is, or the first."""
    starts = np.flatnonzero(np.concatenate([[True], (np.diff(slots) != 0) | (np.diff(times) != 0)]))
    if len(starts) == len(slots):
        return slots, times, values
    row = np.arange(len(slots))[:, None]
    present = ~np.isnan(values)
    if last:
        chosen = np.maximum.reduceat(np.where(present, row, 0), starts, axis=0)
    else:
        chosen = np.minimum.reduceat(np.where(present, row, len(slots) - 1), starts, axis=0)
    # Where there is none, the row chosen means nothing.
    some = np.logical_or.reduceat(present, starts, axis=0)
    return slots[starts], times[starts], np.where(some, np.take_along_axis(values, chosen, axis=0), np.nan)


def _path_of(item: records_pb2.QuarantineRecord) -> str:
    """Of an item for a machine that is not registered: its path as it would be registered."""
    if item.machine_id or not item.batch:
        return ""
    try:
        path = telemetry_pb2.Batch.FromString(item.batch).machine_path
    except DecodeError:
        return ""
    return showable(path.lower()[:PATH_LENGTH_MAX])


def _fits(batch: records_pb2.FrameBatch) -> bool:
    rows, rest = divmod(len(batch.times_us), 8)
    return batch.width > 0 and rest == 0 and len(batch.values) == rows * batch.width * 8


def _rows(
    known: dict[tuple[int, int], tuple[_Lane, int]], lane: _Lane, parts: Sequence[_Part]
) -> tuple[Ints, Ints, Floats, Bools]:
    """The frames of many batches as arrays: slots, times, values (as wide as the lane), repeats."""
    counts = [len(part.batch.times_us) // 8 for part in parts]
    slots = np.repeat([known[part.batch.machine_id, part.batch.first_position][1] for part in parts], counts)
    repeats = np.repeat([part.is_repeat for part in parts], counts)
    times = np.frombuffer(b"".join(part.batch.times_us for part in parts), dtype="<i8").astype(np.int64)
    if all(part.batch.width == lane.width for part in parts):
        values = np.frombuffer(b"".join(part.batch.values for part in parts), dtype="<f8").reshape(-1, lane.width)
        return slots, times, values, repeats
    values = np.full((len(times), lane.width), np.nan)
    row = 0
    for part, count in zip(parts, counts, strict=True):
        narrow = np.frombuffer(part.batch.values, dtype="<f8").reshape(-1, part.batch.width)
        values[row : row + count, : part.batch.width] = narrow
        row += count
    return slots, times, values, repeats
