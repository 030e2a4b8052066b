"""Machines and signals as a table that people fill in: one line a signal, read and written as CSV.

Reading is in two steps: `read` makes lines of text, `plan` compares them with what is registered and says of each line what
becomes of it. Nothing here changes anything.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.ingest.domain import (
    SIGNALS_PER_MACHINE_MAX,
    BadName,
    NewSignal,
    check_path,
    check_signal_name,
    check_text,
)

COLUMNS: Final = ("machine", "machine_name", "kind", "signal", "unit", "range_min", "range_max")
NEEDED: Final = ("machine", "signal")
LINES_MAX: Final = 20_000
CELL_LENGTH_MAX: Final = 1_000

_EXAMPLE: Final = (
    ("leeds/press-shop/press-3", "Press 3", "press", "temperature", "degC", "-50", "300"),
    ("leeds/press-shop/press-3", "", "", "current", "A", "", ""),
)

CREATE, CHANGE, SAME, REFUSE = "create", "change", "same", "refuse"

# A cell that begins so is a formula to a spreadsheet; an apostrophe before it keeps it a text, and is taken off when read.
_FORMULA: Final = ("=", "+", "-", "@", "\t")


class BadTable(ValueError):
    """The file is no such table; the message says why."""


@dataclass(frozen=True)
class Line:
    """Cells as they stand; `number` counts the lines of the file from 1."""

    number: int
    machine: str
    machine_name: str
    kind: str
    signal: str
    unit: str
    range_min: str
    range_max: str


@dataclass(frozen=True)
class KnownMachine:
    """A registered machine with its signals by name."""

    id: int
    name: str
    kind: str
    signals: Mapping[str, NewSignal]


@dataclass(frozen=True)
class Outcome:
    """What becomes of a line: create, change, same or refuse (with the reason in capitals)."""

    line: int
    machine: str
    signal: str
    action: str
    reason: str = ""
    detail: str = ""


@dataclass
class PlannedMachine:
    """What is to be done about one machine. `id` 0: it is new."""

    path: str
    site_id: int
    id: int
    name: str
    kind: str
    is_changed: bool
    new_signals: list[NewSignal] = field(default_factory=list)
    changed_signals: list[NewSignal] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """Every line has an outcome. `machines`: those with something to do, in the order of the file."""

    outcomes: list[Outcome]
    machines: list[PlannedMachine]

    def count(self, action: str) -> int:
        return sum(outcome.action == action for outcome in self.outcomes)


def template() -> str:
    return _written([COLUMNS, *_EXAMPLE])


def written(rows: Iterable[tuple[str, str, str, str, str, float | None, float | None]]) -> str:
    """The table of registered signals; a machine without signals has a line with an empty signal."""
    return _written(
        [
            COLUMNS,
            *(
                (*map(_as_text, texts), *("" if bound is None else repr(bound).removesuffix(".0") for bound in bounds))
                for *texts, low, high in rows
                for bounds in [(low, high)]
            ),
        ]
    )


def _written(rows: Iterable[Iterable[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\r\n").writerows(rows)
    return out.getvalue()


def _as_text(cell: str) -> str:
    return "'" + cell if cell.lstrip("'").startswith(_FORMULA) else cell


def read(body: bytes) -> list[Line]:
    """The lines of a table: UTF-8, comma, semicolon or tab, in any order of columns. Raises BadTable."""
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadTable("The file is not UTF-8; save it as “CSV UTF-8”.") from error
    if "\x00" in text:
        raise BadTable("The file is not text.")
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[Line] = []
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        _check_header(header)
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) > len(header):
                raise BadTable(f"Line {reader.line_num} has {len(cells)} cells, the first line {len(header)}.")
            if any(len(cell) > CELL_LENGTH_MAX for cell in cells):
                raise BadTable(f"Line {reader.line_num} has a cell of more than {CELL_LENGTH_MAX} characters.")
            if len(lines) == LINES_MAX:
                raise BadTable(f"The file has more than {LINES_MAX} lines; import it in parts.")
            named = dict.fromkeys(COLUMNS, "") | dict(zip(header, map(_cell, cells), strict=False))
            lines.append(Line(reader.line_num, **named))
    except csv.Error as error:
        raise BadTable(f"Line {reader.line_num} is not CSV: {error}.") from error
    if not lines:
        raise BadTable("The file has no lines below its first.")
    return lines


def _check_header(header: list[str]) -> None:
    unknown = [name for name in header if name not in COLUMNS]
    if unknown:
        raise BadTable(
            f"Column {unknown[0][:40]!r} is not known; the first line names the columns: {', '.join(COLUMNS)}."
        )
    if len(set(header)) != len(header):
        raise BadTable("The first line names a column twice.")
    missing = [name for name in NEEDED if name not in header]
    if missing:
        raise BadTable(f"Column {missing[0]!r} is missing; the first line names the columns: {', '.join(COLUMNS)}.")


def _cell(cell: str) -> str:
    stripped = cell.strip()
    return stripped[1:] if stripped.startswith("'") and stripped.lstrip("'").startswith(_FORMULA) else stripped


class _Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def machine_path(firm_slug: str, named: str) -> str:
    """The whole path of a machine that was named with or without its firm."""
    named = named.strip("/").lower()
    return named if named.startswith(f"{firm_slug}/") else f"{firm_slug}/{named}"


def plan(lines: Iterable[Line], *, firm_slug: str, sites: Mapping[str, int], known: Mapping[str, KnownMachine]) -> Plan:
    """What would become of each line. `sites`: ids by slug; `known`: registered machines by path."""
    planner = _Planner(firm_slug, sites, known)
    outcomes = [planner.outcome(line) for line in lines]
    return Plan(outcomes, [machine for machine in planner.machines.values() if _has_work(machine)])


def _has_work(machine: PlannedMachine) -> bool:
    return bool(not machine.id or machine.is_changed or machine.new_signals or machine.changed_signals)


class _Planner:
    def __init__(self, firm_slug: str, sites: Mapping[str, int], known: Mapping[str, KnownMachine]) -> None:
        self._firm_slug = firm_slug
        self._sites = sites
        self._known = known
        self._named: dict[tuple[str, str], int] = {}
        self._folded: dict[tuple[str, str], str] = {}
        self.machines: dict[str, PlannedMachine] = {}

    def outcome(self, line: Line) -> Outcome:
        path = machine_path(self._firm_slug, line.machine)
        try:
            action, detail = self._planned(line, path)
        except BadName as error:
            return Outcome(line.number, path, line.signal, REFUSE, "BAD_NAME", str(error))
        except _Refused as error:
            return Outcome(line.number, path, line.signal, REFUSE, error.reason, str(error))
        return Outcome(line.number, path, line.signal, action, "", detail)

    def _planned(self, line: Line, path: str) -> tuple[str, str]:
        signal = _signal(line) if line.signal else None
        if signal is None and (line.unit or line.range_min or line.range_max):
            raise _Refused("NO_SIGNAL", "unit and range belong to a signal; name it")
        machine, machine_done = self._machine(line, path)
        before = self._named.setdefault((path, line.signal), line.number)
        if before != line.number:
            raise _Refused("DUPLICATE", f"line {before} is about the same")
        if signal is None:
            return machine_done or SAME, ""
        signal_done, detail = self._signal(machine, signal)
        return max(machine_done or SAME, signal_done, key=(SAME, CHANGE, CREATE).index), detail

    def _machine(self, line: Line, path: str) -> tuple[PlannedMachine, str]:
        """The machine of a line, and what its first line does about it; later lines do nothing."""
        machine = self.machines.get(path)
        if machine is not None:
            for said, before, what in (
                (line.machine_name, machine.name, "machine_name"),
                (line.kind, machine.kind, "kind"),
            ):
                if said and said != before:
                    raise _Refused("CONFLICT", f"{what}: an earlier line of this machine says {before!r}")
            return machine, ""
        _, _, below_firm = path.partition("/")
        site, _, below_site = below_firm.partition("/")
        if site not in self._sites:
            raise _Refused("UNKNOWN_SITE", f"this firm has no site {site!r}; make it first (POST /v1/sites)")
        check_path(below_site)
        known = self._known.get(path)
        name = line.machine_name or (known.name if known else below_site.rpartition("/")[2])
        kind = line.kind or (known.kind if known else "")
        name = check_text(name, what="machine_name")
        if not kind:
            raise _Refused(
                "NO_KIND", "kind: say what kind of machine it is, such as press; the first line of a machine needs it"
            )
        kind = check_text(kind, what="kind")
        is_changed = known is not None and (known.name, known.kind) != (name, kind)
        machine = PlannedMachine(path, self._sites[site], known.id if known else 0, name, kind, is_changed)
        self.machines[path] = machine
        for existing in known.signals if known else ():
            self._folded[path, existing.casefold()] = existing
        return machine, CREATE if known is None else CHANGE if is_changed else SAME

    def _signal(self, machine: PlannedMachine, signal: NewSignal) -> tuple[str, str]:
        known = self._known.get(machine.path)
        before = known.signals.get(signal.name) if known else None
        if before == signal:
            return SAME, ""
        if before is not None:
            machine.changed_signals.append(signal)
            return CHANGE, _difference(before, signal)
        like = self._folded.setdefault((machine.path, signal.name.casefold()), signal.name)
        if like != signal.name:
            raise BadName(
                f"{signal.name!r}: the machine has a signal {like!r}; names that differ in case only are mixed up"
            )
        if len(machine.new_signals) + (len(known.signals) if known else 0) >= SIGNALS_PER_MACHINE_MAX:
            raise _Refused("TOO_MANY", f"a machine has at most {SIGNALS_PER_MACHINE_MAX} signals")
        machine.new_signals.append(signal)
        return CREATE, ""


def _signal(line: Line) -> NewSignal:
    name = check_signal_name(line.signal)
    unit = check_text(line.unit, what="unit", length_max=32) if line.unit else ""
    low, high = _bound(line.range_min, "range_min"), _bound(line.range_max, "range_max")
    if low is not None and high is not None and low >= high:
        raise _Refused("BAD_RANGE", "range_min must be below range_max")
    return NewSignal(name, unit, low, high)


def _bound(cell: str, what: str) -> float | None:
    if not cell:
        return None
    try:
        number = float(cell.replace("_", "no number"))
    except ValueError as error:
        raise _Refused("BAD_RANGE", f"{what}: {cell[:40]!r} is no number (with a point, without a unit)") from error
    if not math.isfinite(number):
        raise _Refused("BAD_RANGE", f"{what}: leave it empty where there is no bound")
    return number


def _difference(before: NewSignal, after: NewSignal) -> str:
    return "; ".join(
        f"{what}: {old!r} becomes {new!r}"
        for what, old, new in (
            ("unit", before.unit, after.unit),
            ("range_min", before.range_min, after.range_min),
            ("range_max", before.range_max, after.range_max),
        )
        if old != new
    )
