"""How the figures of a machine are made: which signal is what, thresholds, shifts."""

import functools
import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any, Final

from services.ingest.kpi.calendar import Bools, LocalMinutes, day_number, span_of, week_of
from services.ingest.kpi.counts import AMPERES, KW, KWH
from smdih.directory.v1 import directory_pb2 as pb

SHIFTS_MAX: Final = 50
CLOSED_DAYS_MAX: Final = 1_000

# No power, current or count is larger: such a value is a fault, and sums of it would be no numbers.
VALUE_MAX: Final = 1e12
MOST: Final = {
    "energy_rollover": VALUE_MAX,
    "count_rollover": VALUE_MAX,
    "ideal_cycle_s": 1e7,
    "off_below": VALUE_MAX,
    "working_from": VALUE_MAX,
    "volts": 1e5,
}

SIGNAL_ROLES: Final = ("power", "current", "energy", "total_count", "good_count")


@dataclass(frozen=True)
class Shift:
    """Planned time: from "06:00" to "14:00" on some days (none: all), without the breaks (pairs of times)."""

    start: str
    end: str
    days: tuple[str, ...] = ()
    breaks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class KpiSettings:
    """0, None and empty: not said; then the signals are found by their units, and the thresholds from the data."""

    power_signal_id: int = 0
    current_signal_id: int = 0
    energy_signal_id: int = 0
    total_count_signal_id: int = 0
    good_count_signal_id: int = 0
    # Where a counter begins anew at a known value.
    energy_rollover: float = 0.0
    count_rollover: float = 0.0
    # Planned run time for one item (PRI).
    ideal_cycle_s: float = 0.0
    # In the unit of the power or current signal; both or none.
    off_below: float | None = None
    working_from: float | None = None
    dwell_minutes: int = 2
    gap_minutes: int = 5
    # What makes power of a current.
    volts: float = 0.0
    phases: int = 1
    power_factor: float = 1.0
    shifts: tuple[Shift, ...] = ()
    # Dates without planned time.
    closed_days: tuple[str, ...] = ()

    def signal_id(self, role: str) -> int:
        found: int = getattr(self, f"{role}_signal_id")
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> "KpiSettings":
        shifts = tuple(
            Shift(one["start"], one["end"], tuple(one["days"]), tuple((start, end) for start, end in one["breaks"]))
            for one in stored["shifts"]
        )
        found = cls(**{**stored, "shifts": shifts, "closed_days": tuple(stored["closed_days"])})
        # What was stored before there were bounds gives figures that are no numbers: it counts as not said.
        return replace(found, **{name: getattr(cls(), name) for name in found._beyond()})

    def _beyond(self) -> list[str]:
        return [name for name, most in MOST.items() if (getattr(self, name) or 0) > most]

    def check(self, machine: pb.Machine) -> None:
        """Raises ValueError with what is wrong."""
        by_id = {signal.id: signal for signal in machine.signals}
        for role in SIGNAL_ROLES:
            signal = by_id.get(self.signal_id(role))
            if self.signal_id(role) and signal is None:
                raise ValueError(f"{role}_signal_id: the machine has no signal {self.signal_id(role)}")
            if signal is not None and (wrong := wrong_unit(role, signal)):
                raise ValueError(f"{role}_signal_id: {wrong}")
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: a finite number")
        if (self.off_below is None) != (self.working_from is None):
            raise ValueError("off_below and working_from: both or none")
        if self.off_below is not None and self.working_from is not None and not 0 < self.off_below <= self.working_from:
            raise ValueError("off_below must be above 0 and at most working_from")
        if not 1 <= self.dwell_minutes <= 60 or not 0 <= self.gap_minutes <= 60:
            raise ValueError("dwell_minutes: 1 to 60; gap_minutes: 0 to 60")
        if min(self.ideal_cycle_s, self.energy_rollover, self.count_rollover, self.volts) < 0:
            raise ValueError("ideal_cycle_s, the rollovers and volts are 0 (not said) or more")
        for name in self._beyond():
            raise ValueError(f"{name}: at most {MOST[name]:g}")
        if self.phases not in (1, 3) or not 0 < self.power_factor <= 1:
            raise ValueError("phases: 1 or 3; power_factor: above 0, at most 1")
        if len(self.shifts) > SHIFTS_MAX or len(self.closed_days) > CLOSED_DAYS_MAX:
            raise ValueError(f"at most {SHIFTS_MAX} shifts and {CLOSED_DAYS_MAX} closed_days")
        for shift in self.shifts:
            span_of(shift.days, shift.start, shift.end)
            if len(shift.breaks) > SHIFTS_MAX:
                raise ValueError(f"at most {SHIFTS_MAX} breaks in a shift")
            for start, end in shift.breaks:
                span_of((), start, end)
        for day in self.closed_days:
            date.fromisoformat(day)

    def planned(self, local: LocalMinutes) -> Bools | None:
        """Which minutes are planned busy time; None: there is no calendar."""
        if not self.shifts:
            return None
        closed = frozenset(day_number(date.fromisoformat(day)) for day in self.closed_days)
        weeks = [
            week_of(
                [span_of(shift.days, shift.start, shift.end)], [span_of((), start, end) for start, end in shift.breaks]
            )
            for shift in self.shifts
        ]
        return local.within(functools.reduce(operator.or_, weeks), closed)


@dataclass(frozen=True)
class Chosen:
    """The signals that the figures are made of, and why one that was looked for is not there."""

    signals: Mapping[str, pb.Signal] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def without(self, role: str, why: str) -> "Chosen":
        signals = {name: signal for name, signal in self.signals.items() if name != role}
        return replace(self, signals=signals, missing={**self.missing, role: why})


_UNITS: Final[Mapping[str, Mapping[str, float]]] = {"power": KW, "current": AMPERES, "energy": KWH}


def wrong_unit(role: str, signal: pb.Signal) -> str:
    """Why the signal cannot be what it is said to be; empty: it can."""
    units = _UNITS.get(role)
    if units is None or signal.unit in units:
        return ""
    return f"{signal.name!r} is in {signal.unit!r}, and {role} in {', '.join(units)}: give the signal its unit"


def chosen_signals(settings: KpiSettings, machine: pb.Machine) -> Chosen:
    """Those that the settings name; else, for power, current and energy, the only one that the machine has in such a unit."""
    signals: dict[str, pb.Signal] = {}
    missing: dict[str, str] = {}
    for role in SIGNAL_ROLES:
        named = settings.signal_id(role)
        fitting = [
            signal
            for signal in machine.signals
            if (signal.id == named if named else signal.unit in _UNITS.get(role, {}))
        ]
        if len(fitting) == 1:
            signals[role] = fitting[0]
        elif fitting:
            units = ", ".join(sorted({signal.unit for signal in fitting}))
            missing[role] = f"{len(fitting)} signals are in {units}: say which one in the machine's kpi-settings."
        else:
            missing[role] = f"No signal is known as {role}: say which one in the machine's kpi-settings."
    return Chosen(signals, missing)
