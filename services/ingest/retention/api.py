"""HTTP edge of retention and storage."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.forms import Body
from services.ingest.retention.rules import STORES, Rule
from services.ingest.retention.service import Retention


class RuleBody(Body):
    raw_days: int | None = None
    minute_days: int | None = None
    hour_days: int | None = None
    is_on_hold: bool = False
    reason: str


def retention_router(retention: Retention) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["retention"])

    @router.get("/retention")
    async def overview(caller: Authenticated) -> dict[str, Any]:
        """For operators: how long data are kept, the firms with a rule of their own, and what was removed lately."""
        found = await retention.overview(caller)
        return {
            "defaults": _days(Rule()),
            "firms": [{"firm_id": firm_id, **_rule(rule)} for firm_id, rule in found.rules.items()],
            "runs": [
                {
                    "started_us": to_us(run.started),
                    "finished_us": to_us(run.finished) if run.finished else None,
                    "chunks_dropped": run.chunks_dropped,
                    "rows_removed": run.rows_removed,
                    "problem": run.problem,
                }
                for run in found.runs
            ],
        }

    @router.get("/firms/{firm_id}/retention")
    async def of_firm(firm_id: int, caller: Authenticated) -> dict[str, Any]:
        """How long the data of a firm are kept, by resolution."""
        return _rule(await retention.of_firm(caller, firm_id))

    @router.put("/firms/{firm_id}/retention")
    async def decide(firm_id: int, body: RuleBody, caller: Authenticated) -> dict[str, Any]:
        """For operators: keep a firm's data for so many days, or on hold. What is left out is as the hub keeps everybody's."""
        return _rule(await retention.decide(caller, firm_id, Rule(**body.model_dump())))

    @router.get("/storage")
    async def storage(caller: Authenticated) -> dict[str, Any]:
        """For operators: size and growth of what is stored, and for how many days the disk lasts.

        `days_left` null: NO_DISK_SIZE (set SMDIH_DATABASE_DISK_BYTES), NOT_ENOUGH_DATA, or FITS (retention will remove as much as
        arrives before the disk is full).
        """
        found = await retention.forecast(caller)
        return {
            "database_bytes": found.database_bytes,
            "disk_bytes": found.disk_bytes or None,
            "growth_bytes_a_day": _whole(found.growth_bytes_a_day),
            "days_left": None if found.days_left is None else round(found.days_left, 1),
            "reason": found.reason,
            "stores": [
                {
                    "resolution": size.store.name,
                    "bytes": size.size_bytes,
                    "chunks": size.chunks,
                    "growth_bytes_a_day": _whole(size.growth_bytes_a_day),
                    "days_kept": size.days_kept,
                    "full_bytes": _whole(size.full_bytes),
                }
                for size in found.stores
            ],
        }

    return router


def _days(rule: Rule) -> dict[str, int]:
    return {f"{store.name}_days": rule.days(store) for store in STORES}


def _rule(rule: Rule) -> dict[str, Any]:
    return {"in_force": None if rule.is_on_hold else _days(rule), "own": asdict(rule)}


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)
