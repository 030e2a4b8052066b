"""Parquet, block by block. Loaded with the first export of this kind only: the library takes tens of megabytes."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from services.ingest.queries.read import Floats, Ints

# A row group: large enough for readers to skip by, small enough to be kept until it is full (8 bytes a cell).
ROW_GROUP_CELLS = 500_000
# The footer keeps about 150 bytes for each column of each row group; wide files of many columns need larger groups.
ROW_GROUP_ROWS_MIN = 5_000

_TIME = pa.timestamp("us", tz="UTC")


class Parquet:
    """Wide: time and a column a signal. Narrow: time, signal, value. No sample: null."""

    def __init__(self, names: Sequence[str], *, narrow: bool) -> None:
        self._narrow = narrow
        self._names = names
        columns = [("signal", pa.dictionary(pa.int32(), pa.string())), ("value", pa.float64())]
        if not narrow:
            columns = [(name, pa.float64()) for name in names]
        self._schema = pa.schema([pa.field("time", _TIME, nullable=False), *(pa.field(*column) for column in columns)])
        self._sink = _Sink()
        # What a group needs on the way goes back to the system and does not stay with this process.
        self._pool = pa.system_memory_pool()
        self._writer = pq.ParquetWriter(
            pa.PythonFile(self._sink, mode="w"), self._schema, compression="zstd", write_statistics=["time"]
        )
        self._waiting: list[tuple[Ints, Floats]] = []

    def window(self, times_us: Ints, values: Floats) -> bytes:
        self._waiting.append((times_us, values))
        rows = sum(len(times) for times, _ in self._waiting)
        if rows >= max(1 if self._narrow else ROW_GROUP_ROWS_MIN, ROW_GROUP_CELLS // values.shape[1]):
            self._flush()
        return self._sink.taken()

    def end(self) -> bytes:
        self._flush()
        self._writer.close()
        return self._sink.taken()

    def _flush(self) -> None:
        if not self._waiting:
            return
        times = np.concatenate([part for part, _ in self._waiting])
        values = np.concatenate([part for _, part in self._waiting])
        self._waiting.clear()
        if self._narrow:
            rows, columns = np.nonzero(~np.isnan(values))
            signals = pa.DictionaryArray.from_arrays(columns.astype(np.int32), pa.array(self._names, pa.string()))
            arrays = [pa.array(times[rows], _TIME), signals, pa.array(values[rows, columns])]
        else:
            arrays = [pa.array(times, _TIME)]
            arrays += [pa.array(column, pa.float64(), from_pandas=True) for column in np.ascontiguousarray(values.T)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))


class _Sink:
    """Takes what a writer writes until it is fetched."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def taken(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True
