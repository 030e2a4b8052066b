"""SQL of importing and exporting the table of machines."""

from collections.abc import Sequence

from services.common import topics
from services.common.database import Connection
from services.common.directory import entity_key
from services.common.errors import NotFound
from services.common.outbox import write_all
from services.ingest.domain import NewSignal
from services.ingest.registry.machinetable import KnownMachine, PlannedMachine
from services.ingest.registry.store import check_signal_quota, machines_by_id
from smdih.directory.v1 import directory_pb2 as pb


async def locked_slug(connection: Connection, firm_id: int) -> str:
    """The firm's slug; nobody else registers signals of the firm until the end of the transaction. Raises NotFound."""
    slug: str | None = await connection.fetchval("SELECT slug FROM firm WHERE id = $1 FOR NO KEY UPDATE", firm_id)
    if slug is None:
        raise NotFound(f"There is no firm {firm_id}.")
    return slug


async def sites(connection: Connection, firm_id: int) -> dict[str, int]:
    rows = await connection.fetch("SELECT slug, id FROM site WHERE firm_id = $1", firm_id)
    return {row["slug"]: row["id"] for row in rows}


async def known(connection: Connection, firm_id: int, paths: Sequence[str]) -> dict[str, KnownMachine]:
    """The registered ones among these machines, with their signals."""
    rows = await connection.fetch(
        "SELECT m.path, m.id, m.name, m.kind, s.name AS signal, s.unit, s.range_min, s.range_max "
        "FROM machine m LEFT JOIN signal s ON s.machine_id = m.id "
        "WHERE m.firm_id = $1 AND m.path = ANY($2::text[]) ORDER BY m.id, s.position",
        *(firm_id, list(paths)),
    )
    signals: dict[str, dict[str, NewSignal]] = {}
    for row in rows:
        of_machine = signals.setdefault(row["path"], {})
        if row["signal"] is not None:
            of_machine[row["signal"]] = NewSignal(row["signal"], row["unit"], row["range_min"], row["range_max"])
    return {row["path"]: KnownMachine(row["id"], row["name"], row["kind"], signals[row["path"]]) for row in rows}


async def apply(connection: Connection, firm_id: int, machines: Sequence[PlannedMachine], now_us: int) -> pb.Machine:
    """Do what is planned (something) and publish it; the last machine published. Raises Conflict (over the quota)."""
    await check_signal_quota(connection, firm_id, sum(len(machine.new_signals) for machine in machines))
    new = [machine for machine in machines if not machine.id]
    rows = await connection.fetch(
        "INSERT INTO machine (firm_id, site_id, path, name, kind) "
        "SELECT $1, * FROM unnest($2::bigint[], $3::text[], $4::text[], $5::text[]) RETURNING path, id",
        firm_id,
        [machine.site_id for machine in new],
        [machine.path for machine in new],
        [machine.name for machine in new],
        [machine.kind for machine in new],
    )
    made = {row["path"]: row["id"] for row in rows}
    ids = [machine.id or made[machine.path] for machine in machines]
    changed = [machine for machine in machines if machine.is_changed]
    await connection.execute(
        "UPDATE machine SET name = u.name, kind = u.kind FROM unnest($1::bigint[], $2::text[], $3::text[]) AS u (id, name, kind) "
        "WHERE machine.id = u.id",
        [machine.id for machine in changed],
        [machine.name for machine in changed],
        [machine.kind for machine in changed],
    )
    added = [
        (machine_id, number, signal)
        for machine_id, machine in zip(ids, machines, strict=True)
        for number, signal in enumerate(machine.new_signals)
    ]
    await connection.execute(
        "INSERT INTO signal (firm_id, machine_id, position, name, unit, range_min, range_max) "
        "SELECT $1, n.machine_id, n.number + coalesce(have.signals, 0), n.name, n.unit, n.range_min, n.range_max "
        "FROM unnest($2::bigint[], $3::int[], $4::text[], $5::text[], $6::float8[], $7::float8[]) "
        "  AS n (machine_id, number, name, unit, range_min, range_max) "
        "LEFT JOIN (SELECT machine_id, count(*)::int AS signals FROM signal WHERE machine_id = ANY($2::bigint[]) "
        "  GROUP BY machine_id) AS have USING (machine_id)",
        *(firm_id, [one[0] for one in added], [one[1] for one in added]),
        *_columns([one[2] for one in added]),
    )
    corrected = [(machine.id, signal) for machine in machines for signal in machine.changed_signals]
    await connection.execute(
        "UPDATE signal SET unit = u.unit, range_min = u.range_min, range_max = u.range_max "
        "FROM unnest($1::bigint[], $2::text[], $3::text[], $4::float8[], $5::float8[]) "
        "  AS u (machine_id, name, unit, range_min, range_max) "
        "WHERE signal.machine_id = u.machine_id AND signal.name = u.name",
        [one[0] for one in corrected],
        *_columns([one[1] for one in corrected]),
    )
    return await _publish(connection, ids, now_us)


def _columns(signals: Sequence[NewSignal]) -> tuple[list[str], list[str], list[float | None], list[float | None]]:
    return (
        [signal.name for signal in signals],
        [signal.unit for signal in signals],
        [signal.range_min for signal in signals],
        [signal.range_max for signal in signals],
    )


async def _publish(connection: Connection, ids: Sequence[int], now_us: int) -> pb.Machine:
    machines = await machines_by_id(connection, ids)
    events = [
        (
            entity_key("machine", machine_id),
            pb.DirectoryEntry(machine=machines[machine_id], changed_us=now_us).SerializeToString(),
        )
        for machine_id in ids
    ]
    await write_all(connection, topics.DIRECTORY, events)
    return machines[ids[-1]]


async def table(
    connection: Connection, firm_id: int, limit: int
) -> list[tuple[str, str, str, str, str, float | None, float | None]]:
    """All signals of a firm as lines of the table, machines in order of path."""
    rows = await connection.fetch(
        "SELECT m.path, m.name, m.kind, coalesce(s.name, '') AS signal, coalesce(s.unit, '') AS unit, s.range_min, s.range_max "
        "FROM machine m LEFT JOIN signal s ON s.machine_id = m.id WHERE m.firm_id = $1 ORDER BY m.path, s.position LIMIT $2",
        *(firm_id, limit),
    )
    return [tuple(row.values()) for row in rows]
