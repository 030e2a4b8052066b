"""The change scan: a mean that differs from the long-run one, looked for over every length at once."""

import math

from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    C_CHANGE_CLIP,
    C_CHANGE_ROWS,
    CHANGE_AT,
    CHANGE_BASE,
    CHANGE_HEAD,
    CHANGE_KEPT,
    CHANGE_LEAST,
    CHANGE_SUM,
    CHANGE_UP,
)
from services.anomaly.kernel.scores import record


@part
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


@part
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
