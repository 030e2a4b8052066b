"""Contacts, escalations and deliveries in the database."""

from collections.abc import Sequence
from dataclasses import dataclass

import asyncpg

from services.anomaly.delivery import (
    ATTEMPTS_MAX,
    CLAIM_S,
    MESSAGES_A_MINUTE_MAX,
    Contact,
    ContactKind,
    Delivery,
    DeliveryState,
    Escalation,
    Step,
)
from services.anomaly.domain import MICROSECONDS, Alarm, Severity
from services.anomaly.store import ALARM_ROWS, Actor, alarm_of
from services.common.clock import from_us, to_us
from services.common.database import Connection
from services.common.logs import current_correlation_id

_CONTACT_ROWS = "SELECT id, firm_id, name, kind, address, secret, removed, made, actor, credential_id FROM contact "
_ESCALATION_ROWS = (
    "SELECT id, firm_id, name, site, severity_min, tell_changes, removed, made, actor, credential_id FROM escalation "
)
_DELIVERY_COLUMNS = (
    "d.id, d.firm_id, d.alarm_id, d.transition, d.contact_id, d.tell_changes, d.correlation_id, d.state, d.attempts, d.due, "
    "d.made, d.finished, d.last_error"
)
_DELIVERY_ROWS = f"SELECT {_DELIVERY_COLUMNS} FROM delivery d "  # noqa: S608  # fixed texts
PLAN_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext('smdih-anomaly-delivery-plan'))"
# What is planned looks back a little over what was planned before: changes become visible only with their commit.
OVERLAP_S = 60
# What went out is kept a little longer than a year, so that an auditor finds who was told. What is dead waits for a person.
SENT_KEPT_DAYS = 400
# The id is derived, so that it is the same whoever plans it.
_PLANNED = (
    "WITH span AS (SELECT $1::timestamptz AS since, $2::timestamptz AS until) "
    "INSERT INTO delivery AS d (id, firm_id, alarm_id, transition, contact_id, tell_changes, correlation_id, state, due, made) "
    "SELECT DISTINCT ON (alarm_id, transition, contact_id) md5(alarm_id || '/' || transition || '/' || contact_id), firm_id, "
    "alarm_id, transition, contact_id, tell_changes, correlation_id, 'pending', until, until FROM ({}) AS wanted "
    "ORDER BY alarm_id, transition, contact_id, tell_changes DESC ON CONFLICT DO NOTHING"
)
_OF_ESCALATION = (
    "NOT e.removed AND NOT c.removed AND a.severity >= e.severity_min AND a.suppression = 0 AND a.raised >= e.made "
    "AND (e.site = '' OR split_part(a.machine_path, '/', 2) = e.site)"
)
_UNSUPPRESSED = "('unshelved', 'unsuppressed', 'returned_to_service')"
_STEPS = _PLANNED.format(
    "SELECT a.firm_id, a.id AS alarm_id, "  # noqa: S608  # fixed texts
    "CASE WHEN s.after_s = 0 THEN 'raised' ELSE 'escalated_' || s.step END AS transition, "
    "s.contact_id, e.tell_changes, a.correlation_id, until "
    "FROM span JOIN escalation e ON true JOIN escalation_step s ON s.escalation_id = e.id JOIN contact c ON c.id = s.contact_id "
    "JOIN alarm a ON a.firm_id = e.firm_id AND a.raised > since - make_interval(secs => s.after_s) "
    f"AND a.raised <= until - make_interval(secs => s.after_s) WHERE {_OF_ESCALATION} "
    # Whoever is told at once is told also of what is over already; later steps are for what nobody has taken care of. What was off
    # the list and came back is told as that.
    f"AND CASE WHEN s.after_s = 0 THEN NOT EXISTS (SELECT FROM alarm_change WHERE alarm_id = a.id AND change IN {_UNSUPPRESSED}) "
    "ELSE a.ended IS NULL AND NOT a.acknowledged END"
)
_CHANGES = _PLANNED.format(
    "SELECT d.firm_id, d.alarm_id, h.change AS transition, d.contact_id, true AS tell_changes, d.correlation_id, until "
    "FROM span JOIN alarm_change h ON h.changed > since AND h.changed <= until "
    "JOIN delivery d ON d.alarm_id = h.alarm_id AND d.tell_changes JOIN contact c ON c.id = d.contact_id "
    "WHERE h.change IN ('acknowledged', 'returned', 'cleared') AND NOT c.removed "
    "AND (d.transition IN ('raised', 'back_on_list') OR d.transition LIKE 'escalated%')"
)
_BACK = _PLANNED.format(
    "SELECT a.firm_id, a.id AS alarm_id, 'back_on_list' AS transition, "  # noqa: S608  # fixed texts
    "s.contact_id, e.tell_changes, a.correlation_id, until "
    f"FROM span JOIN alarm_change h ON h.changed > since AND h.changed <= until AND h.change IN {_UNSUPPRESSED} "
    "JOIN alarm a ON a.id = h.alarm_id JOIN escalation e ON e.firm_id = a.firm_id "
    "JOIN escalation_step s ON s.escalation_id = e.id AND s.step = 0 JOIN contact c ON c.id = s.contact_id "
    f"WHERE {_OF_ESCALATION} AND a.ended IS NULL AND NOT a.acknowledged"
)


@dataclass(frozen=True)
class Claimed:
    """A delivery that is ours to try for a while, with all that is needed."""

    delivery: Delivery
    contact: Contact
    alarm: Alarm | None


