"""The anomaly service by gRPC."""

from collections.abc import AsyncIterator
from typing import Any

from services.anomaly.messages import CHANGES, alarm_message
from services.anomaly.service import AlarmFeed, AlarmService
from services.anomaly.store import AlarmFilter
from services.common.rpc import current_caller
from smdih.anomaly.v1 import anomaly_pb2 as pb
from smdih.anomaly.v1 import anomaly_pb2_grpc as pb_grpc


class AlarmServicer(pb_grpc.AlarmServiceServicer):
    def __init__(self, service: AlarmService, feed: AlarmFeed) -> None:
        self._service = service
        self._feed = feed

    async def ListAlarms(self, request: pb.ListAlarmsRequest, context: Any) -> pb.ListAlarmsResponse:
        asked = AlarmFilter(
            firm_id=request.firm_id or None,
            machine_id=request.machine_id or None,
            active=request.active,
            unacknowledged=request.unacknowledged,
            since_us=request.since_us or None,
        )
        alarms, token = await self._service.list(
            current_caller(), asked, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListAlarmsResponse(alarms=[alarm_message(alarm) for alarm in alarms], next_page_token=token)

    async def GetAlarm(self, request: pb.GetAlarmRequest, context: Any) -> pb.GetAlarmResponse:
        alarm, history = await self._service.get(current_caller(), request.id)
        return pb.GetAlarmResponse(
            alarm=alarm_message(alarm),
            changes=[
                pb.AlarmHistoryEntry(
                    change=CHANGES[entry.change],
                    changed_us=entry.changed_us,
                    actor=entry.actor,
                    credential_id=entry.credential_id,
                    comment=entry.comment,
                )
                for entry in history
            ],
        )

    async def AcknowledgeAlarm(self, request: pb.AcknowledgeAlarmRequest, context: Any) -> pb.AcknowledgeAlarmResponse:
        alarm = await self._service.acknowledge(current_caller(), request.id, comment=request.comment)
        return pb.AcknowledgeAlarmResponse(alarm=alarm_message(alarm))

    async def ClearAlarm(self, request: pb.ClearAlarmRequest, context: Any) -> pb.ClearAlarmResponse:
        alarm = await self._service.clear(current_caller(), request.id, comment=request.comment)
        return pb.ClearAlarmResponse(alarm=alarm_message(alarm))

    async def WatchAlarms(self, request: pb.WatchAlarmsRequest, context: Any) -> AsyncIterator[pb.WatchAlarmsResponse]:
        with self._feed.watch(current_caller(), firm_id=request.firm_id) as events:
            # The headers tell the reader that nothing from here on is missed.
            await context.send_initial_metadata(())
            async for event in events:
                yield pb.WatchAlarmsResponse(event=event)
