"""InfluxDB line protocol: text in, one columnar batch a machine out, and what could not be read with its reason.

Grammar: https://docs.influxdata.com/influxdb/v2/reference/syntax/line-protocol/. Lines of one form (the same measurement, tags and
field names) are collected and converted column by column; only what has escapes, texts or mistakes is read piece by piece.

Machine: the tag `machine` (path or id), else the measurement as a path. Signal: the field's name if the machine has such a signal,
else `measurement.field` if it has that.
"""

import functools
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from services.ingest.domain import Reason
from services.ingest.telemetry.frames import RAW_BYTES_MAX
from smdih.ingest.v1 import telemetry_pb2

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# Numerator and denominator to microseconds; "n" and "u" are what version 1 of the write call names them.
PRECISIONS: Final = {
    "ns": (1, 1000),
    "n": (1, 1000),
    "us": (1, 1),
    "u": (1, 1),
    "ms": (1000, 1),
    "s": (1_000_000, 1),
}
# A machine's lines of several forms become one matrix as long as that does not hold many more cells than samples.
CELLS_PER_SAMPLE_MAX = 4
# Keeps a batch of few fields for a machine of very many signals small once it is spread over all of them.
ROWS_PER_BATCH_MAX = 500
# A pattern makes reading a form's lines fast but costs as much as some hundred lines.
PATTERNS_MAX = 100
# Over requests: the machines of a plant write the same fields again and again.
PATTERNS_KEPT = 1_000
PATTERN_FIELDS_MAX = 500
# A form or a fault costs as much time as some hundred samples; these bound what one body can cost.
FORMS_MAX = 10_000
FAULTS_MAX = 10_000

_INT64_MAX = 2**63 - 1
_TRUE = dict.fromkeys((b"t", b"T", b"true", b"True", b"TRUE"), 1.0)
_BOOLEANS = _TRUE | dict.fromkeys((b"f", b"F", b"false", b"False", b"FALSE"), 0.0)

_NOT_SEPARATORS = bytes(set(range(256)) - set(b"=,"))
_TIME = re.compile(rb"[+-]?[0-9]{1,19}")
_FLOAT = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:nan|inf|infinity)", re.I)
_INTEGER = re.compile(rb"[+-]?[0-9]{1,20}[iu]")

# The possessive ++ and *+ never go back: time grows with the length, whatever the bytes.
_HEAD = re.compile(rb"(?:[^ \n]|(?<=\\) )++")
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_FIELD = re.compile(rb"((?:[^,= ]|(?<=\\)[,= ])++)=(" + _STRING + rb'|[^," ]*+)', re.S)
# Behind the head: a string value may hold line ends.
_TAIL = re.compile(rb'(?:[^"\n]++|(?<!=)"|(?<==)' + _STRING + rb")*+(?=\n|\Z)", re.S)
_COMMA = re.compile(rb"(?<!\\),")
_EQUALS = re.compile(rb"(?<!\\)=")
_ESCAPED = re.compile(rb"\\([,= ])")

SignalsOf: TypeAlias = Callable[[int, str], Container[str]]


@dataclass(frozen=True)
class Fault:
    """Something that did not become a sample. `samples`: 0 where a whole line could not be read."""

    line: int
    reason: str
    detail: str
    samples: int
    raw: bytes


@dataclass(frozen=True)
class Block:
    """Lines of one form: times x fields; NaN with `present` false where there is nothing."""

    machine: str
    measurement: str
    fields: tuple[str, ...]
    times_us: Ints
    values: Floats
    present: Bools | None


@dataclass(frozen=True)
class Reading:
    blocks: list[Block]
    faults: list[Fault]


class TooMany(Exception):
    """The body is too varied or too wrong to be read at once; the message says in what."""


class _Malformed(Exception):
    """The line breaks the grammar; the message says how."""


