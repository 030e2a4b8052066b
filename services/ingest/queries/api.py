"""HTTP edge of the queries."""

from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.forms import as_dict
from services.ingest.queries.queries import Queries
from services.ingest.queries.store import Bucket


def query_router(queries: Queries) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["queries"])

    @router.get("/machines/{machine_id}")
    async def machine(machine_id: int, caller: Authenticated) -> dict[str, Any]:
        return as_dict(await queries.machine(caller, machine_id))

    @router.get("/machines/{machine_id}/latest")
    async def latest(machine_id: int, caller: Authenticated) -> dict[str, Any]:
        values = await queries.latest(caller, machine_id)
        return {
            "values": [
                {
                    "signal_id": one.signal_id,
                    "name": one.name,
                    "unit": one.unit,
                    "time_us": to_us(one.ts),
                    "value": one.value,
                }
                for one in values
            ]
        }

    @router.get("/signals/{signal_id}/history")
    async def history(
        signal_id: int,
        caller: Authenticated,
        from_us: int,
        to_us: int,
        resolution: str = "raw",
        page_size: int = 0,
        page_token: str = "",
    ) -> dict[str, Any]:
        found = await queries.history(caller, signal_id, from_us, to_us, resolution, page_size, page_token)
        return {
            "samples": [{"time_us": time_us, "value": value} for time_us, value in found.samples],
            "buckets": [_bucket(bucket) for bucket in found.buckets],
            "next_page_token": found.next_page_token,
        }

    return router


def _bucket(bucket: Bucket) -> dict[str, Any]:
    return {
        "time_us": to_us(bucket.ts),
        "count": bucket.count,
        "sum": bucket.sum,
        "min": bucket.min,
        "max": bucket.max,
        "last": bucket.last,
    }
