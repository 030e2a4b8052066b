"""The HTTP edge of needs and offers, and the desk of partners."""

from collections.abc import Mapping, Sequence

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.matching.domain import Kind, Source, Urgency
from services.matching.forms import Body, PageSize, PageToken, RegistryId, us
from services.matching.match_api import MatchView, match_view
from services.matching.needs import Need, NeedState, Offer, OfferState, Origin
from services.matching.service import Matching
from services.matching.service.needs import NewNeed, OpenedNeed


class NeedBody(Body):
    request_id: str = ""
    firm_id: RegistryId = 0
    text: str
    urgency: Urgency = Urgency.NORMAL
    machine_id: RegistryId = 0
    # No offers now but one in the next round, where scarce places go to the needs that they fit best.
    wait_for_round: bool = False
    # Partners may see the text, not whose it is, and propose themselves.
    show_to_partners: bool = False
    # Addresses of ESCO terms that it asks for; providers that offer them come nearer.
    esco_skills: list[str] = []


class ShowBody(Body):
    shown: bool


class CloseBody(Body):
    reason: str


class ProposalBody(Body):
    provider_id: str
    # To the firm.
    message: str = ""


class NeedView(Body):
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
    esco_skills: list[str]
    # Why it was closed, such as BY_FIRM or EXPIRED, and in whose words.
    close_reason: str
    close_note: str


class NeedsPage(Body):
    needs: list[NeedView]
    next_page_token: str


class OfferView(Body):
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


class OffersPage(Body):
    offers: list[OfferView]
    next_page_token: str


class OpenedView(Body):
    need: NeedView
    offers: list[OfferView]


class DeclineBody(Body):
    reason: str


class AcceptedView(Body):
    match: MatchView
    offer: OfferView


def router(matching: Matching) -> APIRouter:
    every = APIRouter(prefix="/v1")
    every.include_router(_needs(matching))
    every.include_router(_offers(matching))
    every.include_router(_desk(matching))
    return every


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
            esco_skills=tuple(body.esco_skills),
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

    @routes.post("/{need_id}/close")
    async def close_need(caller: Authenticated, need_id: str, body: CloseBody) -> NeedView:
        """It is not to be answered any more, for a reason; its offers lapse. A matched one is closed by cancelling its match."""
        return _need_view(await matching.needs.close_need(caller, need_id, body.reason))

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
        """Take a place of the provider and make the match. 409 with reason CAPACITY_FULL: no place is left, the offer lapses."""
        match, offer = await matching.offers.accept_offer(caller, offer_id)
        return AcceptedView(match=match_view(match), offer=_offer_view(offer))

    @routes.post("/{offer_id}/decline")
    async def decline_offer(caller: Authenticated, offer_id: str, body: DeclineBody) -> OfferView:
        """By the firm, or by the partner for its provider. The firm's last no closes the need; after a partner's others follow."""
        return _offer_view(await matching.offers.decline_offer(caller, offer_id, body.reason))

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
        ended_us=us(need.ended),
        correlation_id=need.correlation_id,
        wait_for_round=need.waits,
        shown_to_partners=need.shown,
        esco_skills=list(need.esco_skills),
        close_reason=need.close_reason,
        close_note=need.close_note,
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
        decided_us=us(offer.decided),
        decision_reason=offer.decision_reason,
        correlation_id=offer.correlation_id,
        origin=offer.origin,
        round_id=offer.round_id,
        message=offer.message,
    )
