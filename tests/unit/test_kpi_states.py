"""Machine states from power alone: on machines whose state is known."""

import numpy as np
import numpy.typing as npt
import pytest

from services.ingest.kpi.states import Levels, NoLevels, State, found_levels, runs, states

Floats = npt.NDArray[np.float64]
OFF, IDLE, WORKING, NO_DATA = State.OFF, State.IDLE, State.WORKING, State.NO_DATA


def _machine(
    rng: np.random.Generator, levels: dict[int, tuple[float, float]], shares: dict[int, float]
) -> tuple[Floats, Floats]:
    """Minutes of a machine that changes between states, and their states; a minute of change is in between."""
    truth: list[int] = []
    while len(truth) < 10_000:
        state = rng.choice(list(shares), p=list(shares.values()))
        truth += [int(state)] * int(rng.integers(5, 120))
    codes = np.array(truth[:10_000])
    mean, spread = (np.array([levels[c][k] for c in codes]) for k in (0, 1))
    power = np.abs(mean * np.exp(rng.normal(0, spread)))
    changed = np.flatnonzero(np.diff(codes)) + 1
    part = rng.random(len(changed))
    power[changed] = power[changed - 1] * part + power[changed] * (1 - part)
    return power, codes


@pytest.mark.parametrize(
    ("levels", "shares"),
    [
        # A machining centre: control off, spindle stopped, cutting with all kinds of loads.
        ({OFF: (0.02, 0.3), IDLE: (1.4, 0.05), WORKING: (6.0, 0.25)}, {OFF: 0.4, IDLE: 0.25, WORKING: 0.35}),
        # A compressor on a clamp meter in amperes, rarely idle.
        ({OFF: (0.1, 0.2), IDLE: (11, 0.03), WORKING: (38, 0.06)}, {OFF: 0.5, IDLE: 0.06, WORKING: 0.44}),
        # An oven in watts that is never off while we look.
        ({IDLE: (800, 0.1), WORKING: (9_000, 0.15)}, {IDLE: 0.6, WORKING: 0.4}),
        # A fan: off or on.
        ({OFF: (0.0, 0.0), WORKING: (2.2, 0.04)}, {OFF: 0.7, WORKING: 0.3}),
    ],
)
def test_states_are_found_without_being_told_the_levels(
    levels: dict[int, tuple[float, float]], shares: dict[int, float]
) -> None:
    for seed in range(5):
        power, truth = _machine(np.random.default_rng(seed), levels, shares)
        found = states(power, found_levels(power))
        assert set(np.unique(found)) == set(shares)
        assert (found == truth).mean() > 0.985


@pytest.mark.parametrize(
    ("power", "reason"),
    [
        (np.full(400, 5.0), "NOT_ENOUGH_DATA"),
        (np.full(5_000, np.nan), "NOT_ENOUGH_DATA"),
        (np.zeros(5_000), "ONE_LEVEL"),
        (np.full(5_000, 5.0), "ONE_LEVEL"),
        (5 + np.sin(np.arange(5_000)), "ONE_LEVEL"),
        (-np.ones(5_000), "ONE_LEVEL"),
    ],
)
def test_where_the_levels_cannot_be_told_it_says_so(power: Floats, reason: str) -> None:
    with pytest.raises(NoLevels) as caught:
        found_levels(power)
    assert caught.value.reason == reason


def test_a_gap_is_a_state_of_its_own_and_what_trembles_at_a_threshold_stays() -> None:
    levels = Levels(1.0, 5.0)
    nan = np.nan
    power = np.array([0, 0, 5.1, 5.3, 4.9, 5.1, 4.8, 4.0, 4.0, nan, 5.1, 4.9, 0.97, 0.5, 0.5])
    found = states(power, levels, dwell_minutes=1)
    assert found.tolist() == [OFF, OFF, OFF + 1, *[WORKING] * 4, IDLE, IDLE, NO_DATA, *[WORKING] * 2, IDLE, OFF, OFF]


def test_a_short_state_belongs_to_the_one_before_it() -> None:
    levels = Levels(1.0, 5.0)
    power = np.array([9, 9, 2, 9, 9, 2, 2, 9, np.nan, 2, 9, 9.0])
    found = states(power, levels, dwell_minutes=2)
    assert found.tolist() == [*[WORKING] * 5, IDLE, IDLE, IDLE, NO_DATA, IDLE, WORKING, WORKING]
    starts, ends, values = runs(found)
    assert list(zip(starts.tolist(), ends.tolist(), values.tolist(), strict=True)) == [
        (0, 5, WORKING),
        (5, 8, IDLE),
        (8, 9, NO_DATA),
        (9, 10, IDLE),
        (10, 12, WORKING),
    ]
    assert runs(found[:0])[0].tolist() == []
