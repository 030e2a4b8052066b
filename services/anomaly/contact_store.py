"""Contacts, escalations and deliveries in the database."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from services.anomaly.delivery import (
    ATTEMPTS_MAX,
    CLAIM_S,
    GIVE_UP_S,
    MESSAGES_A_MINUTE_MAX,
    PAUSE_S_MAX,
    RETRY_S_MAX,
    Contact,
    ContactKind,
    Delivery,
    DeliveryState,
    Escalation,
    Step,
    retry_after_s,
)
from services.anomaly.domain import ENDS, MICROSECONDS, Alarm, Change, Severity
from services.anomaly.store import ALARM_ROWS, Actor, alarm_of
from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.logs import current_correlation_id

_CONTACT_ROWS = (
    "SELECT id, firm_id, name, kind, address, secret, confirmed, removed, made, actor, credential_id FROM contact "
)
_ESCALATION_ROWS = (
    "SELECT id, firm_id, name, site, severity_min, tell_changes, removed, made, actor, credential_id FROM escalation "
)
_DELIVERY_COLUMNS = (
    "d.id, d.firm_id, d.alarm_id, d.transition, d.contact_id, d.tell_changes, d.correlation_id, d.state, d.attempts, d.due, "
    "d.made, d.finished, d.last_error"
)
_DELIVERY_ROWS = f"SELECT {_DELIVERY_COLUMNS} FROM delivery d "  # noqa: S608  # fixed texts
_TRIALS_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0))"
PLAN_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('smdih-anomaly-delivery-plan'))"
# What went out is kept a little longer than a year, so that an auditor finds who was told. What is dead waits for a person.
SENT_KEPT_DAYS = 400
# Changes, or steps whose time has come, that are looked at in one transaction.
PLAN_MAX = 1_000
# What started so long before the hub noticed is history that came late: it is told a little later, and only if it is not over.
HISTORY_S = 86_400
HISTORY_WAIT_S = 60
WAITING_COUNTED_MAX = 1_000
# Before messages about any alarm: a person waits.
URGENCY_OF_TRIALS = 4
# The id is derived, so that it is the same whoever plans it.
_PLANNED = (
    "INSERT INTO delivery AS d (id, firm_id, alarm_id, transition, contact_id, tell_changes, correlation_id, state, due, made, "
    "urgency) SELECT DISTINCT ON (name) md5(name), firm_id, alarm_id, transition, contact_id, tell_changes, correlation_id, "
    "'pending', $1, $1, urgency FROM (SELECT w.alarm_id || '/' || w.transition || '/' || w.contact_id || w.again AS name, "
    "w.firm_id, w.alarm_id, w.transition, w.contact_id, w.tell_changes, w.correlation_id, w.urgency FROM ({}) AS w) AS wanted "
    "ORDER BY name, tell_changes DESC ON CONFLICT DO NOTHING"
)
_OF_ESCALATION = (
    "NOT e.removed AND a.severity >= e.severity_min AND a.raised >= e.made "
    "AND (e.site = '' OR split_part(a.machine_path, '/', 2) = e.site) "
)
_CALLS = "(d.transition IN ('raised', 'back_on_list') OR d.transition LIKE 'escalated%')"
_TOLD = (Change.ACKNOWLEDGED, Change.RETURNED, Change.CLEARED)
_BACK_ON_LIST = tuple(ENDS.values())
# Of what has come back, the first step is told at once; those whose time passed meanwhile come now.
_OPENED = (
    "INSERT INTO escalation_due (alarm_id, escalation_id, step, firm_id, due) "  # noqa: S608  # fixed texts
    "SELECT DISTINCT a.id, e.id, s.step, e.firm_id, a.raised + make_interval(secs => s.after_s + "
    "CASE WHEN a.started < a.raised - make_interval(secs => $3) THEN $4 ELSE 0 END) "
    "FROM alarm a JOIN escalation e ON e.firm_id = a.firm_id JOIN escalation_step s ON s.escalation_id = e.id "
    f"WHERE (a.id = ANY($1::text[]) OR a.id = ANY($2::text[]) AND s.step > 0) AND {_OF_ESCALATION} ON CONFLICT DO NOTHING"
)
_STEPS = _PLANNED.format(
    "SELECT a.firm_id, a.id AS alarm_id, "  # noqa: S608  # fixed texts
    "CASE WHEN s.after_s = 0 THEN 'raised' ELSE 'escalated_' || s.step END AS transition, '' AS again, "
    "s.contact_id, e.tell_changes, a.correlation_id, a.severity AS urgency "
    "FROM unnest($2::text[], $3::text[], $4::int[]) AS now (alarm_id, escalation_id, step) JOIN alarm a ON a.id = now.alarm_id "
    "JOIN escalation e ON e.id = now.escalation_id JOIN escalation_step s ON s.escalation_id = e.id AND s.step = now.step "
    f"JOIN contact c ON c.id = s.contact_id WHERE {_OF_ESCALATION} AND NOT c.removed AND c.confirmed AND a.suppression = 0 "
    # Whoever is told at once is told also of what is over already; later steps are for what nobody has taken care of. What was off
    # the list and came back is told as that.
    "AND CASE WHEN s.after_s = 0 THEN (a.ended IS NULL OR a.ended >= a.raised - make_interval(secs => $5)) "
    "AND NOT EXISTS (SELECT FROM alarm_change WHERE alarm_id = a.id AND change = ANY($6::text[])) "
    "ELSE a.ended IS NULL AND NOT a.acknowledged END"
)
_CHANGES = _PLANNED.format(
    "SELECT d.firm_id, d.alarm_id, h.change AS transition, '' AS again, d.contact_id, true AS tell_changes, "  # noqa: S608
    "d.correlation_id, d.urgency FROM unnest($2::text[], $3::text[]) AS h (alarm_id, change) "
    "JOIN delivery d ON d.alarm_id = h.alarm_id AND d.tell_changes JOIN contact c ON c.id = d.contact_id "
    f"WHERE NOT c.removed AND c.confirmed AND {_CALLS}"
)
_BACK = _PLANNED.format(
    "SELECT a.firm_id, a.id AS alarm_id, 'back_on_list' AS transition, '/' || h.event_id AS again, "  # noqa: S608
    "s.contact_id, e.tell_changes, a.correlation_id, a.severity AS urgency "
    # Two reasons that end at once bring it back once.
    "FROM (SELECT alarm_id, max(event_id) AS event_id FROM unnest($2::text[], $3::text[]) AS b (alarm_id, event_id) "
    "GROUP BY alarm_id) AS h JOIN alarm a ON a.id = h.alarm_id JOIN escalation e ON e.firm_id = a.firm_id "
    "JOIN escalation_step s ON s.escalation_id = e.id AND s.step = 0 JOIN contact c ON c.id = s.contact_id "
    f"WHERE {_OF_ESCALATION} AND NOT c.removed AND c.confirmed AND a.suppression = 0 AND a.ended IS NULL AND NOT a.acknowledged"
)
# Contacts that something waits for and that may be sent to now, those that answer first. Contact by contact along the index: one
# with thousands of messages costs no more than one with a few.
_FREE = (
    "WITH RECURSIVE waiting AS ((SELECT contact_id FROM delivery WHERE state = 'pending' ORDER BY contact_id LIMIT 1) UNION ALL "
    "SELECT (SELECT d.contact_id FROM delivery d WHERE d.state = 'pending' AND d.contact_id > w.contact_id ORDER BY d.contact_id "
    "LIMIT 1) FROM waiting w WHERE w.contact_id IS NOT NULL) "
    "SELECT c.id, c.removed FROM waiting w JOIN contact c ON c.id = w.contact_id CROSS JOIN LATERAL (SELECT due FROM delivery "
    "WHERE contact_id = c.id AND state = 'pending' AND due <= $1 ORDER BY urgency DESC, due LIMIT 1) AS first "
    "WHERE c.free <= $1 AND c.id NOT IN (SELECT contact_id FROM delivery WHERE state = 'sent' "
    "AND finished > $1::timestamptz - interval '1 minute' GROUP BY contact_id HAVING count(*) >= $2) "
    "ORDER BY c.failures, first.due LIMIT $3 FOR UPDATE OF c SKIP LOCKED"
)
# Nobody has to hear of what is over and taken care of; and of changes only who may have heard of the alarm.
_OVER = (
    "DELETE FROM delivery d USING alarm a WHERE a.id = ANY($1::text[]) AND a.ended IS NOT NULL AND a.acknowledged "  # noqa: S608
    f"AND d.alarm_id = a.id AND d.state = 'pending' AND d.attempts = 0 AND ({_CALLS} OR NOT EXISTS (SELECT FROM delivery t "
    "WHERE t.alarm_id = a.id AND t.contact_id = d.contact_id AND t.attempts > 0))"
)


@dataclass(frozen=True)
class Claimed:
    """A delivery that is ours to try for a while, with all that is needed."""

    delivery: Delivery
    contact: Contact
    alarm: Alarm | None
    waiting: int = 0  # more messages for this contact; counted to WAITING_COUNTED_MAX


class ContactStore:
    async def add_contact(self, connection: Connection, contact: Contact, *, now_us: int, actor: Actor) -> None:
        await connection.execute(
            "INSERT INTO contact (id, firm_id, name, kind, address, secret, made, actor, credential_id, confirmed) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
            contact.id,
            contact.firm_id,
            contact.name,
            contact.kind.value,
            contact.address,
            contact.secret,
            from_us(now_us),
            actor.name,
            actor.credential_id,
            contact.confirmed,
        )

    async def contacts(self, connection: Connection, firm_id: int, *, limit: int) -> Sequence[Contact]:
        rows = await connection.fetch(
            _CONTACT_ROWS + "WHERE firm_id = $1 AND NOT removed ORDER BY made DESC, id DESC LIMIT $2",
            firm_id,
            limit,
        )
        return [_contact(row) for row in rows]

    async def contact(self, connection: Connection, contact_id: str, *, removed: bool) -> Contact | None:
        """`removed`: also one that was removed."""
        row = await connection.fetchrow(_CONTACT_ROWS + "WHERE id = $1 AND ($2 OR NOT removed)", contact_id, removed)
        return None if row is None else _contact(row)

    async def secrets(self, connection: Connection, *, after_id: str, limit: int) -> Sequence[tuple[str, str]]:
        """Ids and secrets of contacts in order of their ids; held until the transaction ends."""
        rows = await connection.fetch(
            "SELECT id, secret FROM contact WHERE id > $1 AND secret <> '' ORDER BY id LIMIT $2 FOR UPDATE",
            after_id,
            limit,
        )
        return [(row["id"], row["secret"]) for row in rows]

    async def put_secrets(self, connection: Connection, sealed: Sequence[tuple[str, str]]) -> None:
        await connection.executemany("UPDATE contact SET secret = $2 WHERE id = $1", sealed)

    async def remove_contact(self, connection: Connection, contact_id: str, *, now_us: int) -> None:
        await connection.execute("UPDATE contact SET removed = true, secret = '' WHERE id = $1", contact_id)
        await self._end_deliveries(connection, [contact_id], now_us=now_us)

    async def _end_deliveries(self, connection: Connection, contact_ids: Sequence[str], *, now_us: int) -> None:
        """Of removed contacts: nobody could send them again. A trial that may have gone out counts as sent."""
        await connection.execute(
            "UPDATE delivery SET state = 'sent', finished = $2, last_error = 'Its contact was removed meanwhile.' "
            "WHERE contact_id = ANY($1::text[]) AND state = 'pending' AND alarm_id IS NULL AND attempts > 0",
            contact_ids,
            from_us(now_us),
        )
        await connection.execute(
            "DELETE FROM delivery WHERE contact_id = ANY($1::text[]) AND state <> 'sent'", contact_ids
        )

    async def count_code(self, connection: Connection, contact_id: str) -> int:
        """One more code is tried; returns how many have been. Nobody else tries one until the transaction ends."""
        count: int = await connection.fetchval(
            "UPDATE contact SET codes_tried = codes_tried + 1 WHERE id = $1 RETURNING codes_tried", contact_id
        )
        return count

    async def confirm(self, connection: Connection, contact_id: str) -> None:
        await connection.execute("UPDATE contact SET confirmed = true, secret = '' WHERE id = $1", contact_id)

    async def trials(self, connection: Connection, firm_id: int, address: str, *, since_us: int) -> tuple[int, int]:
        """Trials and codes that a firm has had sent since then, in all and to one address, also by contacts that it removed.

        The firm has none sent by anybody else until the transaction ends.
        """
        await connection.execute(_TRIALS_LOCK, f"smdih-anomaly-trials-{firm_id}")
        row = await connection.fetchrow(
            "SELECT count(*) AS of_firm, count(*) FILTER (WHERE c.address = $2) AS of_address FROM delivery d "
            "JOIN contact c ON c.id = d.contact_id WHERE d.firm_id = $1 AND d.alarm_id IS NULL AND d.made > $3",
            firm_id,
            address,
            from_us(since_us),
        )
        assert row is not None
        return row["of_firm"], row["of_address"]

    async def add_trial(self, connection: Connection, contact: Contact, *, now_us: int) -> Delivery:
        row = await connection.fetchrow(
            "INSERT INTO delivery AS d (id, firm_id, transition, contact_id, tell_changes, correlation_id, state, due, made, "  # noqa: S608
            "urgency) SELECT md5(t), $1, t, $2, false, $3, 'pending', $4, $4, $5 "
            f"FROM (SELECT 'trial_' || gen_random_uuid() AS t) AS one RETURNING {_DELIVERY_COLUMNS}",
            contact.firm_id,
            contact.id,
            current_correlation_id(),
            from_us(now_us),
            URGENCY_OF_TRIALS,
        )
        assert row is not None
        await self._release(connection, contact.id, now_us=now_us)
        return _delivery(row)

    async def add_escalation(
        self, connection: Connection, escalation: Escalation, *, now_us: int, actor: Actor
    ) -> None:
        await connection.execute(
            "INSERT INTO escalation (id, firm_id, name, site, severity_min, tell_changes, made, actor, credential_id) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            escalation.id,
            escalation.firm_id,
            escalation.name,
            escalation.site,
            int(escalation.severity_min),
            escalation.tell_changes,
            from_us(now_us),
            actor.name,
            actor.credential_id,
        )
        await connection.executemany(
            "INSERT INTO escalation_step (escalation_id, step, after_s, contact_id) VALUES ($1, $2, $3, $4)",
            [
                (escalation.id, number, step.after_s, contact_id)
                for number, step in enumerate(escalation.steps)
                for contact_id in step.contact_ids
            ],
        )

    async def escalations(self, connection: Connection, firm_id: int, *, limit: int) -> Sequence[Escalation]:
        rows = await connection.fetch(
            _ESCALATION_ROWS + "WHERE firm_id = $1 AND NOT removed ORDER BY made DESC, id DESC LIMIT $2",
            firm_id,
            limit,
        )
        steps = await connection.fetch(
            "SELECT escalation_id, step, after_s, array_agg(contact_id ORDER BY contact_id) AS contact_ids FROM escalation_step "
            "WHERE escalation_id = ANY($1::text[]) GROUP BY escalation_id, step, after_s ORDER BY step",
            [row["id"] for row in rows],
        )
        of: dict[str, list[Step]] = {}
        for step in steps:
            of.setdefault(step["escalation_id"], []).append(Step(step["after_s"], tuple(step["contact_ids"])))
        return [
            Escalation(
                id=row["id"],
                firm_id=row["firm_id"],
                name=row["name"],
                site=row["site"],
                severity_min=Severity(row["severity_min"]),
                tell_changes=row["tell_changes"],
                steps=tuple(of.get(row["id"], ())),
            )
            for row in rows
        ]

    async def remove_escalation(self, connection: Connection, escalation_id: str) -> int | None:
        """Whose it was; None: there is none."""
        firm_id: int | None = await connection.fetchval(
            "UPDATE escalation SET removed = true WHERE id = $1 RETURNING firm_id", escalation_id
        )
        return firm_id

    async def plan(self, connection: Connection, *, now_us: int) -> bool:
        """Write a delivery for each contact that has to be told of something by now, once; True: there may be more to plan."""
        if not await connection.fetchval(PLAN_LOCK):
            return False  # somebody else plans
        now = from_us(now_us)
        changes = await connection.fetch(
            "UPDATE alarm_change SET planned = true WHERE id IN (SELECT id FROM alarm_change WHERE NOT planned ORDER BY id "
            "LIMIT $1) RETURNING event_id, alarm_id, change",
            PLAN_MAX,
        )
        raised = [row["alarm_id"] for row in changes if row["change"] == Change.RAISED]
        back = [(row["alarm_id"], row["event_id"]) for row in changes if row["change"] in _BACK_ON_LIST]
        told = [(row["alarm_id"], row["change"]) for row in changes if row["change"] in _TOLD]
        if raised or back:
            await connection.execute(_OPENED, raised, [alarm_id for alarm_id, _ in back], HISTORY_S, HISTORY_WAIT_S)
        steps = await connection.fetch(
            "DELETE FROM escalation_due WHERE (alarm_id, escalation_id, step) IN (SELECT alarm_id, escalation_id, step "
            "FROM escalation_due WHERE due <= $1 ORDER BY due LIMIT $2) RETURNING alarm_id, escalation_id, step",
            now,
            PLAN_MAX,
        )
        if steps:
            columns = ([row[name] for row in steps] for name in ("alarm_id", "escalation_id", "step"))
            await connection.execute(_STEPS, now, *columns, HISTORY_S, _BACK_ON_LIST)
        for text, rows in ((_BACK, back), (_CHANGES, told)):
            if rows:
                await connection.execute(text, now, [first for first, _ in rows], [second for _, second in rows])
        if told:
            await connection.execute(_OVER, [alarm_id for alarm_id, _ in told])
        return PLAN_MAX in (len(changes), len(steps))

    async def claim(self, connection: Connection, *, now_us: int, limit: int) -> Sequence[Claimed]:
        """Take the most urgent delivery of each of up to `limit` contacts; nobody else sends to these for CLAIM_S."""
        now, until = from_us(now_us), from_us(now_us + CLAIM_S * MICROSECONDS)
        # Each try ended with the process that made it.
        await connection.execute(
            "UPDATE delivery SET state = 'dead', finished = $1, last_error = 'No try came to an end.' "  # noqa: S608
            # Written out, for the index of these alone.
            f"WHERE state = 'pending' AND due <= $1::timestamptz AND attempts >= {ATTEMPTS_MAX}",
            now,
        )
        free = await connection.fetch(_FREE, now, MESSAGES_A_MINUTE_MAX, limit)
        if not free:
            return ()
        await self._end_deliveries(connection, [row["id"] for row in free if row["removed"]], now_us=now_us)
        ids = [row["id"] for row in free if not row["removed"]]
        rows = await connection.fetch(
            "UPDATE delivery d SET attempts = attempts + 1, due = $3 WHERE id IN (SELECT first.id "  # noqa: S608
            "FROM unnest($1::text[]) AS c (id) CROSS JOIN LATERAL (SELECT id FROM delivery "
            "WHERE contact_id = c.id AND state = 'pending' AND due <= $2 ORDER BY urgency DESC, due LIMIT 1) AS first) "
            f"RETURNING {_DELIVERY_COLUMNS}",
            ids,
            now,
            until,
        )
        contacts = {
            row["id"]: row
            for row in await connection.fetch(
                "UPDATE contact SET free = $2 WHERE id = ANY($1::text[]) RETURNING id, firm_id, name, kind, address, secret, "
                "confirmed, (SELECT count(*) FROM (SELECT FROM delivery WHERE contact_id = contact.id AND state = 'pending' "
                "AND due <= $3 LIMIT $4) AS counted) AS waiting",
                [row["contact_id"] for row in rows],
                until,
                now,
                WAITING_COUNTED_MAX,
            )
        }
        alarms = {
            row["id"]: alarm_of(row)
            for row in await connection.fetch(
                ALARM_ROWS + "WHERE id = ANY($1::text[])", [row["alarm_id"] for row in rows if row["alarm_id"]]
            )
        }
        return [
            Claimed(_delivery(row), _contact(contact), alarms.get(row["alarm_id"]), contact["waiting"])
            for row in rows
            for contact in [contacts[row["contact_id"]]]
        ]

    async def sent(self, connection: Connection, delivery: Delivery, *, now_us: int) -> None:
        await connection.execute(
            "UPDATE delivery SET state = 'sent', finished = $2, last_error = '' WHERE id = $1 AND state = 'pending'",
            delivery.id,
            from_us(now_us),
        )
        await self._release(connection, delivery.contact_id, now_us=now_us)

    async def failed(self, connection: Connection, delivery: Delivery, *, now_us: int, error: str) -> bool:
        """Note a failed try; True: it was the last one. A contact that has failed for long is not kept waiting for what is old."""
        dead = delivery.attempts >= ATTEMPTS_MAX
        now = from_us(now_us)
        await connection.execute(
            "UPDATE delivery SET state = $2, due = $3, last_error = $4, finished = CASE WHEN $2 = 'dead' THEN $5::timestamptz END "
            "WHERE id = $1 AND state = 'pending'",
            delivery.id,
            DeliveryState.DEAD.value if dead else DeliveryState.PENDING.value,
            from_us(now_us + int(retry_after_s(delivery.attempts, longest_s=RETRY_S_MAX) * MICROSECONDS)),
            error,
            now,
        )
        failures = await connection.fetchval(
            "UPDATE contact SET failures = failures + 1 WHERE id = $1 RETURNING failures", delivery.contact_id
        )
        wait_s = retry_after_s(failures, longest_s=PAUSE_S_MAX)
        await connection.execute(
            "UPDATE contact SET free = $2 WHERE id = $1",
            delivery.contact_id,
            from_us(now_us + int(wait_s * MICROSECONDS)),
        )
        if failures >= ATTEMPTS_MAX:
            await connection.execute(
                "UPDATE delivery SET state = 'dead', finished = $2, last_error = $3 "
                "WHERE contact_id = $1 AND state = 'pending' AND made < $4",
                delivery.contact_id,
                now,
                error,
                from_us(now_us - GIVE_UP_S * MICROSECONDS),
            )
        return dead

    async def _release(self, connection: Connection, contact_id: str, *, now_us: int) -> None:
        """It may be sent to at once."""
        await connection.execute(
            "UPDATE contact SET failures = 0, free = $2 WHERE id = $1", contact_id, from_us(now_us)
        )

    async def deliveries(
        self, connection: Connection, *, firm_id: int, state: str | None, alarm_id: str | None, limit: int
    ) -> Sequence[Delivery]:
        rows = await connection.fetch(
            _DELIVERY_ROWS + "WHERE firm_id = $1 AND ($2::text IS NULL OR state = $2) "
            "AND ($3::text IS NULL OR alarm_id = $3) ORDER BY made DESC, id DESC LIMIT $4",
            firm_id,
            state,
            alarm_id,
            limit,
        )
        return [_delivery(row) for row in rows]

    async def delivery(self, connection: Connection, delivery_id: str) -> Delivery | None:
        row = await connection.fetchrow(_DELIVERY_ROWS + "WHERE id = $1", delivery_id)
        return None if row is None else _delivery(row)

    async def revive(self, connection: Connection, delivery_id: str, *, now_us: int) -> Delivery | None:
        """Make a dead one pending again, as if planned now; None where its contact was removed."""
        row = await connection.fetchrow(
            "UPDATE delivery d SET state = 'pending', attempts = 0, due = $2, made = $2, finished = NULL FROM contact c "  # noqa: S608
            f"WHERE d.id = $1 AND c.id = d.contact_id AND NOT c.removed RETURNING {_DELIVERY_COLUMNS}",
            delivery_id,
            from_us(now_us),
        )
        if row is None:
            return None
        await self._release(connection, row["contact_id"], now_us=now_us)
        return _delivery(row)

    async def forget(self, connection: Connection, *, now_us: int, limit: int) -> int:
        """Remove messages that went out more than SENT_KEPT_DAYS ago, at most `limit`; returns how many."""
        status = await connection.execute(
            "DELETE FROM delivery WHERE id IN ("
            "SELECT id FROM delivery WHERE state = 'sent' AND finished < $1 LIMIT $2 FOR UPDATE SKIP LOCKED)",
            from_us(now_us - SENT_KEPT_DAYS * 86_400 * MICROSECONDS),
            limit,
        )
        return int(status.rpartition(" ")[2])

    async def backlog(self, connection: Connection, *, now_us: int) -> tuple[int, int, float]:
        """Deliveries that wait, that are dead, and for how many seconds the oldest has been due."""
        row = await connection.fetchrow(
            "SELECT count(*) FILTER (WHERE state = 'pending') AS pending, count(*) FILTER (WHERE state = 'dead') AS dead, "
            "coalesce(extract(epoch FROM $1::timestamptz - min(made) FILTER (WHERE state = 'pending')), 0)::float8 AS oldest_s "
            "FROM delivery WHERE state <> 'sent'",
            from_us(now_us),
        )
        assert row is not None
        return row["pending"], row["dead"], max(0.0, row["oldest_s"])


def _contact(row: asyncpg.Record) -> Contact:
    return Contact(
        id=row["id"],
        firm_id=row["firm_id"],
        name=row["name"],
        kind=ContactKind(row["kind"]),
        address=row["address"],
        secret=row["secret"],
        confirmed=row["confirmed"],
    )


def _delivery(row: asyncpg.Record) -> Delivery:
    return Delivery(
        id=row["id"],
        firm_id=row["firm_id"],
        alarm_id=row["alarm_id"] or "",
        transition=row["transition"],
        contact_id=row["contact_id"],
        correlation_id=row["correlation_id"],
        state=DeliveryState(row["state"]),
        attempts=row["attempts"],
        due_us=to_us(row["due"]),
        made_us=to_us(row["made"]),
        finished_us=None if row["finished"] is None else to_us(row["finished"]),
        last_error=row["last_error"],
    )
