"""The audit record over HTTP, for operators and those who audit for them."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.common.clock import to_us
from services.common.http import Authenticated
from services.funding.audits import AuditService


class AuditEntryOut(BaseModel):
    id: int
    at_us: int
    credential_id: int = Field(description="key that it was done with; 0: the hub did it itself")
    action: str
    call_id: str | None
    application_id: str | None
    detail: dict[str, Any]
    correlation_id: str


class AuditPageOut(BaseModel):
    entries: list[AuditEntryOut]
    next_page_token: str


def router(service: AuditService) -> APIRouter:
    """Who did what."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/audit")
    async def list_entries(
        caller: Authenticated, call_id: str = "", application_id: str = "", page_size: int = 0, page_token: str = ""
    ) -> AuditPageOut:
        """Newest first, at most 100 a page; of a call or an application, if one is named."""
        found, token = await service.list_entries(
            caller, call_id=call_id, application_id=application_id, page_size=page_size, page_token=page_token
        )
        return AuditPageOut(
            entries=[
                AuditEntryOut(
                    id=entry.id,
                    at_us=to_us(entry.at),
                    credential_id=entry.credential_id,
                    action=entry.action,
                    call_id=entry.call_id,
                    application_id=entry.application_id,
                    detail=dict(entry.detail),
                    correlation_id=entry.correlation_id,
                )
                for entry in found
            ],
            next_page_token=token,
        )

    return routes
