"""What counters counted and what energy flowed, minute by minute."""

import itertools
import math
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# What a value of a unit is worth in kW, kWh or A.
KW: Final = {"W": 0.001, "kW": 1.0, "MW": 1000.0}
KWH: Final = {"Wh": 0.001, "kWh": 1.0, "MWh": 1000.0}

AMPERES: Final = {"mA": 0.001, "A": 1.0, "kA": 1000.0}

# By less of its value a counter falls when it is corrected, or trembles.
FALL_SHARE_MIN: Final = 0.1
# Two values a minute, of four weeks.
FAULT_VALUES_MAX: Final = 2 * 28 * 24 * 60
FAULTS_FEW: Final = 3
FAULTS_SHARE_MAX: Final = 0.05
USUAL_RATES_MAX: Final = 10.0
FAULT_ROUNDS_MAX: Final = 5

# Over a longer time without a value the power is not known; over a shorter one it is drawn as a line.
GAP_MINUTES: Final = 5
# Counters are read every hour, and now and then not.
MADE_GAP_MINUTES: Final = 120


@dataclass(frozen=True)
class Counted:
    """What a counter did in each minute."""

    # 0 where it is not known.
    added: Floats
    known: Bools
    # It was set back; how far it had counted until then is not known.
    anew: Bools


def counted(mins: Floats, maxs: Floats, lasts: Floats, rollover: float = 0.0) -> Counted:
    """From the least, greatest and last value of each minute; NaN: none.

    A counter that falls by a tenth or more was set back to 0, or rolled over where `rollover` says at which value it does and it
    fell by more than half of that. One that falls by less was corrected, and counts on once it is past where it stood. Values
    that are read faults are as if they were not there.
    """
    added, known, anew = np.zeros(len(lasts)), np.zeros(len(lasts), dtype=bool), np.zeros(len(lasts), dtype=bool)
    minutes = np.flatnonzero(~np.isnan(lasts))
    if not len(minutes):
        return Counted(added, known, anew)
    # A minute's greatest value comes before its last, if it fell in between; the first minute counts from its own least value.
    values = np.concatenate([mins[minutes[:1]], np.stack([maxs[minutes], lasts[minutes]], axis=1).ravel()])
    minutes = np.concatenate([minutes[:1], np.repeat(minutes, 2)])
    for _ in range(FAULT_ROUNDS_MAX):  # one may hide another
        sound = ~_faults(values, minutes)
        if sound.all():
            break
        values, minutes = values[sound], minutes[sound]
    known[minutes] = True
    before, now = values[:-1], values[1:]
    rolled = (before - now > rollover / 2) if rollover else np.zeros(len(now), dtype=bool)
    fell = ~rolled & (before - now >= FALL_SHARE_MIN * np.abs(before)) & (now < before)
    fresh = np.maximum(now, 0) + np.where(rolled, np.maximum(rollover - before, 0), 0)
    begins = rolled | fell
    np.add.at(added, minutes[1:], np.where(begins, fresh, np.diff(_highest(values, begins))))
    anew[minutes[1:][fell]] = True
    return Counted(added, known, anew)


def _highest(values: Floats, begins: Bools) -> Floats:
    """The highest value so far since the counter began anew."""
    highest = values.copy()
    starts = [0, *(np.flatnonzero(begins) + 1).tolist(), len(values)]
    for start, end in itertools.pairwise(starts):
        np.maximum.accumulate(values[start:end], out=highest[start:end])
    return highest


def _faults(values: Floats, minutes: Ints) -> Bools:
    """Which values of a counter are read faults: away from its course, to which one jump leads back.

    The jump is more than half of the way, and far more than the counter usually moves in that time; such jumps are no measure of
    that themselves, unless they are so many that it looks like a counter that is often set back.
    """
    turned = [(len(values) - end, len(values) - start) for start, end in _dips(-values[::-1])]
    # With the rise to or from each: that is what would be counted for nothing.
    found = [(start, end, end) for start, end in _dips(values)] + [(start, end, start) for start, end in turned]
    faults = np.zeros(len(values), dtype=bool)
    rates = np.diff(values, prepend=values[0]) / np.maximum(np.diff(minutes, prepend=minutes[0]), 1)
    usual = rates > 0
    if len(found) <= max(FAULTS_FEW, FAULTS_SHARE_MAX * len(values)):
        usual[[rise for _, _, rise in found]] = False
    # What is read before the course begins, and is next to nothing beside it.
    ahead = usual[1:] & (10 * np.maximum.accumulate(values[:-1]) < values[1:])
    leading = (np.flatnonzero(ahead)[:1] + 1).tolist()
    usual[leading] = False
    high = USUAL_RATES_MAX * float(np.median(rates[usual])) if usual.any() else 0.0
    for end in leading:
        faults[:end] = rates[end] > high
    # Of those that overlap the shortest is the fault: what it lies in is the course.
    for start, end, rise in sorted(found, key=lambda one: one[1] - one[0]):
        if rates[rise] > high and not (faults[start - 1] or faults[end]):
            faults[start:end] = True
    return faults


