"""Who changed what in the registry, for those whom it concerns."""

from services.common.database import Pool, transaction
from services.common.identity import Caller, Role
from services.ingest.asked import PAGE_SIZE_DEFAULT, check_id, number_in_token, page_size_of
from services.ingest.domain import PAGE_SIZE_MAX
from services.ingest.registry import audit_store as store
from services.ingest.registry.audit_store import Entry


class Audit:
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def page(self, caller: Caller, firm_id: int, page_size: int, page_token: str) -> tuple[list[Entry], str]:
        """Newest first, and the token of the next page. Operators see all with firm_id 0."""
        caller.require(Role.OPERATOR, Role.FIRM)
        firm_id = caller.firm_or(firm_id)
        if firm_id:
            check_id(firm_id, "firm_id")
        size = page_size_of(page_size, PAGE_SIZE_DEFAULT, PAGE_SIZE_MAX)
        before = number_in_token(page_token)
        async with transaction(self._pool) as connection:
            found = await store.page(connection, firm_id, before, size + 1)
        return found[:size], str(found[size - 1].id) if len(found) > size else ""
