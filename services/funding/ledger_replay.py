"""Reading the whole ledger again: hashes, balances and what awards came to, rebuilt from the rows alone and compared with what is
stored."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import asyncpg

from services.common.clock import to_us
from services.common.database import Connection
from services.funding.ledger import Account, AccountKind, Event, Purpose, Transfer, event_hash

_LEDGER_EVENT_ROWS = (
    "SELECT sequence, request_id, content_sha256, kind, recorded, credential_id, correlation_id, previous_hash, hash FROM "
    "ledger_event "
)
REPLAY_PAGE = 2_000
# Figures of an award that transfers of a purpose move, up or down; their subject begins with the award's id.
_AWARD_FIGURES: Mapping[str, Mapping[str, int]] = {
    Purpose.CLAIM_PAID: {"paid_pence": 1},
    Purpose.CLAIM_HELD: {"held_pence": 1},
    Purpose.HELD_PAID: {"paid_pence": 1, "held_pence": -1},
    Purpose.HELD_RESTORED: {"held_pence": -1, "restored_pence": 1},
    Purpose.GRANT_RESTORED: {"restored_pence": 1},
    Purpose.GRANT_RECOVERED: {"recovered_pence": 1},
    Purpose.BUSINESS_PAID: {"business_paid_pence": 1},
}


@dataclass(frozen=True, kw_only=True)
class Replay:
    """The outcome of reading the whole ledger again; `faults` names, in plain words, what does not hold."""

    events: int
    transfers: int
    head_hash: str
    faults: tuple[str, ...]


async def replay(connection: Connection) -> Replay:
    """Read every event from the first, rebuild hashes, balances and figures of awards, and compare with what is stored.

    Run it in a REPEATABLE READ transaction, else events posted meanwhile look like faults.
    """
    reading = _Reading()
    after = -1
    while True:
        events = await connection.fetch(
            _LEDGER_EVENT_ROWS + "WHERE sequence > $1 ORDER BY sequence LIMIT $2", after, REPLAY_PAGE
        )
        if not events:
            break
        last = events[-1]["sequence"]
        transfers = await connection.fetch(
            "SELECT t.event_sequence, t.position, t.debit_account, t.credit_account, t.amount_pence, t.purpose, "
            "t.subject_id, d.call_id AS debit_call, d.kind AS debit_kind, c.call_id AS credit_call, c.kind AS credit_kind "
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
    awards = await connection.fetch(
        "SELECT award_id, paid_pence, held_pence, restored_pence, recovered_pence, business_paid_pence FROM agreement "
        "ORDER BY award_id"
    )
    return reading.finish(head, accounts, stored_transfers, awards)


class _Reading:
    """What a replay has seen so far."""

    def __init__(self) -> None:
        self._sequence = -1
        self._hash = b""
        self._transfers = 0
        self._balances: dict[Account, int] = defaultdict(int)
        self._awards: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
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
            for figure, sign in _AWARD_FIGURES.get(transfer.purpose, {}).items():
                self._awards[transfer.subject_id.partition("/")[0]][figure] += sign * transfer.amount_pence
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

    def finish(
        self,
        head: asyncpg.Record | None,
        accounts: Sequence[asyncpg.Record],
        stored_transfers: int,
        awards: Sequence[asyncpg.Record],
    ) -> Replay:
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
        for row in awards:
            made = self._awards.pop(row["award_id"], {})
            self._faults.extend(
                f"award {row['award_id']} shows {shown} pence as {figure}, its transfers make {made.get(figure, 0)}"
                for figure, shown in row.items()
                if figure != "award_id" and shown != made.get(figure, 0)
            )
        self._faults.extend(f"award {award_id} has transfers but is not there" for award_id in self._awards)
        return Replay(
            events=self._sequence,
            transfers=self._transfers,
            head_hash=self._hash.hex(),
            faults=tuple(self._faults),
        )
