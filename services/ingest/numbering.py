"""Doors number what they put into each partition, so that its reader sees when something is missing.

Every record says which door wrote it (a new name after each start, and after each publish whose outcome is open), the number of
its first batch and how many there are. What a door was promised to be durable, and then is not there, leaves a hole in the
numbers; the historian keeps the next number with its position, in one transaction.
"""

import secrets
import struct
from collections.abc import Sequence
from typing import NamedTuple

HEADER = "numbers"
_FORMAT = struct.Struct("<8sQI")


class Numbers(NamedTuple):
    """What one record says."""

    door: str
    first: int
    batches: int


class Numbering:
    """One door's numbers of one partition."""

    def __init__(self) -> None:
        self.renew()

    def renew(self) -> None:
        """Begin anew: nobody knows whether the last record arrived."""
        self._door = secrets.token_bytes(8)
        self._next = 0

    def take(self, count: int) -> tuple[str, bytes]:
        """The header of the next record, with so many batches."""
        packed = _FORMAT.pack(self._door, self._next, count)
        self._next += count
        return HEADER, packed


def numbers_of(headers: Sequence[tuple[str, bytes]]) -> Numbers | None:
    """None: the record has none, or none that can be read."""
    for name, value in headers:
        if name == HEADER and len(value) == _FORMAT.size:
            door, first, count = _FORMAT.unpack(value)
            return Numbers(door.hex(), first, count)
    return None
