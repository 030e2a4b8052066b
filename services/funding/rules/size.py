"""Size of a firm: EU recommendation 2003/361 with its links, Companies Act two of three, and the two-period rule.

Rules SME-EU-1 to 3, SME-CA-1 and 2. The call names the definition; the same firm can differ under the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction

from services.funding.parameters import ParametersAt
from services.funding.rules.exact import InvalidFact, eur, fixed_down, gbp


class Size(StrEnum):
    """Size class, smallest first."""

    MICRO = "micro"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"

    @property
    def is_sme(self) -> bool:
        """Micro, small and medium firms are SMEs."""
        return self is not Size.LARGE


class Definition(StrEnum):
    """Which legal test of size a call uses."""

    EU = "EU_2003_361"
    COMPANIES_ACT = "COMPANIES_ACT_2006"


class Investor(StrEnum):
    """What kind of owner stands behind a link; all but ``COMPANY`` may hold 25 to 50 % without being partners."""

    COMPANY = "company"
    VENTURE_CAPITAL = "venture_capital"
    BUSINESS_ANGEL = "business_angel"
    UNIVERSITY = "university"
    INSTITUTIONAL = "institutional"
    LOCAL_AUTHORITY = "local_authority"


class Relation(StrEnum):
    """How far another firm's figures count as the applicant's, weakest first."""

    AUTONOMOUS = "autonomous"
    PARTNER = "partner"
    LINKED = "linked"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One firm's or one group's yearly figures: headcount, turnover and balance sheet total.

    Money is in the minor unit of the definition (euro cents or pence); parts of a cent arise from pro rata shares and
    are kept, because a limit must be tested on the exact value.
    """

    headcount: Fraction
    turnover: Fraction
    balance: Fraction

    def plus(self, other: "Figures", weight: Fraction = Fraction(1)) -> "Figures":
        """These figures and ``weight`` of the other's."""
        return Figures(
            headcount=self.headcount + weight * other.headcount,
            turnover=self.turnover + weight * other.turnover,
            balance=self.balance + weight * other.balance,
        )


@dataclass(frozen=True, kw_only=True)
class Link:
    """A holding between the applicant and another firm.

    ``percent`` is the higher of capital and votes, in percent points. ``upstream``: the other firm owns the
    applicant. ``dominant_influence`` links at any percentage. ``enterprise`` names the other firm, so that cross
    holdings are seen as one link. ``acts_with`` names a circle of investors linked to each other. ``linked_to_it``
    are firms linked to the other firm that its own figures leave out. The last three facts matter for angels and
    local authorities; None: not stated.
    """

    percent: Fraction
    upstream: bool
    investor: Investor
    figures: Figures
    dominant_influence: bool = False
    enterprise: str | None = None
    acts_with: str | None = None
    linked_to_it: tuple[Figures, ...] = ()
    investment_c: int | None = None
    budget_c: int | None = None
    inhabitants: int | None = None


@dataclass(frozen=True, kw_only=True)
class SizeDecision:
    """Size class with the figures it rests on; ``relation`` is the strongest of all links."""

    size: Size
    relation: Relation
    aggregated: Figures
    reasons: tuple[str, ...]
    code: None = None


def eu_class(figures: Figures, parameters: ParametersAt) -> Size:
    """Smallest class whose headcount limit (strict) and one of whose money limits (inclusive) hold (SME-EU-1)."""
    for size in (Size.MICRO, Size.SMALL, Size.MEDIUM):
        few_enough = figures.headcount < parameters.exact(f"eu_size.{size}.headcount_below")
        turnover_in = figures.turnover <= parameters.whole(f"eu_size.{size}.turnover_c_max")
        balance_in = figures.balance <= parameters.whole(f"eu_size.{size}.balance_c_max")
        if few_enough and (turnover_in or balance_in):
            return size
    return Size.LARGE


def companies_act_class(group: Figures, parameters: ParametersAt) -> Size:
    """Smallest class of which two of the three limits hold, all inclusive; figures of the whole group (SME-CA-1, 2).

    ``parameters`` are those of the first day of the accounting period.
    """
    for size in (Size.MICRO, Size.SMALL, Size.MEDIUM):
        held = (
            group.headcount <= parameters.exact(f"companies_act.{size}.employees_max"),
            group.turnover <= parameters.whole(f"companies_act.{size}.turnover_p_max"),
            group.balance <= parameters.whole(f"companies_act.{size}.balance_p_max"),
        )
        if sum(held) >= parameters.whole("companies_act.tests_needed"):
            return size
    return Size.LARGE


def companies_act_size(group: Figures, parameters: ParametersAt) -> SizeDecision:
    """Size of a firm in its group in one accounting period under the Companies Act."""
    size = companies_act_class(group, parameters)
    figures = (
        f"{fixed_down(group.headcount)} employees, turnover {gbp(int(group.turnover))}, balance sheet "
        f"{gbp(int(group.balance))} in the period beginning {parameters.day.isoformat()}"
    )
    return SizeDecision(
        size=size,
        relation=Relation.AUTONOMOUS,
        aggregated=group,
        reasons=(f"{size}: at least two of three limits hold for {figures}.",)
        if size.is_sme
        else (f"large: fewer than two of the three limits of a medium firm hold for {figures}.",),
    )


