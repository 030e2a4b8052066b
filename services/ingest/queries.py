"""What can be asked of the stored data; one method a use case."""

from dataclasses import dataclass

from services.common.clock import to_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid, NotFound
from services.common.identity import Caller, Role
from services.ingest import query_store as store
from services.ingest.asked import check_id, check_one_of, checked_time, number_in_token, page_size_of
from services.ingest.domain import HISTORY_PAGE_SIZE_MAX
from services.ingest.query_store import Bucket, Latest
from smdih.directory.v1 import directory_pb2 as pb

HISTORY_PAGE_SIZE_DEFAULT = 1_000


@dataclass(frozen=True)
class History:
    """One page: samples or buckets, and where the next page begins (empty: nowhere)."""

    samples: list[tuple[int, float]]
    buckets: list[Bucket]
    next_page_token: str


class Queries:
    """What is stored, for its firm."""

    def __init__(self, pool: Pool, directory: Directory) -> None:
        self._pool = pool
        self._directory = directory

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
        check_id(signal_id, "signal_id")
        check_one_of(resolution, ("raw", "minute", "hour"), "resolution")
        size = page_size_of(page_size, HISTORY_PAGE_SIZE_DEFAULT, HISTORY_PAGE_SIZE_MAX)
        start_us = number_in_token(page_token) if page_token else from_us
        start, end = checked_time(start_us, "from_us"), checked_time(to_us_, "to_us")
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
