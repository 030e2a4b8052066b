"""A rolling upgrade under load: the release before and this one side by side on the same servers, one process after the other.

The migrations of this release run first, while the old processes work; then each new process joins and its old one leaves. Nothing
acknowledged may be missing or twice, the alarms are those of an undisturbed pass, and no request may fail.
"""

import asyncio
import contextlib
import itertools
import random
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import numpy as np

from bench.plant import register
from chaos import telemetry, whole
from chaos.people import Firm, World, until_ended
from chaos.stage import NotHere, Outcome, Round, Scenario, Stage, poll
from localstack.hub import Hub
from localstack.mosquitto import Mosquitto
from localstack.servers import LOCAL, ROOT, Servers, free_port
from services.common.evidence import new_key
from services.migrate import migrate_all

# The release before: the last commit of it. To be moved on with every release.
BASE_FILE = ROOT / "chaos/previous-release"
DEADLINE_S = 1_800.0
MACHINES = 6
FIRMS = 2
# Under load before the first and after the last change.
STEADY_S = 8.0
BETWEEN_S = 2.0
# From leaving the front to being told to stop, as Kubernetes' endpoints need a moment.
LEAVING_S = 0.5
AT_REST_WITHIN_S = 300.0
ASK_EVERY_S = 0.5
# Backwards along the contracts: who reads a topic can read the new events before anybody writes them.
ROLES = (
    "funding",
    "matching",
    "anomaly",
    "anomaly-notifier",
    "anomaly-worker",
    "historian",
    "mqtt-bridge",
    "door",
)
# Whom the others call, and by which setting: through the fronts, so that old ones call new ones and the other way round.
CALLED = {"SMDIH_INGEST_GRPC": "door", "SMDIH_MATCHING_GRPC": "matching"}


class Front:
    """One address for the processes of a role, as a Service is: each new connection goes to the next that is ready."""

    def __init__(self) -> None:
        self.port = free_port()
        self._backends: list[int] = []
        self._turn = itertools.count()
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", self.port)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def join(self, port: int) -> None:
        self._backends.append(port)

    def leave(self, port: int) -> None:
        """No new connections; those that are open stay."""
        self._backends.remove(port)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            if not self._backends:
                raise OSError("nobody is there yet")
            backend = self._backends[next(self._turn) % len(self._backends)]
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", backend)
            await asyncio.gather(_pump(reader, inner_writer), _pump(inner_reader, writer))
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._open.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()


def previous_release() -> Path:
    """A folder with the release before, ready to run. Raises NotHere when its history is not in this clone."""
    commit = BASE_FILE.read_text().strip()
    folder = LOCAL / "upgrade" / commit
    if (folder / "gen").is_dir():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "--format=tar", commit], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        shutil.rmtree(folder)
        raise NotHere(
            f"this clone has no commit {commit[:12]} of the release before (git fetch --unshallow brings the history)"
        )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    (folder / ".venv").symlink_to(ROOT / ".venv")
    subprocess.run(["bash", "localstack/generate.sh"], cwd=folder, check=True, capture_output=True)
    return folder


@asynccontextmanager
async def prepare(stage: Stage) -> AsyncIterator[Round]:
    old = await asyncio.to_thread(previous_release)

    async def play(rng: random.Random) -> Outcome:
        mosquitto = Mosquitto(LOCAL / "stacks" / "chaos" / "mosquitto-upgrade")
        mosquitto.start()
        try:
            async with stage.database("chaos_upgrade") as dsn, AsyncExitStack() as stack:
                fleet = _Fleet(
                    stack, Servers(stage.servers.kafka_bootstrap, dsn), f"upgrade{rng.randrange(2**31)}.", mosquitto
                )
                return await _play(fleet, old, rng)
        finally:
            mosquitto.stop()

    yield play


