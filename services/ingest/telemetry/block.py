"""Samples that did not come as a matrix into batches that are one."""

from typing import Any

import numpy as np

from smdih.ingest.v1 import telemetry_pb2

# Samples become one matrix as long as that does not hold many more cells than samples.
CELLS_PER_SAMPLE_MAX = 8
CELLS_MIN = 2_000


class Block:
    """Samples of one machine, by rows (of one time each) and names, that make one batch."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self._columns: dict[str, int] = {}
        # Of each sample, and the sample.
        self._rows: list[int] = []
        self._places: list[int] = []
        self._values: list[float] = []

    def __len__(self) -> int:
        """Samples."""
        return len(self._values)

    @property
    def rows(self) -> int:
        return len(self._times)

    def has(self, name: str) -> bool:
        return name in self._columns

    def has_room(self, *, rows: int, names: int, samples: int) -> bool:
        """Whether the matrix would be full enough with so many more."""
        cells = (len(self._times) + rows) * (len(self._columns) + names)
        return not self._times or cells <= max(CELLS_MIN, CELLS_PER_SAMPLE_MAX * (len(self._values) + samples))

    def add_row(self, time_us: int) -> int:
        """Its number."""
        self._times.append(time_us)
        return len(self._times) - 1

    def put(self, row: int, name: str, value: float | None) -> None:
        """Once for each row and name. None: there is no sample."""
        place = self._columns.setdefault(name, len(self._columns))
        if value is not None:
            self._rows.append(row)
            self._places.append(place)
            self._values.append(value)

    def batch(self, **of: Any) -> telemetry_pb2.Batch:
        """`of`: whose it is, and its sequence."""
        shape = (len(self._times), len(self._columns))
        values, absent = np.zeros(shape), np.ones(shape, dtype=bool)
        values[self._rows, self._places] = np.array(self._values, dtype=np.float64)
        absent[self._rows, self._places] = False
        return telemetry_pb2.Batch(
            times_us=self._times,
            signals=list(self._columns),
            values=values.ravel().tolist(),
            absent=np.packbits(absent.ravel(), bitorder="little").tobytes() if absent.any() else b"",
            **of,
        )
