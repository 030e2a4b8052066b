"""All providers in memory, column by column, so that a rule runs once per distinct value and not once per provider."""

from collections.abc import Callable, Hashable, Mapping, Set
from dataclasses import replace
from datetime import date
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from services.matching.domain import (
    LEAD_DAYS_MAX,
    Assesses,
    Assessment,
    FilterCode,
    Kind,
    MatchingError,
    Need,
    Provider,
    Size,
    canonical_region,
    division_of,
    serves_region,
)

Mask = NDArray[np.bool_]
Column = NDArray[np.float64]
Value = TypeVar("Value", bound=Hashable)

SLOTS_FIRST = 64
VALUES_SPARE = 1_000
"""Values that no slot has any more and that a field keeps at most, besides one a slot."""
REMEMBERED_MAX = 200
"""Columns and masks that a field remembers; for 5,000 providers a column has 40 kB."""


class UnknownProviderError(MatchingError):
    """No provider has this id."""

    REASON = "NOT_FOUND"


class Directory:
    """Providers in numbered slots; freed slots are used again. Every array it returns has length `size`."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}
        self.size = 0
        self.kinds: Field[Kind] = Field()
        self.divisions: Field[frozenset[str]] = Field()
        self.regions: Field[tuple[str, ...]] = Field()
        self.skills: Field[frozenset[str]] = Field()
        self._excluded: Field[frozenset[str]] = Field()
        self._sizes: Field[frozenset[Size]] = Field()
        self._reach: Field[tuple[bool, tuple[str, ...]]] = Field()
        self._lead_days: Field[int] = Field()
        self._expiry: Field[date] = Field()
        self._active: Field[bool] = Field()
        self._occupied: Field[bool] = Field()
        self.places: Field[tuple[int, int]] = Field()
        self._providers: list[Provider | None] = []
        self._free_slots: list[int] = []
        self._conflicts: dict[str, set[int]] = {}
        self._organisations: Field[frozenset[str]] = Field()
        self._owners: Field[str] = Field()
        self._assesses: Field[Assesses] = Field()
        self.outcomes: Field[tuple[int, int]] = Field()

    def find(self, provider_id: str) -> Provider | None:
        slot = self.slots.get(provider_id)
        return None if slot is None else self._providers[slot]

    def at(self, slot: int) -> Provider:
        provider = self._providers[slot]
        if provider is None:
            raise UnknownProviderError(f"no provider in slot {slot}")
        return provider

    def put(self, provider: Provider) -> int:
        """Store under the provider's slot, a freed one or a new one; returns it."""
        slot = self.slots.get(provider.id)
        if slot is None:
            slot = self._free_slots.pop() if self._free_slots else self._grow()
        else:
            self._forget_conflicts(slot)
        self.slots[provider.id] = slot
        self._providers[slot] = provider
        for firm_id in provider.conflicts:
            self._conflicts.setdefault(firm_id, set()).add(slot)
        places = provider_places(provider)
        self.kinds.put(slot, provider.kind)
        self.divisions.put(slot, provider.sic_divisions)
        self.regions.put(slot, places)
        self.skills.put(slot, provider.skills)
        self._excluded.put(slot, provider.sic_excluded)
        self._sizes.put(slot, provider.sizes_served)
        self._reach.put(slot, (provider.region_bound, places))
        self._lead_days.put(slot, provider.lead_days)
        self._expiry.put(slot, provider.expires_on or date.max)
        self._active.put(slot, provider.active)
        self._occupied.put(slot, True)
        self.places.put(slot, (provider.places_left, provider.capacity_per_quarter))
        self._organisations.put(slot, provider.conflict_organisations)
        self._owners.put(slot, provider.owner)
        self._assesses.put(slot, provider.assesses)
        self.outcomes.put(slot, (provider.outcome_firms, provider.outcome_points))
        return slot

    def set_places(self, provider_id: str, left: int) -> None:
        slot = self.slots.get(provider_id)
        if slot is None:
            raise UnknownProviderError(f"no provider {provider_id}")
        self._providers[slot] = provider = replace(self.at(slot), capacity_left=left)
        self.places.put(slot, (left, provider.capacity_per_quarter))

    def drop(self, provider_id: str) -> int | None:
        slot = self.slots.pop(provider_id, None)
        if slot is not None:
            self._forget_conflicts(slot)
            self._providers[slot] = None
            self._free_slots.append(slot)
            self._occupied.put(slot, False)
        return slot

    @property
    def occupied(self) -> Mask:
        return self._occupied.test("occupied", bool)

    def blocked(self, need: Need, today: date) -> dict[FilterCode, Mask]:
        """For each filter the slots it takes out, in the order of the codes."""
        occupied = self.occupied
        masks = {code: field.test((code, key), rule) for code, (key, field, rule) in self._filters(need, today).items()}
        masks[FilterCode.CONFLICT_OF_INTEREST] = self._in_conflict({need.firm_id})
        return {code: masks[code] & occupied for code in FilterCode if code in masks}

    def blocked_for_round(self, need: Need, today: date) -> Mask:
        """Slots that any filter takes out but places, which the round counts itself, and conflicts, which are a firm's own."""
        mask = ~self.occupied
        for code, (key, field, rule) in self._filters(need, today).items():
            if code is not FilterCode.NO_CAPACITY:
                mask |= field.test((code, key), rule)
        return mask

    def in_conflict_with(self, firm_id: str) -> list[int]:
        """Slots of providers that must not work for the firm."""
        return list(self._conflicts.get(firm_id, ()))

    def _filters(
        self, need: Need, today: date
    ) -> dict[FilterCode, tuple[Hashable, "Field[Any]", Callable[[Any], bool]]]:
        """Of each filter: what of the need it looks at, the field of a provider, and whether a value takes it out."""
        division, size, wait = need.division, need.size, LEAD_DAYS_MAX[need.urgency]
        region = canonical_region(need.region)
        return {
            FilterCode.INACTIVE: (None, self._active, lambda active: not active),
            FilterCode.EXPIRED: (today, self._expiry, lambda expiry: expiry <= today),
            FilterCode.ASSESSES_ONLY: (None, self._assesses, lambda assesses: assesses is Assesses.ONLY),
            FilterCode.SECTOR_EXCLUDED: (division, self._excluded, lambda excluded: division in excluded),
            FilterCode.SIZE_NOT_SERVED: (size, self._sizes, lambda sizes: bool(sizes) and size not in sizes),
            FilterCode.OUT_OF_REGION: (
                region,
                self._reach,
                lambda reach: not serves_region(region, home=reach[1][0], served=reach[1][1:], bound=reach[0]),
            ),
            FilterCode.LEAD_TIME_TOO_LONG: (wait, self._lead_days, lambda days: days > wait),
            FilterCode.NO_CAPACITY: (None, self.places, lambda places: places[0] <= 0),
        }

    @property
    def assessors(self) -> Mask:
        """Those who assess applications."""
        return self._assesses.test("assessors", lambda assesses: assesses is not Assesses.NO) & self.occupied

    def blocked_as_assessors(self, asked: Assessment, today: date) -> dict[FilterCode, Mask]:
        """For each filter the assessors it takes out. Places, regions and sizes are about helping firms: no filter here."""
        division, worked = division_of(asked.sic), np.zeros(self.size, dtype=np.bool_)
        worked[[self.slots[each] for each in asked.worked_for if each in self.slots]] = True
        named = self._organisations.fresh(lambda names: bool(names & asked.organisations))
        fields: dict[FilterCode, Mask] = {
            FilterCode.INACTIVE: self._active.fresh(lambda active: not active),
            FilterCode.EXPIRED: self._expiry.fresh(lambda expiry: expiry <= today),
            FilterCode.CONFLICT_OF_INTEREST: self._in_conflict(asked.firm_ids),
            FilterCode.CONFLICT_ORGANISATION: named | self._owners.fresh(lambda owner: owner in asked.owners),
            FilterCode.WORKED_FOR_FIRM: worked,
            FilterCode.SECTOR_EXCLUDED: self._excluded.fresh(lambda excluded: division in excluded),
        }
        assessors = self.assessors
        return {code: mask & assessors for code, mask in fields.items()}

    def best(self, scores: Column, limit: int) -> list[int]:
        """Slots of the best `limit` scores above -inf, best first; equal scores by provider id."""
        limit = min(limit, int((scores > -np.inf).sum()))
        if limit <= 0:
            return []
        threshold = np.partition(scores, len(scores) - limit)[len(scores) - limit]
        slots = np.flatnonzero(scores >= threshold)  # may be more than limit when scores are equal
        order = sorted(slots.tolist(), key=lambda slot: (-scores[slot], self.at(slot).id))
        return order[:limit]

    def _grow(self) -> int:
        self._providers.append(None)
        self.size += 1
        return self.size - 1

    def _in_conflict(self, firm_ids: Set[str]) -> Mask:
        mask = np.zeros(self.size, dtype=np.bool_)
        for firm_id in firm_ids:
            mask[list(self._conflicts.get(firm_id, ()))] = True
        return mask

    def _forget_conflicts(self, slot: int) -> None:
        for firm_id in self.at(slot).conflicts:
            self._conflicts[firm_id].discard(slot)
            if not self._conflicts[firm_id]:
                del self._conflicts[firm_id]


