from services.anomaly.domain import (
    HIGH_SCORE,
    LONG_US,
    MEDIUM_SCORE,
    Change,
    Severity,
    alarm_id,
    event_id,
    joint_position,
    severity_at_end,
    severity_at_start,
)


def test_severity_at_the_start_follows_the_score() -> None:
    assert severity_at_start(4.0) is Severity.LOW
    assert severity_at_start(MEDIUM_SCORE) is Severity.MEDIUM
    assert severity_at_start(HIGH_SCORE - 0.01) is Severity.MEDIUM
    assert severity_at_start(HIGH_SCORE) is Severity.HIGH


def test_a_condition_that_lasted_a_shift_is_one_step_more_severe() -> None:
    assert severity_at_end(Severity.LOW, LONG_US - 1) is Severity.LOW
    assert severity_at_end(Severity.LOW, LONG_US) is Severity.MEDIUM
    assert severity_at_end(Severity.HIGH, LONG_US) is Severity.HIGH


def test_ids_say_the_same_for_the_same_fault_and_differ_otherwise() -> None:
    first = alarm_id(machine_id=1, position=2, started_us=3)
    assert first == alarm_id(machine_id=1, position=2, started_us=3)
    others = {
        alarm_id(machine_id=machine, position=position, started_us=started)
        for machine in (1, 12)
        for position in (2, joint_position(0), joint_position(1))
        for started in (3, 23)
    }
    assert len(others) == 12
    assert event_id(first, Change.RAISED) != event_id(first, Change.RETURNED)
