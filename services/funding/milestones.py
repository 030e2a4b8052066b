"""What people can do with milestones: operators set them, the firm shows them by evidence that the hub signed or by a document."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.common.clock import Clock, from_us
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound
from services.common.evidence import Verifier
from services.common.identity import Caller, Role
from services.common.logs import correlated, get_logger
from services.funding import milestone_store
from services.funding.agreement import Agreement, AgreementState, Claim
from services.funding.agreement_store import agreement_of, lock_award
from services.funding.award_store import audit
from services.funding.domain import Refused, checked_text, is_id
from services.funding.milestone import (
    DOCUMENTS_MAX,
    MILESTONES_MAX,
    Figure,
    Milestone,
    check_shown,
    checked_document,
    checked_milestone,
)
from services.funding.requests import understood

log = get_logger(__name__)

_ENDED = (AgreementState.COMPLETE, AgreementState.LAPSED, AgreementState.WITHDRAWN)


class MilestoneService:
    """The use cases. Every method takes the caller first and raises Forbidden or NotFound where it may not or cannot see."""

    def __init__(self, pool: Pool, *, verifier: Verifier, directory: Directory, clock: Clock) -> None:
        self._pool = pool
        self._verifier = verifier
        self._directory = directory
        self._clock = clock

    async def get(self, caller: Caller, award_id: str) -> list[Milestone]:
        async with transaction(self._pool) as connection:
            await _agreement(connection, caller, award_id)
            return await milestone_store.milestones_of(connection, award_id)

    async def set(self, caller: Caller, award_id: str, milestones: Sequence[Milestone]) -> list[Milestone]:
        """These, and no others. One that is met or shown stays as it is and has to be among them."""
        caller.require(Role.OPERATOR)
        if len(milestones) > MILESTONES_MAX or len({one.id for one in milestones}) < len(milestones):
            raise Invalid(
                f"At most {MILESTONES_MAX} milestones, each with an id of its own.", reason="MILESTONE_INVALID"
            )
        with understood():
            wanted = [checked_milestone(one) for one in milestones]
        async with transaction(self._pool) as connection:
            agreement = await self._locked(connection, caller, award_id)
            _check_running(agreement)
            for one in wanted:
                machine = None if one.machine_id is None else self._directory.machines.get(one.machine_id)
                if one.machine_id is not None and (machine is None or machine.firm_id != agreement.award.firm_id):
                    raise NotFound(f"This firm has no machine {one.machine_id}.", reason="MACHINE_UNKNOWN")
            there = await milestone_store.milestones_of(connection, award_id)
            kept = {one.id: one.as_set for one in there if one.met_us or one.document}
            again = {one.id: one for one in wanted if one.id in kept}
            if again != kept:
                changed = next(id_ for id_ in kept if again.get(id_) != kept[id_])
                raise Conflict(
                    f"Milestone {changed} is met or shown already; name it among the others, as it was set.",
                    reason="MILESTONE_MET",
                )
            await milestone_store.set_milestones(
                connection,
                award_id,
                [one for one in wanted if one.id not in kept],
                keep=kept.keys(),
                credential_id=caller.credential_id,
                now_us=self._clock.now_us(),
            )
            await self._audit(connection, caller, "milestones_set", agreement, {"count": len(wanted)})
            return await milestone_store.milestones_of(connection, award_id)

    async def show(
        self, caller: Caller, award_id: str, milestone_id: str, evidence: Mapping[str, Any]
    ) -> list[Milestone]:
        """The firm shows a milestone. A repeat with the same statement gets the first answer."""
        caller.require(Role.FIRM)
        async with transaction(self._pool) as connection:
            agreement = await self._locked(connection, caller, award_id)
            await self.show_within(connection, caller, agreement, milestone_id, evidence)
            return await milestone_store.milestones_of(connection, award_id)

    async def send_document(
        self, caller: Caller, award_id: str, milestone_id: str, *, reference: str, sha256: str
    ) -> list[Milestone]:
        """The firm says where its document is and what it is; another one takes its place until an operator has confirmed. The same
        again changes nothing."""
        caller.require(Role.FIRM)
        with understood():
            reference, sha256 = checked_document(reference, sha256)
        async with transaction(self._pool) as connection:
            agreement = await self._locked(connection, caller, award_id)
            milestone = await self._of_document(connection, agreement, milestone_id)
            if (milestone.document, milestone.document_sha256) != (reference, sha256):
                if milestone.met_us is not None:
                    raise Conflict("The milestone is met already.", reason="MILESTONE_MET")
                _check_accepted(agreement)
                await milestone_store.add_document(
                    connection,
                    award_id,
                    milestone.id,
                    reference=reference,
                    sha256=sha256,
                    credential_id=caller.credential_id,
                    now_us=self._clock.now_us(),
                    documents_max=DOCUMENTS_MAX,
                )
                detail: dict[str, str | int] = {"milestone_id": milestone.id, "sha256": sha256}
                await self._audit(connection, caller, "milestone_document_sent", agreement, detail)
            return await milestone_store.milestones_of(connection, award_id)

    async def confirm(
        self, caller: Caller, award_id: str, milestone_id: str, *, sha256: str, reason: str
    ) -> list[Milestone]:
        """An operator has looked at exactly this document, and the milestone is met. A repeat gets the first answer."""
        caller.require(Role.OPERATOR)
        with understood():
            reason = checked_text("reason", reason)
        async with transaction(self._pool) as connection:
            agreement = await self._locked(connection, caller, award_id)
            milestone = await self._of_document(connection, agreement, milestone_id)
            if not milestone.document or milestone.document_sha256 != sha256:
                raise Conflict(
                    "The newest document of the firm is another one, or there is none; look at it and confirm its sha256.",
                    reason="DOCUMENT_OTHER",
                )
            if milestone.met_us is None:
                _check_accepted(agreement)
                await milestone_store.add_evidence(
                    connection,
                    award_id,
                    milestone.id,
                    # A document may show several milestones, a signed figure one.
                    statement_id=f"{award_id}:{milestone.id}:{sha256}",
                    evidence={"reference": milestone.document, "sha256": sha256, "reason": reason},
                    value="",
                    credential_id=caller.credential_id,
                    now_us=self._clock.now_us(),
                )
                detail: dict[str, str | int] = {"milestone_id": milestone.id, "sha256": sha256, "reason": reason}
                await self._audit(connection, caller, "milestone_met", agreement, detail)
                log.info("milestone met", award_id=award_id, milestone_id=milestone.id)
            return await milestone_store.milestones_of(connection, award_id)

    async def _of_document(self, connection: Connection, agreement: Agreement, milestone_id: str) -> Milestone:
        milestone = await _milestone(connection, agreement, milestone_id)
        if milestone.is_measured:
            raise Conflict(
                "This milestone is shown by a signed figure of the firm's machines; send its evidence.",
                reason="MILESTONE_MEASURED",
            )
        return milestone

    async def show_within(
        self,
        connection: Connection,
        caller: Caller,
        agreement: Agreement,
        milestone_id: str,
        evidence: Mapping[str, Any],
    ) -> None:
        """The same in the transaction of a claim, which holds the agreement."""
        statement = self._verifier.verify(evidence)
        milestone = await _milestone(connection, agreement, milestone_id)
        if not milestone.is_measured:
            raise Conflict("This milestone is shown by a document; send that.", reason="MILESTONE_OF_DOCUMENT")
        if milestone.met_us is not None:
            if milestone.statement_id != statement.id:
                raise Conflict("The milestone is met already.", reason="MILESTONE_MET")
            return
        _check_accepted(agreement)
        try:
            figure = Figure(
                measure=statement.measure,
                firm_id=statement.firm_id,
                machine_id=statement.machine_id,
                from_=from_us(statement.from_us),
                to=from_us(statement.to_us),
                value=statement.value,
                unit=statement.unit,
                coverage=statement.coverage,
            )
            assert agreement.project_start is not None, "an accepted agreement has its dates"
            assert agreement.project_end is not None, "an accepted agreement has its dates"
            check_shown(
                milestone,
                figure,
                firm_id=agreement.award.firm_id,
                start=agreement.project_start,
                end=agreement.project_end,
            )
        except Refused as error:
            raise Conflict(str(error), reason=error.reason) from error
        await milestone_store.add_evidence(
            connection,
            agreement.award.id,
            milestone.id,
            statement_id=statement.id,
            evidence=evidence,
            value=statement.value,
            credential_id=caller.credential_id,
            now_us=self._clock.now_us(),
        )
        detail: dict[str, str | int] = {"milestone_id": milestone.id, "statement_id": statement.id}
        await self._audit(connection, caller, "milestone_met", agreement, {**detail, "value": statement.value})
        log.info("milestone met", award_id=agreement.award.id, milestone_id=milestone.id)

    async def _locked(self, connection: Connection, caller: Caller, award_id: str) -> Agreement:
        await _agreement(connection, caller, award_id)
        await lock_award(connection, award_id)
        return await _agreement(connection, caller, award_id)

    async def _audit(
        self,
        connection: Connection,
        caller: Caller,
        action: str,
        agreement: Agreement,
        detail: Mapping[str, str | int],
    ) -> None:
        award = agreement.award
        with correlated(award.correlation_id):
            await audit(
                connection,
                action,
                credential_id=caller.credential_id,
                now_us=self._clock.now_us(),
                call_id=award.call_id,
                application_id=award.application_id,
                detail={"award_id": award.id, **detail},
            )


async def check_claimable(connection: Connection, award_id: str, claim: Claim) -> None:
    """Raises Conflict while a milestone that is due by the claim's period is not met; by a final claim all are due."""
    unmet = [
        one
        for one in await milestone_store.milestones_of(connection, award_id)
        if not one.met_us and (claim.is_final or one.due <= claim.period_end)
    ]
    if unmet:
        raise Conflict(
            f"Milestone {unmet[0].id} ({unmet[0].title}), due on {unmet[0].due.isoformat()}, is not met yet; "
            "the firm sends the evidence, or an operator confirms its document or sets another milestone in its place.",
            reason="MILESTONE_UNMET",
        )


async def _milestone(connection: Connection, agreement: Agreement, milestone_id: str) -> Milestone:
    found = await milestone_store.milestones_of(connection, agreement.award.id)
    milestone = next((one for one in found if one.id == milestone_id), None)
    if milestone is None:
        raise NotFound("This award has no such milestone.", reason="MILESTONE_UNKNOWN")
    return milestone


async def _agreement(connection: Connection, caller: Caller, award_id: str) -> Agreement:
    caller.require(Role.FIRM, Role.OPERATOR)
    found = await agreement_of(connection, award_id) if is_id(award_id) else None
    if found is None or (caller.role is Role.FIRM and found.award.firm_id != caller.firm_id):
        raise NotFound("There is no such award, or this key may not see it.", reason="AWARD_UNKNOWN")
    return found


def _check_running(agreement: Agreement) -> None:
    if agreement.state in _ENDED:
        raise Conflict(f"The award is {agreement.state}.", reason=f"AWARD_{agreement.state.upper()}")


def _check_accepted(agreement: Agreement) -> None:
    if agreement.state is not AgreementState.ACCEPTED:
        raise Conflict(
            f"The award is {agreement.state}; milestones are shown while the project runs.",
            reason=f"AWARD_{agreement.state.upper()}",
        )
