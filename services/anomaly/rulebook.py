"""Rules that firms wrote, evaluated over whole batches: one compiled pass over the values that some rule looks at."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.anomaly.detector import WIDTH_MAX
from services.anomaly.kernel.compiling import compiled
from services.anomaly.tunings import MACHINE_POSITION, Rule, RuleKind

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# Machine and channel group.
Key = tuple[int, int]

_KINDS = tuple(RuleKind)
_ABOVE, _BELOW, _RISE, _FALL, _NO_DATA = range(len(_KINDS))
_P_KIND, _P_LIMIT, _P_HYSTERESIS, _P_DELAY_US, _P_WINDOW_US, _P_COLUMN = range(6)
_PARAMETERS = 6
_LAST_US, _PENDING_US, _ALARM_US, _RECEIVED_US = range(4)
_BUCKETS = 8  # a window of time is followed in so many parts
_BUCKET_BASE = 4  # number of the part, least and greatest value in it, for each
_STATE = _BUCKET_BASE + 3 * _BUCKETS
_W_RULE, _W_VALUE, _W_WIDTH, _W_ROWS, _W_TIME, _W_RECEIVED = range(6)
_EVENT = 6  # piece of work, raised, time, start, value, what it is compared with
_SAVED = struct.Struct(f"<16si{_STATE}d")

# A rule that begins and ends without a pause tells of the same trouble: so much sample time lies between two beginnings.
AGAIN_US = 60_000_000
# Of one rule in one batch, which may be years of history.
RAISED_MAX = 200

# The clock that says when nothing has come may be so far from the door's, and a record so long under way.
SILENCE_GRACE_US = 5_000_000


@dataclass(frozen=True)
class RuleEvent:
    """A rule's condition began or ended."""

    rule: Rule
    raised: bool
    time_us: int
    started_us: int
    value: float
    reference: float  # what the value was compared with


@compiled
def _extreme(state: Floats, bucket: float, least: bool, x: float) -> float:
    """Least (greatest) value of the window, with x; its part of the window learns x."""
    found = x
    for i in range(_BUCKETS):
        at = _BUCKET_BASE + 3 * i
        if state[at] > bucket - _BUCKETS and state[at] > 0.0:
            found = min(found, state[at + 1]) if least else max(found, state[at + 2])
    at = _BUCKET_BASE + 3 * int(bucket % _BUCKETS)
    if state[at] != bucket:
        state[at] = bucket
        state[at + 1] = state[at + 2] = x
    else:
        state[at + 1] = min(state[at + 1], x)
        state[at + 2] = max(state[at + 2], x)
    return found


@compiled
def _note(
    events: Floats, n: int, work: int, raised: float, t: float, started: float, x: float, reference: float
) -> int:
    if n < len(events):
        row = events[n]
        row[0], row[1], row[2], row[3], row[4], row[5] = work, raised, t, started, x, reference
    return n + 1


