"""The process of matching: `python -m services.matching.main api`."""

import asyncio
import functools
import sys
from datetime import timedelta

from pydantic import Field

from services.common.clock import SystemClock, today
from services.common.database import can_write, create_pool
from services.common.directory import Directory
from services.common.entrance import open_entrance
from services.common.kafka import Cluster, Publisher
from services.common.metrics import keep_measuring
from services.common.outbox import OutboxRelay
from services.common.runtime import Runtime, run
from services.common.settings import Settings
from services.matching import edges, upkeep
from services.matching.gauges import INTERVAL_S as GAUGES_INTERVAL_S
from services.matching.gauges import LifeGauges
from services.matching.index import ProviderIndex
from services.matching.needs import Limits
from services.matching.ranking import Ranker
from services.matching.service import Matching
from services.matching.stream import alarm_consumer
from services.matching.text import Embedder

SCHEMA = "matching"
USAGE = "usage: python -m services.matching.main api"
# What other services call here, by the name in their certificate.
INTERNAL_CALLS = {"funding": ("/smdih.matching.v1.MatchingService/ProposeAssessors",)}


class MatchingSettings(Settings):
    matching_offers_max: int = Field(5, ge=1, le=50, description="offers made for a need")
    matching_offer_lifetime_s: int = Field(
        14 * 24 * 3600, ge=1, le=366 * 24 * 3600, description="an open offer lapses after it"
    )
    matching_episode_gap_s: int = Field(
        24 * 3600, ge=0, le=366 * 24 * 3600, description="alarms of a machine closer than this belong to one fault"
    )
    matching_engage_within_s: int = Field(
        180 * 24 * 3600, ge=60, le=1000 * 24 * 3600, description="a match that nobody engages in this time expires"
    )
    matching_need_lifetime_s: int = Field(
        180 * 24 * 3600, ge=60, le=1000 * 24 * 3600, description="a need that gets no offer for so long is closed"
    )
    matching_round_every_s: int = Field(
        24 * 3600, ge=0, le=366 * 24 * 3600, description="a round begins by itself so often while needs wait; 0: never"
    )
    matching_regional_head_start_s: int = Field(
        3 * 24 * 3600, ge=0, le=366 * 24 * 3600, description="for so long a need is shown to its region's partners only"
    )
    matching_scores_for_s: int = Field(
        30 * 24 * 3600, ge=60, le=366 * 24 * 3600, description="scores of a finished match may be changed for so long"
    )


async def start_api(runtime: Runtime, settings: MatchingSettings) -> None:
    """gRPC, HTTP, alarms into needs, the outbox and the upkeep."""
    entrance = open_entrance(runtime, settings, takes_keys=True)
    clock = SystemClock()
    cluster = Cluster.of(settings)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    publisher = await runtime.enter(Publisher(cluster))
    directory = Directory(cluster, clock=clock, kinds=("firm", "machine", "partner"))
    runtime.background("directory", directory.run())
    relay = OutboxRelay(pool, publisher, schema=SCHEMA)
    runtime.background("outbox", relay.run())
    # Reading the model's weights takes a moment of pure computing.
    embedder = await asyncio.to_thread(Embedder.installed)
    index = ProviderIndex(pool, Ranker(embedder, today=functools.partial(today, clock)), embedder, clock=clock)
    runtime.on_stop(index.close)
    limits = Limits(
        offers_max=settings.matching_offers_max,
        offer_lifetime=timedelta(seconds=settings.matching_offer_lifetime_s),
        episode_gap=timedelta(seconds=settings.matching_episode_gap_s),
        engage_within=timedelta(seconds=settings.matching_engage_within_s),
        scores_for=timedelta(seconds=settings.matching_scores_for_s),
        need_lifetime=timedelta(seconds=settings.matching_need_lifetime_s),
        round_every=timedelta(seconds=settings.matching_round_every_s),
        regional_head_start=timedelta(seconds=settings.matching_regional_head_start_s),
    )
    matching = Matching(pool, index, relay, directory, clock=clock, limits=limits)
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("database", functools.partial(can_write, pool))
    runtime.ready_when("directory", directory.is_caught_up)
    runtime.ready_when("providers", index.is_loaded)
    await entrance.serve(
        "SMDIH matching",
        directory=directory,
        pool=pool,
        servicers=edges.servicers(matching),
        routers=edges.routers(matching),
        internal_calls=INTERNAL_CALLS,
    )
    runtime.background("providers", index.run())
    runtime.background(
        "gauges",
        keep_measuring(
            LifeGauges(pool, clock, need_lifetime=limits.need_lifetime).measure, interval_s=GAUGES_INTERVAL_S
        ),
    )

    async def alarms_into_needs() -> None:
        # Profiles of firms and providers first, so that the first needs are as good as the later ones.
        await directory.wait_caught_up()
        await index.wait_loaded()
        consumer = alarm_consumer(cluster, pool, publisher, matching)
        runtime.alive_when("alarms", consumer.is_turning)
        await consumer.run()

    async def keep_up() -> None:
        await index.wait_loaded()
        await upkeep.run(matching)

    async def carry_out_rounds() -> None:
        await index.wait_loaded()
        await upkeep.run_rounds(matching)

    runtime.background("rounds", carry_out_rounds())
    runtime.background("alarms", alarms_into_needs())
    runtime.background("upkeep", keep_up())


ROLES = {"api": start_api}


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in ROLES:
        print(USAGE, file=sys.stderr)  # noqa: T201  a command line
        sys.exit(2)
    settings = MatchingSettings()
    run(f"matching-{arguments[0]}", settings, functools.partial(ROLES[arguments[0]], settings=settings))


if __name__ == "__main__":
    main(sys.argv[1:])
