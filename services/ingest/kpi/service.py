"""Machine states, use, OEE, energy, its cost and carbon: what docs/kpi.md promises."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np

from services.common.clock import Clock
from services.common.clock import from_us as as_time
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound, TooLarge
from services.common.evidence import Signer, Statement
from services.common.identity import Caller, Role
from services.ingest.asked import check_id, check_one_of, names
from services.ingest.domain import CHANNEL_GROUP, REGIONS, check_text
from services.ingest.kpi import store
from services.ingest.kpi.calendar import Bools, local_minutes
from services.ingest.kpi.counts import AMPERES, KW, KWH, Counted, Floats, counted, flowed, made, spread
from services.ingest.kpi.figures import Figures, Flow, Minutes
from services.ingest.kpi.settings import VALUE_MAX, Chosen, KpiSettings, chosen_signals, wrong_unit
from services.ingest.kpi.states import Codes, Levels, NoLevels, State, found_levels, runs, states
from services.ingest.kpi.tariff import CarbonFactor, RateCost, Tariff, YearCarbon, carbon, costs, total_pence
from services.ingest.queries import read
from services.ingest.queries import store as query_store
from services.ingest.queries.queries import check_range
from services.ingest.queries.turns import Turns
from smdih.directory.v1 import directory_pb2 as pb

MINUTE_US = 60 * 1_000_000
# A minute takes about 100 bytes and a microsecond; a year is the sum of its quarters.
RANGE_DAYS_MAX = 100
# Levels are looked for in so many days before the end of the range (in the whole range where it is longer).
LEVEL_DAYS = 28
# Read before the range: where a counter stood, and which state a machine was in; and behind it: what ends a gap that goes over
# its end, so that ranges that follow one another have shares of it that add up.
LEAD_MINUTES = 24 * 60
RUNS_MAX = 10_000
RATES_MAX = 20
TARIFFS_PER_SITE_MAX = 200

MEASURES = ("energy_kwh", "working_hours", "samples")
REPORTING_REGION = "UK"
GRIDS = ("Great Britain", "Northern Ireland")
CARBON_REGIONS = (REPORTING_REGION, *GRIDS)
SURE = ("seen", "seen_secondary", "memory")


@dataclass(frozen=True)
class StateSource:
    """What the states were told from."""

    # The signal; None: there is none.
    signal: pb.Signal | None
    levels: Levels | None
    # set (by the settings), found (in the data), or the reason why there are none.
    how: str
    detail: str = ""


@dataclass(frozen=True)
class Run:
    state: State
    from_us: int
    to_us: int


@dataclass(frozen=True)
class StateRuns:
    from_us: int
    to_us: int
    settings_revision: int
    source: StateSource
    runs: list[Run]


@dataclass(frozen=True)
class EnergySource:
    """counter, power, current, or nothing and then why."""

    kind: str
    signal: pb.Signal | None
    detail: str


@dataclass(frozen=True)
class Cost:
    """Of the energy, by rates; pence None: `reason` says why."""

    pence: int | None
    reason: str
    rates: list[RateCost]
    tariffs: list[Tariff]

    @property
    def next_step(self) -> str:
        if self.reason != "NO_TARIFF":
            return ""
        return (
            "Enter what a kWh costs at the machine's site, by its contract or bill: POST /v1/tariffs with the site_id. Or ask an "
            "operator for a tariff of the region."
        )


@dataclass(frozen=True)
class Carbon:
    """By one region's factors; kg None: `reason` says why."""

    region: str
    kg: Decimal | None
    reason: str
    years: list[YearCarbon]

    @property
    def next_step(self) -> str:
        if self.reason != "NO_CARBON_FACTOR":
            return ""
        return (
            f"Ask an operator of the hub to enter the published factor of {self.region} for the year, or one before it, with its "
            "source: POST /v1/carbon-factors."
        )


@dataclass(frozen=True)
class Kpis:
    machine: pb.Machine
    from_us: int
    to_us: int
    timezone: str
    settings_revision: int
    state_source: StateSource
    energy_source: EnergySource
    whole: Figures
    days: list[tuple[int, Figures]]
    cost: Cost
    # By the government's factors for reporting, and by those of the machine's own grid.
    reporting: Carbon
    grid: Carbon


