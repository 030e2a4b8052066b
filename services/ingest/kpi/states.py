"""Off, idle or working, from the power (or current) of a machine alone: see docs/kpi.md."""

import itertools
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Codes: TypeAlias = npt.NDArray[np.int8]

# Fewer minutes say nothing about the levels of a machine: a working day of eight hours.
MINUTES_MIN: Final = 480
# A level is one if the machine spends this share of its time there...
LEVEL_SHARE_MIN: Final = 0.01
# ...and if on the way to the next level there is at most this share of the lower of the two peaks.
VALLEY_SHARE_MAX: Final = 0.5
# The lowest level is "off" below this share of the highest, the lowest of the others "idle" below that share.
OFF_SHARE_MAX: Final = 0.05
IDLE_SHARE_MAX: Final = 0.6
# A state is left only when the power is so far beyond the threshold: meters and means tremble.
HYSTERESIS: Final = 0.05
DWELL_MINUTES: Final = 2

_DECADES = 3.0
_BIN = 0.02
# Of the kernel that smooths the histogram: a factor of 1.12.
_SIGMA_BINS = 2.5
# Below, a density is what rounding left of 0.
_NOTHING = 1e-9


class State(IntEnum):
    NO_DATA = 0
    OFF = 1
    IDLE = 2
    WORKING = 3


@dataclass(frozen=True)
class Levels:
    """Where one state ends and the next begins, in the unit of the signal. Equal: the machine has no idle level."""

    off_below: float
    working_from: float


class NoLevels(Exception):
    """The levels of a machine cannot be told from these data."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail
        super().__init__(detail)


def found_levels(power: Floats) -> Levels:
    """The thresholds between the levels at which the machine spends its time. `power`: a mean a minute, NaN for none.

    Raises NoLevels.
    """
    known = power[~np.isnan(power)]
    if len(known) < MINUTES_MIN:
        raise NoLevels("NOT_ENOUGH_DATA", f"{len(known)} minutes with data; the levels need {MINUTES_MIN}.")
    top = float(np.quantile(known, 0.995))
    if top <= 0:
        raise NoLevels("ONE_LEVEL", "The power was never above 0.")
    density, share = _density(np.log10(np.maximum(known / top, 10**-_DECADES)))
    peaks, valleys = _levels(density, share)
    levels, borders = [top * _power(peak) for peak in peaks], [top * _power(valley) for valley in valleys]
    has_off = levels[0] < OFF_SHARE_MAX * levels[-1]
    if has_off and len(levels) == 2:
        return Levels(borders[0], borders[0])
    lowest = 1 if has_off else 0
    if len(levels) < lowest + 2 or levels[lowest] > IDLE_SHARE_MAX * levels[-1]:
        if has_off:
            return Levels(borders[0], borders[0])
        raise NoLevels("ONE_LEVEL", "The machine was at one level all the time: it cannot be told which that is.")
    off_below = borders[0] if has_off else min(OFF_SHARE_MAX * levels[-1], levels[0] / 2)
    return Levels(off_below, borders[lowest])


def states(power: Floats, levels: Levels, *, dwell_minutes: int = DWELL_MINUTES) -> Codes:
    """The state of every minute. A state that lasts less than `dwell_minutes` belongs to the one before it."""
    found = np.full(len(power), State.NO_DATA, dtype=np.int8)
    known = ~np.isnan(power)
    found[known] = State.OFF
    found[_above(power, levels.off_below)] = State.IDLE
    found[_above(power, levels.working_from)] = State.WORKING
    return _settled(found, dwell_minutes)


def runs(codes: Codes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Codes]:
    """Stretches of the same state: starts, ends (behind the last), states."""
    if not len(codes):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), codes
    starts = np.concatenate([[0], np.flatnonzero(np.diff(codes)) + 1])
    ends = np.concatenate([starts[1:], [len(codes)]])
    return starts, ends, codes[starts]


def _above(power: Floats, threshold: float) -> npt.NDArray[np.bool_]:
    """Above the threshold, with hysteresis; what follows a gap is judged by the threshold alone."""
    known = ~np.isnan(power)
    after_gap = known & ~np.concatenate([[False], known[:-1]])
    plain = np.where(known, power >= threshold, False)
    sure = after_gap | (power >= threshold * (1 + HYSTERESIS)) | (power <= threshold / (1 + HYSTERESIS))
    newest = np.maximum.accumulate(np.where(sure & known, np.arange(len(power)), 0))
    return known & plain[newest]


def _settled(codes: Codes, dwell_minutes: int) -> Codes:
    settled = codes.copy()
    starts, ends, values = runs(codes)
    before = State.NO_DATA
    for start, end, value in zip(starts.tolist(), ends.tolist(), values.tolist(), strict=True):
        if value != State.NO_DATA and before not in (State.NO_DATA, value) and end - start < dwell_minutes:
            settled[start:end] = before
        else:
            before = value
    return settled


def _density(logs: Floats) -> tuple[Floats, Floats]:
    """Smoothed histogram of log power, and the share of the minutes in each bin."""
    edges = np.arange(-_DECADES - _BIN / 2, logs.max() + 2 * _BIN, _BIN)
    counts, _ = np.histogram(logs, edges)
    share = counts / len(logs)
    reach = int(4 * _SIGMA_BINS)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / _SIGMA_BINS) ** 2)
    # Nothing is lost at the ends: a machine that is off sits in the very first bin.
    padded = np.pad(share, reach, mode="symmetric")
    return np.convolve(padded, kernel / kernel.sum(), mode="valid"), share


def _levels(density: Floats, share: Floats) -> tuple[list[int], list[int]]:
    """Bins of the peaks that are levels, and of the valleys between them."""
    padded = np.concatenate([[-1.0], density, [-1.0]])
    rising = padded[1:-1] > padded[:-2]
    falling = padded[1:-1] >= padded[2:]
    peaks = np.flatnonzero(rising & falling & (density > _NOTHING)).tolist()
    while len(peaks) > 1:
        valleys = _valleys(density, peaks)
        bounds = [0, *valleys, len(density)]
        masses = [share[low:high].sum() for low, high in itertools.pairwise(bounds)]
        depths = [
            density[valley] / min(density[left], density[right])
            for valley, left, right in zip(valleys, peaks[:-1], peaks[1:], strict=True)
        ]
        shallowest = int(np.argmax(depths))
        if depths[shallowest] > VALLEY_SHARE_MAX:
            pair = (shallowest, shallowest + 1)
            peaks.pop(min(pair, key=lambda number: density[peaks[number]]))
        elif min(masses) < LEVEL_SHARE_MIN:
            peaks.pop(int(np.argmin(masses)))
        else:
            return peaks, valleys
    return peaks, []


def _valleys(density: Floats, peaks: list[int]) -> list[int]:
    """The lowest bin between each two peaks, in its middle where it is flat."""
    found = []
    for left, right in itertools.pairwise(peaks):
        between = density[left : right + 1]
        lowest = np.flatnonzero(between <= between.min() * (1 + 1e-9) + 1e-12)
        found.append(left + int(lowest[len(lowest) // 2]))
    return found


def _power(number: int) -> float:
    return float(10 ** (-_DECADES + number * _BIN))
