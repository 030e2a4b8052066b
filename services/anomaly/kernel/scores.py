"""How statistics become scores: ranges and their records, tails, and the hold after an onset."""

import math

from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    C_HOLD_RATIO,
    C_HOLD_ROWS_MAX,
    C_HOLD_ROWS_MIN,
    C_HOLD_US,
    C_RECORD_CAP,
    C_SCORE_BASE,
    C_SHARE_UNIT,
    ROW_N,
)

LN10 = math.log(10.0)


@part
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


@part
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


@part
def as_score(cfg: Floats, share: float) -> float:
    """-log10 of how often an excursion beyond the range by so much begins, pooled over all series."""
    score: float = cfg[C_SCORE_BASE] + math.log10(1.0 + share / cfg[C_SHARE_UNIT]) if share > 0.0 else 0.0
    return score


@part
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


@part
def hold_rows(cfg: Floats, interval_us: float) -> float:
    """Rows for which an alarm is held: a time, within bounds in rows."""
    rows: float = min(max(cfg[C_HOLD_US] / max(interval_us, 1.0), cfg[C_HOLD_ROWS_MIN]), cfg[C_HOLD_ROWS_MAX])
    return rows
