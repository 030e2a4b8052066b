"""A copy in memory of who and what the hub knows, fed by the compacted directory topic.

Every service holds one, so no request waits for another service, and the telemetry door works while the database is away.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from aiokafka import ConsumerRecord
from google.protobuf.message import DecodeError
from prometheus_client import Gauge

from services.common import topics
from services.common.clock import Clock
from services.common.errors import TryAgain, Unauthenticated
from services.common.identity import Caller, Role, key_sha256
from services.common.kafka import Cluster, Followed
from services.common.logs import get_logger
from smdih.directory.v1 import directory_pb2 as pb

log = get_logger(__name__)

# For so long a process works with what it knew last; then a revocation that it has not heard of weighs more than its service.
AGE_S_MAX = 3600.0
STALE = "DIRECTORY_STALE"

age_seconds = Gauge("smdih_directory_age_seconds", "Since this process last knew for sure which keys are revoked")

_ROLES = {
    pb.ROLE_DEVICE: Role.DEVICE,
    pb.ROLE_FIRM: Role.FIRM,
    pb.ROLE_PARTNER: Role.PARTNER,
    pb.ROLE_OPERATOR: Role.OPERATOR,
}


def entity_key(kind: str, entity_id: int) -> str:
    """Key of an entity's records in the topic."""
    return f"{kind}/{entity_id}"


class KeyWatch(Protocol):
    """Told of every key that is shown here; called for each request, so it must be quick."""

    def used(self, credential_id: int) -> None: ...

    def key_refused(self, key: str, credential: pb.Credential | None, reason: str, detail: str) -> None:
        """`credential`: where the key is one of the hub's, but not valid now."""
        ...


class _Machines(Mapping[int, pb.Machine]):
    """Machines by id, kept as the bytes they came in and read when asked for: a seventh of the memory of read ones."""

    def __init__(self) -> None:
        self.entries: dict[int, bytes] = {}

    def __getitem__(self, machine_id: int) -> pb.Machine:
        return pb.DirectoryEntry.FromString(self.entries[machine_id]).machine

    def __contains__(self, machine_id: object) -> bool:
        return machine_id in self.entries

    def __iter__(self) -> Iterator[int]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


class _Entries:
    """What the topic tells: each entity as its newest record has it."""

    def __init__(self, kinds: Collection[str]) -> None:
        self._kinds = kinds
        self.credentials: dict[bytes, pb.Credential] = {}
        self.credential_digests: dict[int, bytes] = {}
        self.machine_ids: dict[str, int] = {}
        self.firms: dict[int, pb.Firm] = {}
        self.sites: dict[int, pb.Site] = {}
        self.partners: dict[int, pb.Partner] = {}
        self.machines = _Machines()
        # Those that are kept as they are read, each under the name of its field in an entry.
        self._plain: dict[str, dict[int, Any]] = {"firm": self.firms, "site": self.sites, "partner": self.partners}

    def of(self, kind: str) -> Mapping[int, object]:
        return self.machines if kind == "machine" else self._plain[kind]

    def apply(self, record: ConsumerRecord) -> None:
        kind, _, number = record.key.decode().partition("/")
        entity_id = int(number)
        if record.value is None:
            self._remove(kind, entity_id)
            return
        try:
            entry = pb.DirectoryEntry.FromString(record.value)
        except DecodeError:
            # One owner writes this topic; an unreadable entry is a fault of a release, and the rest must go on working.
            log.error("directory entry unreadable", offset=record.offset, key=record.key)
            return
        if kind == "credential":
            self._remove(kind, entity_id)
            self.credentials[entry.credential.sha256] = entry.credential
            self.credential_digests[entity_id] = entry.credential.sha256
        elif kind not in self._kinds:
            return
        elif kind in self._plain:
            self._plain[kind][entity_id] = getattr(entry, kind)
        elif kind == "machine":
            self.machines.entries[entity_id] = record.value
            self.machine_ids[entry.machine.path.lower()] = entity_id

    def _remove(self, kind: str, entity_id: int) -> None:
        if kind == "credential":
            digest = self.credential_digests.pop(entity_id, None)
            if digest is not None:
                self.credentials.pop(digest, None)
        elif kind == "machine" and entity_id in self.machines:
            self.machine_ids.pop(self.machines[entity_id].path.lower(), None)
            del self.machines.entries[entity_id]
        elif kind in self._plain:
            self._plain[kind].pop(entity_id, None)


