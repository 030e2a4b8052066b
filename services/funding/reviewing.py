"""Reviews: what an assessor was asked and answered, the exact mean of an application's scores, and the order of a call's panel."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from services.funding.domain import Refused
from services.funding.parameters import ParametersAt
from services.funding.rules import assessment
from services.funding.rules.exact import InvalidFact, decimal

PERCENT_CHARACTERS_MAX = 6
PERCENT_PLACES_MAX = 2


class ReviewState(StrEnum):
    INVITED = "invited"
    # The assessor has declared that there is no conflict.
    ACCEPTED = "accepted"
    DECLINED = "declined"
    SCORED = "scored"
    # Taken back by an operator.
    WITHDRAWN = "withdrawn"


class DeclinedAs(StrEnum):
    CONFLICT = "conflict"
    NOT_MY_FIELD = "not_my_field"
    NO_TIME = "no_time"
    OTHER = "other"


class ModerationOutcome(StrEnum):
    STANDS = "stands"
    REOPENED = "reopened"


# Verdicts with which an application is rejected.
REJECTING = ("BELOW_THRESHOLD", "OUT_OF_SCOPE")
# Those that take one of the places of an application.
ACTIVE = (ReviewState.INVITED, ReviewState.ACCEPTED, ReviewState.SCORED)


@dataclass(frozen=True, kw_only=True)
class Review:
    """One assessor's judgement of an application, from the invitation on."""

    id: str
    application_id: str
    provider_id: str
    partner_id: int
    name: str
    reasons: tuple[str, ...]
    ranker_version: str
    state: ReviewState
    invited_us: int
    answered_us: int | None = None
    declined_as: DeclinedAs | None = None
    answer: str = ""
    percent: str = ""
    in_scope: bool | None = None
    justification: str = ""
    scored_us: int | None = None


@dataclass(frozen=True, kw_only=True)
class Moderation:
    outcome: ModerationOutcome
    reason: str
    at_us: int
    # By review: the scores that were looked at.
    scores: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the scores of an application come to. `code` is why it cannot be ranked yet or does not pass; empty: it passes."""

    mean: Fraction | None
    scores: tuple[Fraction, ...]
    in_scope: int
    spread: Fraction
    needs_moderation: bool
    code: str
    text: str

    @property
    def decided(self) -> bool:
        """Whether an allocation can take it as it is."""
        return self.code in ("", *REJECTING)


def verdict(reviews: Sequence[Review], moderations: Sequence[Moderation], parameters: ParametersAt) -> Verdict:
    """The exact mean, and what stands in the way. Scores that differ by more than the limit wait until a person has looked at
    exactly these."""
    scored = [review for review in reviews if review.state is ReviewState.SCORED]
    percents = {review.id: decimal(review.percent) for review in scored}
    judged = assessment.assess(
        [
            assessment.Score(assessor=review.id, percent=percents[review.id], in_scope=bool(review.in_scope))
            for review in scored
        ],
        parameters,
    )
    spread = max(percents.values()) - min(percents.values()) if percents else Fraction(0)
    wide = spread > parameters.exact("assessment.moderation_spread_percent")
    looked_at = {review.id: review.percent for review in scored}
    stands = any(item.outcome is ModerationOutcome.STANDS and item.scores == looked_at for item in moderations)
    waiting = wide and not stands
    code, text = judged.code or "", " ".join(judged.reasons)
    if waiting and code not in ("TOO_FEW_ASSESSORS", "TOO_MANY_ASSESSORS"):
        code = "MODERATION_NEEDED"
        text = f"The scores lie {spread} points apart; a person has to look at them first."
    return Verdict(
        mean=judged.mean,
        scores=tuple(sorted(percents.values(), reverse=True)),
        in_scope=sum(bool(review.in_scope) for review in scored),
        spread=spread,
        needs_moderation=waiting,
        code=code,
        text=text,
    )


def checked_percent(text: str) -> str:
    """A score from 0 to 100 with at most two decimals. Raises Refused."""
    try:
        value = decimal(text) if len(text) <= PERCENT_CHARACTERS_MAX else None
    except InvalidFact as error:
        raise Refused(f"percent: {error}", "SCORE_INVALID") from error
    if value is None or value > 100 or (value * 10**PERCENT_PLACES_MAX).denominator != 1:
        raise Refused("percent is a score from 0 to 100 with at most two decimals, such as 72.5.", "SCORE_INVALID")
    return text
