"""Calls, applications, pledges and awards: what they are, which states they have, and which values are sensible."""

import re
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from enum import StrEnum
from fractions import Fraction
from zoneinfo import ZoneInfo

from services.funding.rules.assistance import AssistanceKind
from services.funding.rules.exact import InvalidFact, decimal
from services.funding.rules.intensity import Category, Organisation
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition, Investor, Size
from services.funding.selection import Method

TITLE_CHARACTERS_MAX = 200
TEXT_CHARACTERS_MAX = 2_000
REQUEST_ID_CHARACTERS_MAX = 100
DECIMAL_CHARACTERS_MAX = 20
RELATIONS_MAX = 100
EARLIER_ASSISTANCE_MAX = 200
# Those that are promised to it; co-investors of a call's pool may come on top. With the grant all of them are within the number of
# transfers that the award's one event in the ledger takes.
PLEDGES_PER_APPLICATION_MAX = 100
SUPPORTERS_PER_APPLICATION_MAX = 99
HEADCOUNT_MAX = 10_000_000
# Yearly figures of a firm or group: a million million pounds or euros.
FIGURE_MINOR_MAX = 100_000_000_000_000
# One amount of money: a thousand million pounds. Far above any grant, and so far below int64 that no sum overflows.
AMOUNT_PENCE_MAX = 100_000_000_000
WAIVERS_NEEDED = 2

_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")
# What people call control characters, and halves of characters that no encoding can write.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_YEAR_2000_US, _YEAR_2100_US = 946_684_800_000_000, 4_102_444_800_000_000
_UNITED_KINGDOM = ZoneInfo("Europe/London")


class Refused(ValueError):
    """A value that is not sensible; `reason` is stable, the text says what to change."""

    def __init__(self, detail: str, reason: str = "INVALID") -> None:
        self.reason = reason
        super().__init__(detail)


class CallState(StrEnum):
    """By the time alone."""

    ANNOUNCED = "announced"
    OPEN = "open"
    CLOSED = "closed"


class ApplicationState(StrEnum):
    DRAFT = "draft"
    SUBMITTED = "submitted"
    AWARDED = "awarded"
    REJECTED = "rejected"
    WITHDRAWN = "withdrawn"


class ProposalState(StrEnum):
    """Of what one operator proposes and another confirms: an allocation, a spread of co-investors' money."""

    PROPOSED = "proposed"
    CONFIRMED = "confirmed"


class CostCategory(StrEnum):
    LABOUR = "labour"
    OVERHEAD = "overhead"
    MATERIALS = "materials"
    CAPITAL_USAGE = "capital_usage"
    SUBCONTRACTING = "subcontracting"
    TRAVEL = "travel"
    OTHER = "other"


class AnswerKind(StrEnum):
    TEXT = "text"
    WHOLE_NUMBER = "whole_number"
    YES_NO = "yes_no"
    CHOICE = "choice"
    DATE = "date"


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every application to a call answers."""

    id: str
    text: str
    kind: AnswerKind
    required: bool = True
    # Of a text.
    characters_max: int = TEXT_CHARACTERS_MAX
    # Of a whole number.
    least: int | None = None
    most: int | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PotLimit:
    """How much may, or must, go to a part of the firms: `region:north-west`, `size:micro` or `first-time`. None: no such limit."""

    pot: str
    floor_pence: int | None = None
    ceiling_pence: int | None = None
    share_min: str | None = None
    share_max: str | None = None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Fixed when the call is made."""

    scope: str = ""
    questions: tuple[Question, ...] = ()
    method: Method = Method.TOP_DOWN_SKIP
    limits: tuple[PotLimit, ...] = ()
    # Above zero: an adoption call, which gives a small manufacturer a part of the cost up to this much.
    adoption_max_pence: int = 0


