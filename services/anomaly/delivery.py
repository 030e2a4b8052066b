"""Messages about alarms: to whom, signed how, again when."""

import hashlib
import hmac
import random
from dataclasses import dataclass
from enum import StrEnum

from services.anomaly.domain import Severity

# The first try comes at once; each later one after twice the time, to an hour, a little more or less. So a receiver that is away
# for three hours misses nothing; after that it is for a person to send again.
ATTEMPTS_MAX = 12
RETRY_S = 5
RETRY_S_MAX = 3600
# A contact that fails is left alone for ever longer, to this; what waits for one that has failed ATTEMPTS_MAX times in a row and is
# older than GIVE_UP_S is given up without a try of its own.
PAUSE_S_MAX = 300
GIVE_UP_S = 3 * 3600
# A claimed delivery is claimed by another when nothing is heard of it for so long; longer than any try may take.
CLAIM_S = 60
# To one contact; what is more waits: a flood of alarms must not become a flood of messages.
MESSAGES_A_MINUTE_MAX = 30
ERROR_CHARACTERS_MAX = 300
SIGNATURE_VERSION = "v1"


class ContactKind(StrEnum):
    WEBHOOK = "webhook"
    EMAIL = "email"


class DeliveryState(StrEnum):
    PENDING = "pending"
    SENT = "sent"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True)
class Contact:
    id: str
    firm_id: int
    name: str
    kind: ContactKind
    address: str
    secret: str  # what webhooks are signed with; of a mail address the code, until it is confirmed
    confirmed: bool = True


@dataclass(frozen=True)
class Step:
    """Who is told when an alarm has not been acknowledged for so long; 0: as soon as it is raised."""

    after_s: int
    contact_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Escalation:
    id: str
    firm_id: int
    name: str
    site: str
    severity_min: Severity
    tell_changes: bool
    steps: tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """One message to one contact."""

    id: str
    firm_id: int
    alarm_id: str  # empty: a trial
    transition: str
    contact_id: str
    correlation_id: str
    state: DeliveryState
    attempts: int
    due_us: int
    made_us: int
    finished_us: int | None
    last_error: str


class NotDelivered(Exception):
    """A try failed; the text is for people and holds no secret."""

    def __init__(self, text: str) -> None:
        # Servers answer in whatever encoding they like.
        super().__init__(text.encode("ascii", "backslashreplace").decode().replace("\0", " ")[:ERROR_CHARACTERS_MAX])


def retry_after_s(attempts: int, *, longest_s: int) -> float:
    """How long to wait after so many tries have failed."""
    return min(RETRY_S * 2.0 ** min(attempts - 1, ATTEMPTS_MAX), longest_s) * random.uniform(0.8, 1.2)  # noqa: S311  # jitter


def signature(secret: str, *, timestamp_s: int, body: bytes) -> str:
    """What proves to a receiver that a message is ours, and when it was sent."""
    digest = hmac.new(secret.encode(), f"{timestamp_s}.".encode() + body, hashlib.sha256).hexdigest()
    return f"{SIGNATURE_VERSION}={digest}"
