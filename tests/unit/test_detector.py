"""The detector promises: causal, the same for any batches and after a restart, and it finds what people look for."""

import numpy as np
import pytest
from numpy.typing import NDArray

from services.anomaly.detector import Detector, Scores, StateError
from services.anomaly.explain import Signal, explain

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
    """Calm values with absences, a spike and a shift, so that every component has something to do."""
    values = calm(rows, width)
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


@pytest.mark.parametrize("row", [0, 1, 29, 301, 401, 777])
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
