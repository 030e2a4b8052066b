"""The ledger: money moves between accounts by events that are written once, in one line, and never changed.

What the database refuses by itself, whoever asks: a change or removal of an event or transfer, a transfer that does not
balance, an account of money below zero, a fork in the line of hashes, a second event of the same request. This module writes
events in the form that its hashes are made of, and proves from the rows alone that nothing was altered since.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import asyncpg

from services.common.clock import Clock, from_us, to_us
from services.common.database import Connection
from services.common.errors import Conflict, Invalid
from services.common.logs import current_correlation_id
from services.funding.domain import AMOUNT_PENCE_MAX

EVENTS_PER_POST_MAX = 1_000
TRANSFERS_PER_EVENT_MAX = 200
REPLAY_PAGE = 2_000
# Stands where a call's id stands in the accounts of the programme itself.
PROGRAMME = "programme"


class AccountKind(StrEnum):
    """What an account holds. Money comes from the sources, whose balance is never above zero."""

    # Of the programme; calls set up before it had one had their own.
    PUBLIC_SOURCE = "public_source"
    # Of the programme: allotted to no call yet.
    PROGRAMME_BUDGET = "programme_budget"
    # Granted by nobody yet.
    PUBLIC_BUDGET = "public_budget"
    # Promised by awards and not claimed yet.
    PUBLIC_COMMITTED = "public_committed"
    # Earned by claims, and kept back until the project is complete.
    PUBLIC_HELD = "public_held"
    PUBLIC_PAID = "public_paid"
    # Paid, and taken back from the firm.
    PUBLIC_RECOVERED = "public_recovered"
    CO_INVESTMENT_SOURCE = "co_investment_source"
    # Confirmed by co-investors, the project not yet awarded.
    CO_INVESTMENT_PLEDGED = "co_investment_pledged"
    # Confirmed for awarded projects.
    CO_INVESTMENT_COMMITTED = "co_investment_committed"
    # Spent on claimed costs.
    CO_INVESTMENT_PAID = "co_investment_paid"


CALL_KINDS = (
    AccountKind.PUBLIC_BUDGET,
    AccountKind.PUBLIC_COMMITTED,
    AccountKind.PUBLIC_HELD,
    AccountKind.PUBLIC_PAID,
    AccountKind.PUBLIC_RECOVERED,
    AccountKind.CO_INVESTMENT_SOURCE,
    AccountKind.CO_INVESTMENT_PLEDGED,
    AccountKind.CO_INVESTMENT_COMMITTED,
    AccountKind.CO_INVESTMENT_PAID,
)


class Purpose(StrEnum):
    """What a transfer is for; each subject (call, pledge, application, award/cause) has at most one transfer of a purpose."""

    PROGRAMME_GIVEN = "programme_given"
    BUDGET_ALLOTTED = "budget_allotted"
    PLEDGE_CONFIRMED = "pledge_confirmed"
    PLEDGE_RELEASED = "pledge_released"
    PLEDGE_COMMITTED = "pledge_committed"
    GRANT_COMMITTED = "grant_committed"
    CLAIM_PAID = "claim_paid"
    CLAIM_HELD = "claim_held"
    HELD_PAID = "held_paid"
    HELD_RESTORED = "held_restored"
    GRANT_RESTORED = "grant_restored"
    GRANT_RECOVERED = "grant_recovered"
    BUSINESS_PAID = "business_paid"
    BUSINESS_RESTORED = "business_restored"


class Overdrawn(Conflict):
    """An account does not hold that much; nothing was moved."""

    REASON = "BUDGET_EXHAUSTED"


class RequestIdReused(Conflict):
    """This request id was used before with other content; use a new one for a new request."""

    REASON = "REQUEST_ID_REUSED"


@dataclass(frozen=True)
class Account:
    call_id: str
    kind: AccountKind

    def __str__(self) -> str:
        return f"{self.call_id}/{self.kind}"


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """`amount_pence` from the debited to the credited account. Balance = credits - debits."""

    debit: Account
    credit: Account
    amount_pence: int
    purpose: str
    subject_id: str


@dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happens to the money; all its transfers or none. `request_id` is the key by which a repeat is known."""

    request_id: str
    kind: str
    transfers: tuple[Transfer, ...]
    credential_id: int

    def content_sha256(self) -> bytes:
        """What a repeat must have in common with the first."""
        return _sha256([self.request_id, self.kind, [_transfer_content(item) for item in self.transfers]])


