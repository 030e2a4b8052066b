"""The rooms in the database and in their topic brought together again, after one of them was restored or lost.

What either side says has ended has ended: nothing is lent again by a restore. Nothing else may run meanwhile.
"""

from collections.abc import Mapping

from services.common import topics
from services.common.clock import from_us
from services.common.database import Connection
from services.common.kafka import Message
from services.common.messages import word_of
from services.matching.messages import room_event
from services.matching.rooms import RoomState
from services.matching.store import rooms as rooms_store
from smdih.matching.v1 import events_pb2 as pb


async def adopt(connection: Connection, topic: Mapping[str, bytes | None]) -> tuple[int, list[Message]]:
    """After a restore. Returns how many rooms have ended that the dump had open, and what is to be published now."""
    published = {key: pb.RoomEvent.FromString(value) for key, value in topic.items() if value is not None}
    ended = 0
    for room_id, event in published.items():
        state = word_of(RoomState, pb.RoomState, event.state) or RoomState.RECALLED
        if state is RoomState.OPEN:
            continue
        ended += await connection.fetchval(
            "WITH done AS (UPDATE room SET state = $2, ended = $3, end_reason = 'ended before the restore' "
            "WHERE id = $1 AND state = 'open' RETURNING 1) SELECT count(*) FROM done",
            *(room_id, state, from_us(event.changed_us)),
        )
    messages = await everything(connection)
    stored = {(message.key or b"").decode() for message in messages}
    # Opened after the dump: the firm cannot see it any more, so it could not take it back.
    unknown = [Message(topics.ROOMS, None, room_id.encode()) for room_id in published.keys() - stored]
    differ = [each for each in messages if topic.get((each.key or b"").decode()) != each.value]
    return ended, differ + unknown


async def everything(connection: Connection) -> list[Message]:
    """What the topic is to hold."""
    await connection.execute("DELETE FROM outbox WHERE topic = $1", topics.ROOMS)
    return [
        Message(topics.ROOMS, room_event(room), room.id.encode()) for room in await rooms_store.all_rooms(connection)
    ]
