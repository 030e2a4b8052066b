"""The desk of regional partners: needs that firms let them see, and proposals of their own providers."""

from dataclasses import replace
from datetime import datetime

from services.common.clock import Clock, from_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Forbidden, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.common.outbox import OutboxRelay
from services.matching.domain import FilterCode, canonical_region
from services.matching.index import ProviderIndex
from services.matching.needs import Limits, Need, NeedState, Offer, OfferState, Origin, quarter_of
from services.matching.ranking import Ranked, Ranker, UnknownProviderError
from services.matching.service.checks import (
    KNOWN_TIMEOUT_S,
    NOTE_CHARACTERS_MAX,
    before_token,
    check_text,
    chosen_id,
    known_form,
    page_size_of,
    page_token_of,
)
from services.matching.service.notices import tell_of_offers
from services.matching.service.offers import Offers, offer_for
from services.matching.service.sight import offer_as_seen_by
from services.matching.store import needs as needs_store
from services.matching.store import offers as offers_store
from services.matching.store import providers as providers_store

log = get_logger(__name__)

# Offers of one need that are open at a time, proposals among them.
OPEN_OFFERS_MAX = 20


class Desk:
    """What partners see of needs that nobody has taken up, their own region's first."""

    def __init__(
        self,
        pool: Pool,
        index: ProviderIndex,
        relay: OutboxRelay,
        directory: Directory,
        offers: Offers,
        *,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._directory = directory
        self._offers = offers
        self._clock = clock
        self._limits = limits

    async def shown_needs(self, caller: Caller, *, page_size: int, page_token: str) -> tuple[list[Need], str]:
        """A page of open needs that the caller may see, newest first, without whose they are, and the token of the next."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        limit = page_size_of(page_size)
        region = await self._region(caller)
        async with transaction(self._pool) as connection:
            found = await needs_store.shown_needs(
                connection,
                region=region,
                opened_by=self._now() - self._limits.regional_head_start,
                before=before_token(page_token),
                limit=limit + 1,
            )
        token = page_token_of(found[limit - 1].opened, found[limit - 1].id) if len(found) > limit else ""
        return [_without_firm(need) for need in found[:limit]], token

    async def propose(self, caller: Caller, need_id: str, provider_id: str, message: str) -> Offer:
        """Offer a provider of one's own for a need that one is shown; the firm decides. A repeat changes nothing."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        check_text("message", message, NOTE_CHARACTERS_MAX)
        await self._index.check_takes_rankings()
        region = await self._region(caller)
        now = self._now()
        async with transaction(self._pool) as connection:
            seen = await needs_store.need(connection, known_form(need_id))
            if seen is None or not self._is_shown(seen, region, now):
                raise NotFound("There is no open need of this id that you are shown.")
            provider = await providers_store.provider(
                connection, chosen_id(provider_id), quarter=quarter_of(now.date())
            )
        if provider is None or (caller.role is Role.PARTNER and provider.partner_id != caller.partner_id):
            raise NotFound(f"There is no provider {provider_id} of yours.")
        ranked = await self._judge(seen, provider_id)
        async with transaction(self._pool) as connection:
            need = await needs_store.lock_need(connection, need_id)
            assert need is not None  # it was seen
            offers = await offers_store.offers_of_need(connection, need_id)
            before = [
                each
                for each in offers
                if each.provider_id == provider_id and (each.attempt == need.attempt or each.state is OfferState.MADE)
            ]
            if before:
                return offer_as_seen_by(caller, before[0])
            if need.state is not NeedState.OPEN or not need.shown:
                raise NotFound("There is no open need of this id that you are shown.")
            if sum(each.state is OfferState.MADE for each in offers) >= OPEN_OFFERS_MAX:
                raise Conflict("This need has as many open offers as a firm can look at.", reason="TOO_MANY_OFFERS")
            bookable = await providers_store.bookable_providers(
                connection, [provider_id], quarter=quarter_of(now.date()), today=now.date()
            )
            if not bookable:
                raise Conflict("The provider has no place left in this quarter, or has expired.", reason="NOT_BOOKABLE")
            offer = replace(
                offer_for(
                    need,
                    bookable[provider_id],
                    ranked,
                    rank=1 + max((each.rank for each in offers if each.attempt == need.attempt), default=0),
                    ranker_version=self._index.version,
                    made=now,
                    expires=now + self._limits.offer_lifetime,
                ),
                origin=Origin.PARTNER,
                message=message.strip(),
            )
            with correlated(need.correlation_id):
                await self._offers.make(connection, [offer])
                await tell_of_offers(connection, [offer])
        self._relay.kick()
        log.info("provider proposed", need=need_id, provider=provider_id, by=caller.credential_id)
        return offer_as_seen_by(caller, offer)

    async def _judge(self, need: Need, provider_id: str) -> Ranked:
        """Raises Conflict where a hard filter takes the provider out."""
        asked = need.for_ranking()

        def compute(ranker: Ranker) -> Ranked | tuple[FilterCode, ...]:
            return ranker.codes(asked, provider_id) or ranker.explain(asked, provider_id)

        await self._index.refresh()
        try:
            found = await self._index.compute(compute)
        except UnknownProviderError as error:
            raise Conflict("The provider is withdrawn; put it again first.", reason="NOT_BOOKABLE") from error
        if isinstance(found, Ranked):
            return found
        # Never why: whether a conflict of interest is among the filters would tell whose need it is.
        log.info("proposal refused", need=need.id, provider=provider_id, codes=found)
        raise Conflict(
            "This provider cannot take this need: a hard filter of its profile takes it out.", reason="NOT_SUITABLE"
        )

    def _is_shown(self, need: Need, region: str, now: datetime) -> bool:
        if need.state is not NeedState.OPEN or not need.shown:
            return False
        near = not region or canonical_region(need.region) == canonical_region(region)
        return near or need.opened <= now - self._limits.regional_head_start

    async def _region(self, caller: Caller) -> str:
        """Of the partner; "" for operators, who see every region's."""
        if caller.role is Role.OPERATOR:
            return ""
        if not await self._directory.wait_for("partner", caller.partner_id, timeout_s=KNOWN_TIMEOUT_S):
            raise Forbidden("This key's partner is not registered any more.", reason="UNKNOWN_PARTNER")
        return self._directory.partners[caller.partner_id].region or "nowhere"

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _without_firm(need: Need) -> Need:
    return replace(need, firm_id=0, machine_id=0, alarm_ids=(), consent_id="", opened_by=0)
