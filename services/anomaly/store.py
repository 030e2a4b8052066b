"""Alarms, their history, and what the detector knows, in the database."""

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from enum import StrEnum

import asyncpg
from aiokafka import TopicPartition

from services.anomaly.domain import (
    EPISODE_GAP_US,
    Alarm,
    AlarmEvent,
    Change,
    HistoryEntry,
    Return,
    Severity,
    Share,
    Suppression,
    event_id,
)
from services.anomaly.messages import event_message
from services.common import outbox, topics
from services.common.clock import from_us, to_us
from services.common.database import CONNECT_TIMEOUT_S, Connection, Pool
from services.common.kafka import Fenced, FirstOffsets, Position, load_positions
from services.common.logs import correlated

ALARM_COLUMNS = (
    "a.id, a.firm_id, a.machine_id, a.position, a.signal_id, a.machine_path, a.machine_kind, a.signal_name, a.unit, "
    "a.started, a.ended, a.severity, a.component, a.explanation, a.value, a.score, a.shares, a.correlation_id, "
    "a.episode_id, a.acknowledged, a.cleared, a.raised, a.suppression, a.assignee, a.rule_id, a.rule_version, a.figures"
)
ALARM_ROWS = f"SELECT {ALARM_COLUMNS} FROM alarm a "  # noqa: S608  # fixed texts

DETECTOR = "detector"
STATES_PAGE = 200
# Changes that happen to an alarm at most once.
_ONCE = frozenset({Change.RAISED, Change.RETURNED, Change.ACKNOWLEDGED, Change.CLEARED})
# The suppression that alarm `a` should have at time $1.
WANTED_SUPPRESSION = (
    "(CASE WHEN EXISTS (SELECT FROM suppression WHERE machine_id = a.machine_id AND position = a.position "
    "AND kind = 'shelved' AND ends > $1) THEN 1 ELSE 0 END "
    "| CASE WHEN EXISTS (SELECT FROM maintenance_window WHERE machine_id = a.machine_id AND starts <= $1 AND ends > $1 "
    "AND ended IS NULL) THEN 2 ELSE 0 END "
    "| CASE WHEN EXISTS (SELECT FROM suppression WHERE machine_id = a.machine_id AND position = a.position "
    "AND kind = 'out_of_service') THEN 4 ELSE 0 END)"
)


@dataclass(frozen=True, kw_only=True)
class Actor:
    """Who changes an alarm."""

    name: str = DETECTOR
    credential_id: int = 0


class Suppressed(StrEnum):
    """Which alarms a list has: the operator's list hides those that are off it."""

    HIDDEN = "hidden"
    INCLUDED = "included"
    ONLY = "only"


@dataclass(frozen=True, kw_only=True)
class AlarmFilter:
    """None or False: not asked for."""

    firm_id: int | None = None
    machine_id: int | None = None
    active: bool = False
    unacknowledged: bool = False
    uncleared: bool = False
    since_us: int | None = None
    suppressed: Suppressed = Suppressed.HIDDEN


