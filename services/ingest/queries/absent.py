"""Signals of which nothing is stored far back: most were registered and never sent. To look for what is nowhere takes longest."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

# What was not found is not looked for again so long, except in the newest frames.
ABSENT_S = 60.0
# Channel groups; more are forgotten together.
GROUPS_MAX = 10_000


@dataclass(frozen=True)
class _Entry:
    until_s: float
    places: Collection[int]


class Absent:
    """By channel group (machine, first position), for a while."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._entries: dict[tuple[int, int], _Entry] = {}

    def of(self, group: tuple[int, int]) -> list[int]:
        """Places of signals that need not be looked for."""
        entry = self._entries.get(group)
        return list(entry.places) if entry is not None and self._monotonic_s() < entry.until_s else []

    def note(self, group: tuple[int, int], places: Collection[int]) -> None:
        """These were not found now. They are all looked for again once the first of them has been left out for ABSENT_S."""
        now_s = self._monotonic_s()
        entry = self._entries.get(group)
        until_s = entry.until_s if entry is not None and now_s < entry.until_s else now_s + ABSENT_S
        if entry is None and len(self._entries) >= GROUPS_MAX:
            self._entries.clear()
        self._entries[group] = _Entry(until_s, places)
