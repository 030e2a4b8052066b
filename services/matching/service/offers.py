"""The use cases of offers: made from a ranking, seen, accepted, declined, lapsed, made again."""

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from datetime import datetime, timedelta

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
    CloseReason,
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
from services.matching.service.need_life import NeedLife, standing_offers
from services.matching.service.notices import tell_of_offers
from services.matching.service.publishing import publish_match, publish_offers
from services.matching.service.sight import SUPPLIERS, need_seen_by, offer_as_seen_by, sees_offer
from services.matching.store import matches as matches_store
from services.matching.store import needs as needs_store
from services.matching.store import notices as notices_store
from services.matching.store import offers as offers_store
from services.matching.store import places as places_store
from services.matching.store import providers as providers_store
from services.matching.store.needs import Tried
from services.matching.store.places import Held
from services.matching.text import Vector, stored, vector_of

log = get_logger(__name__)

# First look: more than the offers of a need, for those that are full.
CANDIDATES_FIRST = 20
WIDEN_BY = 10
LAPSES_AT_ONCE_MAX = 200
# Needs without offers that are ranked anew in one turn of the upkeep, some milliseconds each.
TRIES_AT_ONCE_MAX = 50
# A place that is reserved for an offer outlasts it by so much: giving it back is the offer's lapse, not the place's.
PLACE_GRACE = timedelta(hours=1)

# Acceptances refused because the provider had no place left.
capacity_refused_total = Counter("smdih_matching_capacity_refused_total", "Acceptances refused for want of a place")


