"""Two decisions at once, in two processes' worth of services, on what is enough for one: exactly one wins, every time."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

import asyncpg

from chaos.fund_database import database
from chaos.stage import Outcome, Round, Scenario, Stage
from services.common.clock import Clock, SystemClock, from_us
from services.common.database import Pool, create_pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, TryAgain
from services.common.identity import Caller, Role
from services.common.kafka import Cluster
from services.funding import call_store, ledger
from services.funding.applications import ApplicationService
from services.funding.calls import CallService
from services.funding.decisions import DecisionService
from services.funding.domain import Cost, CostCategory, Declaration, EarlierAssistance, Match, SizeFigures, uk_day
from services.funding.groups import GroupService
from services.funding.journal import Journal
from services.funding.judging import Judge
from services.funding.ledger_replay import replay
from services.funding.parameters import load_parameters
from services.funding.rules.assistance import AssistanceKind
from services.funding.rules.intensity import Category
from services.funding.rules.match import PledgeKind
from services.funding.rules.size import Definition
from smdih.directory.v1 import directory_pb2

ROUNDS = 20
RACES = 500
LANES = 6
TRIES_MAX = 200
CUT_EVERY_S = (0.2, 1.0)
GRANT, COST = 40_00, 100_00
# Together exactly the programme's ratio.
PLEDGE = COST - GRANT
MFA_LIMIT = 315_000_00
OPERATOR = Caller(1, Role.OPERATOR)
T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """The use cases as one process has them."""

    calls: CallService
    applications: ApplicationService
    decisions: DecisionService
    groups: GroupService

    @classmethod
    def on(cls, pool: Pool, directory: Directory, clock: Clock) -> "Process":
        table = load_parameters()
        judge = Judge(table=table, clock=clock)
        return cls(
            calls=CallService(pool, journal=Journal(pool, clock), table=table, clock=clock),
            applications=ApplicationService(pool, judge=judge, directory=directory, clock=clock),
            decisions=DecisionService(pool, judge=judge, table=table, clock=clock, kick=lambda: None),
            groups=GroupService(pool, table=table, directory=directory, clock=clock),
        )


async def again(ask: Callable[[], Awaitable[T]]) -> T:
    """The answer, asked for as often as the database was cut off."""
    for _ in range(TRIES_MAX):
        with suppress(TryAgain):
            return await ask()
        await asyncio.sleep(0.02)
    raise TimeoutError("the database did not come back")


class Races:
    """One lane after the other has races of its own; they share the database and the ledger's turn."""

    def __init__(self, pools: list[Pool], directory: Directory, outcome: Outcome) -> None:
        self._pools = pools
        self._clock = SystemClock()
        self._directory = directory
        self._processes = [Process.on(pool, directory, self._clock) for pool in pools]
        self._outcome = outcome
        self.won = 0
        self.refused: Counter[str] = Counter()

    async def open(self) -> None:
        await self._processes[0].calls.open_programme()

    async def lane(self, lane: int, races: int) -> None:
        calls = [await self._call(f"lane-{lane}-{number}") for number in range(2)]
        for number in range(races):
            firms = [1_000_000 * (lane + 1) + 2 * number + which for which in range(2)]
            for firm_id in firms:
                self._directory.firms[firm_id] = directory_pb2.Firm(id=firm_id, name=f"Firm {firm_id}", sic="25.62")
            name = f"{lane}-{number}"
            if number % 2:
                await self._headroom(name, calls, firms)
            else:
                await self._last_pound(name, calls[0], firms)

    async def _last_pound(self, name: str, call_id: str, firms: list[int]) -> None:
        """The call has money for one of two applications."""
        await self._give(call_id, name)
        waiting = [await self._application(f"{name}-{firm_id}", call_id, firm_id, ()) for firm_id in firms]
        await self._race(waiting, "BUDGET_EXHAUSTED")

    async def _headroom(self, name: str, calls: list[str], firms: list[int]) -> None:
        """Two firms of one group apply in two calls with money enough; the group may be given one of the two grants."""
        operators = self._processes[0].groups
        await again(lambda: operators.set_group(OPERATOR, f"group-{name}", firm_ids=firms, source="filing"))
        today = uk_day(from_us(self._clock.now_us()))
        earlier = EarlierAssistance(
            given_on=today.isoformat(), amount_pence=MFA_LIMIT - GRANT, kind=AssistanceKind.SPEI
        )
        waiting = []
        for call_id, firm_id in zip(calls, firms, strict=True):
            await self._give(call_id, f"{name}-{firm_id}")
            waiting.append(await self._application(f"{name}-{firm_id}", call_id, firm_id, (earlier,)))
        # What the loser leaves must not be there for the next race for a last pound.
        lost_in = calls[waiting.index(await self._race(waiting, "MFA_LIMIT"))]
        await self._give(lost_in, f"{name}-back", -GRANT)

    async def _race(self, waiting: list[str], reason: str) -> str:
        """Decide both at once; returns one that did not win."""
        answers = await asyncio.gather(
            *(self._decided(process, one) for process, one in zip(self._processes, waiting, strict=True))
        )
        self._outcome.acknowledged += 1
        winners = answers.count("")
        self.won += winners
        self._outcome.lost += winners == 0
        self._outcome.duplicated += max(0, winners - 1)
        self.refused.update(answer for answer in answers if answer)
        if winners == 1 and set(answers) != {"", reason}:
            self._outcome.broken.append(f"the loser was told {answers} in place of {reason}")
        loser = next((one for one, answer in zip(waiting, answers, strict=True) if answer), waiting[-1])
        decisions = self._processes[0].decisions
        await again(lambda: decisions.decide(OPERATOR, loser, award=False, reason="another was first"))
        return loser

    async def _decided(self, process: Process, application_id: str) -> str:
        """Empty for an award, else why not."""
        try:
            await again(lambda: process.decisions.decide(OPERATOR, application_id, award=True, reason="best"))
        except Conflict as refused:
            return refused.reason
        return ""

    async def _call(self, name: str) -> str:
        now_us = self._clock.now_us()
        calls = self._processes[0].calls
        call = await again(
            lambda: calls.create_call(
                OPERATOR,
                request_id=name,
                title=name,
                budget_pence=1,
                opens_us=now_us - 1_000_000,
                closes_us=now_us + 24 * 3600 * 1_000_000,
                category=Category.EXPERIMENTAL_DEVELOPMENT,
                size_definition=Definition.COMPANIES_ACT,
                rate_max="",
                in_kind_allowed=False,
            )
        )
        return call.id

    async def _give(self, call_id: str, name: str, pence: int = GRANT) -> None:
        calls = self._processes[0].calls
        await again(
            lambda: calls.move_budget(OPERATOR, call_id, request_id=name, change_pence=pence, reason="for the race")
        )

    async def _application(self, name: str, call_id: str, firm_id: int, earlier: tuple[EarlierAssistance, ...]) -> str:
        """One that only waits for the decision."""
        service = self._processes[firm_id % 2].applications
        match = Match(
            id=name,
            event_id=name,
            firm_id=firm_id,
            need_id=name,
            offer_id=name,
            provider_id="p",
            provider_title="Clinic",
            accepted_us=self._clock.now_us(),
            correlation_id=f"race-{name}",
        )
        size = SizeFigures(headcount="9", turnover_minor=1, balance_minor=1, period_start="2026-01-01")
        firm = Caller(2, Role.FIRM, firm_id=firm_id)

        async def matched() -> None:
            async with transaction(self._pools[0]) as connection:
                await call_store.add_match(connection, match)

        await again(matched)
        view = await again(
            lambda: service.create_application(
                firm,
                request_id=name,
                call_id=call_id,
                match_id=name,
                costs=(Cost(category=CostCategory.MATERIALS, amount_pence=COST),),
                declaration=Declaration(size=size, uk_registered=True, earlier_assistance=earlier),
                requested_pence=GRANT,
                other_public_pence=0,
            )
        )
        application_id = view.application.id
        pledge = await again(
            lambda: service.add_pledge(
                firm,
                application_id,
                request_id=name,
                co_investor="Northgate",
                kind=PledgeKind.CASH,
                public_body=False,
                amount_pence=PLEDGE,
            )
        )
        await again(lambda: service.confirm_pledge(OPERATOR, application_id, pledge.id, evidence="letter"))
        await again(lambda: service.submit(firm, application_id))
        return application_id


