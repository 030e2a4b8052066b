"""gRPC edge of the claim codes."""

from typing import Any

from services.common.rpc import current_caller
from services.ingest.registry.claim_store import Place
from services.ingest.registry.claims import EXPIRES_IN_S_DEFAULT, Claims
from smdih.ingest.v1 import claim_pb2, claim_pb2_grpc

# A gateway has no key when it calls this.
OPEN_METHODS = ("/smdih.ingest.v1.ClaimService/ExchangeClaimCode",)


class ClaimServicer(claim_pb2_grpc.ClaimServiceServicer):
    def __init__(self, claims: Claims) -> None:
        self._claims = claims

    async def CreateClaimCode(
        self, request: claim_pb2.CreateClaimCodeRequest, context: Any
    ) -> claim_pb2.CreateClaimCodeResponse:
        new = await self._claims.create(
            current_caller(),
            Place(request.firm_id, request.site_id, request.machine_id),
            label=request.label,
            expires_in_s=request.expires_in_s or EXPIRES_IN_S_DEFAULT,
            key_valid_days=request.key_valid_days,
        )
        return claim_pb2.CreateClaimCodeResponse(id=new.id, code=new.code, expires_us=new.expires_us)

    async def ExchangeClaimCode(
        self, request: claim_pb2.ExchangeClaimCodeRequest, context: Any
    ) -> claim_pb2.ExchangeClaimCodeResponse:
        claimed = await self._claims.exchange(request.code, request.request_id)
        return claim_pb2.ExchangeClaimCodeResponse(
            key=claimed.key, credential_id=claimed.credential_id, site=claimed.site, machine=claimed.machine
        )

    async def CancelClaimCode(
        self, request: claim_pb2.CancelClaimCodeRequest, context: Any
    ) -> claim_pb2.CancelClaimCodeResponse:
        await self._claims.cancel(current_caller(), request.id)
        return claim_pb2.CancelClaimCodeResponse()
