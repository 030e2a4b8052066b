"""Whom a firm wants told of its alarms, in which order, and what became of each message."""

import re
import secrets
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise
from urllib.parse import urlsplit

from services.anomaly.contact_store import ContactStore
from services.anomaly.delivery import Contact, ContactKind, Delivery, DeliveryState, Escalation, Step
from services.anomaly.domain import MICROSECONDS, Severity
from services.anomaly.service import actor_of, check_role, check_text
from services.anomaly.tuning import LIST_MAX, check_id
from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller
from services.common.sealing import Seal, Unreadable

NAME_CHARACTERS_MAX = 100
ADDRESS_CHARACTERS_MAX = 500
# Of a firm, not counting removed ones.
CONTACTS_MAX = 100
ESCALATIONS_MAX = 50
STEPS_MAX = 10
CONTACTS_A_STEP_MAX = 20
AFTER_S_MAX = 7 * 86_400
SECRET_BYTES = 32
# Messages that no alarm asked for, to one address in an hour and of a firm: an address may be somebody else's.
TRIALS_MAX = 10
TRIALS_OF_A_FIRM_MAX = 60
# Of codes to one address, in a day; and how often one is guessed.
CODES_A_DAY_MAX = 3
CODE_TRIES_MAX = 10
CODE_DIGITS = 8

_ID = re.compile(r"[0-9a-f]{32}")
_SITE = re.compile(r"[a-z0-9-]{1,64}")
# Not "=?": a mail header would take it for encoded text.
_EMAIL = re.compile(r"(?!.*=\?)[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})+")


class DeliveryFilter(StrEnum):
    ALL = "all"
    PENDING = "pending"
    SENT = "sent"
    DEAD = "dead"


@dataclass(frozen=True)
class WantedStep:
    after_s: int
    contact_ids: Sequence[str]


