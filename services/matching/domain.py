"""Values and rules of matching: needs, providers, hard filters and the two distances (sector, region).

Standard library only. Everything here is pure; the clock, the models and the database live elsewhere.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from enum import StrEnum

ANY_DIVISION = "any"
"""In `Provider.sic_divisions`: serves every sector."""

ONLINE_REGIONS = frozenset({"online", "remote", "uk", "uk-wide", "united kingdom", "national"})
"""Spellings of "no place": such a provider travels or works at a distance."""


class MatchingError(Exception):
    """Base of what the matching rules refuse."""

    REASON = "MATCHING"


class InvalidNeedError(MatchingError):
    """The need or provider breaks a rule of its own fields; sending it again does not help."""

    REASON = "INVALID_ARGUMENT"


class Kind(StrEnum):
    EXPERT = "expert"
    FACILITY = "facility"
    WORKSHOP = "workshop"
    COURSE = "course"

    @property
    def is_safety_net(self) -> bool:
        """Of use to nearly everybody, when nothing nearer to the need is to be had."""
        return self in (Kind.WORKSHOP, Kind.COURSE)


class Size(StrEnum):
    MICRO = "micro"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Urgency(StrEnum):
    LOW = "low"
    NORMAL = "normal"
    HIGH = "high"


class Source(StrEnum):
    FIRM = "firm"
    ANOMALY = "anomaly"
    # Drafted from a self-assessment of the firm.
    MATURITY = "maturity"


class Assesses(StrEnum):
    """Whether an expert assesses applications to the fund, beside helping firms or instead of it."""

    NO = "no"
    ALSO = "also"
    ONLY = "only"


class FilterCode(StrEnum):
    """Why a provider cannot take a need, or an assessment, at all, whatever its score. Checked in this order."""

    INACTIVE = "INACTIVE"
    EXPIRED = "EXPIRED"
    ASSESSES_ONLY = "ASSESSES_ONLY"
    CONFLICT_OF_INTEREST = "CONFLICT_OF_INTEREST"
    CONFLICT_ORGANISATION = "CONFLICT_ORGANISATION"
    WORKED_FOR_FIRM = "WORKED_FOR_FIRM"
    SECTOR_EXCLUDED = "SECTOR_EXCLUDED"
    SIZE_NOT_SERVED = "SIZE_NOT_SERVED"
    OUT_OF_REGION = "OUT_OF_REGION"
    LEAD_TIME_TOO_LONG = "LEAD_TIME_TOO_LONG"
    NO_CAPACITY = "NO_CAPACITY"


LEAD_DAYS_MAX: dict[Urgency, int] = {Urgency.HIGH: 14, Urgency.NORMAL: 92, Urgency.LOW: 366}
"""How long a need of this urgency can wait for a first day of help, in days."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a firm, or an alarm of one of its machines, asks for.

    `sic` is a SIC 2007 code such as "25.50" or "" if unknown; only its division (two digits) counts.
    `skills` are tags of the shared vocabulary (ESCO); `firm_id` is what `Provider.conflicts` is compared with.
    """

    id: str
    text: str
    sic: str = ""
    size: Size = Size.SMALL
    region: str = ""
    urgency: Urgency = Urgency.NORMAL
    source: Source = Source.FIRM
    firm_id: str = ""
    skills: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not self.id:
            raise InvalidNeedError("a need has no id")
        if not self.text.strip():
            raise InvalidNeedError(f"need {self.id} has no text")

    @property
    def division(self) -> str:
        """The SIC division, two digits, or "" if the code does not start with two digits."""
        return division_of(self.sic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Someone or something that can help: an expert, a facility, a workshop or a course.

    `capacity_left` is what is free in the running quarter (places, not yet reserved or confirmed); None means all of
    `capacity_per_quarter`. `region_bound` providers serve only `region` and `regions_served`. `conflicts` holds firm
    ids, `conflict_organisations` names in the form of `organisation_name`. `sizes_served` empty means all.
    `outcome_points` is the sum of the scores, 1 to 5, that `outcome_firms` firms have given its work.
    `expires_on` is the first day on which the profile no longer counts.
    """

    id: str
    kind: Kind
    title: str
    text: str
    owner: str = ""
    region: str = ""
    regions_served: frozenset[str] = frozenset()
    region_bound: bool = False
    sic_divisions: frozenset[str] = frozenset({ANY_DIVISION})
    sic_excluded: frozenset[str] = frozenset()
    sizes_served: frozenset[Size] = frozenset()
    skills: frozenset[str] = frozenset()
    capacity_per_quarter: int = 1
    capacity_left: int | None = None
    lead_days: int = 0
    active: bool = True
    expires_on: date | None = None
    conflicts: frozenset[str] = frozenset()
    conflict_organisations: frozenset[str] = frozenset()
    assesses: Assesses = Assesses.NO
    outcome_firms: int = 0
    outcome_points: int = 0

    def __post_init__(self) -> None:
        if not self.id:
            raise InvalidNeedError("a provider has no id")
        if not (self.title.strip() or self.text.strip()):
            raise InvalidNeedError(f"provider {self.id} has neither title nor text")
        if self.capacity_per_quarter < 0 or self.lead_days < 0:
            raise InvalidNeedError(f"provider {self.id} has a negative capacity or lead time")
        if self.capacity_left is not None and self.capacity_left < 0:
            raise InvalidNeedError(f"provider {self.id} has a negative capacity left")
        if not self.outcome_firms <= self.outcome_points <= 5 * self.outcome_firms:
            raise InvalidNeedError(f"provider {self.id} has scores that are not 1 to 5")

    @property
    def places_left(self) -> int:
        return self.capacity_per_quarter if self.capacity_left is None else self.capacity_left

    @property
    def profile(self) -> str:
        """Title and text as one passage, as they are searched and embedded."""
        return f"{self.title.strip()}. {self.text.strip()}".strip(". ") if self.title.strip() else self.text.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """An application that assessors are sought for, and who takes part in it: nobody judges what is their own.

    `organisations` are names in the form of `organisation_name`, `owners` the partners among them (`Provider.owner`).
    `worked_for` holds the ids of providers that have a match with one of the firms.
    """

    text: str
    sic: str = ""
    region: str = ""
    firm_ids: frozenset[str] = frozenset()
    organisations: frozenset[str] = frozenset()
    owners: frozenset[str] = frozenset()
    worked_for: frozenset[str] = frozenset()


