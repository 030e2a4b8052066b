"""The HTTP edge: the same abilities as by gRPC, for the hub's pages."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.http import Authenticated
from services.matching.consents import Consent, NewConsent, Severity, SharedItem
from services.matching.domain import Assesses, Kind, Size, Source, Urgency
from services.matching.matches import Match, MatchState, Result, Side
from services.matching.messages import asked_time
from services.matching.needs import Need, NeedState, Offer, OfferState, Origin
from services.matching.providers import Evidence, ProviderRecord
from services.matching.rounds import Round, RoundState
from services.matching.service import Matching
from services.matching.service.needs import NewNeed, OpenedNeed

# Ids of the registry; 0: none named.
RegistryId = Annotated[int, Field(ge=0, le=2**63 - 1)]
TimeUs = Annotated[int, Field(ge=0, le=2**63 - 1)]
PageSize = Annotated[int, Query(description="at most 500; 0 means 100")]
PageToken = Annotated[str, Query(description="next_page_token of the page before")]

_SEVERITIES = {severity.name.lower(): severity for severity in Severity}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class EvidenceBody(_Body):
    title: str
    # Where it is: an address, or the partner's own file number.
    reference: str
    sha256: str
    expires_on: date | None = None
    # The provider is not offered without it.
    required: bool = False


class ProviderBody(_Body):
    kind: Kind
    # A partner may leave it out: itself.
    partner_id: RegistryId = 0
    title: str
    text: str
    region: str = ""
    region_bound: bool = False
    regions_served: list[str] = []
    sic_divisions: list[str] = []
    sic_excluded: list[str] = []
    sizes_served: list[Size] = []
    skills: list[str] = []
    # Left out for courses, which have no limit.
    capacity_per_quarter: int | None = None
    lead_days: int = 0
    # Experts only: whether it assesses applications to the fund, "only" if it is never offered to firms.
    assesses: Assesses = Assesses.NO
    # Organisations whose applications it must not judge, by name.
    conflict_organisations: list[str] = []
    # Addresses of ESCO terms.
    esco_skills: list[str] = []
    # Documents that stand behind the profile; kept elsewhere.
    evidence: list[EvidenceBody] = []
    # First day on which the partner must have looked through the profile again: put it anew then.
    review_on: date | None = None
    conflict_firm_ids: list[RegistryId] = []
    # First day on which it is not offered any more.
    expires_on: date | None = None

    def record(self, provider_id: str) -> ProviderRecord:
        capacity = self.capacity_per_quarter or 0
        return ProviderRecord(
            id=provider_id,
            kind=self.kind,
            partner_id=self.partner_id,
            title=self.title,
            text=self.text,
            region=self.region,
            region_bound=self.region_bound,
            regions_served=tuple(self.regions_served),
            sic_divisions=tuple(self.sic_divisions),
            sic_excluded=tuple(self.sic_excluded),
            sizes_served=tuple(self.sizes_served),
            skills=tuple(self.skills),
            capacity_per_quarter=None if self.kind is Kind.COURSE else capacity,
            lead_days=self.lead_days,
            assesses=self.assesses,
            conflict_organisations=tuple(self.conflict_organisations),
            esco_skills=tuple(self.esco_skills),
            evidence=tuple(Evidence(**each.model_dump()) for each in self.evidence),
            review_on=self.review_on,
            conflict_firm_ids=tuple(self.conflict_firm_ids),
            expires_on=self.expires_on,
        )


class ProviderView(ProviderBody):
    id: str
    active: bool
    # First day on which it is not offered: expired, due for review, or without a document that it needs.
    offered_until: date | None
    taken_this_quarter: int
    changed_us: int | None


class ProvidersPage(_Body):
    providers: list[ProviderView]
    next_page_token: str


class ConsentBody(_Body):
    request_id: str = ""
    firm_id: RegistryId = 0
    shared: list[SharedItem]
    # Empty: all machines of the firm.
    machine_ids: list[RegistryId] = []
    severity_min: str = "any"
    # Left out: from now, until revoked.
    from_us: TimeUs | None = None
    until_us: TimeUs | None = None
    note: str = ""


class FirmBody(_Body):
    firm_id: RegistryId = 0


class ConsentView(_Body):
    id: str
    firm_id: int
    shared: list[SharedItem]
    machine_ids: list[int]
    severity_min: str
    from_us: int
    until_us: int | None
    note: str
    given_us: int
    given_by: int
    ended_us: int | None
    ended_by: int
    replaced: bool


class ConsentsView(_Body):
    # None: no alarm of the firm opens a need.
    current: ConsentView | None
    history: list[ConsentView]


class RevokedView(_Body):
    consent: ConsentView | None


class NeedBody(_Body):
    request_id: str = ""
    firm_id: RegistryId = 0
    text: str
    urgency: Urgency = Urgency.NORMAL
    machine_id: RegistryId = 0
    # No offers now but one in the next round, where scarce places go to the needs that they fit best.
    wait_for_round: bool = False
    # Partners may see the text, not whose it is, and propose themselves.
    show_to_partners: bool = False


class ShowBody(_Body):
    shown: bool


class ProposalBody(_Body):
    provider_id: str
    # To the firm.
    message: str = ""


class RoundBody(_Body):
    # Chosen by the operator; a repeat with the same id begins no second round.
    round_id: str


class RoundView(_Body):
    id: str
    state: RoundState
    started_us: int
    ended_us: int | None
    # Made by it, each with a place reserved until it lapses.
    offers: int
    # Of them the nearest workshop or course, where nobody nearer to the need had a place.
    from_safety_net: int
    # Needs that nobody could take.
    unplaced: int
    # Needs and providers that would both rather have had each other; 0 unless something is wrong.
    blocking_pairs: int
    ranker_version: str


class RoundsView(_Body):
    rounds: list[RoundView]


class NeedView(_Body):
    id: str
    firm_id: int
    source: Source
    state: NeedState
    text: str
    urgency: Urgency
    sic: str
    region: str
    size: str
    machine_id: int
    alarm_ids: list[str]
    consent_id: str
    offers: int
    no_offer_reason: str
    match_id: str
    opened_us: int
    opened_by: int
    ended_us: int | None
    correlation_id: str
    wait_for_round: bool
    shown_to_partners: bool


class NeedsPage(_Body):
    needs: list[NeedView]
    next_page_token: str


class OfferView(_Body):
    id: str
    need_id: str
    # 0 for partners until the offer is accepted; so are machine and alarm.
    firm_id: int
    provider_id: str
    partner_id: int
    provider_title: str
    provider_kind: Kind
    state: OfferState
    # 1 is the best.
    rank: int
    # The sum of the parts.
    score: float
    parts: Mapping[str, float]
    reasons: list[str]
    ranker_version: str
    match_id: str
    need_text: str
    alarm_id: str
    machine_id: int
    made_us: int
    expires_us: int
    decided_us: int | None
    decision_reason: str
    correlation_id: str
    origin: Origin
    # Of the round that made it.
    round_id: str
    # Of the partner that proposed it.
    message: str


class OffersPage(_Body):
    offers: list[OfferView]
    next_page_token: str


class OpenedView(_Body):
    need: NeedView
    offers: list[OfferView]


class DeclineBody(_Body):
    reason: str


class ScoreView(_Body):
    side: Side
    points: int
    comment: str
    scored_us: int


class MatchView(_Body):
    id: str
    need_id: str
    offer_id: str
    firm_id: int
    provider_id: str
    partner_id: int
    # First day of the quarter whose capacity it takes.
    quarter: date
    accepted_us: int
    correlation_id: str
    state: MatchState
    # It expires then unless one side engages.
    engage_by_us: int | None
    engaged_us: int | None
    finished_us: int | None
    result: Result | None
    result_note: str
    # Once finished: scores may be given and changed until then.
    scores_until_us: int | None
    ended_us: int | None
    end_reason: str
    # The other side's is shown once the match is closed.
    scores: list[ScoreView]


class MatchesPage(_Body):
    matches: list[MatchView]
    next_page_token: str


class FinishBody(_Body):
    result: Result
    note: str = ""


class ScoreBody(_Body):
    points: Annotated[int, Field(description="1 (poor) to 5 (excellent)")]
    comment: str = ""


class CancelBody(_Body):
    reason: str
    # The need is closed rather than opened again.
    close_need: bool = False


class AcceptedView(_Body):
    match: MatchView
    offer: OfferView


def router(matching: Matching) -> APIRouter:
    every = APIRouter(prefix="/v1")
    every.include_router(_providers(matching))
    every.include_router(_consents(matching))
    every.include_router(_needs(matching))
    every.include_router(_offers(matching))
    every.include_router(_matches(matching))
    every.include_router(_desk(matching))
    every.include_router(_rounds(matching))
    return every


def _providers(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/providers", tags=["providers"])

    @routes.put("/{provider_id}")
    async def put_provider(caller: Authenticated, provider_id: str, body: ProviderBody) -> ProviderView:
        """Create a provider, or replace the one with this id."""
        return _provider_view(await matching.providers.put_provider(caller, body.record(provider_id)))

    @routes.get("/{provider_id}")
    async def get_provider(caller: Authenticated, provider_id: str) -> ProviderView:
        return _provider_view(await matching.providers.get_provider(caller, provider_id))

    @routes.get("")
    async def list_providers(
        caller: Authenticated,
        partner_id: RegistryId = 0,
        kind: Kind | None = None,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> ProvidersPage:
        """In order of id. Partners and operators see withdrawn and expired ones too."""
        found, token = await matching.providers.list_providers(
            caller, partner_id=partner_id, kind=kind, page_size=page_size, page_token=page_token
        )
        return ProvidersPage(providers=[_provider_view(each) for each in found], next_page_token=token)

    @routes.post("/{provider_id}/withdraw")
    async def withdraw_provider(caller: Authenticated, provider_id: str) -> ProviderView:
        """No new offers; those still open lapse; matches stay."""
        return _provider_view(await matching.providers.withdraw_provider(caller, provider_id))

    return routes


def _consents(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/consents", tags=["consents"])

    @routes.post("")
    async def give_consent(caller: Authenticated, body: ConsentBody) -> ConsentView:
        """Agree that alarms of the firm's machines open needs; replaces the consent in force."""
        new = NewConsent(
            shared=body.shared,
            machine_ids=body.machine_ids,
            severity_min=_severity(body.severity_min),
            valid_from=asked_time("from_us", body.from_us),
            valid_until=asked_time("until_us", body.until_us),
            note=body.note,
        )
        return _consent_view(
            await matching.consents.give_consent(caller, body.firm_id, new, request_id=body.request_id)
        )

    @routes.post("/revoke")
    async def revoke_consent(caller: Authenticated, body: FirmBody | None = None) -> RevokedView:
        """From now on no alarm opens a need."""
        ended = await matching.consents.revoke_consent(caller, body.firm_id if body else 0)
        return RevokedView(consent=None if ended is None else _consent_view(ended))

    @routes.get("")
    async def get_consent(caller: Authenticated, firm_id: RegistryId = 0) -> ConsentsView:
        """The consent in force and those before it, newest first."""
        found = await matching.consents.get_consent(caller, firm_id)
        return ConsentsView(
            current=None if found.current is None else _consent_view(found.current),
            history=[_consent_view(each) for each in found.ended],
        )

    return routes


