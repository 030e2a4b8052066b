"""The process that scores every sample and raises alarms."""

import asyncio
import os
import shutil

from services.anomaly.raiser import AlarmRaiser
from services.anomaly.scorer import compile_kernel
from services.anomaly.settings import SCHEMA, AnomalySettings
from services.anomaly.store import AlarmStore, StateStore
from services.anomaly.stream import Worker
from services.anomaly.tuning_store import HorizonStore
from services.common import memory, topics
from services.common.clock import SystemClock
from services.common.database import can_write, create_pool_when_it_answers
from services.common.directory import Directory
from services.common.entrance import open_entrance
from services.common.kafka import Cluster, DeadLetters, Publisher
from services.common.runtime import Runtime


def make_kernel_ready(compiled: str) -> None:
    """Take the kernel from the folder `compiled`, or compile it. Its compiler looks only where it may write."""
    cache = os.environ.get("NUMBA_CACHE_DIR")
    if compiled and cache:
        shutil.copytree(compiled, cache, dirs_exist_ok=True)
    compile_kernel()


async def start(runtime: Runtime, settings: AnomalySettings) -> None:
    memory.keep_freed()
    clock = SystemClock()
    cluster = Cluster.of(settings)
    publisher = await runtime.enter(Publisher(cluster))
    directory = Directory(cluster, clock=clock, kinds=("machine",))
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await entrance.serve_probes("SMDIH anomaly worker")
    runtime.background("directory", directory.run())
    pool = await create_pool_when_it_answers(settings.database_dsn, schema=SCHEMA, size_max=settings.database_pool_max)
    runtime.on_stop(pool.close)
    await asyncio.to_thread(make_kernel_ready, settings.anomaly_kernel)
    await directory.wait_caught_up()
    made = Worker(
        cluster,
        states=StateStore(pool, topic=cluster.name(topics.SAMPLES)),
        horizons=HorizonStore(pool),
        raiser=AlarmRaiser(AlarmStore(), pool, directory, clock),
        dead_letters=DeadLetters(publisher),
        clock=clock,
        instance=settings.anomaly_instance,
        checkpoint_interval_s=settings.anomaly_checkpoint_interval_s,
    )
    runtime.ready_when("kafka", publisher.answers)
    runtime.ready_when("database", lambda: can_write(pool))
    runtime.ready_when("partitions", made.is_assigned)
    runtime.alive_when("scoring", made.is_turning)
    await runtime.enter(made.consuming())
    runtime.background("worker", made.run())
