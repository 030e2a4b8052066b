"""Periodic profiles: what is usual in each part of a period."""

import math

from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    C_HORIZON,
    C_SEASON_RATIO,
    C_SEASON_STEP,
    C_SEASON_WAIT,
    C_YOUNG,
    ROW_MEAN,
    SEASON_BIN,
    SEASON_COUNT,
    SEASON_ERROR,
    SEASON_GREATEST,
    SEASON_HEAD,
    SEASON_LEAST,
    SEASON_MEAN,
    SEASON_N,
    SEASON_SINCE_US,
    SEASON_SUM,
    SEASON_TOTAL,
)
from services.anomaly.kernel.scores import record


@part
def start_profile(row: Floats, base: int, bins: int) -> None:
    """Nothing is known yet of any part of the period."""
    row[base : base + SEASON_HEAD] = 0.0
    row[base + SEASON_BIN] = -1.0
    row[base + SEASON_HEAD : base + SEASON_HEAD + bins] = math.nan


@part
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


@part
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
    if n == 0.0 or t_us < row[base + SEASON_SINCE_US]:  # the machine's clock may be put back
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
