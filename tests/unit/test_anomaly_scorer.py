"""Scoring and saved states without servers: any grouping of records and any crash give the same alarms and the same bits."""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from services.anomaly.detector import Event
from services.anomaly.domain import Severity
from services.anomaly.rulebook import AGAIN_US, RAISED_MAX, RuleEvent
from services.anomaly.scorer import Scorer, decode
from services.anomaly.store import Checkpoint, SavedState
from services.anomaly.tunings import MACHINE_POSITION, Rule, RuleKind, Tuning, TuningKind
from services.common.kafka import Poison
from smdih.ingest.v1 import records_pb2 as pb
from tests import anomaly_plant as plant

MACHINES = (11, 12, 13)


@pytest.fixture(scope="module")
def records() -> Sequence[bytes]:
    """Three machines with a fault each; the last one gets a further signal half-way."""
    values = {machine: plant.with_fault(machine, column=machine % 3) for machine in MACHINES}
    made = []
    for row in range(0, plant.ROWS, 5):
        batches = [
            plant.batch(machine, values[machine][row : row + 5], firm_id=1, first_row=row) for machine in MACHINES[:2]
        ]
        last = values[13][row : row + 5]
        if row >= plant.ROWS // 2:
            last = np.hstack([last, last[:, :1] * 2])
        batches.append(plant.batch(13, last, firm_id=1, first_row=row))
        made.append(pb.SamplesRecord(batches=batches).SerializeToString())
    return made


def events_of(scorer: Scorer, records: Sequence[tuple[int, bytes]]) -> list[tuple[int, Event]]:
    taken = scorer.take([(offset, decode(value)) for offset, value in records])
    return [
        (found.frames.machine_id, found.event._replace(frame=0))
        for found in taken.found
        if isinstance(found.event, Event)
    ]


def last_states(scorer: Scorer, database: "Database") -> dict[tuple[int, int], bytes]:
    while (checkpoint := scorer.checkpoint(saved_position=database.position, bytes_max=None)) is not None:
        database.save(checkpoint)
    return {key: saved.state for key, saved in database.states.items()}


class Database:
    """What the state store does, in memory."""

    def __init__(self) -> None:
        self.position = 0
        self.states: dict[tuple[int, int], SavedState] = {}

    def save(self, checkpoint: Checkpoint) -> None:
        assert checkpoint.position >= self.position
        self.position = checkpoint.position
        for saved in checkpoint.states:
            self.states[saved.machine_id, saved.channel_group] = saved

    def scorer(self) -> Scorer:
        scorer = Scorer(0, position=self.position)
        for saved in self.states.values():
            scorer.load(saved)
        return scorer


def test_each_fault_is_found_whatever_the_grouping_of_records(records: Sequence[bytes]) -> None:
    numbered = list(enumerate(records))
    one_by_one, at_once = Scorer(0, position=0), Scorer(0, position=0)
    events = [event for record in numbered for event in events_of(one_by_one, [record])]
    assert events == events_of(at_once, numbered)
    assert last_states(one_by_one, Database()) == last_states(at_once, Database())
    found = {(machine, event.signal) for machine, event in events if event.raised}
    assert {(11, 11 % 3), (12, 12 % 3), (13, 13 % 3)} <= found


@pytest.mark.parametrize("seed", range(20))
def test_a_crash_at_any_point_changes_neither_events_nor_state(records: Sequence[bytes], seed: int) -> None:
    dice = random.Random(seed)
    undisturbed = Scorer(0, position=0)
    expected = events_of(undisturbed, list(enumerate(records)))
    database = Database()
    seen: dict[tuple[int, int, int, bool], Event] = {}
    scorer = database.scorer()
    while scorer.next_offset < len(records):
        if dice.random() < 0.2:
            scorer = database.scorer()  # everything in memory is gone
        end = min(len(records), scorer.next_offset + dice.randint(1, 20))
        for machine, event in events_of(scorer, [(at, records[at]) for at in range(scorer.next_offset, end)]):
            key = machine, event.signal, event.started_us, event.raised
            assert seen.setdefault(key, event) == event, seed
        if dice.random() < 0.5:
            # Small slices: machines are saved at different records.
            checkpoint = scorer.checkpoint(saved_position=database.position, bytes_max=dice.choice([1, 6000, None]))
            if checkpoint is not None:
                database.save(checkpoint)
    assert list(seen.values()) == [event for _, event in expected], seed
    assert last_states(scorer, database) == last_states(undisturbed, Database()), seed


