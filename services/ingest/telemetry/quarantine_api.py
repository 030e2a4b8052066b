"""HTTP edge of the quarantine."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.forms import Body
from services.ingest.telemetry.quarantine import Quarantine
from services.ingest.telemetry.quarantine_store import Quarantined


class ReplayBody(Body):
    machine_id: int = 0


class ReplayAllBody(Body):
    reason: str
    page_token: str = ""


def quarantine_router(quarantine: Quarantine) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["quarantine"])

    @router.get("/quarantine")
    async def page(caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = "") -> dict[str, Any]:
        items, token = await quarantine.page(caller, firm_id, page_size, page_token)
        return {"items": [_item(item) for item in items], "next_page_token": token}

    @router.post("/quarantine/{item_id}/replay")
    async def replay(item_id: str, body: ReplayBody, caller: Authenticated) -> dict[str, Any]:
        result = await quarantine.replay(caller, item_id, body.machine_id)
        return {"accepted": result.accepted, "quarantined": result.quarantined}

    @router.post("/machines/{machine_id}/replay")
    async def replay_all(machine_id: int, body: ReplayAllBody, caller: Authenticated) -> dict[str, Any]:
        """Send what waits of a machine for one reason (such as OUT_OF_RANGE) through the door again, after it was mended.

        At most 5,000 items a call. `next_page_token`, given as `page_token`, goes on behind them; it is empty once everything that
        waits was looked at. `left` wait still, to come or refused again.
        """
        return asdict(await quarantine.replay_all(caller, machine_id, body.reason, body.page_token))

    return router


def _item(item: Quarantined) -> dict[str, Any]:
    return {
        "id": item.id,
        "firm_id": item.firm_id,
        "source": item.source,
        "door": item.door,
        "reason": item.reason,
        "detail": item.detail,
        "samples": item.samples,
        "received_us": to_us(item.received),
        "replayed_us": to_us(item.replayed) if item.replayed else None,
    }
