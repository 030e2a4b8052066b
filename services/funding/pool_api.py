"""Co-investors' money for a call as a whole, over HTTP; for operators."""

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from services.common.http import Authenticated
from services.funding.domain import ProposalState
from services.funding.pool_store import PoolPledge
from services.funding.pools import Outcome, PoolService


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PoolPledgeIn(_In):
    request_id: str
    co_investor: str
    amount_pence: StrictInt
    supports: list[str] = Field(description="applications of the call that it would pay for")
    evidence: str = Field(description="what the confirmation rests on, such as the letter and its date")


class ReasonIn(_In):
    reason: str


class PoolPledgeOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    co_investor: str
    amount_pence: int
    supports: list[str]
    evidence: str
    added_us: int


class PoolPledgesOut(BaseModel):
    pledges: list[PoolPledgeOut]


class SpreadOut(BaseModel):
    id: str
    call_id: str
    state: ProposalState
    input: Any
    certificate: Any = Field(
        description="purchases in their order with who pays how much, what is left, and the reasons"
    )
    checker_agrees: bool
    checker_problems: list[str]
    refused: dict[str, str] = Field(description="applications whose payments could not be made pledges just now")


def router(service: PoolService) -> APIRouter:
    """Pool pledges, and their spread by equal shares."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/calls/{call_id}/pool-pledges")
    async def get_pledges(caller: Authenticated, call_id: str) -> PoolPledgesOut:
        return _pledges(await service.list(caller, call_id))

    @routes.post("/calls/{call_id}/pool-pledges", status_code=201)
    async def add(caller: Authenticated, call_id: str, body: PoolPledgeIn) -> PoolPledgesOut:
        """A co-investor's confirmed money for whichever of these applications it can pay together with others."""
        return _pledges(await service.add(caller, call_id, **body.model_dump()))

    @routes.post("/calls/{call_id}/pool-spreads", status_code=201)
    async def spread(caller: Authenticated, call_id: str) -> SpreadOut:
        """Of a closed call, before its budget is allocated; moves nothing."""
        return _out(await service.spread(caller, call_id))

    @routes.get("/pool-spreads/{spread_id}")
    async def get(caller: Authenticated, spread_id: str) -> SpreadOut:
        return _out(await service.get(caller, spread_id))

    @routes.post("/pool-spreads/{spread_id}/confirm")
    async def confirm(caller: Authenticated, spread_id: str, body: ReasonIn) -> SpreadOut:
        """By another operator; the payments become confirmed pledges of the applications."""
        return _out(await service.confirm(caller, spread_id, reason=body.reason))

    return routes


def _pledges(pledges: list[PoolPledge]) -> PoolPledgesOut:
    return PoolPledgesOut(pledges=[PoolPledgeOut.model_validate(one) for one in pledges])


def _out(outcome: Outcome) -> SpreadOut:
    spread = outcome.spread
    return SpreadOut(
        id=spread.id,
        call_id=spread.call_id,
        state=outcome.state,
        input=outcome.input,
        certificate=outcome.certificate,
        checker_agrees=not spread.problems,
        checker_problems=list(spread.problems),
        refused=dict(outcome.refused),
    )
