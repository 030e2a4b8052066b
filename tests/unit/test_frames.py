"""What the door makes of a batch: every sample is accepted or quarantined, and the two add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.directory import Directory
from services.common.kafka import Cluster
from services.ingest.domain import Sender
from services.ingest.telemetry.frames import (
    DETAIL_LENGTH_MAX,
    FRAMES_BYTES_MAX,
    QUARANTINED_BYTES_MAX,
    FrameCheck,
    quarantined,
)
from smdih.directory.v1 import directory_pb2
from smdih.ingest.v1 import telemetry_pb2

NOW_US = 1_764_000_000_000_000
SENDER = Sender(firm_id=1, credential_id=1, source="test", door="grpc", correlation_id="c")


class FixedClock:
    def now_us(self) -> int:
        return NOW_US


def check_with(*signals: directory_pb2.Signal) -> FrameCheck:
    directory = Directory(Cluster("nowhere"), clock=FixedClock(), kinds=("machine",))
    machine = directory_pb2.Machine(id=5, firm_id=1, path="acme/works/press", signals=signals)
    directory.machines.entries[5] = directory_pb2.DirectoryEntry(machine=machine).SerializeToString()
    return FrameCheck(directory, FixedClock())


CHECK = check_with(
    directory_pb2.Signal(id=1, name="a", range_min=-10, range_max=10), directory_pb2.Signal(id=2, name="b")
)


def reasons(batch: telemetry_pb2.Batch) -> dict[str, int]:
    return {record.reason: record.samples for record in CHECK.check(SENDER, batch).quarantine}


def batch(**fields: object) -> telemetry_pb2.Batch:
    return telemetry_pb2.Batch(**({"machine_id": 5, "times_us": [NOW_US], "values": [1.0, 2.0]} | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),
        ({"machine_id": 6}, {"UNKNOWN_MACHINE": 2}),
        ({"machine_id": 0, "machine_path": "other/works/press"}, {"UNKNOWN_MACHINE": 2}),
        ({"values": []}, {"EMPTY_BATCH": 0}),
        ({"times_us": []}, {"EMPTY_BATCH": 2}),
        ({"times_us": [NOW_US, NOW_US + 1], "values": [1.0, 2.0, 3.0]}, {"SHAPE_MISMATCH": 3}),
        ({"signals": ["a"]}, {"SHAPE_MISMATCH": 2}),
        ({"signals": ["a", "a"]}, {"SHAPE_MISMATCH": 2}),
        ({"signals": ["a", "c"]}, {"UNKNOWN_SIGNAL": 1}),
        ({"positions": [0, 7]}, {"UNKNOWN_SIGNAL": 1}),
        ({"values": [1.0, 2.0, 3.0]}, {"UNKNOWN_SIGNAL": 1}),
        ({"absent": b"\x01\x00"}, {"SHAPE_MISMATCH": 2}),
        ({"values": [float("nan"), 2.0]}, {"NOT_FINITE": 1}),
        ({"values": [1.0, float("-inf")]}, {"NOT_FINITE": 1}),
        ({"values": [11.0, 11.0]}, {"OUT_OF_RANGE": 1}),
        ({"values": [float("nan"), 2.0], "absent": b"\x01"}, {}),
        ({"times_us": [0]}, {"TIME_OUT_OF_WINDOW": 2}),
        ({"times_us": [253_402_300_799_000_000]}, {"TIME_OUT_OF_WINDOW": 2}),
        ({"times_us": [2**63 - 1]}, {"TIME_OUT_OF_WINDOW": 2}),
        ({"times_us": [-(2**63)]}, {"TIME_OUT_OF_WINDOW": 2}),
    ],
)
def test_each_kind_of_bad_sample_has_its_reason(changed: dict[str, object], expected: dict[str, int]) -> None:
    assert reasons(batch(**changed)) == expected


@settings(max_examples=200)
@given(
    rows=st.integers(0, 4),
    values=st.lists(st.floats(width=64), max_size=12),
    times=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(NOW_US - 10**9, NOW_US), max_size=4),
    absent=st.binary(max_size=2),
    positions=st.lists(st.integers(0, 4), max_size=4),
)
def test_accepted_and_quarantined_add_up_to_what_was_sent(
    rows: int, values: list[float], times: list[int], absent: bytes, positions: list[int]
) -> None:
    sent = batch(times_us=times[:rows], values=values, absent=absent, positions=positions)
    checked = CHECK.check(SENDER, sent)
    cells = len(values)
    fits = absent and len(absent) == (cells + 7) // 8
    gone = int(np.unpackbits(np.frombuffer(absent, np.uint8), count=cells, bitorder="little").sum()) if fits else 0
    assert checked.accepted + sum(record.samples for record in checked.quarantine) == cells - gone
    stored = [np.frombuffer(frames.values, "<f8") for frames in checked.frames]
    assert sum(int(np.isfinite(one).sum()) for one in stored) == checked.accepted


def test_a_quarantined_part_holds_exactly_its_samples_and_can_be_sent_again() -> None:
    sent = batch(times_us=[NOW_US, 0, NOW_US + 1], values=[1.0, 2.0, 3.0, 4.0, 50.0, 6.0])
    checked = CHECK.check(SENDER, sent)
    by_reason = {record.reason: telemetry_pb2.Batch.FromString(record.batch) for record in checked.quarantine}
    late = by_reason["TIME_OUT_OF_WINDOW"]
    assert (list(late.times_us), list(late.values)) == ([0], [3.0, 4.0])
    outside = CHECK.check(SENDER, by_reason["OUT_OF_RANGE"])
    assert (outside.accepted, [record.samples for record in outside.quarantine]) == (0, [1])


def wide(signals: int) -> FrameCheck:
    return check_with(*(directory_pb2.Signal(id=n + 1, name=f"s{n}") for n in range(signals)))


@pytest.mark.parametrize("columns", [1, 200, 450])
def test_frames_of_one_batch_are_split_before_they_are_too_large_for_a_record(columns: int) -> None:
    rows = 5_300 if columns == 1 else 1_000
    times = list(range(NOW_US - rows, NOW_US))
    cells = np.arange(rows * columns, dtype=np.float64).reshape(rows, columns)
    sent = batch(times_us=times, positions=list(range(columns)), values=cells.ravel().tolist(), sequence=7)
    checked = wide(450 if columns == 450 else 200).check(SENDER, sent)
    assert (checked.accepted, checked.quarantine) == (rows * columns, [])
    assert max(frames.ByteSize() for frames in checked.frames) < FRAMES_BYTES_MAX + 1_000
    found = np.full((rows, 450), np.nan)
    for frames in checked.frames:
        at = np.frombuffer(frames.times_us, "<i8") - times[0]
        first = frames.first_position
        found[at, first : first + frames.width] = np.frombuffer(frames.values, "<f8").reshape(-1, frames.width)
    np.testing.assert_array_equal(found[:, :columns], cells)
    assert np.isnan(found[:, columns:]).all()


def test_the_names_of_signals_are_kept_once_and_only_as_long_as_a_machine_has_them() -> None:
    check = wide(1)
    directory = check._directory
    for width in (2, 3, 4):
        signals = [directory_pb2.Signal(id=n + 1, name=f"s{n}") for n in range(width)]
        for machine_id in (5, 6):
            machine = directory_pb2.Machine(id=machine_id, firm_id=1, path=f"acme/works/{machine_id}", signals=signals)
            entry = directory_pb2.DirectoryEntry(machine=machine)
            directory.machines.entries[machine_id] = entry.SerializeToString()
            sent = batch(machine_id=machine_id, values=[1.0] * width)
            assert check.check(SENDER, sent).accepted == width
    assert [len(names) for names in check._positions] == [4]


def test_rows_that_would_grow_past_all_bounds_are_quarantined_with_what_to_send_instead() -> None:
    rows = 20_001
    sent = batch(times_us=range(NOW_US - rows, NOW_US), positions=[3], values=[1.0] * rows)
    (record,) = wide(200).check(SENDER, sent).quarantine
    assert (record.reason, record.samples) == ("TOO_LARGE", rows)
    assert "send at most 20000 rows" in record.detail
    assert len(record.batch) > 0


def test_a_batch_too_large_for_quarantine_is_kept_in_its_beginning() -> None:
    record = quarantined(SENDER, "X", "", 1, NOW_US, batch=b"x" * (QUARANTINED_BYTES_MAX + 1))
    assert (record.batch, len(record.raw)) == (b"", 64 * 1024)


def test_a_quarantine_record_holds_only_text_that_can_be_stored() -> None:
    record = quarantined(SENDER, "WRONG_TYPE", "a\0b\x1b" + "x" * 100_000, 1, NOW_US)
    assert record.detail.startswith("a?b?x")
    assert len(record.detail) == DETAIL_LENGTH_MAX


def test_the_same_content_is_the_same_quarantine_record() -> None:
    one, other = CHECK.check(SENDER, batch(machine_id=6)), CHECK.check(SENDER, batch(machine_id=6))
    assert one.quarantine[0].id == other.quarantine[0].id
