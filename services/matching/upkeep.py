"""What happens by itself: offers lapse, and needs without offers are tried again."""

import asyncio

import asyncpg

from services.common.errors import TryAgain
from services.common.logs import get_logger
from services.matching.service import Matching
from services.matching.service.offers import LAPSES_AT_ONCE_MAX

log = get_logger(__name__)

INTERVAL_S = 1.0


async def run(matching: Matching) -> None:
    """Until cancelled. Several processes may run it: each thing is done by whoever locks it first."""
    while True:
        try:
            while await matching.offers.lapse_due_offers() >= LAPSES_AT_ONCE_MAX:
                pass
            await matching.offers.offer_again()
        except (asyncpg.PostgresError, TryAgain) as error:
            log.warning("upkeep waits", error=repr(error))
        await asyncio.sleep(INTERVAL_S)
