"""Two firms, two partners, and one of everything that the first of each has, for trying who gets at it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from demo.journey import COSTS, DECLARATION
from localstack.hub import Hub
from tests.oidc import Provider
from tests.polling import eventually

# Stands in every text of the first firm, so that it can be looked for in answers to others.
MARK = "quokka"

SERVICES = ("ingest", "anomaly", "matching", "funding")


@dataclass
class World:
    hub: Hub
    # Bearer keys and tokens of who asks, by a name of it.
    bearers: dict[str, str]
    # Of things of the first firm and partner, by the name that a path, a body or a message has for them.
    ids: dict[str, Any]
    clients: dict[str, httpx.AsyncClient] = field(default_factory=dict)

    async def call(self, service: str, method: str, path: str, body: Any = None, *, key: str = "operator") -> Any:
        """Made, or the test fails; a key or thing that has just been made may take a moment to be known elsewhere."""
        found: httpx.Response | None = None

        async def answered() -> bool:
            nonlocal found
            found = await self.clients[service].request(
                method, path, json=body, headers={"Authorization": f"Bearer {self.bearers[key]}"}
            )
            waits = found.status_code in (401, 404, 429, 503) or found.json().get("reason") == "MATCH_UNKNOWN"
            assert found.is_success or waits, f"{method} {path}: {found.status_code} {found.text}"
            return found.is_success

        await eventually(answered)
        assert found is not None
        return found.json() if found.content else None


async def build(hub: Hub, provider: Provider) -> World:
    body: dict[str, Any]
    world = World(hub, {"operator": hub.operator_key}, {})
    ids = world.ids
    for service, where in hub.endpoints().items():
        if service in SERVICES:
            world.clients[service] = httpx.AsyncClient(base_url=where["http"], timeout=30)

    # Who asks -----------------------------------------------------------------------------------------------------------
    firms, partners = [], []
    for slug in (MARK, "other"):
        body = {"name": f"{slug} ltd", "slug": slug, "sic": "25.62", "region": "Northern Ireland", "size": "small"}
        firms.append((await world.call("ingest", "POST", "/v1/firms", body))["id"])
        body = {"name": f"{slug} university", "region": "Northern Ireland"}
        partners.append((await world.call("ingest", "POST", "/v1/partners", body))["id"])
    for name, role, owner in (
        ("own firm", "firm", {"firm_id": firms[0]}),
        ("own device", "device", {"firm_id": firms[0]}),
        ("own partner", "partner", {"partner_id": partners[0]}),
        ("firm", "firm", {"firm_id": firms[1]}),
        ("device", "device", {"firm_id": firms[1]}),
        ("partner", "partner", {"partner_id": partners[1]}),
    ):
        made = await world.call("ingest", "POST", "/v1/credentials", {"role": role, "label": MARK, **owner})
        world.bearers[name] = made["key"]
    world.bearers |= {
        "none": "",
        "wrong key": world.bearers["firm"][:-4] + "AAAA",
        "wrong token": provider.token("rsa", aud="elsewhere", smdih_role="operator"),
        "nobody's token": provider.token("rsa", smdih_role="auditor"),
        "firm by token": provider.token("ec", sub="f", smdih_role="firm", smdih_firm_id=firms[1]),
        "partner by token": provider.token("ed", sub="p", smdih_role="partner", smdih_partner_id=partners[1]),
        "provider": provider.token("rsa", sub="v", smdih_role="provider", smdih_provider_id="other-lab"),
        "own provider": provider.token("rsa", sub="w", smdih_role="provider", smdih_provider_id=f"{MARK}-lab"),
        "assessor": provider.token("ec", sub="a", smdih_role="assessor", smdih_provider_id="other-lab"),
        "operator by token": provider.token("ed", sub="o"),
    }

    # What the first have -----------------------------------------------------------------------------------------------
    firm_id = ids["firm_id"] = firms[0]
    ids["partner_id"] = partners[0]
    site = await world.call("ingest", "POST", "/v1/sites", {"firm_id": firm_id, "slug": "works", "name": MARK})
    body = {
        "site_id": site["id"],
        "path": "press",
        "name": MARK,
        "kind": "press",
        "signals": [{"name": "temperature", "unit": "degC"}],
    }
    machine = await world.call("ingest", "POST", "/v1/machines", body)
    ids |= {"site_id": site["id"], "machine_id": machine["id"], "signal_id": machine["signals"][0]["id"]}
    ids |= {"signal_ids": [ids["signal_id"]], "machine_ids": [ids["machine_id"]], "machine": f"{MARK}/works/press"}
    code = await world.call("ingest", "POST", "/v1/claim-codes", {"firm_id": firm_id, "label": MARK})
    ids["code_id"] = code["id"]
    body = {"role": "device", "label": MARK, "firm_id": firm_id}
    ids["credential_id"] = (await world.call("ingest", "POST", "/v1/credentials", body))["id"]
    frames = [{"ts": int(time.time() * 1000), "values": {"temperature": 21.5}}, {"ts": 1, "values": {"temperature": 1}}]
    body = {"source": MARK, "batches": [{"machine": machine["path"], "frames": frames}]}
    await world.call("ingest", "POST", "/v1/telemetry", body, key="own device")
    rule = {"machine_id": machine["id"], "signal_id": ids["signal_id"], "kind": "above", "name": MARK, "limit": 5.0}
    ids["rule_id"] = (await world.call("anomaly", "POST", "/v1/rules", rule, key="own firm"))["id"]
    for number in range(2):
        who = "own partner"
        text = "Engineers who diagnose spindles, bearings and gearboxes from vibration and temperature."
        body = {"kind": "expert" if number else "workshop", "title": f"{MARK} lab", "region": "Northern Ireland"}
        body |= {"text": text, "capacity_per_quarter": 6}
        name = f"{MARK}-lab" if number else f"{MARK}-workshop"
        await world.call("matching", "PUT", f"/v1/providers/{name}", body, key=who)
    ids["provider_id"] = f"{MARK}-lab"
    consent = {"request_id": "consent-1", "shared": ["fault", "figures", "profile"], "note": MARK}
    ids["consent_id"] = (await world.call("matching", "POST", "/v1/consents", consent, key="own firm"))["id"]
    need = {"request_id": "need-1", "text": f"{MARK}: the spindle vibrates and its bearings run hot"}
    opened = await world.call("matching", "POST", "/v1/needs", need | {"machine_id": machine["id"]}, key="own firm")
    ids["need_id"] = opened["need"]["id"]
    offers = (await world.call("matching", "GET", f"/v1/needs/{ids['need_id']}/offers", key="own firm"))["offers"]
    offer = next(one for one in offers if one["provider_id"] == ids["provider_id"])
    ids["offer_id"] = offer["id"]
    match = (await world.call("matching", "POST", f"/v1/offers/{offer['id']}/accept", {}, key="own firm"))["match"]
    ids["match_id"] = match["id"]
    await world.call("matching", "POST", f"/v1/matches/{match['id']}/engage", {}, key="own firm")
    now_us = time.time_ns() // 1000
    day_us = 86_400_000_000
    body = {
        "request_id": "call-1",
        "title": "Data for better machines",
        "budget_pence": 2_000_000_00,
        "opens_us": now_us - 60_000_000,
        "closes_us": now_us + 90 * day_us,
        "category": "experimental_development",
        "size_definition": "COMPANIES_ACT_2006",
        "rate_max": "0.40",
    }
    ids["call_id"] = (await world.call("funding", "POST", "/v1/calls", body))["id"]
    body = {
        "request_id": "application-1",
        "call_id": ids["call_id"],
        "match_id": match["id"],
        "costs": [{"category": category, "amount_pence": pence} for category, pence in COSTS],
        "declaration": DECLARATION,
    }
    application = await world.call("funding", "POST", "/v1/applications", body, key="own firm")
    ids["application_id"] = application["id"]
    path = f"/v1/applications/{application['id']}"
    cost = sum(pence for _, pence in COSTS)
    pledge = {
        "request_id": "pledge-1",
        "co_investor": MARK,
        "kind": "cash",
        "amount_pence": cost - application["assessment"]["max_grant_pence"],
    }
    made = await world.call("funding", "POST", f"{path}/pledges", pledge, key="own firm")
    ids["pledge_id"] = made["id"]
    await world.call("funding", "POST", f"{path}/pledges/{made['id']}/confirm", {"evidence": "letter seen"})
    await world.call("funding", "POST", f"{path}/submit", {}, key="own firm")
    decided = await world.call("funding", "POST", f"{path}/decide", {"award": True, "reason": "Every rule is met"})
    ids["award_id"] = decided["award"]["id"]
    return world


# Where any value of the right kind would not do.
EXAMPLES: dict[str, Any] = {
    "from_us": time.time_ns() // 1000 - 3_600_000_000,
    "to_us": time.time_ns() // 1000,
    "one_shot": True,
    "kg_per_kwh": "0.2",
    "year": 2026,
    "points": 10,
    "width_s": 60,
    "kind": "baseline",
    "format": "csv",
    "region": "Northern Ireland",
    "due": "2026-12-31",
    "valid_from": "2026-01-01",
    "percent": "70",
    "until_us": time.time_ns() // 1000 + 3_600_000_000,
    "size": "small",
}


def bodies(ids: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Of routes and calls whose values must fit each other, or be of a form that their type does not tell: whole requests that are
    good for who has what they name. Calls: in the JSON form of their messages."""
    now_us = time.time_ns() // 1000
    day_us = 86_400_000_000
    cost = {"category": "labour", "amount_pence": 1_000_00}
    line = cost | {"evidence": f"{MARK} invoice 1"}
    period = {"request_id": "access-1", "period_start": "2026-01-01", "period_end": "2026-03-31"}
    application = {
        "request_id": "access-1",
        "call_id": ids["call_id"],
        "match_id": ids["match_id"],
        "declaration": DECLARATION,
    }
    change = {"request_id": "access-1", "reason": MARK, "project_end": "2027-12-31"}
    figures = {"jobs_fte": "31", "value_added_pence": 1, "hours_worked": "1", "energy_kwh": "1", "carbon_kg_co2e": "1"}
    impact = {"year_ending": "2026-01-31", "figures": figures, "uncertainty_percent": "10", "method": MARK}
    project = {"project_start": "2026-12-01", "project_end": "2027-11-30"}
    document = {"reference": MARK, "sha256": "0" * 64}
    tariff = {"site_id": ids["site_id"], "valid_from": "2026-01-01", "source": MARK, "confirmed_by": MARK}
    tariff |= {"rates": [{"name": "all", "pence_per_kwh": "24.73"}]}
    room = {"request_id": "access-1", "match_id": ids["match_id"], "purpose": MARK, "data_from_us": now_us - day_us}
    room |= {"closes_us": now_us + day_us}
    room |= {"signals": [{"machine_id": ids["machine_id"], "signal_ids": ids["signal_ids"]}]}
    session = {"provider_id": f"{MARK}-workshop", "title": MARK, "seats": 1}
    session |= {"starts_us": now_us + day_us, "ends_us": now_us + 2 * day_us}
    provider = {
        "title": f"{MARK} lab",
        "region": "Northern Ireland",
        "capacity_per_quarter": 6,
        "text": f"{MARK}: spindles",
    }
    award, match = {"award_id": ids["award_id"]}, {"match_id": ids["match_id"]}
    milestone = award | {"milestone_id": "m-1"}
    funding, matching = "/smdih.funding.v1.", "/smdih.matching.v1."
    return {
        "ingest POST /v1/tariffs": tariff,
        "funding POST /v1/applications": application | {"costs": [cost]},
        "funding POST /v1/awards/{award_id}/accept": project,
        "funding POST /v1/awards/{award_id}/changes": change | {"kind": "time"},
        "funding POST /v1/awards/{award_id}/claims": period | {"costs": [line], "is_final": False},
        "funding POST /v1/awards/{award_id}/impact/{kind}": impact,
        "funding POST /v1/awards/{award_id}/milestones/{milestone_id}/document": document,
        "funding POST /v1/reviews/{review_id}/accept": {"no_conflict": True, "declaration": MARK},
        "matching POST /v1/bookings/{booking_id}/cancel": {"reason": MARK},
        "matching POST /v1/matches/{match_id}/score": {"points": 5, "comment": MARK},
        "matching POST /v1/rooms": room,
        "matching POST /v1/sessions/{session_id}/cancel": {"reason": MARK},
        "matching PUT /v1/providers/{provider_id}": provider | {"kind": "expert"},
        "matching PUT /v1/sessions/{session_id}": session,
        "/smdih.anomaly.v1.NotificationService/ListDeliveries": {"firm_id": ids["firm_id"]},
        "/smdih.ingest.v1.KpiService/AddTariff": tariff,
        f"{funding}AgreementService/AcceptOffer": award | project,
        f"{funding}AgreementService/SubmitClaim": award
        | period
        | {"costs": [line | {"category": "COST_CATEGORY_LABOUR"}]},
        f"{funding}ChangeService/RequestChange": award | change | {"kind": "CHANGE_KIND_TIME"},
        f"{funding}FundingService/CreateApplication": application
        | {"costs": [cost | {"category": "COST_CATEGORY_LABOUR"}]},
        f"{funding}ImpactService/ReportImpact": award | impact | {"kind": "IMPACT_KIND_BASELINE"},
        f"{funding}MilestoneService/SendMilestoneDocument": milestone | document,
        f"{funding}MilestoneService/ShowMilestone": milestone | {"evidence_json": "{}"},
        f"{matching}MatchingService/PutProvider": {
            "provider": provider | {"id": ids["provider_id"], "kind": "PROVIDER_KIND_EXPERT"}
        },
        f"{matching}MatchingService/ScoreMatch": match | {"points": 5, "comment": MARK},
        f"{matching}RoomService/OpenRoom": room,
        f"{matching}SessionService/PutSession": {"session": session | {"id": f"{MARK}-day"}},
    }


def names_in(body: Any, ids: Mapping[str, Any]) -> set[str]:
    """Of the first firm's things that a request names."""
    if isinstance(body, list):
        return {name for one in body for name in names_in(one, ids)}
    if not isinstance(body, dict):
        return set()
    mine = {name for name in body if name in ids}
    return mine | {name for one in body.values() for name in names_in(one, ids)}


def filled(schema: Mapping[str, Any], document: Mapping[str, Any], ids: Mapping[str, Any], named: set[str]) -> Any:
    """A value that the schema allows, naming things of the first firm wherever it names things; their names go to `named`."""
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return filled(schema[key][0], document, ids, named)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        found = {}
        for name, part in schema.get("properties", {}).items():
            if name in ids:
                named.add(name)
                found[name] = ids[name]
            elif name in EXAMPLES and "enum" not in part and "$ref" not in part:
                found[name] = EXAMPLES[name]
            elif name in schema.get("required", ()):
                found[name] = filled(part, document, ids, named)
        return found
    if kind == "array":
        return [filled(schema["items"], document, ids, named)]
    if kind in ("integer", "number"):
        return max(1, schema.get("minimum", 1))
    if schema.get("format") == "date":
        return "2026-01-01"
    return False if kind == "boolean" else "text"