def eu_size(own: Figures, links: Sequence[Link], parameters: ParametersAt) -> SizeDecision:
    """Size of a firm with its links under the EU definition (SME-EU-1, 2).

    Linked firms count in full, partners pro rata (their own linked firms included), autonomous holdings not at all.
    """
    links = _one_link_per_enterprise(links)
    total, strongest, reasons = own, Relation.AUTONOMOUS, []
    for link in links:
        relation, why = _relation(link, links, parameters)
        reasons.append(why)
        theirs = link.figures
        for figures in link.linked_to_it:
            theirs = theirs.plus(figures)
        if relation is Relation.LINKED:
            total = total.plus(theirs)
        elif relation is Relation.PARTNER:
            total = total.plus(theirs, link.percent / 100)
        strongest = max(strongest, relation, key=list(Relation).index)
    size = eu_class(total, parameters)
    reasons.append(
        f"{size}: {fixed_down(total.headcount)} annual work units, turnover {eur(total.turnover)}, balance sheet "
        f"{eur(total.balance)}, the other firms' shares included."
    )
    return SizeDecision(size=size, relation=strongest, aggregated=total, reasons=tuple(reasons))


def _one_link_per_enterprise(links: Sequence[Link]) -> tuple[Link, ...]:
    """Cross holdings are one link at the higher percentage; an owner's exemption does not survive them."""
    merged: dict[object, Link] = {}
    for position, link in enumerate(links):
        key: object = link.enterprise if link.enterprise is not None else position
        other = merged.get(key)
        if other is not None:
            crossed = link.upstream != other.upstream
            link = replace(
                max(link, other, key=lambda candidate: candidate.percent),
                upstream=link.upstream and not crossed,
                dominant_influence=link.dominant_influence or other.dominant_influence,
            )
        merged[key] = link
    return tuple(merged.values())


def relation_between(percent: Fraction, *, dominant_influence: bool, parameters: ParametersAt) -> tuple[Relation, str]:
    """What a holding of one company in another makes of the two, and why (SME-EU-2)."""
    nothing = Figures(headcount=Fraction(0), turnover=Fraction(0), balance=Fraction(0))
    link = Link(
        percent=percent,
        upstream=True,
        investor=Investor.COMPANY,
        figures=nothing,
        dominant_influence=dominant_influence,
    )
    return _relation(link, [link], parameters)


def _relation(link: Link, links: Sequence[Link], parameters: ParametersAt) -> tuple[Relation, str]:
    """Relation of one link; investors that act together are judged by what they hold together."""
    held = link.percent
    if link.acts_with is not None:
        held = sum((other.percent for other in links if other.acts_with == link.acts_with), Fraction(0))
    text = f"{fixed_down(held)} %"
    if link.dominant_influence:
        return Relation.LINKED, "Dominant influence: linked, 100 % is added."
    if held > parameters.exact("eu_links.partner_percent_max"):
        return Relation.LINKED, f"{text} is more than half: linked, 100 % is added."
    if held < parameters.exact("eu_links.partner_percent_min"):
        return Relation.AUTONOMOUS, f"{text} is below the partner limit: nothing is added."
    if _exempt(link, links, parameters):
        kind = link.investor.replace("_", " ")
        return Relation.AUTONOMOUS, f"{text} held by an exempt investor ({kind}): nothing is added."
    return Relation.PARTNER, f"{text}: partner, {fixed_down(link.percent)} % of its figures is added."


def _exempt(link: Link, links: Sequence[Link], parameters: ParametersAt) -> bool:
    """Whether an investor may hold 25 to 50 % without being a partner; only owners can be exempt, not firms owned."""
    if link.investor is Investor.COMPANY or not link.upstream or link.acts_with is not None:
        return False
    if link.investor is Investor.BUSINESS_ANGEL:
        invested = sum(other.investment_c or 0 for other in links if other.investor is Investor.BUSINESS_ANGEL)
        return invested < parameters.whole("eu_links.angel_investment_c_below")
    if link.investor is Investor.LOCAL_AUTHORITY:
        budget_max = parameters.whole("eu_links.local_authority_budget_c_below")
        inhabitants_max = parameters.whole("eu_links.local_authority_inhabitants_below")
        return (link.budget_c or 0) < budget_max and (link.inhabitants or 0) < inhabitants_max
    return True


@dataclass(frozen=True, kw_only=True)
class PeriodClasses:
    """The classes of one accounting period and of those before it, oldest first, all under that period's rules.

    ``taken_over``: the firm passed into another's hands, so that larger figures count at once.
    """

    classes: tuple[Size, ...]
    taken_over: bool = False


def settled_size(
    starting: Size | None, periods: Sequence[PeriodClasses], parameters: ParametersAt
) -> tuple[Size, tuple[str, ...]]:
    """Status after the last period and why (SME-EU-3): a ceiling counts once crossed in two consecutive periods.

    Each ceiling is judged by itself: a small firm that is medium in one period and large in the next has crossed the
    small ceiling twice and the medium one once, so it is medium. ``starting`` None: a new firm, whose first period is
    a bona fide estimate and counts at once. After a takeover a larger class counts at once; a smaller one still needs
    two periods.

    Raises:
        InvalidFact: no period at all.
    """
    if not periods:
        raise InvalidFact("a series needs at least one period")
    needed = parameters.whole("eu_size.periods_to_change")
    status = starting or periods[0].classes[-1]
    reasons = [f"Status at the start: {status}."]
    for number, period in enumerate(periods, start=1):
        before, current, recent = status, period.classes[-1], period.classes[-needed:]
        if len(recent) == needed:
            status = max(min(recent, key=_rank), min(status, max(recent, key=_rank), key=_rank), key=_rank)
        if period.taken_over:
            status = max(status, current, key=_rank)
        if status is not before:
            why = "at once, after a takeover" if period.taken_over else f"{needed} periods in a row"
            reasons.append(f"Period {number}: {current}, so the status changes to {status} ({why}).")
        elif current is not status:
            reasons.append(
                f"Period {number}: {current}, but not yet {needed} periods in a row; the status stays {status}."
            )
    return status, tuple(reasons)


def _rank(size: Size) -> int:
    return list(Size).index(size)
