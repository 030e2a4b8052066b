"""What the use cases share: finding calls and applications for a caller, and judging applications by the rules of the day."""

from dataclasses import dataclass
from typing import TypeVar

from services.common.clock import Clock, from_us
from services.common.database import Connection
from services.common.errors import Forbidden, NotFound
from services.common.identity import Caller, Role
from services.common.logs import correlated
from services.funding import application_store, award_store, call_store, checks, group_store, ledger
from services.funding.domain import Application, ApplicationState, Assessment, Call, is_id, uk_day
from services.funding.ledger import AccountKind
from services.funding.parameters import ParameterTable
from services.funding.requests import understood
from services.funding.rules.exact import decimal
from services.funding.rules.size import Relation

T = TypeVar("T")

LIVE = (ApplicationState.DRAFT, ApplicationState.SUBMITTED)


@dataclass(frozen=True, kw_only=True)
class View:
    """An application with what the rules say about it today; after the decision the award says what they said."""

    application: Application
    assessment: Assessment | None


class Judge:
    """Applies the rules to applications, with what the ledger and earlier awards say."""

    def __init__(self, *, table: ParameterTable, clock: Clock) -> None:
        self._table = table
        self._clock = clock

    async def view(self, connection: Connection, application: Application, call: Call | None = None) -> View:
        if application.state not in LIVE:
            return View(application=application, assessment=None)
        call = call or await call_of(connection, application.call_id)
        assessment = await self.assess_application(connection, application, call)
        return View(application=application, assessment=assessment)

    async def assess_application(self, connection: Connection, application: Application, call: Call) -> Assessment:
        facts = checks.Facts(
            sic=application.sic,
            declaration=application.declaration,
            eligible_pence=application.eligible_pence,
            requested_pence=application.grant_pence or application.requested_pence,
            other_public_pence=application.other_public_pence,
            partners=application.content.partners,
            pledges=application.pledges,
            given=await award_store.given_to(connection, application.firm_id),
            related=await self._related(connection, application.firm_id),
            match=there(await call_store.match_of(connection, application.match_id)),
        )
        return await self.assess(connection, facts, call)

    async def _related(self, connection: Connection, firm_id: int) -> list[checks.Related]:
        """Linked firms and partners, each once."""
        percents: dict[int, str] = {}
        for holding in await group_store.holdings_of(connection, [firm_id]):
            if holding.relation is not Relation.AUTONOMOUS:
                other = holding.owned_firm_id if holding.owner_firm_id == firm_id else holding.owner_firm_id
                percents[other] = max(holding.percent, percents.get(other, "0"), key=decimal)
        return [checks.Related(firm_id=other, percent=percent) for other, percent in sorted(percents.items())]

    async def assess(self, connection: Connection, facts: checks.Facts, call: Call) -> Assessment:
        of_call, of_fund = await ledger.balances(connection, call.id), await ledger.balances(connection)
        fund = checks.Fund(
            left_pence=of_call[AccountKind.PUBLIC_BUDGET],
            public_committed_pence=ledger.public_promised(of_fund),
            business_committed_pence=ledger.business_promised(of_fund),
        )
        with understood():
            return checks.assess(facts, call, fund, self._table, uk_day(from_us(self._clock.now_us())))


async def call_of(connection: Connection, call_id: str) -> Call:
    call = await call_store.call_of(connection, call_id) if is_id(call_id) else None
    if call is None:
        raise NotFound("There is no such call.", reason="CALL_UNKNOWN")
    return call


async def application_of(
    connection: Connection, caller: Caller, application_id: str, *, lock: bool = False
) -> Application:
    if caller.role not in (Role.FIRM, Role.OPERATOR):
        raise Forbidden("Applications are for the firm's own key and for operators.")
    found = (
        await application_store.application_of(connection, application_id, lock=lock) if is_id(application_id) else None
    )
    if found is None or (caller.role is Role.FIRM and found.firm_id != caller.firm_id):
        raise NotFound("There is no such application, or this key may not see it.", reason="APPLICATION_UNKNOWN")
    return found


async def audit_application(
    connection: Connection,
    clock: Clock,
    caller: Caller,
    action: str,
    application: Application,
    detail: dict[str, str | int],
) -> None:
    with correlated(application.correlation_id):
        await award_store.audit(
            connection,
            action,
            credential_id=caller.credential_id,
            now_us=clock.now_us(),
            call_id=application.call_id,
            application_id=application.id,
            detail=detail,
        )


def there(found: T | None) -> T:
    assert found is not None, "the row that this transaction has just met"
    return found
