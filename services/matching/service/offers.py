"""The use cases of offers: made from a ranking, seen, accepted, declined, lapsed, made again."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta

from prometheus_client import Counter

from services.common.clock import Clock, from_us, today
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.common.outbox import OutboxRelay
from services.matching import notices
from services.matching.domain import FilterCode
from services.matching.index import ProviderIndex
from services.matching.matches import Match
from services.matching.needs import (
    Lapse,
    Limits,
    Need,
    NeedState,
    NoOffer,
    Offer,
    OfferState,
    match_id,
    offer_id,
    quarter_of,
)
from services.matching.providers import ProviderRecord
from services.matching.ranking import Ranked, Ranking
from services.matching.service.checks import (
    CHOSEN_ID,
    NOTE_CHARACTERS_MAX,
    before_token,
    check_text,
    known_form,
    page_size_of,
    page_token_of,
)
from services.matching.service.notices import tell_of_offers
from services.matching.service.publishing import publish_match, publish_offers
from services.matching.service.sight import SUPPLIERS, need_seen_by, offer_as_seen_by, sees_offer
from services.matching.store import matches as matches_store
from services.matching.store import needs as needs_store
from services.matching.store import notices as notices_store
from services.matching.store import offers as offers_store
from services.matching.store import places as places_store
from services.matching.store import providers as providers_store
from services.matching.store.places import Held, Why

log = get_logger(__name__)

# First look: more than the offers of a need, for those that are full.
CANDIDATES_FIRST = 20
WIDEN_BY = 10
LAPSES_AT_ONCE_MAX = 200
RETRIES_AT_ONCE_MAX = 20
# A place that is reserved for an offer outlasts it by so much: giving it back is the offer's lapse, not the place's.
PLACE_GRACE = timedelta(hours=1)

# Acceptances refused because the provider had no place left.
capacity_refused_total = Counter("smdih_matching_capacity_refused_total", "Acceptances refused for want of a place")


class Offers:
    """Providers proposed for needs, and what becomes of it."""

    def __init__(self, pool: Pool, index: ProviderIndex, relay: OutboxRelay, *, clock: Clock, limits: Limits) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._clock = clock
        self._limits = limits
        # What the needs without offers were last ranked against: another try makes sense once it differs.
        self._tried: tuple[int, date] | None = None

    async def rank(self, need: Need, limit: int = CANDIDATES_FIRST) -> Ranking:
        return await self._index.rank(need.for_ranking(), limit)

    async def choose(self, connection: Connection, need: Need, ranking: Ranking) -> tuple[list[Offer], str]:
        """The best providers with a free place, or why there is none. Looks further down than `ranking` while places are short."""
        now = self._now()
        refused = await offers_store.providers_refused(connection, need.id) if need.attempt > 1 else set()
        limit = CANDIDATES_FIRST
        while True:
            bookable = await providers_store.bookable_providers(
                connection,
                [each.provider_id for each in ranking.ranked],
                quarter=quarter_of(now.date()),
                today=now.date(),
            )
            chosen = [each for each in ranking.ranked if each.provider_id in bookable.keys() - refused]
            chosen = chosen[: self._limits.offers_max]
            whole = len(ranking.ranked) < limit or limit >= self._limits.candidates_max
            if len(chosen) == self._limits.offers_max or whole:
                break
            limit = min(limit * WIDEN_BY, self._limits.candidates_max)
            ranking = await self.rank(need, limit)
        if not chosen:
            why = _why_none(len(self._index), ranking)
            log.info("no offers", need=need.id, reason=why, filtered_out=dict(ranking.excluded_counts))
            return [], why
        return [
            offer_for(
                need,
                bookable[each.provider_id],
                each,
                rank=rank,
                ranker_version=self._index.version,
                made=now,
                expires=now + self._limits.offer_lifetime,
            )
            for rank, each in enumerate(chosen, start=1)
        ], ""

    async def make(self, connection: Connection, offers: Sequence[Offer]) -> None:
        if offers:
            await offers_store.add_offers(connection, offers)
            await publish_offers(connection, offers)

    async def offers_of_need(
        self, caller: Caller, need_id: str, state: OfferState | None, round_id: str = ""
    ) -> list[Offer]:
        """Best first; for partners those of their own providers, for a provider its own. Of a round, where one is named."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            if caller.role not in SUPPLIERS:
                await need_seen_by(connection, caller, need_id)
            found = await offers_store.offers_of_need(connection, known_form(need_id))
        seen = [offer_as_seen_by(caller, offer) for offer in found if sees_offer(caller, offer)]
        if caller.role in SUPPLIERS and not seen:
            raise NotFound()
        return [offer for offer in seen if state in (None, offer.state) and round_id in ("", offer.round_id)]

    async def list_offers(
        self, caller: Caller, *, state: OfferState | None, round_id: str = "", page_size: int, page_token: str
    ) -> tuple[list[Offer], str]:
        """A page of all offers that the caller may see, of a round where one is named, newest first, and the token of the next
        ("": there is none)."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        if round_id and not CHOSEN_ID.fullmatch(round_id):
            raise NotFound("There is no such round.")
        limit = page_size_of(page_size)
        async with transaction(self._pool) as connection:
            found = await offers_store.list_offers(
                connection,
                firm_id=caller.firm_id if caller.role is Role.FIRM else 0,
                partner_id=caller.partner_id if caller.role is Role.PARTNER else 0,
                provider_id=caller.provider_id if caller.role is Role.PROVIDER else "",
                state=state,
                round_id=round_id,
                before=before_token(page_token),
                limit=limit + 1,
            )
        token = page_token_of(found[limit - 1].made, found[limit - 1].id) if len(found) > limit else ""
        return [offer_as_seen_by(caller, offer) for offer in found[:limit]], token

    async def accept_offer(self, caller: Caller, offer_id: str) -> tuple[Match, Offer]:
        """Take a place of the provider and make the match; the need's other offers lapse. A repeat gives the same answer."""
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            offer, need = await self._lock_offer(connection, caller, offer_id)
            if offer.state is OfferState.ACCEPTED:
                return await self._accepted(connection, offer)
            _check_open(offer)
            with correlated(need.correlation_id):
                match = await self._match(connection, caller, offer)
                await self._lapse(
                    connection,
                    [
                        each
                        for each in await offers_store.offers_of_need(connection, need.id)
                        if each.state is OfferState.MADE
                    ],
                    Lapse.OTHER_ACCEPTED,
                )
                await needs_store.end_need(connection, need.id, NeedState.MATCHED, ended=match.accepted)
                accepted = await self._accepted(connection, offer)
        self._relay.kick()
        self._index.kick()
        log.info("offer accepted", offer=offer.id, need=need.id, match=match.id, provider=offer.provider_id)
        return accepted

    async def _match(self, connection: Connection, caller: Caller, offer: Offer) -> Match:
        now = self._now()
        # Before the provider: see next_provider_change.
        await providers_store.next_provider_change(connection)
        provider = await providers_store.lock_provider(connection, offer.provider_id)
        assert provider is not None  # by foreign key
        if not provider.is_live(now.date()):
            raise Conflict(
                "This provider is not to be had any more; accept another offer of the need.", reason="PROVIDER_GONE"
            )
        quarter = quarter_of(now.date())
        if offer.holds_place:  # of the quarter that the offer was made in
            quarter = await places_store.held_quarter(connection, match_id(offer.id)) or quarter
        match = Match(
            id=match_id(offer.id),
            need_id=offer.need_id,
            offer_id=offer.id,
            firm_id=offer.firm_id,
            provider_id=offer.provider_id,
            partner_id=provider.partner_id,
            quarter=quarter,
            accepted=now,
            accepted_by=caller.credential_id,
            correlation_id=offer.correlation_id,
            engage_by=now + self._limits.engage_within,
        )
        asked = places_store.Ask(match.id, match.provider_id, match.quarter, now + self._limits.engage_within)
        held = (await places_store.reserve(connection, [asked]))[match.id]
        if offer.holds_place and held is Held.HELD:
            await places_store.extend(connection, [match.id], now + self._limits.engage_within)
        if held is not Held.HELD:
            capacity_refused_total.inc()
            raise Conflict(
                "The provider has no place left in this quarter; accept another offer of the need.",
                reason="CAPACITY_FULL",
            )
        await matches_store.add_match(connection, match)
        await publish_match(connection, match)
        await notices_store.add_notices(connection, [notices.of_acceptance(match, offer)])
        by = caller.credential_id
        await offers_store.decide_offer(connection, offer.id, OfferState.ACCEPTED, decided=now, by=by, reason="")
        accepted = replace(offer, state=OfferState.ACCEPTED, decided=now, match_id=match.id)
        await publish_offers(connection, [accepted])
        return match

    async def _accepted(self, connection: Connection, offer: Offer) -> tuple[Match, Offer]:
        match, current = (
            await matches_store.match_of_offer(connection, offer.id),
            await offers_store.offer(connection, offer.id),
        )
        assert match is not None, f"offer {offer.id} is accepted and has no match"
        assert current is not None
        return match, current

    async def decline_offer(self, caller: Caller, offer_id: str, reason: str) -> Offer:
        """By the firm, or by the partner for its provider. A repeat changes nothing. The last one closes the need."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        if not reason.strip():
            raise Invalid("Say why; it makes the next offers better.", reason="REASON_MISSING")
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            offer, need = await self._lock_offer(connection, caller, offer_id)
            if offer.state is not OfferState.DECLINED:
                _check_open(offer)
                with correlated(need.correlation_id):
                    now = self._now()
                    offer = replace(offer, state=OfferState.DECLINED, decided=now, decision_reason=reason.strip())
                    await offers_store.decide_offer(
                        connection,
                        offer.id,
                        offer.state,
                        decided=now,
                        by=caller.credential_id,
                        reason=offer.decision_reason,
                    )
                    await self._give_back(connection, [offer])
                    await publish_offers(connection, [offer])
                    await self._close_if_done(connection, need)
        self._relay.kick()
        return offer_as_seen_by(caller, offer)

    async def _lock_offer(self, connection: Connection, caller: Caller, offer_id: str) -> tuple[Offer, Need]:
        """The offer as it is now, with its need held. Raises NotFound for what the caller may not see."""
        found = await offers_store.offer(connection, known_form(offer_id))
        if found is None or not sees_offer(caller, found):
            raise NotFound()
        need = await needs_store.lock_need(connection, found.need_id)
        current = await offers_store.offer(connection, offer_id)
        assert need is not None  # by foreign key
        assert current is not None
        return current, need

    async def lapse_due_offers(self) -> int:
        """Let offers lapse whose time has run out or whose provider is gone; returns how many."""
        now = self._now()
        async with transaction(self._pool) as connection:
            due = await offers_store.due_lapses(connection, now=now, today=now.date(), limit=LAPSES_AT_ONCE_MAX)
        by_need: Mapping[str, dict[str, Lapse]] = defaultdict(dict)
        for each in due:
            by_need[each.need_id][each.offer_id] = each.why
        lapsed = 0
        for need_id, why in by_need.items():
            async with transaction(self._pool) as connection:
                need = await needs_store.lock_need(connection, need_id)
                assert need is not None  # by foreign key
                with correlated(need.correlation_id):
                    for offer in await offers_store.offers_of_need(connection, need_id):
                        if offer.id in why and offer.state is OfferState.MADE:
                            await self._lapse(connection, [offer], why[offer.id])
                            lapsed += 1
                    await self._close_if_done(connection, need)
        if lapsed:
            self._relay.kick()
            log.info("offers lapsed", offers=lapsed)
        return lapsed

    async def offer_again(self) -> int:
        """Make offers for open needs that have none, once there is something new to offer; returns for how many."""
        against = (self._index.change, quarter_of(today(self._clock)))
        if against == self._tried:
            return 0
        offered = 0
        after: tuple[datetime, str] | None = None
        while True:
            async with transaction(self._pool) as connection:
                needs = await needs_store.lock_needs_without_offers(connection, after=after, limit=RETRIES_AT_ONCE_MAX)
                for need in needs:
                    offered += await self._offer_again(connection, need)
            if len(needs) < RETRIES_AT_ONCE_MAX:
                break
            after = (needs[-1].opened, needs[-1].id)
        self._tried = against
        if offered:
            self._relay.kick()
            log.info("offers made for needs that had none", needs=offered)
        return offered

    async def _offer_again(self, connection: Connection, need: Need) -> bool:
        with correlated(need.correlation_id):
            offers, why = await self.choose(connection, need, await self.rank(need))
            await needs_store.set_need_offers(connection, need.id, len(offers), no_offer_reason=why)
            await self.make(connection, offers)
            await tell_of_offers(connection, offers)
        return bool(offers)

    async def _lapse(self, connection: Connection, offers: Sequence[Offer], why: Lapse) -> None:
        if not offers:
            return
        now = self._now()
        for offer in offers:
            await offers_store.decide_offer(connection, offer.id, OfferState.LAPSED, decided=now, by=None, reason=why)
        await self._give_back(connection, offers)
        await publish_offers(
            connection,
            [replace(offer, state=OfferState.LAPSED, decided=now, decision_reason=why) for offer in offers],
        )

    async def _give_back(self, connection: Connection, offers: Sequence[Offer]) -> None:
        held = [match_id(offer.id) for offer in offers if offer.holds_place]
        if held:
            await places_store.release(connection, held, Why.CANCELLED)
            self._index.kick()

    async def _close_if_done(self, connection: Connection, need: Need) -> None:
        if need.state is not NeedState.OPEN:
            return
        if any(offer.state is OfferState.MADE for offer in await offers_store.offers_of_need(connection, need.id)):
            return
        await needs_store.end_need(connection, need.id, NeedState.CLOSED, ended=self._now())
        log.info("need closed", need=need.id)

    # --- shared checks ---------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def offer_for(
    need: Need,
    provider: ProviderRecord,
    ranked: Ranked,
    *,
    rank: int,
    ranker_version: str,
    made: datetime,
    expires: datetime,
) -> Offer:
    """The offer of a provider for a need."""
    return Offer(
        id=offer_id(need.id, provider.id, need.attempt),
        attempt=need.attempt,
        need_id=need.id,
        firm_id=need.firm_id,
        provider_id=provider.id,
        partner_id=provider.partner_id,
        provider_title=provider.title,
        provider_kind=provider.kind,
        rank=rank,
        score=ranked.score,
        parts=dict(ranked.parts),
        reasons=tuple(ranked.reasons),
        ranker_version=ranker_version,
        made=made,
        expires=expires,
        need_text=need.text,
        machine_id=need.machine_id,
        alarm_id=need.alarm_ids[0] if need.alarm_ids else "",
        correlation_id=need.correlation_id,
    )


def _why_none(providers: int, ranking: Ranking) -> NoOffer:
    if not providers:
        return NoOffer.NO_PROVIDER
    full = ranking.ranked or any(each.codes == (FilterCode.NO_CAPACITY,) for each in ranking.excluded)
    return NoOffer.ALL_FULL if full else NoOffer.NONE_FITS


def _check_open(offer: Offer) -> None:
    if offer.state is not OfferState.MADE:
        raise Conflict(
            f"This offer is {offer.state} already; look at the need's other offers.",
            reason=f"OFFER_{offer.state.upper()}",
        )
