"""HTTP edge of the audit."""

from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.registry.audit import Audit


def audit_router(audit: Audit) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["audit"])

    @router.get("/audit")
    async def page(caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = "") -> dict[str, Any]:
        """Who changed what in the registry, newest first. Operators see all with firm_id 0."""
        entries, token = await audit.page(caller, firm_id, page_size, page_token)
        return {
            "entries": [
                {
                    "id": entry.id,
                    "at_us": to_us(entry.at),
                    "firm_id": entry.firm_id,
                    "credential_id": entry.credential_id or None,
                    "action": entry.action,
                    "detail": entry.detail,
                    "correlation_id": entry.correlation_id,
                }
                for entry in entries
            ],
            "next_page_token": token,
        }

    return router
