"""Plain JSON over MQTT: one value of one signal a message, or one time of a machine.

`<root>/<machine path>/<signal>` with `{"timestamp_ms": 1764000000000, "value": 21.5}`, or `<root>/<machine path>` with
`{"ts": 1764000000000, "values": {"temperature": 21.5, "current": 3.1}}`. Times are milliseconds since 1970 UTC.
"""

from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from services.ingest.domain import Reason

VALUES_PER_MESSAGE_MAX: Final = 10_000
_TIME_MS_MAX = 2**63 // 1000 - 1
_SHAPES = (
    'send {"timestamp_ms": 1764000000000, "value": 21.5} to a topic that ends in the signal\'s name, '
    'or {"ts": 1764000000000, "values": {"temperature": 21.5}} to a topic that ends in the machine'
)


@dataclass(frozen=True)
class Sample:
    name: str
    time_us: int
    value: float


@dataclass(frozen=True)
class Fault:
    """What did not become samples; `samples` 0: it could not be read well enough to count."""

    reason: str
    detail: str
    samples: int


@dataclass(frozen=True)
class Read:
    """A message's samples, and the machine's path that its topic names."""

    machine: str
    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)


def read(path: str, body: bytes) -> Read:
    """Read a message that was published to `<root>/<path>`. Never raises for what can be sent."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        return _refused(path, f"The body is not JSON: {error}; {_SHAPES}.")
    match document:
        case {"timestamp_ms": time, "value": value, **rest} if not rest:
            machine, _, signal = path.rpartition("/")
            return _samples(machine, time, {signal: value})
        case {"ts": time, "values": dict() as values, **rest} if not rest:
            return _samples(path, time, values)
        case _:
            return _refused(path, f"The body has other keys than the hub reads; {_SHAPES}.")


def _samples(machine: str, time: Any, values: dict[str, Any]) -> Read:
    present = {name: value for name, value in values.items() if value is not None}
    if len(values) > VALUES_PER_MESSAGE_MAX:
        detail = f"{len(values)} values in one message; send at most {VALUES_PER_MESSAGE_MAX}."
        return Read(machine, faults=[Fault(Reason.TOO_LARGE, detail, len(present))])
    if not present:
        return Read(machine, faults=[Fault(Reason.EMPTY_BATCH, "The message holds no value.", 0)])
    if isinstance(time, bool) or not isinstance(time, int | float) or not 0 <= time <= _TIME_MS_MAX:
        detail = f"{time!r} is no time; send milliseconds since 1970 UTC as a number."
        return Read(machine, faults=[Fault(Reason.TIME_OUT_OF_WINDOW, detail, len(present))])
    time_us = time * 1000 if isinstance(time, int) else round(time * 1000)
    # A boolean is a number too: 1 and 0.
    numbers = {name: value for name, value in present.items() if isinstance(value, int | float)}
    samples = [Sample(name, time_us, float(value)) for name, value in numbers.items()]
    wrong = [name for name in present if name not in numbers]
    if not wrong:
        return Read(machine, samples)
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    detail = f"The value of {wrong[0]!r}{more} is no number; the hub stores numbers only."
    return Read(machine, samples, [Fault(Reason.WRONG_TYPE, detail, len(wrong))])


def _refused(path: str, detail: str) -> Read:
    return Read(path, faults=[Fault(Reason.MALFORMED, detail, 0)])
