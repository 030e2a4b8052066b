"""The use cases of rooms: a firm lends signals to the provider of an engaged match, and may take them back at any time."""

import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import current_correlation_id, get_logger
from services.common.outbox import OutboxRelay
from services.matching.matches import MatchState
from services.matching.rooms import LentSignal, NewRoom, Room, RoomState
from services.matching.service.checks import (
    NOTE_CHARACTERS_MAX,
    Known,
    before_token,
    check_text,
    checked_request_id,
    digest,
    first_answer,
    known_form,
    page_size_of,
    page_token_of,
)
from services.matching.service.publishing import forget_rooms, publish_room
from services.matching.service.sight import SUPPLIERS, match_seen_by
from services.matching.store import needs as needs_store
from services.matching.store import rooms as rooms_store

log = get_logger(__name__)

SIGNALS_MAX = 500
MACHINES_MAX = 50
ROOMS_OF_A_MATCH_MAX = 20
OPEN_FOR_MAX = timedelta(days=92)
EXPIRIES_AT_ONCE_MAX = 200
# After its end; the log of reads at the ingest service is kept as long.
KEPT_FOR = timedelta(days=400)
FORGOTTEN_AT_ONCE_MAX = 200


class Rooms:
    """What firms lend; ingest enforces it, as published."""

    def __init__(self, pool: Pool, relay: OutboxRelay, directory: Directory, known: Known, *, clock: Clock) -> None:
        self._pool = pool
        self._relay = relay
        self._directory = directory
        self._known = known
        self._clock = clock

    async def open_room(self, caller: Caller, new: NewRoom, *, request_id: str) -> Room:
        """Lend exactly these signals, from now on. Only the firm itself lends."""
        caller.require(Role.FIRM)
        now = self._now()
        _check(new, now)
        repeatable = checked_request_id(request_id)
        sha256 = digest(
            match_id=new.match_id,
            signals={str(machine): sorted(signals) for machine, signals in new.signals.items()},
            purpose=new.purpose,
            data_from=str(new.data_from),
            data_until=str(new.data_until),
            closes=str(new.closes),
        )
        signal_ids = [signal_id for machine in new.signals for signal_id in await self._signals(caller, machine, new)]
        async with transaction(self._pool) as connection:
            if repeatable:
                await needs_store.lock_requests(connection, caller.firm_id, request_id)
                repeated = await rooms_store.room_by_request(connection, caller.firm_id, request_id)
                if repeated is not None:
                    return first_answer(*repeated, sha256)
            match = await match_seen_by(connection, caller, new.match_id)
            # While the need is held nobody ends the match.
            await needs_store.lock_need(connection, match.need_id)
            match = await match_seen_by(connection, caller, new.match_id)
            if match.state is not MatchState.ENGAGED:
                raise Conflict(
                    f"This match is {match.state}; signals are lent to an engaged one.",
                    reason=f"MATCH_{match.state.upper()}",
                )
            if len(await rooms_store.open_rooms_of_match(connection, match.id)) >= ROOMS_OF_A_MATCH_MAX:
                raise Conflict(
                    f"A match has at most {ROOMS_OF_A_MATCH_MAX} open rooms; recall one first.", reason="TOO_MANY_ROOMS"
                )
            room = Room(
                id=uuid.uuid4().hex,
                match_id=match.id,
                firm_id=match.firm_id,
                partner_id=match.partner_id,
                provider_id=match.provider_id,
                machine_ids=tuple(sorted(new.signals)),
                signal_ids=tuple(sorted(set(signal_ids))),
                purpose=new.purpose.strip(),
                data_from=new.data_from,
                data_until=new.data_until or new.closes,
                opens=now,
                closes=new.closes,
                opened_by=caller.credential_id,
                correlation_id=current_correlation_id(),
            )
            await rooms_store.add_room(connection, room, request_id=request_id, request_sha256=sha256)
            await publish_room(connection, room)
        self._relay.kick()
        log.info("room opened", room=room.id, match=match.id, firm=room.firm_id, signals=len(room.signal_ids))
        return room

    async def recall_room(self, caller: Caller, room_id: str, reason: str) -> Room:
        """Nothing of it may be read any more. A repeat changes nothing."""
        caller.require(Role.FIRM, Role.OPERATOR)
        check_text("reason", reason, NOTE_CHARACTERS_MAX)
        async with transaction(self._pool) as connection:
            await _room_seen_by(connection, caller, room_id)
            room = await rooms_store.room(connection, room_id, hold=True)
            assert room is not None  # it was seen
            if room.state is RoomState.OPEN:
                room = replace(room, state=RoomState.RECALLED, ended=self._now(), end_reason=reason.strip())
                await end_room(connection, room, by=caller.credential_id)
        self._relay.kick()
        return room

    async def get_room(self, caller: Caller, room_id: str) -> Room:
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            return await _room_seen_by(connection, caller, room_id)

    async def list_rooms(
        self, caller: Caller, *, state: RoomState | None, page_size: int, page_token: str
    ) -> tuple[list[Room], str]:
        """A page of the caller's rooms, newest first, and the token of the next ("": there is none)."""
        caller.require(Role.FIRM, *SUPPLIERS, Role.OPERATOR)
        limit = page_size_of(page_size)
        async with transaction(self._pool) as connection:
            found = await rooms_store.list_rooms(
                connection,
                firm_id=caller.firm_id if caller.role is Role.FIRM else 0,
                partner_id=caller.partner_id if caller.role is Role.PARTNER else 0,
                provider_id=caller.provider_id if caller.role is Role.PROVIDER else "",
                state=state,
                before=before_token(page_token),
                limit=limit + 1,
            )
        return found[:limit], page_token_of(found[limit - 1].opens, found[limit - 1].id) if len(found) > limit else ""

    async def lent_signals(self, caller: Caller, room_id: str) -> Sequence[LentSignal]:
        """Names and units of the room's signals, for who may read them, while it is open."""
        room = await self.get_room(caller, room_id)
        if caller.role in SUPPLIERS and (room.state is not RoomState.OPEN or room.closes <= self._now()):
            return ()
        wanted = set(room.signal_ids)
        return [
            LentSignal(signal.id, machine.id, machine.kind, signal.name, signal.unit)
            for machine in (
                self._directory.machines[each] for each in room.machine_ids if each in self._directory.machines
            )
            for signal in machine.signals
            if signal.id in wanted
        ]

    async def expire_due_rooms(self) -> int:
        """End rooms whose time is over; ingest has gone by its own clock meanwhile. Returns how many."""
        now, expired = self._now(), 0
        async with transaction(self._pool) as connection:
            due = await rooms_store.due_rooms(connection, now=now, limit=EXPIRIES_AT_ONCE_MAX)
        for room_id in due:
            async with transaction(self._pool) as connection:
                room = await rooms_store.room(connection, room_id, hold=True)
                if room is not None and room.state is RoomState.OPEN:
                    await end_room(connection, replace(room, state=RoomState.EXPIRED, ended=now), by=None)
                    expired += 1
        if expired:
            self._relay.kick()
        return expired

    async def forget_old_rooms(self) -> int:
        """Forget rooms that ended longer ago than KEPT_FOR, here and in the topic; returns how many."""
        async with transaction(self._pool) as connection:
            forgotten = await rooms_store.forget(
                connection, ended_before=self._now() - KEPT_FOR, limit=FORGOTTEN_AT_ONCE_MAX
            )
            if forgotten:
                await forget_rooms(connection, forgotten)
        if forgotten:
            self._relay.kick()
            log.info("rooms forgotten", rooms=len(forgotten))
        return len(forgotten)

    async def _signals(self, caller: Caller, machine_id: int, new: NewRoom) -> Sequence[int]:
        await self._known.check_machine(caller.firm_id, machine_id)
        known = {signal.id for signal in self._directory.machines[machine_id].signals}
        for signal_id in new.signals[machine_id]:
            if signal_id not in known:
                raise NotFound(f"Machine {machine_id} has no signal {signal_id}.", reason="UNKNOWN_SIGNAL")
        return new.signals[machine_id]

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


