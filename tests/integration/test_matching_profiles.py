"""Evidence and reviews of profiles, self-assessments of firms, and the fairness report."""

from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
import pytest_asyncio

from services.common.clock import from_us
from services.common.kafka import Publisher
from services.common.settings import Settings
from services.matching.notices import LONDON
from smdih.matching.v1 import (
    matching_pb2,
    maturity_pb2,
    maturity_pb2_grpc,
    reports_pb2,
    reports_pb2_grpc,
)
from tests.integration.matching_hub import (
    KEYS,
    PROVIDERS,
    Hub,
    bearer,
    publish_world,
    refused_by_grpc,
    running_hub,
)
from tests.polling import eventually

SHA256 = "0123456789abcdef" * 4
ESCO = "http://data.europa.eu/esco/skill/ccd0a1d9-afda-43d9-b901-96344886e14d"


@pytest_asyncio.fixture(scope="module")
async def one_hub(settings: Settings, publisher: Publisher) -> AsyncIterator[Hub]:
    await publish_world(publisher)
    async with running_hub(settings) as running:
        yield running


@pytest_asyncio.fixture
async def hub(one_hub: Hub) -> AsyncIterator[Hub]:
    await one_hub.empty()
    yield one_hub
    one_hub.clock.shift = timedelta(0)


def day(hub: Hub, days: int) -> str:
    return (from_us(hub.clock.now_us()).date() + timedelta(days=days)).isoformat()


def document(**fields: Any) -> dict[str, Any]:
    return {"title": "Insurance", "reference": "file 17/26", "sha256": SHA256, **fields}


async def test_a_provider_is_offered_until_its_review_is_due_or_a_document_it_needs_runs_out(hub: Hub) -> None:
    await hub.put_providers(
        "gear-rigs",
        esco_skills=[ESCO],
        review_on=day(hub, 30),
        expires_on=day(hub, 60),
        evidence=[document(expires_on=day(hub, 10), required=True), document(title="Prize", expires_on=day(hub, 5))],
    )
    shown = await hub.ok("firm", "GET", "/v1/providers/gear-rigs")
    assert (shown["offered_until"], shown["esco_skills"]) == (day(hub, 10), [ESCO])
    assert [each["title"] for each in shown["evidence"]] == ["Insurance", "Prize"]
    opened = await hub.ok("firm", "POST", "/v1/needs", {"text": "Our gears whine."})
    assert [each["provider_id"] for each in opened["offers"]] == ["gear-rigs"]
    by_grpc = await hub.stub.GetProvider(
        matching_pb2.GetProviderRequest(provider_id="gear-rigs"),
        metadata=(("authorization", f"Bearer {KEYS['firm']}"),),
    )
    assert by_grpc.provider.evidence[0].required
    assert by_grpc.provider.offered_until == shown["offered_until"]
    assert list(by_grpc.provider.esco_skills) == [ESCO]
    hub.clock.shift = timedelta(days=11)
    assert (await hub.ok("firm", "POST", "/v1/needs", {"text": "Our gears whine."}))["offers"] == []
    assert (await hub.call("firm", "GET", "/v1/providers/gear-rigs")).status_code == 404

    async def lapsed() -> bool:
        found = (await hub.ok("firm", "GET", f"/v1/needs/{opened['need']['id']}/offers"))["offers"]
        return [(each["state"], each["decision_reason"]) for each in found] == [("lapsed", "PROVIDER_GONE")]

    await eventually(lapsed)
    # The document renewed: back at once.
    await hub.put_providers("gear-rigs", review_on=day(hub, 30), evidence=[document(required=True)])
    assert (await hub.ok("firm", "POST", "/v1/needs", {"text": "Our gears whine."}))["offers"]
    hub.clock.shift = timedelta(days=45)
    assert (await hub.ok("firm", "POST", "/v1/needs", {"text": "Our gears whine."}))["offers"] == []


async def test_a_partner_is_told_ahead_of_what_takes_its_provider_out_of_the_offers(hub: Hub) -> None:
    papers = [document(expires_on=day(hub, 20), required=True), document(title="Picture", expires_on=day(hub, 3))]
    await hub.put_providers("forming", review_on=day(hub, 200), evidence=papers)
    act_by = day(hub, 20)

    async def told() -> list[dict[str, Any]]:
        found = (await hub.ok("partner", "GET", "/v1/notices?page_size=500"))["notices"]
        return [each for each in found if (each["kind"], each["subject_id"]) == ("provider_due", "forming")]

    for days, texts in ((1, 1), (2, 1), (14, 2), (21, 3)):
        hub.clock.shift = timedelta(days=days)

        async def as_many(texts: int = texts) -> bool:
            return len(await told()) == texts

        await eventually(as_many)
    over, soon, ahead = await told()
    assert "is not offered any more" in over["text"]
    assert soon["text"].endswith('its document "Insurance" runs out. Put the profile anew to keep it offered.')
    assert from_us(ahead["act_by_us"]).astimezone(LONDON).date().isoformat() == act_by


