"""What a door notes stays bounded, and is not lost when it cannot be written."""

import pytest

from services.ingest.diagnosis import sightings as module
from services.ingest.diagnosis.sightings import Sightings
from services.ingest.domain import Sender, UnknownSignal
from tests.unit.test_frames import NOW_US, FixedClock

SENDER = Sender(1, 7, "gateway-1", "http", "c")


def test_notes_that_could_not_be_written_are_counted_with_those_that_came_after() -> None:
    one = Sightings(FixedClock())
    signal = UnknownSignal("speed", 2, 5.0, 4.0, 5.0, True)
    for number in range(3):
        one.refused(SENDER, "OUT_OF_RANGE", f"number {number}", machine_id=5, samples=10)
        one.proposed(SENDER, 5, [signal])
    one.taken(SENDER, 5, NOW_US, NOW_US)
    taken = one.take(with_machines=True)
    one.refused(SENDER, "OUT_OF_RANGE", "the last", machine_id=5, samples=1)
    one.proposed(SENDER, 5, [UnknownSignal("speed", 1, 1.5, 1.5, 1.5, False)])
    one.give_back(taken)
    again = one.take(with_machines=True)
    (refused,) = again.refusals.values()
    assert (refused.times, refused.samples, refused.example) == (4, 31, "the last")
    (seen,) = again.proposals.values()
    assert (seen.samples, seen.example, seen.lowest, seen.highest, seen.is_whole) == (7, 1.5, 1.5, 5.0, False)
    assert again.machines[5][:2] == (NOW_US, NOW_US)
    assert again.used == {7: NOW_US}
    assert not one.take(with_machines=True)


def test_machines_wait_for_their_own_time() -> None:
    one = Sightings(FixedClock())
    one.taken(SENDER, 5, NOW_US, NOW_US)
    assert not one.take(with_machines=False)
    one.taken(SENDER, 6, NOW_US, NOW_US)
    assert set(one.take(with_machines=True).machines) == {5, 6}


def test_however_much_is_wrong_the_notes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTED_MAX", 5)
    one = Sightings(FixedClock())
    for number in range(50):
        one.refused(SENDER, "UNKNOWN_MACHINE", "x", subject=f"machine {number}")
        one.key_refused(f"smdih_device_{number:043}", None, "KEY_UNKNOWN", "")
        one.proposed(SENDER, 5, [UnknownSignal(f"s{number}", 1, 0.0, 0.0, 0.0, True)])
    notes = one.take(with_machines=True)
    assert (len(notes.refusals), len(notes.unknown_keys), len(notes.proposals)) == (5, 5, 5)


def test_history_that_is_sent_again_is_no_sighting_and_odd_texts_can_be_stored() -> None:
    one = Sightings(FixedClock())
    one.refused(Sender(1, 7, "s", "replay", "c", is_live=False), "OUT_OF_RANGE", "x")
    assert not one.take(with_machines=True)
    one.refused(SENDER, "UNKNOWN_MACHINE", "a\x00b\ud800" + "x" * 1000, subject="m\x00")
    one.proposed(SENDER, 5, [UnknownSignal("a/b", 1, 0.0, 0.0, 0.0, True)])
    notes = one.take(with_machines=True)
    ((key, refused),) = notes.refusals.items()
    assert (key.subject, refused.example[:4], len(refused.example)) == ("m?", "a?b?", module.TEXT_LENGTH_MAX)
    assert not notes.proposals
