"""Thresholds that people moved, changed sensors and rules of firms: a crash at any point changes neither alarms nor states."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from services.anomaly.detector import Event
from services.anomaly.domain import Severity
from services.anomaly.rulebook import SILENCE_GRACE_US, RuleBook, RuleEvent
from services.anomaly.rules import tried
from services.anomaly.scorer import Found, Scorer, decode
from services.anomaly.store import Checkpoint, SavedState
from services.anomaly.tunings import (
    MACHINE_POSITION,
    THRESHOLD_OFFSET_MAX,
    THRESHOLD_OFFSET_MIN,
    Rule,
    RuleKind,
    Tuning,
    TuningKind,
    threshold_offset,
)
from smdih.ingest.v1 import records_pb2 as pb
from tests import anomaly_plant as plant

MACHINES = (11, 12, 13)
S = plant.SECOND_US
LIMIT = Rule(
    id="a" * 32,
    version=1,
    firm_id=1,
    machine_id=11,
    position=1,
    kind=RuleKind.ABOVE,
    name="vibration",
    severity=Severity.HIGH,
    limit=2.1,
    hysteresis=0.1,
)


def made_records(rows: int = plant.ROWS) -> Sequence[bytes]:
    values = {machine: plant.with_fault(machine, column=machine % 3, rows=rows) for machine in MACHINES}
    return [
        pb.SamplesRecord(
            batches=[
                plant.batch(machine, values[machine][row : row + 5], firm_id=1, first_row=row) for machine in MACHINES
            ]
        ).SerializeToString(deterministic=True)
        for row in range(0, rows, 5)
    ]


@pytest.fixture(scope="module")
def records() -> Sequence[bytes]:
    return made_records()


def tunings(dice: random.Random, records: int) -> list[Tuning]:
    """Everything that people may do, at random records."""
    made: list[Tuning] = []
    for id_ in range(1, 25):
        offset, machine = dice.randrange(records), dice.choice(MACHINES)
        kind = dice.choice(list(TuningKind))
        what = dice.choice(list(RuleKind)[:4])
        limit = 0.2 if what in (RuleKind.RISE, RuleKind.FALL) else 2.1
        rule = replace(LIMIT, version=id_, machine_id=machine, kind=what, limit=limit, window_s=20)
        made.append(
            Tuning(
                id=id_,
                kind=kind,
                from_offset=offset,
                machine_id=machine,
                made_us=1,
                position=dice.choice([0, 1, 2, None]) if kind is TuningKind.RELEARN else dice.choice([-1, 0, 1, 2]),
                threshold_offset=dice.choice([-0.6, -0.3, 0.0, 0.6]),
                rule_id=LIMIT.id if kind is TuningKind.RULE else "",
                rule=rule if kind is TuningKind.RULE and dice.random() < 0.8 else None,
            )
        )
    return sorted(made, key=lambda tuning: (tuning.from_offset, tuning.id))


class Database:
    """What the stores do, in memory: states, the position, and the tunings from a position on."""

    def __init__(self, tunings: Sequence[Tuning]) -> None:
        self.position = 0
        self.states: dict[tuple[int, int], SavedState] = {}
        self._tunings = tunings

    def save(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.position >= self.position
        self.position = checkpoint.position
        for saved in checkpoint.states:
            self.states[saved.machine_id, saved.channel_group] = saved

    def scorer(self) -> Scorer:
        scorer = Scorer(0, position=self.position)
        for saved in self.states.values():
            scorer.load(saved)
        newest: dict[tuple[object, ...], Tuning] = {}
        for tuning in self._tunings:
            if tuning.from_offset < self.position and tuning.kind is not TuningKind.RELEARN:
                newest[tuning.kind, tuning.machine_id, tuning.position, tuning.rule_id] = tuning
        if rules := [tuning for tuning in newest.values() if tuning.kind is TuningKind.RULE]:
            # One rule here, whatever machine it is about.
            last = max(rules, key=lambda tuning: tuning.id)
            newest = {key: tuning for key, tuning in newest.items() if tuning.kind is not TuningKind.RULE}
            newest["rule",] = last
        later = [tuning for tuning in self._tunings if tuning.from_offset >= self.position]
        scorer.tune([*newest.values(), *later])
        return scorer


def alarms_of(scorer: Scorer, records: Sequence[tuple[int, bytes]]) -> list[tuple[object, ...]]:
    taken = scorer.take([(offset, decode(value)) for offset, value in records])
    return [named(found) for found in taken.found]


def named(found: Found) -> tuple[object, ...]:
    event = found.event
    what = (event.rule.id, event.rule.version) if isinstance(event, RuleEvent) else event.signal
    return found.frames.machine_id, what, event.started_us, event.raised, event.time_us


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_at_any_point_changes_neither_alarms_nor_states(records: Sequence[bytes], seed: int) -> None:
    dice = random.Random(seed)
    wanted = tunings(dice, len(records))
    # Ids are in the order of offsets, as horizons make them.
    wanted = [replace(tuning, id=number) for number, tuning in enumerate(wanted, 1)]
    undisturbed = Database(wanted).scorer()
    expected = set(alarms_of(undisturbed, list(enumerate(records))))
    database = Database(wanted)
    seen: set[tuple[object, ...]] = set()
    scorer = database.scorer()
    while scorer.next_offset < len(records):
        if dice.random() < 0.2:
            scorer = database.scorer()
        end = min(len(records), scorer.next_offset + dice.randint(1, 20))
        seen |= set(alarms_of(scorer, [(at, records[at]) for at in range(scorer.next_offset, end)]))
        if dice.random() < 0.3:
            seen |= {named(found) for found in scorer.settle().found}
        if dice.random() < 0.5:
            checkpoint = scorer.checkpoint(saved_position=database.position, bytes_max=dice.choice([1, 6000, None]))
            if checkpoint is not None:
                database.save(checkpoint)
    # Ending an alarm that was never raised does nothing, so such ends are left out.
    raised = {(machine, what, started) for machine, what, started, is_raised, _ in expected if is_raised}
    assert {one for one in seen if one[:3] in raised} == {one for one in expected if one[:3] in raised}
    assert {one[:3] for one in seen if one[3]} == raised
    for one in (scorer, undisturbed):
        checkpoint = one.checkpoint(saved_position=0, bytes_max=None)
        while checkpoint is not None:
            database.save(replace(checkpoint, position=max(checkpoint.position, database.position)))
            checkpoint = one.checkpoint(saved_position=checkpoint.position, bytes_max=None)
        states = {key: (saved.state, saved.rules) for key, saved in database.states.items()}
        if one is scorer:
            disturbed = states
    assert disturbed == states


def test_a_higher_threshold_silences_what_a_lower_one_tells(records: Sequence[bytes]) -> None:
    def raised(offset: float) -> int:
        scorer = Scorer(0, position=0)
        moved = [
            Tuning(id=1, kind=TuningKind.THRESHOLD, from_offset=0, machine_id=11, position=2, threshold_offset=offset)
        ]
        scorer.tune(moved)
        return sum(one[1] == 2 and bool(one[3]) for one in alarms_of(scorer, list(enumerate(records))) if one[0] == 11)

    assert raised(3.0) < raised(0.0)


def test_a_changed_sensor_ends_its_alarm_and_is_learnt_anew(records: Sequence[bytes]) -> None:
    fault = plant.FAULT_ROW // 5
    told = [Tuning(id=1, kind=TuningKind.RELEARN, from_offset=fault + 5, machine_id=11, position=2)]
    scorer = Scorer(0, position=0)
    scorer.tune(told)
    found = alarms_of(scorer, list(enumerate(records)))
    mine = [one for one in found if one[:2] == (11, 2)]
    raised, ended = mine[-2:]
    assert raised[3]
    assert ended[2:] == (raised[2], False, plant.START_US + (plant.FAULT_ROW + 24) * S)


def rule(kind: RuleKind, **fields: object) -> Rule:
    return replace(LIMIT, kind=kind, hysteresis=0.0, **fields)  # type: ignore[arg-type]


def evaluated(rule: Rule, values: Sequence[float], *, rows: int = 0) -> list[tuple[bool, int, int]]:
    """(raised, second, second of the start), evaluated in batches of `rows`."""
    book = RuleBook()
    book.set(rule, last_us=0, made_us=0, saved=False)
    column: NDArray[np.float64] = np.full((len(values), 2), 0.0)
    column[:, 1] = values
    found: list[RuleEvent] = []
    for at in range(0, len(values), rows or len(values)):
        part = column[at : at + (rows or len(values))]
        times = plant.START_US + (at + np.arange(len(part), dtype=np.int64)) * S
        found += [
            event
            for _, event in book.evaluate([(11, 0)], [1], np.array([len(part)]), np.array([2]), times, part.reshape(-1))
        ]
    return [
        (event.raised, (event.time_us - plant.START_US) // S, (event.started_us - plant.START_US) // S)
        for event in found
    ]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_limits_wait_for_the_delay_and_end_inside_the_hysteresis(rows: int) -> None:
    above = replace(rule(RuleKind.ABOVE, limit=10.0, delay_s=2), hysteresis=1.0)
    values = [9, 11, 11, 9, 11, 11, math.nan, 11, 9.5, 9.0, 9, 11]
    assert evaluated(above, values, rows=rows) == [(True, 7, 4), (False, 9, 4)]
    below = rule(RuleKind.BELOW, limit=5.0)
    assert evaluated(below, [6, 4, 5, 4], rows=rows) == [(True, 1, 1), (False, 2, 1)]


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_rate_looks_back_over_its_window(rows: int) -> None:
    rise = rule(RuleKind.RISE, limit=3.0, window_s=8)
    assert evaluated(rise, [1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5], rows=rows) == [(True, 4, 4), (False, 8, 4)]
    assert evaluated(rise, [t / 4 for t in range(40)], rows=rows) == []
    fall = rule(RuleKind.FALL, limit=3.0, window_s=8)
    assert evaluated(fall, [9, 9, 5, 9], rows=rows) == [(True, 2, 2), (False, 3, 2)]


def test_silence_is_told_by_the_clock_and_again_by_the_records_as_the_same_alarm() -> None:
    silence = rule(RuleKind.NO_DATA, position=MACHINE_POSITION, window_s=60)
    book = RuleBook()
    book.set(silence, last_us=0, made_us=0, saved=False)

    def take(second: int) -> list[RuleEvent]:
        times = np.array([plant.START_US + second * S])
        one = np.ones(1, dtype=np.int64)
        return [event for _, event in book.evaluate([(11, 0)], [int(times[0])], one, one, times, np.array([math.nan]))]

    assert take(0) == []
    assert take(30) == []
    assert list(book.silences(plant.START_US + 90 * S)) == []
    (told,) = book.silences(plant.START_US + 91 * S + SILENCE_GRACE_US)
    raised, ended = take(200)
    assert (told.raised, told.started_us) == (raised.raised, raised.started_us) == (True, plant.START_US + 30 * S)
    assert (ended.raised, ended.started_us, ended.time_us) == (False, raised.started_us, plant.START_US + 200 * S)


def test_a_rule_is_tried_by_the_code_that_the_worker_runs() -> None:
    times = plant.START_US + np.array([0, 1, 2, 3, 100, 101]) * S
    values = np.array([1.0, 5.0, 5.0, 1.0, 5.0, 1.0])
    found = tried(rule(RuleKind.ABOVE, limit=3.0), times, values, now_us=0)
    assert [(alarm.started_us, alarm.ended_us) for alarm in found] == [(times[1], times[3]), (times[4], times[5])]
    silence = rule(RuleKind.NO_DATA, position=MACHINE_POSITION, window_s=60)
    found = tried(silence, times, values, now_us=int(times[-1]) + 61 * S)
    assert [(alarm.started_us, alarm.ended_us) for alarm in found] == [(times[3], times[4]), (times[5], None)]
    assert len(tried(silence, times, values, now_us=int(times[-1]) + 60 * S)) == 1
    assert tried(silence, times[:0], values[:0], now_us=0) == tried(LIMIT, times[:0], values[:0], now_us=0) == []


def test_ratings_move_a_threshold_within_bounds() -> None:
    assert threshold_offset(useful=0, not_useful=0) == 0
    assert threshold_offset(useful=0, not_useful=2) == 0.6
    assert threshold_offset(useful=2, not_useful=1) == 0
    assert threshold_offset(useful=99, not_useful=0) == THRESHOLD_OFFSET_MIN
    assert threshold_offset(useful=0, not_useful=99) == THRESHOLD_OFFSET_MAX


def test_an_event_of_the_detector_keeps_its_place_among_those_of_rules(records: Sequence[bytes]) -> None:
    scorer = Scorer(0, position=0)
    scorer.tune([Tuning(id=1, kind=TuningKind.RULE, from_offset=0, machine_id=11, rule_id=LIMIT.id, rule=LIMIT)])
    taken = scorer.take([(offset, decode(value)) for offset, value in enumerate(records)])
    kinds = {type(found.event) for found in taken.found}
    assert kinds == {Event, RuleEvent}
    times = [found.event.time_us for found in taken.found if found.frames.machine_id == 11]
    assert times == sorted(times)