@dataclass(frozen=True, kw_only=True)
class Call:
    """A budget that firms may apply to between two times. `rate_max` lowers the lawful rate and never raises it."""

    id: str
    title: str
    budget_pence: int
    opens_us: int
    closes_us: int
    category: Category
    size_definition: Definition
    rate_max: str
    in_kind_allowed: bool
    created_us: int
    committed_pence: int = 0
    terms: Terms = Terms()

    @property
    def left_pence(self) -> int:
        return self.budget_pence - self.committed_pence

    def state_at(self, now_us: int) -> CallState:
        """From `opens_us` (inclusive) to `closes_us` (exclusive) it is open."""
        if now_us < self.opens_us:
            return CallState.ANNOUNCED
        return CallState.OPEN if now_us < self.closes_us else CallState.CLOSED


@dataclass(frozen=True, kw_only=True)
class Cost:
    category: CostCategory
    amount_pence: int


@dataclass(frozen=True, kw_only=True)
class Relation:
    """A holding between the applicant and another firm, with that firm's figures in the unit of the size definition."""

    percent: str
    upstream: bool
    investor: Investor
    headcount: str
    turnover_minor: int
    balance_minor: int
    dominant_influence: bool = False


@dataclass(frozen=True, kw_only=True)
class SizeFigures:
    """Yearly figures by which the size is computed: the firm's own with its holdings under the EU definition (euro cents), those
    of the whole group under the Companies Act (pence)."""

    headcount: str
    turnover_minor: int
    balance_minor: int
    # First day of the accounting period, ISO; it picks the limits of the Companies Act.
    period_start: str
    relations: tuple[Relation, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EarlierAssistance:
    """Public money that the firm's group was given before, elsewhere; what this fund gave the firm it knows itself."""

    given_on: str
    amount_pence: int
    kind: AssistanceKind


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What a firm states about itself and answers for."""

    size: SizeFigures
    uk_registered: bool
    insolvent: bool = False
    ailing: bool = False
    recovery_order_outstanding: bool = False
    earlier_project_open: bool = False
    earlier_assistance: tuple[EarlierAssistance, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Match:
    """A firm and a provider that found each other: an accepted offer, until it is cancelled or expires."""

    id: str
    event_id: str
    firm_id: int
    need_id: str
    offer_id: str
    provider_id: str
    provider_title: str
    accepted_us: int
    correlation_id: str
    # Since when it does not stand any more; None: it stands, or came to its good end.
    ended_us: int | None = None


@dataclass(frozen=True, kw_only=True)
class Pledge:
    """A co-investor's promise; it counts once an operator has confirmed it on evidence."""

    id: str
    application_id: str
    co_investor: str
    kind: PledgeKind
    public_body: bool
    amount_pence: int
    added_us: int
    confirmed_us: int | None = None
    evidence: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule applied, with the figures that it rests on. `code` is stable; empty when the rule is met."""

    rule: str
    met: bool
    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """An application, or the idea of one, against every rule, on one day.

    `grant_pence` is what would be awarded: what was asked for, else the most that the rules allow (`max_grant_pence`).
    `headroom_pence` is what the enterprise may still be given as minimal financial assistance.
    """

    size: Size | None
    eligible_pence: int
    max_grant_pence: int
    grant_pence: int
    match_required_pence: int
    match_counted_pence: int
    findings: tuple[Finding, ...]
    headroom_pence: int
    database_entry_due: date | None = None

    @property
    def eligible(self) -> bool:
        return not self.against

    @property
    def against(self) -> tuple[Finding, ...]:
        """The rules that are not met, in the order in which they are checked."""
        return tuple(finding for finding in self.findings if not finding.met)


@dataclass(frozen=True, kw_only=True)
class Award:
    id: str
    application_id: str
    call_id: str
    firm_id: int
    match_id: str
    grant_pence: int
    co_investment_pence: int
    awarded_us: int
    awarded_on: date
    parameters_version: str
    database_entry_due: date | None
    findings: tuple[Finding, ...]
    correlation_id: str


@dataclass(frozen=True, kw_only=True)
class ProjectPartner:
    """Another organisation that bears costs of the project. A business states its figures, as its part is capped by its size."""

    name: str
    organisation: Organisation
    costs: tuple[Cost, ...]
    size: SizeFigures | None = None
    other_public_pence: int = 0

    @property
    def eligible_pence(self) -> int:
        return sum(cost.amount_pence for cost in self.costs)


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A document kept elsewhere; the hash says which."""

    name: str
    sha256: str
    size_bytes: int
    media_type: str


@dataclass(frozen=True, kw_only=True)
class Content:
    """What an application says beyond costs and declaration."""

    # By the question's id.
    answers: tuple[tuple[str, str], ...] = ()
    partners: tuple[ProjectPartner, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    machine_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Application:
    id: str
    call_id: str
    match_id: str
    firm_id: int
    state: ApplicationState
    costs: tuple[Cost, ...]
    declaration: Declaration
    sic: str
    # 0: the most that the rules allow.
    requested_pence: int
    other_public_pence: int
    # Fixed on submission.
    grant_pence: int | None
    created_us: int
    submitted_us: int | None
    decided_us: int | None
    decision_reason: str
    correlation_id: str
    pledges: tuple[Pledge, ...] = field(default=())
    award: Award | None = None
    ratio_waivers: int = 0
    content: Content = Content()

    @property
    def eligible_pence(self) -> int:
        """Of the whole project, partners included."""
        return sum(cost.amount_pence for cost in self.costs) + sum(
            partner.eligible_pence for partner in self.content.partners
        )


def uk_day(time_: datetime) -> date:
    """The calendar day in the United Kingdom, by which the rules count."""
    return uk_time(time_).date()


def uk_midnight_after(day: date) -> datetime:
    """When the day is over in the United Kingdom."""
    return datetime.combine(day + timedelta(days=1), time(), _UNITED_KINGDOM)


def uk_time(time_: datetime) -> datetime:
    """As the clocks in the United Kingdom show it."""
    return time_.astimezone(_UNITED_KINGDOM)


def is_id(text: str) -> bool:
    """Whether the text can be an id of ours at all; nothing else is looked up."""
    return _ID.fullmatch(text) is not None


def checked_text(name: str, text: str, characters_max: int = TEXT_CHARACTERS_MAX) -> str:
    """The text without blanks around it. Raises Refused when it is empty, too long or not printable."""
    text = text.strip()
    if not text:
        raise Refused(f"{name} is needed.", f"{name.upper()}_MISSING")
    if len(text) > characters_max:
        raise Refused(f"{name} has {len(text)} characters; at most {characters_max} are taken.", "TEXT_TOO_LONG")
    if _UNPRINTABLE.search(text):
        raise Refused(f"{name} has characters that cannot be printed.", "TEXT_UNPRINTABLE")
    return text


def checked_times(opens_us: int, closes_us: int) -> None:
    """Raises Refused unless both are times from 2000 to 2100, the first before the second."""
    if not (_YEAR_2000_US <= opens_us < _YEAR_2100_US and _YEAR_2000_US <= closes_us < _YEAR_2100_US):
        raise Refused(
            "opens_us and closes_us are microseconds since 1970 UTC, from the year 2000 to 2100.", "TIME_OUT_OF_RANGE"
        )
    if opens_us >= closes_us:
        raise Refused("A call closes after it opens.", "CLOSES_BEFORE_OPENS")


def checked_request_id(text: str) -> str:
    """Raises Refused unless it is 1 to 100 letters, digits or ._:-"""
    if not is_id(text):
        raise Refused(
            f"request_id is needed: 1 to {REQUEST_ID_CHARACTERS_MAX} letters, digits or . _ : - of your choice; "
            "the same again when you send the same request again.",
            "REQUEST_ID_INVALID",
        )
    return text


def checked_amount(name: str, pence: int, *, least: int = 1) -> int:
    """Raises Refused unless `least` <= pence <= AMOUNT_PENCE_MAX."""
    if not least <= pence <= AMOUNT_PENCE_MAX:
        raise Refused(f"{name} is from {least} to {AMOUNT_PENCE_MAX} pence, not {pence}.", "AMOUNT_OUT_OF_RANGE")
    return pence


def checked_rate(name: str, text: str) -> str:
    """A rate above 0 and up to 1 as decimal text. Raises Refused."""
    if len(text) > DECIMAL_CHARACTERS_MAX:
        raise Refused(f"{name} has too many digits.", "RATE_INVALID")
    try:
        rate = decimal(text)
    except InvalidFact as error:
        raise Refused(f"{name}: {error}", "RATE_INVALID") from error
    if not 0 < rate <= 1:
        raise Refused(f"{name} is a rate above 0 and up to 1, such as 0.40; not {text}.", "RATE_INVALID")
    return text


def checked_costs(costs: tuple[Cost, ...]) -> tuple[Cost, ...]:
    """Raises Refused for none, the same category twice, or amounts out of range, also in sum."""
    if not costs:
        raise Refused("costs: at least one is needed.", "COSTS_MISSING")
    if len({cost.category for cost in costs}) < len(costs):
        raise Refused("costs: a category stands there twice; add its amounts up.", "COSTS_INVALID")
    for cost in costs:
        checked_amount(f"costs of {cost.category}", cost.amount_pence)
    checked_amount("the sum of the costs", sum(cost.amount_pence for cost in costs))
    return costs


def checked_declaration(declaration: Declaration) -> Declaration:
    """Raises Refused when a figure, date or number of entries is out of range."""
    check_size("size", declaration.size)
    if len(declaration.earlier_assistance) > EARLIER_ASSISTANCE_MAX:
        raise Refused(f"earlier_assistance: at most {EARLIER_ASSISTANCE_MAX} are taken.", "DECLARATION_INVALID")
    for number, item in enumerate(declaration.earlier_assistance):
        checked_date(f"earlier_assistance[{number}].given_on", item.given_on)
        checked_amount(f"earlier_assistance[{number}].amount_pence", item.amount_pence)
    return declaration


def check_size(where: str, size: SizeFigures) -> None:
    """Of the applicant or of a partner. Raises Refused when a figure or date is out of range, or holdings are too many."""
    if len(size.relations) > RELATIONS_MAX:
        raise Refused(f"{where}.relations: at most {RELATIONS_MAX} are taken.", "DECLARATION_INVALID")
    _check_figures(where, size)
    for number, relation in enumerate(size.relations):
        _check_figures(f"{where}.relations[{number}]", relation)
        _check_decimal(f"{where}.relations[{number}].percent", relation.percent, 100)
    if size.period_start:
        checked_date(f"{where}.period_start", size.period_start)


def _check_figures(where: str, figures: SizeFigures | Relation) -> None:
    _check_decimal(f"{where}.headcount", figures.headcount, HEADCOUNT_MAX)
    for name, minor in (("turnover_minor", figures.turnover_minor), ("balance_minor", figures.balance_minor)):
        if not 0 <= minor <= FIGURE_MINOR_MAX:
            raise Refused(f"{where}.{name} is from 0 to {FIGURE_MINOR_MAX}, not {minor}.", "AMOUNT_OUT_OF_RANGE")


def checked_percent(name: str, text: str) -> Fraction:
    """From 0 to 100, decimal text. Raises Refused."""
    return _check_decimal(name, text, 100)


def _check_decimal(name: str, text: str, most: int) -> Fraction:
    if len(text) > DECIMAL_CHARACTERS_MAX:
        raise Refused(f"{name} has too many digits.", "DECIMAL_INVALID")
    try:
        value = decimal(text)
    except InvalidFact as error:
        raise Refused(f"{name}: {error}", "DECIMAL_INVALID") from error
    if value > most:
        raise Refused(f"{name} is at most {most}.", "DECIMAL_INVALID")
    return value


def checked_date(name: str, text: str) -> date:
    """An ISO date such as 2026-04-01. Raises Refused."""
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
            raise ValueError
        return date.fromisoformat(text)
    except ValueError as error:
        raise Refused(f"{name} is a date such as 2026-04-01, not {text[:20]!r}.", "DATE_INVALID") from error
