"""The use cases of providers."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta

from services.common.clock import Clock, from_us, today
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Forbidden, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.matching import notices
from services.matching.domain import Assesses, Kind
from services.matching.index import ProviderIndex
from services.matching.needs import quarter_of
from services.matching.providers import ProviderRecord
from services.matching.service.checks import (
    CHOSEN_ID,
    KNOWN_TIMEOUT_S,
    LIST_ITEMS_MAX,
    NOTE_CHARACTERS_MAX,
    TEXT_CHARACTERS_MAX,
    TITLE_CHARACTERS_MAX,
    after_id,
    check_esco_skills,
    check_text,
    chosen_id,
    page_size_of,
)
from services.matching.store import notices as notices_store
from services.matching.store import providers as providers_store

log = get_logger(__name__)

CAPACITY_MAX = 100_000
LEAD_DAYS_MAX = 366

# Who puts a profile has looked through it; two years on it is looked through again.
REVIEW_WITHIN_MAX = timedelta(days=731)

# So many days before a provider is not offered any more its partner is told; 0: once it is not.
TOLD_DAYS_AHEAD = (30, 7, 0)
# What ended longer ago than this is no news.
TOLD_AFTERWARDS = timedelta(days=30)
ENDING_AT_ONCE_MAX = 500

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DIVISION = re.compile(r"\d{2}|any")


class Providers:
    """Who can help, as partners describe it."""

    def __init__(self, pool: Pool, index: ProviderIndex, directory: Directory, *, clock: Clock) -> None:
        self._pool = pool
        self._index = index
        self._directory = directory
        self._clock = clock
        self._told_on: date | None = None

    async def put_provider(self, caller: Caller, provider: ProviderRecord) -> ProviderRecord:
        """Create or replace. On return this process ranks it; the others do within POLL_INTERVAL_S."""
        caller.require(Role.PARTNER, Role.OPERATOR)
        _check_provider(provider)
        _check_review(provider, today(self._clock))
        partner_id = provider.partner_id
        if caller.role is Role.PARTNER:
            if partner_id not in (0, caller.partner_id):
                raise Forbidden("This key does not belong to that partner.")
            partner_id = caller.partner_id
        if not await self._directory.wait_for("partner", partner_id, timeout_s=KNOWN_TIMEOUT_S):
            raise NotFound(f"There is no partner {partner_id}; name one that is registered.", reason="UNKNOWN_PARTNER")
        async with transaction(self._pool) as connection:
            change = await providers_store.next_provider_change(connection)
            before = await providers_store.lock_provider(connection, provider.id)
            if before is not None and caller.role is Role.PARTNER and before.partner_id != caller.partner_id:
                raise Forbidden("A provider of another partner has this id; choose another.", reason="ID_TAKEN")
            if (
                before is not None
                and before.partner_id != partner_id
                and await providers_store.in_use(connection, before.id)
            ):
                raise Conflict(
                    "It has been offered or has sessions, which stay with its partner; put it under another id.",
                    reason="PROVIDER_IN_USE",
                )
            now = self._now()
            await providers_store.put_provider(
                connection, replace(provider, partner_id=partner_id, active=True, change=change, changed=now)
            )
            await providers_store.set_quarter_capacities(
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
            change = await providers_store.next_provider_change(connection)
            before = await providers_store.lock_provider(connection, chosen_id(provider_id))
            if before is None or (caller.role is Role.PARTNER and before.partner_id != caller.partner_id):
                raise NotFound(f"There is no provider {provider_id} of yours.")
            if before.active:
                await providers_store.put_provider(
                    connection, replace(before, active=False, change=change, changed=self._now())
                )
            stored = await self._provider(connection, provider_id)
        await self._index.refresh()
        log.info("provider withdrawn", provider=provider_id)
        return stored

    async def get_provider(self, caller: Caller, provider_id: str) -> ProviderRecord:
        """A provider sees itself only."""
        caller.require(Role.FIRM, Role.PARTNER, Role.PROVIDER, Role.OPERATOR)
        if caller.role is Role.PROVIDER and caller.provider_id != provider_id:
            raise NotFound(f"There is no provider {provider_id}.")
        async with transaction(self._pool) as connection:
            found = await self._provider(connection, chosen_id(provider_id))
        if caller.role is Role.FIRM and not found.is_live(today(self._clock)):
            raise NotFound(f"There is no provider {provider_id}.")
        return _as_seen_by(caller, found)

    async def list_providers(
        self, caller: Caller, *, partner_id: int, kind: Kind | None, page_size: int, page_token: str
    ) -> tuple[list[ProviderRecord], str]:
        """A page and the token of the next ("": there is none)."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        limit = page_size_of(page_size)
        day = today(self._clock)
        async with transaction(self._pool) as connection:
            found = await providers_store.list_providers(
                connection,
                quarter=quarter_of(day),
                partner_id=partner_id,
                kind=kind,
                live_on=day if caller.role is Role.FIRM else None,
                after=after_id(page_token),
                limit=limit + 1,
            )
        token = found[limit - 1].id if len(found) > limit else ""
        return [_as_seen_by(caller, each) for each in found[:limit]], token

    async def tell_of_due_providers(self) -> None:
        """Tell partners of providers that are soon not offered any more, once for each of TOLD_DAYS_AHEAD; looked at once a day."""
        day = today(self._clock)
        if day == self._told_on:
            return
        after_id = ""
        while True:
            async with transaction(self._pool) as connection:
                ending = await providers_store.ending_providers(
                    connection,
                    after=day - TOLD_AFTERWARDS,
                    until=day + timedelta(days=max(TOLD_DAYS_AHEAD)),
                    after_id=after_id,
                    limit=ENDING_AT_ONCE_MAX,
                )
                told = [notices.of_due_provider(each, _days_ahead(each, day), made=self._now()) for each in ending]
                await notices_store.add_notices(connection, told)
            if len(ending) < ENDING_AT_ONCE_MAX:
                break
            after_id = ending[-1].id
        self._told_on = day

    async def _provider(self, connection: Connection, provider_id: str) -> ProviderRecord:
        found = await providers_store.provider(connection, provider_id, quarter=quarter_of(today(self._clock)))
        if found is None:
            raise NotFound(f"There is no provider {provider_id}.")
        return found

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _days_ahead(provider: ProviderRecord, day: date) -> int:
    """The least of TOLD_DAYS_AHEAD that its end is within."""
    assert provider.offered_until is not None, "it was found by its end"
    return min(days for days in TOLD_DAYS_AHEAD if provider.offered_until <= day + timedelta(days=days))


