"""What counters counted and what energy flowed, minute by minute."""

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# What a value of a unit is worth in kW or kWh.
KW: Final = {"W": 0.001, "kW": 1.0, "MW": 1000.0}
KWH: Final = {"Wh": 0.001, "kWh": 1.0, "MWh": 1000.0}

# Over a longer time without a value the power is not known; over a shorter one it is drawn as a line.
GAP_MINUTES: Final = 5


def counted(mins: Floats, maxs: Floats, lasts: Floats, rollover: float = 0.0) -> tuple[Floats, Bools]:
    """What a counter added in each minute (0 where there is no value), and in which it began anew.

    A counter that falls was reset to 0, or rolled over where `rollover` says at which value it does. What it counted between its
    last value before a reset and the reset is not known, and not guessed. NaN: no value in that minute.
    """
    added, anew = np.zeros(len(lasts)), np.zeros(len(lasts), dtype=bool)
    known = np.flatnonzero(~np.isnan(lasts))
    if not len(known):
        return added, anew
    low, high, last = mins[known], maxs[known], lasts[known]
    before = np.concatenate([[low[0]], last[:-1]])  # the first minute counts from its own least value
    inside = high > last  # it fell within the minute
    between = ~inside & (last < before)
    top = np.maximum(high - before, 0)
    fresh = last + (np.maximum(rollover - np.where(inside, high, before), 0) if rollover else 0.0)
    added[known] = np.where(inside, top + fresh, np.where(between, fresh, last - before))
    anew[known] = inside | between
    return added, anew


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
