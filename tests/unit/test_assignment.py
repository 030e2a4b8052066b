"""A round: stable, within capacity, nobody left without an offer, and close to the optimum."""

import itertools
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from services.matching.assignment import (
    NOT_FEASIBLE,
    Assignment,
    InvalidRoundError,
    Offer,
    Round,
    assign,
    blocking_pairs,
    over_committed,
    round_of,
)
from services.matching.assignment_bound import optimal_quality

NEVER = -np.inf


def _round(scores: object, capacity: list[int], *, net: list[bool] | None = None, floor: float = -1000.0) -> Round:
    table: NDArray[np.float32] = np.array(scores, dtype=np.float32).reshape(-1, len(capacity))
    return round_of(
        need_ids=[f"n{index:06}" for index in range(len(table))],
        provider_ids=[f"p{index:06}" for index in range(len(capacity))],
        capacity=np.array(capacity, dtype=np.int64),
        safety_net=np.array(net or [False] * len(capacity)),
        scores=lambda block: table[block],
        floor=floor,
    )


def _random(seed: int, needs: int, providers: int, capacity_max: int, net: int = 0, topics: int = 7) -> Round:
    """Needs crowd on a few topics; coarse scores make many ties; a tenth of the pairs is forbidden."""
    random = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, topics + 1)
    wanted = random.choice(topics, needs, p=popularity / popularity.sum())
    offered = random.integers(0, topics, providers)
    scores = np.round(random.random((needs, providers)) * 0.6 + 0.4 * (wanted[:, None] == offered), 2)
    scores[random.random((needs, providers)) < 0.1] = NEVER
    scores[:, :net] = np.where(np.isfinite(scores[:, :net]), scores[:, :net], 0.1)
    capacity = random.integers(0, capacity_max + 1, providers)
    capacity[:net] = needs
    return _round(scores, capacity.tolist(), net=[index < net for index in range(providers)], floor=0.3)


def _pairs(assignment: Assignment) -> dict[str, str]:
    return {offer.need_id[-1]: offer.provider_id[-1] for offer in assignment.offers}


class TestStability:
    @pytest.mark.parametrize("seed", range(25))
    def test_no_blocking_pair_and_no_provider_over_its_capacity(self, seed: int) -> None:
        round_ = _random(seed, needs=300, providers=120, capacity_max=4)
        result = assign(round_)
        assert blocking_pairs(round_, result) == []
        assert over_committed(round_, result) == []
        assert len({offer.need_id for offer in result.offers}) == len(result.offers)
        assert len(result.offers) + len(result.unserved) == 300
        assert all(offer.score >= 0.3 for offer in result.offers)

    @pytest.mark.parametrize("seed", range(40))
    def test_it_is_the_best_stable_matching_for_every_need(self, seed: int) -> None:
        """Against all matchings of a round small enough to list."""
        random = np.random.default_rng(seed)
        scores = np.round(random.random((4, 3)), 1)
        round_ = _round(scores, random.integers(0, 3, 3).tolist())
        result = {offer.need_id: offer for offer in assign(round_).offers}
        for choice in itertools.product([None, 0, 1, 2], repeat=4):
            other = _by_hand(round_, choice)
            if over_committed(round_, other) or blocking_pairs(round_, other):
                continue
            assert {offer.need_id for offer in other.offers} == set(result)  # the same needs in every stable one
            assert all(offer.score <= result[offer.need_id].score for offer in other.offers)

    def test_a_better_need_displaces_and_the_displaced_moves_on(self) -> None:
        round_ = _round([[0.8, 0.5], [0.9, 0.1]], [1, 1])
        result = assign(round_)
        assert _pairs(result) == {"0": "1", "1": "0"}
        assert result.refusals == 1

    def test_ties_go_to_the_earlier_id_on_both_sides(self) -> None:
        assert _pairs(assign(_round([[0.5, 0.5], [0.5, 0.5]], [1, 1]))) == {"0": "0", "1": "1"}

    def test_the_checker_sees_an_unstable_matching(self) -> None:
        round_ = _round([[0.9, 0.5], [0.8, 0.1]], [1, 1])
        assert blocking_pairs(round_, _by_hand(round_, (1, 0))) == [("n000000", "p000000")]
        assert over_committed(round_, _by_hand(round_, (0, 0))) == ["p000000"]

    def test_the_same_round_twice_gives_the_same(self) -> None:
        assert assign(_random(3, 200, 80, 3, net=2)) == assign(_random(3, 200, 80, 3, net=2))


