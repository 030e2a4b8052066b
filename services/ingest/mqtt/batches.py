"""Many small messages into few batches: values of one machine and time become one frame."""

from services.ingest.domain import Sender
from services.ingest.telemetry.block import Block
from smdih.ingest.v1 import telemetry_pb2

# Every row becomes as wide as its machine has signals; this bounds a record.
ROWS_MAX = 500


class _Block(Block):
    """No cell twice."""

    def __init__(self) -> None:
        super().__init__()
        self._row_of: dict[int, int] = {}
        self._taken: set[tuple[int, str]] = set()

    def add(self, name: str, time_us: int, value: float) -> bool:
        """False where it does not fit: the cell is taken, or the matrix would be nearly empty."""
        row = self._row_of.get(time_us)
        if (time_us, name) in self._taken or (row is None and self.rows >= ROWS_MAX):
            return False
        if not self.has_room(rows=row is None, names=not self.has(name), samples=1):
            return False
        if row is None:
            row = self._row_of[time_us] = self.add_row(time_us)
        self._taken.add((time_us, name))
        self.put(row, name, value)
        return True


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
            found.setdefault(sender, []).extend(
                block.batch(machine_id=machine_id, machine_path=path) for block in blocks
            )
        return found
