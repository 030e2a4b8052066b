"""Rounds: what is stored of them, and the computation that places waiting needs."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np

from services.matching.assignment import (
    NOT_FEASIBLE,
    PAIRS_MAX,
    POINTS_PER_UNIT,
    Assignment,
    Scores,
    assign,
    blocking_pairs,
    round_of,
)
from services.matching.assignment import Round as Problem
from services.matching.domain import Need, Provider
from services.matching.needs import NoOffer
from services.matching.ranking import Ranked, Ranker, UnknownProviderError
from services.matching.text import Vectors

NEEDS_MAX = 10_000
FLOOR, FLOOR_DEGRADED = 0.3, 0.15
"""A pair that scores below it is no match; the need then gets the nearest workshop or course. Of all pairs of the development
set nine in ten score below 0.33, the best of each need 0.45 to 0.8. Without the sentence model scores are lower."""


class RoundState(StrEnum):
    RUNNING = "running"
    DONE = "done"


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round as stored. `offers` counts those made by it, `from_safety_net` those that are the nearest workshop or course."""

    id: str
    state: RoundState
    started: datetime
    ended: datetime | None
    offers: int
    from_safety_net: int
    # Needs that nobody could take.
    unplaced: int
    blocking_pairs: int
    ranker_version: str
    correlation_id: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """One need's place in a round."""

    need_id: str
    provider_id: str
    ranked: Ranked
    # Providers that fit the need better and were full with needs ranked above it: its offer is of the rank after them.
    better: int
    from_safety_net: bool

    def reasons(self, round_id: str) -> tuple[str, ...]:
        if self.from_safety_net:
            why = "nobody nearer to the need had a place; a workshop or course helps meanwhile"
        elif self.better:
            why = f"{self.better} that fit better {'was' if self.better == 1 else 'were'} full with needs ranked above yours"
        else:
            why = "nobody fits better"
        return (*self.ranked.reasons, f"It was chosen in round {round_id}: {why}.")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    places: Sequence[Place]
    # Needs that nobody could take, and why.
    unserved: Mapping[str, NoOffer]
    # Needs whose provider was withdrawn meanwhile.
    lost: Sequence[str]
    blocking_pairs: int


def needs_at_once(providers: int) -> int:
    """How many needs one computation takes."""
    return min(NEEDS_MAX, PAIRS_MAX // max(providers, 1))


def place_needs(
    ranker: Ranker,
    needs: Sequence[Need],
    questions: Vectors,
    *,
    providers: Mapping[str, Provider],
    out: Mapping[str, Set[str]],
) -> Outcome:
    """Give each need one provider with a free place (`Provider.places_left`), stably; see `assignment`.

    Needs come in order of id, one question each. `out` names the providers that a need is not to be given.
    """
    provider_ids = sorted(providers)
    column = {provider_id: index for index, provider_id in enumerate(provider_ids)}

    def scores(block: slice) -> Scores:
        table = ranker.score_table(needs[block], questions[block], provider_ids)
        for row, need in enumerate(needs[block]):
            for provider_id in out.get(need.id, frozenset()) & column.keys():
                table[row, column[provider_id]] = -np.inf
        return table

    problem = round_of(
        need_ids=[need.id for need in needs],
        provider_ids=provider_ids,
        capacity=np.array([providers[each].places_left for each in provider_ids], dtype=np.int64),
        safety_net=np.array([providers[each].kind.is_safety_net for each in provider_ids], dtype=np.bool_),
        scores=scores,
        floor=FLOOR_DEGRADED if ranker.degraded else FLOOR,
    )
    assignment = assign(problem)
    places = _explained(ranker, needs, questions, problem, assignment)
    placed = {place.need_id for place in places}
    return Outcome(
        places=places,
        unserved=_why_unserved(problem, assignment),
        lost=[offer.need_id for offer in assignment.offers if offer.need_id not in placed],
        blocking_pairs=len(blocking_pairs(problem, assignment)),
    )


def _why_unserved(problem: Problem, assignment: Assignment) -> dict[str, NoOffer]:
    """Somebody fits a need, but is full; or nobody does."""
    unserved = set(assignment.unserved)
    fits = (problem.points >= problem.floor_points) | (problem.safety_net & (problem.points > NOT_FEASIBLE))
    return {
        need_id: NoOffer.ALL_FULL if fits[row].any() else NoOffer.NONE_FITS
        for row, need_id in enumerate(problem.need_ids)
        if need_id in unserved
    }


def _explained(
    ranker: Ranker, needs: Sequence[Need], questions: Vectors, problem: Problem, assignment: Assignment
) -> list[Place]:
    rows = {need.id: row for row, need in enumerate(needs)}
    places: list[Place] = []
    for offer in assignment.offers:
        row = rows[offer.need_id]
        least = np.int32(round(offer.score * POINTS_PER_UNIT))
        try:
            ranked = ranker.explain(needs[row], offer.provider_id, question=questions[row])
        except UnknownProviderError:  # it left the index since the scores were computed
            continue
        wished = problem.points[row] > max(least, problem.floor_points - 1, NOT_FEASIBLE)
        places.append(
            Place(
                need_id=offer.need_id,
                provider_id=offer.provider_id,
                ranked=ranked,
                better=int(wished.sum()),
                from_safety_net=offer.from_safety_net,
            )
        )
    return places
