"""An application against every rule, in order: firm, size, intensity, assistance, budget, match, programme ratio.

The rules themselves are in `rules`; here their facts are gathered and their answers put side by side. Pure: the same facts,
parameters and day give the same assessment, before an application, on submission and at the decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from math import ceil

from services.common.clock import from_us
from services.funding import domain
from services.funding.domain import Assessment, Call, Declaration, Finding, Refused
from services.funding.parameters import ParameterMissing, ParametersAt, ParameterTable
from services.funding.rules import match as match_rules
from services.funding.rules.assistance import Assistance, AssistanceCheck, AssistanceKind, mfa_check
from services.funding.rules.eligibility import Eligibility, FirmFacts, eligibility
from services.funding.rules.exact import InvalidFact, decimal, gbp, rate_text, share
from services.funding.rules.intensity import CostFacts, GrantCap, Organisation, consortium, grant_cap
from services.funding.rules.size import Definition, Figures, Link, SizeDecision, companies_act_size, eu_size
from services.funding.rules.transparency import Route, database_entry

# The declaration speaks for the whole group, so all of it is one enterprise to the assistance rule.
GROUP = "group"

PROVIDER = "PROVIDER"
ELIGIBILITY = "ELIG-1"
SIZE = "SME"
INTENSITY = "INT-5"
RESEARCH = "INT-4"
ASSISTANCE = "MFA-1"
BUDGET = "BUDGET"
MATCH = "MATCH-1"
RATIO = "MATCH-2"
TRANSPARENCY = "MFA-7"

MATCH_ENDED = "MATCH_ENDED"
NOTHING_TO_GRANT = "NOTHING_TO_GRANT"
BUDGET_EXHAUSTED = "BUDGET_EXHAUSTED"
FUND_RATIO = "FUND_RATIO"


@dataclass(frozen=True, kw_only=True)
class Given:
    """An award that the fund made to the same firm."""

    on: date
    amount_pence: int


@dataclass(frozen=True, kw_only=True)
class Related:
    """A firm that holds, or is held by, the applicant by the hub's own record, in so large a part that it counts."""

    firm_id: int
    percent: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is to be judged. `requested_pence` 0: the most that the rules allow. `pledges` None: not known yet, so match and
    ratio are only told, not judged."""

    sic: str
    declaration: Declaration
    eligible_pence: int
    requested_pence: int = 0
    # Of the applicant; each partner states its own.
    other_public_pence: int = 0
    # Their costs are part of `eligible_pence`.
    partners: Sequence[domain.ProjectPartner] = ()
    pledges: Sequence[domain.Pledge] | None = None
    given: Sequence[Given] = ()
    related: Sequence[Related] = ()
    # What the application rests on; None: there is no application yet.
    match: domain.Match | None = None


@dataclass(frozen=True, kw_only=True)
class Fund:
    """What the ledger says: left in the call; committed in the whole fund."""

    left_pence: int
    public_committed_pence: int
    business_committed_pence: int


def assess(facts: Facts, call: Call, fund: Fund, table: ParameterTable, day: date) -> Assessment:
    """Judge by the parameters of the day. Raises Refused when a fact cannot be read by a rule."""
    try:
        return _assess(facts, call, fund, table, day)
    except (InvalidFact, ParameterMissing) as error:
        raise Refused(f"{error}.".replace("..", "."), error.REASON) from error


def counted_pence(pledge: domain.Pledge, call: Call) -> int:
    """How much of a pledge is business money of this call once it is confirmed: all or nothing."""
    return match_rules.match_check(
        eligible_p=0, grant_p=0, pledges=[_pledge(pledge, confirmed=True)], in_kind_allowed=call.in_kind_allowed
    ).counted_p


def _assess(facts: Facts, call: Call, fund: Fund, table: ParameterTable, day: date) -> Assessment:
    parameters = table.at(day)
    firm = _firm(facts, parameters)
    size = _size(facts.declaration, call, table, day)
    cap = _cap(facts, call, size, table, day)
    wanted_p = facts.requested_pence or cap.max_grant_p
    assistance = _assistance(facts, wanted_p, table, day)
    max_p = min(cap.max_grant_p, assistance.headroom, fund.left_pence)
    grant_p = facts.requested_pence or max_p
    findings = [
        *_match_findings(facts),
        _firm_finding(firm),
        Finding(rule=SIZE, met=True, code="", text=" ".join((*size.reasons, *_record(facts, call, parameters)))),
        _cap_finding(facts, cap),
        *_research_findings(facts, call, size, parameters),
        _assistance_finding(facts, assistance),
        _budget_finding(facts, fund, wanted_p),
    ]
    matched = match_rules.match_check(
        eligible_p=facts.eligible_pence,
        grant_p=grant_p,
        pledges=[_pledge(pledge, confirmed=pledge.confirmed_us is not None) for pledge in facts.pledges or ()],
        in_kind_allowed=call.in_kind_allowed,
    )
    findings += _business_findings(facts, fund, grant_p, matched, parameters)
    entry = database_entry(
        route=Route.MFA, scheme_in_database=False, amount_p=grant_p, decision_confirmed=day, parameters=parameters
    )
    findings.append(Finding(rule=TRANSPARENCY, met=True, code="", text=" ".join(entry.reasons)))
    return Assessment(
        size=size.size,
        eligible_pence=facts.eligible_pence,
        max_grant_pence=max_p if firm.eligible else 0,
        grant_pence=grant_p,
        match_required_pence=matched.required_p,
        match_counted_pence=matched.counted_p,
        findings=tuple(findings),
        headroom_pence=assistance.headroom,
        database_entry_due=entry.entry_due_by,
    )


def match_ended(match: domain.Match) -> str:
    """Why nothing can rest on the match; empty while it stands."""
    if match.ended_us is None:
        return ""
    ended = domain.uk_day(from_us(match.ended_us)).isoformat()
    return f"The match with {match.provider_title} was cancelled or expired on {ended}."


def _match_findings(facts: Facts) -> list[Finding]:
    if facts.match is None:
        return []
    ended = match_ended(facts.match)
    if not ended:
        text = f"The match with {facts.match.provider_title} stands."
        return [Finding(rule=PROVIDER, met=True, code="", text=text)]
    text = (
        f"{ended} Accept another offer for the same need, and the application goes on with that one; with a match for "
        "another need an operator lets it go on."
    )
    return [Finding(rule=PROVIDER, met=False, code=MATCH_ENDED, text=text)]


def _firm(facts: Facts, parameters: ParametersAt) -> Eligibility:
    stated = facts.declaration
    return eligibility(
        FirmFacts(
            sic=facts.sic,
            uk_registered=stated.uk_registered,
            insolvent=stated.insolvent,
            ailing=stated.ailing,
            recovery_order_outstanding=stated.recovery_order_outstanding,
            earlier_projects_finished=not stated.earlier_project_open,
        ),
        parameters,
    )


def _firm_finding(firm: Eligibility) -> Finding:
    return Finding(rule=ELIGIBILITY, met=firm.eligible, code=firm.code or "", text=" ".join(firm.reasons))


def _size(declaration: Declaration, call: Call, table: ParameterTable, day: date) -> SizeDecision:
    stated = declaration.size
    own = Figures(
        headcount=decimal(stated.headcount),
        turnover=_exact(stated.turnover_minor),
        balance=_exact(stated.balance_minor),
    )
    if call.size_definition is Definition.EU:
        links = [
            Link(
                percent=decimal(relation.percent),
                upstream=relation.upstream,
                investor=relation.investor,
                dominant_influence=relation.dominant_influence,
                figures=Figures(
                    headcount=decimal(relation.headcount),
                    turnover=_exact(relation.turnover_minor),
                    balance=_exact(relation.balance_minor),
                ),
            )
            for relation in stated.relations
        ]
        return eu_size(own, links, table.at(day))
    if stated.relations:
        raise InvalidFact("this call uses the Companies Act: state the figures of the whole group, and no relations")
    if not stated.period_start:
        raise InvalidFact(
            "this call uses the Companies Act: state the first day of the accounting period (period_start)"
        )
    return companies_act_size(own, table.at(date.fromisoformat(stated.period_start)))


def _record(facts: Facts, call: Call, parameters: ParametersAt) -> Sequence[str]:
    """What the hub's own record has to say to the figures that were declared; whoever decides looks at it."""
    if not facts.related:
        return ()
    named = ", ".join(f"firm {one.firm_id} ({one.percent} %)" for one in facts.related)
    if call.size_definition is not Definition.EU:
        return (f"By record its group has {named}: the figures have to be those of the whole group.",)
    least = parameters.exact("eu_links.partner_percent_min")
    stated = [
        one for one in facts.declaration.size.relations if one.dominant_influence or decimal(one.percent) >= least
    ]
    if len(stated) >= len(facts.related):
        return ()
    return (
        f"By record {named} count in its size, and the declaration states {len(stated)} such holdings: it has to state "
        "them all.",
    )


