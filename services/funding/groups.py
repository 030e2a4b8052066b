"""Which firms are one enterprise, and how much minimal financial assistance it may still be given (MFA-1 to MFA-4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import award_store, group_store, ledger
from services.funding.award_store import Note
from services.funding.checks import GROUP, Given
from services.funding.domain import TITLE_CHARACTERS_MAX, checked_percent, checked_text, is_id, uk_day
from services.funding.group_store import Group, Holding
from services.funding.parameters import ParameterTable
from services.funding.requests import understood
from services.funding.rules.assistance import Assistance, AssistanceKind, mfa_check
from services.funding.rules.size import relation_between

log = get_logger(__name__)

FIRMS_PER_GROUP_MAX = 200


@dataclass(frozen=True, kw_only=True)
class Headroom:
    """What this fund gave a firm and its sisters that counts today, and what the limit leaves beside it. What others gave the
    group is known only from each application's declaration and is not in it."""

    firm_ids: tuple[int, ...]
    window_start: date
    given: tuple[Given, ...]
    counted_pence: int
    headroom_pence: int


@dataclass(frozen=True, kw_only=True)
class Enterprise:
    """A firm and all that are one enterprise with it, and what that rests on. Holdings that make no link are among them: a partner
    firm's figures count in part when the size is computed."""

    firm_id: int
    firm_ids: tuple[int, ...]
    # Declared by operators.
    groups: tuple[str, ...]
    holdings: tuple[Holding, ...]


