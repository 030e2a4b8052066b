"""The streaming anomaly detector: one causal pass, no labels, one configuration for every series.

A *slot* is one machine (or one channel group of it) with up to `WIDTH_MAX` signals that share a time.  All state
lives in a few growable float64 arrays; `score` makes one compiled call for a whole batch of frames of many machines.
The result is the same, bit for bit, for any split of the same frames into batches, and after `dump` and `load`.

Two scores per value, both -log10 of an expected rate of excursions, so that one threshold means the same everywhere:
*onset* is one early alarm and then quiet (hold), *state* says whether the signal is still abnormal.
"""

import struct
from dataclasses import astuple, dataclass
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.anomaly.kernel import frames, layout

WIDTH_MAX = 200
STATE_VERSION = 2
# A machine whose frames are older than what it sent before, for so long, at most so much faster than they come, has put its
# clock back.
CLOCK_WAIT_US = 3600 * 1_000_000
CLOCK_PACE_MAX = 2.0
OFFSET_MIN, OFFSET_MAX = -1.5, 3.0  # bounds of what people's feedback may do to one signal's threshold

_HEADER = struct.Struct("<4sHHII")  # magic, version, width, series fields, joint fields
_MAGIC = b"SMDA"
_FIELDS = {1: 163, STATE_VERSION: layout.SERIES_FIELDS}  # of a series, by version

Floats = NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)


class StateError(ValueError):
    """The saved state is not one that this version can continue from."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One configuration for all series.  Rows are values of one series, scores are -log10 as in the module's text."""

    raise_at: float = 4.2
    clear_below: float = 2.5
    calm_rows: float = 30.0  # an alarm ends after so many rows below `clear_below`
    horizon_rows: float = 2000.0
    clip_sd: float = 4.0  # learners see no value further out than this
    warmup_rows: float = 30.0
    hold_us: float = 12 * 3600e6  # after an onset only a clearly higher one passes for this time, within ...
    hold_rows_min: float = 20.0
    hold_rows_max: float = 300.0
    hold_ratio: float = 1.5
    forget: float = 1e-4  # share of the distance to the present value that a range gives up per row ...
    forget_us: float = 7 * 86400e6  # ... and at most one part in this time
    record_cap: float = 1.0
    share_unit: float = 0.01  # this and the next: rate of excursions by height, fitted once to all series pooled
    score_base: float = 2.4
    season_ratio: float = 0.4  # a periodic profile counts when it leaves less than this part of the variance
    season_step: float = 0.3
    tail_rows: float = 2000.0
    joint_smoothing: float = 0.1
    joint_warmup_rows: float = 350.0
    joint_gate: float = 3.28  # as normal deviate: learn only below it
    joint_shrinkage: float = 0.1
    joint_horizon_rows: float = 5000.0
    joint_leak: float = 0.00005  # learning rate while not calm: a new regime is accepted after hours at 1 Hz
    joint_unit: float = 1.1  # score per normal deviate
    joint_raise_at: float = 5.0  # smoothed rows depend on each other, so an alarm needs more than one value's does
    young_rows: float = 300.0  # a younger series is scored, but raises no alarm: it has not shown yet what is usual
    raise_at_min: float = (
        3.1  # where frames are rare alarms are raised by time: one in `budget_us` a signal, not below this
    )
    budget_us: float = 7 * 86400e6
    joint_settling: float = 0.2  # the machine's state follows its rows by this share, over about five rows
    change_rows: float = 400.0  # longest stretch that the change scan compares with the long-run mean
    change_clip_sd: float = 64.0  # and the furthest value it sees: far enough for spikes to count
    season_wait: float = 2.0  # periods for which a profile's residual is watched before it counts
    cycle_likeness: float = 0.5  # autocorrelation asked of a period that is found

    def vector(self) -> Floats:
        return np.array(astuple(self), dtype=np.float64)


class Event(NamedTuple):
    """An alarm that began or ended.  (slot, signal, started_us) is the same for both, also after a replay.

    signal is -1 for the joint score of the machine; then lead and next are the two signals with the largest share
    of the distance.  component indexes `layout.COMPONENTS`; period_us is that of a periodic one, else 0.
    """

    frame: int
    signal: int
    raised: bool
    component: int
    time_us: int
    started_us: int
    score: float
    value: float
    expected: float
    spread: float
    distance: float
    samples: int
    period_us: int
    lead: int
    lead_share: float
    next: int
    next_share: float

    @property
    def component_name(self) -> str:
        return layout.COMPONENTS[self.component]


