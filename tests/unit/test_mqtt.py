"""Plain JSON payloads, many messages into few batches, and the wire."""

import asyncio
import random
import struct
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest

from localstack.mosquitto import ACCESS, CONFIG
from localstack.servers import ROOT
from services.common.clock import SystemClock
from services.common.directory import Directory
from services.common.errors import Invalid
from services.common.kafka import Cluster
from services.ingest.domain import Reason, Sender
from services.ingest.mqtt.batches import ROWS_MAX, Gathered
from services.ingest.mqtt.bridge import REBIRTH_DELAY_S, REBIRTH_DELAY_S_MAX, Births, Share, _Rebirths
from services.ingest.mqtt.link import WAITING_MESSAGES_MAX, Broker, Link, LinkLost, LinkRefused, Received
from services.ingest.mqtt.payload import Sample, read
from services.ingest.telemetry.door import Door

SENDER = Sender(1, 0, "mqtt", "mqtt", "c")


def test_one_value_names_its_signal_in_the_topic() -> None:
    found = read("acme/leeds/press/heat", b'{"timestamp_ms": 1500, "value": 2}')
    assert (found.machine, found.samples, found.faults) == ("acme/leeds/press", [Sample("heat", 1_500_000, 2.0)], [])


def test_many_values_of_one_time_name_their_signals_themselves() -> None:
    found = read("acme/leeds/press", b'{"ts": 1500.5, "values": {"a": 1, "b": true, "c": null, "d": "x"}}')
    assert found.machine == "acme/leeds/press"
    assert found.samples == [Sample("a", 1_500_500, 1.0), Sample("b", 1_500_500, 1.0)]
    assert [(fault.reason, fault.samples) for fault in found.faults] == [(Reason.WRONG_TYPE, 1)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", Reason.MALFORMED),
        (b"21.5", Reason.MALFORMED),
        (b"[]", Reason.MALFORMED),
        (b'{"value": 1}', Reason.MALFORMED),
        (b'{"timestamp_ms": 1, "value": 1, "quality": "good"}', Reason.MALFORMED),
        (b'{"ts": 1, "values": [1]}', Reason.MALFORMED),
        (b'{"ts": 1, "values": {}}', Reason.EMPTY_BATCH),
        (b'{"timestamp_ms": 1, "value": null}', Reason.EMPTY_BATCH),
        (b'{"timestamp_ms": true, "value": 1}', Reason.TIME_OUT_OF_WINDOW),
        (b'{"timestamp_ms": -1, "value": 1}', Reason.TIME_OUT_OF_WINDOW),
        (b'{"timestamp_ms": 1e300, "value": 1}', Reason.TIME_OUT_OF_WINDOW),
        (b'{"timestamp_ms": 1, "value": {"a": 1}}', Reason.WRONG_TYPE),
    ],
)
def test_what_is_not_read_says_why_and_what_to_send(body: bytes, reason: str) -> None:
    found = read("acme/leeds/press", body)
    assert found.samples == []
    assert [fault.reason for fault in found.faults] == [reason]


def test_values_of_one_machine_and_time_become_one_row_and_a_repeated_cell_a_batch_of_its_own() -> None:
    gathered = Gathered()
    for name, at, value in (("a", 1, 1.0), ("b", 1, 2.0), ("a", 2, 3.0), ("a", 1, 9.0)):
        gathered.add(SENDER, 7, "p", name, at, value)
    first, second = gathered.batches()[SENDER]
    assert (list(first.times_us), list(first.signals), list(first.values)) == ([1, 2], ["a", "b"], [1.0, 2.0, 3.0, 0.0])
    assert first.absent == b"\x08"
    assert (list(second.times_us), list(second.values), second.absent) == ([1], [9.0], b"")


def test_nothing_is_lost_or_doubled_whatever_comes_together_and_no_batch_is_large() -> None:
    randoms = random.Random(3)
    gathered, sent = Gathered(), []
    for _ in range(20_000):
        cell = (randoms.randrange(3), f"s{randoms.randrange(300)}", randoms.randrange(2_000), randoms.random())
        sent.append(cell)
        gathered.add(SENDER, cell[0] + 1, "", *cell[1:])
    found = []
    for batch in gathered.batches()[SENDER]:
        rows, columns = len(batch.times_us), len(batch.signals)
        assert rows <= ROWS_MAX
        bits = np.unpackbits(np.frombuffer(batch.absent, dtype=np.uint8), count=rows * columns, bitorder="little")
        absent = bits.reshape(rows, columns) if batch.absent else np.zeros((rows, columns))
        values = np.array(batch.values).reshape(rows, columns)
        found += [
            (batch.machine_id - 1, batch.signals[j], batch.times_us[i], values[i, j])
            for i, j in np.argwhere(absent == 0)
        ]
    assert sorted(found) == sorted(sent)


