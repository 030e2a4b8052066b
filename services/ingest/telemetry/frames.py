"""From a sender's batch to frames that can be stored, and what cannot.

Work is per batch in Python and per sample in numpy.
"""

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt

from services.common.clock import Clock, from_us
from services.common.directory import Directory
from services.common.texts import showable
from services.ingest.domain import (
    CHANNEL_GROUP,
    FUTURE_S_MAX,
    PAST_DAYS_MAX,
    Reason,
    Sender,
    UnknownSignal,
)
from smdih.directory.v1 import directory_pb2
from smdih.ingest.v1 import records_pb2, telemetry_pb2

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

RAW_BYTES_MAX = 64 * 1024
DETAIL_LENGTH_MAX = 1_000
# Of a batch that goes to quarantine whole; of a larger one only its beginning is kept.
QUARANTINED_BYTES_MAX = 6 * 1024 * 1024
# Of times and values; frames of one batch beyond it go as several.
FRAMES_BYTES_MAX = 1024 * 1024
# What one batch may become: every row is made as wide as its machine has signals, however few of them it names.
CELLS_MAX = 4_000_000
# Of one batch; a machine whose signals are all unknown is found out about in a few.
PROPOSED_AT_ONCE_MAX = 200
_DAY_US = 86_400 * 1_000_000


@dataclass(slots=True)  # not frozen, which would cost more: there is one for every batch
class Checked:
    """A batch after checking. accepted + the samples of `quarantine` = the samples of the batch."""

    sequence: int
    accepted: int
    frames: list[records_pb2.FrameBatch]
    quarantine: list[records_pb2.QuarantineRecord]
    machine_id: int = 0
    received_us: int = 0
    # Time of the newest good row, where there is one.
    newest_us: int = 0
    # Of the first time outside the window, where there is one: that time less the door's.
    clock_off_us: int = 0
    unknown: Sequence[UnknownSignal] = ()


class _Positions(dict[str, int]):
    """Of signals by name."""

    __slots__ = ("__weakref__", "names")

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(zip(names, range(len(names)), strict=True))
        self.names = list(names)


class _MachineView:
    """What the check needs of a machine, as arrays."""

    __slots__ = ("firm_id", "high", "id", "low", "names", "positions", "version", "width")

    def __init__(self, machine: directory_pb2.Machine, version: object, positions: _Positions) -> None:
        self.positions = positions
        self.names = positions.names
        self.version = version
        self.id = machine.id
        self.firm_id = machine.firm_id
        self.width = len(machine.signals)
        limited = any(s.HasField("range_min") or s.HasField("range_max") for s in machine.signals)
        self.low: Floats | None = None
        self.high: Floats | None = None
        if limited:
            self.low = np.array([s.range_min if s.HasField("range_min") else -np.inf for s in machine.signals])
            self.high = np.array([s.range_max if s.HasField("range_max") else np.inf for s in machine.signals])


