"""The impact form: a firm's yearly figures before and after a project, and what they come to over the whole programme."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date
from enum import StrEnum
from fractions import Fraction

from services.funding.domain import AMOUNT_PENCE_MAX, DECIMAL_CHARACTERS_MAX, Refused, checked_text
from services.funding.rules.exact import InvalidFact, decimal, fixed_down

VERSIONS_MAX = 20
WHOLE_MAX = 10**12


class ImpactKind(StrEnum):
    BASELINE = "baseline"
    FOLLOW_UP = "follow_up"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of the part of the firm that the project is about, over one year; decimal text."""

    jobs_fte: str
    # Value added: what was sold less what was bought for it.
    value_added_pence: int
    hours_worked: str
    energy_kwh: str
    carbon_kg_co2e: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """One form. `uncertainty_percent`: how far each figure may be off, by the firm's own estimate."""

    kind: ImpactKind
    version: int
    year_ending: date
    figures: Figures
    uncertainty_percent: str
    # How the figures were had: meters, payroll, estimate.
    method: str
    reported_us: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """After less before; productivity is value added an hour, None where no hours were worked."""

    jobs_fte: Fraction
    value_added_pence: Fraction
    energy_kwh: Fraction
    carbon_kg_co2e: Fraction
    productivity_before: Fraction | None
    productivity_after: Fraction | None


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over the projects that have both forms. Of their productivity the total value added an hour is compared, so that a
    large project counts for more than a small one."""

    projects: int
    jobs_fte: Fraction
    value_added_pence: Fraction
    energy_kwh: Fraction
    carbon_kg_co2e: Fraction
    productivity_before: Fraction | None
    productivity_after: Fraction | None

    def shown(self) -> "ShownTotals":
        return ShownTotals(
            projects=self.projects,
            jobs_fte=_shown(self.jobs_fte),
            value_added_pounds=_shown(self.value_added_pence / 100),
            energy_kwh=_shown(self.energy_kwh),
            carbon_kg_co2e=_shown(self.carbon_kg_co2e),
            value_added_pounds_an_hour_before=_pounds(self.productivity_before),
            value_added_pounds_an_hour_after=_pounds(self.productivity_after),
        )


@dataclass(frozen=True, kw_only=True)
class ShownTotals:
    """The exact sums as people read them: with two decimals, cut toward zero."""

    projects: int
    jobs_fte: str
    value_added_pounds: str
    energy_kwh: str
    carbon_kg_co2e: str
    value_added_pounds_an_hour_before: str | None
    value_added_pounds_an_hour_after: str | None


def _shown(value: Fraction) -> str:
    return f"-{fixed_down(-value)}" if value < 0 else fixed_down(value)


def _pounds(pence: Fraction | None) -> str | None:
    return None if pence is None else _shown(pence / 100)


def checked_report(report: Report, *, start: date, end: date) -> Report:
    """Raises Refused when a figure is out of range, or the year is not the one before or after the project."""
    figures = report.figures
    for field in fields(figures):
        value = getattr(figures, field.name)
        if isinstance(value, str):
            _checked_decimal(field.name, value, WHOLE_MAX)
        elif not 0 <= value <= AMOUNT_PENCE_MAX:
            raise Refused(f"{field.name} is from 0 to {AMOUNT_PENCE_MAX} pence.", "AMOUNT_OUT_OF_RANGE")
    _checked_decimal("uncertainty_percent", report.uncertainty_percent, 100)
    checked_text("method", report.method)
    if report.kind is ImpactKind.BASELINE and report.year_ending >= start:
        raise Refused(
            f"A baseline is of a year that ended before the project began on {start.isoformat()}.", "YEAR_OUT_OF_RANGE"
        )
    if report.kind is ImpactKind.FOLLOW_UP and report.year_ending <= end:
        raise Refused(
            f"A follow-up is of a year that ended after the project's end on {end.isoformat()}.", "YEAR_OUT_OF_RANGE"
        )
    return report


def _checked_decimal(name: str, text: str, most: int) -> Fraction:
    try:
        value = decimal(text) if len(text) <= DECIMAL_CHARACTERS_MAX else None
    except InvalidFact as error:
        raise Refused(f"{name}: {error}", "DECIMAL_INVALID") from error
    if value is None or value > most:
        raise Refused(f"{name} is a decimal number from 0 to {most}.", "DECIMAL_INVALID")
    return value


def change_between(before: Figures, after: Figures) -> Change:
    return Change(
        jobs_fte=decimal(after.jobs_fte) - decimal(before.jobs_fte),
        value_added_pence=Fraction(after.value_added_pence - before.value_added_pence),
        energy_kwh=decimal(after.energy_kwh) - decimal(before.energy_kwh),
        carbon_kg_co2e=decimal(after.carbon_kg_co2e) - decimal(before.carbon_kg_co2e),
        productivity_before=_an_hour([before]),
        productivity_after=_an_hour([after]),
    )


def totals(pairs: Sequence[tuple[Figures, Figures]]) -> Totals:
    """Over (before, after) of each project."""
    changes = [change_between(before, after) for before, after in pairs]
    zero = Fraction(0)
    return Totals(
        projects=len(pairs),
        jobs_fte=sum((one.jobs_fte for one in changes), zero),
        value_added_pence=sum((one.value_added_pence for one in changes), zero),
        energy_kwh=sum((one.energy_kwh for one in changes), zero),
        carbon_kg_co2e=sum((one.carbon_kg_co2e for one in changes), zero),
        productivity_before=_an_hour([before for before, _ in pairs]),
        productivity_after=_an_hour([after for _, after in pairs]),
    )


def _an_hour(all_of: Sequence[Figures]) -> Fraction | None:
    hours = sum((decimal(figures.hours_worked) for figures in all_of), Fraction(0))
    return Fraction(sum(figures.value_added_pence for figures in all_of)) / hours if hours else None
