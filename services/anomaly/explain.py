"""One plain-English sentence from an alarm event, made of the figures the component measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from services.anomaly.detector import Event
from services.anomaly.kernel import layout
from services.anomaly.rulebook import RuleEvent
from services.anomaly.tunings import RuleKind

SHARE_SHOWN_MIN = 0.05  # a signal with less of the distance explains nothing


@dataclass(frozen=True)
class Signal:
    """How people call a signal: its name and its unit ("" where it has none)."""

    name: str
    unit: str = ""

    def amount(self, value: float) -> str:
        return f"{value:.4g} {self.unit}".rstrip()


def explain(event: Event, signals: Sequence[Signal]) -> str:
    """Say what fired; `signals` are those of the machine, by position."""
    if event.signal < 0:
        return _joint(event, signals)
    signal = signals[event.signal]
    if not event.raised:
        return f"{signal.name} is back to its usual behaviour"
    return f"{signal.name} {_single(event, signal)}"


def explain_rule(event: RuleEvent, signal: Signal) -> str:
    """Say which rule it was and what it saw."""
    rule = event.rule
    value, limit = signal.amount(event.value), signal.amount(rule.limit)
    long = f" for {_duration(rule.delay_s)}" if rule.delay_s else ""
    match rule.kind:
        case RuleKind.ABOVE | RuleKind.BELOW:
            text = f"{signal.name} {value} is {rule.kind} {limit}{long}"
        case RuleKind.RISE | RuleKind.FALL:
            before = signal.amount(event.reference)
            went = "risen" if rule.kind is RuleKind.RISE else "fallen"
            text = (
                f"{signal.name} {value} has {went} by more than {limit} in {_duration(rule.window_s)} (from {before})"
            )
        case _:
            text = f"No data from {signal.name or 'the machine'} for more than {_duration(rule.window_s)}"
    return f"{text}: rule {rule.name}"


def _duration(seconds: int) -> str:
    for size, name in ((3600, "h"), (60, "min")):
        if seconds % size == 0 and seconds:
            return f"{seconds // size} {name}"
    return f"{seconds} s"


def _single(event: Event, signal: Signal) -> str:
    value, expected = signal.amount(event.value), signal.amount(event.expected)
    times = f"{event.distance:.1f} times"
    match event.component:
        case layout.RECORD:
            side = "above" if event.value > event.expected else "below"
            share = f"{100 * event.distance:.0f} % of its range" if event.distance >= 0.005 else "just"
            return f"{value} is {share} {side} anything in {event.samples:,} samples ({expected})"
        case layout.SHIFT_SHORT | layout.SHIFT | layout.SHIFT_LONG | layout.LEVEL_LONG:
            return (
                f"{value}: the mean of about the last {event.samples:,} samples is {times} its usual spread away from "
                f"the long-run level {expected}"
            )
        case layout.CHANGE if event.samples > 1:
            return (
                f"{value}: the mean of the last {event.samples:,} samples is {times} its usual spread away from the "
                f"long-run level {expected}; no stretch before was so far off"
            )
        case layout.CHANGE:
            return f"{value} is {times} its usual spread away from the long-run level {expected}, further than before"
        case layout.SEASON | layout.CYCLE:
            return f"{value} is {times} the usual spread away from {expected}, what is usual {_when(event.period_us)}"
        case layout.FLAT:
            return f"{value} has not changed for {event.samples:,} samples; until now at most {event.spread:.0f}"
        case layout.DROPOUT:
            return (
                f"has sent no value for {event.samples:,} frames; it is usually there in {100 * event.expected:.0f} %"
            )
        case _:
            return f"{value} is {times} its usual spread away from the long-run level {expected}"


def _when(period_us: int) -> str:
    """Where in a period, as people would say it."""
    match period_us:
        case layout.US_PER_DAY:
            return "at this time of the day"
        case layout.US_PER_WEEK:
            return "at this time of the week"
    length, name = period_us / 1e6, "s"
    for seconds, longer in ((60, "min"), (3600, "h"), (86_400, "days")):
        if period_us >= 2e6 * seconds:
            length, name = period_us / 1e6 / seconds, longer
    return f"at this point of its cycle of about {length:.{0 if length >= 10 else 1}f} {name}"


def _joint(event: Event, signals: Sequence[Signal]) -> str:
    if not event.raised:
        return "The machine's signals fit together again as usual"
    most = f"{signals[event.lead].name} ({100 * event.lead_share:.0f} %)"
    if event.next_share >= SHARE_SHOWN_MIN:
        most += f" and {signals[event.next].name} ({100 * event.next_share:.0f} %)"
    return (
        f"The machine's signals do not fit together as usual: distance {event.distance:.1f} times the expected one, "
        f"most from {most}"
    )
