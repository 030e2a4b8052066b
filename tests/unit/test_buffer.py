"""The client's disk buffer: what it returned for is there again after a crash, in order; what does not fit is refused aloud."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from smdih_client.buffer import BufferFull, BufferInUse, DiskBuffer, Record, Sync


def opened(folder: Path, *, bytes_max: int = 1 << 20, segment_bytes_max: int = 1024) -> DiskBuffer:
    return DiskBuffer(folder, bytes_max=bytes_max, segment_bytes_max=segment_bytes_max, sync=Sync.EACH_SECOND)


def put(buffer: DiskBuffer, payload: bytes, samples: int = 1) -> int:
    sequence = buffer.next_sequence()
    buffer.append(sequence, samples, payload)
    return sequence


def everything(buffer: DiskBuffer) -> list[Record]:
    found: list[Record] = []
    while records := buffer.read(records_max=7, bytes_max=300):
        found += records
    return found


def test_records_come_back_in_order_over_segments_and_openings(tmp_path: Path) -> None:
    sent = []
    for _ in range(3):
        buffer = opened(tmp_path)
        sent += [(put(buffer, bytes([n]) * n, n), n) for n in range(100)]
        assert buffer.waiting_samples == sum(n for _, n in sent)
        assert [(r.sequence, r.samples) for r in everything(buffer)] == sent
        assert not buffer.has_unread
        buffer.close()
    buffer = opened(tmp_path)
    assert [(r.sequence, r.payload) for r in everything(buffer)] == [(s, bytes([n]) * n) for s, n in sent]
    assert sent == sorted(sent)
    buffer.close()


def test_the_acknowledged_are_not_given_again_and_their_space_is_freed(tmp_path: Path) -> None:
    buffer = opened(tmp_path)
    sequences = [put(buffer, b"x" * 100) for _ in range(200)]
    before = buffer.bytes_kept
    assert len(everything(buffer)) == 200
    buffer.acknowledge(sequences[149], 150)
    assert buffer.waiting_samples == 50
    assert before - buffer.bytes_kept > 140 * 100
    buffer.close()
    buffer = opened(tmp_path)
    assert [record.sequence for record in everything(buffer)] == sequences[150:]
    buffer.acknowledge(sequences[-1], 50)
    buffer.close()
    buffer = opened(tmp_path)
    assert (everything(buffer), buffer.waiting_samples, buffer.has_unread, buffer.bytes_kept) == ([], 0, False, 0)
    assert put(buffer, b"") > sequences[-1]
    buffer.close()


def test_a_crash_at_every_byte_of_the_last_record_loses_only_that_record(tmp_path: Path) -> None:
    buffer = opened(tmp_path)
    kept = [put(buffer, b"first"), put(buffer, b"second")]
    whole = buffer.bytes_kept
    put(buffer, b"the last record")
    buffer.close()
    (segment,) = tmp_path.glob("*.log")
    content = segment.read_bytes()
    for length in range(whole, len(content)):
        for other in tmp_path.glob("*.log"):
            other.unlink()
        segment.write_bytes(content[:length])
        buffer = opened(tmp_path)
        assert [record.sequence for record in everything(buffer)] == kept
        assert buffer.bytes_kept == whole
        new = put(buffer, b"behind the cut")
        assert [record.sequence for record in everything(buffer)] == [new]
        buffer.close()
        buffer = opened(tmp_path)
        assert [record.sequence for record in everything(buffer)] == [*kept, new]
        buffer.close()
    assert not list(tmp_path.glob("*.damaged"))


def _flip(segment: Path, at: int) -> bytes:
    """The file's bytes before."""
    content = segment.read_bytes()
    segment.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    return content


