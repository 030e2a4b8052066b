"""The use cases of matches: both sides engage, finish and score; either cancels; what nobody engages expires."""

from dataclasses import replace
from datetime import datetime

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Invalid
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.common.outbox import OutboxRelay
from services.matching import notices
from services.matching.index import ProviderIndex
from services.matching.matches import POINTS_MAX, POINTS_MIN, Match, MatchState, Result, Score, Side
from services.matching.needs import CloseReason, Limits, NoOffer, OfferState
from services.matching.service.checks import (
    NOTE_CHARACTERS_MAX,
    before_token,
    check_text,
    page_size_of,
    page_token_of,
)
from services.matching.service.need_life import NeedLife
from services.matching.service.publishing import publish_match, publish_offers
from services.matching.service.rooms import end_rooms_of_match
from services.matching.service.sight import SUPPLIERS, match_seen_by
from services.matching.store import matches as matches_store
from services.matching.store import needs as needs_store
from services.matching.store import notices as notices_store
from services.matching.store import offers as offers_store
from services.matching.store import places as places_store
from services.matching.store import providers as providers_store
from services.matching.store.places import Why

log = get_logger(__name__)

EXPIRIES_AT_ONCE_MAX = 200
CLOSINGS_AT_ONCE_MAX = 200

_PARTIES = (Role.FIRM, *SUPPLIERS, Role.OPERATOR)