def _needs(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/needs", tags=["needs"])

    @routes.post("", status_code=201)
    async def open_need(caller: Authenticated, body: NeedBody) -> OpenedView:
        """Open a need in the firm's own words and make offers for it."""
        new = NewNeed(
            text=body.text,
            urgency=body.urgency,
            machine_id=body.machine_id,
            waits=body.wait_for_round,
            shown=body.show_to_partners,
        )
        opened = await matching.needs.open_need(caller, body.firm_id, new, request_id=body.request_id)
        return opened_view(opened)

    @routes.get("")
    async def list_needs(
        caller: Authenticated,
        firm_id: RegistryId = 0,
        state: NeedState | None = None,
        machine_id: RegistryId = 0,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> NeedsPage:
        """Newest first. Firm 0 for operators: all firms."""
        found, token = await matching.needs.list_needs(
            caller, firm_id=firm_id, state=state, machine_id=machine_id, page_size=page_size, page_token=page_token
        )
        return NeedsPage(needs=[_need_view(each) for each in found], next_page_token=token)

    @routes.post("/{need_id}/show")
    async def show_need(caller: Authenticated, need_id: str, body: ShowBody) -> NeedView:
        """Let partners see the text of an open need, not whose it is, and propose themselves; or not any more."""
        return _need_view(await matching.needs.show_need(caller, need_id, shown=body.shown))

    @routes.get("/{need_id}")
    async def get_need(caller: Authenticated, need_id: str) -> NeedView:
        return _need_view(await matching.needs.get_need(caller, need_id))

    @routes.get("/{need_id}/offers")
    async def offers_of_need(caller: Authenticated, need_id: str, state: OfferState | None = None) -> OffersPage:
        """Best first, all on one page."""
        found = await matching.offers.offers_of_need(caller, need_id, state)
        return OffersPage(offers=_offer_views(found), next_page_token="")

    return routes


def _offers(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/offers", tags=["offers"])

    @routes.get("")
    async def list_offers(
        caller: Authenticated,
        state: OfferState | None = None,
        round_id: str = "",
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> OffersPage:
        """All that the caller may see, newest first: a firm's own, those of a partner's providers. Of one round, if it is named."""
        found, token = await matching.offers.list_offers(
            caller, state=state, round_id=round_id, page_size=page_size, page_token=page_token
        )
        return OffersPage(offers=_offer_views(found), next_page_token=token)

    @routes.post("/{offer_id}/accept")
    async def accept_offer(caller: Authenticated, offer_id: str) -> AcceptedView:
        """Take a place of the provider and make the match. 409 with reason CAPACITY_FULL: no place is left this quarter."""
        match, offer = await matching.offers.accept_offer(caller, offer_id)
        return AcceptedView(match=_match_view(match), offer=_offer_view(offer))

    @routes.post("/{offer_id}/decline")
    async def decline_offer(caller: Authenticated, offer_id: str, body: DeclineBody) -> OfferView:
        """By the firm, or by the partner for its provider."""
        return _offer_view(await matching.offers.decline_offer(caller, offer_id, body.reason))

    return routes


def _matches(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/matches", tags=["matches"])

    @routes.get("")
    async def list_matches(
        caller: Authenticated,
        state: MatchState | None = None,
        page_size: PageSize = 0,
        page_token: PageToken = "",
    ) -> MatchesPage:
        """The caller's own, newest first."""
        found, token = await matching.matches.list_matches(
            caller, state=state, page_size=page_size, page_token=page_token
        )
        return MatchesPage(matches=[_match_view(match) for match in found], next_page_token=token)

    @routes.get("/{match_id}")
    async def get_match(caller: Authenticated, match_id: str) -> MatchView:
        return _match_view(await matching.matches.get_match(caller, match_id))

    @routes.post("/{match_id}/engage")
    async def engage(caller: Authenticated, match_id: str) -> MatchView:
        """Both sides work together from now on; by either."""
        return _match_view(await matching.matches.engage(caller, match_id))

    @routes.post("/{match_id}/finish")
    async def finish(caller: Authenticated, match_id: str, body: FinishBody) -> MatchView:
        """The work is done; by either side. Both may score it until `scores_until_us`."""
        return _match_view(await matching.matches.finish(caller, match_id, body.result, body.note))

    @routes.post("/{match_id}/score")
    async def score(caller: Authenticated, match_id: str, body: ScoreBody) -> MatchView:
        """Give or change the score of the caller's side."""
        return _match_view(await matching.matches.score(caller, match_id, body.points, body.comment))

    @routes.post("/{match_id}/cancel")
    async def cancel(caller: Authenticated, match_id: str, body: CancelBody) -> MatchView:
        """By either side, before the work is done. The need is open again, with new offers, unless it is to be closed."""
        cancelled = await matching.matches.cancel(caller, match_id, body.reason, reopen=not body.close_need)
        return _match_view(cancelled)

    return routes


def _desk(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/desk", tags=["desk of partners"])

    @routes.get("/needs")
    async def shown_needs(caller: Authenticated, page_size: PageSize = 0, page_token: PageToken = "") -> NeedsPage:
        """Open needs that firms let partners see: those of the partner's region at once, others after some days."""
        found, token = await matching.desk.shown_needs(caller, page_size=page_size, page_token=page_token)
        return NeedsPage(needs=[_need_view(each) for each in found], next_page_token=token)

    @routes.post("/needs/{need_id}/propose")
    async def propose(caller: Authenticated, need_id: str, body: ProposalBody) -> OfferView:
        """Offer a provider of one's own; the firm decides."""
        return _offer_view(await matching.desk.propose(caller, need_id, body.provider_id, body.message))

    return routes


def _rounds(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/rounds", tags=["rounds"])

    @routes.post("", status_code=202)
    async def start_round(caller: Authenticated, body: RoundBody) -> RoundView:
        """Begin a round over the open needs without offers; it is carried out in the background."""
        return _round_view(await matching.rounds.start_round(caller, body.round_id))

    @routes.get("")
    async def list_rounds(caller: Authenticated) -> RoundsView:
        """The newest 100, newest first."""
        return RoundsView(rounds=[_round_view(each) for each in await matching.rounds.list_rounds(caller)])

    @routes.get("/{round_id}")
    async def get_round(caller: Authenticated, round_id: str) -> RoundView:
        return _round_view(await matching.rounds.get_round(caller, round_id))

    return routes


# --- between bodies and values -------------------------------------------------------------------------------------


def _severity(name: str) -> Severity:
    if name not in _SEVERITIES:
        raise Invalid("severity_min is any, low, medium or high.", reason="BAD_SEVERITY_MIN")
    return _SEVERITIES[name]


def _us(time_: datetime | None) -> int | None:
    return None if time_ is None else to_us(time_)


def _provider_view(provider: ProviderRecord) -> ProviderView:
    return ProviderView(
        id=provider.id,
        kind=provider.kind,
        partner_id=provider.partner_id,
        title=provider.title,
        text=provider.text,
        region=provider.region,
        region_bound=provider.region_bound,
        regions_served=list(provider.regions_served),
        sic_divisions=list(provider.sic_divisions),
        sic_excluded=list(provider.sic_excluded),
        sizes_served=list(provider.sizes_served),
        skills=list(provider.skills),
        capacity_per_quarter=provider.capacity_per_quarter,
        lead_days=provider.lead_days,
        assesses=provider.assesses,
        conflict_organisations=list(provider.conflict_organisations),
        esco_skills=list(provider.esco_skills),
        evidence=[
            EvidenceBody(
                title=each.title,
                reference=each.reference,
                sha256=each.sha256,
                expires_on=each.expires_on,
                required=each.required,
            )
            for each in provider.evidence
        ],
        review_on=provider.review_on,
        offered_until=provider.offered_until,
        conflict_firm_ids=list(provider.conflict_firm_ids),
        expires_on=provider.expires_on,
        active=provider.active,
        taken_this_quarter=provider.taken,
        changed_us=_us(provider.changed),
    )


def _consent_view(consent: Consent) -> ConsentView:
    return ConsentView(
        id=consent.id,
        firm_id=consent.firm_id,
        shared=sorted(consent.shared),
        machine_ids=sorted(consent.machine_ids),
        severity_min=consent.severity_min.name.lower(),
        from_us=to_us(consent.valid_from),
        until_us=_us(consent.valid_until),
        note=consent.note,
        given_us=to_us(consent.given),
        given_by=consent.given_by,
        ended_us=_us(consent.ended),
        ended_by=consent.ended_by,
        replaced=consent.replaced,
    )


def opened_view(opened: OpenedNeed) -> OpenedView:
    return OpenedView(need=_need_view(opened.need), offers=_offer_views(opened.offers))


def _need_view(need: Need) -> NeedView:
    return NeedView(
        id=need.id,
        firm_id=need.firm_id,
        source=need.source,
        state=need.state,
        text=need.text,
        urgency=need.urgency,
        sic=need.sic,
        region=need.region,
        size=need.size,
        machine_id=need.machine_id,
        alarm_ids=list(need.alarm_ids),
        consent_id=need.consent_id,
        offers=need.offers,
        no_offer_reason=need.no_offer_reason,
        match_id=need.match_id,
        opened_us=to_us(need.opened),
        opened_by=need.opened_by,
        ended_us=_us(need.ended),
        correlation_id=need.correlation_id,
        wait_for_round=need.waits,
        shown_to_partners=need.shown,
    )


def _offer_views(offers: Sequence[Offer]) -> list[OfferView]:
    return [_offer_view(offer) for offer in offers]


def _offer_view(offer: Offer) -> OfferView:
    return OfferView(
        id=offer.id,
        need_id=offer.need_id,
        firm_id=offer.firm_id,
        provider_id=offer.provider_id,
        partner_id=offer.partner_id,
        provider_title=offer.provider_title,
        provider_kind=offer.provider_kind,
        state=offer.state,
        rank=offer.rank,
        score=offer.score,
        parts=offer.parts,
        reasons=list(offer.reasons),
        ranker_version=offer.ranker_version,
        match_id=offer.match_id,
        need_text=offer.need_text,
        alarm_id=offer.alarm_id,
        machine_id=offer.machine_id,
        made_us=to_us(offer.made),
        expires_us=to_us(offer.expires),
        decided_us=_us(offer.decided),
        decision_reason=offer.decision_reason,
        correlation_id=offer.correlation_id,
        origin=offer.origin,
        round_id=offer.round_id,
        message=offer.message,
    )


def _round_view(found: Round) -> RoundView:
    return RoundView(
        id=found.id,
        state=found.state,
        started_us=to_us(found.started),
        ended_us=_us(found.ended),
        offers=found.offers,
        from_safety_net=found.from_safety_net,
        unplaced=found.unplaced,
        blocking_pairs=found.blocking_pairs,
        ranker_version=found.ranker_version,
    )


def _match_view(match: Match) -> MatchView:
    return MatchView(
        id=match.id,
        need_id=match.need_id,
        offer_id=match.offer_id,
        firm_id=match.firm_id,
        provider_id=match.provider_id,
        partner_id=match.partner_id,
        quarter=match.quarter,
        accepted_us=to_us(match.accepted),
        correlation_id=match.correlation_id,
        state=match.state,
        engage_by_us=_us(match.engage_by),
        engaged_us=_us(match.engaged),
        finished_us=_us(match.finished),
        result=match.result,
        result_note=match.result_note,
        scores_until_us=_us(match.scores_until),
        ended_us=_us(match.ended),
        end_reason=match.end_reason,
        scores=[
            ScoreView(side=each.side, points=each.points, comment=each.comment, scored_us=to_us(each.scored))
            for each in match.scores
        ],
    )
