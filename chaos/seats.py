"""Seats under fire: dates booked, confirmed, cancelled, expired, made larger and smaller, while workers, connections and the
database die. A seat is never given twice, nothing that was acknowledged is lost, and no seat stands free while firms wait.
"""

import functools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chaos.batches import WORKERS
from chaos.seats_worker import OPERATOR, PROVIDER, SEATS_MAX, SESSIONS, firm_of, plan, session, sessions_by
from chaos.stage import Outcome, Round, Scenario, Stage
from chaos.workers import ROUND_DEADLINE_S, SCHEMA, Worker, connected, migrated, under_fire
from services.common.clock import SystemClock
from services.common.database import create_pool
from services.matching.store import sessions as sessions_store

OPERATIONS = 9_000


@asynccontextmanager
async def seats(stage: Stage) -> AsyncIterator[Round]:
    await migrated(stage)
    async with connected(stage) as connection:
        await connection.execute(
            "WITH next AS (UPDATE provider_change SET number = number + 1 RETURNING number) "
            "INSERT INTO provider (id, kind, partner_id, title, text, region, region_bound, regions_served, sic_divisions, "
            "sic_excluded, sizes_served, skills, capacity_per_quarter, lead_days, conflict_firm_ids, active, change, changed) "
            "SELECT $1, 'workshop', 1, $1, $1, '', false, '{}', '{}', '{}', '{}', '{}', 10, 0, '{}', true, number, now() "
            "FROM next ON CONFLICT (id) DO NOTHING",
            PROVIDER,
        )
    yield functools.partial(_play, stage)


async def _play(stage: Stage, rng: random.Random) -> Outcome:
    seed, dsn = rng.randrange(2**31), stage.servers.database_dsn
    share = OPERATIONS // WORKERS + 1
    pool = await create_pool(dsn, schema=SCHEMA, size_max=1)
    for number in range(SESSIONS):
        await sessions_by(pool, SystemClock()).put_session(OPERATOR, session(seed, number, rng.randint(1, SEATS_MAX)))
    await pool.close()
    workers = [
        Worker(("chaos.seats_worker", dsn, str(seed), str(number), str(share)), plan(seed, number, share))
        for number in range(WORKERS)
    ]
    faults, most = await under_fire(stage, workers, rng, functools.partial(_over_booked, stage))
    return await _judged(stage, seed, workers, faults, most)


async def _over_booked(stage: Stage) -> int:
    async with connected(stage) as connection:
        return len(await sessions_store.over_booked(connection))


async def _judged(stage: Stage, seed: int, workers: list[Worker], faults: list[str], most: int) -> Outcome:
    async with connected(stage) as connection:
        rows = await connection.fetch(
            "SELECT firm_id, request_id, state FROM booking WHERE session_id LIKE $1 || '-%'", str(seed)
        )
        idle: int = await connection.fetchval(
            "SELECT count(*) FROM session s WHERE s.id LIKE $1 || '-%' AND s.taken < s.seats AND EXISTS "
            "(SELECT FROM booking b WHERE b.session_id = s.id AND b.state = 'waiting')",
            str(seed),
        )
    states = {row["request_id"]: row["state"] for row in rows}
    # What may have become of a booking since it was answered so.
    later = {
        "confirmed": ("confirmed", "cancelled"),
        "cancelled": ("cancelled",),
        "expired": ("expired",),
        "offered": ("offered", "confirmed", "cancelled", "expired"),
        "waiting": ("waiting", "offered", "confirmed", "cancelled", "expired"),
    }
    answers: Counter[str] = Counter()
    lost: list[str] = []
    for worker in workers:
        for number, batch in enumerate(worker.batches):
            if batch.kind not in ("book", "confirm", "cancel"):
                continue
            for request_id, answer in worker.answers[number].items():
                answers[answer] += 1
                if answer in later and states.get(request_id) not in later[answer]:
                    lost.append(request_id)
    outcome = Outcome(
        faults=faults,
        acknowledged=sum(answers.values()) - answers["none"],
        lost=len(lost),
        duplicated=len(rows) - len({(firm_of(row["request_id"]), row["request_id"]) for row in rows}),
        detail={
            "seed_of_plan": seed,
            "answers": dict(answers),
            "lost": lost[:5],
            "bookings": dict(Counter(states.values())),
            "restarts": sum(worker.restarts for worker in workers),
            "repeated": sum(worker.repeats for worker in workers),
            "over_booked": max(most, await _over_booked(stage)),
        },
    )
    if outcome.detail["over_booked"]:
        outcome.broken.append("dates had more bookings than seats, or counted them wrongly")
    if idle:
        outcome.broken.append(f"{idle} dates had free seats while firms waited")
    return outcome


SCENARIOS = (Scenario("seats", 10, seats, deadline_s=ROUND_DEADLINE_S),)
