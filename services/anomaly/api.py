"""The anomaly service over HTTP."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from services.anomaly.alarm_out import AlarmOut, alarm_out, published_out
from services.anomaly.domain import Change, HistoryEntry, MaintenanceWindow, Source, Suppression
from services.anomaly.measures import HOURS_MAX, Measures, MeasureService
from services.anomaly.service import BULK_MAX, PAGE_SIZE_MAX, AlarmFeed, AlarmService, BulkOutcome, Heard
from services.anomaly.store import AlarmFilter, Suppressed
from services.anomaly.suppression import SuppressionService
from services.common.errors import HubError
from services.common.http import Authenticated, while_admitted
from services.common.messages import word_of
from smdih.anomaly.v1 import events_pb2 as events_pb

# A comment line now and then tells proxies, and us, that the other side is still there.
WATCH_KEEPALIVE_S = 15


class AlarmPage(BaseModel):
    alarms: list[AlarmOut]
    next_page_token: str


class HistoryEntryOut(BaseModel):
    change: Change
    changed_us: int
    actor: str
    credential_id: int
    comment: str
    detail: str


class AlarmDetail(BaseModel):
    alarm: AlarmOut
    changes: list[HistoryEntryOut]
    next_page_token: str


class AlarmEventOut(BaseModel):
    event_id: str
    change: str
    changed_us: int
    alarm: AlarmOut


class AcknowledgeIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    comment: str = ""


class ClearIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    comment: str


class AcknowledgeAllIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[str], Field(min_length=1, max_length=BULK_MAX)]
    comment: str = ""


class ClearAllIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[str], Field(min_length=1, max_length=BULK_MAX)]
    comment: str


class BulkOut(BaseModel):
    """The rest of the alarms were so before."""

    changed: int
    not_found: list[str]


class CommentIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    comment: str


class AssignIn(BaseModel):
    """An empty name: nobody any more."""

    model_config = ConfigDict(extra="forbid")

    assignee: str
    comment: str = ""


class ShelveIn(BaseModel):
    """`until_us` is at most 24 hours from now; it may be left out with `one_shot`."""

    model_config = ConfigDict(extra="forbid")

    reason: str
    until_us: int = 0
    one_shot: bool = False


class UnshelveIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    comment: str = ""


class ReasonIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    reason: str


class SuppressionOut(BaseModel):
    alarm_id: str
    firm_id: int
    machine_id: int
    machine_path: str
    signal_name: str
    out_of_service: bool
    one_shot: bool
    began_us: int
    ends_us: int | None
    reason: str
    actor: str
    credential_id: int


class SuppressionList(BaseModel):
    suppressions: list[SuppressionOut]


class WindowIn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    machine_id: int
    starts_us: int
    ends_us: int
    reason: str


class WindowOut(BaseModel):
    id: str
    firm_id: int
    machine_id: int
    starts_us: int
    ends_us: int
    reason: str
    actor: str
    credential_id: int
    ended_us: int | None
    ended_actor: str
    ended_credential_id: int
    ended_reason: str


class WindowList(BaseModel):
    windows: list[WindowOut]


class SourceMeasureOut(BaseModel):
    """An empty name: several signals together. The share is that of the firm's alarms, 0 to 1."""

    machine_id: int
    machine_path: str
    signal_name: str
    alarms: int
    share: float


class MeasuresOut(BaseModel):
    """Over the alarms that were raised in these hours and are not suppressed; a flood is more than 10 in 10 minutes."""

    hours: int
    alarms: int
    low: int
    medium: int
    high: int
    alarms_10_minutes: int
    flooded: bool
    alarms_10_minutes_max: int
    flooded_intervals: int
    chattering: list[SourceMeasureOut]
    stale: int
    worst_sources: list[SourceMeasureOut]
    worst_sources_share: float


