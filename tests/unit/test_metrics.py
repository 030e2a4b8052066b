"""What every process shows of itself."""

import re
from pathlib import Path

from prometheus_client import REGISTRY

from services.common import metrics
from services.ingest.numbering import Numbering, numbers_of

SERVICES = Path(__file__).parents[2] / "services"
DECLARED = re.compile(r'(Counter|Gauge|Histogram|GaugeMetricFamily)\(\s*f?"(smdih_[a-z0-9_{}]+)"')
UNITS = ("seconds", "bytes", "pence", "records", "items", "samples", "days")


def declared() -> list[tuple[str, str, str]]:
    """Kind, name and file of every metric."""
    return [
        (kind, name, path.name) for path in SERVICES.rglob("*.py") for kind, name in DECLARED.findall(path.read_text())
    ]


def test_names_say_the_service_and_the_kind() -> None:
    found = declared()
    assert len(found) > 60
    for kind, name, file in found:
        assert kind != "Counter" or name.endswith("_total"), f"{file}: {name} is a counter"
        assert kind == "Counter" or not name.endswith("_total"), f"{file}: {name} is no counter"
        unit = name.removesuffix("_10_minutes")  # a window, not a unit
        assert not re.search(r"_(ms|us|minutes|hours|kb|mb|percent)(_|$)", unit), f"{file}: {name} has no base unit"
        assert kind != "Histogram" or name.endswith((*UNITS, "events")), f"{file}: {name} says no unit"
    names = [name.removesuffix("_total") for _, name, _ in found]  # the client refuses a pair that differs in that only
    assert len(names) == len(set(names))


def test_a_queue_shows_its_size_and_its_limit() -> None:
    waiting: list[int] = [1, 2]
    metrics.watch_queue("trial", lambda: len(waiting), limit=10)
    waiting.append(3)
    assert REGISTRY.get_sample_value("smdih_queue_items", {"queue": "trial"}) == 3
    assert REGISTRY.get_sample_value("smdih_queue_limit_items", {"queue": "trial"}) == 10


def test_methods_that_callers_make_up_are_one_label() -> None:
    assert metrics.method_label("GET") == "GET"
    assert metrics.method_label("XYZZY-1") == metrics.method_label("XYZZY-2") == "OTHER"


def test_a_door_numbers_without_a_hole_until_an_outcome_is_open() -> None:
    numbering = Numbering()
    first, second = numbers_of([numbering.take(3)]), numbers_of([("other", b"x"), numbering.take(2)])
    assert first is not None
    assert second is not None
    assert (first.first, first.batches, second.first) == (0, 3, 3)
    assert first.door == second.door
    numbering.renew()
    again = numbers_of([numbering.take(1)])
    assert again is not None
    assert again.first == 0
    assert again.door != first.door
    assert numbers_of([]) is None
    assert numbers_of([("numbers", b"short")]) is None
