"""The registry and the directory topic brought together again, after one of them was restored or lost.

Both hold who and what the hub knows. Nothing else may run meanwhile.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import asyncpg

from services.common import topics
from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.directory import entity_key
from services.common.kafka import Message
from services.ingest.registry import audit_store
from services.ingest.registry.credential_store import ROLE_NUMBERS
from services.ingest.registry.store import FIRMS, firm_of, machines_by_id
from smdih.directory.v1 import directory_pb2 as pb

_CREDENTIAL_ROWS = (
    "SELECT id, prefix, sha256, role, firm_id, partner_id, label, valid_from, valid_to, revoked, created, replaces FROM "
    "credential "
)
MACHINES_PAGE = 2_000
# Ids of these come from sequences; a table is named like its kind.
KINDS = ("firm", "partner", "site", "machine", "credential")
_ROLES = {number: role for role, number in ROLE_NUMBERS.items()}

# Key of the topic -> entity; None: it was removed.
Entries = Mapping[str, pb.DirectoryEntry | None]


@dataclass(frozen=True)
class Adopted:
    """What the database did not have, by kind, and what is to be published now."""

    taken: Mapping[str, int]
    revoked: int
    messages: list[Message]


async def adopt(connection: Connection, topic: Mapping[str, bytes | None], now_us: int) -> Adopted:
    """After a restore: take from the topic what became of the registry since the dump.

    `topic`: the newest record of each key. A key that either side says is revoked stays revoked. What the dump had and had not yet
    published is published.
    """
    published: Entries = {
        key: pb.DirectoryEntry.FromString(value) if value is not None else None for key, value in topic.items()
    }
    newest = _newest(published, await _unsent(connection))
    stored = await _stored(connection)
    taken: Counter[str] = Counter()
    # A site needs its firm, a machine its site.
    for kind in KINDS:
        for key, entry in newest.items():
            if entry is not None and entry.WhichOneof("entity") == kind and not _same(entry, stored.get(key)):
                taken[kind] += await _WRITERS[kind](connection, entry)
        await _move_sequence(connection, kind, [_number(key) for key in newest if key.startswith(f"{kind}/")])
    signals = [signal.id for entry in newest.values() if entry is not None for signal in entry.machine.signals]
    await _move_sequence(connection, "signal", signals)
    known = [_number(key) for key, entry in newest.items() if entry is not None and key.startswith("credential/")]
    revoked = await connection.fetch(
        "UPDATE credential SET revoked = $2 WHERE revoked IS NULL AND id <> ALL($1::bigint[]) RETURNING id",
        *(known, from_us(now_us)),
    )
    await connection.execute("DELETE FROM outbox WHERE topic = $1", topics.DIRECTORY)
    await audit_store.note(
        connection,
        now_us,
        firm_id=0,
        credential_id=0,
        action="directory_adopted",
        detail=f"after a restore: {dict(taken)} taken from the topic, {len(revoked)} keys revoked",
    )
    now = await _stored(connection)
    changed = {key: entry for key, entry in now.items() if not _same(entry, published.get(key))}
    gone = [key for key, entry in published.items() if entry is not None and key not in now]
    messages = [_message(key, entry, now_us) for key, entry in changed.items()]
    return Adopted(dict(taken), len(revoked), messages + [_message(key, None, now_us) for key in gone])


async def keys(connection: Connection) -> Collection[str]:
    """Of everything that the topic is to hold."""
    return (await _stored(connection)).keys()


async def is_behind(connection: Connection, topic: Mapping[str, bytes | None]) -> bool:
    """The topic has what this database never had, or has removed what is there: the database was restored. What only the database
    has says nothing."""
    stored = await _stored(connection)
    revoked = {
        entity_key("credential", row["id"])
        for row in await connection.fetch("SELECT id FROM credential WHERE revoked IS NOT NULL")
    }
    return any(
        key in stored if value is None else key not in stored and key not in revoked for key, value in topic.items()
    )


async def everything(connection: Connection, now_us: int) -> list[Message]:
    """After Kafka was lost: what the directory topic is to hold."""
    await connection.execute("DELETE FROM outbox WHERE topic = $1", topics.DIRECTORY)
    return [_message(key, entry, now_us) for key, entry in (await _stored(connection)).items()]


def _newest(published: Entries, unsent: Entries) -> Entries:
    newest = dict(published)
    for key, entry in unsent.items():
        have = newest.get(key)
        # A tombstone has no time; it revokes a key, and that holds whatever else was said.
        if entry is None or key not in newest or (have is not None and have.changed_us < entry.changed_us):
            newest[key] = entry
    return newest


async def _unsent(connection: Connection) -> Entries:
    rows = await connection.fetch("SELECT key, value FROM outbox WHERE topic = $1 ORDER BY id", topics.DIRECTORY)
    return {
        row["key"].decode(): None if row["value"] is None else pb.DirectoryEntry.FromString(row["value"])
        for row in rows
    }


async def _stored(connection: Connection) -> dict[str, pb.DirectoryEntry]:
    """What the tables say, in an order in which everything comes after what it belongs to."""
    entries: list[tuple[str, int, pb.DirectoryEntry]] = [
        ("partner", row["id"], pb.DirectoryEntry(partner=pb.Partner(**dict(row))))
        for row in await connection.fetch("SELECT id, name, region FROM partner ORDER BY id")
    ]
    entries += [
        ("firm", row["id"], pb.DirectoryEntry(firm=firm_of(row)))
        for row in await connection.fetch(FIRMS + "ORDER BY f.id")
    ]
    entries += [
        ("site", row["id"], pb.DirectoryEntry(site=pb.Site(**dict(row))))
        for row in await connection.fetch("SELECT id, firm_id, slug, name, timezone FROM site ORDER BY id")
    ]
    entries += [
        ("credential", row["id"], pb.DirectoryEntry(credential=_credential(row)))
        for row in await connection.fetch(_CREDENTIAL_ROWS + "WHERE revoked IS NULL ORDER BY id")
    ]
    ids = [row["id"] for row in await connection.fetch("SELECT id FROM machine ORDER BY id")]
    for start in range(0, len(ids), MACHINES_PAGE):
        machines = await machines_by_id(connection, ids[start : start + MACHINES_PAGE])
        entries += [
            ("machine", machine_id, pb.DirectoryEntry(machine=machine)) for machine_id, machine in machines.items()
        ]
    return {entity_key(kind, entity_id): entry for kind, entity_id, entry in entries}


def _credential(row: asyncpg.Record) -> pb.Credential:
    return pb.Credential(
        id=row["id"],
        prefix=row["prefix"],
        sha256=row["sha256"],
        role=next(number for number, role in _ROLES.items() if role.value == row["role"]),
        firm_id=row["firm_id"] or 0,
        partner_id=row["partner_id"] or 0,
        label=row["label"],
        valid_from_us=to_us(row["valid_from"]),
        valid_to_us=to_us(row["valid_to"]) if row["valid_to"] is not None else 0,
    )


async def _write_partner(connection: Connection, entry: pb.DirectoryEntry) -> int:
    partner = entry.partner
    await connection.execute(
        "INSERT INTO partner (id, name, region) OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3) "
        "ON CONFLICT (id) DO UPDATE SET name = excluded.name, region = excluded.region",
        *(partner.id, partner.name, partner.region),
    )
    return 1


async def _write_firm(connection: Connection, entry: pb.DirectoryEntry) -> int:
    firm = entry.firm
    await connection.execute(
        "INSERT INTO firm (id, name, slug, sic, region, size, unknown_signals) OVERRIDING SYSTEM VALUE "
        "VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT (id) DO UPDATE SET name = excluded.name, slug = excluded.slug, "
        "sic = excluded.sic, region = excluded.region, size = excluded.size, unknown_signals = excluded.unknown_signals",
        *(firm.id, firm.name, firm.slug, firm.sic, firm.region, firm.size),
        "propose" if firm.propose_unknown_signals else "refuse",
    )
    quota = firm.quota
    if firm.HasField("quota"):
        await connection.execute(
            "INSERT INTO firm_quota (firm_id, samples_per_s, signals, stored_days, changed) VALUES ($1, $2, $3, $4, $5) "
            "ON CONFLICT (firm_id) DO UPDATE SET samples_per_s = excluded.samples_per_s, signals = excluded.signals, "
            "stored_days = excluded.stored_days, changed = excluded.changed",
            *(firm.id, quota.samples_per_s or None, quota.signals or None, quota.stored_days or None),
            from_us(entry.changed_us),
        )
    else:
        await connection.execute("DELETE FROM firm_quota WHERE firm_id = $1", firm.id)
    return 1


async def _write_site(connection: Connection, entry: pb.DirectoryEntry) -> int:
    site = entry.site
    await connection.execute(
        "INSERT INTO site (id, firm_id, slug, name, timezone) OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT (id) DO UPDATE SET slug = excluded.slug, name = excluded.name, timezone = excluded.timezone",
        *(site.id, site.firm_id, site.slug, site.name, site.timezone),
    )
    return 1


async def _write_machine(connection: Connection, entry: pb.DirectoryEntry) -> int:
    machine = entry.machine
    await connection.execute(
        "INSERT INTO machine (id, firm_id, site_id, path, name, kind) OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, $5, $6) "
        "ON CONFLICT (id) DO UPDATE SET path = excluded.path, name = excluded.name, kind = excluded.kind",
        *(machine.id, machine.firm_id, machine.site_id, machine.path, machine.name, machine.kind),
    )
    await connection.executemany(
        "INSERT INTO signal (id, firm_id, machine_id, position, name, unit, range_min, range_max) OVERRIDING SYSTEM VALUE "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (id) DO UPDATE SET name = excluded.name, unit = excluded.unit, "
        "range_min = excluded.range_min, range_max = excluded.range_max",
        [
            (
                *(signal.id, machine.firm_id, machine.id, position, signal.name, signal.unit),
                signal.range_min if signal.HasField("range_min") else None,
                signal.range_max if signal.HasField("range_max") else None,
            )
            for position, signal in enumerate(machine.signals)
        ],
    )
    return 1


async def _write_credential(connection: Connection, entry: pb.DirectoryEntry) -> int:
    credential = entry.credential
    written = await connection.fetchval(
        "INSERT INTO credential (id, prefix, sha256, role, firm_id, partner_id, label, valid_from, valid_to) "
        "OVERRIDING SYSTEM VALUE VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) "
        "ON CONFLICT (id) DO UPDATE SET label = excluded.label, valid_from = excluded.valid_from, valid_to = excluded.valid_to "
        "WHERE credential.revoked IS NULL RETURNING 1",
        *(credential.id, credential.prefix, credential.sha256, _ROLES[credential.role].value),
        *(credential.firm_id or None, credential.partner_id or None, credential.label),
        from_us(credential.valid_from_us),
        from_us(credential.valid_to_us) if credential.valid_to_us else None,
    )
    return int(written is not None)


_WRITERS = {
    "partner": _write_partner,
    "firm": _write_firm,
    "site": _write_site,
    "machine": _write_machine,
    "credential": _write_credential,
}


async def _move_sequence(connection: Connection, table: str, ids: list[int]) -> None:
    # An id that was given out once never names something else: samples and grants go by it.
    await connection.execute(
        f"SELECT setval(pg_get_serial_sequence('{table}', 'id'), greatest($1, (SELECT max(id) FROM {table}), "  # noqa: S608
        f"(SELECT last_value FROM pg_sequences WHERE format('%I.%I', schemaname, sequencename) = "
        f"pg_get_serial_sequence('{table}', 'id')), 1))",
        max(ids, default=0),
    )


def _same(one: pb.DirectoryEntry, other: pb.DirectoryEntry | None) -> bool:
    """But for the time of the change."""
    if other is None:
        return False
    return _bytes(one) == _bytes(other)


def _bytes(entry: pb.DirectoryEntry) -> bytes:
    bare = pb.DirectoryEntry()
    bare.CopyFrom(entry)
    bare.ClearField("changed_us")
    return bare.SerializeToString(deterministic=True)


def _number(key: str) -> int:
    return int(key.partition("/")[2])


def _message(key: str, entry: pb.DirectoryEntry | None, now_us: int) -> Message:
    if entry is not None:
        entry.changed_us = now_us
    return Message(topics.DIRECTORY, None if entry is None else entry.SerializeToString(), key.encode())
