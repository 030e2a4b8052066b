"""Open rollup buckets of many machines, kept in arrays while their frames pass.

A bucket is closed when a frame of a later bucket arrives; only then it is written, once. Machines of the same width share
arrays, so the work is per batch of frames, not per machine.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Counts: TypeAlias = npt.NDArray[np.int32]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# Finite values may have a sum that no float holds; those beyond count as this in sums, here and in buckets_from_frames.
SUMMED_VALUE_MAX = 1e280
NO_BUCKET = np.iinfo(np.int64).min


@dataclass
class Stats:
    """Statistics of n buckets x width signals. Where count is 0, sum is 0 and min, max and last are NaN."""

    slots: Ints
    buckets: Ints
    counts: Counts
    sums: Floats
    mins: Floats
    maxs: Floats
    lasts: Floats

    @classmethod
    def of_frames(cls, slots: Ints, times_us: Ints, values: Floats, width_us: int) -> "Stats":
        """One frame each: sorted by (slot, time)."""
        present = ~np.isnan(values)
        sums = np.where(present, values, 0.0)
        np.clip(sums, -SUMMED_VALUE_MAX, SUMMED_VALUE_MAX, out=sums)
        return cls(
            slots,
            times_us // width_us,
            present.astype(np.int32),
            sums,
            values,
            values,
            values,
        )

    @classmethod
    def none(cls, width: int) -> "Stats":
        """No rows."""
        return _empty(0, width)

    def column(self, number: int) -> "Stats":
        """The same rows for one of the signals, those without a value of it left out."""
        here = self.take(self.counts[:, number] > 0)
        return Stats(
            here.slots,
            here.buckets,
            here.counts[:, number : number + 1],
            here.sums[:, number : number + 1],
            here.mins[:, number : number + 1],
            here.maxs[:, number : number + 1],
            here.lasts[:, number : number + 1],
        )

    def take(self, which: Ints | Bools) -> "Stats":
        return Stats(
            self.slots[which],
            self.buckets[which],
            self.counts[which],
            self.sums[which],
            self.mins[which],
            self.maxs[which],
            self.lasts[which],
        )

    def rebucketed(self, factor: int) -> "Stats":
        """The same rows in buckets that are `factor` times as wide."""
        return Stats(self.slots, self.buckets // factor, self.counts, self.sums, self.mins, self.maxs, self.lasts)

    def reduced(self) -> "Stats":
        """Neighbouring rows of the same slot and bucket become one."""
        if not len(self.slots):
            return self
        changes = np.flatnonzero((np.diff(self.slots) != 0) | (np.diff(self.buckets) != 0)) + 1
        starts = np.concatenate([[0], changes])
        if len(starts) == len(self.slots):
            return self
        if self.counts.all():  # as dense as machines mostly are: nothing to leave out
            least: np.ufunc = np.minimum
            greatest: np.ufunc = np.maximum
            lasts = self.lasts[np.append(starts[1:], len(self.slots)) - 1]
        else:
            least, greatest = np.fmin, np.fmax
            row = np.arange(len(self.slots))[:, None]
            newest = np.maximum.reduceat(np.where(self.counts > 0, row, -1), starts, axis=0)
            lasts = np.take_along_axis(self.lasts, np.maximum(newest, 0), axis=0)
            lasts = np.where(newest >= 0, lasts, np.nan)
        return Stats(
            self.slots[starts],
            self.buckets[starts],
            np.add.reduceat(self.counts, starts, axis=0),
            np.add.reduceat(self.sums, starts, axis=0),
            least.reduceat(self.mins, starts, axis=0),
            greatest.reduceat(self.maxs, starts, axis=0),
            lasts,
        )


class OpenBuckets:
    """The open bucket of every slot (machine and channel group) of one width and one resolution."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._open = _empty(0, width)
        # A bucket whose beginning we have not seen (after a start, or after a late frame): made from the frames when closed.
        self._partial = np.zeros(0, dtype=bool)

    def make_room(self, slots: int) -> None:
        """Know slots 0 to slots - 1; the new ones have no open bucket."""
        have = len(self._open.slots)
        if slots <= have:
            return
        size = max(slots, have * 2, 64)
        grown = _empty(size, self._width)
        for name in ("buckets", "counts", "sums", "mins", "maxs", "lasts"):
            getattr(grown, name)[:have] = getattr(self._open, name)
        self._open = grown
        self._partial = np.concatenate([self._partial, np.zeros(size - have, dtype=bool)])

    def mark_partial(self, slot: int, bucket: int) -> None:
        """The open bucket of the slot is this one, and not all of its frames have passed here."""
        if self._open.buckets[slot] == bucket or self._open.buckets[slot] == NO_BUCKET:
            self._open.buckets[slot] = bucket
            self._partial[slot] = True

    def add(self, stats: Stats) -> tuple[Stats, Stats]:
        """Take in rows sorted by (slot, bucket), one each; return the buckets that this closes: (complete, partial).

        Of the partial ones only slots and buckets are right.
        """
        opened = self._open
        first = np.concatenate([[True], np.diff(stats.slots) != 0])
        last = np.concatenate([first[1:], [True]])
        continues = first & (opened.buckets[stats.slots] == stats.buckets)
        replaced = first & ~continues & (opened.buckets[stats.slots] != NO_BUCKET)
        closed_before = opened.take(stats.slots[replaced])
        closed_before_partial = self._partial[stats.slots[replaced]]

        rows = np.flatnonzero(continues)
        slots = stats.slots[rows]
        merged = Stats(*(np.copy(getattr(stats, name)) for name in _FIELDS))
        if len(rows):
            merged.counts[rows] += opened.counts[slots]
            merged.sums[rows] += opened.sums[slots]
            merged.mins[rows] = np.fmin(merged.mins[rows], opened.mins[slots])
            merged.maxs[rows] = np.fmax(merged.maxs[rows], opened.maxs[slots])
            merged.lasts[rows] = np.where(stats.counts[rows] > 0, merged.lasts[rows], opened.lasts[slots])
        partial = np.zeros(len(stats.slots), dtype=bool)
        partial[rows] = self._partial[slots]

        for name in _FIELDS[1:]:
            getattr(opened, name)[stats.slots[last]] = getattr(merged, name)[last]
        self._partial[stats.slots[last]] = partial[last]

        closed_now, closed_now_partial = merged.take(~last), partial[~last]
        closed = joined([closed_before, closed_now])
        is_partial = np.concatenate([closed_before_partial, closed_now_partial])
        return closed.take(~is_partial), closed.take(is_partial)


_FIELDS = ("slots", "buckets", "counts", "sums", "mins", "maxs", "lasts")


def _empty(size: int, width: int) -> Stats:
    return Stats(
        np.arange(size, dtype=np.int64),
        np.full(size, NO_BUCKET, dtype=np.int64),
        np.zeros((size, width), dtype=np.int32),
        np.zeros((size, width)),
        np.full((size, width), np.nan),
        np.full((size, width), np.nan),
        np.full((size, width), np.nan),
    )


def joined(parts: Sequence[Stats]) -> Stats:
    return Stats(*(np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS))
