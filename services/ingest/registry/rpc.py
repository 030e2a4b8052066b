"""gRPC edge of the registry."""

from typing import Any

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.identity import KEY_ROLES
from services.common.rpc import current_caller
from services.ingest.domain import NewFirm, NewMachine, NewSignal, NewSite
from services.ingest.registry.credential_store import ROLE_NUMBERS
from services.ingest.registry.credentials import OVERLAP_S_DEFAULT, Credentials
from services.ingest.registry.registry import Registry
from smdih.ingest.v1 import registry_pb2, registry_pb2_grpc

_ROLES = {number: role for role, number in ROLE_NUMBERS.items()}


class RegistryServicer(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, registry: Registry, credentials: Credentials) -> None:
        self._registry = registry
        self._credentials = credentials

    async def CreateFirm(
        self, request: registry_pb2.CreateFirmRequest, context: Any
    ) -> registry_pb2.CreateFirmResponse:
        new = NewFirm(request.name, request.slug, request.sic, request.region, request.size)
        return registry_pb2.CreateFirmResponse(firm=await self._registry.create_firm(current_caller(), new))

    async def CreatePartner(
        self, request: registry_pb2.CreatePartnerRequest, context: Any
    ) -> registry_pb2.CreatePartnerResponse:
        partner = await self._registry.create_partner(current_caller(), request.name, request.region)
        return registry_pb2.CreatePartnerResponse(partner=partner)

    async def CreateSite(
        self, request: registry_pb2.CreateSiteRequest, context: Any
    ) -> registry_pb2.CreateSiteResponse:
        new = NewSite(request.firm_id, request.slug, request.name, request.timezone or NewSite.timezone)
        return registry_pb2.CreateSiteResponse(site=await self._registry.create_site(current_caller(), new))

    async def CreateMachine(
        self, request: registry_pb2.CreateMachineRequest, context: Any
    ) -> registry_pb2.CreateMachineResponse:
        new = NewMachine(request.site_id, request.path, request.name, request.kind, _signals(request.signals))
        return registry_pb2.CreateMachineResponse(machine=await self._registry.create_machine(current_caller(), new))

    async def AddSignals(
        self, request: registry_pb2.AddSignalsRequest, context: Any
    ) -> registry_pb2.AddSignalsResponse:
        machine = await self._registry.add_signals(current_caller(), request.machine_id, _signals(request.signals))
        return registry_pb2.AddSignalsResponse(machine=machine)

    async def ListMachines(
        self, request: registry_pb2.ListMachinesRequest, context: Any
    ) -> registry_pb2.ListMachinesResponse:
        machines, token = await self._registry.list_machines(
            current_caller(), request.firm_id, request.page_size, request.page_token
        )
        return registry_pb2.ListMachinesResponse(machines=machines, next_page_token=token)

    async def IssueCredential(
        self, request: registry_pb2.IssueCredentialRequest, context: Any
    ) -> registry_pb2.IssueCredentialResponse:
        role = _ROLES.get(request.role)
        if role is None:
            raise Invalid(f"role: one of {', '.join(KEY_ROLES)}.")
        key, credential = await self._credentials.issue(
            current_caller(),
            role,
            firm_id=request.firm_id,
            partner_id=request.partner_id,
            label=request.label,
            valid_from_us=request.valid_from_us,
            valid_to_us=request.valid_to_us,
        )
        return registry_pb2.IssueCredentialResponse(key=key, credential=credential)

    async def RevokeCredential(
        self, request: registry_pb2.RevokeCredentialRequest, context: Any
    ) -> registry_pb2.RevokeCredentialResponse:
        await self._credentials.revoke(current_caller(), request.credential_id)
        return registry_pb2.RevokeCredentialResponse()

    async def RotateCredential(
        self, request: registry_pb2.RotateCredentialRequest, context: Any
    ) -> registry_pb2.RotateCredentialResponse:
        overlap_s = request.overlap_s if request.HasField("overlap_s") else OVERLAP_S_DEFAULT
        key, credential = await self._credentials.rotate(current_caller(), request.credential_id, overlap_s)
        return registry_pb2.RotateCredentialResponse(key=key, credential=credential)

    async def ListCredentials(
        self, request: registry_pb2.ListCredentialsRequest, context: Any
    ) -> registry_pb2.ListCredentialsResponse:
        listed, token = await self._credentials.page(
            current_caller(), request.firm_id, request.page_size, request.page_token
        )
        response = registry_pb2.ListCredentialsResponse(next_page_token=token)
        for one in listed:
            item = response.credentials.add(credential=one.issued.as_directory_entry(), state=one.state)
            item.credential.ClearField("sha256")
            item.replaces = one.issued.replaces
            if one.issued.used is not None:
                item.last_used_us = to_us(one.issued.used)
        return response


def _signals(signals: Any) -> list[NewSignal]:
    return [
        NewSignal(
            signal.name,
            signal.unit,
            signal.range_min if signal.HasField("range_min") else None,
            signal.range_max if signal.HasField("range_max") else None,
        )
        for signal in signals
    ]
