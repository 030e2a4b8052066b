"""The audit record, as it is shown: who did what, when, under which correlation id. It is written by whatever is done."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from services.common.database import Pool, transaction
from services.common.errors import Invalid
from services.common.identity import Caller, Role
from services.funding.domain import is_id
from services.funding.paging import page_size_of

_TOKEN = re.compile(r"[0-9]{1,18}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    id: int
    at: datetime
    credential_id: int
    action: str
    call_id: str | None
    application_id: str | None
    # What was decided, how much, and the words that came with it.
    detail: Mapping[str, Any]
    correlation_id: str


class AuditService:
    """Reads; nobody changes what stands there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def list_entries(
        self, caller: Caller, *, call_id: str, application_id: str, page_size: int, page_token: str
    ) -> tuple[list[AuditEntry], str]:
        """A page, newest first, and the token of the next ("": there is none). An id that is empty filters nothing."""
        caller.require(Role.OPERATOR)
        limit = page_size_of(page_size)
        if page_token and not _TOKEN.fullmatch(page_token):
            raise Invalid("page_token is not one that was given here.", reason="PAGE_TOKEN_INVALID")
        if not all(is_id(given) for given in (call_id, application_id) if given):
            return [], ""
        async with transaction(self._pool) as connection:
            rows = await connection.fetch(
                "SELECT id, at, credential_id, action, call_id, application_id, detail, correlation_id FROM audit "
                "WHERE ($1 = '' OR call_id = $1) AND ($2 = '' OR application_id = $2) AND ($3::bigint IS NULL OR id < $3) "
                "ORDER BY id DESC LIMIT $4",
                call_id,
                application_id,
                int(page_token) if page_token else None,
                limit + 1,
            )
        found = [AuditEntry(**{**dict(row), "detail": json.loads(row["detail"])}) for row in rows]
        return found[:limit], str(found[limit - 1].id) if len(found) > limit else ""
