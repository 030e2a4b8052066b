"""A gateway in a process of its own, to be killed: arguments TARGET MACHINE FOLDER FIRST END START_S, the key in SMDIH_KEY.

Sends batches FIRST..END-1, ten rows each, says each number once it is kept, waits for the hub and says "flushed SENT QUARANTINED".
"""

import asyncio
import os
import sys
from pathlib import Path

import numpy as np

from smdih_client import TelemetryClient

ROWS = 10


def values(number: int) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    return np.arange(number * ROWS * 3, (number + 1) * ROWS * 3, dtype=np.float64).reshape(ROWS, 3) / 1e3


async def main(target: str, machine: str, folder: str, first: int, end: int, start_s: int) -> None:
    client = TelemetryClient(
        target, os.environ["SMDIH_KEY"], source="gateway-buffered", buffer=Path(folder), samples_per_s_max=3_000
    )
    async with client:
        for number in range(first, end):
            at = (start_s + np.arange(number * ROWS, (number + 1) * ROWS)) * 1_000_000
            await client.send(machine, at, values(number))
            print(number, flush=True)
            await asyncio.sleep(0.005)
        await client.flush()
        assert client.totals.acknowledged == client.totals.sent
        print(f"flushed {client.totals.sent} {client.totals.quarantined}", flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:4], *map(int, sys.argv[4:7])))  # type: ignore[arg-type]
