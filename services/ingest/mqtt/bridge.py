"""From an MQTT broker through the door's own checks into the message log.

The firms are divided into shares by their short names; each share has one session at the broker, so a node's messages keep their
order. Kafka's group of the births topic decides which process serves a share: one partition, one share. The session outlives the
process: what comes meanwhile waits at the broker, and connecting takes the session away from whoever had it, so two processes
never serve one share. A message is acknowledged to the broker when Kafka holds what became of it.
"""

import asyncio
import time
import zlib
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, TopicPartition
from aiokafka.errors import KafkaConnectionError, KafkaError
from prometheus_client import Counter, Gauge

from services.common import topics
from services.common.clock import Clock
from services.common.directory import Directory
from services.common.errors import HubError, SlowDown, TryAgain
from services.common.kafka import Cluster, Message, Publisher
from services.common.logs import correlated, current_correlation_id, get_logger, new_correlation_id
from services.ingest.domain import Reason, Sender
from services.ingest.mqtt import payload as mqttpayload
from services.ingest.mqtt import sparkplug
from services.ingest.mqtt.batches import Gathered
from services.ingest.mqtt.link import TAKEN_OVER, Broker, Link, LinkLost, LinkRefused, Received, Will
from services.ingest.mqtt.payload import Fault
from services.ingest.telemetry.door import Door, Taken, durable, parts
from smdih.ingest.v1 import births_pb2, telemetry_pb2

log = get_logger(__name__)

ROOT: Final = "smdih/v1"
GROUP: Final = "smdih.ingest.mqtt"
# How long a broker keeps what is for the bridge while no bridge runs.
SESSION_EXPIRY_S = 7 * 24 * 3600
# One turn: so many messages are checked, published and acknowledged together.
MESSAGES_PER_TURN_MAX = 500
TURN_TIMEOUT_S = 0.5
RETRY_DELAY_S = 1.0
RETRY_DELAY_S_MAX = 10.0
# After which a process that says nothing loses its shares to the others; the shortest that Kafka takes.
SESSION_TIMEOUT_MS = 6_000
# Longer than the group takes to tell a living process that a share is no longer its own.
TAKEN_OVER_DELAY_S = 5.0
POLL_TIMEOUT_MS = 500
# A node that does not answer is asked less and less often.
REBIRTH_DELAY_S = 5.0
REBIRTH_DELAY_S_MAX = 300.0
# A share's nodes that may be asked in one turn, so that a broker that comes back does not meet all births at once.
REBIRTHS_PER_TURN_MAX = 20

# Messages from the broker by form (json or sparkplug) and what became of them (taken, or again: Kafka did not answer).
messages_total = Counter("smdih_ingest_mqtt_messages_total", "MQTT messages", ["form", "outcome"])
# Rebirths that nodes were asked for.
rebirths_total = Counter("smdih_ingest_mqtt_rebirths_total", "Sparkplug rebirths asked for")
# Shares of the firms that this process serves, connected to the broker.
shares_connected = Gauge("smdih_ingest_mqtt_shares_connected", "Shares served by this process")
# Firms whose topics are subscribed to, of those shares.
firms_subscribed = Gauge("smdih_ingest_mqtt_firms", "Firms whose topics are read", ["share"])
# Nodes of those shares that are alive.
nodes_online = Gauge("smdih_ingest_mqtt_nodes_online", "Sparkplug nodes online", ["share"])


_OVER_QUOTA = (
    "The firm sends more samples a second than its quota; send less often, or ask an operator for more, "
    "then replay this item from quarantine."
)


def share_of(slug: str, shares: int) -> int:
    """Which share a firm belongs to."""
    return zlib.crc32(slug.encode()) % shares


def machine_paths(topic: sparkplug.Topic) -> list[str]:
    """Where a message may belong in the registry, best first: the node's last level may be a gateway rather than a place."""
    group, node, device = topic.group.split(":"), topic.node.split(":"), topic.device.split(":")
    if not topic.device:
        return ["/".join((*group, *node))]
    return ["/".join((*group, *node, *device)), "/".join((*group, *node[:-1], *device))]


@dataclass(frozen=True)
class _Aside:
    """Something of a message that goes to quarantine as it came."""

    sender: Sender
    machine_id: int
    fault: Fault
    raw: bytes


