"""Groups of firms over HTTP, and what minimal financial assistance leaves for them."""

from datetime import date
from typing import Annotated

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from services.common.http import Authenticated
from services.funding.groups import GroupService
from services.funding.rules.size import Relation

FirmId = Annotated[int, Field(ge=0, le=2**63 - 1)]


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


class HoldingIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    percent: str = Field(description="the higher of capital and votes, exact decimal text; 0 gives it up")
    dominant_influence: StrictBool = Field(False, description="links both whatever the percentage")
    source: str = Field(description="what it rests on, such as the filing and its date")


class HoldingOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    owner_firm_id: int
    owned_firm_id: int
    percent: str
    dominant_influence: bool
    relation: Relation = Field(description="linked above 50 %, partner from 25 % (EU 2003/361), else autonomous")
    source: str


class EnterpriseOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    firm_id: int
    firm_ids: list[int] = Field(
        description="one enterprise: they share one limit and judge no application of each other"
    )
    groups: list[str] = Field(description="declared by operators")
    holdings: list[HoldingOut] = Field(
        description="those that make no link too: partners' figures count in part in the size"
    )


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

    @routes.put("/holdings/{owner_firm_id}/{owned_firm_id}")
    async def set_holding(
        caller: Authenticated, owner_firm_id: FirmId, owned_firm_id: FirmId, body: HoldingIn
    ) -> EnterpriseOut:
        """What one firm owns of another. Returns the enterprise of the firm that is owned."""
        found = await service.set_holding(caller, owner_firm_id, owned_firm_id, **body.model_dump())
        return EnterpriseOut.model_validate(found)

    @routes.get("/enterprise")
    async def enterprise(caller: Authenticated, firm_id: FirmId = 0) -> EnterpriseOut:
        """Who is one enterprise with the firm, and why."""
        return EnterpriseOut.model_validate(await service.enterprise(caller, firm_id))

    @routes.get("/assistance")
    async def headroom(caller: Authenticated, firm_id: FirmId = 0) -> HeadroomOut:
        """What this fund gave the firm and its sisters in the window, and what the limit leaves."""
        return HeadroomOut.model_validate(await service.headroom(caller, firm_id))

    return routes
