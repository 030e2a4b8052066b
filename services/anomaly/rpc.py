"""The anomaly service by gRPC."""

from collections.abc import AsyncIterator
from typing import Any

from services.anomaly.domain import Source, Suppression
from services.anomaly.evidence import EvidenceService
from services.anomaly.measures import MeasureService
from services.anomaly.messages import alarm_message
from services.anomaly.rule_rpc import key_of
from services.anomaly.service import AlarmFeed, AlarmService
from services.anomaly.store import AlarmFilter, Suppressed
from services.anomaly.suppression import SuppressionService
from services.anomaly.tuning import TuningService
from services.anomaly.tuning_messages import entry_message, evidence_message, threshold_message, useful_of, usefulness
from services.common.directory import Directory
from services.common.errors import Invalid
from services.common.messages import message_of
from services.common.rpc import current_caller
from smdih.anomaly.v1 import anomaly_pb2 as pb
from smdih.anomaly.v1 import anomaly_pb2_grpc as pb_grpc

_SUPPRESSED = {
    pb.SUPPRESSED_FILTER_UNSPECIFIED: Suppressed.HIDDEN,
    pb.SUPPRESSED_FILTER_INCLUDED: Suppressed.INCLUDED,
    pb.SUPPRESSED_FILTER_ONLY: Suppressed.ONLY,
}