@asynccontextmanager
async def prepare(stage: Stage) -> AsyncIterator[Round]:
    async def play(chance: random.Random) -> Outcome:
        async with database(stage, "chaos_races") as dsn, AsyncExitStack() as stack:
            pools = []
            for _ in range(2):
                pool = await create_pool(dsn, schema="funding", size_max=LANES)
                stack.push_async_callback(pool.close)
                pools.append(pool)
            cluster = Cluster(stage.servers.kafka_bootstrap, "chaos_races.")
            directory = Directory(cluster, clock=SystemClock(), kinds=("firm",))
            return await _play(dsn, pools, directory, chance)

    yield play


async def _play(dsn: str, pools: list[Pool], directory: Directory, chance: random.Random) -> Outcome:
    outcome = Outcome()
    races = Races(pools, directory, outcome)
    await races.open()
    cutting = asyncio.create_task(_cut(dsn, chance, outcome))
    try:
        share = -(-RACES // LANES)
        await asyncio.gather(*(races.lane(lane, min(share, RACES - lane * share)) for lane in range(LANES)))
    finally:
        cutting.cancel()
        await asyncio.gather(cutting, return_exceptions=True)
    connection = await asyncpg.connect(dsn, server_settings={"search_path": "funding"})
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        awards = await connection.fetchval("SELECT count(*) FROM award")
        trial, read = await ledger.trial_balance(connection), await replay(connection)
    await connection.close()
    if awards != races.won:
        outcome.broken.append(f"{awards} awards are stored and {races.won} were told")
    if not trial.in_order:
        outcome.broken.append(f"the trial balance is {trial.total_pence} pence")
    outcome.broken += [f"replay: {fault}" for fault in read.faults]
    outcome.detail = {"awards": awards, "refused": dict(races.refused), "trial_balance_pence": trial.total_pence}
    return outcome


async def _cut(dsn: str, chance: random.Random, outcome: Outcome) -> None:
    """Now and then a connection is cut, whatever it is in the midst of."""
    admin = await asyncpg.connect(dsn)
    try:
        while True:
            await asyncio.sleep(chance.uniform(*CUT_EVERY_S))
            cut = await admin.fetchval(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'smdih-funding' "
                "AND datname = current_database() AND state <> 'idle' ORDER BY random() LIMIT 1"
            )
            if cut:
                outcome.faults.append("cut connection")
    finally:
        await admin.close()


SCENARIOS = (Scenario("races", ROUNDS, prepare),)