def test_a_damaged_record_is_passed_over_and_kept_for_someone_to_look_at(tmp_path: Path) -> None:
    buffer = opened(tmp_path)
    sequences = [put(buffer, bytes([n]) * 20, samples=n) for n in range(10)]
    (segment,) = tmp_path.glob("*.log")
    record_bytes = buffer.bytes_kept // 10
    content = _flip(segment, 3 * record_bytes - 1)
    for _ in range(2):  # noticed while it is read, then at the opening
        assert [record.sequence for record in everything(buffer)] == sequences[:2] + sequences[3:]
        assert buffer.waiting_samples == sum(range(10)) - 2
        aside = tmp_path / f"{segment.stem}-{2 * record_bytes}.damaged"
        damaged = bytearray(content[2 * record_bytes : 3 * record_bytes])
        damaged[-1] ^= 1
        assert aside.read_bytes() == damaged
        aside.unlink()
        buffer.close()
        buffer = opened(tmp_path)
    assert buffer.lost_samples == 0  # never counted as waiting
    everything(buffer)
    buffer.acknowledge(sequences[-1], sum(range(10)) - 2)
    assert (buffer.waiting_samples, buffer.has_unread) == (0, False)
    assert put(buffer, b"goes on") > sequences[-1]
    buffer.close()


