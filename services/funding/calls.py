"""Calls: set up once, with a budget out of the programme's money; open and closed by the time alone."""

import dataclasses
import uuid

from services.common.clock import Clock, from_us
from services.common.database import Pool, transaction
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import award_store, call_store, ledger, programme
from services.funding.award_store import Note
from services.funding.domain import (
    TITLE_CHARACTERS_MAX,
    Call,
    CallState,
    Terms,
    checked_amount,
    checked_rate,
    checked_request_id,
    checked_text,
    checked_times,
    uk_day,
)
from services.funding.journal import Journal
from services.funding.judging import call_of, there
from services.funding.ledger import Account, AccountKind, Event, Purpose, Transfer
from services.funding.paging import next_token, page
from services.funding.parameters import ParameterTable
from services.funding.requests import check_same, content_sha256, understood
from services.funding.rules.intensity import Category
from services.funding.rules.size import Definition
from services.funding.terms import checked_terms

log = get_logger(__name__)

NO_TERMS = Terms()


class CallService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, journal: Journal, table: ParameterTable, clock: Clock) -> None:
        self._pool = pool
        self._journal = journal
        self._table = table
        self._clock = clock

    async def open_programme(self) -> None:
        """Before anything else: the programme has the public money that the parameters of the day say."""
        public_pence = self._table.at(uk_day(from_us(self._clock.now_us()))).whole("programme.public_p")
        async with transaction(self._pool) as connection:
            await programme.open_programme(connection, self._clock, public_pence=public_pence)

    async def create_call(
        self,
        caller: Caller,
        *,
        request_id: str,
        title: str,
        budget_pence: int,
        opens_us: int,
        closes_us: int,
        category: Category,
        size_definition: Definition,
        rate_max: str,
        in_kind_allowed: bool,
        terms: Terms = NO_TERMS,
    ) -> Call:
        caller.require(Role.OPERATOR)
        now_us = self._clock.now_us()
        with understood():
            checked_request_id(request_id)
            checked_times(opens_us, closes_us)
            call = Call(
                id=uuid.uuid4().hex,
                title=checked_text("title", title, TITLE_CHARACTERS_MAX),
                budget_pence=checked_amount("budget_pence", budget_pence),
                opens_us=opens_us,
                closes_us=closes_us,
                category=category,
                size_definition=size_definition,
                rate_max=checked_rate("rate_max", rate_max) if rate_max else "",
                in_kind_allowed=in_kind_allowed,
                created_us=now_us,
                terms=checked_terms(terms, budget_pence=budget_pence),
            )
        content = content_sha256(dataclasses.replace(call, id="", created_us=0))
        async with transaction(self._pool) as connection:
            if not await call_store.add_call(connection, call, request_id=request_id, content_sha256=content):
                first_content, first = there(await call_store.call_by_request(connection, request_id))
                check_same(first_content, content)
                return first
            await ledger.open_accounts(connection, call.id)
            await programme.allot(
                connection,
                self._clock,
                call_id=call.id,
                budget_pence=call.budget_pence,
                credential_id=caller.credential_id,
            )
            await award_store.audit(
                connection,
                "call_created",
                credential_id=caller.credential_id,
                now_us=now_us,
                call_id=call.id,
                detail={"title": call.title, "budget_pence": call.budget_pence},
            )
        log.info("call created", call_id=call.id, budget_pence=call.budget_pence)
        return call

    async def move_budget(
        self, caller: Caller, call_id: str, *, request_id: str, change_pence: int, reason: str
    ) -> Call:
        """Give a call more of what the programme has left, or (below zero) return what the call has promised nobody."""
        caller.require(Role.OPERATOR)
        with understood():
            checked_request_id(request_id)
            checked_amount("change_pence without its sign", abs(change_pence))
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            await call_of(connection, call_id)
        of_call = Account(call_id, AccountKind.PUBLIC_BUDGET)
        more = change_pence > 0
        moved = Transfer(
            debit=programme.BUDGET if more else of_call,
            credit=of_call if more else programme.BUDGET,
            amount_pence=abs(change_pence),
            purpose=Purpose.BUDGET_MOVED,
            subject_id=f"{call_id}/{request_id}",
        )
        event = Event(
            request_id=f"call:{call_id}:moved:{request_id}",
            kind="budget_moved",
            transfers=(moved,),
            credential_id=caller.credential_id,
        )
        detail: dict[str, str | int] = {"change_pence": change_pence, "reason": reason}
        await self._journal.post(event, Note(action="budget_moved", call_id=call_id, detail=detail))
        log.info("budget moved", call_id=call_id, change_pence=change_pence)
        async with transaction(self._pool) as connection:
            return await call_of(connection, call_id)

    async def get_call(self, caller: Caller, call_id: str) -> Call:
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await call_of(connection, call_id)

    async def list_calls(self, caller: Caller, *, page_size: int, page_token: str) -> tuple[list[Call], str]:
        """A page, newest first, and the token of the next one (empty: there is none)."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        limit, after = page(page_size, page_token)
        async with transaction(self._pool) as connection:
            found = await call_store.calls(connection, after=after, limit=limit + 1)
        return found[:limit], next_token(found, limit)

    def state_of(self, call: Call) -> CallState:
        return call.state_at(self._clock.now_us())