async def end_room(connection: Connection, room: Room, *, by: int | None) -> None:
    await rooms_store.end_room(connection, room, by=by)
    await publish_room(connection, room)
    log.info("room ended", room=room.id, state=room.state, match=room.match_id)


async def end_rooms_of_match(connection: Connection, match_id: str, *, ended: datetime) -> None:
    """The match has ended, so nothing is lent any more."""
    for room in await rooms_store.open_rooms_of_match(connection, match_id):
        await end_room(connection, replace(room, state=RoomState.MATCH_ENDED, ended=ended), by=None)


async def _room_seen_by(connection: Connection, caller: Caller, room_id: str) -> Room:
    found = await rooms_store.room(connection, known_form(room_id))
    if found is None or not caller.has_part_in(
        firm_id=found.firm_id, provider_id=found.provider_id, partner_id=found.partner_id
    ):
        raise NotFound()
    return found


def _check(new: NewRoom, now: datetime) -> None:
    if not new.purpose.strip():
        raise Invalid("Say what the signals are lent for.", reason="PURPOSE_MISSING")
    check_text("purpose", new.purpose, NOTE_CHARACTERS_MAX)
    signals = sum(len(each) for each in new.signals.values())
    if not new.signals or not all(new.signals.values()):
        raise Invalid("Name the signals of each machine that are lent.", reason="SIGNALS_MISSING")
    if len(new.signals) > MACHINES_MAX or signals > SIGNALS_MAX:
        raise Invalid(f"A room has at most {SIGNALS_MAX} signals of {MACHINES_MAX} machines.", reason="TOO_MANY")
    if not now < new.closes <= now + OPEN_FOR_MAX:
        raise Invalid(f"A room closes later than now, within {OPEN_FOR_MAX.days} days.", reason="BAD_TIME")
    if new.data_from >= (new.data_until or new.closes):
        raise Invalid("The time of the samples would end before it begins.", reason="EMPTY_PERIOD")