class Offers:
    """Providers proposed for needs, and what becomes of it."""

    def __init__(
        self, pool: Pool, index: ProviderIndex, relay: OutboxRelay, life: NeedLife, *, clock: Clock, limits: Limits
    ) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._life = life
        self._clock = clock
        self._limits = limits

    async def rank(self, need: Need, limit: int = CANDIDATES_FIRST, *, question: Vector | None = None) -> Ranking:
        return await self._index.rank(need.for_ranking(), limit, question=question)

    async def choose(self, connection: Connection, need: Need, ranking: Ranking) -> tuple[list[Offer], str]:
        """The best providers with a free place, or why there is none. Looks further down than `ranking` while places are short."""
        now = self._now()
        out = (await offers_store.providers_out(connection, [need.id])).get(need.id, set())
        limit = CANDIDATES_FIRST
        while True:
            bookable = await providers_store.bookable_providers(
                connection,
                [each.provider_id for each in ranking.ranked],
                quarter=quarter_of(now.date()),
                today=now.date(),
            )
            chosen = [each for each in ranking.ranked if each.provider_id in bookable.keys() - out]
            chosen = chosen[: self._limits.offers_max]
            whole = len(ranking.ranked) < limit or limit >= self._limits.candidates_max
            if len(chosen) == self._limits.offers_max or whole:
                break
            limit = min(limit * WIDEN_BY, self._limits.candidates_max)
            ranking = await self.rank(need, limit, question=ranking.question)
        if not chosen:
            why = _why_none(len(self._index), ranking, out)
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
        """Take a place of the provider and make the match; the need's other offers lapse. A repeat gives the same answer.

        Raises Conflict where the provider is full; the offer has lapsed then, as have others that are full, and more follow if none
        is left.
        """
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            offer, need = await self._lock_offer(connection, caller, offer_id)
            if offer.state is OfferState.ACCEPTED:
                return await self._accepted(connection, offer)
            if offer.state is OfferState.LAPSED and offer.decision_reason == Lapse.FULL:
                raise _full()
            _check_open(offer)
            with correlated(need.correlation_id):
                match = await self._match(connection, caller, offer)
                if match is None:
                    full = await self._full_too(connection, need)
                    await self._life.lapse(
                        connection, [offer, *(each for each in full if each.id != offer.id)], Lapse.FULL
                    )
                    await self._life.bereft(connection, need)
                else:
                    others = await standing_offers(connection, need.id)
                    await self._life.lapse(connection, others, Lapse.OTHER_ACCEPTED)
                    await needs_store.match_need(connection, need.id, ended=match.accepted)
                    accepted = await self._accepted(connection, offer)
        self._relay.kick()
        self._index.kick()
        if match is None:
            capacity_refused_total.inc()
            raise _full()
        log.info("offer accepted", offer=offer.id, need=need.id, match=match.id, provider=offer.provider_id)
        return accepted

    async def _match(self, connection: Connection, caller: Caller, offer: Offer) -> Match | None:
        """None: the provider has no place left."""
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
            return None
        await matches_store.add_match(connection, match)
        await publish_match(connection, match)
        await notices_store.add_notices(connection, [notices.of_acceptance(match, offer)])
        by = caller.credential_id
        await offers_store.decide_offer(connection, offer.id, OfferState.ACCEPTED, decided=now, by=by, reason="")
        accepted = replace(offer, state=OfferState.ACCEPTED, decided=now, match_id=match.id)
        await publish_offers(connection, [accepted])
        return match

    async def _full_too(self, connection: Connection, need: Need) -> list[Offer]:
        """Offers of the need that cannot be accepted either, so that the firm need not find out one by one."""
        day = self._now().date()
        asked = [each for each in await standing_offers(connection, need.id) if not each.holds_place]
        ids = [each.provider_id for each in asked]
        live = await providers_store.providers_by_id(connection, ids)
        bookable = await providers_store.bookable_providers(connection, ids, quarter=quarter_of(day), today=day)
        return [each for each in asked if live[each.provider_id].is_live(day) and each.provider_id not in bookable]

    async def _accepted(self, connection: Connection, offer: Offer) -> tuple[Match, Offer]:
        match = await matches_store.match_of_offer(connection, offer.id)
        assert match is not None, f"offer {offer.id} is accepted and has no match"
        return match, await self._offer(connection, offer.id)

    async def decline_offer(self, caller: Caller, offer_id: str, reason: str) -> Offer:
        """By the firm, or by the partner for its provider. A repeat changes nothing.

        The firm's own no to the last one closes the need; after anybody else's others follow.
        """
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        if not reason.strip():
            raise Invalid("Say why; it makes the next offers better.", reason="REASON_MISSING")
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            offer, need = await self._lock_offer(connection, caller, offer_id)
            if offer.state is not OfferState.DECLINED:
                _check_open(offer)
                with correlated(need.correlation_id):
                    await self._life.end_offers(
                        connection, [offer], OfferState.DECLINED, reason.strip(), by=caller.credential_id
                    )
                    if caller.role is Role.FIRM:
                        await self._life.answered(connection, need, CloseReason.DECLINED)
                    else:
                        await self._life.bereft(connection, need)
                    offer = await self._offer(connection, offer.id)
        self._relay.kick()
        self._index.kick()
        return offer_as_seen_by(caller, offer)

    async def _lock_offer(self, connection: Connection, caller: Caller, offer_id: str) -> tuple[Offer, Need]:
        """The offer as it is now, with its need held. Raises NotFound for what the caller may not see."""
        found = await offers_store.offer(connection, known_form(offer_id))
        if found is None or not sees_offer(caller, found):
            raise NotFound()
        need = await needs_store.lock_need(connection, found.need_id)
        assert need is not None  # by foreign key
        return await self._offer(connection, offer_id), need

    async def _offer(self, connection: Connection, offer_id: str) -> Offer:
        found = await offers_store.offer(connection, offer_id)
        assert found is not None  # offers are never removed
        return found

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
                    for offer in await standing_offers(connection, need_id):
                        if offer.id in why:
                            await self._life.lapse(connection, [offer], why[offer.id])
                            lapsed += 1
                    if Lapse.EXPIRED in why.values():
                        await self._life.answered(connection, need, CloseReason.NOT_ANSWERED)
                    else:
                        await self._life.bereft(connection, need)
        if lapsed:
            self._relay.kick()
            self._index.kick()
            log.info("offers lapsed", offers=lapsed)
        return lapsed

    async def offer_again(self) -> int:
        """Make offers for open needs that have none, where there is something new to offer; returns for how many.

        A bounded number a call, those that were tried longest ago first; so the upkeep goes on meanwhile.
        """
        against = Tried(self._index.change, quarter_of(today(self._clock)))
        model = self._index.model_id
        async with transaction(self._pool) as connection:
            needs = await needs_store.needs_to_try(connection, against, limit=TRIES_AT_ONCE_MAX)
            vectors = await needs_store.vectors(connection, [need.id for need in needs], model=model)
        offered = 0
        for need in needs:
            known = vectors.get(need.id)
            # Before the transaction: neither a connection nor the need is held while a thread computes.
            ranking = await self.rank(need, question=None if known is None else vector_of(known))
            async with transaction(self._pool) as connection:
                current = await needs_store.lock_need(connection, need.id)
                assert current is not None  # it was found
                if current.state is not NeedState.OPEN or current.offers or current.waits:
                    continue
                if known is None and ranking.question is not None:
                    await needs_store.keep_vectors(connection, {need.id: stored(ranking.question)}, model=model)
                offered += await self._offer_again(connection, current, ranking, against)
        if offered:
            self._relay.kick()
            log.info("offers made for needs that had none", needs=offered)
        return offered

    async def _offer_again(self, connection: Connection, need: Need, ranking: Ranking, against: Tried) -> bool:
        with correlated(need.correlation_id):
            offers, why = await self.choose(connection, need, ranking)
            await needs_store.set_need_offers(connection, need.id, len(offers), no_offer_reason=why, tried=against)
            await self.make(connection, offers)
            await tell_of_offers(connection, offers)
        return bool(offers)

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


def _why_none(providers: int, ranking: Ranking, out: Set[str]) -> NoOffer:
    if not providers:
        return NoOffer.NO_PROVIDER
    left = {each.provider_id for each in ranking.ranked} - out
    full = left or any(each.codes == (FilterCode.NO_CAPACITY,) for each in ranking.excluded)
    return NoOffer.ALL_FULL if full else NoOffer.NONE_FITS


def _full() -> Conflict:
    return Conflict(
        "The provider has no place left in this quarter, so this offer has lapsed; accept another offer of the need. If this was "
        "its last, others follow.",
        reason="CAPACITY_FULL",
    )


def _check_open(offer: Offer) -> None:
    if offer.state is not OfferState.MADE:
        raise Conflict(
            f"This offer is {offer.state} already; look at the need's other offers.",
            reason=f"OFFER_{offer.state.upper()}",
        )
