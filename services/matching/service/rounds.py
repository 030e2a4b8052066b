"""The use cases of rounds: started by an operator or by schedule, carried out once, also across a restart."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, current_correlation_id, get_logger
from services.common.outbox import OutboxRelay
from services.matching.index import ProviderIndex
from services.matching.needs import Limits, Need, NoOffer, Origin, match_id, offer_id, quarter_of
from services.matching.ranking import Ranker
from services.matching.rounds import Outcome, Place, Round, needs_at_once, place_needs
from services.matching.service.checks import CHOSEN_ID
from services.matching.service.notices import tell_of_offers
from services.matching.service.offers import PLACE_GRACE, Offers, offer_for
from services.matching.store import needs as needs_store
from services.matching.store import offers as offers_store
from services.matching.store import places as places_store
from services.matching.store import providers as providers_store
from services.matching.store import rounds as rounds_store
from services.matching.store.places import Ask, Held
from services.matching.text import Vectors, stored, vector_of

log = get_logger(__name__)

# Needs whose offers are stored in one transaction; others may accept offers in between.
CHUNK_NEEDS = 500
ROUNDS_SHOWN_MAX = 100
# Times that what found its place taken meanwhile is placed anew.
PASSES_MAX = 5


class Rounds:
    """Places the needs that wait, all at once and stably."""

    def __init__(
        self, pool: Pool, index: ProviderIndex, relay: OutboxRelay, offers: Offers, *, clock: Clock, limits: Limits
    ) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._offers = offers
        self._clock = clock
        self._limits = limits

    async def start_round(self, caller: Caller, round_id: str) -> Round:
        """Begin a round, which is carried out in the background. A repeat with the same id begins no second one."""
        caller.require(Role.OPERATOR)
        if not CHOSEN_ID.fullmatch(round_id):
            raise Invalid(
                "A round_id has 1 to 64 letters, digits, dots, dashes and underscores.", reason="BAD_ROUND_ID"
            )
        async with transaction(self._pool) as connection:
            await self._begin(connection, round_id, by=caller.credential_id)
            found = await rounds_store.round_by_id(connection, round_id)
            assert found is not None  # it was begun or known
        return found

    async def get_round(self, caller: Caller, round_id: str) -> Round:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            found = await rounds_store.round_by_id(connection, round_id) if CHOSEN_ID.fullmatch(round_id) else None
        if found is None:
            raise NotFound(f"There is no round {round_id}.")
        return found

    async def list_rounds(self, caller: Caller) -> list[Round]:
        """The newest, newest first."""
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await rounds_store.list_rounds(connection, limit=ROUNDS_SHOWN_MAX)

    # --- in the background -----------------------------------------------------------------------------------------

    async def start_scheduled(self) -> None:
        """Begin the round of this period where needs wait, at most one a period, whichever process comes first."""
        if not self._limits.round_every:
            return
        every_us = self._limits.round_every // timedelta(microseconds=1)
        period = from_us(self._clock.now_us() // every_us * every_us)
        async with transaction(self._pool) as connection:
            if await rounds_store.any_waiting(connection):
                await self._begin(connection, f"scheduled-{period:%Y%m%dT%H%M%S}", by=None)

    async def carry_out(self) -> bool:
        """Carry out a round that was begun, here or by a process that died over it; False where there is none."""
        async with transaction(self._pool) as claim:
            if not await rounds_store.lock_rounds(claim):
                return False
            running = await rounds_store.next_running_round(claim)
            if running is None:
                return False
            with correlated(running.correlation_id):
                await self._carry_out(running)
        return True

    async def _carry_out(self, running: Round) -> None:
        for _ in range(PASSES_MAX):
            outcome, lost = await self._pass(running)
            if not lost:
                break
        unplaced = {**outcome.unserved, **dict.fromkeys(lost, NoOffer.ALL_FULL)}
        if not len(self._index):
            unplaced = dict.fromkeys(unplaced, NoOffer.NO_PROVIDER)
        async with transaction(self._pool) as connection:
            await rounds_store.set_unplaced(connection, unplaced, now=self._now())
            await rounds_store.end_round(
                connection,
                running.id,
                ended=self._now(),
                unplaced=len(unplaced),
                ranker_version=self._index.version,
            )
        log.info("round done", round=running.id, unplaced=len(unplaced))

    async def _pass(self, running: Round) -> tuple[Outcome, Sequence[str]]:
        """Place what waits; returns how that went, and the needs whose place was gone when it was to be stored."""
        await self._index.refresh()
        day = self._now().date()
        async with transaction(self._pool) as connection:
            found = await providers_store.live_providers(connection, quarter=quarter_of(day), today=day)
            providers = {each.id: each.for_ranking() for each in found}
            waiting = await rounds_store.waiting_needs(
                connection,
                opened_by=running.started,
                limit=needs_at_once(len(providers)),
            )
            waiting.sort(key=lambda need: need.id)
            out = await offers_store.providers_out(connection, [need.id for need in waiting])
        if not waiting:
            return Outcome(places=(), unserved={}, lost=(), blocking_pairs=0), ()
        needs = [need.for_ranking() for need in waiting]
        questions = await self._questions(waiting)

        def compute(ranker: Ranker) -> Outcome:
            known = {each: providers[each] for each in ranker.provider_ids() if each in providers}
            return place_needs(ranker, needs, questions, providers=known, out=out)

        outcome = await self._index.compute(compute)
        if outcome.blocking_pairs:
            log.error("round is not stable", round=running.id, blocking_pairs=outcome.blocking_pairs)
            async with transaction(self._pool) as connection:
                await rounds_store.count_in_round(connection, running.id, blocking_pairs=outcome.blocking_pairs)
        lost = list(outcome.lost)
        for start in range(0, len(outcome.places), CHUNK_NEEDS):
            lost += await self._store(running, outcome.places[start : start + CHUNK_NEEDS])
        return outcome, lost

    async def _questions(self, needs: Sequence[Need]) -> Vectors:
        """One vector a need; those not known are computed and kept."""
        model = self._index.model_id
        async with transaction(self._pool) as connection:
            known = await needs_store.vectors(connection, [need.id for need in needs], model=model)
        missing = [need for need in needs if need.id not in known]
        for start in range(0, len(missing), CHUNK_NEEDS):
            made = await self._index.compute(functools.partial(_made, missing[start : start + CHUNK_NEEDS]))
            async with transaction(self._pool) as connection:
                await needs_store.keep_vectors(connection, made, model=model)
            known |= made
        return np.stack([vector_of(known[need.id]) for need in needs])

    async def _store(self, running: Round, places: Sequence[Place]) -> list[str]:
        """Make the offers, each with its place reserved; returns the needs whose place was gone."""
        now = self._now()
        quarter = quarter_of(now.date())
        expires = now + self._limits.offer_lifetime
        async with transaction(self._pool) as connection:
            needs = await rounds_store.lock_waiting(connection, [place.need_id for place in places])
            # Before the providers are looked at: none is withdrawn from here on; see next_provider_change.
            await providers_store.next_provider_change(connection)
            known = await providers_store.providers_by_id(connection, [place.provider_id for place in places])
            live = {each.id: each for each in known.values() if each.is_live(now.date())}
            standing = [place for place in places if place.need_id in needs and place.provider_id in live]
            ids = {
                place.need_id: offer_id(place.need_id, place.provider_id, needs[place.need_id].attempt)
                for place in standing
            }
            asks = [
                Ask(match_id(ids[place.need_id]), place.provider_id, quarter, expires + PLACE_GRACE)
                for place in standing
            ]
            held = await places_store.reserve(connection, asks)
            got = [place for place in standing if held[match_id(ids[place.need_id])] is Held.HELD]
            offers = [
                replace(
                    offer_for(
                        needs[place.need_id],
                        live[place.provider_id],
                        place.ranked,
                        rank=place.better + 1,
                        ranker_version=self._index.version,
                        made=now,
                        expires=expires,
                    ),
                    reasons=place.reasons(running.id),
                    origin=Origin.ROUND,
                    round_id=running.id,
                    holds_place=True,
                )
                for place in got
            ]
            await self._offers.make(connection, offers)
            await tell_of_offers(connection, offers)
            await rounds_store.set_placed(connection, [offer.need_id for offer in offers])
            await rounds_store.count_in_round(
                connection, running.id, offers=len(offers), from_safety_net=sum(each.from_safety_net for each in got)
            )
        self._relay.kick()
        placed = {offer.need_id for offer in offers}
        return [place.need_id for place in places if place.need_id in needs.keys() - placed]

    async def _begin(self, connection: Connection, round_id: str, *, by: int | None) -> None:
        begun = await rounds_store.begin_round(
            connection, round_id, started=self._now(), by=by, correlation_id=current_correlation_id()
        )
        if begun:
            log.info("round begun", round=round_id, by=by)

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _made(needs: Sequence[Need], ranker: Ranker) -> dict[str, bytes]:
    return {need.id: stored(ranker.question(need.text)) for need in needs}
