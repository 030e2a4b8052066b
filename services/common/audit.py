"""What people and partners change through the doors: an append-only log in the database of each service.

Every request that may change something is noted, also a refused one, with who asked and what came of it. The answer waits for its
entry, but not for a database that is away: then entries wait here, bounded, and the log of the process has them in any case.
"""

import asyncio
import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import asyncpg
from prometheus_client import Counter

from services.common.clock import Clock, from_us
from services.common.database import AWAY, Pool, transaction
from services.common.errors import HubError, Invalid, TryAgain
from services.common.identity import Caller, Role
from services.common.limits import Allowances
from services.common.logs import current_correlation_id, get_logger
from services.common.texts import showable

log = get_logger(__name__)

WAIT_S = 2.0
RETRY_DELAY_S = 1.0
WAITING_MAX = 10_000
BATCH_MAX = 500
PAGE_SIZE_MAX = 1_000
PAGE_SIZE_DEFAULT = 100
BODY_BYTES_MAX = 256 * 1024
IDS_MAX = 20
# Of all ids of an entry, with their names; what is named first is kept.
IDS_CHARACTERS_MAX = 4_000
# Entries that say only that somebody was refused, of each caller: they cost who sends them nothing.
REFUSALS_AT_ONCE = 1_000
REFUSALS_PER_S = 1.0
ADDRESS_CHARACTERS_MAX = 64

_ID_NAME = re.compile(r"[a-z][a-z_]{0,40}_ids?|id")
_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
# Calls that change nothing, by how their names begin.
_READS = re.compile(
    r"Get|List|Check|PreCheck|Preview|ProposeAssessors|Watch|Explain|Diagnose|History|Latest|Plot|Export|TrialBalance"
)

# Entries by what became of them: kept, lost because too many waited, refused by the database, or left out because their caller was
# refused too often (the process's own log has all of them).
entries_total = Counter("smdih_change_log_entries_total", "Entries of the change log", ["outcome"])
for _outcome in ("kept", "lost", "refused", "left_out"):
    entries_total.labels(_outcome)

# Outcomes that do not say that nothing was changed.
_MAY_HAVE_CHANGED = frozenset({"OK", "BROKEN_OFF", HubError.REASON, TryAgain.REASON})


# What the database says of an entry that it will never take.
UNWRITABLE = (Invalid, asyncpg.IntegrityConstraintViolationError)


@dataclass(frozen=True)
class Change:
    """`shown`: what of the key may be shown, or the token's subject. `ids`: what was named in the request, and what was made."""

    at_us: int
    caller: Caller
    shown: str
    action: str
    ids: Mapping[str, Any]
    outcome: str
    correlation_id: str
    address: str


@dataclass(frozen=True)
class Entry:
    id: int
    at: datetime
    role: str
    credential_id: int
    shown: str
    firm_id: int
    partner_id: int
    provider_id: str
    action: str
    ids: Mapping[str, Any]
    outcome: str
    correlation_id: str
    address: str


