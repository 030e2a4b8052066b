"""Keys: issued, listed with their last use, rotated with an overlap, revoked."""

import asyncio
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from services.common.clock import Clock, from_us, to_us
from services.common.database import AWAY, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, HubError, Invalid, TryAgain
from services.common.identity import KEY_ROLES, Caller, Role, key_prefix, key_sha256, new_key
from services.common.logs import get_logger
from services.common.outbox import OutboxRelay
from services.ingest.asked import PAGE_SIZE_DEFAULT, check_id, checked_time, names, number_in_token, page_size_of
from services.ingest.diagnosis.sightings import SightingsWriter
from services.ingest.domain import PAGE_SIZE_MAX, check_text
from services.ingest.registry import audit_store
from services.ingest.registry import credential_store as store
from services.ingest.registry.credential_store import Issued
from smdih.directory.v1 import directory_pb2 as pb

log = get_logger(__name__)

OVERLAP_S_DEFAULT = 24 * 60 * 60
OVERLAP_S_MAX = 90 * 24 * 60 * 60
# A key that ended is told as such for so long; then it is as one that never was.
ENDED_KEPT_S = 7 * 24 * 60 * 60
FORGET_INTERVAL_S = 60
FORGOTTEN_AT_ONCE = 500


@dataclass(frozen=True)
class Listed:
    """A credential and its state: valid, not_yet_valid, expired or revoked."""

    issued: Issued
    state: str


