"""HTTP edge of the proposals of signals."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.diagnosis.proposal_store import Proposal
from services.ingest.domain import NewSignal
from services.ingest.forms import Body, as_dict
from services.ingest.proposals import signalguess
from services.ingest.proposals.service import Proposals


class PolicyBody(Body):
    policy: str


class AcceptBody(Body):
    unit: str = ""
    range_min: float | None = None
    range_max: float | None = None


def proposal_router(proposals: Proposals) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["signal proposals"])

    @router.get("/firms/{firm_id}/unknown-signals")
    async def policy(firm_id: int, caller: Authenticated) -> dict[str, str]:
        return {"policy": await proposals.policy(caller, firm_id)}

    @router.put("/firms/{firm_id}/unknown-signals")
    async def set_policy(firm_id: int, body: PolicyBody, caller: Authenticated) -> dict[str, str]:
        """`refuse`: samples of signals that a machine does not have go to quarantine; `propose`: and the signal is proposed."""
        await proposals.set_policy(caller, firm_id, body.policy)
        return {"policy": await proposals.policy(caller, firm_id)}

    @router.get("/signal-proposals")
    async def page(
        caller: Authenticated,
        firm_id: int = 0,
        machine_id: int = 0,
        dismissed: bool = False,
        page_size: int = 0,
        page_token: str = "",
    ) -> dict[str, Any]:
        """Signals that machines send and do not have. `guessed_unit` is a guess from the name."""
        found, token = await proposals.page(
            caller, firm_id, machine_id, page_size, page_token, with_dismissed=dismissed
        )
        return {"proposals": [_said(one) for one in found], "next_page_token": token}

    @router.post("/signal-proposals/{proposal_id}/accept")
    async def accept(proposal_id: int, body: AcceptBody, caller: Authenticated) -> dict[str, Any]:
        """Make the signal and replay what waits for it in quarantine, in one call.

        `left`: items that are still to be replayed, as there were many or the hub was busy: POST /v1/machines/{id}/replay.
        """
        done = await proposals.accept(caller, proposal_id, NewSignal("", body.unit, body.range_min, body.range_max))
        return {"machine": as_dict(done.machine), "replayed": asdict(done.replayed)}

    @router.post("/signal-proposals/{proposal_id}/dismiss", status_code=204)
    async def dismiss(proposal_id: int, caller: Authenticated) -> None:
        await proposals.dismiss(caller, proposal_id)

    return router


def _said(one: Proposal) -> dict[str, Any]:
    return {
        "id": one.id,
        "firm_id": one.firm_id,
        "machine_id": one.machine_id,
        "machine": one.path,
        "name": one.name,
        "guessed_unit": signalguess.unit(one.name),
        "guessed_kind": signalguess.kind(lowest=one.lowest, highest=one.highest, is_whole=one.whole),
        "samples": one.samples,
        "first_us": to_us(one.first),
        "last_us": to_us(one.last),
        "example": one.example,
        "lowest": one.lowest,
        "highest": one.highest,
        "source": one.source,
        "dismissed_us": to_us(one.dismissed) if one.dismissed else None,
    }
