"""A gateway's command line.

python -m smdih_client claim CODE --target HOST:PORT: get a key; it goes into smdih.key.
python -m smdih_client replay --file F --machine PATH --target HOST:PORT: stream a CSV file.
python -m smdih_client backfill PATH --machine PATH --target HOST:PORT: send history, CSV or Parquet.
python -m smdih_client opcua run --config gateway.toml: read OPC UA servers for ever.
python -m smdih_client opcua browse URL --machine PATH: propose signals, and write a configuration.

The key goes into SMDIH_KEY, or its file's path into SMDIH_KEY_FILE.

Where the door has TLS: SMDIH_TLS_CA names the file of its authority (or is `system`), SMDIH_TLS_CERTIFICATE and SMDIH_TLS_KEY the
files of this gateway's own certificate, if the hub asks for one.
"""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from smdih_client.backfill import Hub, Job, Progress, jobs, send, when
from smdih_client.buffer import BufferFull, BufferInUse
from smdih_client.claim import KeyFileExists, claim
from smdih_client.recording import NotARecording, Recording, read
from smdih_client.telemetry import BUFFERED_SAMPLES_PER_S_MAX, Refused, TelemetryClient
from smdih_client.tls import Tls

ROWS_A_BATCH = 200
PROGRESS_EVERY_BATCHES = 50


async def replay(
    recording: Recording, *, machine: str, target: str, key: str, source: str, buffer: Path | None = None
) -> int:
    """Send everything and wait until it is durable; returns the samples in quarantine. Raises Refused, BufferFull, BufferInUse."""
    async with TelemetryClient(target, key, source=source, buffer=buffer, credentials=Tls.named_in()) as client:
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


async def backfill(found: Sequence[Job], *, target: str, key: str, progress: Progress, samples_per_s_max: float) -> int:
    """Send files one after the other; returns the samples that the hub did not store. Raises Refused, NotARecording."""
    not_stored = 0
    for job in found:
        counts = await send(
            job, progress, target=target, key=key, samples_per_s_max=samples_per_s_max, tls=Tls.named_in()
        )
        not_stored += counts.quarantined + counts.left_out
        print(
            f"{job.name} -> {job.machine}: {counts.rows:,} rows; {counts.stored:,} samples stored, "
            f"{counts.quarantined:,} in quarantine, {counts.left_out:,} left out"
        )
        for reason, samples in sorted(counts.reasons.items()):
            print(f"  {reason}: {samples:,} samples")
    return not_stored


async def forecast(found: Sequence[Job], *, target: str, key: str) -> int:
    """Say what `backfill` would do; returns the samples that would not be stored. Raises Refused, NotARecording."""
    hub = Hub(target, key, Tls.named_in())
    not_stored = 0
    for job in found:
        told = await hub.forecast(job)
        counts = told.counts
        not_stored += counts.quarantined + counts.left_out
        times = ""
        if told.first_us is not None and told.last_us is not None:
            times = f", {when(told.first_us)} to {when(told.last_us)}"
        print(f"{job.name} -> {job.machine}: {counts.rows:,} rows{times}")
        print(
            f"  would be stored: {counts.stored:,} samples; in quarantine: {counts.quarantined:,}; left out: {counts.left_out:,}"
        )
        for reason, samples in sorted(counts.reasons.items()):
            print(f"  {reason}: {samples:,} samples")
            for example in told.examples.get(reason, ()):
                print(f"    row {example.row:,}{' ' + example.time if example.time else ''}: {example.detail}")
    return not_stored


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smdih_client",
        epilog="The key goes into SMDIH_KEY, or the path of its file into SMDIH_KEY_FILE.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "replay", help="stream a CSV file: first column a timestamp, the others signals by name"
    )
    command.add_argument("--file", type=Path, required=True)
    command.add_argument("--machine", required=True, help="path of the machine, such as acme/leeds/press-3")
    command.add_argument("--target", required=True, help="host:port of the gRPC door")
    command.add_argument("--source", default="csv-replay")
    command.add_argument("--buffer", type=Path, help="folder that keeps what the hub does not have yet, over restarts")
    command = commands.add_parser(
        "backfill", help="send history: a CSV or Parquet file or a folder of them; again goes on where it was stopped"
    )
    command.add_argument("path", type=Path, help="a file, or a folder of .csv and .parquet files")
    command.add_argument(
        "--machine",
        default="",
        help="path of the machine; in a folder the default is each file's path without its ending",
    )
    command.add_argument("--target", required=True, help="host:port of the gRPC door")
    command.add_argument("--dry-run", action="store_true", help="say what would be refused and why; store nothing")
    command.add_argument("--progress", type=Path, help="where to note how far it is; default: PATH.progress.json")
    command.add_argument("--rate", type=_rate, default=BUFFERED_SAMPLES_PER_S_MAX, help="samples a second at most")
    command = commands.add_parser("claim", help="exchange a claim code for this gateway's key")
    command.add_argument("code", help="such as 7KQ4-M2XP-9RTV")
    command.add_argument("--target", required=True, help="host:port of the gRPC door")
    command.add_argument("--key-file", type=Path, default=Path("smdih.key"), help="where the key goes (mode 0600)")
    _add_opcua(commands.add_parser("opcua", help="read OPC UA servers, as a gateway that runs for ever"))
    return parser.parse_args()