async def test_skills_of_esco_that_a_need_names_bring_who_offers_them_nearer(hub: Hub) -> None:
    alike = {"kind": "expert", "title": "Gear specialist", "text": "Gears and bearings.", "capacity_per_quarter": 5}
    other = "http://data.europa.eu/esco/skill/S1.2"
    await hub.ok("partner", "PUT", "/v1/providers/a-plain", alike)
    await hub.ok("partner", "PUT", "/v1/providers/b-half", {**alike, "esco_skills": [ESCO]})
    await hub.ok("partner", "PUT", "/v1/providers/c-both", {**alike, "esco_skills": [ESCO, other]})
    need = {"text": "Our gears whine.", "request_id": "esco"}
    plain = await hub.ok("firm", "POST", "/v1/needs", need)
    assert [each["provider_id"] for each in plain["offers"]] == ["a-plain", "b-half", "c-both"]
    assert {each["parts"]["skills"] for each in plain["offers"]} == {0}
    asking = {"text": "Our gears whine.", "esco_skills": [ESCO, other, ESCO]}
    changed = await hub.call("firm", "POST", "/v1/needs", {**asking, "request_id": "esco"})
    assert changed.json()["reason"] == "REQUEST_ID_REUSED"
    named = await hub.ok("firm", "POST", "/v1/needs", asking)
    assert named["need"]["esco_skills"] == [ESCO, other]
    assert [(each["provider_id"], each["parts"]["skills"]) for each in named["offers"]] == [
        ("c-both", 0.15),
        ("b-half", 0.075),
        ("a-plain", 0),
    ]
    told = named["offers"][1]["reasons"]
    assert f"It offers 1 of the 2 skills asked for: ESCO {ESCO.rpartition('/')[2]}." in told
    # By gRPC, and in a round.
    request = matching_pb2.OpenNeedRequest(text="Our gears whine.", esco_skills=[other], wait_for_round=True)
    opened = await hub.stub.OpenNeed(request, metadata=bearer("firm"))
    assert list(opened.need.esco_skills) == [other]
    await hub.ok("operator", "POST", "/v1/rounds", {"round_id": "esco"})
    assert await hub.matching.rounds.carry_out()
    [offer] = (await hub.ok("firm", "GET", f"/v1/needs/{opened.need.id}/offers"))["offers"]
    assert (offer["provider_id"], offer["parts"]["skills"]) == ("c-both", 0.15)
    for skills, reason in ((["vibration"], "BAD_ESCO_SKILL"), ([ESCO] * 51, "TOO_MANY")):
        bad = await hub.call("firm", "POST", "/v1/needs", {"text": "Gears.", "esco_skills": skills})
        assert (bad.status_code, bad.json()["reason"]) == (400, reason)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"esco_skills": ["vibration"]}, "BAD_ESCO_SKILL"),
        ({"esco_skills": [ESCO] * 51}, "TOO_MANY"),
        ({"evidence": [document(sha256="abc")]}, "BAD_EVIDENCE"),
        ({"evidence": [document(title=" ")]}, "BAD_EVIDENCE"),
        ({"evidence": [document()] * 51}, "TOO_MANY"),
        ({"review_on": "2000-01-01"}, "BAD_REVIEW_DATE"),
        ({"review_on": "9999-01-01"}, "BAD_REVIEW_DATE"),
    ],
)
async def test_a_bad_profile_is_refused_with_its_reason(hub: Hub, fields: dict[str, Any], reason: str) -> None:
    answer = await hub.call("partner", "PUT", "/v1/providers/bad", {**PROVIDERS["gear-rigs"], **fields})
    assert (answer.status_code, answer.json()["reason"]) == (400, reason)


