"""Rooms, as matching publishes them: signals that a firm lends to a provider for a time. Enforced here, each read logged.

The copy in memory follows the compacted topic. A recall is known within milliseconds of its commit; if the topic cannot be
read for FRESH_S_MAX, nothing that is lent may be read, since a recall might have been missed.
"""

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg
from aiokafka import ConsumerRecord
from google.protobuf.message import DecodeError
from prometheus_client import Counter, Gauge

from services.common import topics
from services.common.clock import Clock, from_us, to_us
from services.common.database import AWAY, Connection, Pool, transaction, transaction_for_all_firms
from services.common.errors import Invalid, NotFound, TryAgain
from services.common.identity import Caller, Role
from services.common.kafka import Cluster, Followed
from services.common.logs import get_logger
from services.ingest.asked import page_size_of
from services.ingest.queries.access import Grant
from smdih.matching.v1 import events_pb2 as pb

log = get_logger(__name__)

FRESH_S_MAX = 5.0
FLUSH_INTERVAL_S = 1.0
# Reads counted in memory before a reader waits for them to be stored.
PENDING_MAX = 50_000
READS_PAGE_MAX = 1_000
# As long as the rooms themselves, which matching forgets so long after their end.
READS_KEPT_FOR = timedelta(days=400)
FORGOTTEN_AT_ONCE_MAX = 5_000
FORGET_INTERVAL_S = 3600.0
_PAGE_TOKEN = re.compile(r"(\d{1,16})\.(\d{1,18})\.(-?\d{1,18})")

# Rooms that are open, whether or not their time has come.
rooms_open = Gauge("smdih_ingest_rooms_open", "Rooms that lend signals")
# Signals read through rooms, one for each signal of a query.
room_reads_total = Counter("smdih_ingest_room_reads_total", "Signals read through rooms")


class _Lent:
    """What the topic tells: each room as its newest record has it."""

    def __init__(self) -> None:
        self.rooms: dict[str, pb.RoomEvent] = {}
        # Of a partner, and of the provider itself.
        self.by_borrower: dict[int | str, set[str]] = defaultdict(set)
        self.open: set[str] = set()

    def apply(self, record: ConsumerRecord) -> None:
        room_id = record.key.decode()
        known = self.rooms.pop(room_id, None)
        if known is not None:
            for borrower in _borrowers(known):
                self.by_borrower[borrower].discard(room_id)
        self.open.discard(room_id)
        if record.value is None:
            return
        try:
            room = pb.RoomEvent.FromString(record.value)
        except DecodeError:
            # Nothing is lent by what cannot be read.
            log.error("room unreadable", offset=record.offset, room=room_id)
            return
        self.rooms[room_id] = room
        for borrower in _borrowers(room):
            self.by_borrower[borrower].add(room_id)
        if room.state == pb.ROOM_STATE_OPEN:
            self.open.add(room_id)


class Rooms:
    """What is lent to whom now; a source of grants."""

    def __init__(self, cluster: Cluster, *, clock: Clock, fresh_s_max: float = FRESH_S_MAX) -> None:
        self._clock = clock
        self._fresh_s_max = fresh_s_max
        self._topic = Followed(cluster, topics.ROOMS, empty=_Lent, apply=_Lent.apply)

    def grants(self, caller: Caller) -> Iterable[Grant]:
        """What the caller may read of others now. Raises TryAgain while it is not known for sure."""
        if caller.role not in (Role.PARTNER, Role.PROVIDER):
            return []
        borrower = caller.partner_id if caller.role is Role.PARTNER else caller.provider_id
        if not self._topic.caught_up.is_set() or self._topic.age_s > self._fresh_s_max:
            raise TryAgain(
                "What is lent to you cannot be checked now; ask again.", reason="ROOMS_UNKNOWN", retry_after_s=1
            )
        lent, now_us = self._topic.known, self._clock.now_us()
        return [
            Grant(room.signal_ids, room.data_from_us, room.data_until_us, room_id=room.room_id)
            for room in (lent.rooms[room_id] for room_id in lent.by_borrower.get(borrower, ()))
            if room.state == pb.ROOM_STATE_OPEN and room.opens_us <= now_us < room.closes_us
        ]

    def room_seen_by(self, caller: Caller, room_id: str) -> pb.RoomEvent:
        """A room of the caller's, also one that has ended. Raises NotFound."""
        caller.require(Role.FIRM, Role.PARTNER, Role.PROVIDER, Role.OPERATOR)
        room = self._topic.known.rooms.get(room_id)
        if room is None or not caller.has_part_in(
            firm_id=room.firm_id, provider_id=room.provider_id, partner_id=room.partner_id
        ):
            raise NotFound(f"There is no room {room_id[:64]}.")
        return room

    async def run(self) -> None:
        """Follow the topic until cancelled."""
        rooms_open.set_function(lambda: len(self._topic.known.open))
        await self._topic.run()


def _borrowers(room: pb.RoomEvent) -> tuple[int, str]:
    return room.partner_id, room.provider_id


@dataclass(frozen=True)
class RoomRead:
    """Reads of one signal through a room by one key in one minute."""

    room_id: str
    signal_id: int
    credential_id: int
    minute: datetime
    reads: int
    data_from: datetime
    data_until: datetime


_Key = tuple[str, int, int, datetime]


