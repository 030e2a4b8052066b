"""Rows for PostgreSQL's binary COPY, built by numpy rather than value by value.

Format: https://www.postgresql.org/docs/17/sql-copy.html, section "Binary Format"; arrays as array_recv reads them.
"""

import struct
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

# PostgreSQL counts microseconds from 2000-01-01.
POSTGRES_EPOCH_US = 946_684_800_000_000
HEADER = b"PGCOPY\n\xff\r\n\x00" + b"\x00" * 8
TRAILER = b"\xff\xff"

_FLOAT8_OID = 701
_INT4_OID = 23

# Behind the number of columns and each one's length.
_MACHINE_AT, _POSITION_AT, _TS_AT = 6, 18, 26


def keyed_rows(machine_ids: Ints, first_positions: Ints, times_us: Ints, arrays: list[npt.NDArray[Any]]) -> bytes:
    """Rows (machine_id bigint, first_position int, ts timestamptz, array...), without header and trailer.

    Each array is n x width: float64 becomes float8[] with NaN as NULL, int32 becomes int4[].
    """
    present = [~np.isnan(array) if array.dtype.kind == "f" else np.ones(array.shape, dtype=bool) for array in arrays]
    pattern = np.concatenate([np.packbits(cells, axis=1) for cells in present], axis=1)
    if (pattern == pattern[0]).all():
        return _alike(machine_ids, first_positions, times_us, arrays, [cells[0] for cells in present])
    # Rows with the same pattern of NULLs have the same layout, so they can be built together.
    _, which = np.unique(pattern, axis=0, return_inverse=True)
    parts = []
    for number in range(int(which.max()) + 1):
        rows = np.flatnonzero(which.ravel() == number)
        some = [array[rows] for array in arrays]
        parts.append(
            _alike(
                machine_ids[rows], first_positions[rows], times_us[rows], some, [cells[rows[0]] for cells in present]
            )
        )
    return b"".join(parts)


def _alike(
    machine_ids: Ints,
    first_positions: Ints,
    times_us: Ints,
    arrays: list[npt.NDArray[Any]],
    present: list[npt.NDArray[np.bool_]],
) -> bytes:
    """Rows that have NULLs in the same cells: one row's bytes n times over, then the numbers into their places."""
    template = bytearray(struct.pack(">hiqiiiq", 3 + len(arrays), 8, 0, 4, 0, 8, 0))
    places: list[list[int]] = []
    for array, cells in zip(arrays, present, strict=True):
        size, oid = (8, _FLOAT8_OID) if array.dtype.kind == "f" else (4, _INT4_OID)
        width, filled = len(cells), int(cells.sum())
        # length of the field, dimensions, has NULLs, element type, dimension, lower bound
        template += struct.pack(">6i", 20 + 4 * width + size * filled, 1, filled < width, oid, width, 1)
        places.append([])
        for has_value in cells:
            template += struct.pack(">i", size if has_value else -1)
            places[-1].append(len(template))
            template += bytes(size if has_value else 0)
    rows = np.empty((len(machine_ids), len(template)), dtype=np.uint8)
    rows[:] = np.frombuffer(template, dtype=np.uint8)
    _numbers(rows, _MACHINE_AT, ">i8")[:] = machine_ids
    _numbers(rows, _POSITION_AT, ">i4")[:] = first_positions
    _numbers(rows, _TS_AT, ">i8")[:] = times_us - POSTGRES_EPOCH_US
    for array, cells, at in zip(arrays, present, places, strict=True):
        code = ">f8" if array.dtype.kind == "f" else ">i4"
        if cells.all():
            _numbers(rows, at[0], code, width=len(cells))[:] = array
            continue
        for column in np.flatnonzero(cells):
            _numbers(rows, at[column], code)[:] = array[:, column]
    return rows.tobytes()


def _numbers(rows: npt.NDArray[np.uint8], at: int, code: str, *, width: int = 0) -> npt.NDArray[Any]:
    """The numbers that stand `at` so many bytes behind the beginning of each row; with `width` so many side by side, each behind
    its length."""
    number = np.dtype(code)
    shape, strides = (len(rows),), (rows.strides[0],)
    if width:
        shape, strides = (len(rows), width), (rows.strides[0], 4 + number.itemsize)  # type: ignore[assignment]
    return np.ndarray(shape, number, rows, offset=at, strides=strides)
