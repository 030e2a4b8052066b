"""The processes of the fund: `python -m services.funding.main api`, and the checks `trial-balance` and `replay`."""

import functools
import sys

from pydantic import Field

from services.common import topics
from services.common.clock import SystemClock
from services.common.database import Pool, can_write, create_pool, create_pool_when_it_answers
from services.common.directory import Directory
from services.common.entrance import open_entrance
from services.common.evidence import Verifier
from services.common.kafka import Cluster, PositionedConsumer, Publisher
from services.common.metrics import keep_measuring
from services.common.outbox import OutboxRelay
from services.common.runtime import Runtime, run, run_once
from services.common.settings import Settings
from services.funding import edges, ledger, ledger_replay
from services.funding.assessor_finder import AssessorFinder
from services.funding.balances import watch
from services.funding.gauges import INTERVAL_S as GAUGES_INTERVAL_S
from services.funding.gauges import ProgressGauges
from services.funding.journal import Journal
from services.funding.parameters import load_parameters
from services.funding.rules.exact import gbp
from services.funding.stream import MatchKeeper
from services.funding.use_cases import UseCases

SCHEMA = "funding"
USAGE = "usage: python -m services.funding.main api|trial-balance|replay"


class FundingSettings(Settings):
    evidence_public_keys: str = Field(
        "", description="base64, with blanks between; evidence signed with others is refused"
    )
    matching_grpc: str = Field(
        "", description="host:port of the matching service's gRPC; without it nobody is proposed"
    )


async def start_api(runtime: Runtime, settings: FundingSettings) -> None:
    """The fund by gRPC and HTTP; takes matches in and sends awards out."""
    entrance = open_entrance(runtime, settings, takes_keys=True)
    clock = SystemClock()
    cluster = Cluster.of(settings)
    pool = await create_pool_when_it_answers(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    publisher = await runtime.enter(Publisher(cluster))
    directory = Directory(cluster, clock=clock, kinds=("firm", "partner", "machine"))
    runtime.background("directory", directory.run())
    relay = OutboxRelay(pool, publisher, schema=SCHEMA)
    runtime.background("outbox", relay.run())
    journal = Journal(pool, clock)
    runtime.on_stop(journal.close)
    finder = AssessorFinder(entrance.peer(settings.matching_grpc))
    runtime.on_stop(finder.close)
    fund = UseCases(
        pool,
        journal=journal,
        table=load_parameters(),
        directory=directory,
        verifier=Verifier(settings.evidence_public_keys.split()),
        finder=finder,
        clock=clock,
        kick=relay.kick,
    )
    await fund.calls.open_programme()
    matches = PositionedConsumer(
        cluster,
        pool,
        publisher,
        topic_names=[topics.OFFERS],
        group="smdih.funding.matches",
        handler=MatchKeeper(clock).keep,
    )
    runtime.background("matches", matches.run())
    runtime.background("watch", watch(fund.balances))
    runtime.background("gauges", keep_measuring(ProgressGauges(pool).measure, interval_s=GAUGES_INTERVAL_S))
    await entrance.serve(
        "SMDIH fund",
        directory=directory,
        pool=pool,
        servicers=edges.servicers(fund),
        routers=edges.routers(fund),
        open_routers=edges.open_routers(fund),
    )
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("database", functools.partial(can_write, pool))
    runtime.ready_when("directory", directory.is_caught_up)
    runtime.alive_when("matches", matches.is_turning)


async def trial_balance(pool: Pool) -> int:
    """Print every account; 0 when the ledger is in order, else 1."""
    async with pool.acquire() as connection:
        trial = await ledger.trial_balance(connection)
    for account in trial.accounts:
        wrong = "" if account.agrees else "  DIFFERS FROM ITS TRANSFERS"
        _say(f"{account.call_id}  {account.kind:<24} {gbp(account.balance_pence):>24}{wrong}")
    _say(f"total {trial.total_pence} pence, {trial.events} events, head {trial.head_hash}")
    return 0 if trial.in_order else 1


async def replay_all(pool: Pool) -> int:
    """Rebuild hashes and balances from the rows and print what differs; 0 when nothing does, else 1."""
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        read = await ledger_replay.replay(connection)
    for fault in read.faults:
        _say(fault)
    _say(f"{len(read.faults)} faults in {read.events} events, {read.transfers} transfers, head {read.head_hash}")
    return 1 if read.faults else 0


CHECKS = {"trial-balance": trial_balance, "replay": replay_all}


async def check(name: str, settings: Settings) -> int:
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=1)
    try:
        return await CHECKS[name](pool)
    finally:
        await pool.close()


def _say(line: str) -> None:
    print(line)  # noqa: T201  a command line


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in ("api", *CHECKS):
        print(USAGE, file=sys.stderr)  # noqa: T201  a command line
        sys.exit(2)
    settings = FundingSettings()
    if arguments[0] in CHECKS:
        sys.exit(run_once(f"funding-{arguments[0]}", settings, check(arguments[0], settings)))
    run("funding-api", settings, functools.partial(start_api, settings=settings))


if __name__ == "__main__":
    main(sys.argv[1:])
