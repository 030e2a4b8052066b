"""The state table of ISA-18.2 (IEC 62682), each state with each event, as two facets that do not know of each other."""

from dataclasses import replace

import pytest

from services.anomaly.domain import BEGINS, ENDS, Alarm, Change, State, Suppression
from tests.alarms import ALARM

# The states of the standard, A to D.
UNACKNOWLEDGED = ALARM
ACKNOWLEDGED = ALARM.after(Change.ACKNOWLEDGED)
RETURNED_UNACKNOWLEDGED = ALARM.returned(2_000_000)
NORMAL = RETURNED_UNACKNOWLEDGED.after(Change.ACKNOWLEDGED)
ALL = {
    State.NORMAL: NORMAL,
    State.UNACKNOWLEDGED: UNACKNOWLEDGED,
    State.ACKNOWLEDGED: ACKNOWLEDGED,
    State.RETURNED_UNACKNOWLEDGED: RETURNED_UNACKNOWLEDGED,
}
NAMES = {
    Suppression.SHELVED: State.SHELVED,
    Suppression.BY_DESIGN: State.SUPPRESSED_BY_DESIGN,
    Suppression.OUT_OF_SERVICE: State.OUT_OF_SERVICE,
}


def suppressed(alarm: Alarm, *kinds: Suppression) -> Alarm:
    for kind in kinds:
        alarm = alarm.after(BEGINS[kind])
    return alarm


@pytest.mark.parametrize("state", ALL)
def test_the_states_have_their_names(state: State) -> None:
    assert ALL[state].state is state
    assert not ALL[state].suppression


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        (State.NORMAL, Change.ACKNOWLEDGED, State.NORMAL),
        (State.UNACKNOWLEDGED, Change.ACKNOWLEDGED, State.ACKNOWLEDGED),
        (State.ACKNOWLEDGED, Change.ACKNOWLEDGED, State.ACKNOWLEDGED),
        (State.RETURNED_UNACKNOWLEDGED, Change.ACKNOWLEDGED, State.NORMAL),
        (State.NORMAL, Change.CLEARED, State.NORMAL),
        (State.UNACKNOWLEDGED, Change.CLEARED, State.ACKNOWLEDGED),
        (State.ACKNOWLEDGED, Change.CLEARED, State.ACKNOWLEDGED),
        (State.RETURNED_UNACKNOWLEDGED, Change.CLEARED, State.NORMAL),
        # A condition that is true again is another alarm with its own id: this one stays as it is.
        *((state, Change.RAISED, state) for state in ALL),
        *((state, change, state) for state in ALL for change in (Change.COMMENTED, Change.ASSIGNED)),
        # Ending a reason that is not there changes nothing.
        *((state, change, state) for state in ALL for change in ENDS.values()),
    ],
)
def test_what_people_do_while_it_is_on_the_list(before: State, change: Change, after: State) -> None:
    assert ALL[before].after(change).state is after


@pytest.mark.parametrize(
    ("before", "after"),
    [(State.UNACKNOWLEDGED, State.RETURNED_UNACKNOWLEDGED), (State.ACKNOWLEDGED, State.NORMAL)],
)
def test_the_condition_returns(before: State, after: State) -> None:
    assert ALL[before].returned(2_000_000).state is after


@pytest.mark.parametrize("kind", BEGINS)
@pytest.mark.parametrize("before", ALL)
def test_from_any_state_it_goes_off_the_list_and_is_still_evaluated(before: State, kind: Suppression) -> None:
    off = suppressed(ALL[before], kind)
    assert off.suppression == kind
    assert off.state is (NAMES[kind] if off.active else State.NORMAL)
    assert replace(off, suppression=Suppression.NONE) == ALL[before], "the other facet is untouched"
    assert suppressed(off, kind) == off, "a repeat changes nothing"


@pytest.mark.parametrize("kind", BEGINS)
@pytest.mark.parametrize("before", [State.UNACKNOWLEDGED, State.ACKNOWLEDGED])
def test_when_the_reason_ends_it_is_as_the_condition_is_then(before: State, kind: Suppression) -> None:
    off = suppressed(ALL[before], kind)
    assert off.after(ENDS[kind]) == ALL[before]
    returned = off.returned(2_000_000)
    assert returned.state is State.NORMAL
    assert returned.after(ENDS[kind]).state is State.NORMAL, "nobody has to respond to what came and went off the list"


@pytest.mark.parametrize("kind", BEGINS)
def test_it_can_be_acknowledged_off_the_list(kind: Suppression) -> None:
    off = suppressed(UNACKNOWLEDGED, kind).after(Change.ACKNOWLEDGED)
    assert off.state is NAMES[kind]
    assert off.after(ENDS[kind]).state is State.ACKNOWLEDGED


@pytest.mark.parametrize("first", BEGINS)
@pytest.mark.parametrize("second", BEGINS)
def test_it_stays_off_the_list_until_the_last_reason_ends(first: Suppression, second: Suppression) -> None:
    off = suppressed(UNACKNOWLEDGED, first, second)
    one_left = off.after(ENDS[first])
    assert one_left.state is (State.UNACKNOWLEDGED if first is second else NAMES[second])
    assert one_left.after(ENDS[second]).state is State.UNACKNOWLEDGED
