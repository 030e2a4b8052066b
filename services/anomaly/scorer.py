"""Frames of one partition through the detector: in memory only, one owner, in order of offsets."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from services.anomaly.detector import WIDTH_MAX, Config, Detector, Event, StateError
from services.anomaly.store import Checkpoint, SavedState
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
    """An alarm that began or ended, with the frames that it was found in."""

    frames: Frames
    event: Event


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
        self._machines: dict[tuple[int, int], _Machine] = {}
        # First record that is not in the machine's saved state; in order of that record.
        self._unsaved: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._machines)

    @property
    def nbytes(self) -> int:
        return self._detector.nbytes

    def load(self, saved: SavedState) -> None:
        """Continue from a saved state. One that this release cannot read is left aside: the machine is learnt anew."""
        slot = self._detector.add(1)
        machine = _Machine(slot)
        self._machines[saved.machine_id, saved.channel_group] = machine
        try:
            self._detector.load(slot, saved.state)
        except StateError as error:
            log.warning("detector state not readable, learning anew", machine_id=saved.machine_id, error=str(error))
        else:
            machine.skip_below = saved.next_offset

    def take(self, records: Sequence[tuple[int, Sequence[Frames]]]) -> Taken:
        """Score records, each with its offset, rising from `next_offset` on. A record without frames only moves the position."""
        taken = Taken()
        batches: list[tuple[int, Frames]] = []
        for offset, frames_of_record in records:
            assert offset >= self.next_offset, (offset, self.next_offset)
            for frames in frames_of_record:
                key = frames.machine_id, frames.channel_group
                width = frames.values.shape[1]
                machine = self._machines.get(key)
                if machine is None:
                    machine = self._machines[key] = _Machine(self._detector.add(width))
                if offset < machine.skip_below or not len(frames.times_us):
                    continue
                if self._detector.width(machine.slot) < width:
                    # What came before must not see the new signals: else the result would depend on how records are grouped.
                    self._score(batches, taken)
                    batches = []
                    self._detector.widen(machine.slot, width)
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
        scores = self._detector.score(
            np.repeat(np.array([slot for slot, _ in batches], dtype=np.int32), lengths),
            np.concatenate([frames.times_us for _, frames in batches]),
            np.concatenate([frames.values.reshape(-1) for _, frames in batches]),
            starts,
        )
        ends = np.cumsum(lengths)
        for event in scores.events:
            _, frames = batches[int(np.searchsorted(ends, event.frame, side="right"))]
            taken.found.append(Found(frames, event))
        taken.samples += int(starts[-1])
        taken.frames_skipped += scores.skipped

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
            states.append(
                SavedState(machine_id=key[0], channel_group=key[1], next_offset=self.next_offset, state=state)
            )
        position = next(iter(self._unsaved.values()), self.next_offset)
        if not states and position == saved_position:
            return None
        return Checkpoint(partition=self.partition, position=position, states=states)


def compile_kernel() -> None:
    """Compile the detector, or load it from the cache: seconds that nobody should wait for later."""
    detector = Detector()
    slot = detector.add(2)
    rows = 8
    detector.score(np.full(rows, slot, dtype=np.int32), np.arange(1, rows + 1) * 1_000_000, np.zeros(rows * 2))
    detector.widen(slot, 3)
    detector.load(slot, detector.dump(slot))
