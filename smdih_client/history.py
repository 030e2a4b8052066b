"""Files of a machine's history, read a block of rows at a time: CSV and Parquet, however long, in constant memory.

The first column is the time, every other one a signal by name. Rows are counted from 1, without the header.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from smdih_client.recording import NotARecording, cells_of, header_of, number_of, time_us, values_in

if TYPE_CHECKING:
    import pyarrow as pa

# The reasons of what is left out here, before the hub is asked.
NO_TIME = "NO_TIME"
NO_NUMBER = "NO_NUMBER"

SUFFIXES = (".csv", ".parquet")
ROWS_PER_BLOCK_MAX = 500
# Keeps a batch far below what the hub takes in one message.
CELLS_PER_BLOCK_MAX = 50_000
_NOT_A_TIME = np.iinfo(np.int64).min
_US_A_SECOND = {"s": 1_000_000, "ms": 1_000}


@dataclass(frozen=True)
class LeftOut:
    """A cell, or a row's cells, that cannot be sent."""

    reason: str
    row: int
    cells: int
    detail: str


@dataclass(frozen=True)
class Block:
    """Rows that go together: always the same ones, wherever reading begins."""

    # Of the block in its file, from 0.
    number: int
    names: tuple[str, ...]
    # Rows of the file that stand here, as times and values do; NaN: no value.
    rows: npt.NDArray[np.int64]
    times_us: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]
    # How many rows of the file were read for it.
    rows_read: int
    left_out: list[LeftOut] = field(default_factory=list)

    @property
    def samples(self) -> int:
        return int(np.count_nonzero(~np.isnan(self.values)))


def blocks(path: Path, *, first: int = 0) -> Iterator[Block]:
    """The blocks of a file from number `first` on. Raises NotARecording."""
    try:
        if path.suffix.lower() == ".parquet":
            yield from _parquet(path, first)
        else:
            yield from _csv(path, first)
    except OSError as error:
        raise NotARecording(f"{path} cannot be read: {error}") from error


def files(path: Path) -> list[Path]:
    """The file, or those of a folder in order of name. Raises NotARecording for none."""
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
    if not found:
        raise NotARecording(f"{path} holds no file that ends in {' or '.join(SUFFIXES)}")
    return found


