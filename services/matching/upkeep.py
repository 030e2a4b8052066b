"""What happens by itself: offers lapse, matches, seats and rooms run out, and needs without offers are tried again."""

import asyncio

import asyncpg

from services.common.errors import TryAgain
from services.common.logs import get_logger
from services.matching.domain import MatchingError
from services.matching.service import Matching
from services.matching.service.consents import CLOSINGS_AT_ONCE_MAX as CONSENT_CLOSINGS_AT_ONCE_MAX
from services.matching.service.matches import CLOSINGS_AT_ONCE_MAX, EXPIRIES_AT_ONCE_MAX
from services.matching.service.needs import CLOSINGS_AT_ONCE_MAX as NEED_CLOSINGS_AT_ONCE_MAX
from services.matching.service.notices import FORGOTTEN_AT_ONCE_MAX
from services.matching.service.offers import LAPSES_AT_ONCE_MAX
from services.matching.service.rooms import EXPIRIES_AT_ONCE_MAX as ROOM_EXPIRIES_AT_ONCE_MAX
from services.matching.service.rooms import FORGOTTEN_AT_ONCE_MAX as ROOMS_FORGOTTEN_AT_ONCE_MAX
from services.matching.service.sessions import EXPIRIES_AT_ONCE_MAX as BOOKING_EXPIRIES_AT_ONCE_MAX

log = get_logger(__name__)

INTERVAL_S = 1.0


async def run_rounds(matching: Matching) -> None:
    """Carry out rounds, until cancelled. A round that dies with its process is carried out by the next."""
    while True:
        try:
            await matching.rounds.start_scheduled()
            while await matching.rounds.carry_out():
                pass
        except (asyncpg.PostgresError, TryAgain, MatchingError) as error:
            log.warning("rounds wait", error=repr(error))
        await asyncio.sleep(INTERVAL_S)


async def run(matching: Matching, *, interval_s: float = INTERVAL_S) -> None:
    """Until cancelled. Several processes may run it: each thing is done by whoever locks it first."""
    while True:
        try:
            while await matching.offers.lapse_due_offers() >= LAPSES_AT_ONCE_MAX:
                pass
            while await matching.matches.expire_due_matches() >= EXPIRIES_AT_ONCE_MAX:
                pass
            while await matching.matches.close_due_matches() >= CLOSINGS_AT_ONCE_MAX:
                pass
            while await matching.sessions.expire_due_bookings() >= BOOKING_EXPIRIES_AT_ONCE_MAX:
                pass
            while await matching.sessions.end_bookings_of_ended_matches() >= BOOKING_EXPIRIES_AT_ONCE_MAX:
                pass
            while await matching.consents.close_unshared_needs() >= CONSENT_CLOSINGS_AT_ONCE_MAX:
                pass
            while await matching.needs.expire_due_needs() >= NEED_CLOSINGS_AT_ONCE_MAX:
                pass
            while await matching.rooms.expire_due_rooms() >= ROOM_EXPIRIES_AT_ONCE_MAX:
                pass
            while await matching.rooms.forget_old_rooms() >= ROOMS_FORGOTTEN_AT_ONCE_MAX:
                pass
            while await matching.notices.forget_old() >= FORGOTTEN_AT_ONCE_MAX:
                pass
            await matching.providers.tell_of_due_providers()
            await matching.offers.offer_again()
        except (asyncpg.PostgresError, TryAgain) as error:
            log.warning("upkeep waits", error=repr(error))
        await asyncio.sleep(interval_s)
