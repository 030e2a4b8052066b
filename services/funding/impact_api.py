"""Impact forms over HTTP."""

from datetime import date

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from services.common.http import Authenticated
from services.funding.impact import Figures, ImpactKind
from services.funding.impacts import Impact, ImpactService


class FiguresIn(BaseModel):
    """Of the part of the firm that the project is about, over one year."""

    model_config = ConfigDict(extra="forbid", from_attributes=True)

    jobs_fte: str = Field(description="full-time equivalents, decimal text")
    value_added_pence: StrictInt = Field(description="what was sold less what was bought for it")
    hours_worked: str
    energy_kwh: str
    carbon_kg_co2e: str


class ReportIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    year_ending: str = Field(description="ISO date; a baseline's year ends before the project, a follow-up's after it")
    figures: FiguresIn
    uncertainty_percent: str = Field(description="how far each figure may be off, by your own estimate")
    method: str = Field(description="how the figures were had: meters, payroll, estimate")


class ReportOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    kind: ImpactKind
    version: int
    year_ending: date
    figures: FiguresIn
    uncertainty_percent: str
    method: str
    reported_us: int


class ImpactOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    award_id: str
    reports: list[ReportOut]
    baseline_due: date
    follow_up_due: date


class TotalsOut(BaseModel):
    """Follow-up less baseline, over the projects that have both. Sums are exact and shown with two decimals, cut toward zero."""

    model_config = ConfigDict(from_attributes=True)

    projects: int
    jobs_fte: str
    value_added_pounds: str
    energy_kwh: str
    carbon_kg_co2e: str
    value_added_pounds_an_hour_before: str | None
    value_added_pounds_an_hour_after: str | None


class OverdueOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    award_id: str
    firm_id: int
    firm_name: str
    kind: ImpactKind
    due: date


class OverviewOut(BaseModel):
    projects: int
    baselines: int
    follow_ups: int
    totals: TotalsOut
    overdue: list[OverdueOut]


def router(service: ImpactService) -> APIRouter:
    """Forms of the firms, and the sums for partners and operators."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/awards/{award_id}/impact")
    async def get(caller: Authenticated, award_id: str) -> ImpactOut:
        return _out(await service.get(caller, award_id))

    @routes.post("/awards/{award_id}/impact/{kind}", status_code=201)
    async def report(caller: Authenticated, award_id: str, kind: ImpactKind, body: ReportIn) -> ImpactOut:
        """The firm: another form of the same kind corrects the one before."""
        figures = Figures(**body.figures.model_dump())
        fields = body.model_dump(exclude={"figures"})
        return _out(await service.report(caller, award_id, kind, figures=figures, **fields))

    @routes.get("/impact")
    async def overview(caller: Authenticated) -> OverviewOut:
        """Partners and operators: the sums of the programme, and which forms are overdue."""
        found = await service.overview(caller)
        return OverviewOut(
            projects=found.projects,
            baselines=found.baselines,
            follow_ups=found.follow_ups,
            totals=TotalsOut.model_validate(found.totals.shown()),
            overdue=[OverdueOut.model_validate(one) for one in found.overdue],
        )

    return routes


def _out(impact: Impact) -> ImpactOut:
    return ImpactOut.model_validate(impact)