def _rows_per_block(columns: int) -> int:
    return max(1, min(ROWS_PER_BLOCK_MAX, CELLS_PER_BLOCK_MAX // max(columns, 1)))


def _csv(path: Path, first: int) -> Iterator[Block]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        separator, names = header_of(path, file.readline().rstrip("\r\n"))
        size = _rows_per_block(len(names))
        lines = (line for line in file if line.strip())
        for number in itertools.count():
            part = list(itertools.islice(lines, size))
            if not part:
                return
            if number >= first:
                yield _csv_block(number, number * size + 1, names, part, separator)


def _csv_block(number: int, first_row: int, names: tuple[str, ...], lines: list[str], separator: str) -> Block:
    left_out: list[LeftOut] = []
    kept: list[int] = []
    times: list[int] = []
    cells: list[list[str]] = []
    for row, line in enumerate(lines, first_row):
        texts = cells_of(line, separator)
        if texts is None:
            detail = "the row is no CSV: a quote has no end, or stands inside a cell, or a cell is far too long"
            left_out.append(LeftOut(NO_NUMBER, row, values_in(line, separator), detail))
            continue
        at = time_us(texts[0].strip())
        if at is None:
            count = sum(1 for text in texts[1:] if text.strip())
            left_out.append(LeftOut(NO_TIME, row, count, f"{texts[0]!r} is no time, such as 2026-11-23T12:00:00Z"))
            continue
        extra = sum(1 for text in texts[len(names) + 1 :] if text.strip())
        if extra:
            left_out.append(LeftOut(NO_NUMBER, row, extra, f"{extra} more cells than the header has columns"))
        kept.append(row)
        times.append(at)
        cells.append((texts[1:] + [""] * len(names))[: len(names)])
    values = _values(names, kept, cells, separator, left_out)
    return Block(number, names, np.array(kept), np.array(times, dtype=np.int64), values, len(lines), left_out)


def _values(
    names: tuple[str, ...], rows: list[int], cells: list[list[str]], separator: str, left_out: list[LeftOut]
) -> npt.NDArray[np.float64]:
    try:
        return np.array(cells, dtype=np.float64).reshape(len(rows), len(names))  # all are plain numbers: the usual case
    except ValueError:
        pass
    values = np.full((len(rows), len(names)), np.nan)
    for i, texts in enumerate(cells):
        for j, text in enumerate(texts):
            found = number_of(text.strip(), separator)
            if found is None:
                left_out.append(LeftOut(NO_NUMBER, rows[i], 1, f"{names[j]}: {text!r} is no number"))
            else:
                values[i, j] = found
    return values


def _parquet(path: Path, first: int) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            names = tuple(file.schema_arrow.names[1:])
            if not names:
                raise NotARecording(f"{path}: needs a time in the first column and numbers in the others")
            size = _rows_per_block(len(names))
            read = 0
            for number, batch in enumerate(_whole(file, size)):
                if number >= first:
                    yield _parquet_block(path, number, read + 1, names, batch)
                read += batch.num_rows
    except pa.ArrowException as error:
        raise NotARecording(f"{path} is not Parquet that can be read: {error}") from error


def _whole(file: Any, size: int) -> Iterator["pa.RecordBatch"]:
    """Batches of exactly `size` rows but for the last, whatever the row groups."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in file.iter_batches(batch_size=size):
        waiting.append(batch)
        rows += batch.num_rows
        while rows >= size:
            together = pa.Table.from_batches(waiting).combine_chunks()
            (whole,) = together.slice(0, size).to_batches() or [None]
            yield whole
            waiting = together.slice(size).to_batches()
            rows -= size
    if rows:
        (rest,) = pa.Table.from_batches(waiting).combine_chunks().to_batches()
        yield rest


def _parquet_block(path: Path, number: int, first_row: int, names: tuple[str, ...], batch: "pa.RecordBatch") -> Block:
    left_out: list[LeftOut] = []
    rows = np.arange(first_row, first_row + batch.num_rows)
    values = np.full((batch.num_rows, len(names)), np.nan)
    for column, name in enumerate(names):
        values[:, column] = _numbers(batch.column(column + 1), name, rows, left_out)
    times = _times(path, batch.column(0))
    timeless = times == _NOT_A_TIME
    for row in rows[timeless]:
        count = int(np.count_nonzero(~np.isnan(values[row - first_row])))
        left_out.append(LeftOut(NO_TIME, int(row), count, "the time is missing or cannot be read"))
    return Block(number, names, rows[~timeless], times[~timeless], values[~timeless], batch.num_rows, left_out)


def _times(path: Path, column: "pa.Array[Any]") -> npt.NDArray[np.int64]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind):
        raw = column.cast(pa.int64()).to_numpy(zero_copy_only=False) if not column.null_count else None
        if raw is None:
            raw = np.array([_NOT_A_TIME if value is None else value for value in column.cast(pa.int64()).to_pylist()])
        if kind.unit == "ns":
            return np.where(raw == _NOT_A_TIME, raw, raw // 1000)
        return np.where(raw == _NOT_A_TIME, raw, raw * _US_A_SECOND.get(kind.unit, 1))
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_string(kind):
        found = (time_us(str(value)) for value in column.to_pylist())
        return np.array([_NOT_A_TIME if value is None else value for value in found], dtype=np.int64)
    raise NotARecording(f"{path}: the first column is {kind}, not a time")


def _numbers(
    column: "pa.Array[Any]", name: str, rows: npt.NDArray[np.int64], left_out: list[LeftOut]
) -> npt.NDArray[np.float64]:
    import pyarrow as pa

    kind = column.type
    if pa.types.is_floating(kind) and not column.null_count:
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return np.array([np.nan if value is None else float(value) for value in column.to_pylist()], dtype=np.float64)
    if pa.types.is_decimal(kind):
        return np.array([np.nan if value is None else float(value) for value in column.to_pylist()])
    for row, value in zip(rows, column.to_pylist(), strict=True):
        if value is not None:
            left_out.append(LeftOut(NO_NUMBER, int(row), 1, f"{name}: {str(value)[:40]!r} ({kind}) is no number"))
    return np.full(len(rows), np.nan)
