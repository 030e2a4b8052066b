"""Groups of firms over HTTP, and what minimal financial assistance leaves for them."""

from datetime import date

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from services.common.http import Authenticated
from services.funding.groups import GroupService


class GroupIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    firm_ids: list[StrictInt] = Field(description="all firms of the group; none gives it up")
    source: str = Field(description="what it rests on, such as the filing that shows who controls whom")


class GroupOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: str
    source: str
    firm_ids: list[int]


class GivenOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    on: date
    amount_pence: int


class HeadroomOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    firm_ids: list[int]
    window_start: date
    given: list[GivenOut]
    counted_pence: int
    headroom_pence: int


def router(service: GroupService) -> APIRouter:
    """Groups for operators; the headroom also for the firm itself."""
    routes = APIRouter(prefix="/v1")

    @routes.put("/groups/{group_id}")
    async def set_group(caller: Authenticated, group_id: str, body: GroupIn) -> GroupOut:
        """Firms under common control share one limit of minimal financial assistance."""
        return GroupOut.model_validate(await service.set_group(caller, group_id, **body.model_dump()))

    @routes.get("/groups/{group_id}")
    async def get_group(caller: Authenticated, group_id: str) -> GroupOut:
        return GroupOut.model_validate(await service.get_group(caller, group_id))

    @routes.get("/assistance")
    async def headroom(caller: Authenticated, firm_id: int = 0) -> HeadroomOut:
        """What this fund gave the firm and its sisters in the window, and what the limit leaves."""
        return HeadroomOut.model_validate(await service.headroom(caller, firm_id))

    return routes