class FrameCheck:
    """Checks batches against the directory, the time window and the ranges of the instruments."""

    def __init__(self, directory: Directory, clock: Clock) -> None:
        self._directory = directory
        self._clock = clock
        self._views: dict[int, _MachineView] = {}
        # Machines of a kind name their signals alike and share one table of them, as long as there is such a machine.
        self._positions: WeakValueDictionary[tuple[str, ...], _Positions] = WeakValueDictionary()

    def check(self, sender: Sender, batch: telemetry_pb2.Batch) -> Checked:
        """Sort the samples of a batch into frames to store and samples to quarantine. Never raises for what a sender can send."""
        received_us = self._clock.now_us()
        values = np.array(batch.values, dtype=np.float64)
        times = np.array(batch.times_us, dtype=np.int64)
        rows = len(times)
        present = _present(batch.absent, len(values))
        samples = len(values) if present is None else int(present.sum())

        def refuse_all(reason: str, detail: str, machine_id: int = 0) -> Checked:
            whole = batch.SerializeToString()
            record = quarantined(sender, reason, detail, samples, received_us, batch=whole, machine_id=machine_id)
            return Checked(batch.sequence, 0, [], [record], machine_id)

        machine = self._machine(sender, batch.machine_id, batch.machine_path)
        if rows == 0 or len(values) == 0:
            machine_id = machine.id if machine is not None else 0
            return refuse_all(Reason.EMPTY_BATCH, "The batch holds no values; send times_us and values.", machine_id)
        if machine is None:
            named = batch.machine_path or f"id {batch.machine_id}"
            return refuse_all(
                Reason.UNKNOWN_MACHINE,
                f"This firm has no machine {named!r}; register it, then replay this item from quarantine.",
            )
        columns = len(values) // rows
        if columns * rows != len(values):
            return refuse_all(
                Reason.SHAPE_MISMATCH,
                f"{len(values)} values do not fill {rows} rows evenly; send times x signals values.",
                machine.id,
            )
        earliest = received_us - PAST_DAYS_MAX * _DAY_US
        latest = received_us + FUTURE_S_MAX * 1_000_000
        plain = not (batch.positions or batch.absent) and columns == machine.width <= CHANNEL_GROUP
        if plain and batch.signals:
            plain = batch.signals == machine.names
        if plain and _is_clean(machine, times, values.reshape(rows, columns), earliest, latest):
            # Nearly all batches: every signal in order, nothing wrong. The rest of this function would find the same, slower.
            matrix = values.reshape(rows, columns)
            whole = _frame_batches(sender, batch.sequence, machine.id, 0, times, matrix, received_us)
            return Checked(batch.sequence, len(values), whole, [], machine.id, received_us, int(times[-1]))
        if batch.absent and present is None:
            return refuse_all(
                Reason.SHAPE_MISMATCH,
                f"The bitmap of absent values has {len(batch.absent)} bytes for {len(values)} values.",
                machine.id,
            )
        positions, unknown = _positions(machine, batch, columns)
        if len(positions) != columns:
            return refuse_all(
                Reason.SHAPE_MISMATCH,
                f"{len(positions)} signals are named for {columns} columns of values.",
                machine.id,
            )

        known = positions[positions >= 0]
        if len(np.unique(known)) != len(known):
            return refuse_all(Reason.SHAPE_MISMATCH, "A signal is named for two columns of values.", machine.id)

        cells_a_row = sum(
            min(CHANNEL_GROUP, machine.width - group * CHANNEL_GROUP)
            for group in set((known // CHANNEL_GROUP).tolist())
        )
        if rows * cells_a_row > CELLS_MAX:
            return refuse_all(
                Reason.TOO_LARGE,
                f"{rows} rows of a machine that has {machine.width} signals are too many for one batch; "
                f"send at most {CELLS_MAX // cells_a_row} rows in each.",
                machine.id,
            )

        matrix = values.reshape(rows, columns)
        good = np.ones((rows, columns), dtype=bool) if present is None else present.reshape(rows, columns)
        quarantine: list[records_pb2.QuarantineRecord] = []
        clock_off_us = 0

        def set_aside(bad: Bools, reason: str, detail: str) -> None:
            nonlocal good
            bad = bad & good
            count = int(bad.sum())
            if not count:
                return
            part = _part(batch, matrix, bad)
            quarantine.append(
                quarantined(sender, reason, detail, count, received_us, batch=part, machine_id=machine.id)
            )
            good = good & ~bad

        proposed: list[UnknownSignal] = []
        if unknown:
            if batch.signals and self._is_proposing(sender.firm_id):
                proposed = _unknown_signals(batch.signals, positions, matrix, good)
            named = ", ".join(repr(name) for name in unknown[:5])
            bad = np.zeros((rows, columns), dtype=bool)
            bad[:, positions < 0] = True
            set_aside(
                bad,
                Reason.UNKNOWN_SIGNAL,
                f"The machine has no signal {named}; add it, then replay this item from quarantine.",
            )
        if times.min() < earliest or times.max() > latest:
            bad_rows = (times < earliest) | (times > latest)
            clock_off_us = int(times[bad_rows][0]) - received_us
            set_aside(
                np.broadcast_to(bad_rows[:, None], good.shape),
                Reason.TIME_OUT_OF_WINDOW,
                f"A time is {_when(int(times[bad_rows][0]))}; the hub takes times from {_when(earliest)} to {_when(latest)}. "
                "Check the sender's clock and that times_us are microseconds.",
            )
        finite = np.isfinite(matrix)
        if not finite.all():
            set_aside(~finite, Reason.NOT_FINITE, "A value is NaN or infinite; mark a missing value as absent instead.")
        if machine.low is not None and machine.high is not None:
            column = np.where(positions < 0, 0, positions)
            outside = (matrix < machine.low[column]) | (matrix > machine.high[column])
            if outside.any():
                set_aside(
                    outside,
                    Reason.OUT_OF_RANGE,
                    "A value is outside what the instrument can report; check sensor or range.",
                )

        accepted = int(good.sum())
        frames = self._frames(sender, batch, machine, positions, times, matrix, good, received_us) if accepted else []
        newest_us = int(times[good.any(axis=1)].max()) if accepted else 0
        return Checked(
            batch.sequence, accepted, frames, quarantine, machine.id, received_us, newest_us, clock_off_us, proposed
        )

    def signals_of(self, sender: Sender, machine_id: int, path: str) -> Container[str]:
        """Names of a machine's signals; none where the sender's firm has no such machine."""
        machine = self._machine(sender, machine_id, path)
        return () if machine is None else machine.positions

    def machine_id(self, sender: Sender, machine_id: int, path: str) -> int:
        """The machine of the sender's firm that is named so; 0: there is none."""
        machine = self._machine(sender, machine_id, path)
        return 0 if machine is None else machine.id

    def _is_proposing(self, firm_id: int) -> bool:
        firm = self._directory.firms.get(firm_id)
        return firm is not None and firm.propose_unknown_signals

    def _machine(self, sender: Sender, machine_id: int, path: str) -> _MachineView | None:
        if not machine_id:
            machine_id = self._directory.machine_id(path)
        version = self._directory.machine_version(machine_id)
        if version is None:
            return None
        view = self._views.get(machine_id)
        if view is None or view.version is not version:
            machine = self._directory.machines[machine_id]
            names = tuple(signal.name for signal in machine.signals)
            positions = self._positions.get(names)
            if positions is None:
                positions = self._positions[names] = _Positions(names)
            view = self._views[machine_id] = _MachineView(machine, version, positions)
        return view if view.firm_id == sender.firm_id else None

    @staticmethod
    def _frames(
        sender: Sender,
        batch: telemetry_pb2.Batch,
        machine: _MachineView,
        positions: Ints,
        times: Ints,
        matrix: Floats,
        good: Bools,
        received_us: int,
    ) -> list[records_pb2.FrameBatch]:
        if not good.all():
            matrix = np.where(good, matrix, np.nan)
        frames: list[records_pb2.FrameBatch] = []
        for first in range(0, machine.width, CHANNEL_GROUP):
            width = min(CHANNEL_GROUP, machine.width - first)
            here = np.flatnonzero((positions >= first) & (positions < first + width))
            filled = np.flatnonzero(good[:, here].any(axis=1))
            rows_max = _rows_max(width)
            # Spread over all signals, many rows with few values are large: not all of them stand here at a time.
            for at in range(0, len(filled), rows_max):
                some = filled[at : at + rows_max]
                dense = np.full((len(some), width), np.nan)
                dense[:, positions[here] - first] = matrix[np.ix_(some, here)]
                frames += _frame_batches(sender, batch.sequence, machine.id, first, times[some], dense, received_us)
        return frames


def _is_clean(machine: _MachineView, times: Ints, matrix: Floats, earliest: int, latest: int) -> bool:
    """Every time is in the window, every value is finite and in its instrument's range."""
    if times.min() < earliest or times.max() > latest or not np.isfinite(matrix).all():
        return False
    if machine.low is None or machine.high is None:
        return True
    return bool((matrix >= machine.low).all() and (matrix <= machine.high).all())


def _rows_max(width: int) -> int:
    return FRAMES_BYTES_MAX // (8 * (width + 1))


def _frame_batches(
    sender: Sender,
    sequence: int,
    machine_id: int,
    first_position: int,
    times: Ints,
    values: Floats,
    received_us: int,
) -> list[records_pb2.FrameBatch]:
    width = values.shape[1]
    rows_max = _rows_max(width)
    return [
        records_pb2.FrameBatch(
            firm_id=sender.firm_id,
            machine_id=machine_id,
            first_position=first_position,
            width=width,
            times_us=times[at : at + rows_max].astype("<i8", copy=False).tobytes(),
            values=values[at : at + rows_max].astype("<f8", copy=False).tobytes(),
            source=sender.source,
            sequence=sequence,
            received_us=received_us,
            correlation_id=sender.correlation_id,
        )
        for at in range(0, len(times), rows_max)
    ]


def quarantined(
    sender: Sender,
    reason: str,
    detail: str,
    samples: int,
    received_us: int,
    *,
    batch: bytes = b"",
    raw: bytes = b"",
    machine_id: int = 0,
) -> records_pb2.QuarantineRecord:
    """A quarantine record; its id comes from its content, so that what is sent again is the same record."""
    digest = hashlib.sha256(f"{sender.firm_id}/{sender.source}/{reason}/".encode())
    digest.update(batch)
    digest.update(raw)
    if len(batch) > QUARANTINED_BYTES_MAX:
        batch, raw = b"", batch
    return records_pb2.QuarantineRecord(
        id=digest.hexdigest()[:32],
        firm_id=sender.firm_id,
        credential_id=sender.credential_id,
        source=sender.source,
        reason=reason,
        detail=showable(detail[:DETAIL_LENGTH_MAX]),
        samples=samples,
        received_us=received_us,
        correlation_id=sender.correlation_id,
        batch=batch,
        raw=raw[:RAW_BYTES_MAX],
        door=sender.door,
        machine_id=machine_id,
    )


def _unknown_signals(names: Sequence[str], positions: Ints, matrix: Floats, present: Bools) -> list[UnknownSignal]:
    found = []
    for column in np.flatnonzero(positions < 0)[:PROPOSED_AT_ONCE_MAX].tolist():
        values = matrix[:, column][present[:, column] & np.isfinite(matrix[:, column])]
        if len(values):
            is_whole = bool((values == np.floor(values)).all())
            low, high = float(values.min()), float(values.max())
            found.append(UnknownSignal(names[column], len(values), float(values[-1]), low, high, is_whole))
    return found


def _present(absent: bytes, cells: int) -> Bools | None:
    """The bitmap as booleans; None where every value is present or the bitmap does not fit."""
    if not absent or len(absent) != (cells + 7) // 8:
        return None
    bits = np.unpackbits(np.frombuffer(absent, dtype=np.uint8), count=cells, bitorder="little")
    return np.equal(bits, 0)


def _positions(machine: _MachineView, batch: telemetry_pb2.Batch, columns: int) -> tuple[Ints, list[str]]:
    """Position of each column (-1: unknown), and what is unknown."""
    if batch.signals:
        named = list(batch.signals)
        positions = np.array([machine.positions.get(name, -1) for name in named], dtype=np.int64)
    elif batch.positions:
        positions = np.array(batch.positions, dtype=np.int64)
        named = [str(position) for position in batch.positions]
        positions = np.where(positions < machine.width, positions, -1)
    else:
        positions = np.arange(columns, dtype=np.int64)
        if columns <= machine.width:
            return positions, []
        named = [str(position) for position in range(columns)]
        positions = np.where(positions < machine.width, positions, -1)
    return positions, [name for name, position in zip(named, positions, strict=True) if position < 0]


def _part(batch: telemetry_pb2.Batch, matrix: Floats, cells: Bools) -> bytes:
    """A batch with only these cells, and only the rows that have one."""
    rows = cells.any(axis=1)
    kept = cells[rows]
    part = telemetry_pb2.Batch(
        sequence=0,
        machine_id=batch.machine_id,
        machine_path=batch.machine_path,
        times_us=np.array(batch.times_us, dtype=np.int64)[rows].tolist(),
        positions=batch.positions,
        signals=batch.signals,
        values=matrix[rows].ravel().tolist(),
        absent=np.packbits(~kept.ravel(), bitorder="little").tobytes(),
    )
    return part.SerializeToString()


def _when(time_us: int) -> str:
    try:
        return from_us(time_us).isoformat(timespec="seconds")
    except OverflowError:
        return f"{time_us} us after 1970"
