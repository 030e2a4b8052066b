"""Places under fire: reserved, confirmed, cancelled and expired at once, while capacities change and workers, connections and the
database die.

A round is more than 50,000 operations by three processes over one set of ids, through the production store; twenty rounds are
a million. Nothing may ever be promised twice or beyond capacity, nothing that was acknowledged may be lost.
"""

import asyncio
import contextlib
import functools
import json
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import asyncpg

from chaos.places_worker import BATCHES_AT_ONCE, CAPACITY_MAX, PROVIDERS, WORKERS, Batch, plan, provider_id
from chaos.stage import Outcome, Round, Scenario, Stage
from services.common.settings import Settings
from services.matching.store import places as places_store
from services.migrate import migrate_all

OPERATIONS = 56_000
ROUND_DEADLINE_S = 900.0
FAULT_PAUSE_S = (0.2, 1.5)
SCHEMA = "matching"


@dataclass
class Worker:
    """A worker process, started again with what it has not told of."""

    # The module and what it is called with, but for the first batch.
    command: Sequence[str]
    batches: Sequence[Batch]
    answers: dict[int, Any] = field(default_factory=dict)
    restarts: int = -1
    repeats: int = 0
    process: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        try:
            while len(self.answers) < len(self.batches):
                self.restarts += 1
                await self._work()
        finally:
            self.kill()

    async def _work(self) -> None:
        # Whole groups are told together.
        first = len(self.answers) // BATCHES_AT_ONCE * BATCHES_AT_ONCE
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", *self.command, str(first)),
            stdout=asyncio.subprocess.PIPE,
            limit=16 * 1024 * 1024,
        )
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            with contextlib.suppress(json.JSONDecodeError):  # cut off by a kill
                for told in json.loads(line):
                    self.answers[told["batch"]] = told["answer"]
                    self.repeats += told["attempts"] - 1
        if await self.process.wait() > 0:
            raise RuntimeError(f"{self.command[0]} failed")

    def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()


Fault = Callable[[Stage, list[Worker], random.Random], Awaitable[None]]


async def kill_worker(_: Stage, workers: list[Worker], rng: random.Random) -> None:
    rng.choice(workers).kill()


async def cut_connections(stage: Stage, _: list[Worker], rng: random.Random) -> None:
    async with connected(stage.servers.database_dsn) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'smdih-matching' "
            "AND pid <> pg_backend_pid() AND random() < 0.5"
        )


async def kill_database(stage: Stage, _: list[Worker], rng: random.Random) -> None:
    stage.local.kill_postgres()
    await asyncio.sleep(rng.uniform(0.1, 1))
    await stage.local.restart_postgres()


# Workers and connections die several times a round, the database once.
FAULTS: tuple[Fault, ...] = (kill_worker, cut_connections, kill_worker, cut_connections, kill_worker)