class GroupService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, table: ParameterTable, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._table = table
        self._directory = directory
        self._clock = clock

    async def set_group(self, caller: Caller, group_id: str, *, firm_ids: Sequence[int], source: str) -> Group:
        """These firms, and no others, are the group; none gives it up. No award is made while it changes."""
        caller.require(Role.OPERATOR)
        with understood():
            source = checked_text("source", source, TITLE_CHARACTERS_MAX)
        if not is_id(group_id):
            raise Invalid("A group's id has 1 to 100 letters, digits or . _ : -", reason="GROUP_ID_INVALID")
        if len(set(firm_ids)) != len(firm_ids) or len(firm_ids) == 1 or len(firm_ids) > FIRMS_PER_GROUP_MAX:
            raise Invalid(
                f"A group has 2 to {FIRMS_PER_GROUP_MAX} different firms, or none to give it up.",
                reason="GROUP_INVALID",
            )
        unknown = [firm_id for firm_id in firm_ids if firm_id not in self._directory.firms]
        if unknown:
            raise NotFound(f"Firm {unknown[0]} is not in the directory.", reason="FIRM_UNKNOWN")
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            # The lock under which awards are decided: an award sees the group as it was before, or as it is after.
            await ledger.lock(connection)
            await group_store.set_group(
                connection,
                group_id,
                source=source,
                firm_ids=sorted(firm_ids),
                credential_id=caller.credential_id,
                now_us=now_us,
            )
            note = Note(
                action="group_set",
                detail={"group_id": group_id, "source": source, "firms": " ".join(map(str, sorted(firm_ids)))},
            )
            await award_store.audit_note(connection, caller.credential_id, note, now_us=now_us)
            log.info("group set", group_id=group_id, firms=len(firm_ids))
            return await self._group(connection, group_id)

    async def get_group(self, caller: Caller, group_id: str) -> Group:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await self._group(connection, group_id)

    async def set_holding(
        self,
        caller: Caller,
        owner_firm_id: int,
        owned_firm_id: int,
        *,
        percent: str,
        dominant_influence: bool,
        source: str,
    ) -> Enterprise:
        """What one firm owns of another; above half, or with a dominant influence, both are one enterprise from now on. Nothing at
        all gives it up. No award is made while it changes. Returns the enterprise of the firm that is owned."""
        caller.require(Role.OPERATOR)
        with understood():
            source = checked_text("source", source, TITLE_CHARACTERS_MAX)
            share = checked_percent("percent", percent)
        if owner_firm_id == owned_firm_id:
            raise Invalid("A firm does not own itself; name two firms.", reason="HOLDING_INVALID")
        for firm_id in (owner_firm_id, owned_firm_id):
            if firm_id not in self._directory.firms:
                raise NotFound(f"Firm {firm_id} is not in the directory.", reason="FIRM_UNKNOWN")
        now_us = self._clock.now_us()
        parameters = self._table.at(uk_day(from_us(now_us)))
        relation, _ = relation_between(share, dominant_influence=dominant_influence, parameters=parameters)
        holding = Holding(
            owner_firm_id=owner_firm_id,
            owned_firm_id=owned_firm_id,
            percent=percent,
            dominant_influence=dominant_influence,
            relation=relation,
            source=source,
        )
        async with transaction(self._pool) as connection:
            # As for groups: an award sees the enterprise as it was before, or as it is after.
            await ledger.lock(connection)
            if share or dominant_influence:
                await group_store.set_holding(
                    connection,
                    holding,
                    parameters_version=self._table.version,
                    credential_id=caller.credential_id,
                    now_us=now_us,
                )
            else:
                await group_store.remove_holding(connection, owner_firm_id, owned_firm_id)
            enterprise = await self._enterprise(connection, owned_firm_id)
            if max(len(enterprise.firm_ids), len(enterprise.holdings)) > FIRMS_PER_GROUP_MAX:
                raise Conflict(
                    f"An enterprise has at most {FIRMS_PER_GROUP_MAX} firms and holdings; look at those stated before.",
                    reason="ENTERPRISE_TOO_LARGE",
                )
            detail: dict[str, str | int] = {
                "owner": owner_firm_id,
                "owned": owned_firm_id,
                "percent": percent,
                "dominant_influence": str(dominant_influence).lower(),
                "relation": relation,
                "source": source,
            }
            note = Note(action="holding_set", detail=detail)
            await award_store.audit_note(connection, caller.credential_id, note, now_us=now_us)
        log.info("holding set", owner=owner_firm_id, owned=owned_firm_id, relation=relation)
        return enterprise

    async def enterprise(self, caller: Caller, firm_id: int) -> Enterprise:
        """Who is one enterprise with the firm, and why; for the firm itself and for operators."""
        firm_id = self._own_firm(caller, firm_id)
        async with transaction(self._pool) as connection:
            return await self._enterprise(connection, firm_id)

    async def _enterprise(self, connection: Connection, firm_id: int) -> Enterprise:
        kin = await group_store.kin_of(connection, firm_id)
        return Enterprise(
            firm_id=firm_id,
            firm_ids=tuple(sorted(kin)),
            groups=tuple(await group_store.groups_of(connection, kin)),
            holdings=tuple(await group_store.holdings_of(connection, kin)),
        )

    def _own_firm(self, caller: Caller, firm_id: int) -> int:
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = caller.firm_or(firm_id)
        if firm_id not in self._directory.firms:
            raise NotFound("There is no such firm.", reason="FIRM_UNKNOWN")
        return firm_id

    async def headroom(self, caller: Caller, firm_id: int) -> Headroom:
        """For the firm itself and for operators."""
        firm_id = self._own_firm(caller, firm_id)
        today = uk_day(from_us(self._clock.now_us()))
        async with transaction(self._pool) as connection:
            firm_ids = await group_store.kin_of(connection, firm_id)
            given = await award_store.given_to(connection, firm_id)
        check = mfa_check(
            award_date=today,
            proposed_p=0,
            history=[
                Assistance(given_on=item.on, amount=item.amount_pence, kind=AssistanceKind.MFA, enterprise=GROUP)
                for item in given
            ],
            enterprise_group={GROUP},
            table=self._table,
        )
        return Headroom(
            firm_ids=tuple(sorted(firm_ids)),
            window_start=check.window_start,
            given=tuple(item for item in given if item.on >= check.window_start),
            counted_pence=check.counted,
            headroom_pence=check.headroom,
        )

    async def _group(self, connection: Connection, group_id: str) -> Group:
        found = await group_store.group_of(connection, group_id) if is_id(group_id) else None
        if found is None:
            raise NotFound("There is no such group.", reason="GROUP_UNKNOWN")
        return found
