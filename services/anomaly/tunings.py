"""What people change about scoring: thresholds, sensors that were changed, and rules of their own."""

from dataclasses import dataclass, replace
from enum import StrEnum

from services.anomaly.domain import MICROSECONDS, Severity

# One "not useful" makes a signal's threshold so much higher (scores are powers of ten: half as many alarms), one "useful" so
# much lower; together never beyond the bounds.
STEP_NOT_USEFUL = 0.3
STEP_USEFUL = 0.15
THRESHOLD_OFFSET_MIN = -0.6
THRESHOLD_OFFSET_MAX = 1.5

HISTORY_S_MAX = 31 * 86_400
DELAY_S_MAX = 86_400
WINDOW_S_MAX = 86_400
SILENCE_S_MIN = 30
# Position of an alarm about a machine as a whole.
MACHINE_POSITION = -1_000_000


class TuningKind(StrEnum):
    THRESHOLD = "threshold"
    RELEARN = "relearn"
    RULE = "rule"


class RuleKind(StrEnum):
    """What a rule looks at: a value beyond a limit, a change within a time, or silence."""

    ABOVE = "above"
    BELOW = "below"
    RISE = "rise"
    FALL = "fall"
    NO_DATA = "no_data"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition that a firm states itself, about one signal (or, for silence, also about a whole machine).

    above, below: the value is beyond `limit` for `delay_s` of sample time without a break; over as soon as it is back inside by
    `hysteresis`. rise, fall: the value is more than `limit` above (below) what it was at some time in the last `window_s`.
    no_data: nothing for `window_s`, by the hub's clock at receipt.
    """

    id: str
    version: int
    firm_id: int
    machine_id: int
    position: int  # MACHINE_POSITION: the whole machine
    kind: RuleKind
    name: str
    severity: Severity
    limit: float = 0.0
    hysteresis: float = 0.0
    delay_s: int = 0
    window_s: int = 0

    @property
    def silence_us(self) -> int:
        return self.window_s * MICROSECONDS

    def as_if_new(self) -> "Rule":
        """What it says, without which version of which rule it is."""
        return replace(self, id="", version=0)


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One change of scoring, with the record of a partition from which it holds on."""

    id: int
    kind: TuningKind
    from_offset: int
    machine_id: int
    made_us: int = 0
    position: int | None = None  # None: the whole machine
    threshold_offset: float = 0.0
    rule_id: str = ""
    rule: Rule | None = None  # None: no longer evaluated


def threshold_offset(*, useful: int, not_useful: int) -> float:
    """How far so many ratings move a threshold."""
    offset = STEP_NOT_USEFUL * not_useful - STEP_USEFUL * useful
    # Rounded, so that people see the number that is in force.
    return round(min(max(offset, THRESHOLD_OFFSET_MIN), THRESHOLD_OFFSET_MAX), 6)
