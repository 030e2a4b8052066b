"""Alarms: what they are, how they are named, how severe they are, and what may happen to them."""

import hashlib
from dataclasses import dataclass
from enum import IntEnum, StrEnum

MICROSECONDS = 1_000_000

# Severity by the score at the start (-log10 of how often a calm series does that): from here on medium, high.
MEDIUM_SCORE = 6.0
HIGH_SCORE = 9.0
# A condition that lasted a whole shift is one step more severe than it looked at the start.
LONG_US = 8 * 3600 * MICROSECONDS
# An alarm that starts while another of its machine is active, or at most this long after one ended, has most likely the same
# cause: it joins that one's episode.
EPISODE_GAP_US = 300 * MICROSECONDS


class Severity(IntEnum):
    LOW = 1
    MEDIUM = 2
    HIGH = 3


class Change(StrEnum):
    RAISED = "raised"
    ACKNOWLEDGED = "acknowledged"
    RETURNED = "returned"
    CLEARED = "cleared"


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of an alarm is due to one signal."""

    signal_id: int
    signal_name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something abnormal on one machine that needs a response.

    Two facets (ISA-18.2): whether its condition lasts, which only the detector decides, and whether a person has acknowledged
    it. Clearing closes it for people.
    """

    id: str
    firm_id: int
    machine_id: int
    position: int  # of the signal in its machine; below 0: several signals together, see joint_position
    signal_id: int
    machine_path: str
    machine_kind: str
    signal_name: str
    unit: str
    started_us: int
    ended_us: int | None
    severity: Severity
    component: str
    explanation: str
    value: float  # NaN where there was none
    score: float
    shares: tuple[Share, ...]
    correlation_id: str
    episode_id: str  # empty until stored: the store knows the machine's other alarms
    # Of an alarm of several signals: position of the one that contributes most.
    lead_position: int | None = None
    acknowledged: bool = False
    cleared: bool = False

    @property
    def active(self) -> bool:
        return self.ended_us is None


@dataclass(frozen=True, kw_only=True)
class Return:
    """The condition of an alarm has returned to normal."""

    alarm_id: str
    ended_us: int
    correlation_id: str


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    change: Change
    changed_us: int
    actor: str
    credential_id: int
    comment: str


@dataclass(frozen=True, kw_only=True)
class AlarmEvent:
    """An alarm after a change."""

    event_id: str
    change: Change
    changed_us: int
    alarm: Alarm


def joint_position(channel_group: int) -> int:
    """Stands for the signals of a channel group together."""
    return -1 - channel_group


def alarm_id(*, machine_id: int, position: int, started_us: int) -> str:
    """The same fault seen again, as after a restart, has the same id."""
    return _derived("alarm", machine_id, position, started_us)


def event_id(alarm_id_: str, change: Change) -> str:
    """Each change happens to an alarm at most once."""
    return _derived("alarm-event", alarm_id_, change)


def severity_at_start(score: float) -> Severity:
    if score >= HIGH_SCORE:
        return Severity.HIGH
    return Severity.MEDIUM if score >= MEDIUM_SCORE else Severity.LOW


def severity_at_end(at_start: Severity, lasted_us: int) -> Severity:
    return Severity(min(at_start + 1, Severity.HIGH)) if lasted_us >= LONG_US else at_start


def _derived(*parts: object) -> str:
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:32]
