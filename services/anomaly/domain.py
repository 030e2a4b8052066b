"""Alarms: what they are, how they are named, how severe they are, and what may happen to them."""

import hashlib
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag, StrEnum

MICROSECONDS = 1_000_000

# Severity by the score at the start: from here on medium, high. A sudden shift of 10 times the usual noise scores 4.7, a value
# several times its whole range away 5.3 (docs/decisions/0003-detector.md).
MEDIUM_SCORE = 4.7
HIGH_SCORE = 5.3
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
    COMMENTED = "commented"
    ASSIGNED = "assigned"
    SHELVED = "shelved"
    UNSHELVED = "unshelved"
    TAKEN_OUT_OF_SERVICE = "taken_out_of_service"
    RETURNED_TO_SERVICE = "returned_to_service"
    SUPPRESSED = "suppressed"
    UNSUPPRESSED = "unsuppressed"


class Suppression(IntFlag):
    """Why an alarm is off the operator's list; it is evaluated, recorded and published all the same."""

    NONE = 0
    SHELVED = 1
    BY_DESIGN = 2  # a maintenance window of the machine
    OUT_OF_SERVICE = 4


# The change with which each reason begins and ends.
BEGINS = {
    Suppression.SHELVED: Change.SHELVED,
    Suppression.BY_DESIGN: Change.SUPPRESSED,
    Suppression.OUT_OF_SERVICE: Change.TAKEN_OUT_OF_SERVICE,
}
ENDS = {
    Suppression.SHELVED: Change.UNSHELVED,
    Suppression.BY_DESIGN: Change.UNSUPPRESSED,
    Suppression.OUT_OF_SERVICE: Change.RETURNED_TO_SERVICE,
}
_BEGUN_BY = {change: reason for reason, change in BEGINS.items()}
_ENDED_BY = {change: reason for reason, change in ENDS.items()}


class State(StrEnum):
    """Both facets in one word (ISA-18.2). Suppression is told first: that is what decides who sees the alarm."""

    NORMAL = "normal"
    UNACKNOWLEDGED = "unacknowledged"
    ACKNOWLEDGED = "acknowledged"
    RETURNED_UNACKNOWLEDGED = "returned_unacknowledged"
    SHELVED = "shelved"
    SUPPRESSED_BY_DESIGN = "suppressed_by_design"
    OUT_OF_SERVICE = "out_of_service"


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of an alarm is due to one signal."""

    signal_id: int
    signal_name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something abnormal on one machine that needs a response.

    Two facets that do not know of each other (ISA-18.2): its condition, which only the detector decides, with the
    acknowledgement by a person; and suppression, which decides whether it is on the operator's list. Clearing closes it for
    people.
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
    suppression: Suppression = Suppression.NONE
    assignee: str = ""
    rule_id: str = ""  # of a rule that the firm wrote; empty: found by the detector
    rule_version: int = 0
    # What the explanation is made of, such as ("expected", 61.2).
    figures: tuple[tuple[str, float], ...] = ()

    @property
    def active(self) -> bool:
        return self.ended_us is None

    @property
    def state(self) -> State:
        if self.suppression and self.active:
            if Suppression.OUT_OF_SERVICE in self.suppression:
                return State.OUT_OF_SERVICE
            return State.SHELVED if Suppression.SHELVED in self.suppression else State.SUPPRESSED_BY_DESIGN
        if self.active:
            return State.ACKNOWLEDGED if self.acknowledged else State.UNACKNOWLEDGED
        return State.NORMAL if self.acknowledged or self.suppression else State.RETURNED_UNACKNOWLEDGED

    def after(self, change: Change) -> "Alarm":
        """What a person's change, or a reason that begins or ends, makes of it; itself when nothing changes.

        When a reason ends while the condition lasts, the alarm is as it would be without. When the condition has returned
        meanwhile, it keeps the reason and is normal: nobody has to respond to what came and went off the list.
        """
        if change is Change.ACKNOWLEDGED:
            return replace(self, acknowledged=True)
        if change is Change.CLEARED:
            return replace(self, acknowledged=True, cleared=True)
        if change in _BEGUN_BY:
            return replace(self, suppression=self.suppression | _BEGUN_BY[change])
        if change in _ENDED_BY and self.active:
            return replace(self, suppression=self.suppression & ~_ENDED_BY[change])
        return self

    def returned(self, ended_us: int) -> "Alarm":
        """The condition has returned to normal."""
        return replace(self, ended_us=ended_us, severity=severity_at_end(self.severity, ended_us - self.started_us))


@dataclass(frozen=True, kw_only=True)
class Return:
    """The condition of an alarm has returned to normal."""

    alarm_id: str
    ended_us: int
    correlation_id: str


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    event_id: str
    change: Change
    changed_us: int
    actor: str
    credential_id: int
    comment: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a person has taken off the operator's list: a signal of a machine, not one alarm of it."""

    alarm_id: str  # the alarm on which it was done
    firm_id: int
    machine_id: int
    machine_path: str
    signal_name: str
    reason_kind: Suppression
    one_shot: bool
    began_us: int
    ends_us: int | None
    reason: str
    actor: str
    credential_id: int


@dataclass(frozen=True, kw_only=True)
class MaintenanceWindow:
    """Alarms of the machine are suppressed by design from the start until the end, or until a person ends it before."""

    id: str
    firm_id: int
    machine_id: int
    starts_us: int
    ends_us: int
    reason: str
    actor: str
    credential_id: int
    ended_us: int | None = None
    ended_actor: str = ""
    ended_credential_id: int = 0
    ended_reason: str = ""


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


def rule_alarm_id(*, rule_id: str, version: int, started_us: int) -> str:
    """The same for an alarm of a rule."""
    return _derived("rule-alarm", rule_id, version, started_us)


def event_id(alarm_id_: str, change: Change, number: int = 0) -> str:
    """`number`: how many of that kind have happened to the alarm before."""
    parts = ("alarm-event", alarm_id_, change)
    return _derived(*parts, number) if number else _derived(*parts)


def severity_at_start(score: float) -> Severity:
    if score >= HIGH_SCORE:
        return Severity.HIGH
    return Severity.MEDIUM if score >= MEDIUM_SCORE else Severity.LOW


def severity_at_end(at_start: Severity, lasted_us: int) -> Severity:
    return Severity(min(at_start + 1, Severity.HIGH)) if lasted_us >= LONG_US else at_start


def _derived(*parts: object) -> str:
    return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()[:32]
