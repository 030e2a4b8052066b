"""HTTP edge of the registry."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field

from services.common.http import Authenticated
from services.ingest.domain import NewFirm, NewMachine, NewSignal, NewSite
from services.ingest.forms import Body, as_dict
from services.ingest.registry.registry import Registry


class SignalBody(Body):
    name: str
    unit: str = ""
    range_min: float | None = None
    range_max: float | None = None

    def new(self) -> NewSignal:
        return NewSignal(self.name, self.unit, self.range_min, self.range_max)


class FirmBody(Body):
    name: str
    slug: str
    sic: str
    region: str
    size: str


class PartnerBody(Body):
    name: str
    region: str


class SiteBody(Body):
    firm_id: int = 0
    slug: str
    name: str
    timezone: str = "Europe/London"


class MachineBody(Body):
    site_id: int
    path: str
    name: str
    kind: str
    signals: list[SignalBody] = Field(default_factory=list)


class SignalsBody(Body):
    signals: list[SignalBody]


def registry_router(registry: Registry) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["registry"])

    @router.post("/firms", status_code=201)
    async def create_firm(body: FirmBody, caller: Authenticated) -> dict[str, Any]:
        return as_dict(await registry.create_firm(caller, NewFirm(**body.model_dump())))

    @router.post("/partners", status_code=201)
    async def create_partner(body: PartnerBody, caller: Authenticated) -> dict[str, Any]:
        return as_dict(await registry.create_partner(caller, body.name, body.region))

    @router.post("/sites", status_code=201)
    async def create_site(body: SiteBody, caller: Authenticated) -> dict[str, Any]:
        return as_dict(await registry.create_site(caller, NewSite(**body.model_dump())))

    @router.post("/machines", status_code=201)
    async def create_machine(body: MachineBody, caller: Authenticated) -> dict[str, Any]:
        signals = [signal.new() for signal in body.signals]
        return as_dict(
            await registry.create_machine(caller, NewMachine(body.site_id, body.path, body.name, body.kind, signals))
        )

    @router.post("/machines/{machine_id}/signals", status_code=201)
    async def add_signals(machine_id: int, body: SignalsBody, caller: Authenticated) -> dict[str, Any]:
        return as_dict(await registry.add_signals(caller, machine_id, [signal.new() for signal in body.signals]))

    @router.get("/firms")
    async def firms(caller: Authenticated, page_size: int = 0, page_token: str = "") -> dict[str, Any]:
        found, token = await registry.firms(caller, page_size, page_token)
        return {"firms": [as_dict(firm) for firm in found], "next_page_token": token}

    @router.get("/sites")
    async def sites(
        caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = ""
    ) -> dict[str, Any]:
        found, token = await registry.sites(caller, firm_id, page_size, page_token)
        return {"sites": [as_dict(site) for site in found], "next_page_token": token}

    @router.get("/machines")
    async def list_machines(
        caller: Authenticated, firm_id: int = 0, page_size: int = 0, page_token: str = ""
    ) -> dict[str, Any]:
        machines, token = await registry.list_machines(caller, firm_id, page_size, page_token)
        return {"machines": [as_dict(machine) for machine in machines], "next_page_token": token}

    return router
