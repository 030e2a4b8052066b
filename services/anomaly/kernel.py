"""The compiled inner loop of the detector: one causal pass over a batch of frames.

Everything here works on plain arrays so that numba can compile it; `detector.py` owns the arrays and gives them
names and a contract.  No `fastmath`: it may assume that NaN does not exist, and NaN is how an absent value looks.

Indices below name the columns of the state arrays.  `ROW_*` and the bases after it address one series' row,
`MACHINE_*` one machine's row, `JOINT_*` are offsets inside one block of a machine's joint state.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Compiled = TypeVar("Compiled", bound=Callable[..., Any])


def compiled(function: Compiled) -> Compiled:
    """`numba.njit` with the function's own type kept; numba's types know only its dispatcher."""
    return cast(Compiled, numba.njit(cache=True, error_model="numpy")(function))


# --- components: what fired -------------------------------------------------------------------------------------
(
    RECORD, SHIFT_SHORT, SHIFT, SHIFT_LONG, LEVEL_LONG, CHANGE, SEASON, CYCLE, UNUSUAL, FLAT, DROPOUT, JOINT,
) = range(12)  # fmt: skip
COMPONENTS = (
    "record", "shift_short", "shift", "shift_long", "level_long", "change", "season", "cycle", "unusual", "flat",
    "dropout", "joint",
)  # fmt: skip
SCALES = 5  # octave pairs: the value itself and exponential means over 3, 12, 48 and 192 rows
SCALE_ROWS = (1.0, 3.0, 12.0, 48.0, 192.0)

# --- configuration vector ---------------------------------------------------------------------------------------
(
    C_RAISE, C_CLEAR, C_CALM_ROWS, C_HORIZON, C_CLIP, C_WARMUP, C_HOLD_US, C_HOLD_ROWS_MIN, C_HOLD_ROWS_MAX,
    C_HOLD_RATIO, C_FORGET, C_FORGET_US, C_RECORD_CAP, C_SHARE_UNIT, C_SCORE_BASE, C_SEASON_RATIO, C_SEASON_STEP,
    C_TAIL_MEMORY, C_JOINT_EW, C_JOINT_WARMUP, C_JOINT_GATE, C_JOINT_SHRINK, C_JOINT_HORIZON, C_JOINT_LEAK,
    C_JOINT_UNIT, C_JOINT_RAISE, C_YOUNG, C_RAISE_MIN, C_BUDGET_US, C_JOINT_SETTLING, C_CHANGE_ROWS, C_CHANGE_CLIP,
    C_SEASON_WAIT, C_CYCLE_LIKENESS,
) = range(34)  # fmt: skip

# --- state of one machine ---------------------------------------------------------------------------------------
(
    MACHINE_LAST_US, MACHINE_FRAMES, MACHINE_INTERVAL_US, MACHINE_ALARM_US, MACHINE_CALM, MACHINE_OFFSET, MACHINE_STATE,
) = range(7)  # fmt: skip
MACHINE_FIELDS = 8

# --- state of one series (a row of float64) ---------------------------------------------------------------------
(
    ROW_N, ROW_LAST, ROW_MEAN, ROW_VAR, ROW_REPEATS, ROW_REPEATS_USUAL, ROW_PRESENT, ROW_ABSENT_RUN, ROW_HELD,
    ROW_HELD_AGE, ROW_OFFSET, ROW_ALARM_US, ROW_CALM, ROW_STATE, ROW_SHORT_TAIL, ROW_SHORT_TAIL_G, ROW_LONG_TAIL,
    ROW_LONG_TAIL_G,
) = range(18)  # fmt: skip
SCALE_BASE = 20  # mean, least, greatest for each scale
CHANGE_BASE = SCALE_BASE + 3 * SCALES  # the change scan: where the random walk is, its range, its candidates
CHANGE_KEPT = 4  # candidates each way; more did not find more
CHANGE_AT, CHANGE_SUM, CHANGE_LEAST, CHANGE_GREATEST, CHANGE_UP, CHANGE_DOWN = range(6)
CHANGE_HEAD = 6
WEEK_BASE = CHANGE_BASE + CHANGE_HEAD + 4 * CHANGE_KEPT  # two profiles: of the week, then of the found period
WEEK_BINS, CYCLE_BINS = 42, 24
(
    SEASON_BIN, SEASON_SUM, SEASON_COUNT, SEASON_ERROR, SEASON_TOTAL, SEASON_N, SEASON_MEAN, SEASON_LEAST,
    SEASON_GREATEST, SEASON_SINCE_US,
) = range(10)  # fmt: skip
SEASON_HEAD = 10
CYCLE_BASE = WEEK_BASE + SEASON_HEAD + WEEK_BINS
RING_BASE = CYCLE_BASE + SEASON_HEAD + CYCLE_BINS  # means of equal slots of time, in which the period is looked for
(
    RING_PERIOD_US, RING_SLOT_US, RING_SLOT, RING_SUM, RING_COUNT, RING_FIRST, RING_KEPT, RING_DUE, RING_MISSES,
    RING_ROUNDS, RING_ANCHOR_US,
) = range(11)  # fmt: skip
RING_HEAD = 11
RING_SLOTS = 64
RING_LAG_MIN = 6  # slots
RING_MISSES_MAX = 3
RING_ROUNDS_MAX = 32.0  # rounds over which a period is averaged
RING_ROUNDS_SURE = 4.0  # seen so often a period outlasts a standstill
SERIES_FIELDS = RING_BASE + RING_HEAD + RING_SLOTS

# --- joint state: blocks of at most BLOCK signals ---------------------------------------------------------------
BLOCK = 32
JOINT_N, JOINT_SINCE_FACTOR, JOINT_HELD, JOINT_HELD_AGE = range(4)
JOINT_HEAD = 4
JOINT_PER_SIGNAL = 3  # smoothed, mean, values seen

# --- events -----------------------------------------------------------------------------------------------------
(
    E_FRAME, E_SIGNAL, E_RAISED, E_COMPONENT, E_TIME_US, E_STARTED_US, E_SCORE, E_VALUE, E_EXPECTED, E_SPREAD,
    E_DISTANCE, E_SAMPLES, E_PERIOD_US, E_LEAD, E_LEAD_SHARE, E_NEXT, E_NEXT_SHARE,
) = range(17)  # fmt: skip
EVENT_FIELDS = 17

LN10 = math.log(10.0)
US_PER_DAY = 86_400_000_000
US_PER_WEEK = 7 * US_PER_DAY
PRIOR_NEAR = 0.03  # a found period so near to the day or the week is the day or the week
RING_US_MAX = 16 * US_PER_DAY  # longest stretch that is looked at, so that periods are found up to 8 days


def joint_size(width: int) -> int:
    """Float64 fields of joint state for a machine of `width` signals."""
    full, rest = divmod(width, BLOCK)
    return full * block_size(BLOCK) + (block_size(rest) if rest else 0)


@compiled
def block_size(k: int) -> int:
    return JOINT_HEAD + k * JOINT_PER_SIGNAL + k * (k + 1)


@compiled
def tail(row: Floats, base: int, x: float, memory: float, learn: bool) -> float:
    """-log10 of P(statistic > x) from the statistic's own tail, then learn from x.

    A 95 % quantile followed by stochastic approximation and, above it, the mean log excess (Hill 1975): the tail is
    a power law with index 1/g.  Both start at a prior and take ever smaller steps, so a young series is neither
    mute nor noisy.
    """
    q = row[base]
    g = row[base + 1]
    p: float = 1.3 * x / q if x <= q else 1.3 + math.log(x / q) / (g * LN10)
    if learn:
        step = max(0.5 / (row[ROW_N] + 10.0), 1.0 / memory) * 4.0
        if x > q:
            row[base] = q * math.exp(0.95 * step)
            row[base + 1] = g + max(20.0 / (row[ROW_N] + 400.0), 20.0 / memory) * (min(math.log(x / q), 2.0) - g)
        else:
            row[base] = q * math.exp(-0.05 * step)
    return p


@compiled
def start_row(row: Floats, x: float) -> None:
    """First value of a series: every level starts there, every tail at its prior, every profile unknown."""
    row[ROW_LAST] = row[ROW_MEAN] = x
    row[ROW_SHORT_TAIL] = row[ROW_LONG_TAIL] = 1.5
    row[ROW_SHORT_TAIL_G] = row[ROW_LONG_TAIL_G] = 0.25
    for scale in range(3 * SCALES):
        row[SCALE_BASE + scale] = x
    start_profile(row, WEEK_BASE, WEEK_BINS)
    start_profile(row, CYCLE_BASE, CYCLE_BINS)


@compiled
def start_profile(row: Floats, base: int, bins: int) -> None:
    """Nothing is known yet of any part of the period."""
    row[base : base + SEASON_HEAD] = 0.0
    row[base + SEASON_BIN] = -1.0
    row[base + SEASON_HEAD : base + SEASON_HEAD + bins] = math.nan


@compiled
def record(cfg: Floats, row: Floats, at: int, x: float, counted: bool, forget: float) -> float:
    """How far x lies beyond the range [row[at], row[at + 1]] as a share of that range; then the range learns x.

    The range follows a record by at most C_RECORD_CAP times its own width, so that one wild value does not blind
    it, and creeps toward the values by `forget` a row, so that the level of long ago is forgotten.
    """
    least, greatest = row[at], row[at + 1]
    span = greatest - least
    beyond = max(x - greatest, least - x)
    share = 0.0
    if beyond > 0.0 and counted:
        share = min(beyond / span, 100.0) if span > 0.0 else 1.0
    limit = cfg[C_RECORD_CAP] * span if counted and span > 0.0 else 1e300
    row[at] = least - min(least - x, limit) if x < least else least + (x - least) * forget
    row[at + 1] = greatest + min(x - greatest, limit) if x > greatest else greatest + (x - greatest) * forget
    return share


@compiled
def predict(row: Floats, base: int, bins: int, phase: float) -> float:
    """The profile's value at a phase in [0, 1), linear between the middles of its bins; NaN where unknown."""
    place = phase * bins - 0.5
    low = math.floor(place)
    weight = place - low
    a = row[base + SEASON_HEAD + low % bins]
    b = row[base + SEASON_HEAD + (low + 1) % bins]
    value: float = (1.0 - weight) * a + weight * b
    if math.isnan(a):
        value = b if weight >= 0.5 else math.nan
    elif math.isnan(b):
        value = a if weight <= 0.5 else math.nan
    return value