@dataclass(frozen=True, kw_only=True)
class Posted:
    """Where an event stands in the line."""

    sequence: int
    hash: bytes
    repeated: bool = False


@dataclass(frozen=True, kw_only=True)
class AccountBalance:
    """A running balance beside the sums of the transfers that it stands for."""

    call_id: str
    kind: AccountKind
    debits_pence: int
    credits_pence: int
    balance_pence: int

    @property
    def agrees(self) -> bool:
        return self.balance_pence == self.credits_pence - self.debits_pence


@dataclass(frozen=True, kw_only=True)
class TrialBalance:
    """Every account. In order: the total is zero and each balance is what its transfers make."""

    accounts: tuple[AccountBalance, ...]
    total_pence: int
    events: int
    head_hash: str

    @property
    def in_order(self) -> bool:
        return self.total_pence == 0 and all(account.agrees for account in self.accounts)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The outcome of reading the whole ledger again; `faults` names, in plain words, what does not hold."""

    events: int
    transfers: int
    head_hash: str
    faults: tuple[str, ...]


def event_hash(
    *, sequence: int, previous_hash: bytes, recorded_us: int, credential_id: int, correlation_id: str, content: bytes
) -> bytes:
    """Hash of an event: everything stored of it, and the hash before it."""
    return _sha256([sequence, previous_hash.hex(), recorded_us, credential_id, correlation_id, content.hex()])


def _transfer_content(transfer: Transfer) -> list[str | int]:
    return [
        str(transfer.debit),
        str(transfer.credit),
        transfer.amount_pence,
        transfer.purpose,
        transfer.subject_id,
    ]


def _sha256(content: object) -> bytes:
    return hashlib.sha256(json.dumps(content, separators=(",", ":"), ensure_ascii=True).encode()).digest()


async def open_accounts(connection: Connection, call_id: str) -> None:
    """The accounts of a call, all at zero; those that are there stay as they are."""
    await connection.execute(
        "INSERT INTO ledger_account (call_id, kind) SELECT $1, unnest($2::text[]) ON CONFLICT DO NOTHING",
        call_id,
        [*CALL_KINDS],
    )


async def lock(connection: Connection) -> Posted:
    """Wait for the turn, and return the newest event: until the transaction ends nobody else posts, so what is read after this
    is what a post will meet.

    Always the last lock that is waited for: who holds it waits for no row of a call or application.
    """
    row = await connection.fetchrow("SELECT sequence, hash FROM ledger_head FOR UPDATE")
    assert row is not None, "the migration makes the head"
    return Posted(sequence=row["sequence"], hash=row["hash"])


async def post(connection: Connection, clock: Clock, *events: Event) -> list[Posted]:
    """Write events, in order, in the caller's transaction, and move the balances.

    An event whose request id is there already with the same content is answered with the first; so a repeat after an unknown
    outcome is safe. Raises RequestIdReused when the content differs, Overdrawn when an account does not hold the money (the
    transaction is then to be given up), Invalid for an amount that is not in 1 to AMOUNT_PENCE_MAX.
    """
    _check(events)
    newest = await lock(connection)
    sequence, previous = newest.sequence, newest.hash
    known = await _known(connection, events)
    recorded_us, correlation_id = clock.now_us(), current_correlation_id()
    answers: list[Posted] = []
    fresh: list[tuple[Event, bytes, bytes, Posted]] = []
    for event in events:
        content = event.content_sha256()
        if event.request_id in known:
            first_content, first = known[event.request_id]
            if first_content != content:
                raise RequestIdReused()
            answers.append(first)
            continue
        sequence += 1
        made = event_hash(
            sequence=sequence,
            previous_hash=previous,
            recorded_us=recorded_us,
            credential_id=event.credential_id,
            correlation_id=correlation_id,
            content=content,
        )
        posted = Posted(sequence=sequence, hash=made)
        fresh.append((event, content, previous, posted))
        known[event.request_id] = content, Posted(sequence=sequence, hash=made, repeated=True)
        answers.append(posted)
        previous = made
    if fresh:
        await _write(connection, fresh, recorded_us=recorded_us, correlation_id=correlation_id)
    return answers


def _check(events: Sequence[Event]) -> None:
    assert len(events) <= EVENTS_PER_POST_MAX, "more events than one post takes"
    for event in events:
        assert 0 < len(event.transfers) <= TRANSFERS_PER_EVENT_MAX, "an event has some transfers, and not too many"
        for transfer in event.transfers:
            if not 0 < transfer.amount_pence <= AMOUNT_PENCE_MAX:
                raise Invalid(
                    f"An amount is from 1 to {AMOUNT_PENCE_MAX} pence, not {transfer.amount_pence}.",
                    reason="AMOUNT_OUT_OF_RANGE",
                )


async def _known(connection: Connection, events: Sequence[Event]) -> dict[str, tuple[bytes, Posted]]:
    rows = await connection.fetch(
        "SELECT request_id, content_sha256, sequence, hash FROM ledger_event WHERE request_id = ANY($1::text[])",
        [event.request_id for event in events],
    )
    return {
        row["request_id"]: (
            row["content_sha256"],
            Posted(sequence=row["sequence"], hash=row["hash"], repeated=True),
        )
        for row in rows
    }


async def _write(
    connection: Connection,
    fresh: Sequence[tuple[Event, bytes, bytes, Posted]],
    *,
    recorded_us: int,
    correlation_id: str,
) -> None:
    transfers = [
        (posted.sequence, position, item)
        for event, _, _, posted in fresh
        for position, item in enumerate(event.transfers)
    ]
    try:
        # One statement: while it runs, nobody else can post.
        written = await connection.execute(
            "WITH event AS (INSERT INTO ledger_event "
            "  (sequence, request_id, content_sha256, kind, recorded, credential_id, correlation_id, previous_hash, hash) "
            "  SELECT e.sequence, e.request_id, e.content, e.kind, $7, e.credential_id, $8, e.previous_hash, e.hash "
            "  FROM unnest($1::bigint[], $2::text[], $3::bytea[], $4::text[], $5::bigint[], $6::bytea[], $9::bytea[]) "
            "    AS e (sequence, request_id, content, kind, credential_id, previous_hash, hash) ORDER BY e.sequence) "
            "INSERT INTO ledger_transfer "
            "  (event_sequence, position, debit_account, credit_account, amount_pence, purpose, subject_id) "
            "SELECT t.sequence, t.position, debit.id, credit.id, t.amount_pence, t.purpose, t.subject_id "
            "FROM unnest($10::bigint[], $11::smallint[], $12::text[], $13::text[], $14::text[], $15::text[], $16::bigint[], "
            "    $17::text[], $18::text[]) AS t (sequence, position, debit_call, debit_kind, credit_call, credit_kind, "
            "    amount_pence, purpose, subject_id) "
            "JOIN ledger_account debit ON debit.call_id = t.debit_call AND debit.kind = t.debit_kind "
            "JOIN ledger_account credit ON credit.call_id = t.credit_call AND credit.kind = t.credit_kind "
            "ORDER BY t.sequence, t.position",
            [posted.sequence for *_, posted in fresh],
            [event.request_id for event, *_ in fresh],
            [content for _, content, _, _ in fresh],
            [event.kind for event, *_ in fresh],
            [event.credential_id for event, *_ in fresh],
            [previous for _, _, previous, _ in fresh],
            from_us(recorded_us),
            correlation_id,
            [posted.hash for *_, posted in fresh],
            [sequence for sequence, _, _ in transfers],
            [position for _, position, _ in transfers],
            [item.debit.call_id for *_, item in transfers],
            [item.debit.kind for *_, item in transfers],
            [item.credit.call_id for *_, item in transfers],
            [item.credit.kind for *_, item in transfers],
            [item.amount_pence for *_, item in transfers],
            [item.purpose for *_, item in transfers],
            [item.subject_id for *_, item in transfers],
        )
    except asyncpg.CheckViolationError as error:
        if error.constraint_name == "ledger_account_balance_pence_check":
            raise Overdrawn() from error
        raise
    assert written == f"INSERT 0 {len(transfers)}", f"a transfer names an account that is not open: {written}"


async def balances(connection: Connection, call_id: str | None = None) -> Mapping[AccountKind, int]:
    """Running balances by kind of account, of one call or of the whole fund."""
    rows = await connection.fetch(
        "SELECT kind, sum(balance_pence)::bigint AS pence FROM ledger_account "
        "WHERE $1::text IS NULL OR call_id = $1 GROUP BY kind",
        call_id,
    )
    return defaultdict(int, {AccountKind(row["kind"]): row["pence"] for row in rows})


def public_promised(balances: Mapping[AccountKind, int]) -> int:
    """What awards promise, the part that is held or paid included."""
    kinds = (AccountKind.PUBLIC_COMMITTED, AccountKind.PUBLIC_HELD, AccountKind.PUBLIC_PAID)
    return sum(balances[kind] for kind in kinds)


def business_promised(balances: Mapping[AccountKind, int]) -> int:
    """Business money beside awards, the part that is spent included."""
    return balances[AccountKind.CO_INVESTMENT_COMMITTED] + balances[AccountKind.CO_INVESTMENT_PAID]


async def is_posted(connection: Connection, request_id: str) -> bool:
    """Whether the event of this request is there."""
    return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM ledger_event WHERE request_id = $1)", request_id))


async def trial_balance(connection: Connection) -> TrialBalance:
    """Every account with its debits and credits, as of one moment."""
    rows = await connection.fetch(
        "WITH moved AS ("
        "  SELECT debit_account AS id, amount_pence AS debit, 0 AS credit FROM ledger_transfer "
        "  UNION ALL SELECT credit_account, 0, amount_pence FROM ledger_transfer), "
        "summed AS (SELECT id, sum(debit)::bigint AS debits, sum(credit)::bigint AS credits FROM moved GROUP BY id) "
        "SELECT a.call_id, a.kind, a.balance_pence, coalesce(s.debits, 0) AS debits, coalesce(s.credits, 0) AS credits, "
        "  h.sequence, h.hash "
        "FROM ledger_head h LEFT JOIN ledger_account a ON true LEFT JOIN summed s ON s.id = a.id ORDER BY a.id"
    )
    accounts = tuple(
        AccountBalance(
            call_id=row["call_id"],
            kind=AccountKind(row["kind"]),
            debits_pence=row["debits"],
            credits_pence=row["credits"],
            balance_pence=row["balance_pence"],
        )
        for row in rows
        if row["call_id"] is not None
    )
    return TrialBalance(
        accounts=accounts,
        total_pence=sum(account.balance_pence for account in accounts),
        events=rows[0]["sequence"],
        head_hash=rows[0]["hash"].hex(),
    )


async def replay(connection: Connection) -> Replay:
    """Read every event from the first, rebuild hashes and balances from the rows, and compare with what is stored.

    Run it in a REPEATABLE READ transaction, else events posted meanwhile look like faults.
    """
    reading = _Reading()
    after = -1
    while True:
        events = await connection.fetch(
            "SELECT * FROM ledger_event WHERE sequence > $1 ORDER BY sequence LIMIT $2", after, REPLAY_PAGE
        )
        if not events:
            break
        last = events[-1]["sequence"]
        transfers = await connection.fetch(
            "SELECT t.*, d.call_id AS debit_call, d.kind AS debit_kind, c.call_id AS credit_call, c.kind AS credit_kind "
            "FROM ledger_transfer t JOIN ledger_account d ON d.id = t.debit_account "
            "JOIN ledger_account c ON c.id = t.credit_account "
            "WHERE event_sequence > $1 AND event_sequence <= $2 ORDER BY event_sequence, position",
            after,
            last,
        )
        reading.take(events, transfers)
        after = last
    head = await connection.fetchrow("SELECT sequence, hash FROM ledger_head")
    accounts = await connection.fetch("SELECT call_id, kind, balance_pence FROM ledger_account ORDER BY id")
    stored_transfers = await connection.fetchval("SELECT count(*) FROM ledger_transfer")
    return reading.finish(head, accounts, stored_transfers)


class _Reading:
    """What a replay has seen so far."""

    def __init__(self) -> None:
        self._sequence = -1
        self._hash = b""
        self._transfers = 0
        self._balances: dict[Account, int] = defaultdict(int)
        self._faults: list[str] = []

    def take(self, events: Sequence[asyncpg.Record], transfers: Sequence[asyncpg.Record]) -> None:
        by_event: dict[int, list[Transfer]] = defaultdict(list)
        for row in transfers:
            transfer = Transfer(
                debit=Account(row["debit_call"], AccountKind(row["debit_kind"])),
                credit=Account(row["credit_call"], AccountKind(row["credit_kind"])),
                amount_pence=row["amount_pence"],
                purpose=row["purpose"],
                subject_id=row["subject_id"],
            )
            by_event[row["event_sequence"]].append(transfer)
            self._balances[transfer.debit] -= transfer.amount_pence
            self._balances[transfer.credit] += transfer.amount_pence
            self._transfers += 1
        for row in events:
            self._take_event(row, tuple(by_event.get(row["sequence"], ())))

    def _take_event(self, row: asyncpg.Record, transfers: tuple[Transfer, ...]) -> None:
        sequence = row["sequence"]
        if sequence != self._sequence + 1:
            self._faults.append(f"events {self._sequence + 1} to {sequence - 1} are missing")
        if sequence > 0:
            event = Event(
                request_id=row["request_id"],
                kind=row["kind"],
                transfers=transfers,
                credential_id=row["credential_id"],
            )
            content = event.content_sha256()
            expected = event_hash(
                sequence=sequence,
                previous_hash=self._hash,
                recorded_us=to_us(row["recorded"]),
                credential_id=row["credential_id"],
                correlation_id=row["correlation_id"],
                content=content,
            )
            if row["previous_hash"] != self._hash:
                self._faults.append(f"event {sequence} does not follow the event before it")
            if row["content_sha256"] != content or row["hash"] != expected:
                self._faults.append(f"event {sequence} or one of its transfers was altered after it was written")
        self._sequence, self._hash = sequence, row["hash"]

    def finish(self, head: asyncpg.Record | None, accounts: Sequence[asyncpg.Record], stored_transfers: int) -> Replay:
        if head is None or (head["sequence"], head["hash"]) != (self._sequence, self._hash):
            self._faults.append(
                f"the newest event is not the one that the head names; {self._sequence} is the last there"
            )
        if stored_transfers != self._transfers:
            self._faults.append(f"{stored_transfers - self._transfers} transfers belong to no event")
        for row in accounts:
            account = Account(row["call_id"], AccountKind(row["kind"]))
            rebuilt = self._balances.pop(account, 0)
            if rebuilt != row["balance_pence"]:
                self._faults.append(f"{account} shows {row['balance_pence']} pence, its transfers make {rebuilt}")
        self._faults.extend(f"{account} has transfers but is not there" for account in self._balances)
        return Replay(
            events=self._sequence,
            transfers=self._transfers,
            head_hash=self._hash.hex(),
            faults=tuple(self._faults),
        )