class AlarmStore:
    """Every change writes the alarm, its history and the event that leaves with it in the caller's transaction.

    Repeating a change does nothing, so the detector may see the same samples again.
    """

    async def raise_alarm(self, connection: Connection, alarm: Alarm, *, now_us: int) -> Alarm | None:
        """Store a new alarm as part of its machine's episode; None when it is known already.

        Several signals together raise no alarm of their own while the one that contributes most has one: it would say the same
        twice. All conditions are in times of samples, so a replay decides alike whatever has happened since.
        """
        # In one question: in a flood of alarms the way to the database is what takes long. Suppression is a person's doing, so
        # it depends on when that was done; the set of alarms does not.
        row = await connection.fetchrow(
            "SELECT EXISTS (SELECT FROM alarm WHERE machine_id = $2 AND position = $6 AND rule_id = '' AND started <= $4 "  # noqa: S608
            "AND (ended IS NULL OR ended >= $4)) AS lead_has_one, "
            "(SELECT episode_id FROM alarm WHERE machine_id = $2 AND started <= $4 AND (ended IS NULL OR ended >= $5) "
            "ORDER BY started DESC, id DESC LIMIT 1) AS episode_id, "
            f"{WANTED_SUPPRESSION} | CASE WHEN EXISTS (SELECT FROM maintenance_window WHERE machine_id = $2 AND starts <= $4 "
            "AND ends > $4 AND ended IS NULL) THEN 2 ELSE 0 END AS suppression "
            "FROM (SELECT $2::bigint AS machine_id, $3::int AS position) AS a",
            from_us(now_us),
            alarm.machine_id,
            alarm.position,
            from_us(alarm.started_us),
            from_us(alarm.started_us - EPISODE_GAP_US),
            alarm.lead_position,
        )
        assert row is not None
        if row["lead_has_one"]:
            return None
        alarm = replace(alarm, episode_id=row["episode_id"] or alarm.id, suppression=Suppression(row["suppression"]))
        inserted = await connection.fetchval(
            "INSERT INTO alarm (id, firm_id, machine_id, position, signal_id, machine_path, machine_kind, signal_name, unit, "
            "started, severity, component, explanation, value, score, shares, correlation_id, episode_id, raised, suppression, "
            "rule_id, rule_version, figures) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23) "
            "ON CONFLICT (id) DO NOTHING RETURNING 1",
            alarm.id,
            alarm.firm_id,
            alarm.machine_id,
            alarm.position,
            alarm.signal_id,
            alarm.machine_path,
            alarm.machine_kind,
            alarm.signal_name,
            alarm.unit,
            from_us(alarm.started_us),
            int(alarm.severity),
            alarm.component,
            alarm.explanation,
            alarm.value,
            alarm.score,
            json.dumps([[share.signal_id, share.signal_name, share.share] for share in alarm.shares]),
            alarm.correlation_id,
            alarm.episode_id,
            from_us(now_us),
            int(alarm.suppression),
            alarm.rule_id,
            alarm.rule_version,
            json.dumps(dict(alarm.figures)),
        )
        if inserted is None:
            return None
        await self.record(connection, Change.RAISED, [alarm], now_us=now_us, actor=Actor())
        return alarm

    async def end_alarm(self, connection: Connection, returned: Return, *, now_us: int) -> Alarm | None:
        """Store that the condition has returned to normal; None when that is known already."""
        row = await connection.fetchrow(ALARM_ROWS + "WHERE id = $1 AND ended IS NULL FOR UPDATE", returned.alarm_id)
        if row is None:
            return None
        alarm = alarm_of(row).returned(returned.ended_us)
        await connection.execute(
            "UPDATE alarm SET ended = $2, severity = $3 WHERE id = $1",
            alarm.id,
            from_us(returned.ended_us),
            int(alarm.severity),
        )
        await self.record(connection, Change.RETURNED, [alarm], now_us=now_us, actor=Actor())
        if await connection.fetchval(
            "DELETE FROM suppression WHERE machine_id = $1 AND position = $2 AND kind = 'shelved' AND one_shot RETURNING true",
            alarm.machine_id,
            alarm.position,
        ):
            await self.record(
                connection,
                Change.UNSHELVED,
                [alarm],
                now_us=now_us,
                actor=Actor(),
                comment="Shelved until the condition returned to normal.",
            )
        return alarm

    async def last_comment(self, connection: Connection, alarm_id: str, credential_id: int) -> str | None:
        """The last remark that was made with the key."""
        comment: str | None = await connection.fetchval(
            "SELECT comment FROM alarm_change WHERE alarm_id = $1 AND change = $2 AND credential_id = $3 "
            "ORDER BY id DESC LIMIT 1",
            alarm_id,
            Change.COMMENTED.value,
            credential_id,
        )
        return comment

    async def locked(self, connection: Connection, alarm_ids: Sequence[str]) -> Sequence[Alarm]:
        """Those of them that exist, nobody else's to change until the transaction ends; always locked in the same order."""
        rows = await connection.fetch(ALARM_ROWS + "WHERE id = ANY($1::text[]) ORDER BY id FOR UPDATE", list(alarm_ids))
        return [alarm_of(row) for row in rows]

    async def change(
        self,
        connection: Connection,
        change: Change,
        alarms: Sequence[Alarm],
        *,
        now_us: int,
        actor: Actor,
        comment: str = "",
        detail: str = "",
    ) -> None:
        """Store locked alarms as they are after the change, and record it for each."""
        await connection.execute(
            "UPDATE alarm SET acknowledged = n.acknowledged, cleared = n.cleared, suppression = n.suppression, "
            "assignee = n.assignee FROM unnest($1::text[], $2::boolean[], $3::boolean[], $4::smallint[], $5::text[]) "
            "AS n (id, acknowledged, cleared, suppression, assignee) WHERE alarm.id = n.id",
            [alarm.id for alarm in alarms],
            [alarm.acknowledged for alarm in alarms],
            [alarm.cleared for alarm in alarms],
            [int(alarm.suppression) for alarm in alarms],
            [alarm.assignee for alarm in alarms],
        )
        await self.record(connection, change, alarms, now_us=now_us, actor=actor, comment=comment, detail=detail)

    async def record(
        self,
        connection: Connection,
        change: Change,
        alarms: Sequence[Alarm],
        *,
        now_us: int,
        actor: Actor,
        comment: str = "",
        detail: str = "",
    ) -> None:
        """Add a change to the history of the alarms and send its events on their way."""
        ids = [alarm.id for alarm in alarms]
        before: dict[str, int] = {}
        if change not in _ONCE:
            rows = await connection.fetch(
                "SELECT alarm_id, count(*) AS n FROM alarm_change WHERE alarm_id = ANY($1::text[]) AND change = $2 "
                "GROUP BY alarm_id",
                ids,
                change.value,
            )
            before = {row["alarm_id"]: row["n"] for row in rows}
        events = [
            AlarmEvent(
                event_id=event_id(alarm.id, change, before.get(alarm.id, 0)),
                change=change,
                changed_us=now_us,
                alarm=alarm,
            )
            for alarm in alarms
        ]
        await connection.execute(
            "INSERT INTO alarm_change (event_id, alarm_id, change, changed, actor, credential_id, comment, detail) "
            "SELECT event_id, alarm_id, $3, $4, $5, $6, $7, $8 FROM unnest($1::text[], $2::text[]) AS e (event_id, alarm_id)",
            [event.event_id for event in events],
            ids,
            change.value,
            from_us(now_us),
            actor.name,
            actor.credential_id,
            comment,
            detail,
        )
        # One alarm's events carry the id of its samples throughout; those of many at once the id of the request.
        with correlated(alarms[0].correlation_id) if len(alarms) == 1 else nullcontext():
            await outbox.write_all(
                connection,
                topics.ALARMS,
                [(event.alarm.id, event_message(event).SerializeToString(deterministic=True)) for event in events],
            )

    async def get(self, connection: Connection, alarm_id: str) -> Alarm | None:
        row = await connection.fetchrow(ALARM_ROWS + "WHERE id = $1", alarm_id)
        return None if row is None else alarm_of(row)

    async def change_count(self, connection: Connection, alarm_id: str, *, limit: int) -> int:
        """How long its history is; counts to `limit`."""
        count: int = await connection.fetchval(
            "SELECT count(*) FROM (SELECT FROM alarm_change WHERE alarm_id = $1 LIMIT $2) AS counted", alarm_id, limit
        )
        return count

    async def history(
        self, connection: Connection, alarm_id: str, *, before: str | None, limit: int
    ) -> Sequence[HistoryEntry]:
        """The newest changes (or the newest before that of the event `before`), in order."""
        rows = await connection.fetch(
            "SELECT event_id, change, changed, actor, credential_id, comment, detail FROM alarm_change WHERE alarm_id = $1 "
            "AND ($2::text IS NULL OR id < (SELECT id FROM alarm_change WHERE event_id = $2 AND alarm_id = $1)) "
            "ORDER BY id DESC LIMIT $3",
            alarm_id,
            before,
            limit,
        )
        return [
            HistoryEntry(
                event_id=row["event_id"],
                change=Change(row["change"]),
                changed_us=to_us(row["changed"]),
                actor=row["actor"],
                credential_id=row["credential_id"],
                comment=row["comment"],
                detail=row["detail"],
            )
            for row in reversed(rows)
        ]

    async def list(
        self, connection: Connection, asked: AlarmFilter, *, after: tuple[int, str] | None, limit: int
    ) -> Sequence[Alarm]:
        """Newest first; `after` is the start and id of the last one of the page before."""
        conditions: list[str] = []
        arguments: list[object] = []

        def condition(text: str, *values: object) -> None:
            numbers = range(len(arguments) + 1, len(arguments) + len(values) + 1)
            conditions.append(text.format(*(f"${number}" for number in numbers)))
            arguments.extend(values)

        if asked.firm_id is not None:
            condition("firm_id = {}", asked.firm_id)
        if asked.machine_id is not None:
            condition("machine_id = {}", asked.machine_id)
        if asked.active:
            condition("ended IS NULL")
        if asked.unacknowledged:
            condition("NOT acknowledged")
        if asked.uncleared:
            condition("NOT cleared")
        if asked.since_us is not None:
            condition("started >= {}", from_us(asked.since_us))
        if asked.suppressed is not Suppressed.INCLUDED:
            condition("suppression = 0" if asked.suppressed is Suppressed.HIDDEN else "suppression <> 0")
        if after is not None:
            condition("(started, id) < ({}, {})", from_us(after[0]), after[1])
        where = f"WHERE {' AND '.join(conditions)} " if conditions else ""
        rows = await connection.fetch(
            f"{ALARM_ROWS}{where}ORDER BY started DESC, id DESC LIMIT {int(limit)}",  # fixed texts
            *arguments,
        )
        return [alarm_of(row) for row in rows]


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What the detector knows of one machine's channel group from the records before `next_offset`."""

    machine_id: int
    channel_group: int
    next_offset: int
    state: bytes
    rules: bytes = b""  # where its rules stand, as of the same record


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Some machines' states, and how far the partition has come: no machine lacks a record below `position`."""

    partition: int
    position: int
    states: Sequence[SavedState]