class Directory:
    """Firms, sites, machines, partners and credentials, as last published.

    `kinds` names what to keep ("firm", "site", "machine", "partner"); credentials are always kept.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        clock: Clock,
        kinds: Collection[str],
        key_watch: KeyWatch | None = None,
        age_s_max: float = AGE_S_MAX,
    ) -> None:
        self._key_watch = key_watch
        self._clock = clock
        self._age_s_max = age_s_max
        kept = frozenset(kinds)
        self._topic = Followed(cluster, topics.DIRECTORY, empty=lambda: _Entries(kept), apply=_Entries.apply)

    @property
    def _entries(self) -> _Entries:
        return self._topic.known

    @property
    def firms(self) -> dict[int, pb.Firm]:
        return self._entries.firms

    @property
    def sites(self) -> dict[int, pb.Site]:
        return self._entries.sites

    @property
    def partners(self) -> dict[int, pb.Partner]:
        return self._entries.partners

    @property
    def machines(self) -> _Machines:
        return self._entries.machines

    def caller_of(self, key: str) -> Caller:
        """Whose key this is. Raises Unauthenticated for none, unknown, not yet valid, expired and revoked keys alike.

        Raises TryAgain when it has not been known for long which keys are revoked, but for devices': telemetry that is acknowledged
        needs Kafka anyway.
        """
        credential = self._entries.credentials.get(key_sha256(key)) if key else None
        if key:
            self._check_age(credential)
        if credential is None:
            if key and self._key_watch is not None:
                self._key_watch.key_refused(key, None, "KEY_UNKNOWN", "")
            raise Unauthenticated()
        self._check_window(key, credential)
        if self._key_watch is not None:
            self._key_watch.used(credential.id)
        return Caller(
            credential_id=credential.id,
            role=_ROLES[credential.role],
            firm_id=credential.firm_id,
            partner_id=credential.partner_id,
        )

    def prefix_of(self, credential_id: int) -> str:
        """What may be shown of a key; empty once it is revoked."""
        digest = self._entries.credential_digests.get(credential_id)
        return self._entries.credentials[digest].prefix if digest is not None else ""

    def check_still_valid(self, credential_id: int) -> None:
        """For calls that last: raise Unauthenticated once the key with which one began is revoked or has ended; TryAgain."""
        digest = self._entries.credential_digests.get(credential_id)
        if digest is None:
            raise Unauthenticated("This key has been revoked; ask for a new one.", reason="KEY_REVOKED")
        credential = self._entries.credentials[digest]
        self._check_age(credential)
        self._check_window("", credential)

    def _check_age(self, credential: pb.Credential | None) -> None:
        age_s = self._topic.age_s
        if age_s > self._age_s_max and (credential is None or credential.role != pb.ROLE_DEVICE):
            detail = f"The hub has not heard for {int(age_s)} s which keys are revoked; send again."
            raise TryAgain(detail, reason=STALE, retry_after_s=5)

    def _check_window(self, key: str, credential: pb.Credential) -> None:
        now_us = self._clock.now_us()
        if now_us < credential.valid_from_us:
            raise self._not_now(
                key, credential, "KEY_NOT_YET_VALID", "This key is not valid yet; use the one before it."
            )
        if credential.valid_to_us and now_us >= credential.valid_to_us:
            raise self._not_now(key, credential, "KEY_EXPIRED", "This key is not valid any more; ask for a new one.")

    def _not_now(self, key: str, credential: pb.Credential, reason: str, detail: str) -> Unauthenticated:
        if self._key_watch is not None:
            self._key_watch.key_refused(key, credential, reason, detail)
        return Unauthenticated(detail, reason=reason)

    def machine_id(self, path: str) -> int:
        """0: no machine has this path."""
        return self._entries.machine_ids.get(path.lower(), 0)

    def machines_of(self, firm: pb.Firm, *, limit: int) -> list[pb.Machine]:
        """Machines of a firm in order of their paths, at most `limit`."""
        prefix = f"{firm.slug}/"
        paths = sorted(path for path in self._entries.machine_ids if path.startswith(prefix))[:limit]
        return [self.machines[self._entries.machine_ids[path]] for path in paths]

    def machine_version(self, machine_id: int) -> object:
        """Another object whenever the machine changed: what is derived from it can tell that it is stale. None: no such machine."""
        return self.machines.entries.get(machine_id)

    async def is_caught_up(self) -> bool:
        """Readiness: everything that stood in the topic at the start has been read."""
        return self._topic.caught_up.is_set()

    async def wait_caught_up(self) -> None:
        await self._topic.caught_up.wait()

    async def wait_for_credential(self, credential_id: int, *, timeout_s: float = 5.0) -> bool:
        """Wait until a credential that was just made is known here; False when that takes too long."""
        return await self._topic.wait_for(
            lambda: credential_id in self._entries.credential_digests, timeout_s=timeout_s
        )

    async def wait_for_machine(self, machine_id: int, *, signals: int, timeout_s: float = 5.0) -> bool:
        """Wait until a machine that was just made or extended is known here with so many signals."""

        def known() -> bool:
            machine = self.machines.get(machine_id)
            return machine is not None and len(machine.signals) >= signals

        return await self._topic.wait_for(known, timeout_s=timeout_s)

    async def wait_for(self, kind: str, entity_id: int, *, timeout_s: float) -> bool:
        """Wait until a firm, site, machine or partner that may just have been made is known here; False when it takes too long."""

        def known() -> bool:
            return entity_id in self._entries.of(kind)

        return known() or await self._topic.wait_for(known, timeout_s=timeout_s)

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        age_seconds.set_function(lambda: self._topic.age_s)
        await self._topic.run()
