"""A gateway's command line.

python -m smdih_client claim CODE --target HOST:PORT: get a key; it goes into smdih.key.
python -m smdih_client replay --file F --machine PATH --target HOST:PORT: stream a CSV file (key in SMDIH_KEY).
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from smdih_client.claim import KeyFileExists, claim
from smdih_client.recording import NotARecording, Recording, read
from smdih_client.telemetry import Refused, TelemetryClient

ROWS_A_BATCH = 200
PROGRESS_EVERY_BATCHES = 50


async def replay(recording: Recording, *, machine: str, target: str, key: str, source: str) -> int:
    """Send everything and wait until it is durable; returns the samples in quarantine. Raises Refused."""
    async with TelemetryClient(target, key, source=source) as client:
        for number, row in enumerate(range(0, len(recording.times_us), ROWS_A_BATCH)):
            rows = slice(row, row + ROWS_A_BATCH)
            await client.send(machine, recording.times_us[rows], recording.values[rows], signals=recording.names)
            if number % PROGRESS_EVERY_BATCHES == 0:
                print(f"{row:,} of {len(recording.times_us):,} rows sent", file=sys.stderr)
        await client.flush()
        totals = client.totals
        print(
            f"{totals.sent:,} samples sent, {totals.acknowledged:,} acknowledged, of these {totals.quarantined:,} in quarantine; "
            f"{recording.refused:,} cells of the file were left out: no number, no time, or replaced by a later row of that time"
        )
        for reason, samples in sorted(client.problems.items()):
            print(f"  {reason}: {samples:,} samples", file=sys.stderr)
        return totals.quarantined


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m smdih_client")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "replay", help="stream a CSV file: first column a timestamp, the others signals by name"
    )
    command.add_argument("--file", type=Path, required=True)
    command.add_argument("--machine", required=True, help="path of the machine, such as acme/leeds/press-3")
    command.add_argument("--target", required=True, help="host:port of the gRPC door")
    command.add_argument("--source", default="csv-replay")
    command = commands.add_parser("claim", help="exchange a claim code for this gateway's key")
    command.add_argument("code", help="such as 7KQ4-M2XP-9RTV")
    command.add_argument("--target", required=True, help="host:port of the gRPC door")
    command.add_argument("--key-file", type=Path, default=Path("smdih.key"), help="where the key goes (mode 0600)")
    arguments = parser.parse_args()
    if arguments.command == "claim":
        return _claim(arguments.code, arguments.target, arguments.key_file)
    key = os.environ.get("SMDIH_KEY", "")
    if not key:
        print("put a device key into the environment variable SMDIH_KEY", file=sys.stderr)
        return 2
    try:
        recording = read(arguments.file)
        quarantined = asyncio.run(
            replay(recording, machine=arguments.machine, target=arguments.target, key=key, source=arguments.source)
        )
    except (NotARecording, Refused) as error:
        print(error, file=sys.stderr)
        return 1
    return 1 if quarantined else 0


def _claim(code: str, target: str, key_file: Path) -> int:
    try:
        claimed = asyncio.run(claim(code, target=target, key_file=key_file))
    except (KeyFileExists, Refused, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f'The key is in {claimed.key_file}. Use it with: export SMDIH_KEY="$(cat {claimed.key_file})"')
    print(f"It is for {claimed.machine or 'machines of ' + claimed.site}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
