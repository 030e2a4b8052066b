"""The MQTT path: bridges, both brokers and the historian fail under load; what the MQTT broker acknowledged is stored once."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiomqtt
import asyncpg
import httpx

from chaos import rollups
from chaos.stage import Outcome, Round, Scenario, Stage, poll
from chaos.telemetry import start_of_history_s
from localstack.hub import Hub
from localstack.mosquitto import Mosquitto
from localstack.servers import LOCAL
from smdih.sparkplug.v1 import payload_pb2

ROUNDS = 20
FAULTS_A_ROUND = 3
# Shares 6 and 1 of 8: of two bridges each has one.
FIRMS = ("acme", "birch")
PASSWORD = "chaos"  # noqa: S105  of a broker that lives as long as this run
TURN_S = 0.01
SILENT_S = 15.0
DRAINED_WITHIN_S = 60.0
# The gateways' own clock goes faster than ours, so that minutes and an hour are closed in each round.
STEP_MS = 1_000
PLAIN, FRAME, SPARKPLUG = 0, 1, 2
SIGNALS = ("plain", "frame", "sparkplug")
ALIAS = 7


def value(turn: int, position: int) -> float:
    """What a machine measures: to be had again by whoever judges."""
    return (turn * 7 + position * 13) % 10_007 / 8


@dataclass
class Gateway:
    """A firm's gateway: a plain value, a plain frame and a Sparkplug message each turn; the ledger has what was acknowledged."""

    mosquitto: Mosquitto
    firm: str
    machine: str
    start_ms: int
    turn_s: float = TURN_S
    # (position, turn)
    ledger: set[tuple[int, int]] = field(default_factory=set)
    births: int = 0
    _turn: int = 0
    _waiting: list[tuple[int, int]] = field(default_factory=list)
    _stopping: bool = False

    async def run(self) -> None:
        """Until told to stop, over broken connections; plain messages that were not acknowledged are sent again."""
        while not self._stopping or self._waiting:
            death = payload_pb2.Payload(metrics=[self._death_sequence()]).SerializeToString()
            will = aiomqtt.Will(self._topic("NDEATH"), death, qos=1)
            try:
                async with aiomqtt.Client(
                    "127.0.0.1", self.mosquitto.port, username=self.firm, password=PASSWORD, will=will, timeout=5
                ) as client:
                    await self._connection(client)
            except aiomqtt.MqttError:
                await asyncio.sleep(0.2)

    def stop(self) -> None:
        self._stopping = True

    async def _connection(self, client: aiomqtt.Client) -> None:
        await client.subscribe(self._topic("NCMD"))
        sequence = await self._birth(client)
        while not self._stopping or self._waiting:
            again, self._waiting = self._waiting, []
            for position, turn in again:
                await self._plain(client, position, turn)
            if self._stopping:
                continue
            self._turn += 1
            for position in (PLAIN, FRAME):
                await self._plain(client, position, self._turn)
            await client.publish(self._topic("DDATA"), self._data(sequence), qos=1)
            self.ledger.add((SPARKPLUG, self._turn))
            sequence = (sequence + 1) % 256
            if len(client.messages):
                await anext(aiter(client.messages))
                sequence = await self._birth(client)
            await asyncio.sleep(self.turn_s)

    async def _plain(self, client: aiomqtt.Client, position: int, turn: int) -> None:
        topic, at, measured = f"smdih/v1/{self.machine}", self.start_ms + turn * STEP_MS, value(turn, position)
        if position == PLAIN:
            topic, body = f"{topic}/{SIGNALS[PLAIN]}", {"timestamp_ms": at, "value": measured}
        else:
            body = {"ts": at, "values": {SIGNALS[FRAME]: measured}}  # type: ignore[dict-item]
        self._waiting.append((position, turn))
        await client.publish(topic, json.dumps(body), qos=1)
        self._waiting.remove((position, turn))
        self.ledger.add((position, turn))

    async def _birth(self, client: aiomqtt.Client) -> int:
        self.births += 1
        node = payload_pb2.Payload(timestamp=self.start_ms, seq=0, metrics=[self._death_sequence()])
        await client.publish(self._topic("NBIRTH"), node.SerializeToString(), qos=1)
        signal = payload_pb2.Metric(name=SIGNALS[SPARKPLUG], alias=ALIAS, datatype=10, is_null=True)
        device = payload_pb2.Payload(timestamp=self.start_ms, seq=1, metrics=[signal])
        await client.publish(self._topic("DBIRTH"), device.SerializeToString(), qos=1)
        return 2

    def _data(self, sequence: int) -> bytes:
        metric = payload_pb2.Metric(alias=ALIAS, double_value=value(self._turn, SPARKPLUG))
        data = payload_pb2.Payload(timestamp=self.start_ms + self._turn * STEP_MS, seq=sequence, metrics=[metric])
        return data.SerializeToString()

    def _death_sequence(self) -> payload_pb2.Metric:
        return payload_pb2.Metric(name="bdSeq", datatype=8, long_value=1)

    def _topic(self, kind: str) -> str:
        site, device = self.machine.split("/")[1:]
        topic = f"spBv1.0/{self.firm}/{kind}/{site}:gateway"
        return f"{topic}/{device}" if kind.startswith("D") else topic


