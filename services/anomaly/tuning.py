"""What people say about alarms and sensors, and what it does to scoring."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.anomaly.domain import MICROSECONDS, Alarm
from services.anomaly.service import AlarmService, actor_of, changing, check_role, check_text
from services.anomaly.tuning_store import NewTuning, Threshold, TuningEntry, TuningStore
from services.anomaly.tunings import TuningKind, threshold_offset
from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound, SlowDown
from services.common.identity import Caller
from smdih.directory.v1 import directory_pb2 as directory_pb

MACHINE_TIMEOUT_S = 0.5
LIST_MAX = 1_000
HISTORY_MAX = 200
# Ratings, resets, relearnings and versions of rules of a firm: each stops all workers for a moment.
TUNINGS_AN_HOUR_MAX = 2_000


@dataclass(frozen=True, kw_only=True)
class ThresholdNow:
    """The threshold of an alarm's series, how it came there, and what this alarm was rated."""

    threshold: Threshold
    useful: bool | None
    history: Sequence[TuningEntry]


class TuningService:
    """Each change is a row in the log that the workers follow; it holds from the next samples on, never for earlier ones."""

    def __init__(
        self, alarms: AlarmService, store: TuningStore, pool: Pool, directory: Directory, clock: Clock
    ) -> None:
        self._alarms = alarms
        self._store = store
        self._pool = pool
        self._directory = directory
        self._clock = clock

    async def rate(self, caller: Caller, alarm_id: str, *, useful: bool | None, comment: str) -> ThresholdNow:
        """Say that an alarm was useful or not (None: take back what was said). A repeat changes nothing."""
        check_text(comment, "comment")
        async with changing(self._pool) as connection:
            alarm = await self._learned(connection, caller, alarm_id)
            await lock_at_pace(self._store, connection, alarm.firm_id, now_us=self._clock.now_us())
            if await self._store.rate(
                connection, alarm_id=alarm_id, machine_id=alarm.machine_id, position=alarm.position, useful=useful
            ):
                cause = "rating_withdrawn" if useful is None else "rated_useful" if useful else "rated_not_useful"
                good, bad = await self._store.ratings(connection, alarm.machine_id, alarm.position)
                offset = threshold_offset(useful=good, not_useful=bad)
                await self._move(connection, caller, alarm, offset, cause=cause, comment=comment)
            return await self._now(connection, alarm)

    async def threshold(self, caller: Caller, alarm_id: str) -> ThresholdNow:
        """The threshold of the alarm's series and how it came there."""
        async with transaction(self._pool) as connection:
            return await self._now(connection, await self._learned(connection, caller, alarm_id))

    async def reset(self, caller: Caller, alarm_id: str, *, comment: str) -> ThresholdNow:
        """Put the threshold of the alarm's series back where the detector has it; ratings so far count no more."""
        check_text(comment, "comment")
        async with changing(self._pool) as connection:
            alarm = await self._learned(connection, caller, alarm_id)
            await lock_at_pace(self._store, connection, alarm.firm_id, now_us=self._clock.now_us())
            await self._store.discount(connection, alarm.machine_id, alarm.position)
            if await self._store.offset(connection, alarm.machine_id, alarm.position):
                await self._move(connection, caller, alarm, 0.0, cause="reset", comment=comment)
            return await self._now(connection, alarm)

    async def thresholds(self, caller: Caller, *, firm_id: int, machine_id: int) -> Sequence[Threshold]:
        """Those that people have moved; at most LIST_MAX."""
        check_role(caller)
        firm_id = caller.firm_or(check_id(firm_id, "firm_id"))
        async with transaction(self._pool) as connection:
            return await self._store.thresholds(
                connection,
                firm_id=firm_id or None,
                machine_id=check_id(machine_id, "machine_id") or None,
                limit=LIST_MAX,
            )

    async def relearn(self, caller: Caller, *, machine_id: int, signal_id: int, reason: str) -> None:
        """A sensor (0: the machine) is not what it was: it is learnt anew from the next samples on, thresholds stay.

        Alarms of it that last end; nothing is raised of it until enough is known again.
        """
        check_text(reason, "reason", needed=True)
        machine = await known_machine(self._directory, caller, machine_id)
        position = position_of(machine, check_id(signal_id, "signal_id")) if signal_id else None
        async with changing(self._pool) as connection:
            await lock_at_pace(self._store, connection, machine.firm_id, now_us=self._clock.now_us())
            new = NewTuning(
                kind=TuningKind.RELEARN,
                firm_id=machine.firm_id,
                machine_id=machine_id,
                position=position,
                cause="sensor_changed",
                reason=reason,
            )
            await self._store.add(connection, new, now_us=self._clock.now_us(), actor=actor_of(caller))

    async def history(self, caller: Caller, *, machine_id: int, signal_id: int) -> Sequence[TuningEntry]:
        """What people have done to the learning and the threshold of a signal, newest first; at most HISTORY_MAX."""
        machine = await known_machine(self._directory, caller, machine_id)
        position = position_of(machine, check_id(signal_id, "signal_id"))
        async with transaction(self._pool) as connection:
            return await self._store.history(
                connection, machine_id=machine_id, position=position, rule_id="", limit=HISTORY_MAX
            )

    async def _learned(self, connection: Connection, caller: Caller, alarm_id: str) -> Alarm:
        alarm = await self._alarms.locked(connection, caller, alarm_id)
        if alarm.rule_id:
            raise Conflict(
                "This alarm comes from a rule of your own, not from what was learned; change the rule instead.",
                reason="ALARM_OF_A_RULE",
            )
        return alarm

    async def _move(
        self, connection: Connection, caller: Caller, alarm: Alarm, offset: float, *, cause: str, comment: str
    ) -> None:
        new = NewTuning(
            kind=TuningKind.THRESHOLD,
            firm_id=alarm.firm_id,
            machine_id=alarm.machine_id,
            position=alarm.position,
            threshold_offset=offset,
            cause=cause,
            reason=comment,
            alarm_id=alarm.id,
        )
        await self._store.add(connection, new, now_us=self._clock.now_us(), actor=actor_of(caller))

    async def _now(self, connection: Connection, alarm: Alarm) -> ThresholdNow:
        useful, not_useful = await self._store.ratings(connection, alarm.machine_id, alarm.position)
        return ThresholdNow(
            threshold=Threshold(
                firm_id=alarm.firm_id,
                machine_id=alarm.machine_id,
                position=alarm.position,
                offset=await self._store.offset(connection, alarm.machine_id, alarm.position),
                useful=useful,
                not_useful=not_useful,
            ),
            useful=await self._store.rating(connection, alarm.id),
            history=await self._store.history(
                connection, machine_id=alarm.machine_id, position=alarm.position, rule_id="", limit=HISTORY_MAX
            ),
        )


