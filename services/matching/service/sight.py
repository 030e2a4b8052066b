"""Who sees what of needs, offers and matches."""

from dataclasses import replace

from services.common.database import Connection
from services.common.errors import NotFound
from services.common.identity import Caller, Role
from services.matching.matches import Match
from services.matching.needs import Need, Offer, OfferState
from services.matching.service.checks import known_form
from services.matching.store import matches as matches_store
from services.matching.store import needs as needs_store

# Who stands on the other side of a firm.
SUPPLIERS = (Role.PARTNER, Role.PROVIDER)


async def need_seen_by(connection: Connection, caller: Caller, need_id: str) -> Need:
    need = await needs_store.need(connection, known_form(need_id))
    if need is None:
        raise NotFound()
    caller.check_sees_firm(need.firm_id)
    return need


async def match_seen_by(connection: Connection, caller: Caller, match_id: str) -> Match:
    """Raises NotFound for what the caller has no part in."""
    found = await matches_store.match(connection, known_form(match_id))
    if found is None or not caller.has_part_in(
        firm_id=found.firm_id, provider_id=found.provider_id, partner_id=found.partner_id
    ):
        raise NotFound()
    return found


def sees_offer(caller: Caller, offer: Offer) -> bool:
    return caller.has_part_in(firm_id=offer.firm_id, provider_id=offer.provider_id, partner_id=offer.partner_id)


def offer_as_seen_by(caller: Caller, offer: Offer) -> Offer:
    """A partner or provider learns whose need it is once the firm has accepted, and nothing of one that is not shared any more."""
    if caller.role not in SUPPLIERS or offer.state is OfferState.ACCEPTED:
        return offer
    if offer.unshared:
        offer = replace(offer, need_text="", reasons=())
    return replace(offer, firm_id=0, machine_id=0, alarm_id="")
