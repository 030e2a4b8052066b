"""What people can do with impact forms: firms fill them in when they are due, operators see the whole."""

from dataclasses import dataclass, replace
from datetime import date, timedelta

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated
from services.funding import impact_store
from services.funding.agreement import Agreement, AgreementState
from services.funding.agreement_store import agreement_of, lock_award
from services.funding.award_store import audit
from services.funding.domain import checked_date, is_id, uk_day
from services.funding.impact import VERSIONS_MAX, Figures, ImpactKind, Report, Totals, checked_report, totals
from services.funding.parameters import ParameterTable
from services.funding.requests import understood
from services.funding.rules.calendar import add_months

PROJECTS_MAX = 20_000
_REPORTING = (AgreementState.ACCEPTED, AgreementState.COMPLETE, AgreementState.LAPSED)


@dataclass(frozen=True, kw_only=True)
class Impact:
    """The forms of one award, oldest first, and the last days for them."""

    award_id: str
    reports: tuple[Report, ...]
    baseline_due: date
    follow_up_due: date


@dataclass(frozen=True, kw_only=True)
class Overdue:
    award_id: str
    firm_id: int
    firm_name: str
    kind: ImpactKind
    due: date


@dataclass(frozen=True, kw_only=True)
class Overview:
    """The whole programme: projects, how many have which form, the sums, and what is overdue, the longest overdue first."""

    projects: int
    baselines: int
    follow_ups: int
    totals: Totals
    overdue: tuple[Overdue, ...]


class ImpactService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, table: ParameterTable, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._table = table
        self._directory = directory
        self._clock = clock

    async def report(
        self,
        caller: Caller,
        award_id: str,
        kind: ImpactKind,
        *,
        year_ending: str,
        figures: Figures,
        uncertainty_percent: str,
        method: str,
    ) -> Impact:
        """The firm's form; another one corrects it, and both are kept. The same again changes nothing."""
        caller.require(Role.FIRM)
        with understood():
            day = checked_date("year_ending", year_ending)
        async with transaction(self._pool) as connection:
            await self._agreement(connection, caller, award_id)
            await lock_award(connection, award_id)
            agreement = await self._agreement(connection, caller, award_id)
            start, end = _project(agreement)
            there = await impact_store.reports_of(connection, award_id)
            earlier = [one for one in there if one.kind is kind]
            report = Report(
                kind=kind,
                version=len(earlier) + 1,
                year_ending=day,
                figures=figures,
                uncertainty_percent=uncertainty_percent,
                method=method,
                reported_us=self._clock.now_us(),
            )
            with understood():
                checked_report(report, start=start, end=end)
            if day > self._today():
                raise Conflict("The year has not ended yet.", reason="YEAR_OPEN")
            if earlier and replace(earlier[-1], version=report.version, reported_us=report.reported_us) == report:
                return self._impact(agreement, there)
            if len(earlier) >= VERSIONS_MAX:
                raise Conflict(f"A form has at most {VERSIONS_MAX} versions.", reason="TOO_MANY_VERSIONS")
            await impact_store.add_report(connection, award_id, report, credential_id=caller.credential_id)
            with correlated(agreement.award.correlation_id):
                await audit(
                    connection,
                    "impact_reported",
                    credential_id=caller.credential_id,
                    now_us=report.reported_us,
                    call_id=agreement.award.call_id,
                    application_id=agreement.award.application_id,
                    detail={"award_id": award_id, "kind": kind, "version": report.version},
                )
            return self._impact(agreement, [*there, report])

    async def get(self, caller: Caller, award_id: str) -> Impact:
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            agreement = await self._agreement(connection, caller, award_id)
            return self._impact(agreement, await impact_store.reports_of(connection, award_id))

    async def overview(self, caller: Caller) -> Overview:
        caller.require(Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            found = await impact_store.projects(connection, limit=PROJECTS_MAX)
        today, overdue = self._today(), []
        for project in found:
            due = self._due(project.project_start, project.project_end)
            for kind, report in ((ImpactKind.BASELINE, project.baseline), (ImpactKind.FOLLOW_UP, project.follow_up)):
                if report is None and due[kind] < today:
                    firm = self._directory.firms.get(project.firm_id)
                    name = firm.name if firm else f"Firm {project.firm_id}"
                    overdue.append(
                        Overdue(
                            award_id=project.award_id,
                            firm_id=project.firm_id,
                            firm_name=name,
                            kind=kind,
                            due=due[kind],
                        )
                    )
        pairs = [(one.baseline.figures, one.follow_up.figures) for one in found if one.baseline and one.follow_up]
        return Overview(
            projects=len(found),
            baselines=sum(one.baseline is not None for one in found),
            follow_ups=sum(one.follow_up is not None for one in found),
            totals=totals(pairs),
            overdue=tuple(sorted(overdue, key=lambda one: (one.due, one.award_id))),
        )

    def _impact(self, agreement: Agreement, reports: list[Report]) -> Impact:
        due = self._due(*_project(agreement))
        return Impact(
            award_id=agreement.award.id,
            reports=tuple(reports),
            baseline_due=due[ImpactKind.BASELINE],
            follow_up_due=due[ImpactKind.FOLLOW_UP],
        )

    def _due(self, start: date, end: date) -> dict[ImpactKind, date]:
        return {
            ImpactKind.BASELINE: start
            + timedelta(days=self._table.at(start).whole("impact.baseline_days_after_start")),
            ImpactKind.FOLLOW_UP: add_months(end, self._table.at(end).whole("impact.follow_up_months_after_end")),
        }

    async def _agreement(self, connection: Connection, caller: Caller, award_id: str) -> Agreement:
        found = await agreement_of(connection, award_id) if is_id(award_id) else None
        if found is None or (caller.role is Role.FIRM and found.award.firm_id != caller.firm_id):
            raise NotFound("There is no such award, or this key may not see it.", reason="AWARD_UNKNOWN")
        if found.state not in _REPORTING:
            raise Conflict(
                f"The award is {found.state}; impact is reported for one that was accepted.",
                reason=f"AWARD_{found.state.upper()}",
            )
        return found

    def _today(self) -> date:
        return uk_day(from_us(self._clock.now_us()))


def _project(agreement: Agreement) -> tuple[date, date]:
    assert agreement.project_start is not None, "an accepted agreement has its dates"
    assert agreement.project_end is not None, "an accepted agreement has its dates"
    return agreement.project_start, agreement.project_end
