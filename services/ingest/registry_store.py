"""SQL of the registry: values in, directory messages out.

A change and its directory entry in one transaction; asking twice for the same thing makes it once.
"""

from collections.abc import Sequence

import asyncpg

from services.common import topics
from services.common.clock import from_us
from services.common.database import Connection
from services.common.directory import entity_key
from services.common.errors import AlreadyExists, Invalid, NotFound
from services.common.identity import Role
from services.common.outbox import write
from services.ingest.domain import NewFirm, NewMachine, NewSignal, NewSite
from smdih.directory.v1 import directory_pb2 as pb

ROLE_NUMBERS = {
    Role.DEVICE: pb.ROLE_DEVICE,
    Role.FIRM: pb.ROLE_FIRM,
    Role.PARTNER: pb.ROLE_PARTNER,
    Role.OPERATOR: pb.ROLE_OPERATOR,
}


async def publish(connection: Connection, kind: str, entry: pb.DirectoryEntry, entity_id: int, changed_us: int) -> None:
    entry.changed_us = changed_us
    await write(connection, topics.DIRECTORY, key=entity_key(kind, entity_id), value=entry.SerializeToString())


async def create_firm(connection: Connection, new: NewFirm, now_us: int) -> pb.Firm:
    firm_id = await connection.fetchval(
        "INSERT INTO firm (name, slug, sic, region, size) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT ON CONSTRAINT firm_slug_key DO UPDATE SET slug = excluded.slug "
        "WHERE (firm.name, firm.sic, firm.region, firm.size) = (excluded.name, excluded.sic, excluded.region, excluded.size) "
        "RETURNING id",
        *(new.name, new.slug, new.sic, new.region, new.size),
    )
    if firm_id is None:
        raise AlreadyExists(f"There is another firm {new.slug!r} already; choose another slug.")
    firm = pb.Firm(id=firm_id, name=new.name, slug=new.slug, sic=new.sic, region=new.region, size=new.size)
    await publish(connection, "firm", pb.DirectoryEntry(firm=firm), firm_id, now_us)
    return firm


async def create_partner(connection: Connection, name: str, region: str, now_us: int) -> pb.Partner:
    partner_id = await connection.fetchval(
        "INSERT INTO partner (name, region) VALUES ($1, $2) "
        "ON CONFLICT ON CONSTRAINT partner_name_key DO UPDATE SET name = excluded.name "
        "WHERE partner.region = excluded.region RETURNING id",
        *(name, region),
    )
    if partner_id is None:
        raise AlreadyExists(f"There is a partner {name!r} in another region already.")
    partner = pb.Partner(id=partner_id, name=name, region=region)
    await publish(connection, "partner", pb.DirectoryEntry(partner=partner), partner_id, now_us)
    return partner


