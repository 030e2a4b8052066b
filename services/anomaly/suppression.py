"""Taking alarms off the operator's list and putting them back: by people, by maintenance, and by the clock."""

import asyncio
import re
import uuid
from collections.abc import Sequence

import asyncpg

from services.anomaly.domain import BEGINS, ENDS, MICROSECONDS, Alarm, Change, MaintenanceWindow, Source, Suppression
from services.anomaly.service import AlarmService, actor_of, changing, check_role, check_text, check_time
from services.anomaly.store import Actor, AlarmStore
from services.anomaly.suppression_store import SuppressionStore
from services.common.clock import Clock, from_us
from services.common.database import AWAY, Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound, TryAgain
from services.common.identity import Caller
from services.common.logs import get_logger

log = get_logger(__name__)

# MaxTimeShelved of OPC UA Part 9: whatever is shelved comes back by itself within a day.
SHELVE_S_MAX = 24 * 3600
WINDOW_S_MAX = 31 * 24 * 3600
WINDOW_AHEAD_S_MAX = 366 * 24 * 3600
# Windows of one machine that are not over.
WINDOWS_MAX = 100
LIST_MAX = 1_000
MACHINE_TIMEOUT_S = 0.5
SETTLE_INTERVAL_S = 1.0
# Alarms and shelves in one transaction of the loop.
SETTLE_BATCH = 200
RETRY_DELAY_S = 1.0

SCHEDULE = Actor(name="schedule")
_WINDOW_ID = re.compile(r"[0-9a-f]{32}")


