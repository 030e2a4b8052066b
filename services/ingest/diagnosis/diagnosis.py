""" "Why is there no data?" as a use case."""

from dataclasses import dataclass, replace

from services.common import topics
from services.common.clock import Clock
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.kafka import TopicEnds
from services.ingest.asked import PAGE_SIZE_DEFAULT, check_id, number_in_token, page_size_of
from services.ingest.diagnosis import store
from services.ingest.diagnosis.causes import Diagnosis, Facts, Refusal, diagnose
from services.ingest.diagnosis.sightings import SightingsWriter
from services.ingest.domain import PAGE_SIZE_MAX

# Whoever asks looks at a machine without data: a broker that does not answer by then is an answer too.
END_TIMEOUT_S = 2.0
SKIPPED_MAX = 1_000_000_000


@dataclass(frozen=True)
class Partitions:
    """How machines are spread over the samples topic, whose full name is `topic`."""

    topic: str
    count: int

    def of(self, machine_id: int) -> int:
        return machine_id % self.count


class Diagnoses:
    """Says why a machine has no data."""

    def __init__(
        self,
        pool: Pool,
        directory: Directory,
        clock: Clock,
        writer: SightingsWriter,
        *,
        ends: TopicEnds,
        partitions: Partitions,
    ) -> None:
        self._pool = pool
        self._directory = directory
        self._clock = clock
        self._writer = writer
        self._ends = ends
        self._partitions = partitions

    async def of_machine(self, caller: Caller, machine_id: int) -> tuple[Facts, Diagnosis]:
        """What is known, and what it means. Raises NotFound, TryAgain (the database is away)."""
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        check_id(machine_id, "machine_id")
        machine = self._directory.machines.get(machine_id)
        if machine is None:
            raise NotFound(f"There is no machine {machine_id}.")
        caller.check_sees_firm(machine.firm_id)
        await self._writer.write()
        partition = self._partitions.of(machine_id)
        async with transaction(self._pool) as connection:
            facts, position = await store.facts(
                connection, machine, topic=self._partitions.topic, partition=partition, now_us=self._clock.now_us()
            )
        end = await self._ends.end_of(topics.SAMPLES, partition, timeout_s=END_TIMEOUT_S)
        facts = replace(facts, waiting_records=None if end is None else max(0, end - position))
        return facts, diagnose(facts)

    async def refusals(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[tuple[int, Refusal]], str]:
        """What the doors refused or put aside, a row for each kind, newest first; each with its firm."""
        caller.require(Role.OPERATOR, Role.FIRM)
        firm_id = caller.firm_or(firm_id)
        if firm_id:
            check_id(firm_id, "firm_id")
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        # A page is found by counting: the rows are few, and those that move do so to the front.
        skip = number_in_token(page_token)
        if not 0 <= skip <= SKIPPED_MAX:
            raise Invalid("page_token: send back exactly what the page before gave.")
        await self._writer.write()
        async with transaction(self._pool) as connection:
            found = await store.refusals_page(connection, firm_id, skip, size + 1)
        return found[:size], str(skip + size) if len(found) > size else ""
