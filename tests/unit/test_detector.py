"""The detector promises: causal, the same for any batches and after a restart, and it finds what people look for."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from services.anomaly.detector import Config, Detector, Scores, StateError
from services.anomaly.explain import Signal, explain
from services.anomaly.kernel import layout

SECOND = 1_000_000
Floats = NDArray[np.float64]


def calm(rows: int, width: int = 1, seed: int = 7) -> Floats:
    return 40.0 + np.random.default_rng(seed).normal(size=(rows, width))


def times(rows: int, start: int = 0) -> NDArray[np.int64]:
    return (1_700_000_000 + start + np.arange(rows)) * SECOND


def run(detector: Detector, slot: int, values: Floats, start: int = 0) -> Scores:
    return detector.score(np.full(len(values), slot, dtype=np.int32), times(len(values), start), values.ravel())


def columns(scores: Scores) -> list[Floats]:
    return [scores.onset, scores.state, scores.joint_onset, scores.joint_state, scores.share]


def machine(width: int) -> tuple[Detector, int]:
    detector = Detector()
    return detector, detector.add(width)


def troubled(rows: int, width: int) -> Floats:
    """Calm values with a cycle, absences, a spike and a shift, so that every component has something to do."""
    values = calm(rows, width)
    values[:, width // 2] += 8.0 * np.sin(2 * np.pi * np.arange(rows) / 20)
    values[rows // 3, 0] = 90.0
    values[rows // 2 :, -1] += 6.0
    values[::17, width // 2] = np.nan
    values[rows // 4 : rows // 4 + 60, 0] = 41.0
    return values


def test_a_prefix_scores_the_same_whatever_follows() -> None:
    values = troubled(1200, 3)
    whole = columns(run(*machine(3), values))
    for rows in (1, 311, 700):
        for part, full in zip(columns(run(*machine(3), values[:rows])), whole, strict=True):
            np.testing.assert_array_equal(part, full[: len(part)])


@pytest.mark.parametrize("size", [1, 7, 500])
def test_batch_boundaries_do_not_change_a_bit(size: int) -> None:
    values = troubled(1200, 3)
    whole = run(*machine(3), values)
    detector, slot = machine(3)
    parts = [run(detector, slot, values[i : i + size], start=i) for i in range(0, len(values), size)]
    for part, full in zip(zip(*map(columns, parts), strict=True), columns(whole), strict=True):
        np.testing.assert_array_equal(np.concatenate(part), full)
    ended = [event[1:4] + event[4:6] for part in parts for event in part.events]
    assert ended == [event[1:4] + event[4:6] for event in whole.events]


@pytest.mark.parametrize("row", [0, 1, 29, 349, 401, 777])
def test_a_restart_at_any_row_continues_with_equal_bits(row: int) -> None:
    values = troubled(1200, 3)
    whole = columns(run(*machine(3), values))
    detector, slot = machine(3)
    run(detector, slot, values[:row])
    data = detector.dump(slot)
    other = Detector()
    other.add(5)
    again = other.add(3)
    other.load(again, data)
    assert other.dump(again) == data
    for part, full in zip(columns(run(other, again, values[row:], start=row)), whole, strict=True):
        np.testing.assert_array_equal(part, full[len(full) - len(part) :])


def test_machines_in_one_batch_do_not_touch_each_other() -> None:
    a, b = troubled(400, 2), calm(400, 5, seed=3)
    detector = Detector()
    first, second = detector.add(2), detector.add(5)
    slots = np.tile(np.array([first, second], dtype=np.int32), 400)
    mixed = detector.score(slots, np.repeat(times(400), 2), np.concatenate([a, b], axis=1).ravel())
    np.testing.assert_array_equal(mixed.onset.reshape(400, 7)[:, :2].ravel(), run(*machine(2), a).onset)
    np.testing.assert_array_equal(mixed.state.reshape(400, 7)[:, 2:].ravel(), run(*machine(5), b).state)


def test_frames_not_newer_than_the_last_are_skipped_and_counted() -> None:
    values = calm(100)
    detector, slot = machine(1)
    run(detector, slot, values)
    before = detector.dump(slot)
    again = run(detector, slot, np.full((10, 1), 1e9), start=90)
    assert again.skipped == 10
    assert not again.onset.any()
    assert detector.dump(slot) == before


def test_an_unreadable_state_is_refused() -> None:
    detector, slot = machine(2)
    data = detector.dump(slot)
    for bad in (b"", data[:-8], b"XXXX" + data[4:], data[:4] + b"\xff\xff" + data[6:]):
        with pytest.raises(StateError):
            detector.load(slot, bad)
    assert detector.dump(slot) == data


def test_a_state_of_version_1_goes_on_with_its_ranges_and_its_alarm() -> None:
    values = calm(1200)
    values[700:] += 60.0
    detector, slot = machine(1)
    run(detector, slot, values[:710])
    now = detector.dump(slot)
    series = 16 + 8 * layout.MACHINE_FIELDS
    kept = now[series : series + 8 * layout.CHANGE_BASE]
    rest = now[series + 8 * layout.SERIES_FIELDS :]
    profiles = np.full(163 - layout.CHANGE_BASE, 7.0).tobytes()
    header = now[:4] + (1).to_bytes(2, "little") + now[6:8] + (163).to_bytes(4, "little") + now[12:16]
    other, again = machine(1)
    other.load(again, header + now[16:series] + kept + profiles + rest)
    assert other.active_us(again, 0) == detector.active_us(slot, 0) is not None
    scores = run(other, again, values[710:], start=710)
    assert not any(event.raised for event in scores.events)
    assert all(np.isfinite(part).all() for part in columns(scores))


def test_widening_keeps_what_a_signal_has_learned() -> None:
    values = calm(600, 1)
    detector, slot = machine(1)
    run(detector, slot, values[:300])
    detector.widen(slot, 40)
    wide = np.full((300, 40), np.nan)
    wide[:, 0] = values[300:, 0]
    scores = run(detector, slot, wide, start=300)
    np.testing.assert_array_equal(scores.onset.reshape(300, 40)[:, 0], run(*machine(1), values).onset[300:])


def test_a_spike_is_raised_explained_and_cleared() -> None:
    values = calm(1000)
    values[800, 0] = 96.2
    events = run(*machine(1), values).events
    raised = [event for event in events if event.raised and event.frame == 800]
    assert len(raised) == 1
    text = explain(raised[0], [Signal("Spindle temperature", "degC")])
    assert text.startswith("Spindle temperature 96.2 degC ")
    assert any(not event.raised and event.started_us == raised[0].started_us for event in events)


def first_raised(scores: Scores, signal: int, since: int) -> str:
    names = [e.component_name for e in scores.events if e.raised and e.signal == signal and e.frame >= since]
    return names[0] if names else "nothing"


def test_a_level_shift_is_raised() -> None:
    values = calm(1200)
    values[900:] += 6.0
    assert first_raised(run(*machine(1), values), 0, 900) != "nothing"


def eager(values: Floats, *, since: int, seconds: int = 1, config: Config | None = None) -> list[tuple[int, str, str]]:
    """Row, component and explanation of the alarms from a row on, where they are raised at every excursion."""
    detector = Detector(replace(config or Config(), raise_at=2.6, raise_at_min=2.6))
    slot = detector.add(1)
    at = (1_699_920_000 + seconds * np.arange(len(values))) * SECOND
    events = detector.score(np.full(len(values), slot, dtype=np.int32), at, values.ravel()).events
    return [
        (event.frame, event.component_name, explain(event, [Signal("Motor current", "A")]))
        for event in events
        if event.raised and event.frame >= since
    ]


def test_a_change_large_for_now_is_seen_within_the_range_of_wilder_days() -> None:
    rng = np.random.default_rng(3)
    values = 40.0 + np.concatenate([12.0 * rng.normal(size=1000), rng.normal(size=6000)])[:, None]
    values[6500:] += 5.0
    frame, component, text = eager(values, since=6500)[0]
    assert frame < 6510
    assert component == "change"
    assert "the mean of the last 4 samples is" in text
    assert not [found for found in eager(values, since=6500, config=Config(change_clip_sd=0.0)) if found[0] < 6510]


@pytest.mark.parametrize(("period", "seconds", "when"), [
    (90, 1, "at this point of its cycle of about 90 s"), (40, 60, "at this point of its cycle of about 40 min"),
    (144, 600, "at this time of the day"),
])  # fmt: skip
def test_work_in_a_pause_is_unusual_once_the_cycle_was_found(period: int, seconds: int, when: str) -> None:
    rows = 40 * period
    busy = np.arange(rows) % period < 0.6 * period
    values = 10.0 + 8.0 * busy + 0.3 * np.random.default_rng(2).normal(size=rows)
    pause = 30 * period + int(0.6 * period) + 1
    values[pause : pause + int(0.3 * period)] += 8.0
    told = eager(values[:, None], since=pause, seconds=seconds)
    assert any(frame < pause + 0.3 * period and text.endswith(when) for frame, _, text in told), told


def test_a_cycle_outlasts_a_standstill_and_a_gap() -> None:
    cycles, idle = 5400, 7200
    values = 10.0 + 0.3 * np.random.default_rng(4).normal(size=cycles + idle)
    values[:cycles] += 8.0 * (np.arange(cycles) % 90 < 54)
    detector, slot = machine(1)
    run(detector, slot, values[:, None])
    assert period_s(detector, slot)[0] == pytest.approx(90, abs=1)
    run(detector, slot, values[:90, None], start=3 * 86_400)
    assert period_s(detector, slot)[0] == pytest.approx(90, abs=1)


def period_s(detector: Detector, slot: int) -> Floats:
    """The found period of each signal, 0 where there is none."""
    state = np.frombuffer(detector.dump(slot), dtype=np.float64, offset=16 + 8 * layout.MACHINE_FIELDS)
    series = state[: detector.width(slot) * layout.SERIES_FIELDS].reshape(-1, layout.SERIES_FIELDS)
    periods: Floats = series[:, layout.RING_BASE + layout.RING_PERIOD_US] / SECOND
    return periods


def test_in_noise_hardly_a_period_is_found() -> None:
    """Chance has a standard deviation of 1/8 among 64 slots; the autocorrelation asked is four times that."""
    detector, slot = machine(200)
    run(detector, slot, calm(2000, 200))
    assert np.mean(period_s(detector, slot) > 0.0) < 0.1


def test_a_stuck_sensor_is_raised_though_its_value_is_usual() -> None:
    values = calm(1200)
    values[900:] = values[899]
    scores = run(*machine(1), values)
    assert first_raised(scores, 0, 900) == "flat"
    event = next(e for e in scores.events if e.component_name == "flat")
    assert "has not changed for" in explain(event, [Signal("Coolant flow", "l/min")])


def test_a_slow_signal_gone_silent_is_raised_as_dropout_and_teaches_nothing() -> None:
    values = calm(1200, 2)
    values[900:960, 1] = np.nan
    scores = run(*machine(2), values)
    assert first_raised(scores, 1, 900) == "dropout"
    event = next(e for e in scores.events if e.component_name == "dropout")
    assert "has sent no value for" in explain(event, [Signal("A"), Signal("B")])


def test_sensors_that_no_longer_move_together_are_raised_jointly() -> None:
    """Each sensor alone stays within what it did before; only their relation breaks."""
    rng = np.random.default_rng(5)
    common = np.convolve(rng.normal(size=1700), np.ones(20) / 4, mode="valid")[:1600]
    values = common[:, None] + 0.2 * rng.normal(size=(1600, 4))
    values[1200:, 0] = -values[1200:, 0]
    scores = run(*machine(4), values)
    joint = [event for event in scores.events if event.raised and event.signal == -1]
    assert joint
    assert 1200 <= joint[0].frame < 1350
    assert "do not fit together" in explain(joint[0], [Signal(name) for name in "ABCD"])
    assert "A (" in explain(joint[0], [Signal(name) for name in "ABCD"])
    shares = scores.share.reshape(1600, 4)[1250]
    np.testing.assert_allclose(shares.sum(), 1.0)
    assert (scores.share >= 0.0).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_calm_series_stays_within_its_alarm_budget(seed: int) -> None:
    """20,000 rows are 5.5 hours at 1 Hz; a handful of alarms are the range being learned."""
    raised = [event for event in run(*machine(1), calm(20_000, seed=seed)).events if event.raised]
    assert len(raised) <= 6
    assert len([event for event in raised if event.frame >= 5000]) <= 3


def test_a_gap_of_a_year_and_wild_values_leave_finite_scores() -> None:
    values = calm(600)
    values[300], values[301], values[302] = 1e300, -1e300, np.inf
    detector, slot = machine(1)
    before = run(detector, slot, values[:400])
    after = run(detector, slot, values[400:], start=365 * 86_400)
    for scores in (before, after):
        assert all(np.isfinite(part).all() for part in columns(scores))


def test_feedback_moves_one_threshold_within_bounds_and_survives_a_restart() -> None:
    detector, slot = machine(2)
    assert detector.sensitivity(slot, 1, 99.0) == 3.0
    other, again = machine(2)
    other.load(again, detector.dump(slot))
    values = calm(1000, 2)
    values[800] = 200.0
    raised = {event.signal for event in run(other, again, values).events if event.raised and event.frame == 800}
    assert 0 in raised
    assert 1 not in raised


def test_a_constant_series_is_calm() -> None:
    scores = run(*machine(1), np.full((2000, 1), 45.0))
    assert not scores.events


@pytest.mark.parametrize("wild", [1e16, -3.4e38, 1e160, 1.7e308])
@pytest.mark.parametrize("row", [0, 3, 100, 400])
def test_a_value_beyond_measure_blinds_neither_its_signal_nor_the_signals_together(wild: float, row: int) -> None:
    """Drivers say "none" by the largest float there is."""
    values = calm(1400, 3)
    values[row, 1] = wild
    values[1200:, 1] += 30.0
    values[1200:, 2] -= 30.0
    scores = run(*machine(3), values)
    assert first_raised(scores, 1, 1200) != "nothing"
    assert all(np.isfinite(part).all() for part in columns(scores))
    assert scores.joint_state[1200:1300].max() > 5.0
    assert all(np.isfinite(event.lead_share + event.next_share) for event in scores.events)


@pytest.mark.parametrize("row", [100, 400])
def test_one_absurd_value_is_all_but_forgotten_within_the_hour(row: int) -> None:
    values = calm(4200, 2)
    values[row, 1] = 1e13
    values[3900:, 1] += 30.0
    values[3900:, 0] -= 30.0
    scores = run(*machine(2), values)
    assert first_raised(scores, 1, 3900) != "nothing"
    assert scores.joint_state[3900:4000].max() > 5.0


def apart(values: Floats) -> tuple[NDArray[np.int64], Floats]:
    """The same, each signal in a frame of its own: times and values."""
    rows, width = values.shape
    own = np.full((rows, width, width), np.nan)
    for signal in range(width):
        own[:, signal, signal] = values[:, signal]
    return np.repeat(times(rows), width), own.reshape(-1, width)


def test_signals_that_come_in_frames_of_their_own_are_all_watched() -> None:
    values = calm(1200, 3)
    values[900:, 2] += 30.0
    detector, slot = machine(3)
    at, own = apart(values)
    scores = detector.score(np.full(len(own), slot, dtype=np.int32), at, own.ravel())
    assert scores.skipped == 0
    assert first_raised(scores, 2, 3 * 900) != "nothing"
    before = detector.dump(slot)
    again = detector.score(np.full(len(own), slot, dtype=np.int32), at, own.ravel())
    assert (again.skipped, detector.dump(slot)) == (len(own), before)


def test_a_gateway_that_sends_a_minute_later_than_its_neighbour_is_watched() -> None:
    values = calm(1200, 2)
    values[900:, 1] += 30.0
    detector, slot = machine(2)
    found = []
    for minute in range(20):
        rows = slice(60 * minute, 60 * minute + 60)
        for signal, late in ((0, 0), (1, 60)):
            frames = np.full((60, 2), np.nan)
            frames[:, signal] = values[rows, signal]
            at = times(60, 60 * minute - late)
            found += detector.score(np.full(60, slot, dtype=np.int32), at, frames.ravel()).events
    assert any(event.raised and event.signal == 1 and event.time_us >= times(1, 900 - 60)[0] for event in found)


def test_a_state_from_before_signals_had_clocks_goes_on_with_equal_bits() -> None:
    values = troubled(1200, 3)
    detector, slot = machine(3)
    run(detector, slot, values[:700])
    now = detector.dump(slot)
    start = 16 + 8 * layout.MACHINE_FIELDS
    series = np.frombuffer(now[start : start + 24 * layout.SERIES_FIELDS]).reshape(3, -1).copy()
    series[:, layout.ROW_LAST_US] = 0.0
    rest = now[start + 24 * layout.SERIES_FIELDS :]
    data = now[:start] + series.tobytes() + rest
    other, again = machine(3)
    other.load(again, data)
    assert run(other, again, values[690:700], start=690).skipped == 10
    for part, full in zip(
        columns(run(other, again, values[700:], start=700)),
        columns(run(detector, slot, values[700:], start=700)),
        strict=True,
    ):
        np.testing.assert_array_equal(part, full)
