"""How firms of each size and region fare: shares and waiting times, with small groups left out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

GROUP_MIN = 5
"""A group of fewer needs is not shown: its figures would be those of single firms."""


@dataclass(frozen=True, kw_only=True)
class GroupFigures:
    """Needs of one group, opened in the period. None where there is nothing to divide by, or the group is too small."""

    group: str
    needs: int | None
    # Offers a need, on average.
    offers_mean: float | None = None
    # Half of the needs with offers had the first within this time of being opened.
    first_offer_s_median: float | None = None
    # Shares of all needs of the group.
    matched_share: float | None = None
    without_offer_share: float | None = None
    # Open or closed without anybody having accepted or declined an offer.
    unanswered_share: float | None = None
    # Of the offers that were accepted: 1 is the best.
    accepted_rank_mean: float | None = None

    @property
    def suppressed(self) -> bool:
        return self.needs is None


@dataclass(frozen=True)
class Fairness:
    by_size: Sequence[GroupFigures]
    by_region: Sequence[GroupFigures]


def without_small_groups(groups: Sequence[GroupFigures]) -> list[GroupFigures]:
    """Groups below GROUP_MIN without their figures. If that is one alone, the next smallest too: it could be had by difference."""
    small = {each.group for each in groups if each.needs is not None and each.needs < GROUP_MIN}
    others = sorted((each.needs or 0, each.group) for each in groups if each.group not in small)
    if len(small) == 1 and others:
        small.add(others[0][1])
    return [GroupFigures(group=each.group, needs=None) if each.group in small else replace(each) for each in groups]
