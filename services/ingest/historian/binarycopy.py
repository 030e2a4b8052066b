"""Rows for PostgreSQL's binary COPY, built by numpy rather than value by value.

Format: https://www.postgresql.org/docs/17/sql-copy.html, section "Binary Format"; arrays as array_recv reads them.
"""

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
    fields: list[tuple[str, Any]] = [
        ("columns", ">i2"),
        ("machine_len", ">i4"),
        ("machine", ">i8"),
        ("position_len", ">i4"),
        ("position", ">i4"),
        ("ts_len", ">i4"),
        ("ts", ">i8"),
    ]
    headers: list[npt.NDArray[np.int32]] = []
    for number, (array, cells) in enumerate(zip(arrays, present, strict=True)):
        size, code, oid = (8, ">f8", _FLOAT8_OID) if array.dtype.kind == "f" else (4, ">i4", _INT4_OID)
        element = np.dtype([("len", ">i4"), ("value", code)])
        width, filled = len(cells), int(cells.sum())
        payload = 20 + 4 * width + size * filled
        # length of the field, dimensions, has NULLs, element type, dimension, lower bound
        headers.append(np.array([payload, 1, int(filled < width), oid, width, 1], dtype=">i4"))
        fields.append((f"head{number}", ">i4", (6,)))  # type: ignore[arg-type]
        if filled == width:
            fields.append((f"cells{number}", element, (width,)))  # type: ignore[arg-type]
        else:
            fields.extend((f"cell{number}_{column}", element if cells[column] else ">i4") for column in range(width))
    rows = np.empty(len(machine_ids), dtype=np.dtype(fields))
    rows["columns"] = 3 + len(arrays)
    rows["machine_len"], rows["machine"] = 8, machine_ids
    rows["position_len"], rows["position"] = 4, first_positions
    rows["ts_len"], rows["ts"] = 8, times_us - POSTGRES_EPOCH_US
    for number, (array, cells) in enumerate(zip(arrays, present, strict=True)):
        size = 8 if array.dtype.kind == "f" else 4
        rows[f"head{number}"] = headers[number]
        if cells.all():
            rows[f"cells{number}"]["len"] = size
            rows[f"cells{number}"]["value"] = array
            continue
        for column in range(len(cells)):
            name = f"cell{number}_{column}"
            if cells[column]:
                rows[name]["len"] = size
                rows[name]["value"] = array[:, column]
            else:
                rows[name] = -1
    return rows.tobytes()
