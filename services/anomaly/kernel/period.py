"""The period of a series, found in its own values as they come."""

import math

import numpy as np

from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    C_CYCLE_LIKENESS,
    CYCLE_BASE,
    CYCLE_BINS,
    RING_ANCHOR_US,
    RING_BASE,
    RING_COUNT,
    RING_DUE,
    RING_FIRST,
    RING_HEAD,
    RING_KEPT,
    RING_MISSES,
    RING_PERIOD_US,
    RING_ROUNDS,
    RING_SLOT,
    RING_SLOT_US,
    RING_SLOTS,
    RING_SUM,
    ROW_N,
    US_PER_DAY,
    US_PER_WEEK,
)
from services.anomaly.kernel.season import start_profile

RING_LAG_MIN = 6  # slots
RING_MISSES_MAX = 3
RING_ROUNDS_MAX = 32.0  # rounds over which a period is averaged
RING_ROUNDS_SURE = 4.0  # seen so often a period outlasts a standstill
PRIOR_NEAR = 0.03  # a found period so near to the day or the week is the day or the week
RING_US_MAX = 16 * US_PER_DAY  # longest stretch that is looked at, so that periods are found up to 8 days


@part
def ring_step(cfg: Floats, row: Floats, x: float, t_us: int, interval_us: float) -> None:
    """Look for a period of the series: means of equal slots of time go round in a ring, which is examined when full.

    Where nothing repeats in it the slots become twice as long, up to hours, and then short again.  A period that was
    found is looked for again each time the ring has gone round; after some rounds without it others are looked for.
    One that was sure stays until another is found or none is at any length: a machine that stood still goes on with it.
    """
    slot_us = row[RING_BASE + RING_SLOT_US]
    if slot_us == 0.0:
        if row[ROW_N] >= 16.0 and interval_us >= 1.0:
            restart_ring(row, x, t_us, math.floor(interval_us))
        return
    slot = float(t_us // int(slot_us))
    passed = slot - row[RING_BASE + RING_SLOT]
    if passed == 0.0:
        row[RING_BASE + RING_SUM] += x
        row[RING_BASE + RING_COUNT] += 1.0
        return
    if passed > RING_SLOTS // 2:
        restart_ring(row, x, t_us, max(slot_us, math.floor(interval_us)))
        return
    mean = row[RING_BASE + RING_SUM] / row[RING_BASE + RING_COUNT]
    first, kept = int(row[RING_BASE + RING_FIRST]), int(row[RING_BASE + RING_KEPT])
    for _ in range(int(passed)):  # a slot without a value is like the one before
        row[RING_BASE + RING_HEAD + (first + kept) % RING_SLOTS] = mean
        if kept < RING_SLOTS:
            kept += 1
        else:
            first = (first + 1) % RING_SLOTS
    row[RING_BASE + RING_FIRST] = first
    row[RING_BASE + RING_KEPT] = kept
    row[RING_BASE + RING_DUE] -= passed
    row[RING_BASE + RING_SLOT] = slot
    row[RING_BASE + RING_SUM] = x
    row[RING_BASE + RING_COUNT] = 1.0
    if kept == RING_SLOTS and row[RING_BASE + RING_DUE] <= 0.0:
        examine_ring(cfg, row, t_us, interval_us)


@part
def restart_ring(row: Floats, x: float, t_us: int, slot_us: float) -> None:
    row[RING_BASE + RING_SLOT_US] = slot_us
    row[RING_BASE + RING_SLOT] = float(t_us // int(slot_us))
    row[RING_BASE + RING_SUM] = x
    row[RING_BASE + RING_COUNT] = 1.0
    row[RING_BASE + RING_FIRST] = row[RING_BASE + RING_KEPT] = 0.0
    row[RING_BASE + RING_DUE] = RING_SLOTS


@part
def examine_ring(cfg: Floats, row: Floats, t_us: int, interval_us: float) -> None:
    """Keep, find or give up the period; where none is seen make the slots longer."""
    slot_us = row[RING_BASE + RING_SLOT_US]
    known_us = row[RING_BASE + RING_PERIOD_US]
    lag = ring_lag(row, known_us / slot_us, cfg[C_CYCLE_LIKENESS])
    row[RING_BASE + RING_DUE] = RING_SLOTS
    if lag > 0.0:
        period_us = lag * slot_us
        if abs(period_us - known_us) > 0.1 * known_us:
            row[RING_BASE + RING_PERIOD_US] = near_prior(period_us)
            row[RING_BASE + RING_ROUNDS] = 1.0
            row[RING_BASE + RING_ANCHOR_US] = t_us
            start_profile(row, CYCLE_BASE, CYCLE_BINS)
        else:
            row[RING_BASE + RING_ROUNDS] += 1.0
            phase = ((t_us - row[RING_BASE + RING_ANCHOR_US]) / known_us) % 1.0
            finer_us = near_prior(
                known_us + (period_us - known_us) / min(row[RING_BASE + RING_ROUNDS], RING_ROUNDS_MAX)
            )
            row[RING_BASE + RING_PERIOD_US] = finer_us
            row[RING_BASE + RING_ANCHOR_US] = t_us - phase * finer_us
        row[RING_BASE + RING_MISSES] = 0.0
        return
    row[RING_BASE + RING_MISSES] += 1.0
    if known_us > 0.0 and row[RING_BASE + RING_MISSES] < RING_MISSES_MAX:
        return
    if row[RING_BASE + RING_ROUNDS] < RING_ROUNDS_SURE:
        row[RING_BASE + RING_PERIOD_US] = 0.0
    x = row[RING_BASE + RING_SUM]
    if 2.0 * slot_us * RING_SLOTS > RING_US_MAX:
        row[RING_BASE + RING_PERIOD_US] = 0.0
        row[RING_BASE + RING_MISSES] = 0.0
        restart_ring(row, x, t_us, max(1.0, math.floor(interval_us)))
        return
    first = int(row[RING_BASE + RING_FIRST])
    ring = np.empty(RING_SLOTS)
    for i in range(RING_SLOTS):
        ring[i] = row[RING_BASE + RING_HEAD + (first + i) % RING_SLOTS]
    restart_ring(row, x, t_us, 2.0 * slot_us)
    for i in range(RING_SLOTS // 2):
        row[RING_BASE + RING_HEAD + i] = 0.5 * (ring[2 * i] + ring[2 * i + 1])
    row[RING_BASE + RING_KEPT] = row[RING_BASE + RING_DUE] = RING_SLOTS // 2


@part
def near_prior(period_us: float) -> float:
    """The day or the week, where the period is nearly that."""
    for prior_us in (US_PER_DAY, US_PER_WEEK):
        if abs(period_us - prior_us) < PRIOR_NEAR * prior_us:
            return float(prior_us)
    return period_us


@part
def ring_lag(row: Floats, known: float, likeness: float) -> float:
    """The period of what is in the ring, in slots, from its autocorrelation without trend; 0: it has none.

    The likeness asked of a period later is four times that of chance among 64 values, and more than half of it is asked
    of two periods later where the ring is long enough to tell.
    """
    first = int(row[RING_BASE + RING_FIRST])
    middle = (RING_SLOTS - 1) / 2.0
    ring = np.empty(RING_SLOTS)
    mean = slope = 0.0
    for i in range(RING_SLOTS):
        ring[i] = row[RING_BASE + RING_HEAD + (first + i) % RING_SLOTS]
        mean += ring[i] / RING_SLOTS
        slope += (i - middle) * ring[i]
    slope /= RING_SLOTS * (RING_SLOTS * RING_SLOTS - 1) / 12.0
    power = 0.0
    for i in range(RING_SLOTS):
        ring[i] -= mean + slope * (i - middle)
        power += ring[i] * ring[i]
    if not power > 0.0:
        return 0.0
    half = RING_SLOTS // 2
    like = np.empty(half + 1)
    for lag in range(1, half + 1):
        total = 0.0
        for i in range(RING_SLOTS - lag):
            total += ring[i] * ring[i + lag]
        like[lag] = total / power * RING_SLOTS / (RING_SLOTS - lag)
    best = 0
    crossed = False  # before it first falls below 0 a lag is near for being short
    for lag in range(2, half):
        crossed = crossed or like[lag] < 0.0
        if not crossed or lag < RING_LAG_MIN or like[lag] < max(like[lag - 1], like[lag + 1]):
            continue
        if like[lag] > (like[best] * 1.1 + 0.02 if best > 0 else 0.0):  # a multiple has to be clearly better
            best = lag
    if RING_LAG_MIN <= known < half - 1:  # what is known stays while it holds, though another may fit better for once
        top = round(known)
        for lag in (top - 1, top + 1):
            if lag < half and like[lag] > like[top]:
                top = lag
        if like[top] > likeness:
            best = top
    if best == 0 or not like[best] > likeness:
        return 0.0
    if 2 * best <= half:
        twice = max(like[2 * best - 1], like[2 * best])
        if 2 * best < half:
            twice = max(twice, like[2 * best + 1])
        if not twice > 0.6 * likeness:
            return 0.0
    lag_found = best + top_offset(like, best)
    for times in range(2, half // RING_LAG_MIN + 1):  # the further the multiple, the finer the period
        near = round(lag_found * times)
        if near >= half - 1:
            break
        top = near
        for lag in range(near - 1, near + 2):
            if like[lag] > like[top]:
                top = lag
        lag_found = (top + top_offset(like, top)) / times
    return lag_found


@part
def top_offset(like: Floats, top: int) -> float:
    """Where between the neighbours a parabola through three values has its top: from -0.5 to 0.5."""
    bend = like[top - 1] - 2.0 * like[top] + like[top + 1]
    if not bend < 0.0:
        return 0.0
    offset: float = min(max(0.5 * (like[top - 1] - like[top + 1]) / bend, -0.5), 0.5)
    return offset