async def lock_at_pace(store: TuningStore, connection: Connection, firm_id: int, *, now_us: int) -> None:
    """Take the lock for a change. Raises SlowDown, without it, when the firm has changed too much of late: it holds up nobody."""
    since_us = now_us - 3600 * MICROSECONDS
    if await store.made(connection, firm_id, since_us=since_us, limit=TUNINGS_AN_HOUR_MAX) >= TUNINGS_AN_HOUR_MAX:
        raise SlowDown(
            f"A firm changes rules and thresholds at most {TUNINGS_AN_HOUR_MAX:,} times an hour; send again later.",
            reason="LIMIT_TUNINGS",
            retry_after_s=600,
        )
    await store.lock(connection)


async def known_machine(directory: Directory, caller: Caller, machine_id: int) -> directory_pb.Machine:
    """Raises NotFound unless there is such a machine and the caller may see it."""
    check_role(caller)
    # One that has just been made may not be known here yet.
    await directory.wait_for("machine", machine_id, timeout_s=MACHINE_TIMEOUT_S)
    machine = directory.machines.get(machine_id)
    if machine is None:
        raise NotFound("There is no such machine, or this key may not see it.")
    caller.check_sees_firm(machine.firm_id)
    return machine


def position_of(machine: directory_pb.Machine, signal_id: int) -> int:
    """Raises NotFound when the machine has no such signal."""
    for position, signal in enumerate(machine.signals):
        if signal.id == signal_id:
            return position
    raise NotFound("The machine has no such signal; ask the registry for its signals.")


def check_id(number: int, name: str) -> int:
    if not 0 <= number < 2**63:
        raise Invalid(f"{name} is not an id; leave it out or give one from the registry.")
    return number
