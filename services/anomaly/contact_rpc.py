"""Contacts, escalations and deliveries by gRPC."""

from typing import Any

from services.anomaly.contacts import ContactService, DeliveryFilter, WantedStep
from services.anomaly.delivery import Contact, ContactKind, Delivery, DeliveryState, Escalation
from services.anomaly.domain import Severity
from services.common.errors import Invalid
from services.common.rpc import current_caller
from smdih.anomaly.v1 import events_pb2 as events_pb
from smdih.anomaly.v1 import notification_pb2 as pb
from smdih.anomaly.v1 import notification_pb2_grpc as pb_grpc

_KINDS = {ContactKind.WEBHOOK: pb.CONTACT_KIND_WEBHOOK, ContactKind.EMAIL: pb.CONTACT_KIND_EMAIL}
_KINDS_OF = {number: kind for kind, number in _KINDS.items()}
_STATES = {
    DeliveryState.PENDING: pb.DELIVERY_STATE_PENDING,
    DeliveryState.SENT: pb.DELIVERY_STATE_SENT,
    DeliveryState.DEAD: pb.DELIVERY_STATE_DEAD,
}
_FILTERS = {number: DeliveryFilter(state.value) for state, number in _STATES.items()} | {
    pb.DELIVERY_STATE_UNSPECIFIED: DeliveryFilter.ALL
}


class NotificationServicer(pb_grpc.NotificationServiceServicer):
    def __init__(self, contacts: ContactService) -> None:
        self._contacts = contacts

    async def CreateContact(self, request: pb.CreateContactRequest, context: Any) -> pb.CreateContactResponse:
        if request.kind not in _KINDS_OF:
            raise Invalid("kind is webhook or email.")
        contact, secret = await self._contacts.create_contact(
            current_caller(),
            firm_id=request.firm_id,
            name=request.name,
            kind=_KINDS_OF[request.kind],
            address=request.address,
        )
        return pb.CreateContactResponse(contact=_contact(contact), secret=secret)

    async def ListContacts(self, request: pb.ListContactsRequest, context: Any) -> pb.ListContactsResponse:
        found = await self._contacts.contacts(current_caller(), firm_id=request.firm_id)
        return pb.ListContactsResponse(contacts=[_contact(one) for one in found])

    async def RemoveContact(self, request: pb.RemoveContactRequest, context: Any) -> pb.RemoveContactResponse:
        await self._contacts.remove_contact(current_caller(), request.id)
        return pb.RemoveContactResponse()

    async def TryContact(self, request: pb.TryContactRequest, context: Any) -> pb.TryContactResponse:
        found = await self._contacts.try_contact(current_caller(), request.id)
        return pb.TryContactResponse(delivery=_delivery(found))

    async def CreateEscalation(self, request: pb.CreateEscalationRequest, context: Any) -> pb.CreateEscalationResponse:
        if request.severity_min not in (0, *(severity.value for severity in Severity)):
            raise Invalid("severity_min is low, medium or high.")
        found = await self._contacts.create_escalation(
            current_caller(),
            firm_id=request.firm_id,
            name=request.name,
            site=request.site,
            severity_min=Severity(request.severity_min or Severity.LOW),
            tell_changes=request.tell_changes,
            steps=[WantedStep(step.after_s, list(step.contact_ids)) for step in request.steps],
        )
        return pb.CreateEscalationResponse(escalation=_escalation(found))

    async def ListEscalations(self, request: pb.ListEscalationsRequest, context: Any) -> pb.ListEscalationsResponse:
        found = await self._contacts.escalations(current_caller(), firm_id=request.firm_id)
        return pb.ListEscalationsResponse(escalations=[_escalation(one) for one in found])

    async def RemoveEscalation(self, request: pb.RemoveEscalationRequest, context: Any) -> pb.RemoveEscalationResponse:
        await self._contacts.remove_escalation(current_caller(), request.id)
        return pb.RemoveEscalationResponse()

    async def ListDeliveries(self, request: pb.ListDeliveriesRequest, context: Any) -> pb.ListDeliveriesResponse:
        if request.state not in _FILTERS:
            raise Invalid("state is not one of its values.")
        found = await self._contacts.deliveries(
            current_caller(), firm_id=request.firm_id, state=_FILTERS[request.state], alarm_id=request.alarm_id
        )
        return pb.ListDeliveriesResponse(deliveries=[_delivery(one) for one in found])

    async def ResendDelivery(self, request: pb.ResendDeliveryRequest, context: Any) -> pb.ResendDeliveryResponse:
        found = await self._contacts.resend(current_caller(), request.id)
        return pb.ResendDeliveryResponse(delivery=_delivery(found))


def _contact(contact: Contact) -> pb.Contact:
    return pb.Contact(
        id=contact.id,
        firm_id=contact.firm_id,
        name=contact.name,
        kind=_KINDS[contact.kind],
        address=contact.address,
    )


def _escalation(escalation: Escalation) -> pb.Escalation:
    return pb.Escalation(
        id=escalation.id,
        firm_id=escalation.firm_id,
        name=escalation.name,
        site=escalation.site,
        severity_min=events_pb.Severity.ValueType(escalation.severity_min),
        tell_changes=escalation.tell_changes,
        steps=[pb.EscalationStep(after_s=step.after_s, contact_ids=step.contact_ids) for step in escalation.steps],
    )


def _delivery(delivery: Delivery) -> pb.Delivery:
    return pb.Delivery(
        id=delivery.id,
        firm_id=delivery.firm_id,
        alarm_id=delivery.alarm_id,
        transition=delivery.transition,
        contact_id=delivery.contact_id,
        state=_STATES[delivery.state],
        attempts=delivery.attempts,
        due_us=delivery.due_us,
        made_us=delivery.made_us,
        finished_us=delivery.finished_us or 0,
        last_error=delivery.last_error,
    )
