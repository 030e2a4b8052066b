"""The HTTP edge of notices."""

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.http import Authenticated
from services.matching.forms import Body, PageSize, PageToken, us
from services.matching.notices import Notice, NoticeKind
from services.matching.service import Matching


class NoticeView(Body):
    id: str
    kind: NoticeKind
    # Of a booking, a need or a match, as the kind says.
    subject_id: str
    text: str
    # What there is to do is to be done by then.
    act_by_us: int | None
    made_us: int
    read_us: int | None
    correlation_id: str


class NoticesPage(Body):
    notices: list[NoticeView]
    next_page_token: str


def router(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/v1/notices", tags=["notices"])

    @routes.get("")
    async def list_notices(
        caller: Authenticated, unread: bool = False, page_size: PageSize = 0, page_token: PageToken = ""
    ) -> NoticesPage:
        """What happened to the firm or partner while it was not there, newest first; kept for 400 days."""
        found, token = await matching.notices.list_notices(
            caller, unread=unread, page_size=page_size, page_token=page_token
        )
        return NoticesPage(notices=[_notice_view(each) for each in found], next_page_token=token)

    @routes.post("/{notice_id}/read")
    async def mark_read(caller: Authenticated, notice_id: str) -> NoticeView:
        """It is not among the unread any more."""
        return _notice_view(await matching.notices.mark_read(caller, notice_id))

    return routes


def _notice_view(notice: Notice) -> NoticeView:
    return NoticeView(
        id=notice.id,
        kind=notice.kind,
        subject_id=notice.subject_id,
        text=notice.text,
        act_by_us=us(notice.act_by),
        made_us=to_us(notice.made),
        read_us=us(notice.read),
        correlation_id=notice.correlation_id,
    )
