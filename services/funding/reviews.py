"""Assessment of applications: assessors are found without conflict, invited, answer and score; people moderate; a panel decides."""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller, Role
from services.common.logs import get_logger
from services.funding import application_store, call_store, group_store, review_store
from services.funding.assessor_finder import PROPOSED_MAX, AssessorFinder, Proposal, Question
from services.funding.domain import (
    Application,
    Call,
    Match,
    checked_text,
    is_id,
    uk_day,
)
from services.funding.judging import application_of, audit_application, call_of, there
from services.funding.paging import next_token, page
from services.funding.parameters import ParametersAt, ParameterTable
from services.funding.permissions import Action, check_may
from services.funding.requests import understood
from services.funding.reviewing import (
    ACTIVE,
    DeclinedAs,
    Moderation,
    ModerationOutcome,
    Review,
    ReviewState,
    Verdict,
    checked_percent,
    verdict,
)

log = get_logger(__name__)

# More than any call is expected to have; beyond it a call's panel has to be cut into calls.
PANEL_APPLICATIONS_MAX = 5_000


class TooManyAssessors(Conflict):
    """An application has at most that many assessors; take one back first."""

    REASON = "TOO_MANY_ASSESSORS"


@dataclass(frozen=True, kw_only=True)
class Task:
    """A review with what its assessor has to read: what the project is, not what the firm says of its own standing."""

    review: Review
    call: Call
    application: Application
    match: Match
    firm_name: str


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An application's reviews, moderations and what they come to today."""

    application_id: str
    reviews: tuple[Review, ...]
    moderations: tuple[Moderation, ...]
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class PanelRow:
    """One line of the panel sheet. `rank` is shared by equal means; none without a mean."""

    rank: int | None
    tied: bool
    application: Application
    firm_name: str
    region: str
    verdict: Verdict