def _dips(values: Floats) -> list[tuple[int, int]]:
    """Where values are below the one before them, up to the jump that leads back to it or beyond it."""
    # For each value the next one that is not lower, and the least in between (of those that wait: the least so far).
    plain = values.tolist()
    back, least, lower = [len(plain)] * len(plain), [math.inf] * len(plain), list[int]()
    for number, value in enumerate(plain):
        while lower and plain[lower[-1]] <= value:
            before = lower.pop()
            back[before] = number
            if lower:
                least[lower[-1]] = min(least[lower[-1]], least[before])
        if lower:
            least[lower[-1]] = min(least[lower[-1]], value)
        lower.append(number)
    found = []
    for before in np.flatnonzero(np.diff(values) < 0).tolist():
        start, end = before + 1, back[before]
        if end < len(values) and end - start <= FAULT_VALUES_MAX:
            depth = values[before] - least[before]
            if values[end] - values[end - 1] > depth / 2:
                found.append((start, end))
    return found


def spread(added: Floats, known: Bools) -> tuple[Floats, Bools]:
    """What was added over a gap, evenly over its minutes; and which minutes are accounted for."""
    index = np.flatnonzero(known)
    if not len(index):
        return added, known
    steps = np.diff(index, prepend=index[0] - 1)
    evenly = np.zeros(len(added))
    evenly[index[0] : index[-1] + 1] = np.repeat(added[index] / steps, steps)
    accounted = np.zeros(len(added), dtype=bool)
    accounted[index[0] : index[-1] + 1] = True
    return evenly, accounted


def made(added: Floats, known: Bools) -> tuple[Floats, Bools]:
    """Items of each minute, and which minutes they are known for.

    Those of a gap are spread evenly over it. Those of one that is longer than MADE_GAP_MINUTES stand at its end: if they are as few
    as the counter ever adds at once, they were made there (it tells of every item); else nobody knows when, and neither the gap nor
    its end is known.
    """
    evenly, accounted = spread(added, known)
    index = np.flatnonzero(known)
    steps = np.diff(index, prepend=index[:1] - 1)
    at_once = added[index][(steps <= MADE_GAP_MINUTES) & (added[index] > 0)]
    few = 2 * float(at_once.min()) if len(at_once) else 0.0
    long = steps > MADE_GAP_MINUTES
    for end, step in zip(index[long].tolist(), steps[long].tolist(), strict=True):
        gap = slice(end - step + 1, end + 1)
        evenly[gap] = 0
        evenly[end] = added[end]
        accounted[gap] = added[end] <= few
    return evenly, accounted


def flowed(power_kw: Floats, gap_minutes: int = GAP_MINUTES) -> tuple[Floats, Bools]:
    """kWh of each minute from its mean power (NaN: none), drawn as a line over gaps; and which minutes are accounted for."""
    known = np.flatnonzero(~np.isnan(power_kw))
    accounted = ~np.isnan(power_kw)
    if not len(known):
        return np.zeros(len(power_kw)), accounted
    minutes = np.arange(len(power_kw))
    before = np.maximum.accumulate(np.where(accounted, minutes, -1))
    after = np.minimum.accumulate(np.where(accounted, minutes, len(power_kw))[::-1])[::-1]
    bridged = ~accounted & (before >= 0) & (after < len(power_kw)) & (after - before - 1 <= gap_minutes)
    energy = np.zeros(len(power_kw))
    energy[accounted] = power_kw[accounted]
    energy[bridged] = np.interp(minutes[bridged], known, power_kw[known])
    return energy / 60, accounted | bridged
