"""What the JSON door makes of a body: every value is in a batch or told of, and odd ones cost no more than plain ones."""

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.telemetry.frames import RAW_BYTES_MAX
from services.ingest.telemetry.jsonbatches import NotTelemetry, Read, read_body
from smdih.ingest.v1 import telemetry_pb2

AT_MS = 1_764_000_000_000


def read(frames: Any, **more: Any) -> Read:
    body = {"batches": [{"machine": "acme/works/press", "sequence": 7, "frames": frames, **more}]}
    _, (one,) = read_body(orjson.loads(orjson.dumps(body)))
    return one


def cells(batches: list[telemetry_pb2.Batch]) -> list[tuple[int, str, float]]:
    found = []
    for batch in batches:
        rows, columns = len(batch.times_us), len(batch.signals)
        bits = np.unpackbits(np.frombuffer(batch.absent, dtype=np.uint8), count=rows * columns, bitorder="little")
        absent = bits.reshape(rows, columns) if batch.absent else np.zeros((rows, columns))
        values = np.array(batch.values).reshape(rows, columns)
        found += [(batch.times_us[i], batch.signals[j], values[i, j]) for i, j in np.argwhere(absent == 0)]
    return found


@given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=2)),
        max_size=6,
    )
)
def test_every_value_is_in_a_batch_once_or_told_of(rows: list[dict[str, Any]]) -> None:
    one = read([{"ts": AT_MS + number, "values": row} for number, row in enumerate(rows)])
    numbers = [
        ((AT_MS + number) * 1000, name, float(value))
        for number, row in enumerate(rows)
        for name, value in row.items()
        if isinstance(value, int)
    ]
    texts = sum(isinstance(value, str) for row in rows for value in row.values())
    assert sorted(cells(list(one.batches))) == sorted(numbers)
    assert sum(fault.samples for fault in one.faults.values()) == texts


def test_frames_that_share_no_names_grow_no_faster_than_their_values() -> None:
    """All times all names would be 25 million cells."""
    one = read([{"ts": AT_MS + n, "values": {f"s{n}": n}} for n in range(5_000)])
    assert {batch.sequence for batch in one.batches} == {7}
    assert sum(len(batch.values) for batch in one.batches) < 50 * 5_000
    assert len(cells(list(one.batches))) == 5_000


def test_many_faults_are_told_as_one_with_what_was_sent() -> None:
    one = read([{"ts": None, "values": {"a": 1, "b": None}}] * 3 + [{"ts": AT_MS, "values": {"a": {"b": 2}}}])
    (fault,) = one.faults.values()
    assert (fault.reason, fault.samples, one.batches) == ("WRONG_TYPE", 4, [])
    assert fault.sentence.startswith("batches.0.frames.0.ts: milliseconds")
    assert fault.sentence.endswith("(And 3 more.)")
    raw = orjson.loads(one.raw(fault, b""))
    assert (raw["machine"], raw["sequence"]) == ("acme/works/press", 7)
    assert raw["refused"][-1] == {"ts": AT_MS, "values": {"a": {"b": 2}}}


def test_of_many_faults_no_more_is_kept_than_quarantine_keeps() -> None:
    """A body of 4 MiB made 150 MB of them."""
    one = read([{"ts": AT_MS, "values": {f"{n}": "" for n in range(10_000)}}])
    (fault,) = one.faults.values()
    assert (fault.samples, fault.times) == (10_000, 10_000)
    assert RAW_BYTES_MAX < len(one.raw(fault, b"")) < 1.1 * RAW_BYTES_MAX
    assert orjson.loads(one.raw(fault, b""))["refused"][0] == {"ts": AT_MS, "values": {"0": ""}}


def test_what_is_nested_too_deep_to_be_written_is_kept_as_it_came() -> None:
    deep = b'{"batches": [{"machine": ' + b"[" * 900 + b"]" * 900 + b"}]}"
    _, (one,) = read_body(orjson.loads(deep))
    assert [one.raw(fault, deep) for fault in one.faults.values()] == [deep]


@pytest.mark.parametrize(
    ("changed", "detail"),
    [
        ({"machine": 0}, "machine: a path or an id"),
        ({"machine": True}, "machine: a path or an id"),
        ({"sequence": -1}, "sequence: a number from 0 up"),
        ({"frames": {}}, "frames: a list"),
    ],
)
def test_a_batch_that_cannot_be_read_is_counted_as_far_as_can_be(changed: dict[str, Any], detail: str) -> None:
    one = read([{"ts": 1, "values": {"a": 1, "b": None, "c": "x"}}, 5], **changed) if "frames" not in changed else None
    one = one or read(changed["frames"])
    (fault,) = one.faults.values()
    assert detail in fault.detail
    assert fault.samples == (0 if "frames" in changed else 2)
    assert one.batches == ()


def test_a_body_with_too_many_batches_is_refused() -> None:
    with pytest.raises(NotTelemetry):
        read_body({"batches": [{}] * 10_001})
