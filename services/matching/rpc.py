"""The gRPC edge: messages in, use cases, messages out."""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from services.common.errors import Invalid
from services.common.messages import message_of
from services.common.rpc import current_caller
from services.matching.consents import Consent, NewConsent, Severity, SharedItem
from services.matching.domain import Assesses, Kind, Size, Urgency
from services.matching.matches import Match, MatchState, Result
from services.matching.messages import asked_filter, asked_time, asked_word, offer_message
from services.matching.needs import Need, NeedState, Offer, OfferState
from services.matching.providers import Evidence, ProviderRecord
from services.matching.service import Matching
from services.matching.service.assessors import Application
from services.matching.service.needs import NewNeed
from smdih.matching.v1 import events_pb2, matching_pb2_grpc
from smdih.matching.v1 import matching_pb2 as pb


class MatchingServicer(matching_pb2_grpc.MatchingServiceServicer):
    def __init__(self, matching: Matching) -> None:
        self._matching = matching

    async def PutProvider(self, request: pb.PutProviderRequest, context: Any) -> pb.PutProviderResponse:
        put = await self._matching.providers.put_provider(current_caller(), _provider(request.provider))
        return pb.PutProviderResponse(provider=provider_message(put))

    async def GetProvider(self, request: pb.GetProviderRequest, context: Any) -> pb.GetProviderResponse:
        found = await self._matching.providers.get_provider(current_caller(), request.provider_id)
        return pb.GetProviderResponse(provider=provider_message(found))

    async def ListProviders(self, request: pb.ListProvidersRequest, context: Any) -> pb.ListProvidersResponse:
        found, token = await self._matching.providers.list_providers(
            current_caller(),
            partner_id=request.partner_id,
            kind=asked_filter("kind", Kind, events_pb2.ProviderKind, request.kind),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListProvidersResponse(providers=map(provider_message, found), next_page_token=token)

    async def WithdrawProvider(self, request: pb.WithdrawProviderRequest, context: Any) -> pb.WithdrawProviderResponse:
        withdrawn = await self._matching.providers.withdraw_provider(current_caller(), request.provider_id)
        return pb.WithdrawProviderResponse(provider=provider_message(withdrawn))

    async def GiveConsent(self, request: pb.GiveConsentRequest, context: Any) -> pb.GiveConsentResponse:
        new = NewConsent(
            shared=[asked_word("shared", SharedItem, pb.SharedItem, item) for item in request.shared],
            machine_ids=list(request.machine_ids),
            severity_min=_severity(request.severity_min),
            valid_from=asked_time("from_us", request.from_us),
            valid_until=asked_time("until_us", request.until_us),
            note=request.note,
        )
        given = await self._matching.consents.give_consent(
            current_caller(), request.firm_id, new, request_id=request.request_id
        )
        return pb.GiveConsentResponse(consent=consent_message(given))

    async def RevokeConsent(self, request: pb.RevokeConsentRequest, context: Any) -> pb.RevokeConsentResponse:
        ended = await self._matching.consents.revoke_consent(current_caller(), request.firm_id)
        return pb.RevokeConsentResponse(consent=None if ended is None else consent_message(ended))

    async def GetConsent(self, request: pb.GetConsentRequest, context: Any) -> pb.GetConsentResponse:
        found = await self._matching.consents.get_consent(current_caller(), request.firm_id)
        return pb.GetConsentResponse(
            current=None if found.current is None else consent_message(found.current),
            history=map(consent_message, found.ended),
        )

    async def OpenNeed(self, request: pb.OpenNeedRequest, context: Any) -> pb.OpenNeedResponse:
        new = NewNeed(
            text=request.text,
            urgency=asked_urgency(request.urgency),
            machine_id=request.machine_id,
            waits=request.wait_for_round,
            shown=request.show_to_partners,
            esco_skills=tuple(request.esco_skills),
        )
        opened = await self._matching.needs.open_need(
            current_caller(), request.firm_id, new, request_id=request.request_id
        )
        return pb.OpenNeedResponse(need=need_message(opened.need), offers=map(offer_details, opened.offers))

    async def GetNeed(self, request: pb.GetNeedRequest, context: Any) -> pb.GetNeedResponse:
        return pb.GetNeedResponse(
            need=need_message(await self._matching.needs.get_need(current_caller(), request.need_id))
        )

    async def ListNeeds(self, request: pb.ListNeedsRequest, context: Any) -> pb.ListNeedsResponse:
        found, token = await self._matching.needs.list_needs(
            current_caller(),
            firm_id=request.firm_id,
            state=asked_filter("state", NeedState, pb.NeedState, request.state),
            machine_id=request.machine_id,
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListNeedsResponse(needs=map(need_message, found), next_page_token=token)

    async def ListOffers(self, request: pb.ListOffersRequest, context: Any) -> pb.ListOffersResponse:
        state = asked_filter("state", OfferState, pb.OfferState, request.state)
        token = ""
        found: Sequence[Offer]
        if request.need_id:
            found = await self._matching.offers.offers_of_need(
                current_caller(), request.need_id, state, request.round_id
            )
        else:
            found, token = await self._matching.offers.list_offers(
                current_caller(),
                state=state,
                round_id=request.round_id,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        return pb.ListOffersResponse(offers=map(offer_details, found), next_page_token=token)

    async def AcceptOffer(self, request: pb.AcceptOfferRequest, context: Any) -> pb.AcceptOfferResponse:
        match, offer = await self._matching.offers.accept_offer(current_caller(), request.offer_id)
        return pb.AcceptOfferResponse(match=match_message(match), offer=offer_details(offer))

    async def DeclineOffer(self, request: pb.DeclineOfferRequest, context: Any) -> pb.DeclineOfferResponse:
        declined = await self._matching.offers.decline_offer(current_caller(), request.offer_id, request.reason)
        return pb.DeclineOfferResponse(offer=offer_details(declined))

    async def ShowNeed(self, request: pb.ShowNeedRequest, context: Any) -> pb.ShowNeedResponse:
        need = await self._matching.needs.show_need(current_caller(), request.need_id, shown=request.shown)
        return pb.ShowNeedResponse(need=need_message(need))

    async def CloseNeed(self, request: pb.CloseNeedRequest, context: Any) -> pb.CloseNeedResponse:
        need = await self._matching.needs.close_need(current_caller(), request.need_id, request.reason)
        return pb.CloseNeedResponse(need=need_message(need))

    async def ListShownNeeds(self, request: pb.ListShownNeedsRequest, context: Any) -> pb.ListShownNeedsResponse:
        found, token = await self._matching.desk.shown_needs(
            current_caller(), page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListShownNeedsResponse(needs=map(need_message, found), next_page_token=token)

    async def ProposeProvider(self, request: pb.ProposeProviderRequest, context: Any) -> pb.ProposeProviderResponse:
        offer = await self._matching.desk.propose(
            current_caller(), request.need_id, request.provider_id, request.message
        )
        return pb.ProposeProviderResponse(offer=offer_details(offer))

    async def ListMatches(self, request: pb.ListMatchesRequest, context: Any) -> pb.ListMatchesResponse:
        found, token = await self._matching.matches.list_matches(
            current_caller(),
            state=asked_filter("state", MatchState, pb.MatchState, request.state),
            page_size=request.page_size,
            page_token=request.page_token,
        )
        return pb.ListMatchesResponse(matches=map(match_message, found), next_page_token=token)

    async def GetMatch(self, request: pb.GetMatchRequest, context: Any) -> pb.GetMatchResponse:
        found = await self._matching.matches.get_match(current_caller(), request.match_id)
        return pb.GetMatchResponse(match=match_message(found))

    async def EngageMatch(self, request: pb.EngageMatchRequest, context: Any) -> pb.EngageMatchResponse:
        engaged = await self._matching.matches.engage(current_caller(), request.match_id)
        return pb.EngageMatchResponse(match=match_message(engaged))

    async def FinishMatch(self, request: pb.FinishMatchRequest, context: Any) -> pb.FinishMatchResponse:
        result = asked_word("result", Result, events_pb2.Result, request.result)
        finished = await self._matching.matches.finish(current_caller(), request.match_id, result, request.note)
        return pb.FinishMatchResponse(match=match_message(finished))

    async def ScoreMatch(self, request: pb.ScoreMatchRequest, context: Any) -> pb.ScoreMatchResponse:
        scored = await self._matching.matches.score(current_caller(), request.match_id, request.points, request.comment)
        return pb.ScoreMatchResponse(match=match_message(scored))

    async def CancelMatch(self, request: pb.CancelMatchRequest, context: Any) -> pb.CancelMatchResponse:
        cancelled = await self._matching.matches.cancel(
            current_caller(), request.match_id, request.reason, reopen=not request.close_need
        )
        return pb.CancelMatchResponse(match=match_message(cancelled))

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
                    parts=_parts(each.ranked.parts),
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


def asked_urgency(number: int) -> Urgency:
    """Unspecified: normal."""
    return asked_filter("urgency", Urgency, pb.Urgency, number) or Urgency.NORMAL


def _severity(number: int) -> Severity:
    try:
        return Severity(number)
    except ValueError as error:
        raise Invalid(f"severity_min {number} is not one of the contract's.", reason="BAD_SEVERITY_MIN") from error


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
    kind = asked_word("kind", Kind, events_pb2.ProviderKind, message.kind)
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
        assesses=asked_filter("assesses", Assesses, pb.Assesses, message.assesses) or Assesses.NO,
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


def provider_message(provider: ProviderRecord) -> pb.Provider:
    return message_of(
        pb.Provider,
        provider,
        taken_this_quarter=provider.taken,
        assesses=None if provider.assesses is Assesses.NO else provider.assesses,
    )


def consent_message(consent: Consent) -> pb.Consent:
    return message_of(
        pb.Consent,
        consent,
        shared=[item for item in SharedItem if item in consent.shared],
        machine_ids=sorted(consent.machine_ids),
        from_us=consent.valid_from,
        until_us=consent.valid_until,
    )


def need_message(need: Need) -> pb.Need:
    return message_of(pb.Need, need, wait_for_round=need.waits, shown_to_partners=need.shown)


def offer_details(offer: Offer) -> pb.OfferDetails:
    return message_of(pb.OfferDetails, offer, offer=offer_message(offer), parts=_parts(offer.parts))


def match_message(match: Match) -> pb.Match:
    return message_of(pb.Match, match)


def _parts(parts: Mapping[str, float]) -> list[pb.ScorePart]:
    return [pb.ScorePart(name=name, points=points) for name, points in parts.items()]
