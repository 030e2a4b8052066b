"""The anomaly service over HTTP."""

import asyncio
import math
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict

from services.anomaly.domain import Alarm, Change, HistoryEntry, Severity
from services.anomaly.messages import CHANGES, alarm_message
from services.anomaly.service import PAGE_SIZE_MAX, AlarmFeed, AlarmService
from services.anomaly.store import AlarmFilter
from services.common.errors import SlowDown
from services.common.http import Authenticated
from smdih.anomaly.v1 import events_pb2 as events_pb

# A comment line now and then tells proxies, and us, that the other side is still there.
WATCH_KEEPALIVE_S = 15

_CHANGE_NAMES = {number: change.value for change, number in CHANGES.items()}


class ShareOut(BaseModel):
    signal_id: int
    signal_name: str
    share: float


class AlarmOut(BaseModel):
    """Times are microseconds since 1970 UTC."""

    id: str
    firm_id: int
    machine_id: int
    signal_id: int
    machine_path: str
    machine_kind: str
    signal_name: str
    unit: str
    started_us: int
    ended_us: int | None
    severity: str
    component: str
    explanation: str
    value: float | None
    score: float
    active: bool
    acknowledged: bool
    cleared: bool
    shares: list[ShareOut]
    correlation_id: str
    episode_id: str


class AlarmPage(BaseModel):
    alarms: list[AlarmOut]
    next_page_token: str


class HistoryEntryOut(BaseModel):
    change: Change
    changed_us: int
    actor: str
    credential_id: int
    comment: str


class AlarmDetail(BaseModel):
    alarm: AlarmOut
    changes: list[HistoryEntryOut]


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


def router(service: AlarmService, feed: AlarmFeed) -> APIRouter:
    routes = APIRouter(prefix="/v1/alarms", tags=["alarms"])

    @routes.get("")
    async def list_alarms(
        caller: Authenticated,
        firm_id: int | None = None,
        machine_id: int | None = None,
        active: bool = False,
        unacknowledged: bool = False,
        since_us: int | None = None,
        page_size: Annotated[int, Query(ge=0, le=PAGE_SIZE_MAX)] = 0,
        page_token: str = "",
    ) -> AlarmPage:
        """Alarms that the key may see, newest first."""
        asked = AlarmFilter(
            firm_id=firm_id,
            machine_id=machine_id,
            active=active,
            unacknowledged=unacknowledged,
            since_us=since_us,
        )
        alarms, token = await service.list(caller, asked, page_size=page_size, page_token=page_token)
        return AlarmPage(alarms=[_alarm(alarm) for alarm in alarms], next_page_token=token)

    @routes.get("/watch", response_class=StreamingResponse)
    async def watch_alarms(caller: Authenticated, firm_id: int = 0) -> StreamingResponse:
        """Every change from now on, as server-sent events. A reader that is too slow gets an event "problem" and the end."""
        feed.admit(caller, firm_id=firm_id)  # refusals come before the answer starts

        async def lines() -> AsyncIterator[str]:
            try:
                with feed.watch(caller, firm_id=firm_id) as events:
                    yield ": watching\n\n"
                    async for event in _with_pauses(events):
                        yield (
                            ": \n\n" if event is None else f"event: alarm\ndata: {_event(event).model_dump_json()}\n\n"
                        )
            except SlowDown as error:
                yield f"event: problem\ndata: {error.reason}: {error.detail}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @routes.get("/{alarm_id}")
    async def get_alarm(caller: Authenticated, alarm_id: str) -> AlarmDetail:
        """One alarm with everything that has happened to it."""
        alarm, history = await service.get(caller, alarm_id)
        return AlarmDetail(alarm=_alarm(alarm), changes=[_entry(entry) for entry in history])

    @routes.post("/{alarm_id}/acknowledge")
    async def acknowledge_alarm(caller: Authenticated, alarm_id: str, body: AcknowledgeIn) -> AlarmOut:
        """Say that somebody has seen it and will respond."""
        return _alarm(await service.acknowledge(caller, alarm_id, comment=body.comment))

    @routes.post("/{alarm_id}/clear")
    async def clear_alarm(caller: Authenticated, alarm_id: str, body: ClearIn) -> AlarmOut:
        """Close it, saying what was found and done."""
        return _alarm(await service.clear(caller, alarm_id, comment=body.comment))

    return routes


async def _with_pauses(events: AsyncIterator[events_pb.AlarmEvent]) -> AsyncIterator[events_pb.AlarmEvent | None]:
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


def _alarm(alarm: Alarm) -> AlarmOut:
    return _out(alarm_message(alarm))


def _out(alarm: events_pb.Alarm) -> AlarmOut:
    return AlarmOut(
        id=alarm.id,
        firm_id=alarm.firm_id,
        machine_id=alarm.machine_id,
        signal_id=alarm.signal_id,
        machine_path=alarm.machine_path,
        machine_kind=alarm.machine_kind,
        signal_name=alarm.signal_name,
        unit=alarm.unit,
        started_us=alarm.started_us,
        ended_us=alarm.ended_us or None,
        severity=Severity(alarm.severity).name.lower(),
        component=alarm.component,
        explanation=alarm.explanation,
        value=alarm.value if math.isfinite(alarm.value) else None,
        score=alarm.score,
        active=alarm.active,
        acknowledged=alarm.acknowledged,
        cleared=alarm.cleared,
        shares=[
            ShareOut(signal_id=share.signal_id, signal_name=share.signal_name, share=share.share)
            for share in alarm.shares
        ],
        correlation_id=alarm.correlation_id,
        episode_id=alarm.episode_id,
    )


def _event(event: events_pb.AlarmEvent) -> AlarmEventOut:
    return AlarmEventOut(
        event_id=event.event_id,
        change=_CHANGE_NAMES[event.change],
        changed_us=event.changed_us,
        alarm=_out(event.alarm),
    )


def _entry(entry: HistoryEntry) -> HistoryEntryOut:
    return HistoryEntryOut(
        change=entry.change,
        changed_us=entry.changed_us,
        actor=entry.actor,
        credential_id=entry.credential_id,
        comment=entry.comment,
    )
