"""Terms of calls and contents of applications between the gRPC contract and the domain."""

from collections.abc import Iterable

from services.common.messages import message_of
from services.funding import domain
from services.funding.rules.intensity import Organisation
from services.funding.rules.size import Investor
from services.funding.selection import Method
from services.funding.words import word_of
from smdih.funding.v1 import funding_pb2 as pb

CHARACTERS = 2_000


def terms_of(message: pb.Terms) -> domain.Terms:
    """Raises Invalid for a kind that is missing."""
    return domain.Terms(
        scope=message.scope,
        questions=tuple(
            domain.Question(
                id=question.id,
                text=question.text,
                kind=word_of(domain.AnswerKind, pb.AnswerKind, question.kind),
                required=not question.optional,
                characters_max=question.characters_max or CHARACTERS,
                least=question.least if question.HasField("least") else None,
                most=question.most if question.HasField("most") else None,
                choices=tuple(question.choices),
            )
            for question in message.questions
        ),
        method=word_of(Method, pb.AllocationMethod, message.method) if message.method else Method.TOP_DOWN_SKIP,
        limits=tuple(
            domain.PotLimit(
                pot=limit.pot,
                floor_pence=limit.floor_pence if limit.HasField("floor_pence") else None,
                ceiling_pence=limit.ceiling_pence if limit.HasField("ceiling_pence") else None,
                share_min=limit.share_min if limit.HasField("share_min") else None,
                share_max=limit.share_max if limit.HasField("share_max") else None,
            )
            for limit in message.limits
        ),
        adoption_max_pence=message.adoption_max_pence,
    )


def terms_message(terms: domain.Terms) -> pb.Terms:
    questions = [message_of(pb.Question, question, optional=not question.required) for question in terms.questions]
    return message_of(pb.Terms, terms, questions=questions)


def content_of(request: pb.CreateApplicationRequest) -> domain.Content:
    return domain.Content(
        answers=tuple(request.answers.items()),
        partners=tuple(
            domain.ProjectPartner(
                name=partner.name,
                organisation=word_of(Organisation, pb.OrganisationKind, partner.organisation),
                costs=costs_of(partner.costs),
                size=size_of(partner.size) if partner.HasField("size") else None,
                other_public_pence=partner.other_public_pence,
            )
            for partner in request.partners
        ),
        attachments=tuple(
            domain.Attachment(
                name=attachment.name,
                sha256=attachment.sha256,
                size_bytes=attachment.size_bytes,
                media_type=attachment.media_type,
            )
            for attachment in request.attachments
        ),
        machine_ids=tuple(request.machine_ids),
    )


def costs_of(costs: Iterable[pb.Cost]) -> tuple[domain.Cost, ...]:
    """Raises Invalid for a category that is missing."""
    return tuple(
        domain.Cost(
            category=word_of(domain.CostCategory, pb.CostCategory, cost.category), amount_pence=cost.amount_pence
        )
        for cost in costs
    )


def size_of(size: pb.SizeFigures) -> domain.SizeFigures:
    return domain.SizeFigures(
        headcount=size.headcount,
        turnover_minor=size.turnover_minor,
        balance_minor=size.balance_minor,
        period_start=size.period_start,
        relations=tuple(
            domain.Relation(
                percent=relation.percent,
                upstream=relation.upstream,
                investor=word_of(Investor, pb.Investor, relation.investor),
                headcount=relation.headcount,
                turnover_minor=relation.turnover_minor,
                balance_minor=relation.balance_minor,
                dominant_influence=relation.dominant_influence,
            )
            for relation in size.relations
        ),
    )
