"""Frames of one partition through the detector: in memory only, one owner, in order of offsets."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from services.anomaly.detector import WIDTH_MAX, Config, Detector, Event, Scores, StateError
from services.anomaly.domain import Severity
from services.anomaly.kernel import layout
from services.anomaly.rulebook import Key, RuleBook, RuleEvent, place
from services.anomaly.store import Checkpoint, SavedState
from services.anomaly.tunings import Rule, RuleKind, Tuning, TuningKind
from services.common.kafka import Poison
from services.common.logs import get_logger
from smdih.ingest.v1 import records_pb2 as pb

log = get_logger(__name__)

TIME_US_MAX = 253_402_300_800_000_000  # the year 10000: later times cannot be stored


@dataclass(frozen=True)
class Frames:
    """Frames of one machine and channel group, ready for the detector."""

    firm_id: int
    machine_id: int
    channel_group: int
    times_us: NDArray[np.int64]
    values: NDArray[np.float64]  # times x signals, from the group's first position on
    received_us: int
    correlation_id: str


@dataclass(frozen=True)
class Found:
    """An alarm that began or ended, with the frames that it was found in (empty ones: a tuning ended it, or the clock began it)."""

    frames: Frames
    event: Event | RuleEvent


@dataclass
class Taken:
    """What came of some records."""

    found: list[Found] = field(default_factory=list)
    samples: int = 0
    frames_skipped: int = 0


@dataclass
class _Machine:
    slot: int
    # Its loaded state holds the records before this one.
    skip_below: int = 0


def decode(value: bytes | None) -> Sequence[Frames]:
    """The frames of a record. Raises Poison when it is not a record of the door."""
    if not value:
        raise Poison("EMPTY")
    try:
        record = pb.SamplesRecord.FromString(value)
    except DecodeError as error:
        raise Poison("MALFORMED") from error
    for batch in record.batches:
        _check_shape(batch)
    # Once for the whole record: a record of many small batches would pay more for the calls than for the numbers.
    times_us = np.frombuffer(b"".join(batch.times_us for batch in record.batches), dtype="<i8")
    if len(times_us) and not 0 < times_us.min() <= times_us.max() < TIME_US_MAX:
        raise Poison("TIME_OUT_OF_RANGE")
    values = np.frombuffer(b"".join(batch.values for batch in record.batches), dtype="<f8")
    if np.isinf(values).any():
        raise Poison("NOT_FINITE")
    frames: list[Frames] = []
    row = value_ = 0
    for batch in record.batches:
        rows = len(batch.times_us) // 8
        matrix = values[value_ : value_ + rows * batch.width].reshape(rows, batch.width)
        group, before = divmod(batch.first_position, WIDTH_MAX)
        if before:
            matrix = np.pad(matrix, ((0, 0), (before, 0)), constant_values=np.nan)
        times = times_us[row : row + rows]
        if rows > 1 and not (times[1:] > times[:-1]).all():
            # A sender may give its rows in any order; the detector's clock only goes forward.
            order = np.argsort(times, kind="stable")
            times, matrix = times[order], matrix[order]
        frames.append(
            Frames(
                batch.firm_id,
                batch.machine_id,
                group,
                times,
                matrix,
                batch.received_us,
                batch.correlation_id,
            )
        )
        row += rows
        value_ += rows * batch.width
    return frames


def _check_shape(batch: pb.FrameBatch) -> None:
    if batch.machine_id <= 0 or batch.firm_id <= 0:
        raise Poison("NO_MACHINE")
    if not 1 <= batch.width <= WIDTH_MAX - batch.first_position % WIDTH_MAX:
        raise Poison("WIDTH")
    if len(batch.times_us) % 8 or len(batch.values) != len(batch.times_us) * batch.width:
        raise Poison("SHAPE")


class Scorer:
    """The detector's state of one partition and how far it has come.

    The width of a machine comes from its frames, not from the registry: a replay then gives the same bits even if signals were
    added meanwhile.
    """

    def __init__(self, partition: int, *, position: int, config: Config | None = None) -> None:
        self.partition = partition
        self.next_offset = position
        self._detector = Detector(config)
        self._machines: dict[Key, _Machine] = {}
        # First record that is not in the machine's saved state; in order of that record.
        self._unsaved: dict[Key, int] = {}
        self._rules = RuleBook()
        # Since when each rule's machine is silent, as was told last.
        self._announced: dict[str, int] = {}
        # Slots whose newest frames brought nothing new.
        self._behind: set[int] = set()
        # Tunings that hold from a later record on, in order of it.
        self._coming: deque[Tuning] = deque()
        # Offset of a threshold by machine and position, where it is not 0: also of machines that are not here yet.
        self._thresholds: dict[int, dict[int, float]] = {}

    def __len__(self) -> int:
        return len(self._machines)

    @property
    def nbytes(self) -> int:
        return self._detector.nbytes

    def load(self, saved: SavedState) -> None:
        """Continue from a saved state. One that this release cannot read is left aside: the machine is learnt anew.

        States are loaded before tunings are added.
        """
        slot = self._detector.add(1)
        machine = _Machine(slot)
        key = saved.machine_id, saved.channel_group
        self._machines[key] = machine
        try:
            self._detector.load(slot, saved.state)
        except StateError as error:
            log.warning("detector state not readable, learning anew", machine_id=saved.machine_id, error=str(error))
        else:
            machine.skip_below = saved.next_offset
            if self._detector.is_behind(slot):
                self._behind.add(slot)
            self._rules.load(key, saved.rules)

    def tune(self, tunings: Sequence[Tuning]) -> None:
        """Add tunings; each holds from its record on, which must not have been taken yet. One from before the position is in the
        states already, or (thresholds and rules) belongs to all that comes."""
        together = [*self._coming, *tunings]
        together.sort(key=lambda tuning: (tuning.from_offset, tuning.id))
        self._coming = deque(together)

    def settle(self) -> Taken:
        """Let the tunings take effect that hold from the next record on, without waiting for it."""
        taken = Taken()
        self._apply_until(self.next_offset, taken)
        return taken

    def silences(self, now_us: int) -> Taken:
        """Silence that rules look for and that the clock shows; each once. Only for one who has taken all there is."""
        taken = Taken()
        for event in self._rules.silences(now_us):
            if self._announced.get(event.rule.id) != event.started_us:
                self._announced[event.rule.id] = event.started_us
                taken.found.append(Found(_no_frames(place(event.rule)[0], event.rule.firm_id), event))
        return taken

    def take(self, records: Sequence[tuple[int, Sequence[Frames]]]) -> Taken:
        """Score records, each with its offset, rising from `next_offset` on. A record without frames only moves the position."""
        taken = Taken()
        batches: list[tuple[int, Frames]] = []
        for offset, frames_of_record in records:
            assert offset >= self.next_offset, (offset, self.next_offset)
            if self._coming and self._coming[0].from_offset <= offset:
                # What came before must not see it.
                self._score(batches, taken)
                batches = []
                self._apply_until(offset, taken)
            for frames in frames_of_record:
                key = frames.machine_id, frames.channel_group
                width = frames.values.shape[1]
                machine = self._machines.get(key)
                if machine is None:
                    machine = self._machines[key] = _Machine(self._detector.add(width))
                    self._set_thresholds(key)
                if offset < machine.skip_below or not len(frames.times_us):
                    continue
                if self._detector.width(machine.slot) < width:
                    # What came before must not see the new signals: else the result would depend on how records are grouped.
                    self._score(batches, taken)
                    batches = []
                    self._detector.widen(machine.slot, width)
                    self._set_thresholds(key)
                batches.append((machine.slot, frames))
                self._unsaved.setdefault(key, offset)
            self.next_offset = offset + 1
        self._score(batches, taken)
        return taken

    def _score(self, batches: Sequence[tuple[int, Frames]], taken: Taken) -> None:
        if not batches:
            return
        lengths = np.array([len(frames.times_us) for _, frames in batches])
        widths = np.array([frames.values.shape[1] for _, frames in batches])
        starts = np.zeros(int(lengths.sum()) + 1, dtype=np.int64)
        np.cumsum(np.repeat(widths, lengths), out=starts[1:])
        times_us = np.concatenate([frames.times_us for _, frames in batches])
        values = np.concatenate([frames.values.reshape(-1) for _, frames in batches])
        scores = self._detector.score(
            np.repeat(np.array([slot for slot, _ in batches], dtype=np.int32), lengths), times_us, values, starts
        )
        found: list[tuple[int, Event | RuleEvent]] = []
        if len(self._rules):
            keys = [(frames.machine_id, frames.channel_group) for _, frames in batches]
            received_us = [frames.received_us for _, frames in batches]
            found += self._rules.evaluate(keys, received_us, lengths, widths, times_us, values)
        if scores.events:
            numbers = np.searchsorted(np.cumsum(lengths), [event.frame for event in scores.events], side="right")
            found += zip(numbers.tolist(), scores.events, strict=True)
        # In the order of the samples whatever was taken together: episodes depend on it.
        found.sort(key=lambda one: (one[0], one[1].time_us))
        taken.found += [Found(batches[number][1], event) for number, event in found]
        taken.samples += int(starts[-1])
        taken.frames_skipped += scores.skipped
        self._follow_clocks(batches, scores, taken)

    def _follow_clocks(self, batches: Sequence[tuple[int, Frames]], scores: Scores, taken: Taken) -> None:
        """A machine whose clock was put back is scored on by its new one, and by that its rules are evaluated."""
        if not scores.skipped and not self._behind:
            return
        end = 0
        again: dict[int, list[tuple[int, Frames]]] = {}
        for slot, frames in batches:
            first, end = end, end + len(frames.times_us)
            if slot in again:
                again[slot].append((slot, frames))
                continue
            is_new = scores.is_new(first, end)
            if is_new and slot not in self._behind:
                continue
            newest_us = int(frames.times_us[-1])
            if self._detector.follow_clock(slot, newest_us, frames.received_us, is_new=is_new):
                log.warning("a machine's clock was put back", machine_id=frames.machine_id, time_us=newest_us)
                self._rules.set_clock((frames.machine_id, frames.channel_group), newest_us)
                again[slot] = []
                is_new = True
            if is_new:
                self._behind.discard(slot)
            else:
                self._behind.add(slot)
        # What was taken together must not matter.
        self._score([batch for later in again.values() for batch in later], taken)

    def _apply_until(self, offset: int, taken: Taken) -> None:
        while self._coming and self._coming[0].from_offset <= offset:
            tuning = self._coming.popleft()
            if tuning.kind is TuningKind.THRESHOLD:
                assert tuning.position is not None
                self._thresholds.setdefault(tuning.machine_id, {})[tuning.position] = tuning.threshold_offset
                key = tuning.machine_id, _group(tuning.position)
                if key in self._machines:
                    self._set_thresholds(key)
            elif tuning.kind is TuningKind.RELEARN:
                self._relearn(tuning, taken)
            else:
                self._set_rule(tuning, taken)

    def _set_thresholds(self, key: Key) -> None:
        slot = self._machines[key].slot
        width = self._detector.width(slot)
        for position, offset in self._thresholds.get(key[0], {}).items():
            signal = -1 if position < 0 else position - key[1] * WIDTH_MAX
            if _group(position) == key[1] and signal < width:
                self._detector.sensitivity(slot, signal, offset)

    def _relearn(self, tuning: Tuning, taken: Taken) -> None:
        groups = [key for key in self._machines if key[0] == tuning.machine_id]
        for key in groups:
            slot = self._machines[key].slot
            if tuning.from_offset < self._machines[key].skip_below:
                continue  # its loaded state has it
            signals = range(self._detector.width(slot))
            if tuning.position is not None:
                if _group(tuning.position) != key[1] or tuning.position - key[1] * WIDTH_MAX not in signals:
                    continue
                signals = range(tuning.position - key[1] * WIDTH_MAX, tuning.position - key[1] * WIDTH_MAX + 1)
            last_us = self._detector.last_time_us(slot)
            for signal in (-1, *signals):
                started_us = self._detector.active_us(slot, signal)
                if started_us and last_us:
                    taken.found.append(Found(_no_frames(key, 0), _end(signal, started_us, last_us)))
            for signal in signals:
                self._detector.forget(slot, signal)
            if tuning.position is None:
                self._detector.forget_clock(slot)
                self._rules.set_clock(key, 0)
            self._unsaved.setdefault(key, max(tuning.from_offset, self.next_offset))

    def _set_rule(self, tuning: Tuning, taken: Taken) -> None:
        machine = None
        if tuning.rule is not None:
            key = place(tuning.rule)[0]
            machine = self._machines.get(key)
        in_state = machine is not None and tuning.from_offset < machine.skip_below
        ended = self._rules.active(tuning.rule_id)
        if ended is not None:
            # Ended twice is ended once, so a replay needs no care.
            held = place(ended.rule)[0]
            taken.found.append(Found(_no_frames(held, ended.rule.firm_id), ended))
            if held in self._machines and tuning.from_offset >= self._machines[held].skip_below:
                self._unsaved.setdefault(held, max(tuning.from_offset, self.next_offset))
        if tuning.rule is None:
            self._rules.remove(tuning.rule_id)
            return
        last_us = (self._detector.last_time_us(machine.slot) or 0) if machine else 0
        self._rules.set(tuning.rule, last_us=last_us, made_us=tuning.made_us, saved=in_state)
        if machine is not None and not in_state:
            self._unsaved.setdefault(key, max(tuning.from_offset, self.next_offset))

    def checkpoint(self, *, saved_position: int, bytes_max: int | None) -> Checkpoint | None:
        """States that are not saved yet, the oldest first, and the position that holds once they are; None: nothing to save.

        They count as saved from here on: the caller stores them or gives the partition up.
        """
        states: list[SavedState] = []
        size = 0
        while self._unsaved and (bytes_max is None or size < bytes_max):
            key = next(iter(self._unsaved))
            del self._unsaved[key]
            state = self._detector.dump(self._machines[key].slot)
            size += len(state)
            rules = self._rules.dump(key)
            states.append(
                SavedState(
                    machine_id=key[0], channel_group=key[1], next_offset=self.next_offset, state=state, rules=rules
                )
            )
        position = next(iter(self._unsaved.values()), self.next_offset)
        if not states and position == saved_position:
            return None
        return Checkpoint(partition=self.partition, position=position, states=states)


def _group(position: int) -> int:
    """Channel group of a position, as of an alarm."""
    return position // WIDTH_MAX if position >= 0 else -1 - position


def _no_frames(key: Key, firm_id: int) -> Frames:
    return Frames(firm_id, *key, np.zeros(0, dtype=np.int64), np.zeros((0, 1)), 0, "")


def _end(signal: int, started_us: int, time_us: int) -> Event:
    """The detector forgets the alarm, so it ends here."""
    nothing = dict.fromkeys(("score", "value", "expected", "spread", "distance", "lead_share", "next_share"), 0.0)
    return Event(
        frame=0, signal=signal, raised=False, component=layout.RECORD, time_us=time_us, started_us=started_us, samples=0,
        period_us=0, lead=-1, next=-1, **nothing,
    )  # fmt: skip


def compile_kernel() -> None:
    """Compile the detector, or load it from the cache: seconds that nobody should wait for later."""
    detector = Detector()
    slot = detector.add(2)
    rows = 8
    detector.score(np.full(rows, slot, dtype=np.int32), np.arange(1, rows + 1) * 1_000_000, np.zeros(rows * 2))
    detector.widen(slot, 3)
    detector.load(slot, detector.dump(slot))
    rules = RuleBook()
    rule = Rule(
        id="0" * 32, version=1, firm_id=1, machine_id=1, position=0, kind=RuleKind.ABOVE, name="", severity=Severity.LOW
    )
    rules.set(rule, last_us=0, made_us=0, saved=False)
    one = np.ones(1, dtype=np.int64)
    rules.evaluate([(1, 0)], [1], one, one, one, np.ones(1))
