"""Thresholds, tunings, rules and evidence as protobuf messages."""

from services.anomaly.domain import Severity
from services.anomaly.evidence import Evidence, Track
from services.anomaly.messages import alarm_message
from services.anomaly.rules import Preview, Wanted
from services.anomaly.tuning_store import StoredRule, Threshold, TuningEntry
from services.anomaly.tunings import THRESHOLD_OFFSET_MAX, THRESHOLD_OFFSET_MIN, RuleKind
from services.common.directory import Directory
from services.common.errors import Invalid
from services.common.messages import message_of, number_of, word_of
from smdih.anomaly.v1 import anomaly_pb2 as pb
from smdih.anomaly.v1 import events_pb2 as events_pb
from smdih.anomaly.v1 import rules_pb2


def signal_id_at(directory: Directory, machine_id: int, position: int) -> int:
    """0 where several signals or the machine are meant, or the machine is not known any more."""
    machine = directory.machines.get(machine_id)
    known = machine is not None and 0 <= position < len(machine.signals)
    return machine.signals[position].id if machine is not None and known else 0


def threshold_message(directory: Directory, threshold: Threshold) -> pb.Threshold:
    machine = directory.machines.get(threshold.machine_id)
    known = machine is not None and 0 <= threshold.position < len(machine.signals)
    return pb.Threshold(
        firm_id=threshold.firm_id,
        machine_id=threshold.machine_id,
        signal_id=signal_id_at(directory, threshold.machine_id, threshold.position),
        offset=threshold.offset,
        offset_min=THRESHOLD_OFFSET_MIN,
        offset_max=THRESHOLD_OFFSET_MAX,
        useful=threshold.useful,
        not_useful=threshold.not_useful,
        signal_name=machine.signals[threshold.position].name if machine is not None and known else "",
        machine_path=machine.path if machine is not None else "",
    )


def usefulness(useful: bool | None) -> pb.Usefulness.ValueType:
    if useful is None:
        return pb.USEFULNESS_UNSPECIFIED
    return pb.USEFULNESS_USEFUL if useful else pb.USEFULNESS_NOT_USEFUL


def useful_of(number: int) -> bool | None:
    """Raises Invalid."""
    if number not in pb.Usefulness.values():
        raise Invalid("usefulness is not one of its values.")
    return None if number == pb.USEFULNESS_UNSPECIFIED else number == pb.USEFULNESS_USEFUL


def entry_message(entry: TuningEntry) -> pb.TuningEntry:
    return message_of(pb.TuningEntry, entry)


def evidence_message(found: Evidence) -> pb.ExplainAlarmResponse:
    return pb.ExplainAlarmResponse(
        alarm=alarm_message(found.alarm),
        figures=dict(found.alarm.figures),
        from_us=found.from_us,
        to_us=found.to_us,
        tracks=[_track(track) for track in found.tracks],
        samples_missing=found.samples_missing,
    )


def _track(track: Track) -> pb.SignalTrack:
    return pb.SignalTrack(
        signal_id=track.signal_id,
        signal_name=track.name,
        unit=track.unit,
        share=track.share,
        times_us=track.times_us.tolist(),
        by_minute=track.by_minute,
        values=[] if track.by_minute else track.least.tolist(),
        least=track.least.tolist() if track.by_minute else [],
        greatest=track.greatest.tolist() if track.by_minute else [],
    )


def wanted_rule(text: rules_pb2.RuleText) -> Wanted:
    """Raises Invalid."""
    kind = word_of(RuleKind, rules_pb2.RuleKind, text.kind)
    if kind is None:
        raise Invalid("kind is not one of its values.")
    if text.severity not in (severity.value for severity in Severity):
        raise Invalid("severity is low, medium or high.")
    return Wanted(
        machine_id=text.machine_id,
        signal_id=text.signal_id,
        kind=kind,
        name=text.name,
        severity=Severity(text.severity),
        limit=text.limit,
        hysteresis=text.hysteresis,
        delay_s=text.delay_s,
        window_s=text.window_s,
    )


def rule_message(directory: Directory, stored: StoredRule) -> rules_pb2.Rule:
    rule = stored.rule
    return rules_pb2.Rule(
        id=rule.id,
        version=rule.version,
        firm_id=rule.firm_id,
        text=rules_pb2.RuleText(
            machine_id=rule.machine_id,
            signal_id=signal_id_at(directory, rule.machine_id, rule.position),
            kind=number_of(rules_pb2.RuleKind, rule.kind),
            name=rule.name,
            severity=events_pb.Severity.ValueType(rule.severity),
            limit=rule.limit,
            hysteresis=rule.hysteresis,
            delay_s=rule.delay_s,
            window_s=rule.window_s,
        ),
        enabled=stored.enabled,
        made_us=stored.made_us,
        changed_us=stored.changed_us,
    )


def preview_message(found: Preview) -> rules_pb2.PreviewRuleResponse:
    return rules_pb2.PreviewRuleResponse(
        from_us=found.from_us,
        to_us=found.to_us,
        samples=found.samples,
        by_minute=found.by_minute,
        count=found.count,
        alarms=[
            rules_pb2.PreviewAlarm(started_us=alarm.started_us, ended_us=alarm.ended_us or 0, value=alarm.value)
            for alarm in found.alarms
        ],
    )
