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
    # Empty: that was the last page.
    next_page_token: str


def rooms_router(log: RoomReads) -> APIRouter:
    routes = APIRouter(prefix="/v1/rooms", tags=["rooms"])

    @routes.get("/{room_id}/reads")
    async def room_reads(
        caller: Authenticated, room_id: str, page_size: int = 0, page_token: str = ""
    ) -> RoomReadsView:
        """Who read what through the room, a row a minute, signal and key, newest first, at most 1,000 a page. For both sides."""
        found, token = await log.page(caller, room_id, page_size, page_token)
        return RoomReadsView(
            next_page_token=token,
            reads=[
                RoomReadView(
                    signal_id=read.signal_id,
                    credential_id=read.credential_id,
                    minute_us=to_us(read.minute),
                    reads=read.reads,
                    data_from_us=to_us(read.data_from),
                    data_until_us=to_us(read.data_until),
                )
                for read in found
            ],
        )

    return routes
