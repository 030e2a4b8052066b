"""Alarms as protobuf messages."""

from services.anomaly.domain import Alarm, AlarmEvent, Suppression
from services.common.messages import message_of
from smdih.anomaly.v1 import events_pb2 as pb


def alarm_message(alarm: Alarm) -> pb.Alarm:
    return message_of(
        pb.Alarm,
        alarm,
        suppressed_or_shelved=bool(alarm.suppression),
        shelved=Suppression.SHELVED in alarm.suppression,
        suppressed_by_design=Suppression.BY_DESIGN in alarm.suppression,
        out_of_service=Suppression.OUT_OF_SERVICE in alarm.suppression,
    )


def event_message(event: AlarmEvent) -> pb.AlarmEvent:
    return message_of(pb.AlarmEvent, event, alarm=alarm_message(event.alarm))
