"""Words and rules of ingest: names, limits, reasons."""

import re
from dataclasses import dataclass, field
from typing import Final

# A machine's signals are stored in runs of this many positions, so that a frame stays below PostgreSQL's 2 kB
# out-of-line limit.
CHANNEL_GROUP: Final = 200
SIGNALS_PER_MACHINE_MAX: Final = 10_000
BATCHES_PER_REQUEST_MAX: Final = 10_000
PAGE_SIZE_MAX: Final = 1_000
HISTORY_PAGE_SIZE_MAX: Final = 10_000

# Times outside would make chunks of their own; they go to quarantine.
FUTURE_S_MAX: Final = 10 * 60
PAST_DAYS_MAX: Final = 15 * 366

# What a firm may use unless an operator says otherwise. A door lets it go over its rate for QUOTA_BURST_S, so that gateways
# that were cut off catch up.
QUOTA_SAMPLES_PER_S_DEFAULT: Final = 500_000
QUOTA_SIGNALS_DEFAULT: Final = 50_000
QUOTA_STORED_DAYS_DEFAULT: Final = 400
QUOTA_BURST_S: Final = 60
QUOTA_SAMPLES_PER_S_MAX: Final = 100_000_000
QUOTA_SIGNALS_MAX: Final = 10_000_000
QUOTA_STORED_DAYS_MAX: Final = PAST_DAYS_MAX
# A shorter time would remove what is still arriving late, and alarms would have nothing to show.
STORED_DAYS_MIN: Final = 7

# What a firm may have in quarantine. What comes on top is refused there, and counted: senders have been answered by then.
QUARANTINE_BYTES_PER_FIRM_MAX: Final = 1024**3

REGIONS: Final = (
    "North East",
    "North West",
    "Yorkshire and The Humber",
    "East Midlands",
    "West Midlands",
    "East of England",
    "London",
    "South East",
    "South West",
    "Wales",
    "Scotland",
    "Northern Ireland",
)
SIZES: Final = ("micro", "small", "medium", "large")

UNKNOWN_SIGNAL_POLICIES: Final = ("refuse", "propose")

PATH_LENGTH_MAX: Final = 255
# What programs write where they have no name: a machine of that name would gather the data of many.
RESERVED_NAMES: Final = frozenset(("all", "any", "default", "nan", "nil", "none", "null", "undefined", "unknown"))

_SLUG = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SIC = re.compile(r"\d\d\.\d\d?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Reason:
    """Why samples are in quarantine or were refused. Stable: dashboards and senders rely on the words."""

    UNKNOWN_MACHINE = "UNKNOWN_MACHINE"
    UNKNOWN_SIGNAL = "UNKNOWN_SIGNAL"
    EMPTY_BATCH = "EMPTY_BATCH"
    SHAPE_MISMATCH = "SHAPE_MISMATCH"
    TIME_OUT_OF_WINDOW = "TIME_OUT_OF_WINDOW"
    NOT_FINITE = "NOT_FINITE"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    WRONG_TYPE = "WRONG_TYPE"
    MALFORMED = "MALFORMED"
    TOO_LARGE = "TOO_LARGE"
    # Of Sparkplug nodes.
    DATA_BEFORE_BIRTH = "DATA_BEFORE_BIRTH"
    NOT_IN_BIRTH = "NOT_IN_BIRTH"
    BAD_QUALITY = "BAD_QUALITY"
    NODE_OFFLINE = "NODE_OFFLINE"  # nothing refused: the reason why nothing comes
    # These are sent back and not kept: the sender still has what it sent.
    QUOTA_SAMPLES = "QUOTA_SAMPLES"
    SLOW_DOWN = "SLOW_DOWN"
    FORBIDDEN = "FORBIDDEN"
    INVALID = "INVALID"
    KEY_UNKNOWN = "KEY_UNKNOWN"
    KEY_REVOKED = "KEY_REVOKED"
    KEY_EXPIRED = "KEY_EXPIRED"
    KEY_NOT_YET_VALID = "KEY_NOT_YET_VALID"


@dataclass(frozen=True)
class NewSignal:
    name: str
    unit: str = ""
    range_min: float | None = None
    range_max: float | None = None


@dataclass(frozen=True)
class NewFirm:
    name: str
    slug: str
    sic: str
    region: str
    size: str


@dataclass(frozen=True)
class NewSite:
    firm_id: int
    slug: str
    name: str
    timezone: str = "Europe/London"


@dataclass(frozen=True)
class NewMachine:
    site_id: int
    path: str
    name: str
    kind: str
    signals: list[NewSignal] = field(default_factory=list)


class BadName(ValueError):
    """A name breaks a rule; the message says which."""


def check_slug(slug: str) -> str:
    """One level of a path. Raises BadName."""
    if not _SLUG.fullmatch(slug):
        raise BadName(f"{slug!r}: use 1 to 63 lower case letters, digits and dashes, not first or last a dash")
    if slug in RESERVED_NAMES:
        raise BadName(f"{slug!r}: programs write this where they have no name; choose another")
    return slug


def check_path(path: str) -> str:
    """Levels below a site: [area/[line/[cell/]]]machine. Raises BadName."""
    levels = path.split("/")
    if not 1 <= len(levels) <= 4:
        raise BadName(f"{path!r}: one to four levels, such as line-1/press-3")
    for level in levels:
        check_slug(level)
    if len(path) > PATH_LENGTH_MAX:
        raise BadName(f"{path[:40]!r}...: a path has at most {PATH_LENGTH_MAX} characters")
    return path


def check_text(text: str, *, what: str, length_max: int = 200) -> str:
    """A name for people: something to see, nothing that could break a log or a page. Raises BadName."""
    stripped = text.strip()
    if not stripped or len(stripped) > length_max or _CONTROL.search(stripped):
        raise BadName(f"{what}: 1 to {length_max} characters, no control characters")
    try:
        stripped.encode()
    except UnicodeEncodeError as error:
        raise BadName(f"{what}: not valid Unicode") from error
    return stripped


def check_signal_name(name: str) -> str:
    """Raises BadName for what could not stand in a topic or a path."""
    check_text(name, what="signal name", length_max=100)
    if any(character in name for character in "+#/$"):
        raise BadName(f"{name!r}: a signal's name has none of + # / $")
    return name.strip()


def check_sic(sic: str) -> str:
    if not _SIC.fullmatch(sic):
        raise BadName(f"{sic!r}: a SIC 2007 code looks like 25.62")
    return sic


@dataclass(frozen=True)
class Sender:
    """Whose input it is."""

    firm_id: int
    credential_id: int
    source: str
    door: str
    correlation_id: str
    # False: history that is sent now. It says nothing about the machine and its gateway now.
    is_live: bool = True


@dataclass(frozen=True)
class UnknownSignal:
    """What a batch holds of a signal that its machine does not have, for a firm that wants such signals proposed."""

    name: str
    samples: int
    example: float
    lowest: float
    highest: float
    is_whole: bool