@pytest.mark.parametrize("bit", [0, 7, 31])
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("when", ["open", "closed"])
def test_a_damaged_length_costs_its_record_and_no_other(tmp_path: Path, bit: int, place: int, when: str) -> None:
    buffer = opened(tmp_path)
    sequences = [put(buffer, b"x" * 100, samples=10) for _ in range(5)]
    (segment,) = tmp_path.glob("*.log")
    if when == "closed":
        buffer.close()
    content = bytearray(segment.read_bytes())
    content[place * 120 + bit // 8] ^= 1 << bit % 8
    segment.write_bytes(content)
    if when == "closed":
        buffer = opened(tmp_path)
    rest = sequences[:place] + sequences[place + 1 :]
    assert [record.sequence for record in everything(buffer)] == rest
    assert (tmp_path / f"{segment.stem}-{place * 120}.damaged").read_bytes() == content[place * 120 : place * 120 + 120]
    assert (buffer.waiting_samples, buffer.lost_samples) == (40, 10 if when == "open" else 0)
    assert not buffer.has_unread
    buffer.acknowledge(rest[-1], 40)
    new = put(buffer, b"goes on")
    buffer.close()
    buffer = opened(tmp_path)
    assert [record.sequence for record in everything(buffer)] == [new]
    buffer.close()


def test_a_length_beyond_the_end_of_an_older_segment_is_damage_too(tmp_path: Path) -> None:
    buffer = opened(tmp_path)
    sequences = [put(buffer, b"x" * 100) for _ in range(20)]
    buffer.close()
    first, *_ = sorted(tmp_path.glob("*.log"))
    in_first = first.stat().st_size // 120
    os.truncate(first, (in_first - 1) * 120 + 50)
    buffer = opened(tmp_path)
    assert [record.sequence for record in everything(buffer)] == sequences[: in_first - 1] + sequences[in_first:]
    (aside,) = tmp_path.glob("*.damaged")
    assert aside.stat().st_size == 50
    buffer.close()


def test_several_damages_of_a_segment_are_counted_once_each(tmp_path: Path) -> None:
    buffer = opened(tmp_path, segment_bytes_max=1 << 14)
    sequences = [put(buffer, b"x" * 100, samples=n) for n in range(30)]
    (segment,) = tmp_path.glob("*.log")
    content = bytearray(segment.read_bytes())
    content[120 * 3 : 120 * 5] = bytes(240)
    content[120 * 7 + 16] ^= 255  # how many samples it says
    content[120 * 29 + 3] ^= 128
    segment.write_bytes(content)
    assert [r.sequence for r in everything(buffer)] == [s for n, s in enumerate(sequences) if n not in (3, 4, 7, 29)]
    assert (buffer.lost_samples, buffer.waiting_samples) == (3 + 4 + 7 + 29, sum(range(29)) - 3 - 4 - 7)
    assert len(list(tmp_path.glob("*.damaged"))) == 3
    buffer.close()


def test_at_the_bound_new_records_are_refused_and_the_old_are_kept(tmp_path: Path) -> None:
    buffer = opened(tmp_path, bytes_max=4096)
    sequences = [put(buffer, b"x" * 100) for _ in range(4096 // 120)]
    with pytest.raises(BufferFull, match="4096"):
        put(buffer, b"x" * 100)
    assert [record.sequence for record in everything(buffer)] == sequences
    with pytest.raises(BufferFull):
        put(buffer, b"x" * 100)
    buffer.acknowledge(sequences[-1], len(sequences))
    put(buffer, b"x" * 100)
    buffer.close()


def test_on_a_full_disk_new_records_are_refused_and_the_old_are_kept(tmp_path: Path) -> None:
    # A limit on the size of files stands in for the full disk: the write ends in the middle of a record, then fails.
    script = """
import resource, signal, sys
from pathlib import Path
from smdih_client.buffer import BufferFull, DiskBuffer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
buffer = DiskBuffer(Path(sys.argv[1]))
taken = refused = 0
for _ in range(20):
    try:
        buffer.append(buffer.next_sequence(), 1, b"x" * 100)
        taken += 1
    except BufferFull:
        refused += 1
print(taken, refused, len(buffer.read(records_max=100, bytes_max=10**6)))
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("8 12 8\n", 0), done.stderr
    buffer = opened(tmp_path)
    assert len(everything(buffer)) == 8
    buffer.close()


def test_only_one_may_have_it_open(tmp_path: Path) -> None:
    buffer = opened(tmp_path)
    with pytest.raises(BufferInUse):
        opened(tmp_path)
    buffer.close()
    opened(tmp_path).close()


def test_what_could_never_be_sent_is_refused_at_once(tmp_path: Path) -> None:
    buffer = opened(tmp_path)
    with pytest.raises(ValueError, match="bytes"):
        put(buffer, bytes(4 * 1024 * 1024))
    with pytest.raises(ValueError, match="two segments"):
        opened(tmp_path / "other", bytes_max=100)
    buffer.close()


def test_no_file_stays_open(tmp_path: Path) -> None:
    count = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        buffer = opened(tmp_path)
        for _ in range(50):
            put(buffer, b"x" * 100)
        everything(buffer)
        buffer.close()
    assert len(os.listdir("/proc/self/fd")) == count


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["append", "read", "acknowledge", "crash", "tear"]), max_size=80))
def test_any_order_of_events_gives_every_record_in_order(
    tmp_path_factory: pytest.TempPathFactory, events: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("buffer")
    buffer = opened(folder, bytes_max=4096, segment_bytes_max=256)
    kept: list[int] = []
    unread: list[int] = []
    read: list[int] = []
    for event in events:
        if event == "append":
            try:
                sequence = put(buffer, b"y" * 60)
            except BufferFull:
                assert buffer.bytes_kept > 4000
                continue
            kept.append(sequence)
            unread.append(sequence)
        elif event == "read":
            found = [record.sequence for record in buffer.read(records_max=3, bytes_max=1000)]
            assert found == unread[:3]
            assert bool(unread[3:]) == buffer.has_unread
            read += found
            unread = unread[3:]
        elif event == "acknowledge" and read:
            done = read[: (len(read) + 1) // 2]
            buffer.acknowledge(done[-1], len(done))
            read = read[len(done) :]
            kept = kept[len(done) :]
        else:
            buffer.close()
            if event == "tear":
                (folder / f"{10**19:020d}.log").write_bytes(b"\x40\x00\x00\x00half")
            buffer = opened(folder, bytes_max=4096, segment_bytes_max=256)
            unread, read = list(kept), []
        assert buffer.waiting_samples == len(kept)
    buffer.close()
