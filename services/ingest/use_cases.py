"""What may be asked of the door besides taking telemetry, by what it is about; the edges translate and nothing more."""

from services.common.clock import Clock
from services.common.database import Pool
from services.common.directory import Directory
from services.common.evidence import Signer
from services.common.kafka import TopicEnds
from services.common.outbox import OutboxRelay
from services.ingest.diagnosis.diagnosis import Diagnoses, Partitions
from services.ingest.diagnosis.sightings import SightingsWriter
from services.ingest.kpi.service import KpiService
from services.ingest.proposals.service import Proposals
from services.ingest.queries.access import Access
from services.ingest.queries.export import Export
from services.ingest.queries.queries import Queries
from services.ingest.queries.rooms import RoomReads, Rooms
from services.ingest.queries.turns import Turns
from services.ingest.registry.audit import Audit
from services.ingest.registry.claims import Claims
from services.ingest.registry.credentials import Credentials
from services.ingest.registry.imports import Imports
from services.ingest.registry.quotas import Quotas
from services.ingest.registry.registry import Registry
from services.ingest.retention.service import Retention
from services.ingest.telemetry.door import Door
from services.ingest.telemetry.quarantine import Quarantine


class UseCases:
    """`samples`: how machines are spread over their topic. `signer`: none without a key to sign evidence with."""

    def __init__(
        self,
        pool: Pool,
        *,
        directory: Directory,
        relay: OutboxRelay,
        clock: Clock,
        door: Door,
        sightings: SightingsWriter,
        ends: TopicEnds,
        samples: Partitions,
        rooms: Rooms,
        room_reads: RoomReads,
        signer: Signer | None,
        disk_bytes: int,
    ) -> None:
        self.registry = Registry(pool, relay, directory, clock)
        self.imports = Imports(pool, relay, directory, clock)
        self.credentials = Credentials(pool, relay, directory, clock, sightings)
        self.claims = Claims(pool, relay, directory, clock)
        self.quotas = Quotas(pool, relay, clock)
        self.audit = Audit(pool)
        self.diagnoses = Diagnoses(pool, directory, clock, sightings, ends=ends, partitions=samples)
        self.quarantine = Quarantine(pool, directory, door, ends)
        self.proposals = Proposals(pool, relay, clock, sightings, self.registry, self.quarantine)
        self.retention = Retention(pool, clock, disk_bytes=disk_bytes)
        turns = Turns()
        access = Access(rooms.grants, note=room_reads.note)
        self.queries = Queries(pool, directory, access, turns)
        self.export = Export(pool, directory, access)
        self.room_reads = room_reads
        self.kpi = KpiService(pool, directory, clock, turns, signer)