class ReviewService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(
        self, pool: Pool, *, finder: AssessorFinder, table: ParameterTable, directory: Directory, clock: Clock
    ) -> None:
        self._pool = pool
        self._finder = finder
        self._table = table
        self._directory = directory
        self._clock = clock

    # Operators

    async def propose(self, caller: Caller, application_id: str, *, key: str, count: int) -> Proposal:
        """Who fits best, and who was left out and why. Stores nothing."""
        caller.require(Role.OPERATOR)
        if not 1 <= count <= PROPOSED_MAX:
            raise Invalid(f"count is from 1 to {PROPOSED_MAX}.", reason="COUNT_OUT_OF_RANGE")
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id)
            question = await self._question(connection, application)
        return await self._finder.propose(key, question, count=count)

    async def invite(self, caller: Caller, application_id: str, *, key: str, provider_ids: Sequence[str]) -> Judged:
        """Only assessors whom the matching service proposes now, free of conflict, are invited. A repeat changes nothing."""
        caller.require(Role.OPERATOR)
        wanted = dict.fromkeys(provider_ids)
        most = self._parameters().whole("assessment.assessors_max")
        if not 1 <= len(wanted) <= most or not all(is_id(one) for one in wanted):
            raise Invalid(f"provider_ids: 1 to {most} ids of proposed assessors.", reason="PROVIDER_IDS_INVALID")
        proposal = await self.propose(caller, application_id, key=key, count=PROPOSED_MAX)
        proposed = {one.provider_id: one for one in proposal.assessors}
        for one in wanted:
            if one not in proposed:
                against = next((left for left in proposal.excluded if left.provider_id == one), None)
                raise Conflict(
                    " ".join(against.reasons) if against else f"{one} is not among the assessors proposed for this.",
                    reason=against.codes[0] if against and against.codes else "ASSESSOR_NOT_PROPOSED",
                )
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            check_may(caller, application, Action.INVITE_ASSESSORS)
            for one in wanted:
                review = Review(
                    id=uuid.uuid4().hex,
                    application_id=application.id,
                    provider_id=one,
                    partner_id=proposed[one].partner_id,
                    name=proposed[one].name,
                    reasons=proposed[one].reasons,
                    ranker_version=proposal.ranker_version,
                    state=ReviewState.INVITED,
                    invited_us=self._clock.now_us(),
                )
                if await review_store.add_review(connection, review, credential_id=caller.credential_id):
                    await audit_application(
                        connection, self._clock, caller, "assessor_invited", application, {"provider_id": one}
                    )
            judged = await self._judged(connection, application.id)
            if sum(review.state in ACTIVE for review in judged.reviews) > most:
                raise TooManyAssessors(f"An application has at most {most} assessors; take one back first.")
        log.info("assessors invited", application_id=application_id, count=len(wanted))
        return judged

    async def take_back(self, caller: Caller, review_id: str, *, reason: str) -> Judged:
        """An assessor does not judge this application after all; a score that was given does not count."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            review = await self._review(connection, caller, review_id)
            application = await application_of(connection, caller, review.application_id, lock=True)
            review = there(await review_store.review_of(connection, review_id, lock=True))
            if review.state is not ReviewState.WITHDRAWN:
                check_may(caller, application, Action.TAKE_ASSESSOR_BACK)
                await review_store.set_withdrawn(connection, review.id)
                detail: dict[str, str | int] = {"review_id": review.id, "percent": review.percent, "reason": reason}
                await audit_application(connection, self._clock, caller, "assessor_taken_back", application, detail)
            return await self._judged(connection, application.id)

    async def get_judged(self, caller: Caller, application_id: str) -> Judged:
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id)
            return await self._judged(connection, application.id)

    async def moderate(self, caller: Caller, application_id: str, *, outcome: ModerationOutcome, reason: str) -> Judged:
        """The scores as they are stand although they lie far apart, or the assessors are asked again."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            application = await application_of(connection, caller, application_id, lock=True)
            check_may(caller, application, Action.MODERATE)
            judged = await self._judged(connection, application.id)
            scores = {one.id: one.percent for one in judged.reviews if one.state is ReviewState.SCORED}
            if not scores:
                raise Conflict("There are no scores to look at yet.", reason="NOT_SCORED")
            moderation = Moderation(outcome=outcome, reason=reason, at_us=self._clock.now_us(), scores=scores)
            await review_store.add_moderation(
                connection, application.id, moderation, credential_id=caller.credential_id
            )
            if outcome is ModerationOutcome.REOPENED:
                await review_store.reopen(connection, application.id)
            detail: dict[str, str | int] = {"outcome": outcome, "reason": reason, "scores": " ".join(scores.values())}
            await audit_application(connection, self._clock, caller, "scores_moderated", application, detail)
            return await self._judged(connection, application.id)

    async def panel(self, caller: Caller, call_id: str) -> list[PanelRow]:
        """Every application of the call that was submitted, the highest exact mean first; equal means share a rank."""
        caller.require(Role.OPERATOR)
        async with transaction(self._pool) as connection:
            call = await call_of(connection, call_id)
            return await self.panel_rows(connection, call.id)

    async def panel_rows(self, connection: Connection, call_id: str) -> list[PanelRow]:
        """The same within a transaction."""
        found = await application_store.submitted_of(connection, call_id, limit=PANEL_APPLICATIONS_MAX + 1)
        if len(found) > PANEL_APPLICATIONS_MAX:
            raise Conflict(f"A panel has at most {PANEL_APPLICATIONS_MAX} applications.", reason="PANEL_TOO_LARGE")
        ids = [application.id for application in found]
        reviews = await review_store.reviews_of(connection, ids)
        moderations = await review_store.moderations_of(connection, ids)
        parameters = self._parameters()
        rows = []
        for application in found:
            firm = self._directory.firms.get(application.firm_id)
            rows.append(
                PanelRow(
                    rank=None,
                    tied=False,
                    application=application,
                    firm_name=firm.name if firm else f"Firm {application.firm_id}",
                    region=firm.region if firm else "",
                    verdict=verdict(reviews.get(application.id, ()), moderations.get(application.id, ()), parameters),
                )
            )
        return ranked(rows)

    # Assessors

    async def list_tasks(
        self, caller: Caller, *, state: ReviewState | None, page_size: int, page_token: str
    ) -> tuple[list[Review], str]:
        """The invitations of a partner's experts, or of an assessor, newest first, and the token of the next page."""
        caller.require(Role.PARTNER, Role.ASSESSOR)
        limit, after = page(page_size, page_token)
        async with transaction(self._pool) as connection:
            found = await review_store.reviews_for(
                connection,
                partner_id=caller.partner_id if caller.role is Role.PARTNER else None,
                provider_id=caller.provider_id if caller.role is Role.ASSESSOR else None,
                state=state,
                after=after,
                limit=limit + 1,
            )
        return found[:limit], next_token([_Placed(one.id, one.invited_us) for one in found], limit)

    async def get_task(self, caller: Caller, review_id: str) -> Task:
        async with transaction(self._pool) as connection:
            return await self._task(connection, await self._review(connection, caller, review_id))

    async def accept(self, caller: Caller, review_id: str, *, no_conflict: bool, declaration: str) -> Task:
        """The assessor declares to have no part in the application, in words that are kept. A repeat gets the first answer."""
        caller.require(Role.PARTNER, Role.ASSESSOR)
        with understood():
            declaration = checked_text("declaration", declaration)
        if not no_conflict:
            raise Invalid(
                "Who has a conflict declines, as conflict; no_conflict is true when there is none.",
                reason="CONFLICT_NOT_EXCLUDED",
            )
        return await self._answer(caller, review_id, ReviewState.ACCEPTED, None, declaration)

    async def decline(self, caller: Caller, review_id: str, *, declined_as: DeclinedAs, reason: str) -> Task:
        """Also after accepting, until a score is given. A repeat gets the first answer."""
        caller.require(Role.PARTNER, Role.ASSESSOR)
        with understood():
            reason = checked_text("reason", reason)
        return await self._answer(caller, review_id, ReviewState.DECLINED, declined_as, reason)

    async def score(self, caller: Caller, review_id: str, *, percent: str, in_scope: bool, justification: str) -> Task:
        """Once; another score only after the moderation asked for it. A repeat with the same score gets the first answer."""
        caller.require(Role.PARTNER, Role.ASSESSOR)
        with understood():
            percent = checked_percent(percent)
            justification = checked_text("justification", justification)
        async with transaction(self._pool) as connection:
            task = await self._locked_task(connection, caller, review_id)
            if task.review.state is ReviewState.SCORED:
                if (task.review.percent, task.review.in_scope) != (percent, in_scope):
                    raise Conflict("There is a score already; ask an operator to reopen it.", reason="ALREADY_SCORED")
                return task
            _check_review(task.review, ReviewState.ACCEPTED)
            check_may(caller, task.application, Action.SCORE)
            self._check_no_part(task)
            await review_store.set_scored(
                connection,
                review_id,
                percent=percent,
                in_scope=in_scope,
                justification=justification,
                now_us=self._clock.now_us(),
            )
            detail: dict[str, str | int] = {"review_id": review_id, "percent": percent, "in_scope": str(in_scope)}
            await audit_application(connection, self._clock, caller, "application_scored", task.application, detail)
            return replace(task, review=there(await review_store.review_of(connection, review_id)))

    async def _answer(
        self, caller: Caller, review_id: str, state: ReviewState, declined_as: DeclinedAs | None, answer: str
    ) -> Task:
        async with transaction(self._pool) as connection:
            task = await self._locked_task(connection, caller, review_id)
            if task.review.state is state:
                return task
            if state is ReviewState.ACCEPTED:
                _check_review(task.review, ReviewState.INVITED)
                check_may(caller, task.application, Action.ACCEPT_REVIEW)
                self._check_no_part(task)
            else:
                _check_review(task.review, ReviewState.INVITED, ReviewState.ACCEPTED)
            await review_store.set_answered(
                connection,
                review_id,
                state=state,
                declined_as=declined_as,
                answer=answer,
                credential_id=caller.credential_id,
                now_us=self._clock.now_us(),
            )
            detail: dict[str, str | int] = {"review_id": review_id, "answer": answer, "as": declined_as or ""}
            await audit_application(connection, self._clock, caller, f"review_{state}", task.application, detail)
            return replace(task, review=there(await review_store.review_of(connection, review_id)))

    # What the use cases share

    async def _question(self, connection: Connection, application: Application) -> Question:
        call = await call_of(connection, application.call_id)
        match = there(await call_store.match_of(connection, application.match_id))
        firm = self._directory.firms.get(application.firm_id)
        sisters = await group_store.kin_of(connection, application.firm_id)
        answers = [answer for _, answer in application.content.answers]
        text = ". ".join((match.provider_title, call.title, *answers, call.terms.scope))
        return Question(
            text=text,
            sic=application.sic,
            region=firm.region if firm else "",
            firm_ids=sorted(sisters),
            organisations=sorted(
                {pledge.co_investor for pledge in application.pledges}
                | {partner.name for partner in application.content.partners}
            ),
        )

    async def _review(self, connection: Connection, caller: Caller, review_id: str) -> Review:
        caller.require(Role.PARTNER, Role.ASSESSOR, Role.OPERATOR)
        found = await review_store.review_of(connection, review_id) if is_id(review_id) else None
        if found is None or not (
            caller.role is Role.OPERATOR or caller.acts_for(provider_id=found.provider_id, partner_id=found.partner_id)
        ):
            raise NotFound("There is no such review, or this key may not see it.", reason="REVIEW_UNKNOWN")
        return found

    async def _locked_task(self, connection: Connection, caller: Caller, review_id: str) -> Task:
        """The application first, then the review, as everywhere: so nobody waits in a circle."""
        review = await self._review(connection, caller, review_id)
        await application_store.application_of(connection, review.application_id, lock=True)
        return await self._task(connection, there(await review_store.review_of(connection, review_id, lock=True)))

    async def _task(self, connection: Connection, review: Review) -> Task:
        application = there(await application_store.application_of(connection, review.application_id))
        firm = self._directory.firms.get(application.firm_id)
        return Task(
            review=review,
            call=await call_of(connection, application.call_id),
            application=application,
            match=there(await call_store.match_of(connection, application.match_id)),
            firm_name=firm.name if firm else f"Firm {application.firm_id}",
        )

    async def _judged(self, connection: Connection, application_id: str) -> Judged:
        reviews = (await review_store.reviews_of(connection, [application_id])).get(application_id, [])
        moderations = (await review_store.moderations_of(connection, [application_id])).get(application_id, [])
        return Judged(
            application_id=application_id,
            reviews=tuple(reviews),
            moderations=tuple(moderations),
            verdict=verdict(reviews, moderations, self._parameters()),
        )

    def _check_no_part(self, task: Task) -> None:
        """A co-investor that came after the invitation may be the assessor's own organisation."""
        partner = self._directory.partners.get(task.review.partner_id)
        names = {pledge.co_investor.casefold() for pledge in task.application.pledges}
        names |= {partner.name.casefold() for partner in task.application.content.partners}
        if task.review.provider_id == task.match.provider_id or (partner and partner.name.casefold() in names):
            raise Conflict(
                "Your organisation has a part in this application; decline, as conflict.",
                reason="CONFLICT_OF_INTEREST",
            )

    def _parameters(self) -> ParametersAt:
        return self._table.at(uk_day(from_us(self._clock.now_us())))


@dataclass(frozen=True)
class _Placed:
    id: str
    created_us: int


def ranked(rows: Sequence[PanelRow]) -> list[PanelRow]:
    """Highest mean first, then as the allocation breaks ties: lower request, earlier submission, id."""

    def key(row: PanelRow) -> tuple[object, ...]:
        mean, application = row.verdict.mean, row.application
        return (mean is None, -(mean or 0), application.grant_pence or 0, application.submitted_us or 0, application.id)

    ordered = sorted(rows, key=key)
    shared = Counter(row.verdict.mean for row in ordered)
    first: dict[object, int] = {}
    for place, row in enumerate(ordered, start=1):
        first.setdefault(row.verdict.mean, place)
    return [
        row
        if row.verdict.mean is None
        else replace(row, rank=first[row.verdict.mean], tied=shared[row.verdict.mean] > 1)
        for row in ordered
    ]


def _check_review(review: Review, *states: ReviewState) -> None:
    if review.state not in states:
        raise Conflict(
            f"The review is {review.state}; this is for one that is {' or '.join(states)}.",
            reason=f"REVIEW_{review.state.upper()}",
        )
