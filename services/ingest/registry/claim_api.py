"""HTTP edge of the claim codes."""

from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.forms import Body
from services.ingest.registry.claim_store import ClaimCode, Place
from services.ingest.registry.claims import EXPIRES_IN_S_DEFAULT, Claims


class ClaimCodeBody(Body):
    firm_id: int = 0
    site_id: int = 0
    machine_id: int = 0
    label: str = ""
    expires_in_s: int = EXPIRES_IN_S_DEFAULT
    key_valid_days: int = 0


class ClaimBody(Body):
    code: str
    request_id: str


def claim_code_router(claims: Claims) -> APIRouter:
    """For those who make the codes."""
    router = APIRouter(prefix="/v1", tags=["claim codes"])

    @router.post("/claim-codes", status_code=201)
    async def create(body: ClaimCodeBody, caller: Authenticated) -> dict[str, Any]:
        """A code that one new gateway may exchange for a key, once. It is in this answer and nowhere else."""
        new = await claims.create(
            caller,
            Place(body.firm_id, body.site_id, body.machine_id),
            label=body.label,
            expires_in_s=body.expires_in_s,
            key_valid_days=body.key_valid_days,
        )
        return {"id": new.id, "code": new.code, "expires_us": new.expires_us}

    @router.get("/claim-codes")
    async def page(caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = "") -> dict[str, Any]:
        """Codes with their state (open, used, expired, locked), newest first; without what would let anybody use them."""
        listed, token = await claims.page(caller, firm_id, page_size, page_token)
        return {"claim_codes": [_said(code, state) for code, state in listed], "next_page_token": token}

    @router.delete("/claim-codes/{code_id}", status_code=204)
    async def cancel(code_id: int, caller: Authenticated) -> None:
        await claims.cancel(caller, code_id)

    return router


def claim_router(claims: Claims) -> APIRouter:
    """For the gateway, which has no key yet."""
    router = APIRouter(prefix="/v1", tags=["claim codes"])

    @router.post("/claims", status_code=201)
    async def exchange(body: ClaimBody) -> dict[str, Any]:
        """A key for a claim code; needs no key. `request_id`: 16 random characters or more, the same in a repeat.

        The same request again within ten minutes gets the same key. 400 CLAIM_MISTYPED, 404 CLAIM_UNKNOWN, 409 CLAIM_USED,
        CLAIM_EXPIRED, CLAIM_LOCKED (after five wrong tries), 429: send again after Retry-After seconds.
        """
        claimed = await claims.exchange(body.code, body.request_id)
        return {
            "key": claimed.key,
            "credential_id": claimed.credential_id,
            "site": claimed.site,
            "machine": claimed.machine,
        }

    return router


def _said(code: ClaimCode, state: str) -> dict[str, Any]:
    return {
        "id": code.id,
        "begins": code.lookup,
        "state": state,
        "firm_id": code.firm_id,
        "site_id": code.site_id or None,
        "machine_id": code.machine_id or None,
        "label": code.label,
        "created_us": to_us(code.created),
        "expires_us": to_us(code.expires),
        "used_us": to_us(code.used) if code.used else None,
        "credential_id": code.credential_id or None,
    }