@compiled
def _evaluate(parameters: Floats, states: Floats, work: Ints, times_us: Ints, values: Floats, events: Floats) -> int:
    """Evaluate pieces of work (one rule, one batch) in order; returns the number of events, which may be more than there is room
    for."""
    n = 0
    for w in range(len(work)):
        rule = work[w, _W_RULE]
        p, s = parameters[rule], states[rule]
        kind, limit, hysteresis, window = int(p[_P_KIND]), p[_P_LIMIT], p[_P_HYSTERESIS], p[_P_WINDOW_US]
        column, width = int(p[_P_COLUMN]), work[w, _W_WIDTH]
        if column >= width:
            continue
        received = float(work[w, _W_RECEIVED])
        raised = 0
        heard = False
        for r in range(work[w, _W_ROWS]):
            x = values[work[w, _W_VALUE] + r * width + column] if column >= 0 else 0.0
            if np.isnan(x):
                continue
            t = float(times_us[work[w, _W_TIME] + r])
            if kind == _NO_DATA:
                if not heard and s[_RECEIVED_US] > 0.0 and s[_LAST_US] > 0.0:
                    silent = received - s[_RECEIVED_US]
                    if silent > window:
                        n = _note(events, n, w, 1.0, s[_LAST_US], s[_LAST_US], np.nan, silent)
                    # The hub's clock may have said so already, a little before the records did.
                    if silent > 0.5 * window:
                        n = _note(events, n, w, 0.0, t, s[_LAST_US], np.nan, silent)
                heard = True
                s[_LAST_US] = max(s[_LAST_US], t)
                continue
            if t <= s[_LAST_US]:
                continue
            s[_LAST_US] = t
            reference = limit
            if kind == _ABOVE:
                beyond = x - limit
            elif kind == _BELOW:
                beyond = limit - x
            else:
                bucket = np.floor(t / (window / _BUCKETS))
                reference = _extreme(s, bucket, kind == _RISE, x)
                beyond = abs(x - reference) - limit
            if s[_ALARM_US] <= 0.0:  # none; below 0: when the last one began
                if beyond <= 0.0:
                    s[_PENDING_US] = 0.0
                    continue
                if s[_PENDING_US] == 0.0:
                    s[_PENDING_US] = t
                waited = s[_ALARM_US] == 0.0 or t + s[_ALARM_US] >= AGAIN_US
                if t - s[_PENDING_US] >= p[_P_DELAY_US] and waited and raised < RAISED_MAX:
                    raised += 1
                    s[_ALARM_US] = s[_PENDING_US]
                    n = _note(events, n, w, 1.0, t, s[_ALARM_US], x, reference)
            elif beyond <= -hysteresis:
                n = _note(events, n, w, 0.0, t, s[_ALARM_US], x, reference)
                s[_ALARM_US], s[_PENDING_US] = -s[_ALARM_US], 0.0
        if heard:
            s[_RECEIVED_US] = max(s[_RECEIVED_US], received)
    return n