@dataclass(frozen=True)
class _Turn:
    """What one turn's messages hold."""

    gathered: Gathered
    aside: list[_Aside]
    # Machines that send no more, as their nodes say.
    gone: list[tuple[Sender, int, str]]
    births: dict[tuple[str, str], births_pb2.NodeRecord]
    rebirths: dict[tuple[str, str], str]


class _Rebirths:
    """How often a node may be asked for a rebirth."""

    def __init__(self) -> None:
        self._asked: dict[tuple[str, str], tuple[float, float]] = {}

    def born(self, node: tuple[str, str]) -> None:
        self._asked.pop(node, None)

    def may_ask(self, node: tuple[str, str], now_s: float) -> bool:
        at, delay_s = self._asked.get(node, (0.0, 0.0))
        if delay_s and now_s - at < delay_s:
            return False
        self._asked[node] = (now_s, min(max(REBIRTH_DELAY_S, delay_s * 2), REBIRTH_DELAY_S_MAX))
        return True


class Share:
    """The firms of one share: their messages, and their Sparkplug nodes."""

    def __init__(
        self,
        number: int,
        shares: int,
        *,
        broker: Broker,
        client_id: str,
        births: "Births",
        directory: Directory,
        door: Door,
        clock: Clock,
    ) -> None:
        self._number = number
        self._shares = shares
        self._broker = broker
        self._client_id = client_id
        self._births = births
        self._directory = directory
        self._door = door
        self._clock = clock
        self._nodes: dict[tuple[str, str], sparkplug.Node] = {}
        self._rebirths = _Rebirths()
        self._firms: dict[str, int] = {}
        self.is_connected = False

    async def run(self) -> None:
        """Serve until cancelled, over broken connections."""
        delay_s = RETRY_DELAY_S
        while True:
            started_s = time.monotonic()
            try:
                await self._connection()
            except LinkRefused as error:
                log.error("the MQTT broker refuses the bridge", share=self._number, error=str(error))
            except LinkLost as error:
                log.warning("connection to the MQTT broker lost", share=self._number, error=str(error))
                if error.code == TAKEN_OVER:
                    await asyncio.sleep(TAKEN_OVER_DELAY_S)
            except (KafkaError, OSError, TryAgain) as error:
                log.warning("births cannot be read yet", share=self._number, error=repr(error))
            delay_s = RETRY_DELAY_S if time.monotonic() - started_s > 30 else min(delay_s * 2, RETRY_DELAY_S_MAX)
            await asyncio.sleep(delay_s / 2)

    async def _connection(self) -> None:
        async with Link(self._broker, client_id=self._client_id, session_expiry_s=SESSION_EXPIRY_S) as link:
            # From here on the session is ours; what the one before us acknowledged stands in the births.
            records = await self._births.read(self._number)
            self._nodes = {key: sparkplug.Node(*key, record) for key, record in records.items()}
            self._firms = {}
            self._count_nodes()
            subscribing = asyncio.create_task(self._subscribe(link, self._new_firms()))
            try:
                while True:
                    messages = await link.messages(messages_max=MESSAGES_PER_TURN_MAX, timeout_s=TURN_TIMEOUT_S)
                    if subscribing.done():
                        await subscribing
                        self._connected()
                        if new := self._new_firms():
                            subscribing = asyncio.create_task(self._subscribe(link, new))
                    await self._turn(link, messages)
            finally:
                subscribing.cancel()
                await asyncio.gather(subscribing, return_exceptions=True)
                if self.is_connected:
                    self.is_connected = False
                    shares_connected.dec()

    def _connected(self) -> None:
        if not self.is_connected:
            self.is_connected = True
            shares_connected.inc()
            log.info("share connected", share=self._number, firms=len(self._firms), nodes=len(self._nodes))

    def _new_firms(self) -> list[str]:
        """Short names of this share's firms that are new here."""
        if len(self._directory.firms) == len(self._firms):
            return []
        new = {firm.slug: firm.id for firm in self._directory.firms.values() if firm.slug not in self._firms}
        self._firms |= new
        return [slug for slug in new if share_of(slug, self._shares) == self._number]

    async def _subscribe(self, link: Link, slugs: Sequence[str]) -> None:
        """Beside the turns: the broker's answer stands behind what waits for us, which may be more than we read ahead."""
        if slugs:
            await link.subscribe([f for slug in slugs for f in (f"{ROOT}/{slug}/#", f"{sparkplug.NAMESPACE}/{slug}/#")])
        ours = sum(share_of(slug, self._shares) == self._number for slug in self._firms)
        firms_subscribed.labels(str(self._number)).set(ours)

    async def _turn(self, link: Link, messages: Sequence[Received]) -> None:
        with correlated(new_correlation_id()):
            turn = self._read(messages)
            delay_s = RETRY_DELAY_S
            while True:
                try:
                    await self._keep(turn)
                    break
                except HubError as error:
                    if isinstance(error, SlowDown | TryAgain) or error.retry_after_s:
                        log.warning("messages cannot be kept yet", share=self._number, error=str(error))
                        _count(messages, "again")
                        await asyncio.sleep(error.retry_after_s or delay_s)
                    else:  # sent again they would be refused again, by every bridge in turn
                        log.error("messages are set aside", share=self._number, reason=error.reason, error=str(error))
                        turn = self._whole_aside(messages, error)
        link.ack(messages)
        _count(messages, "taken")
        for sender, machine_id, detail in turn.gone:  # after what came before it has been noted as taken
            self._door.note_offline(sender, machine_id, detail)
        for (group, node), why in turn.rebirths.items():
            rebirths_total.inc()
            log.info("rebirth asked for", group=group, node=node, why=why)
            await link.publish(
                sparkplug.rebirth_topic(group, node), sparkplug.rebirth_payload(self._clock.now_us() // 1000)
            )

    def _read(self, messages: Sequence[Received]) -> _Turn:
        turn = _Turn(Gathered(), [], [], {}, {})
        now_s = time.monotonic()
        wanted: dict[tuple[str, str], str] = {}
        for message in messages:
            if message.topic.startswith(f"{ROOT}/"):
                self._read_plain(message, turn)
            else:
                topic = sparkplug.read_topic(message.topic)
                if topic is not None:
                    self._read_sparkplug(topic, message, turn, wanted, now_s)
        for key, node in self._nodes.items():
            if key not in wanted and (why := node.overdue(now_s)):
                wanted[key] = why
        for key, why in wanted.items():
            if len(turn.rebirths) < REBIRTHS_PER_TURN_MAX and self._rebirths.may_ask(key, now_s):
                turn.rebirths[key] = why
        return turn

    def _whole_aside(self, messages: Sequence[Received], error: HubError) -> _Turn:
        fault = Fault(error.reason, error.detail, 0)
        aside = []
        for message in messages:
            levels = message.topic.split("/")
            slug = levels[2] if message.topic.startswith(f"{ROOT}/") else levels[1]
            aside.append(_Aside(self._sender(slug, "mqtt"), 0, fault, message.payload))
        return _Turn(Gathered(), aside, [], {}, {})

    def _read_plain(self, message: Received, turn: _Turn) -> None:
        path = message.topic.removeprefix(f"{ROOT}/")
        sender = self._sender(path.partition("/")[0], "mqtt")
        read = mqttpayload.read(path, message.payload)
        machine_id = self._directory.machine_id(read.machine)
        for sample in read.samples:
            turn.gathered.add(sender, machine_id, read.machine, sample.name, sample.time_us, sample.value)
        turn.aside.extend(_Aside(sender, machine_id, fault, message.payload) for fault in read.faults)

    def _read_sparkplug(
        self,
        topic: sparkplug.Topic,
        message: Received,
        turn: _Turn,
        wanted: dict[tuple[str, str], str],
        now_s: float,
    ) -> None:
        key = (topic.group, topic.node)
        node = self._nodes.get(key)
        if node is None:
            node = self._nodes[key] = sparkplug.Node(*key)
        sender = self._sender(topic.group, f"sparkplug {topic.node}"[:128])
        heard = node.hear(topic, message.payload, now_s, is_again=message.is_again)
        if topic.kind == "NBIRTH":
            self._rebirths.born(key)
            wanted.pop(key, None)
        if heard.rebirth:
            wanted[key] = heard.rebirth
        if heard.is_changed:
            turn.births[key] = node.record(self._clock.now_us())
            log.info("sparkplug state", kind=topic.kind, group=topic.group, node=topic.node, device=topic.device)
            self._count_nodes()
        for device in heard.gone:
            gone_id, _ = self._machine(replace(topic, device=device))
            if gone_id:
                who = f"the device {device!r} of the node {topic.node!r}" if device else f"the node {topic.node!r}"
                turn.gone.append((sender, gone_id, f"{who} said goodbye, or its connection broke"))
        machine_id, path = self._machine(topic)
        for sample in heard.samples:
            turn.gathered.add(sender, machine_id, path, sample.name, sample.time_us, sample.value)
        turn.aside.extend(_Aside(sender, machine_id, fault, message.payload) for fault in heard.faults)

    async def _keep(self, turn: _Turn) -> None:
        """Return when Kafka holds what the turn's messages hold. Raises SlowDown, TryAgain, and what else the door refuses."""
        taken: list[Taken] = []
        for sender, batches in turn.gathered.batches().items():
            for part in parts(batches):
                taken = await self._take(sender, part, taken)
        await asyncio.gather(
            durable(taken),
            *(
                self._door.set_aside(
                    one.sender,
                    one.fault.reason,
                    one.fault.detail,
                    one.raw,
                    one.fault.samples,
                    machine_id=one.machine_id,
                )
                for one in turn.aside
            ),
        )
        if turn.births:
            await self._births.write(self._number, turn.births)

    async def _take(self, sender: Sender, part: Sequence[telemetry_pb2.Batch], taken: list[Taken]) -> list[Taken]:
        """What is on its way with this part, after `taken`."""
        try:
            return taken + self._door.take(sender, part)
        except SlowDown as error:
            if error.reason == Reason.QUOTA_SAMPLES:
                # Nobody can be told to wait, and the other firms of the share must not.
                await self._door.keep_aside(sender, Reason.QUOTA_SAMPLES, _OVER_QUOTA, part)
                return taken
            if not taken:
                raise
        await durable(taken)  # this turn's own takes the room
        return await self._take(sender, part, [])

    def _sender(self, slug: str, source: str) -> Sender:
        # The broker's access list is what binds an account to its firm's topics; no key of the hub takes part.
        return Sender(self._firms.get(slug, 0), 0, source, "mqtt", current_correlation_id())

    def _machine(self, topic: sparkplug.Topic) -> tuple[int, str]:
        """Id (0: none is registered) and path of the machine that a topic names."""
        paths = machine_paths(topic)
        found = ((self._directory.machine_id(path), path) for path in paths)
        return next((one for one in found if one[0]), (0, paths[0]))

    def _count_nodes(self) -> None:
        nodes_online.labels(str(self._number)).set(sum(node.is_online for node in self._nodes.values()))


def _count(messages: Sequence[Received], outcome: str) -> None:
    plain = sum(message.topic.startswith(f"{ROOT}/") for message in messages)
    messages_total.labels("json", outcome).inc(plain)
    messages_total.labels("sparkplug", outcome).inc(len(messages) - plain)


class Births:
    """Sparkplug nodes in the message log, a compacted partition for each share."""

    def __init__(self, cluster: Cluster, publisher: Publisher) -> None:
        self._cluster = cluster
        self._publisher = publisher

    async def shares(self) -> int:
        """How many shares there are. Raises TryAgain."""
        return await self._publisher.partitions(topics.BIRTHS)

    async def read(self, share: int) -> dict[tuple[str, str], births_pb2.NodeRecord]:
        """All nodes of a share. Raises KafkaError, OSError."""
        partition = TopicPartition(self._cluster.name(topics.BIRTHS), share)
        consumer = AIOKafkaConsumer(**self._cluster.client(), group_id=None, auto_offset_reset="earliest")
        found: dict[tuple[str, str], births_pb2.NodeRecord] = {}
        await consumer.start()
        try:
            consumer.assign([partition])
            await consumer.seek_to_beginning(partition)
            end = (await consumer.end_offsets([partition]))[partition]
            while await consumer.position(partition) < end:
                for record in (await consumer.getmany(partition, timeout_ms=POLL_TIMEOUT_MS)).get(partition, ()):
                    read = births_pb2.NodeRecord.FromString(record.value)
                    found[read.group, read.node] = read
        finally:
            await consumer.stop()
        return found

    async def write(self, share: int, records: dict[tuple[str, str], births_pb2.NodeRecord]) -> None:
        """Return when they are durable. Raises TryAgain."""
        await self._publisher.publish_all(
            [
                Message(topics.BIRTHS, record.SerializeToString(), key="/".join(key).encode(), partition=share)
                for key, record in records.items()
            ]
        )


class Host:
    """The host application that nodes wait for: a birth and a will on its STATE topic, on a clean connection of its own."""

    def __init__(self, broker: Broker, *, host_id: str, client_id: str, clock: Clock) -> None:
        self._broker = broker
        self._topic = sparkplug.state_topic(host_id)
        self._client_id = client_id
        self._clock = clock

    async def run(self) -> None:
        """Be online until cancelled, then say goodbye."""
        while True:
            try:
                await self._connection()
            except LinkLost as error:
                log.warning("the host's connection to the MQTT broker is lost", error=str(error))
                if error.code == TAKEN_OVER:
                    await asyncio.sleep(TAKEN_OVER_DELAY_S)
            await asyncio.sleep(RETRY_DELAY_S)

    async def _connection(self) -> None:
        started_ms = self._clock.now_us() // 1000
        death = sparkplug.state_payload(is_online=False, started_ms=started_ms)
        birth = sparkplug.state_payload(is_online=True, started_ms=started_ms)
        async with Link(self._broker, client_id=self._client_id, will=Will(self._topic, death)) as link:
            await link.subscribe([self._topic])
            await link.publish(self._topic, birth, qos=1, retain=True)
            try:
                while True:
                    for message in await link.messages(messages_max=100, timeout_s=TURN_TIMEOUT_S):
                        link.ack([message])
                        if sparkplug.says_offline(message.payload):
                            # The will of an earlier connection came late, or somebody else speaks in our name.
                            await link.publish(self._topic, birth, qos=1, retain=True)
            finally:
                with suppress(LinkLost):
                    await link.publish(self._topic, death, qos=1, retain=True)


class Bridge(ConsumerRebalanceListener):  # type: ignore[misc]  # untyped base
    """One of the processes that share the firms among them."""

    def __init__(
        self,
        cluster: Cluster,
        births: Births,
        *,
        share: Callable[[int, int], Share],
        host: Host,
    ) -> None:
        """`share` makes the one of a number, of so many; the process that has number 0 is also the host."""
        self._cluster = cluster
        self._births = births
        self._share = share
        self._host = host
        self._served: dict[int, Share] = {}
        self._tasks: dict[int, list[asyncio.Task[None]]] = {}
        self._is_assigned = False
        self._is_joined = False

    async def run(self) -> None:
        """Serve the shares that fall to this process, until cancelled."""
        shares = await self._births.shares()
        consumer = AIOKafkaConsumer(
            **self._cluster.client(),
            group_id=self._cluster.name(GROUP),
            enable_auto_commit=False,
            auto_offset_reset="latest",
            session_timeout_ms=SESSION_TIMEOUT_MS,
            heartbeat_interval_ms=SESSION_TIMEOUT_MS // 4,
        )
        while True:
            try:
                await consumer.start()
                break
            except KafkaConnectionError as error:
                log.warning("no broker answers yet", error=repr(error))
                await asyncio.sleep(RETRY_DELAY_S)
        consumer.subscribe([self._cluster.name(topics.BIRTHS)], listener=self)
        try:
            while True:
                # The group is all that is wanted of this consumer: each share reads its births when it connects.
                await consumer.getmany(timeout_ms=POLL_TIMEOUT_MS)
                await self._serve({partition.partition for partition in consumer.assignment()}, shares)
                self._is_joined = self._is_joined or self._is_assigned
                for task in [task for tasks in self._tasks.values() for task in tasks if task.done()]:
                    task.result()  # a share ends by what it did not expect only: then so does the process
        finally:
            await self._serve(frozenset(), shares)
            await consumer.stop()

    async def is_serving(self) -> bool:
        """Readiness: the group has been joined, and every share that fell to this process is connected."""
        return self._is_joined and all(share.is_connected for share in self._served.values())

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        """Nothing to do: whoever gets a share takes its session with it, and `_serve` stops what is no longer ours."""

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        self._is_assigned = True
        log.info("shares assigned", shares=sorted(partition.partition for partition in assigned))

    async def _serve(self, wanted: Collection[int], shares: int) -> None:
        for number in [number for number in self._tasks if number not in wanted]:
            del self._served[number]
            tasks = self._tasks.pop(number)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            nodes_online.labels(str(number)).set(0)
            firms_subscribed.labels(str(number)).set(0)
        for number in wanted:
            if number not in self._tasks:
                self._served[number] = share = self._share(number, shares)
                self._tasks[number] = [asyncio.create_task(share.run())]
                if number == 0:
                    self._tasks[number].append(asyncio.create_task(self._host.run()))
