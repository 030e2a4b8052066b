"""The fund's part of the bench: how many transfers the ledger makes durable, and how long a large call takes to be decided."""

import asyncio
import hashlib
import json
import random
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import asyncpg

from bench.report import tell
from localstack.servers import Servers
from services.common.clock import SystemClock
from services.common.database import Connection, create_pool, migrate, transaction
from services.funding import call_store, ledger, programme
from services.funding.allocation import Application, Call, Method, Quota, allocate, allocation_input
from services.funding.checker import check_allocation
from services.funding.domain import Call as FundCall
from services.funding.journal import Journal
from services.funding.ledger import PROGRAMME, Account, AccountKind, Event, Purpose, Transfer
from services.funding.ledger_replay import replay
from services.funding.rules.intensity import Category
from services.funding.rules.size import Definition

CLIENTS = 16
ROUNDS = 3
ROUND_S = 3.0
APPLICATIONS = 1_000
ALLOCATION_LIMIT_S = 2.0
CLOCK = SystemClock()
MIGRATIONS = Path(__file__).resolve().parents[1] / "services/funding/migrations"


async def run(servers: Servers) -> None:
    """Both rows, on a database of their own."""
    admin = await asyncpg.connect(servers.database_dsn)
    await admin.execute("DROP DATABASE IF EXISTS bench_funding WITH (FORCE)")
    await admin.execute("CREATE DATABASE bench_funding")
    dsn = servers.database_dsn.rpartition("/")[0] + "/bench_funding"
    try:
        await migrate(dsn, schema="funding", folder=MIGRATIONS)
        await ledger_transfers(dsn)
    finally:
        await admin.execute("DROP DATABASE bench_funding WITH (FORCE)")
        await admin.close()
    allocation_1000_s()


# The ledger


async def ledger_transfers(database_dsn: str) -> None:
    """Durable transfers a second, each an event of its own with its place in the line of hashes, by clients that each wait for one
    answer before they ask again; beside single-row commits by as many clients of the same program on the same database."""
    database = await asyncpg.connect(database_dsn)
    pool = await create_pool(database_dsn, schema="funding", size_max=CLIENTS)
    try:
        await database.execute("CREATE TABLE public.bench_row (id bigint PRIMARY KEY, pence bigint NOT NULL)")
        call_id = await _open_call(pool)
        journal, posted, commits, rates = Journal(pool, CLOCK), 0, 0, dict[str, list[float]](commits=[], transfers=[])
        connections = [await asyncpg.connect(database_dsn) for _ in range(CLIENTS)]
        statements = [await one.prepare("INSERT INTO public.bench_row VALUES ($1, 1)") for one in connections]

        def commit(client: int, number: int) -> Awaitable[Any]:
            return statements[client].fetch((number + 1) * CLIENTS + client)

        def post(client: int, number: int) -> Awaitable[Any]:
            return journal.post(_transfer(call_id, f"{number}-{client}"))

        # In turn, so that what else the machine does meets both.
        for _ in range(ROUNDS):
            done, seconds = await _closed_loop(commit, commits)
            commits, rates["commits"] = commits + done, [*rates["commits"], done / seconds]
            done, seconds = await _closed_loop(post, posted)
            posted, rates["transfers"] = posted + done, [*rates["transfers"], done / seconds]
        await asyncio.gather(*(one.close() for one in connections))
        async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            trial, read = await ledger.trial_balance(connection), await replay(connection)
            stored = await connection.fetchval("SELECT count(*) FROM ledger_transfer WHERE purpose = 'bench'")
        tell(
            "ledger_transfers",
            max(rates["transfers"]),
            "transfers/s",
            max(rates["commits"]),
            clients=CLIENTS,
            acknowledged=posted,
            stored=stored,
            trial_balance_pence=trial.total_pence,
            in_order=trial.in_order,
            replay_faults=len(read.faults),
            transfer_rounds=[round(rate) for rate in rates["transfers"]],
            commit_rounds=[round(rate) for rate in rates["commits"]],
        )
        await database.execute("DROP TABLE public.bench_row")
    finally:
        await pool.close()
        await database.close()


async def _closed_loop(ask: Callable[[int, int], Awaitable[Any]], before: int) -> tuple[int, float]:
    """How many answers the clients got together, and in how many seconds. `before` keeps the numbers of rounds apart."""
    began = time.monotonic()
    until, done = began + ROUND_S, 0

    async def client(name: int) -> None:
        nonlocal done
        number = before
        while time.monotonic() < until:
            await ask(name, number)
            number += 1
            done += 1

    await asyncio.gather(*(client(name) for name in range(CLIENTS)))
    return done, time.monotonic() - began


