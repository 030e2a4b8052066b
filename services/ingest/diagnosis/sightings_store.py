"""SQL of what the doors have seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import NamedTuple, Self

from services.common.clock import from_us
from services.common.database import Connection

REFUSALS_KEPT_DAYS = 90
REFUSALS_A_FIRM_MAX = 1_000
# The rows of a firm above which come from keys that nobody issued.
REFUSALS_OF_NOBODY_MAX = 10_000
_BIGINT_MAX = 2**63 - 1


class RefusalKey(NamedTuple):
    """What makes two refusals the same kind. 0 and "": not known."""

    firm_id: int
    machine_id: int
    credential_id: int
    subject: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """How often, and the last time."""

    times: int
    samples: int
    first_us: int
    last_us: int
    source: str
    door: str
    example: str
    clock_off_us: int

    def and_then(self, later: "Refused | None") -> Self:
        if later is None:
            return self
        return replace(
            self,
            times=self.times + later.times,
            samples=self.samples + later.samples,
            last_us=max(self.last_us, later.last_us),
            source=later.source,
            door=later.door,
            example=later.example,
            clock_off_us=later.clock_off_us,
        )


@dataclass(frozen=True)
class MachineSeen:
    """The newest good batch of a machine at one door."""

    machine_id: int
    received_us: int
    newest_us: int
    credential_id: int
    source: str
    door: str


@dataclass(frozen=True)
class Owner:
    """Whose a revoked key was."""

    credential_id: int
    firm_id: int
    prefix: str


# Sorted by key: doors that write the same rows lock them in the same order.
_MACHINES = """
INSERT INTO machine_seen AS m (machine_id, received, newest, credential_id, source, door)
SELECT * FROM unnest($1::bigint[], $2::timestamptz[], $3::timestamptz[], $4::bigint[], $5::text[], $6::text[])
ON CONFLICT (machine_id) DO UPDATE SET received = excluded.received, newest = excluded.newest,
    credential_id = excluded.credential_id, source = excluded.source, door = excluded.door
WHERE m.received < excluded.received
"""
_USED = """
INSERT INTO credential_seen AS c (credential_id, used) SELECT * FROM unnest($1::bigint[], $2::timestamptz[])
ON CONFLICT (credential_id) DO UPDATE SET used = excluded.used WHERE c.used < excluded.used
"""
_REFUSALS = """
INSERT INTO refusal AS r (firm_id, machine_id, credential_id, subject, reason, source, door, times, samples, first, last,
    example, clock_off_us)
SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[],
    $9::bigint[], $10::timestamptz[], $11::timestamptz[], $12::text[], $13::bigint[])
ON CONFLICT (firm_id, machine_id, credential_id, subject, reason) DO UPDATE SET
    times = r.times + excluded.times, samples = r.samples + excluded.samples, first = least(r.first, excluded.first),
    last = greatest(r.last, excluded.last), source = excluded.source, door = excluded.door, example = excluded.example,
    clock_off_us = excluded.clock_off_us
"""


async def write_seen(connection: Connection, machines: Sequence[MachineSeen], used: Mapping[int, int]) -> None:
    if machines:
        rows = sorted(machines, key=lambda one: one.machine_id)
        await connection.execute(
            _MACHINES,
            [one.machine_id for one in rows],
            [from_us(one.received_us) for one in rows],
            [from_us(one.newest_us) for one in rows],
            [one.credential_id for one in rows],
            [one.source for one in rows],
            [one.door for one in rows],
        )
    if used:
        ids = sorted(used)
        await connection.execute(_USED, ids, [from_us(used[one]) for one in ids])


async def write_refusals(connection: Connection, refusals: Mapping[RefusalKey, Refused]) -> None:
    if not refusals:
        return
    rows = [
        (
            *key,
            *(one.source, one.door, one.times, one.samples, from_us(one.first_us), from_us(one.last_us), one.example),
            max(-_BIGINT_MAX, min(_BIGINT_MAX, one.clock_off_us)),
        )
        for key, one in sorted(refusals.items())
    ]
    await connection.execute(_REFUSALS, *(list(column) for column in zip(*rows, strict=True)))


async def owners(connection: Connection, digests: Sequence[bytes]) -> dict[bytes, Owner]:
    rows = await connection.fetch(
        "SELECT sha256, id, coalesce(firm_id, 0) AS firm_id, prefix FROM credential "
        "WHERE sha256 = ANY($1::bytea[]) AND revoked IS NOT NULL",
        list(digests),
    )
    return {row["sha256"]: Owner(row["id"], row["firm_id"], row["prefix"]) for row in rows}


async def clean_refusals(connection: Connection, now_us: int) -> None:
    """Forget what is old, and the oldest where a firm has too many kinds."""
    await connection.execute(
        "DELETE FROM refusal WHERE last < $1", from_us(now_us) - timedelta(days=REFUSALS_KEPT_DAYS)
    )
    await connection.execute(
        "DELETE FROM refusal r USING (SELECT firm_id, last, row_number() OVER (PARTITION BY firm_id ORDER BY last DESC) AS n, "
        "machine_id, credential_id, subject, reason FROM refusal) AS o "
        "WHERE o.n > CASE WHEN o.firm_id = 0 THEN $1::bigint ELSE $2::bigint END "
        "AND (r.firm_id, r.machine_id, r.credential_id, r.subject, r.reason) "
        "= (o.firm_id, o.machine_id, o.credential_id, o.subject, o.reason)",
        REFUSALS_OF_NOBODY_MAX,
        REFUSALS_A_FIRM_MAX,
    )
