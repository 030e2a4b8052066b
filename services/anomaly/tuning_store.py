"""Tunings, what they follow from (ratings, rules), and from which record of each partition they hold, in the database."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import asyncpg

from services.anomaly.domain import Severity
from services.anomaly.store import Actor
from services.anomaly.tunings import Rule, RuleKind, Tuning, TuningKind
from services.common.clock import from_us, to_us
from services.common.database import CONNECT_TIMEOUT_S, Connection, Pool

_TUNING_ROWS = (
    "SELECT id, kind, firm_id, machine_id, position, threshold_offset, rule_id, rule, cause, alarm_id, reason, made, actor, "
    "credential_id FROM tuning "
)
_RULE_ROWS = "SELECT id, firm_id, machine_id, version, enabled, rule, made, changed FROM rule "
# Held while a tuning is added or a partition's horizon is made: tunings are then committed in the order of their ids.
_LOCK = "SELECT pg_advisory_xact_lock(hashtext('smdih-anomaly-tuning'))"
_COLUMNS = "t.id, t.kind, t.machine_id, t.position, t.threshold_offset, t.rule_id, t.rule, t.made"


@dataclass(frozen=True, kw_only=True)
class Horizon:
    """How far a partition may be scored with the tunings that are known, and those that were not known before."""

    next_offset: int
    tunings: Sequence[Tuning]
    known: int  # id of the newest tuning


@dataclass(frozen=True, kw_only=True)
class NewTuning:
    kind: TuningKind
    firm_id: int
    machine_id: int
    position: int | None
    cause: str
    reason: str
    threshold_offset: float | None = None
    rule_id: str = ""
    rule: Rule | None = None
    alarm_id: str = ""


@dataclass(frozen=True, kw_only=True)
class TuningEntry:
    """A tuning in the history of a signal."""

    kind: TuningKind
    cause: str
    threshold_offset: float | None
    alarm_id: str
    reason: str
    made_us: int
    actor: str
    credential_id: int


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How far people have moved the threshold of a series."""

    firm_id: int
    machine_id: int
    position: int
    offset: float
    useful: int
    not_useful: int


@dataclass(frozen=True, kw_only=True)
class StoredRule:
    """A rule as it is now."""

    rule: Rule
    enabled: bool
    made_us: int
    changed_us: int


