"""The rules as named operations on plain JSON objects: reads and checks the input, calls one rule, writes its answer.

Used by the evaluation command and wherever a rule is asked about without a stored application. Input: integer minor
units (``_p`` pence, ``_c`` euro cents), rates as decimal text, ISO dates; a field that is left out is zero, false or
empty where that is harmless. An operation whose input has no date of its own uses its ``as_of``, else the caller's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from fractions import Fraction
from typing import Any, TypeVar

from services.funding.parameters import ParametersAt, ParameterTable
from services.funding.rules import assistance, claims, intensity, match, size, transparency
from services.funding.rules.exact import InvalidFact, decimal, fixed_down, rate_text

Answer = dict[str, Any]
Word = TypeVar("Word", bound=StrEnum)

ACADEMIC_WORDS = frozenset({"academic", "academia", "university", "higher_education"})
RESEARCH_WORDS = frozenset(
    {
        "research_organisation", "research_organization", "research", "rto", "research_technology_organisation",
        "research_and_technology_organisation", "public_sector", "public_sector_organisation", "public_body", "charity",
        "third_sector", "catapult",
    }
)  # fmt: skip
BUSINESS_WORDS = frozenset({"business", "company", "firm", "sole_trader", "partnership"})
PUBLIC_WORDS = frozenset(
    {"public", "council", "authority", "government", "state", "department", "ukri", "innovate", "nhs"}
)
CONTROL_KINDS = frozenset({"dominant_influence", "control", "controlling_influence", "linked"})


class UnknownOperation(ValueError):
    """No operation of that name."""

    REASON = "UNKNOWN_OPERATION"


def run_operation(operation: object, given: object, *, table: ParameterTable, as_of: date) -> Answer:
    """Answer one operation; the answer is JSON, with ``code`` (or None) and ``reasons`` beside the fields of the rule.

    Raises:
        UnknownOperation: no such name.
        InvalidFact: a field is missing, of the wrong kind or out of range; the text names it.
        ParameterMissing: no number is on record for the date of the event.
    """
    run = OPERATIONS.get(operation) if isinstance(operation, str) else None
    if run is None:
        raise UnknownOperation(f"unknown operation: {operation!r}")
    facts = Facts(given)
    return run(facts, Context(table, facts.day("as_of", default=as_of)))


@dataclass(frozen=True)
class Context:
    """The parameter table and the day to use where the facts have none."""

    table: ParameterTable
    as_of: date

    @property
    def parameters(self) -> ParametersAt:
        """The parameters of that day."""
        return self.table.at(self.as_of)


class Facts:
    """A JSON object read field by field; every getter refuses a wrong kind with the field's name."""

    def __init__(self, given: object) -> None:
        if not isinstance(given, Mapping):
            raise InvalidFact("expected an object")
        self.given = given

    def amount(self, name: str, default: int | None = None) -> int:
        """Money in minor units, or a count: a whole number, not negative."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise InvalidFact(f"{name}: expected a whole number of at least 0, not {value!r}")
        return value

    def number(self, name: str, default: str | None = None) -> Fraction:
        """A rate, percentage or headcount: decimal text, or a whole number."""
        value = self._value(name, default)
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        try:
            return decimal(value)
        except InvalidFact as error:
            raise InvalidFact(f"{name}: {error}") from error

    def rate(self, name: str, default: str | None = None) -> Fraction:
        """A number from 0 to 1."""
        value = self.number(name, default)
        if value > 1:
            raise InvalidFact(f"{name}: a rate is at most 1, not {value}")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise InvalidFact(f"{name}: expected true or false, not {value!r}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._value(name, default)
        if not isinstance(value, str):
            raise InvalidFact(f"{name}: expected text, not {value!r}")
        return value

    def word(self, name: str, words: type[Word], default: Word | None = None) -> Word:
        """One of a fixed set of words."""
        value = self.text(name, default)
        try:
            return words(value)
        except ValueError as error:
            raise InvalidFact(f"{name}: {value!r} is none of {', '.join(words)}") from error

    def day(self, name: str, default: date | None = None) -> date:
        """An ISO calendar date."""
        value = self._value(name, default)
        if isinstance(value, date):
            return value
        try:
            return date.fromisoformat(value)
        except (TypeError, ValueError) as error:
            raise InvalidFact(f"{name}: expected an ISO date, not {value!r}") from error

    def objects(self, name: str) -> "list[Facts]":
        """A list of objects; left out: empty."""
        value = self._value(name, [])
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise InvalidFact(f"{name}: expected a list")
        return [Facts(item) for item in value]

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.given.get(name) is not None

    def _value(self, name: str, default: Any) -> Any:
        value = self.given.get(name)
        value = default if value is None else value
        if value is None:
            raise InvalidFact(f"{name}: missing")
        return value


def _sme_status(facts: Facts, context: Context) -> Answer:
    if facts.word("definition", size.Definition) is size.Definition.COMPANIES_ACT:
        period_start = facts.day("period_start", default=context.as_of)
        decision = size.companies_act_size(_group_figures(facts), context.table.at(period_start))
        return _size_answer(decision.size, decision.reasons)
    decision = size.eu_size(_own_figures(facts), _links(facts), context.parameters)
    aggregated = {
        "headcount_awu": fixed_down(decision.aggregated.headcount),
        "turnover_c": int(decision.aggregated.turnover),
        "balance_c": int(decision.aggregated.balance),
    }
    return {
        "relation": decision.relation.value,
        "aggregated": aggregated,
        **_size_answer(decision.size, decision.reasons),
    }


def _sme_status_series(facts: Facts, context: Context) -> Answer:
    """A firm that is no longer autonomous was taken over: larger figures count at once."""
    companies_act = facts.word("definition", size.Definition) is size.Definition.COMPANIES_ACT
    taken_over = not facts.flag("autonomous", default=True)
    given = facts.objects("periods")
    periods = []
    for position, period in enumerate(given):
        seen = given[: position + 1]
        if companies_act:
            # The 2024 regulations judge the period before by the limits of the period at hand.
            parameters = context.table.at(period.day("period_start", default=context.as_of))
            classes = tuple(size.companies_act_class(_group_figures(each), parameters) for each in seen)
        else:
            parameters = context.parameters
            classes = tuple(size.eu_size(_own_figures(each), _links(each), parameters).size for each in seen)
        changed_hands = taken_over or period.flag("taken_over", default=False)
        periods.append(size.PeriodClasses(classes=classes, taken_over=changed_hands))
    status, reasons = size.settled_size(_starting_size(facts, periods), periods, context.parameters)
    return _size_answer(status, reasons)


def _starting_size(facts: Facts, periods: Sequence[size.PeriodClasses]) -> size.Size | None:
    """A class; or only that the firm was an SME: then the class nearest to the first period's. Left out: a new firm."""
    if not facts.has("starting_status"):
        return None
    word = facts.text("starting_status").lower()
    if word in ("not_sme", "non_sme"):
        return size.Size.LARGE
    if word == "sme":
        first = periods[0].classes[-1] if periods else size.Size.MEDIUM
        return first if first.is_sme else size.Size.MEDIUM
    return facts.word("starting_status", size.Size)


