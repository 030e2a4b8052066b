"""SQL of the queries: rows out."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from services.common.database import Connection
from services.common.errors import NotFound
from services.ingest.domain import CHANNEL_GROUP
from services.ingest.queries.absent import Absent
from smdih.directory.v1 import directory_pb2 as pb


@dataclass(frozen=True)
class SignalPlace:
    """Where the values of a signal stand."""

    id: int
    firm_id: int
    machine_id: int
    position: int
    name: str
    unit: str

    @property
    def first_position(self) -> int:
        return self.position // CHANNEL_GROUP * CHANNEL_GROUP

    @property
    def index(self) -> int:
        """Of the value in the stored array, from 1 as PostgreSQL counts."""
        return self.position % CHANNEL_GROUP + 1


@dataclass(frozen=True)
class Latest:
    signal_id: int
    name: str
    unit: str
    ts: datetime
    value: float


@dataclass(frozen=True)
class Bucket:
    ts: datetime
    count: int
    sum: float
    min: float
    max: float
    last: float


async def signal_place(connection: Connection, signal_id: int) -> SignalPlace:
    """Raises NotFound."""
    row = await connection.fetchrow(
        "SELECT id, firm_id, machine_id, position, name, unit FROM signal WHERE id = $1", signal_id
    )
    if row is None:
        raise NotFound(f"There is no signal {signal_id}.")
    return SignalPlace(**dict(row))


async def signal_places(connection: Connection, signal_ids: Sequence[int]) -> list[SignalPlace]:
    """In the order asked for. Raises NotFound."""
    rows = await connection.fetch(
        "SELECT id, firm_id, machine_id, position, name, unit FROM signal WHERE id = ANY($1::bigint[])", signal_ids
    )
    found = {row["id"]: SignalPlace(**dict(row)) for row in rows}
    for signal_id in signal_ids:
        if signal_id not in found:
            raise NotFound(f"There is no signal {signal_id}.")
    return [found[signal_id] for signal_id in signal_ids]


async def latest(connection: Connection, machine: pb.Machine, absent: Absent) -> list[Latest]:
    """The newest stored value of each signal of the machine that had one within its newest hours (`latest_values`)."""
    found: list[Latest] = []
    for first in range(0, len(machine.signals), CHANNEL_GROUP):
        width = min(CHANNEL_GROUP, len(machine.signals) - first)
        rows = await connection.fetch(
            "SELECT i, ts, v FROM latest_values($1, $2, $3, $4) ORDER BY i",
            *(machine.id, first, width, absent.of((machine.id, first))),
        )
        absent.note((machine.id, first), set(range(1, width + 1)) - {row["i"] for row in rows})
        for row in rows:
            signal = machine.signals[first + row["i"] - 1]
            found.append(Latest(signal.id, signal.name, signal.unit, row["ts"], row["v"]))
    return found


async def samples(
    connection: Connection, place: SignalPlace, start: datetime, end: datetime, limit: int
) -> list[tuple[datetime, float]]:
    """Stored samples in [start, end), in order of time, at most `limit`."""
    rows = await connection.fetch(
        "SELECT ts, values[$3] AS value FROM frame WHERE machine_id = $1 AND first_position = $2 AND ts >= $4 AND ts < $5 "
        "AND values[$3] IS NOT NULL ORDER BY ts LIMIT $6",
        *(place.machine_id, place.first_position, place.index, start, end, limit),
    )
    return [(row["ts"], row["value"]) for row in rows]


_BUCKETS_1M = """
SELECT ts, counts[$3] AS count, sums[$3] AS sum, mins[$3] AS min, maxs[$3] AS max, lasts[$3] AS last
FROM buckets_1m($1, $2, $4, $5) WHERE counts[$3] > 0 ORDER BY ts LIMIT $6
"""
_BUCKETS_1H = _BUCKETS_1M.replace("buckets_1m", "buckets_1h")


async def buckets(
    connection: Connection, place: SignalPlace, start: datetime, end: datetime, limit: int, *, hours: bool
) -> list[Bucket]:
    """Buckets that begin in [start, end) and hold a value, in order of time, at most `limit`."""
    rows = await connection.fetch(
        _BUCKETS_1H if hours else _BUCKETS_1M,
        *(place.machine_id, place.first_position, place.index, start, end, limit),
    )
    return [Bucket(**dict(row)) for row in rows]
