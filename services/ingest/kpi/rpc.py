"""gRPC edge of the figures of machines."""

import json
import re
from datetime import date
from decimal import Decimal
from typing import Any

from services.common.errors import Invalid
from services.common.evidence import ALGORITHM
from services.common.rpc import current_caller
from services.ingest.kpi import figures as kpi_figures
from services.ingest.kpi.calendar import day_of
from services.ingest.kpi.service import Carbon, KpiService, StateSource
from services.ingest.kpi.settings import KpiSettings, Shift
from services.ingest.kpi.states import State
from smdih.ingest.v1 import kpi_pb2, kpi_pb2_grpc

MINUTE_US = 60 * 1_000_000

_STATES = {
    State.NO_DATA: kpi_pb2.MACHINE_STATE_NO_DATA,
    State.OFF: kpi_pb2.MACHINE_STATE_OFF,
    State.IDLE: kpi_pb2.MACHINE_STATE_IDLE,
    State.WORKING: kpi_pb2.MACHINE_STATE_WORKING,
}

_FIGURES = (
    *("utilisation", "availability", "effectiveness", "quality", "oee"),
    *("total_count", "good_count", "energy_kwh", "idle_energy_kwh"),
)


class KpiServicer(kpi_pb2_grpc.KpiServiceServicer):
    def __init__(self, kpi: KpiService) -> None:
        self._kpi = kpi

    async def ListStates(self, request: kpi_pb2.ListStatesRequest, context: Any) -> kpi_pb2.ListStatesResponse:
        found = await self._kpi.states(current_caller(), request.machine_id, request.from_us, request.to_us)
        response = kpi_pb2.ListStatesResponse(
            from_us=found.from_us,
            to_us=found.to_us,
            settings_revision=found.settings_revision,
            source=_state_source(found.source),
        )
        for run in found.runs:
            response.states.add(state=_STATES[run.state], from_us=run.from_us, to_us=run.to_us)
        return response

    async def GetKpis(self, request: kpi_pb2.GetKpisRequest, context: Any) -> kpi_pb2.GetKpisResponse:
        found = await self._kpi.kpis(
            current_caller(), request.machine_id, request.from_us, request.to_us, by_day=request.by_day
        )
        source = found.energy_source
        response = kpi_pb2.GetKpisResponse(
            machine_id=found.machine.id,
            timezone=found.timezone,
            settings_revision=found.settings_revision,
            state_source=_state_source(found.state_source),
            energy_source=kpi_pb2.EnergySource(
                kind=source.kind, signal_id=source.signal.id if source.signal else 0, detail=source.detail
            ),
            whole=_figures(found.whole),
            days=[
                kpi_pb2.DayFigures(date=day_of(day).isoformat(), figures=_figures(figures))
                for day, figures in found.days
            ],
            cost_pence=found.cost.pence,
            cost_reason=found.cost.reason,
            cost_next_step=found.cost.next_step,
            reporting=_carbon(found.reporting),
            grid=_carbon(found.grid),
        )
        for one in found.cost.rates:
            response.rates.add(
                tariff_id=one.tariff_id,
                rate=one.rate,
                kwh=str(one.kwh),
                pence_per_kwh=str(one.pence_per_kwh),
                pence=f"{one.pence:.4f}",
            )
        return response

    async def GetEvidence(self, request: kpi_pb2.GetEvidenceRequest, context: Any) -> kpi_pb2.GetEvidenceResponse:
        evidence = await self._kpi.evidence(
            current_caller(), request.machine_id, request.measure, request.from_us, request.to_us
        )
        return kpi_pb2.GetEvidenceResponse(evidence_json=json.dumps(evidence))

    async def GetEvidenceKey(
        self, request: kpi_pb2.GetEvidenceKeyRequest, context: Any
    ) -> kpi_pb2.GetEvidenceKeyResponse:
        key_id, public_key = self._kpi.evidence_key()
        return kpi_pb2.GetEvidenceKeyResponse(algorithm=ALGORITHM, key_id=key_id, public_key=public_key)

    async def GetKpiSettings(
        self, request: kpi_pb2.GetKpiSettingsRequest, context: Any
    ) -> kpi_pb2.GetKpiSettingsResponse:
        revision, found = await self._kpi.settings(current_caller(), request.machine_id)
        return kpi_pb2.GetKpiSettingsResponse(revision=revision, settings=_settings_message(found))

    async def SetKpiSettings(
        self, request: kpi_pb2.SetKpiSettingsRequest, context: Any
    ) -> kpi_pb2.SetKpiSettingsResponse:
        settings = _settings(request.settings)
        revision = await self._kpi.change_settings(current_caller(), request.machine_id, settings)
        return kpi_pb2.SetKpiSettingsResponse(revision=revision)

    async def ListTariffs(self, request: kpi_pb2.ListTariffsRequest, context: Any) -> kpi_pb2.ListTariffsResponse:
        response = kpi_pb2.ListTariffsResponse()
        for tariff in await self._kpi.tariffs(current_caller(), request.site_id):
            response.tariffs.add(
                id=tariff.id,
                valid_from=tariff.valid_from.isoformat(),
                rates=[kpi_pb2.Rate(name=rate.name, pence_per_kwh=str(rate.pence_per_kwh)) for rate in tariff.rates],
                source=tariff.source,
                assumed=tariff.is_assumed,
                confirmed_by=tariff.confirmed_by or "",
            )
        return response

    async def AddTariff(self, request: kpi_pb2.AddTariffRequest, context: Any) -> kpi_pb2.AddTariffResponse:
        try:
            valid_from = date.fromisoformat(request.valid_from)
        except ValueError as error:
            raise Invalid("valid_from: a date such as 2026-04-01.") from error
        rates = [
            {
                "name": rate.name,
                "pence_per_kwh": rate.pence_per_kwh,
                "days": list(rate.days),
                "from": rate.start if rate.HasField("start") else None,
                "to": rate.end if rate.HasField("end") else None,
            }
            for rate in request.rates
        ]
        added = await self._kpi.add_tariff(
            current_caller(),
            site_id=request.site_id,
            region=request.region,
            valid_from=valid_from,
            rates=rates,
            source=request.source,
            confirmed_by=request.confirmed_by,
        )
        return kpi_pb2.AddTariffResponse(id=added)

    async def ListCarbonFactors(
        self, request: kpi_pb2.ListCarbonFactorsRequest, context: Any
    ) -> kpi_pb2.ListCarbonFactorsResponse:
        response = kpi_pb2.ListCarbonFactorsResponse()
        for factor in await self._kpi.carbon_factors(current_caller()):
            response.carbon_factors.add(
                id=factor.id,
                region=factor.region,
                year=factor.year,
                kg_per_kwh=str(factor.kg_per_kwh),
                source=factor.source,
                sure=factor.sure,
                confirmed_by=factor.confirmed_by or "",
            )
        return response

    async def AddCarbonFactor(
        self, request: kpi_pb2.AddCarbonFactorRequest, context: Any
    ) -> kpi_pb2.AddCarbonFactorResponse:
        if not _FACTOR.fullmatch(request.kg_per_kwh):
            raise Invalid("kg_per_kwh: a decimal number as text, such as 0.207.")
        added = await self._kpi.add_carbon_factor(
            current_caller(),
            region=request.region,
            year=request.year,
            kg_per_kwh=Decimal(request.kg_per_kwh),
            source=request.source,
            sure=request.sure,
            confirmed_by=request.confirmed_by,
        )
        return kpi_pb2.AddCarbonFactorResponse(id=added)