class ChangeLog:
    """Of one process. Entries are written in groups, in the order in which they came.

    `apart`: actions that are not noted here, such as telemetry, which must not wait for the database.
    """

    def __init__(self, pool: Pool, *, clock: Clock, apart: Collection[str] = ()) -> None:
        self._pool = pool
        self._apart = frozenset(apart)
        self._clock = clock
        self._waiting: deque[tuple[Change, asyncio.Future[None]]] = deque()
        self._came = asyncio.Event()
        self._refusals = Allowances()

    async def note(
        self, caller: Caller, *, shown: str, action: str, ids: Mapping[str, Any], outcome: str, address: str
    ) -> None:
        """Return once the entry is kept, or after WAIT_S. Gateways are not noted: what they send is telemetry."""
        if caller.role is Role.DEVICE or action in self._apart:
            return
        change = Change(
            at_us=self._clock.now_us(),
            caller=caller,
            shown=showable(shown),
            action=showable(action),
            ids=ids,
            outcome=showable(outcome),
            correlation_id=current_correlation_id(),
            address=showable(address[:ADDRESS_CHARACTERS_MAX]),
        )
        log.info(
            "change", role=caller.role, credential=caller.credential_id, action=action, ids=dict(ids), outcome=outcome
        )
        if outcome not in _MAY_HAVE_CHANGED and self._refusals.take(
            caller.credential_id, per_s=REFUSALS_PER_S, most=REFUSALS_AT_ONCE
        ):
            entries_total.labels("left_out").inc()
            return
        if len(self._waiting) >= WAITING_MAX:
            entries_total.labels("lost").inc()
            return
        kept: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((change, kept))
        self._came.set()
        await asyncio.wait([kept], timeout=WAIT_S)

    async def run(self) -> None:
        while True:
            await self._came.wait()
            self._came.clear()
            while self._waiting:
                try:
                    await self._write_some()
                except (*AWAY, asyncpg.PostgresError, HubError) as error:
                    log.warning("change log waits", waiting=len(self._waiting), error=repr(error))
                    await asyncio.sleep(RETRY_DELAY_S)

    async def close(self) -> None:
        """Write what waits, if the database takes it."""
        try:
            while self._waiting:
                await self._write_some()
        except (*AWAY, asyncpg.PostgresError, HubError) as error:
            log.error("change log not written", entries=len(self._waiting), error=repr(error))

    async def _write_some(self) -> None:
        some = [self._waiting[index][0] for index in range(min(len(self._waiting), BATCH_MAX))]
        try:
            await self._insert(some)
        except UNWRITABLE:
            # One of them; the others are written, and nothing waits behind it for ever.
            for one in some:
                try:
                    await self._insert([one])
                except UNWRITABLE as error:
                    log.error(
                        "change not kept", action=one.action, credential=one.caller.credential_id, error=repr(error)
                    )
                    self._settle(1, "refused")
                else:
                    self._settle(1, "kept")
        else:
            self._settle(len(some), "kept")

    def _settle(self, count: int, outcome: str) -> None:
        for _ in range(count):
            _, kept = self._waiting.popleft()
            entries_total.labels(outcome).inc()
            if not kept.done():
                kept.set_result(None)

    async def _insert(self, some: Sequence[Change]) -> None:
        async with transaction(self._pool) as connection:
            await connection.executemany(
                "INSERT INTO change_log (at, role, credential_id, shown, firm_id, partner_id, provider_id, action, ids, "
                "outcome, correlation_id, address) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)",
                [
                    (
                        from_us(one.at_us),
                        one.caller.role.value,
                        one.caller.credential_id,
                        one.shown,
                        one.caller.firm_id,
                        one.caller.partner_id,
                        one.caller.provider_id,
                        one.action,
                        json.dumps(dict(one.ids)),
                        one.outcome,
                        one.correlation_id,
                        one.address,
                    )
                    for one in some
                ],
            )

    async def page(
        self, caller: Caller, *, firm_id: int, credential_id: int, page_size: int, page_token: str
    ) -> tuple[Sequence[Entry], str]:
        """For operators: newest first, and the token of the next page. 0: of all firms, of all credentials."""
        caller.require(Role.OPERATOR)
        if page_size < 0:
            raise Invalid("page_size: 0 or more.")
        if not re.fullmatch(r"[0-9]{0,18}", page_token):
            raise Invalid("page_token: send back exactly what the page before gave.")
        limit = min(page_size or PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT id, at, role, credential_id, shown, firm_id, partner_id, provider_id, action, ids, outcome, "
                "correlation_id, address FROM change_log WHERE ($1::bigint = 0 OR firm_id = $1) "
                "AND ($2::bigint = 0 OR credential_id = $2) AND ($3::bigint = 0 OR id < $3) ORDER BY id DESC LIMIT $4",
                firm_id,
                credential_id,
                int(page_token or 0),
                limit + 1,
            )
        found = [Entry(**dict(row) | {"ids": json.loads(row["ids"])}) for row in rows[:limit]]
        return found, str(found[-1].id) if len(rows) > limit else ""


def changes_by_http(method: str) -> bool:
    return method in ("POST", "PUT", "PATCH", "DELETE")


def changes_by_call(method: str) -> bool:
    """Of "/package.Service/Method"."""
    return _READS.match(method.rpartition("/")[2]) is None


def ids_in(parts: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Of names and values those that are ids, and nothing else: no text that somebody wrote, and never a key."""
    found: dict[str, Any] = {}
    left = IDS_CHARACTERS_MAX
    for name, value in parts:
        if len(found) == IDS_MAX:
            break
        if not _ID_NAME.fullmatch(name):
            continue
        is_list = isinstance(value, list | tuple)
        ids = [one for one in (value[:IDS_MAX] if is_list else [value]) if _is_id(one)]
        left -= sum(len(name) + len(str(one)) for one in ids)
        if left < 0:
            break
        if ids:
            found[name] = ids if is_list else ids[0]
    return found


def ids_in_json(data: bytes) -> dict[str, Any]:
    """Of the top level of a document; none where it is not one."""
    if not data or len(data) > BODY_BYTES_MAX:
        return {}
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return ids_in(document.items()) if isinstance(document, dict) else {}


def _is_id(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_ID.fullmatch(value)) and not value.startswith("smdih_")
    return type(value) is int and value != 0 and -(2**63) <= value < 2**63
