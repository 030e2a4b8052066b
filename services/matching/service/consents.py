"""The use cases of consents."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.common.clock import Clock, from_us
from services.common.database import Pool, transaction
from services.common.errors import Invalid
from services.common.identity import Caller, Role
from services.common.logs import current_correlation_id, get_logger
from services.common.outbox import OutboxRelay
from services.matching.consents import Consent, NewConsent, SharedItem
from services.matching.needs import CloseReason, NeedState
from services.matching.service.checks import (
    NOTE_CHARACTERS_MAX,
    Known,
    check_text,
    checked_request_id,
    digest,
    first_answer,
)
from services.matching.service.need_life import NeedLife
from services.matching.store import consents as consents_store
from services.matching.store import needs as needs_store

log = get_logger(__name__)

MACHINES_MAX = 10_000
CONSENT_HISTORY_MAX = 100
# The upkeep goes on with the others.
CLOSINGS_AT_ONCE_MAX = 200


@dataclass(frozen=True)
class ConsentHistory:
    current: Consent | None
    # Newest first.
    ended: Sequence[Consent]


class Consents:
    """What firms agree to."""

    def __init__(self, pool: Pool, relay: OutboxRelay, known: Known, life: NeedLife, *, clock: Clock) -> None:
        self._pool = pool
        self._relay = relay
        self._known = known
        self._life = life
        self._clock = clock

    async def give_consent(self, caller: Caller, firm_id: int, new: NewConsent, *, request_id: str) -> Consent:
        """Record the firm's agreement; the one before it, if any, ends as replaced, and with it the needs that the new one does not
        cover."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        now = self._now()
        await self._check_consent(caller, firm_id, new, now)
        sha256 = digest(
            shared=sorted(set(new.shared)),
            machine_ids=sorted(set(new.machine_ids)),
            severity_min=int(new.severity_min),
            valid_from=str(new.valid_from),
            valid_until=str(new.valid_until),
            note=new.note,
        )
        async with transaction(self._pool) as connection:
            await consents_store.lock_firm_consents(connection, firm_id)
            if checked_request_id(request_id):
                repeated = await consents_store.consent_by_request(connection, firm_id, request_id)
                if repeated is not None:
                    return first_answer(*repeated, sha256)
            consent = Consent(
                id=uuid.uuid4().hex,
                firm_id=firm_id,
                shared=frozenset(new.shared),
                machine_ids=frozenset(new.machine_ids),
                severity_min=new.severity_min,
                valid_from=new.valid_from or now,
                valid_until=new.valid_until,
                note=new.note,
                given=now,
                given_by=caller.credential_id,
            )
            await consents_store.end_consent(connection, firm_id, ended=now, by=caller.credential_id, replaced=True)
            await consents_store.add_consent(
                connection,
                consent,
                request_id=request_id,
                request_sha256=sha256,
                correlation_id=current_correlation_id(),
            )
            if SharedItem.PARTNERS not in new.shared:
                await needs_store.hide_alarm_needs(connection, firm_id)
        await self.close_unshared_needs(firm_id)
        log.info("consent given", consent=consent.id, firm=firm_id, by=caller.credential_id)
        return consent

    async def revoke_consent(self, caller: Caller, firm_id: int) -> Consent | None:
        """From now on no alarm opens a need, and those that were opened are closed. Returns the consent that ended last, None where
        there never was one."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        async with transaction(self._pool) as connection:
            await consents_store.lock_firm_consents(connection, firm_id)
            ended = await consents_store.end_consent(
                connection, firm_id, ended=self._now(), by=caller.credential_id, replaced=False
            )
            newest = await consents_store.ended_consents(connection, firm_id, limit=1)
            await needs_store.hide_alarm_needs(connection, firm_id)
        await self.close_unshared_needs(firm_id)
        if ended:
            log.info("consent revoked", consent=newest[0].id, firm=firm_id, by=caller.credential_id)
        return newest[0] if newest else None

    async def get_consent(self, caller: Caller, firm_id: int) -> ConsentHistory:
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        async with transaction(self._pool) as connection:
            current = await consents_store.current_consent(connection, firm_id)
            return ConsentHistory(
                current, await consents_store.ended_consents(connection, firm_id, limit=CONSENT_HISTORY_MAX)
            )

    async def close_unshared_needs(self, firm_id: int = 0) -> int:
        """Close open needs that no consent of their firm covers any more (revoked, replaced, run out); returns how many."""
        now, closed = self._now(), 0
        async with transaction(self._pool) as connection:
            due = await needs_store.unshared_needs(connection, firm_id=firm_id, now=now, limit=CLOSINGS_AT_ONCE_MAX)
        for need_id in due:
            async with transaction(self._pool) as connection:
                need = await needs_store.lock_need(connection, need_id)
                assert need is not None  # it was found
                if need.state is NeedState.OPEN:
                    await self._life.close(connection, need, CloseReason.CONSENT_ENDED)
                    closed += 1
        if closed:
            self._relay.kick()
        return closed

    async def _check_consent(self, caller: Caller, firm_id: int, new: NewConsent, now: datetime) -> None:
        if SharedItem.FAULT not in new.shared:
            raise Invalid(
                "Without sharing the fault itself no need can be written; name 'fault' among what is shared.",
                reason="FAULT_NOT_SHARED",
            )
        if len(new.machine_ids) > MACHINES_MAX:
            raise Invalid(
                f"At most {MACHINES_MAX} machines can be named; leave them out to cover all.", reason="TOO_MANY"
            )
        for machine_id in new.machine_ids:
            await self._known.check_machine(firm_id, machine_id)
        if new.valid_until is not None and new.valid_until <= (new.valid_from or now):
            raise Invalid("The consent would end before it begins; set a later end.", reason="EMPTY_PERIOD")
        check_text("note", new.note, NOTE_CHARACTERS_MAX)
        if caller.role is Role.OPERATOR and not new.note.strip():
            raise Invalid("Say in the note how the firm agreed.", reason="NOTE_MISSING")

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())
