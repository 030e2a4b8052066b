"""The ledger: money moves between accounts by events that are written once, in one line, and never changed.

What the database refuses by itself, whoever asks: a change or removal of an event or transfer, a transfer that does not
balance, an account of money below zero, a fork in the line of hashes, a second event of the same request. This module writes
events in the form that its hashes are made of, and proves from the rows alone that nothing was altered since.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import asyncpg

from services.common.clock import Clock, from_us
from services.common.database import Connection
from services.common.errors import Conflict, HubError, Invalid
from services.common.logs import current_correlation_id
from services.funding.domain import AMOUNT_PENCE_MAX

EVENTS_PER_POST_MAX = 1_000
TRANSFERS_PER_EVENT_MAX = 200
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
    BUDGET_MOVED = "budget_moved"
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


class AccountUnknown(Conflict):
    """A transfer names an account that is not open; nothing was moved."""

    REASON = "ACCOUNT_UNKNOWN"


class AlreadyMoved(Conflict):
    """This was moved already, by another request: each subject has one transfer of a purpose. Nothing was moved again."""

    REASON = "ALREADY_MOVED"


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


def event_hash(
    *, sequence: int, previous_hash: bytes, recorded_us: int, credential_id: int, correlation_id: str, content: bytes
) -> bytes:
    """Hash of an event: everything stored of it, and the hash before it. `post_events` makes the same."""
    hashed = _hashed(recorded_us, credential_id, correlation_id, content)
    return hashlib.sha256(f'[{sequence},"{previous_hash.hex()}",{hashed}'.encode()).digest()


def _hashed(recorded_us: int, credential_id: int, correlation_id: str, content: bytes) -> str:
    """What an event's hash is made of, behind sequence and hash before: JSON, up to the closing bracket."""
    return f'{recorded_us},{credential_id},{json.dumps(correlation_id)},"{content.hex()}"]'


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
    outcome is safe. Raises RequestIdReused when the content differs, Overdrawn when an account does not hold the money at an
    event's turn (the transaction is then to be given up), Invalid for an amount that is not in 1 to AMOUNT_PENCE_MAX.
    """
    entries: dict[str, Entry] = {}
    for event in events:
        entry = entered(event)
        if entries.setdefault(event.request_id, entry).content != entry.content:
            raise RequestIdReused()
    found = dict(zip(entries, await write(connection, clock, list(entries.values())), strict=True))
    answers = []
    for event in events:
        outcome = found[event.request_id]
        if isinstance(outcome, HubError):
            raise outcome
        answers.append(outcome)
        found[event.request_id] = replace(outcome, repeated=True)
    return answers


@dataclass(frozen=True, slots=True)
class Entry:
    """An event on its way into the ledger, with what its hash will be made of."""

    event: Event
    content: bytes
    correlation_id: str


def entered(event: Event) -> Entry:
    """The event under the correlation id of what is being done. Raises Invalid for an amount out of range."""
    assert 0 < len(event.transfers) <= TRANSFERS_PER_EVENT_MAX, "an event has some transfers, and not too many"
    for transfer in event.transfers:
        if not 0 < transfer.amount_pence <= AMOUNT_PENCE_MAX:
            raise Invalid(
                f"An amount is from 1 to {AMOUNT_PENCE_MAX} pence, not {transfer.amount_pence}.",
                reason="AMOUNT_OUT_OF_RANGE",
            )
    return Entry(event, event.content_sha256(), current_correlation_id())


async def write(connection: Connection, clock: Clock, entries: Sequence[Entry]) -> list[Posted | HubError]:
    """Write entries of different request ids in one call; what became of each. Those that are refused change nothing and do not
    touch the others. Outside of a transaction it is one by itself."""
    assert len(entries) <= EVENTS_PER_POST_MAX, "more events than one post takes"
    if not entries:
        return []
    recorded_us = clock.now_us()
    accounts: dict[Account, int] = {}
    transfers = [transfer for entry in entries for transfer in entry.event.transfers]
    for transfer in transfers:
        accounts.setdefault(transfer.debit, len(accounts) + 1)
        accounts.setdefault(transfer.credit, len(accounts) + 1)
    try:
        rows = await connection.fetch(
            "SELECT * FROM post_events($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15)",
            [entry.event.request_id for entry in entries],
            [entry.content for entry in entries],
            [entry.event.kind for entry in entries],
            [entry.event.credential_id for entry in entries],
            [entry.correlation_id for entry in entries],
            [_hashed(recorded_us, entry.event.credential_id, entry.correlation_id, entry.content) for entry in entries],
            [len(entry.event.transfers) for entry in entries],
            [account.call_id for account in accounts],
            [account.kind for account in accounts],
            [accounts[transfer.debit] for transfer in transfers],
            [accounts[transfer.credit] for transfer in transfers],
            [transfer.amount_pence for transfer in transfers],
            [transfer.purpose for transfer in transfers],
            [transfer.subject_id for transfer in transfers],
            from_us(recorded_us),
        )
    except asyncpg.UniqueViolationError as error:
        if error.constraint_name == "ledger_transfer_purpose_subject_id_key":
            raise AlreadyMoved() from error
        raise
    return [_outcome(*row) for row in rows]


def _outcome(word: str, sequence: int | None, made: bytes | None) -> Posted | HubError:
    if word in ("posted", "repeated"):
        assert sequence is not None, "what is written has its place"
        assert made is not None, "what is written has its hash"
        return Posted(sequence=sequence, hash=made, repeated=word == "repeated")
    refusals: dict[str, type[HubError]] = {
        "reused": RequestIdReused,
        "overdrawn": Overdrawn,
        "unknown_account": AccountUnknown,
    }
    return refusals[word]()


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
