"""What energy costs and what carbon it stands for: dated rows, each with its source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from services.ingest.kpi.calendar import DAY_MINUTES, DAYS, Ints, LocalMinutes, Span, day_number, day_of, week_of

Floats: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

# Metered figures are floats; before they meet money they become decimals of so many places.
KWH_PLACES: Final = Decimal("0.000001")


@dataclass(frozen=True)
class Rate:
    name: str
    pence_per_kwh: Decimal
    # None: whenever no other rate holds.
    spans: Sequence[Span] | None


@dataclass(frozen=True)
class Tariff:
    """One row of a site's or a region's tariffs. Of the rates the first that holds counts; the last holds always."""

    id: int
    valid_from: date
    rates: Sequence[Rate]
    source: str
    # Whether it is the region's, since the site has none of its own.
    is_assumed: bool
    confirmed_by: str | None


@dataclass(frozen=True)
class RateCost:
    tariff_id: int
    rate: str
    kwh: Decimal
    pence_per_kwh: Decimal
    pence: Decimal


@dataclass(frozen=True)
class CarbonFactor:
    """kgCO2e a kWh of grid electricity, of one region and year."""

    id: int
    region: str
    year: int
    kg_per_kwh: Decimal
    source: str
    # seen (in the primary text), seen_secondary or memory.
    sure: str
    confirmed_by: str | None


@dataclass(frozen=True)
class YearCarbon:
    """Energy of one year times the factor of that year, or of the newest year before it (then it is provisional)."""

    factor: CarbonFactor
    year: int
    kwh: Decimal
    kg: Decimal

    @property
    def is_provisional(self) -> bool:
        return self.factor.year != self.year


def costs(energy_kwh: Floats, local: LocalMinutes, tariffs: Sequence[Tariff]) -> tuple[list[RateCost], Bools]:
    """What the energy of these minutes costs by each rate, and which minutes a tariff covers. `tariffs` in order of date."""
    of_minute = np.searchsorted([day_number(tariff.valid_from) for tariff in tariffs], local.days, side="right") - 1
    found = []
    for number in np.unique(of_minute[of_minute >= 0]).tolist():
        tariff = tariffs[number]
        holds = of_minute == number
        rates = _rates_of_the_week(tariff)[local.weekdays[holds], local.minutes[holds]]
        minutes = np.bincount(rates, minlength=len(tariff.rates))
        sums = np.bincount(rates, weights=energy_kwh[holds], minlength=len(tariff.rates))
        for rate, count, sum_kwh in zip(tariff.rates, minutes.tolist(), sums.tolist(), strict=True):
            if count:
                kwh = decimal_kwh(sum_kwh)
                found.append(RateCost(tariff.id, rate.name, kwh, rate.pence_per_kwh, kwh * rate.pence_per_kwh))
    return found, of_minute >= 0


def _rates_of_the_week(tariff: Tariff) -> Ints:
    """Which rate holds, by day and minute."""
    holding = np.full((len(DAYS), DAY_MINUTES), len(tariff.rates) - 1)
    for number in reversed(range(len(tariff.rates))):
        spans = tariff.rates[number].spans
        if spans is not None:
            holding[week_of(spans).minutes] = number
    return holding


def total_pence(found: Sequence[RateCost]) -> int:
    """Rounded once, at the end."""
    return int(sum((one.pence for one in found), Decimal(0)).quantize(Decimal(1), ROUND_HALF_UP))


def carbon(
    energy_kwh: Floats, local: LocalMinutes, factors: Mapping[int, CarbonFactor]
) -> tuple[list[YearCarbon], list[int]]:
    """Carbon by year of consumption, and the years for which (and before which) there is no factor. `factors` by year."""
    found, missing = [], []
    years = np.array([day_of(int(day)).year for day in np.unique(local.days)])
    year_of = years[np.searchsorted(np.unique(local.days), local.days)] if len(years) else np.zeros(0)
    for year in sorted({int(year) for year in years}):
        before = [known for known in factors if known <= year]
        if not before:
            missing.append(year)
            continue
        factor = factors[max(before)]
        kwh = decimal_kwh(energy_kwh[year_of == year].sum())
        found.append(YearCarbon(factor, year, kwh, (kwh * factor.kg_per_kwh).quantize(KWH_PLACES)))
    return found, missing


def decimal_kwh(kwh: float) -> Decimal:
    return Decimal(float(kwh)).quantize(KWH_PLACES)
