"""Samples of the historian, asked of ingest with the key of whoever asks us: nobody sees here what they may not see there."""

from dataclasses import dataclass
from typing import TypeAlias

import grpc
import numpy as np
from numpy.typing import NDArray

from services.common import tracing
from services.common.errors import Conflict, NotFound, SlowDown, TryAgain
from services.common.logs import current_correlation_id, get_logger
from services.common.tls import PeerChannel
from smdih.ingest.v1 import query_pb2 as pb
from smdih.ingest.v1 import query_pb2_grpc as pb_grpc

log = get_logger(__name__)

CALL_TIMEOUT_S = 10
PAGE_SIZE = 10_000
RETRY_AFTER_S = 2
HOUR_US = 3_600_000_000
MINUTE_US = 60_000_000

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True)
class Buckets:
    """Rollups of a signal: starts, and per bucket how many samples, the least and the greatest."""

    times_us: Ints
    counts: Ints
    least: Floats
    greatest: Floats


class Samples:
    """Asks the door's QueryService. Raises NotFound, TryAgain; Conflict where this process was not told where the door is."""

    def __init__(self, peer: PeerChannel) -> None:
        self._peer = peer

    async def close(self) -> None:
        await self._peer.close()

    async def raw(self, key: str, signal_id: int, *, from_us: int, to_us: int, limit: int) -> tuple[Ints, Floats]:
        """Samples in order of time, at most `limit` of them."""
        times: list[int] = []
        values: list[float] = []
        token = ""
        while len(times) < limit:
            request = pb.HistoryRequest(
                signal_id=signal_id,
                from_us=from_us,
                to_us=to_us,
                resolution=pb.RESOLUTION_RAW,
                page_size=min(PAGE_SIZE, limit - len(times)),
                page_token=token,
            )
            page = await self._history(key, request)
            times += [sample.time_us for sample in page.samples]
            values += [sample.value for sample in page.samples]
            token = page.next_page_token
            if not token:
                break
        return np.array(times, dtype=np.int64), np.array(values, dtype=np.float64)

    async def buckets(self, key: str, signal_id: int, *, from_us: int, to_us: int, resolution: int) -> Buckets:
        """Buckets of a minute or an hour (MINUTE_US, HOUR_US); the caller bounds the range."""
        found: list[pb.Bucket] = []
        token = ""
        while True:
            request = pb.HistoryRequest(
                signal_id=signal_id,
                from_us=from_us,
                to_us=to_us,
                resolution=pb.RESOLUTION_HOUR if resolution == HOUR_US else pb.RESOLUTION_MINUTE,
                page_size=PAGE_SIZE,
                page_token=token,
            )
            page = await self._history(key, request)
            found += page.buckets
            token = page.next_page_token
            if not token:
                break
        return Buckets(
            np.array([bucket.time_us for bucket in found], dtype=np.int64),
            np.array([bucket.count for bucket in found], dtype=np.int64),
            np.array([bucket.min for bucket in found], dtype=np.float64),
            np.array([bucket.max for bucket in found], dtype=np.float64),
        )

    async def _history(self, key: str, request: pb.HistoryRequest) -> pb.HistoryResponse:
        if not self._peer.target:
            raise Conflict(
                "This hub's alarm service was not told where samples are (SMDIH_INGEST_GRPC).", reason="NO_SAMPLES"
            )
        correlation_id = current_correlation_id()
        metadata = (("authorization", f"Bearer {key}"), ("x-correlation-id", correlation_id))
        try:
            with tracing.span("QueryService/History", correlation_id, kind="client"):
                response: pb.HistoryResponse = await pb_grpc.QueryServiceStub(self._peer.channel()).History(
                    request, metadata=(*metadata, *tracing.metadata(correlation_id)), timeout=CALL_TIMEOUT_S
                )
        except grpc.aio.AioRpcError as error:
            code = error.code()
            log.info("samples not had", code=code.name, detail=error.details())
            if code is grpc.StatusCode.NOT_FOUND:
                raise NotFound("There are no samples of this signal, or this key may not see them.") from error
            if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise SlowDown("Ingest asks to wait; ask again.", retry_after_s=RETRY_AFTER_S) from error
            raise TryAgain(
                "Ingest, which has the samples, does not answer; ask again.", retry_after_s=RETRY_AFTER_S
            ) from error
        return response
