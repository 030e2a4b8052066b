"""Batches on disk until the hub has acknowledged them: append-only segments of records with a checksum each.

What `append` returned for is still there after the process was killed. Nothing kept is ever given up for something new: at the
bound, or when the disk is full, `append` raises. Opening cuts off a record that a crash left half written; whatever else cannot
be read is passed over and kept beside the buffer, up to the next whole record.
"""

import enum
import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

BYTES_MAX = 1024 * 1024 * 1024
SEGMENT_BYTES_MAX = 8 * 1024 * 1024
# With room to spare below what the hub takes in one message (4 MiB).
RECORD_BYTES_MAX = 3 * 1024 * 1024
SYNC_EVERY_S = 1.0

# Bytes of the payload, CRC-32 of everything behind it, sequence, samples.
_HEADER = struct.Struct("<IIQI")
_CHECKED_FROM = 8
# The upper half of the sequence.
_UPPER_FROM = 12
# The acknowledged sequence and its CRC-32, in two places written in turn: a torn write leaves the other, and no write needs new
# space on a full disk.
_SLOT = struct.Struct("<QI")
_SLOT_OFFSETS = (0, 512)


class Sync(enum.Enum):
    """When the disk has to have it (a killed process loses nothing in either case, a power cut may)."""

    EACH_BATCH = "each batch"
    """`send` returns when the disk has the batch."""
    EACH_SECOND = "each second"
    """A power cut loses what was sent since the last `sync`, about a second's worth while batches keep coming."""


class BufferFull(Exception):
    """The buffer or its disk is full; the new samples were not taken, everything kept is still there."""


class BufferInUse(Exception):
    """Another process has this buffer open; give every gateway a folder of its own."""


@dataclass(frozen=True)
class Record:
    sequence: int
    samples: int
    payload: bytes


@dataclass
class _Segment:
    path: Path
    last: int
    size: int
    # Of its whole records that wait.
    samples: int = 0
    # Places of damage, and where the next whole record begins.
    damages: dict[int, int] = field(default_factory=dict)


