"""What happened to a firm's applications and awards while it was not there, in a sentence each, with what to do now.

Nothing is written for it: the audit record has it all, and what concerns the firm is told from there.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from services.common.database import Pool, transaction
from services.common.errors import Invalid
from services.common.identity import Caller, Role
from services.funding.paging import page_size_of
from services.funding.rules.exact import gbp

ID_MAX = 2**63 - 1

_TOKEN = re.compile(r"[0-9]{1,18}", re.ASCII)


class NoticeKind(StrEnum):
    """What others did, or the hub; named like the entry of the audit record."""

    APPLICATION_AWARDED = "application_awarded"
    APPLICATION_REJECTED = "application_rejected"
    MATCH_ENDED = "match_ended"
    MATCH_REPLACED = "match_replaced"
    PLEDGE_CONFIRMED = "pledge_confirmed"
    POOL_PAID = "pool_paid"
    MILESTONES_SET = "milestones_set"
    MILESTONE_MET = "milestone_met"
    CLAIM_DECIDED = "claim_decided"
    CLAIM_REJECTED = "claim_rejected"
    CLAIM_LAPSED = "claim_lapsed"
    CLAIM_PAID = "claim_paid"
    CHANGE_APPROVED = "change_approved"
    CHANGE_REFUSED = "change_refused"
    AWARD_WITHDRAWN = "award_withdrawn"
    AWARD_LAPSED = "award_lapsed"
    GRANT_RECOVERED = "grant_recovered"


_Detail = Mapping[str, Any]

_TEXTS: Mapping[NoticeKind, Callable[[_Detail], str]] = {
    NoticeKind.APPLICATION_AWARDED: lambda it: (
        f"The grant is awarded: {it['reason']}. Accept the offer, with your dates."
    ),
    NoticeKind.APPLICATION_REJECTED: lambda it: (
        f"The application is rejected: {it['reason']}. Its match is free for an application to another call."
    ),
    NoticeKind.MATCH_ENDED: lambda _: (
        "The match was cancelled or has expired. Accept another offer for the same need, and the application goes on."
    ),
    NoticeKind.MATCH_REPLACED: lambda _: "The application goes on with your new match.",
    NoticeKind.PLEDGE_CONFIRMED: lambda it: f"A pledge of {gbp(it['pence'])} is confirmed.",
    NoticeKind.POOL_PAID: lambda it: f"Co-investors of the call pay {gbp(it['pence'])}.",
    NoticeKind.MILESTONES_SET: lambda it: f"The project has {it['count']} milestones now; look when they are due.",
    NoticeKind.MILESTONE_MET: lambda it: f"Milestone {it['milestone_id']} is met.",
    NoticeKind.CLAIM_DECIDED: lambda it: (
        f"The claim is accepted: {gbp(it['payable_pence'])} is payable, once a second person has looked at it."
    ),
    NoticeKind.CLAIM_REJECTED: lambda it: (
        f"The claim is rejected: {it['reason']}."
        + (f" Send a corrected one for the same period by {it['correct_until']}." if it.get("correct_until") else "")
    ),
    NoticeKind.CLAIM_LAPSED: lambda it: f"The claim came too late and lapsed: {it['reason']}.",
    NoticeKind.CLAIM_PAID: lambda it: f"The claim is settled: {gbp(it['paid_pence'])} is paid.",
    NoticeKind.CHANGE_APPROVED: lambda it: f"The change that you asked for ({it['kind']}) is approved and holds.",
    NoticeKind.CHANGE_REFUSED: lambda it: (
        f"The change that you asked for ({it['kind']}) is refused; the list of changes says why."
    ),
    NoticeKind.AWARD_WITHDRAWN: lambda it: (
        f"The award is given up: {it['reason']}. What is not paid returned to the call."
    ),
    NoticeKind.AWARD_LAPSED: lambda it: f"The award is closed without a final claim: {it['reason']}.",
    NoticeKind.GRANT_RECOVERED: lambda it: f"{gbp(it['amount_pence'])} of the grant was paid back: {it['reason']}.",
}


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Newer ones have higher ids."""

    id: int
    at: datetime
    kind: NoticeKind
    application_id: str
    # Once there is an award.
    award_id: str
    text: str
    correlation_id: str


class NoticeService:
    """Reads. Raises Forbidden for all but firms, who see their own."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list_notices(
        self, caller: Caller, *, after_id: int, page_size: int, page_token: str
    ) -> tuple[list[Notice], str]:
        """A page of those with a higher id than `after_id`, newest first, and the token of the next ("": there is none)."""
        caller.require(Role.FIRM)
        limit = page_size_of(page_size)
        if not 0 <= after_id <= ID_MAX:
            raise Invalid("after_id is the id of a notice, or 0.", reason="AFTER_ID_INVALID")
        if page_token and not _TOKEN.fullmatch(page_token):
            raise Invalid("page_token is not one that was given here.", reason="PAGE_TOKEN_INVALID")
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT a.id, a.at, a.action, a.application_id, a.detail, a.correlation_id, coalesce(w.id, '') AS award_id "
                "FROM audit a JOIN application p ON p.id = a.application_id LEFT JOIN award w ON w.application_id = p.id "
                "WHERE p.firm_id = $1 AND a.action = ANY($2::text[]) AND a.id > $3 AND a.id < $4 "
                "ORDER BY a.id DESC LIMIT $5",
                caller.firm_id,
                [*NoticeKind],
                after_id,
                int(page_token) if page_token else ID_MAX,
                limit + 1,
            )
        found = [_notice(dict(row)) for row in rows[:limit]]
        return found, str(found[-1].id) if len(rows) > limit else ""


def _notice(row: dict[str, Any]) -> Notice:
    kind, detail = NoticeKind(row.pop("action")), json.loads(row.pop("detail"))
    return Notice(kind=kind, text=_TEXTS[kind](detail).replace("..", "."), **row)
