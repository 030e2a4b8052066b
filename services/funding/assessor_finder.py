"""Who could judge an application: asked of the matching service, which knows the experts and their conflicts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from services.common import tracing
from services.common.errors import Forbidden, HubError, Invalid, TryAgain
from services.common.logs import current_correlation_id
from services.common.tls import PeerChannel
from smdih.matching.v1 import matching_pb2, matching_pb2_grpc

TIMEOUT_S = 10.0
TEXT_CHARACTERS_MAX = 20_000
# Of the firms, and of the names, that the matching service takes at once.
PARTIES_MAX = 200
# And of the assessors that it proposes at once.
PROPOSED_MAX = 50


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: the application's text, and everyone who has a part in it."""

    text: str
    sic: str
    region: str
    firm_ids: Sequence[int]
    organisations: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Proposed:
    provider_id: str
    name: str
    partner_id: int
    score: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Excluded:
    provider_id: str
    name: str
    codes: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    assessors: tuple[Proposed, ...]
    excluded: tuple[Excluded, ...]
    ranker_version: str


class AssessorFinder:
    """A client of the matching service; asks under the key of the operator who asks here."""

    def __init__(self, peer: PeerChannel) -> None:
        self._peer = peer

    async def propose(self, key: str, question: Question, *, count: int) -> Proposal:
        """Best first, without those who have a conflict. Raises TryAgain when the matching service does not answer."""
        if not self._peer.target:
            raise TryAgain(
                "This process does not know where the matching service is; set SMDIH_MATCHING_GRPC.",
                reason="MATCHING_AWAY",
            )
        firms, names = list(question.firm_ids), list(question.organisations)
        askings = max(1, math.ceil(max(len(firms), len(names)) / PARTIES_MAX))
        # Where more take part than one question holds, only those stay who have a conflict with none of them.
        wanted = count if askings == 1 else PROPOSED_MAX
        answers = [
            await self._asked(
                key,
                question,
                firm_ids=firms[number * PARTIES_MAX : (number + 1) * PARTIES_MAX],
                organisations=names[number * PARTIES_MAX : (number + 1) * PARTIES_MAX],
                count=wanted,
            )
            for number in range(askings)
        ]
        proposed = [{one.provider_id for one in answer.assessors} for answer in answers]
        free = [one for one in answers[0].assessors if all(one.provider_id in each for each in proposed)]
        excluded = {one.provider_id: one for answer in answers for one in answer.excluded}
        return Proposal(
            assessors=tuple(free[:count]), excluded=tuple(excluded.values()), ranker_version=answers[0].ranker_version
        )

    async def _asked(
        self, key: str, question: Question, *, firm_ids: Sequence[int], organisations: Sequence[str], count: int
    ) -> Proposal:
        correlation_id = current_correlation_id()
        metadata = (("authorization", f"Bearer {key}"), ("x-correlation-id", correlation_id))
        try:
            with tracing.span("MatchingService/ProposeAssessors", correlation_id, kind="client"):
                answer = await matching_pb2_grpc.MatchingServiceStub(self._peer.channel()).ProposeAssessors(
                    matching_pb2.ProposeAssessorsRequest(
                        text=question.text[:TEXT_CHARACTERS_MAX],
                        sic=question.sic,
                        region=question.region,
                        conflict_firm_ids=firm_ids,
                        conflict_organisations=organisations,
                        count=count,
                    ),
                    metadata=(*metadata, *tracing.metadata(correlation_id)),
                    timeout=TIMEOUT_S,
                )
        except grpc.aio.AioRpcError as error:
            raise _understood(error) from error
        return Proposal(
            assessors=tuple(
                Proposed(
                    provider_id=one.provider_id,
                    name=one.name,
                    partner_id=one.partner_id,
                    score=one.score,
                    reasons=tuple(one.reasons),
                )
                for one in answer.assessors
            ),
            excluded=tuple(
                Excluded(provider_id=one.provider_id, name=one.name, codes=tuple(one.codes), reasons=tuple(one.reasons))
                for one in answer.excluded
            ),
            ranker_version=answer.ranker_version,
        )

    async def close(self) -> None:
        await self._peer.close()


def _understood(error: grpc.aio.AioRpcError) -> HubError:
    detail = error.details() or ""
    if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return Forbidden(detail)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return Invalid(f"The matching service did not understand: {detail}")
    return TryAgain(
        "The matching service does not answer; nothing was stored, send again.",
        reason="MATCHING_AWAY",
        retry_after_s=2,
    )
