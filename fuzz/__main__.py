"""`make fuzz`: one JSON line a target on standard output; exit code 1 if something broke.

FUZZ_SECONDS bounds the whole run (starting the hub comes on top). What broke is played again by its seed:
python -m fuzz --target sparkplug --seed 123456.
"""

import argparse
import asyncio
import dataclasses
import functools
import json
import os
import secrets
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from fuzz import doors, parsers
from fuzz.rounds import Outcome, fuzz
from localstack.servers import LOCAL, LocalServers
from services.common import logs

SECONDS = 420.0
# Shares of the time.
PARSERS, GRPC, HTTP = 0.25, 0.25, 0.5


def tell(outcome: Outcome) -> bool:
    """Print it; True when all is well."""
    print(json.dumps({**dataclasses.asdict(outcome), "ok": not outcome.broken}), flush=True)
    for broken in outcome.broken:
        print(f"\n{outcome.target}, seed {outcome.seed}:\n{broken}\n", file=sys.stderr, flush=True)
    return not outcome.broken


def fuzz_parsers(wanted: Sequence[str], *, seconds: float, seed: int) -> bool:
    targets = [target for target in parsers.TARGETS if not wanted or target.name in wanted]
    told = [tell(fuzz(target, seconds=seconds / len(targets), seed=seed)) for target in targets]
    return all(told)


async def fuzz_doors(wanted: Sequence[str], *, seconds: float, seed: int, folder: Path) -> bool:
    local = LocalServers(f"fuzz-{os.getpid()}", outlives_power=False)
    well = True
    try:
        async with doors.opened(await local.start(), folder) as opened:
            services = [s for s in doors.SERVICES if not wanted or any(name.split("-")[1] == s for name in wanted)]
            share = seconds / (GRPC + HTTP) / len(services)
            for service in services:
                if not wanted or f"grpc-{service}" in wanted:
                    target = doors.grpc_target(opened, service)
                    well &= tell(await asyncio.to_thread(fuzz, target, seconds=share * GRPC, seed=seed))
                for who in opened.keys:
                    if not wanted or f"http-{service}-as-{who}" in wanted:
                        timed = share * HTTP / len(opened.keys)
                        asking = functools.partial(doors.fuzz_http, seconds=timed, seed=seed, folder=folder)
                        well &= tell(await asyncio.to_thread(asking, opened, service, who))
            if ended := opened.restarts():
                well &= tell(Outcome("hub", seed, broken=[f"{name} ended: see {folder / name}.log" for name in ended]))
    finally:
        await local.remove()
    return well


def main() -> int:
    names = [target.name for target in parsers.TARGETS]
    at_doors = [f"grpc-{service}" for service in doors.SERVICES]
    at_doors += [f"http-{service}-as-{who}" for service in doors.SERVICES for who in doors.WHO]
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=[*names, *at_doors], action="append", help="only this one; may be repeated")
    parser.add_argument("--seed", type=int, help="of the first round; random without it")
    options = parser.parse_args()
    logs.configure("fuzz", "ERROR")
    seed = options.seed if options.seed is not None else secrets.randbelow(2**31)
    seconds = float(os.environ.get("FUZZ_SECONDS", SECONDS))
    wanted = options.target or []
    in_process, outside = [n for n in wanted if n in names], [n for n in wanted if n in at_doors]
    folder = LOCAL / "fuzz"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    well = True
    if in_process or not wanted:
        well &= fuzz_parsers(in_process, seconds=seconds * (PARSERS if not wanted else 1), seed=seed)
    if outside or not wanted:
        share = seconds * (GRPC + HTTP if not wanted else 1)
        well &= asyncio.run(fuzz_doors(outside, seconds=share, seed=seed, folder=folder))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
