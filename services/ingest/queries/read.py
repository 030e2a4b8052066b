"""Stored values as arrays: read by binary COPY in pages of bounded size, so that any range takes the same memory.

A page is one short statement. Nothing is held in the database between two pages, however slowly they are used.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from services.common.clock import from_us, to_us
from services.common.database import Connection, Pool, transaction
from services.ingest.historian.binarycopy import HEADER, POSTGRES_EPOCH_US
from services.ingest.historian.rollups import Stats
from services.ingest.queries.store import SignalPlace

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

MINUTE_US = 60 * 1_000_000
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US

# Values read at a time, all channel groups together: 8 bytes each in memory, three times that on the way.
PAGE_CELLS_MAX = 100_000
PAGE_ROWS_MAX = 20_000
PAGE_ROWS_MIN = 100
# Except of so many signals that even these few rows would be large.
PAGE_CELLS_OF_FEW_ROWS_MAX = 1_000_000
# A statement over more chunks than this spans (a chunk has 7 days) takes longer to plan than to run.
PAGE_SPAN_US = 35 * DAY_US

_FRAMES = """
SELECT ts, {cells} FROM frame
WHERE machine_id = {machine_id} AND first_position = {first_position} AND ts >= TIMESTAMPTZ '{start}' AND ts < TIMESTAMPTZ '{end}'
ORDER BY ts LIMIT {limit}
"""
_BUCKETS = """
SELECT ts, {cells} FROM {function}({machine_id}, {first_position}, TIMESTAMPTZ '{start}', TIMESTAMPTZ '{end}') ORDER BY ts
"""
_HELD = """
SELECT min(least(frame, hour)) AS first, max(last) AS last,
       max(coalesce(frame, last)) FILTER (WHERE hour + INTERVAL '1 hour' <= coalesce(frame, 'infinity')) AS samples,
       max(coalesce(minute, last)) FILTER (WHERE hour + INTERVAL '1 hour' <= coalesce(minute, 'infinity')) AS minutes