_FACTOR = re.compile(r"[0-9](\.[0-9]{1,6})?")
_PLAIN = (
    *("power_signal_id", "current_signal_id", "energy_signal_id", "total_count_signal_id", "good_count_signal_id"),
    *("energy_rollover", "count_rollover", "ideal_cycle_s", "volts"),
)
_OPTIONAL = ("off_below", "working_from", "dwell_minutes", "gap_minutes", "phases", "power_factor")


def _settings(message: kpi_pb2.KpiSettings) -> KpiSettings:
    plain = {name: getattr(message, name) for name in _PLAIN}
    plain |= {field.name: value for field, value in message.ListFields() if field.name in _OPTIONAL}
    shifts = tuple(
        Shift(one.start, one.end, tuple(one.days), tuple((pause.start, pause.end) for pause in one.breaks))
        for one in message.shifts
    )
    return KpiSettings(**plain, shifts=shifts, closed_days=tuple(message.closed_days))


def _settings_message(found: KpiSettings) -> kpi_pb2.KpiSettings:
    message = kpi_pb2.KpiSettings(
        **{name: getattr(found, name) for name in (*_PLAIN, *_OPTIONAL)}, closed_days=found.closed_days
    )
    for shift in found.shifts:
        breaks = [kpi_pb2.Break(start=start, end=end) for start, end in shift.breaks]
        message.shifts.add(start=shift.start, end=shift.end, days=shift.days, breaks=breaks)
    return message


def _state_source(source: StateSource) -> kpi_pb2.StateSource:
    return kpi_pb2.StateSource(
        signal_id=source.signal.id if source.signal else 0,
        unit=source.signal.unit if source.signal else "",
        off_below=source.levels.off_below if source.levels else None,
        working_from=source.levels.working_from if source.levels else None,
        thresholds=source.how,
        detail=source.detail,
    )


def _figures(figures: kpi_figures.Figures) -> kpi_pb2.Figures:
    return kpi_pb2.Figures(
        from_us=figures.from_minute * MINUTE_US,
        to_us=figures.to_minute * MINUTE_US,
        times=_times(figures.times),
        planned=None if figures.planned is None else _times(figures.planned),
        energy_coverage=figures.energy_coverage,
        **{name: _figure(getattr(figures, name)) for name in _FIGURES},
    )


def _figure(figure: kpi_figures.Figure) -> kpi_pb2.Figure:
    return kpi_pb2.Figure(value=figure.value, reason=figure.reason)


def _times(times: kpi_figures.Times) -> kpi_pb2.Times:
    return kpi_pb2.Times(off_s=times.off_s, idle_s=times.idle_s, working_s=times.working_s, no_data_s=times.no_data_s)


def _carbon(found: Carbon) -> kpi_pb2.Carbon:
    carbon = kpi_pb2.Carbon(
        region=found.region,
        kg="" if found.kg is None else str(found.kg),
        reason=found.reason,
        next_step=found.next_step,
    )
    for one in found.years:
        carbon.years.add(
            year=one.year,
            kwh=str(one.kwh),
            kg=str(one.kg),
            factor_id=one.factor.id,
            factor_year=one.factor.year,
            kg_per_kwh=str(one.factor.kg_per_kwh),
            source=one.factor.source,
            provisional=one.is_provisional,
        )
    return carbon