class StateStore:
    """Detector states and positions of one topic."""

    def __init__(self, pool: Pool, *, topic: str) -> None:
        self._pool = pool
        self._topic = topic

    async def positions(
        self, partitions: Collection[int], *, topic_id: str, first_offsets: FirstOffsets
    ) -> Mapping[int, Position]:
        """Where to go on. Raises MadeAnew, and what `first_offsets` raises."""
        async with self._pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection:
            loaded = await load_positions(
                connection,
                [TopicPartition(self._topic, partition) for partition in partitions],
                topic_ids={self._topic: topic_id},
                first_offsets=first_offsets,
            )
        return {at.partition: position for at, position in loaded.items()}

    async def states(self, partition: int) -> AsyncIterator[SavedState]:
        after = (-1, -1)
        while True:
            rows = await self._pool.fetch(
                "SELECT machine_id, channel_group, next_offset, state, rules FROM detector_state "
                "WHERE partition = $1 AND (machine_id, channel_group) > ($2, $3) "
                "ORDER BY machine_id, channel_group LIMIT $4",
                partition,
                *after,
                STATES_PAGE,
            )
            for row in rows:
                yield SavedState(**row)
            if len(rows) < STATES_PAGE:
                return
            after = rows[-1]["machine_id"], rows[-1]["channel_group"]

    async def save(
        self, checkpoint: Checkpoint, *, expected: int, unreadable_in_a_row: int = 0, records_lost: int = 0
    ) -> None:
        """Store a checkpoint on top of position `expected`. May be repeated after an error that leaves the outcome open.

        `records_lost`: gone before they could be taken in, between `expected` and the checkpoint's position.

        Raises Fenced when another process has moved the position: the partition is not ours any more.
        """
        async with self._pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection, connection.transaction():
            # First the fence: it also holds the row until the commit.
            moved = await connection.fetchval(
                "UPDATE position SET next_offset = $4, unreadable_in_a_row = $5, "
                "records_lost = records_lost + CASE WHEN next_offset = $3 THEN $6::bigint ELSE 0 END "
                "WHERE topic = $1 AND partition = $2 AND next_offset IN ($3, $4) RETURNING 1",
                self._topic,
                checkpoint.partition,
                expected,
                checkpoint.position,
                unreadable_in_a_row,
                records_lost,
            )
            if moved is None:
                raise Fenced(f"partition {checkpoint.partition} is not at {expected} any more")
            if checkpoint.states:
                await self._write(connection, checkpoint)

    async def _write(self, connection: Connection, checkpoint: Checkpoint) -> None:
        # A state never goes back: a process that lost the partition may still have an older one in hand.
        await connection.execute(
            "INSERT INTO detector_state AS s (partition, machine_id, channel_group, next_offset, state, rules) "
            "SELECT $1, * FROM unnest($2::bigint[], $3::int[], $4::bigint[], $5::bytea[], $6::bytea[]) "
            "ON CONFLICT (partition, machine_id, channel_group) DO UPDATE SET next_offset = excluded.next_offset, "
            "state = excluded.state, rules = excluded.rules WHERE s.next_offset <= excluded.next_offset",
            checkpoint.partition,
            [saved.machine_id for saved in checkpoint.states],
            [saved.channel_group for saved in checkpoint.states],
            [saved.next_offset for saved in checkpoint.states],
            [saved.state for saved in checkpoint.states],
            [saved.rules for saved in checkpoint.states],
        )


def alarm_of(row: asyncpg.Record) -> Alarm:
    return Alarm(
        id=row["id"],
        firm_id=row["firm_id"],
        machine_id=row["machine_id"],
        position=row["position"],
        signal_id=row["signal_id"],
        machine_path=row["machine_path"],
        machine_kind=row["machine_kind"],
        signal_name=row["signal_name"],
        unit=row["unit"],
        started_us=to_us(row["started"]),
        ended_us=None if row["ended"] is None else to_us(row["ended"]),
        severity=Severity(row["severity"]),
        component=row["component"],
        explanation=row["explanation"],
        value=row["value"],
        score=row["score"],
        shares=tuple(
            Share(signal_id=signal_id, signal_name=name, share=share)
            for signal_id, name, share in json.loads(row["shares"])
        ),
        correlation_id=row["correlation_id"],
        episode_id=row["episode_id"],
        acknowledged=row["acknowledged"],
        cleared=row["cleared"],
        suppression=Suppression(row["suppression"]),
        assignee=row["assignee"],
        rule_id=row["rule_id"],
        rule_version=row["rule_version"],
        figures=tuple(json.loads(row["figures"]).items()),
    )