@dataclass(frozen=True)
class _Cap:
    """The most that may be granted to the whole project, and why; `code` where the firm may have nothing of it."""

    max_grant_p: int
    reasons: tuple[str, ...]
    code: str = ""


def _cap(facts: Facts, call: Call, size: SizeDecision, table: ParameterTable, day: date) -> _Cap:
    parameters = table.at(day)
    # A public body's pledge counts before it is confirmed: it may be paid all the same.
    public_pledges_p = sum(pledge.amount_pence for pledge in facts.pledges or () if pledge.public_body)
    public_p = facts.other_public_pence + public_pledges_p
    if call.terms.adoption_max_pence:
        return _adoption_cap(facts, call, size, public_p, parameters)
    own = grant_cap(
        CostFacts(
            organisation=Organisation.BUSINESS,
            size=size.size,
            category=call.category,
            eligible_p=facts.eligible_pence - sum(partner.eligible_pence for partner in facts.partners),
            other_public_same_costs_p=public_p,
            call_rate=_call_rate(call),
        ),
        parameters,
    )
    caps = [("", own), *((partner.name, _partner_cap(partner, call, table, day)) for partner in facts.partners)]
    return _Cap(
        max_grant_p=sum(cap.max_grant_p for _, cap in caps),
        reasons=tuple(f"{name}: {text}" if name else text for name, cap in caps for text in cap.reasons),
    )


