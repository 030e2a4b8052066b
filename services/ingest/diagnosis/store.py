"""SQL of "why is there no data?": everything that is known of a machine, in one statement."""

from datetime import datetime
from typing import Any

import orjson

from services.common.clock import to_us
from services.common.database import Connection
from services.ingest.diagnosis.causes import Facts, Key, Refusal, SignalSeen
from services.ingest.domain import CHANNEL_GROUP

REFUSALS_LOOKED_AT = 200
KEYS_LOOKED_AT = 200

# Refusals: of the machine itself, of its firm where no machine was known, and of unknown keys that begin like one of the firm's.
_FACTS = """
WITH m AS (SELECT id, firm_id FROM machine WHERE id = $1),
keys AS (
    SELECT c.id, c.prefix, c.label, c.valid_from, c.valid_to, c.revoked, s.used
    FROM credential c JOIN m ON m.firm_id = c.firm_id LEFT JOIN credential_seen s ON s.credential_id = c.id
    WHERE c.role IN ('device', 'firm') ORDER BY s.used DESC NULLS LAST, c.id DESC LIMIT $5
),
refusals AS (
    SELECT r.* FROM m JOIN refusal r ON r.firm_id = m.firm_id AND r.machine_id IN (0, m.id)
    UNION ALL
    SELECT r.* FROM refusal r WHERE r.firm_id = 0 AND r.machine_id = 0 AND r.credential_id = 0
        AND r.subject IN (SELECT prefix FROM keys)
    ORDER BY last DESC LIMIT $6
),
cells AS MATERIALIZED (
    SELECT g.first_position + l.i - 1 AS position, l.ts, l.v
    FROM unnest($2::int[], $7::int[]) AS g (first_position, width), latest_values($1, g.first_position, g.width) AS l
)
SELECT seen.received, seen.newest, seen.credential_id, seen.source,
    (SELECT max(f.ts) FROM unnest($2::int[]) AS g (first_position), LATERAL (
        SELECT ts FROM frame WHERE machine_id = $1 AND frame.first_position = g.first_position ORDER BY ts DESC LIMIT 1
    ) AS f) AS stored,
    (SELECT next_offset FROM position WHERE topic = $3 AND partition = $4) AS next_offset,
    (SELECT json_agg(json_build_array(position, extract(epoch FROM ts) * 1000000, v)) FROM cells) AS cells,
    (SELECT json_agg(to_json(k)) FROM keys k) AS keys,
    (SELECT json_agg(to_json(r)) FROM refusals r) AS refusals
FROM m LEFT JOIN machine_seen seen ON seen.machine_id = m.id
"""


async def facts(connection: Connection, machine: Any, *, topic: str, partition: int, now_us: int) -> tuple[Facts, int]:
    """What is known of a machine (a directory entry), and the historian's position in its partition."""
    groups = list(range(0, len(machine.signals), CHANNEL_GROUP))
    widths = [min(CHANNEL_GROUP, len(machine.signals) - first) for first in groups]
    limits = (KEYS_LOOKED_AT, REFUSALS_LOOKED_AT)
    row = await connection.fetchrow(_FACTS, machine.id, groups, topic, partition, *limits, widths)
    if row is None:
        return Facts(machine.id, machine.path, now_us), 0
    cells = {position: (int(ts_us), value) for position, ts_us, value in orjson.loads(row["cells"] or "[]")}
    signals = [
        SignalSeen(signal.id, signal.name, signal.unit, *cells.get(position, (0, None)))
        for position, signal in enumerate(machine.signals)
    ]
    found = Facts(
        machine_id=machine.id,
        path=machine.path,
        now_us=now_us,
        received_us=_us(row["received"]),
        newest_us=_us(row["newest"]),
        credential_id=row["credential_id"] or 0,
        source=row["source"] or "",
        stored_us=_us(row["stored"]),
        signals=signals,
        refusals=[_refusal(one) for one in orjson.loads(row["refusals"] or "[]")],
        keys=[_key(one) for one in orjson.loads(row["keys"] or "[]")],
    )
    return found, row["next_offset"] or 0


async def refusals_page(connection: Connection, firm_id: int, skip: int, limit: int) -> list[tuple[int, Refusal]]:
    """Refusals with their firm, newest first. firm_id 0: all firms, and keys of nobody."""
    rows = await connection.fetch(
        "SELECT to_json(r) AS one FROM refusal r WHERE $1::bigint = 0 OR firm_id = $1 "
        "ORDER BY last DESC, firm_id, machine_id, credential_id, subject, reason OFFSET $2 LIMIT $3",
        *(firm_id, skip, limit),
    )
    found = [orjson.loads(row["one"]) for row in rows]
    return [(one["firm_id"], _refusal(one)) for one in found]


def _refusal(one: dict[str, Any]) -> Refusal:
    return Refusal(
        machine_id=one["machine_id"],
        credential_id=one["credential_id"],
        subject=one["subject"],
        reason=one["reason"],
        source=one["source"],
        door=one["door"],
        times=one["times"],
        samples=one["samples"],
        first_us=_us_of_text(one["first"]),
        last_us=_us_of_text(one["last"]),
        example=one["example"],
        clock_off_us=one["clock_off_us"],
    )


def _key(one: dict[str, Any]) -> Key:
    return Key(
        id=one["id"],
        prefix=one["prefix"],
        label=one["label"],
        valid_from_us=_us_of_text(one["valid_from"]),
        valid_to_us=_us_of_text(one["valid_to"]),
        revoked_us=_us_of_text(one["revoked"]),
        used_us=_us_of_text(one["used"]),
    )


def _us(time: datetime | None) -> int:
    return 0 if time is None else to_us(time)


def _us_of_text(text: str | None) -> int:
    return 0 if text is None else to_us(datetime.fromisoformat(text))
