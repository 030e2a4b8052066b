"""Notices to firms, over HTTP."""

from fastapi import APIRouter
from pydantic import BaseModel, Field

from services.common.clock import to_us
from services.common.http import Authenticated
from services.funding.notices import NoticeKind, NoticeService


class NoticeOut(BaseModel):
    id: int
    at_us: int
    kind: NoticeKind
    application_id: str
    award_id: str = Field(description="empty while there is none")
    text: str
    correlation_id: str


class NoticePageOut(BaseModel):
    notices: list[NoticeOut]
    next_page_token: str


def router(service: NoticeService) -> APIRouter:
    """What others did with a firm's applications and awards."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/notices")
    async def list_notices(
        caller: Authenticated, after_id: int = 0, page_size: int = 0, page_token: str = ""
    ) -> NoticePageOut:
        """Newest first, at most 100 a page; only those newer than the notice `after_id`, if one is named."""
        found, token = await service.list_notices(caller, after_id=after_id, page_size=page_size, page_token=page_token)
        notices = [
            NoticeOut(
                id=one.id,
                at_us=to_us(one.at),
                kind=one.kind,
                application_id=one.application_id,
                award_id=one.award_id,
                text=one.text,
                correlation_id=one.correlation_id,
            )
            for one in found
        ]
        return NoticePageOut(notices=notices, next_page_token=token)

    return routes
