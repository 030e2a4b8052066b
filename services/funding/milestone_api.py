"""Milestones of awards over HTTP."""

from datetime import date
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from services.common.http import Authenticated
from services.funding.domain import checked_date
from services.funding.milestone import COVERAGE_MIN, Comparison, Milestone
from services.funding.milestones import MilestoneService
from services.funding.requests import understood


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MilestoneIn(_In):
    id: str
    title: str
    measure: str = Field("", description="as the hub measures it, such as energy_kwh; none: shown by a document")
    machine_id: StrictInt | None = Field(None, description="none: any machine of the firm")
    comparison: Comparison | None = None
    threshold: str = Field("", description="decimal text; equal is enough")
    days_min: StrictInt = Field(0, description="how long the evidence spans at least")
    coverage_min: str = Field("", description=f"share of that time that data stand for at least; none: {COVERAGE_MIN}")
    due: str = Field(description="ISO date; a claim for a later period, and the final claim, waits until it is met")


class MilestonesIn(_In):
    milestones: list[MilestoneIn]


class ShowIn(_In):
    evidence: dict[str, Any] = Field(description="exactly as GET /v1/machines/{id}/evidence gave it out")


class DocumentIn(_In):
    reference: str = Field(description="where it is kept")
    sha256: str = Field(description="of the file, 64 hexadecimal digits in lower case")


class ConfirmIn(_In):
    sha256: str = Field(description="of the document that was looked at")
    reason: str


class MilestoneOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    title: str
    measure: str
    machine_id: int | None
    comparison: Comparison | None
    threshold: str
    days_min: int
    coverage_min: str
    due: date
    met_us: int | None
    value: str
    statement_id: str
    document: str
    document_sha256: str
    document_sent_us: int | None


class MilestonesOut(BaseModel):
    milestones: list[MilestoneOut]


def router(service: MilestoneService) -> APIRouter:
    """For the firm of the award and for operators."""
    routes = APIRouter(prefix="/v1/awards/{award_id}/milestones")

    @routes.get("")
    async def get(caller: Authenticated, award_id: str) -> MilestonesOut:
        return _out(await service.get(caller, award_id))

    @routes.put("")
    async def put(caller: Authenticated, award_id: str, body: MilestonesIn) -> MilestonesOut:
        """Operators: these and no others, until the first is met."""
        with understood():
            wanted = [
                Milestone(
                    **one.model_dump(exclude={"due", "coverage_min"}),
                    coverage_min=one.coverage_min or (COVERAGE_MIN if one.measure else ""),
                    due=checked_date("due", one.due),
                )
                for one in body.milestones
            ]
        return _out(await service.set(caller, award_id, wanted))

    @routes.post("/{milestone_id}/evidence")
    async def show(caller: Authenticated, award_id: str, milestone_id: str, body: ShowIn) -> MilestonesOut:
        """The firm: signed evidence; its signature, firm, machine, measure, range, coverage and figure are checked."""
        return _out(await service.show(caller, award_id, milestone_id, body.evidence))

    @routes.post("/{milestone_id}/document")
    async def send_document(caller: Authenticated, award_id: str, milestone_id: str, body: DocumentIn) -> MilestonesOut:
        """The firm: of a milestone without a measure. Another one takes its place until an operator has confirmed."""
        return _out(await service.send_document(caller, award_id, milestone_id, **body.model_dump()))

    @routes.post("/{milestone_id}/confirm")
    async def confirm(caller: Authenticated, award_id: str, milestone_id: str, body: ConfirmIn) -> MilestonesOut:
        """Operators: exactly this document has been looked at, and the milestone is met."""
        return _out(await service.confirm(caller, award_id, milestone_id, **body.model_dump()))

    return routes


def _out(milestones: list[Milestone]) -> MilestonesOut:
    return MilestonesOut(milestones=[MilestoneOut.model_validate(one) for one in milestones])