async def create_site(connection: Connection, new: NewSite, now_us: int) -> pb.Site:
    try:
        site_id = await connection.fetchval(
            "INSERT INTO site (firm_id, slug, name, timezone) VALUES ($1, $2, $3, $4) "
            "ON CONFLICT ON CONSTRAINT site_firm_id_slug_key DO UPDATE SET slug = excluded.slug "
            "WHERE (site.name, site.timezone) = (excluded.name, excluded.timezone) RETURNING id",
            *(new.firm_id, new.slug, new.name, new.timezone),
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise NotFound(f"There is no firm {new.firm_id}.") from error
    if site_id is None:
        raise AlreadyExists(f"This firm has another site {new.slug!r} already.")
    site = pb.Site(id=site_id, firm_id=new.firm_id, slug=new.slug, name=new.name, timezone=new.timezone)
    await publish(connection, "site", pb.DirectoryEntry(site=site), site_id, now_us)
    return site


async def firm_of_site(connection: Connection, site_id: int) -> tuple[int, str]:
    """The firm's id and the path of the site. Raises NotFound."""
    row = await connection.fetchrow(
        "SELECT f.id, f.slug || '/' || s.slug AS path FROM site s JOIN firm f ON f.id = s.firm_id WHERE s.id = $1",
        site_id,
    )
    if row is None:
        raise NotFound(f"There is no site {site_id}.")
    return row["id"], row["path"]


async def create_machine(connection: Connection, new: NewMachine, firm_id: int, path: str, now_us: int) -> pb.Machine:
    machine_id = await connection.fetchval(
        "INSERT INTO machine (firm_id, site_id, path, name, kind) VALUES ($1, $2, $3, $4, $5) "
        "ON CONFLICT ON CONSTRAINT machine_path_key DO NOTHING RETURNING id",
        *(firm_id, new.site_id, path, new.name, new.kind),
    )
    if machine_id is None:
        return await _same_machine(connection, new, path)
    return await add_signals(connection, machine_id, new.signals, now_us)


async def _same_machine(connection: Connection, new: NewMachine, path: str) -> pb.Machine:
    """The machine of this path, if it is what `new` asks for: asking twice makes one. Raises AlreadyExists."""
    machine = await machine_by_id(connection, await connection.fetchval("SELECT id FROM machine WHERE path = $1", path))
    same = (machine.site_id, machine.name, machine.kind) == (new.site_id, new.name, new.kind)
    if not same or [signal.name for signal in machine.signals] != [signal.name for signal in new.signals]:
        raise AlreadyExists(f"There is another machine {path!r} already.")
    return machine


async def add_signals(connection: Connection, machine_id: int, signals: Sequence[NewSignal], now_us: int) -> pb.Machine:
    """Append signals and return the machine as it then is. Raises NotFound, AlreadyExists, Invalid."""
    row = await connection.fetchrow("SELECT firm_id FROM machine WHERE id = $1 FOR UPDATE", machine_id)
    if row is None:
        raise NotFound(f"There is no machine {machine_id}.")
    have = await connection.fetchval("SELECT count(*) FROM signal WHERE machine_id = $1", machine_id)
    try:
        await connection.executemany(
            "INSERT INTO signal (firm_id, machine_id, position, name, unit, range_min, range_max) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7)",
            [
                (row["firm_id"], machine_id, have + number, new.name, new.unit, new.range_min, new.range_max)
                for number, new in enumerate(signals)
            ],
        )
    except asyncpg.UniqueViolationError as error:
        raise AlreadyExists("The machine has a signal of one of these names already.") from error
    except asyncpg.CheckViolationError as error:
        raise Invalid("A signal's range_min must be below its range_max.") from error
    machine = await machine_by_id(connection, machine_id)
    await publish(connection, "machine", pb.DirectoryEntry(machine=machine), machine_id, now_us)
    return machine


async def machine_by_id(connection: Connection, machine_id: int) -> pb.Machine:
    """Raises NotFound."""
    row = await connection.fetchrow(
        "SELECT id, firm_id, site_id, path, name, kind FROM machine WHERE id = $1", machine_id
    )
    if row is None:
        raise NotFound(f"There is no machine {machine_id}.")
    machine = pb.Machine(**dict(row))
    for signal in await connection.fetch(
        "SELECT id, name, unit, range_min, range_max FROM signal WHERE machine_id = $1 ORDER BY position", machine_id
    ):
        machine.signals.add(**dict(signal))
    return machine


async def create_credential(
    connection: Connection, credential: pb.Credential, role: Role, now_us: int
) -> pb.Credential:
    """Store and publish a credential (its id is given here). Raises NotFound when its firm or partner does not exist."""
    try:
        credential.id = await connection.fetchval(
            "INSERT INTO credential (prefix, sha256, role, firm_id, partner_id, label, valid_from, valid_to) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8) RETURNING id",
            *(
                credential.prefix,
                credential.sha256,
                role.value,
                credential.firm_id or None,
                credential.partner_id or None,
            ),
            *(credential.label, from_us(credential.valid_from_us)),
            from_us(credential.valid_to_us) if credential.valid_to_us else None,
        )
    except asyncpg.ForeignKeyViolationError as error:
        raise NotFound("There is no such firm or partner.") from error
    await publish(connection, "credential", pb.DirectoryEntry(credential=credential), credential.id, now_us)
    return credential


async def revoke_credential(connection: Connection, credential_id: int) -> int:
    """Revoke and publish; return the firm it belonged to (0: none). Raises NotFound."""
    row = await connection.fetchrow(
        "UPDATE credential SET revoked = coalesce(revoked, now()) WHERE id = $1 RETURNING firm_id", credential_id
    )
    if row is None:
        raise NotFound(f"There is no credential {credential_id}.")
    await write(connection, topics.DIRECTORY, key=entity_key("credential", credential_id), value=None)
    return row["firm_id"] or 0


async def list_machine_ids(connection: Connection, firm_id: int, after: int, limit: int) -> list[int]:
    rows = await connection.fetch(
        "SELECT id FROM machine WHERE firm_id = $1 AND id > $2 ORDER BY id LIMIT $3", firm_id, after, limit
    )
    return [row["id"] for row in rows]
