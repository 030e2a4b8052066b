"""What a Sparkplug host makes of a node's messages; names follow the specification's own test identifiers where there is one."""

import json
import random
from typing import Any

import pytest

from services.ingest.domain import Reason
from services.ingest.mqtt import sparkplug
from services.ingest.mqtt.bridge import machine_paths
from services.ingest.mqtt.sparkplug import REORDER_S, Heard, Node
from smdih.sparkplug.v1 import payload_pb2

INT8, INT32, INT64, UINT64, FLOAT, DOUBLE, BOOLEAN, STRING = 1, 3, 4, 8, 9, 10, 11, 12


def metric(name: str = "", alias: int | None = None, kind: int = DOUBLE, **value: Any) -> payload_pb2.Metric:
    made = payload_pb2.Metric(alias=alias, datatype=kind, **value)
    if name:
        made.name = name
    return made


def body(*metrics: payload_pb2.Metric, seq: int | None = 0, timestamp: int = 1_000) -> bytes:
    return payload_pb2.Payload(timestamp=timestamp, metrics=metrics, seq=seq).SerializeToString()


class Edge:
    """A node with one device, born; `now_s` is the clock."""

    def __init__(self) -> None:
        self.node = Node("acme", "works")
        self.now_s = 0.0

    def hear(self, kind: str, payload: bytes, device: str = "") -> Heard:
        topic = sparkplug.read_topic(f"spBv1.0/acme/{kind}/works" + (f"/{device}" if device else ""))
        assert topic is not None
        return self.node.hear(topic, payload, self.now_s)

    def born(self, seq: int = 0, death_sequence: int = 0) -> "Edge":
        self.hear("NBIRTH", body(metric("bdSeq", kind=UINT64, long_value=death_sequence), seq=seq))
        self.hear("DBIRTH", body(metric("heat", 1, double_value=1.0), seq=(seq + 1) % 256), "press")
        return self

    def data(self, seq: int, alias: int = 1, value: float = 2.0) -> Heard:
        return self.hear("DDATA", body(metric("", alias, double_value=value), seq=seq), "press")


@pytest.mark.parametrize(
    "topic",
    ["spBv1.0/STATE/smdih", "spBv1.0/a/NCMD/n", "spBv1.0/a/NDATA/n/d", "spBv1.0/a/DDATA/n", "spAv1.0/a/NDATA/n"],
)
def test_topics_that_carry_no_telemetry_are_left_alone(topic: str) -> None:
    assert sparkplug.read_topic(topic) is None


@pytest.mark.parametrize(
    ("kind", "value", "number"),
    [
        (INT8, {"int_value": 0xFF}, -1.0),
        (INT8, {"int_value": 0xFFFFFFFF}, -1.0),
        (INT32, {"int_value": 2**32 - 7}, -7.0),
        (INT64, {"long_value": 2**64 - 9}, -9.0),
        (UINT64, {"long_value": 2**40}, 2.0**40),
        (7, {"int_value": 2**32 - 1}, 2.0**32 - 1),
        (FLOAT, {"float_value": 0.5}, 0.5),
        (BOOLEAN, {"boolean_value": True}, 1.0),
    ],
)
def test_numbers_are_read_by_the_type_of_the_birth(kind: int, value: dict[str, Any], number: float) -> None:
    edge = Edge().born()
    edge.hear("DBIRTH", body(metric("x", 5, kind, **value), seq=2), "press")
    heard = edge.hear("DDATA", body(payload_pb2.Metric(alias=5, **value), seq=3), "press")
    assert [sample.value for sample in heard.samples] == [number]


def test_what_is_no_number_no_sample_or_no_good_value_is_told_apart() -> None:
    edge = Edge().born()
    edge.hear(
        "DBIRTH",
        body(metric("text", 2, STRING, string_value=b"a"), metric("heat", 1), metric("Device Control/Go", 3), seq=2),
        "press",
    )
    bad = metric("heat", double_value=1.0)
    bad.properties.keys.append("Quality")
    bad.properties.values.add(int_value=500)
    heard = edge.hear(
        "DDATA",
        body(
            metric("", 2, STRING, string_value=b"b"),
            bad,
            metric("heat", is_null=True),
            metric("heat", is_transient=True, double_value=2.0),
            metric("", 3, BOOLEAN, boolean_value=True),
            metric("heat", timestamp=0, double_value=3.0),
            metric("heat", timestamp=7, double_value=4.0, is_historical=True),
            seq=3,
        ),
        "press",
    )
    assert [(sample.time_us, sample.value) for sample in heard.samples] == [(7_000, 4.0)]
    assert {(fault.reason, fault.samples) for fault in heard.faults} == {
        (Reason.WRONG_TYPE, 1),
        (Reason.BAD_QUALITY, 1),
        (Reason.TIME_OUT_OF_WINDOW, 1),
    }
    assert not heard.rebirth


