"""Alarms as matching sees them, and the need that a person would write from one."""

import re
from collections.abc import Set
from dataclasses import dataclass
from datetime import datetime

from services.matching.consents import Severity, SharedItem
from services.matching.domain import Urgency

SIGNALS_NAMED_MAX = 3


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A raised alarm of one machine. `signal_name` is empty where several signals took part; then `shares` names them."""

    id: str
    firm_id: int
    machine_id: int
    machine_kind: str
    signal_name: str
    component: str
    explanation: str
    severity: Severity
    raised: datetime
    correlation_id: str
    # Names of the signals that took part, the largest share first.
    shares: tuple[str, ...] = ()


# What a machine's signal did, by the part of the detector that fired.
_CHANGES = {
    "record": "goes beyond anything measured before",
    "shift_long": "has drifted away from its usual level",
    "shift_short": "has moved away from its usual level",
    "level": "is far from its usual level",
    "change": "has changed its level",
    "season": "is unusual for the time of the day or the week",
    "cycle": "is unusual for this point of its cycle",
    "spread": "fluctuates differently from usual",
    "step": "jumps suddenly",
    "flat": "is stuck at one value",
    "dropout": "sends no values any more",
}
_CHANGE_UNKNOWN = "behaves unusually"


def need_text(alarm: Alarm, shared: Set[SharedItem]) -> str:
    """The need in plain words, with what the consent lets through: never a path or a name of the firm's own.

    "Anomaly on spindle: vibration jumps suddenly. vibration_x 4.1 mm/s jumped from 1.3 mm/s, ..."
    """
    machine = _words(alarm.machine_kind) or "machine"
    text = f"Anomaly on {machine}: {_what_changed(alarm)}."
    if SharedItem.FIGURES in shared and alarm.explanation:
        text += f" {alarm.explanation.strip().rstrip('.')}."
    return text


def urgency_of(severity: Severity) -> Urgency:
    return {Severity.HIGH: Urgency.HIGH, Severity.LOW: Urgency.LOW}.get(severity, Urgency.NORMAL)


def _what_changed(alarm: Alarm) -> str:
    if not alarm.signal_name:
        named = [_words(name) for name in alarm.shares[:SIGNALS_NAMED_MAX]]
        return f"its signals do not move together as usual{': above all ' + _listed(named) if named else ''}"
    return f"{_words(alarm.signal_name)} {_CHANGES.get(alarm.component, _CHANGE_UNKNOWN)}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _words(name: str) -> str:
    """A name as people say it, so that it finds the words of a profile: "MeltTemp_zone-2" becomes "melt temp zone 2"."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])|[_\-./]+", " ", name)
    return " ".join(spaced.split()).lower()
