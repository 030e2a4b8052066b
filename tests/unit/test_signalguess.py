"""What an unknown signal may be."""

import pytest

from services.ingest.proposals import signalguess


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("spindle_temp_c", "degC"),
        ("spindleTemperature", "degC"),
        ("Motor Current", "A"),
        ("motor.current_mA", "mA"),
        ("power_kw", "kW"),
        ("PowerW", "W"),
        ("line_speed", "1/min"),
        ("humidity %", "%"),
        ("a", ""),
        ("door", ""),
        ("", ""),
        ("температура", ""),
    ],
)
def test_the_unit_is_read_from_the_name(name: str, unit: str) -> None:
    assert signalguess.unit(name) == unit


def test_the_kind_is_read_from_the_values() -> None:
    assert signalguess.kind(lowest=0, highest=1, is_whole=True) == "switch"
    assert signalguess.kind(lowest=0, highest=900, is_whole=True) == "whole"
    assert signalguess.kind(lowest=0, highest=1, is_whole=False) == "measure"
