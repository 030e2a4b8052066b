"""The programme's public money: what it was given, and how the calls draw on it.

The account `programme_budget` holds what no call has yet. It cannot go below zero, so the budgets of all calls together never
pass what the programme was given, however many are set up at once.
"""

from services.common.clock import Clock
from services.common.database import Connection
from services.common.errors import Conflict
from services.common.logs import get_logger
from services.funding import ledger
from services.funding.ledger import PROGRAMME, Account, AccountKind, Event, Purpose, Transfer
from services.funding.rules.exact import gbp

log = get_logger(__name__)

SOURCE = Account(PROGRAMME, AccountKind.PUBLIC_SOURCE)
BUDGET = Account(PROGRAMME, AccountKind.PROGRAMME_BUDGET)
# Entries that the service makes by itself, from the parameters.
NOBODY = 0


class ProgrammeExhausted(Conflict):
    """The programme does not have that much left; lower the call's budget."""

    REASON = "PROGRAMME_EXHAUSTED"


async def open_programme(connection: Connection, clock: Clock, *, public_pence: int) -> None:
    """Bring what the programme was given up to the figure of the parameters, and take over calls that had a source of their
    own. Safe to repeat, and to do in several processes at once. Raises ProgrammeExhausted when those calls have more."""
    await ledger.lock(connection)
    given_pence = -(await ledger.balances(connection, PROGRAMME))[AccountKind.PUBLIC_SOURCE]
    if given_pence > public_pence:
        # Money given cannot be ungiven by a new row of the table: a person must look.
        log.error("programme was given more than its parameter says", given_pence=given_pence, says_pence=public_pence)
    if given_pence < public_pence:
        entry = Transfer(
            debit=SOURCE,
            credit=BUDGET,
            amount_pence=public_pence - given_pence,
            purpose=Purpose.PROGRAMME_GIVEN,
            subject_id=str(public_pence),
        )
        event = Event(
            request_id=f"programme:given:{public_pence}",
            kind="programme_given",
            credential_id=NOBODY,
            transfers=(entry,),
        )
        await ledger.post(connection, clock, event)
        log.info("programme given its public money", given_pence=public_pence)
    rows = await connection.fetch(
        "SELECT call_id, -balance_pence AS pence FROM ledger_account "
        "WHERE kind = 'public_source' AND call_id <> $1 AND balance_pence < 0 ORDER BY id",
        PROGRAMME,
    )
    for row in rows:
        own_source = Account(row["call_id"], AccountKind.PUBLIC_SOURCE)
        await _allot(connection, clock, own_source, row["pence"], kind="call_taken_over", credential_id=NOBODY)


async def allot(connection: Connection, clock: Clock, *, call_id: str, budget_pence: int, credential_id: int) -> None:
    """Give a new call its budget. Raises ProgrammeExhausted."""
    to = Account(call_id, AccountKind.PUBLIC_BUDGET)
    await _allot(connection, clock, to, budget_pence, kind="call_created", credential_id=credential_id)


async def _allot(
    connection: Connection, clock: Clock, to: Account, pence: int, *, kind: str, credential_id: int
) -> None:
    await ledger.lock(connection)
    left_pence = (await ledger.balances(connection, PROGRAMME))[AccountKind.PROGRAMME_BUDGET]
    if pence > left_pence:
        raise ProgrammeExhausted(
            f"{gbp(left_pence)} of the programme's public money is not allotted yet, and the call asks for {gbp(pence)}; "
            "lower its budget."
        )
    transfer = Transfer(
        debit=BUDGET, credit=to, amount_pence=pence, purpose=Purpose.BUDGET_ALLOTTED, subject_id=to.call_id
    )
    event = Event(
        request_id=f"call:{to.call_id}:allotted", kind=kind, credential_id=credential_id, transfers=(transfer,)
    )
    await ledger.post(connection, clock, event)
