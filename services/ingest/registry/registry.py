"""What can be asked of the registry; one method a use case."""

import math
from dataclasses import replace
from zoneinfo import ZoneInfo

from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid, TryAgain
from services.common.identity import Caller, Role
from services.common.outbox import OutboxRelay
from services.ingest.asked import (
    PAGE_SIZE_DEFAULT,
    check_id,
    check_one_of,
    names,
    number_in_token,
    page_size_of,
)
from services.ingest.domain import (
    PAGE_SIZE_MAX,
    REGIONS,
    SIGNALS_PER_MACHINE_MAX,
    SIZES,
    NewFirm,
    NewMachine,
    NewSignal,
    NewSite,
    check_path,
    check_sic,
    check_signal_name,
    check_slug,
    check_text,
)
from services.ingest.registry import audit_store, store
from smdih.directory.v1 import directory_pb2 as pb

# So many names of added signals stand in the audit.
SIGNALS_NOTED_MAX = 20


class Registry:
    """Firms, sites, machines, signals, partners and keys.

    A change returns once this process knows it too, so what is made here can be used here at once.
    """

    def __init__(self, pool: Pool, relay: OutboxRelay, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._relay = relay
        self._directory = directory
        self._clock = clock

    async def create_firm(self, caller: Caller, new: NewFirm) -> pb.Firm:
        caller.require(Role.OPERATOR)
        with names():
            checked = NewFirm(
                check_text(new.name, what="name"), check_slug(new.slug), check_sic(new.sic), new.region, new.size
            )
        check_one_of(new.region, REGIONS, "region")
        check_one_of(new.size, SIZES, "size")
        async with transaction(self._pool) as connection:
            firm = await store.create_firm(connection, checked, self._clock.now_us())
            await self._note(connection, caller, firm.id, "firm registered", firm.slug)
        self._relay.kick()
        return firm

    async def create_partner(self, caller: Caller, name: str, region: str) -> pb.Partner:
        caller.require(Role.OPERATOR)
        with names():
            name = check_text(name, what="name")
        check_one_of(region, REGIONS, "region")
        async with transaction(self._pool) as connection:
            partner = await store.create_partner(connection, name, region, self._clock.now_us())
            await self._note(connection, caller, 0, "partner registered", f"partner {partner.id}")
        self._relay.kick()
        return partner

    async def create_site(self, caller: Caller, new: NewSite) -> pb.Site:
        caller.require(Role.OPERATOR, Role.FIRM)
        new = replace(new, firm_id=caller.firm_or(new.firm_id))
        check_id(new.firm_id, "firm_id")
        with names():
            new = replace(new, slug=check_slug(new.slug), name=check_text(new.name, what="name"))
        try:
            ZoneInfo(new.timezone)
        except (OSError, ValueError, KeyError) as error:
            raise Invalid(f"{new.timezone!r} is no time zone; use a name such as Europe/London.") from error
        async with transaction(self._pool) as connection:
            site = await store.create_site(connection, new, self._clock.now_us())
            await self._note(connection, caller, site.firm_id, "site registered", site.slug)
        self._relay.kick()
        return site

    async def create_machine(self, caller: Caller, new: NewMachine) -> pb.Machine:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(new.site_id, "site_id")
        with names():
            check_path(new.path)
            new = replace(new, name=check_text(new.name, what="name"), kind=check_text(new.kind, what="kind"))
        new = replace(new, signals=_checked_signals(new.signals))
        async with transaction(self._pool) as connection:
            firm_id, site_path = await store.firm_of_site(connection, new.site_id)
            caller.check_sees_firm(firm_id)
            path = f"{site_path}/{new.path}"
            machine = await store.create_machine(connection, new, firm_id, path, self._clock.now_us())
            await self._note(connection, caller, firm_id, "machine registered", path)
        await self._known_here(machine)
        return machine

    async def add_signals(self, caller: Caller, machine_id: int, signals: list[NewSignal]) -> pb.Machine:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(machine_id, "machine_id")
        checked = _checked_signals(signals)
        if not checked:
            raise Invalid("signals: name at least one.")
        async with transaction(self._pool) as connection:
            before = await store.machine_by_id(connection, machine_id)
            caller.check_sees_firm(before.firm_id)
            if len(before.signals) + len(checked) > SIGNALS_PER_MACHINE_MAX:
                raise Invalid(f"A machine has at most {SIGNALS_PER_MACHINE_MAX} signals.")
            _check_not_alike([signal.name for signal in before.signals], checked)
            machine = await store.add_signals(connection, machine_id, checked, self._clock.now_us())
            added = ", ".join(repr(signal.name) for signal in checked[:SIGNALS_NOTED_MAX])
            await self._note(
                connection, caller, machine.firm_id, "signals added", f"{len(checked)} of {machine.path}: {added}"
            )
        await self._known_here(machine)
        return machine

    async def machine(self, caller: Caller, machine_id: int) -> pb.Machine:
        """As it is in the database. Raises NotFound."""
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(machine_id, "machine_id")
        async with transaction(self._pool) as connection:
            machine = await store.machine_by_id(connection, machine_id)
        caller.check_sees_firm(machine.firm_id)
        return machine

    async def list_machines(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[pb.Machine], str]:
        """Machines in order of id, and the token of the next page (empty: none)."""
        firm_id = caller.firm_or(firm_id)
        check_id(firm_id, "firm_id")
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        after = number_in_token(page_token)
        async with transaction(self._pool) as connection:
            ids = await store.list_machine_ids(connection, firm_id, after, size + 1)
            found = await store.machines_by_id(connection, ids[:size])
        return [found[machine_id] for machine_id in ids[:size]], str(ids[size - 1]) if len(ids) > size else ""

    async def firms(self, caller: Caller, page_size: int, page_token: str) -> tuple[list[pb.Firm], str]:
        """Operators see all firms, in order of id; a firm sees itself."""
        caller.require(Role.OPERATOR, Role.FIRM)
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        after = number_in_token(page_token)
        seen = [
            firm
            for firm_id, firm in sorted(self._directory.firms.items())
            if firm_id > after and (caller.role is Role.OPERATOR or firm_id == caller.firm_id)
        ]
        return seen[:size], str(seen[size - 1].id) if len(seen) > size else ""

    async def sites(self, caller: Caller, firm_id: int, page_size: int, page_token: str) -> tuple[list[pb.Site], str]:
        """In order of id. Operators see all sites with firm_id 0."""
        caller.require(Role.OPERATOR, Role.FIRM)
        firm_id = caller.firm_or(firm_id)
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        after = number_in_token(page_token)
        seen = [
            site
            for site_id, site in sorted(self._directory.sites.items())
            if site_id > after and firm_id in (0, site.firm_id)
        ]
        return seen[:size], str(seen[size - 1].id) if len(seen) > size else ""

    async def _note(self, connection: Connection, caller: Caller, firm_id: int, action: str, detail: str) -> None:
        await audit_store.note(
            connection,
            self._clock.now_us(),
            firm_id=firm_id,
            credential_id=caller.credential_id,
            action=action,
            detail=detail,
        )

    async def _known_here(self, machine: pb.Machine) -> None:
        self._relay.kick()
        if not await self._directory.wait_for_machine(machine.id, signals=len(machine.signals)):
            raise TryAgain(f"Machine {machine.id} is registered; the door will know it in a moment.", retry_after_s=2)


def _checked_signals(signals: list[NewSignal]) -> list[NewSignal]:
    if len(signals) > SIGNALS_PER_MACHINE_MAX:
        raise Invalid(f"A machine has at most {SIGNALS_PER_MACHINE_MAX} signals.")
    checked = []
    for new in signals:
        with names():
            name = check_signal_name(new.name)
            unit = check_text(new.unit, what="unit", length_max=32) if new.unit else ""
        for bound in (new.range_min, new.range_max):
            if bound is not None and not math.isfinite(bound):
                raise Invalid(f"{name}: a range needs finite numbers; leave a bound out where there is none.")
        checked.append(NewSignal(name, unit, new.range_min, new.range_max))
    _check_not_alike([], checked)
    return checked


def _check_not_alike(have: list[str], new: list[NewSignal]) -> None:
    """Raise Invalid for names that differ in case only; that the very same name is there already, the database tells."""
    folded = {name.casefold(): name for name in have}
    for signal in new:
        like = folded.setdefault(signal.name.casefold(), signal.name)
        if like != signal.name:
            detail = f"{signal.name!r} and {like!r} differ in case only and will be mixed up; choose another name."
            raise Invalid(detail, reason="BAD_NAME")