def _adoption_cap(facts: Facts, call: Call, size: SizeDecision, public_p: int, parameters: ParametersAt) -> _Cap:
    """A part of the cost up to the call's maximum, for a small manufacturer; all public money together keeps the rate."""
    if facts.partners:
        raise InvalidFact("an adoption grant is for one firm: state no partners")
    lawful, own_rate = parameters.exact("adoption.rate"), _call_rate(call)
    rate = lawful if own_rate is None else min(lawful, own_rate)
    most_p = min(call.terms.adoption_max_pence, parameters.whole("adoption.max_grant_p"))
    adopted = match_rules.adoption_grant(
        sic=facts.sic,
        is_sme=size.size.is_sme,
        eligible_p=facts.eligible_pence,
        rate=rate,
        max_grant_p=most_p,
        parameters=parameters,
    )
    free_p = max(0, share(facts.eligible_pence, rate) - public_p)
    reasons = adopted.reasons
    if public_p:
        reasons = (*reasons, f"{gbp(public_p)} of public money is already given for the same costs.")
    return _Cap(min(adopted.grant_p, free_p), reasons, adopted.code or "")


def _call_rate(call: Call) -> Fraction | None:
    return decimal(call.rate_max) if call.rate_max else None


def _partner_cap(partner: domain.ProjectPartner, call: Call, table: ParameterTable, day: date) -> GrantCap:
    return grant_cap(_partner_costs(partner, call, table, day), table.at(day))


def _partner_costs(partner: domain.ProjectPartner, call: Call, table: ParameterTable, day: date) -> CostFacts:
    size = None
    if partner.size is not None:
        size = _size(Declaration(size=partner.size, uk_registered=True), call, table, day).size
    return CostFacts(
        organisation=partner.organisation,
        size=size,
        category=call.category,
        eligible_p=partner.eligible_pence,
        other_public_same_costs_p=partner.other_public_pence,
        call_rate=_call_rate(call) if partner.organisation is Organisation.BUSINESS else None,
    )


def _cap_finding(facts: Facts, cap: _Cap) -> Finding:
    if cap.code:
        return Finding(rule=INTENSITY, met=False, code=cap.code, text=" ".join(cap.reasons))
    if facts.requested_pence:
        over_p = facts.requested_pence - cap.max_grant_p
        verdict = (
            f"{gbp(facts.requested_pence)} is {gbp(over_p)} over the cap of {gbp(cap.max_grant_p)}."
            if over_p > 0
            else f"{gbp(facts.requested_pence)} is within the cap of {gbp(cap.max_grant_p)}."
        )
        code = "INTENSITY_EXCEEDED" if over_p > 0 else ""
        return Finding(rule=INTENSITY, met=not code, code=code, text=" ".join((*cap.reasons, verdict)))
    nothing = cap.max_grant_p == 0
    code = NOTHING_TO_GRANT if nothing else ""
    return Finding(rule=INTENSITY, met=not nothing, code=code, text=" ".join(cap.reasons))


