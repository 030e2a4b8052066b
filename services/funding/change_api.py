"""Change requests of awards over HTTP."""

from datetime import date

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from services.common.http import Authenticated
from services.funding.change_requests import Change, ChangeKind, ChangeService, ChangeState
from services.funding.domain import Cost, CostCategory


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)


class CostIn(_In):
    category: CostCategory
    amount_pence: StrictInt


class ChangeIn(_In):
    request_id: str
    kind: ChangeKind
    reason: str
    project_end: str = Field("", description="of the kind time: the new last day, ISO")
    costs: list[CostIn] = Field([], description="of the kind costs: all of them anew, with the same sum")
    reduction_pence: StrictInt = Field(0, description="of the kind reduction: so much less grant")


class ChangeDecisionIn(_In):
    approve: StrictBool
    reason: str


class ChangeOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    kind: ChangeKind
    reason: str
    project_end: date | None
    costs: list[CostIn] | None
    reduction_pence: int | None
    state: ChangeState
    requested_us: int
    decided_us: int | None
    decision_reason: str


class ChangesOut(BaseModel):
    changes: list[ChangeOut]


def router(service: ChangeService) -> APIRouter:
    """For the firm of the award and for operators."""
    routes = APIRouter(prefix="/v1/awards/{award_id}/changes")

    @routes.get("")
    async def get(caller: Authenticated, award_id: str) -> ChangesOut:
        return _out(await service.get(caller, award_id))

    @routes.post("", status_code=201)
    async def request(caller: Authenticated, award_id: str, body: ChangeIn) -> ChangesOut:
        """The firm: one at a time."""
        costs = [Cost(category=cost.category, amount_pence=cost.amount_pence) for cost in body.costs]
        fields = body.model_dump(exclude={"costs"})
        return _out(await service.request(caller, award_id, costs=costs, **fields))

    @routes.post("/{change_id}/decide")
    async def decide(caller: Authenticated, award_id: str, change_id: str, body: ChangeDecisionIn) -> ChangesOut:
        """Operators: what is approved takes effect at once, in the ledger too."""
        return _out(await service.decide(caller, award_id, change_id, **body.model_dump()))

    return routes


def _out(changes: list[Change]) -> ChangesOut:
    return ChangesOut(changes=[ChangeOut.model_validate(one) for one in changes])