def _add_opcua(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="opcua", required=True)
    command = commands.add_parser("run", help="read the servers of a configuration and send to the hub")
    command.add_argument("--config", type=Path, required=True, help="a TOML file, such as browse writes")
    command = commands.add_parser("browse", help="propose signals: a table for the hub's import, and a configuration")
    command.add_argument("url", help="such as opc.tcp://10.0.0.5:4840")
    command.add_argument("--machine", required=True, help="path of the machine, such as acme/leeds/press-3")
    command.add_argument("--root", default="", help="node to begin below, such as ns=2;s=Press3; default: all objects")
    command.add_argument("--target", default="127.0.0.1:8002", help="host:port of the hub, for the configuration")
    command.add_argument("--config", type=Path, help="write a configuration to this file")
    command.add_argument("--user", default="")
    command.add_argument("--password-env", default="", help="environment variable that holds the password")
    command.add_argument(
        "--security",
        default="",
        help="policy,mode,certificate,private key[,server's certificate]; files beside --config",
    )


def _rate(text: str) -> float:
    rate = float(text)
    if not 0 < rate < float("inf"):
        raise ValueError(text)
    return rate


async def _run(arguments: argparse.Namespace, key: str) -> int:
    if arguments.command == "replay":
        return await replay(
            read(arguments.file),
            machine=arguments.machine,
            target=arguments.target,
            key=key,
            source=arguments.source,
            buffer=arguments.buffer,
        )
    found = jobs(arguments.path, arguments.machine)
    if arguments.dry_run:
        return await forecast(found, target=arguments.target, key=key)
    path: Path = arguments.progress or arguments.path.with_name(arguments.path.resolve().name + ".progress.json")
    return await backfill(
        found, target=arguments.target, key=key, progress=Progress(path), samples_per_s_max=arguments.rate
    )


def main() -> int:
    arguments = _arguments()
    if arguments.command == "claim":
        return _claim(arguments.code, arguments.target, arguments.key_file)
    if arguments.command == "opcua" and arguments.opcua == "browse":
        return _browse(arguments)
    key, key_file = os.environ.get("SMDIH_KEY", ""), os.environ.get("SMDIH_KEY_FILE", "")
    if not (key or key_file):
        print("put a device key into SMDIH_KEY, or its file's path into SMDIH_KEY_FILE", file=sys.stderr)
        return 2
    if arguments.command == "opcua":
        return _gateway(arguments.config, key or Path(key_file))
    try:
        key = key or Path(key_file).read_text().strip()
        return 1 if asyncio.run(_run(arguments, key)) else 0
    except (NotARecording, Refused, BufferFull, BufferInUse, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _claim(code: str, target: str, key_file: Path) -> int:
    try:
        claimed = asyncio.run(claim(code, target=target, key_file=key_file, credentials=Tls.named_in()))
    except (KeyFileExists, Refused, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The key is in {claimed.key_file}. Use it with: export SMDIH_KEY_FILE={claimed.key_file.resolve()}")
    print(f"It is for {claimed.machine or 'machines of ' + claimed.site}.")
    return 0


def _gateway(config: Path, key: str | Path) -> int:
    from smdih_client import opcua  # large, and nobody else's

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("asyncua").setLevel(logging.CRITICAL)  # it tells every lost connection again, at length

    async def run() -> None:
        me = asyncio.current_task()
        assert me is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
        await opcua.Gateway(opcua.load(config), key, Tls.named_in()).run()

    try:
        asyncio.run(run())
    except opcua.BadConfiguration as error:
        print(error, file=sys.stderr)
        return 2
    except (BufferInUse, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        pass
    return 0


def _browse(arguments: argparse.Namespace) -> int:
    from asyncua import ua

    from smdih_client import opcua

    logging.getLogger("asyncua").setLevel(logging.CRITICAL)
    password = os.environ.get(arguments.password_env, "") if arguments.password_env else ""
    folder = arguments.config.parent if arguments.config is not None else Path()
    login = {one: getattr(arguments, one) for one in ("user", "password_env", "security")}
    try:
        secured = opcua.security("--security", arguments.security, folder) if arguments.security else None
        server = opcua.Server(arguments.url, False, 1_000, (), arguments.user, password, secured)
        found = asyncio.run(opcua.browse(server, arguments.root))
        if arguments.config is not None:
            text = opcua.configuration_text(
                arguments.url, found, target=arguments.target, machine=arguments.machine, login=login
            )
            with arguments.config.open("x") as file:
                file.write(text)
    except (OSError, ua.UaError, opcua.BadConfiguration) as error:
        print(f"{arguments.url}: {error or repr(error)}", file=sys.stderr)
        return 1
    print(opcua.table(found, arguments.machine), end="")
    print(f"{len(found)} variables are numbers", file=sys.stderr)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