class KpiService:
    def __init__(self, pool: Pool, directory: Directory, clock: Clock, turns: Turns, signer: Signer | None) -> None:
        self._pool = pool
        self._directory = directory
        self._clock = clock
        self._turns = turns
        self._signer = signer

    async def settings(self, caller: Caller, machine_id: int) -> tuple[int, KpiSettings]:
        """The revision that holds (0: none was made yet) and what it says."""
        machine = self._machine(caller, machine_id)
        async with transaction(self._pool) as connection:
            return await store.settings_of(connection, machine.id)

    async def change_settings(self, caller: Caller, machine_id: int, settings: KpiSettings) -> int:
        """The new revision. Raises NotFound, Invalid, Conflict."""
        machine = self._machine(caller, machine_id)
        try:
            settings.check(machine)
        except (ValueError, OverflowError) as error:
            raise Invalid(f"{error}.") from error
        async with transaction(self._pool) as connection:
            return await store.add_settings(connection, machine.id, settings, caller.credential_id)

    async def tariffs(self, caller: Caller, site_id: int) -> list[Tariff]:
        """What holds at a site, in order of date."""
        site = self._site(caller, site_id)
        async with transaction(self._pool) as connection:
            return await store.tariffs(connection, site.id, self._region(site.firm_id))

    async def add_tariff(
        self,
        caller: Caller,
        *,
        site_id: int,
        region: str,
        valid_from: date,
        rates: Sequence[Mapping[str, object]],
        source: str,
        confirmed_by: str,
    ) -> int:
        """A tariff of a site, or (operators) of a region for sites without one. Raises Invalid, NotFound, Forbidden."""
        caller.require(Role.FIRM, Role.OPERATOR)
        if bool(site_id) == bool(region):
            raise Invalid("A tariff is either of a site_id or of a region.")
        if region:
            caller.require(Role.OPERATOR)
            check_one_of(region, REGIONS, "region")
        else:
            self._site(caller, site_id)
        if not 1 <= len(rates) <= RATES_MAX:
            raise Invalid(f"rates: 1 to {RATES_MAX}.")
        try:
            checked = [store.rate_of(rate) for rate in rates]
        except ValueError as error:
            raise Invalid(f"rates: {error}.") from error
        if any(rate.spans is None for rate in checked[:-1]) or checked[-1].spans is not None:
            raise Invalid("rates: the last one, and only that, has no times: it holds whenever no other does.")
        with names():
            for rate in checked:
                check_text(rate.name, what="rate name", length_max=50)
            source = check_text(source, what="source", length_max=500)
            confirmed_by = check_text(confirmed_by, what="confirmed_by") if confirmed_by else ""
        async with transaction(self._pool) as connection:
            if site_id and len(await store.tariffs(connection, site_id, "")) >= TARIFFS_PER_SITE_MAX:
                raise Invalid(f"A site has at most {TARIFFS_PER_SITE_MAX} tariffs.")
            return await store.add_tariff(
                connection,
                site_id=site_id or None,
                region=region or None,
                valid_from=valid_from,
                rates=rates,
                source=source,
                confirmed_by=confirmed_by or None,
                created_by=caller.credential_id,
            )

    async def carbon_factors(self, caller: Caller) -> list[CarbonFactor]:
        """All that hold; they are the same for everybody."""
        async with transaction(self._pool) as connection:
            return await store.carbon_factors(connection)

    async def add_carbon_factor(
        self,
        caller: Caller,
        *,
        region: str,
        year: int,
        kg_per_kwh: Decimal,
        source: str,
        sure: str,
        confirmed_by: str,
    ) -> int:
        caller.require(Role.OPERATOR)
        check_one_of(region, CARBON_REGIONS, "region")
        check_one_of(sure, SURE, "sure")
        if not 1990 <= year <= 2100:
            raise Invalid("year: 1990 to 2100.")
        if not kg_per_kwh.is_finite() or not 0 <= kg_per_kwh < 5:
            raise Invalid("kg_per_kwh: from 0 to below 5, in kgCO2e a kWh.")
        with names():
            source = check_text(source, what="source", length_max=500)
            confirmed_by = check_text(confirmed_by, what="confirmed_by") if confirmed_by else ""
        async with transaction(self._pool) as connection:
            return await store.add_carbon_factor(
                connection,
                region=region,
                year=year,
                kg_per_kwh=kg_per_kwh,
                source=source,
                sure=sure,
                confirmed_by=confirmed_by or None,
                created_by=caller.credential_id,
            )

    async def states(self, caller: Caller, machine_id: int, from_us: int, to_us: int) -> StateRuns:
        """Off, idle, working or no data over whole minutes. Raises NotFound, Invalid, TooLarge, Conflict (no states to tell)."""
        machine = self._machine(caller, machine_id)
        start, end = self._minutes(from_us, to_us)
        async with transaction(self._pool) as connection:
            revision, settings = await store.settings_of(connection, machine.id)
        async with self._turns.of(caller):
            history = self._history(machine, start, end)
            source, codes = await self._codes(settings, chosen_signals(settings, machine), history)
        if source.levels is None:
            raise Conflict(f"{source.detail} Set off_below and working_from in the kpi-settings.", reason=source.how)
        starts, ends, values = runs(codes)
        if len(starts) > RUNS_MAX:
            raise TooLarge(
                f"That is {len(starts)} changes of state, and an answer has {RUNS_MAX}: ask for a shorter range."
            )
        found = [
            Run(State(value), (start + first) * MINUTE_US, (start + last) * MINUTE_US)
            for first, last, value in zip(starts.tolist(), ends.tolist(), values.tolist(), strict=True)
        ]
        return StateRuns(start * MINUTE_US, end * MINUTE_US, revision, source, found)

    async def kpis(self, caller: Caller, machine_id: int, from_us: int, to_us: int, *, by_day: bool) -> Kpis:
        """All figures of a machine over whole minutes. Raises NotFound, Invalid; a figure that cannot be had says why itself."""
        machine = self._machine(caller, machine_id)
        start, end = self._minutes(from_us, to_us)
        async with self._turns.of(caller):
            return await self._kpis(machine, start, end, by_day=by_day)

    async def _kpis(self, machine: pb.Machine, start: int, end: int, *, by_day: bool) -> Kpis:
        site = self._directory.sites.get(machine.site_id)
        region = self._region(machine.firm_id)
        own_grid = GRIDS[1] if region == "Northern Ireland" else GRIDS[0]
        async with transaction(self._pool) as connection:
            revision, settings = await store.settings_of(connection, machine.id)
            tariffs = await store.tariffs(connection, machine.site_id, region)
            factors = {name: await store.carbon_factors(connection, name) for name in (REPORTING_REGION, own_grid)}
        chosen = chosen_signals(settings, machine)
        history = self._history(machine, start, end)
        state_source, codes = await self._codes(settings, chosen, history)
        timezone = site.timezone if site is not None else "Europe/London"
        local = await asyncio.to_thread(local_minutes, start, end - start, ZoneInfo(timezone))
        energy_source, energy = await self._energy(settings, chosen, history)
        counts = {
            role: await self._made(history, chosen.signals[role], settings.count_rollover)
            for role in ("total_count", "good_count")
            if role in chosen.signals
        }
        missing = {role: f"NO_{role.upper()}" for role in ("total_count", "good_count") if role not in counts}
        if state_source.levels is None:
            missing["states"] = state_source.how
        if energy is None:
            missing["energy"] = "NO_ENERGY_SIGNAL"

        def reckoned() -> Kpis:
            minutes = Minutes(
                start=start,
                local=local,
                codes=codes,
                planned=settings.planned(local),
                total=counts.get("total_count"),
                good=counts.get("good_count"),
                energy=energy,
                ideal_cycle_s=settings.ideal_cycle_s,
                missing=missing,
            )
            return Kpis(
                machine=machine,
                from_us=start * MINUTE_US,
                to_us=end * MINUTE_US,
                timezone=timezone,
                settings_revision=revision,
                state_source=state_source,
                energy_source=energy_source,
                whole=minutes.figures(slice(0, end - start)),
                days=[(day, minutes.figures(part)) for day, part in minutes.days()] if by_day else [],
                cost=_cost(minutes, tariffs),
                reporting=_carbon(REPORTING_REGION, minutes, factors[REPORTING_REGION]),
                grid=_carbon(own_grid, minutes, factors[own_grid]),
            )

        return await asyncio.to_thread(reckoned)

    async def evidence(
        self, caller: Caller, machine_id: int, measure: str, from_us: int, to_us: int
    ) -> dict[str, object]:
        """A figure signed with the hub's key, for who must rely on it. Raises Conflict where there is none to sign."""
        machine = self._machine(caller, machine_id)
        check_one_of(measure, MEASURES, "measure")
        if self._signer is None:
            raise Conflict(
                "This hub has no key to sign with: its operators set SMDIH_EVIDENCE_KEY.", reason="NO_EVIDENCE_KEY"
            )
        start, end = self._minutes(from_us, to_us)
        if start * MINUTE_US != from_us or end * MINUTE_US != to_us:
            raise Invalid("from_us and to_us: whole minutes that are over; evidence is for exactly what was asked.")
        if measure == "samples":
            async with self._turns.of(caller):
                value, unit, coverage, method = await self._counted_samples(machine, from_us, to_us)
        else:
            value, unit, coverage, method = await self._measured(caller, machine, measure, from_us, to_us)
        return self._signer.sign(
            Statement(
                measure=measure,
                firm_id=machine.firm_id,
                machine_id=machine.id,
                machine_path=machine.path,
                from_us=from_us,
                to_us=to_us,
                value=value,
                unit=unit,
                coverage=f"{coverage:.6f}",
                method=method,
                issued_us=self._clock.now_us(),
            )
        )

    def evidence_key(self) -> tuple[str, str]:
        """Name and text of the public key. Raises NotFound."""
        if self._signer is None:
            raise NotFound("This hub has no key to sign with: its operators set SMDIH_EVIDENCE_KEY.")
        return self._signer.key_id, self._signer.public_key

    async def _measured(
        self, caller: Caller, machine: pb.Machine, measure: str, from_us: int, to_us: int
    ) -> tuple[str, str, float, str]:
        kpis = await self.kpis(caller, machine.id, from_us, to_us, by_day=False)
        used = f"settings revision {kpis.settings_revision}"
        if measure == "energy_kwh":
            figure, source = kpis.whole.energy_kwh, kpis.energy_source
            if figure.value is None:
                raise Conflict(f"There is no energy to attest: {source.detail}", reason=figure.reason)
            name = source.signal.name if source.signal else ""
            return f"{figure.value:.6f}", "kWh", kpis.whole.energy_coverage, f"{source.detail} Signal {name!r}; {used}."
        state_source, times = kpis.state_source, kpis.whole.times
        if state_source.levels is None:
            raise Conflict(f"There are no states to attest: {state_source.detail}", reason=state_source.how)
        assert state_source.signal is not None
        seconds = (to_us - from_us) / 1_000_000
        method = (
            f"Minutes in state working by the mean of {state_source.signal.name!r}: from {state_source.levels.working_from:.6g} "
            f"{state_source.signal.unit} (threshold {state_source.how}); {used}."
        )
        return f"{times.working_s / 3600:.6f}", "h", 1 - times.no_data_s / seconds, method

    async def _counted_samples(self, machine: pb.Machine, from_us: int, to_us: int) -> tuple[str, str, float, str]:
        count, minutes = 0, 0
        async with transaction(self._pool) as connection:
            for first in range(0, len(machine.signals), CHANNEL_GROUP):
                range_ = (as_time(from_us), as_time(to_us))
                count += await store.sample_count(connection, machine.id, first, *range_)
                minutes = max(minutes, await store.minute_count(connection, machine.id, first, *range_))
        coverage = minutes / ((to_us - from_us) // MINUTE_US)
        return str(count), "samples", coverage, "Samples stored of all signals of the machine."

    async def _codes(self, settings: KpiSettings, chosen: Chosen, history: "_History") -> tuple[StateSource, Codes]:
        """States of the minutes start to end - 1, by power, else by current."""
        start, end = history.start, history.end
        unknown = np.full(end - start, State.NO_DATA, dtype=np.int8)
        signal = chosen.signals.get("power") or chosen.signals.get("current")
        if signal is None:
            detail = chosen.missing["power"]
            return StateSource(None, None, "NO_POWER_SIGNAL", detail), unknown
        first = min(start - LEAD_MINUTES, end - LEVEL_DAYS * 24 * 60)
        means = (await history.minutes(signal, first))["means"][: end - first]
        lead = start - LEAD_MINUTES - first
        how = "set"
        if settings.off_below is not None and settings.working_from is not None:
            levels = Levels(settings.off_below, settings.working_from)
        else:
            how = "found"
            try:
                levels = await asyncio.to_thread(found_levels, means)
            except NoLevels as error:
                return StateSource(signal, None, error.reason, error.detail), unknown
        codes = await asyncio.to_thread(states, means[lead:], levels, dwell_minutes=settings.dwell_minutes)
        return StateSource(signal, levels, how), codes[LEAD_MINUTES:]

    async def _energy(
        self, settings: KpiSettings, chosen: Chosen, history: "_History"
    ) -> tuple[EnergySource, Flow | None]:
        """kWh of each minute: by the energy counter if there is one, else by power, else by current."""
        counter, power, current = (chosen.signals.get(role) for role in ("energy", "power", "current"))
        first = history.start - LEAD_MINUTES
        for role in ("energy", "power", "current"):
            # Units may change after the settings were made; another source in place of the named one would be a surprise.
            if role in chosen.signals and (wrong := wrong_unit(role, chosen.signals[role])):
                return EnergySource("", None, f"{wrong}."), None
        if counter is not None:
            found = await history.counted(counter, settings.energy_rollover)
            flow = history.cut(*spread(found.added * KWH[counter.unit], found.known), found.anew)
            detail = f"Differences of the energy counter, which began anew {int(flow.anew.sum())} times."
            return EnergySource("counter", counter, detail), flow
        gap = f"over gaps of up to {settings.gap_minutes} minutes drawn as a line."
        if power is not None:
            means = (await history.minutes(power, first))["means"] * KW[power.unit]
            detail = f"Mean power of each minute, {gap}"
            return EnergySource("power", power, detail), history.cut(*flowed(means, settings.gap_minutes))
        if current is not None and settings.volts:
            factor = settings.volts * settings.power_factor * (3**0.5 if settings.phases == 3 else 1) / 1000
            means = (await history.minutes(current, first))["means"] * (AMPERES[current.unit] * factor)
            detail = (
                f"Estimated: mean current of each minute at {settings.volts:g} V, {settings.phases} phases, power factor "
                f"{settings.power_factor:g}, {gap}"
            )
            return EnergySource("current", current, detail), history.cut(*flowed(means, settings.gap_minutes))
        if current is not None:
            detail = "A current alone is no energy: set volts, phases and power_factor in the kpi-settings."
        else:
            detail = chosen.missing.get("energy", chosen.missing.get("power", ""))
        return EnergySource("", None, detail), None

    async def _made(self, history: "_History", signal: pb.Signal, rollover: float) -> Flow:
        found = await history.counted(signal, rollover)
        return history.cut(*made(found.added, found.known), found.anew)

    def _history(self, machine: pb.Machine, start: int, end: int) -> "_History":
        return _History(self._pool, machine, start, end, min(end + LEAD_MINUTES, self._clock.now_us() // MINUTE_US))

    def _minutes(self, from_us: int, to_us: int) -> tuple[int, int]:
        """The whole minutes of the range that are over. Raises Invalid."""
        check_range(from_us, to_us)
        start, end = from_us // MINUTE_US, min(-(-to_us // MINUTE_US), self._clock.now_us() // MINUTE_US)
        if start >= end:
            raise Invalid("from_us must lie in the past, and the range hold a minute that is over.")
        if end - start > RANGE_DAYS_MAX * 24 * 60:
            raise Invalid(f"At most {RANGE_DAYS_MAX} days at a time; times, counts, energy and cost can be added up.")
        if start < LEVEL_DAYS * 24 * 60:
            raise Invalid("from_us: microseconds since 1970, from 1971 on.")
        return start, end

    def _machine(self, caller: Caller, machine_id: int) -> pb.Machine:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(machine_id, "machine_id")
        machine = self._directory.machines.get(machine_id)
        if machine is None:
            raise NotFound(f"There is no machine {machine_id}.")
        caller.check_sees_firm(machine.firm_id)
        return machine

    def _site(self, caller: Caller, site_id: int) -> pb.Site:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(site_id, "site_id")
        site = self._directory.sites.get(site_id)
        if site is None:
            raise NotFound(f"There is no site {site_id}.")
        caller.check_sees_firm(site.firm_id)
        return site

    def _region(self, firm_id: int) -> str:
        firm = self._directory.firms.get(firm_id)
        return "" if firm is None else firm.region


class _History:
    """The stored minutes of a machine's signals around start to end - 1, each signal read once."""

    def __init__(self, pool: Pool, machine: pb.Machine, start: int, end: int, until: int) -> None:
        self._pool = pool
        self._machine = machine
        self.start = start
        self.end = end
        # Behind the last minute that is read.
        self._until = until
        self._known: dict[int, tuple[int, dict[str, Floats]]] = {}

    async def minutes(self, signal: pb.Signal, first: int) -> dict[str, Floats]:
        """Means, mins, maxs and lasts of the minutes from `first` to some behind the end; NaN: no value."""
        known = self._known.get(signal.id)
        if known is None or known[0] > first:
            known = self._known[signal.id] = (first, await self._read(signal, first))
        return {name: values[first - known[0] :] for name, values in known[1].items()}

    async def counted(self, signal: pb.Signal, rollover: float) -> Counted:
        """What a counter did from LEAD_MINUTES before the start on."""
        stood = await self.minutes(signal, self.start - LEAD_MINUTES)
        return await asyncio.to_thread(counted, stood["mins"], stood["maxs"], stood["lasts"], rollover)

    def cut(self, added: Floats, accounted: Bools, anew: Bools | None = None) -> Flow:
        """The range of what begins LEAD_MINUTES before it."""
        part = slice(LEAD_MINUTES, LEAD_MINUTES + self.end - self.start)
        anew = np.zeros(len(added), dtype=bool) if anew is None else anew
        return Flow(added[part], accounted[part], anew[part])

    async def _read(self, signal: pb.Signal, first: int) -> dict[str, Floats]:
        machine = self._machine
        position = next(number for number, one in enumerate(machine.signals) if one.id == signal.id)
        place = query_store.SignalPlace(signal.id, machine.firm_id, machine.id, position, signal.name, signal.unit)
        found = {name: np.full(self._until - first, np.nan) for name in ("means", "mins", "maxs", "lasts")}
        async for _, page in read.stats(self._pool, [place], read.MINUTE, first * MINUTE_US, self._until * MINUTE_US):
            some = page.column(0)
            at = some.buckets - first
            found["means"][at] = (some.sums / some.counts)[:, 0]
            for name in ("mins", "maxs", "lasts"):
                found[name][at] = getattr(some, name)[:, 0]
        for values in found.values():
            values[np.abs(values) > VALUE_MAX] = np.nan
        return found


def _cost(minutes: Minutes, tariffs: Sequence[Tariff]) -> Cost:
    if minutes.energy is None:
        return Cost(None, minutes.missing["energy"], [], [])
    energy = minutes.energy.added
    found, covered = costs(energy, minutes.local, tariffs)
    used = {one.tariff_id for one in found}
    of_use = [tariff for tariff in tariffs if tariff.id in used]
    if not covered[energy > 0].all() or not tariffs:
        return Cost(None, "NO_TARIFF", found, of_use)
    return Cost(total_pence(found), "", found, of_use)


def _carbon(region: str, minutes: Minutes, factors: Sequence[CarbonFactor]) -> Carbon:
    if minutes.energy is None:
        return Carbon(region, None, minutes.missing["energy"], [])
    years, missing = carbon(minutes.energy.added, minutes.local, {factor.year: factor for factor in factors})
    if missing:
        return Carbon(region, None, "NO_CARBON_FACTOR", years)
    return Carbon(region, sum((one.kg for one in years), Decimal(0)), "", years)