_LEGAL_FORMS = frozenset({"ltd", "limited", "plc", "llp", "lp", "inc", "gmbh", "cic", "co", "company", "the"})


def organisation_name(name: str) -> str:
    """A name as organisations are compared: "The Acme Company Ltd." and "ACME" are the same."""
    words = re.findall(r"\w+", name.casefold())
    return " ".join(word for word in words if word not in _LEGAL_FORMS) or " ".join(words)


# --- outcomes ---------------------------------------------------------------------------------------------------

OUTCOME_PRIOR_MEAN, OUTCOME_PRIOR_FIRMS = 0.75, 8
"""A provider nobody has scored counts as if eight firms had scored 4 of 5, which is (4 - 1) / 4 of the scale: what good
work gets. So few scores move little, and what is usual moves nothing."""
OUTCOME_FIRMS_MIN = 3
"""Scores of fewer firms count as none: what they move would tell what one firm has said."""


def outcome_lift(firms: int, points: int) -> float:
    """How far the scores lift a provider over one without any, -0.75 to 0.25: the shrunk mean less its prior."""
    if firms < OUTCOME_FIRMS_MIN:
        return 0.0
    scaled = (points - firms) / 4  # the sum of scores as 0..1
    return (OUTCOME_PRIOR_MEAN * OUTCOME_PRIOR_FIRMS + scaled) / (OUTCOME_PRIOR_FIRMS + firms) - OUTCOME_PRIOR_MEAN


# --- sector -----------------------------------------------------------------------------------------------------

_SECTOR_FAMILIES: tuple[frozenset[str], ...] = (
    frozenset({"10", "11", "12"}),  # food, drink, tobacco
    frozenset({"13", "14", "15"}),  # textiles, clothing, leather
    frozenset({"16", "31"}),  # wood, furniture
    frozenset({"17", "18"}),  # paper, print
    frozenset({"19", "20", "21"}),  # refining, chemicals, pharmaceuticals
    frozenset({"20", "22"}),  # chemicals, rubber and plastics
    frozenset({"21", "32"}),  # pharmaceuticals, medical devices (in 32)
    frozenset({"24", "25"}),  # metals, metal products
    frozenset({"25", "28"}),  # metal products, machinery
    frozenset({"26", "27"}),  # electronics, electrical equipment
    frozenset({"28", "33"}),  # machinery, its repair and installation
    frozenset({"29", "30"}),  # vehicles, other transport equipment
)
"""SIC 2007 manufacturing divisions that share processes and suppliers; a division may be in two families."""

