"""What a plot reads, and what it keeps of it."""

import numpy as np
import pytest

from services.common.errors import TooLarge
from services.ingest.queries.queries import CELLS_READ_MAX, resolution_of_plot, thinned
from services.ingest.queries.read import DAY_US, HOUR, HOUR_US, MINUTE, Held, Resolution

START_US = 1_760_000_400 * 1_000_000  # on an hour
ALL = Held(0, START_US + 10_000 * DAY_US, 0, 0)


@pytest.mark.parametrize(
    ("held", "signals", "days", "points", "resolution"),
    [
        (ALL, 1, 1, 500, None),
        (ALL, 1, 2, 500, MINUTE),
        (ALL, 1, 83, 500, MINUTE),
        (ALL, 1, 84, 500, HOUR),
        # Six million minutes would be read, and 300 MB kept.
        (ALL, 50, 83, 500, HOUR),
        (ALL, 50, 55, 500, MINUTE),
        # What retention has left.
        (Held(0, ALL.end_us, START_US + HOUR_US, 0), 1, 1, 500, MINUTE),
        (Held(0, ALL.end_us, START_US, 0), 1, 1, 500, None),
        (Held(0, ALL.end_us, START_US + DAY_US, START_US + HOUR_US), 1, 1, 500, HOUR),
    ],
)
def test_a_plot_reads_what_there_is_and_no_more_than_it_needs(
    held: Held, signals: int, days: int, points: int, resolution: Resolution | None
) -> None:
    assert resolution_of_plot(held, signals, START_US, START_US + days * DAY_US, points) is resolution


def test_a_plot_of_more_hours_than_may_be_read_is_refused() -> None:
    days = CELLS_READ_MAX // 50 // 24 + 1
    assert resolution_of_plot(ALL, 49, START_US, START_US + days * DAY_US, 500) is HOUR
    with pytest.raises(TooLarge):
        resolution_of_plot(ALL, 50, START_US, START_US + days * DAY_US, 500)


def test_thinning_keeps_the_extremes_of_each_bin_at_their_own_times() -> None:
    rng = np.random.default_rng(5)
    times = np.cumsum(rng.integers(1, 50, 5_000))
    values = rng.integers(0, 100, 5_000).astype(np.float64)
    kept_times, kept = thinned(times, values, 1_000)
    bins = np.unique(times // 1_000)
    assert len(kept) <= 2 * len(bins)
    assert (np.diff(kept_times) > 0).all()
    for one in bins:
        inside, shown = values[times // 1_000 == one], kept[kept_times // 1_000 == one]
        assert (shown.min(), shown.max()) == (inside.min(), inside.max())
    assert set(zip(kept_times.tolist(), kept.tolist(), strict=True)) <= set(zip(times, values, strict=True))
    few_times, few = thinned(times, values, 1)
    assert (few_times.tolist(), few.tolist()) == (times.tolist(), values.tolist())
    assert len(thinned(times[:0], values[:0], 1)[0]) == 0
