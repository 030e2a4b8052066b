"""HTTP edge of the queries over several signals: buckets, plots, files."""

import asyncio
from contextlib import aclosing
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Query, Request, Response
from starlette.types import Receive, Scope, Send

from services.common.http import Authenticated, while_admitted
from services.ingest.queries.export import Export, File, Wanted
from services.ingest.queries.queries import Queries
from services.ingest.queries.store import SignalPlace

# A reader that takes nothing for so long is gone.
SEND_TIMEOUT_S = 120

SignalIds = Annotated[list[int], Query(alias="signal_id")]


def series_router(queries: Queries, export: Export) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["series"])

    @router.get("/buckets")
    async def buckets(
        caller: Authenticated, signal_ids: SignalIds, from_us: int, to_us: int, width_s: int, fill: str = "none"
    ) -> Response:
        """Several signals (repeat `signal_id`, up to 50) in buckets of `width_s` seconds: 1 to 59, or a multiple of 60.

        `fill`: what stands for a bucket without a value: `none` (nothing), `empty` (count 0, null) or `locf` (count 0 and the last
        value of the range before it). Buckets are counted from 1970 UTC and the range is widened to whole ones; `resolution` says
        what they were made from. At most 50,000 buckets in an answer.
        """
        found = await queries.buckets(caller, signal_ids, from_us, to_us, width_s, fill)
        return _json(
            {
                "from_us": found.from_us,
                "to_us": found.to_us,
                "width_s": found.width_s,
                "resolution": found.resolution,
                "series": [
                    _signal(one.signal)
                    | {
                        "times_us": one.times_us,
                        "counts": one.counts,
                        "sums": one.sums,
                        "means": one.means,
                        "mins": one.mins,
                        "maxs": one.maxs,
                        "lasts": one.lasts,
                    }
                    for one in found.series
                ],
            }
        )

    @router.get("/plot")
    async def plot(caller: Authenticated, signal_ids: SignalIds, from_us: int, to_us: int, points: int = 0) -> Response:
        """Several signals as few points each (3 to 2,000, 500 unless said) that keep the look of the line, peaks included.

        `resolution`: `raw`, each point is a sample; `minute` or `hour`, each is the least or greatest value of its bucket.
        """
        found = await queries.plot(caller, signal_ids, from_us, to_us, points)
        series = [_signal(one.signal) | {"times_us": one.times_us, "values": one.values} for one in found.series]
        return _json({"resolution": found.resolution, "series": series})

    @router.get("/export", response_class=Response)
    async def export_file(
        request: Request,
        caller: Authenticated,
        from_us: int,
        to_us: int,
        signal_ids: Annotated[list[int] | None, Query(alias="signal_id")] = None,
        machine_id: int = 0,
        format: str = "csv",
        layout: str = "wide",
        gzip: bool = False,
        header: bool = True,
        resolution: str = "raw",
    ) -> Response:
        """Every sample of the signals, or of a machine, as a file of any length: `format` csv or parquet, `layout` wide (a column a
        signal) or narrow (a row a sample). `resolution` minute or hour: the stored buckets instead, five figures of each signal.

        In order of time. A download that breaks off is seen as broken by the reader; go on with `from_us` one microsecond after the
        last whole line and `header=false`.
        """
        wanted = Wanted(signal_ids or [], machine_id, from_us, to_us, format, layout, gzip, header, resolution)
        return _FileResponse(await export.file(caller, wanted), request)

    return router


class _FileResponse(Response):
    def __init__(self, file: File, request: Request) -> None:
        headers = {"Content-Disposition": f'attachment; filename="{file.name}"', "Cache-Control": "no-store"}
        super().__init__(media_type=file.media_type, headers=headers)
        del self.headers["content-length"]
        self._file = file
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end, or until the reader goes away or his key ends.

        What goes wrong is raised, and the server breaks the connection off.
        """
        async with aclosing(self._file):
            sending = asyncio.create_task(self._send(send))
            leaving = asyncio.create_task(_left(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (sending, leaving):
                    task.cancel()
                sent, _ = await asyncio.gather(sending, leaving, return_exceptions=True)
            if isinstance(sent, Exception):
                raise sent

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for chunk in while_admitted(self._request, aiter(self._file)):
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _signal(place: SignalPlace) -> dict[str, Any]:
    return {"signal_id": place.id, "machine_id": place.machine_id, "name": place.name, "unit": place.unit}


def _json(body: dict[str, Any]) -> Response:
    """Arrays as they are, NaN as null."""
    return Response(orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")
