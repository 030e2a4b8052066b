"""The use cases of matching: providers, consents, needs, offers."""

import hashlib
import json
import re
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import TypeVar

from prometheus_client import Counter

from services.common import outbox, topics
from services.common.clock import Clock, from_us, to_us, today
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import AlreadyExists, Conflict, Forbidden, Invalid, NotFound, SlowDown, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import correlated, current_correlation_id, get_logger
from services.common.outbox import OutboxRelay
from services.matching import domain, store
from services.matching.alarms import Alarm, need_text, urgency_of
from services.matching.consents import Consent, Coverage, NewConsent, SharedItem
from services.matching.domain import FilterCode, Kind, Size, Source, Urgency
from services.matching.index import ProviderIndex
from services.matching.messages import offer_event
from services.matching.needs import (
    Lapse,
    Limits,
    Match,
    Need,
    NeedState,
    NoOffer,
    Offer,
    OfferState,
    alarm_need_id,
    match_id,
    offer_id,
    quarter_of,
)
from services.matching.providers import ProviderRecord
from services.matching.ranking import Ranking

log = get_logger(__name__)

T = TypeVar("T")

TEXT_CHARACTERS_MAX = 4_000
TITLE_CHARACTERS_MAX = 200
NOTE_CHARACTERS_MAX = 500
LIST_ITEMS_MAX = 50
MACHINES_MAX = 10_000
CAPACITY_MAX = 100_000
LEAD_DAYS_MAX = 366
PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 500
CONSENT_HISTORY_MAX = 100
# Rankings that may wait for a thread before new needs are asked to come later.
RANKS_WAITING_MAX = 200
# What was registered a moment ago may still be on its way here.
KNOWN_TIMEOUT_S = 0.5
# First look: more than the offers of a need, for those that are full.
CANDIDATES_FIRST = 20
WIDEN_BY = 10
LAPSES_AT_ONCE_MAX = 200
RETRIES_AT_ONCE_MAX = 20

_ID = re.compile(r"[0-9a-f]{32}")
_PAGE_TOKEN = re.compile(r"(\d{1,16})\.([0-9a-f]{32})")
_CHOSEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DIVISION = re.compile(r"\d{2}|any")
# Tabs and line ends are part of texts; other control characters are not, and the database refuses NUL.
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")

# Raised alarms by whether the firm's consent covered them ("opened", "attached", "repeated", or why not).
alarms_total = Counter("smdih_matching_alarms_total", "Raised alarms taken in", ["outcome"])
# Needs opened, by who wrote them.
needs_opened_total = Counter("smdih_matching_needs_opened_total", "Needs opened", ["source"])
# Needs that no offer could be made for when they were opened, by reason.
needs_without_offers_total = Counter("smdih_matching_needs_without_offers_total", "Needs without offers", ["reason"])
# Offers by the state that they came into.
offers_total = Counter("smdih_matching_offers_total", "Offers made, accepted, declined and lapsed", ["state"])
# Acceptances refused because the provider had no place left.
capacity_refused_total = Counter("smdih_matching_capacity_refused_total", "Acceptances refused for want of a place")


@dataclass(frozen=True, kw_only=True)
class NewNeed:
    """What a firm asks for, before the hub has recorded it."""

    text: str
    urgency: Urgency = Urgency.NORMAL
    machine_id: int = 0


@dataclass(frozen=True)
class OpenedNeed:
    need: Need
    # Best first.
    offers: Sequence[Offer]


@dataclass(frozen=True)
class ConsentHistory:
    current: Consent | None
    # Newest first.
    ended: Sequence[Consent]


