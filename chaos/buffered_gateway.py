"""A gateway with a disk buffer, in a process of its own that may be killed:

    python -m chaos.buffered_gateway TARGET MACHINE FOLDER START_S LEDGER [TURN_S SEGMENT_BYTES]    (the key in SMDIH_KEY)

Sends frames until a line comes on standard input, then waits until the hub has all of them. LEDGER gets a line "machine
first_row rows" once the buffer has kept a batch: from then on it must arrive. Started again it goes on behind its ledger. A file
LEDGER.full says that the disk was full.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np

from chaos.gateway import frames
from smdih_client import BufferFull, DiskBuffer, TelemetryClient

ROWS_A_BATCH = 200
TURN_S = 0.02
FULL_TURN_S = 0.2
SEGMENT_BYTES_MAX = 1024 * 1024


async def main(
    target: str, machine: int, folder: Path, start_s: int, ledger_path: Path, turn_s: float, segment_bytes: int
) -> None:
    lines = ledger_path.read_text().split("\n")[:-1] if ledger_path.exists() else []
    row = (int(lines[-1].split()[1]) + ROWS_A_BATCH) if lines else 0
    refusals = 0
    # The bound is far above what the disk holds.
    buffer = DiskBuffer(folder, segment_bytes_max=segment_bytes)
    with ledger_path.open("a") as ledger:
        async with TelemetryClient(target, os.environ["SMDIH_KEY"], source="buffered", buffer=buffer) as client:
            told = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
            while not told.done():
                rows = np.arange(row, row + ROWS_A_BATCH, dtype=np.int64)
                try:
                    await client.send(machine, (start_s + rows) * 1_000_000, frames(machine, rows))
                except BufferFull:
                    refusals += 1
                    ledger_path.with_suffix(".full").touch()
                    await asyncio.sleep(FULL_TURN_S)
                    continue
                ledger.write(f"{machine} {row} {ROWS_A_BATCH}\n")
                ledger.flush()
                row += ROWS_A_BATCH
                await asyncio.sleep(turn_s)
            await client.flush()
    told_at_end = {"rows": row, "refused_while_full": refusals, "quarantined": client.totals.quarantined}
    print(json.dumps({**told_at_end, "reconnects": client.totals.reconnects}))


if __name__ == "__main__":
    target, machine, folder, start_s, ledger, *pace = sys.argv[1:]
    turn_s, segment_bytes = (float(pace[0]), int(pace[1])) if pace else (TURN_S, SEGMENT_BYTES_MAX)
    asyncio.run(main(target, int(machine), Path(folder), int(start_s), Path(ledger), turn_s, segment_bytes))
