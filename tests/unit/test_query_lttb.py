"""Down-sampling keeps the look of a line."""

import numpy as np
import pytest

from services.ingest.queries.lttb import chosen


def _plain(times: list[int], values: list[float], points: int) -> list[int]:
    """The paper's algorithm, word for word, on the same buckets."""
    count = len(times)
    edges = np.linspace(1, count - 1, points - 1).astype(int)
    found = [0]
    for number in range(points - 2):
        if number + 2 < len(edges):
            span = range(edges[number + 1], edges[number + 2])
            cx, cy = sum(times[i] for i in span) / len(span), sum(values[i] for i in span) / len(span)
        else:
            cx, cy = times[-1], values[-1]
        ax, ay = times[found[-1]], values[found[-1]]
        areas = {
            i: abs((ax - cx) * (values[i] - ay) - (ax - times[i]) * (cy - ay))
            for i in range(edges[number], edges[number + 1])
        }
        found.append(max(areas, key=lambda i: (areas[i], -i)))
    return [*found, count - 1]


@pytest.mark.parametrize(("count", "points"), [(4, 3), (10, 9), (1000, 50), (1001, 333), (5000, 3)])
def test_it_is_the_algorithm_of_the_paper(count: int, points: int) -> None:
    rng = np.random.default_rng(count)
    times = np.cumsum(rng.integers(1, 2_000_000, count))
    values = np.cumsum(rng.normal(0, 1, count))
    found = chosen(times, values, points)
    start = int(times[0])
    assert found.tolist() == _plain([int(t) - start for t in times], values.tolist(), points)
    assert len(found) == points
    assert (np.diff(found) > 0).all()


def test_a_single_peak_among_a_million_samples_stays() -> None:
    values = np.zeros(1_000_000)
    values[654_321] = 9.0
    times = 1_764_000_000_000_000 + np.arange(1_000_000) * 1_000
    found = chosen(times, values, 500)
    assert 654_321 in found
    assert (found[0], found[-1]) == (0, 999_999)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_samples_are_all_kept(count: int) -> None:
    assert chosen(np.arange(count), np.ones(count), 3).tolist() == list(range(count))
