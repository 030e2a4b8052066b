"""A round: many needs, few places. Stable assignment by deferred acceptance, and its proof.

Needs propose to providers in the order of their scores; a provider keeps the best needs it has places for. The result
is stable: no need and provider would both rather have each other, so every refusal has one true reason, "full with
needs ranked above yours". It is also the best stable one for every need (Gale and Shapley 1962).
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.matching.domain import MatchingError

Scores = NDArray[np.float32]
Points = NDArray[np.int32]
Keys = NDArray[np.int64]
Indices = NDArray[np.intp]

POINTS_PER_UNIT = 1_000_000
"""Scores are compared as whole millionths, the six places the ranker gives: comparing and ties are then exact."""
NOT_FEASIBLE = np.int32(np.iinfo(np.int32).min)
SCORE_MAX = 1000.0
PAIRS_MAX = 200_000_000
"""Needs x providers of one round, 4 bytes each; 10,000 x 5,000 are 50 million."""
BLOCK_NEEDS = 256
FIRST_CANDIDATES = 50
WIDER_CANDIDATES = 200
GROUP_PROVIDERS = 10
_NOBODY, _ANYBODY = np.iinfo(np.int64).max, np.iinfo(np.int64).min


class InvalidRoundError(MatchingError):
    """Ids, capacities and scores of the round do not fit together."""

    REASON = "INVALID_ARGUMENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What is to be assigned.

    `need_ids` and `provider_ids` are in increasing order without repetition, so that an index breaks ties by id.
    `points` holds a score in millionths for each pair, shape (needs, providers), or `NOT_FEASIBLE`; `round_of` makes
    it. `capacity[p]` places are free; `safety_net[p]` marks workshops and courses, which may also take a need that
    scores below `floor`. Any other pair that scores below `floor` is no match.
    """

    need_ids: Sequence[str]
    provider_ids: Sequence[str]
    capacity: NDArray[np.int64]
    safety_net: NDArray[np.bool_]
    points: Points
    floor: float = -SCORE_MAX

    def __post_init__(self) -> None:
        needs, providers = len(self.need_ids), len(self.provider_ids)
        for name, ids in (("need", self.need_ids), ("provider", self.provider_ids)):
            if any(earlier >= later for earlier, later in itertools.pairwise(ids)):
                raise InvalidRoundError(f"{name} ids must be increasing and different")
        if self.points.shape != (needs, providers):
            raise InvalidRoundError(f"points have shape {self.points.shape}, expected {(needs, providers)}")
        if len(self.capacity) != providers or len(self.safety_net) != providers:
            raise InvalidRoundError("capacity and safety_net must have one entry for each provider")
        if providers and int(self.capacity.min()) < 0:
            raise InvalidRoundError("capacity must not be negative")

    @property
    def floor_points(self) -> np.int32:
        """The least points of a match; above `NOT_FEASIBLE` in any case."""
        return np.int32(math.ceil(max(self.floor, -SCORE_MAX) * POINTS_PER_UNIT))


def round_of(
    *,
    need_ids: Sequence[str],
    provider_ids: Sequence[str],
    capacity: NDArray[np.int64],
    safety_net: NDArray[np.bool_],
    scores: Callable[[slice], Scores],
    floor: float = -SCORE_MAX,
) -> Round:
    """A round whose scores are asked for once, in blocks of 256 needs: `scores(slice)` has shape (needs, providers).

    Raises `InvalidRoundError` when the round is too large or a score lies outside +-1000; -inf means not feasible.
    """
    shape = len(need_ids), len(provider_ids)
    if shape[0] * shape[1] > PAIRS_MAX:
        raise InvalidRoundError(f"{shape[0]} needs x {shape[1]} providers are more than {PAIRS_MAX} pairs")
    points = np.empty(shape, dtype=np.int32)
    for start in range(0, shape[0], BLOCK_NEEDS):
        block = slice(start, min(start + BLOCK_NEEDS, shape[0]))
        points[block] = _points(scores(block))
    return Round(
        need_ids=need_ids,
        provider_ids=provider_ids,
        capacity=capacity,
        safety_net=safety_net,
        points=points,
        floor=floor,
    )


