"""Changes of offers and matches on their way out, in the transaction that makes them."""

from collections.abc import Sequence

from prometheus_client import Counter

from services.common import outbox, topics
from services.common.database import Connection
from services.matching.matches import Match
from services.matching.messages import match_event, offer_event, room_event
from services.matching.needs import Offer
from services.matching.rooms import Room

# Offers by the state that they came into.
offers_total = Counter(
    "smdih_matching_offers_total", "Offers made, accepted, declined, lapsed and cancelled", ["state"]
)
# Matches by the state that they came into.
matches_total = Counter("smdih_matching_matches_total", "Matches made, engaged, finished and ended", ["state"])
# Rooms by the state that they came into.
rooms_total = Counter("smdih_matching_rooms_total", "Rooms opened and ended", ["state"])


async def publish_offers(connection: Connection, offers: Sequence[Offer]) -> None:
    await outbox.write_all(connection, topics.OFFERS, [(offer.need_id, offer_event(offer)) for offer in offers])
    for offer in offers:
        offers_total.labels(offer.state).inc()


async def publish_match(connection: Connection, match: Match) -> None:
    await outbox.write(connection, topics.MATCHES, key=match.id, value=match_event(match))
    matches_total.labels(match.state).inc()


async def publish_room(connection: Connection, room: Room) -> None:
    """Compacted by room: whoever reads the topic knows what is lent now."""
    await outbox.write(connection, topics.ROOMS, key=room.id, value=room_event(room))
    rooms_total.labels(room.state).inc()


async def forget_rooms(connection: Connection, room_ids: Sequence[str]) -> None:
    await outbox.write_all(connection, topics.ROOMS, [(room_id, None) for room_id in room_ids])
