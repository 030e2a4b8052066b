"""What this service serves: its routers and gRPC services, in one list for the process and for tests."""

from collections.abc import Sequence

from fastapi import APIRouter

from services.common.rpc import Registered
from services.matching import (
    consent_api,
    match_api,
    need_api,
    notice_api,
    provider_api,
    reports_api,
    rooms_api,
    round_api,
    sessions_api,
)
from services.matching.notices_rpc import NoticeServicer
from services.matching.reports_rpc import MaturityServicer, ReportServicer
from services.matching.rooms_rpc import RoomServicer
from services.matching.rounds_rpc import RoundServicer
from services.matching.rpc import MatchingServicer
from services.matching.service import Matching
from services.matching.sessions_rpc import SessionServicer
from smdih.matching.v1 import (
    matching_pb2_grpc,
    maturity_pb2_grpc,
    notices_pb2_grpc,
    reports_pb2_grpc,
    rooms_pb2_grpc,
    rounds_pb2_grpc,
    sessions_pb2_grpc,
)


def routers(matching: Matching) -> Sequence[APIRouter]:
    return [
        provider_api.router(matching),
        consent_api.router(matching),
        need_api.router(matching),
        match_api.router(matching),
        notice_api.router(matching),
        round_api.router(matching),
        sessions_api.router(matching),
        rooms_api.router(matching),
        reports_api.router(matching),
    ]


def servicers(matching: Matching) -> Sequence[Registered]:
    return [
        (matching_pb2_grpc.add_MatchingServiceServicer_to_server, MatchingServicer(matching)),
        (sessions_pb2_grpc.add_SessionServiceServicer_to_server, SessionServicer(matching)),
        (rooms_pb2_grpc.add_RoomServiceServicer_to_server, RoomServicer(matching)),
        (notices_pb2_grpc.add_NoticeServiceServicer_to_server, NoticeServicer(matching)),
        (rounds_pb2_grpc.add_RoundServiceServicer_to_server, RoundServicer(matching)),
        (maturity_pb2_grpc.add_MaturityServiceServicer_to_server, MaturityServicer(matching)),
        (reports_pb2_grpc.add_ReportServiceServicer_to_server, ReportServicer(matching)),
    ]
