"""Stored samples as a file of any length, in constant memory.

Between two windows nothing is held in the database, so a slow reader costs nothing but its place; one that goes away ends the
reading. What goes wrong in the middle is raised out of the stream: the edges then break it off, so that no reader takes a part
for the whole.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
from prometheus_client import Counter

from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid, NotFound, SlowDown
from services.common.identity import Caller
from services.common.metrics import watch_queue
from services.ingest.asked import check_id, check_one_of
from services.ingest.domain import SIGNALS_PER_MACHINE_MAX
from services.ingest.queries import read, store
from services.ingest.queries.access import Access
from services.ingest.queries.export_formats import Encoder, Gzip, NarrowCsv, WideCsv
from services.ingest.queries.queries import check_range
from services.ingest.queries.read import Floats, Ints
from services.ingest.queries.store import SignalPlace

# As many as a machine may have.
SIGNALS_PER_EXPORT_MAX = SIGNALS_PER_MACHINE_MAX
# Parquet keeps a block of each column until it is large enough to be worth its place in the file.
PARQUET_COLUMNS_MAX = 1_000
# At a time; each keeps one window of values (see query_read) and the block that is being made of them.
EXPORTS_MAX = 8
EXPORTS_PER_KEY_MAX = 2
RETRY_AFTER_S = 10
# A gRPC client takes messages of 4 MiB unless it is told to take more.
CHUNK_BYTES_MAX = 512 * 1024

FORMATS = ("csv", "parquet")
RESOLUTIONS = {"raw": None, "minute": read.MINUTE, "hour": read.HOUR}
LAYOUTS = ("wide", "narrow")

# Samples that left in exports.
exported_samples_total = Counter("smdih_ingest_export_samples_total", "Samples exported", ["format"])


@dataclass(frozen=True)
class Wanted:
    """What should be in the file: signals by id, and all of those of a machine."""

    signal_ids: Sequence[int]
    machine_id: int
    from_us: int
    to_us: int
    format: str = "csv"
    layout: str = "wide"
    gzip: bool = False
    # A header line in CSV; left out when a file is continued.
    header: bool = True
    # raw, or stored buckets: minute or hour.
    resolution: str = "raw"


class File:
    """A file on its way: iterating yields its bytes. Close it, however far it was read."""

    def __init__(self, name: str, media_type: str, first: bytes, rest: AsyncGenerator[bytes, None]) -> None:
        self.name = name
        self.media_type = media_type
        self._first = first
        self._rest = rest

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in _pieces(self._first):
            yield piece
        self._first = b""
        async for chunk in self._rest:
            for piece in _pieces(chunk):
                yield piece

    async def aclose(self) -> None:
        await self._rest.aclose()


def _pieces(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK_BYTES_MAX):
        yield data[start : start + CHUNK_BYTES_MAX]


_MEDIA_TYPES = {
    "csv": "text/csv; charset=utf-8",
    "csv.gz": "application/gzip",
    "parquet": "application/vnd.apache.parquet",
}


class Export:
    def __init__(self, pool: Pool, directory: Directory, access: Access) -> None:
        self._pool = pool
        self._directory = directory
        self._access = access
        self._running: dict[int, int] = {}
        watch_queue("exports", lambda: sum(self._running.values()), limit=EXPORTS_MAX)

    async def file(self, caller: Caller, wanted: Wanted) -> File:
        """The file, with its first bytes made already. Raises Invalid, NotFound, Forbidden, SlowDown, TryAgain."""
        check_range(wanted.from_us, wanted.to_us)
        check_one_of(wanted.format, FORMATS, "format")
        check_one_of(wanted.layout, LAYOUTS, "layout")
        check_one_of(wanted.resolution, tuple(RESOLUTIONS), "resolution")
        wanted = _in_whole_buckets(wanted)
        if wanted.gzip and wanted.format != "csv":
            raise Invalid("gzip: for CSV only; Parquet is packed already.")
        places = await self._places(caller, wanted)
        chunks = self._chunks(caller, wanted, places)
        first = await anext(chunks, b"")
        suffix = wanted.format + (".gz" if wanted.gzip else "")
        return File(f"samples.{suffix}", _MEDIA_TYPES[suffix], first, chunks)

    async def _places(self, caller: Caller, wanted: Wanted) -> list[SignalPlace]:
        signal_ids = list(wanted.signal_ids)
        if wanted.machine_id:
            check_id(wanted.machine_id, "machine_id")
            machine = self._directory.machines.get(wanted.machine_id)
            if machine is None or not self._access.owns(caller, machine.firm_id):
                raise NotFound(f"There is no machine {wanted.machine_id}.")
            signal_ids += [signal.id for signal in machine.signals]
        signal_ids = list(dict.fromkeys(signal_ids))
        if not 1 <= len(signal_ids) <= SIGNALS_PER_EXPORT_MAX:
            raise Invalid(f"Name a machine_id, or signal_ids: 1 to {SIGNALS_PER_EXPORT_MAX} signals in one file.")
        columns = len(signal_ids) * (1 if RESOLUTIONS[wanted.resolution] is None else len(read.BUCKET_FIGURES))
        if columns > PARQUET_COLUMNS_MAX and (wanted.format, wanted.layout) == ("parquet", "wide"):
            raise Invalid(
                f"{columns} columns, and a wide Parquet file has at most {PARQUET_COLUMNS_MAX}: ask for layout=narrow or "
                "format=csv, or name fewer signals."
            )
        for signal_id in signal_ids:
            check_id(signal_id, "signal_id")
        async with transaction(self._pool) as connection:
            places = await store.signal_places(connection, signal_ids)
        await self._access.admit(caller, places, wanted.from_us, wanted.to_us)
        return places

    async def _chunks(
        self, caller: Caller, wanted: Wanted, places: Sequence[SignalPlace]
    ) -> AsyncGenerator[bytes, None]:
        self._take_place(caller)
        try:
            encoder = await asyncio.to_thread(_encoder, wanted, self._columns(wanted, places))
            windows = await self._windows(wanted, places)
            async with aclosing(windows):
                async for times, values in windows:
                    # A room that was recalled meanwhile lends no more.
                    self._access.check(caller, places, wanted.from_us, wanted.to_us)
                    chunk = await asyncio.to_thread(encoder.window, times, values)
                    exported_samples_total.labels(wanted.format).inc(int(np.count_nonzero(~np.isnan(values))))
                    if chunk:
                        yield chunk
            chunk = await asyncio.to_thread(encoder.end)
            if chunk:
                yield chunk
        finally:
            self._give_place(caller)

    async def _windows(
        self, wanted: Wanted, places: Sequence[SignalPlace]
    ) -> AsyncGenerator[tuple[Ints, Floats], None]:
        async with transaction(self._pool) as connection:
            held = await read.held(connection, places)
        resolution = RESOLUTIONS[wanted.resolution]
        if resolution is None:
            return read.samples(self._pool, places, max(held.first_us, wanted.from_us), min(held.end_us, wanted.to_us))
        start_us = max(held.first_us // resolution.width_us * resolution.width_us, wanted.from_us)
        return read.bucket_rows(self._pool, places, resolution, start_us, min(held.end_us, wanted.to_us))

    def _columns(self, wanted: Wanted, places: Sequence[SignalPlace]) -> list[str]:
        names = self._names(places)
        if RESOLUTIONS[wanted.resolution] is None:
            return names
        return [f"{name} {figure}" for name in names for figure in read.BUCKET_FIGURES]

    def _names(self, places: Sequence[SignalPlace]) -> list[str]:
        """Of one machine the signals' own names; of several with the machine's path before them."""
        if len({place.machine_id for place in places}) == 1:
            return [place.name for place in places]
        machines = self._directory.machines
        paths = {i: machines[i].path if i in machines else str(i) for i in {place.machine_id for place in places}}
        return [f"{paths[place.machine_id]}/{place.name}" for place in places]

    def _take_place(self, caller: Caller) -> None:
        if (
            sum(self._running.values()) >= EXPORTS_MAX
            or self._running.get(caller.credential_id, 0) >= EXPORTS_PER_KEY_MAX
        ):
            raise SlowDown(
                f"{EXPORTS_PER_KEY_MAX} exports of a key and {EXPORTS_MAX} in all run at a time; let one end first.",
                reason="TOO_MANY_EXPORTS",
                retry_after_s=RETRY_AFTER_S,
            )
        self._running[caller.credential_id] = self._running.get(caller.credential_id, 0) + 1

    def _give_place(self, caller: Caller) -> None:
        self._running[caller.credential_id] -= 1
        if not self._running[caller.credential_id]:
            del self._running[caller.credential_id]


def _in_whole_buckets(wanted: Wanted) -> Wanted:
    """A bucket tells of all of its time: the range is widened to whole ones. Raises Invalid."""
    resolution = RESOLUTIONS[wanted.resolution]
    if resolution is None:
        return wanted
    width_us = resolution.width_us
    widened = replace(
        wanted, from_us=wanted.from_us // width_us * width_us, to_us=-(-wanted.to_us // width_us) * width_us
    )
    check_range(widened.from_us, widened.to_us)
    return widened


def _encoder(wanted: Wanted, names: Sequence[str]) -> Encoder:
    if wanted.format == "parquet":
        from services.ingest.queries.export_parquet import Parquet  # tens of megabytes: only for who asks for it

        return Parquet(names, narrow=wanted.layout == "narrow")
    plain = (WideCsv if wanted.layout == "wide" else NarrowCsv)(names, header=wanted.header)
    return Gzip(plain) if wanted.gzip else plain
