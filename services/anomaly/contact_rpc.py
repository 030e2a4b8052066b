"""Contacts, escalations and deliveries by gRPC."""

from typing import Any

from services.anomaly.contacts import ContactService, DeliveryFilter, WantedStep
from services.anomaly.delivery import ContactKind, DeliveryState
from services.anomaly.domain import Severity
from services.common.errors import Invalid
from services.common.messages import message_of, word_of
from services.common.rpc import current_caller
from smdih.anomaly.v1 import notification_pb2 as pb
from smdih.anomaly.v1 import notification_pb2_grpc as pb_grpc


class NotificationServicer(pb_grpc.NotificationServiceServicer):
    def __init__(self, contacts: ContactService) -> None:
        self._contacts = contacts

    async def CreateContact(self, request: pb.CreateContactRequest, context: Any) -> pb.CreateContactResponse:
        kind = word_of(ContactKind, pb.ContactKind, request.kind)
        if kind is None:
            raise Invalid("kind is webhook or email.")
        contact, secret = await self._contacts.create_contact(
            current_caller(),
            firm_id=request.firm_id,
            name=request.name,
            kind=kind,
            address=request.address,
        )
        return pb.CreateContactResponse(contact=message_of(pb.Contact, contact), secret=secret)

    async def ListContacts(self, request: pb.ListContactsRequest, context: Any) -> pb.ListContactsResponse:
        found = await self._contacts.contacts(current_caller(), firm_id=request.firm_id)
        return pb.ListContactsResponse(contacts=[message_of(pb.Contact, one) for one in found])

    async def RemoveContact(self, request: pb.RemoveContactRequest, context: Any) -> pb.RemoveContactResponse:
        await self._contacts.remove_contact(current_caller(), request.id)
        return pb.RemoveContactResponse()

    async def ConfirmContact(self, request: pb.ConfirmContactRequest, context: Any) -> pb.ConfirmContactResponse:
        found = await self._contacts.confirm_contact(current_caller(), request.id, code=request.code)
        return pb.ConfirmContactResponse(contact=message_of(pb.Contact, found))

    async def TryContact(self, request: pb.TryContactRequest, context: Any) -> pb.TryContactResponse:
        found = await self._contacts.try_contact(current_caller(), request.id)
        return pb.TryContactResponse(delivery=message_of(pb.Delivery, found))

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
        return pb.CreateEscalationResponse(escalation=message_of(pb.Escalation, found))

    async def ListEscalations(self, request: pb.ListEscalationsRequest, context: Any) -> pb.ListEscalationsResponse:
        found = await self._contacts.escalations(current_caller(), firm_id=request.firm_id)
        return pb.ListEscalationsResponse(escalations=[message_of(pb.Escalation, one) for one in found])

    async def RemoveEscalation(self, request: pb.RemoveEscalationRequest, context: Any) -> pb.RemoveEscalationResponse:
        await self._contacts.remove_escalation(current_caller(), request.id)
        return pb.RemoveEscalationResponse()

    async def ListDeliveries(self, request: pb.ListDeliveriesRequest, context: Any) -> pb.ListDeliveriesResponse:
        state = word_of(DeliveryState, pb.DeliveryState, request.state)
        if request.state and state is None:
            raise Invalid("state is not one of its values.")
        found = await self._contacts.deliveries(
            current_caller(),
            firm_id=request.firm_id,
            state=DeliveryFilter(state) if state else DeliveryFilter.ALL,
            alarm_id=request.alarm_id,
        )
        return pb.ListDeliveriesResponse(deliveries=[message_of(pb.Delivery, one) for one in found])

    async def ResendDelivery(self, request: pb.ResendDeliveryRequest, context: Any) -> pb.ResendDeliveryResponse:
        found = await self._contacts.resend(current_caller(), request.id)
        return pb.ResendDeliveryResponse(delivery=message_of(pb.Delivery, found))