class TestEveryNeedIsOfferedSomething:
    @pytest.mark.parametrize("seed", range(10))
    def test_courses_take_who_is_left(self, seed: int) -> None:
        round_ = _random(seed, needs=400, providers=60, capacity_max=2, net=3)
        result = assign(round_)
        assert result.unserved == ()
        assert blocking_pairs(round_, result) == []
        assert over_committed(round_, result) == []

    def test_the_safety_net_may_score_below_the_floor_and_says_so(self) -> None:
        round_ = _round([[0.9, 0.1], [0.8, 0.1]], [1, 10], net=[False, True], floor=0.3)
        result = assign(round_)
        assert [offer.from_safety_net for offer in result.offers] == [False, True]
        assert result.quality == pytest.approx(0.9)

    def test_a_net_with_too_few_places_leaves_needs_unserved_by_name(self) -> None:
        result = assign(_round([[0.9, 0.2]] * 3, [1, 1], net=[False, True], floor=0.3))
        assert result.unserved == ("n000002",)

    def test_lists_widen_until_a_provider_with_a_place_is_found(self) -> None:
        """300 providers look better to everybody, each with one place: the last need gets the last provider."""
        providers = 301
        scores = np.tile(np.linspace(1.0, 0.4, providers, dtype=np.float32), (providers, 1))
        round_ = _round(scores, [1] * providers)
        result = assign(round_)
        assert len(result.offers) == providers
        assert {offer.provider_id for offer in result.offers} == set(round_.provider_ids)
        assert blocking_pairs(round_, result) == []


class TestEdges:
    def test_empty_rounds(self) -> None:
        assert assign(_round(np.zeros((0, 2)), [1, 1])).offers == ()
        nobody = Round(
            need_ids=["n"],
            provider_ids=[],
            capacity=np.zeros(0, np.int64),
            safety_net=np.zeros(0, np.bool_),
            points=np.zeros((1, 0), np.int32),
        )
        assert assign(nobody).unserved == ("n",)
        assert optimal_quality(nobody, assign(nobody)) == 0.0

    def test_forbidden_pairs_and_providers_without_places_are_never_used(self) -> None:
        result = assign(_round([[NEVER, 0.9], [0.2, NEVER]], [5, 0]))
        assert _pairs(result) == {"1": "0"}
        assert result.unserved == ("n000000",)

    def test_a_round_that_does_not_fit_together_is_refused(self) -> None:
        with pytest.raises(InvalidRoundError, match="within"):
            _round([[np.nan]], [1])
        with pytest.raises(InvalidRoundError, match="negative"):
            _round([[0.5]], [-1])
        with pytest.raises(InvalidRoundError, match="increasing"):
            Round(
                need_ids=["b", "a"],
                provider_ids=["p"],
                capacity=np.ones(1, np.int64),
                safety_net=np.zeros(1, np.bool_),
                points=np.zeros((2, 1), np.int32),
            )


class TestBound:
    @pytest.mark.parametrize("seed", range(5))
    def test_the_optimum_is_never_below_and_not_far_above(self, seed: int) -> None:
        round_ = _random(seed, needs=300, providers=120, capacity_max=4)
        result = assign(round_)
        best = optimal_quality(round_, result)
        assert result.quality <= best + 1e-6
        assert 1 - result.quality / best < 0.05

    def test_the_optimum_looks_beyond_what_all_needs_like_best(self) -> None:
        """Sixty providers that everybody likes best have one place each; the others differ in what they are worth to whom."""
        random = np.random.default_rng(1)
        scores = random.random((300, 400)) * 0.5 + 0.3
        scores[:, :60] += 1.0
        round_ = _round(scores, [1] * 400)
        result = assign(round_)
        best = optimal_quality(round_, result)
        greedy = 60 * 1.8 + 240 * 0.8  # nobody can have more
        assert result.quality <= best <= greedy
        assert best > 0.98 * greedy

    def test_the_optimum_of_a_small_round_is_exact(self) -> None:
        round_ = _round([[0.9, 0.8], [0.85, 0.1]], [1, 1])
        result = assign(round_)
        assert result.quality == pytest.approx(1.0)
        assert optimal_quality(round_, result) == pytest.approx(1.65)


def test_a_large_round_ends_in_time() -> None:
    """A fifth of the full size in a generous time; the benchmark measures the real one."""
    round_ = _random(1, needs=4000, providers=2500, capacity_max=4, net=3)
    started = time.perf_counter()
    result = assign(round_)
    assert time.perf_counter() - started < 10.0
    assert result.unserved == ()
    assert blocking_pairs(round_, result) == []


def _by_hand(round_: Round, choice: tuple[int | None, ...]) -> Assignment:
    offers = tuple(
        Offer(
            need_id=round_.need_ids[need],
            provider_id=round_.provider_ids[provider],
            score=float(round_.points[need, provider]) / 1e6,
        )
        for need, provider in enumerate(choice)
        if provider is not None and round_.points[need, provider] != NOT_FEASIBLE
    )
    return Assignment(offers=offers, unserved=(), refusals=0)