class _Form:
    """Lines of one form: the same measurement, tags and field names; values still as text."""

    def __init__(self, head: bytes, names: list[bytes]) -> None:
        """Raises _Malformed."""
        self.head = head
        self.names = names
        self.machine, self.measurement = _machine(head)
        self.fields = _fields(tuple(names))
        self.lines: list[int] = []
        # Row by row: the values, then the time.
        self.cells: list[bytes] = []
        # Matches what stands behind the head in most lines of this form; made when the form is met again.
        self.pattern: re.Pattern[bytes] | None = None

    def column(self, number: int) -> list[bytes]:
        return self.cells[number :: len(self.fields) + 1]


def read(body: bytes, *, precision: str, now_us: int) -> Reading:
    """Read a body. `precision` is one of PRECISIONS; a line without a time gets `now_us`.

    Raises TooMany, and nothing else whatever the bytes.
    """
    if b"\r" in body:
        body = body.replace(b"\r\n", b"\n")
    if b'"' in body:
        lines, numbers = _logical_lines(body)
    else:
        lines, numbers = body.split(b"\n"), None
    return _Reader(lines, numbers, precision, now_us).reading()


class _Reader:
    def __init__(self, lines: list[bytes], numbers: list[int] | None, precision: str, now_us: int) -> None:
        self._lines = lines
        self._numbers = numbers
        self._factor, self._divisor = PRECISIONS[precision]
        self._now_us = now_us
        self._forms: dict[tuple[bytes, tuple[bytes, ...]], _Form] = {}
        self._faults: list[Fault] = []

    def reading(self) -> Reading:
        self._collect()
        blocks = [block for form in self._forms.values() if (block := self._block(form)) is not None]
        return Reading(blocks, sorted(self._faults, key=lambda fault: fault.line))

    def _collect(self) -> None:
        latest: dict[bytes, _Form] = {}
        patterns = 0
        for index, line in enumerate(self._lines):
            head, _, rest = line.partition(b" ")
            form = latest.get(head)
            if form is not None:
                if form.pattern is None and patterns < PATTERNS_MAX and len(form.fields) <= PATTERN_FIELDS_MAX:
                    form.pattern, patterns = _pattern(tuple(form.names)), patterns + 1
                match = form.pattern and form.pattern.fullmatch(rest)
                if match:
                    form.cells += match.groups()
                    form.lines.append(index)
                    continue
            form = self._add_by_splitting(index, head, rest) or self._add_by_grammar(index)
            if form is not None and form.head == head:
                latest[head] = form

    def _add_by_splitting(self, index: int, head: bytes, rest: bytes) -> _Form | None:
        """A line without escapes, texts and odd spaces, and with a time; None for any other, which is then not taken."""
        fields, _, time = rest.partition(b" ")
        pieces = fields.replace(b"=", b",").split(b",")
        # The separators alone have to read =,=,= : otherwise the pieces do not alternate between names and values.
        separators = fields.translate(None, _NOT_SEPARATORS)
        if len(pieces) & 1 or separators != b"=" + b",=" * (len(pieces) // 2 - 1):
            return None
        if not time.isdigit() or b"\\" in rest or b'"' in rest or head[-1:] in b"\\" or head[:1] == b"#":
            return None
        names = pieces[::2]
        try:
            form = self._form(head, names)
        except _Malformed:
            return None
        form.cells += pieces[1::2]
        form.cells.append(time)
        form.lines.append(index)
        return form

    def _add_by_grammar(self, index: int) -> _Form | None:
        line = self._lines[index].strip(b" \r\t")
        if not line or line[:1] == b"#":
            return None
        try:
            head, names, values, time = _pieces(line)
            form = self._form(head, names)
        except _Malformed as error:
            self._fault(index, Reason.MALFORMED, str(error))
            return None
        form.cells += values
        form.cells.append(time)
        form.lines.append(index)
        return form

    def _form(self, head: bytes, names: list[bytes]) -> _Form:
        """Raises _Malformed."""
        key = (head, tuple(names))
        form = self._forms.get(key)
        if form is None:
            if len(self._forms) >= FORMS_MAX:
                raise TooMany(f"more than {FORMS_MAX} different combinations of measurement, tags and fields")
            form = self._forms[key] = _Form(head, names)
        return form

    def _block(self, form: _Form) -> Block | None:
        times, whole = self._times(form)
        values, present = self._values(form, whole)
        if not whole.all():
            times, values = times[whole], values[whole]
            present = None if present is None else present[whole]
        if present is not None and not present.any(axis=1).all():
            some = present.any(axis=1)
            times, values, present = times[some], values[some], present[some]
        if not len(times):
            return None
        return Block(form.machine, form.measurement, form.fields, times, values, present)

    def _times(self, form: _Form) -> tuple[Ints, Bools]:
        """Times in microseconds, and which rows have one that can be used."""
        written = form.column(len(form.fields))
        whole = np.ones(len(written), dtype=bool)
        if b"" not in written and max(map(len, written)) <= 19 and b"".join(written).isdigit():
            numbers = list(map(int, written))
            if max(numbers) <= _INT64_MAX // self._factor:
                return np.array(numbers, dtype=np.int64) * self._factor // self._divisor, whole
        times = []
        for row, text in enumerate(written):
            time_us = self._now_us
            if text:
                if not _TIME.fullmatch(text):
                    whole[row] = False
                    detail = f"the timestamp {_shown(text)} is not a whole number"
                    self._fault(form.lines[row], Reason.MALFORMED, detail)
                else:
                    time_us = int(text) * self._factor // self._divisor
                    if not -_INT64_MAX <= time_us <= _INT64_MAX:
                        whole[row], time_us = False, 0
                        detail = f"the timestamp {_shown(text)} is far from now; check `precision`"
                        self._fault(form.lines[row], Reason.TIME_OUT_OF_WINDOW, detail, len(form.fields))
            times.append(time_us)
        return np.array(times, dtype=np.int64), whole

    def _values(self, form: _Form, whole: Bools) -> tuple[Floats, Bools | None]:
        """Values, and which cells hold one (None: all); clears `whole` for rows with one that cannot be read."""
        rows, columns = len(form.lines), len(form.fields)
        floats = _floats(form.cells)  # with the times between them, which are numbers too
        if floats is not None:
            return np.array(floats).reshape(rows, columns + 1)[:, :columns], None
        values = np.zeros((rows, columns))
        present: Bools | None = None
        texts: dict[int, list[str]] = {}
        for column in range(columns):
            written = form.column(column)
            numbers = _floats(written) or _integers(written) or _booleans(written)
            if numbers is not None:
                values[:, column] = numbers
                continue
            for row, text in enumerate(written):
                number = _number(text)
                if number is not None:
                    values[row, column] = number
                    continue
                if present is None:
                    present = np.ones((rows, columns), dtype=bool)
                present[row, column] = False
                if not whole[row]:
                    continue
                if text[:1] == b'"':
                    texts.setdefault(row, []).append(form.fields[column])
                else:
                    whole[row] = False
                    named = _shown(form.fields[column].encode())
                    detail = f"the field {named} is {_shown(text)}, which is no number, boolean or text"
                    self._fault(form.lines[row], Reason.MALFORMED, detail)
        for row, named_fields in texts.items():
            if whole[row]:
                named = ", ".join(_shown(field.encode()) for field in named_fields[:5])
                detail = f"a text in {named}; the hub stores numbers"
                self._fault(form.lines[row], Reason.WRONG_TYPE, detail, len(named_fields))
        return values, present

    def _fault(self, index: int, reason: str, detail: str, samples: int = 0) -> None:
        if len(self._faults) >= FAULTS_MAX:
            raise TooMany(f"more than {FAULTS_MAX} lines that cannot be stored as they are")
        number = index + 1 if self._numbers is None else self._numbers[index]
        self._faults.append(Fault(number, reason, detail, samples, self._lines[index]))


def batches(blocks: Sequence[Block], signals_of: SignalsOf) -> list[telemetry_pb2.Batch]:
    """One batch a machine (more where it has very many rows, or forms that do not share times), in order of time.

    `signals_of(machine id, machine path)` tells the names of a machine's signals.
    """
    by_machine: dict[str, list[Block]] = {}
    for block in blocks:
        by_machine.setdefault(block.machine, []).append(block)
    found: list[telemetry_pb2.Batch] = []
    for machine, of_machine in by_machine.items():
        machine_id = int(machine) if machine.isascii() and machine.isdigit() and len(machine) <= 18 else 0
        path = "" if machine_id else machine
        known = signals_of(machine_id, path)
        named = [(_signals(block, known), block) for block in of_machine]
        merged = _merged(named) if len(named) > 1 else None
        parts = [merged] if merged is not None else [(names, *_in_order(block)) for names, block in named]
        for names, times, values, present in parts:
            for start in range(0, len(times), ROWS_PER_BATCH_MAX):
                rows = slice(start, start + ROWS_PER_BATCH_MAX)
                absent = b""
                if present is not None and not present[rows].all():
                    absent = np.packbits(~present[rows].ravel(), bitorder="little").tobytes()
                found.append(
                    telemetry_pb2.Batch(
                        machine_id=machine_id,
                        machine_path=path,
                        times_us=times[rows].tolist(),
                        signals=names,
                        values=values[rows].ravel().tolist(),
                        absent=absent,
                    )
                )
    return found


def by_reason(faults: Sequence[Fault]) -> list[list[Fault]]:
    """Faults for one quarantine record each: of one reason, with as many lines as a record keeps whole."""
    found: list[list[Fault]] = []
    latest: dict[str, tuple[list[Fault], int]] = {}
    for fault in faults:
        together, size = latest.get(fault.reason, ([], RAW_BYTES_MAX))
        size += len(fault.raw) + 1
        if size > RAW_BYTES_MAX:
            together, size = [], len(fault.raw) + 1
            found.append(together)
        together.append(fault)
        latest[fault.reason] = (together, size)
    return found


_Columns: TypeAlias = tuple[list[str], Ints, Floats, Bools | None]


def _signals(block: Block, known: Container[str]) -> list[str]:
    names: list[str] = []
    taken = set(block.fields)
    for field in block.fields:
        longer = f"{block.measurement}.{field}"
        use_longer = field not in known and longer in known and longer not in taken
        names.append(longer if use_longer else field)
    return names


def _in_order(block: Block) -> tuple[Ints, Floats, Bools | None]:
    times, values, present = block.times_us, block.values, block.present
    if len(times) > 1 and (times[1:] < times[:-1]).any():
        order = np.argsort(times, kind="stable")
        times, values = times[order], values[order]
        present = None if present is None else present[order]
    return times, values, present


def _merged(named: Sequence[tuple[list[str], Block]]) -> _Columns | None:
    """Blocks of one machine side by side; None where that would replace a sample or hold mostly nothing."""
    columns: dict[str, int] = {}
    for names, _ in named:
        for name in names:
            columns.setdefault(name, len(columns))
    times, row_of = np.unique(np.concatenate([block.times_us for _, block in named]), return_inverse=True)
    samples = sum(block.values.size for _, block in named)
    if len(times) * len(columns) > CELLS_PER_SAMPLE_MAX * samples:
        return None
    values = np.zeros((len(times), len(columns)))
    present = np.zeros((len(times), len(columns)), dtype=bool)
    start = cells = 0
    for names, block in named:
        rows = row_of[start : start + len(block.times_us)]
        start += len(rows)
        where = (rows[:, None], np.array([columns[name] for name in names])[None, :])
        values[where] = block.values
        present[where] = True
        cells += block.values.size
        if np.count_nonzero(present) != cells:
            return None
    # Only now what a block itself lacks: until here a cell was to be counted once.
    start = 0
    for names, block in named:
        rows = row_of[start : start + len(block.times_us)]
        start += len(rows)
        if block.present is not None:
            present[rows[:, None], np.array([columns[name] for name in names])[None, :]] = block.present
    return list(columns), times, values, None if present.all() else present


def _logical_lines(body: bytes) -> tuple[list[bytes], list[int]]:
    """Lines, those whose strings hold line ends in one piece, and the number at which each begins."""
    lines, numbers = [], []
    at, number = 0, 1
    while at < len(body):
        end = body.find(b"\n", at)
        end = len(body) if end < 0 else end
        if body.find(b'"', at, end) >= 0 and body[at : at + 1] != b"#":
            head = _HEAD.match(body, at)
            tail = _TAIL.match(body, head.end()) if head else None
            # A string that never ends leaves the line as it is, to be refused alone.
            end = tail.end() if tail else end
        line = body[at:end]
        lines.append(line)
        numbers.append(number)
        number += line.count(b"\n") + 1
        at = end + 1
    return lines, numbers


def _pieces(line: bytes) -> tuple[bytes, list[bytes], list[bytes], bytes]:
    """Head, field names (unescaped), values as written, time (empty: none). Raises _Malformed."""
    head = _HEAD.match(line)
    assert head is not None  # the line is stripped and not empty
    at = head.end()
    while line[at : at + 1] == b" ":
        at += 1
    if at == len(line):
        raise _Malformed("there is no field behind the measurement")
    names, values = [], []
    while True:
        field = _FIELD.match(line, at)
        if field is None or not field[2]:
            raise _Malformed(f"a field NAME=VALUE was expected at {_shown(line[at:])}")
        names.append(_ESCAPED.sub(rb"\1", field[1]))
        values.append(field[2])
        at = field.end()
        if line[at : at + 1] != b",":
            break
        at += 1
    if at < len(line) and line[at : at + 1] != b" ":
        raise _Malformed(f"a comma or a space was expected at {_shown(line[at:])}")
    return head[0], names, values, line[at:].strip(b" ")


def _machine(head: bytes) -> tuple[str, str]:
    """Machine and measurement of a head. Raises _Malformed."""
    measurement, *tags = _COMMA.split(head)
    if not measurement:
        raise _Malformed("there is no measurement")
    name = _text(_ESCAPED.sub(rb"\1", measurement), "measurement")
    machine = ""
    for tag in tags:
        pair = _EQUALS.split(tag)
        if len(pair) != 2 or not pair[0] or not pair[1]:
            raise _Malformed(f"{_shown(tag)} is no tag NAME=VALUE")
        if pair[0] == b"machine":
            machine = _text(_ESCAPED.sub(rb"\1", pair[1]), "tag machine")
    return machine or name, name


@functools.lru_cache(PATTERNS_KEPT)
def _fields(names: tuple[bytes, ...]) -> tuple[str, ...]:
    """Raises _Malformed."""
    fields = tuple(_text(name, "field name") for name in names)
    if len(set(fields)) != len(fields):
        raise _Malformed("a field is named twice")
    return fields


@functools.lru_cache(PATTERNS_KEPT)
def _pattern(names: tuple[bytes, ...]) -> re.Pattern[bytes]:
    fields = b",".join(re.escape(name) + rb'=([^,= "\\]++)' for name in names)
    return re.compile(fields + rb" ([0-9]++)")


def _text(raw: bytes, what: str) -> str:
    if not raw:
        raise _Malformed(f"a {what} is empty")
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise _Malformed(f"a {what} is not UTF-8") from error


def _floats(written: list[bytes]) -> list[float] | None:
    if b",".join(written).translate(None, b"0123456789+-.eE,"):
        return None
    try:
        return list(map(float, written))
    except ValueError:
        return None


def _integers(written: list[bytes]) -> list[float] | None:
    joined = b",".join(written) + b","
    if joined.count(b"i,") != len(written) or joined.translate(None, b"0123456789-,") != b"i" * len(written):
        return None
    # Shorter than the largest 64 bit integer; anything longer is looked at alone.
    if max(map(len, written)) > 19:
        return None
    try:
        return list(map(float, joined.replace(b"i", b"").split(b",")[:-1]))
    except ValueError:
        return None


def _booleans(written: list[bytes]) -> list[float] | None:
    try:
        return [_BOOLEANS[text] for text in written]
    except KeyError:
        return None


def _number(text: bytes) -> float | None:
    """The number that a value stands for; None for a text and for what is nothing."""
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INTEGER.fullmatch(text):
        whole = int(text[:-1])
        low, high = (0, 2**64 - 1) if text[-1:] == b"u" else (-(2**63), _INT64_MAX)
        return float(whole) if low <= whole <= high else None
    return _BOOLEANS.get(text)


def _shown(raw: bytes) -> str:
    return repr(raw[:40].decode(errors="replace"))
