"""A new gateway gets its key: somebody of the firm makes a code, the gateway exchanges it, once."""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import asyncpg

from services.common.clock import Clock, from_us, to_us
from services.common.database import AWAY, Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, HubError, Invalid, NotFound, SlowDown, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.common.outbox import OutboxRelay
from services.ingest.asked import PAGE_SIZE_DEFAULT, check_id, names, number_in_token, page_size_of
from services.ingest.domain import PAGE_SIZE_MAX, check_text
from services.ingest.registry import audit_store, claimcodes, credential_store
from services.ingest.registry import claim_store as store
from services.ingest.registry.claim_store import ClaimCode, Place
from services.ingest.registry.credentials import credential_of

log = get_logger(__name__)

EXPIRES_IN_S_DEFAULT = 24 * 60 * 60
EXPIRES_IN_S_MAX = 30 * 24 * 60 * 60
KEY_VALID_DAYS_MAX = 3_660
OPEN_CODES_A_FIRM_MAX = 1_000
WRONG_ATTEMPTS_MAX = 5
# A gateway that did not hear the answer may ask again for so long.
RETRY_WINDOW_S = 600
# Of everybody at one door: checking a code is slow on purpose, and asking needs no key.
EXCHANGES_A_SECOND_MAX = 5
EXCHANGES_AT_ONCE_MAX = 20
UPKEEP_INTERVAL_S = 60

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{16,64}")
_NEW_CODES_TRIED_MAX = 10


@dataclass(frozen=True)
class NewCode:
    """`code` is shown once, here."""

    id: int
    code: str
    expires_us: int


@dataclass(frozen=True)
class Claimed:
    """What a gateway needs to begin. `machine`: path of the machine that the code was for; empty: any of the firm's."""

    key: str
    credential_id: int
    site: str
    machine: str


class _Pace:
    """A token bucket for all exchanges of this door."""

    def __init__(self, monotonic_s: Callable[[], float]) -> None:
        self._monotonic_s = monotonic_s
        self._tokens = float(EXCHANGES_AT_ONCE_MAX)
        self._at_s = monotonic_s()

    def check(self) -> None:
        now_s = self._monotonic_s()
        self._tokens = min(EXCHANGES_AT_ONCE_MAX, self._tokens + (now_s - self._at_s) * EXCHANGES_A_SECOND_MAX)
        self._at_s = now_s
        if self._tokens < 1:
            raise SlowDown("Too many claim codes are being tried; send again.", retry_after_s=2)
        self._tokens -= 1


