"""Open data over HTTP. Field names of 360Giving are the standard's own."""

import hashlib
import time
from collections import OrderedDict
from datetime import date

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from services.common.errors import SlowDown
from services.common.http import Authenticated
from services.funding.open_data import Duty, OpenDataService, Published
from services.funding.rules.exact import gbp

# The publisher's prefix has to be registered with 360Giving before the data are announced there.
PUBLISHER_PREFIX = "360G-smdih"
FUNDER_ID = f"{PUBLISHER_PREFIX}-ORG:fund"
ASKS_A_MINUTE = 60
ADDRESSES_MAX = 10_000
# For how long a cache may answer in our place.
FRESH_S = 300
FUNDER_NAME = "Smart Manufacturing Data Innovation Hub"


class OrganizationOut(BaseModel):
    id: str
    name: str


class PlannedDatesOut(BaseModel):
    startDate: date
    endDate: date


class GrantProgrammeOut(BaseModel):
    code: str
    title: str


class GrantOut(BaseModel):
    """One award as the 360Giving standard has it. Amounts are pounds."""

    id: str
    title: str
    description: str
    currency: str
    amountAwarded: float
    amountDisbursed: float
    awardDate: date
    plannedDates: list[PlannedDatesOut] | None = None
    recipientOrganization: list[OrganizationOut]
    fundingOrganization: list[OrganizationOut]
    grantProgramme: list[GrantProgrammeOut]


class GrantsOut(BaseModel):
    grants: list[GrantOut]


class EntryOut(BaseModel):
    award_id: str
    firm_id: int
    recipient: str
    grant_pence: int
    awarded_on: date
    due: date
    days_left: int = Field(description="negative once it is overdue")


class EntriesOut(BaseModel):
    entries: list[EntryOut]


class EntryIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reference: str = Field(description="the number of the entry in the subsidy database")


def public_router(service: OpenDataService, *, asks_a_minute: int = ASKS_A_MINUTE) -> APIRouter:
    """The awards, for everybody and without a key."""
    routes = APIRouter(prefix="/v1/open-data")
    allowance = Allowance(asks_a_minute)

    @routes.get("/360giving", response_model=GrantsOut, response_model_exclude_none=True)
    async def awards(request: Request, page_token: str = "") -> Response:
        """Open data, no key needed. Another page is named by the header Link, rel="next"; who sends the ETag back as If-None-Match
        gets 304 while nothing has changed."""
        allowance.take(request.client.host if request.client else "")
        found, token = await service.awards(page_token=page_token)
        body = GrantsOut(grants=[_grant(one) for one in found]).model_dump_json(exclude_none=True).encode()
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"Cache-Control": f"public, max-age={FRESH_S}", "ETag": tag, "Access-Control-Allow-Origin": "*"}
        if token:
            headers["Link"] = f'<{request.url.path}?page_token={token}>; rel="next"'
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(body, media_type="application/json", headers=headers)

    return routes


class Allowance:
    """How often one address may ask: so many at once, and as many a minute. Addresses are forgotten once they have it all back."""

    def __init__(self, asks_a_minute: int) -> None:
        self._most = float(asks_a_minute)
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str) -> None:
        """Raises SlowDown."""
        now = time.monotonic()
        left, since = self._left.pop(address, (self._most, now))
        left = min(self._most, left + (now - since) * self._most / 60)
        self._left[address] = (max(0.0, left - 1), now)
        if len(self._left) > ADDRESSES_MAX:
            self._left.popitem(last=False)
        if left < 1:
            raise SlowDown(
                "Too many requests from this address; keep what you have and use its ETag.", retry_after_s=60
            )


def router(service: OpenDataService) -> APIRouter:
    """The duties of the operators."""
    routes = APIRouter(prefix="/v1/open-data")

    @routes.get("/subsidy-entries")
    async def entries(caller: Authenticated) -> EntriesOut:
        """Awards that have to be in the public subsidy database and are not yet, the most urgent first."""
        return EntriesOut(entries=[_entry(duty) for duty in await service.duties(caller)])

    @routes.post("/subsidy-entries/{award_id}", status_code=204)
    async def record_entry(caller: Authenticated, award_id: str, body: EntryIn) -> None:
        await service.record_entry(caller, award_id, reference=body.reference)

    return routes


def _grant(published: Published) -> GrantOut:
    award = published.award
    dates = None
    if award.project_start and award.project_end:
        dates = [PlannedDatesOut(startDate=award.project_start, endDate=award.project_end)]
    return GrantOut(
        id=f"{PUBLISHER_PREFIX}-{award.id}",
        title=f"{award.call_title}: {published.recipient}",
        description=(
            # Not with whom: a provider may be a person.
            "Part of the cost of a manufacturer's project with an expert, a laboratory or a workshop; "
            f"{gbp(award.co_investment_pence)} of business money stands beside the grant."
        ),
        currency="GBP",
        amountAwarded=_pounds(award.grant_pence),
        amountDisbursed=_pounds(award.paid_pence),
        awardDate=award.awarded_on,
        plannedDates=dates,
        # The directory has no company number, which would make it GB-COH-; the standard then asks for the publisher's own.
        recipientOrganization=[
            OrganizationOut(id=f"{PUBLISHER_PREFIX}-ORG:firm-{award.firm_id}", name=published.recipient)
        ],
        fundingOrganization=[OrganizationOut(id=FUNDER_ID, name=FUNDER_NAME)],
        grantProgramme=[GrantProgrammeOut(code=award.call_id, title=award.call_title)],
    )


def _pounds(pence: int) -> float:
    # The standard wants a JSON number. Up to twelve digits a float shows exactly the two decimals that it was made of.
    return pence / 100


def _entry(duty: Duty) -> EntryOut:
    entry = duty.entry
    return EntryOut(
        award_id=entry.award_id,
        firm_id=entry.firm_id,
        recipient=duty.recipient,
        grant_pence=entry.grant_pence,
        awarded_on=entry.awarded_on,
        due=entry.due,
        days_left=duty.days_left,
    )
