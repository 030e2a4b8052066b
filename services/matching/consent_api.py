"""The HTTP edge of consents."""

from fastapi import APIRouter

from services.common.clock import to_us
from services.common.errors import Invalid
from services.common.http import Authenticated
from services.matching.consents import Consent, NewConsent, Severity, SharedItem
from services.matching.forms import Body, RegistryId, TimeUs, us
from services.matching.messages import asked_time
from services.matching.service import Matching

_SEVERITIES = {severity.name.lower(): severity for severity in Severity}


class ConsentBody(Body):
    request_id: str = ""
    firm_id: RegistryId = 0
    shared: list[SharedItem]
    # Empty: all machines of the firm.
    machine_ids: list[RegistryId] = []
    severity_min: str = "any"
    # Left out: from now, until revoked.
    from_us: TimeUs | None = None
    until_us: TimeUs | None = None
    note: str = ""


class FirmBody(Body):
    firm_id: RegistryId = 0


class ConsentView(Body):
    id: str
    firm_id: int
    shared: list[SharedItem]
    machine_ids: list[int]
    severity_min: str
    from_us: int
    until_us: int | None
    note: str
    given_us: int
    given_by: int
    ended_us: int | None
    ended_by: int
    replaced: bool


class ConsentsView(Body):
    # None: no alarm of the firm opens a need.
    current: ConsentView | None
    history: list[ConsentView]


class RevokedView(Body):
    consent: ConsentView | None


def router(matching: Matching) -> APIRouter:
    routes = APIRouter(prefix="/v1/consents", tags=["consents"])

    @routes.post("")
    async def give_consent(caller: Authenticated, body: ConsentBody) -> ConsentView:
        """Agree that alarms of the firm's machines open needs; replaces the consent in force."""
        new = NewConsent(
            shared=body.shared,
            machine_ids=body.machine_ids,
            severity_min=_severity(body.severity_min),
            valid_from=asked_time("from_us", body.from_us),
            valid_until=asked_time("until_us", body.until_us),
            note=body.note,
        )
        return _consent_view(
            await matching.consents.give_consent(caller, body.firm_id, new, request_id=body.request_id)
        )

    @routes.post("/revoke")
    async def revoke_consent(caller: Authenticated, body: FirmBody | None = None) -> RevokedView:
        """From now on no alarm opens a need, and those that were opened and are not matched are closed."""
        ended = await matching.consents.revoke_consent(caller, body.firm_id if body else 0)
        return RevokedView(consent=None if ended is None else _consent_view(ended))

    @routes.get("")
    async def get_consent(caller: Authenticated, firm_id: RegistryId = 0) -> ConsentsView:
        """The consent in force and those before it, newest first."""
        found = await matching.consents.get_consent(caller, firm_id)
        return ConsentsView(
            current=None if found.current is None else _consent_view(found.current),
            history=[_consent_view(each) for each in found.ended],
        )

    return routes


def _severity(name: str) -> Severity:
    if name not in _SEVERITIES:
        raise Invalid("severity_min is any, low, medium or high.", reason="BAD_SEVERITY_MIN")
    return _SEVERITIES[name]


def _consent_view(consent: Consent) -> ConsentView:
    return ConsentView(
        id=consent.id,
        firm_id=consent.firm_id,
        shared=sorted(consent.shared),
        machine_ids=sorted(consent.machine_ids),
        severity_min=consent.severity_min.name.lower(),
        from_us=to_us(consent.valid_from),
        until_us=us(consent.valid_until),
        note=consent.note,
        given_us=to_us(consent.given),
        given_by=consent.given_by,
        ended_us=us(consent.ended),
        ended_by=consent.ended_by,
        replaced=consent.replaced,
    )
