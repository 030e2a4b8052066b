"""What the fund serves: its routers and gRPC services, in one list for the process and for tests."""

from collections.abc import Sequence

from fastapi import APIRouter

from services.common.rpc import Registered
from services.funding import (
    agreement_api,
    allocation_api,
    api,
    audit_api,
    change_api,
    group_api,
    impact_api,
    milestone_api,
    notice_api,
    open_data_api,
    pool_api,
    review_api,
)
from services.funding.agreement_rpc import AgreementRpc
from services.funding.allocation_rpc import AllocationRpc, PoolRpc
from services.funding.audit_rpc import AuditRpc
from services.funding.change_rpc import ChangeRpc
from services.funding.group_rpc import GroupRpc
from services.funding.impact_rpc import ImpactRpc
from services.funding.milestone_rpc import MilestoneRpc
from services.funding.notice_rpc import NoticeRpc
from services.funding.review_rpc import ReviewRpc
from services.funding.rpc import FundingRpc
from services.funding.use_cases import UseCases
from smdih.funding.v1 import (
    agreement_pb2_grpc,
    allocation_pb2_grpc,
    audit_pb2_grpc,
    change_pb2_grpc,
    funding_pb2_grpc,
    group_pb2_grpc,
    impact_pb2_grpc,
    milestone_pb2_grpc,
    notice_pb2_grpc,
    pool_pb2_grpc,
    review_pb2_grpc,
)


def routers(fund: UseCases) -> Sequence[APIRouter]:
    return [
        api.router(calls=fund.calls, applications=fund.applications, decisions=fund.decisions, balances=fund.balances),
        review_api.router(fund.reviews),
        allocation_api.router(fund.allocations),
        pool_api.router(fund.pools),
        agreement_api.router(agreements=fund.agreements, claims=fund.claims, balances=fund.balances),
        milestone_api.router(fund.milestones),
        change_api.router(fund.changes),
        impact_api.router(fund.impacts),
        group_api.router(fund.groups),
        audit_api.router(fund.audits),
        notice_api.router(fund.notices),
        open_data_api.router(fund.open_data),
    ]


def open_routers(fund: UseCases) -> Sequence[APIRouter]:
    """Those that need no key."""
    return [open_data_api.public_router(fund.open_data)]


def servicers(fund: UseCases) -> Sequence[Registered]:
    return [
        (
            funding_pb2_grpc.add_FundingServiceServicer_to_server,
            FundingRpc(
                calls=fund.calls, applications=fund.applications, decisions=fund.decisions, balances=fund.balances
            ),
        ),
        (review_pb2_grpc.add_ReviewServiceServicer_to_server, ReviewRpc(fund.reviews)),
        (allocation_pb2_grpc.add_AllocationServiceServicer_to_server, AllocationRpc(fund.allocations)),
        (pool_pb2_grpc.add_PoolServiceServicer_to_server, PoolRpc(fund.pools)),
        (
            agreement_pb2_grpc.add_AgreementServiceServicer_to_server,
            AgreementRpc(agreements=fund.agreements, claims=fund.claims, balances=fund.balances),
        ),
        (milestone_pb2_grpc.add_MilestoneServiceServicer_to_server, MilestoneRpc(fund.milestones)),
        (change_pb2_grpc.add_ChangeServiceServicer_to_server, ChangeRpc(fund.changes)),
        (impact_pb2_grpc.add_ImpactServiceServicer_to_server, ImpactRpc(fund.impacts)),
        (group_pb2_grpc.add_GroupServiceServicer_to_server, GroupRpc(fund.groups)),
        (audit_pb2_grpc.add_AuditServiceServicer_to_server, AuditRpc(fund.audits)),
        (notice_pb2_grpc.add_NoticeServiceServicer_to_server, NoticeRpc(fund.notices)),
    ]
