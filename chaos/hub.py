"""The whole hub for ten minutes: every process, both brokers and the database fail at random while people and machines use it.

Machines send by gRPC, MQTT and from a small disk; firms with planted faults get alarms, needs and offers, book seats, apply, are
awarded and paid. At the end everything that anybody was told is compared with what the hub holds.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import httpx
import numpy as np
import psutil

from bench.plant import Plant, register
from chaos import mqtt, telemetry, whole
from chaos.people import Firm, World, until_ended
from chaos.stage import Outcome, Round, Scenario, Stage, poll
from localstack.hub import Hub
from localstack.mosquitto import Mosquitto
from localstack.servers import LOCAL
from services.ingest.historian.binarycopy import Ints

SECONDS = 600.0
DEADLINE_S = 2_400.0
# Machines of the load; the last one sends from a disk that is soon full.
MACHINES = 7
FIRMS = 3
MQTT_TURN_S = 0.1
BUFFER_DISK_BYTES = 768 * 1024
BUFFER_SEGMENT_BYTES = 128 * 1024
BUFFER_TURN_S = 0.5
GATEWAY_DEADLINE_S = 240.0
FAULT_EVERY_S = (1.0, 8.0)
AT_ONCE_MAX = 2
CAUGHT_UP_WITHIN_S = 60.0
# After that nothing more is waited for.
CAUGHT_UP_DEADLINE_S = 300.0


@dataclass
class _Gateway:
    """The gateway with a disk buffer, started again with what its disk has."""

    hub: Hub
    plant: Plant
    disk: Path
    start_s: int
    ledger: Path
    process: asyncio.subprocess.Process | None = None
    kills: int = 0

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "chaos.buffered_gateway", self.hub.processes["door"].grpc, str(self.plant.machine_ids[-1])),
            *(str(self.disk / "buffer"), str(self.start_s), str(self.ledger)),
            *(str(BUFFER_TURN_S), str(BUFFER_SEGMENT_BYTES)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"SMDIH_KEY": self.plant.key},
        )

    async def restart(self) -> None:
        self.kills += 1
        await self.abort()
        await self.start()

    async def abort(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    async def stop(self) -> dict[str, int]:
        """No new frames; returns what it says once the hub has all that the disk kept."""
        assert self.process is not None
        async with asyncio.timeout(GATEWAY_DEADLINE_S):
            output, _ = await self.process.communicate(b"stop\n")
        found: dict[str, int] = json.loads(output)
        return found


@dataclass
class _Trouble:
    """Random faults, at most AT_ONCE_MAX at a time and never two of the same server or process."""

    stage: Stage
    hub: Hub
    mosquitto: Mosquitto
    gateway: _Gateway
    rng: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    _busy: set[str] = field(default_factory=set)

    async def play(self, seconds: float) -> None:
        """Returns when the last fault is over and everything runs again."""
        until = time.monotonic() + seconds
        going: set[asyncio.Task[None]] = set()
        try:
            while time.monotonic() < until:
                await asyncio.sleep(self.rng.uniform(*FAULT_EVERY_S))
                for task in [task for task in going if task.done()]:
                    task.result()
                    going.discard(task)
                if len(going) < AT_ONCE_MAX:
                    going.add(asyncio.create_task(self._fault()))
            await asyncio.gather(*going)
        finally:
            for task in going:
                task.cancel()
            await asyncio.gather(*going, return_exceptions=True)
        await asyncio.gather(*(self.hub.wait_ready(name) for name in self.hub.processes))

    async def _fault(self) -> None:
        # Processes die most often, servers now and then.
        fault, weight = zip(*_FAULTS, strict=True)
        chosen = self.rng.choices(fault, weights=weight)[0]
        subject = _SUBJECTS.get(chosen) or self.rng.choice(sorted(self.hub.processes))
        if subject in self._busy:
            return
        self._busy.add(subject)
        self.faults[f"{chosen.__name__} {subject}" if chosen not in _SUBJECTS else chosen.__name__] += 1
        try:
            await chosen(self, subject)
        finally:
            self._busy.discard(subject)

    async def kill(self, name: str) -> None:
        self.hub.kill(name)
        await asyncio.sleep(self.rng.uniform(0.5, 3))

    async def freeze(self, name: str) -> None:
        """The process stands still while its connections stay open: others think that it is dead."""
        process = self.hub.processes[name].process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            frozen = psutil.Process(process.pid)
            frozen.suspend()
            try:
                await asyncio.sleep(self.rng.uniform(1, 15))
            finally:
                frozen.resume()

    async def kill_broker(self, _: str) -> None:
        self.stage.local.kill_kafka()
        await asyncio.sleep(self.rng.uniform(0.2, 5))
        await self.stage.local.restart_kafka()

    async def silence_broker(self, _: str) -> None:
        self.stage.local.pause_kafka(True)
        try:
            await asyncio.sleep(self.rng.uniform(3, 20))
        finally:
            self.stage.local.pause_kafka(False)

    async def kill_database(self, _: str) -> None:
        await asyncio.to_thread(self.stage.local.kill_postgres)
        await asyncio.sleep(self.rng.uniform(0.2, 5))
        await self.stage.local.restart_postgres()

    async def cut_connections(self, _: str) -> None:
        with contextlib.suppress(OSError, asyncpg.PostgresError):
            admin = await asyncpg.connect(self.stage.servers.database_dsn)
            try:
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'smdih-%' "
                    "AND random() < 0.5"
                )
            finally:
                await admin.close()

    async def restart_mqtt_broker(self, _: str) -> None:
        await asyncio.to_thread(self.mosquitto.stop)
        await asyncio.sleep(self.rng.uniform(0, 5))
        await asyncio.to_thread(self.mosquitto.start, dict.fromkeys(mqtt.FIRMS, mqtt.PASSWORD))

    async def kill_gateway(self, _: str) -> None:
        await self.gateway.restart()


Fault = Callable[[_Trouble, str], Awaitable[None]]
_FAULTS: tuple[tuple[Fault, int], ...] = (
    (_Trouble.kill, 40),
    (_Trouble.freeze, 15),
    (_Trouble.kill_broker, 8),
    (_Trouble.silence_broker, 6),
    (_Trouble.kill_database, 8),
    (_Trouble.cut_connections, 10),
    (_Trouble.restart_mqtt_broker, 8),
    (_Trouble.kill_gateway, 5),
)
_SUBJECTS: dict[Fault, str] = {
    _Trouble.kill_broker: "broker",
    _Trouble.silence_broker: "broker",
    _Trouble.kill_database: "database",
    _Trouble.cut_connections: "database",
    _Trouble.restart_mqtt_broker: "mqtt broker",
    _Trouble.kill_gateway: "gateway",
}


@asynccontextmanager
async def prepare(stage: Stage) -> AsyncIterator[Round]:
    async def play(rng: random.Random) -> Outcome:
        mosquitto = Mosquitto(LOCAL / "stacks" / "chaos" / "mosquitto-hub")
        mosquitto.start(dict.fromkeys(mqtt.FIRMS, mqtt.PASSWORD))
        name = f"hub{rng.randrange(2**31)}"
        try:
            async with (
                stage.database("chaos_hub") as dsn,
                stage.hub(name, roles(), mqtt=mosquitto, database_dsn=dsn) as hub,
            ):
                return await _play(stage, hub, mosquitto, rng)
        finally:
            mosquitto.stop()

    yield play


def roles() -> tuple[str, ...]:
    """Every process that there is."""
    return (
        *("door", "historian", "mqtt-bridge", "anomaly-worker", "anomaly", "anomaly-notifier"),
        *("matching", "funding"),
    )


async def _play(stage: Stage, hub: Hub, mosquitto: Mosquitto, rng: random.Random) -> Outcome:
    outcome = Outcome()
    start_s = telemetry.start_of_history_s()
    # First, so that the bridge knows them when they begin.
    nodes, machines = await _nodes(hub, mosquitto, start_s)
    plant = await register(hub.settings.database_dsn, telemetry.cluster_of(hub), MACHINES)
    sending = Plant(plant.firm_id, plant.machine_ids[:-1], plant.key)
    world = await World.make(lambda service: str(hub.endpoints()[service]["http"]), hub.operator_key)
    firms = [Firm(world, number, random.Random(rng.random())) for number in range(FIRMS)]
    for firm in firms:
        await firm.open()
    stop = asyncio.Event()
    target = hub.processes["door"].grpc
    with telemetry.small_disk(BUFFER_DISK_BYTES) as disk, tempfile.TemporaryDirectory() as folder:
        gateway = _Gateway(hub, plant, disk, start_s, Path(folder) / "buffered")
        async with telemetry.load(hub, sending, start_s, rng.randrange(2**31)) as sender:
            await gateway.start()
            living = asyncio.create_task(
                until_ended(
                    [
                        *(firm.send(target, stop) for firm in firms),
                        *(firm.live(stop) for firm in firms),
                        *(node.run() for node in nodes),
                    ],
                    outcome.broken,
                )
            )
            trouble = _Trouble(stage, hub, mosquitto, gateway, rng)
            try:
                await trouble.play(stage.seconds or SECONDS)
                healed = time.monotonic()
                stop.set()
                for node in nodes:
                    node.stop()
                sent, kept, _ = await asyncio.gather(sender.stop(), gateway.stop(), living)
            finally:
                living.cancel()
                await asyncio.gather(living, return_exceptions=True)
                await gateway.abort()
            ledgers = [np.loadtxt(each, dtype=np.int64, ndmin=2) for each in (sender.ledger, gateway.ledger)]
        outcome.faults = [f"{name} x{times}" for name, times in sorted(trouble.faults.items())]
        outcome.detail |= {"gateway": sent, "buffered": kept | {"kills": gateway.kills}}
        outcome.broken += [f"gateway: {problem}" for problem in sent["problems"]]
        if sent["sent"] != sent["acknowledged"]:
            outcome.broken.append(f"{sent['sent'] - sent['acknowledged']} batches were never acknowledged")
        await _judge(hub, plant, world, np.concatenate(ledgers), start_s, healed, outcome)
        database = await asyncpg.connect(hub.settings.database_dsn)
        try:
            for node in nodes:
                await mqtt.judge(database, node, machines[node.firm], outcome)
        finally:
            await database.close()
    return outcome


async def _judge(
    hub: Hub,
    plant: Plant,
    world: World,
    ledger: Ints,
    start_s: int,
    healed: float,
    outcome: Outcome,
) -> None:
    database = await asyncpg.connect(hub.settings.database_dsn)
    left: dict[str, int] = {}

    async def at_rest() -> bool:
        nonlocal left
        left = await whole.behind(hub, database)
        return not left

    try:
        try:
            await poll("at rest", at_rest, deadline_s=CAUGHT_UP_DEADLINE_S, interval_s=0.5)
        except TimeoutError:
            outcome.broken.append(f"still behind: {left}")
        outcome.detail["caught_up_s"] = round(time.monotonic() - healed, 1)
        if outcome.detail["caught_up_s"] > CAUGHT_UP_WITHIN_S:
            outcome.broken.append(f"caught up only {outcome.detail['caught_up_s']} s after the last fault")
        await telemetry.judge(hub, plant, ledger, start_s, time.monotonic(), outcome)
        told = world.told
        outcome.detail |= {
            "calls": told.calls,
            "calls_repeated": told.repeats,
            "refused": dict(told.refused),
            "restarts": {name: running.starts - 1 for name, running in hub.processes.items()},
        }
        await whole.judge(hub, database, told, outcome)
        duplicates = "SELECT count(*) - count(DISTINCT (machine_id, first_position, ts)) FROM ingest.frame"
        if await database.fetchval(duplicates):
            outcome.broken.append("a frame is stored twice")
        quarantined = await database.fetch("SELECT reason, sum(samples) AS n FROM ingest.quarantine GROUP BY 1")
        if quarantined:
            outcome.broken.append(f"in quarantine: {[(row['reason'], int(row['n'])) for row in quarantined]}")
    finally:
        await database.close()


async def _nodes(hub: Hub, mosquitto: Mosquitto, start_s: int) -> tuple[list[mqtt.Gateway], dict[str, int]]:
    """MQTT nodes of two firms, and their machines' ids."""
    headers = {"Authorization": f"Bearer {hub.operator_key}"}
    async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers, timeout=30) as door:
        registry = mqtt.Registry(door)
        await registry.start()
        machines = await registry.machines()
    nodes = [
        mqtt.Gateway(mosquitto, firm, machine["path"], start_s * 1_000, MQTT_TURN_S)
        for firm, machine in machines.items()
    ]
    return nodes, {firm: machine["id"] for firm, machine in machines.items()}


SCENARIOS = (Scenario("hub", 1, prepare, deadline_s=DEADLINE_S),)
