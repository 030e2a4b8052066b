"""Alarms into words, what a consent covers, quarters and derived ids."""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta

import pytest

from services.matching.alarms import Alarm, need_text, urgency_of
from services.matching.consents import Consent, Coverage, Severity, SharedItem
from services.matching.domain import Kind, Urgency
from services.matching.messages import offer_event, raised_alarm
from services.matching.needs import Offer, alarm_need_id, event_id, match_id, offer_id, quarter_of
from services.matching.providers import ProviderRecord
from smdih.anomaly.v1 import events_pb2 as anomaly_pb
from smdih.matching.v1 import events_pb2 as pb

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
ALL = frozenset(SharedItem)

ALARM = Alarm(
    id="a1",
    firm_id=7,
    machine_id=70,
    machine_kind="twin-screw extruder",
    signal_name="MeltTemp_zone-2",
    component="step",
    explanation="MeltTemp_zone-2 231 degC jumped from 210 degC, 6.2 times its usual spread at once",
    severity=Severity.HIGH,
    raised=NOON,
    correlation_id="c1",
)
CONSENT = Consent(
    id="c",
    firm_id=7,
    shared=ALL,
    machine_ids=frozenset(),
    severity_min=Severity.ANY,
    valid_from=NOON - timedelta(hours=1),
    valid_until=NOON + timedelta(hours=1),
    note="",
    given=NOON,
    given_by=1,
)


def test_an_alarm_becomes_words_that_a_profile_would_use() -> None:
    assert need_text(ALARM, ALL) == (
        "Anomaly on twin screw extruder: melt temp zone 2 jumps suddenly. "
        "MeltTemp_zone-2 231 degC jumped from 210 degC, 6.2 times its usual spread at once."
    )


def test_figures_stay_out_of_the_text_where_the_firm_does_not_share_them() -> None:
    text = need_text(ALARM, frozenset({SharedItem.FAULT}))
    assert text == "Anomaly on twin screw extruder: melt temp zone 2 jumps suddenly."
    assert not any(character.isdigit() for character in text.replace("zone 2", ""))


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (
            ("load", "vibration_x", "speed", "oil"),
            ": above all load, vibration x and speed",
        ),
        (("load",), ": above all load"),
        ((), ""),
    ],
)
def test_several_signals_are_named_by_their_share(shares: tuple[str, ...], words: str) -> None:
    alarm = replace(ALARM, signal_name="", shares=shares, component="joint", explanation="")
    assert need_text(alarm, ALL) == f"Anomaly on twin screw extruder: its signals do not move together as usual{words}."


def test_an_unknown_component_and_a_machine_without_kind_still_make_a_sentence() -> None:
    alarm = replace(ALARM, component="new", machine_kind="", explanation="")
    assert need_text(alarm, ALL) == "Anomaly on machine: melt temp zone 2 behaves unusually."


def test_urgency_follows_severity() -> None:
    assert [urgency_of(each) for each in (Severity.LOW, Severity.MEDIUM, Severity.HIGH)] == [
        Urgency.LOW,
        Urgency.NORMAL,
        Urgency.HIGH,
    ]


@pytest.mark.parametrize(
    ("consent", "expected"),
    [
        (CONSENT, Coverage.COVERED),
        (replace(CONSENT, valid_from=NOON), Coverage.COVERED),
        (replace(CONSENT, valid_from=NOON + timedelta(microseconds=1)), Coverage.OTHER_TIME),
        (replace(CONSENT, valid_until=NOON), Coverage.OTHER_TIME),
        (replace(CONSENT, valid_until=None), Coverage.COVERED),
        (replace(CONSENT, machine_ids=frozenset({70, 71})), Coverage.COVERED),
        (replace(CONSENT, machine_ids=frozenset({71})), Coverage.OTHER_MACHINE),
        (replace(CONSENT, severity_min=Severity.HIGH), Coverage.BELOW_SEVERITY),
        (replace(CONSENT, severity_min=Severity.MEDIUM), Coverage.COVERED),
    ],
)
def test_a_consent_covers_its_time_its_machines_and_its_severities(consent: Consent, expected: Coverage) -> None:
    covered = consent.coverage(machine_id=70, severity=Severity.MEDIUM, raised=NOON, now=NOON)
    assert covered is expected


