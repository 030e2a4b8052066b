"""Largest triangle three buckets (Steinarsson 2013): the few points of a line that keep its look."""

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def chosen(times_us: Ints, values: Floats, points: int) -> Ints:
    """Indexes of at most `points` (at least 3) of the samples, first and last included. Times grow; no value is NaN."""
    count = len(times_us)
    if count <= points:
        return np.arange(count, dtype=np.int64)
    # Small numbers: products of microseconds since 1970 would lose what the areas are compared by.
    x = (times_us - times_us[0]).astype(np.float64)
    edges = np.linspace(1, count - 1, points - 1).astype(np.int64)
    starts, ends = edges[:-1], edges[1:]
    sizes = ends - starts
    mean_x = np.append(np.add.reduceat(x[1:-1], starts - 1) / sizes, x[-1])
    mean_y = np.append(np.add.reduceat(values[1:-1], starts - 1) / sizes, values[-1])
    found = np.empty(points, dtype=np.int64)
    found[0], found[-1] = 0, count - 1
    before = 0
    for number in range(points - 2):
        start, end = starts[number], ends[number]
        ax, ay, cx, cy = x[before], values[before], mean_x[number + 1], mean_y[number + 1]
        area = np.abs((ax - cx) * (values[start:end] - ay) - (ax - x[start:end]) * (cy - ay))
        before = int(start + area.argmax())
        found[number + 1] = before
    return found