class SuppressionService:
    """What people do to keep alarms off the operator's list. Nothing of it touches the detector."""

    def __init__(
        self,
        service: AlarmService,
        alarms: AlarmStore,
        store: SuppressionStore,
        pool: Pool,
        directory: Directory,
        clock: Clock,
    ) -> None:
        self._service = service
        self._alarms = alarms
        self._store = store
        self._pool = pool
        self._directory = directory
        self._clock = clock

    async def shelve(self, caller: Caller, alarm_id: str, *, reason: str, until_us: int, one_shot: bool) -> Alarm:
        """Take the alarm's source off the list until then, at most SHELVE_S_MAX from now. A repeat changes nothing.

        One-shot ends as soon as the condition returns to normal; if it is normal now, after its next activation.
        """
        check_text(reason, "reason", needed=True)
        now_us = self._clock.now_us()
        latest_us = now_us + SHELVE_S_MAX * MICROSECONDS
        if until_us or not one_shot:
            check_time(until_us, "until_us")
            if not now_us < until_us <= latest_us:
                hours = SHELVE_S_MAX // 3600
                raise Invalid(f"until_us is a time in the next {hours} hours; take it out of service for longer.")
        return await self._begin(
            caller,
            alarm_id,
            Suppression.SHELVED,
            reason=reason,
            ends_us=until_us or latest_us,
            fixed_end=bool(until_us),
            one_shot=one_shot,
        )

    async def unshelve(self, caller: Caller, alarm_id: str, *, comment: str) -> Alarm:
        check_text(comment, "comment")
        return await self._end(caller, alarm_id, Suppression.SHELVED, comment=comment)

    async def take_out_of_service(self, caller: Caller, alarm_id: str, *, reason: str) -> Alarm:
        """Take the alarm's source off the list until somebody puts it back."""
        check_text(reason, "reason", needed=True)
        return await self._begin(caller, alarm_id, Suppression.OUT_OF_SERVICE, reason=reason)

    async def return_to_service(self, caller: Caller, alarm_id: str, *, reason: str) -> Alarm:
        check_text(reason, "reason", needed=True)
        return await self._end(caller, alarm_id, Suppression.OUT_OF_SERVICE, comment=reason)

    async def list(self, caller: Caller, *, firm_id: int) -> Sequence[Source]:
        """What is shelved or out of service now, the oldest first; at most LIST_MAX."""
        check_role(caller)
        firm_id = caller.firm_or(_id(firm_id, "firm_id"))
        async with transaction(self._pool) as connection:
            return await self._store.list(connection, firm_id=firm_id or None, limit=LIST_MAX)

    async def create_window(
        self, caller: Caller, *, machine_id: int, starts_us: int, ends_us: int, reason: str
    ) -> MaintenanceWindow:
        """Raises NotFound, and Conflict when the machine has too many windows already."""
        check_role(caller)
        check_text(reason, "reason", needed=True)
        # One that has just been made may not be known here yet.
        await self._directory.wait_for("machine", machine_id, timeout_s=MACHINE_TIMEOUT_S)
        machine = self._directory.machines.get(machine_id)
        if machine is None:
            raise NotFound("There is no such machine, or this key may not see it.")
        caller.check_sees_firm(machine.firm_id)
        now_us = self._clock.now_us()
        for name, time_us in (("starts_us", starts_us), ("ends_us", ends_us)):
            check_time(time_us, name)
        if not starts_us < ends_us or ends_us <= now_us:
            raise Invalid("A window ends after it starts, and after now.")
        if ends_us - starts_us > WINDOW_S_MAX * MICROSECONDS:
            raise Invalid(f"A window lasts at most {WINDOW_S_MAX // 86_400} days; make another one then.")
        if starts_us > now_us + WINDOW_AHEAD_S_MAX * MICROSECONDS:
            raise Invalid(f"A window starts at most {WINDOW_AHEAD_S_MAX // 86_400} days from now.")
        actor = actor_of(caller)
        wanted = MaintenanceWindow(
            id=uuid.uuid4().hex,
            firm_id=machine.firm_id,
            machine_id=machine_id,
            starts_us=starts_us,
            ends_us=ends_us,
            reason=reason,
            actor=actor.name,
            credential_id=actor.credential_id,
        )
        async with changing(self._pool) as connection:
            window = await self._store.create_window(connection, wanted, now_us=now_us)
            if await self._store.window_count(connection, machine_id, now_us=now_us) > WINDOWS_MAX:
                raise Conflict(
                    f"A machine has at most {WINDOWS_MAX} windows ahead; end one first.", reason="TOO_MANY_WINDOWS"
                )
            await self._settle_machine(connection, machine_id, now_us=now_us, actor=actor, comment=reason)
        return window

    async def windows(self, caller: Caller, *, firm_id: int, machine_id: int) -> Sequence[MaintenanceWindow]:
        """Those that are not over, the first to start first; at most LIST_MAX."""
        check_role(caller)
        firm_id = caller.firm_or(_id(firm_id, "firm_id"))
        machine_id = _id(machine_id, "machine_id")
        async with transaction(self._pool) as connection:
            return await self._store.windows(
                connection,
                firm_id=firm_id or None,
                machine_id=machine_id or None,
                now_us=self._clock.now_us(),
                limit=LIST_MAX,
            )

    async def end_window(self, caller: Caller, window_id: str, *, reason: str) -> MaintenanceWindow:
        """End it before its time; one that is over stays as it is."""
        check_role(caller)
        check_text(reason, "reason", needed=True)
        now_us = self._clock.now_us()
        async with changing(self._pool) as connection:
            window = await self._store.window(connection, window_id) if _WINDOW_ID.fullmatch(window_id) else None
            if window is None:
                raise NotFound("There is no such window, or this key may not see it.")
            caller.check_sees_firm(window.firm_id)
            if window.ended_us is not None or window.ends_us <= now_us:
                return window
            actor = actor_of(caller)
            window = await self._store.end_window(connection, window, now_us=now_us, actor=actor, reason=reason)
            await self._settle_machine(connection, window.machine_id, now_us=now_us, actor=actor, comment=reason)
        return window

    async def _begin(
        self,
        caller: Caller,
        alarm_id: str,
        kind: Suppression,
        *,
        reason: str,
        ends_us: int | None = None,
        fixed_end: bool = True,
        one_shot: bool = False,
    ) -> Alarm:
        now_us = self._clock.now_us()
        actor = actor_of(caller)
        async with changing(self._pool) as connection:
            before = await self._service.locked(connection, caller, alarm_id)
            stands = await self._store.of_alarm(connection, before, kind)
            if (
                stands is not None
                and (stands.reason, stands.one_shot) == (reason, one_shot)
                and (not fixed_end or stands.ends_us == ends_us)
                and kind in before.suppression
            ):
                return before
            await self._service.check_room(connection, alarm_id)
            source = Source(
                alarm_id=alarm_id,
                firm_id=before.firm_id,
                machine_id=before.machine_id,
                machine_path=before.machine_path,
                signal_name=before.signal_name,
                reason_kind=kind,
                one_shot=one_shot,
                began_us=now_us,
                ends_us=ends_us,
                reason=reason,
                actor=actor.name,
                credential_id=actor.credential_id,
            )
            await self._store.begin(connection, source, before)
            alarm = before.after(BEGINS[kind])
            detail = "" if ends_us is None else f"until {from_us(ends_us).isoformat()}{', one-shot' * one_shot}"
            await self._alarms.change(
                connection, BEGINS[kind], [alarm], now_us=now_us, actor=actor, comment=reason, detail=detail
            )
            await self._settle_machine(connection, alarm.machine_id, now_us=now_us, actor=actor, comment=reason)
        return alarm

    async def _end(self, caller: Caller, alarm_id: str, kind: Suppression, *, comment: str) -> Alarm:
        now_us = self._clock.now_us()
        actor = actor_of(caller)
        async with changing(self._pool) as connection:
            before = await self._service.locked(connection, caller, alarm_id)
            if not await self._store.end(connection, before, kind):
                return before
            alarm = before.after(ENDS[kind])
            await self._alarms.change(connection, ENDS[kind], [alarm], now_us=now_us, actor=actor, comment=comment)
            await self._settle_machine(connection, alarm.machine_id, now_us=now_us, actor=actor, comment=comment)
        return alarm

    async def _settle_machine(
        self, connection: Connection, machine_id: int, *, now_us: int, actor: Actor, comment: str
    ) -> None:
        # More than one batch is not worth a longer request: the loop does the rest.
        await self._store.settle(
            connection, now_us=now_us, actor=actor, comment=comment, machine_id=machine_id, limit=SETTLE_BATCH
        )


