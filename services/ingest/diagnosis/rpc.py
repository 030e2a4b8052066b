"""gRPC edge of "why is there no data?"."""

from typing import Any

from services.common.rpc import current_caller
from services.ingest.diagnosis.diagnosis import Diagnoses
from smdih.ingest.v1 import diagnosis_pb2, diagnosis_pb2_grpc


class DiagnosisServicer(diagnosis_pb2_grpc.DiagnosisServiceServicer):
    def __init__(self, diagnoses: Diagnoses) -> None:
        self._diagnoses = diagnoses

    async def DiagnoseMachine(
        self, request: diagnosis_pb2.DiagnoseMachineRequest, context: Any
    ) -> diagnosis_pb2.DiagnoseMachineResponse:
        facts, diagnosis = await self._diagnoses.of_machine(current_caller(), request.machine_id)
        response = diagnosis_pb2.DiagnoseMachineResponse(
            last_received_us=facts.received_us or None,
            last_received_time_us=facts.newest_us or None,
            last_stored_time_us=facts.stored_us or None,
            waiting_records=facts.waiting_records,
        )
        for cause in diagnosis.causes:
            response.causes.add(
                cause=cause.cause,
                text=cause.text,
                next_step=cause.next_step,
                last_us=cause.last_us or None,
                times=cause.times,
                samples=cause.samples,
                credential_id=cause.credential_id,
                example=cause.example,
            )
        for signal in facts.signals:
            response.signals.add(
                signal_id=signal.id,
                name=signal.name,
                unit=signal.unit,
                last_us=signal.last_us or None,
                value=signal.value,
            )
        return response
