"""Samples as files, window by window: CSV and Parquet, wide (a column a signal) or narrow (a row a sample)."""

import csv
import io
import zlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import orjson

from services.ingest.queries.read import Floats, Ints

# Level 1 packs CSV of samples to about a quarter at 100 MB/s; level 6 gains a tenth at a third of the speed.
GZIP_LEVEL = 1


class Encoder(Protocol):
    """Makes one file. Called from a thread, one call at a time."""

    def window(self, times_us: Ints, values: Floats) -> bytes:
        """Bytes for the next samples (NaN: none); may be empty, when they are kept for a larger block."""
        ...

    def end(self) -> bytes:
        """The last bytes."""
        ...


class WideCsv:
    """`time,<signal>,...`: one row a time, nothing between two commas where a signal has no sample."""

    def __init__(self, names: Sequence[str], *, header: bool) -> None:
        self._head = _line(["time", *names]) if header else b""

    def window(self, times_us: Ints, values: Floats) -> bytes:
        head, self._head = self._head, b""
        cells = orjson.dumps(values, option=orjson.OPT_SERIALIZE_NUMPY)[2:-2].replace(b"null", b"").split(b"],[")
        return head + b"".join(map(b"%b,%b\n".__mod__, zip(_times(times_us), cells, strict=True)))

    def end(self) -> bytes:
        return self._head


class NarrowCsv:
    """`time,signal,value`: one row a sample, in order of time, then of the signals as asked for."""

    def __init__(self, names: Sequence[str], *, header: bool) -> None:
        self._head = _line(["time", "signal", "value"]) if header else b""
        self._names = [_line([name])[:-1] for name in names]

    def window(self, times_us: Ints, values: Floats) -> bytes:
        head, self._head = self._head, b""
        rows, columns = np.nonzero(~np.isnan(values))
        times, names = _times(times_us), self._names
        cells = orjson.dumps(values[rows, columns], option=orjson.OPT_SERIALIZE_NUMPY)[1:-1].split(b",")
        lines = (
            b"%b,%b,%b\n" % (times[row], names[column], cell)
            for row, column, cell in zip(rows.tolist(), columns.tolist(), cells, strict=True)
        )
        return head + b"".join(lines)

    def end(self) -> bytes:
        return self._head


class Gzip:
    """Another encoder's bytes, packed."""

    def __init__(self, inner: Encoder) -> None:
        self._inner = inner
        self._pack = zlib.compressobj(GZIP_LEVEL, wbits=16 + zlib.MAX_WBITS)

    def window(self, times_us: Ints, values: Floats) -> bytes:
        return self._pack.compress(self._inner.window(times_us, values))

    def end(self) -> bytes:
        return self._pack.compress(self._inner.end()) + self._pack.flush()


def _times(times_us: Ints) -> list[bytes]:
    """RFC 3339 in UTC with microseconds."""
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_UTC_Z | orjson.OPT_NAIVE_UTC
    text = orjson.dumps(times_us.view("datetime64[us]"), option=option)
    return text[2:-2].split(b'","') if len(times_us) else []


def _line(cells: Sequence[str]) -> bytes:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue().encode()
