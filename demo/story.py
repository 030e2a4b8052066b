"""What happens in a demo run, as the view and the report tell it."""

import time
from dataclasses import dataclass, field
from typing import Any

from demo.plant import Fault, Floats, Ints, Signal

# An alarm this long after a fault has ended may still be its own: some parts of the detector look back.
FAULT_GRACE_S = 120


@dataclass
class Step:
    """A step of the journey, with the seconds since the start at which it began and ended."""

    title: str
    began_s: float
    ended_s: float | None = None
    outcome: str = ""


@dataclass
class Source:
    """A machine that sends: what it is and what it sent."""

    path: str
    name: str
    kind: str
    signals: tuple[Signal, ...]
    times_us: Ints
    values: Floats
    faults: tuple[Fault, ...] | None
    machine_id: int = 0
    signal_ids: tuple[int, ...] = ()

    def fault_at(self, time_us: int) -> Fault | None:
        """The known fault that an alarm at this time belongs to."""
        seconds = (time_us - int(self.times_us[0])) / 1e6
        for fault in self.faults or ():
            if fault.start_s <= seconds < fault.end_s + FAULT_GRACE_S:
                return fault
        return None


@dataclass
class Counts:
    """Samples; stored and duplicated are counted in the database."""

    sent: int = 0
    acknowledged: int = 0
    stored: int = 0
    quarantined: int = 0
    refused: int = 0
    duplicated: int = 0

    @property
    def lost(self) -> int:
        return self.acknowledged - self.quarantined - self.stored


@dataclass
class Story:
    """Everything known so far."""

    input: str
    sources: list[Source]
    started: float = field(default_factory=time.monotonic)
    steps: list[Step] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    total_samples: int = 0
    rate: float = 0.0
    lag: int = 0
    restarts: int = 0
    first_sample_s: float | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)
    need: dict[str, Any] | None = None
    offers: list[dict[str, Any]] = field(default_factory=list)
    match: dict[str, Any] | None = None
    application: dict[str, Any] | None = None
    trial_balance: dict[str, Any] | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def source_of(self, machine_id: int) -> Source:
        return next(source for source in self.sources if source.machine_id == machine_id)

    def fault_of(self, alarm: dict[str, Any]) -> Fault | None:
        return self.source_of(alarm["machine_id"]).fault_at(alarm["started_us"])

    @property
    def award(self) -> dict[str, Any] | None:
        return self.application["award"] if self.application else None

    def summary(self) -> dict[str, Any]:
        """As .local/demo/summary.json holds it."""
        known = [(source.path, fault) for source in self.sources for fault in source.faults or ()]
        found = {
            (self.source_of(alarm["machine_id"]).path, fault)
            for alarm in self.alarms
            if (fault := self.fault_of(alarm))
        }
        judged = all(source.faults is not None for source in self.sources)
        counts = self.counts
        award = self.award
        return {
            "input": self.input,
            "elapsed_s": round(self.elapsed_s, 1),
            "first_sample_s": None if self.first_sample_s is None else round(self.first_sample_s, 1),
            "samples": {
                "sent": counts.sent,
                "acknowledged": counts.acknowledged,
                "stored": counts.stored,
                "quarantined": counts.quarantined,
                "refused": counts.refused,
                "lost": counts.lost,
                "duplicated": counts.duplicated,
            },
            "alarms": {
                "raised": len(self.alarms),
                "faults_known": len(known) if judged else None,
                "faults_found": len(found) if judged else None,
                "false": sum(self.fault_of(alarm) is None for alarm in self.alarms) if judged else None,
            },
            "need_id": self.need["id"] if self.need else None,
            "offers": len(self.offers),
            "match_id": self.match["id"] if self.match else None,
            "award": award
            and {
                "id": award["id"],
                "grant_pence": award["grant_pence"],
                "co_investment_pence": award["co_investment_pence"],
            },
            "trial_balance_pence": self.trial_balance["total_pence"] if self.trial_balance else None,
        }
