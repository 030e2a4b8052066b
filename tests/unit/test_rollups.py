"""Open buckets against a plain model: any split of the frames into polls gives the same closed buckets."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from services.ingest.historian.binarycopy import Floats, Ints
from services.ingest.historian.historian import DAY_US, LOOKUPS_MAX, MINUTE_US, _lookups
from services.ingest.historian.rollups import OpenBuckets, Stats

MINUTE = 60


def model(slots: Ints, times: Ints, values: Floats) -> dict[tuple[int, int], list[Floats]]:
    found: dict[tuple[int, int], list[Floats]] = {}
    for slot, at, row in zip(slots, times, values, strict=True):
        found.setdefault((int(slot), int(at) // MINUTE), []).append(row)
    return found


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), polls=st.integers(1, 6))
def test_closed_buckets_hold_exactly_their_frames(seed: int, polls: int) -> None:
    rng = np.random.default_rng(seed)
    times_of = {slot: np.cumsum(rng.integers(1, 40, rng.integers(1, 40))) for slot in range(3)}
    slots = np.concatenate([np.full(len(times), slot) for slot, times in times_of.items()])
    times = np.concatenate(list(times_of.values()))
    values = rng.normal(size=(len(times), 2))
    values[rng.random(values.shape) < 0.3] = np.nan
    poll = (times * polls) // (times.max() + 1)  # frames of a machine come in order, in so many polls
    opened = OpenBuckets(2)
    opened.make_room(3)
    closed: dict[tuple[int, int], tuple[Floats, ...]] = {}
    for number in range(polls):
        which = np.flatnonzero(poll == number)
        if not len(which):
            continue
        which = which[np.lexsort((times[which], slots[which]))]
        complete, partial = opened.add(Stats.of_frames(slots[which], times[which], values[which], MINUTE).reduced())
        assert not len(partial.slots)
        for row in range(len(complete.slots)):
            key = (int(complete.slots[row]), int(complete.buckets[row]))
            assert key not in closed
            closed[key] = tuple(getattr(complete, name)[row] for name in ("counts", "sums", "mins", "maxs", "lasts"))
    expected = model(slots, times, values)
    newest = {slot: int(times_[-1]) // MINUTE for slot, times_ in times_of.items()}
    assert set(closed) == {key for key in expected if key[1] < newest[key[0]]}
    for key, (counts, sums, mins, maxs, lasts) in closed.items():
        rows = np.array(expected[key])
        for column in range(2):
            present = rows[~np.isnan(rows[:, column]), column]
            assert counts[column] == len(present)
            np.testing.assert_allclose(sums[column], present.sum(), atol=1e-12)
            if len(present):
                assert (mins[column], maxs[column], lasts[column]) == (present.min(), present.max(), present[-1])
            else:
                assert np.isnan([mins[column], maxs[column], lasts[column]]).all()


@given(st.lists(st.integers(0, 300 * 7 * 1440), max_size=300), st.sampled_from([1, 60, 1_000]))
def test_touched_buckets_are_looked_for_once_each_and_few_at_a_time_where_they_lie_apart(
    minutes: list[int], dense: int
) -> None:
    times = np.array([minute + n for minute in minutes for n in range(dense)][:20_000], dtype=np.int64) * MINUTE_US
    found = list(_lookups(times, 7 * DAY_US))
    assert sorted(int(one) for some in found for one in some) == list(range(len(times)))
    for some in found:
        chunks = times[some] // (7 * DAY_US)
        assert (np.diff(times[some]) >= 0).all()
        assert len(some) * (chunks[-1] - chunks[0] + 1) <= LOOKUPS_MAX
