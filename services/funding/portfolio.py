"""The declared portfolio: the best selection under a budget, floors, ceilings and shares, proven optimal by CP-SAT.

Objectives in order, each fixed before the next: sum of exact mean x pence, number of firms, lowest ids. One worker,
fixed seed and canonical order make it repeat bit for bit; limits are deterministic effort, never seconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import gcd, lcm
from typing import Any

from ortools.linear_solver import pywraplp
from ortools.sat.python import cp_model

from services.funding.rules.exact import InvalidFact, gbp, percent
from services.funding.selection import (
    AllocationInfeasible,
    AllocationUnproven,
    Application,
    Call,
    Reason,
    Selection,
    rooms_of,
)

EFFORT_MAX = 60.0  # deterministic units of the solver, about as many seconds on one core
TIES_TRIED_MAX = 20
INT64_SAFE = 2**62
MULTIPLIER_STEPS = 10**6  # multipliers are rounded to millionths; any non-negative ones prove a bound


@dataclass(frozen=True)
class Limit:
    """``sum(coefficient x chosen) <= most``, with the quota or the enterprise it comes from."""

    coefficients: tuple[int, ...]
    most: int
    pot: str


def select_portfolio(call: Call, passing: Sequence[Application]) -> Selection:
    """Best selection among the applications at or above the threshold.

    Raises:
        AllocationInfeasible: the limits contradict each other or the demand.
        AllocationUnproven: no proof within ``EFFORT_MAX``.
        InvalidFact: numbers too large for exact solving.
    """
    ordered = sorted(passing, key=lambda application: application.id)
    limits = list(_limits(call, ordered))
    weights, unit = _weights(ordered)
    problem = _Problem(ordered, weights, limits)
    best = problem.maximise()
    if best is None:
        raise AllocationInfeasible(_why_infeasible(call, ordered))
    multipliers = _multipliers(weights, limits)
    problem.settle(best, multipliers)
    best, tie_break_proven = problem.lowest_ids(best)
    chosen = frozenset(application.id for application, taken in zip(ordered, best, strict=True) if taken)
    funded = [application for application in ordered if application.id in chosen]
    rooms = dict(_tight_rooms(ordered))
    reasons = {application.id: _reason(call, application, funded, rooms) for application in ordered}
    return Selection(
        chosen=chosen,
        reasons=reasons,
        bound=Fraction(problem.score_bound) * unit,
        multipliers=tuple(multiplier * unit for multiplier in multipliers),
        tie_break_proven=tie_break_proven,
    )


def _limits(call: Call, ordered: Sequence[Application]) -> Iterator[Limit]:
    """The budget, then per quota in order of its pot: ceiling, floor, smallest share, largest share; then, in their order, the
    enterprises that ask for more than they may still be given."""
    yield Limit(tuple(each.request_p for each in ordered), call.budget_p, "budget")
    for quota in sorted(call.quotas, key=lambda quota: quota.pot):
        inside = tuple(each.request_p if quota.pot in each.pots else 0 for each in ordered)
        if quota.ceiling_p is not None:
            yield Limit(inside, quota.ceiling_p, quota.pot)
        if quota.floor_p is not None:
            yield Limit(tuple(-amount for amount in inside), -quota.floor_p, quota.pot)
        for share, sign in ((quota.share_min, 1), (quota.share_max, -1)):
            if share is not None:
                over = tuple(
                    sign * (share.numerator * each.request_p - share.denominator * amount)
                    for each, amount in zip(ordered, inside, strict=True)
                )
                yield Limit(over, 0, quota.pot)
    for enterprise, room_p in _tight_rooms(ordered):
        theirs = tuple(each.request_p if each.enterprise == enterprise else 0 for each in ordered)
        yield Limit(theirs, room_p, enterprise)


def _tight_rooms(ordered: Sequence[Application]) -> list[tuple[str, int]]:
    """Only these can be overstepped."""
    asked: dict[str, int] = {}
    for each in ordered:
        asked[each.enterprise] = asked.get(each.enterprise, 0) + each.request_p
    return [
        (enterprise, room_p) for enterprise, room_p in sorted(rooms_of(ordered).items()) if asked[enterprise] > room_p
    ]


def _weights(ordered: Sequence[Application]) -> tuple[list[int], Fraction]:
    """Mean x pence of each application as whole multiples of a common unit."""
    common = lcm(*(application.mean.denominator for application in ordered)) if ordered else 1
    weights = [int(application.mean * common) * application.request_p for application in ordered]
    divisor = gcd(*weights) or 1
    return [weight // divisor for weight in weights], Fraction(divisor, common)


class _Problem:
    """One CP-SAT model; score and firms are one integer objective, as a score counts more than all firms together."""

    def __init__(self, ordered: Sequence[Application], weights: Sequence[int], limits: Sequence[Limit]) -> None:
        self._ordered, self._weights, self._limits = ordered, weights, limits
        self._model = cp_model.CpModel()
        self._taken = [self._model.new_bool_var(f"take{index}") for index in range(len(ordered))]
        for limit in limits:
            _refuse_overflow(limit.coefficients)
            terms = cp_model.LinearExpr.weighted_sum(self._taken, list(limit.coefficients))
            self._model.add(terms <= limit.most)
        self._lowest_ids_among_twins()
        firms = sorted({application.firm for application in ordered})
        self._per_score = len(firms) + 1
        coefficients = [weight * self._per_score for weight in weights]
        _refuse_overflow([*coefficients, len(firms)])
        score = cp_model.LinearExpr.weighted_sum(self._taken, coefficients)
        self._objective = score + sum(self._firm_funded(firm) for firm in firms)
        self.score_bound = 0

    def maximise(self) -> tuple[bool, ...] | None:
        """An optimal selection, or None if there is none at all; afterwards ``score_bound`` bounds every score."""
        self._model.maximize(self._objective)
        # Presolve spends up to 3 s on a call without quotas and finds nothing; once much is fixed it pays for ties.
        solver = self._solve(presolve=False)
        if solver is None:
            return None
        # The proto's bound is an exact integer of the minimised form; the float one would lose pence on large calls.
        self.score_bound = -solver.response_proto.inner_objective_lower_bound // self._per_score
        return self._selection(solver)

    def settle(self, best: tuple[bool, ...], multipliers: Sequence[Fraction]) -> None:
        """Fix what every selection as good as ``best`` has in common, so that looking for ties is quick.

        At these prices of the limits an application is worth its weight less what it uses. Taking one of negative
        worth, or leaving one of positive worth, loses that worth against the bound; more than the bound's gap cannot
        be lost.
        """
        bound, worths = priced_bound(self._weights, self._limits, multipliers)
        gap = bound - sum(weight for weight, taken in zip(self._weights, best, strict=True) if taken)
        for variable, worth in zip(self._taken, worths, strict=True):
            if abs(worth) > gap:
                self._model.add(variable == int(worth > 0))

    def lowest_ids(self, best: tuple[bool, ...]) -> tuple[tuple[bool, ...], bool]:
        """The optimal selection with the lowest sum of id positions, and whether that is proven.

        Optima to the penny are mostly unique, and excluding one shows it in one more run. Where there are many, the sum
        itself is minimised.
        """
        self._model.add(self._objective >= self._value(best))
        candidates = [best]
        for _ in range(TIES_TRIED_MAX):
            self._exclude(candidates[-1])
            solver = self._solve()
            if solver is None:
                return min(candidates, key=self._id_key), True
            candidates.append(self._selection(solver))
        self._model.minimize(cp_model.LinearExpr.weighted_sum(self._taken, list(range(1, len(self._ordered) + 1))))
        incumbent = min(candidates, key=self._id_key)
        try:
            solver = self._solve()
        except AllocationUnproven:
            return incumbent, False
        if solver is not None:
            incumbent = min(incumbent, self._selection(solver), key=self._id_key)
        return incumbent, True

    def _solve(self, *, presolve: bool = True) -> Any | None:
        solver = cp_model.CpSolver()
        solver.parameters.cp_model_presolve = presolve
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 20
        solver.parameters.max_deterministic_time = EFFORT_MAX
        status = solver.status_name(solver.solve(self._model))
        if status == "OPTIMAL":
            return solver
        if status == "INFEASIBLE":
            return None
        raise AllocationUnproven(f"the solver stopped as {status}")

    def _selection(self, solver: Any) -> tuple[bool, ...]:
        return tuple(bool(solver.value(variable)) for variable in self._taken)

    def _exclude(self, selection: tuple[bool, ...]) -> None:
        self._model.add_bool_or(
            [~variable if taken else variable for variable, taken in zip(self._taken, selection, strict=True)]
        )

    def _value(self, selection: tuple[bool, ...]) -> int:
        score = sum(weight for weight, taken in zip(self._weights, selection, strict=True) if taken)
        firms = {application.firm for application, taken in zip(self._ordered, selection, strict=True) if taken}
        return score * self._per_score + len(firms)

    def _id_key(self, selection: tuple[bool, ...]) -> tuple[int, list[int]]:
        positions = [position for position, taken in enumerate(selection) if taken]
        return sum(positions) + len(positions), positions

    def _firm_funded(self, firm: str) -> Any:
        """The one application's variable, or a variable that is true only if one of several is taken."""
        theirs = [
            variable
            for variable, application in zip(self._taken, self._ordered, strict=True)
            if application.firm == firm
        ]
        if len(theirs) == 1:
            return theirs[0]
        funded = self._model.new_bool_var(f"firm {firm}")
        self._model.add_bool_or([*theirs, ~funded])
        for variable in theirs:
            self._model.add_implication(variable, funded)
        return funded

    def _lowest_ids_among_twins(self) -> None:
        """Applications that differ only by id, from firms with one application, are taken in order of their ids."""
        per_firm: dict[str, int] = {}
        for application in self._ordered:
            per_firm[application.firm] = per_firm.get(application.firm, 0) + 1
        tight = {enterprise for enterprise, _ in _tight_rooms(self._ordered)}
        twins: dict[object, list[int]] = {}
        for index, application in enumerate(self._ordered):
            if per_firm[application.firm] == 1:
                bound = application.enterprise if application.enterprise in tight else None
                alike = (application.request_p, application.mean, application.pots, bound)
                twins.setdefault(alike, []).append(index)
        for indices in twins.values():
            for earlier, later in pairwise(indices):
                self._model.add_implication(self._taken[later], self._taken[earlier])


