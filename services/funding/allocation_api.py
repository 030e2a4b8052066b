"""Allocations over HTTP, for operators: run, look, confirm by a second person, and the documents for whoever checks them."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from services.common.http import Authenticated
from services.funding.allocations import AllocationService, Carried
from services.funding.domain import ProposalState


class ConfirmIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reason: str


class WhyOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    application_id: str
    funded: bool
    code: str
    text: str


class AllocationOut(BaseModel):
    id: str
    call_id: str
    state: ProposalState
    method: str
    certificate_sha256: str
    budget_pence: int
    spent_pence: int
    left_pence: int
    spent_by_pot: dict[str, int]
    reasons: list[WhyOut] = Field(description="one for every application, those left out included")
    checker_agrees: bool
    checker_problems: list[str]
    checker_proof: str = Field(
        description="ranking, exhaustion, or bound: how the optimum was shown without the solver"
    )
    created_us: int
    confirmed_us: int | None
    pending: list[str] = Field(description="applications that wait to be decided; confirm again to go on")
    refused: dict[str, str] = Field(description="awards that a rule did not allow just now, by application")


class DocumentsOut(BaseModel):
    """What `python services/funding/checker.py FILE` checks."""

    input: Any
    certificate: Any


def router(service: AllocationService) -> APIRouter:
    """Allocations of closed calls."""
    routes = APIRouter(prefix="/v1")

    @routes.post("/calls/{call_id}/allocations", status_code=201)
    async def run(caller: Authenticated, call_id: str) -> AllocationOut:
        """Allocate a closed call by the method it declared; decides nothing."""
        return _out(await service.run(caller, call_id))

    @routes.get("/allocations/{allocation_id}")
    async def get(caller: Authenticated, allocation_id: str) -> AllocationOut:
        return _out(await service.get(caller, allocation_id))

    @routes.get("/allocations/{allocation_id}/documents")
    async def documents(caller: Authenticated, allocation_id: str) -> DocumentsOut:
        carried = await service.get(caller, allocation_id)
        return DocumentsOut(input=carried.input, certificate=carried.certificate)

    @routes.post("/allocations/{allocation_id}/confirm")
    async def confirm(caller: Authenticated, allocation_id: str, body: ConfirmIn) -> AllocationOut:
        """By another operator than who ran it; decides the applications, some hundred at a time."""
        return _out(await service.confirm(caller, allocation_id, reason=body.reason))

    return routes


def _out(carried: Carried) -> AllocationOut:
    allocation, spend = carried.allocation, carried.certificate["spend_p"]
    return AllocationOut(
        id=allocation.id,
        call_id=allocation.call_id,
        state=carried.state,
        method=carried.certificate["method"],
        certificate_sha256=allocation.certificate_sha256.hex(),
        budget_pence=spend["total"] + spend["left"],
        spent_pence=spend["total"],
        left_pence=spend["left"],
        spent_by_pot=spend["pots"],
        reasons=[WhyOut.model_validate(why) for why in carried.reasons],
        checker_agrees=not allocation.problems,
        checker_problems=list(allocation.problems),
        checker_proof=allocation.proof,
        created_us=allocation.created_us,
        confirmed_us=allocation.confirmed_us,
        pending=list(carried.pending),
        refused=dict(carried.refused),
    )
