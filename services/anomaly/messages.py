"""Alarms as protobuf messages."""

from services.anomaly.domain import Alarm, AlarmEvent, Change
from smdih.anomaly.v1 import events_pb2 as pb

CHANGES = {
    Change.RAISED: pb.ALARM_CHANGE_RAISED,
    Change.ACKNOWLEDGED: pb.ALARM_CHANGE_ACKNOWLEDGED,
    Change.RETURNED: pb.ALARM_CHANGE_RETURNED,
    Change.CLEARED: pb.ALARM_CHANGE_CLEARED,
}


def alarm_message(alarm: Alarm) -> pb.Alarm:
    return pb.Alarm(
        id=alarm.id,
        firm_id=alarm.firm_id,
        machine_id=alarm.machine_id,
        signal_id=alarm.signal_id,
        machine_path=alarm.machine_path,
        machine_kind=alarm.machine_kind,
        signal_name=alarm.signal_name,
        unit=alarm.unit,
        started_us=alarm.started_us,
        ended_us=alarm.ended_us or 0,
        severity=pb.Severity.ValueType(alarm.severity),
        component=alarm.component,
        explanation=alarm.explanation,
        value=alarm.value,
        score=alarm.score,
        active=alarm.active,
        acknowledged=alarm.acknowledged,
        cleared=alarm.cleared,
        shares=[
            pb.Share(signal_id=share.signal_id, signal_name=share.signal_name, share=share.share)
            for share in alarm.shares
        ],
        correlation_id=alarm.correlation_id,
        episode_id=alarm.episode_id,
    )


def event_message(event: AlarmEvent) -> pb.AlarmEvent:
    return pb.AlarmEvent(
        event_id=event.event_id,
        change=CHANGES[event.change],
        changed_us=event.changed_us,
        alarm=alarm_message(event.alarm),
    )