class Credentials:
    """Operators have all of it; a firm's own key has what concerns device and firm keys of that firm."""

    def __init__(
        self, pool: Pool, relay: OutboxRelay, directory: Directory, clock: Clock, writer: SightingsWriter
    ) -> None:
        self._pool = pool
        self._relay = relay
        self._directory = directory
        self._clock = clock
        self._writer = writer

    async def issue(
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
        if role not in KEY_ROLES:
            raise Invalid(
                f"There are no keys of role {role}: they come with tokens. Keys are of {', '.join(KEY_ROLES)}."
            )
        for number, what in ((firm_id, "firm_id"), (partner_id, "partner_id")):
            if number:
                check_id(number, what)
        with names():
            label = check_text(label or role.value, what="label")
        belongs = {Role.DEVICE: bool(firm_id), Role.FIRM: bool(firm_id), Role.PARTNER: bool(partner_id)}
        if not belongs.get(role, True):
            raise Invalid(f"A {role} key needs a {'partner_id' if role is Role.PARTNER else 'firm_id'}.")
        now_us = self._clock.now_us()
        start_us = valid_from_us or now_us
        if valid_to_us and valid_to_us <= start_us:
            raise Invalid("valid_to_us must be after valid_from_us.")
        checked_time(start_us, "valid_from_us")
        checked_time(valid_to_us, "valid_to_us")
        key, credential = make_credential(role, firm_id, partner_id, label, start_us, valid_to_us)
        async with transaction(self._pool) as connection:
            credential = await store.create(connection, credential, role, now_us)
            await audit_store.note(
                connection,
                now_us,
                firm_id=credential.firm_id,
                credential_id=caller.credential_id,
                action="key issued",
                detail=f"credential {credential.id} ({credential.prefix}..., {role}, {label!r})",
            )
        await self._known_here(credential.id)
        return key, credential

    async def page(self, caller: Caller, firm_id: int, page_size: int, page_token: str) -> tuple[list[Listed], str]:
        """Credentials in order of id, revoked ones too, and the token of the next page. Operators: firm_id 0 is everybody."""
        caller.require(Role.OPERATOR, Role.FIRM)
        firm_id = caller.firm_or(firm_id)
        if firm_id:
            check_id(firm_id, "firm_id")
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        after = number_in_token(page_token)
        await self._writer.write()
        async with transaction(self._pool) as connection:
            found = await store.page(connection, firm_id, after, size + 1)
        now = self._now()
        listed = [Listed(one, one.state(now)) for one in found[:size]]
        return listed, str(found[size - 1].id) if len(found) > size else ""

    async def rotate(self, caller: Caller, credential_id: int, overlap_s: int) -> tuple[str, pb.Credential]:
        """A new key of the same kind, valid from now; the old one ends after the overlap.

        The new one has the length of validity that the old one was made with. Raises Conflict where the old one is revoked,
        expired or rotated already.
        """
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(credential_id, "credential_id")
        if not 0 <= overlap_s <= OVERLAP_S_MAX:
            raise Invalid(f"overlap_s: from 0 to {OVERLAP_S_MAX}.")
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            old = await store.locked(connection, credential_id)
            caller.check_sees_firm(old.firm_id)
            state = old.state(self._now())
            if state in ("revoked", "expired"):
                raise Conflict(f"Credential {old.id} is {state}; issue a new one.", reason=f"KEY_{state.upper()}")
            rotated_to = await store.successor(connection, old.id)
            if rotated_to:
                raise Conflict(
                    f"Credential {old.id} was rotated to {rotated_to} already. If that key was lost, revoke {rotated_to} and "
                    "rotate again.",
                    reason="ALREADY_ROTATED",
                )
            valid_to_us = 0
            # A rotation ended what was rotated; the last of the line still has the length that the first was made with.
            like = await store.last_of_line(connection, old.id)
            if like.valid_to is not None:
                valid_to_us = now_us + to_us(like.valid_to) - to_us(like.valid_from)
                checked_time(valid_to_us, "valid_to_us")
            key, new = make_credential(old.role, old.firm_id, old.partner_id, old.label, now_us, valid_to_us)
            new = await store.create(connection, new, old.role, now_us, replaces=old.id)
            end_us = now_us + overlap_s * 1_000_000
            if old.valid_to is None or end_us < to_us(old.valid_to):
                # An end before its own beginning would be no window: a key that was not valid yet never will be.
                await store.end_at(connection, old, max(end_us, to_us(old.valid_from)), now_us)
            await audit_store.note(
                connection,
                now_us,
                firm_id=old.firm_id,
                credential_id=caller.credential_id,
                action="key rotated",
                detail=f"credential {old.id} to {new.id}, overlap {overlap_s} s",
            )
        await self._known_here(new.id)
        return key, new

    async def revoke(self, caller: Caller, credential_id: int) -> None:
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(credential_id, "credential_id")
        async with transaction(self._pool) as connection:
            revoked = await store.revoke(connection, credential_id)
            caller.check_sees_firm(revoked.firm_id)
            await audit_store.note(
                connection,
                self._clock.now_us(),
                firm_id=revoked.firm_id,
                credential_id=caller.credential_id,
                action="key revoked",
                detail=f"credential {credential_id} ({revoked.prefix}...)",
            )
        self._relay.kick()

    async def run(self) -> None:
        """Forget keys that ended a while ago, until cancelled."""
        while True:
            try:
                await self.forget_ended()
            except (*AWAY, asyncpg.PostgresError, HubError) as error:
                log.warning("keys that ended wait", error=repr(error))
            await asyncio.sleep(FORGET_INTERVAL_S)

    async def forget_ended(self) -> None:
        before_us = self._clock.now_us() - ENDED_KEPT_S * 1_000_000
        async with transaction(self._pool) as connection:
            forgotten = await store.forget_ended(connection, before_us, FORGOTTEN_AT_ONCE)
        if forgotten:
            log.info("keys that ended forgotten", credentials=len(forgotten))
            self._relay.kick()

    async def _known_here(self, credential_id: int) -> None:
        self._relay.kick()
        if not await self._directory.wait_for_credential(credential_id):
            raise TryAgain("The key was made but is not known everywhere yet; issue another.", retry_after_s=2)

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def make_credential(
    role: Role, firm_id: int, partner_id: int, label: str, valid_from_us: int, valid_to_us: int = 0
) -> tuple[str, pb.Credential]:
    """A new key and its credential, not stored yet."""
    key = new_key(role)
    return key, credential_of(key, role, firm_id, partner_id, label, valid_from_us, valid_to_us)


def credential_of(
    key: str, role: Role, firm_id: int, partner_id: int, label: str, valid_from_us: int, valid_to_us: int
) -> pb.Credential:
    """What is kept of a key."""
    return pb.Credential(
        prefix=key_prefix(key),
        sha256=key_sha256(key),
        role=store.ROLE_NUMBERS[role],
        firm_id=firm_id if role in (Role.DEVICE, Role.FIRM) else 0,
        partner_id=partner_id if role is Role.PARTNER else 0,
        label=label,
        valid_from_us=valid_from_us,
        valid_to_us=valid_to_us,
    )