class RoomReads:
    """The log of reads through rooms. What is read first in a minute is stored before it is answered, what follows is counted
    and stored within FLUSH_INTERVAL_S: so every read leaves a row, at a bounded rate."""

    def __init__(self, pool: Pool, rooms: Rooms, *, clock: Clock) -> None:
        self._pool = pool
        self._rooms = rooms
        self._clock = clock
        self._stored: set[_Key] = set()
        self._minute: datetime | None = None
        self._pending: dict[_Key, RoomRead] = {}

    async def note(self, caller: Caller, room_id: str, signal_ids: Collection[int], from_us: int, to_us: int) -> None:
        """Note that the signals are about to be read. Raises TryAgain when that cannot be stored."""
        minute = _minute_of(self._clock.now_us())
        if minute != self._minute:
            self._minute, self._stored = minute, set()
        room_reads_total.inc(len(signal_ids))
        now: list[RoomRead] = []
        for signal_id in signal_ids:
            key = (room_id, signal_id, caller.credential_id, minute)
            read = RoomRead(*key, 1, _stored_time(from_us), _stored_time(to_us))
            if key in self._stored and len(self._pending) < PENDING_MAX:
                self._pending[key] = _joined(self._pending.get(key), read)
            else:
                now.append(read)
        if now:
            async with transaction(self._pool) as connection:
                await _store(connection, now)
            self._stored |= {(read.room_id, read.signal_id, read.credential_id, read.minute) for read in now}

    async def page(self, caller: Caller, room_id: str, page_size: int, page_token: str) -> tuple[list[RoomRead], str]:
        """A page of the reads of a room of the caller's, newest first, and the token of the next ("": there is none). Raises
        NotFound."""
        self._rooms.room_seen_by(caller, room_id)
        limit = page_size_of(page_size, READS_PAGE_MAX, READS_PAGE_MAX)
        minute, signal_id, credential_id = _token(page_token)
        await self.flush()
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT room_id, signal_id, credential_id, minute, reads, data_from, data_until FROM room_read "
                "WHERE room_id = $1 AND ($2::timestamptz IS NULL OR minute < $2 OR "
                "(minute = $2 AND (signal_id, credential_id) > ($3, $4))) "
                "ORDER BY minute DESC, signal_id, credential_id LIMIT $5",
                room_id,
                minute,
                signal_id,
                credential_id,
                limit + 1,
            )
        reads = [RoomRead(**dict(row)) for row in rows[:limit]]
        return reads, _token_of(reads[-1]) if len(rows) > limit else ""

    async def flush(self) -> None:
        """Store what was counted."""
        pending, self._pending = self._pending, {}
        if not pending:
            return
        try:
            async with transaction_for_all_firms(self._pool) as connection:  # whoever asks for it
                await _store(connection, list(pending.values()))
        except BaseException:
            for key, read in pending.items():  # nothing is forgotten while the database is away
                self._pending[key] = _joined(self._pending.get(key), read)
            raise

    async def run(self) -> None:
        """Store what was counted and forget what is old, again and again, until cancelled."""
        forget_at = time.monotonic()
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_S)
            try:
                await self.flush()
                if time.monotonic() >= forget_at and await self._forget_some() < FORGOTTEN_AT_ONCE_MAX:
                    forget_at = time.monotonic() + FORGET_INTERVAL_S
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("reads through rooms cannot be stored now", error=repr(error))

    async def _forget_some(self) -> int:
        """Forget reads older than READS_KEPT_FOR; returns how many."""
        before = from_us(self._clock.now_us()) - READS_KEPT_FOR
        async with transaction_for_all_firms(self._pool) as connection:
            gone = await connection.fetch(
                "DELETE FROM room_read WHERE (room_id, minute, signal_id, credential_id) IN (SELECT room_id, minute, signal_id, "
                "credential_id FROM room_read WHERE minute < $1 ORDER BY minute LIMIT $2) RETURNING minute",
                before,
                FORGOTTEN_AT_ONCE_MAX,
            )
        return len(gone)


def _token_of(read: RoomRead) -> str:
    return f"{to_us(read.minute)}.{read.signal_id}.{read.credential_id}"


def _token(page_token: str) -> tuple[datetime | None, int, int]:
    """Minute, signal and key of the last row of the page before. Raises Invalid."""
    if not page_token:
        return None, 0, 0
    found = _PAGE_TOKEN.fullmatch(page_token)
    if found is None:
        raise Invalid("page_token: send back exactly what the page before gave.", reason="BAD_PAGE_TOKEN")
    return from_us(int(found[1])), int(found[2]), int(found[3])


def _minute_of(time_us: int) -> datetime:
    """The minute that the time lies in."""
    return from_us(time_us // 60_000_000 * 60_000_000)


_LAST = datetime.max.replace(tzinfo=from_us(0).tzinfo) - timedelta(days=366)


def _stored_time(time_us: int) -> datetime:
    """As a time of the database; what lies beyond its end is its end."""
    try:
        return min(from_us(time_us), _LAST)
    except OverflowError:
        return _LAST


def _joined(before: RoomRead | None, read: RoomRead) -> RoomRead:
    if before is None:
        return read
    return RoomRead(
        read.room_id,
        read.signal_id,
        read.credential_id,
        read.minute,
        before.reads + read.reads,
        min(before.data_from, read.data_from),
        max(before.data_until, read.data_until),
    )


async def _store(connection: Connection, reads: Sequence[RoomRead]) -> None:
    await connection.executemany(
        "INSERT INTO room_read AS r (room_id, signal_id, credential_id, minute, reads, data_from, data_until) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (room_id, minute, signal_id, credential_id) DO UPDATE SET "
        "reads = r.reads + excluded.reads, data_from = least(r.data_from, excluded.data_from), "
        "data_until = greatest(r.data_until, excluded.data_until)",
        sorted(
            (read.room_id, read.signal_id, read.credential_id, read.minute, read.reads, read.data_from, read.data_until)
            for read in reads
        ),
    )
