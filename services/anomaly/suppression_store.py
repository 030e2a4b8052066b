"""What keeps alarms off the operator's list, in the database: shelved and out of service sources, and maintenance windows."""

from collections.abc import Sequence
from dataclasses import replace

import asyncpg

from services.anomaly.domain import BEGINS, ENDS, Alarm, MaintenanceWindow, Source, Suppression
from services.anomaly.store import ALARM_COLUMNS, WANTED_SUPPRESSION, Actor, AlarmStore, alarm_of
from services.common.clock import from_us, to_us
from services.common.database import Connection

_MAINTENANCE_WINDOW_ROWS = (
    "SELECT id, firm_id, machine_id, starts, ends, reason, actor, credential_id, made, ended, ended_actor, "
    "ended_credential_id, ended_reason FROM maintenance_window "
)
_KINDS = {Suppression.SHELVED: "shelved", Suppression.OUT_OF_SERVICE: "out_of_service"}
_REASONS = {kind: reason for reason, kind in _KINDS.items()}


class SuppressionStore:
    """The alarms follow what stands here: `settle` brings those whose condition lasts in line with it, each with its entry in
    its history, whatever was missed meanwhile."""

    def __init__(self, alarms: AlarmStore) -> None:
        self._alarms = alarms

    async def begin(self, connection: Connection, source: Source, alarm: Alarm) -> None:
        """Take the alarm's source off the list; instead of what stood there for the same kind of reason."""
        await connection.execute(
            "INSERT INTO suppression (machine_id, position, kind, firm_id, alarm_id, one_shot, began, ends, reason, actor, "
            "credential_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) "
            "ON CONFLICT (machine_id, position, kind) DO UPDATE SET alarm_id = excluded.alarm_id, one_shot = excluded.one_shot, "
            "began = excluded.began, ends = excluded.ends, reason = excluded.reason, actor = excluded.actor, "
            "credential_id = excluded.credential_id",
            alarm.machine_id,
            alarm.position,
            _KINDS[source.reason_kind],
            alarm.firm_id,
            alarm.id,
            source.one_shot,
            from_us(source.began_us),
            None if source.ends_us is None else from_us(source.ends_us),
            source.reason,
            source.actor,
            source.credential_id,
        )

    async def end(self, connection: Connection, alarm: Alarm, kind: Suppression) -> bool:
        """Put the alarm's source back on the list; False when it was there."""
        return bool(
            await connection.fetchval(
                "DELETE FROM suppression WHERE machine_id = $1 AND position = $2 AND kind = $3 RETURNING true",
                alarm.machine_id,
                alarm.position,
                _KINDS[kind],
            )
        )

    async def of_alarm(self, connection: Connection, alarm: Alarm, kind: Suppression) -> Source | None:
        row = await connection.fetchrow(
            "SELECT s.machine_id, s.position, s.kind, s.firm_id, s.alarm_id, s.one_shot, s.began, s.ends, s.reason, "
            "s.actor, s.credential_id, a.machine_path, a.signal_name FROM suppression s JOIN alarm a ON a.id = s.alarm_id "
            "WHERE s.machine_id = $1 AND s.position = $2 AND s.kind = $3",
            alarm.machine_id,
            alarm.position,
            _KINDS[kind],
        )
        return None if row is None else _source(row)

    async def list(self, connection: Connection, *, firm_id: int | None, limit: int) -> Sequence[Source]:
        rows = await connection.fetch(
            "SELECT s.machine_id, s.position, s.kind, s.firm_id, s.alarm_id, s.one_shot, s.began, s.ends, s.reason, "
            "s.actor, s.credential_id, a.machine_path, a.signal_name FROM suppression s JOIN alarm a ON a.id = s.alarm_id "
            "WHERE $1::bigint IS NULL OR s.firm_id = $1 ORDER BY s.began, s.machine_id, s.position LIMIT $2",
            firm_id,
            limit,
        )
        return [_source(row) for row in rows]

    async def expired(self, connection: Connection, *, now_us: int, limit: int) -> Sequence[str]:
        """Remove what has run out; returns the alarms on which it was done."""
        rows = await connection.fetch(
            "DELETE FROM suppression WHERE (machine_id, position, kind) IN (SELECT machine_id, position, kind "
            "FROM suppression WHERE ends <= $1 ORDER BY ends LIMIT $2 FOR UPDATE SKIP LOCKED) RETURNING alarm_id",
            from_us(now_us),
            limit,
        )
        return [row["alarm_id"] for row in rows]

    async def settle(
        self, connection: Connection, *, now_us: int, actor: Actor, comment: str, machine_id: int | None, limit: int
    ) -> int:
        """Bring active alarms (of one machine, or all) in line; returns how many changed. `actor` and `comment` say who ended a
        reason; who began one stands with it."""
        rows = await connection.fetch(
            f"SELECT {ALARM_COLUMNS}, w.wanted FROM alarm a CROSS JOIN LATERAL (SELECT {WANTED_SUPPRESSION} AS wanted) AS w "  # noqa: S608
            "WHERE a.ended IS NULL AND ($2::bigint IS NULL OR a.machine_id = $2) AND a.suppression <> w.wanted "
            # Those that cannot differ are left out first: the loop asks this every second.
            "AND (a.suppression <> 0 OR a.machine_id IN (SELECT machine_id FROM suppression UNION ALL "
            "SELECT machine_id FROM maintenance_window WHERE starts <= $1 AND ends > $1 AND ended IS NULL)) "
            "ORDER BY a.id LIMIT $3 FOR UPDATE OF a",
            from_us(now_us),
            machine_id,
            limit,
        )
        for row in rows:
            alarm, wanted = alarm_of(row), Suppression(row["wanted"])
            for kind in BEGINS:
                begins, ends = kind in wanted, kind in alarm.suppression
                if begins == ends:
                    continue
                change = BEGINS[kind] if begins else ENDS[kind]
                by, why = await self._origin(connection, alarm, kind, now_us=now_us) if begins else (actor, comment)
                alarm = alarm.after(change)
                await self._alarms.change(connection, change, [alarm], now_us=now_us, actor=by, comment=why)
        return len(rows)

    async def _origin(
        self, connection: Connection, alarm: Alarm, kind: Suppression, *, now_us: int
    ) -> tuple[Actor, str]:
        if kind is Suppression.BY_DESIGN:
            row = await connection.fetchrow(
                "SELECT actor, credential_id, reason FROM maintenance_window "
                "WHERE machine_id = $1 AND starts <= $2 AND ends > $2 AND ended IS NULL ORDER BY starts, id LIMIT 1",
                alarm.machine_id,
                from_us(now_us),
            )
        else:
            row = await connection.fetchrow(
                "SELECT actor, credential_id, reason FROM suppression WHERE machine_id = $1 AND position = $2 AND kind = $3",
                alarm.machine_id,
                alarm.position,
                _KINDS[kind],
            )
        if row is None:  # ended between the two questions
            return Actor(), ""
        return Actor(name=row["actor"], credential_id=row["credential_id"]), row["reason"]

    async def create_window(
        self, connection: Connection, window: MaintenanceWindow, *, now_us: int
    ) -> MaintenanceWindow:
        """Store it; returns the one that stands there already when it is the same."""
        row = await connection.fetchrow(
            "INSERT INTO maintenance_window (id, firm_id, machine_id, starts, ends, reason, actor, credential_id, made) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) "
            "ON CONFLICT (machine_id, starts, ends) WHERE ended IS NULL DO UPDATE SET id = maintenance_window.id "
            "RETURNING id, firm_id, machine_id, starts, ends, reason, actor, credential_id, made, ended, ended_actor, "
            "ended_credential_id, ended_reason",
            window.id,
            window.firm_id,
            window.machine_id,
            from_us(window.starts_us),
            from_us(window.ends_us),
            window.reason,
            window.actor,
            window.credential_id,
            from_us(now_us),
        )
        assert row is not None
        return _window(row)

    async def window_count(self, connection: Connection, machine_id: int, *, now_us: int) -> int:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM maintenance_window WHERE machine_id = $1 AND ends > $2 AND ended IS NULL",
            machine_id,
            from_us(now_us),
        )
        return count

    async def window(self, connection: Connection, window_id: str) -> MaintenanceWindow | None:
        row = await connection.fetchrow(_MAINTENANCE_WINDOW_ROWS + "WHERE id = $1 FOR UPDATE", window_id)
        return None if row is None else _window(row)

    async def windows(
        self, connection: Connection, *, firm_id: int | None, machine_id: int | None, now_us: int, limit: int
    ) -> Sequence[MaintenanceWindow]:
        rows = await connection.fetch(
            _MAINTENANCE_WINDOW_ROWS + "WHERE ends > $1 AND ended IS NULL AND ($2::bigint IS NULL OR firm_id = $2) "
            "AND ($3::bigint IS NULL OR machine_id = $3) ORDER BY starts, id LIMIT $4",
            from_us(now_us),
            firm_id,
            machine_id,
            limit,
        )
        return [_window(row) for row in rows]

    async def end_window(
        self, connection: Connection, window: MaintenanceWindow, *, now_us: int, actor: Actor, reason: str
    ) -> MaintenanceWindow:
        await connection.execute(
            "UPDATE maintenance_window SET ended = $2, ended_actor = $3, ended_credential_id = $4, ended_reason = $5 "
            "WHERE id = $1",
            window.id,
            from_us(now_us),
            actor.name,
            actor.credential_id,
            reason,
        )
        return replace(
            window,
            ended_us=now_us,
            ended_actor=actor.name,
            ended_credential_id=actor.credential_id,
            ended_reason=reason,
        )


def _source(row: asyncpg.Record) -> Source:
    return Source(
        alarm_id=row["alarm_id"],
        firm_id=row["firm_id"],
        machine_id=row["machine_id"],
        machine_path=row["machine_path"],
        signal_name=row["signal_name"],
        reason_kind=_REASONS[row["kind"]],
        one_shot=row["one_shot"],
        began_us=to_us(row["began"]),
        ends_us=None if row["ends"] is None else to_us(row["ends"]),
        reason=row["reason"],
        actor=row["actor"],
        credential_id=row["credential_id"],
    )


def _window(row: asyncpg.Record) -> MaintenanceWindow:
    return MaintenanceWindow(
        id=row["id"],
        firm_id=row["firm_id"],
        machine_id=row["machine_id"],
        starts_us=to_us(row["starts"]),
        ends_us=to_us(row["ends"]),
        reason=row["reason"],
        actor=row["actor"],
        credential_id=row["credential_id"],
        ended_us=None if row["ended"] is None else to_us(row["ended"]),
        ended_actor=row["ended_actor"],
        ended_credential_id=row["ended_credential_id"],
        ended_reason=row["ended_reason"],
    )