def test_sequences_go_round_at_255_and_a_birth_may_begin_anywhere() -> None:
    edge = Edge().born(seq=250)
    for seq in (252, 253, 254, 255, 0, 1):
        assert not edge.data(seq).rebirth
    edge.now_s = 100
    assert not edge.node.overdue(edge.now_s)


def test_a_gap_asks_for_a_rebirth_after_the_reorder_time_also_when_the_node_says_nothing_more() -> None:
    edge = Edge().born()
    assert edge.data(3).samples  # 2 is missing; what is there is stored
    assert not edge.node.overdue(edge.now_s)
    edge.now_s = REORDER_S
    assert edge.node.overdue(edge.now_s)
    assert edge.data(4).rebirth
    edge.born()
    assert not edge.data(2).rebirth


def test_a_message_that_was_only_overtaken_asks_for_nothing() -> None:
    edge = Edge().born()
    for seq in (3, 2, 4):
        assert edge.data(seq).samples
    edge.now_s = 100
    assert not edge.data(5).rebirth


def test_an_unknown_alias_is_set_aside_and_never_stored_under_a_made_up_name() -> None:
    heard = Edge().born().data(2, alias=77)
    assert heard.samples == []
    assert [(fault.reason, fault.samples) for fault in heard.faults] == [(Reason.NOT_IN_BIRTH, 1)]
    assert heard.rebirth


def test_a_new_birth_replaces_the_aliases_at_once() -> None:
    edge = Edge().born()
    edge.hear("NBIRTH", body(metric("bdSeq", kind=UINT64, long_value=0)))
    assert edge.data(1).rebirth  # devices are born again after their node
    edge.hear("DBIRTH", body(metric("cold", 1, double_value=1.0), seq=2), "press")
    assert [sample.name for sample in edge.data(3).samples] == ["cold"]


def test_an_alias_of_another_device_is_not_this_devices() -> None:
    edge = Edge().born()
    edge.hear("DBIRTH", body(metric("heat", 9, double_value=1.0), seq=2), "saw")
    heard = edge.hear("DDATA", body(metric("", 1, double_value=1.0), seq=3), "saw")
    assert heard.samples == []
    assert heard.rebirth


def test_only_the_death_of_the_present_birth_counts() -> None:
    edge = Edge().born(death_sequence=4)

    def death(number: int) -> Heard:
        return edge.hear("NDEATH", body(metric("bdSeq", kind=UINT64, long_value=number), seq=None))

    assert not death(3).is_changed
    assert edge.data(2).samples
    assert death(4).is_changed
    assert not death(4).is_changed
    assert edge.data(3).faults[0].reason == Reason.DATA_BEFORE_BIRTH


def test_a_dead_device_does_not_speak() -> None:
    edge = Edge().born()
    assert edge.hear("DDEATH", body(seq=2), "press").is_changed
    heard = edge.data(3)
    assert heard.samples == []
    assert heard.rebirth


def test_a_node_whose_record_no_message_log_could_hold_is_told_what_to_do() -> None:
    edge = Edge().born()
    names = [metric(f"{n:05d}" + "x" * 4_000, double_value=1.0) for n in range(200)]
    faults = [
        fault for n in range(10) for fault in edge.hear("DBIRTH", body(*names, seq=(n + 2) % 256), f"saw-{n}").faults
    ]
    assert {fault.reason for fault in faults} == {Reason.TOO_LARGE}
    assert edge.node.record(1).ByteSize() < 7 * 1024 * 1024
    # Born again it counts once.
    assert edge.hear("DBIRTH", body(*names, seq=20), "saw-0").is_changed


