"""SQL of the registry: values in, directory messages out.

A change and its directory entry in one transaction; asking twice for the same thing makes it once.
"""

from collections.abc import Sequence

import asyncpg

from services.common import topics
from services.common.database import Connection
from services.common.directory import entity_key
from services.common.errors import AlreadyExists, Conflict, Invalid, NotFound
from services.common.outbox import write
from services.ingest.domain import QUOTA_SIGNALS_DEFAULT, NewFirm, NewMachine, NewSignal, NewSite
from smdih.directory.v1 import directory_pb2 as pb

# Every process of the hub keeps all sites in memory.
SITES_PER_FIRM_MAX = 1_000


async def publish(connection: Connection, kind: str, entry: pb.DirectoryEntry, entity_id: int, changed_us: int) -> None:
    entry.changed_us = changed_us
    await write(connection, topics.DIRECTORY, key=entity_key(kind, entity_id), value=entry.SerializeToString())


async def lock_firm(connection: Connection, firm_id: int) -> None:
    """Until the end of the transaction nobody else counts what the firm has, and so what is counted holds."""
    await connection.execute("SELECT FROM firm WHERE id = $1 FOR NO KEY UPDATE", firm_id)


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
    return await publish_firm(connection, firm_id, now_us)


async def publish_firm(connection: Connection, firm_id: int, now_us: int) -> pb.Firm:
    """Tell everybody what the firm is now; what is told last holds, so one change waits for the other. Raises NotFound."""
    row = await connection.fetchrow(FIRMS + "WHERE f.id = $1 FOR NO KEY UPDATE OF f", firm_id)
    if row is None:
        raise NotFound(f"There is no firm {firm_id}.")
    firm = firm_of(row)
    await publish(connection, "firm", pb.DirectoryEntry(firm=firm), firm_id, now_us)
    return firm


FIRMS = (
    "SELECT f.id, f.name, f.slug, f.sic, f.region, f.size, f.unknown_signals = 'propose' AS propose_unknown_signals, "
    "q.samples_per_s, q.signals, q.stored_days FROM firm f LEFT JOIN firm_quota q ON q.firm_id = f.id "
)


def firm_of(row: asyncpg.Record) -> pb.Firm:
    """A row of FIRMS."""
    fields = dict(row)
    quota = {name: fields.pop(name) for name in ("samples_per_s", "signals", "stored_days")}
    firm = pb.Firm(**fields)
    if any(quota.values()):
        firm.quota.MergeFrom(pb.Quota(**quota))
    return firm


async def check_signal_quota(connection: Connection, firm_id: int, adding: int) -> None:
    """Raise Conflict where so many more signals are too many; until the end of the transaction nobody else adds any."""
    most = await connection.fetchval(
        "SELECT coalesce((SELECT signals FROM firm_quota WHERE firm_id = f.id), $2) FROM firm f WHERE id = $1 FOR NO KEY UPDATE",
        *(firm_id, QUOTA_SIGNALS_DEFAULT),
    )
    have = await connection.fetchval("SELECT count(*) FROM signal WHERE firm_id = $1", firm_id)
    if adding and have + adding > most:
        raise Conflict(
            f"The firm has {have} signals and may have {most}; {adding} more are too many. Ask an operator for a higher quota.",
            reason="QUOTA_SIGNALS",
        )


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
    await lock_firm(connection, new.firm_id)
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
    if await connection.fetchval("SELECT count(*) FROM site WHERE firm_id = $1", new.firm_id) > SITES_PER_FIRM_MAX:
        raise Conflict(f"The firm has {SITES_PER_FIRM_MAX} sites; use those.", reason="TOO_MANY_SITES")
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
    row = await connection.fetchrow("SELECT firm_id FROM machine WHERE id = $1", machine_id)
    if row is None:
        raise NotFound(f"There is no machine {machine_id}.")
    # Locks the firm: nobody else appends signals until this is committed.
    await check_signal_quota(connection, row["firm_id"], len(signals))
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
    found = await machines_by_id(connection, [machine_id])
    if not found:
        raise NotFound(f"There is no machine {machine_id}.")
    return found[machine_id]


async def machines_by_id(connection: Connection, machine_ids: Sequence[int]) -> dict[int, pb.Machine]:
    """Those that there are, with their signals."""
    rows = await connection.fetch(
        "SELECT id, firm_id, site_id, path, name, kind FROM machine WHERE id = ANY($1::bigint[])", list(machine_ids)
    )
    machines = {row["id"]: pb.Machine(**dict(row)) for row in rows}
    for row in await connection.fetch(
        "SELECT machine_id, id, name, unit, range_min, range_max FROM signal WHERE machine_id = ANY($1::bigint[]) "
        "ORDER BY machine_id, position",
        list(machine_ids),
    ):
        fields = dict(row)
        machines[fields.pop("machine_id")].signals.add(**fields)
    return machines


async def list_machine_ids(connection: Connection, firm_id: int, after: int, limit: int) -> list[int]:
    rows = await connection.fetch(
        "SELECT id FROM machine WHERE firm_id = $1 AND id > $2 ORDER BY id LIMIT $3", firm_id, after, limit
    )
    return [row["id"] for row in rows]
