"""Telemetry as JSON: what can be read of a body becomes batches, the rest is told apart value by value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from services.common.clock import to_us
from services.ingest.domain import BATCHES_PER_REQUEST_MAX, Reason
from services.ingest.telemetry.block import Block
from services.ingest.telemetry.frames import RAW_BYTES_MAX
from smdih.ingest.v1 import telemetry_pb2

_NUMBERS = frozenset((float, int, bool))


class NotTelemetry(Exception):
    """The body is JSON, but not telemetry."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


@dataclass
class Fault:
    """Part of a batch that no frame could be made of, with the first of its kind told in `detail`. `samples` 0: not countable."""

    reason: str
    detail: str
    samples: int = 0
    # How many there are.
    times: int = 0
    # The first of them as JSON, as much as quarantine keeps.
    parts: bytearray = field(default_factory=bytearray)
    # One of them is nested deeper than can be written.
    is_too_deep: bool = False

    def add(self, samples: int, part: Any) -> None:
        self.samples += samples
        self.times += 1
        if self.is_too_deep or len(self.parts) >= RAW_BYTES_MAX:
            return
        try:
            text = orjson.dumps(part)
        except orjson.JSONEncodeError:
            self.is_too_deep = True
            return
        if self.parts:
            self.parts += b","
        self.parts += text[:RAW_BYTES_MAX]

    @property
    def sentence(self) -> str:
        return f"{self.detail} (And {self.times - 1} more.)" if self.times > 1 else self.detail


@dataclass
class Read:
    """One batch of a body. It may have become several: together they are what was sent."""

    machine_id: int = 0
    machine_path: str = ""
    sequence: int = 0
    batches: Sequence[telemetry_pb2.Batch] = ()
    faults: dict[str, Fault] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Any]:
        """Of its batches."""
        return {"sequence": self.sequence, "machine_path": self.machine_path, "machine_id": self.machine_id}

    def refuse(self, reason: str, detail: str, samples: int, part: Any) -> None:
        self.faults.setdefault(reason, Fault(reason, detail)).add(samples, part)

    def raw(self, fault: Fault, body: bytes) -> bytes:
        """What was refused of the body, as it came."""
        if fault.is_too_deep:
            return body
        head = orjson.dumps({"machine": self.machine_path or self.machine_id, "sequence": self.sequence, "refused": []})
        return head[:-2] + fault.parts + b"]}"


def read_body(document: Any) -> tuple[str, list[Read]]:
    """Source and batches of a body. Raises NotTelemetry where it has none."""
    if not isinstance(document, dict) or not isinstance(document.get("batches"), list):
        raise NotTelemetry(Reason.MALFORMED, 'The body should be {"batches": [...]}.')
    source, batches = document.get("source", ""), document["batches"]
    if not isinstance(source, str):
        raise NotTelemetry(Reason.WRONG_TYPE, "source: a text.")
    if not batches:
        raise NotTelemetry(Reason.EMPTY_BATCH, "The body holds no batches.")
    if len(batches) > BATCHES_PER_REQUEST_MAX:
        detail = f"{len(batches)} batches in one body; send at most {BATCHES_PER_REQUEST_MAX}."
        raise NotTelemetry(Reason.INVALID, detail)
    return source, [_read(f"batches.{number}", batch) for number, batch in enumerate(batches)]


def _read(where: str, batch: Any) -> Read:
    read = Read()
    if not isinstance(batch, dict):
        read.refuse(Reason.WRONG_TYPE, f"{where}: an object.", 0, batch)
        return read
    machine, sequence, frames = batch.get("machine"), batch.get("sequence", 0), batch.get("frames", [])
    wrong = ""
    if type(machine) is str:
        read.machine_path = machine
    elif type(machine) is int and 0 < machine < 2**63:
        read.machine_id = machine
    else:
        wrong = f"{where}.machine: a path or an id."
    if type(sequence) is int and 0 <= sequence < 2**64:
        read.sequence = sequence
    else:
        wrong = wrong or f"{where}.sequence: a number from 0 up."
    if type(frames) is not list:
        wrong, frames = wrong or f"{where}.frames: a list.", []
    if wrong:
        read.refuse(Reason.WRONG_TYPE, wrong, sum(map(_count, frames)), batch)
        return read
    times: list[int] = []
    rows: list[dict[str, Any]] = []
    indexes: list[int] = []
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("values"), dict):
            detail = f'{where}.frames.{index}: {{"ts": ..., "values": {{...}}}}.'
            read.refuse(Reason.WRONG_TYPE, detail, 0, frame)
            continue
        ts = frame.get("ts")
        time_us = ts * 1000 if type(ts) is int and 0 < ts < 2**53 else _time_us(ts)
        if time_us is None:
            detail = f"{where}.frames.{index}.ts: milliseconds since 1970 UTC, or RFC 3339 with a zone."
            read.refuse(Reason.WRONG_TYPE, detail, _count(frame), frame)
            continue
        times.append(time_us)
        rows.append(frame["values"])
        indexes.append(index)
    if not rows:
        if not frames:
            read.batches = [_batch(read)]
        return read
    names = list(rows[0])
    values = [value for row in rows for value in row.values()]
    if _NUMBERS.issuperset(map(type, values)) and all(list(row) == names for row in rows):
        read.batches = [_batch(read, times_us=times, signals=names, values=values)]
    else:
        # Not every value in every frame in the same order, or not every one a number.
        read.batches = _ragged(read, where, indexes, times, rows)
    return read


def _batch(read: Read, **cells: Any) -> telemetry_pb2.Batch:
    return telemetry_pb2.Batch(**read.named, **cells)


def _ragged(
    read: Read, where: str, indexes: list[int], times: list[int], rows: list[dict[str, Any]]
) -> list[telemetry_pb2.Batch]:
    """Batches of these rows, with the values that are no numbers left out and told."""
    blocks = [Block()]
    for index, time_us, row in zip(indexes, times, rows, strict=True):
        names = sum([not blocks[-1].has(name) for name in row])
        if not blocks[-1].has_room(rows=1, names=names, samples=len(row)):
            blocks.append(Block())
        block = blocks[-1]
        number = block.add_row(time_us)
        for name, value in row.items():
            if value is not None and type(value) not in _NUMBERS:
                what = repr(value[:40]) if isinstance(value, str) else "a list or an object"
                detail = f"{where}.frames.{index}.values.{name:.100}: a number, true, false or null, not {what}."
                read.refuse(Reason.WRONG_TYPE, detail, 1, {"ts": time_us // 1000, "values": {name: value}})
                continue
            block.put(number, name, value)
    return [block.batch(**read.named) for block in blocks if len(block) or not read.faults]


def _count(frame: Any) -> int:
    """How many samples a frame would have been."""
    values = frame.get("values") if isinstance(frame, dict) else None
    return sum(value is not None for value in values.values()) if isinstance(values, dict) else 0


def _time_us(ts: Any) -> int | None:
    """None: it is no time."""
    if isinstance(ts, int | float) and not isinstance(ts, bool) and math.isfinite(ts):
        time_us = round(ts * 1000)
        return time_us if -(2**63) <= time_us < 2**63 else None
    if isinstance(ts, str):
        try:
            parsed = datetime.fromisoformat(ts)
        except ValueError:
            return None
        return to_us(parsed) if parsed.tzinfo is not None else None
    return None
