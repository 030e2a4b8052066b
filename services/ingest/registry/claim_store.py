"""SQL of the claim codes."""

from dataclasses import dataclass
from datetime import datetime, timedelta

import asyncpg

from services.common.clock import from_us
from services.common.database import Connection
from services.common.errors import Invalid, NotFound

# How long a code that can no longer be used stays to be seen.
KEPT_DAYS = 30


@dataclass(frozen=True)
class Place:
    """What a code is for; 0 and "": not said."""

    firm_id: int
    site_id: int
    machine_id: int


@dataclass(frozen=True)
class ClaimCode:
    """A code as it stands, without its secret."""

    id: int
    lookup: str
    salt: bytes
    digest: bytes
    firm_id: int
    site_id: int
    machine_id: int
    label: str
    created: datetime
    expires: datetime
    key_valid_days: int
    wrong_attempts: int
    used: datetime | None
    request_sha256: bytes | None
    credential_id: int
    key_salt: bytes | None


_CODES = """
SELECT id, lookup, salt, digest, firm_id, coalesce(site_id, 0) AS site_id, coalesce(machine_id, 0) AS machine_id, label,
    created, expires, coalesce(key_valid_days, 0) AS key_valid_days, wrong_attempts, used, request_sha256,
    coalesce(credential_id, 0) AS credential_id, key_salt
FROM claim_code
"""


async def check_place(connection: Connection, place: Place) -> None:
    """Raise NotFound or Invalid unless firm, site and machine exist and belong together."""
    if not await connection.fetchval("SELECT 1 FROM firm WHERE id = $1", place.firm_id):
        raise NotFound(f"There is no firm {place.firm_id}.")
    if place.site_id:
        firm_id = await connection.fetchval("SELECT firm_id FROM site WHERE id = $1", place.site_id)
        if firm_id != place.firm_id:
            raise NotFound(f"The firm has no site {place.site_id}.")
    if place.machine_id:
        machine = await connection.fetchrow("SELECT firm_id, site_id FROM machine WHERE id = $1", place.machine_id)
        if machine is None or machine["firm_id"] != place.firm_id:
            raise NotFound(f"The firm has no machine {place.machine_id}.")
        if place.site_id not in (0, machine["site_id"]):
            raise Invalid(f"Machine {place.machine_id} does not stand at site {place.site_id}.")


async def create(
    connection: Connection,
    place: Place,
    *,
    lookup: str,
    salt: bytes,
    digest: bytes,
    label: str,
    created_by: int,
    now_us: int,
    expires_us: int,
    key_valid_days: int,
) -> int | None:
    """The id of the new code; None where another code begins with the same characters."""
    try:
        async with connection.transaction():
            code_id: int = await connection.fetchval(
                "INSERT INTO claim_code (lookup, salt, digest, firm_id, site_id, machine_id, label, created_by, created, expires, "
                "key_valid_days) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) RETURNING id",
                *(
                    lookup,
                    salt,
                    digest,
                    place.firm_id,
                    place.site_id or None,
                    place.machine_id or None,
                    label,
                    created_by,
                ),
                *(from_us(now_us), from_us(expires_us), key_valid_days or None),
            )
    except asyncpg.UniqueViolationError:
        return None
    return code_id


async def open_codes(connection: Connection, firm_id: int, now_us: int) -> int:
    found: int = await connection.fetchval(
        "SELECT count(*) FROM claim_code WHERE firm_id = $1 AND used IS NULL AND expires > $2",
        *(firm_id, from_us(now_us)),
    )
    return found


async def salt_of(connection: Connection, lookup: str) -> bytes | None:
    found: bytes | None = await connection.fetchval("SELECT salt FROM claim_code WHERE lookup = $1", lookup)
    return found


async def locked(connection: Connection, lookup: str) -> ClaimCode | None:
    row = await connection.fetchrow(_CODES + "WHERE lookup = $1 FOR UPDATE", lookup)
    return None if row is None else ClaimCode(**dict(row))


async def note_wrong_attempt(connection: Connection, code_id: int) -> None:
    await connection.execute("UPDATE claim_code SET wrong_attempts = wrong_attempts + 1 WHERE id = $1", code_id)


async def note_used(
    connection: Connection, code_id: int, credential_id: int, request_sha256: bytes, key_salt: bytes, now_us: int
) -> None:
    await connection.execute(
        "UPDATE claim_code SET used = $2, credential_id = $3, request_sha256 = $4, key_salt = $5 WHERE id = $1",
        *(code_id, from_us(now_us), credential_id, request_sha256, key_salt),
    )


async def forget(connection: Connection, now_us: int, retry_window_s: int) -> None:
    """Erase what repeats no longer need, and codes that ended long ago."""
    await connection.execute(
        "UPDATE claim_code SET key_salt = NULL WHERE key_salt IS NOT NULL AND used < $1",
        from_us(now_us) - timedelta(seconds=retry_window_s),
    )
    await connection.execute(
        "DELETE FROM claim_code WHERE greatest(expires, used) < $1", from_us(now_us) - timedelta(days=KEPT_DAYS)
    )


async def page(connection: Connection, firm_id: int, before: int, limit: int) -> list[ClaimCode]:
    """Newest first, below the id `before` (0: from the newest). firm_id 0: of all firms."""
    rows = await connection.fetch(
        _CODES + "WHERE ($1::bigint = 0 OR firm_id = $1) AND ($2::bigint = 0 OR id < $2) ORDER BY id DESC LIMIT $3",
        *(firm_id, before, limit),
    )
    return [ClaimCode(**dict(row)) for row in rows]


async def cancel(connection: Connection, code_id: int, now_us: int) -> tuple[int, bool]:
    """End a code; the firm it was for, and whether it was open. Raises NotFound."""
    row = await connection.fetchrow(
        "SELECT firm_id, used IS NULL AND expires > $2 AS open FROM claim_code WHERE id = $1 FOR UPDATE",
        *(code_id, from_us(now_us)),
    )
    if row is None:
        raise NotFound(f"There is no claim code {code_id}.")
    if row["open"]:
        await connection.execute("UPDATE claim_code SET expires = $2 WHERE id = $1", code_id, from_us(now_us))
    return row["firm_id"], row["open"]


async def paths(connection: Connection, code: ClaimCode) -> tuple[str, str]:
    """Path of the site (or firm) and of the machine that a code is for; the latter may be empty."""
    row = await connection.fetchrow(
        "SELECT f.slug || coalesce('/' || s.slug, '') AS site, coalesce(m.path, '') AS machine FROM firm f "
        "LEFT JOIN machine m ON m.id = $3 LEFT JOIN site s ON s.id = coalesce(nullif($2, 0), m.site_id) WHERE f.id = $1",
        *(code.firm_id, code.site_id, code.machine_id),
    )
    assert row is not None
    return row["site"], row["machine"]