Fault = Callable[[Stage, Hub, Mosquitto, random.Random], Awaitable[None]]


async def kill_bridge(_: Stage, hub: Hub, __: Mosquitto, rng: random.Random) -> None:
    hub.kill(rng.choice(("mqtt-bridge", "mqtt-bridge-2")))
    await asyncio.sleep(rng.uniform(0.5, 2))


async def kill_both_bridges(_: Stage, hub: Hub, __: Mosquitto, rng: random.Random) -> None:
    hub.kill("mqtt-bridge")
    await asyncio.sleep(rng.uniform(0, 1))
    hub.kill("mqtt-bridge-2")
    await asyncio.sleep(rng.uniform(0.5, 2))


async def pause_bridge(_: Stage, hub: Hub, __: Mosquitto, rng: random.Random) -> None:
    """Stopped politely, so that its shares go to the other; back after a while."""
    name = rng.choice(("mqtt-bridge", "mqtt-bridge-2"))
    await hub.pause(name)
    await asyncio.sleep(rng.uniform(1, 8))
    hub.resume(name)


async def restart_mqtt_broker(_: Stage, __: Hub, mosquitto: Mosquitto, rng: random.Random) -> None:
    await asyncio.to_thread(mosquitto.stop)
    await asyncio.sleep(rng.uniform(0, 3))
    await asyncio.to_thread(mosquitto.start, dict.fromkeys(FIRMS, PASSWORD))


async def kill_kafka(stage: Stage, _: Hub, __: Mosquitto, rng: random.Random) -> None:
    stage.local.kill_kafka()
    await asyncio.sleep(rng.uniform(0.2, 4))
    await stage.local.restart_kafka()


async def silence_kafka(stage: Stage, _: Hub, __: Mosquitto, ___: random.Random) -> None:
    stage.local.pause_kafka(True)
    try:
        await asyncio.sleep(SILENT_S)
    finally:
        stage.local.pause_kafka(False)


async def kill_database(stage: Stage, _: Hub, __: Mosquitto, rng: random.Random) -> None:
    stage.local.kill_postgres()
    await asyncio.sleep(rng.uniform(0.2, 4))
    await stage.local.restart_postgres()


async def kill_historian(_: Stage, hub: Hub, __: Mosquitto, rng: random.Random) -> None:
    hub.kill("historian")
    await asyncio.sleep(rng.uniform(0.5, 2))


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(kill_bridge, kill_both_bridges, pause_bridge, restart_mqtt_broker, kill_kafka, silence_kafka),
        *(kill_historian, kill_database),
    )
}


class Registry:
    """Firms, and a machine of each for every round."""

    def __init__(self, door: httpx.AsyncClient) -> None:
        self._door = door
        self._sites: dict[str, int] = {}
        self._machines = 0

    async def start(self) -> None:
        for slug in FIRMS:
            firm = {"name": slug, "slug": slug, "sic": "25.62", "region": "Wales", "size": "small"}
            firm_id = (await self._made("/v1/firms", firm))["id"]
            self._sites[slug] = (await self._made("/v1/sites", {"firm_id": firm_id, "slug": "works", "name": "Works"}))[
                "id"
            ]

    async def machines(self) -> dict[str, dict[str, Any]]:
        self._machines += 1
        path, signals = f"press-{self._machines}", [{"name": name} for name in SIGNALS]
        return {
            slug: await self._made(
                "/v1/machines", {"site_id": site, "path": path, "name": path, "kind": "press", "signals": signals}
            )
            for slug, site in self._sites.items()
        }

    async def _made(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = await self._door.post(path, json=body)
        answer.raise_for_status()
        found: dict[str, Any] = answer.json()
        return found


@asynccontextmanager
async def mqtt(stage: Stage) -> AsyncIterator[Round]:
    """Two bridges, two firms, load all the time, three faults one after the other, the first overlapping."""
    mosquitto = Mosquitto(LOCAL / "stacks" / "chaos" / "mosquitto")
    mosquitto.start(dict.fromkeys(FIRMS, PASSWORD))
    roles, copies = ("door", "historian", "mqtt-bridge"), {"mqtt-bridge": 2}
    try:
        async with stage.hub("mqtt", roles, copies=copies, mqtt=mosquitto) as hub:
            headers = {"Authorization": f"Bearer {hub.operator_key}"}
            async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers, timeout=30) as door:
                registry = Registry(door)
                await registry.start()

                async def play(rng: random.Random) -> Outcome:
                    return await _play(stage, hub, mosquitto, await registry.machines(), rng)

                yield play
    finally:
        mosquitto.stop()


