"""`make chaos`: one JSON line a round on standard output; exit code 1 if a round was not well.

A round is replayed by its seed: python -m chaos --scenario telemetry --seed 123456.
"""

import argparse
import asyncio
import json
import random
import secrets
import sys
import time
import traceback

from chaos import anomaly, funding, hub, mqtt, places, seats, telemetry, upgrade
from chaos.stage import NotHere, Outcome, Scenario, Stage
from localstack.servers import LocalServers
from services.common import logs

SCENARIOS: tuple[Scenario, ...] = (
    *telemetry.SCENARIOS,
    *mqtt.SCENARIOS,
    *anomaly.SCENARIOS,
    *places.SCENARIOS,
    *seats.SCENARIOS,
    *funding.SCENARIOS,
    *upgrade.SCENARIOS,
    *hub.SCENARIOS,
)


async def play(scenario: Scenario, stage: Stage, seeds: list[int]) -> bool:
    """Play the scenario once for each seed and print each outcome."""
    well = True
    async with scenario.prepare(stage) as play_round:
        for number, seed in enumerate(seeds, start=1):
            began = time.monotonic()
            try:
                async with asyncio.timeout(scenario.deadline_s):
                    outcome = await play_round(random.Random(seed))
            except Exception as error:
                # Nothing can be said about this round, and what it leaves behind is no ground for another.
                traceback.print_exc()
                outcome = Outcome(broken=[repr(error)])
            line = {
                "scenario": scenario.name,
                "round": number,
                "seed": seed,
                "faults": outcome.faults,
                "acknowledged": outcome.acknowledged,
                "lost": outcome.lost,
                "duplicated": outcome.duplicated,
                "ok": outcome.ok,
                "broken": outcome.broken,
                "elapsed_s": round(time.monotonic() - began, 1),
                "detail": outcome.detail,
            }
            print(json.dumps(line), flush=True)
            well = well and outcome.ok
            if not outcome.faults:
                break
    return well


async def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m chaos", description=__doc__.split("\n")[0])
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", choices=names, action="append", help="only this one; may be given several times")
    parser.add_argument("--rounds", type=int, help="rounds of each scenario, in place of its own number")
    parser.add_argument("--seed", type=int, help="play one round with this seed")
    parser.add_argument("--seconds", type=float, help="how long faults go on in the scenario hub (600)")
    parser.add_argument("--stack", default="chaos", help="name of the servers, so that two runs may go on side by side")
    options = parser.parse_args()
    logs.configure("chaos", "ERROR")
    local = LocalServers(options.stack)
    await local.remove()
    well = True
    try:
        stage = Stage(local, await local.start(), seconds=options.seconds)
        for scenario in SCENARIOS:
            if options.scenario and scenario.name not in options.scenario:
                continue
            rounds = options.rounds or scenario.rounds
            seeds = [secrets.randbelow(2**31) for _ in range(rounds)] if options.seed is None else [options.seed]
            try:
                well = await play(scenario, stage, seeds) and well
            except NotHere as error:
                print(json.dumps({"scenario": scenario.name, "left_out": str(error)}), flush=True)
                well = well and not options.scenario
    finally:
        await local.remove()
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