class Claims:
    """Makes claim codes, and exchanges them for keys."""

    def __init__(
        self,
        pool: Pool,
        relay: OutboxRelay,
        directory: Directory,
        clock: Clock,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._relay = relay
        self._directory = directory
        self._clock = clock
        self._pace = _Pace(monotonic_s)

    async def create(
        self, caller: Caller, place: Place, *, label: str, expires_in_s: int, key_valid_days: int
    ) -> NewCode:
        """A code for one gateway. `key_valid_days` 0: its key is valid until it is revoked."""
        caller.require(Role.OPERATOR, Role.FIRM)
        place = Place(caller.firm_or(place.firm_id), place.site_id, place.machine_id)
        check_id(place.firm_id, "firm_id")
        for number, what in ((place.site_id, "site_id"), (place.machine_id, "machine_id")):
            if number:
                check_id(number, what)
        if not 0 < expires_in_s <= EXPIRES_IN_S_MAX:
            raise Invalid(f"expires_in_s: from 1 to {EXPIRES_IN_S_MAX}.")
        if not 0 <= key_valid_days <= KEY_VALID_DAYS_MAX:
            raise Invalid(f"key_valid_days: from 0 (no end) to {KEY_VALID_DAYS_MAX}.")
        with names():
            label = check_text(label or "gateway", what="label")
        now_us = self._clock.now_us()
        expires_us = now_us + expires_in_s * 1_000_000
        for _ in range(_NEW_CODES_TRIED_MAX):
            code, salt = claimcodes.new_code(), secrets.token_bytes(claimcodes.SALT_BYTES)
            digest = await asyncio.to_thread(claimcodes.digest, code, salt)
            async with transaction(self._pool) as connection:
                await store.check_place(connection, place)
                if await store.open_codes(connection, place.firm_id, now_us) >= OPEN_CODES_A_FIRM_MAX:
                    raise Conflict(
                        f"The firm has {OPEN_CODES_A_FIRM_MAX} open claim codes; cancel some.", reason="TOO_MANY_CODES"
                    )
                code_id = await store.create(
                    connection,
                    place,
                    lookup=claimcodes.lookup(code),
                    salt=salt,
                    digest=digest,
                    label=label,
                    created_by=caller.credential_id,
                    now_us=now_us,
                    expires_us=expires_us,
                    key_valid_days=key_valid_days,
                )
                if code_id is None:
                    continue
                await audit_store.note(
                    connection,
                    now_us,
                    firm_id=place.firm_id,
                    credential_id=caller.credential_id,
                    action="claim code made",
                    detail=f"claim code {code_id} ({label!r})",
                )
                return NewCode(code_id, claimcodes.shown(code), expires_us)
        raise TryAgain("No free claim code was found; try again.", retry_after_s=1)

    async def exchange(self, typed: str, request_id: str) -> Claimed:
        """A key for the gateway that shows the code. The same request again within RETRY_WINDOW_S gets the same key.

        Raises Invalid (mistyped), NotFound (no such code), Conflict (used, expired, locked), SlowDown, TryAgain.
        """
        if not _REQUEST_ID.fullmatch(request_id):
            raise Invalid("request_id: 16 to 64 random letters, digits, . _ - that the gateway keeps for its repeats.")
        try:
            code = claimcodes.read(typed)
        except claimcodes.Mistyped as error:
            raise Invalid(str(error), reason="CLAIM_MISTYPED") from error
        self._pace.check()
        unknown = NotFound("This claim code is not known; compare it, or ask for a new one.", reason="CLAIM_UNKNOWN")
        async with transaction(self._pool) as connection:
            salt = await store.salt_of(connection, claimcodes.lookup(code))
        if salt is None:
            raise unknown
        digest = await asyncio.to_thread(claimcodes.digest, code, salt)
        is_right = False
        async with transaction(self._pool) as connection:
            found = await store.locked(connection, claimcodes.lookup(code))
            if found is not None and found.wrong_attempts < WRONG_ATTEMPTS_MAX:
                is_right = hmac.compare_digest(found.digest, digest)
                if is_right:
                    claimed = await self._claimed(connection, found, code, request_id)
                else:
                    await self._note_wrong(connection, found)
        if found is None or (not is_right and found.wrong_attempts < WRONG_ATTEMPTS_MAX):
            raise unknown
        if not is_right:
            raise Conflict(
                "This claim code is locked after too many wrong tries; ask for a new one.", reason="CLAIM_LOCKED"
            )
        self._relay.kick()
        if not await self._directory.wait_for_credential(claimed.credential_id):
            raise TryAgain("The key is being made known; send the same request again.", retry_after_s=2)
        return claimed

    async def _claimed(self, connection: Connection, found: ClaimCode, code: str, request_id: str) -> Claimed:
        now_us = self._clock.now_us()
        request_sha256 = hashlib.sha256(request_id.encode()).digest()
        site, machine = await store.paths(connection, found)
        if found.used is not None:
            is_repeat = now_us - to_us(found.used) <= RETRY_WINDOW_S * 1_000_000 and found.key_salt is not None
            if not is_repeat or not hmac.compare_digest(found.request_sha256 or b"", request_sha256):
                raise Conflict("This claim code was used already; ask for a new one.", reason="CLAIM_USED")
            assert found.key_salt is not None
            key = claimcodes.device_key(code, request_id, found.key_salt)
            return Claimed(key, found.credential_id, site, machine)
        if from_us(now_us) >= found.expires:
            raise Conflict("This claim code has expired; ask for a new one.", reason="CLAIM_EXPIRED")
        key_salt = secrets.token_bytes(claimcodes.KEY_SALT_BYTES)
        key = claimcodes.device_key(code, request_id, key_salt)
        valid_to_us = now_us + found.key_valid_days * 86_400 * 1_000_000 if found.key_valid_days else 0
        credential = credential_of(key, Role.DEVICE, found.firm_id, 0, found.label, now_us, valid_to_us)
        credential = await credential_store.create(connection, credential, Role.DEVICE, now_us)
        await store.note_used(connection, found.id, credential.id, request_sha256, key_salt, now_us)
        await audit_store.note(
            connection,
            now_us,
            firm_id=found.firm_id,
            credential_id=0,
            action="claim code exchanged",
            detail=f"claim code {found.id} for credential {credential.id} ({credential.prefix}...)",
        )
        return Claimed(key, credential.id, site, machine)

    async def _note_wrong(self, connection: Connection, found: ClaimCode) -> None:
        await store.note_wrong_attempt(connection, found.id)
        if found.wrong_attempts + 1 == WRONG_ATTEMPTS_MAX:
            await audit_store.note(
                connection,
                self._clock.now_us(),
                firm_id=found.firm_id,
                credential_id=0,
                action="claim code locked",
                detail=f"claim code {found.id} after {WRONG_ATTEMPTS_MAX} wrong tries",
            )

    async def page(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[tuple[ClaimCode, str]], str]:
        """Codes with their state (open, used, expired, locked), newest first."""
        caller.require(Role.OPERATOR, Role.FIRM)
        firm_id = caller.firm_or(firm_id)
        if firm_id:
            check_id(firm_id, "firm_id")
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        before = number_in_token(page_token)
        async with transaction(self._pool) as connection:
            found = await store.page(connection, firm_id, before, size + 1)
        listed = [(one, self._state(one)) for one in found[:size]]
        return listed, str(found[size - 1].id) if len(found) > size else ""

    def _state(self, code: ClaimCode) -> str:
        if code.used is not None:
            return "used"
        if code.wrong_attempts >= WRONG_ATTEMPTS_MAX:
            return "locked"
        return "expired" if from_us(self._clock.now_us()) >= code.expires else "open"

    async def cancel(self, caller: Caller, code_id: int) -> None:
        """End an open code; one that has ended already is left as it is."""
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(code_id, "code_id")
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            firm_id, was_open = await store.cancel(connection, code_id, now_us)
            caller.check_sees_firm(firm_id)
            if was_open:
                await audit_store.note(
                    connection,
                    now_us,
                    firm_id=firm_id,
                    credential_id=caller.credential_id,
                    action="claim code cancelled",
                    detail=f"claim code {code_id}",
                )

    async def run(self) -> None:
        """Forget what is no longer needed, until cancelled."""
        while True:
            try:
                async with transaction(self._pool) as connection:
                    await store.forget(connection, self._clock.now_us(), RETRY_WINDOW_S)
            except (*AWAY, asyncpg.PostgresError, HubError) as error:
                log.warning("claim codes are not cleaned", error=repr(error))
            await asyncio.sleep(UPKEEP_INTERVAL_S)
