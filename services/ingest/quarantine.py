"""What stands in quarantine, and its way back through the door."""

from google.protobuf.message import DecodeError

from services.common.clock import to_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, NotFound
from services.common.identity import Caller, Role
from services.ingest import quarantine_store as store
from services.ingest.asked import PAGE_SIZE_DEFAULT, checked_time, number_in_token, page_size_of
from services.ingest.domain import PAGE_SIZE_MAX
from services.ingest.door import Door
from services.ingest.frames import Sender
from services.ingest.quarantine_store import Quarantined
from smdih.ingest.v1 import telemetry_pb2


class Quarantine:
    """What could not be stored, for its firm."""

    def __init__(self, pool: Pool, directory: Directory, door: Door) -> None:
        self._pool = pool
        self._directory = directory
        self._door = door

    async def page(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[Quarantined], str]:
        """What is in quarantine, newest first, and the token of the next page."""
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        firm_id = caller.firm_or(firm_id)
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        before: tuple[int, str] | None = None
        if page_token:
            time_us, _, item_id = page_token.partition(".")
            before = (number_in_token(time_us), item_id)
            checked_time(before[0], "page_token")
        async with transaction(self._pool) as connection:
            items = await store.quarantine_page(connection, firm_id, before, size + 1)
        token = f"{to_us(items[size - 1].received)}.{items[size - 1].id}" if len(items) > size else ""
        return items[:size], token

    async def replay(self, caller: Caller, item_id: str, machine_id: int) -> telemetry_pb2.BatchResult:
        """Send an item through the door again, to `machine_id` if given. Raises NotFound, Conflict (nothing to send)."""
        caller.require(Role.OPERATOR, Role.FIRM)
        async with transaction(self._pool) as connection:
            item = await store.quarantined_item(connection, item_id)
        caller.check_sees_firm(item.firm_id)
        if item.batch is None:
            raise Conflict(
                "No samples could be read from this item; mend the sender and send them anew.", reason="NOT_REPLAYABLE"
            )
        try:
            batch = telemetry_pb2.Batch.FromString(item.batch)
        except DecodeError as error:
            raise Conflict("This item cannot be read any more.", reason="NOT_REPLAYABLE") from error
        if machine_id:
            machine = self._directory.machines.get(machine_id)
            if machine is None:
                raise NotFound(f"There is no machine {machine_id}.")
            caller.check_sees_firm(machine.firm_id)
            batch.machine_id, batch.machine_path = machine_id, ""
        sender = Sender(item.firm_id, item.credential_id, item.source, "replay", item.id)
        (result,) = await self._door.send(sender, [batch])
        if not result.quarantined:
            async with transaction(self._pool) as connection:
                await store.mark_replayed(connection, item_id)
        return result