@compiled
def season_step(
    cfg: Floats, row: Floats, base: int, bins: int, period_us: float, phase: float, x: float, t_us: int,
    deviation: float, limit: float, forget: float, figures: Floats,
) -> float:  # fmt: skip
    """Share by which the residual to a periodic profile breaks its own record; 0 unless the profile explains a lot.

    A profile speaks once its residual was watched for some whole periods: before, every part of it is news.
    figures[4:7]: what the profile expected, the residual's usual spread, its distance in spreads.
    """
    at = int(phase * bins)
    current = int(row[base + SEASON_BIN])
    if at != current:
        if current >= 0:
            seen = row[base + SEASON_SUM] / row[base + SEASON_COUNT]
            known = row[base + SEASON_HEAD + current]
            row[base + SEASON_HEAD + current] = (
                seen if math.isnan(known) else known + cfg[C_SEASON_STEP] * (seen - known)
            )
        row[base + SEASON_BIN] = at
        row[base + SEASON_SUM] = 0.0
        row[base + SEASON_COUNT] = 0.0
    row[base + SEASON_SUM] += row[ROW_MEAN] + deviation
    row[base + SEASON_COUNT] += 1.0
    expected = predict(row, base, bins, phase)
    if math.isnan(expected):
        return 0.0
    n = row[base + SEASON_N]
    total = row[base + SEASON_TOTAL]
    if n == 0.0:
        row[base + SEASON_SINCE_US] = t_us
    watched = n >= cfg[C_YOUNG] and t_us - row[base + SEASON_SINCE_US] >= cfg[C_SEASON_WAIT] * period_us
    useful = watched and total > 0.0 and row[base + SEASON_ERROR] < cfg[C_SEASON_RATIO] * total
    residual = x - expected
    row[base + SEASON_MEAN] += max(1.0 / (n + 1.0), 0.25) * (residual - row[base + SEASON_MEAN])
    mean = row[base + SEASON_MEAN]
    if n == 0.0:
        row[base + SEASON_LEAST] = row[base + SEASON_GREATEST] = mean
    share = record(cfg, row, base + SEASON_LEAST, mean, watched, forget)
    figures[4] = expected
    figures[5] = math.sqrt(row[base + SEASON_ERROR])
    figures[6] = abs(residual) / (figures[5] + 1e-12)
    error = min(max(residual, -limit), limit)
    rate = max(1.0 / (n + 1.0), 2.0 / cfg[C_HORIZON])
    row[base + SEASON_ERROR] += rate * (error * error - row[base + SEASON_ERROR])
    row[base + SEASON_TOTAL] += rate * (deviation * deviation - total)
    row[base + SEASON_N] = n + 1.0
    return share if useful else 0.0