def test_a_node_is_known_again_from_its_record_with_its_aliases_and_any_next_sequence() -> None:
    before = Edge().born(death_sequence=6)
    before.hear("DBIRTH", body(metric("speed", 2, INT32, int_value=1), seq=2), "saw")
    before.hear("DDEATH", body(seq=3), "saw")
    after = Edge()
    after.node = Node("acme", "works", before.node.record(1))
    assert after.node.is_online
    assert [sample.name for sample in after.data(99).samples] == ["heat"]
    assert after.hear("DDATA", body(metric("", 2, INT32, int_value=1), seq=100), "saw").rebirth
    assert after.hear("NDEATH", body(metric("bdSeq", kind=UINT64, long_value=6), seq=None)).is_changed


def test_data_that_the_broker_sends_again_after_a_newer_birth_or_death_are_not_read_by_it() -> None:
    edge = Edge()

    def data(node: Node, at: int, *, is_again: bool) -> Heard:
        topic = sparkplug.read_topic("spBv1.0/acme/DDATA/works/press")
        assert topic is not None
        return node.hear(topic, body(metric("", 1, double_value=1.0), seq=9, timestamp=at), 0.0, is_again=is_again)

    edge.hear("NBIRTH", body(metric("bdSeq", kind=UINT64, long_value=0), timestamp=10))
    edge.hear("DBIRTH", body(metric("heat", 1), seq=1, timestamp=11), "press")
    assert data(edge.node, 20, is_again=False).samples
    edge.hear("NBIRTH", body(metric("bdSeq", kind=UINT64, long_value=0), timestamp=30))
    edge.hear("DBIRTH", body(metric("cold", 1), seq=1, timestamp=31), "press")
    # The process dies before it has acknowledged any of it.
    after = Node("acme", "works", edge.node.record(1))
    again = data(after, 20, is_again=True)
    assert (again.samples, again.faults, again.rebirth) == ([], [], "")
    assert [sample.name for sample in data(after, 20, is_again=False).samples] == ["cold"]
    assert [sample.name for sample in data(after, 32, is_again=True).samples] == ["cold"]
    edge.node = after
    edge.hear("NDEATH", body(metric("bdSeq", kind=UINT64, long_value=0), seq=None))
    dead = Node("acme", "works", after.record(1))
    assert data(dead, 32, is_again=True).faults == []
    assert data(dead, 33, is_again=True).faults


def test_whatever_bytes_come_the_node_lives_on() -> None:
    randoms = random.Random(5)
    edge = Edge().born()
    good = body(metric("heat", 1, double_value=1.0), seq=2)
    for _ in range(2_000):
        broken = bytearray(good)
        for _ in range(randoms.randrange(1, 4)):
            broken[randoms.randrange(len(broken))] = randoms.randrange(256)
        edge.hear(randoms.choice(("DDATA", "DBIRTH", "DDEATH")), bytes(broken), "press")
        edge.hear(randoms.choice(("NDATA", "NBIRTH", "NDEATH")), randoms.randbytes(randoms.randrange(60)))
    assert edge.born().data(2).samples


def test_birth_and_will_of_the_host_carry_the_same_time() -> None:
    birth, death = (sparkplug.state_payload(is_online=online, started_ms=5) for online in (True, False))
    assert json.loads(birth) == {"online": True, "timestamp": 5}
    assert json.loads(death) == {"online": False, "timestamp": 5}


@pytest.mark.parametrize(
    ("payload", "offline"),
    [
        (sparkplug.state_payload(is_online=True, started_ms=9), False),
        (sparkplug.state_payload(is_online=False, started_ms=9), True),
        (b"OFFLINE", True),
        (b"", True),
        (b"[]", True),
        (b"\xff", True),
    ],
)
def test_only_what_denies_the_host_is_answered(payload: bytes, offline: bool) -> None:
    assert sparkplug.says_offline(payload) == offline


def test_group_node_and_device_name_a_machine_with_or_without_the_gateway() -> None:
    topic = sparkplug.read_topic("spBv1.0/acme/DDATA/leeds:line-1:gateway-2/press-3")
    assert topic is not None
    assert machine_paths(topic) == ["acme/leeds/line-1/gateway-2/press-3", "acme/leeds/line-1/press-3"]
    topic = sparkplug.read_topic("spBv1.0/acme/NDATA/leeds:press-3")
    assert topic is not None
    assert machine_paths(topic) == ["acme/leeds/press-3"]