class Matching:
    """What may be asked of the matching service, by whom; the edges translate and nothing more."""

    def __init__(
        self,
        pool: Pool,
        index: ProviderIndex,
        relay: OutboxRelay,
        directory: Directory,
        *,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._directory = directory
        self._clock = clock
        self._limits = limits
        # What the needs without offers were last ranked against: another try makes sense once it differs.
        self._tried: tuple[int, date] | None = None

    # --- providers -------------------------------------------------------------------------------------------------

    async def put_provider(self, caller: Caller, provider: ProviderRecord) -> ProviderRecord:
        """Create or replace. On return this process ranks it; the others do within POLL_INTERVAL_S."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        _check_provider(provider)
        partner_id = provider.partner_id
        if caller.role is Role.PARTNER:
            if partner_id not in (0, caller.partner_id):
                raise Forbidden("This key does not belong to that partner.")
            partner_id = caller.partner_id
        if not await self._directory.wait_for("partner", partner_id, timeout_s=KNOWN_TIMEOUT_S):
            raise NotFound(f"There is no partner {partner_id}; name one that is registered.", reason="UNKNOWN_PARTNER")
        async with transaction(self._pool) as connection:
            change = await store.next_provider_change(connection)
            before = await store.lock_provider(connection, provider.id)
            if before is not None and caller.role is Role.PARTNER and before.partner_id != caller.partner_id:
                raise Forbidden("A provider of another partner has this id; choose another.", reason="ID_TAKEN")
            now = self._now()
            await store.put_provider(
                connection, replace(provider, partner_id=partner_id, active=True, change=change, changed=now)
            )
            await store.set_quarter_capacities(
                connection, provider.id, provider.capacity_per_quarter, since=quarter_of(now.date())
            )
            stored = await self._provider(connection, provider.id)
        await self._index.refresh()
        log.info("provider put", provider=provider.id, partner=partner_id, kind=provider.kind)
        return stored

    async def withdraw_provider(self, caller: Caller, provider_id: str) -> ProviderRecord:
        """No new offers from now on; the upkeep lets the open ones lapse."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            change = await store.next_provider_change(connection)
            before = await store.lock_provider(connection, _chosen_id(provider_id))
            if before is None or (caller.role is Role.PARTNER and before.partner_id != caller.partner_id):
                raise NotFound(f"There is no provider {provider_id} of yours.")
            if before.active:
                await store.put_provider(connection, replace(before, active=False, change=change, changed=self._now()))
            stored = await self._provider(connection, provider_id)
        await self._index.refresh()
        log.info("provider withdrawn", provider=provider_id)
        return stored

    async def get_provider(self, caller: Caller, provider_id: str) -> ProviderRecord:
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            found = await self._provider(connection, _chosen_id(provider_id))
        if caller.role is Role.FIRM and not found.is_live(today(self._clock)):
            raise NotFound(f"There is no provider {provider_id}.")
        return _as_seen_by(caller, found)

    async def list_providers(
        self, caller: Caller, *, partner_id: int, kind: Kind | None, page_size: int, page_token: str
    ) -> tuple[list[ProviderRecord], str]:
        """A page and the token of the next ("": there is none)."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        limit = _page_size(page_size)
        day = today(self._clock)
        async with transaction(self._pool) as connection:
            found = await store.list_providers(
                connection,
                quarter=quarter_of(day),
                partner_id=partner_id,
                kind=kind,
                live_on=day if caller.role is Role.FIRM else None,
                after=_after_id(page_token),
                limit=limit + 1,
            )
        token = found[limit - 1].id if len(found) > limit else ""
        return [_as_seen_by(caller, each) for each in found[:limit]], token

    async def _provider(self, connection: Connection, provider_id: str) -> ProviderRecord:
        found = await store.provider(connection, provider_id, quarter=quarter_of(today(self._clock)))
        if found is None:
            raise NotFound(f"There is no provider {provider_id}.")
        return found

    # --- consents --------------------------------------------------------------------------------------------------

    async def give_consent(self, caller: Caller, firm_id: int, new: NewConsent, *, request_id: str) -> Consent:
        """Record the firm's agreement; the one before it, if any, ends as replaced."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known_firm(caller.firm_or(firm_id))
        now = self._now()
        await self._check_consent(caller, firm_id, new, now)
        sha256 = _digest(
            shared=sorted(set(new.shared)),
            machine_ids=sorted(set(new.machine_ids)),
            severity_min=int(new.severity_min),
            valid_from=str(new.valid_from),
            valid_until=str(new.valid_until),
            note=new.note,
        )
        async with transaction(self._pool) as connection:
            await store.lock_firm_consents(connection, firm_id)
            if _checked_request_id(request_id):
                repeated = await store.consent_by_request(connection, firm_id, request_id)
                if repeated is not None:
                    return _first_answer(*repeated, sha256)
            consent = Consent(
                id=uuid.uuid4().hex,
                firm_id=firm_id,
                shared=frozenset(new.shared),
                machine_ids=frozenset(new.machine_ids),
                severity_min=new.severity_min,
                valid_from=new.valid_from or now,
                valid_until=new.valid_until,
                note=new.note,
                given=now,
                given_by=caller.credential_id,
            )
            await store.end_consent(connection, firm_id, ended=now, by=caller.credential_id, replaced=True)
            await store.add_consent(
                connection,
                consent,
                request_id=request_id,
                request_sha256=sha256,
                correlation_id=current_correlation_id(),
            )
        log.info("consent given", consent=consent.id, firm=firm_id, by=caller.credential_id)
        return consent

    async def revoke_consent(self, caller: Caller, firm_id: int) -> Consent | None:
        """From now on no alarm opens a need. Returns the consent that ended last, None where there never was one."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known_firm(caller.firm_or(firm_id))
        async with transaction(self._pool) as connection:
            await store.lock_firm_consents(connection, firm_id)
            ended = await store.end_consent(
                connection, firm_id, ended=self._now(), by=caller.credential_id, replaced=False
            )
            newest = await store.ended_consents(connection, firm_id, limit=1)
        if ended:
            log.info("consent revoked", consent=newest[0].id, firm=firm_id, by=caller.credential_id)
        return newest[0] if newest else None

    async def get_consent(self, caller: Caller, firm_id: int) -> ConsentHistory:
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known_firm(caller.firm_or(firm_id))
        async with transaction(self._pool) as connection:
            current = await store.current_consent(connection, firm_id)
            return ConsentHistory(current, await store.ended_consents(connection, firm_id, limit=CONSENT_HISTORY_MAX))

    async def _check_consent(self, caller: Caller, firm_id: int, new: NewConsent, now: datetime) -> None:
        if SharedItem.FAULT not in new.shared:
            raise Invalid(
                "Without sharing the fault itself no need can be written; name 'fault' among what is shared.",
                reason="FAULT_NOT_SHARED",
            )
        if len(new.machine_ids) > MACHINES_MAX:
            raise Invalid(
                f"At most {MACHINES_MAX} machines can be named; leave them out to cover all.", reason="TOO_MANY"
            )
        for machine_id in new.machine_ids:
            await self._check_machine(firm_id, machine_id)
        if new.valid_until is not None and new.valid_until <= (new.valid_from or now):
            raise Invalid("The consent would end before it begins; set a later end.", reason="EMPTY_PERIOD")
        _check_text("note", new.note, NOTE_CHARACTERS_MAX)
        if caller.role is Role.OPERATOR and not new.note.strip():
            raise Invalid("Say in the note how the firm agreed.", reason="NOTE_MISSING")

    # --- needs -----------------------------------------------------------------------------------------------------

    async def open_need(self, caller: Caller, firm_id: int, new: NewNeed, *, request_id: str) -> OpenedNeed:
        """Record a need in the firm's words and make offers for it."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known_firm(caller.firm_or(firm_id))
        if not new.text.strip():
            raise Invalid("A need has a text; say what you want help with.", reason="TEXT_MISSING")
        _check_text("text", new.text, TEXT_CHARACTERS_MAX)
        if new.machine_id:
            await self._check_machine(firm_id, new.machine_id)
        if not await self._index.is_loaded():
            raise TryAgain(
                "The hub has just started and still reads its providers.", reason="STARTING", retry_after_s=2
            )
        if self._index.waiting >= RANKS_WAITING_MAX:
            raise SlowDown("Too many needs wait to be ranked; send again in a moment.", retry_after_s=1)
        sha256 = _digest(text=new.text, urgency=new.urgency, machine_id=new.machine_id)
        repeatable = _checked_request_id(request_id)
        firm = self._directory.firms[firm_id]
        need = Need(
            id=uuid.uuid4().hex,
            firm_id=firm_id,
            source=Source.FIRM,
            text=new.text.strip(),
            urgency=new.urgency,
            sic=firm.sic,
            region=firm.region,
            size=firm.size,
            machine_id=new.machine_id,
            opened=self._now(),
            opened_by=caller.credential_id,
            correlation_id=current_correlation_id(),
        )
        # Before the transaction: a connection is not held while a thread computes.
        ranking = await self._rank(need)
        async with transaction(self._pool) as connection:
            if repeatable:
                await store.lock_requests(connection, firm_id, request_id)
                repeated = await store.need_by_request(connection, firm_id, request_id)
                if repeated is not None:
                    need = _first_answer(*repeated, sha256)
                    return OpenedNeed(need, await store.offers_of_need(connection, need.id))
            opened = await self._open(connection, need, ranking, request_id=request_id, request_sha256=sha256)
        self._relay.kick()
        return opened

    async def get_need(self, caller: Caller, need_id: str) -> Need:
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await self._need_seen_by(connection, caller, need_id)

    async def list_needs(
        self,
        caller: Caller,
        *,
        firm_id: int,
        state: NeedState | None,
        machine_id: int,
        page_size: int,
        page_token: str,
    ) -> tuple[list[Need], str]:
        """A page, newest first, and the token of the next ("": there is none)."""
        caller.require(Role.FIRM, Role.OPERATOR)
        limit = _page_size(page_size)
        async with transaction(self._pool) as connection:
            found = await store.list_needs(
                connection,
                firm_id=caller.firm_or(firm_id),
                state=state,
                machine_id=machine_id,
                before=_before(page_token),
                limit=limit + 1,
            )
        token = _token(found[limit - 1].opened, found[limit - 1].id) if len(found) > limit else ""
        return found[:limit], token

    async def take_alarms(self, connection: Connection, alarms: Sequence[Alarm]) -> None:
        """Turn raised alarms into needs where the firm's consent covers them, in the caller's transaction.

        Safe to repeat: ids are derived from the alarm. Without consent nothing is stored, the alarm is only counted.
        """
        covered: list[tuple[Alarm, Consent]] = []
        consents: dict[int, Consent | None] = {}
        for alarm in alarms:
            if alarm.firm_id not in consents:
                consents[alarm.firm_id] = await store.current_consent(connection, alarm.firm_id, hold=True)
            consent = consents[alarm.firm_id]
            coverage = _coverage(consent, alarm)
            if consent is not None and coverage is Coverage.COVERED:
                covered.append((alarm, consent))
            else:
                alarms_total.labels(coverage).inc()
        await store.lock_machines(connection, {alarm.machine_id for alarm, _ in covered})
        known = await store.known_alarms(connection, {alarm.id for alarm, _ in covered})
        for alarm, consent in covered:
            with correlated(alarm.correlation_id):
                if alarm.id in known:
                    alarms_total.labels("repeated").inc()
                    continue
                known.add(alarm.id)
                alarms_total.labels(await self._take_alarm(connection, alarm, consent)).inc()

    async def _take_alarm(self, connection: Connection, alarm: Alarm, consent: Consent) -> str:
        since = alarm.raised - self._limits.episode_gap
        need_id = await store.need_of_fault(connection, alarm.machine_id, since=since)
        if need_id is not None:
            await store.attach_alarm(connection, need_id, alarm.id, raised=alarm.raised)
            log.info("alarm attached to need", alarm=alarm.id, need=need_id)
            return "attached"
        firm = self._directory.firms.get(alarm.firm_id) if SharedItem.PROFILE in consent.shared else None
        need = Need(
            id=alarm_need_id(alarm.id),
            firm_id=alarm.firm_id,
            source=Source.ANOMALY,
            text=need_text(alarm, consent.shared)[:TEXT_CHARACTERS_MAX],
            urgency=urgency_of(alarm.severity),
            sic=firm.sic if firm else "",
            region=firm.region if firm else "",
            size=firm.size if firm else "",
            machine_id=alarm.machine_id,
            opened=self._now(),
            opened_by=0,
            correlation_id=alarm.correlation_id,
            alarm_ids=(alarm.id,),
            consent_id=consent.id,
        )
        await self._open(connection, need, await self._rank(need), raised=alarm.raised)
        return "opened"

    async def _open(
        self,
        connection: Connection,
        need: Need,
        ranking: Ranking,
        *,
        request_id: str = "",
        request_sha256: bytes = b"",
        raised: datetime | None = None,
    ) -> OpenedNeed:
        offers, why = await self._choose(connection, need, ranking)
        need = replace(need, offers=len(offers), no_offer_reason=why)
        await store.add_need(connection, need, request_id=request_id, request_sha256=request_sha256)
        for alarm_id in need.alarm_ids:
            await store.attach_alarm(connection, need.id, alarm_id, raised=raised or need.opened)
        await self._make(connection, offers)
        needs_opened_total.labels(need.source).inc()
        if why:
            needs_without_offers_total.labels(why).inc()
        log.info("need opened", need=need.id, firm=need.firm_id, source=need.source, offers=len(offers), reason=why)
        return OpenedNeed(need, offers)

    async def _rank(self, need: Need, limit: int = CANDIDATES_FIRST) -> Ranking:
        asked = domain.Need(
            id=need.id,
            text=need.text,
            sic=need.sic,
            region=need.region,
            size=Size(need.size) if need.size in _SIZES else Size.SMALL,
            urgency=need.urgency,
            source=need.source,
            firm_id=str(need.firm_id),
        )
        return await self._index.rank(asked, limit)

    async def _choose(self, connection: Connection, need: Need, ranking: Ranking) -> tuple[list[Offer], str]:
        """The best providers with a free place, or why there is none. Looks further down than `ranking` while places are short."""
        now = self._now()
        limit = CANDIDATES_FIRST
        while True:
            bookable = await store.bookable_providers(
                connection,
                [each.provider_id for each in ranking.ranked],
                quarter=quarter_of(now.date()),
                today=now.date(),
            )
            chosen = [each for each in ranking.ranked if each.provider_id in bookable][: self._limits.offers_max]
            whole = len(ranking.ranked) < limit or limit >= self._limits.candidates_max
            if len(chosen) == self._limits.offers_max or whole:
                break
            limit = min(limit * WIDEN_BY, self._limits.candidates_max)
            ranking = await self._rank(need, limit)
        if not chosen:
            why = _why_none(len(self._index), ranking)
            log.info("no offers", need=need.id, reason=why, filtered_out=dict(ranking.excluded_counts))
            return [], why
        return [
            Offer(
                id=offer_id(need.id, each.provider_id),
                need_id=need.id,
                firm_id=need.firm_id,
                provider_id=each.provider_id,
                partner_id=bookable[each.provider_id].partner_id,
                provider_title=bookable[each.provider_id].title,
                provider_kind=bookable[each.provider_id].kind,
                rank=rank,
                score=each.score,
                parts=dict(each.parts),
                reasons=tuple(each.reasons),
                ranker_version=self._index.version,
                made=now,
                expires=now + self._limits.offer_lifetime,
                need_text=need.text,
                machine_id=need.machine_id,
                alarm_id=need.alarm_ids[0] if need.alarm_ids else "",
                correlation_id=need.correlation_id,
            )
            for rank, each in enumerate(chosen, start=1)
        ], ""

    async def _make(self, connection: Connection, offers: Sequence[Offer]) -> None:
        if offers:
            await store.add_offers(connection, offers)
            await self._publish(connection, offers)

    async def _need_seen_by(self, connection: Connection, caller: Caller, need_id: str) -> Need:
        need = await store.need(connection, _known_form(need_id))
        if need is None:
            raise NotFound()
        caller.check_sees_firm(need.firm_id)
        return need

    # --- offers ----------------------------------------------------------------------------------------------------

    async def offers_of_need(self, caller: Caller, need_id: str, state: OfferState | None) -> list[Offer]:
        """Best first; for partners those of their own providers."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            if caller.role is not Role.PARTNER:
                await self._need_seen_by(connection, caller, need_id)
            found = await store.offers_of_need(connection, _known_form(need_id))
        seen = [_offer_as_seen_by(caller, offer) for offer in found if _sees_offer(caller, offer)]
        if caller.role is Role.PARTNER and not seen:
            raise NotFound()
        return [offer for offer in seen if state in (None, offer.state)]

    async def list_offers(
        self, caller: Caller, *, state: OfferState | None, page_size: int, page_token: str
    ) -> tuple[list[Offer], str]:
        """A page of all offers that the caller may see, newest first, and the token of the next ("": there is none)."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        limit = _page_size(page_size)
        async with transaction(self._pool) as connection:
            found = await store.list_offers(
                connection,
                firm_id=caller.firm_id if caller.role is Role.FIRM else 0,
                partner_id=caller.partner_id if caller.role is Role.PARTNER else 0,
                state=state,
                before=_before(page_token),
                limit=limit + 1,
            )
        token = _token(found[limit - 1].made, found[limit - 1].id) if len(found) > limit else ""
        return [_offer_as_seen_by(caller, offer) for offer in found[:limit]], token

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
                    [each for each in await store.offers_of_need(connection, need.id) if each.state is OfferState.MADE],
                    Lapse.OTHER_ACCEPTED,
                )
                await store.end_need(connection, need.id, NeedState.MATCHED, ended=match.accepted)
                accepted = await self._accepted(connection, offer)
        self._relay.kick()
        self._index.kick()
        log.info("offer accepted", offer=offer.id, need=need.id, match=match.id, provider=offer.provider_id)
        return accepted

    async def _match(self, connection: Connection, caller: Caller, offer: Offer) -> Match:
        now = self._now()
        change = await store.next_provider_change(connection)
        provider = await store.lock_provider(connection, offer.provider_id)
        assert provider is not None  # by foreign key
        if not provider.is_live(now.date()):
            raise Conflict(
                "This provider is not to be had any more; accept another offer of the need.", reason="PROVIDER_GONE"
            )
        quarter = quarter_of(now.date())
        if not await store.take_place(connection, offer.provider_id, quarter=quarter, change=change):
            capacity_refused_total.inc()
            raise Conflict(
                "The provider has no place left in this quarter; accept another offer of the need.",
                reason="CAPACITY_FULL",
            )
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
        )
        await store.add_match(connection, match)
        by = caller.credential_id
        await store.decide_offer(connection, offer.id, OfferState.ACCEPTED, decided=now, by=by, reason="")
        accepted = replace(offer, state=OfferState.ACCEPTED, decided=now, match_id=match.id)
        await self._publish(connection, [accepted])
        return match

    async def _accepted(self, connection: Connection, offer: Offer) -> tuple[Match, Offer]:
        match, current = await store.match_of_offer(connection, offer.id), await store.offer(connection, offer.id)
        assert match is not None, f"offer {offer.id} is accepted and has no match"
        assert current is not None
        return match, current

    async def decline_offer(self, caller: Caller, offer_id: str, reason: str) -> Offer:
        """By the firm, or by the partner for its provider. A repeat changes nothing. The last one closes the need."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        if not reason.strip():
            raise Invalid("Say why; it makes the next offers better.", reason="REASON_MISSING")
        _check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            offer, need = await self._lock_offer(connection, caller, offer_id)
            if offer.state is not OfferState.DECLINED:
                _check_open(offer)
                with correlated(need.correlation_id):
                    now = self._now()
                    offer = replace(offer, state=OfferState.DECLINED, decided=now, decision_reason=reason.strip())
                    await store.decide_offer(
                        connection,
                        offer.id,
                        offer.state,
                        decided=now,
                        by=caller.credential_id,
                        reason=offer.decision_reason,
                    )
                    await self._publish(connection, [offer])
                    await self._close_if_done(connection, need)
        self._relay.kick()
        return _offer_as_seen_by(caller, offer)

    async def _lock_offer(self, connection: Connection, caller: Caller, offer_id: str) -> tuple[Offer, Need]:
        """The offer as it is now, with its need held. Raises NotFound for what the caller may not see."""
        found = await store.offer(connection, _known_form(offer_id))
        if found is None or not _sees_offer(caller, found):
            raise NotFound()
        need = await store.lock_need(connection, found.need_id)
        current = await store.offer(connection, offer_id)
        assert need is not None  # by foreign key
        assert current is not None
        return current, need

    async def _publish(self, connection: Connection, offers: Sequence[Offer]) -> None:
        await outbox.write_all(connection, topics.OFFERS, [(offer.need_id, offer_event(offer)) for offer in offers])
        for offer in offers:
            offers_total.labels(offer.state).inc()

    # --- upkeep ----------------------------------------------------------------------------------------------------

    async def lapse_due_offers(self) -> int:
        """Let offers lapse whose time has run out or whose provider is gone; returns how many."""
        now = self._now()
        async with transaction(self._pool) as connection:
            due = await store.due_lapses(connection, now=now, today=now.date(), limit=LAPSES_AT_ONCE_MAX)
        by_need: Mapping[str, dict[str, Lapse]] = defaultdict(dict)
        for each in due:
            by_need[each.need_id][each.offer_id] = each.why
        lapsed = 0
        for need_id, why in by_need.items():
            async with transaction(self._pool) as connection:
                need = await store.lock_need(connection, need_id)
                assert need is not None  # by foreign key
                with correlated(need.correlation_id):
                    for offer in await store.offers_of_need(connection, need_id):
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
                needs = await store.lock_needs_without_offers(connection, after=after, limit=RETRIES_AT_ONCE_MAX)
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
            offers, why = await self._choose(connection, need, await self._rank(need))
            await store.set_need_offers(connection, need.id, len(offers), no_offer_reason=why)
            await self._make(connection, offers)
        return bool(offers)

    async def _lapse(self, connection: Connection, offers: Sequence[Offer], why: Lapse) -> None:
        if not offers:
            return
        now = self._now()
        for offer in offers:
            await store.decide_offer(connection, offer.id, OfferState.LAPSED, decided=now, by=None, reason=why)
        await self._publish(
            connection,
            [replace(offer, state=OfferState.LAPSED, decided=now, decision_reason=why) for offer in offers],
        )

    async def _close_if_done(self, connection: Connection, need: Need) -> None:
        if need.state is not NeedState.OPEN:
            return
        if any(offer.state is OfferState.MADE for offer in await store.offers_of_need(connection, need.id)):
            return
        await store.end_need(connection, need.id, NeedState.CLOSED, ended=self._now())
        log.info("need closed", need=need.id)

    # --- shared checks ---------------------------------------------------------------------------------------------

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())

    async def _known_firm(self, firm_id: int) -> int:
        if not firm_id:
            raise Invalid("Say which firm it is about.", reason="FIRM_MISSING")
        if not await self._directory.wait_for("firm", firm_id, timeout_s=KNOWN_TIMEOUT_S):
            raise NotFound(f"There is no firm {firm_id}.", reason="UNKNOWN_FIRM")
        return firm_id

    async def _check_machine(self, firm_id: int, machine_id: int) -> None:
        known = await self._directory.wait_for("machine", machine_id, timeout_s=KNOWN_TIMEOUT_S)
        if not known or self._directory.machines[machine_id].firm_id != firm_id:
            raise NotFound(f"The firm has no machine {machine_id}.", reason="UNKNOWN_MACHINE")


_SIZES = frozenset(Size)


def _coverage(consent: Consent | None, alarm: Alarm) -> Coverage:
    if consent is None:
        return Coverage.NO_CONSENT
    return consent.coverage(machine_id=alarm.machine_id, severity=alarm.severity, raised=alarm.raised)


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


def _sees_offer(caller: Caller, offer: Offer) -> bool:
    return {
        Role.OPERATOR: True,
        Role.FIRM: offer.firm_id == caller.firm_id,
        Role.PARTNER: offer.partner_id == caller.partner_id,
    }.get(caller.role, False)


def _offer_as_seen_by(caller: Caller, offer: Offer) -> Offer:
    """A partner learns whose need it is once the firm has accepted."""
    if caller.role is Role.PARTNER and offer.state is not OfferState.ACCEPTED:
        return replace(offer, firm_id=0, machine_id=0, alarm_id="")
    return offer


def _as_seen_by(caller: Caller, provider: ProviderRecord) -> ProviderRecord:
    if caller.role is Role.OPERATOR or (caller.role is Role.PARTNER and caller.partner_id == provider.partner_id):
        return provider
    return provider.without_conflicts()


def _check_provider(provider: ProviderRecord) -> None:
    if not _CHOSEN_ID.fullmatch(provider.id):
        raise Invalid("An id has 1 to 64 letters, digits, dots, dashes and underscores.", reason="BAD_ID")
    if not provider.title.strip():
        raise Invalid("A provider has a title.", reason="TITLE_MISSING")
    if not provider.text.strip():
        raise Invalid("A provider says in its text what it offers.", reason="TEXT_MISSING")
    _check_text("title", provider.title, TITLE_CHARACTERS_MAX)
    _check_text("text", provider.text, TEXT_CHARACTERS_MAX)
    _check_text("region", provider.region, TITLE_CHARACTERS_MAX)
    lists: Mapping[str, Sequence[object]] = {
        "regions_served": provider.regions_served,
        "sic_divisions": provider.sic_divisions,
        "sic_excluded": provider.sic_excluded,
        "sizes_served": provider.sizes_served,
        "skills": provider.skills,
        "conflict_firm_ids": provider.conflict_firm_ids,
    }
    for name, items in lists.items():
        if len(items) > LIST_ITEMS_MAX:
            raise Invalid(f"{name} has more than {LIST_ITEMS_MAX} items.", reason="TOO_MANY")
    for item in (*provider.regions_served, *provider.skills):
        _check_text("items of regions_served and skills", item, TITLE_CHARACTERS_MAX)
    if not all(_DIVISION.fullmatch(division) for division in (*provider.sic_divisions, *provider.sic_excluded)):
        raise Invalid('A SIC division has two digits, such as "25", or is "any".', reason="BAD_SIC_DIVISION")
    if provider.capacity_per_quarter is not None and not 1 <= provider.capacity_per_quarter <= CAPACITY_MAX:
        raise Invalid(
            f"capacity_per_quarter is 1 to {CAPACITY_MAX} (a course has no limit); withdraw a provider that takes nothing.",
            reason="BAD_CAPACITY",
        )
    if not 0 <= provider.lead_days <= LEAD_DAYS_MAX:
        raise Invalid(f"lead_days is 0 to {LEAD_DAYS_MAX}.", reason="BAD_LEAD_DAYS")


def _check_text(name: str, text: str, characters_max: int) -> None:
    if len(text) > characters_max:
        raise Invalid(f"{name} has more than {characters_max} characters.", reason="TEXT_TOO_LONG")
    if _NOT_TEXT.search(text):
        raise Invalid(f"{name} has characters that are not text.", reason="NOT_TEXT")


def _chosen_id(provider_id: str) -> str:
    if not _CHOSEN_ID.fullmatch(provider_id):
        raise NotFound("There is no such provider.")
    return provider_id


def _known_form(identifier: str) -> str:
    """Ids of needs and offers; what does not look like one cannot exist."""
    if not _ID.fullmatch(identifier):
        raise NotFound()
    return identifier


def _checked_request_id(request_id: str) -> bool:
    """Whether there is one. Raises Invalid for one that cannot be stored."""
    if request_id and not _CHOSEN_ID.fullmatch(request_id):
        raise Invalid(
            "A request_id has 1 to 64 letters, digits, dots, dashes and underscores.", reason="BAD_REQUEST_ID"
        )
    return bool(request_id)


def _digest(**content: object) -> bytes:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _first_answer(answer: T, first_sha256: bytes, sha256: bytes) -> T:
    if first_sha256 != sha256:
        raise AlreadyExists(
            "This request_id was used for a request with other content; use a new one.", reason="REQUEST_ID_REUSED"
        )
    return answer


def _page_size(asked: int) -> int:
    if asked < 0 or asked > PAGE_SIZE_MAX:
        raise Invalid(f"page_size is at most {PAGE_SIZE_MAX}.", reason="BAD_PAGE_SIZE")
    return asked or PAGE_SIZE_DEFAULT


def _after_id(page_token: str) -> str:
    if page_token and not _CHOSEN_ID.fullmatch(page_token):
        raise _bad_page_token()
    return page_token


def _token(when: datetime, identifier: str) -> str:
    return f"{to_us(when)}.{identifier}"


def _before(page_token: str) -> tuple[datetime, str] | None:
    if not page_token:
        return None
    found = _PAGE_TOKEN.fullmatch(page_token)
    if found is None:
        raise _bad_page_token()
    return from_us(int(found[1])), found[2]


def _bad_page_token() -> Invalid:
    return Invalid("This page token is not one of ours; begin with the first page.", reason="BAD_PAGE_TOKEN")
