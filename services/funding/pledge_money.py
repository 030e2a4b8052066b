"""The co-investors' money in the ledger: confirmed, committed with the award, or released."""

from collections.abc import Sequence

from services.common.clock import Clock
from services.common.database import Connection
from services.common.identity import Caller
from services.common.logs import correlated
from services.funding import checks, ledger
from services.funding.domain import Application, Call, Pledge
from services.funding.judging import call_of
from services.funding.ledger import Account, AccountKind, Event, Purpose, Transfer

_PLEDGE_PATHS = {
    Purpose.PLEDGE_CONFIRMED: (AccountKind.CO_INVESTMENT_SOURCE, AccountKind.CO_INVESTMENT_PLEDGED),
    Purpose.PLEDGE_COMMITTED: (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_COMMITTED),
    Purpose.PLEDGE_RELEASED: (AccountKind.CO_INVESTMENT_PLEDGED, AccountKind.CO_INVESTMENT_SOURCE),
}


async def post_pledges(
    connection: Connection,
    clock: Clock,
    caller: Caller,
    call: Call,
    pledges: Sequence[Pledge],
    *,
    request_id: str,
    kind: str,
    purpose: Purpose,
    before: tuple[Transfer, ...] = (),
) -> None:
    """Move the business money of the pledges as the purpose says, after the transfers of `before`, as one event."""
    debit, credit = _PLEDGE_PATHS[purpose]
    transfers = before + tuple(
        Transfer(
            debit=Account(call.id, debit),
            credit=Account(call.id, credit),
            amount_pence=checks.counted_pence(pledge, call),
            purpose=purpose,
            subject_id=pledge.id,
        )
        for pledge in pledges
        if checks.counted_pence(pledge, call)
    )
    if transfers:
        await ledger.post(
            connection,
            clock,
            Event(request_id=request_id, kind=kind, transfers=transfers, credential_id=caller.credential_id),
        )


async def release_pledges(connection: Connection, clock: Clock, caller: Caller, application: Application) -> None:
    call = await call_of(connection, application.call_id)
    with correlated(application.correlation_id):
        await post_pledges(
            connection,
            clock,
            caller,
            call,
            [pledge for pledge in application.pledges if pledge.confirmed_us is not None],
            request_id=f"application:{application.id}:released",
            kind="pledges_released",
            purpose=Purpose.PLEDGE_RELEASED,
        )
