"""The use cases of needs: in a firm's words, or from an alarm under consent."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from prometheus_client import Counter

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid
from services.common.identity import Caller, Role
from services.common.logs import correlated, current_correlation_id, get_logger
from services.common.outbox import OutboxRelay
from services.matching.alarms import Alarm, need_text, urgency_of
from services.matching.consents import Consent, Coverage, SharedItem
from services.matching.domain import Source, Urgency
from services.matching.index import ProviderIndex
from services.matching.needs import CloseReason, Limits, Need, NeedState, NoOffer, Offer, alarm_need_id
from services.matching.ranking import Ranking
from services.matching.service.checks import (
    NOTE_CHARACTERS_MAX,
    TEXT_CHARACTERS_MAX,
    Known,
    before_token,
    check_esco_skills,
    check_text,
    checked_request_id,
    digest,
    first_answer,
    page_size_of,
    page_token_of,
)
from services.matching.service.need_life import NeedLife, standing_offers
from services.matching.service.notices import tell_of_offers
from services.matching.service.offers import Offers
from services.matching.service.sight import need_seen_by
from services.matching.store import consents as consents_store
from services.matching.store import needs as needs_store
from services.matching.store import offers as offers_store
from services.matching.text import stored

log = get_logger(__name__)

CLOSINGS_AT_ONCE_MAX = 200

# Raised alarms by whether the firm's consent covered them ("opened", "attached", "repeated", or why not).
alarms_total = Counter("smdih_matching_alarms_total", "Raised alarms taken in", ["outcome"])
# Needs opened, by who wrote them.
needs_opened_total = Counter("smdih_matching_needs_opened_total", "Needs opened", ["source"])
# Needs that no offer could be made for when they were opened, by reason.
needs_without_offers_total = Counter("smdih_matching_needs_without_offers_total", "Needs without offers", ["reason"])


@dataclass(frozen=True, kw_only=True)
class NewNeed:
    """What a firm asks for, before the hub has recorded it."""

    text: str
    urgency: Urgency = Urgency.NORMAL
    machine_id: int = 0
    # No offers now but one in the next round, where scarce places go to whom they fit best.
    waits: bool = False
    # Partners may see the text, not whose it is, and propose themselves.
    shown: bool = False
    source: Source = Source.FIRM
    # Addresses of terms of ESCO that it asks for.
    esco_skills: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpenedNeed:
    need: Need
    # Best first.
    offers: Sequence[Offer]


class Needs:
    """What firms want help with."""

    def __init__(
        self,
        pool: Pool,
        index: ProviderIndex,
        relay: OutboxRelay,
        directory: Directory,
        offers: Offers,
        life: NeedLife,
        *,
        clock: Clock,
        limits: Limits,
    ) -> None:
        self._pool = pool
        self._index = index
        self._relay = relay
        self._directory = directory
        self._known = Known(directory)
        self._offers = offers
        self._life = life
        self._clock = clock
        self._limits = limits

    async def open_need(self, caller: Caller, firm_id: int, new: NewNeed, *, request_id: str) -> OpenedNeed:
        """Record a need in the firm's words and make offers for it."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        if not new.text.strip():
            raise Invalid("A need has a text; say what you want help with.", reason="TEXT_MISSING")
        check_text("text", new.text, TEXT_CHARACTERS_MAX)
        check_esco_skills(new.esco_skills)
        if new.machine_id:
            await self._known.check_machine(firm_id, new.machine_id)
        await self._index.check_takes_rankings()
        # What came later counts once it says something: so a request of an earlier release keeps its hash.
        more = {name: getattr(new, name) for name in ("waits", "shown", "esco_skills") if getattr(new, name)}
        sha256 = digest(text=new.text, urgency=new.urgency, machine_id=new.machine_id, **more)
        repeatable = checked_request_id(request_id)
        firm = self._directory.firms[firm_id]
        need = Need(
            id=uuid.uuid4().hex,
            firm_id=firm_id,
            source=new.source,
            text=new.text.strip(),
            urgency=new.urgency,
            sic=firm.sic,
            region=firm.region,
            size=firm.size,
            machine_id=new.machine_id,
            opened=self._now(),
            opened_by=caller.credential_id,
            correlation_id=current_correlation_id(),
            waits=new.waits,
            shown=new.shown,
            esco_skills=tuple(dict.fromkeys(new.esco_skills)),
        )
        # Before the transaction: a connection is not held while a thread computes.
        ranking = await self._offers.rank(need)
        async with transaction(self._pool) as connection:
            if repeatable:
                await needs_store.lock_requests(connection, firm_id, request_id)
                repeated = await needs_store.need_by_request(connection, firm_id, request_id)
                if repeated is not None:
                    need = first_answer(*repeated, sha256)
                    return OpenedNeed(need, await offers_store.offers_of_need(connection, need.id))
            opened = await self._open(connection, need, ranking, request_id=request_id, request_sha256=sha256)
        self._relay.kick()
        return opened

    async def show_need(self, caller: Caller, need_id: str, *, shown: bool) -> Need:
        """Let partners see an open need's text and propose themselves, or not any more."""
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            await need_seen_by(connection, caller, need_id)
            need = await needs_store.lock_need(connection, need_id)
            assert need is not None  # it was seen
            await needs_store.set_shown(connection, need_id, shown=shown)
        log.info("need shown" if shown else "need hidden", need=need_id, by=caller.credential_id)
        return replace(need, shown=shown)

    async def close_need(self, caller: Caller, need_id: str, reason: str) -> Need:
        """The firm does not want it answered any more: its offers lapse. A repeat changes nothing."""
        caller.require(Role.FIRM, Role.OPERATOR)
        if not reason.strip():
            raise Invalid("Say why; it makes the next offers better.", reason="REASON_MISSING")
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            await need_seen_by(connection, caller, need_id)
            need = await needs_store.lock_need(connection, need_id)
            assert need is not None  # it was seen
            if need.state is NeedState.MATCHED:
                raise Conflict("This need is matched; cancel its match, and the need with it.", reason="NEED_MATCHED")
            if need.state is NeedState.OPEN:
                need = await self._life.close(connection, need, CloseReason.BY_FIRM, note=reason.strip())
        self._relay.kick()
        self._index.kick()
        return need

    async def expire_due_needs(self) -> int:
        """Close needs that had no offer for as long as needs are kept open; returns how many."""
        now, expired = self._now(), 0
        async with transaction(self._pool) as connection:
            due = await needs_store.due_expiries(connection, now=now, limit=CLOSINGS_AT_ONCE_MAX)
        for need_id in due:
            async with transaction(self._pool) as connection:
                need = await needs_store.lock_need(connection, need_id)
                assert need is not None  # it was found
                if need.state is NeedState.OPEN and not await standing_offers(connection, need_id):
                    await self._life.close(connection, need, CloseReason.EXPIRED)
                    expired += 1
        return expired

    async def opened_need(self, caller: Caller, need_id: str) -> OpenedNeed:
        """A need with its offers, as it is now."""
        async with transaction(self._pool) as connection:
            need = await need_seen_by(connection, caller, need_id)
            return OpenedNeed(need, await offers_store.offers_of_need(connection, need_id))

    async def get_need(self, caller: Caller, need_id: str) -> Need:
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await need_seen_by(connection, caller, need_id)

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
        limit = page_size_of(page_size)
        async with transaction(self._pool) as connection:
            found = await needs_store.list_needs(
                connection,
                firm_id=caller.firm_or(firm_id),
                state=state,
                machine_id=machine_id,
                before=before_token(page_token),
                limit=limit + 1,
            )
        token = page_token_of(found[limit - 1].opened, found[limit - 1].id) if len(found) > limit else ""
        return found[:limit], token

    async def take_alarms(self, connection: Connection, alarms: Sequence[Alarm]) -> None:
        """Turn raised alarms into needs where the firm's consent covers them, in the caller's transaction.

        Safe to repeat: ids are derived from the alarm. Without consent nothing is stored, the alarm is only counted.
        """
        covered: list[tuple[Alarm, Consent]] = []
        consents: dict[int, Consent | None] = {}
        for alarm in alarms:
            if alarm.firm_id not in consents:
                consents[alarm.firm_id] = await consents_store.current_consent(connection, alarm.firm_id, hold=True)
            consent = consents[alarm.firm_id]
            coverage = _coverage(consent, alarm, self._now())
            if consent is not None and coverage is Coverage.COVERED:
                covered.append((alarm, consent))
            else:
                alarms_total.labels(coverage).inc()
        await needs_store.lock_machines(connection, {alarm.machine_id for alarm, _ in covered})
        known = await needs_store.known_alarms(connection, {alarm.id for alarm, _ in covered})
        for alarm, consent in covered:
            with correlated(alarm.correlation_id):
                if alarm.id in known:
                    alarms_total.labels("repeated").inc()
                    continue
                known.add(alarm.id)
                alarms_total.labels(await self._take_alarm(connection, alarm, consent)).inc()

    async def _take_alarm(self, connection: Connection, alarm: Alarm, consent: Consent) -> str:
        since = alarm.raised - self._limits.episode_gap
        need_id = await needs_store.need_of_fault(connection, alarm.machine_id, since=since)
        if need_id is not None:
            await needs_store.attach_alarm(connection, need_id, alarm.id, raised=alarm.raised)
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
            shown=SharedItem.PARTNERS in consent.shared,
        )
        opened = await self._open(connection, need, await self._offers.rank(need), raised=alarm.raised)
        await tell_of_offers(connection, opened.offers)
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
        offers: Sequence[Offer] = ()
        why = str(NoOffer.WAITS_FOR_ROUND)
        if not need.waits:
            offers, why = await self._offers.choose(connection, need, ranking)
        need = replace(need, offers=len(offers), no_offer_reason=why)
        expires = need.opened + self._limits.need_lifetime
        await needs_store.add_need(
            connection, need, expires=expires, request_id=request_id, request_sha256=request_sha256
        )
        if ranking.question is not None:
            await needs_store.keep_vectors(connection, {need.id: stored(ranking.question)}, model=ranking.model_id)
        for alarm_id in need.alarm_ids:
            await needs_store.attach_alarm(connection, need.id, alarm_id, raised=raised or need.opened)
        await self._offers.make(connection, offers)
        needs_opened_total.labels(need.source).inc()
        if why:
            needs_without_offers_total.labels(why).inc()
        log.info("need opened", need=need.id, firm=need.firm_id, source=need.source, offers=len(offers), reason=why)
        return OpenedNeed(need, offers)

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _coverage(consent: Consent | None, alarm: Alarm, now: datetime) -> Coverage:
    if consent is None:
        return Coverage.NO_CONSENT
    return consent.coverage(machine_id=alarm.machine_id, severity=alarm.severity, raised=alarm.raised, now=now)