class SuppressionClock:
    """Ends what has run out and begins what has come, from what stands in the database: a restart misses nothing."""

    def __init__(self, alarms: AlarmStore, store: SuppressionStore, pool: Pool, clock: Clock) -> None:
        self._alarms = alarms
        self._store = store
        self._pool = pool
        self._clock = clock

    async def run(self) -> None:
        while True:
            try:
                while await self.settle() >= SETTLE_BATCH:
                    pass
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("suppression waits", error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)
            await asyncio.sleep(SETTLE_INTERVAL_S)

    async def settle(self) -> int:
        """One batch; returns how many alarms it changed. Raises TryAgain."""
        now_us = self._clock.now_us()
        comment = "The time was over."
        async with changing(self._pool) as connection:
            over = await self._store.expired(connection, now_us=now_us, limit=SETTLE_BATCH)
            for alarm in await self._alarms.locked(connection, over) if over else ():
                await self._alarms.change(
                    connection,
                    Change.UNSHELVED,
                    [alarm.after(Change.UNSHELVED)],
                    now_us=now_us,
                    actor=SCHEDULE,
                    comment=comment,
                )
            settled = await self._store.settle(
                connection, now_us=now_us, actor=SCHEDULE, comment=comment, machine_id=None, limit=SETTLE_BATCH
            )
        return max(settled, len(over))


def _id(number: int, name: str) -> int:
    if not 0 <= number < 2**63:
        raise Invalid(f"{name} is not an id; leave it out or give one from the registry.")
    return number