def _size_answer(found: size.Size, reasons: Sequence[str]) -> Answer:
    return {"size": found.value, "is_sme": found.is_sme, "code": None, "reasons": list(reasons)}


def _own_figures(facts: Facts) -> size.Figures:
    own = Facts(facts.given["own"]) if facts.has("own") else facts
    return _eu_figures(own)


def _eu_figures(facts: Facts) -> size.Figures:
    return size.Figures(
        headcount=facts.number("headcount_awu"),
        turnover=Fraction(facts.amount("turnover_c")),
        balance=Fraction(facts.amount("balance_c")),
    )


def _group_figures(facts: Facts) -> size.Figures:
    group = Facts(facts.given["group_total"]) if facts.has("group_total") else facts
    return size.Figures(
        headcount=group.number("employees_avg"),
        turnover=Fraction(group.amount("turnover_p")),
        balance=Fraction(group.amount("balance_p")),
    )


def _links(facts: Facts) -> list[size.Link]:
    return [_link(relation) for relation in facts.objects("relations")]


def _link(facts: Facts) -> size.Link:
    percent = facts.number("percent")
    if percent > 100:
        raise InvalidFact(f"percent: at most 100, not {percent}")
    return size.Link(
        percent=percent,
        upstream=facts.flag("upstream"),
        investor=facts.word("investor_type", size.Investor, default=size.Investor.COMPANY),
        figures=_eu_figures(facts),
        dominant_influence=facts.text("kind", default="shareholding") in CONTROL_KINDS,
        enterprise=facts.text("enterprise") if facts.has("enterprise") else None,
        acts_with=facts.text("acts_with") if facts.has("acts_with") else None,
        linked_to_it=tuple(_eu_figures(each) for each in facts.objects("linked_to_it")),
        investment_c=facts.amount("investment_c") if facts.has("investment_c") else None,
        budget_c=facts.amount("budget_c") if facts.has("budget_c") else None,
        inhabitants=facts.amount("inhabitants") if facts.has("inhabitants") else None,
    )


