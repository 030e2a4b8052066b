"""HTTP edge of the credentials."""

from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.common.identity import Role
from services.ingest.forms import Body
from services.ingest.registry.credentials import OVERLAP_S_DEFAULT, Credentials, Listed


class CredentialBody(Body):
    role: Role
    firm_id: int = 0
    partner_id: int = 0
    label: str = ""
    valid_from_us: int = 0
    valid_to_us: int = 0


class RotateBody(Body):
    overlap_s: int = OVERLAP_S_DEFAULT


def credential_router(credentials: Credentials) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["credentials"])

    @router.post("/credentials", status_code=201)
    async def issue_credential(body: CredentialBody, caller: Authenticated) -> dict[str, Any]:
        """The key is in this answer and nowhere else, ever."""
        key, credential = await credentials.issue(
            caller,
            body.role,
            firm_id=body.firm_id,
            partner_id=body.partner_id,
            label=body.label,
            valid_from_us=body.valid_from_us,
            valid_to_us=body.valid_to_us,
        )
        return {"key": key, "id": credential.id, "prefix": credential.prefix}

    @router.delete("/credentials/{credential_id}", status_code=204)
    async def revoke_credential(credential_id: int, caller: Authenticated) -> None:
        await credentials.revoke(caller, credential_id)

    @router.get("/credentials")
    async def page(caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = "") -> dict[str, Any]:
        """Credentials with state and last use, revoked ones too, in order of id. Operators see all with firm_id 0."""
        listed, token = await credentials.page(caller, firm_id, page_size, page_token)
        return {"credentials": [_said(one) for one in listed], "next_page_token": token}

    @router.post("/credentials/{credential_id}/rotate", status_code=201)
    async def rotate(credential_id: int, body: RotateBody, caller: Authenticated) -> dict[str, Any]:
        """A new key, in this answer and nowhere else; the old one stays valid for `overlap_s` (a day, if not said)."""
        key, credential = await credentials.rotate(caller, credential_id, body.overlap_s)
        return {"key": key, "id": credential.id, "prefix": credential.prefix, "replaces": credential_id}

    return router


def _said(one: Listed) -> dict[str, Any]:
    issued = one.issued
    return {
        "id": issued.id,
        "prefix": issued.prefix,
        "role": issued.role,
        "firm_id": issued.firm_id,
        "partner_id": issued.partner_id,
        "label": issued.label,
        "state": one.state,
        "valid_from_us": to_us(issued.valid_from),
        "valid_to_us": to_us(issued.valid_to) if issued.valid_to else None,
        "revoked_us": to_us(issued.revoked) if issued.revoked else None,
        "created_us": to_us(issued.created),
        "replaces": issued.replaces or None,
        "last_used_us": to_us(issued.used) if issued.used else None,
    }
