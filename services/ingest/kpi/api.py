"""HTTP edge of the figures of machines."""

from dataclasses import asdict
from datetime import date
from decimal import Decimal
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from services.common.evidence import ALGORITHM
from services.common.http import Authenticated
from services.ingest.forms import Body
from services.ingest.kpi.calendar import day_of
from services.ingest.kpi.figures import Figures
from services.ingest.kpi.service import Carbon, Cost, EnergySource, KpiService, StateSource
from services.ingest.kpi.settings import KpiSettings, Shift
from services.ingest.kpi.tariff import CarbonFactor, Tariff

MINUTE_US = 60 * 1_000_000


class BreakBody(Body):
    start: str = Field(alias="from")
    end: str = Field(alias="to")


class ShiftBody(Body):
    start: str = Field(alias="from")
    end: str = Field(alias="to")
    days: list[str] = Field(default_factory=list, max_length=7)
    breaks: list[BreakBody] = Field(default_factory=list)


class SettingsBody(Body):
    power_signal_id: int = 0
    current_signal_id: int = 0
    energy_signal_id: int = 0
    total_count_signal_id: int = 0
    good_count_signal_id: int = 0
    energy_rollover: float = 0.0
    count_rollover: float = 0.0
    ideal_cycle_s: float = 0.0
    off_below: float | None = None
    working_from: float | None = None
    dwell_minutes: int = 2
    gap_minutes: int = 5
    volts: float = 0.0
    phases: int = 1
    power_factor: float = 1.0
    shifts: list[ShiftBody] = Field(default_factory=list)
    closed_days: list[date] = Field(default_factory=list)

    def settings(self) -> KpiSettings:
        plain = self.model_dump(exclude={"shifts", "closed_days"})
        shifts = tuple(
            Shift(one.start, one.end, tuple(one.days), tuple((pause.start, pause.end) for pause in one.breaks))
            for one in self.shifts
        )
        return KpiSettings(**plain, shifts=shifts, closed_days=tuple(day.isoformat() for day in self.closed_days))


class RateBody(Body):
    name: str
    pence_per_kwh: str
    days: list[str] = Field(default_factory=list, max_length=7)
    start: str | None = Field(None, alias="from")
    end: str | None = Field(None, alias="to")


class TariffBody(Body):
    site_id: int = 0
    region: str = ""
    valid_from: date
    rates: list[RateBody]
    source: str
    confirmed_by: str = ""


class CarbonFactorBody(Body):
    region: str
    year: int
    kg_per_kwh: str = Field(pattern=r"^[0-9](\.[0-9]{1,6})?$")
    source: str
    sure: str
    confirmed_by: str = ""


def kpi_router(kpi: KpiService) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["kpi"])

    @router.get("/machines/{machine_id}/kpi-settings")
    async def settings(machine_id: int, caller: Authenticated) -> dict[str, Any]:
        revision, found = await kpi.settings(caller, machine_id)
        return {"revision": revision, "settings": settings_form(found)}

    @router.put("/machines/{machine_id}/kpi-settings")
    async def change_settings(machine_id: int, body: SettingsBody, caller: Authenticated) -> dict[str, Any]:
        """Say how the machine's figures are made; what is left out is found by units and from the data, or not known.

        All of it is replaced, and kept as a new revision: every answer says which revision it used.
        """
        changed = body.settings()
        revision = await kpi.change_settings(caller, machine_id, changed)
        return {"revision": revision, "settings": settings_form(changed)}

    @router.get("/machines/{machine_id}/states")
    async def states(machine_id: int, caller: Authenticated, from_us: int, to_us: int) -> dict[str, Any]:
        """Off, idle, working or no_data, from the power or the current of the machine alone; up to 100 days."""
        found = await kpi.states(caller, machine_id, from_us, to_us)
        return {
            "from_us": found.from_us,
            "to_us": found.to_us,
            "settings_revision": found.settings_revision,
            "source": _state_source(found.source),
            "states": [
                {"state": run.state.name.lower(), "from_us": run.from_us, "to_us": run.to_us} for run in found.runs
            ],
        }

    @router.get("/machines/{machine_id}/kpis")
    async def kpis(
        machine_id: int, caller: Authenticated, from_us: int, to_us: int, by_day: bool = False
    ) -> dict[str, Any]:
        """Times by state, use, availability and OEE (ISO 22400), counts, energy, its cost and carbon; up to 100 days.

        A figure is `{"value", "reason"}`: value null and why there is none, or a value with why to look at it. `by_day`: the
        same for each day of the site.
        """
        found = await kpi.kpis(caller, machine_id, from_us, to_us, by_day=by_day)
        return {
            "machine_id": found.machine.id,
            "from_us": found.from_us,
            "to_us": found.to_us,
            "timezone": found.timezone,
            "settings_revision": found.settings_revision,
            "state_source": _state_source(found.state_source),
            "energy_source": _energy_source(found.energy_source),
            **_figures(found.whole),
            "cost": _cost(found.cost),
            "carbon": {"reporting": _carbon(found.reporting), "grid": _carbon(found.grid)},
            "days": [{"date": day_of(day).isoformat(), **_figures(figures)} for day, figures in found.days],
        }

    @router.get("/machines/{machine_id}/evidence")
    async def evidence(
        machine_id: int, caller: Authenticated, measure: str, from_us: int, to_us: int
    ) -> dict[str, Any]:
        """A figure (`measure`: energy_kwh, working_hours or samples) over whole minutes, signed with the hub's Ed25519 key."""
        return await kpi.evidence(caller, machine_id, measure, from_us, to_us)

    @router.get("/evidence/key")
    async def evidence_key(caller: Authenticated) -> dict[str, str]:
        """The public key (base64 of 32 bytes) that evidence is checked with."""
        key_id, public_key = kpi.evidence_key()
        return {"algorithm": ALGORITHM, "key_id": key_id, "public_key": public_key}

    @router.get("/sites/{site_id}/tariffs")
    async def tariffs(site_id: int, caller: Authenticated) -> dict[str, Any]:
        """What electricity costs at a site, in order of date; its region's where the site has none (`assumed`)."""
        return {"tariffs": [_tariff(tariff) for tariff in await kpi.tariffs(caller, site_id)]}

    @router.post("/tariffs", status_code=201)
    async def add_tariff(body: TariffBody, caller: Authenticated) -> dict[str, int]:
        """A tariff of a site, or (operators) of a region, from a day on. Of several rates the first whose times fit holds; the last
        one has no times."""
        rates = [
            {"name": one.name, "pence_per_kwh": one.pence_per_kwh, "days": one.days, "from": one.start, "to": one.end}
            for one in body.rates
        ]
        added = await kpi.add_tariff(
            caller,
            site_id=body.site_id,
            region=body.region,
            valid_from=body.valid_from,
            rates=rates,
            source=body.source,
            confirmed_by=body.confirmed_by,
        )
        return {"id": added}

    @router.get("/carbon-factors")
    async def carbon_factors(caller: Authenticated) -> dict[str, Any]:
        return {"carbon_factors": [_factor(factor) for factor in await kpi.carbon_factors(caller)]}

    @router.post("/carbon-factors", status_code=201)
    async def add_carbon_factor(body: CarbonFactorBody, caller: Authenticated) -> dict[str, int]:
        """For operators: the factor of a region (UK, Great Britain, Northern Ireland) and year; of two the newer counts."""
        added = await kpi.add_carbon_factor(
            caller,
            region=body.region,
            year=body.year,
            kg_per_kwh=Decimal(body.kg_per_kwh),
            source=body.source,
            sure=body.sure,
            confirmed_by=body.confirmed_by,
        )
        return {"id": added}

    return router


