"""Contacts, escalations and deliveries over HTTP."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from services.anomaly.contacts import ContactService, DeliveryFilter, WantedStep
from services.anomaly.delivery import Contact, ContactKind, Delivery, DeliveryState, Escalation
from services.anomaly.domain import Severity
from services.common.http import Authenticated

_SEVERITIES = {severity.name.lower(): severity for severity in Severity}

Firm = Annotated[int, Query(ge=0)]


class ContactIn(BaseModel):
    """`address` is a web address (webhook) or a mail address. Operators name the firm."""

    model_config = ConfigDict(extra="forbid")

    firm_id: int = 0
    name: str
    kind: ContactKind
    address: str


class ContactOut(BaseModel):
    id: str
    firm_id: int
    name: str
    kind: ContactKind
    address: str
    confirmed: bool


class ConfirmIn(BaseModel):
    """`code` is what was sent to the mail address."""

    model_config = ConfigDict(extra="forbid")

    code: Annotated[str, Field(max_length=100)]


class NewContactOut(BaseModel):
    """`secret` is what webhooks are signed with; it is shown only now."""

    contact: ContactOut
    secret: str


class ContactList(BaseModel):
    contacts: list[ContactOut]


class StepIn(BaseModel):
    """Told when nobody has acknowledged for `after_s`; 0: as soon as the alarm is raised."""

    model_config = ConfigDict(extra="forbid")

    after_s: int
    contact_ids: list[str]


class EscalationIn(BaseModel):
    """`site` is a site's short name, as in the machine's path; empty: every site."""

    model_config = ConfigDict(extra="forbid")

    firm_id: int = 0
    name: str
    site: str = ""
    severity_min: Annotated[str, Field(pattern="^(low|medium|high)$")] = "low"
    tell_changes: bool = False
    steps: list[StepIn]


class StepOut(BaseModel):
    after_s: int
    contact_ids: list[str]


class EscalationOut(BaseModel):
    id: str
    firm_id: int
    name: str
    site: str
    severity_min: str
    tell_changes: bool
    steps: list[StepOut]


class EscalationList(BaseModel):
    escalations: list[EscalationOut]


class DeliveryOut(BaseModel):
    """An empty `alarm_id`: a trial. `due_us` is the time of the next try of a pending one."""

    id: str
    firm_id: int
    alarm_id: str
    transition: str
    contact_id: str
    correlation_id: str
    state: DeliveryState
    attempts: int
    due_us: int
    made_us: int
    finished_us: int | None
    last_error: str


class DeliveryList(BaseModel):
    deliveries: list[DeliveryOut]


def router(contacts: ContactService) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["notifications"])

    @routes.get("/contacts")
    async def list_contacts(caller: Authenticated, firm_id: Firm = 0) -> ContactList:
        """Newest first."""
        return ContactList(contacts=[_contact(one) for one in await contacts.contacts(caller, firm_id=firm_id)])

    @routes.post("/contacts", status_code=201)
    async def create_contact(caller: Authenticated, body: ContactIn) -> NewContactOut:
        """Where a firm wants to be told of alarms: a web address that takes signed POSTs, or a mail address. The latter gets a
        code, and alarms once that has been confirmed."""
        contact, secret = await contacts.create_contact(
            caller, firm_id=body.firm_id, name=body.name, kind=body.kind, address=body.address
        )
        return NewContactOut(contact=_contact(contact), secret=secret)

    @routes.delete("/contacts/{contact_id}", status_code=204)
    async def remove_contact(caller: Authenticated, contact_id: str) -> None:
        """It is told nothing more."""
        await contacts.remove_contact(caller, contact_id)

    @routes.post("/contacts/{contact_id}/confirm")
    async def confirm_contact(caller: Authenticated, contact_id: str, body: ConfirmIn) -> ContactOut:
        """Give the code that was sent to its mail address."""
        return _contact(await contacts.confirm_contact(caller, contact_id, code=body.code))

    @routes.post("/contacts/{contact_id}/try")
    async def try_contact(caller: Authenticated, contact_id: str) -> DeliveryOut:
        """Send it a trial message, or its code once more; look at the delivery to see what came of it."""
        return _delivery(await contacts.try_contact(caller, contact_id))

    @routes.get("/escalations")
    async def list_escalations(caller: Authenticated, firm_id: Firm = 0) -> EscalationList:
        """Newest first."""
        found = await contacts.escalations(caller, firm_id=firm_id)
        return EscalationList(escalations=[_escalation(one) for one in found])

    @routes.post("/escalations", status_code=201)
    async def create_escalation(caller: Authenticated, body: EscalationIn) -> EscalationOut:
        """Who is told of which alarms, and who next when nobody acknowledges. Holds for alarms raised from now on."""
        return _escalation(
            await contacts.create_escalation(
                caller,
                firm_id=body.firm_id,
                name=body.name,
                site=body.site,
                severity_min=_SEVERITIES[body.severity_min],
                tell_changes=body.tell_changes,
                steps=[WantedStep(step.after_s, step.contact_ids) for step in body.steps],
            )
        )

    @routes.delete("/escalations/{escalation_id}", status_code=204)
    async def remove_escalation(caller: Authenticated, escalation_id: str) -> None:
        await contacts.remove_escalation(caller, escalation_id)

    @routes.get("/deliveries")
    async def list_deliveries(
        caller: Authenticated, firm_id: Firm = 0, state: DeliveryFilter = DeliveryFilter.ALL, alarm_id: str = ""
    ) -> DeliveryList:
        """Newest first; `state=dead` shows those that were given up."""
        found = await contacts.deliveries(caller, firm_id=firm_id, state=state, alarm_id=alarm_id)
        return DeliveryList(deliveries=[_delivery(one) for one in found])

    @routes.post("/deliveries/{delivery_id}/resend")
    async def resend_delivery(caller: Authenticated, delivery_id: str) -> DeliveryOut:
        """Try a dead one again from the start."""
        return _delivery(await contacts.resend(caller, delivery_id))

    return routes


def _contact(contact: Contact) -> ContactOut:
    return ContactOut(**{name: getattr(contact, name) for name in ContactOut.model_fields})


def _escalation(escalation: Escalation) -> EscalationOut:
    return EscalationOut(**asdict(escalation) | {"severity_min": escalation.severity_min.name.lower()})


def _delivery(delivery: Delivery) -> DeliveryOut:
    return DeliveryOut(**asdict(delivery))
