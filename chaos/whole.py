"""What must hold of a whole hub once it has come to rest: samples, alarms, needs, places and pence."""

import asyncio
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import TopicPartition

from chaos import anomaly
from chaos.people import SIGNALS, Told
from chaos.stage import Outcome
from chaos.telemetry import cluster_of, reading, records_of
from localstack.hub import Hub
from services.common import topics
from services.common.database import create_pool
from services.funding import ledger
from services.funding.ledger import AccountKind
from services.funding.ledger_replay import replay
from services.matching.store import places as places_store
from services.matching.store import sessions as sessions_store
from services.migrate import SCHEMAS

# Which schema takes in which topic.
CONSUMED = {
    topics.SAMPLES: ("ingest", "anomaly"),
    topics.QUARANTINE: ("ingest",),
    topics.ALARMS: ("matching",),
    topics.OFFERS: ("funding",),
}
DEAD_LETTERS = tuple(topic.name for topic in topics.TOPICS if topic.name.endswith(topics.DEAD_LETTERS_SUFFIX))
# They owe what they gave.
SOURCES = (AccountKind.PUBLIC_SOURCE, AccountKind.CO_INVESTMENT_SOURCE)
NAMED_MAX = 5
# Of minimal financial assistance, to one firm: each firm of these scenarios stands alone.
ASSISTANCE_MAX_PENCE = 315_000_00


async def behind(hub: Hub, database: Any) -> dict[str, int]:
    """Records that a service has not taken in yet, and events in the outboxes; empty when the hub has come to rest."""
    found: Counter[str] = Counter()
    for topic, schemas in CONSUMED.items():
        name = cluster_of(hub).name(topic)
        async with reading(hub, topic) as (consumer, partitions):
            ends: dict[TopicPartition, int] = await consumer.end_offsets(partitions)
        for schema in schemas:
            positions = dict(
                await database.fetch(f"SELECT partition, next_offset FROM {schema}.position WHERE topic = $1", name)  # noqa: S608
            )
            for partition, end in ends.items():
                found[f"{topic} of {schema}"] += end - positions.get(partition.partition, 0)
    for schema in SCHEMAS:
        found[f"outbox of {schema}"] = await database.fetchval(f"SELECT count(*) FROM {schema}.outbox")  # noqa: S608
    return {name: count for name, count in found.items() if count}


async def judge(hub: Hub, database: Any, told: Told, outcome: Outcome, *, one_release: bool = True) -> None:
    """Everything but the samples of the load; counts into `outcome` and says in words what does not hold.

    `one_release`: alarms are compared with their scores and words too, and those of several signals, which another release may
    judge differently.
    """
    await _frames(database, told, outcome)
    await _alarms(hub, database, outcome, one_release)
    await _needs(database, told, outcome)
    await _places(hub, database, told, outcome)
    await _pence(hub, database, told, outcome)
    for topic in DEAD_LETTERS:
        async with reading(hub, topic) as (consumer, partitions):
            letters = sum((await consumer.end_offsets(partitions)).values())
        if letters:
            outcome.broken.append(f"{letters} records in {topic}, though every one could be read")


def lost(outcome: Outcome, what: str, told: Mapping[str, Any] | set[str], stored: Mapping[str, Any] | set[str]) -> None:
    """Count what people were told and the hub does not hold."""
    if isinstance(told, Mapping) and isinstance(stored, Mapping):
        missing = [name for name, value in told.items() if stored.get(name) != value]
    else:
        missing = [name for name in told if name not in stored]
    outcome.acknowledged += len(told)
    outcome.lost += len(missing)
    if missing:
        outcome.broken.append(f"{len(missing)} of {len(told)} {what} are not as they were told: {missing[:NAMED_MAX]}")


async def _frames(database: Any, told: Told, outcome: Outcome) -> None:
    rows = await database.fetch(
        "SELECT machine_id, count(*) AS frames, count(DISTINCT ts) AS times FROM ingest.frame WHERE machine_id = ANY($1::bigint[]) "
        "GROUP BY 1",
        list(told.frames),
    )
    stored = {row["machine_id"]: row["times"] for row in rows}
    signals = len(SIGNALS)
    outcome.acknowledged += sum(told.frames.values()) * signals
    outcome.lost += sum(max(0, frames - stored.get(machine, 0)) for machine, frames in told.frames.items()) * signals
    outcome.duplicated += sum(row["frames"] - row["times"] for row in rows) * signals


async def _alarms(hub: Hub, database: Any, outcome: Outcome, one_release: bool) -> None:
    """Those that an undisturbed pass over the stored samples raises, no more and no fewer."""
    of: dict[int, list[tuple[int, bytes]]] = {}
    async for record in records_of(hub, topics.SAMPLES):
        of.setdefault(record.partition, []).append((record.offset, record.value))
    machines = await database.fetchrow("SELECT coalesce(min(id), 0), coalesce(max(id), 0) FROM ingest.machine")
    pool = await create_pool(hub.settings.database_dsn, schema="anomaly", size_max=2)
    try:
        expected = _compared(await anomaly.undisturbed(hub.settings, pool, of, tuple(machines)), one_release)
        found: dict[str, Any] = {}
        for _ in range(20):  # an alarm that ends by the clock may be on its way
            found = _compared(await pool.fetch(anomaly.ALARMS, *machines), one_release)
            if found == expected:
                break
            await asyncio.sleep(0.5)
    finally:
        await pool.close()
    outcome.detail["alarms"] = len(expected)
    lost(outcome, "alarms", expected, found)
    outcome.duplicated += len(found.keys() - expected.keys())
    if not expected:
        outcome.broken.append("no alarm was raised, though faults were planted")