def router(
    service: AlarmService, suppression: SuppressionService, measuring: MeasureService, feed: AlarmFeed
) -> APIRouter:
    routes = APIRouter(prefix="/v1/alarms", tags=["alarms"])

    @routes.get("")
    async def list_alarms(
        caller: Authenticated,
        firm_id: int | None = None,
        machine_id: int | None = None,
        active: bool = False,
        unacknowledged: bool = False,
        uncleared: bool = False,
        since_us: int | None = None,
        suppressed: Suppressed = Suppressed.HIDDEN,
        page_size: Annotated[int, Query(ge=0, le=PAGE_SIZE_MAX)] = 0,
        page_token: str = "",
    ) -> AlarmPage:
        """Alarms that the key may see, newest first; without `suppressed` the operator's list."""
        asked = AlarmFilter(
            firm_id=firm_id,
            machine_id=machine_id,
            active=active,
            unacknowledged=unacknowledged,
            uncleared=uncleared,
            since_us=since_us,
            suppressed=suppressed,
        )
        alarms, token = await service.list(caller, asked, page_size=page_size, page_token=page_token)
        return AlarmPage(alarms=[alarm_out(alarm) for alarm in alarms], next_page_token=token)

    @routes.get("/watch", response_class=StreamingResponse)
    async def watch_alarms(
        request: Request,
        caller: Authenticated,
        firm_id: int = 0,
        last_event_id: Annotated[str, Header(max_length=20_000)] = "",
    ) -> StreamingResponse:
        """Every change from now on, as server-sent events. Whoever comes back with the id of the last one (browsers send it by
        themselves, as Last-Event-ID) gets what was missed first. A reader that is too slow, or whose key is over, gets an event
        "problem" and the end."""
        feed.admit(caller, firm_id=firm_id, token=last_event_id)  # refusals come before the answer starts

        async def lines() -> AsyncIterator[str]:
            try:
                with feed.watch(caller, firm_id=firm_id, token=last_event_id) as events:
                    yield ": watching\n\n"
                    async for heard in while_admitted(request, _with_pauses(events)):
                        yield ": \n\n" if heard is None else _sse(*heard)
            except HubError as error:
                yield f"event: problem\ndata: {error.reason}: {error.detail}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @routes.get("/measures")
    async def get_measures(
        caller: Authenticated, firm_id: int = 0, hours: Annotated[int, Query(ge=0, le=HOURS_MAX)] = 0
    ) -> MeasuresOut:
        """How well a firm's alarms serve the people who must respond."""
        return _measures(await measuring.measures(caller, firm_id=firm_id, hours=hours))

    @routes.get("/suppressions")
    async def list_suppressions(caller: Authenticated, firm_id: int = 0) -> SuppressionList:
        """What is shelved or out of service now, the oldest first."""
        found = await suppression.list(caller, firm_id=firm_id)
        return SuppressionList(suppressions=[_suppression(source) for source in found])

    @routes.get("/windows")
    async def list_windows(caller: Authenticated, firm_id: int = 0, machine_id: int = 0) -> WindowList:
        """Maintenance windows that are not over, the first to start first."""
        found = await suppression.windows(caller, firm_id=firm_id, machine_id=machine_id)
        return WindowList(windows=[_window(window) for window in found])

    @routes.post("/windows")
    async def create_window(caller: Authenticated, body: WindowIn) -> WindowOut:
        """Announce maintenance of a machine. Its alarms are recorded and marked meanwhile, but off the operator's list."""
        return _window(
            await suppression.create_window(
                caller,
                machine_id=body.machine_id,
                starts_us=body.starts_us,
                ends_us=body.ends_us,
                reason=body.reason,
            )
        )

    @routes.post("/windows/{window_id}/end")
    async def end_window(caller: Authenticated, window_id: str, body: ReasonIn) -> WindowOut:
        """End it before its time."""
        return _window(await suppression.end_window(caller, window_id, reason=body.reason))

    @routes.post("/acknowledge")
    async def acknowledge_alarms(caller: Authenticated, body: AcknowledgeAllIn) -> BulkOut:
        """Acknowledge up to 5,000 alarms at once."""
        return _bulk(await service.acknowledge_all(caller, body.ids, comment=body.comment))

    @routes.post("/clear")
    async def clear_alarms(caller: Authenticated, body: ClearAllIn) -> BulkOut:
        """Close up to 5,000 alarms at once, saying what was found and done."""
        return _bulk(await service.clear_all(caller, body.ids, comment=body.comment))

    @routes.get("/{alarm_id}")
    async def get_alarm(caller: Authenticated, alarm_id: str, page_token: str = "") -> AlarmDetail:
        """One alarm with what has happened to it: the newest 200 changes in order of time, and the token of those before."""
        alarm, history, token = await service.with_history(caller, alarm_id, page_token=page_token)
        return AlarmDetail(alarm=alarm_out(alarm), changes=[_entry(entry) for entry in history], next_page_token=token)

    @routes.post("/{alarm_id}/acknowledge")
    async def acknowledge_alarm(caller: Authenticated, alarm_id: str, body: AcknowledgeIn) -> AlarmOut:
        """Say that somebody has seen it and will respond."""
        return alarm_out(await service.acknowledge(caller, alarm_id, comment=body.comment))

    @routes.post("/{alarm_id}/clear")
    async def clear_alarm(caller: Authenticated, alarm_id: str, body: ClearIn) -> AlarmOut:
        """Close it, saying what was found and done."""
        return alarm_out(await service.clear(caller, alarm_id, comment=body.comment))

    @routes.post("/{alarm_id}/comment")
    async def comment_alarm(caller: Authenticated, alarm_id: str, body: CommentIn) -> AlarmOut:
        """Add a remark to its history."""
        return alarm_out(await service.comment(caller, alarm_id, comment=body.comment))

    @routes.post("/{alarm_id}/assign")
    async def assign_alarm(caller: Authenticated, alarm_id: str, body: AssignIn) -> AlarmOut:
        """Say who takes care of it."""
        return alarm_out(await service.assign(caller, alarm_id, assignee=body.assignee, comment=body.comment))

    @routes.post("/{alarm_id}/shelve")
    async def shelve_alarm(caller: Authenticated, alarm_id: str, body: ShelveIn) -> AlarmOut:
        """Take its source off the operator's list for a while."""
        return alarm_out(
            await suppression.shelve(
                caller, alarm_id, reason=body.reason, until_us=body.until_us, one_shot=body.one_shot
            )
        )

    @routes.post("/{alarm_id}/unshelve")
    async def unshelve_alarm(caller: Authenticated, alarm_id: str, body: UnshelveIn) -> AlarmOut:
        """Put it back before its time."""
        return alarm_out(await suppression.unshelve(caller, alarm_id, comment=body.comment))

    @routes.post("/{alarm_id}/take-out-of-service")
    async def take_out_of_service(caller: Authenticated, alarm_id: str, body: ReasonIn) -> AlarmOut:
        """Take its source off the operator's list until somebody puts it back."""
        return alarm_out(await suppression.take_out_of_service(caller, alarm_id, reason=body.reason))

    @routes.post("/{alarm_id}/return-to-service")
    async def return_to_service(caller: Authenticated, alarm_id: str, body: ReasonIn) -> AlarmOut:
        return alarm_out(await suppression.return_to_service(caller, alarm_id, reason=body.reason))

    return routes