async def test_a_self_assessment_gives_a_level_and_opens_a_need(hub: Hub) -> None:
    await hub.put_providers("iot-basics")
    asked = await hub.ok("firm", "GET", "/v1/maturity/questionnaire")
    answers = {question["id"]: 1 for question in asked["questions"]}
    body = {"version": asked["version"], "answers": answers, "request_id": "first"}
    assessed = await hub.ok("firm", "POST", "/v1/maturity/assessments", body)
    assert (assessed["level"], assessed["share"]) == ("collecting", pytest.approx(1 / 3))
    assert set(assessed["topics"]) == {"capture", "storage", "use", "people", "security"}
    assert await hub.ok("firm", "POST", "/v1/maturity/assessments", body) == assessed
    path = f"/v1/maturity/assessments/{assessed['id']}"
    opened = await hub.ok("firm", "POST", f"{path}/need", {})
    assert (opened["need"]["text"], opened["need"]["source"]) == (assessed["need_draft"], "maturity")
    assert [each["provider_id"] for each in opened["offers"]] == ["iot-basics"]
    again = await hub.ok("firm", "POST", f"{path}/need", {"text": "Something else."})
    assert again["need"]["id"] == opened["need"]["id"]
    assert (await hub.ok("firm", "GET", path))["need_id"] == opened["need"]["id"]
    # Cut off before the assessment knew of its need: the need is found, whatever it says.
    await hub.pool.execute("UPDATE maturity_assessment SET need_id = NULL WHERE need_id = $1", opened["need"]["id"])
    found = await hub.ok("firm", "POST", f"{path}/need", {"text": "Something else."})
    assert found["need"]["id"] == opened["need"]["id"]
    assert (await hub.ok("firm", "GET", path))["need_id"] == opened["need"]["id"]
    assert (await hub.ok("firm", "GET", "/v1/maturity/assessments"))["assessments"][0]["id"] == assessed["id"]
    calls: list[tuple[str, str, str, Any, int]] = [
        ("other_firm", "GET", path, None, 404),
        ("other_firm", "POST", f"{path}/need", {}, 404),
        ("partner", "GET", path, None, 403),
        ("partner", "POST", "/v1/maturity/assessments", body, 403),
        ("device", "GET", "/v1/maturity/questionnaire", None, 403),
        ("", "GET", "/v1/maturity/questionnaire", None, 401),
        ("firm", "POST", "/v1/maturity/assessments", {**body, "request_id": "", "version": "none"}, 400),
        ("firm", "POST", "/v1/maturity/assessments", {**body, "request_id": "", "answers": {}}, 400),
        ("firm", "POST", "/v1/maturity/assessments", {**body, "answers": {**answers, "skills": 4}}, 400),
        ("firm", "POST", "/v1/maturity/assessments", {**body, "answers": {**answers, "skills": 2}}, 409),
    ]
    for who, method, called, sent, status in calls:
        answer = await hub.call(who, method, called, sent)
        assert answer.status_code == status, (who, method, called, answer.text)


async def test_a_self_assessment_by_grpc(hub: Hub) -> None:
    await hub.put_providers("iot-basics")
    maturity, pb = maturity_pb2_grpc.MaturityServiceStub(hub.channel), maturity_pb2
    ask = pb.GetQuestionnaireRequest()
    asked = (await maturity.GetQuestionnaire(ask, metadata=bearer("partner"))).questionnaire
    assert (asked.questions[0].topic, len(asked.questions[0].answers)) == (pb.TOPIC_CAPTURE, 4)
    answers = {question.id: 1 for question in asked.questions} | {"backup": 3}
    request = pb.AssessRequest(version=asked.version, answers=answers, request_id="by-wire")
    assessed = (await maturity.Assess(request, metadata=bearer("firm"))).assessment
    by_http = await hub.ok("firm", "GET", f"/v1/maturity/assessments/{assessed.id}")
    assert (assessed.level, assessed.share, assessed.need_draft, assessed.taken_us, dict(assessed.answers)) == (
        *(by_http[name] for name in ("level", "share", "need_draft", "taken_us")),
        answers,
    )
    assert {pb.Topic.Name(each.topic): each.share for each in assessed.topics} == {
        f"TOPIC_{topic.upper()}": share for topic, share in by_http["topics"].items()
    }
    assert (await maturity.Assess(request, metadata=bearer("firm"))).assessment == assessed
    other_answers = pb.AssessRequest(version=asked.version, answers={**answers, "backup": 2}, request_id="by-wire")
    assert await refused_by_grpc(maturity.Assess, other_answers, "firm") == "ALREADY_EXISTS"
    open_it = pb.OpenAssessedNeedRequest(assessment_id=assessed.id, urgency=matching_pb2.URGENCY_HIGH)
    opened = await maturity.OpenAssessedNeed(open_it, metadata=bearer("firm"))
    assert (opened.need.source, opened.need.urgency) == (matching_pb2.NEED_SOURCE_MATURITY, matching_pb2.URGENCY_HIGH)
    assert [each.offer.provider_id for each in opened.offers] == ["iot-basics"]
    get = pb.GetAssessmentRequest(assessment_id=assessed.id)
    assert (await maturity.GetAssessment(get, metadata=bearer("operator"))).assessment.need_id == opened.need.id
    listed = await maturity.ListAssessments(pb.ListAssessmentsRequest(), metadata=bearer("firm"))
    assert [each.id for each in listed.assessments].count(assessed.id) == 1
    refused: list[tuple[Any, Any, str, str]] = [
        (maturity.GetAssessment, get, "other_firm", "NOT_FOUND"),
        (maturity.GetAssessment, get, "partner", "PERMISSION_DENIED"),
        (maturity.GetAssessment, pb.GetAssessmentRequest(assessment_id="\0"), "firm", "NOT_FOUND"),
        (maturity.OpenAssessedNeed, open_it, "other_firm", "NOT_FOUND"),
        (maturity.OpenAssessedNeed, pb.OpenAssessedNeedRequest(urgency=9), "firm", "INVALID_ARGUMENT"),  # type: ignore[arg-type]
        (maturity.Assess, request, "partner", "PERMISSION_DENIED"),
        (maturity.Assess, pb.AssessRequest(version=asked.version), "firm", "INVALID_ARGUMENT"),
        (maturity.Assess, pb.AssessRequest(firm_id=2, version=asked.version), "firm", "PERMISSION_DENIED"),
        (maturity.ListAssessments, pb.ListAssessmentsRequest(firm_id=2), "firm", "PERMISSION_DENIED"),
        (maturity.ListAssessments, pb.ListAssessmentsRequest(), "operator", "INVALID_ARGUMENT"),
        (maturity.GetQuestionnaire, ask, "device", "PERMISSION_DENIED"),
        (maturity.GetQuestionnaire, ask, "", "UNAUTHENTICATED"),
    ]
    for call, sent, who, status in refused:
        assert await refused_by_grpc(call, sent, who) == status, (sent, who)


