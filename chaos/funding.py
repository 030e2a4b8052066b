"""The fund's money: clients of the ledger and the database are killed amid random operations.

Nothing acknowledged may be missing or there twice, no penny may be lost or made, no account overdrawn.
"""

import asyncio
import random
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import asyncpg

from chaos import races
from chaos.fund_database import database
from chaos.ledger_client import BUDGET_PENCE, CALLS, call_name, operation
from chaos.stage import Outcome, Round, Scenario, Stage
from services.common.clock import SystemClock
from services.common.database import Pool, create_pool, transaction
from services.funding import call_store, ledger
from services.funding.domain import Call
from services.funding.ledger import PROGRAMME, Account, AccountKind, Event, Purpose, Transfer
from services.funding.ledger_replay import replay
from services.funding.rules.intensity import Category
from services.funding.rules.size import Definition

OPERATIONS = 50_000
ROUNDS = 20
CLIENTS = 2
# Asked of both clients, so that the same request comes from two processes at once.
SHARED_SHARE = 0.05
# Between two kills so many answers, not seconds: on a busy machine a client that is started again needs longer to get anywhere.
KILL_EVERY_ANSWERS = (1_000, 7_000)
# Of the kills, how many meet the database in place of a client.
DATABASE_SHARE = 0.1
ROUND_DEADLINE_S = 900
CLOCK = SystemClock()


# Random operations


@dataclass
class Answers:
    """What the clients were told, over all their lives."""

    posted: dict[int, tuple[int, str]] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    refused_once: set[int] = field(default_factory=set)
    repeats: int = 0
    count: int = 0
    broken: list[str] = field(default_factory=list)

    def take(self, line: str) -> int:
        """Returns the number of the operation that is answered."""
        number_, word, *rest = line.split()
        number = int(number_)
        self.count += 1
        if word == "refused":
            self.refused[rest[0]] += 1
            self.refused_once.add(number)
            return number
        place = (int(rest[0]), rest[1])
        if self.posted.setdefault(number, place) != place:
            self.broken.append(f"operation {number} was told two places: {self.posted[number]} and {place}")
        self.repeats += word == "repeated"
        return number


class ClientProcess:
    """A client that is started again with what is not answered yet, until all is."""

    def __init__(self, dsn: str, seed: int, numbers: list[int], answers: Answers) -> None:
        self._dsn = dsn
        self._seed = seed
        self._open = dict.fromkeys(numbers)
        self._answers = answers
        self._process: asyncio.subprocess.Process | None = None
        self.kills = 0

    def kill(self) -> None:
        """SIGKILL, at whatever point it is."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
                self.kills += 1

    async def run(self) -> None:
        try:
            while self._open:
                await self._live()
        finally:
            self.kill()

    async def _live(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "chaos.ledger_client", self._dsn, str(self._seed)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=2**20,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(ConnectionError):
            self._process.stdin.write("\n".join(map(str, self._open)).encode())
            await self._process.stdin.drain()
            self._process.stdin.close()
        async for line in self._process.stdout:
            self._open.pop(self._answers.take(line.decode()), None)
        if await self._process.wait() > 0:
            raise RuntimeError("a client of the ledger failed")


async def prepare_calls(pool: Pool) -> None:
    """Calls with a budget each, out of a source, so that all accounts together are zero."""
    async with transaction(pool) as connection:
        given = Transfer(
            debit=Account(PROGRAMME, AccountKind.PUBLIC_SOURCE),
            credit=Account(PROGRAMME, AccountKind.PROGRAMME_BUDGET),
            amount_pence=CALLS * BUDGET_PENCE,
            purpose=Purpose.PROGRAMME_GIVEN,
            subject_id="chaos",
        )
        events = [Event(request_id="given", kind="chaos", transfers=(given,), credential_id=1)]
        for number in range(CALLS):
            call = Call(
                id=call_name(number),
                title="Chaos",
                budget_pence=BUDGET_PENCE,
                opens_us=1_000_000_000_000_000,
                closes_us=2_000_000_000_000_000,
                category=Category.FEASIBILITY,
                size_definition=Definition.EU,
                rate_max="",
                in_kind_allowed=False,
                created_us=CLOCK.now_us(),
            )
            await call_store.add_call(connection, call, request_id=call.id, content_sha256=b"")
            await ledger.open_accounts(connection, call.id)
            allotted = Transfer(
                debit=Account(PROGRAMME, AccountKind.PROGRAMME_BUDGET),
                credit=Account(call.id, AccountKind.PUBLIC_BUDGET),
                amount_pence=BUDGET_PENCE,
                purpose=Purpose.BUDGET_ALLOTTED,
                subject_id=call.id,
            )
            events.append(Event(request_id=call.id, kind="chaos", transfers=(allotted,), credential_id=1))
        await ledger.post(connection, CLOCK, *events)


@asynccontextmanager
async def prepare_ledger(stage: Stage) -> AsyncIterator[Round]:
    async def play(chance: random.Random) -> Outcome:
        async with database(stage, "chaos_ledger") as dsn:
            return await play_ledger(stage, dsn, chance)

    yield play


async def play_ledger(stage: Stage, dsn: str, chance: random.Random) -> Outcome:
    pool = await create_pool(dsn, schema="funding", size_max=4)
    await prepare_calls(pool)
    seed, answers, outcome = chance.randrange(2**31), Answers(), Outcome()
    numbers = [[number for number in range(OPERATIONS) if number % CLIENTS == client] for client in range(CLIENTS)]
    for own in numbers:
        own.extend(chance.sample(range(OPERATIONS), int(OPERATIONS * SHARED_SHARE)))
        chance.shuffle(own)
    clients = [ClientProcess(dsn, seed, own, answers) for own in numbers]
    trials = Trials(dsn)
    watching = asyncio.create_task(trials.watch())
    killer = Killer(stage, clients, answers, chance, outcome.faults)
    try:
        async with asyncio.timeout(ROUND_DEADLINE_S):
            await killer.until(asyncio.ensure_future(_all(clients)))
    finally:
        await killer.stop()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        for client in clients:
            client.kill()
    await pool.expire_connections()
    await _judge(pool, seed, answers, outcome)
    outcome.broken += answers.broken + trials.broken
    outcome.detail |= {
        "operations": OPERATIONS,
        "refused": dict(answers.refused),
        "repeats": answers.repeats,
        "trial_balances_meanwhile": trials.taken,
    }
    await pool.close()
    return outcome


async def _all(clients: list[ClientProcess]) -> None:
    await asyncio.gather(*(client.run() for client in clients))


class Trials:
    """The trial balance, taken again and again while everything happens."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.taken = 0
        self.broken: list[str] = []

    async def watch(self) -> None:
        while True:
            with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                connection = await asyncpg.connect(self._dsn, server_settings={"search_path": "funding"})
                try:
                    trial = await ledger.trial_balance(connection)
                finally:
                    await connection.close()
                self.taken += 1
                if not trial.in_order:
                    self.broken.append(f"after {trial.events} events the trial balance was {trial.total_pence} pence")
            await asyncio.sleep(0.25)


