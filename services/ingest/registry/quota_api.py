"""HTTP edge of the quotas."""

from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.forms import Body
from services.ingest.registry.quota_store import Quota
from services.ingest.registry.quotas import QuotaInForce, Quotas


class QuotaBody(Body):
    samples_per_s: int | None = None
    signals: int | None = None
    stored_days: int | None = None


def quota_router(quotas: Quotas) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["quotas"])

    @router.get("/firms/{firm_id}/quota")
    async def quota(firm_id: int, caller: Authenticated) -> dict[str, Any]:
        """What the firm may use, and what it uses now. `set_by_operator`: null where the default holds."""
        return _said(await quotas.of_firm(caller, firm_id))

    @router.put("/firms/{firm_id}/quota")
    async def change(firm_id: int, body: QuotaBody, caller: Authenticated) -> dict[str, Any]:
        """Operators set the quota; what is left out or null becomes the default."""
        await quotas.change(caller, firm_id, Quota(body.samples_per_s, body.signals, body.stored_days))
        return _said(await quotas.of_firm(caller, firm_id))

    return router


def _said(quota: QuotaInForce) -> dict[str, Any]:
    return {
        "samples_per_s": quota.samples_per_s,
        "signals": quota.signals,
        "stored_days": quota.stored_days,
        "set_by_operator": {
            "samples_per_s": quota.own.samples_per_s,
            "signals": quota.own.signals,
            "stored_days": quota.own.stored_days,
        },
        "use": {
            "samples_per_s": round(quota.use.samples_per_s, 1),
            "signals": quota.use.signals,
            "machines": quota.use.machines,
            "oldest_sample_us": to_us(quota.use.oldest) if quota.use.oldest else None,
            "quarantine_bytes": quota.use.quarantine_bytes,
            "quarantine_refused_samples": quota.use.quarantine_refused_samples,
        },
    }
