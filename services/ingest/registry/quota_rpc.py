"""gRPC edge of the quotas."""

from typing import Any

from services.common.clock import to_us
from services.common.rpc import current_caller
from services.ingest.registry.quota_store import Quota
from services.ingest.registry.quotas import Quotas
from smdih.ingest.v1 import quota_pb2, quota_pb2_grpc


class QuotaServicer(quota_pb2_grpc.QuotaServiceServicer):
    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas

    async def GetQuota(self, request: quota_pb2.GetQuotaRequest, context: Any) -> quota_pb2.GetQuotaResponse:
        quota = await self._quotas.of_firm(current_caller(), request.firm_id)
        return quota_pb2.GetQuotaResponse(
            samples_per_s=quota.samples_per_s,
            signals=quota.signals,
            stored_days=quota.stored_days,
            used_samples_per_s=quota.use.samples_per_s,
            used_signals=quota.use.signals,
            machines=quota.use.machines,
            oldest_sample_us=to_us(quota.use.oldest) if quota.use.oldest else None,
        )

    async def SetQuota(self, request: quota_pb2.SetQuotaRequest, context: Any) -> quota_pb2.SetQuotaResponse:
        quota = Quota(
            request.samples_per_s if request.HasField("samples_per_s") else None,
            request.signals if request.HasField("signals") else None,
            request.stored_days if request.HasField("stored_days") else None,
        )
        await self._quotas.change(current_caller(), request.firm_id, quota)
        return quota_pb2.SetQuotaResponse()
