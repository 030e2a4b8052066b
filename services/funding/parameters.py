"""Every number the fund's rules use, as dated and versioned rows with their source.

The date of the event (the award, the accounting period, the claim) picks the row, never today's date. The rows are in
``parameters.json`` beside this file; nothing is in force until a person has confirmed it, and ``confirmed_by`` says
who.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from services.funding.rules.exact import InvalidFact, decimal

PARAMETERS_FILE = Path(__file__).with_name("parameters.json")
WHOLE_UNITS = frozenset({"pence", "euro_cents", "days", "months", "years", "count", "division", "persons"})
DECIMAL_UNITS = frozenset({"rate", "percent", "headcount", "ratio"})
TEXT_UNITS = frozenset({"text"})


class ParametersInvalid(Exception):
    """The parameter table contradicts itself or has a row that cannot be read."""

    REASON = "PARAMETERS_INVALID"


class ParameterMissing(Exception):
    """No row of the parameter table is in force on the date of the event."""

    REASON = "PARAMETER_MISSING"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number with the days on which it holds.

    ``value`` is decimal text in ``unit`` (words separated by spaces for ``text``). ``valid_from`` None: since before
    the fund; ``valid_to`` None: until changed; both days included. ``sure``: ``seen`` (primary text),
    ``seen_secondary``, ``memory`` or ``own`` (the platform's choice). ``confirmed_by`` stays None until a person has
    checked the source.
    """

    name: str
    value: str
    unit: str
    valid_from: date | None
    valid_to: date | None
    source: str
    sure: str
    note: str
    confirmed_by: str | None

    def holds_on(self, day: date) -> bool:
        """Whether the row is in force on the day."""
        return (self.valid_from or date.min) <= day <= (self.valid_to or date.max)


@dataclass(frozen=True)
class ParametersAt:
    """The table as it stood on one day."""

    day: date
    rows: Mapping[str, Row]

    def whole(self, name: str) -> int:
        """A value in whole units (pence, euro cents, days, months, count).

        Raises:
            ParameterMissing: no row holds on this day.
        """
        return int(self._row(name, WHOLE_UNITS).value)

    def exact(self, name: str) -> Fraction:
        """A rate, percentage, headcount or ratio, exactly.

        Raises:
            ParameterMissing: no row holds on this day.
        """
        return Fraction(self._row(name, DECIMAL_UNITS).value)

    def words(self, name: str) -> frozenset[str]:
        """A set of words, such as SIC classes.

        Raises:
            ParameterMissing: no row holds on this day.
        """
        return frozenset(self._row(name, TEXT_UNITS).value.split())

    def _row(self, name: str, units: frozenset[str]) -> Row:
        row = self.rows.get(name)
        if row is None:
            raise ParameterMissing(f"no value of {name} is on record for {self.day.isoformat()}")
        assert row.unit in units, f"{name} is in {row.unit}"
        return row


@dataclass(frozen=True)
class ParameterTable:
    """All rows. ``checked_on`` is the day on which the sources were last read."""

    rows: tuple[Row, ...]
    checked_on: date

    def at(self, day: date) -> ParametersAt:
        """The rows in force on the day of the event."""
        return ParametersAt(day, {row.name: row for row in self.rows if row.holds_on(day)})

    @cached_property
    def version(self) -> str:
        """Hash of every name, value, unit and date; decisions record it.

        A person's confirmation or a better source leaves it as it is: neither changes a decision.
        """
        effective = sorted([row.name, row.unit, row.value, str(row.valid_from), str(row.valid_to)] for row in self.rows)
        return hashlib.sha256(json.dumps(effective, separators=(",", ":")).encode()).hexdigest()

    @property
    def unconfirmed(self) -> tuple[Row, ...]:
        """Rows that no person has confirmed yet; real money must wait for this to be empty."""
        return tuple(row for row in self.rows if row.confirmed_by is None)


def load_parameters(path: Path = PARAMETERS_FILE) -> ParameterTable:
    """Read and check a table.

    Raises:
        ParametersInvalid: unreadable, unknown unit or value, or two rows of one name that overlap.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows = tuple(_row(item) for item in document["rows"])
        checked_on = date.fromisoformat(document["checked_on"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParametersInvalid(f"{path.name}: {error}") from error
    _refuse_overlaps(rows)
    return ParameterTable(rows, checked_on)


def _row(item: Mapping[str, Any]) -> Row:
    first, last = (date.fromisoformat(item[key]) if item[key] else None for key in ("valid_from", "valid_to"))
    row = Row(**{**item, "valid_from": first, "valid_to": last})
    if first and last and last < first:
        raise ParametersInvalid(f"{row.name}: ends {last} before it starts {first}")
    if row.unit not in WHOLE_UNITS | DECIMAL_UNITS | TEXT_UNITS:
        raise ParametersInvalid(f"{row.name}: unknown unit {row.unit!r}")
    if row.unit not in TEXT_UNITS:
        try:
            value = decimal(row.value)
        except InvalidFact as error:
            raise ParametersInvalid(f"{row.name}: {error}") from error
        if row.unit in WHOLE_UNITS and not row.value.isdigit():
            raise ParametersInvalid(f"{row.name}: {value} is not a whole number of {row.unit}")
    return row


def _refuse_overlaps(rows: Iterable[Row]) -> None:
    ordered = sorted(rows, key=lambda row: (row.name, row.valid_from or date.min))
    for earlier, later in pairwise(ordered):
        if earlier.name == later.name and (earlier.valid_to or date.max) >= (later.valid_from or date.min):
            raise ParametersInvalid(f"{later.name}: two rows hold on the same day")