def test_position_stays_before_what_is_not_saved(records: Sequence[bytes]) -> None:
    scorer = Scorer(0, position=0)
    events_of(scorer, list(enumerate(records[:10])))
    first = scorer.checkpoint(saved_position=0, bytes_max=1)
    assert first is not None
    assert len(first.states) == 1
    assert first.position == 0
    events_of(scorer, [(10, records[10])])
    rest = scorer.checkpoint(saved_position=0, bytes_max=None)
    assert rest is not None
    assert len(rest.states) == 3
    assert rest.position == 11
    assert scorer.checkpoint(saved_position=11, bytes_max=None) is None


def test_a_state_of_another_release_is_learnt_anew() -> None:
    scorer = Scorer(0, position=5)
    scorer.load(SavedState(machine_id=11, channel_group=0, next_offset=9, state=b"something else"))
    record = pb.SamplesRecord(batches=[plant.batch(11, plant.calm(1), firm_id=1)]).SerializeToString()
    assert scorer.take([(5, decode(record))]).samples == plant.calm(1).size


GOOD = {"firm_id": 1, "machine_id": 1, "width": 1, "times_us": (1).to_bytes(8, "little"), "values": bytes(8)}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"machine_id": 0}, "NO_MACHINE"),
        ({"firm_id": 0}, "NO_MACHINE"),
        ({"width": 0}, "WIDTH"),
        ({"width": 201}, "WIDTH"),
        ({"first_position": 200, "width": 200, "values": b""}, "SHAPE"),
        ({"first_position": 399, "width": 2}, "WIDTH"),
        ({"times_us": b"1234567"}, "SHAPE"),
        ({"values": bytes(16)}, "SHAPE"),
        ({"times_us": (2**62).to_bytes(8, "little")}, "TIME_OUT_OF_RANGE"),
        ({"times_us": bytes(8)}, "TIME_OUT_OF_RANGE"),
        ({"values": np.array([np.inf]).tobytes()}, "NOT_FINITE"),
    ],
)
def test_a_record_that_the_door_never_writes_is_poison(changed: dict[str, object], reason: str) -> None:
    record = pb.SamplesRecord(batches=[pb.FrameBatch(**(GOOD | changed))])  # type: ignore[arg-type]
    with pytest.raises(Poison, match=reason):
        decode(record.SerializeToString())


@pytest.mark.parametrize("value", [None, b"", b"\xff\xff\xff"])
def test_bytes_that_are_no_record_are_poison(value: bytes | None) -> None:
    with pytest.raises(Poison):
        decode(value)


def test_columns_in_the_middle_of_a_channel_group_stay_in_their_places() -> None:
    record = pb.SamplesRecord(batches=[pb.FrameBatch(**(GOOD | {"first_position": 402}))])  # type: ignore[arg-type]
    frames = decode(record.SerializeToString())[0]
    assert frames.channel_group == 2
    assert frames.values.shape == (1, 3)
    assert np.isnan(frames.values[0, :2]).all()


def test_rows_in_any_order_within_a_batch_are_put_in_order() -> None:
    batch = plant.batch(11, plant.calm(1), firm_id=1)
    times_us, values = (np.frombuffer(data, dtype="<i8") for data in (batch.times_us, batch.values))
    batch.times_us, batch.values = times_us[::-1].tobytes(), values.reshape(-1, 3)[::-1].tobytes()
    taken = Scorer(0, position=0).take([(0, decode(pb.SamplesRecord(batches=[batch]).SerializeToString()))])
    assert taken.frames_skipped == 0


def told(minutes: int, *, clock_off_s: int, received_s: int, pace: int = 60, shift: float = 0.0) -> list[bytes]:
    """A record of a minute in every so many seconds from a machine whose clock is so far off; in the last ten it shifts."""
    values = plant.calm(3, 60 * minutes)
    values[-600:, 0] += shift
    return [
        pb.SamplesRecord(
            batches=[
                plant.batch(
                    11,
                    values[60 * number : 60 * number + 60],
                    firm_id=1,
                    first_row=clock_off_s + 60 * number,
                    received_us=plant.START_US + (received_s + pace * number) * plant.SECOND_US,
                )
            ]
        ).SerializeToString()
        for number in range(minutes)
    ]


