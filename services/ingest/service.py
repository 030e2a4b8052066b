"""What can be asked of the registry and of the stored data; one method a use case."""

import math
from dataclasses import dataclass, replace
from datetime import datetime
from zoneinfo import ZoneInfo

from google.protobuf.message import DecodeError

from services.common.clock import Clock, from_us, to_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound, TryAgain
from services.common.identity import Caller, Role, key_prefix, key_sha256, new_key
from services.common.outbox import OutboxRelay
from services.ingest import store
from services.ingest.domain import (
    HISTORY_PAGE_SIZE_MAX,
    PAGE_SIZE_MAX,
    REGIONS,
    SIGNALS_PER_MACHINE_MAX,
    SIZES,
    BadName,
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
from services.ingest.door import Door
from services.ingest.frames import Sender
from services.ingest.store import Bucket, Latest, Quarantined
from smdih.directory.v1 import directory_pb2 as pb
from smdih.ingest.v1 import telemetry_pb2

PAGE_SIZE_DEFAULT = 100
HISTORY_PAGE_SIZE_DEFAULT = 1_000
ID_MAX = 2**63 - 1


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
        with _names():
            checked = NewFirm(
                check_text(new.name, what="name"), check_slug(new.slug), check_sic(new.sic), new.region, new.size
            )
        _one_of(new.region, REGIONS, "region")
        _one_of(new.size, SIZES, "size")
        async with transaction(self._pool) as connection:
            firm = await store.create_firm(connection, checked, self._clock.now_us())
        self._relay.kick()
        return firm

    async def create_partner(self, caller: Caller, name: str, region: str) -> pb.Partner:
        caller.require(Role.OPERATOR)
        with _names():
            name = check_text(name, what="name")
        _one_of(region, REGIONS, "region")
        async with transaction(self._pool) as connection:
            partner = await store.create_partner(connection, name, region, self._clock.now_us())
        self._relay.kick()
        return partner

    async def create_site(self, caller: Caller, new: NewSite) -> pb.Site:
        caller.require(Role.OPERATOR, Role.FIRM)
        new = replace(new, firm_id=caller.firm_or(new.firm_id))
        _id(new.firm_id, "firm_id")
        with _names():
            new = replace(new, slug=check_slug(new.slug), name=check_text(new.name, what="name"))
        try:
            ZoneInfo(new.timezone)
        except (OSError, ValueError, KeyError) as error:
            raise Invalid(f"{new.timezone!r} is no time zone; use a name such as Europe/London.") from error
        async with transaction(self._pool) as connection:
            site = await store.create_site(connection, new, self._clock.now_us())
        self._relay.kick()
        return site

    async def create_machine(self, caller: Caller, new: NewMachine) -> pb.Machine:
        caller.require(Role.OPERATOR, Role.FIRM)
        _id(new.site_id, "site_id")
        with _names():
            check_path(new.path)
            new = replace(new, name=check_text(new.name, what="name"), kind=check_text(new.kind, what="kind"))
        new = replace(new, signals=_checked_signals(new.signals))
        async with transaction(self._pool) as connection:
            firm_id, site_path = await store.firm_of_site(connection, new.site_id)
            caller.check_sees_firm(firm_id)
            path = f"{site_path}/{new.path}"
            machine = await store.create_machine(connection, new, firm_id, path, self._clock.now_us())
        await self._known_here(machine)
        return machine

    async def add_signals(self, caller: Caller, machine_id: int, signals: list[NewSignal]) -> pb.Machine:
        caller.require(Role.OPERATOR, Role.FIRM)
        _id(machine_id, "machine_id")
        checked = _checked_signals(signals)
        if not checked:
            raise Invalid("signals: name at least one.")
        async with transaction(self._pool) as connection:
            before = await store.machine_by_id(connection, machine_id)
            caller.check_sees_firm(before.firm_id)
            if len(before.signals) + len(checked) > SIGNALS_PER_MACHINE_MAX:
                raise Invalid(f"A machine has at most {SIGNALS_PER_MACHINE_MAX} signals.")
            machine = await store.add_signals(connection, machine_id, checked, self._clock.now_us())
        await self._known_here(machine)
        return machine

    async def list_machines(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[pb.Machine], str]:
        """Machines in order of id, and the token of the next page (empty: none)."""
        firm_id = caller.firm_or(firm_id)
        _id(firm_id, "firm_id")
        size = _page_size(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        after = _int_token(page_token)
        async with transaction(self._pool) as connection:
            ids = await store.list_machine_ids(connection, firm_id, after, size + 1)
            machines = [await store.machine_by_id(connection, machine_id) for machine_id in ids[:size]]
        return machines, str(ids[size - 1]) if len(ids) > size else ""

    async def issue_credential(
        self,
        caller: Caller,
        role: Role,
        *,
        firm_id: int,
        partner_id: int,
        label: str,
        valid_from_us: int,
        valid_to_us: int,
    ) -> tuple[str, pb.Credential]:
        """A new key (shown here and never again) and what is kept of it."""
        caller.require(Role.OPERATOR, Role.FIRM)
        if caller.role is Role.FIRM:
            if role not in (Role.DEVICE, Role.FIRM):
                caller.require(Role.OPERATOR)
            firm_id = caller.firm_or(firm_id)
        for number, what in ((firm_id, "firm_id"), (partner_id, "partner_id")):
            if number:
                _id(number, what)
        with _names():
            label = check_text(label or role.value, what="label")
        belongs = {Role.DEVICE: bool(firm_id), Role.FIRM: bool(firm_id), Role.PARTNER: bool(partner_id)}
        if not belongs.get(role, True):
            raise Invalid(f"A {role} key needs a {'partner_id' if role is Role.PARTNER else 'firm_id'}.")
        now_us = self._clock.now_us()
        start_us = valid_from_us or now_us
        if valid_to_us and valid_to_us <= start_us:
            raise Invalid("valid_to_us must be after valid_from_us.")
        _time(start_us, "valid_from_us")
        _time(valid_to_us, "valid_to_us")
        key, credential = make_credential(role, firm_id, partner_id, label, start_us, valid_to_us)
        async with transaction(self._pool) as connection:
            credential = await store.create_credential(connection, credential, role, now_us)
        self._relay.kick()
        if not await self._directory.wait_for_credential(credential.id):
            raise TryAgain("The key was made but is not known everywhere yet; issue another.", retry_after_s=2)
        return key, credential

    async def revoke_credential(self, caller: Caller, credential_id: int) -> None:
        caller.require(Role.OPERATOR, Role.FIRM)
        _id(credential_id, "credential_id")
        async with transaction(self._pool) as connection:
            firm_id = await store.revoke_credential(connection, credential_id)
            caller.check_sees_firm(firm_id)
        self._relay.kick()

    async def _known_here(self, machine: pb.Machine) -> None:
        self._relay.kick()
        if not await self._directory.wait_for_machine(machine.id, signals=len(machine.signals)):
            raise TryAgain(f"Machine {machine.id} is registered; the door will know it in a moment.", retry_after_s=2)


def make_credential(
    role: Role, firm_id: int, partner_id: int, label: str, valid_from_us: int, valid_to_us: int = 0
) -> tuple[str, pb.Credential]:
    """A new key and its credential, not stored yet."""
    key = new_key(role)
    credential = pb.Credential(
        prefix=key_prefix(key),
        sha256=key_sha256(key),
        role=store.ROLE_NUMBERS[role],
        firm_id=firm_id if role in (Role.DEVICE, Role.FIRM) else 0,
        partner_id=partner_id if role is Role.PARTNER else 0,
        label=label,
        valid_from_us=valid_from_us,
        valid_to_us=valid_to_us,
    )
    return key, credential


@dataclass(frozen=True)
class History:
    """One page: samples or buckets, and where the next page begins (empty: nowhere)."""

    samples: list[tuple[int, float]]
    buckets: list[Bucket]
    next_page_token: str


class Queries:
    """What is stored, for its firm."""

    def __init__(self, pool: Pool, directory: Directory, door: Door) -> None:
        self._pool = pool
        self._directory = directory
        self._door = door

    async def machine(self, caller: Caller, machine_id: int) -> pb.Machine:
        """Raises NotFound."""
        machine = self._directory.machines.get(machine_id)
        if machine is None:
            raise NotFound(f"There is no machine {machine_id}.")
        caller.check_sees_firm(machine.firm_id)
        return machine

    async def latest(self, caller: Caller, machine_id: int) -> list[Latest]:
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        machine = await self.machine(caller, machine_id)
        async with transaction(self._pool) as connection:
            return await store.latest(connection, machine)

    async def history(
        self,
        caller: Caller,
        signal_id: int,
        from_us: int,
        to_us_: int,
        resolution: str,
        page_size: int,
        page_token: str,
    ) -> History:
        """One signal over [from, to): resolution raw, minute or hour. Raises NotFound, Invalid."""
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        _id(signal_id, "signal_id")
        _one_of(resolution, ("raw", "minute", "hour"), "resolution")
        size = _page_size(page_size, HISTORY_PAGE_SIZE_DEFAULT, HISTORY_PAGE_SIZE_MAX)
        start_us = _int_token(page_token) if page_token else from_us
        start, end = _time(start_us, "from_us"), _time(to_us_, "to_us")
        if start >= end and not page_token:
            raise Invalid("from_us must be before to_us.")
        async with transaction(self._pool) as connection:
            place = await store.signal_place(connection, signal_id)
            caller.check_sees_firm(place.firm_id)
            if resolution == "raw":
                found = await store.samples(connection, place, start, end, size + 1)
                page = [(to_us(ts), value) for ts, value in found[:size]]
                return History(page, [], str(to_us(found[size][0])) if len(found) > size else "")
            buckets = await store.buckets(connection, place, start, end, size + 1, hours=resolution == "hour")
            return History([], buckets[:size], str(to_us(buckets[size].ts)) if len(buckets) > size else "")

    async def quarantine(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[Quarantined], str]:
        """What is in quarantine, newest first, and the token of the next page."""
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        firm_id = caller.firm_or(firm_id)
        size = _page_size(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        before: tuple[int, str] | None = None
        if page_token:
            time_us, _, item_id = page_token.partition(".")
            before = (_int_token(time_us), item_id)
            _time(before[0], "page_token")
        async with transaction(self._pool) as connection:
            items = await store.quarantine_page(connection, firm_id, before, size + 1)
        token = f"{to_us(items[size - 1].received)}.{items[size - 1].id}" if len(items) > size else ""
        return items[:size], token

    async def replay(self, caller: Caller, item_id: str, machine_id: int) -> telemetry_pb2.BatchResult:
        """Send an item through the door again, to `machine_id` if given. Raises NotFound, Conflict (nothing to send)."""
        caller.require(Role.OPERATOR, Role.FIRM)
        async with transaction(self._pool) as connection:
            item = await store.quarantined_item(connection, item_id)
        caller.check_sees_firm(item.firm_id)
        if item.batch is None:
            raise Conflict(
                "No samples could be read from this item; mend the sender and send them anew.", reason="NOT_REPLAYABLE"
            )
        try:
            batch = telemetry_pb2.Batch.FromString(item.batch)
        except DecodeError as error:
            raise Conflict("This item cannot be read any more.", reason="NOT_REPLAYABLE") from error
        if machine_id:
            await self.machine(caller, machine_id)
            batch.machine_id, batch.machine_path = machine_id, ""
        sender = Sender(item.firm_id, item.credential_id, item.source, "replay", item.id)
        (result,) = await self._door.send(sender, [batch])
        if not result.quarantined:
            async with transaction(self._pool) as connection:
                await store.mark_replayed(connection, item_id)
        return result


class _names:
    """Inside, a broken name is an invalid request."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadName):
            raise Invalid(str(error), reason="BAD_NAME") from error


def _checked_signals(signals: list[NewSignal]) -> list[NewSignal]:
    if len(signals) > SIGNALS_PER_MACHINE_MAX:
        raise Invalid(f"A machine has at most {SIGNALS_PER_MACHINE_MAX} signals.")
    checked = []
    for new in signals:
        with _names():
            name = check_signal_name(new.name)
            unit = check_text(new.unit, what="unit", length_max=32) if new.unit else ""
        for bound in (new.range_min, new.range_max):
            if bound is not None and not math.isfinite(bound):
                raise Invalid(f"{name}: a range needs finite numbers; leave a bound out where there is none.")
        checked.append(NewSignal(name, unit, new.range_min, new.range_max))
    return checked


def _one_of(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise Invalid(f"{what}: {value!r} is not one of {', '.join(allowed)}.")


def _id(value: int, what: str) -> None:
    if not 0 < value <= ID_MAX:
        raise Invalid(f"{what}: an id is a number from 1 up.")


def _page_size(asked: int, default: int, most: int) -> int:
    if asked < 0:
        raise Invalid("page_size: 0 or more.")
    return min(asked or default, most)


def _int_token(token: str) -> int:
    try:
        return int(token or "0")
    except ValueError as error:
        raise Invalid("page_token: send back exactly what the page before gave.") from error


def _time(time_us: int, what: str) -> datetime:
    try:
        return from_us(time_us)
    except OverflowError as error:
        raise Invalid(f"{what}: microseconds since 1970, in the years 1 to 9999.") from error
