"""Matches come from the matching service: an accepted offer is one, until it is cancelled."""

from collections.abc import Sequence

from aiokafka import ConsumerRecord
from google.protobuf.message import DecodeError

from services.common.clock import Clock, from_us
from services.common.database import Connection
from services.common.logs import accepted_correlation_id, correlated, get_logger
from services.funding import matches
from services.funding.domain import TITLE_CHARACTERS_MAX, Match, is_id
from smdih.matching.v1 import events_pb2 as pb

log = get_logger(__name__)


class Unreadable(Exception):
    """A record that says something else than an offer's change; the text says what."""


class MatchKeeper:
    """Handles records of the topic of offers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def keep(
        self, connection: Connection, records: Sequence[ConsumerRecord]
    ) -> Sequence[tuple[ConsumerRecord, str]]:
        """Keep what became of matches. Returns the records that cannot be read."""
        bad: list[tuple[ConsumerRecord, str]] = []
        for record in records:
            try:
                match = _match(record.value)
            except Unreadable as error:
                bad.append((record, str(error)))
                continue
            if match is None:
                continue
            with correlated(match.correlation_id):
                if match.ended_us is None:
                    await matches.begin(connection, self._clock, match)
                else:
                    await matches.end(connection, self._clock, match)
        return bad


def _match(value: bytes | None) -> Match | None:
    """As it is after the change; None for a change that concerns no match. Raises Unreadable."""
    try:
        event = pb.OfferEvent.FromString(value or b"")
    except DecodeError as error:
        raise Unreadable("not an OfferEvent") from error
    if event.change == pb.OFFER_CHANGE_UNSPECIFIED:
        raise Unreadable("an OfferEvent without a change")
    if event.change not in (pb.OFFER_CHANGE_ACCEPTED, pb.OFFER_CHANGE_CANCELLED):
        return None
    offer = event.offer
    ids = {
        "event_id": event.event_id,
        "match_id": offer.match_id,
        "id": offer.id,
        "need_id": offer.need_id,
        "provider_id": offer.provider_id,
    }
    wrong = [name for name, text in ids.items() if not is_id(text)]
    if wrong or offer.firm_id <= 0:
        raise Unreadable(f"an offer of a match without a sensible {', '.join(wrong) or 'firm_id'}")
    try:
        from_us(event.changed_us)
    except (OverflowError, ValueError, OSError) as error:
        raise Unreadable("changed_us is not a time") from error
    return Match(
        id=offer.match_id,
        event_id=event.event_id,
        firm_id=offer.firm_id,
        need_id=offer.need_id,
        offer_id=offer.id,
        provider_id=offer.provider_id,
        # The one character that the database does not take.
        provider_title=offer.provider_title.replace("\x00", "")[:TITLE_CHARACTERS_MAX],
        accepted_us=event.changed_us,
        correlation_id=accepted_correlation_id(offer.correlation_id),
        ended_us=event.changed_us if event.change == pb.OFFER_CHANGE_CANCELLED else None,
    )
