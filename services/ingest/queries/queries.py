"""What can be asked of the stored data; one method a use case."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.common.clock import to_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid, NotFound, TooLarge
from services.common.identity import Caller, Role
from services.ingest.asked import check_id, check_one_of, checked_time, number_in_token, page_size_of
from services.ingest.domain import HISTORY_PAGE_SIZE_MAX
from services.ingest.historian.rollups import Counts, Stats, joined
from services.ingest.queries import read, store
from services.ingest.queries.absent import Absent
from services.ingest.queries.access import Access
from services.ingest.queries.lttb import chosen
from services.ingest.queries.read import Floats, Ints
from services.ingest.queries.store import Bucket, Latest, SignalPlace
from services.ingest.queries.turns import Turns
from smdih.directory.v1 import directory_pb2 as pb

HISTORY_PAGE_SIZE_DEFAULT = 1_000
SIGNALS_PER_QUERY_MAX = 50
# In one answer, all signals together: about 2.5 MB by gRPC, 5 MB by HTTP.
BUCKETS_PER_QUERY_MAX = 50_000
# Values read for one answer, all signals together; a second or two of work.
CELLS_READ_MAX = 4_000_000
PLOT_POINTS_DEFAULT = 500
PLOT_POINTS_MIN, PLOT_POINTS_MAX = 3, 2_000
# Points to choose from for each point that is shown: fewer, and a finer resolution is read.
PLOT_CANDIDATES_PER_POINT = 8

FILLS = ("none", "empty", "locf")


@dataclass(frozen=True)
class History:
    """One page: samples or buckets, and where the next page begins (empty: nowhere)."""

    samples: list[tuple[int, float]]
    buckets: list[Bucket]
    next_page_token: str


@dataclass(frozen=True)
class BucketSeries:
    """One signal. Where count is 0, sum is 0, and the others are NaN or (locf) the last value before."""

    signal: SignalPlace
    times_us: Ints
    counts: Counts
    sums: Floats
    mins: Floats
    maxs: Floats
    lasts: Floats
    means: Floats


@dataclass(frozen=True)
class Buckets:
    """Several signals in buckets of one width; [from, to) are whole buckets."""

    from_us: int
    to_us: int
    width_s: int
    # What the buckets were made from: raw, minute or hour.
    resolution: str
    series: list[BucketSeries]


@dataclass(frozen=True)
class PlotSeries:
    """One signal, down-sampled."""

    signal: SignalPlace
    times_us: Ints
    values: Floats


@dataclass(frozen=True)
class Plot:
    # raw: each point is a sample. minute, hour: each is the least or greatest value of its bucket, placed inside that bucket.
    resolution: str
    series: list[PlotSeries]


class Queries:
    """What is stored, for those who may read it."""

    def __init__(self, pool: Pool, directory: Directory, access: Access, turns: Turns) -> None:
        self._pool = pool
        self._directory = directory
        self._access = access
        self._turns = turns
        self._absent = Absent()

    async def machine(self, caller: Caller, machine_id: int) -> pb.Machine:
        """Raises NotFound."""
        machine = self._directory.machines.get(machine_id)
        if machine is None:
            raise NotFound(f"There is no machine {machine_id}.")
        caller.check_sees_firm(machine.firm_id)
        return machine

    async def latest(self, caller: Caller, machine_id: int) -> list[Latest]:
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        machine = await self.machine(caller, machine_id)
        async with self._turns.of(caller), transaction(self._pool) as connection:
            return await store.latest(connection, machine, self._absent)

    async def history(
        self,
        caller: Caller,
        signal_id: int,
        from_us: int,
        to_us_: int,
        resolution: str,
        page_size: int,
        page_token: str,
    ) -> History:
        """One signal over [from, to): resolution raw, minute or hour. Raises NotFound, Forbidden, Invalid."""
        check_id(signal_id, "signal_id")
        check_one_of(resolution, ("raw", "minute", "hour"), "resolution")
        size = page_size_of(page_size, HISTORY_PAGE_SIZE_DEFAULT, HISTORY_PAGE_SIZE_MAX)
        start_us = number_in_token(page_token) if page_token else from_us
        start, end = checked_time(start_us, "from_us"), checked_time(to_us_, "to_us")
        if start >= end and not page_token:
            raise Invalid("from_us must be before to_us.")
        async with self._turns.of(caller), transaction(self._pool) as connection:
            place = await store.signal_place(connection, signal_id)
            # A bucket tells of all of its time, also of what lies behind the end of the range.
            width_us = {"raw": 1, "minute": read.MINUTE_US, "hour": read.HOUR_US}[resolution]
            await self._access.admit(caller, [place], start_us, -(-to_us_ // width_us) * width_us)
            if resolution == "raw":
                found = await store.samples(connection, place, start, end, size + 1)
                page = [(to_us(ts), value) for ts, value in found[:size]]
                return History(page, [], str(to_us(found[size][0])) if len(found) > size else "")
            buckets = await store.buckets(connection, place, start, end, size + 1, hours=resolution == "hour")
            return History([], buckets[:size], str(to_us(buckets[size].ts)) if len(buckets) > size else "")

    async def buckets(
        self, caller: Caller, signal_ids: Sequence[int], from_us: int, to_us: int, width_s: int, fill: str
    ) -> Buckets:
        """Several signals in buckets of `width_s`, counted from 1970 UTC; the range is widened to whole buckets.

        `fill` says what stands for buckets without a value: nothing ("none"), a bucket of count 0 ("empty"), or one of count 0
        that repeats the last value of the range before it ("locf"). Raises Invalid, NotFound, Forbidden, TooLarge.
        """
        check_range(from_us, to_us)
        check_one_of(fill, FILLS, "fill")
        resolution = _resolution_of(width_s)
        width_us = width_s * 1_000_000
        first, end = from_us // width_us, -(-to_us // width_us)
        start_us, end_us = first * width_us, end * width_us
        checked_time(start_us, "from_us")
        checked_time(end_us, "to_us")
        places = await self._places(caller, signal_ids, start_us, end_us)
        if (end - first) * len(places) > BUCKETS_PER_QUERY_MAX:
            raise TooLarge(
                f"That would be {(end - first) * len(places)} buckets, and an answer has at most {BUCKETS_PER_QUERY_MAX}: "
                "ask for wider buckets, a shorter range or fewer signals.",
                reason="TOO_MANY_BUCKETS",
            )
        if resolution is not None and (end_us - start_us) // resolution.width_us * len(places) > CELLS_READ_MAX:
            raise _too_much()
        async with self._turns.of(caller):
            if resolution is None:
                found = await self._from_samples(places, start_us, end_us, width_us)
            else:
                found = await self._from_stats(places, resolution, start_us, end_us, width_us)
        series = [_filled(place, stats, first, end, width_us, fill) for place, stats in zip(places, found, strict=True)]
        return Buckets(start_us, end_us, width_s, "raw" if resolution is None else resolution.name, series)

    async def plot(self, caller: Caller, signal_ids: Sequence[int], from_us: int, to_us: int, points: int) -> Plot:
        """Several signals as at most `points` points each (0: 500), chosen by LTTB so that the line keeps its look.

        Reads the coarsest resolution that has enough to choose from. Raises Invalid, NotFound, Forbidden, TooLarge.
        """
        check_range(from_us, to_us)
        points = points or PLOT_POINTS_DEFAULT
        if not PLOT_POINTS_MIN <= points <= PLOT_POINTS_MAX:
            raise Invalid(f"points: {PLOT_POINTS_MIN} to {PLOT_POINTS_MAX}.")
        places = await self._places(caller, signal_ids, from_us, to_us)
        async with self._turns.of(caller):
            return await self._plotted(places, from_us, to_us, points)

    async def _places(self, caller: Caller, signal_ids: Sequence[int], start_us: int, end_us: int) -> list[SignalPlace]:
        wanted = list(dict.fromkeys(signal_ids))
        if not 1 <= len(wanted) <= SIGNALS_PER_QUERY_MAX:
            raise Invalid(f"signal_id: name 1 to {SIGNALS_PER_QUERY_MAX} signals.")
        for signal_id in wanted:
            check_id(signal_id, "signal_id")
        async with transaction(self._pool) as connection:
            places = await store.signal_places(connection, wanted)
        await self._access.admit(caller, places, start_us, end_us)
        return places

    async def _from_samples(
        self, places: Sequence[SignalPlace], start_us: int, end_us: int, width_us: int
    ) -> list[Stats]:
        parts: list[Stats] = []
        left = CELLS_READ_MAX
        async for times, values in read.samples(self._pool, places, start_us, end_us):
            left = _less(left, values)
            parts.append(Stats.of_frames(np.zeros(len(times), dtype=np.int64), times, values, width_us).reduced())
        stats = joined(parts).reduced() if parts else Stats.none(len(places))
        return [stats.column(column) for column in range(len(places))]

    async def _from_stats(
        self, places: Sequence[SignalPlace], resolution: read.Resolution, start_us: int, end_us: int, width_us: int
    ) -> list[Stats]:
        factor = width_us // resolution.width_us
        parts: dict[int, list[Stats]] = {column: [] for column in range(len(places))}
        async for group, page in read.stats(self._pool, places, resolution, start_us, end_us):
            reduced = page.rebucketed(factor).reduced()
            for number, column in enumerate(group.columns.tolist()):
                parts[column].append(reduced.column(number))
        return [joined(found).reduced() if found else Stats.none(1) for found in parts.values()]

    async def _plotted(self, places: Sequence[SignalPlace], from_us: int, to_us: int, points: int) -> Plot:
        async with transaction(self._pool) as connection:
            held = await read.held(connection, places)
        start_us, end_us = max(from_us, held.first_us), min(to_us, held.end_us)
        resolution = resolution_of_plot(held, len(places), start_us, end_us, points)
        if resolution is not None:
            return await self._plotted_stats(places, resolution, start_us, end_us, points)
        try:
            return await self._plotted_samples(places, start_us, end_us, points)
        except TooLarge:
            # So dense that a minute holds more than a screen shows.
            if not _whole(read.MINUTE, start_us, end_us):
                raise
            return await self._plotted_stats(places, read.MINUTE, start_us, end_us, points)

    async def _plotted_samples(self, places: Sequence[SignalPlace], start_us: int, end_us: int, points: int) -> Plot:
        parts: list[tuple[Ints, Floats]] = []
        left = CELLS_READ_MAX // 4  # kept until the end, not counted up
        async for times, values in read.samples(self._pool, places, start_us, end_us):
            left = _less(left, values)
            parts.append((times, values))
        series = []
        for column, place in enumerate(places):
            some = [(times, values[:, column], ~np.isnan(values[:, column])) for times, values in parts]
            times = np.concatenate([_NO_TIMES, *(times[here] for times, _, here in some)])
            values = np.concatenate([_NO_VALUES, *(values[here] for _, values, here in some)])
            which = chosen(times, values, points)
            series.append(PlotSeries(place, times[which], values[which]))
        return Plot("raw", series)

    async def _plotted_stats(
        self, places: Sequence[SignalPlace], resolution: read.Resolution, start_us: int, end_us: int, points: int
    ) -> Plot:
        whole = _whole(resolution, start_us, end_us)
        # More than there are to choose from anyway would only take memory, for as long as the range is.
        bin_us = max(1, (end_us - start_us) // (points * PLOT_CANDIDATES_PER_POINT // 2))
        parts: list[list[tuple[Ints, Floats]]] = [[] for _ in places]
        async for group, page in read.stats(
            self._pool, places, resolution, whole.start * resolution.width_us, whole.stop * resolution.width_us
        ):
            for number, column in enumerate(group.columns.tolist()):
                parts[column].append(thinned(*_extremes(page.column(number), resolution.width_us), bin_us))
        series = []
        for place, some in zip(places, parts, strict=True):
            times = np.concatenate([_NO_TIMES, *(part_times for part_times, _ in some)])
            values = np.concatenate([_NO_VALUES, *(part for _, part in some)])
            which = chosen(times, values, points)
            series.append(PlotSeries(place, times[which], values[which]))
        return Plot(resolution.name, series)


_NO_TIMES: Ints = np.zeros(0, dtype=np.int64)
_NO_VALUES: Floats = np.zeros(0)


def check_range(from_us: int, to_us: int) -> None:
    """Raises Invalid."""
    checked_time(from_us, "from_us")
    checked_time(to_us, "to_us")
    if from_us >= to_us:
        raise Invalid("from_us must be before to_us.")


def _less(left: int, values: Floats) -> int:
    left -= values.size
    if left < 0:
        raise _too_much()
    return left


def _too_much() -> TooLarge:
    return TooLarge(
        "That is too much to read for one answer: ask for a shorter range, fewer signals, or whole minutes or hours as width_s.",
        reason="TOO_MUCH_TO_READ",
    )


def _resolution_of(width_s: int) -> read.Resolution | None:
    """The widest stored resolution that such buckets can be made from; None: the samples themselves."""
    if 1 <= width_s < 60:
        return None
    if width_s >= 60 and width_s % 60 == 0 and width_s <= 366 * 86_400:
        return read.HOUR if width_s % 3600 == 0 else read.MINUTE
    raise Invalid("width_s: 1 to 59 seconds, or whole minutes (a multiple of 60) up to 366 days.")


def _whole(resolution: read.Resolution, start_us: int, end_us: int) -> range:
    """The buckets that lie within the range wholly: what is shown, and what is lent, ends where it was said to end."""
    return range(-(-start_us // resolution.width_us), end_us // resolution.width_us)


def resolution_of_plot(
    held: read.Held, signals: int, start_us: int, end_us: int, points: int
) -> read.Resolution | None:
    """The coarsest that has enough to choose from; None: the samples. Where these, or minutes, are gone, what is left.

    Raises TooLarge.
    """
    hours, minutes = (len(_whole(resolution, start_us, end_us)) for resolution in (read.HOUR, read.MINUTE))
    enough = points * PLOT_CANDIDATES_PER_POINT // 2
    is_hours = hours >= enough or start_us < held.minutes_from_us
    if not is_hours and minutes < enough and start_us >= held.samples_from_us:
        return None
    if not is_hours and minutes * signals <= CELLS_READ_MAX:
        return read.MINUTE
    if hours * signals > CELLS_READ_MAX:
        raise _too_much()
    return read.HOUR


def _filled(place: SignalPlace, stats: Stats, first: int, end: int, width_us: int, fill: str) -> BucketSeries:
    """The one column of `stats` as the buckets first to end - 1."""
    if fill == "none":
        stats = stats.take(stats.counts[:, 0] > 0)
        which, numbers = np.arange(len(stats.buckets)), stats.buckets
    else:
        which, numbers = stats.buckets - first, np.arange(first, end)
    counts = np.zeros(len(numbers), dtype=np.int32)
    sums = np.zeros(len(numbers))
    counts[which], sums[which] = stats.counts[:, 0], stats.sums[:, 0]
    others = np.full((4, len(numbers)), np.nan)
    for row, part in enumerate((stats.mins, stats.maxs, stats.lasts)):
        others[row, which] = part[:, 0]
    with np.errstate(invalid="ignore"):
        others[3] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    if fill == "locf":
        newest = np.maximum.accumulate(np.where(counts > 0, np.arange(len(numbers)), -1))
        carried = (counts == 0) & (newest >= 0)
        others[:, carried] = others[2, newest[carried]]
    mins, maxs, lasts, means = others
    return BucketSeries(place, numbers * width_us, counts, sums, mins, maxs, lasts, means)


def _extremes(stats: Stats, width_us: int) -> tuple[Ints, Floats]:
    """The least and the greatest value of each bucket as points inside it; one in its middle where they are the same."""
    stats = stats.take(stats.counts[:, 0] > 0)
    lows, highs, lasts = stats.mins[:, 0], stats.maxs[:, 0], stats.lasts[:, 0]
    starts = stats.buckets * width_us
    rises = np.abs(highs - lasts) <= np.abs(lasts - lows)  # the end is nearer to the top: probably low first
    times = np.stack([starts + width_us // 4, starts + 3 * width_us // 4], axis=1)
    values = np.stack([np.where(rises, lows, highs), np.where(rises, highs, lows)], axis=1)
    flat = lows == highs
    times[flat, 0] = starts[flat] + width_us // 2
    keep = np.stack([np.ones(len(flat), dtype=bool), ~flat], axis=1)
    return times[keep], values[keep]


def thinned(times: Ints, values: Floats, bin_us: int) -> tuple[Ints, Floats]:
    """Of points in order of time the least and the greatest of each bin, as they are."""
    if not len(times):
        return times, values
    bins = times // bin_us
    starts = np.flatnonzero(np.concatenate([[True], bins[1:] != bins[:-1]]))
    number = np.cumsum(np.concatenate([[False], bins[1:] != bins[:-1]]))
    keep = np.zeros(len(times), dtype=bool)
    for extreme in (np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)):
        at = np.flatnonzero(values == extreme[number])
        keep[at[np.unique(number[at], return_index=True)[1]]] = True  # the first that is as far out
    return times[keep], values[keep]
