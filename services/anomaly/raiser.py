"""Turns what the worker found into alarms."""

import math
from collections.abc import Sequence

from prometheus_client import Counter

from services.anomaly.detector import WIDTH_MAX, Event
from services.anomaly.domain import (
    MICROSECONDS,
    Alarm,
    AlarmEvent,
    Change,
    Return,
    Share,
    alarm_id,
    event_id,
    joint_position,
    rule_alarm_id,
    severity_at_start,
)
from services.anomaly.explain import Signal, explain, explain_rule
from services.anomaly.rulebook import RuleEvent
from services.anomaly.scorer import Found, Frames
from services.anomaly.store import AlarmStore
from services.anomaly.tunings import MACHINE_POSITION, RuleKind
from services.common.clock import Clock
from services.common.database import REFUSED, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Invalid
from services.common.logs import get_logger, new_correlation_id
from smdih.directory.v1 import directory_pb2 as directory_pb

log = get_logger(__name__)

# Alarms that began or ended and that the database did not take: a mistake of the hub's.
refused_total = Counter("smdih_anomaly_alarms_refused_total", "Alarms that could not be stored")
# How long the worker waits for the names of a machine that has just been made.
NAMES_TIMEOUT_S = 0.5


class AlarmRaiser:
    """Turns what the detector found into alarms."""

    def __init__(self, store: AlarmStore, pool: Pool, directory: Directory, clock: Clock) -> None:
        self._store = store
        self._pool = pool
        self._directory = directory
        self._clock = clock
        self._nameless: set[int] = set()

    async def store(self, found: Sequence[Found]) -> Sequence[AlarmEvent]:
        """Store what is new, in order, in one transaction; returns that. Repeats are recognised. Raises TryAgain.

        An alarm that the database does not take for what is in it is told in the log and counted: the others must not wait for it.
        """
        changes = [await self._change_of(one) for one in found]
        try:
            return await self._store_all(changes)
        except (Invalid, *REFUSED):
            stored: list[AlarmEvent] = []
            for change in changes:
                try:
                    stored += await self._store_all([change])
                except (Invalid, *REFUSED) as error:
                    id_ = change.id if isinstance(change, Alarm) else change.alarm_id
                    log.error("an alarm could not be stored", alarm_id=id_, error=repr(error))
                    refused_total.inc()
            return stored

    async def _store_all(self, changes: Sequence[Alarm | Return]) -> Sequence[AlarmEvent]:
        now_us = self._clock.now_us()
        stored: list[AlarmEvent] = []
        async with transaction(self._pool) as connection:
            for change in changes:
                if isinstance(change, Alarm):
                    alarm = await self._store.raise_alarm(connection, change, now_us=now_us)
                    kind = Change.RAISED
                else:
                    alarm = await self._store.end_alarm(connection, change, now_us=now_us)
                    kind = Change.RETURNED
                if alarm is not None:
                    stored.append(
                        AlarmEvent(event_id=event_id(alarm.id, kind), change=kind, changed_us=now_us, alarm=alarm)
                    )
        for event in stored:
            log.info(
                "alarm " + event.change,
                alarm_id=event.alarm.id,
                machine=event.alarm.machine_path,
                severity=event.alarm.severity.name,
                explanation=event.alarm.explanation,
                correlation_id=event.alarm.correlation_id,
            )
        return stored

    async def _change_of(self, found: Found) -> Alarm | Return:
        frames, event = found.frames, found.event
        if isinstance(event, RuleEvent):
            return await self._change_of_rule(frames, event)
        base = frames.channel_group * WIDTH_MAX
        position = base + event.signal if event.signal >= 0 else joint_position(frames.channel_group)
        id_ = alarm_id(machine_id=frames.machine_id, position=position, started_us=event.started_us)
        if not event.raised:
            return _return(id_, event, frames)
        machine = await self._machine(frames, base + frames.values.shape[1])
        signals = [_signal(machine, base + column) for column in range(frames.values.shape[1])]
        named = [Signal(signal.name, signal.unit) for signal in signals]
        shares: tuple[Share, ...] = ()
        signal = directory_pb.Signal()
        if event.signal >= 0:
            signal = signals[event.signal]
        else:
            parts = ((event.lead, event.lead_share), (event.next, event.next_share))
            shares = tuple(
                Share(signal_id=signals[column].id, signal_name=signals[column].name, share=share)
                for column, share in parts
                if column >= 0 and math.isfinite(share)
            )
        return Alarm(
            id=id_,
            firm_id=frames.firm_id,
            machine_id=frames.machine_id,
            position=position,
            signal_id=signal.id,
            machine_path=machine.path,
            machine_kind=machine.kind,
            signal_name=signal.name,
            unit=signal.unit,
            started_us=event.started_us,
            ended_us=None,
            severity=severity_at_start(event.score),
            component=event.component_name,
            explanation=explain(event, named),
            value=event.value,
            score=event.score,
            shares=shares,
            correlation_id=frames.correlation_id,
            episode_id="",
            lead_position=None if event.signal >= 0 else base + event.lead,
            figures=_finite(
                expected=event.expected,
                spread=event.spread,
                distance=event.distance,
                samples=event.samples,
                period_s=event.period_us / MICROSECONDS if event.period_us else math.nan,
            )
            if event.signal >= 0
            else _finite(distance=event.distance, samples=event.samples),
        )

    async def _change_of_rule(self, frames: Frames, event: RuleEvent) -> Alarm | Return:
        rule = event.rule
        id_ = rule_alarm_id(rule_id=rule.id, version=rule.version, started_us=event.started_us)
        if not event.raised:
            return _return(id_, event, frames)
        machine = await self._machine(frames, 0 if rule.position == MACHINE_POSITION else rule.position + 1)
        signal = directory_pb.Signal() if rule.position == MACHINE_POSITION else _signal(machine, rule.position)
        return Alarm(
            id=id_,
            firm_id=rule.firm_id,
            machine_id=rule.machine_id,
            position=rule.position,
            signal_id=signal.id,
            machine_path=machine.path,
            machine_kind=machine.kind,
            signal_name=signal.name,
            unit=signal.unit,
            started_us=event.started_us,
            ended_us=None,
            severity=rule.severity,
            component=rule.kind.value,
            explanation=explain_rule(event, Signal(signal.name, signal.unit)),
            value=event.value,
            score=0.0,
            shares=(),
            correlation_id=frames.correlation_id or new_correlation_id(),
            episode_id="",
            rule_id=rule.id,
            rule_version=rule.version,
            figures=_finite(limit=rule.limit, reference=event.reference, delay_s=rule.delay_s, window_s=rule.window_s)
            if rule.kind is not RuleKind.NO_DATA
            else _finite(window_s=rule.window_s),
        )

    async def _machine(self, frames: Frames, signals: int) -> directory_pb.Machine:
        machine = self._directory.machines.get(frames.machine_id)
        if (machine is None or len(machine.signals) < signals) and frames.machine_id not in self._nameless:
            # Once a machine: one that has been removed must not hold up the others at each of its alarms.
            self._nameless.add(frames.machine_id)
            await self._directory.wait_for_machine(frames.machine_id, signals=signals, timeout_s=NAMES_TIMEOUT_S)
            machine = self._directory.machines.get(frames.machine_id)
        # A machine that has been removed since: an alarm without its names is better than none.
        return machine or directory_pb.Machine(id=frames.machine_id, path=f"machine {frames.machine_id}")


def _return(id_: str, event: Event | RuleEvent, frames: Frames) -> Return:
    # A clock that was put back would end an alarm before it began.
    ended_us = max(event.started_us, event.time_us)
    return Return(alarm_id=id_, ended_us=ended_us, correlation_id=frames.correlation_id)


def _signal(machine: directory_pb.Machine, position: int) -> directory_pb.Signal:
    if position < len(machine.signals):
        return machine.signals[position]
    return directory_pb.Signal(name=f"signal {position}")


def _finite(**figures: float) -> tuple[tuple[str, float], ...]:
    return tuple((name, value) for name, value in figures.items() if math.isfinite(value))
