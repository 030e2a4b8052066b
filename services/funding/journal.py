"""Group commit in front of the ledger: what arrives while one transaction runs becomes the next transaction.

The newest event is one row, so posts take turns, and a turn lasts as long as the disk takes to make it durable. Together they
share that turn: one call to the database, one flush, however many wait.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg
from prometheus_client import Histogram

from services.common.clock import Clock
from services.common.database import AWAY, CONNECT_TIMEOUT_S, RETRY_AFTER_S, Connection, Pool
from services.common.errors import Conflict, HubError, SlowDown, TryAgain
from services.common.logs import get_logger
from services.common.metrics import watch_queue
from services.common.tenancy import for_all_firms
from services.funding import award_store, ledger
from services.funding.award_store import Note
from services.funding.ledger import EVENTS_PER_POST_MAX, Entry, Event, Posted

log = get_logger(__name__)

EVENTS_WAITING_MAX = 10_000

# How many events share a transaction.
batch_events = Histogram(
    "smdih_funding_journal_batch_events", "Events written in one transaction", buckets=(1, 2, 4, 8, 16, 64, 256, 1000)
)


@dataclass(frozen=True, slots=True)
class _Asked:
    entry: Entry
    note: Note | None
    answer: asyncio.Future[Posted]


class Journal:
    """Posts single events for many callers at once.

    For events that need no other row in their transaction; what belongs to a change of an application or agreement is posted
    with that change. Each event is judged by itself, in the order of arrival: one that is refused does not touch the others.
    """

    def __init__(self, pool: Pool, clock: Clock, *, waiting_max: int = EVENTS_WAITING_MAX) -> None:
        self._pool = pool
        self._clock = clock
        self._waiting_max = waiting_max
        self._waiting: deque[_Asked] = deque()
        watch_queue("ledger", lambda: len(self._waiting), limit=waiting_max)
        self._draining: asyncio.Task[None] | None = None

    async def post(self, event: Event, note: Note | None = None) -> Posted:
        """Returns once the event is durable, with the note of it in the audit record. A repeat gets the first answer.

        Raises what `ledger.post` raises; SlowDown when too many wait; TryAgain when the database went away, which leaves the
        outcome open: send the same event again.
        """
        if len(self._waiting) >= self._waiting_max:
            raise SlowDown(f"{self._waiting_max} events wait for the ledger; send again.", retry_after_s=1)
        asked = _Asked(ledger.entered(event), note, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._draining is None or self._draining.done():
            with for_all_firms():  # it posts for everybody who waits, whoever came first
                self._draining = asyncio.create_task(self._drain(), name="journal")
        return await asked.answer

    async def close(self) -> None:
        """Wait until everything that was asked for is answered."""
        if self._draining is not None:
            await asyncio.wait([self._draining])

    async def _drain(self) -> None:
        batch: list[_Asked] = []
        try:
            while self._waiting:
                # One connection as long as there is work: giving it back costs a round trip.
                async with self._pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection:
                    while self._waiting:
                        batch = self._take()
                        await self._write(connection, batch)
                        # Whoever was answered just now, and asks again at once, comes into the next transaction.
                        await asyncio.sleep(0)
        except AWAY as error:
            log.warning("ledger waits for the database", error=repr(error))
            await self._pool.expire_connections()
            self._refuse(batch)
        except BaseException:
            self._refuse(batch)
            raise

    def _refuse(self, batch: Sequence[_Asked]) -> None:
        """Nobody is left waiting for an answer that will not come."""
        for asked in (*batch, *self._waiting):
            if not asked.answer.done():
                asked.answer.set_exception(
                    TryAgain("The database does not answer; send the same again.", retry_after_s=RETRY_AFTER_S)
                )
        self._waiting.clear()

    def _take(self) -> list[_Asked]:
        """The next batch; the same request id twice goes into two, so the second meets the first."""
        taken: dict[str, _Asked] = {}
        later: list[_Asked] = []
        while self._waiting and len(taken) < EVENTS_PER_POST_MAX:
            asked = self._waiting.popleft()
            if asked.answer.done():  # who asked has gone away
                continue
            if taken.setdefault(asked.entry.event.request_id, asked) is not asked:
                later.append(asked)
        self._waiting.extendleft(reversed(later))
        return list(taken.values())

    async def _write(self, connection: Connection, batch: Sequence[_Asked]) -> None:
        outcomes: Sequence[Posted | HubError]
        try:
            outcomes = await self._together(connection, batch)
        except (ledger.AlreadyMoved, asyncpg.PostgresError) as error:
            if isinstance(error, AWAY):
                raise
            if len(batch) > 1:
                # The database refused the whole for the sake of one: each by itself, so only that one is refused.
                for asked in batch:
                    await self._write(connection, [asked])
                return
            outcomes = [_refusal(error)]
        batch_events.observe(len(batch))
        for asked, outcome in zip(batch, outcomes, strict=True):
            if asked.answer.done():
                continue
            if isinstance(outcome, HubError):
                asked.answer.set_exception(outcome)
            else:
                asked.answer.set_result(outcome)

    async def _together(self, connection: Connection, batch: Sequence[_Asked]) -> list[Posted | HubError]:
        entries = [asked.entry for asked in batch]
        if not any(asked.note for asked in batch):
            return await ledger.write(connection, self._clock, entries)
        async with connection.transaction():
            outcomes = await ledger.write(connection, self._clock, entries)
            notes = [
                (asked.entry.event.credential_id, asked.note, asked.entry.correlation_id)
                for asked, outcome in zip(batch, outcomes, strict=True)
                if asked.note and isinstance(outcome, Posted) and not outcome.repeated
            ]
            await award_store.audit_all(connection, notes, now_us=self._clock.now_us())
            return outcomes


def _refusal(error: Exception) -> HubError:
    if isinstance(error, HubError):
        return error
    log.warning("event refused by the database", error=repr(error))
    if isinstance(error, asyncpg.TransactionRollbackError | asyncpg.QueryCanceledError):
        return TryAgain("The ledger was busy with something that excludes this; send again.", retry_after_s=1)
    return Conflict("The database refused the event; nothing was moved.", reason="EVENT_REFUSED")
