"""Alarms as JSON."""

import math

from pydantic import BaseModel

from services.anomaly.domain import Alarm, Severity, State
from services.anomaly.messages import alarm_message
from services.common.messages import word_of
from smdih.anomaly.v1 import events_pb2 as events_pb


class ShareOut(BaseModel):
    signal_id: int
    signal_name: str
    share: float


class AlarmOut(BaseModel):
    """Times are microseconds since 1970 UTC."""

    id: str
    firm_id: int
    machine_id: int
    signal_id: int
    machine_path: str
    machine_kind: str
    signal_name: str
    unit: str
    started_us: int
    ended_us: int | None
    severity: str
    component: str
    explanation: str
    value: float | None
    score: float
    active: bool
    acknowledged: bool
    cleared: bool
    shares: list[ShareOut]
    correlation_id: str
    episode_id: str
    suppressed_or_shelved: bool
    shelved: bool
    suppressed_by_design: bool
    out_of_service: bool
    assignee: str
    state: str
    rule_id: str
    rule_version: int


def alarm_out(alarm: Alarm) -> AlarmOut:
    return published_out(alarm_message(alarm))


def published_out(alarm: events_pb.Alarm) -> AlarmOut:
    return AlarmOut(
        id=alarm.id,
        firm_id=alarm.firm_id,
        machine_id=alarm.machine_id,
        signal_id=alarm.signal_id,
        machine_path=alarm.machine_path,
        machine_kind=alarm.machine_kind,
        signal_name=alarm.signal_name,
        unit=alarm.unit,
        started_us=alarm.started_us,
        ended_us=alarm.ended_us or None,
        severity=Severity(alarm.severity).name.lower(),
        component=alarm.component,
        explanation=alarm.explanation,
        value=alarm.value if math.isfinite(alarm.value) else None,
        score=alarm.score,
        active=alarm.active,
        acknowledged=alarm.acknowledged,
        cleared=alarm.cleared,
        shares=[
            ShareOut(signal_id=share.signal_id, signal_name=share.signal_name, share=share.share)
            for share in alarm.shares
        ],
        correlation_id=alarm.correlation_id,
        episode_id=alarm.episode_id,
        suppressed_or_shelved=alarm.suppressed_or_shelved,
        shelved=alarm.shelved,
        suppressed_by_design=alarm.suppressed_by_design,
        out_of_service=alarm.out_of_service,
        assignee=alarm.assignee,
        state=word_of(State, events_pb.AlarmState, alarm.state) or "",  # an event of the release before has none
        rule_id=alarm.rule_id,
        rule_version=alarm.rule_version,
    )
