"""What the processes of a round under fire share: a plan of batches that can be made again from its seed, work that is tried
again, and how they tell of it.

Such a process prints a JSON line after each group of batches that was done. Killed and started again with the first batch
that it has not told of, it repeats what may have been committed already.
"""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg

from services.common.database import AWAY
from services.common.errors import TryAgain

WORKERS = 3
BATCHES_AT_ONCE = 4
# A batch is tried again so often before the round counts as broken.
ATTEMPTS_MAX = 100
REPEATED = 0.1


@dataclass(frozen=True)
class Batch:
    kind: str
    # What it is about; of a change "what=new number".
    ids: tuple[str, ...]


def plan(
    seed: int,
    worker: int,
    operations: int,
    *,
    size: int,
    weights: Mapping[str, int],
    change: str,
    changes: Callable[[random.Random], tuple[str, ...]],
) -> list[Batch]:
    """What a worker does in a round. All workers share one set of ids, so the same one is worked on from several sides.

    `weights` says how often each kind of batch comes; the kind `change` is about what `changes` makes, every other about
    `size` of the newest ids.
    """
    rng = random.Random(f"{seed}/{worker}")
    ids = [f"{seed}-{number}" for number in range(operations * WORKERS // 3)]
    batches: list[Batch] = []
    while sum(len(batch.ids) for batch in batches) < operations:
        if batches and rng.random() < REPEATED:
            batches.append(rng.choice(batches))  # word for word
            continue
        kind = rng.choices(list(weights), list(weights.values()))[0]
        if kind == change:
            batches.append(Batch(kind, changes(rng)))
            continue
        reach = min(len(ids), (len(batches) + 2) * size * WORKERS // 2)
        low = max(0, reach - 20 * size)
        batches.append(Batch(kind, tuple(rng.sample(ids[low:reach], min(size, reach - low)))))
    return batches


async def tried(work: Callable[[], Awaitable[Any]]) -> tuple[Any, int]:
    """The answer, and how often it was tried: a connection that dies in COMMIT leaves the outcome open, so it is repeated."""
    for attempt in range(1, ATTEMPTS_MAX + 1):
        try:
            return await work(), attempt
        except (*AWAY, TryAgain, asyncpg.DeadlockDetectedError):
            await asyncio.sleep(0.05 * min(attempt, 20))
    raise TimeoutError(f"not done in {ATTEMPTS_MAX} attempts")


async def tell_batches(first: int, works: Sequence[Callable[[], Awaitable[Any]]]) -> None:
    """Do them from the first on, BATCHES_AT_ONCE at a time, and tell of them once they are done."""
    for start in range(first, len(works), BATCHES_AT_ONCE):
        answers = await asyncio.gather(*(tried(work) for work in works[start : start + BATCHES_AT_ONCE]))
        told = [
            {"batch": start + number, "answer": answer, "attempts": attempts}
            for number, (answer, attempts) in enumerate(answers)
        ]
        print(json.dumps(told), flush=True)
