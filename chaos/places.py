"""Places under fire: reserved, confirmed, cancelled and expired at once, while capacities change and workers, connections and the
database die.

A round is more than 50,000 operations by three processes over one set of ids, through the production store; twenty rounds are
a million. Nothing may ever be promised twice or beyond capacity, nothing that was acknowledged may be lost.
"""

import functools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import date

import asyncpg

from chaos.batches import WORKERS
from chaos.places_worker import CAPACITY_MAX, PROVIDERS, plan, provider_id
from chaos.stage import Outcome, Round, Scenario, Stage
from chaos.workers import ROUND_DEADLINE_S, Worker, connected, migrated, under_fire
from services.matching.store import places as places_store

OPERATIONS = 56_000


@asynccontextmanager
async def places(stage: Stage) -> AsyncIterator[Round]:
    await migrated(stage)
    async with connected(stage) as connection:
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


async def _over_committed(stage: Stage, quarter: date) -> int:
    """Places promised beyond capacity at this moment, counted place by place."""
    async with connected(stage) as connection:
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
    async with connected(stage) as connection:
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