class AlarmServicer(pb_grpc.AlarmServiceServicer):
    def __init__(
        self,
        service: AlarmService,
        suppression: SuppressionService,
        tuning: TuningService,
        evidence: EvidenceService,
        measuring: MeasureService,
        feed: AlarmFeed,
        directory: Directory,
    ) -> None:
        self._service = service
        self._suppression = suppression
        self._tuning = tuning
        self._evidence = evidence
        self._measuring = measuring
        self._feed = feed
        self._directory = directory

    async def ListAlarms(self, request: pb.ListAlarmsRequest, context: Any) -> pb.ListAlarmsResponse:
        if request.suppressed not in _SUPPRESSED:
            raise Invalid("suppressed is not one of the filters.")
        asked = AlarmFilter(
            firm_id=request.firm_id or None,
            machine_id=request.machine_id or None,
            active=request.active,
            unacknowledged=request.unacknowledged,
            uncleared=request.uncleared,
            since_us=request.since_us or None,
            suppressed=_SUPPRESSED[request.suppressed],
        )
        alarms, token = await self._service.list(
            current_caller(), asked, page_size=request.page_size, page_token=request.page_token
        )
        return pb.ListAlarmsResponse(alarms=[alarm_message(alarm) for alarm in alarms], next_page_token=token)

    async def GetAlarm(self, request: pb.GetAlarmRequest, context: Any) -> pb.GetAlarmResponse:
        alarm, history, token = await self._service.with_history(
            current_caller(), request.id, page_token=request.page_token
        )
        return pb.GetAlarmResponse(
            alarm=alarm_message(alarm),
            changes=[message_of(pb.AlarmHistoryEntry, entry) for entry in history],
            next_page_token=token,
        )

    async def AcknowledgeAlarm(self, request: pb.AcknowledgeAlarmRequest, context: Any) -> pb.AcknowledgeAlarmResponse:
        alarm = await self._service.acknowledge(current_caller(), request.id, comment=request.comment)
        return pb.AcknowledgeAlarmResponse(alarm=alarm_message(alarm))

    async def ClearAlarm(self, request: pb.ClearAlarmRequest, context: Any) -> pb.ClearAlarmResponse:
        alarm = await self._service.clear(current_caller(), request.id, comment=request.comment)
        return pb.ClearAlarmResponse(alarm=alarm_message(alarm))

    async def AcknowledgeAlarms(
        self, request: pb.AcknowledgeAlarmsRequest, context: Any
    ) -> pb.AcknowledgeAlarmsResponse:
        outcome = await self._service.acknowledge_all(current_caller(), request.ids, comment=request.comment)
        return pb.AcknowledgeAlarmsResponse(changed=outcome.changed, not_found=outcome.not_found)

    async def ClearAlarms(self, request: pb.ClearAlarmsRequest, context: Any) -> pb.ClearAlarmsResponse:
        outcome = await self._service.clear_all(current_caller(), request.ids, comment=request.comment)
        return pb.ClearAlarmsResponse(changed=outcome.changed, not_found=outcome.not_found)

    async def CommentAlarm(self, request: pb.CommentAlarmRequest, context: Any) -> pb.CommentAlarmResponse:
        alarm = await self._service.comment(current_caller(), request.id, comment=request.comment)
        return pb.CommentAlarmResponse(alarm=alarm_message(alarm))

    async def AssignAlarm(self, request: pb.AssignAlarmRequest, context: Any) -> pb.AssignAlarmResponse:
        alarm = await self._service.assign(
            current_caller(), request.id, assignee=request.assignee, comment=request.comment
        )
        return pb.AssignAlarmResponse(alarm=alarm_message(alarm))

    async def ShelveAlarm(self, request: pb.ShelveAlarmRequest, context: Any) -> pb.ShelveAlarmResponse:
        alarm = await self._suppression.shelve(
            current_caller(),
            request.id,
            reason=request.reason,
            until_us=request.until_us,
            one_shot=request.one_shot,
        )
        return pb.ShelveAlarmResponse(alarm=alarm_message(alarm))

    async def UnshelveAlarm(self, request: pb.UnshelveAlarmRequest, context: Any) -> pb.UnshelveAlarmResponse:
        alarm = await self._suppression.unshelve(current_caller(), request.id, comment=request.comment)
        return pb.UnshelveAlarmResponse(alarm=alarm_message(alarm))

    async def TakeOutOfService(self, request: pb.TakeOutOfServiceRequest, context: Any) -> pb.TakeOutOfServiceResponse:
        alarm = await self._suppression.take_out_of_service(current_caller(), request.id, reason=request.reason)
        return pb.TakeOutOfServiceResponse(alarm=alarm_message(alarm))

    async def ReturnToService(self, request: pb.ReturnToServiceRequest, context: Any) -> pb.ReturnToServiceResponse:
        alarm = await self._suppression.return_to_service(current_caller(), request.id, reason=request.reason)
        return pb.ReturnToServiceResponse(alarm=alarm_message(alarm))

    async def ListSuppressions(self, request: pb.ListSuppressionsRequest, context: Any) -> pb.ListSuppressionsResponse:
        found = await self._suppression.list(current_caller(), firm_id=request.firm_id)
        return pb.ListSuppressionsResponse(suppressions=[_suppression(source) for source in found])

    async def CreateMaintenanceWindow(
        self, request: pb.CreateMaintenanceWindowRequest, context: Any
    ) -> pb.CreateMaintenanceWindowResponse:
        window = await self._suppression.create_window(
            current_caller(),
            machine_id=request.machine_id,
            starts_us=request.starts_us,
            ends_us=request.ends_us,
            reason=request.reason,
        )
        return pb.CreateMaintenanceWindowResponse(window=message_of(pb.MaintenanceWindow, window))

    async def ListMaintenanceWindows(
        self, request: pb.ListMaintenanceWindowsRequest, context: Any
    ) -> pb.ListMaintenanceWindowsResponse:
        found = await self._suppression.windows(
            current_caller(), firm_id=request.firm_id, machine_id=request.machine_id
        )
        return pb.ListMaintenanceWindowsResponse(windows=[message_of(pb.MaintenanceWindow, window) for window in found])

    async def EndMaintenanceWindow(
        self, request: pb.EndMaintenanceWindowRequest, context: Any
    ) -> pb.EndMaintenanceWindowResponse:
        window = await self._suppression.end_window(current_caller(), request.id, reason=request.reason)
        return pb.EndMaintenanceWindowResponse(window=message_of(pb.MaintenanceWindow, window))

    async def GetAlarmMeasures(self, request: pb.GetAlarmMeasuresRequest, context: Any) -> pb.GetAlarmMeasuresResponse:
        found = await self._measuring.measures(current_caller(), firm_id=request.firm_id, hours=request.hours)
        low, medium, high = found.alarms_by_severity
        return message_of(pb.GetAlarmMeasuresResponse, found, low=low, medium=medium, high=high)

    async def WatchAlarms(self, request: pb.WatchAlarmsRequest, context: Any) -> AsyncIterator[pb.WatchAlarmsResponse]:
        with self._feed.watch(current_caller(), firm_id=request.firm_id, token=request.resume_token) as events:
            # The headers tell the reader that nothing from here on is missed.
            await context.send_initial_metadata(())
            async for event, token in events:
                yield pb.WatchAlarmsResponse(event=event, resume_token=token)

    async def ExplainAlarm(self, request: pb.ExplainAlarmRequest, context: Any) -> pb.ExplainAlarmResponse:
        return evidence_message(
            await self._evidence.evidence(current_caller(), key_of(context), request.id, minutes=request.minutes)
        )

    async def RateAlarm(self, request: pb.RateAlarmRequest, context: Any) -> pb.RateAlarmResponse:
        useful = useful_of(request.usefulness)
        now = await self._tuning.rate(current_caller(), request.id, useful=useful, comment=request.comment)
        threshold = threshold_message(self._directory, now.threshold)
        return pb.RateAlarmResponse(threshold=threshold, usefulness=usefulness(now.useful))

    async def GetThreshold(self, request: pb.GetThresholdRequest, context: Any) -> pb.GetThresholdResponse:
        now = await self._tuning.threshold(current_caller(), request.alarm_id)
        return pb.GetThresholdResponse(
            threshold=threshold_message(self._directory, now.threshold),
            usefulness=usefulness(now.useful),
            history=[entry_message(entry) for entry in now.history],
        )

    async def ResetThreshold(self, request: pb.ResetThresholdRequest, context: Any) -> pb.ResetThresholdResponse:
        now = await self._tuning.reset(current_caller(), request.alarm_id, comment=request.comment)
        return pb.ResetThresholdResponse(threshold=threshold_message(self._directory, now.threshold))

    async def ListThresholds(self, request: pb.ListThresholdsRequest, context: Any) -> pb.ListThresholdsResponse:
        found = await self._tuning.thresholds(current_caller(), firm_id=request.firm_id, machine_id=request.machine_id)
        return pb.ListThresholdsResponse(thresholds=[threshold_message(self._directory, one) for one in found])

    async def RelearnSensor(self, request: pb.RelearnSensorRequest, context: Any) -> pb.RelearnSensorResponse:
        await self._tuning.relearn(
            current_caller(), machine_id=request.machine_id, signal_id=request.signal_id, reason=request.reason
        )
        return pb.RelearnSensorResponse()

    async def ListTunings(self, request: pb.ListTuningsRequest, context: Any) -> pb.ListTuningsResponse:
        found = await self._tuning.history(current_caller(), machine_id=request.machine_id, signal_id=request.signal_id)
        return pb.ListTuningsResponse(tunings=[entry_message(entry) for entry in found])


def _suppression(source: Source) -> pb.Suppression:
    out_of_service = source.reason_kind is Suppression.OUT_OF_SERVICE
    return message_of(pb.Suppression, source, out_of_service=out_of_service)
