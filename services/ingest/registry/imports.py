"""The table of machines: looked at before it is imported, imported whole or not at all, exported."""

import asyncio
from dataclasses import dataclass

import asyncpg

from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import AlreadyExists, Conflict, Invalid, TryAgain
from services.common.identity import Caller, Role
from services.common.outbox import OutboxRelay
from services.ingest.asked import check_id
from services.ingest.registry import audit_store, machinetable
from services.ingest.registry import import_store as store
from services.ingest.registry.machinetable import REFUSE, Plan
from smdih.directory.v1 import directory_pb2 as pb

KNOWN_TIMEOUT_S = 30.0
EXPORT_LINES_MAX = 1_000_000


@dataclass(frozen=True)
class Imported:
    """`is_applied`: it was done; not for a preview, and not when a line is refused."""

    plan: Plan
    is_applied: bool


class _Preview(Exception):
    """Undoes what a preview has tried."""


class Imports:
    """Operators for every firm, a firm's own key for its own."""

    def __init__(self, pool: Pool, relay: OutboxRelay, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._relay = relay
        self._directory = directory
        self._clock = clock

    async def run(self, caller: Caller, firm_id: int, body: bytes, *, is_preview: bool) -> Imported:
        """Import a table, all of it or, where a line is refused, nothing. The same table again changes nothing.

        A preview does the same and undoes it, so it tells what the import would. Raises Invalid (no such table), NotFound,
        Conflict (over the quota).
        """
        self._check(caller, firm_id)
        try:
            # Reading and planning a large table takes a while; senders are served meanwhile.
            lines = await asyncio.to_thread(machinetable.read, body)
        except machinetable.BadTable as error:
            raise Invalid(str(error), reason="BAD_TABLE") from error
        plan: Plan | None = None
        last: pb.Machine | None = None
        try:
            async with transaction(self._pool) as connection:
                plan = await self._plan(connection, firm_id, lines)
                if plan.count(REFUSE):
                    return Imported(plan, False)
                if plan.machines:
                    last = await store.apply(connection, firm_id, plan.machines, self._clock.now_us())
                    await self._note(connection, caller, firm_id, plan)
                if is_preview:
                    raise _Preview
        except _Preview:
            assert plan is not None
            return Imported(plan, False)
        except asyncpg.UniqueViolationError as error:
            raise AlreadyExists("Somebody registered one of these at this moment; import again.") from error
        self._relay.kick()
        if last is not None and not await self._directory.wait_for_machine(
            last.id, signals=len(last.signals), timeout_s=KNOWN_TIMEOUT_S
        ):
            raise TryAgain("The machines are registered; the door will know them in a moment.", retry_after_s=5)
        return Imported(plan, True)

    async def export(self, caller: Caller, firm_id: int) -> str:
        """The firm's machines and signals in the form that can be imported. Raises NotFound."""
        self._check(caller, firm_id)
        async with transaction(self._pool) as connection:
            await store.locked_slug(connection, firm_id)
            rows = await store.table(connection, firm_id, EXPORT_LINES_MAX + 1)
        if len(rows) > EXPORT_LINES_MAX:
            raise Conflict(f"The firm has more than {EXPORT_LINES_MAX} signals; that is too much for one table.")
        return await asyncio.to_thread(machinetable.written, rows)

    @staticmethod
    def _check(caller: Caller, firm_id: int) -> None:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(firm_id, "firm_id")
        caller.check_sees_firm(firm_id)

    @staticmethod
    async def _plan(connection: Connection, firm_id: int, lines: list[machinetable.Line]) -> Plan:
        slug = await store.locked_slug(connection, firm_id)
        sites = await store.sites(connection, firm_id)
        paths = {machinetable.machine_path(slug, line.machine) for line in lines}
        known = await store.known(connection, firm_id, sorted(paths))
        return await asyncio.to_thread(machinetable.plan, lines, firm_slug=slug, sites=sites, known=known)

    async def _note(self, connection: Connection, caller: Caller, firm_id: int, plan: Plan) -> None:
        await audit_store.note(
            connection,
            self._clock.now_us(),
            firm_id=firm_id,
            credential_id=caller.credential_id,
            action="table of machines imported",
            detail=f"{len(plan.machines)} machines, {plan.count(machinetable.CREATE)} lines created, "
            f"{plan.count(machinetable.CHANGE)} changed",
        )
