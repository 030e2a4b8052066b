"""One series: a value is scored against the state before it, then learned from."""

import math

from services.anomaly.kernel.change import change_step
from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    C_CLIP,
    C_FORGET,
    C_FORGET_US,
    C_HORIZON,
    C_TAIL_MEMORY,
    C_WARMUP,
    CHANGE,
    CYCLE,
    CYCLE_BASE,
    CYCLE_BINS,
    DROPOUT,
    FLAT,
    RECORD,
    RING_ANCHOR_US,
    RING_BASE,
    RING_PERIOD_US,
    ROW_ABSENT_RUN,
    ROW_HELD,
    ROW_LAST,
    ROW_LONG_TAIL,
    ROW_LONG_TAIL_G,
    ROW_MEAN,
    ROW_N,
    ROW_PRESENT,
    ROW_REPEATS,
    ROW_REPEATS_USUAL,
    ROW_SHORT_TAIL,
    ROW_SHORT_TAIL_G,
    ROW_STATE,
    ROW_VAR,
    SCALE_BASE,
    SCALE_ROWS,
    SCALES,
    SEASON,
    UNUSUAL,
    US_PER_DAY,
    US_PER_WEEK,
    WEEK_BASE,
    WEEK_BINS,
)
from services.anomaly.kernel.period import ring_step
from services.anomaly.kernel.scores import (
    as_score,
    hold,
    hold_rows,
    record,
    tail,
)
from services.anomaly.kernel.season import season_step, start_profile


@part
def start_row(row: Floats, x: float) -> None:
    """First value of a series: every level starts there, every tail at its prior, every profile unknown."""
    row[ROW_LAST] = row[ROW_MEAN] = x
    row[ROW_SHORT_TAIL] = row[ROW_LONG_TAIL] = 1.5
    row[ROW_SHORT_TAIL_G] = row[ROW_LONG_TAIL_G] = 0.25
    for scale in range(3 * SCALES):
        row[SCALE_BASE + scale] = x
    start_profile(row, WEEK_BASE, WEEK_BINS)
    start_profile(row, CYCLE_BASE, CYCLE_BINS)


@part
def series_step(
    cfg: Floats, row: Floats, x: float, t_us: int, interval_us: float, figures: Floats
) -> tuple[float, float, int]:
    """Score one value against the state before it, then learn from it.  Returns (onset, state, component).

    Onset is the strongest of three: the sum over scales of how far each mean breaks its own slowly forgotten record, and
    the same of the change scan and of the residuals to the periodic profiles.  A share of a range has no unit and needs
    no scale, so it carries over between series.  State is how unusual the level still is, by the
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


@part
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
