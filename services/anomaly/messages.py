"""Alarms as protobuf messages."""

from services.anomaly.domain import Alarm, AlarmEvent, Change, State, Suppression
from smdih.anomaly.v1 import events_pb2 as pb

CHANGES = {
    Change.RAISED: pb.ALARM_CHANGE_RAISED,
    Change.ACKNOWLEDGED: pb.ALARM_CHANGE_ACKNOWLEDGED,
    Change.RETURNED: pb.ALARM_CHANGE_RETURNED,
    Change.CLEARED: pb.ALARM_CHANGE_CLEARED,
    Change.COMMENTED: pb.ALARM_CHANGE_COMMENTED,
    Change.ASSIGNED: pb.ALARM_CHANGE_ASSIGNED,
    Change.SHELVED: pb.ALARM_CHANGE_SHELVED,
    Change.UNSHELVED: pb.ALARM_CHANGE_UNSHELVED,
    Change.TAKEN_OUT_OF_SERVICE: pb.ALARM_CHANGE_TAKEN_OUT_OF_SERVICE,
    Change.RETURNED_TO_SERVICE: pb.ALARM_CHANGE_RETURNED_TO_SERVICE,
    Change.SUPPRESSED: pb.ALARM_CHANGE_SUPPRESSED,
    Change.UNSUPPRESSED: pb.ALARM_CHANGE_UNSUPPRESSED,
}
STATES = {
    State.NORMAL: pb.ALARM_STATE_NORMAL,
    State.UNACKNOWLEDGED: pb.ALARM_STATE_UNACKNOWLEDGED,
    State.ACKNOWLEDGED: pb.ALARM_STATE_ACKNOWLEDGED,
    State.RETURNED_UNACKNOWLEDGED: pb.ALARM_STATE_RETURNED_UNACKNOWLEDGED,
    State.SHELVED: pb.ALARM_STATE_SHELVED,
    State.SUPPRESSED_BY_DESIGN: pb.ALARM_STATE_SUPPRESSED_BY_DESIGN,
    State.OUT_OF_SERVICE: pb.ALARM_STATE_OUT_OF_SERVICE,
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
        suppressed_or_shelved=bool(alarm.suppression),
        shelved=Suppression.SHELVED in alarm.suppression,
        suppressed_by_design=Suppression.BY_DESIGN in alarm.suppression,
        out_of_service=Suppression.OUT_OF_SERVICE in alarm.suppression,
        assignee=alarm.assignee,
        state=STATES[alarm.state],
        rule_id=alarm.rule_id,
        rule_version=alarm.rule_version,
    )


def event_message(event: AlarmEvent) -> pb.AlarmEvent:
    return pb.AlarmEvent(
        event_id=event.event_id,
        change=CHANGES[event.change],
        changed_us=event.changed_us,
        alarm=alarm_message(event.alarm),
    )
