"""SQL of the proposals of signals."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import NamedTuple, Self

from services.common.clock import from_us
from services.common.database import Connection
from services.common.errors import NotFound

PROPOSALS_A_FIRM_MAX = 1_000


class ProposalKey(NamedTuple):
    machine_id: int
    name: str


@dataclass(frozen=True)
class Seen:
    """What came of a signal that its machine does not have."""

    firm_id: int
    samples: int
    first_us: int
    last_us: int
    example: float
    lowest: float
    highest: float
    is_whole: bool
    source: str

    def and_then(self, later: "Seen | None") -> Self:
        if later is None:
            return self
        return replace(
            self,
            samples=self.samples + later.samples,
            last_us=later.last_us,
            example=later.example,
            lowest=min(self.lowest, later.lowest),
            highest=max(self.highest, later.highest),
            is_whole=self.is_whole and later.is_whole,
            source=later.source,
        )


@dataclass(frozen=True)
class Proposal:
    id: int
    firm_id: int
    machine_id: int
    path: str
    name: str
    samples: int
    first: datetime
    last: datetime
    example: float
    lowest: float
    highest: float
    whole: bool
    source: str
    dismissed: datetime | None


# A signal that has been made meanwhile is not proposed again.
_WRITE = """
INSERT INTO signal_proposal AS p (firm_id, machine_id, name, samples, first, last, example, lowest, highest, whole, source)
SELECT t.* FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::bigint[], $5::timestamptz[], $6::timestamptz[],
    $7::float8[], $8::float8[], $9::float8[], $10::boolean[], $11::text[])
    AS t (firm_id, machine_id, name, samples, first, last, example, lowest, highest, whole, source)
WHERE NOT EXISTS (SELECT 1 FROM signal s WHERE s.machine_id = t.machine_id AND s.name = t.name)
    AND EXISTS (SELECT 1 FROM machine m WHERE m.id = t.machine_id)
ON CONFLICT (machine_id, name) DO UPDATE SET
    samples = p.samples + excluded.samples, last = greatest(p.last, excluded.last), example = excluded.example,
    lowest = least(p.lowest, excluded.lowest), highest = greatest(p.highest, excluded.highest),
    whole = p.whole AND excluded.whole, source = excluded.source
"""
# Those that were seen last stay; what somebody has dismissed stays dismissed as long as there is room for it.
_CLEAN = """
DELETE FROM signal_proposal p USING (
    SELECT id, row_number() OVER (PARTITION BY firm_id ORDER BY (dismissed IS NOT NULL), last DESC) AS n FROM signal_proposal
) AS o WHERE o.id = p.id AND o.n > $1
"""


async def write(connection: Connection, proposals: Mapping[ProposalKey, Seen]) -> None:
    if not proposals:
        return
    rows = [
        (
            *(one.firm_id, *key, one.samples, from_us(one.first_us), from_us(one.last_us)),
            *(one.example, one.lowest, one.highest, one.is_whole, one.source),
        )
        for key, one in sorted(proposals.items())
    ]
    await connection.execute(_WRITE, *(list(column) for column in zip(*rows, strict=True)))


async def clean(connection: Connection) -> None:
    await connection.execute(_CLEAN, PROPOSALS_A_FIRM_MAX)


_PROPOSALS = """
SELECT p.id, p.firm_id, p.machine_id, m.path, p.name, p.samples, p.first, p.last, p.example, p.lowest, p.highest, p.whole,
    p.source, p.dismissed
FROM signal_proposal p JOIN machine m ON m.id = p.machine_id
"""


async def page(
    connection: Connection, firm_id: int, machine_id: int, after: int, limit: int, *, with_dismissed: bool
) -> list[Proposal]:
    """In order of id, above `after`. firm_id, machine_id 0: all."""
    rows = await connection.fetch(
        _PROPOSALS + "WHERE ($1::bigint = 0 OR p.firm_id = $1) AND ($2::bigint = 0 OR p.machine_id = $2) AND p.id > $3 "
        "AND ($5 OR p.dismissed IS NULL) ORDER BY p.id LIMIT $4",
        *(firm_id, machine_id, after, limit, with_dismissed),
    )
    return [Proposal(**dict(row)) for row in rows]


async def locked(connection: Connection, proposal_id: int) -> Proposal:
    """Raises NotFound."""
    row = await connection.fetchrow(_PROPOSALS + "WHERE p.id = $1 FOR UPDATE OF p", proposal_id)
    if row is None:
        raise NotFound(f"There is no proposal {proposal_id}; it may have been accepted already.")
    return Proposal(**dict(row))


async def dismiss(connection: Connection, proposal_id: int, now_us: int) -> None:
    await connection.execute("UPDATE signal_proposal SET dismissed = $2 WHERE id = $1", proposal_id, from_us(now_us))


async def remove(connection: Connection, proposal_id: int) -> None:
    await connection.execute("DELETE FROM signal_proposal WHERE id = $1", proposal_id)


async def policy(connection: Connection, firm_id: int) -> str:
    """refuse or propose. Raises NotFound."""
    found: str | None = await connection.fetchval("SELECT unknown_signals FROM firm WHERE id = $1", firm_id)
    if found is None:
        raise NotFound(f"There is no firm {firm_id}.")
    return found


async def set_policy(connection: Connection, firm_id: int, policy_: str) -> None:
    await connection.execute("UPDATE firm SET unknown_signals = $2 WHERE id = $1", firm_id, policy_)