def _research_findings(facts: Facts, call: Call, size: SizeDecision, parameters: ParametersAt) -> list[Finding]:
    if not facts.partners:
        return []
    own_p = facts.eligible_pence - sum(partner.eligible_pence for partner in facts.partners)
    # Only the share is asked for here, which no size changes.
    shares = [
        CostFacts(organisation=Organisation.BUSINESS, size=size.size, category=call.category, eligible_p=own_p),
        *(
            CostFacts(
                organisation=partner.organisation,
                size=size.size,
                category=call.category,
                eligible_p=partner.eligible_pence,
            )
            for partner in facts.partners
        ),
    ]
    found = consortium(shares, parameters.exact("consortium.research_share_max"), parameters)
    return [Finding(rule=RESEARCH, met=found.allowed, code=found.code or "", text=found.reasons[0])]


def _assistance(facts: Facts, wanted_p: int, table: ParameterTable, day: date) -> AssistanceCheck:
    elsewhere = [
        Assistance(
            given_on=date.fromisoformat(item.given_on), amount=item.amount_pence, kind=item.kind, enterprise=GROUP
        )
        for item in facts.declaration.earlier_assistance
    ]
    here = [
        Assistance(given_on=item.on, amount=item.amount_pence, kind=AssistanceKind.MFA, enterprise=GROUP)
        for item in facts.given
    ]
    return mfa_check(
        award_date=day, proposed_p=wanted_p, history=[*elsewhere, *here], enterprise_group={GROUP}, table=table
    )


def _assistance_finding(facts: Facts, check: AssistanceCheck) -> Finding:
    # What was not asked for by amount is cut to the headroom, unless there is none.
    met = check.allowed or (facts.requested_pence == 0 and check.headroom > 0)
    return Finding(rule=ASSISTANCE, met=met, code="" if met else check.code or "", text=" ".join(check.reasons))


def _budget_finding(facts: Facts, fund: Fund, wanted_p: int) -> Finding:
    needed_p = facts.requested_pence or min(wanted_p, 1)
    met = fund.left_pence >= needed_p
    text = f"{gbp(fund.left_pence)} is left in the call."
    if not met:
        text += f" {gbp(needed_p)} is needed."
    return Finding(rule=BUDGET, met=met, code="" if met else BUDGET_EXHAUSTED, text=text)


def _business_findings(
    facts: Facts, fund: Fund, grant_p: int, matched: match_rules.MatchCheck, parameters: ParametersAt
) -> list[Finding]:
    target = parameters.exact("programme.business_per_public")
    if facts.pledges is None:
        beside = f"{gbp(matched.required_p)} of confirmed private money would have to stand beside the grant."
        programme = (
            f"The programme asks for {rate_text(target)} pounds of business money per pound of grant over the whole fund: "
            f"with {gbp(ceil(target * grant_p))} this project carries its part."
        )
        return [
            Finding(rule=rule, met=True, code="", text=text) for rule, text in ((MATCH, beside), (RATIO, programme))
        ]
    ratio = match_rules.fund_ratio(
        public_p=fund.public_committed_pence + grant_p,
        business_p=fund.business_committed_pence + matched.counted_p,
        target=target,
    )
    return [
        Finding(rule=MATCH, met=matched.ok, code=matched.code or "", text=" ".join(matched.reasons)),
        Finding(
            rule=RATIO,
            met=ratio.met,
            code="" if ratio.met else FUND_RATIO,
            text=f"The whole fund with this award: {' '.join(ratio.reasons)}",
        ),
    ]


def _pledge(pledge: domain.Pledge, *, confirmed: bool) -> match_rules.Pledge:
    return match_rules.Pledge(
        kind=pledge.kind, public=pledge.public_body, amount_p=pledge.amount_pence, confirmed=confirmed
    )


def _exact(minor: int) -> Fraction:
    return Fraction(minor)