@pytest.mark.parametrize("together", [1, 7, 1000])
def test_a_machine_whose_clock_was_put_back_is_watched_again_after_an_hour(together: int) -> None:
    before = told(20, clock_off_s=0, received_s=0)
    # Its battery was flat: it is ten years earlier by its clock.
    after = told(120, clock_off_s=-10 * 365 * 86_400, received_s=20 * 60, shift=15.0)
    records = list(enumerate([*before, *after]))
    scorer = Scorer(0, position=0)
    events = [
        event for at in range(0, len(records), together) for _, event in events_of(scorer, records[at : at + together])
    ]
    back_us = plant.START_US - 5 * 365 * 86_400 * plant.SECOND_US
    found = [event for event in events if event.raised and event.signal == 0 and event.time_us < back_us]
    assert len(found) == 1
    whole = Scorer(0, position=0)
    assert [event for record in records for _, event in events_of(whole, [record])] == events
    assert last_states(scorer, Database()) == last_states(whole, Database())


def test_history_that_comes_late_does_not_put_a_clock_back() -> None:
    before = told(20, clock_off_s=0, received_s=0)
    # Three days before it in two hours, at twelve times the pace and more; nothing newer comes meanwhile.
    history = told(1440, clock_off_s=-3 * 86_400, received_s=20 * 60, pace=5)
    scorer = Scorer(0, position=0)
    taken = scorer.take([(offset, decode(value)) for offset, value in enumerate([*before, *history])])
    assert taken.frames_skipped == 60 * 1440


def test_what_a_machine_learned_anew_takes_whatever_time_comes() -> None:
    scorer = Scorer(0, position=0)
    scorer.take([(offset, decode(value)) for offset, value in enumerate(told(5, clock_off_s=0, received_s=0))])
    scorer.tune([Tuning(id=1, kind=TuningKind.RELEARN, from_offset=5, machine_id=11)])
    later = told(5, clock_off_s=-86_400, received_s=300)
    taken = scorer.take([(offset, decode(value)) for offset, value in enumerate(later, start=5)])
    assert taken.frames_skipped == 0


def test_a_rule_in_the_middle_of_the_noise_does_not_flood() -> None:
    """One upload may hold 65,536 rows, and a firm may have a thousand rules."""
    rules = [
        Rule(
            id=f"{number:032x}", version=1, firm_id=1, machine_id=11, position=0, kind=RuleKind.ABOVE, name="noise",
            severity=Severity.LOW, limit=60.0,
        )
        for number in range(20)
    ]  # fmt: skip
    scorer = Scorer(0, position=0)
    scorer.tune([
        Tuning(id=number, kind=TuningKind.RULE, from_offset=0, machine_id=11, rule_id=rule.id, rule=rule)
        for number, rule in enumerate(rules)
    ])  # fmt: skip
    rows = 65_536
    record = pb.SamplesRecord(batches=[plant.batch(11, plant.calm(1, rows), firm_id=1)]).SerializeToString()
    taken = scorer.take([(0, decode(record))])
    raised = [found for found in taken.found if isinstance(found.event, RuleEvent) and found.event.raised]
    assert len(rules) * RAISED_MAX == len(raised)
    first = [found.event for found in raised if isinstance(found.event, RuleEvent) and found.event.rule == rules[0]]
    assert all(after.time_us - one.started_us >= AGAIN_US for one, after in itertools.pairwise(first))


def test_a_silence_is_told_once_and_remembered_once_a_rule() -> None:
    rule = Rule(
        id="a" * 32, version=1, firm_id=1, machine_id=11, position=MACHINE_POSITION, kind=RuleKind.NO_DATA, name="quiet",
        severity=Severity.LOW, window_s=30,
    )  # fmt: skip
    scorer = Scorer(0, position=0)
    scorer.tune([Tuning(id=1, kind=TuningKind.RULE, from_offset=0, machine_id=11, rule_id=rule.id, rule=rule)])
    told_of = []
    for offset, record in enumerate(told(30, clock_off_s=0, received_s=0)):
        scorer.take([(offset, decode(record))])
        now_us = plant.START_US + (60 * offset + 50) * plant.SECOND_US
        told_of += [found.event.started_us for _ in range(2) for found in scorer.silences(now_us).found]
    assert len(told_of) == len(set(told_of)) == 30
    assert len(scorer._announced) == 1