def _refuse_overflow(coefficients: Sequence[int]) -> None:
    if sum(abs(coefficient) for coefficient in coefficients) > INT64_SAFE:
        raise InvalidFact("the amounts, shares or score denominators are too large for exact solving")


def priced_bound(
    weights: Sequence[int], limits: Sequence[Limit], multipliers: Sequence[Fraction]
) -> tuple[Fraction, list[Fraction]]:
    """Upper bound of every selection at these prices of the limits, and what each application is worth at them."""
    priced = [(limit, multiplier) for limit, multiplier in zip(limits, multipliers, strict=True) if multiplier]
    worths = [
        weight - sum((multiplier * limit.coefficients[index] for limit, multiplier in priced), Fraction(0))
        for index, weight in enumerate(weights)
    ]
    free = sum((multiplier * limit.most for limit, multiplier in priced), Fraction(0))
    return free + sum((worth for worth in worths if worth > 0), Fraction(0)), worths


def _multipliers(weights: Sequence[int], limits: Sequence[Limit]) -> tuple[Fraction, ...]:
    """Prices of the limits from the linear relaxation, in weight per pence; any reader can turn them into a bound."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    taken = [solver.NumVar(0, 1, "") for _ in weights]
    rows = []
    for limit in limits:
        row = solver.Constraint(-solver.infinity(), limit.most)
        for variable, coefficient in zip(taken, limit.coefficients, strict=True):
            if coefficient:
                row.SetCoefficient(variable, coefficient)
        rows.append(row)
    for variable, weight in zip(taken, weights, strict=True):
        solver.Objective().SetCoefficient(variable, weight)
    solver.Objective().SetMaximization()
    if solver.Solve() != pywraplp.Solver.OPTIMAL:
        return tuple(Fraction(0) for _ in limits)
    return tuple(Fraction(max(0, round(row.dual_value() * MULTIPLIER_STEPS)), MULTIPLIER_STEPS) for row in rows)


def _reason(
    call: Call, application: Application, funded: Sequence[Application], rooms: Mapping[str, int]
) -> tuple[Reason, str]:
    """Funded, or the first limit that adding the application to the selection would break."""
    if application in funded:
        return Reason.FUNDED, f"Exact mean {application.mean}; asks for {gbp(application.request_p)}."
    total_p = sum(each.request_p for each in funded)
    with_it_p = total_p + application.request_p
    if with_it_p > call.budget_p:
        text = f"It asks for {gbp(application.request_p)}; the best selection leaves {gbp(call.budget_p - total_p)}."
        return Reason.ASKS_MORE_THAN_LEFT, text
    for quota in sorted(call.quotas, key=lambda quota: quota.pot):
        inside_p = sum(each.request_p for each in [*funded, application] if quota.pot in each.pots)
        if quota.pot in application.pots and quota.ceiling_p is not None and inside_p > quota.ceiling_p:
            text = f"With it {quota.pot} would receive {gbp(inside_p)}, over the ceiling of {gbp(quota.ceiling_p)}."
            return Reason.OVER_CEILING, text
        for share, broken in (
            (quota.share_min, quota.share_min is not None and inside_p < quota.share_min * with_it_p),
            (quota.share_max, quota.share_max is not None and inside_p > quota.share_max * with_it_p),
        ):
            if broken and share is not None:
                held = f"{gbp(inside_p)} of {gbp(with_it_p)}"
                text = f"With it {quota.pot} would hold {held}, past its share of {percent(share)}."
                return Reason.BREAKS_SHARE, text
    if application.enterprise in rooms:
        room_p = rooms[application.enterprise]
        theirs_p = sum(each.request_p for each in [*funded, application] if each.enterprise == application.enterprise)
        if theirs_p > room_p:
            text = f"With it its enterprise would receive {gbp(theirs_p)}, and may still be given {gbp(room_p)} of assistance."
            return Reason.MFA_LIMIT, text
    return Reason.ADDS_NOTHING, f"With an exact mean of {application.mean} it would add nothing to the selection."


def _why_infeasible(call: Call, ordered: Sequence[Application]) -> str:
    demand: Mapping[str, int] = {
        quota.pot: sum(each.request_p for each in ordered if quota.pot in each.pots) for quota in call.quotas
    }
    short = [
        f"{quota.pot} asks for {gbp(demand[quota.pot])}, below its floor of {gbp(quota.floor_p)}"
        for quota in call.quotas
        if quota.floor_p is not None and demand[quota.pot] < quota.floor_p
    ]
    return "; ".join(short) or "the floors, ceilings and shares cannot all be kept within the budget"