async def _open_call(pool: Any) -> str:
    pence = 100_000_000
    call = FundCall(
        id="bench-call",
        title="Bench",
        budget_pence=pence,
        opens_us=1_000_000_000_000_000,
        closes_us=2_000_000_000_000_000,
        category=Category.FEASIBILITY,
        size_definition=Definition.EU,
        rate_max="",
        in_kind_allowed=False,
        created_us=CLOCK.now_us(),
    )
    async with transaction(pool) as connection:
        await call_store.add_call(connection, call, request_id=call.id, content_sha256=b"")
        await ledger.open_accounts(connection, call.id)
        await _give_programme(connection, pence)
        await programme.allot(connection, CLOCK, call_id=call.id, budget_pence=pence, credential_id=0)
    return call.id


async def _give_programme(connection: Connection, pence: int) -> None:
    given = Transfer(
        debit=Account(PROGRAMME, AccountKind.PUBLIC_SOURCE),
        credit=Account(PROGRAMME, AccountKind.PROGRAMME_BUDGET),
        amount_pence=pence,
        purpose=Purpose.PROGRAMME_GIVEN,
        subject_id="bench",
    )
    event = Event(request_id="bench:given", kind="programme_given", transfers=(given,), credential_id=0)
    await ledger.post(connection, CLOCK, event)


def _transfer(call_id: str, name: str) -> Event:
    transfer = Transfer(
        debit=Account(call_id, AccountKind.PUBLIC_BUDGET),
        credit=Account(call_id, AccountKind.PUBLIC_COMMITTED),
        amount_pence=1,
        purpose="bench",
        subject_id=name,
    )
    return Event(request_id=f"bench:{name}", kind="bench", transfers=(transfer,), credential_id=0)


# Allocation


def allocation_1000_s() -> None:
    """A call with quotas decided to the proven optimum, again with the applications in another order, and checked by a program
    that shares no code with the solver."""
    declared, applications = large_call(APPLICATIONS)
    seconds, digests = [], set()
    for order in (applications, applications[::-1], applications):
        began = time.monotonic()
        certificate = allocate(declared, order, parameter_version="bench")
        seconds.append(time.monotonic() - began)
        digests.add(hashlib.sha256(json.dumps(certificate, sort_keys=True).encode()).hexdigest())
    began = time.monotonic()
    verdict = check_allocation(allocation_input(declared, applications), certificate)
    gap = Fraction(certificate["bound"]) - Fraction(certificate["objective"]["score_pence"])
    tell(
        "allocation_1000_s",
        sorted(seconds)[1],
        "s",
        ALLOCATION_LIMIT_S,
        runs=[round(one, 3) for one in seconds],
        gap=str(gap),
        identical_on_repeat=len(digests) == 1,
        checker_agrees=verdict.holds,
        checker_s=round(time.monotonic() - began, 3),
        checker_own_bound_gap=None if verdict.gap is None else float(verdict.gap),
        funded=len(certificate["chosen"]),
        left_pence=certificate["spend_p"]["left"],
    )


def large_call(count: int, seed: int = 20) -> tuple[Call, list[Application]]:
    """Requests to the penny of GBP 125m for GBP 20m, twelve regions with floors and ceilings, and two shares."""
    chance = random.Random(seed)
    regions = [f"region:{number:02d}" for number in range(12)]
    opening = datetime(2026, 3, 1, tzinfo=UTC)
    applications = []
    for number in range(count):
        assessors, quality = chance.choice([3, 4, 5]), chance.gauss(68, 12)
        scores = [max(0, min(100, round(chance.gauss(quality, 6)))) for _ in range(assessors)]
        pots = {chance.choice(regions), "size:" + chance.choice(["micro", "small", "medium"])}
        pots |= {"first-time"} if chance.random() < 0.5 else set()
        applications.append(
            Application(
                id=f"A{number:04d}",
                firm=f"F{number:04d}",
                request_p=chance.randint(500_000, 24_500_000),
                mean=Fraction(sum(scores), assessors),
                submitted_at=opening + timedelta(minutes=number),
                pots=frozenset(pots),
            )
        )
    budget_p = 2_000_000 * count
    quotas = [Quota(pot=pot, floor_p=budget_p // 20, ceiling_p=budget_p // 9) for pot in regions]
    quotas.append(Quota(pot="size:micro", share_min=Fraction("0.30")))
    quotas.append(Quota(pot="first-time", share_min=Fraction("0.45")))
    declared = Call(id="C1", budget_p=budget_p, threshold=Fraction(70), method=Method.PORTFOLIO, quotas=tuple(quotas))
    return declared, applications