def _compared(rows: Sequence[Any], one_release: bool) -> dict[str, Any]:
    names: tuple[str, ...] = ("machine_id", "position", "started")
    if one_release:
        names = ("machine_id", "position", "started", "ended", "severity", "component", "explanation", "score")
    return {row["id"]: tuple(row[name] for name in names) for row in rows if one_release or row["position"] >= 0}


async def _needs(database: Any, told: Told, outcome: Outcome) -> None:
    rows = await database.fetch("SELECT id FROM matching.need")
    lost(outcome, "needs", told.needs, {row["id"] for row in rows})
    # Every alarm that a firm's consent covers has led to a need, or joined one.
    missing = await database.fetch(
        "SELECT a.id FROM anomaly.alarm a JOIN matching.consent c ON c.firm_id = a.firm_id AND c.ended IS NULL "
        "WHERE c.given < a.raised AND NOT EXISTS (SELECT FROM matching.need_alarm n WHERE n.alarm_id = a.id) "
        "AND EXISTS (SELECT FROM anomaly.alarm_change h WHERE h.alarm_id = a.id AND h.change = 'raised')"
    )
    outcome.detail["alarms_in_needs"] = await database.fetchval("SELECT count(*) FROM matching.need_alarm")
    if missing:
        outcome.broken.append(f"{len(missing)} alarms are in no need: {[row['id'] for row in missing[:NAMED_MAX]]}")


async def _places(hub: Hub, database: Any, told: Told, outcome: Outcome) -> None:
    matches = await database.fetch("SELECT id, offer_id FROM matching.match")
    lost(outcome, "matches", told.matches, {row["id"]: row["offer_id"] for row in matches})
    declined = await database.fetch("SELECT id FROM matching.offer WHERE state = 'declined'")
    lost(outcome, "declined offers", told.declined, {row["id"] for row in declined})
    if await database.fetchval("SELECT count(*) - count(DISTINCT need_id) FROM matching.match"):
        outcome.broken.append("a need has two matches")
    bookings = {row["id"]: row["state"] for row in await database.fetch("SELECT id, state FROM matching.booking")}
    # Who waited may have been offered a seat since.
    kept = {name: state for name, state in told.bookings.items() if state != "waiting"}
    lost(outcome, "bookings", kept, bookings)
    pool = await create_pool(hub.settings.database_dsn, schema="matching", size_max=1)
    try:
        async with pool.acquire() as connection:
            wrong = [*await places_store.mismatches(connection), *await sessions_store.over_booked(connection)]
    finally:
        await pool.close()
    if wrong:
        outcome.broken.append(
            f"places or seats do not agree with their counts, or are over-committed: {wrong[:NAMED_MAX]}"
        )
    # Every match is known to the fund, too.
    known = {row["id"] for row in await database.fetch("SELECT id FROM funding.match")}
    lost(outcome, "matches at the fund", set(told.matches), known)


async def _pence(hub: Hub, database: Any, told: Told, outcome: Outcome) -> None:
    awards = await database.fetch("SELECT id, grant_pence FROM funding.award")
    lost(outcome, "awards", told.awards, {row["id"]: row["grant_pence"] for row in awards})
    over = await database.fetch(
        "SELECT firm_id FROM funding.award GROUP BY 1 HAVING sum(grant_pence) > $1",
        ASSISTANCE_MAX_PENCE,
    )
    if over:
        outcome.broken.append(f"more than the limit of assistance: {[row['firm_id'] for row in over]}")
    paid = await database.fetch("SELECT id FROM funding.claim WHERE state = 'paid'")
    lost(outcome, "payments", set(told.paid), {row["id"] for row in paid})
    pool = await create_pool(hub.settings.database_dsn, schema="funding", size_max=1)
    try:
        async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            trial, read = await ledger.trial_balance(connection), await replay(connection)
    finally:
        await pool.close()
    overspent = [each for each in trial.accounts if each.kind not in SOURCES and each.balance_pence < 0]
    outcome.detail |= {
        "awards": len(awards),
        "payments": len(paid),
        "trial_balance_pence": trial.total_pence,
        "ledger_events": read.events,
    }
    if trial.total_pence or not trial.in_order:
        outcome.broken.append(f"the trial balance is {trial.total_pence} pence")
    if overspent:
        outcome.broken.append(f"overspent: {[(each.call_id, str(each.kind)) for each in overspent[:NAMED_MAX]]}")
    outcome.broken += [f"replay: {fault}" for fault in read.faults]


def short(text: str) -> str:
    """An error in one line."""
    return re.sub(r"\s+", " ", text)[:500]
