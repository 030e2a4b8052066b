"""The use cases of notices: listed, marked as read, forgotten. They are written by whatever happened, in its transaction."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.errors import NotFound
from services.common.identity import Caller, Role
from services.matching import notices
from services.matching.needs import Offer
from services.matching.notices import Notice
from services.matching.service.checks import before_token, known_form, page_size_of, page_token_of
from services.matching.store import notices as notices_store

KEPT_FOR = timedelta(days=400)
FORGOTTEN_AT_ONCE_MAX = 1_000


class Notices:
    """What a firm or a partner is told."""

    def __init__(self, pool: Pool, *, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock

    async def list_notices(
        self, caller: Caller, *, unread: bool, page_size: int, page_token: str
    ) -> tuple[list[Notice], str]:
        """A page of the caller's own, newest first, and the token of the next ("": there is none)."""
        caller.require(Role.FIRM, Role.PARTNER)
        limit = page_size_of(page_size)
        firm_id, partner_id = _side(caller)
        async with transaction(self._pool) as connection:
            found = await notices_store.list_notices(
                connection,
                firm_id=firm_id,
                partner_id=partner_id,
                unread=unread,
                before=before_token(page_token),
                limit=limit + 1,
            )
        return found[:limit], page_token_of(found[limit - 1].made, found[limit - 1].id) if len(found) > limit else ""

    async def mark_read(self, caller: Caller, notice_id: str) -> Notice:
        """A repeat changes nothing."""
        caller.require(Role.FIRM, Role.PARTNER)
        firm_id, partner_id = _side(caller)
        async with transaction(self._pool) as connection:
            found = await notices_store.mark_read(
                connection,
                known_form(notice_id),
                firm_id=firm_id,
                partner_id=partner_id,
                read=self._now(),
                by=caller.credential_id,
            )
        if found is None:
            raise NotFound()
        return found

    async def forget_old(self) -> int:
        """Forget what is older than KEPT_FOR; returns how many."""
        async with transaction(self._pool) as connection:
            return await notices_store.forget(
                connection, made_before=self._now() - KEPT_FOR, limit=FORGOTTEN_AT_ONCE_MAX
            )

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


async def tell_of_offers(connection: Connection, offers: Sequence[Offer]) -> None:
    """Tell each firm once of what was offered for a need of its while it was not there."""
    by_need = defaultdict[str, list[Offer]](list)
    for offer in offers:
        by_need[offer.need_id].append(offer)
    await notices_store.add_notices(connection, [notices.of_offers(each) for each in by_need.values()])


def _side(caller: Caller) -> tuple[int, int]:
    """Ids of firm and partner, the other being 0."""
    return (caller.firm_id, 0) if caller.role is Role.FIRM else (0, caller.partner_id)
