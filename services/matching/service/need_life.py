"""The life of a need: its firm, its match or its time closes it; whoever else ends its last offer makes it get others."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from services.common.clock import Clock, from_us
from services.common.database import Connection
from services.common.logs import correlated, get_logger
from services.matching import notices
from services.matching.needs import (
    CloseReason,
    Lapse,
    Limits,
    Need,
    NeedState,
    NoOffer,
    Offer,
    OfferState,
    Origin,
    match_id,
)
from services.matching.service.publishing import publish_offers
from services.matching.store import needs as needs_store
from services.matching.store import notices as notices_store
from services.matching.store import offers as offers_store
from services.matching.store import places as places_store
from services.matching.store.places import Why

log = get_logger(__name__)


class NeedLife:
    """Works in the caller's transaction, which holds the need."""

    def __init__(self, *, clock: Clock, limits: Limits) -> None:
        self._clock = clock
        self._limits = limits

    async def end_offers(
        self, connection: Connection, offers: Sequence[Offer], state: OfferState, reason: str, *, by: int | None = None
    ) -> None:
        """They are declined or lapse, and their places are free again. `by` None: the hub."""
        if not offers:
            return
        now = self._now()
        for offer in offers:
            await offers_store.decide_offer(connection, offer.id, state, decided=now, by=by, reason=reason)
        held = [match_id(offer.id) for offer in offers if offer.holds_place]
        if held:
            await places_store.release(connection, held, Why.CANCELLED)
        ended = [replace(offer, state=state, decided=now, decision_reason=reason) for offer in offers]
        await publish_offers(connection, ended)

    async def lapse(self, connection: Connection, offers: Sequence[Offer], why: Lapse) -> None:
        await self.end_offers(connection, offers, OfferState.LAPSED, why)

    async def answered(self, connection: Connection, need: Need, reason: CloseReason) -> None:
        """The firm has ended an offer, or let it run out: if that was the last, the need is closed. One that waits goes on."""
        if need.state is not NeedState.OPEN:
            return
        if not need.offers:
            await needs_store.try_anew(connection, need.id)
        elif not await standing_offers(connection, need.id):
            await self.close(connection, need, reason)

    async def bereft(self, connection: Connection, need: Need) -> None:
        """Somebody else has ended an offer: if none is left but proposals, others follow. One that waits goes on waiting."""
        if need.state is not NeedState.OPEN:
            return
        standing = await standing_offers(connection, need.id)
        if not need.offers:
            await needs_store.try_anew(connection, need.id)
        elif all(offer.origin is Origin.PARTNER for offer in standing):
            await self.seek_again(connection, need.id, NoOffer.OFFERS_ENDED)
            await notices_store.add_notices(connection, [notices.of_ended_offers(need, self._now())])
            log.info("need seeks again", need=need.id)

    async def seek_again(self, connection: Connection, need_id: str, why: NoOffer) -> bool:
        """It is open and gets offers of a new attempt; False where its machine has another open need."""
        expires = self._now() + self._limits.need_lifetime
        return await needs_store.seek_again(connection, need_id, why, expires=expires)

    async def close(self, connection: Connection, need: Need, reason: CloseReason, *, note: str = "") -> Need:
        """Its offers lapse, and its firm is told."""
        now = self._now()
        with correlated(need.correlation_id):
            await self.lapse(connection, await standing_offers(connection, need.id), Lapse.NEED_CLOSED)
            await needs_store.close_need(connection, need.id, reason, note=note, ended=now)
            closed = replace(need, state=NeedState.CLOSED, ended=now, close_reason=reason, close_note=note)
            await notices_store.add_notices(connection, [notices.of_closed_need(closed)])
            log.info("need closed", need=need.id, reason=reason)
        return closed

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


async def standing_offers(connection: Connection, need_id: str) -> list[Offer]:
    found = await offers_store.offers_of_need(connection, need_id)
    return [offer for offer in found if offer.state is OfferState.MADE]