class ContactService:
    def __init__(self, store: ContactStore, pool: Pool, clock: Clock, *, mail: bool, seal: Seal) -> None:
        self._store = store
        self._pool = pool
        self._clock = clock
        self._mail = mail  # this hub can send mail
        self._seal = seal

    async def create_contact(
        self, caller: Caller, *, firm_id: int, name: str, kind: ContactKind, address: str
    ) -> tuple[Contact, str]:
        """The contact, and the secret that its webhooks are signed with (empty for mail), which is shown only now.

        A mail address gets a code, and nothing else until the firm has given it to `confirm_contact`.
        """
        check_role(caller)
        firm_id = _one_firm(caller, firm_id)
        check_text(name, "name", needed=True, characters_max=NAME_CHARACTERS_MAX)
        check_text(address, "address", needed=True, characters_max=ADDRESS_CHARACTERS_MAX)
        if kind is ContactKind.EMAIL:
            if not self._mail:
                raise Conflict("This hub was not told how to send mail; use a webhook.", reason="NO_MAIL")
            if not _EMAIL.fullmatch(address):
                raise Invalid("address is not a mail address such as maintenance@firm.example.")
        else:
            check_webhook(address)
        confirmed = kind is ContactKind.WEBHOOK
        secret = (
            secrets.token_urlsafe(SECRET_BYTES)
            if confirmed
            else str(secrets.randbelow(10**CODE_DIGITS)).zfill(CODE_DIGITS)
        )
        contact_id = uuid.uuid4().hex
        contact = Contact(
            id=contact_id,
            firm_id=firm_id,
            name=name.strip(),
            kind=kind,
            address=address,
            secret=self._seal.seal(secret, of=contact_id),
            confirmed=confirmed,
        )
        now_us = self._clock.now_us()
        async with transaction(self._pool) as connection:
            await self._store.add_contact(connection, contact, now_us=now_us, actor=actor_of(caller))
            if not confirmed:
                await self._send_trial(connection, contact, now_us=now_us)
            if len(await self._store.contacts(connection, firm_id, limit=CONTACTS_MAX + 1)) > CONTACTS_MAX:
                raise Conflict(f"A firm has at most {CONTACTS_MAX} contacts; remove one first.", reason="TOO_MANY")
        return contact, secret if confirmed else ""

    async def contacts(self, caller: Caller, *, firm_id: int) -> Sequence[Contact]:
        """Newest first."""
        check_role(caller)
        async with transaction(self._pool) as connection:
            return await self._store.contacts(connection, _one_firm(caller, firm_id), limit=CONTACTS_MAX)

    async def remove_contact(self, caller: Caller, contact_id: str) -> Contact:
        """It is told nothing more; what waits for it is dropped. A repeat changes nothing."""
        async with transaction(self._pool) as connection:
            contact = await self._contact(connection, caller, contact_id, removed=True)
            await self._store.remove_contact(connection, contact_id, now_us=self._clock.now_us())
            return contact

    async def confirm_contact(self, caller: Caller, contact_id: str, *, code: str) -> Contact:
        """Give the code that was sent to its mail address: alarms are sent there from now on. A repeat changes nothing."""
        async with transaction(self._pool) as connection:
            contact = await self._contact(connection, caller, contact_id)
            if contact.confirmed:
                return contact
            tries = await self._store.count_code(connection, contact_id)
            is_right = tries <= CODE_TRIES_MAX and self._is_code(contact, code.strip())
            if is_right:
                await self._store.confirm(connection, contact_id)
        if tries > CODE_TRIES_MAX:
            raise Conflict("Too many codes were tried; remove the contact and make another one.", reason="CODE_LOCKED")
        if not is_right:
            raise Invalid("This is not the code that was sent to the address; look again.", reason="WRONG_CODE")
        return replace(contact, confirmed=True)

    async def try_contact(self, caller: Caller, contact_id: str) -> Delivery:
        """Send it a trial message; the code once more where that has not been given."""
        async with transaction(self._pool) as connection:
            contact = await self._contact(connection, caller, contact_id)
            return await self._send_trial(connection, contact, now_us=self._clock.now_us())

    async def create_escalation(
        self,
        caller: Caller,
        *,
        firm_id: int,
        name: str,
        site: str,
        severity_min: Severity,
        tell_changes: bool,
        steps: Sequence[WantedStep],
    ) -> Escalation:
        """Holds for alarms raised from now on."""
        check_role(caller)
        firm_id = _one_firm(caller, firm_id)
        check_text(name, "name", needed=True, characters_max=NAME_CHARACTERS_MAX)
        if site and not _SITE.fullmatch(site):
            raise Invalid("site is the short name of a site, as in the machine's path; empty for every site.")
        if not 1 <= len(steps) <= STEPS_MAX:
            raise Invalid(f"An escalation has 1 to {STEPS_MAX} steps.")
        if any(later.after_s <= step.after_s for step, later in pairwise(steps)):
            raise Invalid("Each step comes later than the one before: after_s must grow.")
        for step in steps:
            if not 0 <= step.after_s <= AFTER_S_MAX:
                raise Invalid(f"after_s is 0 to {AFTER_S_MAX:,} seconds.")
            if not 1 <= len(set(step.contact_ids)) <= CONTACTS_A_STEP_MAX:
                raise Invalid(f"A step tells 1 to {CONTACTS_A_STEP_MAX} contacts.")
        escalation = Escalation(
            id=uuid.uuid4().hex,
            firm_id=firm_id,
            name=name.strip(),
            site=site,
            severity_min=severity_min,
            tell_changes=tell_changes,
            steps=tuple(Step(step.after_s, tuple(dict.fromkeys(step.contact_ids))) for step in steps),
        )
        async with transaction(self._pool) as connection:
            known = {contact.id for contact in await self._store.contacts(connection, firm_id, limit=CONTACTS_MAX)}
            if not {id_ for step in steps for id_ in step.contact_ids} <= known:
                raise NotFound("A step names a contact that the firm does not have.")
            await self._store.add_escalation(
                connection, escalation, now_us=self._clock.now_us(), actor=actor_of(caller)
            )
            if len(await self._store.escalations(connection, firm_id, limit=ESCALATIONS_MAX + 1)) > ESCALATIONS_MAX:
                raise Conflict(f"A firm has at most {ESCALATIONS_MAX} escalations; remove one.", reason="TOO_MANY")
        return escalation

    async def escalations(self, caller: Caller, *, firm_id: int) -> Sequence[Escalation]:
        """Newest first."""
        check_role(caller)
        async with transaction(self._pool) as connection:
            return await self._store.escalations(connection, _one_firm(caller, firm_id), limit=ESCALATIONS_MAX)

    async def remove_escalation(self, caller: Caller, escalation_id: str) -> None:
        """It tells nobody any more. A repeat changes nothing."""
        check_role(caller)
        async with transaction(self._pool) as connection:
            firm_id = (
                await self._store.remove_escalation(connection, escalation_id) if _ID.fullmatch(escalation_id) else None
            )
            if firm_id is None:
                raise NotFound("There is no such escalation, or this key may not see it.")
            caller.check_sees_firm(firm_id)

    async def deliveries(
        self, caller: Caller, *, firm_id: int, state: DeliveryFilter, alarm_id: str
    ) -> Sequence[Delivery]:
        """Newest first; at most LIST_MAX."""
        check_role(caller)
        if alarm_id and not _ID.fullmatch(alarm_id):
            raise Invalid("alarm_id is not the id of an alarm.")
        async with transaction(self._pool) as connection:
            return await self._store.deliveries(
                connection,
                firm_id=_one_firm(caller, firm_id),
                state=None if state is DeliveryFilter.ALL else state.value,
                alarm_id=alarm_id or None,
                limit=LIST_MAX,
            )

    async def resend(self, caller: Caller, delivery_id: str) -> Delivery:
        """Try a dead one again, from the start. One that is pending or sent stays as it is."""
        check_role(caller)
        async with transaction(self._pool) as connection:
            found = await self._store.delivery(connection, delivery_id) if _ID.fullmatch(delivery_id) else None
            if found is None:
                raise NotFound("There is no such delivery, or this key may not see it.")
            caller.check_sees_firm(found.firm_id)
            if found.state is not DeliveryState.DEAD:
                return found
            again = await self._store.revive(connection, delivery_id, now_us=self._clock.now_us())
        if again is None:
            raise Conflict("Its contact was removed.", reason="NO_CONTACT")
        return again

    async def _send_trial(self, connection: Connection, contact: Contact, *, now_us: int) -> Delivery:
        """Raises Conflict where the firm has asked for too many."""
        firm_id, address = contact.firm_id, contact.address
        of_firm, of_address = await self._store.trials(
            connection, firm_id, address, since_us=now_us - 3600 * MICROSECONDS
        )
        if of_address >= TRIALS_MAX:
            raise Conflict(f"An address is tried at most {TRIALS_MAX} times an hour.", reason="TOO_MANY")
        if of_firm >= TRIALS_OF_A_FIRM_MAX:
            raise Conflict(f"A firm tries at most {TRIALS_OF_A_FIRM_MAX} times an hour.", reason="TOO_MANY")
        if not contact.confirmed:
            _, of_day = await self._store.trials(connection, firm_id, address, since_us=now_us - 86_400 * MICROSECONDS)
            if of_day >= CODES_A_DAY_MAX:
                raise Conflict(
                    f"A code is sent at most {CODES_A_DAY_MAX} times a day; look for one that came.", reason="TOO_MANY"
                )
        return await self._store.add_trial(connection, contact, now_us=now_us)

    def _is_code(self, contact: Contact, code: str) -> bool:
        try:
            expected = self._seal.open(contact.secret, of=contact.id)
        except Unreadable as error:
            raise Conflict("The code cannot be read any more; remove the contact and make another one.") from error
        return secrets.compare_digest(expected.encode(), code.encode())

    async def _contact(
        self, connection: Connection, caller: Caller, contact_id: str, *, removed: bool = False
    ) -> Contact:
        check_role(caller)
        found = None
        if _ID.fullmatch(contact_id):
            found = await self._store.contact(connection, contact_id, removed=removed)
        if found is None:
            raise NotFound("There is no such contact, or this key may not see it.")
        caller.check_sees_firm(found.firm_id)
        return found


def check_webhook(address: str) -> None:
    """Raises Invalid unless it is an address that may be called; where its name leads to is checked at each call."""
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError as error:
        raise Invalid("address is not a web address such as https://firm.example/alarms.") from error
    if url.scheme not in ("https", "http") or not url.hostname or port == 0:
        raise Invalid("address is not a web address such as https://firm.example/alarms.")
    if url.username or url.password or url.fragment:
        raise Invalid("address has no user, password or fragment; the signature says who sends.")
    if not address.isascii() or re.search(r"[\x00-\x20\x7f]", address):
        raise Invalid("address holds characters that must be escaped.")


def _one_firm(caller: Caller, firm_id: int) -> int:
    firm_id = caller.firm_or(check_id(firm_id, "firm_id"))
    if not firm_id:
        raise Invalid("firm_id says whose; operators must name one.", reason="FIRM_MISSING")
    return firm_id
