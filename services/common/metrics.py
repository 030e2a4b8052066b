"""Metrics that every process has: which one it is, how full its pools and queues are, what waits to leave, how the loop turns.

Those of a service stand in the module that moves them. Two kinds need care when they are read from several processes: what
one process did or holds is summed (`sum`), what is counted in the database is the same in each copy (`max`). The help text of
the second kind begins with "In the database".
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from importlib import metadata

import asyncpg
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.errors import HubError, SlowDown, TryAgain
from services.common.logs import get_logger

log = get_logger(__name__)

LOOP_INTERVAL_S = 1.0
HTTP_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# 1, with the name of the process ("ingest-door") and the release that it runs.
process_info = Gauge("smdih_process_info", "Which process of the hub this is", ["process", "release"])
# How late a loop came back from a sleep: what everything else in the process waits as well.
loop_delay_seconds = Histogram(
    "smdih_process_loop_delay_seconds",
    "Delay of the event loop",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
# Requests, calls and streams that ended through the hub's fault, counted where the answer leaves: by what was asked
# ("POST /v1/needs", "/package.Service/Method") and the reason that was told. Over the caller's own limits is not the hub's fault.
faults_total = Counter("smdih_faults_total", "Requests sent back through the hub's fault", ["call", "reason"])
# Of a process that measures what is in the database: whether it was answered when it last asked.
database_answers = Gauge("smdih_database_answers", "1: the database answered when it was last asked")


def expect_faults(calls: Iterable[str]) -> None:
    """Show these calls from the start: an increase is not seen in a series that begins with it."""
    for call in calls:
        for reason in (
            HubError.REASON,
            TryAgain.REASON,
            SlowDown.REASON,
            "STARTING",
            "TOKEN_KEYS_AWAY",
            "DIRECTORY_STALE",
        ):
            faults_total.labels(call, reason)


def count_fault(call: str, reason: str, *, status: int) -> None:
    """Of an answer with this HTTP status (gRPC: of the table in errors.py), if it is one."""
    if status >= 500 or reason == SlowDown.REASON:
        faults_total.labels(call, reason).inc()


def name_process(name: str) -> None:
    """Say which process of the hub this is."""
    try:
        release = metadata.version("smdih")
    except metadata.PackageNotFoundError:
        release = "source"
    process_info.labels(name, release).set(1)


def method_label(method: str) -> str:
    """An HTTP method as a label: what callers make up is one."""
    return method if method in HTTP_METHODS else "OTHER"


async def watch_loop() -> None:
    """Measure the delay of the event loop until cancelled."""
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LOOP_INTERVAL_S)
        loop_delay_seconds.observe(max(0.0, time.perf_counter() - before - LOOP_INTERVAL_S))


async def keep_measuring(measure: Callable[[], Awaitable[None]], *, interval_s: float) -> None:
    """Call `measure`, which sets gauges from the database, every `interval_s` until cancelled; while the database is away they
    keep what they had."""
    while True:
        try:
            await measure()
            database_answers.set(1)
        except (OSError, TryAgain, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            database_answers.set(0)
            log.warning("not measured", error=repr(error))
        await asyncio.sleep(interval_s)


@dataclass(frozen=True)
class _Queue:
    size: Callable[[], float]
    limit: float


class _Limits(Collector):
    """Pools and queues that have a limit, as they are when somebody asks."""

    def __init__(self) -> None:
        self._pools: list[tuple[asyncpg.Pool[asyncpg.Record], str]] = []
        self._queues: dict[tuple[str, str], _Queue] = {}

    def add_pool(self, pool: "asyncpg.Pool[asyncpg.Record]", schema: str) -> None:
        self._pools.append((pool, schema))

    def add_queue(self, unit: str, name: str, queue: _Queue) -> None:
        self._queues[unit, name] = queue

    def collect(self) -> list[Metric]:
        connections = GaugeMetricFamily(
            "smdih_database_pool_connections", "Connections of this process to the database", labels=["schema", "state"]
        )
        connections_max = GaugeMetricFamily(
            "smdih_database_pool_connections_limit", "Connections that this process may have", labels=["schema"]
        )
        of_schema: dict[str, list[asyncpg.Pool[asyncpg.Record]]] = {}
        self._pools = [(pool, schema) for pool, schema in self._pools if not pool.is_closing()]
        for pool, schema in self._pools:
            of_schema.setdefault(schema, []).append(pool)
        for schema, pools in of_schema.items():
            idle = sum(pool.get_idle_size() for pool in pools)
            connections.add_metric([schema, "used"], sum(pool.get_size() for pool in pools) - idle)
            connections.add_metric([schema, "idle"], idle)
            connections_max.add_metric([schema], sum(pool.get_max_size() for pool in pools))
        families: list[Metric] = [connections, connections_max]
        for unit, help_text in (("items", "Items"), ("bytes", "Bytes")):
            size = GaugeMetricFamily(f"smdih_queue_{unit}", f"{help_text} in a queue of this process", labels=["queue"])
            limit = GaugeMetricFamily(
                f"smdih_queue_limit_{unit}", f"{help_text} that a queue of this process takes", labels=["queue"]
            )
            for (of_unit, name), queue in self._queues.items():
                if of_unit == unit:
                    size.add_metric([name], queue.size())
                    limit.add_metric([name], queue.limit)
            families += [size, limit]
        return families

    def describe(self) -> list[Metric]:
        return []  # so that registering needs no reading


_limits = _Limits()
REGISTRY.register(_limits)


def watch_pool(pool: "asyncpg.Pool[asyncpg.Record]", *, schema: str) -> None:
    """Show how many of the pool's connections are used, until it is closed."""
    _limits.add_pool(pool, schema)


def watch_queue(name: str, size: Callable[[], float], *, limit: float) -> None:
    """Show how many items stand in a queue, and how many it takes. A second queue of the name takes the first one's place."""
    _limits.add_queue("items", name, _Queue(size, limit))


def watch_queue_bytes(name: str, size: Callable[[], float], *, limit: float) -> None:
    """The same for a queue whose limit is in bytes."""
    _limits.add_queue("bytes", name, _Queue(size, limit))
