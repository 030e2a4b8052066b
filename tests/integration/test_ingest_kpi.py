"""Figures of machines whose every minute is known, by HTTP and gRPC; evidence that a stranger can check."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.errors import Invalid
from services.common.evidence import Signer, Verifier
from services.common.settings import Settings
from smdih.ingest.v1 import kpi_pb2, kpi_pb2_grpc
from tests.integration.stored_plant import StoredPlant, stored_plant

LONDON = ZoneInfo("Europe/London")
# Monday to Monday, with the end of summer time in between: on Sunday the 26th the night has an hour more.
START = datetime(2025, 10, 20, tzinfo=LONDON).astimezone(UTC)
END = datetime(2025, 10, 28, tzinfo=LONDON).astimezone(UTC)
FROM_US, TO_US = int(START.timestamp()) * 1_000_000, int(END.timestamp()) * 1_000_000
KW = {"off": 0.02, "idle": 1.5, "working": 6.0}
SHIFTS = [
    {
        "days": ["mon", "tue", "wed", "thu", "fri"],
        "from": "06:00",
        "to": "14:00",
        "breaks": [{"from": "10:00", "to": "10:30"}],
    },
    {"days": ["sat"], "from": "22:00", "to": "06:00"},
]


class Truth:
    """What a press did, minute by minute, as a person would write it down."""

    def __init__(self) -> None:
        self.minutes: list[datetime] = []
        self.states: list[str] = []
        self.planned: list[bool] = []
        self.bridged: list[bool] = []
        at = START
        while at < END:
            local = at.astimezone(LONDON)
            clock, day = local.strftime("%H:%M"), local.weekday()
            night = (day == 5 and clock >= "22:00") or (day == 6 and clock < "06:00")
            shift = day < 5 and "06:00" <= clock < "14:00"
            pause = shift and "10:00" <= clock < "10:30"
            state = "working" if night or (shift and not pause and clock < "13:00") else "idle" if shift else "off"
            missing = (day == 3 and "03:00" <= clock < "05:00") or (day == 1 and "07:00" <= clock < "07:03")
            self.minutes.append(at)
            self.states.append("no_data" if missing else state)
            self.planned.append(night or (shift and not pause))
            self.bridged.append(missing and day == 1)
            at += timedelta(minutes=1)

    def seconds(self, state: str, *, planned: bool = False) -> int:
        return 60 * sum(s == state and (p or not planned) for s, p in zip(self.states, self.planned, strict=True))

    def kwh(self, number: int) -> float:
        state = "working" if self.bridged[number] else self.states[number]
        return KW.get(state, 0.0) / 60


class Plant:
    def __init__(self, plant: StoredPlant) -> None:
        self.plant = plant
        self.truth = Truth()
        self.press: dict[str, Any] = {}
        self.meter: dict[str, Any] = {}

    async def fill(self) -> None:
        truth = self.truth
        signals = [("power", "kW"), ("items", ""), ("good items", ""), ("oil", "degC")]
        self.press = await self.plant.machine("press-1", [{"name": n, "unit": u} for n, u in signals])
        times, rows, items, good = [], [], 0, 0
        for at, state in zip(truth.minutes, truth.states, strict=True):
            if at.weekday() == 2 and at.strftime("%H:%M") == "09:30":
                items, good = 0, 0  # somebody sets the counters back
            if state == "no_data":
                continue
            if state == "working":
                items += 2
                good = items - items // 40
            for second in (0, 20, 40):
                times.append(int(at.timestamp()) * 1_000_000 + second * 1_000_000)
                rows.append([KW[state], items, good, 20.0])
        await self.plant.store(self.press, np.array(times), np.array(rows, dtype=float))
        # An energy counter in Wh that is read every ten minutes, with a day without readings.
        self.meter = await self.plant.machine("oven-1", [{"name": "energy", "unit": "Wh"}, {"name": "L1", "unit": "A"}])
        readings = [n for n in range(0, len(truth.minutes), 10) if not 3 * 1440 < n < 4 * 1440]
        wh = np.array([n * 50.0 for n in readings])
        wh[len(wh) // 2 :] -= wh[len(wh) // 2] - 25  # exchanged for a new one, which shows 25 at its first reading
        currents = np.where(np.arange(len(readings)) % 10 < 4, 2.0, 40.0)
        read_us = np.array([FROM_US + n * 60_000_000 for n in readings])
        await self.plant.store(self.meter, read_us, np.stack([wh, currents], axis=1))

    async def get(self, path: str, **more: Any) -> dict[str, Any]:
        answer = await self.plant.http.get(path, params={"from_us": FROM_US, "to_us": TO_US, **more})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found


@pytest_asyncio.fixture(scope="module")
async def plant(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    async with stored_plant(servers, settings, Path(tmp_path_factory.mktemp("hub"))) as stored:
        made = Plant(stored)
        await made.fill()
        yield made


async def test_a_clamp_meter_alone_gives_states_use_energy_and_carbon_on_the_first_day(plant: Plant) -> None:
    machine, truth = plant.press["id"], plant.truth
    found = await plant.get(f"/v1/machines/{machine}/kpis")
    assert (found["settings_revision"], found["timezone"]) == (0, "Europe/London")
    source = found["state_source"]
    assert (source["thresholds"], source["signal_id"]) == ("found", plant.press["signals"][0]["id"])
    assert 0.02 < source["off_below"] < 1.5 < source["working_from"] < 6
    assert found["times"] == {f"{name}_s": truth.seconds(name) for name in ("off", "idle", "working", "no_data")}
    known = sum(truth.seconds(name) for name in KW)
    assert found["utilisation"]["value"] == pytest.approx(truth.seconds("working") / known)
    kwh = sum(truth.kwh(n) for n in range(len(truth.minutes)))
    assert found["energy_kwh"]["value"] == pytest.approx(kwh)
    assert found["energy_coverage"] == pytest.approx(1 - 120 / len(truth.minutes))
    assert found["energy_source"]["kind"] == "power"
    assert found["idle_energy_kwh"]["value"] == pytest.approx(truth.seconds("idle") / 3600 * 1.5)
    # What is not known is not 0: it is nothing, with the reason.
    for name, reason in (
        ("availability", "NO_CALENDAR"),
        ("effectiveness", "NO_TOTAL_COUNT"),
        ("quality", "NO_TOTAL_COUNT"),
        ("oee", "NO_CALENDAR"),
    ):
        assert found[name] == {"value": None, "reason": reason}
    assert (found["cost"]["pence"], found["cost"]["reason"]) == (None, "NO_TARIFF")
    assert "POST /v1/tariffs" in found["cost"]["next_step"]
    reporting, grid = found["carbon"]["reporting"], found["carbon"]["grid"]
    assert Decimal(reporting["kg"]) == pytest.approx(Decimal(kwh * 0.177), abs=Decimal("0.0001"))
    assert reporting["years"][0]["factor"]["confirmed_by"] is None
    # Northern Ireland has a grid of its own, and nobody has entered its factor yet.
    assert (grid["region"], grid["kg"], grid["reason"]) == ("Northern Ireland", None, "NO_CARBON_FACTOR")
    assert "factor of Northern Ireland" in grid["next_step"]
    assert reporting["next_step"] == ""


async def test_states_are_stretches_that_follow_one_another(plant: Plant) -> None:
    found = await plant.get(f"/v1/machines/{plant.press['id']}/states")
    assert (found["from_us"], found["to_us"]) == (FROM_US, TO_US)
    at, named = FROM_US, []
    for run in found["states"]:
        assert run["from_us"] == at
        named += [run["state"]] * ((run["to_us"] - at) // 60_000_000)
        at = run["to_us"]
    assert at == TO_US
    assert named == plant.truth.states


async def test_with_calendar_and_counters_there_is_oee_by_iso_22400(plant: Plant) -> None:
    machine, truth = plant.press["id"], plant.truth
    _, items, good, _ = (signal["id"] for signal in plant.press["signals"])
    settings = {
        "total_count_signal_id": items,
        "good_count_signal_id": good,
        "ideal_cycle_s": 24,
        "shifts": SHIFTS,
        "closed_days": ["2025-10-27"],
    }
    url = f"/v1/machines/{machine}/kpi-settings"
    answer = await plant.plant.http.put(url, json=settings)
    assert (answer.status_code, answer.json()["revision"]) == (200, 1)
    assert (await plant.plant.http.get(url)).json() == answer.json()
    # The second Monday is closed: what was done on it is not planned.
    last_monday = datetime(2025, 10, 27, tzinfo=LONDON)
    truth.planned = [p and at < last_monday for p, at in zip(truth.planned, truth.minutes, strict=True)]
    found = await plant.get(f"/v1/machines/{machine}/kpis", by_day=True)
    assert found["settings_revision"] == 1
    planned = {f"{name}_s": truth.seconds(name, planned=True) for name in ("off", "idle", "working", "no_data")}
    assert found["planned"] == planned
    assert sum(planned.values()) == (5 * 7.5 + 9) * 3600
    availability = planned["working_s"] / (planned["working_s"] + planned["idle_s"])
    assert found["availability"]["value"] == pytest.approx(availability)
    # Two a minute; what was made in the three minutes without data is not known to the counter either.
    total = 2 * planned["working_s"] / 60
    assert found["total_count"]["value"] == total
    assert found["good_count"]["value"] == pytest.approx(total * 39 / 40, abs=2)
    assert found["effectiveness"]["value"] == pytest.approx(24 * total / planned["working_s"])
    oee = availability * 0.8 * found["good_count"]["value"] / total
    assert found["oee"]["value"] == pytest.approx(oee)
    days = found["days"]
    assert [day["date"] for day in days] == [f"2025-10-{n}" for n in range(20, 28)]
    assert [sum(day["times"].values()) for day in days] == [86_400] * 6 + [90_000, 86_400]
    assert sum(day["energy_kwh"]["value"] for day in days) == pytest.approx(found["energy_kwh"]["value"])
    assert sum(day["total_count"]["value"] for day in days) == total
    assert days[5]["planned"]["working_s"] == 2 * 3600
    assert days[6]["planned"]["working_s"] == 7 * 3600
    assert days[7]["availability"] == {"value": None, "reason": "NOT_PLANNED"}
    # An ideal cycle that cannot be right is shown as it is, and flagged.
    await plant.plant.http.put(url, json=settings | {"ideal_cycle_s": 60})
    found = await plant.get(f"/v1/machines/{machine}/kpis")
    assert found["effectiveness"]["value"] == pytest.approx(2.0)
    assert found["effectiveness"]["reason"] == found["oee"]["reason"] == "WRONG_IDEAL_CYCLE"


async def test_energy_costs_by_the_clock_of_the_site_and_carbon_by_the_grid_of_the_region(plant: Plant) -> None:
    truth, site = plant.truth, plant.plant.site["id"]
    rates = [
        {"name": "night", "pence_per_kwh": "14.25", "from": "00:30", "to": "07:30"},
        {"name": "day", "pence_per_kwh": "31.5"},
    ]
    tariff = {"valid_from": "2025-01-01", "rates": rates, "source": "contract 7"}
    region = await plant.plant.operator.post("/v1/tariffs", json=tariff | {"region": "Northern Ireland"})
    assert region.status_code == 201
    found = (await plant.get(f"/v1/machines/{plant.press['id']}/kpis"))["cost"]
    assert found["tariffs"][0]["assumed"] is True
    own = await plant.plant.http.post("/v1/tariffs", json=tariff | {"site_id": site})
    dearer = [rates[0], rates[1] | {"pence_per_kwh": "40"}]
    await plant.plant.http.post(
        "/v1/tariffs", json=tariff | {"site_id": site, "valid_from": "2025-10-27", "rates": dearer}
    )
    found = (await plant.get(f"/v1/machines/{plant.press['id']}/kpis"))["cost"]
    assert [one["assumed"] for one in found["tariffs"]] == [False, False]
    assert found["tariffs"][0]["id"] == own.json()["id"]
    pence = 0.0
    for number, at in enumerate(truth.minutes):
        local = at.astimezone(LONDON)
        night = "00:30" <= local.strftime("%H:%M") < "07:30"
        pence += truth.kwh(number) * (14.25 if night else 40 if local.day >= 27 else 31.5)
    assert found["pence"] == round(pence)
    assert sum(Decimal(one["pence"]) for one in found["rates"]) == pytest.approx(Decimal(pence), abs=Decimal("0.001"))
    listed = (await plant.plant.http.get(f"/v1/sites/{site}/tariffs")).json()["tariffs"]
    assert [one["valid_from"] for one in listed] == ["2025-01-01", "2025-10-27"]
    factor = {"region": "Northern Ireland", "year": 2025, "kg_per_kwh": "0.25", "source": "a test", "sure": "memory"}
    assert (await plant.plant.operator.post("/v1/carbon-factors", json=factor)).status_code == 201
    kpis = await plant.get(f"/v1/machines/{plant.press['id']}/kpis")
    assert Decimal(kpis["carbon"]["grid"]["kg"]) == pytest.approx(
        Decimal(kpis["energy_kwh"]["value"]) / 4, abs=Decimal("0.0001")
    )
    factors = (await plant.plant.http.get("/v1/carbon-factors")).json()["carbon_factors"]
    assert {(one["region"], one["year"]) for one in factors} >= {("UK", 2024), ("UK", 2025), ("Northern Ireland", 2025)}


async def test_an_energy_counter_is_used_before_anything_else_and_its_gaps_are_spread(plant: Plant) -> None:
    found = await plant.get(f"/v1/machines/{plant.meter['id']}/kpis", by_day=True)
    assert (found["energy_source"]["kind"], found["energy_source"]["detail"]) == (
        "counter",
        "Differences of the energy counter, which began anew 1 times.",
    )
    # 50 Wh a minute; of the ten minutes before the new counter was read first, 25 Wh are known.
    minutes = len(plant.truth.minutes)
    assert found["energy_kwh"]["value"] == pytest.approx((minutes - 10) * 0.05 - 0.5 + 0.025)
    assert found["energy_kwh"]["reason"] == "COUNTER_RESET"
    assert [day["energy_kwh"]["value"] for day in found["days"][2:4]] == pytest.approx([72, 72], abs=0.6)
    assert found["state_source"]["thresholds"] == "found"


async def test_a_current_gives_states_and_with_its_voltage_an_estimate_of_energy(plant: Plant) -> None:
    machine = await plant.plant.machine("saw-1", [{"name": "L1", "unit": "A"}])
    at = FROM_US + np.arange(0, 1440) * 60_000_000
    await plant.plant.store(machine, at, np.where(np.arange(1440) % 60 < 30, 0.1, 10.0)[:, None])
    found = await plant.get(f"/v1/machines/{machine['id']}/kpis", to_us=FROM_US + 86_400_000_000)
    assert found["times"]["working_s"] == 43_200
    assert found["energy_kwh"] == {"value": None, "reason": "NO_ENERGY_SIGNAL"}
    assert "volts" in found["energy_source"]["detail"]
    settings = {"volts": 400, "phases": 3, "power_factor": 0.8, "off_below": 1, "working_from": 5}
    await plant.plant.http.put(f"/v1/machines/{machine['id']}/kpi-settings", json=settings)
    found = await plant.get(f"/v1/machines/{machine['id']}/kpis", to_us=FROM_US + 86_400_000_000)
    assert found["state_source"]["thresholds"] == "set"
    assert found["energy_source"]["detail"].startswith("Estimated: ")
    assert found["energy_kwh"]["value"] == pytest.approx(400 * 0.8 * 3**0.5 / 1000 * 12 * 10.1)


async def test_the_unit_of_a_current_counts_and_a_signal_that_is_something_else_is_refused(plant: Plant) -> None:
    signals = [{"name": "L1", "unit": "mA"}, {"name": "load", "unit": "%"}, {"name": "gas", "unit": "m3"}]
    machine = await plant.plant.machine("lathe-1", signals)
    at = FROM_US + np.arange(0, 1440) * 60_000_000
    rows = np.stack(
        [np.where(np.arange(1440) % 60 < 30, 100.0, 10_000.0), np.full(1440, 50.0), np.arange(1440.0)], axis=1
    )
    await plant.plant.store(machine, at, rows)
    url = f"/v1/machines/{machine['id']}/kpi-settings"
    current, load, gas = (signal["id"] for signal in machine["signals"])
    await plant.plant.http.put(url, json={"volts": 400, "current_signal_id": current})
    found = await plant.get(f"/v1/machines/{machine['id']}/kpis", to_us=FROM_US + 86_400_000_000)
    assert found["energy_kwh"]["value"] == pytest.approx(400 / 1000 * 12 * 10.1)
    for role, signal, unit in (
        ("current", load, "%"),
        ("power", load, "%"),
        ("energy", gas, "m3"),
        ("power", current, "mA"),
    ):
        answer = await plant.plant.http.put(url, json={"volts": 400, f"{role}_signal_id": signal})
        assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID")
        assert f"is in {unit!r}" in answer.text


async def test_days_add_up_also_where_a_gap_goes_over_midnight(plant: Plant) -> None:
    machine = await plant.plant.machine("chiller-1", [{"name": "energy", "unit": "kWh"}])
    hours = np.arange(30, 72 * 60, 60)
    at = FROM_US + hours * 60_000_000
    await plant.plant.store(machine, at, (hours / 60 * 5.0)[:, None])
    day = 86_400_000_000

    async def kpis(machine: int, start: int, end: int) -> dict[str, Any]:
        path = f"/v1/machines/{machine}/kpis"
        return await plant.get(path, from_us=FROM_US + day * start, to_us=FROM_US + day * end)

    first, second, both = [await kpis(machine["id"], *days) for days in ((0, 1), (1, 2), (0, 2))]
    assert both["energy_kwh"]["value"] == pytest.approx(47.5 * 5, abs=0.1)
    assert first["energy_kwh"]["value"] + second["energy_kwh"]["value"] == pytest.approx(both["energy_kwh"]["value"])
    assert first["energy_coverage"] + second["energy_coverage"] == pytest.approx(2 * both["energy_coverage"])
    power = await plant.plant.machine("fan-1", [{"name": "power", "unit": "kW"}])
    minutes = np.array([1437, 1442])
    await plant.plant.store(power, FROM_US + minutes * 60_000_000, np.array([[6.0], [6.0]]))
    found = [await kpis(power["id"], *days) for days in ((0, 1), (1, 2), (0, 2))]
    assert [one["energy_kwh"]["value"] for one in found] == pytest.approx([0.3, 0.3, 0.6])


async def test_grpc_answers_the_same(plant: Plant) -> None:
    machine = plant.press["id"]
    metadata = (("authorization", f"Bearer {plant.plant.firm_key}"),)
    async with grpc.aio.insecure_channel(plant.plant.hub.processes["door"].grpc) as channel:
        stub = kpi_pb2_grpc.KpiServiceStub(channel)
        kpis = await stub.GetKpis(
            kpi_pb2.GetKpisRequest(machine_id=machine, from_us=FROM_US, to_us=TO_US, by_day=True), metadata=metadata
        )
        states = await stub.ListStates(
            kpi_pb2.ListStatesRequest(machine_id=machine, from_us=FROM_US, to_us=TO_US), metadata=metadata
        )
        key = await stub.GetEvidenceKey(kpi_pb2.GetEvidenceKeyRequest(), metadata=metadata)
        evidence = await stub.GetEvidence(
            kpi_pb2.GetEvidenceRequest(machine_id=machine, measure="samples", from_us=FROM_US, to_us=TO_US),
            metadata=metadata,
        )
    same = await plant.get(f"/v1/machines/{machine}/kpis", by_day=True)
    assert kpis.whole.energy_kwh.value == same["energy_kwh"]["value"]
    assert kpis.whole.times.working_s == same["times"]["working_s"]
    assert [day.figures.energy_kwh.value for day in kpis.days] == [day["energy_kwh"]["value"] for day in same["days"]]
    assert (kpis.cost_pence, kpis.cost_reason) == (same["cost"]["pence"], same["cost"]["reason"])
    assert (kpis.cost_next_step, kpis.grid.next_step) == (
        same["cost"]["next_step"],
        same["carbon"]["grid"]["next_step"],
    )
    assert kpis.HasField("cost_pence") == (same["cost"]["pence"] is not None)
    assert kpis.reporting.kg == same["carbon"]["reporting"]["kg"]
    assert len(states.states) == len((await plant.get(f"/v1/machines/{machine}/states"))["states"])
    assert key.public_key in (await plant.get("/v1/evidence/key")).values()
    assert '"signature"' in evidence.evidence_json


async def test_settings_tariffs_and_factors_can_be_had_and_made_by_grpc(plant: Plant) -> None:
    machine = await plant.plant.machine("grpc-1", [{"name": "power", "unit": "kW"}, {"name": "items"}])
    firm = (("authorization", f"Bearer {plant.plant.firm_key}"),)
    operator = (("authorization", f"Bearer {plant.plant.hub.operator_key}"),)
    async with grpc.aio.insecure_channel(plant.plant.hub.processes["door"].grpc) as channel:
        stub = kpi_pb2_grpc.KpiServiceStub(channel)

        async def refused(call: Any, code: grpc.StatusCode) -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is code

        before = await stub.GetKpiSettings(kpi_pb2.GetKpiSettingsRequest(machine_id=machine["id"]), metadata=firm)
        assert (before.revision, before.settings.dwell_minutes, before.settings.phases) == (0, 2, 1)
        settings = kpi_pb2.KpiSettings(
            total_count_signal_id=machine["signals"][1]["id"],
            off_below=0.5,
            working_from=4,
            gap_minutes=0,
            shifts=[
                kpi_pb2.Shift(
                    days=["mon"], start="06:00", end="14:00", breaks=[kpi_pb2.Break(start="09:00", end="09:15")]
                )
            ],
            closed_days=["2026-12-25"],
        )
        set_request = kpi_pb2.SetKpiSettingsRequest(machine_id=machine["id"], settings=settings)
        assert (await stub.SetKpiSettings(set_request, metadata=firm)).revision == 1
        url = f"/v1/machines/{machine['id']}/kpi-settings"
        same = (await plant.plant.http.get(url)).json()
        # What HTTP gives back can be put as it is.
        again = await plant.plant.http.put(url, json=same["settings"])
        assert (again.json()["revision"], again.json()["settings"]) == (2, same["settings"])
        after = await stub.GetKpiSettings(kpi_pb2.GetKpiSettingsRequest(machine_id=machine["id"]), metadata=firm)
        for name in ("total_count_signal_id", "off_below", "working_from", "gap_minutes", "shifts", "closed_days"):
            assert getattr(after.settings, name) == getattr(settings, name)
        settings.volts = float("nan")
        set_request = kpi_pb2.SetKpiSettingsRequest(machine_id=machine["id"], settings=settings)
        await refused(stub.SetKpiSettings(set_request, metadata=firm), grpc.StatusCode.INVALID_ARGUMENT)
        tariff = kpi_pb2.AddTariffRequest(
            site_id=plant.plant.site["id"],
            valid_from="2019-01-01",
            rates=[
                kpi_pb2.Rate(name="peak", pence_per_kwh="40", days=["mon", "fri"], start="16:00", end="19:00"),
                kpi_pb2.Rate(name="rest", pence_per_kwh="20.5"),
            ],
            source="an old contract",
        )
        added = await stub.AddTariff(tariff, metadata=firm)
        listed = await stub.ListTariffs(kpi_pb2.ListTariffsRequest(site_id=plant.plant.site["id"]), metadata=firm)
        assert (listed.tariffs[0].id, listed.tariffs[0].valid_from) == (added.id, "2019-01-01")
        assert [rate.pence_per_kwh for rate in listed.tariffs[0].rates] == ["40", "20.5"]
        for wrong in ({"valid_from": "soon"}, {"site_id": 10**6}, {"source": ""}):
            bad = kpi_pb2.AddTariffRequest()
            bad.CopyFrom(tariff)
            for name, value in wrong.items():
                setattr(bad, name, value)
            code = grpc.StatusCode.NOT_FOUND if "site_id" in wrong else grpc.StatusCode.INVALID_ARGUMENT
            await refused(stub.AddTariff(bad, metadata=firm), code)
        factor = kpi_pb2.AddCarbonFactorRequest(
            region="Great Britain", year=2025, kg_per_kwh="0.1", source="a test", sure="memory"
        )
        await refused(stub.AddCarbonFactor(factor, metadata=firm), grpc.StatusCode.PERMISSION_DENIED)
        made = await stub.AddCarbonFactor(factor, metadata=operator)
        factors = await stub.ListCarbonFactors(kpi_pb2.ListCarbonFactorsRequest(), metadata=firm)
        assert made.id in {one.id for one in factors.carbon_factors}
        factor.kg_per_kwh = "much"
        await refused(stub.AddCarbonFactor(factor, metadata=operator), grpc.StatusCode.INVALID_ARGUMENT)


async def test_evidence_is_checked_with_the_public_key_and_says_how_the_figure_was_made(plant: Plant) -> None:
    machine = plant.press["id"]
    key = await plant.get("/v1/evidence/key")
    assert key["public_key"] == Signer(plant.plant.hub.evidence_key).public_key
    verifier = Verifier([key["public_key"]])
    url = f"/v1/machines/{machine}/evidence"
    energy = await plant.get(url, measure="energy_kwh")
    statement = verifier.verify(energy)
    kpis = await plant.get(f"/v1/machines/{machine}/kpis")
    assert statement.figure == pytest.approx(Decimal(kpis["energy_kwh"]["value"]), abs=Decimal("0.000001"))
    assert (statement.unit, statement.machine_path, statement.firm_id) == (
        "kWh",
        "acme/derry/press-1",
        plant.plant.firm["id"],
    )
    assert (statement.from_us, statement.to_us) == (FROM_US, TO_US)
    assert "'power'" in statement.method
    hours = verifier.verify(await plant.get(url, measure="working_hours"))
    assert hours.figure == Decimal(plant.truth.seconds("working")) / 3600
    assert "threshold found" in hours.method
    # Minutes at both ends, and hours between them.
    for start, end in (
        (FROM_US, TO_US),
        (FROM_US + 1_860_000_000, TO_US - 420_000_000),
        (FROM_US, FROM_US + 300_000_000),
    ):
        samples = verifier.verify(await plant.get(url, measure="samples", from_us=start, to_us=end))
        stored = await plant.plant.database.fetchval(
            "SELECT sum(cardinality(values)) FROM frame WHERE machine_id = $1 AND ts >= $2 AND ts < $3",
            machine,
            datetime.fromtimestamp(start / 1_000_000, UTC),
            datetime.fromtimestamp(end / 1_000_000, UTC),
        )
        assert samples.figure == stored
    energy["statement"]["value"] = "1.0"
    with pytest.raises(Invalid):
        verifier.verify(energy)
    wrong: tuple[tuple[dict[str, Any], int, str], ...] = (
        ({"measure": "happiness"}, 400, "INVALID"),
        ({"measure": "samples", "from_us": FROM_US + 1}, 400, "INVALID"),
        ({"measure": "samples", "to_us": 4 * 10**15}, 400, "INVALID"),
    )
    for params, status, reason in wrong:
        answer = await plant.plant.http.get(url, params={"from_us": FROM_US, "to_us": TO_US, **params})
        assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text
    nothing = await plant.plant.machine("nothing-1", [{"name": "temperature"}])
    answer = await plant.plant.http.get(
        f"/v1/machines/{nothing['id']}/evidence", params={"measure": "energy_kwh", "from_us": FROM_US, "to_us": TO_US}
    )
    assert (answer.status_code, answer.json()["reason"]) == (409, "NO_ENERGY_SIGNAL")
    answer = await plant.plant.http.get(
        f"/v1/machines/{nothing['id']}/states", params={"from_us": FROM_US, "to_us": TO_US}
    )
    assert (answer.status_code, answer.json()["reason"]) == (409, "NO_POWER_SIGNAL")


@pytest.mark.parametrize(
    "wrong",
    [
        {"power_signal_id": 10**6},
        {"off_below": 1.0},
        {"off_below": 5.0, "working_from": 1.0},
        {"dwell_minutes": 0},
        {"gap_minutes": 61},
        {"phases": 2},
        {"power_factor": 0},
        {"ideal_cycle_s": -1},
        {"ideal_cycle_s": 1e308},
        {"energy_rollover": 1e30},
        {"count_rollover": 1e30},
        {"volts": 1e300},
        {"shifts": [{"from": "06:00", "to": "25:00"}]},
        {"shifts": [{"from": "06:00", "to": "06:00"}]},
        {"shifts": [{"from": "06:00", "to": "14:00", "days": ["holiday"]}]},
        {"shifts": [{"from": "06:00", "to": "14:00", "breaks": [{"from": "x", "to": "07:00"}]}]},
        {"closed_days": ["tomorrow"]},
        {"colour": "blue"},
    ],
)
async def test_settings_that_cannot_be_meant_are_refused(plant: Plant, wrong: dict[str, Any]) -> None:
    url = f"/v1/machines/{plant.press['id']}/kpi-settings"
    answer = await plant.plant.http.put(url, json=wrong)
    assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID"), answer.text


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": []},
        {"rates": [{"name": "day", "pence_per_kwh": "thirty"}]},
        {"rates": [{"name": "day", "pence_per_kwh": "30", "from": "06:00", "to": "07:00"}]},
        {"rates": [{"name": "day", "pence_per_kwh": "30"}, {"name": "night", "pence_per_kwh": "30"}]},
        {"rates": [{"name": "day", "pence_per_kwh": "30", "from": "06:00"}, {"name": "rest", "pence_per_kwh": "3"}]},
        {"source": ""},
        {"region": "Wales"},
        {"site_id": 0},
        {"valid_from": "soon"},
    ],
)
async def test_tariffs_that_cannot_be_meant_are_refused(plant: Plant, wrong: dict[str, Any]) -> None:
    tariff = {"site_id": plant.plant.site["id"], "valid_from": "2020-01-01", "source": "s"}
    tariff |= {"rates": [{"name": "day", "pence_per_kwh": "30"}]}
    answer = await plant.plant.http.post("/v1/tariffs", json=tariff | wrong)
    assert answer.status_code == 400, answer.text
    assert answer.json()["reason"] == ("BAD_NAME" if "source" in wrong else "INVALID")


async def test_figures_and_settings_are_for_the_firm_itself(plant: Plant) -> None:
    machine, site = plant.press["id"], plant.plant.site["id"]
    window = {"from_us": FROM_US, "to_us": TO_US}
    partner = (await plant.plant.operator.post("/v1/partners", json={"name": "Lab", "region": "Wales"})).json()
    tariff = {"valid_from": "2020-01-01", "source": "s", "rates": [{"name": "day", "pence_per_kwh": "30"}]}
    factor = {"region": "UK", "year": 2025, "kg_per_kwh": "0", "source": "s", "sure": "seen"}

    async def asked(client: httpx.AsyncClient) -> list[int]:
        gets = ("kpis", "states", "evidence", "kpi-settings")
        answers = [
            await client.get(f"/v1/machines/{machine}/{path}", params=window | {"measure": "samples"}) for path in gets
        ]
        answers += [
            await client.put(f"/v1/machines/{machine}/kpi-settings", json={}),
            await client.get(f"/v1/sites/{site}/tariffs"),
            await client.post("/v1/tariffs", json=tariff | {"site_id": site}),
            await client.post("/v1/tariffs", json=tariff | {"region": "Wales"}),
            await client.post("/v1/carbon-factors", json=factor),
        ]
        return [answer.status_code for answer in answers]

    door = plant.plant.hub.processes["door"].http
    assert await asked(plant.plant.stranger) == [*[404] * 7, 403, 403]
    for role, owner, expected in (
        ("device", {"firm_id": plant.plant.firm["id"]}, [403] * 9),
        ("partner", {"partner_id": partner["id"]}, [403] * 9),
    ):
        key = await plant.plant.key(role, **owner)
        async with httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {key}"}) as client:
            assert await asked(client) == expected
    async with httpx.AsyncClient(base_url=door) as nobody:
        assert await asked(nobody) == [401] * 9
