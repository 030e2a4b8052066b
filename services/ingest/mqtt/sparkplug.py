"""Sparkplug B 3.0 as a host application reads it: births, aliases, the order of a node's messages, deaths.

https://sparkplug.eclipse.org/specification/version/3.0/documents/sparkplug-specification-3.0.0.pdf. Nothing here does I/O: a node
hears a message and says what it holds, what has to be remembered, and whether the node should be asked to be born again.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.message import DecodeError

from services.ingest.domain import Reason
from services.ingest.mqtt.payload import Fault, Sample
from smdih.ingest.v1 import births_pb2
from smdih.sparkplug.v1 import payload_pb2

NAMESPACE: Final = "spBv1.0"
REBIRTH_METRIC: Final = "Node Control/Rebirth"
SEQUENCES: Final = 256
# How long a message that was overtaken may still come before the node is asked for a rebirth.
REORDER_S: Final = 2.0
METRICS_PER_NODE_MAX: Final = 20_000
# The names of a node's metrics and devices stand in one record of the message log.
NAMES_BYTES_PER_NODE_MAX: Final = 6 * 1024 * 1024
GOOD_QUALITY: Final = 192

_DEVICE_KINDS = ("DBIRTH", "DDATA", "DDEATH")
_NODE_KINDS = ("NBIRTH", "NDATA", "NDEATH")
_DEATH_SEQUENCE = "bdSeq"
# For the protocol itself, not measured on the machine.
_CONTROL = ("Node Control/", "Device Control/")
# Of a birth that carries none.
_NO_SEQUENCE = SEQUENCES
_TIME_MS_MAX = 2**63 // 1000 - 1

_INT8, _INT16, _INT32, _INT64, _UINT64, _FLOAT, _DOUBLE, _BOOLEAN = 1, 2, 3, 4, 8, 9, 10, 11
_SIGNED_BITS = {_INT8: 8, _INT16: 16, _INT32: 32, _INT64: 64}


@dataclass(frozen=True)
class Topic:
    """Where a message of a node or of one of its devices (else "") was published."""

    group: str
    kind: str
    node: str
    device: str


def read_topic(topic: str) -> Topic | None:
    """None for commands, STATE and whatever else a host has nothing to do with."""
    levels = topic.split("/")
    if levels[0] != NAMESPACE:
        return None
    if len(levels) == 4 and levels[2] in _NODE_KINDS:
        return Topic(levels[1], levels[2], levels[3], "")
    if len(levels) == 5 and levels[2] in _DEVICE_KINDS:
        return Topic(levels[1], levels[2], levels[3], levels[4])
    return None


def state_topic(host_id: str) -> str:
    return f"{NAMESPACE}/STATE/{host_id}"


def state_payload(*, is_online: bool, started_ms: int) -> bytes:
    """Birth and will of one connection carry the same time."""
    return json.dumps({"online": is_online, "timestamp": started_ms}).encode()


def says_offline(payload: bytes) -> bool:
    """Whether a STATE message says anything but that the host is there. Two hosts of one name do not answer each other's births."""
    try:
        said = json.loads(payload)
    except (ValueError, RecursionError):
        return True
    return not isinstance(said, dict) or said.get("online") is not True


def rebirth_topic(group: str, node: str) -> str:
    return f"{NAMESPACE}/{group}/NCMD/{node}"


def rebirth_payload(now_ms: int) -> bytes:
    metric = payload_pb2.Metric(name=REBIRTH_METRIC, timestamp=now_ms, datatype=_BOOLEAN, boolean_value=True)
    return payload_pb2.Payload(timestamp=now_ms, metrics=[metric]).SerializeToString()


@dataclass
class Heard:
    """What a message was good for."""

    samples: list[Sample] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    # The node's record is another one now and has to be kept.
    is_changed: bool = False
    # Devices that were alive and are not any more; "" is the node itself.
    gone: list[str] = field(default_factory=list)
    # Why the node should be asked to be born again; empty: no need.
    rebirth: str = ""


