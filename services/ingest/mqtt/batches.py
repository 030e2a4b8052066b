"""Many small messages into few batches: values of one machine and time become one frame."""

import numpy as np

from services.ingest.domain import Sender
from smdih.ingest.v1 import telemetry_pb2

# A machine's samples become one matrix as long as that does not hold many more cells than samples.
CELLS_PER_SAMPLE_MAX = 8
CELLS_MIN = 2_000
# Every row becomes as wide as its machine has signals; this bounds a record.
ROWS_MAX = 500


class _Block:
    """Samples of one machine that make one batch: no cell twice."""

    def __init__(self) -> None:
        self.rows: dict[int, int] = {}
        self.columns: dict[str, int] = {}
        self.cells: dict[tuple[int, int], float] = {}

    def add(self, name: str, time_us: int, value: float) -> bool:
        """False where it does not fit: the cell is taken, or the matrix would be nearly empty."""
        row, column = self.rows.get(time_us, len(self.rows)), self.columns.get(name, len(self.columns))
        if (row, column) in self.cells or row >= ROWS_MAX:
            return False
        size = max(row + 1, len(self.rows)) * max(column + 1, len(self.columns))
        if size > max(CELLS_MIN, CELLS_PER_SAMPLE_MAX * len(self.cells)):
            return False
        self.rows[time_us], self.columns[name] = row, column
        self.cells[row, column] = value
        return True

    def batch(self, machine_id: int, machine_path: str) -> telemetry_pb2.Batch:
        values = np.zeros((len(self.rows), len(self.columns)))
        absent = np.ones(values.shape, dtype=bool)
        at = np.array(list(self.cells), dtype=np.int64)
        values[at[:, 0], at[:, 1]] = list(self.cells.values())
        absent[at[:, 0], at[:, 1]] = False
        return telemetry_pb2.Batch(
            machine_id=machine_id,
            machine_path=machine_path,
            times_us=list(self.rows),
            signals=list(self.columns),
            values=values.ravel().tolist(),
            absent=np.packbits(absent.ravel(), bitorder="little").tobytes() if absent.any() else b"",
        )


class Gathered:
    """The samples of one turn of the bridge, in the order of their messages."""

    def __init__(self) -> None:
        self._blocks: dict[tuple[Sender, int, str], list[_Block]] = {}

    def add(self, sender: Sender, machine_id: int, machine_path: str, name: str, time_us: int, value: float) -> None:
        """`machine_id` 0: not registered, so the path goes along for whoever looks at the quarantine."""
        blocks = self._blocks.setdefault((sender, machine_id, machine_path), [])
        if not blocks or not blocks[-1].add(name, time_us, value):
            blocks.append(_Block())
            blocks[-1].add(name, time_us, value)

    def batches(self) -> dict[Sender, list[telemetry_pb2.Batch]]:
        found: dict[Sender, list[telemetry_pb2.Batch]] = {}
        for (sender, machine_id, path), blocks in self._blocks.items():
            found.setdefault(sender, []).extend(block.batch(machine_id, path) for block in blocks)
        return found
