"""What the fund owes the public: its awards in the 360Giving standard, and entries in the subsidy database in time."""

import re
from dataclasses import dataclass
from datetime import date

from services.common.clock import Clock, from_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated
from services.funding import agreement_store
from services.funding.agreement_store import EntryDue, PublicAward
from services.funding.award_store import audit
from services.funding.domain import checked_text, is_id, uk_day
from services.funding.requests import understood

AWARDS_PER_PAGE = 1_000
ENTRIES_MAX = 1_000

_PAGE_TOKEN = re.compile(r"(\d{1,16})-([A-Za-z0-9._:-]{1,100})", re.ASCII)
_YEAR_2100_US = 4_102_444_800_000_000


@dataclass(frozen=True, kw_only=True)
class Published:
    """An award with the recipient's name. Firms only: no person is named."""

    award: PublicAward
    recipient: str


@dataclass(frozen=True, kw_only=True)
class Duty:
    """An entry to be made; `days_left` is negative once it is overdue."""

    entry: EntryDue
    recipient: str
    days_left: int


class OpenDataService:
    """The use cases. Awards are for everybody; the list of duties is for operators."""

    def __init__(self, pool: Pool, *, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._directory = directory
        self._clock = clock

    async def awards(self, *, page_token: str) -> tuple[list[Published], str]:
        """A page, oldest first, and the token of the next one (empty: there is none)."""
        after_us, after_id = 0, ""
        if page_token:
            token = _PAGE_TOKEN.fullmatch(page_token)
            if token is None or int(token[1]) > _YEAR_2100_US:
                raise Invalid("page_token is not one that was given here.", reason="PAGE_TOKEN_INVALID")
            after_us, after_id = int(token[1]), token[2]
        async with transaction(self._pool) as connection:
            found = await agreement_store.public_awards(
                connection, after_us=after_us, after_id=after_id, limit=AWARDS_PER_PAGE + 1
            )
        page = found[:AWARDS_PER_PAGE]
        following = f"{page[-1].awarded_us}-{page[-1].id}" if len(found) > AWARDS_PER_PAGE else ""
        return [Published(award=award, recipient=self._name(award.firm_id)) for award in page], following

    async def duties(self, caller: Caller) -> list[Duty]:
        """Entries in the subsidy database that are due, the most urgent first; at most ENTRIES_MAX."""
        caller.require(Role.OPERATOR)
        today = self._today()
        async with transaction(self._pool) as connection:
            found = await agreement_store.entries_due(connection, limit=ENTRIES_MAX)
        return [
            Duty(entry=entry, recipient=self._name(entry.firm_id), days_left=(entry.due - today).days)
            for entry in found
        ]

    async def record_entry(self, caller: Caller, award_id: str, *, reference: str) -> None:
        """The entry is made, under this reference of the database. A repeat changes nothing."""
        caller.require(Role.OPERATOR)
        with understood():
            reference = checked_text("reference", reference)
        async with transaction(self._pool) as connection:
            found = await agreement_store.agreement_of(connection, award_id) if is_id(award_id) else None
            if found is None or found.award.database_entry_due is None:
                raise NotFound("There is no such award that needs an entry.", reason="AWARD_UNKNOWN")
            award, now_us = found.award, self._clock.now_us()
            added = await agreement_store.add_entry(
                connection, award_id, reference=reference, credential_id=caller.credential_id, now_us=now_us
            )
            if added:
                with correlated(award.correlation_id):
                    await audit(
                        connection,
                        "subsidy_entry_recorded",
                        credential_id=caller.credential_id,
                        now_us=now_us,
                        call_id=award.call_id,
                        application_id=award.application_id,
                        detail={"award_id": award_id, "reference": reference},
                    )

    def _name(self, firm_id: int) -> str:
        firm = self._directory.firms.get(firm_id)
        return firm.name if firm is not None and firm.name else f"Firm {firm_id}"

    def _today(self) -> date:
        return uk_day(from_us(self._clock.now_us()))