class RuleBook:
    """The rules in force in one partition and where each stands. In memory only; dumped and loaded with its machine's state."""

    def __init__(self) -> None:
        self._rules: dict[str, int] = {}
        self._rows: list[Rule | None] = []
        self._free: list[int] = []
        self._of_key: dict[Key, list[int]] = {}
        self._parameters: Floats = np.zeros((8, _PARAMETERS))
        self._states: Floats = np.zeros((8, _STATE))
        # Loaded with a machine, for rules that are not in force yet in a replay.
        self._saved: dict[Key, dict[str, tuple[int, Floats]]] = {}

    def __len__(self) -> int:
        return len(self._rules)

    def set(self, rule: Rule, *, last_us: int, made_us: int, saved: bool) -> None:
        """Put a rule into force, in place of its version before. `saved`: go on from the loaded state, if it is of this version.

        `last_us`: time of the machine's newest sample, 0 if there is none. Silence counts from `made_us` at the earliest.
        """
        self.remove(rule.id)
        row = self._free.pop() if self._free else len(self._rows)
        if row == len(self._rows):
            self._rows.append(None)
            if row >= len(self._parameters):
                self._parameters = np.vstack([self._parameters, np.zeros_like(self._parameters)])
                self._states = np.vstack([self._states, np.zeros_like(self._states)])
        key, column = place(rule)
        self._rows[row] = rule
        self._rules[rule.id] = row
        self._of_key.setdefault(key, []).append(row)
        self._parameters[row] = (
            _KINDS.index(rule.kind), rule.limit, rule.hysteresis, rule.delay_s * 1e6, rule.window_s * 1e6, column,
        )  # fmt: skip
        self._states[row] = 0.0
        version, state = self._saved.get(key, {}).get(rule.id, (0, None))
        if saved and state is not None and version == rule.version:
            self._states[row] = state
        elif rule.kind is RuleKind.NO_DATA and last_us:
            self._states[row, _LAST_US], self._states[row, _RECEIVED_US] = last_us, made_us

    def remove(self, rule_id: str) -> None:
        row = self._rules.pop(rule_id, None)
        if row is None:
            return
        rule = self._rows[row]
        assert rule is not None
        self._rows[row] = None
        self._free.append(row)
        key, _ = place(rule)
        self._of_key[key].remove(row)
        if not self._of_key[key]:
            del self._of_key[key]

    def active(self, rule_id: str) -> RuleEvent | None:
        """The end of the rule's alarm that lasts, at the newest sample; None: there is none."""
        row = self._rules.get(rule_id)
        rule = None if row is None else self._rows[row]
        if row is None or rule is None or not self._states[row, _LAST_US]:
            return None
        last_us, started_us = int(self._states[row, _LAST_US]), int(self._states[row, _ALARM_US])
        if rule.kind is RuleKind.NO_DATA:
            started_us = last_us  # the clock may have said so; ending what never began does nothing
        return RuleEvent(rule, False, last_us, started_us, np.nan, np.nan) if started_us > 0 else None

    def evaluate(
        self,
        keys: Sequence[Key],
        received_us: Sequence[int],
        lengths: Ints,
        widths: Ints,
        times_us: Ints,
        values: Floats,
    ) -> list[tuple[int, RuleEvent]]:
        """What the rules find in batches that lie one behind the other in `times_us` and `values`, each with its batch's number."""
        if not self._of_key:
            return []
        pieces = [(number, row) for number, key in enumerate(keys) for row in self._of_key.get(key, ())]
        if not pieces:
            return []
        numbers = np.array([number for number, _ in pieces])
        first_time, first_value = np.cumsum(lengths) - lengths, np.cumsum(lengths * widths) - lengths * widths
        work = np.empty((len(pieces), 6), dtype=np.int64)
        work[:, _W_RULE] = [row for _, row in pieces]
        work[:, _W_VALUE], work[:, _W_TIME] = first_value[numbers], first_time[numbers]
        work[:, _W_WIDTH], work[:, _W_ROWS] = widths[numbers], lengths[numbers]
        work[:, _W_RECEIVED] = np.array(received_us, dtype=np.int64)[numbers]
        # A row begins or ends at most one alarm; one may have lasted before; silence is at most both of one, in a batch.
        events = np.empty((int(np.minimum(work[:, _W_ROWS], 2 * RAISED_MAX + 1).sum()) + 2 * len(work), _EVENT))
        count = _evaluate(self._parameters, self._states, work, times_us, values, events)
        found = []
        for piece, raised, time, started, value, reference in events[:count].tolist():
            number, row = pieces[int(piece)]
            rule = self._rows[row]
            assert rule is not None
            found.append((number, RuleEvent(rule, bool(raised), int(time), int(started), value, reference)))
        return found

    def silences(self, now_us: int) -> Iterator[RuleEvent]:
        """Machines and signals of which nothing has come for too long, if everything that the door took has been seen."""
        for row, rule in enumerate(self._rows):
            if rule is None or rule.kind is not RuleKind.NO_DATA:
                continue
            last_us, received_us = int(self._states[row, _LAST_US]), int(self._states[row, _RECEIVED_US])
            if last_us and received_us and now_us - received_us > rule.silence_us + SILENCE_GRACE_US:
                yield RuleEvent(rule, True, last_us, last_us, np.nan, float(now_us - received_us))

    def set_clock(self, key: Key, time_us: int) -> None:
        """Samples of the machine count from this time on (0: from the next one on), though later ones have come before."""
        for row in self._of_key.get(key, ()):
            rule, state = self._rows[row], self._states[row]
            if rule is None or (rule.kind is RuleKind.NO_DATA and not time_us):
                continue  # silence is measured by the hub's clock
            state[_LAST_US], state[_PENDING_US], state[_ALARM_US] = time_us, 0.0, max(0.0, state[_ALARM_US])
            state[_BUCKET_BASE:] = 0.0

    def dump(self, key: Key) -> bytes:
        """Where the rules of a machine's channel group stand."""
        parts = []
        for row in self._of_key.get(key, ()):
            rule = self._rows[row]
            assert rule is not None
            parts.append((rule.id, _SAVED.pack(bytes.fromhex(rule.id), rule.version, *self._states[row].tolist())))
        return b"".join(part for _, part in sorted(parts))

    def load(self, key: Key, data: bytes) -> None:
        """Keep a dump for the rules that are put into force with `saved`. One of another release is left aside."""
        if len(data) % _SAVED.size:
            return
        held = self._saved.setdefault(key, {})
        for id_, version, *state in _SAVED.iter_unpack(data):
            held[id_.hex()] = version, np.array(state)


def place(rule: Rule) -> tuple[Key, int]:
    """Where its values are: machine and channel group, and the column there (-1: any)."""
    if rule.position == MACHINE_POSITION:
        return (rule.machine_id, 0), -1
    group, column = divmod(rule.position, WIDTH_MAX)
    return (rule.machine_id, group), column
