"""The HTTP edge of the log of reads through rooms."""

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from services.common.clock import to_us
from services.common.http import Authenticated
from services.ingest.queries.rooms import RoomReads


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RoomReadView(_Body):
    signal_id: int
    # The key that read; below 0: a person with a token.
    credential_id: int
    minute_us: int
    reads: int
    # The least and the greatest time of the samples that were asked for.
    data_from_us: int
    data_until_us: int


class RoomReadsView(_Body):
    reads: list[RoomReadView]


def rooms_router(log: RoomReads) -> APIRouter:
    routes = APIRouter(prefix="/v1/rooms", tags=["rooms"])

    @routes.get("/{room_id}/reads")
    async def room_reads(caller: Authenticated, room_id: str) -> RoomReadsView:
        """Who read what through the room, a row a minute, signal and key; the newest 1,000. For both sides."""
        return RoomReadsView(
            reads=[
                RoomReadView(
                    signal_id=read.signal_id,
                    credential_id=read.credential_id,
                    minute_us=to_us(read.minute),
                    reads=read.reads,
                    data_from_us=to_us(read.data_from),
                    data_until_us=to_us(read.data_until),
                )
                for read in await log.reads(caller, room_id)
            ]
        )

    return routes