@compiled
def change_step(cfg: Floats, row: Floats, z: float, forget: float, figures: Floats) -> float:
    """Share by which a change of the mean, looked for over every length at once, breaks its own record.

    The scan of Romano et al. (2023, FOCuS): where the mean of the last rows differs most from the long-run mean, the
    change began at a corner of the convex hull of the random walk that sums z, the standardised values; all other
    beginnings are pruned.  The few latest corners are kept each way.  The statistic is the sum since then over the root
    of its rows, negative for a change downward.
    figures[4:6]: how far the mean of z went since the change began, and how many rows ago that was.
    """
    z = min(max(z, -cfg[C_CHANGE_CLIP]), cfg[C_CHANGE_CLIP])
    at = row[CHANGE_BASE + CHANGE_AT]
    walk = row[CHANGE_BASE + CHANGE_SUM]
    greatest = 0.0
    upward = True
    for way in range(2):
        sign = 1.0 if way == 0 else -1.0
        begin = CHANGE_BASE + CHANGE_HEAD + 2 * CHANGE_KEPT * way
        kept = change_corner(row, begin, int(row[CHANGE_BASE + CHANGE_UP + way]), at, sign * walk, cfg[C_CHANGE_ROWS])
        row[CHANGE_BASE + CHANGE_UP + way] = kept
        for i in range(kept):
            rows = at + 1.0 - row[begin + 2 * i]
            total = sign * (walk + z) - row[begin + 2 * i + 1]
            if total > 0.0 and total * total > greatest * rows:
                greatest = total * total / rows
                upward = way == 0
                figures[4] = total / rows
                figures[5] = rows
    row[CHANGE_BASE + CHANGE_AT] = at + 1.0
    row[CHANGE_BASE + CHANGE_SUM] = walk + z
    statistic = math.sqrt(greatest) if upward else -math.sqrt(greatest)
    return record(cfg, row, CHANGE_BASE + CHANGE_LEAST, statistic, at >= 60.0, forget)