def settings_form(found: KpiSettings) -> dict[str, Any]:
    """As the body that sets it."""
    shifts = [
        {
            "from": one.start,
            "to": one.end,
            "days": list(one.days),
            "breaks": [{"from": start, "to": end} for start, end in one.breaks],
        }
        for one in found.shifts
    ]
    return found.as_json() | {"shifts": shifts, "closed_days": list(found.closed_days)}


def _state_source(source: StateSource) -> dict[str, Any]:
    levels = source.levels
    return {
        "signal_id": source.signal.id if source.signal else None,
        "unit": source.signal.unit if source.signal else None,
        "off_below": levels.off_below if levels else None,
        "working_from": levels.working_from if levels else None,
        "thresholds": source.how,
        "detail": source.detail,
    }


def _energy_source(source: EnergySource) -> dict[str, Any]:
    return {
        "kind": source.kind or None,
        "signal_id": source.signal.id if source.signal else None,
        "detail": source.detail,
    }


def _figures(figures: Figures) -> dict[str, Any]:
    found = asdict(figures)
    found["from_us"], found["to_us"] = found.pop("from_minute") * MINUTE_US, found.pop("to_minute") * MINUTE_US
    return found


def _cost(cost: Cost) -> dict[str, Any]:
    return {
        "pence": cost.pence,
        "reason": cost.reason,
        "next_step": cost.next_step,
        "rates": [
            {
                "tariff_id": one.tariff_id,
                "rate": one.rate,
                "kwh": str(one.kwh),
                "pence_per_kwh": str(one.pence_per_kwh),
                "pence": f"{one.pence:.4f}",
            }
            for one in cost.rates
        ],
        "tariffs": [
            {
                "id": tariff.id,
                "valid_from": tariff.valid_from.isoformat(),
                "source": tariff.source,
                "assumed": tariff.is_assumed,
                "confirmed_by": tariff.confirmed_by,
            }
            for tariff in cost.tariffs
        ],
    }


def _carbon(found: Carbon) -> dict[str, Any]:
    return {
        "region": found.region,
        "kg": None if found.kg is None else str(found.kg),
        "reason": found.reason,
        "next_step": found.next_step,
        "years": [
            {
                "year": one.year,
                "kwh": str(one.kwh),
                "kg": str(one.kg),
                "provisional": one.is_provisional,
                "factor": _factor(one.factor),
            }
            for one in found.years
        ],
    }


def _factor(factor: CarbonFactor) -> dict[str, Any]:
    return asdict(factor) | {"kg_per_kwh": str(factor.kg_per_kwh)}


def _tariff(tariff: Tariff) -> dict[str, Any]:
    return {
        "id": tariff.id,
        "valid_from": tariff.valid_from.isoformat(),
        "source": tariff.source,
        "assumed": tariff.is_assumed,
        "confirmed_by": tariff.confirmed_by,
        "rates": [{"name": rate.name, "pence_per_kwh": str(rate.pence_per_kwh)} for rate in tariff.rates],
    }