async def _play(
    stage: Stage, hub: Hub, mosquitto: Mosquitto, machines: dict[str, dict[str, Any]], rng: random.Random
) -> Outcome:
    outcome = Outcome(faults=rng.sample(sorted(FAULTS), FAULTS_A_ROUND))
    began_s = time.time()
    start_ms = start_of_history_s() * 1000
    await asyncio.gather(hub.wait_ready("mqtt-bridge"), hub.wait_ready("mqtt-bridge-2"))
    await asyncio.sleep(2)  # the bridges' directories follow
    gateways = [Gateway(mosquitto, firm, machine["path"], start_ms) for firm, machine in machines.items()]
    running = [asyncio.create_task(gateway.run()) for gateway in gateways]
    try:
        await asyncio.sleep(rng.uniform(1, 3))
        first, *others = (FAULTS[name](stage, hub, mosquitto, random.Random(rng.random())) for name in outcome.faults)
        overlap = asyncio.create_task(_after(rng.uniform(0, 3), first))
        for fault in others:
            await fault
            await asyncio.sleep(rng.uniform(0, 2))
        await overlap
        healed = time.monotonic()
        await asyncio.sleep(1)
        for gateway in gateways:
            gateway.stop()
        async with asyncio.timeout(DRAINED_WITHIN_S):
            await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    database = await asyncpg.connect(hub.settings.database_dsn)
    try:
        for gateway, machine in zip(gateways, machines.values(), strict=True):
            await judge(database, gateway, machine["id"], outcome)
        quarantined = await database.fetch(
            "SELECT reason, sum(samples) AS samples FROM ingest.quarantine WHERE received > to_timestamp($1) GROUP BY reason",
            began_s,
        )
    finally:
        await database.close()
    outcome.detail |= {
        "drained_s": round(time.monotonic() - healed, 1),
        "births": sum(gateway.births for gateway in gateways),
        "quarantined": {row["reason"]: int(row["samples"]) for row in quarantined},
    }
    if quarantined:
        outcome.broken.append("something is in quarantine though all of it was right")
    return outcome


async def judge(database: Any, gateway: Gateway, machine_id: int, outcome: Outcome) -> None:
    """Compare what the broker acknowledged with the database."""
    stored: dict[tuple[int, int], float] = {}
    rows: list[Any] = []

    async def all_stored() -> bool:
        nonlocal rows
        rows = await database.fetch(
            "SELECT (extract(epoch FROM ts) * 1000)::bigint AS ms, values FROM ingest.frame WHERE machine_id = $1",
            machine_id,
        )
        for row in rows:
            for position, number in enumerate(row["values"]):
                if number is not None:
                    stored[position, (row["ms"] - gateway.start_ms) // STEP_MS] = number
        return stored.keys() >= gateway.ledger

    try:
        await poll("stored", all_stored, deadline_s=DRAINED_WITHIN_S, interval_s=0.5)
    except TimeoutError as error:
        outcome.broken.append(f"{gateway.firm}: {error}")
    outcome.acknowledged += len(gateway.ledger)
    outcome.lost += len(gateway.ledger - stored.keys())
    await rollups.judge(database, [machine_id], outcome)
    wrong = sum(number != value(turn, position) for (position, turn), number in stored.items())
    if wrong:
        outcome.broken.append(f"{gateway.firm}: {wrong} values are not those that were sent")


async def _after(delay_s: float, work: Awaitable[None]) -> None:
    await asyncio.sleep(delay_s)
    await work


SCENARIOS = (Scenario("mqtt", ROUNDS, mqtt),)
