"""What people do with alarms."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

import asyncpg

from services.anomaly.domain import (
    Alarm,
    Change,
    HistoryEntry,
)
from services.anomaly.store import Actor, AlarmFilter, AlarmStore
from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import Conflict, Invalid, NotFound, SlowDown, TryAgain
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.common.metrics import watch_queue
from smdih.anomaly.v1 import events_pb2 as events_pb

log = get_logger(__name__)

PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 1_000
COMMENT_CHARACTERS_MAX = 2_000
# Of an alarm's history in one answer; and past which people may add no more than the end of what they began.
CHANGES_PAGE = 200
CHANGES_MAX = 2_000
ASSIGNEE_CHARACTERS_MAX = 200
# Alarms acknowledged or cleared in one call, in one transaction.
BULK_MAX = 5_000
# In one process: in all, and with the keys of one firm.
WATCHERS_MAX = 200
WATCHERS_OF_A_FIRM_MAX = 10
# Changes that wait for one watcher; a watcher further behind is ended.
WATCHER_QUEUE_MAX = 1_000
# Changes of all firms that one who comes back may have missed.
RESUME_MAX = 100_000

_ALARM_ID = re.compile(r"[0-9a-f]{32}")
_RESUME_TOKEN = re.compile(r"\d{1,18}(\.\d{1,18}){0,1023}")
_PAGE_TOKEN = re.compile(r"(-?\d{1,18})\.([0-9a-f]{32})")


@dataclass(frozen=True)
class BulkOutcome:
    """What came of a change to many alarms."""

    changed: int  # the others were so before
    not_found: Sequence[str]


@asynccontextmanager
async def changing(pool: Pool) -> AsyncIterator[Connection]:
    """A transaction that locks alarms. Raises TryAgain also when the worker or another person changes the same ones."""
    try:
        async with transaction(pool) as connection:
            yield connection
    except asyncpg.DeadlockDetectedError as error:
        raise TryAgain("Somebody else changes the same alarms now; send again.", retry_after_s=1) from error


class AlarmService:
    """What people do with alarms."""

    def __init__(self, store: AlarmStore, pool: Pool, clock: Clock) -> None:
        self._store = store
        self._pool = pool
        self._clock = clock

    async def list(
        self, caller: Caller, asked: AlarmFilter, *, page_size: int, page_token: str
    ) -> tuple[Sequence[Alarm], str]:
        """A page and the token of the next one, empty after the last."""
        check_role(caller)
        firm_id = caller.firm_or(asked.firm_id or 0)
        if not 0 <= page_size <= PAGE_SIZE_MAX:
            raise Invalid(f"page_size is 1 to {PAGE_SIZE_MAX}, or 0 for {PAGE_SIZE_DEFAULT}.")
        for name, number in (("firm_id", asked.firm_id), ("machine_id", asked.machine_id)):
            if number is not None and not 0 < number < 2**63:
                raise Invalid(f"{name} is not an id; leave it out or give one from the registry.")
        if asked.since_us is not None:
            check_time(asked.since_us, "since_us")
        after = _after(page_token) if page_token else None
        limit = page_size or PAGE_SIZE_DEFAULT
        asked = replace(asked, firm_id=firm_id or None)
        async with transaction(self._pool) as connection:
            alarms = await self._store.list(connection, asked, after=after, limit=limit + 1)
        if len(alarms) <= limit:
            return alarms, ""
        last = alarms[limit - 1]
        return alarms[:limit], f"{last.started_us}.{last.id}"

    async def get(self, caller: Caller, alarm_id: str) -> Alarm:
        async with transaction(self._pool) as connection:
            return await self._seen(connection, caller, alarm_id)

    async def with_history(
        self, caller: Caller, alarm_id: str, *, page_token: str
    ) -> tuple[Alarm, Sequence[HistoryEntry], str]:
        """An alarm, the newest of its changes in order, and the token of those before; empty: there are none."""
        async with transaction(self._pool) as connection:
            alarm = await self._seen(connection, caller, alarm_id)
            if page_token and not _ALARM_ID.fullmatch(page_token):
                raise Invalid("page_token is not one from a page before.")
            history = await self._store.history(connection, alarm_id, before=page_token or None, limit=CHANGES_PAGE + 1)
        if len(history) <= CHANGES_PAGE:
            return alarm, history, ""
        return alarm, history[1:], history[1].event_id

    async def acknowledge(self, caller: Caller, alarm_id: str, *, comment: str) -> Alarm:
        check_text(comment, "comment")
        return await self._change(caller, alarm_id, Change.ACKNOWLEDGED, comment=comment)

    async def clear(self, caller: Caller, alarm_id: str, *, comment: str) -> Alarm:
        _check_clearing(comment)
        return await self._change(caller, alarm_id, Change.CLEARED, comment=comment)

    async def acknowledge_all(self, caller: Caller, alarm_ids: Sequence[str], *, comment: str) -> BulkOutcome:
        check_text(comment, "comment")
        return await self._change_all(caller, alarm_ids, Change.ACKNOWLEDGED, comment=comment)

    async def clear_all(self, caller: Caller, alarm_ids: Sequence[str], *, comment: str) -> BulkOutcome:
        _check_clearing(comment)
        return await self._change_all(caller, alarm_ids, Change.CLEARED, comment=comment)

    async def comment(self, caller: Caller, alarm_id: str, *, comment: str) -> Alarm:
        """Add a remark. One that is the key's last on this alarm is a repeat and changes nothing."""
        check_text(comment, "comment", needed=True)
        async with changing(self._pool) as connection:
            alarm = await self.locked(connection, caller, alarm_id)
            if await self._store.last_comment(connection, alarm_id, caller.credential_id) != comment:
                await self.check_room(connection, alarm_id)
                await self._store.record(
                    connection,
                    Change.COMMENTED,
                    [alarm],
                    now_us=self._clock.now_us(),
                    actor=actor_of(caller),
                    comment=comment,
                )
        return alarm

    async def assign(self, caller: Caller, alarm_id: str, *, assignee: str, comment: str) -> Alarm:
        """Say who takes care of it; an empty name: nobody any more."""
        check_text(comment, "comment")
        check_text(assignee, "assignee", characters_max=ASSIGNEE_CHARACTERS_MAX)
        assignee = assignee.strip()
        async with changing(self._pool) as connection:
            before = await self.locked(connection, caller, alarm_id)
            if before.assignee == assignee:
                return before
            await self.check_room(connection, alarm_id)
            alarm = replace(before, assignee=assignee)
            await self._store.change(
                connection,
                Change.ASSIGNED,
                [alarm],
                now_us=self._clock.now_us(),
                actor=actor_of(caller),
                comment=comment,
                detail=assignee,
            )
        return alarm

    async def locked(self, connection: Connection, caller: Caller, alarm_id: str) -> Alarm:
        """The alarm, nobody else's to change until the transaction ends. Raises NotFound unless the caller may see it."""
        check_role(caller)
        found = await self._store.locked(connection, [alarm_id]) if _ALARM_ID.fullmatch(alarm_id) else ()
        if not found:
            raise NotFound("There is no such alarm, or this key may not see it.")
        caller.check_sees_firm(found[0].firm_id)
        return found[0]

    async def check_room(self, connection: Connection, alarm_id: str) -> None:
        """Raises Conflict where the alarm's history is full. What happens to an alarm once, or ends something, is not asked."""
        if await self._store.change_count(connection, alarm_id, limit=CHANGES_MAX) >= CHANGES_MAX:
            raise Conflict(
                f"This alarm has {CHANGES_MAX:,} changes, which is all that it takes; clear it.",
                reason="TOO_MANY_CHANGES",
            )

    async def _change(self, caller: Caller, alarm_id: str, change: Change, *, comment: str) -> Alarm:
        async with changing(self._pool) as connection:
            before = await self.locked(connection, caller, alarm_id)
            alarm = before.after(change)
            if alarm != before:
                await self._store.change(
                    connection,
                    change,
                    [alarm],
                    now_us=self._clock.now_us(),
                    actor=actor_of(caller),
                    comment=comment,
                )
        return alarm

    async def _change_all(
        self, caller: Caller, alarm_ids: Sequence[str], change: Change, *, comment: str
    ) -> BulkOutcome:
        check_role(caller)
        if not 1 <= len(alarm_ids) <= BULK_MAX:
            raise Invalid(f"Name 1 to {BULK_MAX:,} alarms a call.")
        wanted = dict.fromkeys(alarm_ids)
        async with changing(self._pool) as connection:
            found = await self._store.locked(connection, [id_ for id_ in wanted if _ALARM_ID.fullmatch(id_)])
            seen = [alarm for alarm in found if caller.role is Role.OPERATOR or alarm.firm_id == caller.firm_id]
            changed = [after for alarm in seen if (after := alarm.after(change)) != alarm]
            if changed:
                await self._store.change(
                    connection,
                    change,
                    changed,
                    now_us=self._clock.now_us(),
                    actor=actor_of(caller),
                    comment=comment,
                )
        there = {alarm.id for alarm in seen}
        return BulkOutcome(len(changed), [id_ for id_ in wanted if id_ not in there])

    async def _seen(self, connection: Connection, caller: Caller, alarm_id: str) -> Alarm:
        check_role(caller)
        alarm = await self._store.get(connection, alarm_id) if _ALARM_ID.fullmatch(alarm_id) else None
        if alarm is None:
            raise NotFound("There is no such alarm, or this key may not see it.")
        caller.check_sees_firm(alarm.firm_id)
        return alarm


