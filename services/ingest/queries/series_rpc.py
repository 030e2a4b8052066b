"""gRPC edge of the queries over several signals: buckets, plots, files."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from services.common.errors import Invalid
from services.common.rpc import current_caller
from services.ingest.queries.export import Export, Wanted
from services.ingest.queries.queries import Queries
from smdih.ingest.v1 import query_pb2, series_pb2, series_pb2_grpc

_FILLS = {
    series_pb2.FILL_UNSPECIFIED: "none",
    series_pb2.FILL_EMPTY: "empty",
    series_pb2.FILL_LOCF: "locf",
}
_FORMATS = {
    series_pb2.EXPORT_FORMAT_UNSPECIFIED: ("csv", False),
    series_pb2.EXPORT_FORMAT_CSV: ("csv", False),
    series_pb2.EXPORT_FORMAT_CSV_GZIP: ("csv", True),
    series_pb2.EXPORT_FORMAT_PARQUET: ("parquet", False),
}
_RESOLUTIONS = {
    query_pb2.RESOLUTION_UNSPECIFIED: "raw",
    query_pb2.RESOLUTION_RAW: "raw",
    query_pb2.RESOLUTION_MINUTE: "minute",
    query_pb2.RESOLUTION_HOUR: "hour",
}
_LAYOUTS = {
    series_pb2.EXPORT_LAYOUT_UNSPECIFIED: "wide",
    series_pb2.EXPORT_LAYOUT_WIDE: "wide",
    series_pb2.EXPORT_LAYOUT_NARROW: "narrow",
}


class SeriesServicer(series_pb2_grpc.SeriesServiceServicer):
    def __init__(self, queries: Queries, export: Export) -> None:
        self._queries = queries
        self._export = export

    async def ListBuckets(self, request: series_pb2.ListBucketsRequest, context: Any) -> series_pb2.ListBucketsResponse:
        found = await self._queries.buckets(
            current_caller(),
            request.signal_ids,
            request.from_us,
            request.to_us,
            request.width_s,
            _FILLS.get(request.fill, "unknown"),
        )
        response = series_pb2.ListBucketsResponse(
            from_us=found.from_us, to_us=found.to_us, width_s=found.width_s, resolution=found.resolution
        )
        for one in found.series:
            response.series.add(
                signal_id=one.signal.id,
                machine_id=one.signal.machine_id,
                name=one.signal.name,
                unit=one.signal.unit,
                times_us=one.times_us,
                counts=one.counts,
                sums=one.sums,
                means=one.means,
                mins=one.mins,
                maxs=one.maxs,
                lasts=one.lasts,
            )
        return response

    async def Plot(self, request: series_pb2.PlotRequest, context: Any) -> series_pb2.PlotResponse:
        found = await self._queries.plot(
            current_caller(), request.signal_ids, request.from_us, request.to_us, request.points
        )
        response = series_pb2.PlotResponse(resolution=found.resolution)
        for one in found.series:
            response.series.add(
                signal_id=one.signal.id,
                machine_id=one.signal.machine_id,
                name=one.signal.name,
                unit=one.signal.unit,
                times_us=one.times_us,
                values=one.values,
            )
        return response

    async def Export(self, request: series_pb2.ExportRequest, context: Any) -> AsyncIterator[series_pb2.ExportResponse]:
        if request.format not in _FORMATS or request.layout not in _LAYOUTS:
            raise Invalid("format and layout: one of those that the contract names.")
        format_, gzip = _FORMATS[request.format]
        wanted = Wanted(
            request.signal_ids,
            request.machine_id,
            request.from_us,
            request.to_us,
            format_,
            _LAYOUTS[request.layout],
            gzip,
            not request.headless,
            _RESOLUTIONS.get(request.resolution, "unknown"),
        )
        async with aclosing(await self._export.file(current_caller(), wanted)) as file:
            async for chunk in file:
                yield series_pb2.ExportResponse(data=chunk)
