"""The use cases of the data-maturity self-assessment: asked, scored, kept, and turned into a need."""

import uuid
from collections.abc import Mapping
from datetime import datetime

from services.common.clock import Clock, from_us, today
from services.common.database import Pool, transaction
from services.common.errors import Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import current_correlation_id, get_logger
from services.matching.domain import Source, Urgency
from services.matching.maturity import (
    Assessment,
    Questionnaire,
    need_draft,
    questionnaire_of,
    questionnaire_on,
    score,
)
from services.matching.service.checks import Known, checked_request_id, digest, first_answer, known_form
from services.matching.service.needs import Needs, NewNeed, OpenedNeed
from services.matching.store import maturity as maturity_store
from services.matching.store import needs as needs_store

log = get_logger(__name__)

ASSESSMENTS_SHOWN_MAX = 100


class Maturity:
    """How far a firm is with its data, in its own judgement."""

    def __init__(self, pool: Pool, known: Known, needs: Needs, *, clock: Clock) -> None:
        self._pool = pool
        self._known = known
        self._needs = needs
        self._clock = clock

    def questionnaire(self, caller: Caller) -> Questionnaire:
        """The one that is asked today."""
        caller.require(Role.FIRM, Role.PARTNER, Role.OPERATOR)
        return questionnaire_on(today(self._clock))

    async def assess(
        self, caller: Caller, firm_id: int, version: str, answers: Mapping[str, int], *, request_id: str
    ) -> Assessment:
        """Score a firm's answers and keep them."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        questionnaire = questionnaire_of(version)
        if questionnaire is None or questionnaire.valid_from > today(self._clock):
            raise Invalid("There is no such version; ask for the questionnaire first.", reason="UNKNOWN_VERSION")
        _check(questionnaire, answers)
        sha256 = digest(version=version, answers=dict(answers))
        repeatable = checked_request_id(request_id)
        scoring = score(questionnaire, answers)
        assessment = Assessment(
            id=uuid.uuid4().hex,
            firm_id=firm_id,
            version=version,
            answers=dict(answers),
            scoring=scoring,
            need_draft=need_draft(scoring),
            taken=self._now(),
        )
        async with transaction(self._pool) as connection:
            if repeatable:
                await needs_store.lock_requests(connection, firm_id, request_id)
                repeated = await maturity_store.assessment_by_request(connection, firm_id, request_id)
                if repeated is not None:
                    return first_answer(*repeated, sha256)
            await maturity_store.add_assessment(
                connection,
                assessment,
                by=caller.credential_id,
                request_id=request_id,
                request_sha256=sha256,
                correlation_id=current_correlation_id(),
            )
        log.info("maturity assessed", assessment=assessment.id, firm=firm_id, level=scoring.level)
        return assessment

    async def get_assessment(self, caller: Caller, assessment_id: str) -> Assessment:
        caller.require(Role.FIRM, Role.OPERATOR)
        async with transaction(self._pool) as connection:
            found = await maturity_store.assessment(connection, known_form(assessment_id))
        if found is None:
            raise NotFound()
        caller.check_sees_firm(found.firm_id)
        return found

    async def list_assessments(self, caller: Caller, firm_id: int) -> list[Assessment]:
        """The newest of a firm, newest first."""
        caller.require(Role.FIRM, Role.OPERATOR)
        firm_id = await self._known.firm(caller.firm_or(firm_id))
        async with transaction(self._pool) as connection:
            return await maturity_store.assessments_of_firm(connection, firm_id, limit=ASSESSMENTS_SHOWN_MAX)

    async def open_need(self, caller: Caller, assessment_id: str, text: str, urgency: Urgency) -> OpenedNeed:
        """Open the drafted need, or the text that the firm made of it. A repeat gives the need that was opened."""
        assessment = await self.get_assessment(caller, assessment_id)
        if assessment.need_id:
            return await self._needs.opened_need(caller, assessment.need_id)
        request_id = f"maturity-{assessment.id}"
        async with transaction(self._pool) as connection:
            before = await needs_store.need_by_request(connection, assessment.firm_id, request_id)
            if before is not None:  # whoever opened it was cut off before the assessment knew of it
                await maturity_store.set_need(connection, assessment.id, before[0].id)
        if before is not None:
            return await self._needs.opened_need(caller, before[0].id)
        text = text.strip() or assessment.need_draft
        if not text:
            raise Invalid("Nothing is weak, so there is no draft; say what you want help with.", reason="TEXT_MISSING")
        opened = await self._needs.open_need(
            caller,
            assessment.firm_id,
            NewNeed(text=text, urgency=urgency, source=Source.MATURITY),
            request_id=request_id,
        )
        async with transaction(self._pool) as connection:
            await maturity_store.set_need(connection, assessment.id, opened.need.id)
        return opened

    def _now(self) -> datetime:
        return from_us(self._clock.now_us())


def _check(questionnaire: Questionnaire, answers: Mapping[str, int]) -> None:
    known = {question.id: question for question in questionnaire.questions}
    missing, strange = known.keys() - answers.keys(), answers.keys() - known.keys()
    if missing or strange:
        raise Invalid(
            f"Answer each question once; missing: {', '.join(sorted(missing)) or 'none'}, not asked: {len(strange)}.",
            reason="OTHER_QUESTIONS",
        )
    for name, number in answers.items():
        if not 0 <= number <= known[name].points_max:
            raise Invalid(f"{name} has answers 0 to {known[name].points_max}.", reason="BAD_ANSWER")
