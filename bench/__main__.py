"""`make bench`: how fast the hub is, as ratios to limits measured in the same run; one JSON line a measure.

Absolute figures on a shared machine drift; the ratios are what to compare.
"""

import argparse
import asyncio
import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from bench import anomaly, funding, ingest, matching
from bench.report import tell
from localstack.servers import LocalServers, Servers, named_in_environment
from services.common import logs

PARTS: dict[str, Callable[[Servers], Awaitable[None]]] = {
    "ingest": ingest.run,
    "anomaly": anomaly.run,
    "matching": matching.run,
    "funding": funding.run,
}


@asynccontextmanager
async def own_servers() -> AsyncIterator[Servers]:
    named = named_in_environment()
    if named is not None:
        yield named
        return
    local = LocalServers("bench")
    await local.remove()
    try:
        yield await local.start()
    finally:
        await local.remove()


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part; may be given several times")
    options = parser.parse_args()
    logs.configure("bench", "ERROR")
    async with own_servers() as servers:
        for name, run in PARTS.items():
            if not options.only or name in options.only:
                await run(servers)
    tell("bench_memory", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, "MiB", largest="child process")


if __name__ == "__main__":
    asyncio.run(main())