class ContactStore:
    async def add_contact(self, connection: Connection, contact: Contact, *, now_us: int, actor: Actor) -> None:
        await connection.execute(
            "INSERT INTO contact (id, firm_id, name, kind, address, secret, made, actor, credential_id) "
            "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            contact.id,
            contact.firm_id,
            contact.name,
            contact.kind.value,
            contact.address,
            contact.secret,
            from_us(now_us),
            actor.name,
            actor.credential_id,
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

    async def remove_contact(self, connection: Connection, contact_id: str) -> None:
        await connection.execute("UPDATE contact SET removed = true, secret = '' WHERE id = $1", contact_id)
        await connection.execute(
            "UPDATE delivery SET state = 'dead', last_error = 'The contact was removed.' "
            "WHERE contact_id = $1 AND state = 'pending'",
            contact_id,
        )

    async def trials(self, connection: Connection, contact_id: str, *, now_us: int) -> int:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM delivery WHERE contact_id = $1 AND alarm_id IS NULL AND made > $2",
            contact_id,
            from_us(now_us - 3600 * MICROSECONDS),
        )
        return count

    async def add_trial(self, connection: Connection, contact: Contact, *, now_us: int) -> Delivery:
        row = await connection.fetchrow(
            "INSERT INTO delivery AS d (id, firm_id, transition, contact_id, tell_changes, correlation_id, state, due, made) "  # noqa: S608
            "SELECT md5(t), $1, t, $2, false, $3, 'pending', $4, $4 FROM (SELECT 'trial_' || gen_random_uuid() AS t) AS one "
            f"RETURNING {_DELIVERY_COLUMNS}",
            contact.firm_id,
            contact.id,
            current_correlation_id(),
            from_us(now_us),
        )
        assert row is not None
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

    async def plan(self, connection: Connection, *, now_us: int) -> int | None:
        """Write a delivery for each contact that has to be told of something by now, once; None: somebody else plans."""
        if not await connection.fetchval(PLAN_LOCK):
            return None
        planned = await connection.fetchval(
            "SELECT planned - make_interval(secs => $1) FROM delivery_plan FOR UPDATE", OVERLAP_S
        )
        made = 0
        for text in (_STEPS, _BACK, _CHANGES):
            made += int((await connection.execute(text, planned, from_us(now_us))).rpartition(" ")[2])
        # A clock that is behind another's must not plan the same again and again.
        await connection.execute("UPDATE delivery_plan SET planned = greatest(planned, $1)", from_us(now_us))
        return made

    async def claim(self, connection: Connection, *, now_us: int, limit: int) -> Sequence[Claimed]:
        """Take deliveries that are due; nobody else takes them for CLAIM_S."""
        rows = await connection.fetch(
            "UPDATE delivery d SET attempts = attempts + 1, due = $1::timestamptz + make_interval(secs => $2) WHERE id IN ("  # noqa: S608
            "SELECT id FROM delivery WHERE state = 'pending' AND due <= $1::timestamptz "
            "AND contact_id NOT IN (SELECT contact_id FROM delivery "
            "WHERE state = 'sent' AND finished > $1::timestamptz - interval '1 minute' GROUP BY contact_id HAVING count(*) >= $3) "
            f"ORDER BY due LIMIT $4 FOR UPDATE SKIP LOCKED) RETURNING {_DELIVERY_COLUMNS}",
            from_us(now_us),
            CLAIM_S,
            MESSAGES_A_MINUTE_MAX,
            limit,
        )
        contacts = {
            row["id"]: _contact(row)
            for row in await connection.fetch(
                _CONTACT_ROWS + "WHERE id = ANY($1::text[])", [row["contact_id"] for row in rows]
            )
        }
        alarms = {
            row["id"]: alarm_of(row)
            for row in await connection.fetch(
                ALARM_ROWS + "WHERE id = ANY($1::text[])", [row["alarm_id"] for row in rows if row["alarm_id"]]
            )
        }
        return [Claimed(_delivery(row), contacts[row["contact_id"]], alarms.get(row["alarm_id"])) for row in rows]

    async def sent(self, connection: Connection, delivery: Delivery, *, now_us: int) -> None:
        await connection.execute(
            "UPDATE delivery SET state = 'sent', finished = $2, last_error = '' WHERE id = $1 AND state = 'pending'",
            delivery.id,
            from_us(now_us),
        )

    async def failed(
        self, connection: Connection, delivery: Delivery, *, now_us: int, error: str, retry_after_s: float
    ) -> bool:
        """Note a failed try; True: it was the last one."""
        dead = delivery.attempts >= ATTEMPTS_MAX
        await connection.execute(
            "UPDATE delivery SET state = $2, due = $3, last_error = $4, finished = CASE WHEN $2 = 'dead' THEN $5::timestamptz END "
            "WHERE id = $1 AND state = 'pending'",
            delivery.id,
            DeliveryState.DEAD.value if dead else DeliveryState.PENDING.value,
            from_us(now_us + int(retry_after_s * MICROSECONDS)),
            error,
            from_us(now_us),
        )
        return dead

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
        """Make a dead one pending again; None where its contact was removed."""
        row = await connection.fetchrow(
            "UPDATE delivery d SET state = 'pending', attempts = 0, due = $2, finished = NULL FROM contact c "  # noqa: S608
            f"WHERE d.id = $1 AND c.id = d.contact_id AND NOT c.removed RETURNING {_DELIVERY_COLUMNS}",
            delivery_id,
            from_us(now_us),
        )
        return None if row is None else _delivery(row)

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
