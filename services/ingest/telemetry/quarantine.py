"""What stands in quarantine, and its way back through the door."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Self

from google.protobuf.message import DecodeError

from services.common import topics
from services.common.clock import to_us
from services.common.database import Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, NotFound, SlowDown
from services.common.identity import Caller, Role
from services.common.kafka import TopicEnds
from services.ingest.asked import PAGE_SIZE_DEFAULT, check_id, checked_time, number_in_token, page_size_of
from services.ingest.domain import PAGE_SIZE_MAX, Reason, Sender
from services.ingest.telemetry import quarantine_store as store
from services.ingest.telemetry.door import Door
from services.ingest.telemetry.quarantine_store import Quarantined
from smdih.ingest.v1 import telemetry_pb2

REPLAYED_AT_ONCE = 50
REPLAYED_ITEMS_MAX = 5_000
LOOKED_AT_MAX = 50_000
LEFT_COUNTED_MAX = 100_000
CAUGHT_UP_WITHIN_S = 5.0
CAUGHT_UP_POLL_S = 0.05


@dataclass(frozen=True)
class Replayed:
    """Items that were sent again, what became of their samples, and how many items wait still (at most LEFT_COUNTED_MAX), also
    such as were refused again.

    `is_complete`: nothing was on its way into quarantine that this did not see. `next_page_token`: where the next call goes on;
    empty: everything that waits was looked at.
    """

    items: int
    accepted: int
    quarantined: int
    left: int
    is_complete: bool
    next_page_token: str = ""

    def and_then(self, later: "Replayed") -> Self:
        return replace(
            self,
            items=self.items + later.items,
            accepted=self.accepted + later.accepted,
            quarantined=self.quarantined + later.quarantined,
        )


class Quarantine:
    """What could not be stored, for its firm."""

    def __init__(self, pool: Pool, directory: Directory, door: Door, ends: TopicEnds) -> None:
        self._pool = pool
        self._directory = directory
        self._door = door
        self._ends = ends

    async def page(
        self, caller: Caller, firm_id: int, page_size: int, page_token: str
    ) -> tuple[list[Quarantined], str]:
        """What is in quarantine, newest first, and the token of the next page."""
        caller.require(Role.OPERATOR, Role.FIRM, Role.DEVICE)
        firm_id = caller.firm_or(firm_id)
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        before = _from_token(page_token) if page_token else None
        async with transaction(self._pool) as connection:
            items = await store.quarantine_page(connection, firm_id, before, size + 1)
        return items[:size], _token(items[size - 1].received, items[size - 1].id) if len(items) > size else ""

    async def replay(self, caller: Caller, item_id: str, machine_id: int) -> telemetry_pb2.BatchResult:
        """Send an item through the door again, to `machine_id` if given. Raises NotFound, Conflict (nothing to send any more)."""
        caller.require(Role.OPERATOR, Role.FIRM)
        async with transaction(self._pool) as connection:
            item = await store.quarantined_item(connection, item_id)
        caller.check_sees_firm(item.firm_id)
        if item.replayed is not None:
            raise Conflict(
                "This item was replayed already: what was in it is stored, or stands in quarantine as an item of its own.",
                reason="ALREADY_REPLAYED",
            )
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
        (result,) = await self._door.send(_sender(item), [batch])
        if _is_done(result):
            async with transaction(self._pool) as connection:
                await store.mark_replayed(connection, [item_id])
        return result

    async def replay_all(
        self, caller: Caller, machine_id: int, reason: str, page_token: str = "", *, signal: str = ""
    ) -> Replayed:
        """Send everything of a machine that waits for this reason (and names `signal`, if given) through the door again.

        For UNKNOWN_MACHINE that is what came for its path before it was registered. What is on its way into quarantine now is
        waited for, for CAUGHT_UP_WITHIN_S. Repeating the call does no harm. Raises NotFound, Invalid.
        """
        caller.require(Role.OPERATOR, Role.FIRM)
        check_id(machine_id, "machine_id")
        machine = self._directory.machines.get(machine_id)
        if machine is None:
            raise NotFound(f"There is no machine {machine_id}.")
        caller.check_sees_firm(machine.firm_id)
        if reason == Reason.UNKNOWN_MACHINE:
            wanted = store.Waiting(machine.firm_id, 0, machine.path, reason)
        else:
            wanted = store.Waiting(machine.firm_id, machine_id, "", reason)
        after = _from_token(page_token or "0.")
        replayed, is_through = Replayed(0, 0, 0, 0, await self._caught_up()), False
        for _ in range(LOOKED_AT_MAX // REPLAYED_AT_ONCE):
            async with transaction(self._pool) as connection:
                items = await store.waiting(connection, wanted, after, REPLAYED_AT_ONCE)
            is_through = not items
            if is_through or replayed.items >= REPLAYED_ITEMS_MAX:
                break
            try:
                replayed = replayed.and_then(await self._replay_some(items, signal))
            except SlowDown:
                break
            after = (items[-1].received, items[-1].id)
        async with transaction(self._pool) as connection:
            left = await store.count_waiting(connection, wanted, LEFT_COUNTED_MAX)
        return replace(replayed, left=left, next_page_token="" if is_through else _token(*after))

    async def _replay_some(self, items: Sequence[Quarantined], signal: str) -> Replayed:
        chosen = []
        for item in items:
            try:
                batch = telemetry_pb2.Batch.FromString(item.batch or b"")
            except DecodeError:
                continue
            if not signal or signal in batch.signals:
                chosen.append((item, batch))
        # Taken in this order; what comes later has the last word about a sample, as it had when it came.
        sent = await asyncio.gather(
            *(self._door.send(_sender(item), [batch]) for item, batch in chosen), return_exceptions=True
        )
        results = [(item, one) for (item, _), one in zip(chosen, sent, strict=True) if isinstance(one, list)]
        done = [item.id for item, (result,) in results if _is_done(result)]
        async with transaction(self._pool) as connection:
            await store.mark_replayed(connection, done)
        for one in sent:
            if isinstance(one, BaseException):
                raise one
        accepted = sum(result.accepted for _, (result,) in results)
        return Replayed(len(results), accepted, sum(result.quarantined for _, (result,) in results), 0, True)

    async def _caught_up(self) -> bool:
        """Wait until everything that stands in quarantine's topic now is in the database."""
        end = await self._ends.end_of(topics.QUARANTINE, 0, timeout_s=CAUGHT_UP_WITHIN_S)
        until_s = time.monotonic() + CAUGHT_UP_WITHIN_S
        while end is not None:
            async with transaction(self._pool) as connection:
                if await store.position(connection, self._ends.full_name(topics.QUARANTINE)) >= end:
                    return True
            if time.monotonic() > until_s:
                break
            await asyncio.sleep(CAUGHT_UP_POLL_S)
        return False


def _token(received: datetime, item_id: str) -> str:
    return f"{to_us(received)}.{item_id}"


def _from_token(token: str) -> tuple[datetime, str]:
    """Raises Invalid."""
    time_us, _, item_id = token.partition(".")
    return checked_time(number_in_token(time_us), "page_token"), item_id


def _sender(item: Quarantined) -> Sender:
    return Sender(item.firm_id, item.credential_id, item.source, "replay", item.id, is_live=False)


def _is_done(result: telemetry_pb2.BatchResult) -> bool:
    """Nothing more is to be had from the item: what was refused again of a part that was taken is an item of its own."""
    return bool(result.accepted or not result.quarantined)