class DiskBuffer:
    """One gateway's buffer in a folder; sequences grow by one from record to record, over restarts too.

    What does not have the checksum it was written with (a disk that fails) is passed over, and kept in a file of its own for
    someone to look at; `lost_samples` counts what was in it, where it was found after the opening. Not for several threads at once,
    except `sync`. Raises BufferInUse, OSError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bytes_max: int = BYTES_MAX,
        segment_bytes_max: int = SEGMENT_BYTES_MAX,
        sync: Sync = Sync.EACH_BATCH,
    ) -> None:
        if bytes_max < 2 * segment_bytes_max:
            # A segment is freed as a whole, and the one being written never is.
            raise ValueError(f"bytes_max: at least two segments, {2 * segment_bytes_max} bytes")
        self.sync_policy = sync
        self._folder = folder
        self._bytes_max = bytes_max
        self._segment_bytes_max = segment_bytes_max
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder / "lock")
        self._state = os.open(folder / "acknowledged", os.O_RDWR | os.O_CREAT, 0o600)
        self._syncing = threading.Lock()
        self._slot = 0
        self.acknowledged = self._read_acknowledged()
        self._segments: list[_Segment] = []
        self._current: int | None = None
        self._is_broken = False
        self._is_dirty = False
        self._synced_s = time.monotonic()
        self.waiting_samples = 0
        self.lost_samples = 0
        paths = sorted(folder.glob("[0-9]" * 20 + ".log"))
        for path in paths:
            segment = self._opened(path, is_newest=path == paths[-1])
            if segment.size:
                self._segments.append(segment)
            else:
                path.unlink()
        last_written = max((segment.last for segment in self._segments), default=0)
        self._last = max(time.time_ns() // 1000, self.acknowledged, last_written)
        # What is read next: a segment and a place in it.
        self._reading = 0
        self._offset = 0
        self._read_samples = 0  # of this segment
        self._read_last = self.acknowledged
        self._last_written = last_written
        self._drop_acknowledged()

    @property
    def bytes_kept(self) -> int:
        return sum(segment.size for segment in self._segments)

    @property
    def has_unread(self) -> bool:
        return self._last_written > self._read_last

    def next_sequence(self) -> int:
        """The sequence that the next `append` has to carry."""
        return self._last + 1

    def append(self, sequence: int, samples: int, payload: bytes) -> None:
        """Keep a record. Raises BufferFull, OSError; then it is not kept. Raises ValueError for one that could never be sent."""
        if len(payload) > RECORD_BYTES_MAX:
            raise ValueError(f"a batch of {len(payload)} bytes; send at most {RECORD_BYTES_MAX} at once")
        if sequence <= self._last:
            raise ValueError(f"sequence {sequence} does not follow {self._last}")
        checked = struct.pack("<QI", sequence, samples) + payload
        record = struct.pack("<II", len(payload), zlib.crc32(checked)) + checked
        if self.bytes_kept + len(record) > self._bytes_max:
            raise BufferFull(
                f"{self._folder} holds {self.bytes_kept} bytes of {self._bytes_max} and the hub takes none"
            )
        if self._is_broken:
            raise OSError(f"{self._folder} could not be written; open the buffer anew")
        try:
            segment, file = self._to_write(sequence, len(record))
            written = os.write(file, record)
        except OSError as error:
            raise BufferFull(f"{self._folder} cannot be written: {error.strerror}") from error
        if written < len(record):
            try:
                os.ftruncate(file, segment.size)
            except OSError:
                # Whatever came behind half a record would be cut off with it.
                self._is_broken = True
                raise
            raise BufferFull(f"{self._folder}: no space left on the disk")
        segment.size += len(record)
        segment.samples += samples
        segment.last = self._last = self._last_written = sequence
        self.waiting_samples += samples
        self._is_dirty = True

    def is_sync_due(self) -> bool:
        if not self._is_dirty:
            return False
        return self.sync_policy is Sync.EACH_BATCH or time.monotonic() - self._synced_s >= SYNC_EVERY_S

    def sync(self) -> None:
        """Return when the disk has everything appended before. Raises OSError."""
        with self._syncing:  # not while `append` closes this file and begins another
            if self._current is not None:
                self._is_dirty = False
                self._synced_s = time.monotonic()
                os.fdatasync(self._current)

    def read(self, *, records_max: int, bytes_max: int) -> list[Record]:
        """The next records in order, at least one if there is one; each is given once. Raises OSError."""
        found: list[Record] = []
        size = 0
        while self._reading < len(self._segments) and len(found) < records_max and size < bytes_max:
            segment = self._segments[self._reading]
            if self._offset >= segment.size:
                if self._reading == len(self._segments) - 1:
                    break
                self._reading, self._offset, self._read_samples = self._reading + 1, 0, 0
                continue
            with segment.path.open("rb") as file:
                file.seek(self._offset)
                while self._offset < segment.size and len(found) < records_max and size < bytes_max:
                    is_damaged = self._offset in segment.damages
                    record = None if is_damaged else _read_record(file.read(_HEADER.size), file.read)
                    if record is None:
                        self._pass_over(segment)
                        file.seek(self._offset)
                        continue
                    self._offset += _HEADER.size + len(record.payload)
                    if record.sequence > self.acknowledged:
                        self._read_samples += record.samples
                        found.append(record)
                        size += len(record.payload)
                    self._read_last = max(self._read_last, record.sequence)
        return found

    def set_aside(self, sequence: int, samples: int, payload: bytes) -> None:
        """The hub will never take this record, the first of those that wait: keep it in a file of its own. Raises OSError."""
        (self._folder / f"{sequence:020d}.refused").write_bytes(payload)
        self.acknowledge(sequence, samples)

    def acknowledge(self, sequence: int, samples: int) -> None:
        """Everything up to this sequence (`samples` samples since the last call) is in the hub. Raises OSError."""
        self.acknowledged = sequence
        self.waiting_samples -= samples
        packed = struct.pack("<Q", sequence)
        os.pwrite(self._state, packed + struct.pack("<I", zlib.crc32(packed)), _SLOT_OFFSETS[self._slot])
        self._slot = 1 - self._slot
        self._drop_acknowledged()

    def close(self) -> None:
        """Close; the disk has everything. Raises OSError."""
        try:
            self.sync()
        finally:
            for file in (self._current, self._state, self._lock):
                if file is not None:
                    os.close(file)
            self._current = None

    def _to_write(self, sequence: int, size: int) -> tuple[_Segment, int]:
        if self._current is not None and self._segments[-1].size + size <= self._segment_bytes_max:
            return self._segments[-1], self._current
        self.sync()
        path = self._folder / f"{sequence:020d}.log"
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _sync_folder(self._folder)
        except OSError:
            os.close(file)
            raise
        with self._syncing:
            if self._current is not None:
                os.close(self._current)
            self._current = file
        self._segments.append(_Segment(path, 0, 0))
        self._drop_acknowledged()
        return self._segments[-1], file

    def _drop_acknowledged(self) -> None:
        while self._segments and self._segments[0].last <= self.acknowledged:
            if self._current is not None and len(self._segments) == 1:
                return
            self._segments.pop(0).path.unlink()
            if self._reading:
                self._reading -= 1
            else:
                self._offset = self._read_samples = 0

    def _opened(self, path: Path, *, is_newest: bool) -> _Segment:
        """The segment as it is found; of the newest one a record that was being written is cut off."""
        content = path.read_bytes()
        segment = _Segment(path, 0, 0)
        for begin, end, record in _parts(content, 0, _first_of(path) - 1):
            if record is not None:
                segment.last = record.sequence
                if record.sequence > self.acknowledged:
                    segment.samples += record.samples
            elif is_newest and end == len(content) and _is_torn(content[begin:]):
                log.warning("%s: %d bytes of a record that was being written are cut off", path, end - begin)
                os.truncate(path, begin)
                break
            else:
                _keep_damaged(path, begin, content[begin:end])
                segment.damages[begin] = end
            segment.size = end
        self.waiting_samples += segment.samples
        return segment

    def _pass_over(self, segment: _Segment) -> None:
        """Go on reading behind the damage at the present place."""
        if self._offset not in segment.damages:  # it was whole at the opening, and counted
            content = segment.path.read_bytes()[: segment.size]
            behind = 0
            for begin, end, record in _parts(content, self._offset, max(_first_of(segment.path) - 1, self._read_last)):
                if record is not None:
                    behind += record.samples
                elif begin not in segment.damages:
                    _keep_damaged(segment.path, begin, content[begin:end])
                    segment.damages[begin] = end
            lost = segment.samples - self._read_samples - behind
            segment.samples -= lost
            self.waiting_samples -= lost
            self.lost_samples += lost
        self._offset = segment.damages[self._offset]
        if self._offset >= segment.size:
            self._read_last = max(self._read_last, segment.last)

    def _read_acknowledged(self) -> int:
        content = os.pread(self._state, _SLOT_OFFSETS[-1] + _SLOT.size, 0)
        if len(content) < _SLOT_OFFSETS[-1] + _SLOT.size:
            os.ftruncate(self._state, 0)
            os.pwrite(self._state, bytes(_SLOT_OFFSETS[-1] + _SLOT.size), 0)
            os.fsync(self._state)
            _sync_folder(self._folder)
            return 0
        found = []
        for offset in _SLOT_OFFSETS:
            sequence, crc = _SLOT.unpack_from(content, offset)
            found.append(sequence if zlib.crc32(struct.pack("<Q", sequence)) == crc else 0)
        # The next write goes over the older one.
        self._slot = 0 if found[0] <= found[1] else 1
        return max(found)


def _read_record(header: bytes, take: Callable[[int], bytes]) -> Record | None:
    """The record, None if it is not whole."""
    if len(header) < _HEADER.size:
        return None
    size, crc, sequence, samples = _HEADER.unpack(header)
    if size > RECORD_BYTES_MAX:
        return None
    payload = take(size)
    if len(payload) < size or zlib.crc32(header[_CHECKED_FROM:] + payload) != crc:
        return None
    return Record(sequence, samples, payload)


def _record_at(content: bytes, at: int) -> Record | None:
    start = at + _HEADER.size
    return _read_record(content[at:start], lambda size: content[start : start + size])


def _parts(content: bytes, at: int, after: int) -> Iterator[tuple[int, int, Record | None]]:
    """What a segment consists of from `at` on: the records behind the sequence `after`, and between them damage (None)."""
    while at < len(content):
        record = _record_at(content, at)
        if record is None or record.sequence <= after:
            behind = _next_whole(content, at + 1, after)
            yield at, behind, None
            at = behind
        else:
            behind = at + _HEADER.size + len(record.payload)
            yield at, behind, record
            at, after = behind, record.sequence


def _next_whole(content: bytes, at: int, after: int) -> int:
    """Where the next whole record behind the sequence `after` begins; the end, if there is none.

    No damaged length leads there: records are known by the upper half of their sequences, which does not change within a segment
    (for 71 minutes' worth of microseconds, or four billion records), and then by their checksums.
    """
    upper = struct.pack("<Q", after + 1)[4:]
    found = content.find(upper, at + _UPPER_FROM)
    while found >= 0:
        record = _record_at(content, found - _UPPER_FROM)
        if record is not None and record.sequence > after:
            return found - _UPPER_FROM
        found = content.find(upper, found + 1)
    return len(content)


def _is_torn(rest: bytes) -> bool:
    """Whether this end of what was written last is the beginning of a record rather than a damaged one."""
    if len(rest) < _HEADER.size:
        return True
    size: int
    size, crc, _, _ = _HEADER.unpack_from(rest)
    return len(rest) - _HEADER.size < size <= RECORD_BYTES_MAX and zlib.crc32(rest[_CHECKED_FROM:]) != crc


def _first_of(path: Path) -> int:
    """The sequence that a segment began with."""
    return int(path.stem)


def _keep_damaged(path: Path, at: int, rest: bytes) -> None:
    aside = path.with_name(f"{path.stem}-{at}.damaged")
    log.error("%s: %d bytes have a wrong checksum and are set aside in %s", path, len(rest), aside)
    try:
        aside.write_bytes(rest)
    except OSError as error:  # what is whole must not wait for it
        log.error("%s: %s", aside, error.strerror)


def _locked(path: Path) -> int:
    # The system lets go of it when the process ends, however it ends.
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        raise BufferInUse(f"{path.parent}: {BufferInUse.__doc__}") from error
    return file


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
