"""What the door sees, noted in memory and written in batches: who sent last, and what was refused and why.

Noting costs a dictionary entry, never a write. A door that is killed loses the notes of FLUSH_INTERVAL_S at most; a cause that
lasts is noted again.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import asyncpg
from prometheus_client import Counter

from services.common.clock import Clock
from services.common.database import AWAY, Connection, Pool, transaction, transaction_for_all_firms
from services.common.errors import HubError
from services.common.identity import KEY_ROLES, key_prefix, key_sha256
from services.common.logs import get_logger
from services.common.metrics import watch_queue
from services.common.texts import showable
from services.ingest.diagnosis import proposal_store
from services.ingest.diagnosis import sightings_store as store
from services.ingest.diagnosis.proposal_store import ProposalKey, Seen
from services.ingest.diagnosis.sightings_store import MachineSeen, RefusalKey, Refused
from services.ingest.domain import BadName, Reason, Sender, UnknownSignal, check_signal_name
from smdih.directory.v1 import directory_pb2 as pb

log = get_logger(__name__)

FLUSH_INTERVAL_S = 5.0
# What is new is written sooner, so that whoever looks at once finds it.
FLUSH_SOON_S = 0.2
# Machines that send all the time are the many; theirs is news only when it stops.
MACHINES_INTERVAL_S = 30.0
NOTED_MAX = 10_000
TEXT_LENGTH_MAX = 300
CLEAN_INTERVAL_S = 600.0

# Keys that were shown and may not come in, by reason. A revoked key counts as unknown here.
keys_refused_total = Counter("smdih_ingest_keys_refused_total", "Keys refused", ["reason"])
# Refusals and proposals that were not noted, because NOTED_MAX kinds waited to be written already.
unnoted_total = Counter("smdih_ingest_door_unnoted_total", "Refusals and proposals not noted")

_KEY = re.compile(rf"smdih_({'|'.join(KEY_ROLES)})_[A-Za-z0-9_-]{{4,}}")


@dataclass(frozen=True)
class _UnknownKey:
    digest: bytes
    prefix: str


@dataclass(frozen=True)
class Notes:
    """What waits to be written."""

    machines: dict[int, tuple[int, int, Sender]] = field(default_factory=dict)
    used: dict[int, int] = field(default_factory=dict)
    refusals: dict[RefusalKey, Refused] = field(default_factory=dict)
    unknown_keys: dict[_UnknownKey, Refused] = field(default_factory=dict)
    proposals: dict[ProposalKey, Seen] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.machines or self.used or self.refusals or self.unknown_keys or self.proposals)


class Sightings:
    """One door's notes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._notes = Notes()
        self._machines = self._notes.machines
        self.is_new = asyncio.Event()
        watch_queue("sightings", lambda: len(self._notes.refusals), limit=NOTED_MAX)

    def taken(self, sender: Sender, machine_id: int, received_us: int, newest_us: int) -> None:
        """A batch with good samples."""
        self._machines[machine_id] = (received_us, newest_us, sender)

    def used(self, credential_id: int) -> None:
        """A key was accepted."""
        self._notes.used[credential_id] = self._clock.now_us()

    def refused(
        self,
        sender: Sender,
        reason: str,
        detail: str,
        *,
        machine_id: int = 0,
        subject: str = "",
        samples: int = 0,
        clock_off_us: int = 0,
    ) -> None:
        """Input of a known sender that was put aside or sent back."""
        if not sender.is_live:
            return
        key = RefusalKey(sender.firm_id, machine_id, sender.credential_id, showable(subject[:TEXT_LENGTH_MAX]), reason)
        self._note(key, sender.source, sender.door, samples, detail, clock_off_us)

    def key_refused(self, key: str, credential: pb.Credential | None, reason: str, detail: str) -> None:
        """A key that may not come in; `credential` where it is one of ours, but not valid now."""
        keys_refused_total.labels(reason).inc()
        if credential is not None:
            noted = RefusalKey(credential.firm_id, 0, credential.id, credential.prefix, reason)
            self._note(noted, "", "", 0, detail, 0)
            return
        unknown = _UnknownKey(key_sha256(key), key_prefix(key) if _KEY.fullmatch(key) else "")
        if self._has_room(self._notes.unknown_keys, unknown):
            before = self._notes.unknown_keys.get(unknown)
            self._notes.unknown_keys[unknown] = self._counted(before, "", "", 0, detail, 0)

    def proposed(self, sender: Sender, machine_id: int, unknown: Sequence[UnknownSignal]) -> None:
        """Signals that a machine does not have, of a firm that wants them proposed."""
        now_us = self._clock.now_us()
        for one in unknown:
            key = ProposalKey(machine_id, one.name)
            if not _is_signal_name(one.name) or not self._has_room(self._notes.proposals, key):
                continue
            seen = Seen(
                sender.firm_id,
                one.samples,
                now_us,
                now_us,
                one.example,
                one.lowest,
                one.highest,
                one.is_whole,
                sender.source,
            )
            before = self._notes.proposals.get(key)
            self._notes.proposals[key] = seen if before is None else before.and_then(seen)

    def _note(self, key: RefusalKey, source: str, door: str, samples: int, detail: str, clock_off_us: int) -> None:
        if self._has_room(self._notes.refusals, key):
            before = self._notes.refusals.get(key)
            self._notes.refusals[key] = self._counted(before, source, door, samples, detail, clock_off_us)

    def _has_room(self, noted: Mapping[Any, object], key: object) -> bool:
        if key not in noted:
            if len(noted) >= NOTED_MAX:
                unnoted_total.inc()
                return False
            self.is_new.set()
        return True

    def _counted(
        self, before: Refused | None, source: str, door: str, samples: int, detail: str, clock_off_us: int
    ) -> Refused:
        now_us = self._clock.now_us()
        times, first_us = (before.times, before.first_us) if before else (0, now_us)
        samples += before.samples if before else 0
        detail = showable(detail[:TEXT_LENGTH_MAX])
        return Refused(times + 1, samples, first_us, now_us, source, door, detail, clock_off_us)

    def take(self, *, with_machines: bool) -> Notes:
        """The notes so far; they are the caller's now. Without the machines those stay here."""
        self.is_new.clear()
        taken = self._notes
        if with_machines:
            for received_us, _, sender in taken.machines.values():
                taken.used[sender.credential_id] = max(received_us, taken.used.get(sender.credential_id, 0))
            self._notes = Notes()
        else:
            self._notes = Notes(machines=taken.machines)
            taken = replace(taken, machines={})
        self._machines = self._notes.machines
        return taken

    def give_back(self, notes: Notes) -> None:
        """What could not be written is written with the next; what has been noted since comes last."""
        since = self._notes
        for machine_id, seen in notes.machines.items():
            since.machines.setdefault(machine_id, seen)
        for credential_id, used_us in notes.used.items():
            since.used.setdefault(credential_id, used_us)
        for key, refused in notes.refusals.items():
            since.refusals[key] = refused.and_then(since.refusals.get(key))
        for unknown, refused in notes.unknown_keys.items():
            since.unknown_keys[unknown] = refused.and_then(since.unknown_keys.get(unknown))
        for proposal, proposed in notes.proposals.items():
            since.proposals[proposal] = proposed.and_then(since.proposals.get(proposal))