FROM (
    SELECT (SELECT ts FROM frame WHERE machine_id = m AND first_position = p ORDER BY ts LIMIT 1) AS frame,
           (SELECT ts FROM rollup_1m WHERE machine_id = m AND first_position = p ORDER BY ts LIMIT 1) AS minute,
           (SELECT ts FROM rollup_1h WHERE machine_id = m AND first_position = p ORDER BY ts LIMIT 1) AS hour,
           greatest(
               (SELECT ts FROM frame WHERE machine_id = m AND first_position = p ORDER BY ts DESC LIMIT 1),
               (SELECT ts FROM rollup_1h WHERE machine_id = m AND first_position = p ORDER BY ts DESC LIMIT 1)) AS last
    FROM unnest($1::bigint[], $2::int[]) AS asked (m, p)
) AS found WHERE last IS NOT NULL
"""
_FRAME_CELL = "coalesce(values[{index}], 'NaN')"
_BUCKET_CELLS = (
    "coalesce(counts[{index}], 0)",
    "coalesce(sums[{index}], 0)",
    "coalesce(mins[{index}], 'NaN')",
    "coalesce(maxs[{index}], 'NaN')",
    "coalesce(lasts[{index}], 'NaN')",
)


@dataclass(frozen=True)
class Resolution:
    """How stored buckets are had."""

    name: str
    width_us: int
    function: str


MINUTE = Resolution("minute", MINUTE_US, "buckets_1m")
HOUR = Resolution("hour", HOUR_US, "buckets_1h")


@dataclass(frozen=True)
class Group:
    """The asked signals of one machine that stand in the same rows."""

    machine_id: int
    first_position: int
    # Of the values in the stored arrays, from 1 as PostgreSQL counts.
    indexes: tuple[int, ...]
    # Of the signals in the order in which they were asked for.
    columns: Ints


@dataclass(frozen=True)
class Held:
    """What is stored of some signals' rows: outside of [first, end) nothing; before the other times retention has removed samples,
    or minutes, of some."""

    first_us: int
    end_us: int
    samples_from_us: int
    minutes_from_us: int


def groups_of(places: Sequence[SignalPlace]) -> list[Group]:
    by_row: dict[tuple[int, int], list[int]] = {}
    for column, place in enumerate(places):
        by_row.setdefault((place.machine_id, place.first_position), []).append(column)
    return [
        Group(*row, tuple(places[column].index for column in columns), np.array(columns, dtype=np.int64))
        for row, columns in by_row.items()
    ]


async def held(connection: Connection, places: Sequence[SignalPlace]) -> Held:
    groups = groups_of(places)
    row = await connection.fetchrow(_HELD, [g.machine_id for g in groups], [g.first_position for g in groups])
    if row is None or row["first"] is None:
        return Held(0, 0, 0, 0)
    samples, minutes = (to_us(row[name]) if row[name] is not None else 0 for name in ("samples", "minutes"))
    return Held(to_us(row["first"]), to_us(row["last"]) + HOUR_US, samples, minutes)


async def samples(
    pool: Pool, places: Sequence[SignalPlace], start_us: int, end_us: int
) -> AsyncGenerator[tuple[Ints, Floats], None]:
    """Samples of several signals over [start, end) in order of time: (times, times x signals with NaN where there is none).

    Each time comes once. What arrives late, behind what has been read already, is not seen.
    """
    cursors = [_Cursor(group, start_us, end_us) for group in groups_of(places)]
    rows = _page_rows(len(places))
    if start_us >= end_us:
        return
    while True:
        for cursor in cursors:
            await cursor.fill(pool, rows)
        # Later than what every group has been read to, another group may still have values.
        until = min((cursor.read_to_us for cursor in cursors), default=end_us)
        taken = [cursor.take(until) for cursor in cursors]
        times = np.unique(np.concatenate([part_times for part_times, _ in taken]))
        values = np.full((len(times), len(places)), np.nan)
        for cursor, (part_times, part) in zip(cursors, taken, strict=True):
            values[np.searchsorted(times, part_times)[:, None], cursor.group.columns] = part
        some = ~np.isnan(values).all(axis=1)
        if some.any():
            yield times[some], values[some]
        if until >= end_us:
            return


class _Cursor:
    """What has been read of one channel group and not been used yet."""

    def __init__(self, group: Group, start_us: int, end_us: int) -> None:
        self.group = group
        # All frames before this time have been read.
        self.read_to_us = start_us
        self._end_us = end_us
        self._times: Ints = np.zeros(0, dtype=np.int64)
        self._values: Floats = np.zeros((0, len(group.indexes)))

    async def fill(self, pool: Pool, rows: int) -> None:
        while not len(self._times) and self.read_to_us < self._end_us:
            page_end_us = min(self._end_us, self.read_to_us + PAGE_SPAN_US)
            async with transaction(pool) as connection:
                times, values = await frames(connection, self.group, self.read_to_us, page_end_us, rows)
            self._times, self._values = times, values
            self.read_to_us = int(times[-1]) + 1 if len(times) == rows else page_end_us

    def take(self, until_us: int) -> tuple[Ints, Floats]:
        count = int(np.searchsorted(self._times, until_us))
        taken = self._times[:count], self._values[:count]
        self._times, self._values = self._times[count:], self._values[count:]
        return taken


async def stats(
    pool: Pool, places: Sequence[SignalPlace], resolution: Resolution, start_us: int, end_us: int
) -> AsyncIterator[tuple[Group, Stats]]:
    """Stored buckets that begin in [start, end), page by page, group after group; buckets are numbered from 1970."""
    for group in groups_of(places):
        span_us = _page_rows(len(BUCKET_FIGURES) * len(group.indexes)) * resolution.width_us
        for page_us in range(start_us, end_us, span_us):
            async with transaction(pool) as connection:
                found = await buckets(connection, group, resolution, page_us, min(end_us, page_us + span_us))
            if len(found.buckets):
                yield group, found


# Of a bucket, in the order of the columns of `bucket_rows`.
BUCKET_FIGURES = ("count", "mean", "min", "max", "last")


async def bucket_rows(
    pool: Pool, places: Sequence[SignalPlace], resolution: Resolution, start_us: int, end_us: int
) -> AsyncGenerator[tuple[Ints, Floats], None]:
    """Stored buckets of several signals that begin in [start, end), in order of time: (starts, buckets x figures of each signal).

    NaN where a bucket holds no value of a signal; each time comes once.
    """
    groups = groups_of(places)
    rows = _page_rows(len(BUCKET_FIGURES) * len(places))
    for page_us in range(start_us, end_us, rows * resolution.width_us):
        page_end_us = min(end_us, page_us + rows * resolution.width_us)
        pages = []
        for group in groups:
            async with transaction(pool) as connection:
                pages.append(await buckets(connection, group, resolution, page_us, page_end_us))
        numbers = np.unique(np.concatenate([page.buckets for page in pages]))
        values = np.full((len(numbers), len(places), len(BUCKET_FIGURES)), np.nan)
        for group, page in zip(groups, pages, strict=True):
            means = page.sums / np.maximum(page.counts, 1)
            figures = np.stack([page.counts, means, page.mins, page.maxs, page.lasts], axis=2)
            figures[page.counts == 0] = np.nan
            values[np.searchsorted(numbers, page.buckets)[:, None], group.columns] = figures
        flat = values.reshape(len(numbers), len(places) * len(BUCKET_FIGURES))
        some = ~np.isnan(flat).all(axis=1)
        if some.any():
            yield numbers[some] * resolution.width_us, flat[some]


def _page_rows(columns: int) -> int:
    fewest = min(PAGE_ROWS_MIN, PAGE_CELLS_OF_FEW_ROWS_MAX // columns)
    return min(PAGE_ROWS_MAX, max(fewest, PAGE_CELLS_MAX // columns))


async def frames(connection: Connection, group: Group, start_us: int, end_us: int, limit: int) -> tuple[Ints, Floats]:
    """At most `limit` frames of [start, end), in order of time; NaN: no value."""
    width = len(group.indexes)
    sql = _sql(_FRAMES, group, start_us, end_us, (_FRAME_CELL,), limit=limit)
    cell = np.dtype([("len", ">i4"), ("value", ">f8")])
    rows = await _copied(connection, sql, [("cells", cell, (width,))])
    return _times(rows), rows["cells"]["value"].astype(np.float64).reshape(-1, width)


async def buckets(connection: Connection, group: Group, resolution: Resolution, start_us: int, end_us: int) -> Stats:
    """Stored buckets that begin in [start, end), in order of time; slot 0."""
    width = len(group.indexes)
    sql = _sql(_BUCKETS, group, start_us, end_us, _BUCKET_CELLS, function=resolution.function)
    number, cell = np.dtype([("len", ">i4"), ("value", ">i4")]), np.dtype([("len", ">i4"), ("value", ">f8")])
    names = ("counts", "sums", "mins", "maxs", "lasts")
    rows = await _copied(connection, sql, [(name, number if name == "counts" else cell, (width,)) for name in names])
    counts, *rest = (rows[name]["value"].reshape(-1, width) for name in names)
    return Stats(
        np.zeros(len(rows), dtype=np.int64),
        _times(rows) // resolution.width_us,
        counts.astype(np.int32),
        *(part.astype(np.float64) for part in rest),
    )


def _sql(template: str, group: Group, start_us: int, end_us: int, cells: Sequence[str], **more: str | int) -> str:
    # COPY takes no parameters. What is put in here are numbers and times of our own making, never a caller's text.
    return template.format(
        cells=", ".join(cell.format(index=index) for cell in cells for index in group.indexes),
        machine_id=group.machine_id,
        first_position=group.first_position,
        start=from_us(start_us).isoformat(),
        end=from_us(end_us).isoformat(),
        **more,
    )


async def _copied(connection: Connection, sql: str, fields: list[tuple[str, Any, Any]]) -> npt.NDArray[Any]:
    """The rows of a binary COPY whose first column is a time and which has no NULL."""
    parts: list[bytes] = []

    async def keep(data: bytes) -> None:
        parts.append(data)

    await connection.copy_from_query(sql, output=keep, format="binary")
    raw = b"".join(parts)
    row = np.dtype([("columns", ">i2"), ("ts_len", ">i4"), ("ts", ">i8"), *fields])
    return np.frombuffer(raw, dtype=row, offset=len(HEADER), count=(len(raw) - len(HEADER) - 2) // row.itemsize)


def _times(rows: npt.NDArray[Any]) -> Ints:
    return rows["ts"].astype(np.int64) + POSTGRES_EPOCH_US