def _as_seen_by(caller: Caller, provider: ProviderRecord) -> ProviderRecord:
    if caller.role is Role.OPERATOR or caller.acts_for(provider_id=provider.id, partner_id=provider.partner_id):
        return provider
    return provider.without_conflicts()


def _check_provider(provider: ProviderRecord) -> None:
    if not CHOSEN_ID.fullmatch(provider.id):
        raise Invalid("An id has 1 to 64 letters, digits, dots, dashes and underscores.", reason="BAD_ID")
    if not provider.title.strip():
        raise Invalid("A provider has a title.", reason="TITLE_MISSING")
    if not provider.text.strip():
        raise Invalid("A provider says in its text what it offers.", reason="TEXT_MISSING")
    check_text("title", provider.title, TITLE_CHARACTERS_MAX)
    check_text("text", provider.text, TEXT_CHARACTERS_MAX)
    check_text("region", provider.region, TITLE_CHARACTERS_MAX)
    lists: Mapping[str, Sequence[object]] = {
        "regions_served": provider.regions_served,
        "sic_divisions": provider.sic_divisions,
        "sic_excluded": provider.sic_excluded,
        "sizes_served": provider.sizes_served,
        "skills": provider.skills,
        "esco_skills": provider.esco_skills,
        "evidence": provider.evidence,
        "conflict_firm_ids": provider.conflict_firm_ids,
        "conflict_organisations": provider.conflict_organisations,
    }
    for name, items in lists.items():
        if len(items) > LIST_ITEMS_MAX:
            raise Invalid(f"{name} has more than {LIST_ITEMS_MAX} items.", reason="TOO_MANY")
    for item in (*provider.regions_served, *provider.skills, *provider.conflict_organisations):
        check_text("items of regions_served, skills and conflict_organisations", item, TITLE_CHARACTERS_MAX)
    if provider.assesses is not Assesses.NO and provider.kind is not Kind.EXPERT:
        raise Invalid(
            "Only experts assess applications; put the person as a provider of their own.", reason="NOT_AN_EXPERT"
        )
    if not all(_DIVISION.fullmatch(division) for division in (*provider.sic_divisions, *provider.sic_excluded)):
        raise Invalid('A SIC division has two digits, such as "25", or is "any".', reason="BAD_SIC_DIVISION")
    if provider.capacity_per_quarter is not None and not 1 <= provider.capacity_per_quarter <= CAPACITY_MAX:
        raise Invalid(
            f"capacity_per_quarter is 1 to {CAPACITY_MAX} (a course has no limit); withdraw a provider that takes nothing.",
            reason="BAD_CAPACITY",
        )
    if not 0 <= provider.lead_days <= LEAD_DAYS_MAX:
        raise Invalid(f"lead_days is 0 to {LEAD_DAYS_MAX}.", reason="BAD_LEAD_DAYS")
    check_esco_skills(provider.esco_skills)
    for evidence in provider.evidence:
        if not evidence.title.strip() or not evidence.reference.strip():
            raise Invalid("A document has a title and a reference.", reason="BAD_EVIDENCE")
        check_text("title of evidence", evidence.title, TITLE_CHARACTERS_MAX)
        check_text("reference of evidence", evidence.reference, NOTE_CHARACTERS_MAX)
        if not _SHA256.fullmatch(evidence.sha256):
            raise Invalid("The sha256 of a document has 64 hexadecimal digits, lower case.", reason="BAD_EVIDENCE")


def _check_review(provider: ProviderRecord, day: date) -> None:
    if provider.review_on is not None and not day < provider.review_on <= day + REVIEW_WITHIN_MAX:
        raise Invalid(
            f"review_on is a day after today, within {REVIEW_WITHIN_MAX.days} days: who puts a profile has looked through it.",
            reason="BAD_REVIEW_DATE",
        )
