"""The gRPC edge: messages in, use cases, messages out."""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any, TypeVar

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.rpc import current_caller
from services.matching.consents import Consent, NewConsent, Severity, SharedItem
from services.matching.domain import Assesses, Kind, Size, Source, Urgency
from services.matching.matches import Match, MatchState, Result, Side
from services.matching.messages import KINDS, RESULTS, asked_time, offer_message
from services.matching.needs import Need, NeedState, Offer, OfferState, Origin
from services.matching.providers import Evidence, ProviderRecord
from services.matching.service import Matching
from services.matching.service.assessors import Application
from services.matching.service.needs import NewNeed
from smdih.matching.v1 import events_pb2, matching_pb2_grpc
from smdih.matching.v1 import matching_pb2 as pb

T = TypeVar("T")

_KINDS: Mapping[int, Kind] = {number: kind for kind, number in KINDS.items()}
_SHARED: Mapping[int, SharedItem] = {
    pb.SHARED_ITEM_FAULT: SharedItem.FAULT,
    pb.SHARED_ITEM_FIGURES: SharedItem.FIGURES,
    pb.SHARED_ITEM_PROFILE: SharedItem.PROFILE,
    pb.SHARED_ITEM_PARTNERS: SharedItem.PARTNERS,
}
_SEVERITIES: Mapping[int, Severity] = {
    pb.ALARM_SEVERITY_UNSPECIFIED: Severity.ANY,
    pb.ALARM_SEVERITY_LOW: Severity.LOW,
    pb.ALARM_SEVERITY_MEDIUM: Severity.MEDIUM,
    pb.ALARM_SEVERITY_HIGH: Severity.HIGH,
}
_URGENCIES: Mapping[int, Urgency] = {
    pb.URGENCY_UNSPECIFIED: Urgency.NORMAL,
    pb.URGENCY_LOW: Urgency.LOW,
    pb.URGENCY_NORMAL: Urgency.NORMAL,
    pb.URGENCY_HIGH: Urgency.HIGH,
}
_NEED_STATES: Mapping[int, NeedState] = {
    pb.NEED_STATE_OPEN: NeedState.OPEN,
    pb.NEED_STATE_MATCHED: NeedState.MATCHED,
    pb.NEED_STATE_CLOSED: NeedState.CLOSED,
}
_OFFER_STATES: Mapping[int, OfferState] = {
    pb.OFFER_STATE_MADE: OfferState.MADE,
    pb.OFFER_STATE_ACCEPTED: OfferState.ACCEPTED,
    pb.OFFER_STATE_DECLINED: OfferState.DECLINED,
    pb.OFFER_STATE_LAPSED: OfferState.LAPSED,
    pb.OFFER_STATE_CANCELLED: OfferState.CANCELLED,
}
_MATCH_STATES: Mapping[int, MatchState] = {
    pb.MATCH_STATE_ACCEPTED: MatchState.ACCEPTED,
    pb.MATCH_STATE_ENGAGED: MatchState.ENGAGED,
    pb.MATCH_STATE_FINISHED: MatchState.FINISHED,
    pb.MATCH_STATE_CLOSED: MatchState.CLOSED,
    pb.MATCH_STATE_CANCELLED: MatchState.CANCELLED,
    pb.MATCH_STATE_EXPIRED: MatchState.EXPIRED,
}
_RESULTS: Mapping[int, Result] = {number: result for result, number in RESULTS.items()}
_SIDES = {Side.FIRM: pb.SIDE_FIRM, Side.PARTNER: pb.SIDE_PARTNER}
_ASSESSES: Mapping[int, Assesses] = {
    pb.ASSESSES_UNSPECIFIED: Assesses.NO,
    pb.ASSESSES_ALSO: Assesses.ALSO,
    pb.ASSESSES_ONLY: Assesses.ONLY,
}
_SHARED_NUMBERS = {
    SharedItem.FAULT: pb.SHARED_ITEM_FAULT,
    SharedItem.FIGURES: pb.SHARED_ITEM_FIGURES,
    SharedItem.PROFILE: pb.SHARED_ITEM_PROFILE,
    SharedItem.PARTNERS: pb.SHARED_ITEM_PARTNERS,
}
_ORIGINS = {
    Origin.HUB: pb.OFFER_ORIGIN_HUB,
    Origin.ROUND: pb.OFFER_ORIGIN_ROUND,
    Origin.PARTNER: pb.OFFER_ORIGIN_PARTNER,
}
_SOURCES = {
    Source.FIRM: pb.NEED_SOURCE_FIRM,
    Source.ANOMALY: pb.NEED_SOURCE_ANOMALY,
    Source.MATURITY: pb.NEED_SOURCE_MATURITY,
}
_URGENCY_NUMBERS = {
    Urgency.LOW: pb.URGENCY_LOW,
    Urgency.NORMAL: pb.URGENCY_NORMAL,
    Urgency.HIGH: pb.URGENCY_HIGH,
}