# Where a reader of changes stands: the next offset of each partition of the topic, in order.
Place = tuple[int, ...]
Heard = tuple[events_pb.AlarmEvent, str]


class Recall(Protocol):
    """Gives what was published before."""

    def between(self, start: Place, end: Place) -> AsyncIterator[tuple[events_pb.AlarmEvent, Place]]:
        """Changes from `start` to before `end`, each with the place behind it. Raises NotFound when they are not kept any more."""
        ...


class AlarmFeed:
    """Passes changes on to those who watch; what was missed comes from the topic itself."""

    def __init__(self, recall: Recall | None = None) -> None:
        self._recall = recall
        self._watchers: set[_Watcher] = set()
        watch_queue("alarm watchers", lambda: len(self._watchers), limit=WATCHERS_MAX)
        self._place: Place = ()

    def stand(self, place: Place) -> None:
        """Where the feed begins."""
        self._place = place

    def tell(self, event: events_pb.AlarmEvent, place: Place = ()) -> None:
        """Pass on a change; `place` is behind it."""
        self._place = place
        token = resume_token(place)
        for watcher in self._watchers:
            watcher.tell(event, token)

    def admit(self, caller: Caller, *, firm_id: int, token: str = "") -> tuple[int, Place]:
        """Whose alarms the caller may watch (0: all firms'), and from where. Raises Forbidden, Invalid, and SlowDown when too many
        watch already."""
        check_role(caller)
        firm_id = caller.firm_or(firm_id)
        if len(self._watchers) >= WATCHERS_MAX:
            raise SlowDown("Too many watch alarms here already; try again later.", retry_after_s=60)
        own = sum(watcher.credited_to == caller.firm_id for watcher in self._watchers)
        if caller.role is not Role.OPERATOR and own >= WATCHERS_OF_A_FIRM_MAX:
            raise SlowDown(
                f"A firm watches at most {WATCHERS_OF_A_FIRM_MAX} times here; end one first.",
                reason="LIMIT_WATCHERS",
                retry_after_s=60,
            )
        place = _place_of(token)
        if place and not self._place:
            raise TryAgain("This process has just started; watch again.", reason="STARTING", retry_after_s=1)
        if place and len(place) != len(self._place):
            raise Invalid("resume_token is not one from a watch before; list the alarms, then watch without it.")
        if place and sum(max(0, end - at) for at, end in zip(place, self._place, strict=True)) > RESUME_MAX:
            raise Conflict(
                "You are too far behind; list the alarms, then watch without resume_token.", reason="TOO_OLD"
            )
        return firm_id, place

    @contextmanager
    def watch(self, caller: Caller, *, firm_id: int, token: str = "") -> Iterator[AsyncIterator[Heard]]:
        """Changes from now on, or from behind the one that came with `token`; each with a token of its own.

        The iterator raises SlowDown when its reader is too far behind.
        """
        firm_id, place = self.admit(caller, firm_id=firm_id, token=token)
        watcher = _Watcher(firm_id, credited_to=None if caller.role is Role.OPERATOR else caller.firm_id)
        self._watchers.add(watcher)
        try:
            yield self._heard(watcher, firm_id, place, self._place) if place else watcher.events()
        finally:
            self._watchers.discard(watcher)

    async def _heard(self, watcher: "_Watcher", firm_id: int, start: Place, end: Place) -> AsyncIterator[Heard]:
        assert self._recall is not None
        # A place may be ahead of ours: another process of the service gave it.
        async for event, place in self._recall.between(start, tuple(map(max, start, end))):
            if firm_id in (0, event.alarm.firm_id):
                yield event, resume_token(place)
        async for heard in watcher.events():
            yield heard