@dataclass(frozen=True)
class Scores:
    """Scores of a batch.  Flat arrays have the layout of `values`: frame i owns [starts[i], starts[i + 1])."""

    onset: Floats
    state: Floats
    component: NDArray[np.int8]  # strongest component, -1 where the frame was skipped
    joint_onset: Floats  # per frame
    joint_state: Floats
    share: Floats  # each signal's part of its block's T-squared
    starts: NDArray[np.int64]
    events: list[Event]  # in order of frames; the only part that a worker must walk in Python
    skipped: int  # frames without anything new

    def is_new(self, first: int, end: int) -> bool:
        """Whether any value of these frames was scored."""
        return bool((self.component[self.starts[first] : self.starts[end]] >= 0).any())


def frame_starts(widths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Starts of frames with so many values each, as `score` wants them: int64[n + 1]."""
    starts = np.zeros(len(widths) + 1, dtype=np.int64)
    np.cumsum(widths, out=starts[1:])
    return starts


class Detector:
    """Holds the state of all machines of one worker.  Not thread-safe: one owner, one batch at a time."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config or Config()
        self._config = self.config.vector()
        self._places: NDArray[np.int64] = np.zeros((8, 3), dtype=np.int64)  # first row, width, first joint field
        self._machines: Floats = np.zeros((8, layout.MACHINE_FIELDS))
        self._series: Floats = np.zeros((64, layout.SERIES_FIELDS))
        self._joint: Floats = np.zeros(1024)
        self._slots = self._rows = self._joint_fields = 0
        self._free: list[_Room] = []

    def __len__(self) -> int:
        return self._slots

    def width(self, slot: int) -> int:
        return int(self._places[self._checked(slot), 1])

    @property
    def nbytes(self) -> int:
        """Bytes of state in use, without the arrays' spare room."""
        return 8 * (self._rows * layout.SERIES_FIELDS + self._joint_fields + self._slots * (layout.MACHINE_FIELDS + 3))

    def add(self, width: int) -> int:
        """Register a machine of `width` signals and return its slot."""
        if not 1 <= width <= WIDTH_MAX:
            raise ValueError(f"a machine has 1 to {WIDTH_MAX} signals, not {width}")
        slot = self._slots
        self._places = _grown(self._places, slot + 1)
        self._machines = _grown(self._machines, slot + 1)
        self._slots += 1
        row, joint = self._room(width)
        self._places[slot] = row, width, joint
        return slot

    def widen(self, slot: int, width: int) -> None:
        """Append signals to a machine; the state of the ones it has is kept."""
        row, had, joint = (int(x) for x in self._places[self._checked(slot)])
        if not had <= width <= WIDTH_MAX:
            raise ValueError(f"a machine grows from {had} to at most {WIDTH_MAX} signals, not to {width}")
        if width == had:
            return
        new_row, new_joint = self._room(width)
        self._series[new_row : new_row + had] = self._series[row : row + had]
        for block in range(0, had, layout.BLOCK):
            old_k, new_k = min(layout.BLOCK, had - block), min(layout.BLOCK, width - block)
            offset = block // layout.BLOCK * int(layout.block_size(layout.BLOCK))
            _widen_block(self._joint[joint + offset :], old_k, self._joint[new_joint + offset :], new_k)
        self._places[slot] = new_row, width, new_joint
        self._release(row, joint, had)

    def score(
        self,
        slots: NDArray[np.int32],
        times_us: NDArray[np.int64],
        values: Floats,
        starts: NDArray[np.int64] | None = None,
    ) -> Scores:
        """Score frames in the order given and learn from them.

        slots: int32[n], machines in any mixture; times_us: int64[n], rising per machine, microseconds since 1970;
        values: float64[total], the frames' values one after the other (a times x signals matrix is its `ravel()`),
        NaN where a signal is absent; starts: int64[n + 1], frame i is values[starts[i]:starts[i + 1]].  Without
        `starts` every frame has its machine's full width.  A shorter frame lacks the machine's last signals: they
        are not touched.  A frame longer than its machine raises ValueError.

        Each signal has its own clock: a value that is not newer than the signal's last one is passed over, and its scores
        are 0.  A frame without any newer value is skipped and counted.
        """
        slots = np.ascontiguousarray(slots, dtype=np.int32)
        times_us = np.ascontiguousarray(times_us, dtype=np.int64)
        values = np.ascontiguousarray(values, dtype=np.float64).reshape(-1)
        n, total = len(slots), len(values)
        if n and not 0 <= int(slots.min()) <= int(slots.max()) < self._slots:
            raise ValueError("a frame names a slot that was never added")
        widths = self._places[slots, 1]
        starts = frame_starts(widths) if starts is None else np.ascontiguousarray(starts, dtype=np.int64)
        if len(times_us) != n or len(starts) != n + 1 or starts[0] != 0 or starts[-1] != total:
            raise ValueError("slots, times, starts and values do not fit together")
        lengths = np.diff(starts)
        if np.any(lengths > widths) or np.any(lengths < 0):
            raise ValueError("a frame has more values than its machine has signals")

        scores = Scores(
            onset=np.empty(total),
            state=np.empty(total),
            component=np.empty(total, dtype=np.int8),
            joint_onset=np.empty(n),
            joint_state=np.empty(n),
            share=np.empty(total),
            starts=starts,
            events=[],
            skipped=0,
        )
        events = np.empty((total + n, layout.EVENT_FIELDS))  # a value or a frame begins or ends at most one alarm
        n_events, skipped = frames.score_frames(
            self._config, slots, times_us, starts, values, self._places, self._machines, self._series, self._joint,
            scores.onset, scores.state, scores.component, scores.joint_onset, scores.joint_state, scores.share, events,
        )  # fmt: skip
        object.__setattr__(scores, "skipped", int(skipped))
        scores.events.extend(_event(row) for row in events[:n_events].tolist())
        return scores

    def sensitivity(self, slot: int, signal: int, offset: float) -> float:
        """Move one signal's threshold (-1: the machine's joint one) by feedback; bounded, saved with the state.

        Positive is less sensitive.  Moves only the threshold, never what is learned.  Returns the offset in force.
        """
        row, width, _ = self._places[self._checked(slot)]
        if not -1 <= signal < width:
            raise ValueError(f"the machine has no signal {signal}")
        bounded = float(min(max(offset, OFFSET_MIN), OFFSET_MAX))
        if signal < 0:
            self._machines[slot, layout.MACHINE_OFFSET] = bounded
        else:
            self._series[row + signal, layout.ROW_OFFSET] = bounded
        return bounded

    def active_us(self, slot: int, signal: int) -> int | None:
        """When the alarm that lasts on the signal (-1: on several together) started; None: there is none."""
        row, width, _ = self._places[self._checked(slot)]
        if not -1 <= signal < width:
            raise ValueError(f"the machine has no signal {signal}")
        field = (
            self._machines[slot, layout.MACHINE_ALARM_US]
            if signal < 0
            else self._series[row + signal, layout.ROW_ALARM_US]
        )
        return int(field) or None

    def forget(self, slot: int, signal: int) -> None:
        """Learn one signal anew from the next value on, and how it goes together with the others; its threshold stays.

        Alarms that last are forgotten too: ask `active_us` first.
        """
        row, width, joint = (int(x) for x in self._places[self._checked(slot)])
        if not 0 <= signal < width:
            raise ValueError(f"the machine has no signal {signal}")
        kept = [layout.ROW_OFFSET, layout.ROW_LAST_US, layout.ROW_BEHIND_US]
        before = self._series[row + signal, kept]
        self._series[row + signal] = 0.0
        self._series[row + signal, kept] = before
        lo = signal // layout.BLOCK * layout.BLOCK
        at = joint + lo // layout.BLOCK * int(layout.block_size(layout.BLOCK))
        self._joint[at : at + int(layout.block_size(min(layout.BLOCK, width - lo)))] = 0.0
        self._machines[slot, layout.MACHINE_ALARM_US] = 0.0

    def forget_clock(self, slot: int) -> None:
        """Take whatever time comes next; the machine's pace is learned anew."""
        self._set_clock(slot, 0)
        for field in (layout.MACHINE_FRAMES, layout.MACHINE_INTERVAL_US):
            self._machines[slot, field] = 0.0

    def follow_clock(self, slot: int, time_us: int, received_us: int, *, is_new: bool) -> bool:
        """Take note of frames until `time_us`, of which some was new or nothing; true: their clock counts from here on.

        A clock that was put back goes on at the pace of the hub's, without any newer frame, for CLOCK_WAIT_US. History that is
        sent again or late is faster, or newer frames come beside it.
        """
        # The time of the first frame that was behind stands with the machine's first signal, where there was room.
        machine, first = self._machines[self._checked(slot)], self._series[self._places[slot, 0]]
        began_us, since_us = first[layout.ROW_BEHIND_US], machine[layout.MACHINE_BEHIND_SINCE_US]
        if is_new:
            machine[layout.MACHINE_BEHIND_SINCE_US] = 0.0
            return False
        waited_us, went_us = received_us - since_us, time_us - began_us
        if not since_us or not 0.0 <= went_us <= CLOCK_PACE_MAX * max(waited_us, CLOCK_WAIT_US / 10):
            first[layout.ROW_BEHIND_US], machine[layout.MACHINE_BEHIND_SINCE_US] = time_us, received_us
            return False
        if waited_us < CLOCK_WAIT_US or went_us < CLOCK_WAIT_US / CLOCK_PACE_MAX:
            return False
        self._set_clock(slot, time_us)
        return True

    def is_behind(self, slot: int) -> bool:
        """Whether the machine's newest frames brought nothing new."""
        return bool(self._machines[self._checked(slot), layout.MACHINE_BEHIND_SINCE_US])

    def _set_clock(self, slot: int, time_us: int) -> None:
        row, width, _ = (int(x) for x in self._places[self._checked(slot)])
        self._machines[slot, layout.MACHINE_LAST_US] = time_us
        self._machines[slot, layout.MACHINE_BEHIND_SINCE_US] = 0.0
        self._series[row : row + width, layout.ROW_LAST_US] = time_us

    def last_time_us(self, slot: int) -> int | None:
        """Time of the newest frame that was scored."""
        machine = self._machines[self._checked(slot)]
        return int(machine[layout.MACHINE_LAST_US]) if machine[layout.MACHINE_FRAMES] else None

    def dump(self, slot: int) -> bytes:
        """Everything known about one machine; `load` continues from it with equal bits."""
        row, width, joint = (int(x) for x in self._places[self._checked(slot)])
        size = layout.joint_size(width)
        header = _HEADER.pack(_MAGIC, STATE_VERSION, width, layout.SERIES_FIELDS, size)
        parts = (self._machines[slot], self._series[row : row + width], self._joint[joint : joint + size])
        return header + b"".join(part.tobytes() for part in parts)

    def load(self, slot: int, data: bytes) -> None:
        """Replace a machine's state by a dumped one; the slot widens to the dump's width if it has fewer signals.

        A state of version 1 is read too.  Raises StateError, and changes nothing, if the data are damaged, of a later
        version or of a wider machine than the slot may hold.
        """
        self._checked(slot)
        if len(data) < _HEADER.size:
            raise StateError("the saved state is cut short")
        magic, version, width, fields, size = _HEADER.unpack_from(data)
        if magic != _MAGIC or fields != _FIELDS.get(version):
            raise StateError(f"the saved state has version {version}, this detector reads up to {STATE_VERSION}")
        expected = _HEADER.size + 8 * (layout.MACHINE_FIELDS + width * fields + size)
        if not 1 <= width <= WIDTH_MAX or size != layout.joint_size(width) or len(data) != expected:
            raise StateError("the saved state is damaged")
        had = self.width(slot)
        row, _, joint = (int(x) for x in self._places[slot])
        if had != width:
            self._release(row, joint, had)
            row, joint = self._room(width)
            self._places[slot] = row, width, joint
        state = np.frombuffer(data, dtype=np.float64, offset=_HEADER.size)
        machine, series, block = np.split(state, [layout.MACHINE_FIELDS, len(state) - size])
        self._machines[slot] = machine
        now = _as_now(version, series.reshape(width, fields))
        # From before a signal had a clock of its own.
        unclocked = (now[:, layout.ROW_LAST_US] == 0.0) & (now[:, layout.ROW_N] > 0.0)
        now[unclocked, layout.ROW_LAST_US] = machine[layout.MACHINE_LAST_US]
        self._series[row : row + width] = now
        self._joint[joint : joint + size] = block if np.isfinite(block).all() else 0.0
        if had > width:
            self.widen(slot, had)

    def _checked(self, slot: int) -> int:
        if not 0 <= slot < self._slots:
            raise ValueError(f"slot {slot} was never added")
        return slot

    def _room(self, width: int) -> tuple[int, int]:
        """Zeroed series rows and joint fields for `width` signals: (first row, first joint field)."""
        size = layout.joint_size(width)
        for room in self._free:
            if room.width == width:
                self._free.remove(room)
                self._series[room.row : room.row + width] = 0.0
                self._joint[room.joint : room.joint + size] = 0.0
                return room.row, room.joint
        row, joint = self._rows, self._joint_fields
        self._rows += width
        self._joint_fields += size
        self._series = _grown(self._series, self._rows)
        self._joint = _grown(self._joint, self._joint_fields)
        return row, joint

    def _release(self, row: int, joint: int, width: int) -> None:
        self._free.append(_Room(row, joint, width))


@dataclass(frozen=True)
class _Room:
    """Rows that a widened machine left behind."""

    row: int
    joint: int
    width: int


def _widen_block(old: Floats, old_k: int, new: Floats, new_k: int) -> None:
    """Copy the joint state of old_k signals into the zeroed block of new_k; packed rows keep their order."""
    head, per_signal = layout.JOINT_HEAD, layout.JOINT_PER_SIGNAL
    new[:head] = old[:head]
    for part in range(per_signal):
        at, was = head + part * new_k, head + part * old_k
        new[at : at + old_k] = old[was : was + old_k]
    packed = old_k * (old_k + 1) // 2
    for half in range(2):  # the covariance, then its factor
        at = head + per_signal * new_k + half * (new_k * (new_k + 1) // 2)
        was = head + per_signal * old_k + half * packed
        new[at : at + packed] = old[was : was + packed]
    if new_k > old_k:
        new[layout.JOINT_N] = 0.0  # covariances with the new signals are unknown: warm up again


def _as_now(version: int, series: Floats) -> Floats:
    """A copy as of this version. Of version 1 levels, ranges and alarms go on, changes and periods are learned from here on."""
    if version == STATE_VERSION:
        now = series.copy()
        # Values beyond measure could make these, once; such a series learns anew.
        lost = ~np.isfinite(now[:, (layout.ROW_MEAN, layout.ROW_VAR)]).all(axis=1)
        now[lost] = 0.0
        now[lost, layout.ROW_OFFSET] = series[lost, layout.ROW_OFFSET]
        return now
    now = np.zeros((len(series), layout.SERIES_FIELDS))
    now[:, : layout.CHANGE_BASE] = series[:, : layout.CHANGE_BASE]
    for base, bins in ((layout.WEEK_BASE, layout.WEEK_BINS), (layout.CYCLE_BASE, layout.CYCLE_BINS)):
        now[:, base + layout.SEASON_BIN] = -1.0
        now[:, base + layout.SEASON_HEAD : base + layout.SEASON_HEAD + bins] = np.nan
    return now


def _event(row: list[float]) -> Event:
    frame, signal, raised, component, time_us, started_us, score, value, expected, spread, distance, samples = row[:12]
    period_us, lead, lead_share, second, second_share = row[12:]
    return Event(
        int(frame), int(signal), bool(raised), int(component), int(time_us), int(started_us), score, value, expected,
        spread, distance, int(samples), int(period_us), int(lead), lead_share, int(second), second_share,
    )  # fmt: skip


def _grown(array: NDArray[Scalar], rows: int) -> NDArray[Scalar]:
    """The same array, or a copy of at least `rows` rows with half as many to spare; new rows are zero."""
    if rows <= len(array):
        return array
    wider = np.zeros((rows + rows // 2, *array.shape[1:]), dtype=array.dtype)
    wider[: len(array)] = array
    return wider
