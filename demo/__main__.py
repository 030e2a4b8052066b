"""`make demo`: the whole journey on real servers, shown live, told in a summary and a report.

Usage: python -m demo [--input FILE.csv]
"""

import argparse
import asyncio
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import numpy as np
import orjson
from rich.console import Console

from demo import plant, report
from demo.journey import Journey, JourneyError, Observer
from demo.story import Source, Step, Story
from demo.view import View, print_summary
from localstack.hub import Hub, HubError
from localstack.servers import LOCAL, LocalServers, Servers, ServersError, named_in_environment
from services.common import logs
from smdih_client import recording

FOLDER = LOCAL / "demo"


def told(input_path: Path | None) -> Story:
    """The story of the built-in plant, or of a file. Raises NotARecording."""
    if input_path is None:
        now_us = time.time_ns() // 1000
        sources = []
        for machine in plant.build():
            times = now_us - (len(machine.values) - np.arange(len(machine.values))) * 1_000_000
            sources.append(
                Source(machine.path, machine.name, machine.kind, machine.signals, times, machine.values, machine.faults)
            )
        story = Story("built-in plant, two hours at one frame a second", sources)
    else:
        found = recording.read(input_path)
        signals = tuple(plant.Signal(name, "") for name in found.names)
        source = Source("machine-1", input_path.stem, "machine", signals, found.times_us, found.values, None)
        story = Story(str(input_path), [source])
        story.counts.refused = story.counts.sent = found.refused
    story.total_samples = sum(int((~np.isnan(source.values)).sum()) for source in story.sources)
    return story


@asynccontextmanager
async def own_servers() -> AsyncIterator[tuple[Servers, str]]:
    """Servers with a fresh database, and a prefix for fresh topics; removed afterwards."""
    name = f"smdih_demo_{secrets.token_hex(4)}"
    named = named_in_environment()
    if named is None:
        local = LocalServers("demo", outlives_power=False)
        await local.remove()
        try:
            yield await local.start(), ""
        finally:
            await local.remove()
        return
    admin = await asyncpg.connect(named.database_dsn)
    await admin.execute(f"CREATE DATABASE {name}")
    try:
        yield Servers(named.kafka_bootstrap, named.database_dsn.rpartition("/")[0] + "/" + name), f"{name}."
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


async def run(story: Story, console: Console) -> None:
    """Start everything, walk the journey, write summary and report. Raises JourneyError, HubError, ServersError.

    Told to stop (by the keyboard, or because the terminal closed), it first ends what it started.
    """
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, me.cancel)
    async with View(story, console):
        step = Step("Start Kafka, TimescaleDB and the services", story.elapsed_s)
        story.steps.append(step)
        async with own_servers() as (servers, prefix):
            hub = Hub(servers, FOLDER / "log", topic_prefix=prefix)
            try:
                await hub.start()
                step.outcome, step.ended_s = f"{len(hub.processes)} processes ready", story.elapsed_s
                write(FOLDER / "endpoints.json", orjson.dumps(hub.endpoints(), option=orjson.OPT_INDENT_2))
                observing = asyncio.create_task(Observer(hub, story).run())
                try:
                    await Journey(hub, story).walk()
                finally:
                    observing.cancel()
                    await asyncio.gather(observing, return_exceptions=True)
                write(FOLDER / "summary.json", orjson.dumps(story.summary(), option=orjson.OPT_INDENT_2))
                write(FOLDER / "report.html", report.page(story).encode())
            finally:
                await hub.stop()


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description="The whole journey on real servers.")
    parser.add_argument("--input", type=Path, help="a CSV file to stream in place of the built-in plant")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True) if not sys.stdout.isatty() else Console()
    logs.configure("demo", "ERROR")  # the processes have logs of their own; the view is for people
    try:
        story = told(arguments.input)
        asyncio.run(run(story, console))
    except (recording.NotARecording, ServersError, HubError, JourneyError) as error:
        console.print(f"demo: {error}", style="red", highlight=False)
        return 1
    except asyncio.CancelledError:
        console.print("demo: stopped, and everything that it had started with it", highlight=False)
        return 130
    print_summary(story, console, str((FOLDER / "report.html").relative_to(LOCAL.parent)))
    counts = story.counts
    return 0 if counts.lost == 0 and counts.duplicated == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
