"""Times, use, OEE (ISO 22400-2) and energy of a range of minutes: see docs/kpi.md."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from services.ingest.kpi.calendar import Bools, LocalMinutes
from services.ingest.kpi.counts import Floats
from services.ingest.kpi.states import Codes, State

# With less of the time known a share of the time says nothing.
COVERAGE_MIN: Final = 0.5
MINUTE_S: Final = 60


@dataclass(frozen=True)
class Figure:
    """A number, or the reason why there is none. A number may have a reason too: why it should be looked at."""

    value: float | None
    reason: str = ""


@dataclass(frozen=True)
class Times:
    off_s: int
    idle_s: int
    working_s: int
    no_data_s: int


@dataclass(frozen=True)
class Figures:
    """Of one range."""

    from_minute: int
    to_minute: int
    times: Times
    # The part of it that was planned busy time; None: there is no calendar.
    planned: Times | None
    utilisation: Figure
    availability: Figure
    effectiveness: Figure
    quality: Figure
    oee: Figure
    total_count: Figure
    good_count: Figure
    energy_kwh: Figure
    idle_energy_kwh: Figure
    # Share of the time that the energy is known for.
    energy_coverage: float


@dataclass(frozen=True)
class Flow:
    """What was made or used in each minute, which minutes that is known for, and in which its counter was set back."""

    added: Floats
    accounted: Bools
    anew: Bools


@dataclass(frozen=True)
class Minutes:
    """What is known of each minute from `start` (minutes since 1970 UTC) on; None: not known at all, `missing` says why."""

    start: int
    local: LocalMinutes
    codes: Codes
    planned: Bools | None
    total: Flow | None
    good: Flow | None
    energy: Flow | None
    ideal_cycle_s: float
    # Reasons by what is missing: states, total_count, good_count, energy.
    missing: dict[str, str] = field(default_factory=dict)

    def days(self) -> list[tuple[int, slice]]:
        """The local days (since 1970) with their minutes."""
        if not len(self.codes):
            return []
        starts = np.concatenate([[0], np.flatnonzero(np.diff(self.local.days)) + 1]).tolist()
        ends = [*starts[1:], len(self.codes)]
        return [(int(self.local.days[start]), slice(start, end)) for start, end in zip(starts, ends, strict=True)]

    def figures(self, part: slice) -> Figures:
        codes = self.codes[part]
        planned = None if self.planned is None else self.planned[part]
        # Items made outside of the plan are measured against work outside of the plan: neither counts.
        counting = np.ones(len(codes), dtype=bool) if planned is None else planned
        total = self._count(self.total, "total_count", part, counting)
        good = self._count(self.good, "good_count", part, counting)
        availability = self._availability(codes, planned)
        effectiveness = self._effectiveness(total, part, counting)
        quality = self._quality(total, good, part, counting)
        energy, idle_energy, coverage = self._energy(part)
        return Figures(
            from_minute=self.start + part.start,
            to_minute=self.start + part.stop,
            times=_times(codes),
            planned=None if planned is None else _times(codes[planned]),
            utilisation=self._utilisation(codes),
            availability=availability,
            effectiveness=effectiveness,
            quality=quality,
            oee=_product(availability, effectiveness, quality),
            total_count=total,
            good_count=good,
            energy_kwh=energy,
            idle_energy_kwh=idle_energy,
            energy_coverage=coverage,
        )

    def _count(self, made: Flow | None, role: str, part: slice, counting: Bools) -> Figure:
        if made is None:
            return Figure(None, self.missing[role])
        if not counting.any():
            return Figure(0.0)
        added, accounted = made.added[part][counting], made.accounted[part][counting]
        if not accounted.any():
            return Figure(None, "NO_DATA")
        if accounted.mean() < COVERAGE_MIN:
            return Figure(None, "TOO_LITTLE_DATA")
        return Figure(_items(added), "LONG_GAP" if added[~accounted].any() else "")

    def _utilisation(self, codes: Codes) -> Figure:
        if "states" in self.missing:
            return Figure(None, self.missing["states"])
        known = codes != State.NO_DATA
        return _share(codes == State.WORKING, known, len(codes))

    def _availability(self, codes: Codes, planned: Bools | None) -> Figure:
        if "states" in self.missing:
            return Figure(None, self.missing["states"])
        if planned is None:
            return Figure(None, "NO_CALENDAR")
        if not planned.any():
            return Figure(None, "NOT_PLANNED")
        return _share((codes == State.WORKING) & planned, (codes != State.NO_DATA) & planned, int(planned.sum()))

    def _effectiveness(self, total: Figure, part: slice, counting: Bools) -> Figure:
        """Over the minutes that the items are known for."""
        if "states" in self.missing:
            return Figure(None, self.missing["states"])
        if total.value is None:
            return Figure(None, total.reason)
        if not self.ideal_cycle_s:
            return Figure(None, "NO_IDEAL_CYCLE")
        assert self.total is not None
        known = counting & self.total.accounted[part]
        working_s = _seconds((self.codes[part] == State.WORKING) & known)
        if not working_s:
            return Figure(None, "NOT_WORKING")
        value = self.ideal_cycle_s * _items(self.total.added[part][known]) / working_s
        return Figure(value, "WRONG_IDEAL_CYCLE" if value > 1 else "")

    def _quality(self, total: Figure, good: Figure, part: slice, counting: Bools) -> Figure:
        """Over the minutes that both are known for."""
        for count in (total, good):
            if count.value is None:
                return Figure(None, count.reason)
        assert self.total is not None
        assert self.good is not None
        known = counting & self.total.accounted[part] & self.good.accounted[part]
        of_all = _items(self.total.added[part][known])
        if not of_all:
            return Figure(None, "NOTHING_PRODUCED")
        value = _items(self.good.added[part][known]) / of_all
        return Figure(value, "MORE_GOOD_THAN_TOTAL" if value > 1 else "")

    def _energy(self, part: slice) -> tuple[Figure, Figure, float]:
        if self.energy is None:
            return Figure(None, self.missing["energy"]), Figure(None, self.missing["energy"]), 0.0
        energy, accounted = self.energy.added[part], self.energy.accounted[part]
        if not accounted.any():
            return Figure(None, "NO_DATA"), Figure(None, "NO_DATA"), 0.0
        reason = "COUNTER_RESET" if self.energy.anew[part].any() else ""
        idle = Figure(float(energy[self.codes[part] == State.IDLE].sum()), reason)
        if "states" in self.missing:
            idle = Figure(None, self.missing["states"])
        return Figure(float(energy.sum()), reason), idle, float(accounted.mean())


def _items(added: Floats) -> float:
    return round(float(added.sum()), 6)


def _seconds(which: Bools) -> int:
    return int(np.count_nonzero(which)) * MINUTE_S


def _times(codes: Codes) -> Times:
    off, idle, working, no_data = (
        _seconds(codes == state) for state in (State.OFF, State.IDLE, State.WORKING, State.NO_DATA)
    )
    return Times(off, idle, working, no_data)


def _share(some: Bools, known: Bools, of: int) -> Figure:
    count = int(np.count_nonzero(known))
    if not count:
        return Figure(None, "NO_DATA")
    if count < COVERAGE_MIN * of:
        return Figure(None, "TOO_LITTLE_DATA")
    return Figure(float(np.count_nonzero(some) / count))


def _product(*factors: Figure) -> Figure:
    value, reason = 1.0, ""
    for factor in factors:
        if factor.value is None:
            return Figure(None, factor.reason)
        value *= factor.value
        reason = reason or factor.reason
    return Figure(value, reason)