def _points(scores: Scores) -> Points:
    forbidden = scores == -np.inf
    scaled = np.where(forbidden, np.float32(0.0), scores)
    if not bool((np.abs(scaled) <= SCORE_MAX).all()):  # also refuses NaN
        raise InvalidRoundError(f"scores must lie within {SCORE_MAX} of zero")
    points = np.rint(scaled * np.float32(POINTS_PER_UNIT)).astype(np.int32)
    points[forbidden] = NOT_FEASIBLE
    return points


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    need_id: str
    provider_id: str
    score: float
    from_safety_net: bool = False
    """True when the need found no place by score and was given the best workshop or course instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """`offers` in the order of need ids, one for each need except `unserved` (nothing feasible had a place)."""

    offers: tuple[Offer, ...]
    unserved: tuple[str, ...]
    refusals: int
    """Proposals turned down or displaced on the way."""

    @property
    def quality(self) -> float:
        """Sum of the scores of the matches, without the safety net."""
        return math.fsum(offer.score for offer in self.offers if not offer.from_safety_net)


def assign(round_: Round) -> Assignment:
    """Deferred acceptance over all feasible pairs, then the safety net for needs left without a place.

    Each need starts with its best 50 candidates; one that runs out gets its best 200 among the providers that could
    still take it, until it has a place or nobody could. Leaving out full providers that hold only better needs
    (among them all that refused it before) changes nothing, since what a full provider holds only improves.
    """
    matcher = _Matcher(round_)
    matcher.run()
    matched = [
        Offer(need_id=round_.need_ids[need], provider_id=round_.provider_ids[provider], score=points / POINTS_PER_UNIT)
        for need, (provider, points) in matcher.match.items()
    ]
    rescued = _safety_net(round_, matcher)
    offers = sorted([*matched, *rescued], key=lambda offer: offer.need_id)
    served = {offer.need_id for offer in offers}
    return Assignment(
        offers=tuple(offers),
        unserved=tuple(need_id for need_id in round_.need_ids if need_id not in served),
        refusals=matcher.refusals,
    )


def _safety_net(round_: Round, matcher: "_Matcher") -> list[Offer]:
    """A second stable round: the needs left over, the workshops and courses with places left, no floor."""
    needs = np.array([n for n in range(len(round_.need_ids)) if n not in matcher.match], dtype=np.intp)
    left = round_.capacity - np.array([len(heap) for heap in matcher.held], dtype=np.int64)
    providers = np.flatnonzero(round_.safety_net & (left > 0))
    if not len(needs) or not len(providers):
        return []
    rest = Round(
        need_ids=[round_.need_ids[need] for need in needs.tolist()],
        provider_ids=[round_.provider_ids[provider] for provider in providers.tolist()],
        capacity=left[providers],
        safety_net=round_.safety_net[providers],
        points=round_.points[np.ix_(needs, providers)],
    )
    net = _Matcher(rest)
    net.run()
    return [
        Offer(
            need_id=rest.need_ids[need],
            provider_id=rest.provider_ids[provider],
            score=points / POINTS_PER_UNIT,
            from_safety_net=True,
        )
        for need, (provider, points) in net.match.items()
    ]


class _Matcher:
    """The running state of deferred acceptance: who holds whom, and what a newcomer must beat.

    A *key* is what a provider compares: points times the number of needs, plus the need's place counted from the end.
    """

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self._needs = len(round_.need_ids)
        self._capacity: list[int] = round_.capacity.tolist()
        self.held: list[list[int]] = [[] for _ in self._capacity]
        """Per provider a heap of the keys of the needs it holds, the worst first."""
        self.match: dict[int, tuple[int, int]] = {}
        """need -> (provider, points)"""
        self.refusals = 0
        self._to_beat: list[int] = [_ANYBODY if places else _NOBODY for places in self._capacity]
        self._lists: dict[int, list[tuple[int, int]]] = {}
        """need -> (points, provider) it has not asked yet, the best last"""

    def run(self) -> None:
        """Until every need has a place or no provider could still take it."""
        waiting: Indices = np.arange(self._needs, dtype=np.intp)
        wanted = FIRST_CANDIDATES
        while len(waiting):
            asking: list[int] = []
            for start in range(0, len(waiting), BLOCK_NEEDS):
                asking += self._widen(waiting[start : start + BLOCK_NEEDS], wanted)
            waiting = self._propose(asking)
            wanted = WIDER_CANDIDATES

    def _widen(self, needs: Indices, wanted: int) -> list[int]:
        """Give these needs their best `wanted` providers (more if equal) that could still take them.

        Returns the needs that got any; nobody can take the others any more.
        """
        points = self._round.points[needs]
        last_points, last_place = np.divmod(np.array(self._to_beat, dtype=np.int64), self._needs)
        limits = np.iinfo(np.int32)
        last_points = np.clip(last_points, int(self._round.floor_points) - 1, limits.max - 1).astype(np.int32)
        behind = (self._needs - 1 - needs)[:, None] <= last_place  # would lose against equal points
        least = np.maximum(last_points + behind, self._round.floor_points)
        least = np.maximum(least, threshold_of(np.where(points >= least, points, NOT_FEASIBLE), wanted))
        rows, providers = np.nonzero(points >= least)
        found = points[rows, providers]
        order = np.lexsort((-providers, found, rows))
        rows, providers, found = rows[order], providers[order], found[order]
        bounds = np.searchsorted(rows, np.arange(len(needs) + 1))
        pairs = list(zip(found.tolist(), providers.tolist(), strict=True))
        asking: list[int] = []
        for row, need in enumerate(needs.tolist()):
            if bounds[row] < bounds[row + 1]:
                self._lists[need] = pairs[bounds[row] : bounds[row + 1]]
                asking.append(need)
        return asking

    def _propose(self, asking: list[int]) -> Indices:
        """Run proposals until every need has a place or has used up its list; returns the latter, in order.

        A need displaced here whose list was used up earlier is among them, and gets a wider list next.
        """
        needs, to_beat, capacity, held, match = self._needs, self._to_beat, self._capacity, self.held, self.match
        free = sorted(asking, reverse=True)
        left: list[int] = []
        while free:
            need = free.pop()
            entries, place = self._lists[need], needs - 1 - need
            while entries:
                points, provider = entries.pop()
                key = points * needs + place
                if key <= to_beat[provider]:
                    self.refusals += 1
                    continue
                heap = held[provider]
                if len(heap) < capacity[provider]:
                    heapq.heappush(heap, key)
                else:
                    displaced = needs - 1 - heapq.heapreplace(heap, key) % needs
                    del match[displaced]
                    free.append(displaced)
                    self.refusals += 1
                match[need] = (provider, points)
                if len(heap) == capacity[provider]:
                    to_beat[provider] = heap[0]
                break
            else:
                left.append(need)
        return np.array(sorted(left), dtype=np.intp)


def threshold_of(points: Points, wanted: int) -> Points:
    """For each row a number that at least `wanted` entries reach, and not many more; shape (rows, 1).

    The `wanted` best of the maxima of disjoint groups are that many entries, so the least of them will do. It costs a
    fifth of sorting out the exact `wanted` best.
    """
    groups = max(wanted, points.shape[1] // GROUP_PROVIDERS)
    size = points.shape[1] // groups
    if size < 1:
        return np.full((len(points), 1), NOT_FEASIBLE, dtype=np.int32)
    maxima = points[:, : groups * size].reshape(len(points), size, groups).max(axis=1)
    return np.partition(maxima, groups - wanted, axis=1)[:, groups - wanted : groups - wanted + 1]


# --- proof -------------------------------------------------------------------------------------------------------


def blocking_pairs(round_: Round, assignment: Assignment, limit: int = 100) -> list[tuple[str, str]]:
    """Pairs that would both rather have each other than what they got; empty = stable. At most `limit` are listed.

    Shares no state with `assign`: it looks at every feasible pair at or above the floor, and at capacities.
    """
    needs, providers = len(round_.need_ids), len(round_.provider_ids)
    own_points = np.full(needs, NOT_FEASIBLE, dtype=np.int32)
    own_provider = np.full(needs, providers, dtype=np.int64)
    worst = np.full(providers, _NOBODY, dtype=np.int64)
    used = np.zeros(providers, dtype=np.int64)
    for need, provider, offer in indexed(round_, assignment):
        points = round_.points[need, provider]
        used[provider] += 1
        worst[provider] = min(int(worst[provider]), int(points) * needs + (needs - 1 - need))
        if not offer.from_safety_net:
            own_points[need], own_provider[need] = points, provider
    worst[used < round_.capacity] = _ANYBODY  # a free place takes anybody
    found: list[tuple[str, str]] = []
    for start in range(0, needs, BLOCK_NEEDS):
        block = slice(start, start + BLOCK_NEEDS)
        table, mine, own = round_.points[block], own_points[block][:, None], own_provider[block][:, None]
        wishes = (table > mine) | ((table == mine) & (np.arange(providers) < own))
        rows, columns = np.nonzero(wishes & (table >= round_.floor_points))
        keys = table[rows, columns].astype(np.int64) * needs + (needs - 1 - (start + rows))
        welcome = keys > worst[columns]
        for row, column in zip(rows[welcome].tolist(), columns[welcome].tolist(), strict=True):
            found.append((round_.need_ids[start + row], round_.provider_ids[column]))
            if len(found) >= limit:
                return found
    return found


def over_committed(round_: Round, assignment: Assignment) -> list[str]:
    """Ids of providers with more offers than places; must be empty."""
    used = Counter(provider for _, provider, _ in indexed(round_, assignment))
    return [round_.provider_ids[each] for each, count in sorted(used.items()) if count > round_.capacity[each]]


def indexed(round_: Round, assignment: Assignment) -> Iterator[tuple[int, int, Offer]]:
    need_at = {need_id: index for index, need_id in enumerate(round_.need_ids)}
    provider_at = {provider_id: index for index, provider_id in enumerate(round_.provider_ids)}
    for offer in assignment.offers:
        yield need_at[offer.need_id], provider_at[offer.provider_id], offer