class _Fleet:
    """The processes of both releases behind their fronts."""

    def __init__(self, stack: AsyncExitStack, servers: Servers, prefix: str, mqtt: Mosquitto) -> None:
        self._stack = stack
        self._servers = servers
        self._prefix = prefix
        self._mqtt = mqtt
        self._hubs: dict[str, Hub] = {}
        self.http = {name: Front() for name in ROLES}
        self.grpc = {name: Front() for name in CALLED.values()}
        self.operator_key = ""
        # What the door signs, the fund checks, of whichever release they are.
        self._evidence_key = new_key()

    async def open(self) -> None:
        for front in (*self.http.values(), *self.grpc.values()):
            await front.start()
            self._stack.push_async_callback(front.stop)

    async def bring(self, name: str, code: Path, release: str) -> None:
        """A process of this release takes the place of the one before, if there is one."""
        hub = Hub(
            self._servers,
            LOCAL / "log" / "chaos" / f"upgrade-{release}",
            topic_prefix=self._prefix,
            roles=(name,),
            code=code,
            instance_suffix=f"-{release}",
            mqtt=self._mqtt,
            environment={setting: f"127.0.0.1:{self.grpc[called].port}" for setting, called in CALLED.items()},
        )
        hub.evidence_key = self._evidence_key
        self._stack.push_async_callback(hub.stop)
        await hub.start()
        self.operator_key = self.operator_key or hub.operator_key
        running, before = hub.processes[name], self._hubs.get(name)
        self.http[name].join(running.http_port)
        if name in self.grpc:
            self.grpc[name].join(running.grpc_port)
        self._hubs[name] = hub
        if before is not None:
            await asyncio.sleep(BETWEEN_S)
            left = before.processes[name]
            self.http[name].leave(left.http_port)
            if name in self.grpc:
                self.grpc[name].leave(left.grpc_port)
            await asyncio.sleep(LEAVING_S)
            await before.stop()

    @property
    def any_hub(self) -> Hub:
        return self._hubs["door"]

    def address(self, service: str) -> str:
        name = {"ingest": "door"}.get(service, service)
        return f"http://127.0.0.1:{self.http[name].port}"


async def _ask_across(firm: Firm, stop: asyncio.Event, asked: list[str]) -> None:
    """What one service has to ask another for: the samples around an alarm, of whichever release the two are."""
    while not stop.is_set():
        found = await firm.call("anomaly", "GET", "/v1/alarms?page_size=1", key="firm")
        for alarm in found["alarms"]:
            await firm.call("anomaly", "GET", f"/v1/alarms/{alarm['id']}/evidence", key="firm")
            asked.append(alarm["id"])
        await asyncio.sleep(ASK_EVERY_S)


async def _play(fleet: _Fleet, old: Path, rng: random.Random) -> Outcome:
    outcome = Outcome(faults=["upgrade"])
    await fleet.open()
    for name in ROLES:
        await fleet.bring(name, old, "old")
    settings = fleet.any_hub.settings
    plant = await register(settings.database_dsn, telemetry.cluster_of(fleet.any_hub), MACHINES)
    world = await World.make(fleet.address, fleet.operator_key)
    firms = [Firm(world, number, random.Random(rng.random())) for number in range(FIRMS)]
    for firm in firms:
        await firm.open()
    asked_across: list[str] = []
    start_s = int(time.time()) - 5 * 86_400
    target, stop = f"127.0.0.1:{fleet.grpc['door'].port}", asyncio.Event()
    async with telemetry.load_to(target, plant, start_s, rng.randrange(2**31)) as sender:
        living = asyncio.create_task(
            until_ended(
                [
                    *(firm.send(target, stop) for firm in firms),
                    *(firm.live(stop) for firm in firms),
                    *(_ask_across(firm, stop, asked_across) for firm in firms),
                ],
                outcome.broken,
            )
        )
        try:
            await asyncio.sleep(STEADY_S)
            await migrate_all(settings)
            await asyncio.sleep(STEADY_S)
            for name in ROLES:
                await fleet.bring(name, ROOT, "new")
            await asyncio.sleep(STEADY_S)
            stop.set()
            ended = time.monotonic()
            sent, _ = await asyncio.gather(sender.stop(), living)
        finally:
            living.cancel()
            await asyncio.gather(living, return_exceptions=True)
        ledger = np.loadtxt(sender.ledger, dtype=np.int64, ndmin=2)
    outcome.detail |= {"gateway": sent, "calls": world.told.calls, "calls_repeated": world.told.repeats}
    outcome.detail["asked_across"] = len(asked_across)
    if not asked_across:
        outcome.broken.append("no service asked another")
    if sent["sent"] != sent["acknowledged"] or sent["problems"]:
        outcome.broken.append(f"{sent['sent'] - sent['acknowledged']} batches not acknowledged; {sent['problems']}")
    hub = fleet.any_hub
    database = await asyncpg.connect(settings.database_dsn)

    async def at_rest() -> bool:
        return not await whole.behind(hub, database)

    try:
        outcome.detail["caught_up_s"] = round(await poll("at rest", at_rest, deadline_s=AT_REST_WITHIN_S), 1)
        await telemetry.judge(hub, plant, ledger, start_s, max(ended, time.monotonic()), outcome)
        await whole.judge(hub, database, world.told, outcome, one_release=False)
    finally:
        await database.close()
    if world.told.repeats:
        outcome.broken.append(
            f"{world.told.repeats} requests failed and were sent again: {dict(world.told.failures.most_common(3))}"
        )
    return outcome


SCENARIOS = (Scenario("upgrade", 1, prepare, deadline_s=DEADLINE_S),)
