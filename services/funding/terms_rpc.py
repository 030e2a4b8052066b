"""Terms of calls and contents of applications between the gRPC contract and the domain."""

from services.funding import domain
from services.funding.rules.intensity import Organisation
from services.funding.rules.size import Investor
from services.funding.selection import Method
from services.funding.words import number_of, word_of
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
                kind=word_of(domain.AnswerKind, pb.AnswerKind, "ANSWER_KIND", question.kind),
                required=not question.optional,
                characters_max=question.characters_max or CHARACTERS,
                least=question.least if question.HasField("least") else None,
                most=question.most if question.HasField("most") else None,
                choices=tuple(question.choices),
            )
            for question in message.questions
        ),
        method=word_of(Method, pb.AllocationMethod, "ALLOCATION_METHOD", message.method)
        if message.method
        else Method.TOP_DOWN_SKIP,
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
    return pb.Terms(
        scope=terms.scope,
        questions=[
            pb.Question(
                id=question.id,
                text=question.text,
                kind=number_of(pb.AnswerKind, "ANSWER_KIND", question.kind),
                optional=not question.required,
                characters_max=question.characters_max,
                least=question.least,
                most=question.most,
                choices=question.choices,
            )
            for question in terms.questions
        ],
        method=number_of(pb.AllocationMethod, "ALLOCATION_METHOD", terms.method),
        limits=[
            pb.PotLimit(
                pot=limit.pot,
                floor_pence=limit.floor_pence,
                ceiling_pence=limit.ceiling_pence,
                share_min=limit.share_min,
                share_max=limit.share_max,
            )
            for limit in terms.limits
        ],
        adoption_max_pence=terms.adoption_max_pence,
    )


def content_of(request: pb.CreateApplicationRequest) -> domain.Content:
    return domain.Content(
        answers=tuple(request.answers.items()),
        partners=tuple(
            domain.ProjectPartner(
                name=partner.name,
                organisation=word_of(Organisation, pb.OrganisationKind, "ORGANISATION_KIND", partner.organisation),
                costs=tuple(
                    domain.Cost(
                        category=word_of(domain.CostCategory, pb.CostCategory, "COST_CATEGORY", cost.category),
                        amount_pence=cost.amount_pence,
                    )
                    for cost in partner.costs
                ),
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


def partner_message(partner: domain.ProjectPartner) -> pb.ProjectPartner:
    return pb.ProjectPartner(
        name=partner.name,
        organisation=number_of(pb.OrganisationKind, "ORGANISATION_KIND", partner.organisation),
        costs=[
            pb.Cost(category=number_of(pb.CostCategory, "COST_CATEGORY", cost.category), amount_pence=cost.amount_pence)
            for cost in partner.costs
        ],
        size=size_message(partner.size) if partner.size else None,
        other_public_pence=partner.other_public_pence,
    )


def attachment_message(attachment: domain.Attachment) -> pb.Attachment:
    return pb.Attachment(
        name=attachment.name,
        sha256=attachment.sha256,
        size_bytes=attachment.size_bytes,
        media_type=attachment.media_type,
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
                investor=word_of(Investor, pb.Investor, "INVESTOR", relation.investor),
                headcount=relation.headcount,
                turnover_minor=relation.turnover_minor,
                balance_minor=relation.balance_minor,
                dominant_influence=relation.dominant_influence,
            )
            for relation in size.relations
        ),
    )


def size_message(size: domain.SizeFigures) -> pb.SizeFigures:
    return pb.SizeFigures(
        headcount=size.headcount,
        turnover_minor=size.turnover_minor,
        balance_minor=size.balance_minor,
        period_start=size.period_start,
        relations=[
            pb.Relation(
                percent=relation.percent,
                upstream=relation.upstream,
                investor=number_of(pb.Investor, "INVESTOR", relation.investor),
                headcount=relation.headcount,
                turnover_minor=relation.turnover_minor,
                balance_minor=relation.balance_minor,
                dominant_influence=relation.dominant_influence,
            )
            for relation in size.relations
        ],
    )
