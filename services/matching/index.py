"""The ranker's copy of the providers, kept up to date from the database."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import TypeVar

import asyncpg
from prometheus_client import Gauge, Histogram

from services.common.clock import Clock, today
from services.common.database import AWAY, Pool, transaction
from services.common.errors import SlowDown, TryAgain
from services.common.logs import get_logger
from services.common.metrics import watch_queue
from services.matching.domain import Assessment, Need
from services.matching.needs import quarter_of
from services.matching.providers import ProviderRecord
from services.matching.ranking import Ranker, Ranking
from services.matching.store import providers as store
from services.matching.store.providers import ChangedProvider
from services.matching.text import Embedder, Vector, stored, vector_of

log = get_logger(__name__)

T = TypeVar("T")

# A change made through another process shows here after this time at the latest, and the time to embed it.
POLL_INTERVAL_S = 0.25
RETRY_DELAY_S = 1.0
CHANGES_MAX = 500
# Ranking computes; two at a time leave the loop free to answer on a small machine.
THREADS = 2
# Rankings that may wait for a thread before new needs are asked to come later.
RANKS_WAITING_MAX = 200

# Providers that can be ranked, withdrawn and expired ones not counted.
providers_known = Gauge("smdih_matching_providers", "Providers in the index")
# 1 while the sentence model is missing and words alone rank: offers are worse than they could be.
degraded = Gauge("smdih_matching_degraded", "Whether words alone rank")
# Time to rank all providers for one need, without waiting for a thread.
rank_seconds = Histogram(
    "smdih_matching_rank_seconds",
    "Time to rank the providers for a need",
    buckets=(0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1),
)


class ProviderIndex:
    """Ranks the providers of the database, as they were at the last refresh."""

    def __init__(self, pool: Pool, ranker: Ranker, embedder: Embedder | None, *, clock: Clock) -> None:
        self._pool = pool
        self._ranker = ranker
        self._embedder = embedder
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="rank")
        self._refreshing = asyncio.Lock()
        self._loaded = asyncio.Event()
        self._clock = clock
        self._kicked = asyncio.Event()
        self._waiting = 0
        watch_queue("rankings", lambda: self._waiting, limit=RANKS_WAITING_MAX)
        degraded.set(embedder is None)
        self._quarter = date.min
        # Title and text that the ranker holds, by provider: what is unchanged needs no vector.
        self._texts: dict[str, tuple[str, str]] = {}
        # Number of the last change that is in the index.
        self.change = 0

    @property
    def version(self) -> str:
        """Of whatever decides about an order, beside the providers: weights and model."""
        return f"{self._ranker.weights_version}/{self._ranker.model_id}"

    @property
    def model_id(self) -> str:
        """Of the vectors in use."""
        return self._ranker.model_id

    @property
    def waiting(self) -> int:
        """Rankings asked for and not yet answered."""
        return self._waiting

    def __len__(self) -> int:
        return len(self._ranker)

    async def is_loaded(self) -> bool:
        """Readiness: every provider that stood in the database at the start can be ranked."""
        return self._loaded.is_set()

    async def wait_loaded(self) -> None:
        await self._loaded.wait()

    async def check_takes_rankings(self) -> None:
        """Raise TryAgain while the providers are not read, SlowDown while too many rankings wait."""
        if not self._loaded.is_set():
            raise TryAgain(
                "The hub has just started and still reads its providers.", reason="STARTING", retry_after_s=2
            )
        if self._waiting >= RANKS_WAITING_MAX:
            raise SlowDown("Too many needs wait to be ranked; send again in a moment.", retry_after_s=1)

    async def rank(self, need: Need, limit: int, *, question: Vector | None = None) -> Ranking:
        """The best providers for the need; see Ranker.rank. The loop goes on meanwhile."""
        self._waiting += 1
        try:
            return await self._in_thread(lambda: self._timed(need, limit, question))
        finally:
            self._waiting -= 1

    async def rank_assessors(self, asked: Assessment, limit: int) -> Ranking:
        """The best assessors for an application; see Ranker.rank_assessors."""
        self._waiting += 1
        try:
            return await self._in_thread(lambda: self._ranker.rank_assessors(asked, limit))
        finally:
            self._waiting -= 1

    async def compute(self, work: Callable[[Ranker], T]) -> T:
        """Let something be computed with the ranker, in a thread; the loop goes on meanwhile."""
        return await self._in_thread(lambda: work(self._ranker))

    def kick(self) -> None:
        """Look now rather than at the next poll."""
        self._kicked.set()

    async def refresh(self) -> None:
        """Take in every change of providers that is committed by now. Raises TryAgain when the database is away."""
        async with self._refreshing:
            quarter = quarter_of(today(self._clock))
            if quarter != self._quarter:
                # All places are free again: every provider is read anew, its vector kept.
                self._quarter, self.change = quarter, 0
            while await self._refresh_some() == CHANGES_MAX:
                pass
            self._loaded.set()

    async def _refresh_some(self) -> int:
        model = self._ranker.model_id
        async with transaction(self._pool) as connection:
            changed = await store.changed_providers(
                connection, after=self.change, quarter=self._quarter, vector_model=model, limit=CHANGES_MAX
            )
        if not changed:
            return 0
        computed = await self._in_thread(lambda: self._take_in(changed))
        if computed:
            async with transaction(self._pool) as connection:
                await store.keep_vectors(connection, computed, vector_model=model)
        self.change = changed[-1].provider.change
        providers_known.set(len(self._ranker))
        log.info("providers taken in", changed=len(changed), change=self.change, providers=len(self._ranker))
        return len(changed)

    async def run(self) -> None:
        """Follow the changes until cancelled."""
        while True:
            self._kicked.clear()
            try:
                await self.refresh()
            except (*AWAY, asyncpg.PostgresError, TryAgain) as error:
                log.warning("providers cannot be read now", error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_INTERVAL_S):
                    await self._kicked.wait()

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def _timed(self, need: Need, limit: int, question: Vector | None) -> Ranking:
        started = time.perf_counter()
        ranking = self._ranker.rank(need, limit, question=question)
        rank_seconds.observe(time.perf_counter() - started)
        return ranking

    def _take_in(self, changed: list[ChangedProvider]) -> list[tuple[ProviderRecord, bytes]]:
        """Put the changes into the ranker; returns the vectors that had to be computed."""
        computed: list[tuple[ProviderRecord, bytes]] = []
        for each in changed:
            provider = each.provider
            if not provider.active:
                self._ranker.remove(provider.id)
                self._texts.pop(provider.id, None)
                continue
            ranked, text = provider.for_ranking(), (provider.title, provider.text)
            vector = None
            if self._texts.get(provider.id) != text and each.vector is not None:
                vector = vector_of(each.vector)
            elif self._texts.get(provider.id) != text and self._embedder is not None:
                vector = self._embedder.embed([ranked.profile])[0]
                computed.append((provider, stored(vector)))
            self._ranker.upsert(ranked, vector)
            self._texts[provider.id] = text
        return computed
