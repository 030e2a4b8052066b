"""A CSV file as a machine: first column a timestamp, the others numbers, a header line; the separator is found."""

import csv
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

ROWS_MAX = 5_000_000
# The day comes first: with the month first as well, half of a file's dates would be others, unseen.
_TIME_FORMATS = ("%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%Y/%m/%d %H:%M:%S")


class NotARecording(Exception):
    """The file is not what it should be; the message says where and what to do."""


@dataclass(frozen=True)
class Recording:
    """A file's content, in order of time; times_us and values agree in length; NaN: the cell was empty."""

    names: tuple[str, ...]
    times_us: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    # Cells left out: what is no number, rows whose time cannot be read, and values that a later row of the same time replaces.
    refused: int


def read(path: Path) -> Recording:
    """Read a recording. Raises NotARecording."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise NotARecording(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise NotARecording(f"{path} is not text (UTF-8): export it as CSV") from error
    lines = text.splitlines()
    if len(lines) < 2:
        raise NotARecording(f"{path}: needs a header line and at least one row")
    separator, names = header_of(path, lines[0])
    times: list[int] = []
    values: list[list[float]] = []
    refused = 0
    for line in lines[1:]:
        if not line.strip():
            continue
        row = cells_of(line, separator)
        if row is None:
            refused += values_in(line, separator)
            continue
        if len(times) >= ROWS_MAX:
            raise NotARecording(f"{path}: more than {ROWS_MAX} rows; split the file")
        cells = (row[1:] + [""] * len(names))[: len(names)]
        at = time_us(row[0].strip())
        if at is None:
            refused += sum(1 for cell in cells if cell.strip())
            continue
        numbers = []
        for cell in cells:
            number = number_of(cell.strip(), separator)
            refused += number is None
            numbers.append(np.nan if number is None else number)
        times.append(at)
        values.append(numbers)
    if not times:
        raise NotARecording(f"{path}: no row has a time that can be read, such as 2026-11-23 12:00:00")
    merged_times, merged_values = _merged(np.array(times, dtype=np.int64), np.array(values))
    replaced = int(np.count_nonzero(~np.isnan(values))) - int(np.count_nonzero(~np.isnan(merged_values)))
    return Recording(names, merged_times, merged_values, refused + replaced)


def header_of(path: Path, line: str) -> tuple[str, tuple[str, ...]]:
    """The separator and the names of the columns behind the time. Raises NotARecording."""
    separator = max(",;\t|", key=line.count)
    if separator not in line:
        raise NotARecording(f"{path}: the header has one column; the first is a timestamp, the others are numbers")
    cells = cells_of(line, separator)
    if cells is None:
        raise NotARecording(f"{path}: the header cannot be read: a quote has no end, or a name is far too long")
    header = [name.strip() for name in cells]
    names = tuple(name or f"column {number}" for number, name in enumerate(header[1:], 2))
    if len(set(names)) != len(names):
        raise NotARecording(f"{path}: two columns have the same name; give each its own")
    return separator, names


def cells_of(line: str, separator: str) -> list[str] | None:
    """The cells of one line; None where it is no CSV. A quote without an end takes no other lines along."""
    try:
        return next(csv.reader([line], delimiter=separator, strict=True))
    except csv.Error:
        return None


def values_in(line: str, separator: str) -> int:
    """How many cells behind the first have something in them, in a line that is no CSV."""
    return sum(1 for cell in line.split(separator)[1:] if cell.strip())


def _merged(
    times: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Rows in order of time, those of the same time made one: the later row wins where it has a value."""
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    distinct, starts = np.unique(times, return_index=True)
    if len(distinct) == len(times):
        return times, values
    row = np.where(np.isnan(values), -1, np.arange(len(values))[:, None])
    newest = np.maximum.reduceat(row, starts, axis=0)
    taken = np.take_along_axis(values, np.maximum(newest, 0), axis=0)
    return distinct, np.where(newest >= 0, taken, np.nan)


def time_us(text: str) -> int | None:
    """Microseconds since 1970 UTC of a number (seconds, milliseconds or microseconds) or a written time; None for anything else."""
    try:
        number = float(text)
    except ValueError:
        pass
    else:
        # Seconds, milliseconds or microseconds since 1970, told apart by their size.
        for limit, factor in ((1e11, 1e6), (1e14, 1e3), (1e17, 1.0)):
            if 0 <= number < limit:
                return round(number * factor)
        return None
    parsed: datetime | None = None
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        for form in _TIME_FORMATS:
            try:
                parsed = datetime.strptime(text, form)  # noqa: DTZ007  zone is set below
                break
            except ValueError:
                continue
    if parsed is None:
        return None
    return round((parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp() * 1e6)


def number_of(text: str, separator: str) -> float | None:
    """The number, NaN for an empty cell, None for anything else."""
    if not text or text.lower() in ("nan", "null", "na"):
        return np.nan
    try:
        return float(text.replace(",", ".") if separator == ";" else text)
    except ValueError:
        return None