def _sse(event: events_pb.AlarmEvent, token: str) -> str:
    return f"id: {token}\nevent: alarm\ndata: {_event(event).model_dump_json()}\n\n"


async def _with_pauses(events: AsyncIterator[Heard]) -> AsyncIterator[Heard | None]:
    """The events, and None whenever none came for a while."""
    following = asyncio.ensure_future(anext(events))
    try:
        while True:
            done, _ = await asyncio.wait([following], timeout=WATCH_KEEPALIVE_S)
            if not done:
                yield None
                continue
            yield following.result()
            following = asyncio.ensure_future(anext(events))
    finally:
        following.cancel()


def _bulk(outcome: BulkOutcome) -> BulkOut:
    return BulkOut(changed=outcome.changed, not_found=list(outcome.not_found))


def _suppression(source: Source) -> SuppressionOut:
    return SuppressionOut(
        alarm_id=source.alarm_id,
        firm_id=source.firm_id,
        machine_id=source.machine_id,
        machine_path=source.machine_path,
        signal_name=source.signal_name,
        out_of_service=source.reason_kind is Suppression.OUT_OF_SERVICE,
        one_shot=source.one_shot,
        began_us=source.began_us,
        ends_us=source.ends_us,
        reason=source.reason,
        actor=source.actor,
        credential_id=source.credential_id,
    )


def _measures(measures: Measures) -> MeasuresOut:
    fields = asdict(measures)
    low, medium, high = fields.pop("alarms_by_severity")
    return MeasuresOut(**fields, low=low, medium=medium, high=high)


def _window(window: MaintenanceWindow) -> WindowOut:
    return WindowOut(**asdict(window))


def _event(event: events_pb.AlarmEvent) -> AlarmEventOut:
    return AlarmEventOut(
        event_id=event.event_id,
        change=word_of(Change, events_pb.AlarmChange, event.change) or "",  # a later release may publish more
        changed_us=event.changed_us,
        alarm=published_out(event.alarm),
    )


def _entry(entry: HistoryEntry) -> HistoryEntryOut:
    return HistoryEntryOut(
        change=entry.change,
        changed_us=entry.changed_us,
        actor=entry.actor,
        credential_id=entry.credential_id,
        comment=entry.comment,
        detail=entry.detail,
    )
