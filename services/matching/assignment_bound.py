"""What the best assignment could reach, stable or not: a bound to measure rounds against.

Apart from `assignment`, since it brings OR-tools with it, which no serving process needs.
"""

import numpy as np
from ortools.graph.python import min_cost_flow

from services.matching.assignment import (
    BLOCK_NEEDS,
    FIRST_CANDIDATES,
    POINTS_PER_UNIT,
    Assignment,
    Indices,
    InvalidRoundError,
    Points,
    Round,
    indexed,
    threshold_of,
)

WIDEN_BY = 4
GAIN_MIN = 1e-4
"""Wider lists that add a smaller share than this are the last."""


def optimal_quality(round_: Round, assignment: Assignment) -> float:
    """The most total score any assignment could reach (min-cost flow), stable or not, to a share of GAIN_MIN.

    Over each need's best pairs and the pairs of `assignment`, so it is never below `assignment.quality` when scores are
    positive; lists grow until that adds nothing any more. The reported gap is 1 - quality / optimum. Pairs with a
    negative score are left out: leaving a need alone is then better.
    """
    if not round_.need_ids or not round_.provider_ids:
        return 0.0
    candidates, best = FIRST_CANDIDATES, _optimum(round_, assignment, FIRST_CANDIDATES)
    while candidates < len(round_.provider_ids):
        candidates *= WIDEN_BY
        before, best = best, _optimum(round_, assignment, candidates)
        if best - before <= GAIN_MIN * best:
            break
    return best


def _optimum(round_: Round, assignment: Assignment, candidates: int) -> float:
    needs, providers = len(round_.need_ids), len(round_.provider_ids)
    tails, heads, points = _edges(round_, assignment, candidates)
    source, sink = needs + providers, needs + providers + 1
    every_need, every_provider = np.arange(needs), needs + np.arange(providers)
    arcs = (  # from, to, capacity, cost
        (np.full(needs, source), every_need, np.ones(needs), np.zeros(needs)),
        (tails, needs + heads, np.ones(len(tails)), -points),
        (every_provider, np.full(providers, sink), np.minimum(round_.capacity, needs), np.zeros(providers)),
        (every_need, np.full(needs, sink), np.ones(needs), np.zeros(needs)),  # stays without a place
    )
    flow = min_cost_flow.SimpleMinCostFlow()
    for start, end, capacity, cost in arcs:
        flow.add_arcs_with_capacity_and_unit_cost(
            start.astype(np.int32), end.astype(np.int32), capacity.astype(np.int64), cost.astype(np.int64)
        )
    flow.set_nodes_supplies(np.array([source, sink], dtype=np.int32), np.array([needs, -needs], dtype=np.int64))
    status = flow.solve()
    if status != flow.OPTIMAL:
        raise InvalidRoundError(f"the bound could not be computed (solver status {status})")
    return float(-flow.optimal_cost()) / POINTS_PER_UNIT


def _edges(round_: Round, assignment: Assignment, candidates: int) -> tuple[Indices, Indices, Points]:
    """Needs, providers and points of the best candidates and the matches made; positive, at or above the floor."""
    least = np.empty((len(round_.need_ids), 1), dtype=np.int32)
    for start in range(0, len(least), BLOCK_NEEDS):
        block = slice(start, start + BLOCK_NEEDS)
        least[block] = np.maximum(threshold_of(round_.points[block], candidates), max(int(round_.floor_points), 1))
    chosen = round_.points >= least
    for need, provider, offer in indexed(round_, assignment):
        if not offer.from_safety_net and round_.points[need, provider] > 0:
            chosen[need, provider] = True
    needs, providers = np.nonzero(chosen)
    return needs, providers, round_.points[needs, providers]
