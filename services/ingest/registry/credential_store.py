"""SQL of the credentials."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import asyncpg

from services.common import topics
from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.directory import entity_key
from services.common.errors import Conflict, NotFound
from services.common.identity import Role
from services.common.outbox import write, write_all
from services.ingest.registry.store import lock_firm, publish
from smdih.directory.v1 import directory_pb2 as pb

# Every process of the hub keeps all keys in memory. Those that ended count too, until they are forgotten.
KEYS_PER_FIRM_MAX = 2_000

ROLE_NUMBERS = {
    Role.DEVICE: pb.ROLE_DEVICE,
    Role.FIRM: pb.ROLE_FIRM,
    Role.PARTNER: pb.ROLE_PARTNER,
    Role.OPERATOR: pb.ROLE_OPERATOR,
}


@dataclass(frozen=True)
class Issued:
    """A credential as it stands, without what would let anybody use it."""

    id: int
    prefix: str
    sha256: bytes
    role: Role
    firm_id: int
    partner_id: int
    label: str
    valid_from: datetime
    valid_to: datetime | None
    revoked: datetime | None
    created: datetime
    replaces: int
    used: datetime | None

    def state(self, now: datetime) -> str:
        if self.revoked is not None:
            # What ended by itself is taken back in the end, so that nobody has to remember it.
            return "expired" if self.valid_to is not None and self.revoked >= self.valid_to else "revoked"
        if now < self.valid_from:
            return "not_yet_valid"
        return "expired" if self.valid_to is not None and now >= self.valid_to else "valid"

    def as_directory_entry(self) -> pb.Credential:
        return pb.Credential(
            id=self.id,
            prefix=self.prefix,
            sha256=self.sha256,
            role=ROLE_NUMBERS[self.role],
            firm_id=self.firm_id,
            partner_id=self.partner_id,
            label=self.label,
            valid_from_us=to_us(self.valid_from),
            valid_to_us=to_us(self.valid_to) if self.valid_to is not None else 0,
        )


async def create(
    connection: Connection, credential: pb.Credential, role: Role, now_us: int, *, replaces: int = 0
) -> pb.Credential:
    """Store and publish a credential (its id is given here). Raises NotFound when its firm or partner does not exist; Conflict
    where a firm has too many."""
    if credential.firm_id:
        await lock_firm(connection, credential.firm_id)
        have = await connection.fetchval(
            "SELECT count(*) FROM credential WHERE firm_id = $1 AND revoked IS NULL", credential.firm_id
        )
        if have >= KEYS_PER_FIRM_MAX:
            detail = f"The firm has {have} keys that are not revoked; revoke some that nobody uses."
            raise Conflict(detail, reason="TOO_MANY_KEYS")
    try:
        credential.id = await connection.fetchval(
            "INSERT INTO credential (prefix, sha256, role, firm_id, partner_id, label, valid_from, valid_to, replaces) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) RETURNING id",
            *(credential.prefix, credential.sha256, role.value),
            *(credential.firm_id or None, credential.partner_id or None, credential.label),
            from_us(credential.valid_from_us),
            from_us(credential.valid_to_us) if credential.valid_to_us else None,
            replaces or None,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise NotFound("There is no such firm or partner.") from error
    await publish(connection, "credential", pb.DirectoryEntry(credential=credential), credential.id, now_us)
    return credential


async def revoke(connection: Connection, credential_id: int) -> Issued:
    """Revoke and publish; revoking again changes nothing. Raises NotFound."""
    await connection.execute("UPDATE credential SET revoked = now() WHERE id = $1 AND revoked IS NULL", credential_id)
    await write(connection, topics.DIRECTORY, key=entity_key("credential", credential_id), value=None)
    return await locked(connection, credential_id)


async def forget_ended(connection: Connection, before_us: int, limit: int) -> Sequence[int]:
    """Revoke and publish some that ended before then; which."""
    rows = await connection.fetch(
        "UPDATE credential SET revoked = now() WHERE id IN (SELECT id FROM credential WHERE revoked IS NULL AND valid_to < $1 "
        "ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING id",
        *(from_us(before_us), limit),
    )
    ids = [row["id"] for row in rows]
    await write_all(connection, topics.DIRECTORY, [(entity_key("credential", one), None) for one in ids])
    return ids


async def end_at(connection: Connection, credential: Issued, end_us: int, now_us: int) -> None:
    """Let it be valid until then and no longer; publish."""
    await connection.execute("UPDATE credential SET valid_to = $2 WHERE id = $1", credential.id, from_us(end_us))
    entry = credential.as_directory_entry()
    entry.valid_to_us = end_us
    await publish(connection, "credential", pb.DirectoryEntry(credential=entry), credential.id, now_us)


_ISSUED = """
SELECT c.id, c.prefix, c.sha256, c.role, coalesce(c.firm_id, 0) AS firm_id, coalesce(c.partner_id, 0) AS partner_id, c.label,
    c.valid_from, c.valid_to, c.revoked, c.created, coalesce(c.replaces, 0) AS replaces, s.used
FROM credential c LEFT JOIN credential_seen s ON s.credential_id = c.id
"""


_LAST_OF_LINE = """
WHERE c.id = (
    WITH RECURSIVE line AS (SELECT $1::bigint AS id UNION ALL SELECT n.id FROM credential n JOIN line ON n.replaces = line.id)
    SELECT max(id) FROM line
)
"""


async def locked(connection: Connection, credential_id: int) -> Issued:
    """The credential, which nobody else changes until the end of the transaction. Raises NotFound."""
    row = await connection.fetchrow(_ISSUED + "WHERE c.id = $1 FOR UPDATE OF c", credential_id)
    if row is None:
        raise NotFound(f"There is no credential {credential_id}.")
    return _issued(row)


async def successor(connection: Connection, credential_id: int) -> int:
    """The credential that takes over from this one; 0: none."""
    found = await connection.fetchval(
        "SELECT id FROM credential WHERE replaces = $1 AND revoked IS NULL ORDER BY id LIMIT 1", credential_id
    )
    return found or 0


async def last_of_line(connection: Connection, credential_id: int) -> Issued:
    """The newest of those that were made to take over from this one, revoked ones too; itself if there is none."""
    row = await connection.fetchrow(_ISSUED + _LAST_OF_LINE, credential_id)
    assert row is not None
    return _issued(row)


async def page(connection: Connection, firm_id: int, after: int, limit: int) -> Sequence[Issued]:
    """In order of id, above `after`. firm_id 0: of everybody."""
    rows = await connection.fetch(
        _ISSUED + "WHERE ($1::bigint = 0 OR c.firm_id = $1) AND c.id > $2 ORDER BY c.id LIMIT $3",
        *(firm_id, after, limit),
    )
    return [_issued(row) for row in rows]


def _issued(row: asyncpg.Record) -> Issued:
    fields = dict(row)
    return Issued(**fields | {"role": Role(fields["role"])})