class Killer:
    """Kills clients, and sometimes the database."""

    def __init__(
        self,
        stage: Stage,
        clients: list[ClientProcess],
        answers: Answers,
        chance: random.Random,
        faults: list[str],
    ) -> None:
        self._stage = stage
        self._clients = clients
        self._answers = answers
        self._chance = chance
        self._faults = faults
        self._crashing: asyncio.Task[None] | None = None
        self._running = asyncio.create_task(self._run())

    async def until(self, work: asyncio.Future[None]) -> None:
        """Wait for the work; raises what stopped it, or what stopped the killing."""
        await asyncio.wait([work, self._running], return_when=asyncio.FIRST_COMPLETED)
        if self._running.done():
            work.cancel()
            await self._running
        await work

    async def stop(self) -> None:
        """The database is there again afterwards."""
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)
        if self._crashing is not None:
            await self._crashing

    async def _run(self) -> None:
        while True:
            after = self._answers.count + self._chance.randint(*KILL_EVERY_ANSWERS)
            while self._answers.count < after:
                await asyncio.sleep(0.01)
            if self._chance.random() < DATABASE_SHARE:
                self._faults.append("kill database")
                self._crashing = asyncio.create_task(self._crash())
                await asyncio.shield(self._crashing)
            else:
                number = self._chance.randrange(CLIENTS)
                self._faults.append(f"kill client {number}")
                self._clients[number].kill()

    async def _crash(self) -> None:
        await asyncio.to_thread(self._stage.local.kill_postgres)
        await self._stage.local.restart_postgres()


async def _judge(pool: Pool, seed: int, answers: Answers, outcome: Outcome) -> None:
    """Everything that was acknowledged, counted again from the rows and from what each operation is by its number."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        rows = await connection.fetch(
            "SELECT request_id, sequence, hash FROM ledger_event WHERE request_id LIKE 'chaos:%'"
        )
        accounts = await connection.fetch("SELECT call_id, kind, balance_pence FROM ledger_account")
        trial, read = await ledger.trial_balance(connection), await replay(connection)
    stored = Counter(int(row["request_id"].partition(":")[2]) for row in rows)
    places = {int(row["request_id"].partition(":")[2]): (row["sequence"], row["hash"].hex()) for row in rows}
    expected: Counter[tuple[str, str]] = Counter()
    for number in range(CALLS):
        expected[call_name(number), AccountKind.PUBLIC_BUDGET] += BUDGET_PENCE
        expected[PROGRAMME, AccountKind.PUBLIC_SOURCE] -= BUDGET_PENCE
    for number, times in stored.items():
        for transfer in operation(seed, number).transfers:
            expected[transfer.debit.call_id, transfer.debit.kind] -= transfer.amount_pence * times
            expected[transfer.credit.call_id, transfer.credit.kind] += transfer.amount_pence * times
    held = {(row["call_id"], row["kind"]): row["balance_pence"] for row in accounts}
    sources = (AccountKind.PUBLIC_SOURCE, AccountKind.CO_INVESTMENT_SOURCE)
    differing = sum(abs(held.get(key, 0) - expected[key]) for key in expected.keys() | held.keys())
    overspent = sum(-pence for (_, kind), pence in held.items() if kind not in sources and pence < 0)
    outcome.acknowledged = len(answers.posted)
    outcome.lost = sum(places.get(number) != place for number, place in answers.posted.items())
    outcome.duplicated = sum(times - 1 for times in stored.values())
    # A client that was refused and asks again when there is money may be killed before it hears that it was posted.
    unasked = stored.keys() - answers.posted.keys() - answers.refused_once
    if unasked:
        outcome.broken.append(f"{len(unasked)} operations are stored that were never acknowledged")
    if differing or overspent or trial.total_pence or not trial.in_order:
        outcome.broken.append(
            f"{differing} pence differ, {overspent} are overspent, the trial balance is {trial.total_pence}"
        )
    outcome.broken += [f"replay: {fault}" for fault in read.faults]
    outcome.detail |= {
        "posted_unheard": len(stored.keys() - answers.posted.keys()),
        "pence_lost_or_created": differing,
        "pence_overspent": overspent,
        "trial_balance_pence": trial.total_pence,
        "replay_faults": len(read.faults),
        "events": read.events,
    }


SCENARIOS = (Scenario("ledger", ROUNDS, prepare_ledger, deadline_s=ROUND_DEADLINE_S), *races.SCENARIOS)
