"""A firm's agreement that alarms of its machines open needs, and what it covers."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum, StrEnum


class SharedItem(StrEnum):
    """What a need made from an alarm may tell partners."""

    FAULT = "fault"
    FIGURES = "figures"
    PROFILE = "profile"
    # The need is shown to partners, who may propose themselves.
    PARTNERS = "partners"


class Severity(IntEnum):
    """Of an alarm; `ANY` as a limit lets all through."""

    ANY = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3


class Coverage(StrEnum):
    """Whether an alarm may open a need, and why not."""

    COVERED = "covered"
    NO_CONSENT = "no_consent"
    OTHER_TIME = "other_time"
    OTHER_MACHINE = "other_machine"
    BELOW_SEVERITY = "below_severity"


@dataclass(frozen=True, kw_only=True)
class Consent:
    id: str
    firm_id: int
    shared: frozenset[SharedItem]
    # Empty: all machines of the firm.
    machine_ids: frozenset[int]
    severity_min: Severity
    valid_from: datetime
    valid_until: datetime | None
    note: str
    given: datetime
    given_by: int
    ended: datetime | None = None
    ended_by: int = 0
    replaced: bool = False

    def coverage(self, *, machine_id: int, severity: Severity, raised: datetime, now: datetime) -> Coverage:
        """Whether an alarm raised then may open a need now: both within the consent's time."""
        if raised < self.valid_from or (self.valid_until is not None and max(raised, now) >= self.valid_until):
            return Coverage.OTHER_TIME
        if self.machine_ids and machine_id not in self.machine_ids:
            return Coverage.OTHER_MACHINE
        if severity < self.severity_min:
            return Coverage.BELOW_SEVERITY
        return Coverage.COVERED


@dataclass(frozen=True, kw_only=True)
class NewConsent:
    """What a firm agrees to, before the hub has recorded it. Times are None for "from now" and "until revoked"."""

    shared: Sequence[SharedItem]
    machine_ids: Sequence[int] = ()
    severity_min: Severity = Severity.ANY
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    note: str = ""
