"""Score of an application from its assessors (ASSESS-1): the exact mean, never a rounded one."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from services.funding.parameters import ParametersAt
from services.funding.rules.exact import fixed_down


@dataclass(frozen=True, kw_only=True)
class Score:
    """One assessor's score in percent points; a score under a conflict of interest never counts."""

    assessor: str
    percent: Fraction
    in_scope: bool
    conflict: bool = False


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Outcome of the assessment; ``mean`` None when nobody may judge.

    ``code`` is TOO_FEW_ASSESSORS, TOO_MANY_ASSESSORS, OUT_OF_SCOPE or BELOW_THRESHOLD when it does not pass.
    """

    passed: bool
    mean: Fraction | None
    code: str | None
    reasons: tuple[str, ...]


def assess(scores: Sequence[Score], parameters: ParametersAt) -> Assessment:
    """Mean of the scores without conflict; scope by majority (a tie is out); the threshold itself passes."""
    valid = [score for score in scores if not score.conflict]
    least, most = parameters.whole("assessment.assessors_min"), parameters.whole("assessment.assessors_max")
    threshold = parameters.exact("assessment.threshold_percent")
    mean = sum((score.percent for score in valid), Fraction(0)) / len(valid) if valid else None
    in_scope = sum(score.in_scope for score in valid)
    if mean is None or len(valid) < least:
        code, reason = "TOO_FEW_ASSESSORS", f"{len(valid)} assessors without conflict; at least {least} are needed."
    elif len(valid) > most:
        code, reason = "TOO_MANY_ASSESSORS", f"{len(valid)} assessors; at most {most} are admitted."
    elif 2 * in_scope <= len(valid):
        code, reason = "OUT_OF_SCOPE", f"{in_scope} of {len(valid)} assessors find it in scope: no majority."
    elif mean < threshold:
        code, reason = (
            "BELOW_THRESHOLD",
            f"The exact mean {mean} ({fixed_down(mean)}) is below {fixed_down(threshold)}.",
        )
    else:
        return Assessment(
            passed=True, mean=mean, code=None, reasons=(f"The exact mean {mean} reaches {fixed_down(threshold)}.",)
        )
    return Assessment(passed=False, mean=mean, code=code, reasons=(reason,))
