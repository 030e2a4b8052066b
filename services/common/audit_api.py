"""HTTP edge of the change log."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from services.common.audit import ChangeLog, Entry
from services.common.clock import to_us
from services.common.http import Authenticated


class EntryOut(BaseModel):
    """`credential_id` below 0: a person with a token, whose subject is `shown`; else the first characters of the key are."""

    id: int
    at_us: int
    role: str
    credential_id: int
    shown: str
    firm_id: int
    partner_id: int
    provider_id: str
    action: str
    ids: dict[str, Any]
    outcome: str
    correlation_id: str
    address: str


class EntriesOut(BaseModel):
    entries: list[EntryOut]
    next_page_token: str


def change_log_router(changes: ChangeLog) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["change log"])

    @router.get("/change-log")
    async def page(
        caller: Authenticated,
        firm_id: int = 0,
        credential_id: int = 0,
        page_size: int = 0,
        page_token: str = "",
    ) -> EntriesOut:
        """For operators: what people and partners changed, or tried to change, in this service, newest first."""
        entries, token = await changes.page(
            caller, firm_id=firm_id, credential_id=credential_id, page_size=page_size, page_token=page_token
        )
        return EntriesOut(entries=[_entry(one) for one in entries], next_page_token=token)

    return router


def _entry(entry: Entry) -> EntryOut:
    return EntryOut(
        id=entry.id,
        at_us=to_us(entry.at),
        role=entry.role,
        credential_id=entry.credential_id,
        shown=entry.shown,
        firm_id=entry.firm_id,
        partner_id=entry.partner_id,
        provider_id=entry.provider_id,
        action=entry.action,
        ids=dict(entry.ids),
        outcome=entry.outcome,
        correlation_id=entry.correlation_id,
        address=entry.address,
    )
