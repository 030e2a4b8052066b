"""Which signals and times a caller may read: decided here and nowhere else."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from services.common.clock import from_us
from services.common.errors import Forbidden, NotFound
from services.common.identity import Caller, Role
from services.ingest.queries.store import SignalPlace


@dataclass(frozen=True)
class Grant:
    """Signals that their firm lends to somebody else, over [from_us, to_us)."""

    signal_ids: Collection[int]
    from_us: int
    to_us: int
    # Of the room that it comes from.
    room_id: str = ""


# What is lent to a caller now; asked again for every query, so that a grant that was taken back ends at once.
GrantSource: TypeAlias = Callable[[Caller], Iterable[Grant]]
# Told of a read through a room before it is answered: caller, room, signals, from, to.
ReadNote: TypeAlias = Callable[[Caller, str, Collection[int], int, int], Awaitable[None]]


class Access:
    """A firm reads its own signals, an operator all, and anybody what is lent to them by a source of grants."""

    def __init__(self, *sources: GrantSource, note: ReadNote | None = None) -> None:
        self._sources = sources
        self._note = note

    def owns(self, caller: Caller, firm_id: int) -> bool:
        """Whether the caller may read everything of the firm, of all times."""
        return caller.role is Role.OPERATOR or (caller.firm_id != 0 and caller.firm_id == firm_id)

    async def admit(self, caller: Caller, places: Sequence[SignalPlace], from_us: int, to_us: int) -> None:
        """`check`, and what is read through a room stands in its log before it is read. Raises TryAgain too."""
        used = self.check(caller, places, from_us, to_us)
        if self._note is not None:
            for room_id, signal_ids in used.items():
                await self._note(caller, room_id, signal_ids, from_us, to_us)

    def check(
        self, caller: Caller, places: Sequence[SignalPlace], from_us: int, to_us: int
    ) -> Mapping[str, Collection[int]]:
        """Raise NotFound for a signal that the caller knows nothing of, Forbidden for one that is not lent for all of the time.

        Returns the signals that are read through each room.
        """
        used: dict[str, list[int]] = defaultdict(list)
        lent = [place for place in places if not self.owns(caller, place.firm_id)]
        if not lent:
            return used
        grants = [grant for source in self._sources for grant in source(caller)]
        for place in lent:
            own = [grant for grant in grants if place.id in grant.signal_ids]
            if not own:
                raise NotFound(f"There is no signal {place.id}.")
            grant = next((grant for grant in own if grant.from_us <= from_us and to_us <= grant.to_us), None)
            if grant is None:
                windows = "; ".join(f"{_text(grant.from_us)} to {_text(grant.to_us)}" for grant in own)
                raise Forbidden(f"Signal {place.id} is lent to you for {windows}: ask within that.", reason="NOT_LENT")
            if grant.room_id:
                used[grant.room_id].append(place.id)
        return used


def _text(time_us: int) -> str:
    try:
        return from_us(time_us).isoformat(timespec="seconds")
    except OverflowError:
        return "the end of time"
