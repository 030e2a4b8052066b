"""What the door sees, noted in memory and written in batches: who sent last, and what was refused and why.

Noting costs a dictionary entry, never a write. A door that is killed loses the notes of FLUSH_INTERVAL_S at most; a cause that
lasts is noted again.
"""

import asyncio
import re
from dataclasses import dataclass

import asyncpg
from prometheus_client import Counter

from services.common.clock import Clock
from services.common.database import AWAY, Connection, Pool, transaction
from services.common.errors import HubError
from services.common.identity import Role, key_prefix, key_sha256
from services.common.logs import get_logger
from services.ingest import sightings_store as store
from services.ingest.domain import Reason
from services.ingest.frames import Sender
from services.ingest.sightings_store import MachineSeen, RefusalKey, Refused
from smdih.directory.v1 import directory_pb2 as pb

log = get_logger(__name__)

FLUSH_INTERVAL_S = 5.0
# What is new is written sooner, so that whoever looks at once finds it.
FLUSH_SOON_S = 0.2
# Machines that send all the time are the many; theirs is news only when it stops.
MACHINES_INTERVAL_S = 30.0
REFUSALS_NOTED_MAX = 10_000
TEXT_LENGTH_MAX = 300
CLEAN_INTERVAL_S = 600.0

# Refusals that were counted without their details, because more kinds than REFUSALS_NOTED_MAX waited to be written.
unnoted_total = Counter("smdih_ingest_door_unnoted_refusals_total", "Refusals counted without details")

_KEY = re.compile(rf"smdih_({'|'.join(Role)})_[A-Za-z0-9_-]{{4,}}")
_UNSHOWABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class _UnknownKey:
    digest: bytes
    prefix: str


class Sightings:
    """One door's notes."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._machines: dict[int, tuple[int, int, Sender]] = {}
        self._used: dict[int, int] = {}
        self._refusals: dict[RefusalKey, Refused] = {}
        self._unknown_keys: dict[_UnknownKey, Refused] = {}
        self.is_new = asyncio.Event()

    def taken(self, sender: Sender, machine_id: int, received_us: int, newest_us: int) -> None:
        """A batch with good samples."""
        self._machines[machine_id] = (received_us, newest_us, sender)

    def used(self, credential_id: int) -> None:
        """A key was accepted."""
        self._used[credential_id] = self._clock.now_us()

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
        key = RefusalKey(sender.firm_id, machine_id, sender.credential_id, _shown(subject), reason)
        self._note(key, sender.source, sender.door, samples, detail, clock_off_us)

    def key_refused(self, key: str, credential: pb.Credential | None, reason: str, detail: str) -> None:
        """A key that may not come in; `credential` where it is one of ours, but not valid now."""
        if credential is not None:
            noted = RefusalKey(credential.firm_id, 0, credential.id, credential.prefix, reason)
            self._note(noted, "", "", 0, detail, 0)
            return
        unknown = _UnknownKey(key_sha256(key), key_prefix(key) if _KEY.fullmatch(key) else "")
        if unknown not in self._unknown_keys:
            if len(self._unknown_keys) >= REFUSALS_NOTED_MAX:
                unnoted_total.inc()
                return
            self.is_new.set()
        self._unknown_keys[unknown] = self._counted(self._unknown_keys.get(unknown), "", "", 0, detail, 0)

    def _note(self, key: RefusalKey, source: str, door: str, samples: int, detail: str, clock_off_us: int) -> None:
        if key not in self._refusals:
            if len(self._refusals) >= REFUSALS_NOTED_MAX:
                unnoted_total.inc()
                return
            self.is_new.set()
        self._refusals[key] = self._counted(self._refusals.get(key), source, door, samples, detail, clock_off_us)

    def _counted(
        self, before: Refused | None, source: str, door: str, samples: int, detail: str, clock_off_us: int
    ) -> Refused:
        now_us = self._clock.now_us()
        times, first_us = (before.times, before.first_us) if before else (0, now_us)
        samples += before.samples if before else 0
        return Refused(times + 1, samples, first_us, now_us, source, door, _shown(detail), clock_off_us)

    def take_machines(self) -> list[MachineSeen]:
        """The notes about machines so far; they are the caller's now."""
        machines, self._machines = self._machines, {}
        for received_us, _, sender in machines.values():
            self._used[sender.credential_id] = max(received_us, self._used.get(sender.credential_id, 0))
        return [
            MachineSeen(machine_id, received_us, newest_us, sender.credential_id, sender.source, sender.door)
            for machine_id, (received_us, newest_us, sender) in machines.items()
        ]

    def take_used(self) -> dict[int, int]:
        used, self._used = self._used, {}
        return used

    def take_refusals(self) -> tuple[dict[RefusalKey, Refused], dict[_UnknownKey, Refused]]:
        self.is_new.clear()
        refusals, self._refusals = self._refusals, {}
        unknown, self._unknown_keys = self._unknown_keys, {}
        return refusals, unknown

    def give_back(
        self,
        machines: list[MachineSeen],
        used: dict[int, int],
        refusals: dict[RefusalKey, Refused],
        unknown: dict[_UnknownKey, Refused],
    ) -> None:
        """What could not be written is written with the next; what has been noted since comes first."""
        for seen in machines:
            sender = Sender(0, seen.credential_id, seen.source, seen.door, "")
            self._machines.setdefault(seen.machine_id, (seen.received_us, seen.newest_us, sender))
        self._used = used | self._used
        for key, refused in refusals.items():
            self._refusals[key] = refused.and_then(self._refusals.get(key))
        for digest, refused in unknown.items():
            self._unknown_keys[digest] = refused.and_then(self._unknown_keys.get(digest))


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
            except (*AWAY, asyncpg.PostgresError, HubError) as error:
                log.warning("sightings wait", error=repr(error))
                await asyncio.sleep(FLUSH_INTERVAL_S)

    async def write(self, *, machines: bool = True) -> None:
        """Write what has been noted. Raises TryAgain; the notes are kept then (and may be counted twice)."""
        async with self._writing:
            seen = self._sightings.take_machines() if machines else []
            used = self._sightings.take_used()
            refusals, unknown = self._sightings.take_refusals()
            try:
                if seen or used or refusals or unknown:
                    async with transaction(self._pool) as connection:
                        await store.write_seen(connection, seen, used)
                        await store.write_refusals(connection, await self._with_owners(connection, refusals, unknown))
            except BaseException:
                self._sightings.give_back(seen, used, refusals, unknown)
                raise

    @staticmethod
    async def _with_owners(
        connection: Connection, refusals: dict[RefusalKey, Refused], unknown: dict[_UnknownKey, Refused]
    ) -> dict[RefusalKey, Refused]:
        """Unknown keys may be ones that were revoked: the database still knows whose they were."""
        if not unknown:
            return refusals
        owners = await store.owners(connection, [key.digest for key in unknown])
        found = dict(refusals)
        for key, refused in unknown.items():
            owner = owners.get(key.digest)
            if owner is None:
                noted = RefusalKey(0, 0, 0, key.prefix, Reason.KEY_UNKNOWN)
            else:
                noted = RefusalKey(owner.firm_id, 0, owner.credential_id, owner.prefix, Reason.KEY_REVOKED)
            found[noted] = refused.and_then(found.get(noted))
        return found


def _shown(text: str) -> str:
    """What a sender wrote, as it can be stored and shown."""
    return _UNSHOWABLE.sub("?", text[:TEXT_LENGTH_MAX])