def _cost_facts(facts: Facts, shared: Facts | None = None) -> intensity.CostFacts:
    """``shared`` holds the project's category where a partner states none."""
    source = facts if facts.has("category") or shared is None else shared
    return intensity.CostFacts(
        organisation=_organisation(facts.text("org_type")),
        size=facts.word("size", size.Size) if facts.has("size") else None,
        category=source.word("category", intensity.Category) if source.has("category") else None,
        eligible_p=facts.amount("eligible_p"),
        other_public_same_costs_p=facts.amount("other_public_same_costs_p", default=0),
        other_public_other_costs_p=facts.amount("other_public_other_costs_p", default=0),
        call_rate=facts.rate("call_rate") if facts.has("call_rate") else None,
    )


def _organisation(text: str) -> intensity.Organisation:
    word = text.strip().lower().replace("-", "_").replace(" ", "_")
    for words, organisation in (
        (BUSINESS_WORDS, intensity.Organisation.BUSINESS),
        (ACADEMIC_WORDS, intensity.Organisation.ACADEMIC),
        (RESEARCH_WORDS, intensity.Organisation.RESEARCH),
    ):
        if word in words:
            return organisation
    raise InvalidFact(f"org_type: {text!r} is not a known kind of organisation")


def _grant_cap(facts: Facts, context: Context) -> Answer:
    cap = intensity.grant_cap(_cost_facts(facts), context.parameters)
    return {
        "max_rate": rate_text(cap.max_rate),
        "max_grant_p": cap.max_grant_p,
        "min_match_p": cap.min_match_p,
        "code": None,
        "reasons": list(cap.reasons),
    }


def _grant_request(facts: Facts, context: Context) -> Answer:
    return _plain(intensity.grant_request(_cost_facts(facts), facts.amount("requested_p"), context.parameters))


def _consortium(facts: Facts, context: Context) -> Answer:
    limit = (
        facts.number("max_research_share")
        if facts.has("max_research_share")
        else context.parameters.exact("consortium.research_share_max")
    )
    partners = [_cost_facts(partner, shared=facts) for partner in facts.objects("partners")]
    return _plain(intensity.consortium(partners, limit, context.parameters))


def _mfa_check(facts: Facts, context: Context) -> Answer:
    """Without a stated group every enterprise of the history counts."""
    history = [
        assistance.Assistance(
            given_on=item.day("date"),
            amount=item.amount("amount_p"),
            kind=item.word("kind", assistance.AssistanceKind),
            enterprise=item.text("enterprise"),
        )
        for item in facts.objects("history")
    ]
    group = facts.given.get("enterprise_group") or [item.enterprise for item in history]
    if not isinstance(group, list) or not all(isinstance(name, str) for name in group):
        raise InvalidFact("enterprise_group: expected a list of names")
    check = assistance.mfa_check(
        award_date=facts.day("award_date"),
        proposed_p=facts.amount("proposed_p"),
        history=history,
        enterprise_group=frozenset(group),
        table=context.table,
    )
    return {
        "window_start": check.window_start.isoformat(),
        "counted_p": check.counted,
        "total_p": check.total,
        "headroom_p": check.headroom,
        "allowed": check.allowed,
        "max_offer_p": check.max_offer,
        "database_entry_required": check.database_entry_required,
        "code": check.code,
        "reasons": list(check.reasons),
    }