@asynccontextmanager
async def connected(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(dsn, server_settings={"search_path": f"{SCHEMA},public"})
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def places(stage: Stage) -> AsyncIterator[Round]:
    settings = Settings(
        kafka_bootstrap=stage.servers.kafka_bootstrap,
        kafka_topic_prefix="places.",
        database_dsn=stage.servers.database_dsn,
    )
    await migrate_all(settings)
    async with connected(settings.database_dsn) as connection:
        await _put_providers(connection)
    played = 0

    async def play(rng: random.Random) -> Outcome:
        nonlocal played
        played += 1
        # Fresh quarters for each round.
        quarter = date(2000 + played // 4, 1 + 3 * (played % 4), 1)
        return await _play(stage, rng, quarter)

    yield play


async def _put_providers(connection: "asyncpg.Connection[asyncpg.Record]") -> None:
    """Straight into the table: the round is about their places."""
    rng = random.Random(1)
    first: int = await connection.fetchval(
        "UPDATE provider_change SET number = number + $1 RETURNING number - $1 + 1", PROVIDERS
    )
    await connection.executemany(
        "INSERT INTO provider (id, kind, partner_id, title, text, region, region_bound, regions_served, sic_divisions, "
        "sic_excluded, sizes_served, skills, capacity_per_quarter, lead_days, conflict_firm_ids, active, change, changed) "
        "VALUES ($1, 'expert', 1, $1, $1, '', false, '{}', '{}', '{}', '{}', '{}', $2, 0, '{}', true, $3, now()) "
        "ON CONFLICT (id) DO NOTHING",
        [(provider_id(number), rng.randint(1, CAPACITY_MAX), first + number) for number in range(PROVIDERS)],
    )


async def _play(stage: Stage, rng: random.Random, quarter: date) -> Outcome:
    seed = rng.randrange(2**31)
    share = OPERATIONS // WORKERS + 1
    workers = [
        Worker(
            (
                "chaos.places_worker",
                *(stage.servers.database_dsn, str(seed), str(number), str(share), quarter.isoformat()),
            ),
            plan(seed, number, share),
        )
        for number in range(WORKERS)
    ]
    faults, most = await under_fire(stage, workers, rng, functools.partial(_over_committed, stage, quarter))
    return await _judged(stage, seed, quarter, workers, faults, most)


async def under_fire(
    stage: Stage, workers: list[Worker], rng: random.Random, look: Callable[[], Awaitable[int]]
) -> tuple[list[str], int]:
    """Let them work while things die. Returns what died, and the most that a look found meanwhile."""
    faults: list[str] = []
    most = 0
    async with asyncio.timeout(ROUND_DEADLINE_S), asyncio.TaskGroup() as group:
        running = [group.create_task(worker.run()) for worker in workers]
        database_at = rng.randrange(2, 6)
        while not all(task.done() for task in running):
            await asyncio.sleep(rng.uniform(*FAULT_PAUSE_S))
            fault: Fault = kill_database if len(faults) == database_at else rng.choice(FAULTS)
            faults.append(fault.__name__)
            await fault(stage, workers, rng)
            most = max(most, await look())
    return faults, most


async def _over_committed(stage: Stage, quarter: date) -> int:
    """Places promised beyond capacity at this moment, counted place by place."""
    async with connected(stage.servers.database_dsn) as connection:
        found: int = await connection.fetchval(
            "SELECT coalesce(sum(greatest(held - capacity, 0)), 0)::int FROM (SELECT p.provider_id, count(*) AS held "
            "FROM place p WHERE p.quarter = $1 AND p.state <> 'released' GROUP BY p.provider_id) h "
            "JOIN provider_quarter q ON (q.provider_id, q.quarter) = (h.provider_id, $1)",
            quarter,
        )
    return found


async def _judged(
    stage: Stage, seed: int, quarter: date, workers: list[Worker], faults: list[str], most: int
) -> Outcome:
    held: set[str] = set()
    confirmed: set[str] = set()
    given_back: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    full = 0
    for worker in workers:
        for number, batch in enumerate(worker.batches):
            answer = worker.answers[number]
            kinds[batch.kind] += len(answer) if batch.kind == "expire" else len(batch.ids)
            if batch.kind == "reserve":
                full += sum(what == "full" for what in answer.values())
                held |= {place_id for place_id, what in answer.items() if what in ("held", "released")}
            elif batch.kind == "confirm":
                confirmed |= set(answer)
            elif batch.kind in ("cancel", "expire"):
                given_back.update(answer)
    async with connected(stage.servers.database_dsn) as connection:
        # What was left over from an earlier round may expire in this one.
        rows = await connection.fetch(
            "SELECT id, state, why FROM place WHERE quarter = $1 OR id = ANY($2::text[])", quarter, list(given_back)
        )
        wrong = await places_store.mismatches(connection)
        # Above what its provider takes now a quarter has what was promised, and no place more.
        too_many: int = await connection.fetchval(
            "SELECT count(*) FROM provider_quarter q JOIN provider p ON p.id = q.provider_id WHERE q.quarter = $1 "
            "AND q.capacity <> greatest(p.capacity_per_quarter, q.taken)",
            quarter,
        )
    states = {row["id"]: (row["state"], row["why"]) for row in rows}
    lost = {
        "held": [each for each in held if each not in states],
        "confirmed": [
            each for each in confirmed if states.get(each) not in (("confirmed", ""), ("released", "cancelled"))
        ],
        "given_back": [each for each in given_back if states.get(each, ("", ""))[0] != "released"],
    }
    outcome = Outcome(
        faults=faults,
        acknowledged=sum(kinds.values()),
        lost=sum(map(len, lost.values())),
        duplicated=sum(times - 1 for times in given_back.values()) + len(states.keys() - held - given_back.keys()),
        detail={
            "seed_of_plan": seed,
            "operations": dict(kinds),
            "lost": {kind: ids[:5] for kind, ids in lost.items() if ids},
            "refused_as_full": full,
            "places": len(states),
            "standing": sum(state != "released" for state, _ in states.values()),
            "restarts": sum(worker.restarts for worker in workers),
            "repeated_transactions": sum(worker.repeats for worker in workers),
            "over_committed": max(most, await _over_committed(stage, quarter)),
        },
    )
    if wrong:
        outcome.broken.append(f"{len(wrong)} quarters do not agree with their places, the first {wrong[0]}")
    if too_many:
        outcome.broken.append(f"{too_many} quarters have more places than their provider and what is promised")
    if outcome.detail["over_committed"]:
        outcome.broken.append("places were promised beyond capacity")
    return outcome


SCENARIOS = (Scenario("places", 20, places, deadline_s=ROUND_DEADLINE_S),)