async def test_operators_see_how_groups_of_firms_fare_and_no_single_firm(hub: Hub) -> None:
    await hub.pool.execute("UPDATE need SET opened = opened - interval '200 days'")
    await hub.put_providers("gear-rigs", capacity_per_quarter=50)
    await hub.put_providers("iot-basics")
    for number in range(6):
        opened = await hub.ok("firm", "POST", "/v1/needs", {"text": f"Our gears whine, stand {number}."})
        if number < 3:
            await hub.ok("firm", "POST", f"/v1/offers/{opened['offers'][number % 2]['id']}/accept")
    for number in range(2):
        await hub.ok("other_firm", "POST", "/v1/needs", {"text": f"Our ovens are cold, {number}."})
    report = await hub.ok("operator", "GET", "/v1/reports/fairness")
    [small] = report["by_size"]
    assert (small["group"], small["needs"], small["matched_share"], small["unanswered_share"]) == (
        "small",
        8,
        0.375,
        0.625,
    )
    assert (small["offers_mean"], small["without_offer_share"]) == (2, 0)
    assert small["accepted_rank_mean"] == pytest.approx(4 / 3)
    assert 0 <= small["first_offer_s_median"] < 5
    # Wales has too few, and the East Midlands would tell by difference.
    assert [(each["group"], each["suppressed"]) for each in report["by_region"]] == [
        ("East Midlands", True),
        ("Wales", True),
    ]
    assert {each["matched_share"] for each in report["by_region"]} == {None}
    for who, status in (("firm", 403), ("partner", 403), ("device", 403), ("", 401)):
        assert (await hub.call(who, "GET", "/v1/reports/fairness")).status_code == status
    reports, ask = reports_pb2_grpc.ReportServiceStub(hub.channel), reports_pb2.GetFairnessRequest()
    by_grpc = await reports.GetFairness(ask, metadata=bearer("operator"))
    [wired] = by_grpc.by_size
    assert (wired.group, wired.needs, wired.matched_share, by_grpc.group_min) == ("small", 8, 0.375, 5)
    assert [(each.group, each.suppressed, each.HasField("matched_share")) for each in by_grpc.by_region] == [
        ("East Midlands", True, False),
        ("Wales", True, False),
    ]
    for who in ("firm", "partner", "device"):
        assert await refused_by_grpc(reports.GetFairness, ask, who) == "PERMISSION_DENIED"
    early = reports_pb2.GetFairnessRequest(from_us=5, until_us=5)
    assert await refused_by_grpc(reports.GetFairness, early, "operator") == "INVALID_ARGUMENT"
    empty = await hub.ok("operator", "GET", "/v1/reports/fairness?from_us=1000000000000000&until_us=1000000001000000")
    assert (empty["by_size"], empty["by_region"]) == ([], [])
    last_us = 253_402_300_799_000_000  # in the year 9999
    for period in ("from_us=5&until_us=5", f"from_us={last_us}", f"until_us={last_us}&from_us=5", f"from_us={2**62}"):
        bad = await hub.call("operator", "GET", f"/v1/reports/fairness?{period}")
        assert (bad.status_code, bad.json()["reason"]) == (400, "BAD_TIME")