@dataclass(frozen=True)
class _Known:
    """A metric as its birth named it."""

    device: str
    name: str
    datatype: int
    alias: int | None


class _Order:
    """The rule of a node's sequence numbers: one up with each message, 255 to 0."""

    def __init__(self) -> None:
        # None: nothing heard since this process has the node, and what was not acknowledged may come again: any is right.
        self._next: int | None = None
        self._missing: set[int] = set()
        self._since_s = 0.0

    def restart(self, sequence: int) -> None:
        """A birth: what comes next is known again."""
        self._next = (sequence + 1) % SEQUENCES
        self._missing.clear()

    def take(self, sequence: int, now_s: float) -> None:
        if self._next is not None and sequence in self._missing:
            self._missing.discard(sequence)
            return
        if self._next is not None and sequence != self._next:
            if not self._missing:
                self._since_s = now_s
            self._missing |= {(self._next + i) % SEQUENCES for i in range((sequence - self._next) % SEQUENCES)}
        self._next = (sequence + 1) % SEQUENCES

    def is_broken(self, now_s: float) -> bool:
        return bool(self._missing) and now_s - self._since_s >= REORDER_S


class Node:
    """An edge node as its messages tell it."""

    def __init__(self, group: str, node: str, record: births_pb2.NodeRecord | None = None) -> None:
        self.group = group
        self.node = node
        self._death_sequence = _NO_SEQUENCE
        self._devices: dict[str, dict[str, _Known]] = {}
        self._names_bytes: dict[str, int] = {}
        self._online: set[str] = set()
        self._aliases: dict[int, _Known] = {}
        self._order = _Order()
        # Times of the node: of its newest data; what the record says, and what the next one will say.
        self._last_ms = self._settled_ms = self._to_settle_ms = 0
        if record is not None:
            self._death_sequence = record.death_sequence
            self._last_ms = self._settled_ms = self._to_settle_ms = record.settled_ms
            for device in record.devices:
                self._learn(
                    device.device,
                    [
                        _Known(device.device, m.name, m.datatype, m.alias if m.HasField("alias") else None)
                        for m in device.metrics
                    ],
                )
                if not device.is_online:
                    self._online.discard(device.device)

    @property
    def is_online(self) -> bool:
        return "" in self._online

    def record(self, changed_us: int) -> births_pb2.NodeRecord:
        """What a new process needs to go on with this node."""
        made = births_pb2.NodeRecord(
            group=self.group,
            node=self.node,
            death_sequence=self._death_sequence,
            changed_us=changed_us,
            settled_ms=self._to_settle_ms,
        )
        for device, metrics in self._devices.items():
            made.devices.add(
                device=device,
                is_online=device in self._online,
                metrics=[
                    births_pb2.MetricRecord(name=known.name, alias=known.alias, datatype=known.datatype)
                    for known in metrics.values()
                ],
            )
        return made

    def overdue(self, now_s: float) -> str:
        """Why the node should be asked for a rebirth though it says nothing; empty: no need."""
        return "a message is missing" if self._order.is_broken(now_s) else ""

    def hear(self, topic: Topic, body: bytes, now_s: float, *, is_again: bool = False) -> Heard:
        """Take one message; `is_again`: the broker says that it has sent it before. Never raises for what can be sent."""
        try:
            payload = payload_pb2.Payload.FromString(body)
        except DecodeError:
            detail = f"The body is no Sparkplug B payload; the hub asked {self.node} for a rebirth."
            return Heard(faults=[Fault(Reason.MALFORMED, detail, 0)], rebirth="a body that cannot be read")
        if topic.kind in ("NDATA", "DDATA"):
            if is_again and payload.timestamp <= self._settled_ms:
                return Heard()
            self._last_ms = min(payload.timestamp, _TIME_MS_MAX)
        elif topic.kind in ("NBIRTH", "DBIRTH"):
            self._to_settle_ms = max(0, min(payload.timestamp, _TIME_MS_MAX) - 1)
        else:
            self._to_settle_ms = self._last_ms
        if topic.kind == "NDEATH":
            return self._node_death(payload)
        if topic.kind == "NBIRTH":
            self._settled_ms = 0  # from here on the node's state is what its messages make of it, in their order
            self._order.restart(payload.seq % SEQUENCES)
        elif payload.HasField("seq"):
            self._order.take(payload.seq % SEQUENCES, now_s)
        if topic.kind in ("NBIRTH", "DBIRTH"):
            heard = self._birth(topic, payload)
        elif topic.kind == "DDEATH":
            gone = [topic.device] if topic.device in self._online else []
            self._online.discard(topic.device)
            heard = Heard(is_changed=bool(gone), gone=gone)
        else:
            heard = self._data(topic, payload)
        heard.rebirth = heard.rebirth or self.overdue(now_s)
        return heard

    def _node_death(self, payload: payload_pb2.Payload) -> Heard:
        if not self.is_online or _death_sequence(payload) != self._death_sequence:
            return Heard()  # the will of an earlier connection: the node has been born again since
        gone = sorted(self._online)
        self._online.clear()
        return Heard(is_changed=True, gone=gone)

    def _birth(self, topic: Topic, payload: payload_pb2.Payload) -> Heard:
        if topic.kind == "DBIRTH" and not self.is_online:
            return self._unborn(payload, f"{self.node} has not been born")
        known = [
            _Known(topic.device, metric.name, metric.datatype, metric.alias if metric.HasField("alias") else None)
            for metric in payload.metrics
            if metric.name and metric.name != _DEATH_SEQUENCE
        ]
        if topic.kind == "NBIRTH":
            # Devices are there again when they are born again.
            self._devices.clear()
            self._names_bytes.clear()
            self._online.clear()
            self._aliases.clear()
            self._death_sequence = _death_sequence(payload)
        names_bytes = _names_bytes(topic.device, known)
        others = [device for device in self._devices if device != topic.device]
        detail = ""
        if len(known) + sum(len(self._devices[device]) for device in others) > METRICS_PER_NODE_MAX:
            detail = f"{self.node} has more than {METRICS_PER_NODE_MAX} metrics; spread its devices over several nodes."
        elif names_bytes + sum(self._names_bytes[device] for device in others) > NAMES_BYTES_PER_NODE_MAX:
            detail = (
                f"The names of the metrics of {self.node} have more than {NAMES_BYTES_PER_NODE_MAX} bytes; "
                "spread its devices over several nodes."
            )
        if detail:
            return Heard(faults=[Fault(Reason.TOO_LARGE, detail, _values(payload.metrics))])
        self._learn(topic.device, known)
        heard = self._data(topic, payload)
        heard.is_changed = True
        return heard

    def _learn(self, device: str, metrics: Iterable[_Known]) -> None:
        for old in self._devices.get(device, {}).values():
            if old.alias is not None and self._aliases.get(old.alias) is old:
                del self._aliases[old.alias]
        self._devices[device] = {known.name: known for known in metrics}
        self._names_bytes[device] = _names_bytes(device, self._devices[device].values())
        self._aliases |= {known.alias: known for known in self._devices[device].values() if known.alias is not None}
        self._online.add(device)

    def _data(self, topic: Topic, payload: payload_pb2.Payload) -> Heard:
        if not self.is_online or topic.device not in self._online:
            who = f"{self.node}/{topic.device}" if topic.device else self.node
            return self._unborn(payload, f"{who} has not been born, or has died")
        heard = Heard()
        strange: list[str] = []
        texts: list[str] = []
        bad: list[str] = []
        timeless: list[str] = []
        for metric in payload.metrics:
            if metric.name == _DEATH_SEQUENCE:
                continue
            known = self._known(topic.device, metric)
            if known is None:
                strange.append(metric.name or f"alias {metric.alias}")
                continue
            if known.name.startswith(_CONTROL) or metric.is_transient or metric.is_null or not _has_value(metric):
                continue
            value = _number(metric, metric.datatype or known.datatype)
            time_ms = metric.timestamp if metric.HasField("timestamp") else payload.timestamp
            if value is None:
                texts.append(known.name)
            elif _is_bad(metric):
                bad.append(known.name)
            elif not 0 < time_ms <= _TIME_MS_MAX:
                timeless.append(known.name)
            else:
                heard.samples.append(Sample(known.name.replace("/", "."), time_ms * 1000, value))
        for names, reason, detail in (
            (strange, Reason.NOT_IN_BIRTH, "is not in the birth; the hub asked the node for a rebirth"),
            (texts, Reason.WRONG_TYPE, "is no number; the hub stores numbers only"),
            (
                bad,
                Reason.BAD_QUALITY,
                "was marked by the node itself as bad or stale; look at its sensor or connection",
            ),
            (timeless, Reason.TIME_OUT_OF_WINDOW, "has no time that can be stored; set the metric's or the payload's"),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                heard.faults.append(Fault(reason, f"{names[0]!r}{more} {detail}.", len(names)))
        if strange:
            heard.rebirth = "a metric that is not in the birth"
        return heard

    def _unborn(self, payload: payload_pb2.Payload, what: str) -> Heard:
        detail = f"{what}, so what its metrics are is not known; the hub asked the node for a rebirth."
        fault = Fault(Reason.DATA_BEFORE_BIRTH, detail, _values(payload.metrics))
        return Heard(faults=[fault], rebirth="data before a birth")

    def _known(self, device: str, metric: payload_pb2.Metric) -> _Known | None:
        if metric.name:
            return self._devices[device].get(metric.name)
        found = self._aliases.get(metric.alias) if metric.HasField("alias") else None
        return found if found is not None and found.device == device else None


def _names_bytes(device: str, metrics: Iterable[_Known]) -> int:
    """With what a record holds beside each name."""
    return len(device.encode()) + 16 + sum(len(known.name.encode()) + 16 for known in metrics)


def _has_value(metric: payload_pb2.Metric) -> bool:
    return metric.WhichOneof("value") is not None


def _values(metrics: Iterable[payload_pb2.Metric]) -> int:
    """How many of them would have been samples, as far as can be told without the birth."""
    return sum(
        1
        for metric in metrics
        if _has_value(metric)
        and not metric.is_null
        and not metric.is_transient
        and metric.name != _DEATH_SEQUENCE
        and not metric.name.startswith(_CONTROL)
    )


def _number(metric: payload_pb2.Metric, datatype: int) -> float | None:
    """The value as a number; None where its type is not one."""
    if not _INT8 <= datatype <= _BOOLEAN:
        return None
    kind = metric.WhichOneof("value")
    if kind in ("int_value", "long_value"):
        raw: int = getattr(metric, kind)
        bits = _SIGNED_BITS.get(datatype)
        if bits is not None:
            raw &= (1 << bits) - 1
            raw -= (raw >> bits - 1) << bits
        return float(raw)
    if kind in ("float_value", "double_value", "boolean_value"):
        return float(getattr(metric, kind))
    return None


def _is_bad(metric: payload_pb2.Metric) -> bool:
    """The property Quality is there and is not "good"; absent means good."""
    for key, value in zip(metric.properties.keys, metric.properties.values, strict=False):
        if key == "Quality" and not value.is_null:
            return (value.int_value or value.long_value) != GOOD_QUALITY
    return False


def _death_sequence(payload: payload_pb2.Payload) -> int:
    for metric in payload.metrics:
        if metric.name == _DEATH_SEQUENCE:
            return (metric.int_value or metric.long_value) % SEQUENCES
    return _NO_SEQUENCE