class _Watcher:
    def __init__(self, firm_id: int, *, credited_to: int | None) -> None:
        self._firm_id = firm_id  # 0: all
        self.credited_to = credited_to  # whose place it takes; None: an operator's
        self._queue: asyncio.Queue[Heard] = asyncio.Queue(WATCHER_QUEUE_MAX)
        self._too_slow = False

    def tell(self, event: events_pb.AlarmEvent, token: str) -> None:
        if self._firm_id not in (0, event.alarm.firm_id) or self._too_slow:
            return
        try:
            self._queue.put_nowait((event, token))
        except asyncio.QueueFull:
            self._too_slow = True

    async def events(self) -> AsyncIterator[Heard]:
        while not (self._too_slow and self._queue.empty()):
            yield await self._queue.get()
        raise SlowDown("You read too slowly; watch again with your last resume_token.", reason="TOO_SLOW")


def resume_token(place: Place) -> str:
    return ".".join(str(offset) for offset in place)


def _place_of(token: str) -> Place:
    if not token:
        return ()
    if not _RESUME_TOKEN.fullmatch(token):
        raise Invalid("resume_token is not one from a watch before; list the alarms, then watch without it.")
    return tuple(int(part) for part in token.split("."))


def check_role(caller: Caller) -> None:
    caller.require(Role.FIRM, Role.OPERATOR)


def actor_of(caller: Caller) -> Actor:
    return Actor(name=caller.role, credential_id=caller.credential_id)


def check_text(text: str, name: str, *, needed: bool = False, characters_max: int = COMMENT_CHARACTERS_MAX) -> None:
    if needed and not text.strip():
        raise Invalid(f"Give a {name}; it goes into the alarm's history.", reason=f"{name.upper()}_MISSING")
    if len(text) > characters_max:
        raise Invalid(f"{name} has at most {characters_max:,} characters.")
    if "\0" in text:
        raise Invalid(f"{name} may not hold a zero character.")


def _check_clearing(comment: str) -> None:
    check_text(comment, "comment")
    if not comment.strip():
        raise Invalid("Say in the comment what was found and done.", reason="COMMENT_MISSING")


def check_time(time_us: int, name: str) -> None:
    try:
        from_us(time_us)
    except (OverflowError, ValueError) as error:
        raise Invalid(f"{name} is not a time: microseconds since 1970 UTC are expected.") from error


def _after(page_token: str) -> tuple[int, str]:
    match = _PAGE_TOKEN.fullmatch(page_token)
    if match is None:
        raise Invalid("page_token is not one from a page before.")
    check_time(int(match[1]), "page_token")
    return int(match[1]), match[2]