class RefusingDoor:
    """Takes nothing, and keeps what is set aside."""

    def __init__(self) -> None:
        self.aside: list[tuple[str, bytes]] = []

    def take(self, *_: Any) -> None:
        raise Invalid("as no batch should be")

    async def set_aside(self, sender: Sender, reason: str, detail: str, raw: bytes, *_: Any, **__: Any) -> None:
        self.aside.append((reason, raw))


class AckedLink:
    def __init__(self) -> None:
        self.acked: list[Received] = []

    def ack(self, messages: Sequence[Received]) -> None:
        self.acked += messages


async def test_a_message_that_the_door_refuses_is_set_aside_and_acknowledged_so_that_no_bridge_gets_it_again() -> None:
    door, link = RefusingDoor(), AckedLink()
    clock = SystemClock()
    share = Share(
        *(0, 1),
        broker=Broker("nowhere", 1),
        client_id="c",
        births=cast(Births, None),
        directory=Directory(Cluster("nowhere"), clock=clock, kinds=("machine",)),
        door=cast(Door, door),
        clock=clock,
    )
    message = Received("smdih/v1/acme/works/press-1/a", b'{"timestamp_ms": 1764000000000, "value": 1}', 1)
    await share._turn(cast(Link, link), [message])
    assert door.aside == [("INVALID", message.payload)]
    assert link.acked == [message]


def test_a_node_that_does_not_answer_is_asked_less_and_less_often() -> None:
    rebirths, node = _Rebirths(), ("g", "n")
    assert rebirths.may_ask(node, 10.0)
    assert not rebirths.may_ask(node, 10.0 + REBIRTH_DELAY_S * 0.9)
    assert rebirths.may_ask(node, 10.0 + REBIRTH_DELAY_S)
    assert not rebirths.may_ask(node, 10.0 + REBIRTH_DELAY_S * 2.9)
    at = 1_000.0
    for _ in range(20):
        at += REBIRTH_DELAY_S_MAX
        assert rebirths.may_ask(node, at)
    rebirths.born(node)
    assert rebirths.may_ask(node, at)


def test_the_documented_broker_is_the_one_that_is_tested() -> None:
    text = (ROOT / "docs/mqtt.md").read_text()
    assert f"```\n{CONFIG}```" in text
    assert f"```\n{ACCESS}```" in text


async def _serve(answer: bytes, *, stays: bool = False) -> tuple[asyncio.Server, Broker]:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer)
        await writer.drain()
        if stays:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    return server, Broker("127.0.0.1", server.sockets[0].getsockname()[1])


async def test_a_broker_that_refuses_is_told_apart_from_one_that_is_away() -> None:
    server, broker = await _serve(b"\x20\x03\x00\x87\x00")
    async with server:
        with pytest.raises(LinkRefused):
            await Link(broker, client_id="c").__aenter__()
    with pytest.raises(LinkLost, match="no answer"):
        await Link(broker, client_id="c").__aenter__()


async def test_bytes_that_are_not_mqtt_end_the_connection_and_nothing_else() -> None:
    randoms = random.Random(1)

    async def listen(broker: Broker) -> None:
        async with Link(broker, client_id="c") as link:
            while True:
                await link.messages(messages_max=10, timeout_s=0.05)
                link.ack([])

    for _ in range(100):
        server, broker = await _serve(b"\x20\x03\x00\x00\x00" + randoms.randbytes(50))
        async with server, asyncio.timeout(5):
            with pytest.raises(LinkLost):
                await listen(broker)


async def test_past_a_bound_the_broker_is_not_listened_to_until_messages_are_taken() -> None:
    message = b"\x30\x04" + struct.pack(">H", 1) + b"t\x00"
    count = WAITING_MESSAGES_MAX * 60
    server, broker = await _serve(b"\x20\x03\x00\x00\x00" + message * count, stays=True)
    async with server, Link(broker, client_id="c") as link:
        taken, most = 0, 0
        while taken < count:
            await asyncio.sleep(0)
            most = max(most, len(link._wire._waiting))
            taken += len(await link.messages(messages_max=500, timeout_s=5))
    # One read of the socket may go past the bound, once.
    assert most < WAITING_MESSAGES_MAX + 256 * 1024 // len(message)
