"""Signals of one machine together: gated T-squared."""

import math

import numpy as np

from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    BLOCK,
    C_CHANGE_CLIP,
    C_JOINT_EW,
    C_JOINT_GATE,
    C_JOINT_HORIZON,
    C_JOINT_LEAK,
    C_JOINT_SHRINK,
    C_JOINT_UNIT,
    C_JOINT_WARMUP,
    JOINT_HEAD,
    JOINT_HELD,
    JOINT_N,
    JOINT_PER_SIGNAL,
    JOINT_SINCE_FACTOR,
    ROW_MEAN,
    ROW_N,
    ROW_VAR,
    VALUE_MAX,
)
from services.anomaly.kernel.scores import hold


@part
def joint_value(cfg: Floats, row: Floats, x: float) -> float:
    """A value as the signals together see it, NaN where it is absent: not so far out that all else would be small beside it."""
    if not abs(x) <= VALUE_MAX:
        return math.nan
    if row[ROW_N] < 8.0 or not row[ROW_VAR] > 0.0:
        return x
    limit = cfg[C_CHANGE_CLIP] * math.sqrt(row[ROW_VAR])
    return float(min(max(x, row[ROW_MEAN] - limit), row[ROW_MEAN] + limit))


@part
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


@part
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


@part
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