class Field(Generic[Value]):
    """One field of all providers: a table of distinct values and a code per slot.

    What a rule makes of it is remembered under the key that names the rule and all that it depends on, until a provider
    changes in this field. What is returned must not be written into.
    """

    def __init__(self) -> None:
        self._codes = np.zeros(SLOTS_FIRST, dtype=np.int32)
        self._used = 0
        self._values: list[Value] = []
        self._code_of: dict[Value, int] = {}
        self._columns: dict[Hashable, Column] = {}
        self._masks: dict[Hashable, Mask] = {}

    def put(self, slot: int, value: Value) -> None:
        if slot >= len(self._codes):
            self._codes = np.concatenate([self._codes, np.zeros(len(self._codes), dtype=np.int32)])
        code = self._code_of.setdefault(value, len(self._values))
        if code == len(self._values):
            self._values.append(value)
        if slot >= self._used or self._codes[slot] != code:
            self._columns.clear()
            self._masks.clear()
        self._codes[slot] = code
        self._used = max(self._used, slot + 1)
        if len(self._values) > 2 * self._used + VALUES_SPARE:
            self._forget_unused()

    def _forget_unused(self) -> None:
        """Keep the values that a slot has; each rule is asked for all that are kept."""
        kept, codes = np.unique(self._codes[: self._used], return_inverse=True)
        self._codes[: self._used] = codes
        self._values = [self._values[code] for code in kept]
        self._code_of = {value: code for code, value in enumerate(self._values)}

    def at(self, slot: int) -> Value:
        return self._values[int(self._codes[slot])]

    def map(self, key: Hashable, rule: Callable[[Value], float]) -> Column:
        found = self._columns.get(key)
        if found is None:
            if len(self._columns) >= REMEMBERED_MAX:
                self._columns.clear()
            found = np.array([rule(value) for value in self._values], dtype=np.float64)[self._codes[: self._used]]
            self._columns[key] = found
        return found

    def test(self, key: Hashable, rule: Callable[[Value], bool]) -> Mask:
        found = self._masks.get(key)
        if found is None:
            if len(self._masks) >= REMEMBERED_MAX:
                self._masks.clear()
            found = self._masks[key] = self.fresh(rule)
        return found

    def fresh(self, rule: Callable[[Value], bool]) -> Mask:
        """`test` of a rule that is asked once."""
        return np.array([rule(value) for value in self._values], dtype=np.bool_)[self._codes[: self._used]]


def any_of(blocked: Mapping[FilterCode, Mask], size: int) -> Mask:
    """Slots that at least one filter takes out."""
    mask = np.zeros(size, dtype=np.bool_)
    for each in blocked.values():
        mask |= each
    return mask


def provider_places(provider: Provider) -> tuple[str, ...]:
    """Regions a provider serves in canonical form, its own first."""
    others = {canonical_region(name) for name in provider.regions_served}
    home = canonical_region(provider.region)
    return (home, *sorted(others - {home}))