SECTOR_SAME, SECTOR_RELATED, SECTOR_GENERAL, SECTOR_OTHER = 1.0, 0.5, 0.5, 0.0


def division_of(sic: str) -> str:
    """The two-digit division of a SIC code in any usual spelling ("25.50", "25500", "25"), "" if there is none."""
    head = sic.strip()[:2]
    return head if len(head) == 2 and head.isdigit() else ""


def sector_closeness(division: str, served: frozenset[str]) -> float:
    """1 when the division is named, 0.5 for a related division or a provider for all sectors, else 0.

    An unknown division is neutral: every provider gets 0.5, so that a missing code moves nobody.
    """
    if not division:
        return SECTOR_GENERAL
    if division in served:
        return SECTOR_SAME
    if not served or ANY_DIVISION in served:
        return SECTOR_GENERAL
    if any(division in family and family & served for family in _SECTOR_FAMILIES):
        return SECTOR_RELATED
    return SECTOR_OTHER


# --- region -----------------------------------------------------------------------------------------------------

_NEIGHBOURS: dict[str, frozenset[str]] = {
    name: frozenset(others.split("|"))
    for name, others in {
        "north east": "north west|yorkshire and the humber|scotland",
        "north west": "north east|yorkshire and the humber|east midlands|west midlands|wales|scotland",
        "yorkshire and the humber": "north east|north west|east midlands",
        "east midlands": "yorkshire and the humber|north west|west midlands|east of england|south east",
        "west midlands": "north west|east midlands|south east|south west|wales",
        "east of england": "east midlands|london|south east",
        "london": "east of england|south east",
        "south east": "london|east of england|east midlands|west midlands|south west",
        "south west": "south east|west midlands|wales",
        "wales": "north west|west midlands|south west",
        "scotland": "north east|north west|northern ireland",
        "northern ireland": "scotland",
    }.items()
}
"""The twelve UK regions (ITL 1) that touch each other; Northern Ireland by the short crossing."""

_PART_OF: dict[str, str] = {
    "yorkshire": "yorkshire and the humber",
    "yorkshire and humber": "yorkshire and the humber",
    "yorkshire & the humber": "yorkshire and the humber",
    "south yorkshire": "yorkshire and the humber",
    "west yorkshire": "yorkshire and the humber",
    "north yorkshire": "yorkshire and the humber",
    "humber": "yorkshire and the humber",
    "greater manchester": "north west",
    "lancashire": "north west",
    "cumbria": "north west",
    "merseyside": "north west",
    "liverpool city region": "north west",
    "cheshire": "north west",
    "tees valley": "north east",
    "north east england": "north east",
    "north west england": "north west",
    "black country": "west midlands",
    "east anglia": "east of england",
    "cornwall": "south west",
    "west of england": "south west",
    "greater london": "london",
    "east": "east of england",
}

REGION_SAME, REGION_NEIGHBOUR, REGION_ONLINE, REGION_FAR = 1.0, 0.5, 0.5, 0.0


def canonical_region(name: str) -> str:
    """The ITL 1 region in lower case, "online" for no place, or the cleaned name itself if it is not known."""
    cleaned = " ".join(name.casefold().split())
    if cleaned in ONLINE_REGIONS:
        return "online"
    return _PART_OF.get(cleaned, cleaned)


def region_nearness(need_region: str, provider_region: str) -> float:
    """1 in the same region, 0.5 next door or online, else 0; an unknown need region is neutral (0.5)."""
    here, there = canonical_region(need_region), canonical_region(provider_region)
    if there in {"online", ""} or here in {"online", ""}:
        return REGION_ONLINE
    if here == there:
        return REGION_SAME
    return REGION_NEIGHBOUR if there in _NEIGHBOURS.get(here, frozenset()) else REGION_FAR


def serves_region(need_region: str, *, home: str, served: Iterable[str], bound: bool) -> bool:
    """False only for a region-bound provider whose regions are known and do not hold the need's."""
    if not bound or canonical_region(need_region) in {"", "online"}:
        return True
    return canonical_region(need_region) in {canonical_region(name) for name in (home, *served)}
