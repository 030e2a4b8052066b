"""What every change of an agreement shares: held while it is changed, its money moved, noted for the auditors, published."""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import date

from services.common import outbox, topics
from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated
from services.common.messages import message_of
from services.funding import agreement_store as store
from services.funding import award_store, ledger
from services.funding.agreement import (
    Agreement,
    AgreementState,
)
from services.funding.domain import is_id, uk_day
from services.funding.ledger import Account, AccountKind, Event, Purpose, Transfer
from services.funding.parameters import ParameterTable
from services.funding.rules.claims import payable_before_completion
from services.funding.rules.exact import rate_text
from smdih.funding.v1 import events_pb2


class AgreementChanges:
    """Whoever changes an agreement does it through this."""

    def __init__(self, pool: Pool, *, table: ParameterTable, clock: Clock, kick: Callable[[], None]) -> None:
        self._pool = pool
        self._table = table
        self._clock = clock
        # Tells the outbox relay that there is something.
        self._kick = kick

    @asynccontextmanager
    async def changing(self, caller: Caller, award_id: str) -> AsyncIterator[tuple[Connection, Agreement]]:
        """A transaction in which nobody else changes the agreement, under the correlation id of the award."""
        async with transaction(self._pool) as connection:
            award = (await agreement_seen_by(connection, caller, award_id)).award
            retention = self._table.at(award.awarded_on).exact("claim.retention_rate")
            with correlated(award.correlation_id):
                await store.lock_agreement(
                    connection,
                    award,
                    retention_rate=rate_text(retention),
                    before_completion_pence_max=payable_before_completion(award.grant_pence, retention),
                )
                yield connection, await agreement_seen_by(connection, caller, award_id)
        self._kick()

    async def post(
        self,
        connection: Connection,
        caller: Caller,
        agreement: Agreement,
        request_id: str,
        kind: str,
        cause: str,
        moves: Sequence[tuple[Purpose, int]],
    ) -> None:
        call_id = agreement.award.call_id
        transfers = tuple(
            Transfer(
                debit=Account(call_id, _PATHS[purpose][0]),
                credit=Account(call_id, _PATHS[purpose][1]),
                amount_pence=pence,
                purpose=purpose,
                subject_id=f"{agreement.award.id}/{cause}",
            )
            for purpose, pence in moves
            if pence
        )
        if transfers:
            event = Event(request_id=request_id, kind=kind, transfers=transfers, credential_id=caller.credential_id)
            await ledger.post(connection, self._clock, event)

    async def audit(
        self, connection: Connection, caller: Caller, action: str, agreement: Agreement, detail: Mapping[str, str | int]
    ) -> None:
        await award_store.audit(
            connection,
            action,
            credential_id=caller.credential_id,
            now_us=self._clock.now_us(),
            call_id=agreement.award.call_id,
            application_id=agreement.award.application_id,
            detail={"award_id": agreement.award.id, **detail},
        )

    async def publish(
        self, connection: Connection, agreement: Agreement, change: events_pb2.AwardChange.ValueType, cause: str
    ) -> None:
        award = agreement.award
        event = events_pb2.AwardEvent(
            event_id=f"{award.id}:{cause}",
            changed_us=self._clock.now_us(),
            award=message_of(events_pb2.Award, award),
            change=change,
            paid_pence=agreement.paid_pence,
            held_pence=agreement.held_pence,
            recovered_pence=agreement.recovered_pence,
            restored_pence=agreement.restored_pence,
        )
        await outbox.write(connection, topics.AWARDS, key=award.id, value=event.SerializeToString())

    def today(self) -> date:
        return uk_day(from_us(self._clock.now_us()))


_PATHS = {
    Purpose.CLAIM_PAID: (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_PAID),
    Purpose.CLAIM_HELD: (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_HELD),
    Purpose.HELD_PAID: (AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_PAID),
    Purpose.HELD_RESTORED: (AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_BUDGET),
    Purpose.GRANT_RESTORED: (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_BUDGET),
    Purpose.GRANT_RECOVERED: (AccountKind.PUBLIC_PAID, AccountKind.PUBLIC_RECOVERED),
    Purpose.BUSINESS_PAID: (AccountKind.CO_INVESTMENT_COMMITTED, AccountKind.CO_INVESTMENT_PAID),
    Purpose.BUSINESS_RESTORED: (AccountKind.CO_INVESTMENT_COMMITTED, AccountKind.CO_INVESTMENT_SOURCE),
}


async def agreement_seen_by(connection: Connection, caller: Caller, award_id: str) -> Agreement:
    caller.require(Role.FIRM, Role.OPERATOR)
    found = await store.agreement_of(connection, award_id) if is_id(award_id) else None
    if found is None or (caller.role is Role.FIRM and found.award.firm_id != caller.firm_id):
        raise NotFound("There is no such award, or this key may not see it.", reason="AWARD_UNKNOWN")
    return found


def check_state(agreement: Agreement, *states: AgreementState) -> None:
    if agreement.state not in states:
        raise Conflict(
            f"The award is {agreement.state}; this is for one that is {' or '.join(states)}.",
            reason=f"AWARD_{agreement.state.upper()}",
        )
