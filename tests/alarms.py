"""An alarm as the detector raises it; tests replace what matters to them."""

from services.anomaly.domain import Alarm, Severity

ALARM = Alarm(
    id="a" * 32,
    firm_id=7,
    machine_id=1,
    position=0,
    signal_id=1000,
    machine_path="firm-7/leeds/press-1",
    machine_kind="press",
    signal_name="temperature",
    unit="degC",
    started_us=1_000_000,
    ended_us=None,
    severity=Severity.LOW,
    component="level",
    explanation="temperature is high",
    value=1.0,
    score=5.0,
    shares=(),
    correlation_id="test",
    episode_id="",
)