@compiled
def change_corner(row: Floats, begin: int, kept: int, at: float, height: float, rows_max: float) -> int:
    """Add the present place of the walk to a hull of pairs (at, height) that turn upward; returns how many are kept."""
    while kept >= 2:
        one, two = begin + 2 * kept - 4, begin + 2 * kept - 2
        if (row[two + 1] - row[one + 1]) * (at - row[one]) < (height - row[one + 1]) * (row[two] - row[one]):
            break
        kept -= 1
    while kept >= 1 and row[begin + 2 * kept - 1] >= height:
        kept -= 1
    drop = 1 if kept == CHANGE_KEPT else 0
    while drop < kept and at - row[begin + 2 * drop] > rows_max:
        drop += 1
    if drop > 0:
        kept -= drop
        for i in range(2 * kept):
            row[begin + i] = row[begin + i + 2 * drop]
    row[begin + 2 * kept] = at
    row[begin + 2 * kept + 1] = height
    return kept + 1


@compiled
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


@compiled
def restart_ring(row: Floats, x: float, t_us: int, slot_us: float) -> None:
    row[RING_BASE + RING_SLOT_US] = slot_us
    row[RING_BASE + RING_SLOT] = float(t_us // int(slot_us))
    row[RING_BASE + RING_SUM] = x
    row[RING_BASE + RING_COUNT] = 1.0
    row[RING_BASE + RING_FIRST] = row[RING_BASE + RING_KEPT] = 0.0
    row[RING_BASE + RING_DUE] = RING_SLOTS


@compiled
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


@compiled
def near_prior(period_us: float) -> float:
    """The day or the week, where the period is nearly that."""
    for prior_us in (US_PER_DAY, US_PER_WEEK):
        if abs(period_us - prior_us) < PRIOR_NEAR * prior_us:
            return float(prior_us)
    return period_us


@compiled
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


@compiled
def top_offset(like: Floats, top: int) -> float:
    """Where between the neighbours a parabola through three values has its top: from -0.5 to 0.5."""
    bend = like[top - 1] - 2.0 * like[top] + like[top + 1]
    if not bend < 0.0:
        return 0.0
    offset: float = min(max(0.5 * (like[top - 1] - like[top + 1]) / bend, -0.5), 0.5)
    return offset


@compiled
def as_score(cfg: Floats, share: float) -> float:
    """-log10 of how often an excursion beyond the range by so much begins, pooled over all series."""
    score: float = cfg[C_SCORE_BASE] + math.log10(1.0 + share / cfg[C_SHARE_UNIT]) if share > 0.0 else 0.0
    return score


@compiled
def hold(cfg: Floats, state: Floats, held_at: int, score: float, rows: float) -> float:
    """The early alarm, then quiet: after an emitted score only one clearly higher passes for some rows."""
    state[held_at + 1] += 1.0
    if state[held_at + 1] > rows:
        state[held_at] = 0.0
    if score > cfg[C_HOLD_RATIO] * state[held_at]:
        state[held_at] = score
        state[held_at + 1] = 0.0
        return score
    return 0.0


@compiled
def hold_rows(cfg: Floats, interval_us: float) -> float:
    """Rows for which an alarm is held: a time, within bounds in rows."""
    rows: float = min(max(cfg[C_HOLD_US] / max(interval_us, 1.0), cfg[C_HOLD_ROWS_MIN]), cfg[C_HOLD_ROWS_MAX])
    return rows


@compiled
def series_step(
    cfg: Floats, row: Floats, x: float, t_us: int, interval_us: float, figures: Floats
) -> tuple[float, float, int]:
    """Score one value against the state before it, then learn from it.  Returns (onset, state, component).

    Onset is the sum over scales of how far each mean breaks its own slowly forgotten record: a share of a range has
    no unit and needs no scale, so it carries over between series.  State is how unusual the level still is, by the
    tail of its own distance from the long-run mean.
    figures: float64[8], filled with what the explanation needs: expected, spread, distance, samples, and at 7 the period.
    """
    n = row[ROW_N]
    if n == 0.0:
        start_row(row, x)
    sd = math.sqrt(row[ROW_VAR]) + 1e-9 * abs(row[ROW_MEAN]) + 1e-12
    limit = cfg[C_CLIP] * sd if n >= 8.0 and row[ROW_VAR] > 0.0 else 1e300
    deviation = min(max(x - row[ROW_MEAN], -limit), limit)
    forget = min(cfg[C_FORGET], interval_us / cfg[C_FORGET_US])
    component = UNUSUAL
    figures[0] = row[ROW_MEAN]
    figures[1] = sd
    figures[2] = abs(x - row[ROW_MEAN]) / sd
    figures[3] = n
    share = 0.0
    best = 0.0
    for scale in range(SCALES):
        at = SCALE_BASE + 3 * scale
        rows = SCALE_ROWS[scale]
        row[at] += max(1.0 / (n + 1.0), 1.0 / rows) * (x - row[at])
        least, greatest = row[at + 1], row[at + 2]
        beyond = record(cfg, row, at + 1, row[at], n >= max(20.0, 2.0 * rows), forget)
        share += beyond
        if beyond > best:
            best = beyond
            component = RECORD + scale
            figures[0] = greatest if row[at] > greatest else least
            figures[1] = greatest - least
            figures[2] = beyond
            figures[3] = n
            if scale > 0:
                figures[0] = row[ROW_MEAN]
                figures[1] = sd
                figures[2] = abs(row[at] - row[ROW_MEAN]) / sd
                figures[3] = rows
    if n >= 8.0:
        beyond = change_step(cfg, row, (x - row[ROW_MEAN]) / sd, forget, figures)
        if beyond > share:
            share = beyond
            component = CHANGE
            figures[0] = row[ROW_MEAN]
            figures[1] = sd
            figures[2] = figures[4]
            figures[3] = figures[5]
    cycle_us = row[RING_BASE + RING_PERIOD_US]
    for which in range(2 if cycle_us > 0.0 else 1):
        if which == 0:
            base, bins, period_us = WEEK_BASE, WEEK_BINS, float(US_PER_WEEK)
            phase = (t_us % US_PER_WEEK) / US_PER_WEEK
        else:
            base, bins, period_us = CYCLE_BASE, CYCLE_BINS, cycle_us
            phase = ((t_us - row[RING_BASE + RING_ANCHOR_US]) / cycle_us) % 1.0
        beyond = season_step(cfg, row, base, bins, period_us, phase, x, t_us, deviation, limit, forget, figures)
        if beyond > share:
            share = beyond
            component = SEASON if period_us in (US_PER_DAY, US_PER_WEEK) else CYCLE
            figures[0] = figures[4]
            figures[1] = figures[5]
            figures[2] = figures[6]
            figures[3] = n
            figures[7] = period_us
    ring_step(cfg, row, row[ROW_MEAN] + deviation, t_us, interval_us)

    learn = n >= 30.0
    memory = cfg[C_TAIL_MEMORY]
    state = 0.0
    if n >= cfg[C_WARMUP]:
        short = abs(row[SCALE_BASE + 6] - row[ROW_MEAN]) / sd
        long = abs(row[SCALE_BASE + 9] - row[ROW_MEAN]) / sd
        state = max(
            tail(row, ROW_SHORT_TAIL, min(short, 1e6), memory, learn),
            tail(row, ROW_LONG_TAIL, min(long, 1e6), memory, learn),
        )
        state = min(state, 12.0)

    if x == row[ROW_LAST] and n > 0.0:
        row[ROW_REPEATS] += 1.0
    else:
        row[ROW_REPEATS_USUAL] = max(row[ROW_REPEATS_USUAL], row[ROW_REPEATS])
        row[ROW_REPEATS] = 0.0
    stuck_after = 3.0 * row[ROW_REPEATS_USUAL] + 20.0
    if n >= cfg[C_WARMUP] and row[ROW_REPEATS] >= stuck_after and row[ROW_VAR] > 0.0:
        stuck = 4.0 + math.log10(row[ROW_REPEATS] / stuck_after)
        if stuck > state:
            state = stuck
            component = FLAT
            figures[0] = x
            figures[1] = row[ROW_REPEATS_USUAL]
            figures[2] = figures[3] = row[ROW_REPEATS]

    rate = max(1.0 / (n + 1.0), 1.0 / cfg[C_HORIZON])
    row[ROW_MEAN] += rate * deviation
    row[ROW_VAR] += rate * (deviation * deviation - row[ROW_VAR])
    row[ROW_LAST] = x
    row[ROW_N] = n + 1.0
    row[ROW_ABSENT_RUN] = 0.0
    row[ROW_PRESENT] += max(1.0 / (n + 1.0), 0.01) * (1.0 - row[ROW_PRESENT])
    share = hold(cfg, row, ROW_HELD, share, hold_rows(cfg, interval_us))
    onset = as_score(cfg, share) if n >= cfg[C_WARMUP] else 0.0
    state = max(state, onset)
    row[ROW_STATE] = state
    return onset, state, component


@compiled
def absent_step(cfg: Floats, row: Floats, figures: Floats) -> tuple[float, float, int]:
    """A signal without a value in this frame: only the run of absences is counted, nothing is learned from it."""
    row[ROW_ABSENT_RUN] += 1.0
    usual = min(max(1.0 - row[ROW_PRESENT], 0.02), 0.98)
    score = 0.0
    if row[ROW_N] >= cfg[C_WARMUP]:
        score = min(row[ROW_ABSENT_RUN] * -math.log10(usual) / 2.0, 12.0)
        figures[0] = 1.0 - usual
        figures[1] = 0.0
        figures[2] = row[ROW_ABSENT_RUN]
        figures[3] = row[ROW_ABSENT_RUN]
        if score < row[ROW_STATE]:
            score = row[ROW_STATE]  # what was abnormal stays so until a value says otherwise
    row[ROW_PRESENT] += 0.01 * (0.0 - row[ROW_PRESENT]) if row[ROW_ABSENT_RUN] < 50.0 else 0.0
    return 0.0, score, DROPOUT


@compiled
def joint_step(
    cfg: Floats, block: Floats, k: int, values: Floats, share: Floats, rows_held: float
) -> tuple[float, float, float]:
    """Gated T-squared of one block of k signals (values: float64[k], NaN absent).  Returns (onset, state, distance).

    Hotelling's T-squared of exponentially smoothed signals; mean and covariance are learned only while calm, with
    a slow leak so that a permanent new regime is accepted at last.  The covariance is shrunk toward its diagonal
    and its Cholesky factor renewed every few rows.  share: float64[k], the signals' parts of T2, sum to one.
    """
    smooth = JOINT_HEAD
    mean = smooth + k
    seen = mean + k
    cov = JOINT_HEAD + k * JOINT_PER_SIGNAL
    factor = cov + k * (k + 1) // 2
    n = block[JOINT_N]
    for i in range(k):
        share[i] = 0.0
        x = values[i]
        if math.isnan(x):
            continue
        if block[seen + i] == 0.0:
            block[smooth + i] = x
        else:
            block[smooth + i] += max(1.0 / (block[seen + i] + 1.0), cfg[C_JOINT_EW]) * (x - block[smooth + i])
        block[seen + i] += 1.0
    warm = n >= cfg[C_JOINT_WARMUP]
    t2 = 0.0
    if warm:
        t2 = mahalanobis(block, k, values, smooth, mean, factor, share)
    normal = 0.0
    if warm:
        # Wilson and Hilferty (1931): the cube root of chi-squared over k is nearly normal, whatever k is.
        normal = ((t2 / k) ** (1.0 / 3.0) - (1.0 - 2.0 / (9.0 * k))) / math.sqrt(2.0 / (9.0 * k))
    calm = not warm or normal < cfg[C_JOINT_GATE]
    rate = max(1.0 / (n + 1.0), 1.0 / cfg[C_JOINT_HORIZON])
    if not calm:
        rate = cfg[C_JOINT_LEAK]
    for i in range(k):
        if math.isnan(values[i]):
            continue
        di = block[smooth + i] - block[mean + i] if block[seen + i] > 1.0 else 0.0
        for j in range(i + 1):
            if math.isnan(values[j]):
                continue
            dj = block[smooth + j] - block[mean + j] if block[seen + j] > 1.0 else 0.0
            at = cov + i * (i + 1) // 2 + j
            block[at] += rate * (di * dj - block[at])
    for i in range(k):
        if math.isnan(values[i]):
            continue
        if block[seen + i] <= 1.0:
            block[mean + i] = block[smooth + i]
        block[mean + i] += rate * (block[smooth + i] - block[mean + i])
    block[JOINT_N] = n + 1.0
    block[JOINT_SINCE_FACTOR] += 1.0
    if block[JOINT_SINCE_FACTOR] >= max(8.0, k) or n + 1.0 == math.ceil(cfg[C_JOINT_WARMUP]):
        block[JOINT_SINCE_FACTOR] = 0.0
        factorise(cfg, block, k, cov, factor)
    score = min(max(cfg[C_JOINT_UNIT] * normal, 0.0), 30.0)
    return hold(cfg, block, JOINT_HELD, score, rows_held), score, math.sqrt(t2 / k)


@compiled
def factorise(cfg: Floats, block: Floats, k: int, cov: int, factor: int) -> None:
    """Cholesky factor of the shrunk covariance, packed by rows like the covariance itself."""
    keep = 1.0 - cfg[C_JOINT_SHRINK]
    for i in range(k):
        for j in range(i + 1):
            at = i * (i + 1) // 2 + j
            total = block[cov + at] * (keep if j < i else 1.0)
            for m in range(j):
                total -= block[factor + i * (i + 1) // 2 + m] * block[factor + j * (j + 1) // 2 + m]
            if j < i:
                block[factor + at] = total / block[factor + j * (j + 1) // 2 + j]
            else:
                floor = 1e-6 * block[cov + at] + 1e-18
                block[factor + at] = math.sqrt(max(total, floor))


@compiled
def mahalanobis(block: Floats, k: int, values: Floats, smooth: int, mean: int, factor: int, share: Floats) -> float:
    """d' S^-1 d by two triangular solves; `share` receives each signal's part of it, from 0 to 1, summing to 1.

    A part d_i (S^-1 d)_i is negative where a signal makes the others less surprising: it then has no share.
    """
    forward = np.empty(BLOCK)
    t2 = 0.0
    for i in range(k):
        total = 0.0 if math.isnan(values[i]) else block[smooth + i] - block[mean + i]
        share[i] = total
        row = factor + i * (i + 1) // 2
        for j in range(i):
            total -= block[row + j] * forward[j]
        forward[i] = total / block[row + i]
        t2 += forward[i] * forward[i]
    for i in range(k - 1, -1, -1):
        total = forward[i]
        for j in range(i + 1, k):
            total -= block[factor + j * (j + 1) // 2 + i] * forward[j]
        forward[i] = total / block[factor + i * (i + 1) // 2 + i]
    surprising = 0.0
    for i in range(k):
        share[i] = max(share[i] * forward[i], 0.0)
        surprising += share[i]
    if surprising > 0.0:
        for i in range(k):
            share[i] /= surprising
    return t2


@compiled
def eased_by(cfg: Floats, interval_us: float) -> float:
    """How far alarms are raised below `raise_at` where frames are rare: the budget is in time, the score in rows."""
    if interval_us <= 0.0:
        return 0.0
    asked = math.log10(max(cfg[C_BUDGET_US] / interval_us, 1.0))
    return float(cfg[C_RAISE] - min(cfg[C_RAISE], max(cfg[C_RAISE_MIN], asked)))


@compiled
def alarm_step(
    cfg: Floats,
    alarm: Floats,
    started_at: int,
    calm_at: int,
    raise_at: float,
    offset: float,
    onset: float,
    state: float,
    t_us: float,
) -> int:
    """The alarm of one series or machine: 1 raised now, 2 cleared now, 0 nothing new."""
    if alarm[started_at] == 0.0:
        if onset >= raise_at + offset:
            alarm[started_at] = t_us
            alarm[calm_at] = 0.0
            return 1
        return 0
    if state >= cfg[C_CLEAR] + offset:
        alarm[calm_at] = 0.0
        return 0
    alarm[calm_at] += 1.0
    return 2 if alarm[calm_at] >= cfg[C_CALM_ROWS] else 0


@compiled
def write_event(
    event: Floats, frame: int, signal: int, what: int, component: int, t_us: float, started_us: float, score: float
) -> None:
    """Begin a row of `events`; the figures follow."""
    event[:] = 0.0
    event[E_FRAME] = frame
    event[E_SIGNAL] = signal
    event[E_RAISED] = 1.0 if what == 1 else 0.0
    event[E_COMPONENT] = component
    event[E_TIME_US] = t_us
    event[E_STARTED_US] = started_us
    event[E_SCORE] = score


@compiled
def write_leads(event: Floats, share: Floats) -> None:
    """The two signals with the largest share of the joint distance; share: float64[k], k >= 2."""
    lead = 0
    for i in range(1, share.shape[0]):
        if share[i] > share[lead]:
            lead = i
    second = 1 if lead == 0 else 0
    for i in range(share.shape[0]):
        if i != lead and share[i] > share[second]:
            second = i
    event[E_LEAD] = lead
    event[E_LEAD_SHARE] = share[lead]
    event[E_NEXT] = second
    event[E_NEXT_SHARE] = share[second]


@compiled
def score_frames(
    cfg: Floats, slots: NDArray[np.int32], times_us: Ints, starts: Ints, values: Floats,
    places: Ints, machines: Floats, series: Floats, joint: Floats,
    onset: Floats, state: Floats, component: NDArray[np.int8], joint_onset: Floats, joint_state: Floats,
    share: Floats, events: Floats,
) -> tuple[int, int]:  # fmt: skip
    """Run every frame in order.  Returns (events written, frames skipped as not newer)."""
    figures = np.zeros(8)
    n_events = 0
    skipped = 0
    for f in range(slots.shape[0]):
        slot = slots[f]
        machine = machines[slot]
        first_row, width, joint_at = places[slot, 0], places[slot, 1], places[slot, 2]
        begin = starts[f]
        count = starts[f + 1] - begin
        t_us = float(times_us[f])
        joint_onset[f] = 0.0
        joint_state[f] = 0.0
        for i in range(begin, begin + count):
            onset[i] = 0.0
            state[i] = 0.0
            component[i] = -1
            share[i] = 0.0
        if machine[MACHINE_FRAMES] > 0.0 and t_us <= machine[MACHINE_LAST_US]:
            skipped += 1
            continue
        if machine[MACHINE_FRAMES] > 0.0:
            step = min(t_us - machine[MACHINE_LAST_US], float(US_PER_DAY))
            if machine[MACHINE_FRAMES] == 1.0:
                machine[MACHINE_INTERVAL_US] = step
            limited = min(step, 4.0 * machine[MACHINE_INTERVAL_US])
            machine[MACHINE_INTERVAL_US] += max(1.0 / machine[MACHINE_FRAMES], 0.01) * (
                limited - machine[MACHINE_INTERVAL_US]
            )
        machine[MACHINE_LAST_US] = t_us
        machine[MACHINE_FRAMES] += 1.0
        eased = eased_by(cfg, machine[MACHINE_INTERVAL_US])
        for i in range(min(count, width)):
            row = series[first_row + i]
            x = values[begin + i]
            if math.isfinite(x):
                o, s, c = series_step(cfg, row, x, times_us[f], machine[MACHINE_INTERVAL_US], figures)
            else:
                o, s, c = absent_step(cfg, row, figures)
            onset[begin + i] = o
            state[begin + i] = s
            component[begin + i] = c
            lasting = s if c in (FLAT, DROPOUT) else o  # these two have no onset: being long is what is wrong
            alarming = max(o, lasting) if row[ROW_N] >= cfg[C_YOUNG] else 0.0
            what = alarm_step(
                cfg, row, ROW_ALARM_US, ROW_CALM, cfg[C_RAISE] - eased, row[ROW_OFFSET], alarming, s, t_us
            )
            if what:
                event = events[n_events]
                write_event(event, f, i, what, c, t_us, row[ROW_ALARM_US], s)
                event[E_VALUE] = x
                event[E_EXPECTED] = figures[0]
                event[E_SPREAD] = figures[1]
                event[E_DISTANCE] = figures[2]
                event[E_SAMPLES] = figures[3]
                event[E_PERIOD_US] = figures[7] if c in (SEASON, CYCLE) else 0.0
                n_events += 1
                if what == 2:
                    row[ROW_ALARM_US] = 0.0
        if width < 2 or count < 2:
            continue
        distance = 0.0
        joint_now = 0.0
        for lo in range(0, min(count, width), BLOCK):
            k = min(BLOCK, width - lo)
            if lo + k > count:
                break
            block = joint[joint_at + (lo // BLOCK) * block_size(BLOCK) :][: block_size(k)]
            o, s, d = joint_step(
                cfg,
                block,
                k,
                values[begin + lo : begin + lo + k],
                share[begin + lo : begin + lo + k],
                hold_rows(cfg, machine[MACHINE_INTERVAL_US]),
            )
            distance = max(distance, d)
            joint_onset[f] = max(joint_onset[f], o)
            joint_now = max(joint_now, s)
        # A machine does not change its state from one row to the next and back: what is said of it settles over a
        # few rows.  An alarm is raised by the row itself.
        machine[MACHINE_STATE] += cfg[C_JOINT_SETTLING] * (joint_now - machine[MACHINE_STATE])
        joint_state[f] = machine[MACHINE_STATE]
        what = alarm_step(
            cfg,
            machine,
            MACHINE_ALARM_US,
            MACHINE_CALM,
            cfg[C_JOINT_RAISE] - eased,
            machine[MACHINE_OFFSET],
            joint_now,
            joint_state[f],
            t_us,
        )
        if what:
            event = events[n_events]
            write_event(event, f, -1, what, JOINT, t_us, machine[MACHINE_ALARM_US], joint_now)
            event[E_DISTANCE] = distance
            event[E_SAMPLES] = machine[MACHINE_FRAMES]
            write_leads(event, share[begin : begin + count])
            n_events += 1
            if what == 2:
                machine[MACHINE_ALARM_US] = 0.0
    return n_events, skipped