class Matches:
    """Firms and providers that were brought together, and what comes of it."""

    def __init__(
        self, pool: Pool, index: ProviderIndex, relay: OutboxRelay, life: NeedLife, *, clock: Clock, limits: Limits
    ) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._life = life
        self._clock = clock
        self._limits = limits

    async def list_matches(
        self, caller: Caller, *, state: MatchState | None, page_size: int, page_token: str
    ) -> tuple[list[Match], str]:
        """A page of the caller's matches, newest first, and the token of the next ("": there is none)."""
        caller.require(*_PARTIES)
        limit = page_size_of(page_size)
        async with transaction(self._pool) as connection:
            found = await matches_store.list_matches(
                connection,
                firm_id=caller.firm_id if caller.role is Role.FIRM else 0,
                partner_id=caller.partner_id if caller.role is Role.PARTNER else 0,
                provider_id=caller.provider_id if caller.role is Role.PROVIDER else "",
                state=state,
                before=before_token(page_token),
                limit=limit + 1,
            )
        token = page_token_of(found[limit - 1].accepted, found[limit - 1].id) if len(found) > limit else ""
        return [_as_seen_by(caller, match) for match in found[:limit]], token

    async def get_match(self, caller: Caller, match_id: str) -> Match:
        caller.require(*_PARTIES)
        async with transaction(self._pool) as connection:
            return _as_seen_by(caller, await match_seen_by(connection, caller, match_id))

    async def engage(self, caller: Caller, match_id: str) -> Match:
        """Both sides work together from now on, and the place is kept for good. A repeat changes nothing."""
        caller.require(*_PARTIES)
        async with transaction(self._pool) as connection:
            match = await self._lock(connection, caller, match_id)
            if match.state is not MatchState.ENGAGED:
                _require(match, MatchState.ACCEPTED)
                await places_store.confirm(connection, [match.id])
                match = await self._keep(connection, replace(match, state=MatchState.ENGAGED, engaged=self._now()))
                offer = await offers_store.offer(connection, match.offer_id)
                assert offer is not None  # by foreign key
                told = [notices.of_engaged_match(match, offer, side) for side in _others(caller)]
                await notices_store.add_notices(connection, told)
        self._relay.kick()
        return _as_seen_by(caller, match)

    async def finish(self, caller: Caller, match_id: str, result: Result, note: str) -> Match:
        """The work is done. Both sides are asked to score it within a while, in which the firm may correct the result. A repeat
        with the same result changes nothing."""
        caller.require(*_PARTIES)
        check_text("note", note, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            match = await self._lock(connection, caller, match_id)
            if match.finished is None or match.result is not result:
                _require(match, MatchState.ENGAGED, *([MatchState.FINISHED] if caller.role is Role.FIRM else []))
                now = self._now()
                match = await self._keep(
                    connection,
                    replace(
                        match,
                        state=MatchState.FINISHED,
                        finished=now,
                        result=result,
                        result_note=note.strip(),
                        scores_until=match.scores_until or now + self._limits.scores_for,
                    ),
                )
                offer = await offers_store.offer(connection, match.offer_id)
                assert offer is not None  # by foreign key
                told = [notices.of_finished_match(match, offer, side) for side in Side]
                await notices_store.add_notices(connection, told)
        self._relay.kick()
        return _as_seen_by(caller, match)

    async def score(self, caller: Caller, match_id: str, points: int, comment: str) -> Match:
        """Give or change the score of the caller's side. That of the firm bears on rankings of the provider once the match is
        closed."""
        caller.require(Role.FIRM, *SUPPLIERS)
        if not POINTS_MIN <= points <= POINTS_MAX:
            raise Invalid(f"points are {POINTS_MIN} (poor) to {POINTS_MAX} (excellent).", reason="BAD_POINTS")
        check_text("comment", comment, NOTE_CHARACTERS_MAX)
        side = Side.FIRM if caller.role is Role.FIRM else Side.PARTNER
        async with transaction(self._pool) as connection:
            match = await self._lock(connection, caller, match_id)
            _require(match, MatchState.FINISHED)
            score = Score(side=side, points=points, comment=comment.strip(), scored=self._now())
            await matches_store.put_score(connection, match.id, score, by=caller.credential_id)
            match = replace(match, scores=(*(each for each in match.scores if each.side is not side), score))
        log.info("match scored", match=match.id, side=side, points=points)
        return _as_seen_by(caller, match)

    async def cancel(self, caller: Caller, match_id: str, reason: str, *, reopen: bool) -> Match:
        """The place is given back, and the need opened again or closed. A repeat changes nothing."""
        caller.require(*_PARTIES)
        if not reason.strip():
            raise Invalid("Say why; the other side will read it.", reason="REASON_MISSING")
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            match = await self._lock(connection, caller, match_id)
            if match.state is not MatchState.CANCELLED:
                _require(match, MatchState.ACCEPTED, MatchState.ENGAGED)
                match = replace(match, state=MatchState.CANCELLED, ended=self._now(), end_reason=reason.strip())
                await self._undo(connection, match, Why.CANCELLED, by=caller, reopen=reopen)
        self._relay.kick()
        self._index.kick()
        return _as_seen_by(caller, match)

    # --- upkeep ----------------------------------------------------------------------------------------------------

    async def expire_due_matches(self) -> int:
        """Let matches expire that nobody has engaged in time; returns how many."""
        now, expired = self._now(), 0
        async with transaction(self._pool) as connection:
            due = await places_store.due(connection, now=now, limit=EXPIRIES_AT_ONCE_MAX)
        for match_id in due:
            async with transaction(self._pool) as connection:
                match = await self._hold(connection, match_id)
                if match is None:  # of an offer that has lapsed
                    await places_store.release(connection, [match_id], Why.EXPIRED)
                    continue
                if match.state is not MatchState.ACCEPTED:
                    continue
                match = replace(match, state=MatchState.EXPIRED, ended=now, end_reason="NOBODY_ENGAGED")
                await self._undo(connection, match, Why.EXPIRED, by=None, reopen=True)
                expired += 1
        if expired:
            self._relay.kick()
            self._index.kick()
        return expired

    async def close_due_matches(self) -> int:
        """Close finished matches whose time for scores has run out; returns how many."""
        now, closed = self._now(), 0
        async with transaction(self._pool) as connection:
            due = await matches_store.due_closings(connection, now=now, limit=CLOSINGS_AT_ONCE_MAX)
        for match_id in due:
            async with transaction(self._pool) as connection:
                match = await self._hold(connection, match_id)
                if match is not None and match.state is MatchState.FINISHED:
                    await self._keep(connection, replace(match, state=MatchState.CLOSED, ended=now))
                    if any(score.side is Side.FIRM for score in match.scores):
                        change = await providers_store.next_provider_change(connection)
                        await providers_store.lock_provider(connection, match.provider_id)
                        await providers_store.set_outcomes(connection, match.provider_id, change=change)
                    closed += 1
        if closed:
            self._relay.kick()
            self._index.kick()
        return closed

    # --- inside ----------------------------------------------------------------------------------------------------

    async def _lock(self, connection: Connection, caller: Caller, match_id: str) -> Match:
        """The match as it is now, with its need held. Raises NotFound for what the caller may not see."""
        await match_seen_by(connection, caller, match_id)
        match = await self._hold(connection, match_id)
        assert match is not None  # it was seen
        return match

    async def _hold(self, connection: Connection, match_id: str) -> Match | None:
        found = await matches_store.match(connection, match_id)
        if found is None:
            return None
        await needs_store.lock_need(connection, found.need_id)
        return await matches_store.match(connection, match_id)

    async def _keep(self, connection: Connection, match: Match, *, by: int | None = None) -> Match:
        with correlated(match.correlation_id):
            await matches_store.keep_match(connection, match, by=by)
            if match.state not in (MatchState.ACCEPTED, MatchState.ENGAGED):
                await end_rooms_of_match(connection, match.id, ended=match.changed)
            await publish_match(connection, match)
            log.info("match changed", match=match.id, state=match.state, need=match.need_id, provider=match.provider_id)
        return match

    async def _undo(self, connection: Connection, match: Match, why: Why, *, by: Caller | None, reopen: bool) -> None:
        """The match came to nothing: its place, its offer and its need follow, and whoever did not end it is told. The match must
        be held and standing. `by` None: the hub, when its time was over."""
        credential_id = by.credential_id if by else None
        given_back = await places_store.release(connection, [match.id], why)
        assert given_back == {match.id}, f"match {match.id} stood without a place"
        await self._keep(connection, match, by=credential_id)
        offer = await offers_store.offer(connection, match.offer_id)
        assert offer is not None and match.ended is not None  # noqa: PT018  by foreign key; whoever ends a match says when
        reason = match.end_reason
        with correlated(match.correlation_id):
            await offers_store.decide_offer(
                connection, offer.id, OfferState.CANCELLED, decided=match.ended, by=credential_id, reason=reason
            )
            cancelled = replace(offer, state=OfferState.CANCELLED, decided=match.ended, decision_reason=reason)
            await publish_offers(connection, [cancelled])
        if offer.machine_id:
            await needs_store.lock_machines(connection, {offer.machine_id})
        is_shared = await needs_store.is_shared(connection, match.need_id, now=match.ended)
        reopened = reopen and is_shared and await self._life.seek_again(connection, match.need_id, NoOffer.MATCH_ENDED)
        if not reopened:
            why_closed = CloseReason.MATCH_ENDED if is_shared else CloseReason.CONSENT_ENDED
            await needs_store.close_need(connection, match.need_id, why_closed, note=reason, ended=match.ended)
        told = [notices.of_ended_match(match, offer, side, reopened=reopened) for side in _others(by)]
        await notices_store.add_notices(connection, told)

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _others(by: Caller | None) -> list[Side]:
    """The sides that did not do it themselves; None: the hub did."""
    return [side for side in Side if by is None or by.role.value != side.value]


def _as_seen_by(caller: Caller, match: Match) -> Match:
    """Neither side sees the other's score while it may still change its own."""
    if caller.role is Role.OPERATOR or match.state is MatchState.CLOSED:
        return match
    side = Side.FIRM if caller.role is Role.FIRM else Side.PARTNER
    return replace(match, scores=tuple(score for score in match.scores if score.side is side))


def _require(match: Match, *states: MatchState) -> None:
    if match.state not in states:
        raise Conflict(
            f"This match is {match.state}; that is for one that is {' or '.join(states)}.",
            reason=f"MATCH_{match.state.upper()}",
        )