class SightingsWriter:
    """Brings the notes into the database."""

    def __init__(self, pool: Pool, sightings: Sightings, clock: Clock) -> None:
        self._pool = pool
        self._sightings = sightings
        self._clock = clock
        self._writing = asyncio.Lock()
        self._machines_due_s = 0.0
        self._clean_due_s = 0.0

    async def run(self) -> None:
        """Write until cancelled; while the database is away the notes wait."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                async with asyncio.timeout(FLUSH_INTERVAL_S):
                    await self._sightings.is_new.wait()
                await asyncio.sleep(FLUSH_SOON_S)
            except TimeoutError:
                pass
            with_machines = loop.time() >= self._machines_due_s
            if with_machines:
                self._machines_due_s = loop.time() + MACHINES_INTERVAL_S
            try:
                await self.write(machines=with_machines)
                if loop.time() >= self._clean_due_s:
                    self._clean_due_s = loop.time() + CLEAN_INTERVAL_S
                    async with transaction(self._pool) as connection:
                        await store.clean_refusals(connection, self._clock.now_us())
                        await proposal_store.clean(connection)
            except (*AWAY, asyncpg.PostgresError, HubError) as error:
                log.warning("sightings wait", error=repr(error))
                await asyncio.sleep(FLUSH_INTERVAL_S)

    async def close(self) -> None:
        """Write what is noted still; where the database is away it is lost."""
        try:
            await self.write()
        except (*AWAY, asyncpg.PostgresError, HubError) as error:
            log.warning("the last sightings are lost", error=repr(error))

    async def write(self, *, machines: bool = True) -> None:
        """Write what has been noted. Raises TryAgain; the notes are kept then (and may be counted twice)."""
        async with self._writing:
            notes = self._sightings.take(with_machines=machines)
            if not notes:
                return
            try:
                async with transaction_for_all_firms(self._pool) as connection:  # whoever asks for it
                    await store.write_seen(connection, _seen(notes), notes.used)
                    await store.write_refusals(connection, await self._with_owners(connection, notes))
                    await proposal_store.write(connection, notes.proposals)
            except BaseException:
                self._sightings.give_back(notes)
                raise

    @staticmethod
    async def _with_owners(connection: Connection, notes: Notes) -> dict[RefusalKey, Refused]:
        """Unknown keys may be ones that were revoked: the database still knows whose they were."""
        if not notes.unknown_keys:
            return notes.refusals
        owners = await store.owners(connection, [key.digest for key in notes.unknown_keys])
        found = dict(notes.refusals)
        for key, refused in notes.unknown_keys.items():
            owner = owners.get(key.digest)
            if owner is None:
                noted = RefusalKey(0, 0, 0, key.prefix, Reason.KEY_UNKNOWN)
            else:
                noted = RefusalKey(owner.firm_id, 0, owner.credential_id, owner.prefix, Reason.KEY_REVOKED)
            found[noted] = refused.and_then(found.get(noted))
        return found


def _seen(notes: Notes) -> list[MachineSeen]:
    return [
        MachineSeen(machine_id, received_us, newest_us, sender.credential_id, sender.source, sender.door)
        for machine_id, (received_us, newest_us, sender) in notes.machines.items()
    ]


def _is_signal_name(name: str) -> bool:
    try:
        return check_signal_name(name) == name
    except BadName:
        return False