def _transparency(facts: Facts, context: Context) -> Answer:
    confirmed = facts.day("decision_confirmed") if facts.has("decision_confirmed") else None
    return _plain(
        transparency.database_entry(
            route=facts.word("route", transparency.Route),
            scheme_in_database=facts.flag("scheme_in_database", default=False),
            amount_p=facts.amount("amount_p"),
            decision_confirmed=confirmed,
            parameters=context.table.at(confirmed or context.as_of),
        )
    )


def _adoption_grant(facts: Facts, context: Context) -> Answer:
    parameters = context.parameters
    sic = facts.given.get("sic")
    return _plain(
        match.adoption_grant(
            sic=str(sic) if isinstance(sic, int) else facts.text("sic"),
            is_sme=facts.flag("is_sme"),
            eligible_p=facts.amount("eligible_p"),
            rate=facts.rate("rate") if facts.has("rate") else parameters.exact("adoption.rate"),
            max_grant_p=facts.amount("max_grant_p", default=parameters.whole("adoption.max_grant_p")),
            parameters=parameters,
        )
    )


def _match_check(facts: Facts, context: Context) -> Answer:
    """A pledge is public money if its source names a public body, private otherwise."""
    pledges = [
        match.Pledge(
            kind=pledge.word("kind", match.PledgeKind, default=match.PledgeKind.CASH),
            public=not PUBLIC_WORDS.isdisjoint(
                pledge.text("source").lower().replace("-", " ").replace("_", " ").split()
            ),
            amount_p=pledge.amount("amount_p"),
            confirmed=pledge.flag("confirmed", default=False),
        )
        for pledge in facts.objects("pledges")
    ]
    return _plain(
        match.match_check(
            eligible_p=facts.amount("eligible_p"),
            grant_p=facts.amount("grant_p"),
            pledges=pledges,
            in_kind_allowed=facts.flag("in_kind_allowed", default=False),
        )
    )


def _fund_ratio(facts: Facts, context: Context) -> Answer:
    name = "target_business_per_public"
    target = facts.number(name) if facts.has(name) else context.parameters.exact("programme.business_per_public")
    found = match.fund_ratio(
        public_p=facts.amount("public_committed_p"), business_p=facts.amount("business_committed_p"), target=target
    )
    ratio = None if found.ratio is None else fixed_down(found.ratio)
    return {"ratio": ratio, "met": found.met, "code": None, "reasons": list(found.reasons)}


def _claim(facts: Facts, context: Context) -> Answer:
    submitted = facts.day("submitted")
    parameters = context.table.at(submitted)
    has_rate = facts.has("retention_rate")
    return _plain(
        claims.decide_claim(
            claims.ClaimFacts(
                max_grant_p=facts.amount("max_grant_p"),
                award_rate=facts.rate("award_rate"),
                retention_rate=facts.rate("retention_rate") if has_rate else parameters.exact("claim.retention_rate"),
                paid_so_far_p=facts.amount("paid_so_far_p", default=0),
                held_so_far_p=facts.amount("held_so_far_p", default=0),
                defrayed_costs_p=facts.amount("defrayed_costs_p"),
                is_final=facts.flag("is_final", default=False),
                final_report_received=facts.flag("final_report_received", default=False),
                iar_received=facts.flag("iar_received", default=False),
                period_end=facts.day("period_end"),
                submitted=submitted,
            ),
            parameters,
        )
    )


def _plain(result: object) -> Answer:
    """A result whose fields are already the answer's: dates to text, tuples to lists."""
    answer: Answer = {}
    for name, value in vars(result).items():
        answer[name] = (
            value.isoformat() if isinstance(value, date) else list(value) if isinstance(value, tuple) else value
        )
    return answer


OPERATIONS: Mapping[str, Callable[[Facts, Context], Answer]] = {
    "sme_status": _sme_status,
    "sme_status_series": _sme_status_series,
    "grant_cap": _grant_cap,
    "grant_request": _grant_request,
    "consortium": _consortium,
    "mfa_check": _mfa_check,
    "transparency": _transparency,
    "adoption_grant": _adoption_grant,
    "match_check": _match_check,
    "fund_ratio": _fund_ratio,
    "claim": _claim,
}