@pytest.mark.parametrize(
    ("day", "quarter"),
    [
        (date(2026, 1, 1), date(2026, 1, 1)),
        (date(2026, 3, 31), date(2026, 1, 1)),
        (date(2026, 4, 1), date(2026, 4, 1)),
        (date(2026, 12, 31), date(2026, 10, 1)),
        (date(2028, 2, 29), date(2028, 1, 1)),
    ],
)
def test_a_quarter_is_a_calendar_quarter(day: date, quarter: date) -> None:
    assert quarter_of(day) == quarter


def test_ids_are_derived_so_a_repeat_makes_nothing_twice() -> None:
    need = alarm_need_id("a1")
    offer = offer_id(need, "p")
    ids = [need, offer, match_id(offer), event_id(offer, "made"), event_id(offer, "lapsed")]
    assert ids[0] == alarm_need_id("a1")
    assert ids[1] == offer_id(need, "p")
    assert len(set(ids)) == len(ids)
    assert alarm_need_id("a2") != need
    assert offer_id(need, "q") != offer


def test_a_provider_is_live_until_the_day_it_expires() -> None:
    provider = ProviderRecord(
        id="p",
        kind=Kind.COURSE,
        partner_id=1,
        title="t",
        text="t",
        region="Online",
        capacity_per_quarter=None,
        expires_on=date(2026, 12, 1),
    )
    assert provider.is_live(date(2026, 11, 30))
    assert not provider.is_live(date(2026, 12, 1))
    assert not replace(provider, active=False).is_live(date(2026, 11, 30))
    assert provider.for_ranking().places_left > 1000


def event(change: "anomaly_pb.AlarmChange.ValueType" = anomaly_pb.ALARM_CHANGE_RAISED) -> anomaly_pb.AlarmEvent:
    alarm = anomaly_pb.Alarm(id="a", firm_id=1, machine_id=2, signal_id=3, signal_name="load", correlation_id="corr-1")
    return anomaly_pb.AlarmEvent(event_id="e", change=change, changed_us=1_700_000_000_000_000, alarm=alarm)


def test_only_raised_alarms_are_taken() -> None:
    taken = raised_alarm(event().SerializeToString())
    assert taken is not None
    assert (taken.id, taken.signal_name, taken.correlation_id) == ("a", "load", "corr-1")
    assert taken.severity is Severity.MEDIUM
    assert raised_alarm(event(anomaly_pb.ALARM_CHANGE_RETURNED).SerializeToString()) is None
    shelved = event()
    shelved.alarm.suppressed_or_shelved = True
    assert raised_alarm(shelved.SerializeToString()) is None


@pytest.mark.parametrize("value", [None, b"\xff\xff", b"not a message"])
def test_what_is_no_alarm_event_is_refused(value: bytes | None) -> None:
    with pytest.raises(ValueError, match=r"."):
        raised_alarm(value)


def test_an_alarm_without_a_machine_or_with_an_impossible_time_is_refused() -> None:
    without_machine = event()
    without_machine.alarm.machine_id = 0
    with pytest.raises(ValueError, match="machine"):
        raised_alarm(without_machine.SerializeToString())
    never = event()
    never.changed_us = 2**62
    with pytest.raises(ValueError, match="range"):
        raised_alarm(never.SerializeToString())


def test_the_event_of_an_offer_says_what_changed_and_when() -> None:
    offer = Offer(
        id="o",
        need_id="n",
        firm_id=7,
        provider_id="p",
        partner_id=3,
        provider_title="Gear laboratory",
        provider_kind=Kind.FACILITY,
        rank=1,
        score=0.5,
        parts={"meaning": 0.5},
        reasons=("Near you.",),
        ranker_version="2/m",
        made=NOON,
        expires=NOON + timedelta(days=14),
        need_text="help",
        machine_id=70,
        alarm_id="a",
        correlation_id="c",
    )
    made = pb.OfferEvent.FromString(offer_event(offer))
    assert made.change == pb.OFFER_CHANGE_MADE
    assert made.offer.provider_kind == pb.PROVIDER_KIND_FACILITY
    assert made.event_id == event_id("o", "made")
    assert made.changed_us == int(NOON.timestamp() * 1_000_000)