class HorizonStore:
    """The worker's side."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def load(self, partition: int, *, position: int) -> Horizon:
        """The horizon of a partition, with every tuning that matters to one who goes on from `position`."""
        async with self._pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection, connection.transaction():
            await connection.execute(_LOCK)
            if await connection.fetchval(
                "INSERT INTO horizon (partition, next_offset) VALUES ($1, $2) ON CONFLICT DO NOTHING RETURNING true",
                partition,
                position,
            ):
                # A new partition: the last that people have said of each thing holds in it from the start.
                await connection.execute(
                    "INSERT INTO tuning_start (partition, tuning_id, from_offset) SELECT DISTINCT ON (kind, machine_id, position, "
                    "rule_id) $1::int, id, $2::bigint FROM tuning WHERE kind <> 'relearn' "
                    "ORDER BY kind, machine_id, position, rule_id, id DESC",
                    partition,
                    position,
                )
            next_offset = await connection.fetchval(
                "SELECT next_offset FROM horizon WHERE partition = $1 FOR UPDATE", partition
            )
            rows = await connection.fetch(
                # Before the position the last word counts, and what a sensor had before it was changed is forgotten already.
                f"WITH t AS (SELECT t.*, s.from_offset, row_number() OVER (PARTITION BY t.kind, t.machine_id, t.position, "  # noqa: S608
                "t.rule_id, s.from_offset >= $2 ORDER BY t.id DESC) AS newest "
                "FROM tuning t JOIN tuning_start s ON s.tuning_id = t.id AND s.partition = $1) "
                f"SELECT {_COLUMNS}, t.from_offset FROM t WHERE from_offset >= $2 OR (newest = 1 AND kind <> 'relearn') "
                "ORDER BY t.from_offset, t.id",
                partition,
                position,
            )
            known = await connection.fetchval(
                "SELECT coalesce(max(tuning_id), 0) FROM tuning_start WHERE partition = $1", partition
            )
        return Horizon(next_offset=next_offset, tunings=[_tuning(row) for row in rows], known=known)

    async def move(self, wanted: Mapping[int, int], *, known: Mapping[int, int]) -> Mapping[int, Horizon]:
        """Move the horizons of partitions to `wanted` or leave them further on; each with the tunings after `known`. Raises one of
        AWAY."""
        numbers = sorted(wanted)
        async with self._pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection:
            rows = await connection.fetch(
                "SELECT * FROM move_horizons($1, $2, $3)",
                numbers,
                [wanted[number] for number in numbers],
                [known[number] for number in numbers],
            )
            new = [row for row in rows if row["tuning_id"] is not None]
            found = (
                await connection.fetch(
                    f"SELECT {_COLUMNS} FROM tuning t WHERE id = ANY($1::bigint[])",  # noqa: S608
                    list({row["tuning_id"] for row in new}),
                )
                if new
                else ()
            )
        by_id = {row["id"]: row for row in found}
        moved: dict[int, Horizon] = {}
        for number in numbers:
            mine = sorted((row["tuning_id"], row["from_offset"]) for row in new if row["number"] == number)
            moved[number] = Horizon(
                next_offset=next(row["horizon"] for row in rows if row["number"] == number),
                tunings=[_tuning(by_id[id_], from_offset) for id_, from_offset in mine],
                known=max((id_ for id_, _ in mine), default=known[number]),
            )
        return moved


class TuningStore:
    """What people change, each with its row in the log that the workers follow, in the caller's transaction."""

    async def lock(self, connection: Connection) -> None:
        """One change at a time, until the transaction ends."""
        await connection.execute(_LOCK)

    async def made(self, connection: Connection, firm_id: int, *, since_us: int, limit: int) -> int:
        """How many a firm has made since then; counts to `limit`."""
        count: int = await connection.fetchval(
            "SELECT count(*) FROM (SELECT FROM tuning WHERE firm_id = $1 AND made > $2 LIMIT $3) AS counted",
            firm_id,
            from_us(since_us),
            limit,
        )
        return count

    async def add(self, connection: Connection, new: NewTuning, *, now_us: int, actor: Actor) -> int:
        """Add a tuning; it holds from the horizon of each partition on. Returns its id. `lock` comes first."""
        id_: int = await connection.fetchval(
            "INSERT INTO tuning (kind, firm_id, machine_id, position, threshold_offset, rule_id, rule, cause, alarm_id, reason, "
            "made, actor, credential_id) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13) RETURNING id",
            new.kind.value,
            new.firm_id,
            new.machine_id,
            new.position,
            new.threshold_offset,
            new.rule_id,
            None if new.rule is None else _rule_json(new.rule),
            new.cause,
            new.alarm_id,
            new.reason,
            from_us(now_us),
            actor.name,
            actor.credential_id,
        )
        await connection.execute(
            "INSERT INTO tuning_start (partition, tuning_id, from_offset) SELECT partition, $1, next_offset "
            "FROM (SELECT partition, next_offset FROM horizon ORDER BY partition FOR UPDATE) AS h",
            id_,
        )
        return id_

    async def rate(
        self, connection: Connection, *, alarm_id: str, machine_id: int, position: int, useful: bool | None
    ) -> bool:
        """Set or (None) withdraw what is said of an alarm; False when it was so before."""
        if useful is None:
            return bool(await connection.fetchval("DELETE FROM rating WHERE alarm_id = $1 RETURNING true", alarm_id))
        return bool(
            await connection.fetchval(
                "INSERT INTO rating (alarm_id, machine_id, position, useful) VALUES ($1, $2, $3, $4) "
                "ON CONFLICT (alarm_id) DO UPDATE SET useful = excluded.useful, counts = true "
                "WHERE rating.useful <> excluded.useful RETURNING true",
                alarm_id,
                machine_id,
                position,
                useful,
            )
        )

    async def rating(self, connection: Connection, alarm_id: str) -> bool | None:
        rated: bool | None = await connection.fetchval("SELECT useful FROM rating WHERE alarm_id = $1", alarm_id)
        return rated

    async def ratings(self, connection: Connection, machine_id: int, position: int) -> tuple[int, int]:
        """How many alarms of a series count as useful and as not."""
        row = await connection.fetchrow(
            "SELECT count(*) FILTER (WHERE useful) AS useful, count(*) FILTER (WHERE NOT useful) AS not_useful FROM rating "
            "WHERE machine_id = $1 AND position = $2 AND counts",
            machine_id,
            position,
        )
        assert row is not None
        return row["useful"], row["not_useful"]

    async def discount(self, connection: Connection, machine_id: int, position: int) -> None:
        """The ratings so far move the threshold no more."""
        await connection.execute(
            "UPDATE rating SET counts = false WHERE machine_id = $1 AND position = $2 AND counts", machine_id, position
        )

    async def offset(self, connection: Connection, machine_id: int, position: int) -> float:
        found: float | None = await connection.fetchval(
            "SELECT threshold_offset FROM tuning WHERE kind = 'threshold' AND machine_id = $1 AND position = $2 "
            "ORDER BY id DESC LIMIT 1",
            machine_id,
            position,
        )
        return found or 0.0

    async def thresholds(
        self, connection: Connection, *, firm_id: int | None, machine_id: int | None, limit: int
    ) -> Sequence[Threshold]:
        """Those that are not where the detector has them by itself."""
        rows = await connection.fetch(
            "SELECT t.firm_id, t.machine_id, t.position, t.threshold_offset, r.useful, r.not_useful FROM ("
            "SELECT DISTINCT ON (machine_id, position) * FROM tuning WHERE kind = 'threshold' "
            "AND ($1::bigint IS NULL OR firm_id = $1) AND ($2::bigint IS NULL OR machine_id = $2) "
            "ORDER BY machine_id, position, id DESC) AS t CROSS JOIN LATERAL (SELECT count(*) FILTER (WHERE useful) AS useful, "
            "count(*) FILTER (WHERE NOT useful) AS not_useful FROM rating "
            "WHERE machine_id = t.machine_id AND position = t.position AND counts) AS r "
            "WHERE t.threshold_offset <> 0 ORDER BY t.machine_id, t.position LIMIT $3",
            firm_id,
            machine_id,
            limit,
        )
        return [
            Threshold(
                firm_id=row["firm_id"],
                machine_id=row["machine_id"],
                position=row["position"],
                offset=row["threshold_offset"],
                useful=row["useful"],
                not_useful=row["not_useful"],
            )
            for row in rows
        ]

    async def history(
        self, connection: Connection, *, machine_id: int, position: int | None, rule_id: str, limit: int
    ) -> Sequence[TuningEntry]:
        """Of a series (with what was said of its whole machine) or of a rule, newest first."""
        rows = await connection.fetch(
            _TUNING_ROWS + "WHERE machine_id = $1 AND rule_id = $3 AND ($3 <> '' OR position = $2 OR position IS NULL) "
            "ORDER BY id DESC LIMIT $4",
            machine_id,
            position,
            rule_id,
            limit,
        )
        return [
            TuningEntry(
                kind=TuningKind(row["kind"]),
                cause=row["cause"],
                threshold_offset=row["threshold_offset"],
                alarm_id=row["alarm_id"],
                reason=row["reason"],
                made_us=to_us(row["made"]),
                actor=row["actor"],
                credential_id=row["credential_id"],
            )
            for row in rows
        ]

    async def save_rule(self, connection: Connection, rule: Rule, *, enabled: bool, now_us: int) -> StoredRule:
        row = await connection.fetchrow(
            "INSERT INTO rule (id, firm_id, machine_id, version, enabled, rule, made, changed) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $7) ON CONFLICT (id) DO UPDATE SET machine_id = excluded.machine_id, "
            "version = excluded.version, enabled = excluded.enabled, rule = excluded.rule, changed = excluded.changed "
            "RETURNING id, firm_id, machine_id, version, enabled, rule, made, changed",
            rule.id,
            rule.firm_id,
            rule.machine_id,
            rule.version,
            enabled,
            _rule_json(rule),
            from_us(now_us),
        )
        assert row is not None
        return _stored_rule(row)

    async def rule(self, connection: Connection, rule_id: str) -> StoredRule | None:
        row = await connection.fetchrow(_RULE_ROWS + "WHERE id = $1 FOR UPDATE", rule_id)
        return None if row is None else _stored_rule(row)

    async def rules(
        self, connection: Connection, *, firm_id: int | None, machine_id: int | None, limit: int
    ) -> Sequence[StoredRule]:
        rows = await connection.fetch(
            _RULE_ROWS + "WHERE ($1::bigint IS NULL OR firm_id = $1) AND ($2::bigint IS NULL OR machine_id = $2) "
            "ORDER BY made DESC, id DESC LIMIT $3",
            firm_id,
            machine_id,
            limit,
        )
        return [_stored_rule(row) for row in rows]

    async def rule_count(self, connection: Connection, firm_id: int) -> int:
        count: int = await connection.fetchval("SELECT count(*) FROM rule WHERE firm_id = $1 AND enabled", firm_id)
        return count

    async def rule_count_of(self, connection: Connection, rule: Rule) -> int:
        """Rules that look at the same signal."""
        count: int = await connection.fetchval(
            "SELECT count(*) FROM rule WHERE firm_id = $1 AND machine_id = $2 AND (rule ->> 'position')::int = $3 AND enabled",
            rule.firm_id,
            rule.machine_id,
            rule.position,
        )
        return count


def _tuning(row: asyncpg.Record, from_offset: int | None = None) -> Tuning:
    return Tuning(
        id=row["id"],
        kind=TuningKind(row["kind"]),
        from_offset=row["from_offset"] if from_offset is None else from_offset,
        machine_id=row["machine_id"],
        made_us=to_us(row["made"]),
        position=row["position"],
        threshold_offset=row["threshold_offset"] or 0.0,
        rule_id=row["rule_id"],
        rule=None if row["rule"] is None else _rule(row["rule"]),
    )


def _rule_json(rule: Rule) -> str:
    return json.dumps(asdict(rule))


def _rule(text: str) -> Rule:
    fields = json.loads(text)
    return Rule(**fields | {"kind": RuleKind(fields["kind"]), "severity": Severity(fields["severity"])})


def _stored_rule(row: asyncpg.Record) -> StoredRule:
    return StoredRule(
        rule=_rule(row["rule"]), enabled=row["enabled"], made_us=to_us(row["made"]), changed_us=to_us(row["changed"])
    )
