"""What the door serves: its routers and gRPC services, in one list."""

from collections.abc import Sequence

from fastapi import APIRouter

from services.common.rpc import Registered
from services.ingest.diagnosis.api import diagnosis_router
from services.ingest.diagnosis.rpc import DiagnosisServicer
from services.ingest.kpi.api import kpi_router
from services.ingest.kpi.rpc import KpiServicer
from services.ingest.proposals.api import proposal_router
from services.ingest.proposals.rpc import ProposalServicer
from services.ingest.queries.api import query_router
from services.ingest.queries.rooms_api import rooms_router
from services.ingest.queries.rooms_rpc import RoomReadServicer
from services.ingest.queries.rpc import QueryServicer
from services.ingest.queries.series_api import series_router
from services.ingest.queries.series_rpc import SeriesServicer
from services.ingest.registry.api import registry_router
from services.ingest.registry.audit_api import audit_router
from services.ingest.registry.claim_api import claim_code_router, claim_router
from services.ingest.registry.claim_rpc import ClaimServicer
from services.ingest.registry.credential_api import credential_router
from services.ingest.registry.import_api import import_router
from services.ingest.registry.quota_api import quota_router
from services.ingest.registry.quota_rpc import QuotaServicer
from services.ingest.registry.rpc import RegistryServicer
from services.ingest.retention.api import retention_router
from services.ingest.telemetry.api import lines_router, telemetry_router
from services.ingest.telemetry.door import Door
from services.ingest.telemetry.quarantine_api import quarantine_router
from services.ingest.telemetry.rpc import TelemetryServicer
from services.ingest.use_cases import UseCases
from smdih.ingest.v1 import (
    claim_pb2_grpc,
    diagnosis_pb2_grpc,
    kpi_pb2_grpc,
    proposal_pb2_grpc,
    query_pb2_grpc,
    quota_pb2_grpc,
    registry_pb2_grpc,
    rooms_pb2_grpc,
    series_pb2_grpc,
    telemetry_pb2_grpc,
)

# Goes into the message log, not into the change log.
TELEMETRY = (
    *("POST /v1/telemetry", "POST /api/v2/write", "POST /write"),
    *("/smdih.ingest.v1.TelemetryService/SendBatches", "/smdih.ingest.v1.TelemetryService/StreamBatches"),
)


def routers(door: Door, cases: UseCases) -> Sequence[APIRouter]:
    return [
        telemetry_router(door),
        lines_router(door),
        registry_router(cases.registry),
        credential_router(cases.credentials),
        query_router(cases.queries),
        series_router(cases.queries, cases.export),
        kpi_router(cases.kpi),
        retention_router(cases.retention),
        quarantine_router(cases.quarantine),
        diagnosis_router(cases.diagnoses),
        quota_router(cases.quotas),
        claim_code_router(cases.claims),
        audit_router(cases.audit),
        rooms_router(cases.room_reads),
        import_router(cases.imports),
        proposal_router(cases.proposals),
    ]


def open_routers(cases: UseCases) -> Sequence[APIRouter]:
    """Those that need no key."""
    return [claim_router(cases.claims)]


def servicers(door: Door, cases: UseCases) -> Sequence[Registered]:
    return [
        (telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server, TelemetryServicer(door)),
        (registry_pb2_grpc.add_RegistryServiceServicer_to_server, RegistryServicer(cases.registry, cases.credentials)),
        (query_pb2_grpc.add_QueryServiceServicer_to_server, QueryServicer(cases.queries, cases.quarantine)),
        (proposal_pb2_grpc.add_ProposalServiceServicer_to_server, ProposalServicer(cases.proposals, cases.quarantine)),
        (claim_pb2_grpc.add_ClaimServiceServicer_to_server, ClaimServicer(cases.claims)),
        (quota_pb2_grpc.add_QuotaServiceServicer_to_server, QuotaServicer(cases.quotas)),
        (diagnosis_pb2_grpc.add_DiagnosisServiceServicer_to_server, DiagnosisServicer(cases.diagnoses)),
        (series_pb2_grpc.add_SeriesServiceServicer_to_server, SeriesServicer(cases.queries, cases.export)),
        (kpi_pb2_grpc.add_KpiServiceServicer_to_server, KpiServicer(cases.kpi)),
        (rooms_pb2_grpc.add_RoomReadServiceServicer_to_server, RoomReadServicer(cases.room_reads)),
    ]