class MatchingServicer(matching_pb2_grpc.MatchingServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._matching = matching

    async def PutProvider(self, request: pb.PutProviderRequest, context: Any) -> pb.PutProviderResponse:
        put = await self._matching.providers.put_provider(current_caller(), _provider(request.provider))
        return pb.PutProviderResponse(provider=_provider_message(put))

    async def GetProvider(self, request: pb.GetProviderRequest, context: Any) -> pb.GetProviderResponse:
        found = await self._matching.providers.get_provider(current_caller(), request.provider_id)
        return pb.GetProviderResponse(provider=_provider_message(found))

    async def ListProviders(self, request: pb.ListProvidersRequest, context: Any) -> pb.ListProvidersResponse:
        found, token = await self._matching.providers.list_providers(
            current_caller(),
            partner_id=request.partner_id,
            kind=_filter("kind", _KINDS, request.kind),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListProvidersResponse(providers=map(_provider_message, found), next_page_token=token)

    async def WithdrawProvider(self, request: pb.WithdrawProviderRequest, context: Any) -> pb.WithdrawProviderResponse:
        withdrawn = await self._matching.providers.withdraw_provider(current_caller(), request.provider_id)
        return pb.WithdrawProviderResponse(provider=_provider_message(withdrawn))

    async def GiveConsent(self, request: pb.GiveConsentRequest, context: Any) -> pb.GiveConsentResponse:
        new = NewConsent(
            shared=[_member("shared", _SHARED, item) for item in request.shared],
            machine_ids=list(request.machine_ids),
            severity_min=_member("severity_min", _SEVERITIES, request.severity_min),
            valid_from=asked_time("from_us", request.from_us),
            valid_until=asked_time("until_us", request.until_us),
            note=request.note,
        )
        given = await self._matching.consents.give_consent(
            current_caller(), request.firm_id, new, request_id=request.request_id
        )
        return pb.GiveConsentResponse(consent=_consent_message(given))

    async def RevokeConsent(self, request: pb.RevokeConsentRequest, context: Any) -> pb.RevokeConsentResponse:
        ended = await self._matching.consents.revoke_consent(current_caller(), request.firm_id)
        return pb.RevokeConsentResponse(consent=None if ended is None else _consent_message(ended))

    async def GetConsent(self, request: pb.GetConsentRequest, context: Any) -> pb.GetConsentResponse:
        found = await self._matching.consents.get_consent(current_caller(), request.firm_id)
        return pb.GetConsentResponse(
            current=None if found.current is None else _consent_message(found.current),
            history=map(_consent_message, found.ended),
        )

    async def OpenNeed(self, request: pb.OpenNeedRequest, context: Any) -> pb.OpenNeedResponse:
        new = NewNeed(
            text=request.text,
            urgency=_member("urgency", _URGENCIES, request.urgency),
            machine_id=request.machine_id,
            waits=request.wait_for_round,
            shown=request.show_to_partners,
        )
        opened = await self._matching.needs.open_need(
            current_caller(), request.firm_id, new, request_id=request.request_id
        )
        return pb.OpenNeedResponse(need=_need_message(opened.need), offers=map(_offer_details, opened.offers))

    async def GetNeed(self, request: pb.GetNeedRequest, context: Any) -> pb.GetNeedResponse:
        return pb.GetNeedResponse(
            need=_need_message(await self._matching.needs.get_need(current_caller(), request.need_id))
        )

    async def ListNeeds(self, request: pb.ListNeedsRequest, context: Any) -> pb.ListNeedsResponse:
        found, token = await self._matching.needs.list_needs(
            current_caller(),
            firm_id=request.firm_id,
            state=_filter("state", _NEED_STATES, request.state),
            machine_id=request.machine_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListNeedsResponse(needs=map(_need_message, found), next_page_token=token)

    async def ListOffers(self, request: pb.ListOffersRequest, context: Any) -> pb.ListOffersResponse:
        state = _filter("state", _OFFER_STATES, request.state)
        token = ""
        found: Sequence[Offer]
        if request.need_id:
            found = await self._matching.offers.offers_of_need(current_caller(), request.need_id, state)
        else:
            found, token = await self._matching.offers.list_offers(
                current_caller(), state=state, page_size=request.page_size, page_token=request.page_token
            )
        return pb.ListOffersResponse(offers=map(_offer_details, found), next_page_token=token)

    async def AcceptOffer(self, request: pb.AcceptOfferRequest, context: Any) -> pb.AcceptOfferResponse:
        match, offer = await self._matching.offers.accept_offer(current_caller(), request.offer_id)
        return pb.AcceptOfferResponse(match=_match_message(match), offer=_offer_details(offer))

    async def DeclineOffer(self, request: pb.DeclineOfferRequest, context: Any) -> pb.DeclineOfferResponse:
        declined = await self._matching.offers.decline_offer(current_caller(), request.offer_id, request.reason)
        return pb.DeclineOfferResponse(offer=_offer_details(declined))

    async def ShowNeed(self, request: pb.ShowNeedRequest, context: Any) -> pb.ShowNeedResponse:
        need = await self._matching.needs.show_need(current_caller(), request.need_id, shown=request.shown)
        return pb.ShowNeedResponse(need=_need_message(need))

    async def ListShownNeeds(self, request: pb.ListShownNeedsRequest, context: Any) -> pb.ListShownNeedsResponse:
        found, token = await self._matching.desk.shown_needs(
            current_caller(), page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListShownNeedsResponse(needs=map(_need_message, found), next_page_token=token)

    async def ProposeProvider(self, request: pb.ProposeProviderRequest, context: Any) -> pb.ProposeProviderResponse:
        offer = await self._matching.desk.propose(
            current_caller(), request.need_id, request.provider_id, request.message
        )
        return pb.ProposeProviderResponse(offer=_offer_details(offer))

    async def ListMatches(self, request: pb.ListMatchesRequest, context: Any) -> pb.ListMatchesResponse:
        found, token = await self._matching.matches.list_matches(
            current_caller(),
            state=_filter("state", _MATCH_STATES, request.state),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListMatchesResponse(matches=map(_match_message, found), next_page_token=token)

    async def GetMatch(self, request: pb.GetMatchRequest, context: Any) -> pb.GetMatchResponse:
        found = await self._matching.matches.get_match(current_caller(), request.match_id)
        return pb.GetMatchResponse(match=_match_message(found))

    async def EngageMatch(self, request: pb.EngageMatchRequest, context: Any) -> pb.EngageMatchResponse:
        engaged = await self._matching.matches.engage(current_caller(), request.match_id)
        return pb.EngageMatchResponse(match=_match_message(engaged))

    async def FinishMatch(self, request: pb.FinishMatchRequest, context: Any) -> pb.FinishMatchResponse:
        result = _member("result", _RESULTS, request.result)
        finished = await self._matching.matches.finish(current_caller(), request.match_id, result, request.note)
        return pb.FinishMatchResponse(match=_match_message(finished))

    async def ScoreMatch(self, request: pb.ScoreMatchRequest, context: Any) -> pb.ScoreMatchResponse:
        scored = await self._matching.matches.score(current_caller(), request.match_id, request.points, request.comment)
        return pb.ScoreMatchResponse(match=_match_message(scored))

    async def CancelMatch(self, request: pb.CancelMatchRequest, context: Any) -> pb.CancelMatchResponse:
        cancelled = await self._matching.matches.cancel(
            current_caller(), request.match_id, request.reason, reopen=not request.close_need
        )
        return pb.CancelMatchResponse(match=_match_message(cancelled))

    async def ProposeAssessors(self, request: pb.ProposeAssessorsRequest, context: Any) -> pb.ProposeAssessorsResponse:
        application = Application(
            text=request.text,
            sic=request.sic,
            region=request.region,
            firm_ids=list(request.conflict_firm_ids),
            organisations=list(request.conflict_organisations),
        )
        proposal = await self._matching.assessors.propose_assessors(current_caller(), application, request.count)
        return pb.ProposeAssessorsResponse(
            assessors=[
                pb.ProposedAssessor(
                    provider_id=each.provider.id,
                    name=each.provider.title,
                    partner_id=each.provider.partner_id,
                    score=each.ranked.score,
                    parts=[pb.ScorePart(name=name, points=points) for name, points in each.ranked.parts.items()],
                    reasons=each.ranked.reasons,
                )
                for each in proposal.assessors
            ],
            excluded=[
                pb.ExcludedAssessor(
                    provider_id=each.provider.id,
                    name=each.provider.title,
                    codes=list(each.excluded.codes),
                    reasons=each.reasons,
                )
                for each in proposal.excluded
            ],
            excluded_count=proposal.excluded_count,
            degraded=proposal.degraded,
            ranker_version=proposal.ranker_version,
        )


# --- messages to values --------------------------------------------------------------------------------------------


def _member(name: str, members: Mapping[int, T], number: int) -> T:
    if number not in members:
        raise Invalid(f"{name} {number} is not one of the contract's.", reason=f"BAD_{name.upper()}")
    return members[number]


def _filter(name: str, members: Mapping[int, T], number: int) -> T | None:
    """0 filters nothing."""
    return None if number == 0 else _member(name, members, number)


def _date(name: str, text: str) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError as error:
        raise Invalid(f'{name} is not a date such as "2027-03-31".', reason="BAD_DATE") from error


def _size(text: str) -> Size:
    try:
        return Size(text)
    except ValueError as error:
        raise Invalid("A size is micro, small, medium or large.", reason="BAD_SIZE") from error


def _provider(message: pb.Provider) -> ProviderRecord:
    kind = _member("kind", _KINDS, message.kind)
    return ProviderRecord(
        id=message.id,
        kind=kind,
        partner_id=message.partner_id,
        title=message.title,
        text=message.text,
        region=message.region,
        region_bound=message.region_bound,
        regions_served=tuple(message.regions_served),
        sic_divisions=tuple(message.sic_divisions),
        sic_excluded=tuple(message.sic_excluded),
        sizes_served=tuple(_size(size) for size in message.sizes_served),
        skills=tuple(message.skills),
        capacity_per_quarter=None if kind is Kind.COURSE else message.capacity_per_quarter,
        lead_days=message.lead_days,
        assesses=_member("assesses", _ASSESSES, message.assesses),
        conflict_organisations=tuple(message.conflict_organisations),
        esco_skills=tuple(message.esco_skills),
        evidence=tuple(
            Evidence(
                title=each.title,
                reference=each.reference,
                sha256=each.sha256,
                expires_on=_date("expires_on", each.expires_on),
                required=each.required,
            )
            for each in message.evidence
        ),
        review_on=_date("review_on", message.review_on),
        conflict_firm_ids=tuple(message.conflict_firm_ids),
        expires_on=_date("expires_on", message.expires_on),
    )


# --- values to messages --------------------------------------------------------------------------------------------


def _provider_message(provider: ProviderRecord) -> pb.Provider:
    return pb.Provider(
        id=provider.id,
        kind=KINDS[provider.kind],
        partner_id=provider.partner_id,
        title=provider.title,
        text=provider.text,
        region=provider.region,
        sic_divisions=provider.sic_divisions,
        skills=provider.skills,
        capacity_per_quarter=provider.capacity_per_quarter or 0,
        expires_on=_date_text(provider.expires_on),
        active=provider.active,
        taken_this_quarter=provider.taken,
        changed_us=_us(provider.changed),
        region_bound=provider.region_bound,
        regions_served=provider.regions_served,
        sic_excluded=provider.sic_excluded,
        sizes_served=provider.sizes_served,
        lead_days=provider.lead_days,
        assesses=_number(_ASSESSES, provider.assesses),  # type: ignore[arg-type]
        conflict_organisations=provider.conflict_organisations,
        esco_skills=provider.esco_skills,
        evidence=[
            pb.Evidence(
                title=each.title,
                reference=each.reference,
                sha256=each.sha256,
                expires_on=_date_text(each.expires_on),
                required=each.required,
            )
            for each in provider.evidence
        ],
        review_on=_date_text(provider.review_on),
        offered_until=_date_text(provider.offered_until),
        conflict_firm_ids=provider.conflict_firm_ids,
    )


def _consent_message(consent: Consent) -> pb.Consent:
    return pb.Consent(
        id=consent.id,
        firm_id=consent.firm_id,
        shared=[number for item, number in _SHARED_NUMBERS.items() if item in consent.shared],
        machine_ids=sorted(consent.machine_ids),
        severity_min=int(consent.severity_min),  # type: ignore[arg-type]
        from_us=_us(consent.valid_from),
        until_us=_us(consent.valid_until),
        note=consent.note,
        given_us=_us(consent.given),
        given_by=consent.given_by,
        ended_us=_us(consent.ended),
        ended_by=consent.ended_by,
        replaced=consent.replaced,
    )


def _need_message(need: Need) -> pb.Need:
    return pb.Need(
        id=need.id,
        firm_id=need.firm_id,
        source=_SOURCES[need.source],
        state=_number(_NEED_STATES, need.state),  # type: ignore[arg-type]
        text=need.text,
        urgency=_URGENCY_NUMBERS[need.urgency],
        sic=need.sic,
        region=need.region,
        size=need.size,
        machine_id=need.machine_id,
        alarm_ids=need.alarm_ids,
        consent_id=need.consent_id,
        offers=need.offers,
        no_offer_reason=need.no_offer_reason,
        match_id=need.match_id,
        opened_us=_us(need.opened),
        opened_by=need.opened_by,
        ended_us=_us(need.ended),
        correlation_id=need.correlation_id,
        wait_for_round=need.waits,
        shown_to_partners=need.shown,
    )


def _offer_details(offer: Offer) -> pb.OfferDetails:
    return pb.OfferDetails(
        offer=offer_message(offer),
        state=_number(_OFFER_STATES, offer.state),  # type: ignore[arg-type]
        parts=[pb.ScorePart(name=name, points=points) for name, points in offer.parts.items()],
        made_us=_us(offer.made),
        expires_us=_us(offer.expires),
        decided_us=_us(offer.decided),
        decision_reason=offer.decision_reason,
        ranker_version=offer.ranker_version,
        origin=_ORIGINS[offer.origin],
        round_id=offer.round_id,
        message=offer.message,
    )


def _match_message(match: Match) -> pb.Match:
    return pb.Match(
        id=match.id,
        need_id=match.need_id,
        offer_id=match.offer_id,
        firm_id=match.firm_id,
        provider_id=match.provider_id,
        partner_id=match.partner_id,
        quarter=match.quarter.isoformat(),
        accepted_us=_us(match.accepted),
        correlation_id=match.correlation_id,
        state=_number(_MATCH_STATES, match.state),  # type: ignore[arg-type]
        engage_by_us=_us(match.engage_by),
        engaged_us=_us(match.engaged),
        finished_us=_us(match.finished),
        result=events_pb2.RESULT_UNSPECIFIED if match.result is None else RESULTS[match.result],
        result_note=match.result_note,
        scores_until_us=_us(match.scores_until),
        ended_us=_us(match.ended),
        end_reason=match.end_reason,
        scores=[
            pb.MatchScore(
                side=_SIDES[score.side], points=score.points, comment=score.comment, scored_us=_us(score.scored)
            )
            for score in match.scores
        ],
    )


def _number(members: Mapping[int, T], member: T) -> int:
    return next(number for number, each in members.items() if each == member)


def _date_text(day: date | None) -> str:
    return "" if day is None else day.isoformat()


def _us(time_: datetime | None) -> int:
    return 0 if time_ is None else to_us(time_)
