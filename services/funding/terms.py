"""What a call declares before it opens (scope, questions, how its money is spent), and what an application answers to it."""

import re
from collections.abc import Mapping
from fractions import Fraction

from services.funding.domain import (
    AMOUNT_PENCE_MAX,
    TITLE_CHARACTERS_MAX,
    AnswerKind,
    Attachment,
    Content,
    PotLimit,
    ProjectPartner,
    Question,
    Refused,
    Terms,
    check_size,
    checked_amount,
    checked_costs,
    checked_date,
    checked_rate,
    checked_text,
)
from services.funding.rules.exact import decimal
from services.funding.rules.intensity import Organisation
from services.funding.selection import Method

QUESTIONS_MAX = 50
CHOICES_MAX = 50
LIMITS_MAX = 50
SCOPE_CHARACTERS_MAX = 10_000
ANSWER_CHARACTERS_MAX = 20_000
WHOLE_NUMBER_MAX = 10**12
PARTNERS_MAX = 20
ATTACHMENTS_MAX = 30
ATTACHMENT_BYTES_MAX = 10**9
MACHINES_MAX = 200

_QUESTION_ID = re.compile(r"[a-z][a-z0-9_]{0,39}")
_POT = re.compile(r"(region|size):[a-z0-9][a-z0-9-]{0,59}|first-time")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MEDIA_TYPE = re.compile(r"[a-z0-9.+-]{1,60}/[a-z0-9.+-]{1,100}")
_WHOLE = re.compile(r"-?\d{1,13}", re.ASCII)


def checked_terms(terms: Terms, *, budget_pence: int) -> Terms:
    """Raises Refused when a question or limit makes no sense, or the method cannot keep a limit."""
    if len(terms.questions) > QUESTIONS_MAX or len(terms.limits) > LIMITS_MAX:
        raise Refused(f"At most {QUESTIONS_MAX} questions and {LIMITS_MAX} limits are taken.", "TERMS_TOO_MANY")
    if terms.scope:
        checked_text("scope", terms.scope, SCOPE_CHARACTERS_MAX)
    if len({question.id for question in terms.questions}) < len(terms.questions):
        raise Refused("questions: two have the same id.", "QUESTION_INVALID")
    for question in terms.questions:
        _check_question(question)
    if len({limit.pot for limit in terms.limits}) < len(terms.limits):
        raise Refused("limits: two name the same pot.", "LIMIT_INVALID")
    for limit in terms.limits:
        _check_limit(limit, terms.method, budget_pence)
    for kind in ("region:", "size:"):  # a firm is in one of each
        of_kind = [limit for limit in terms.limits if limit.pot.startswith(kind)]
        floors_pence = sum(limit.floor_pence or 0 for limit in of_kind)
        shares = sum((decimal(limit.share_min) for limit in of_kind if limit.share_min is not None), Fraction(0))
        if floors_pence > budget_pence or shares > 1:
            raise Refused(
                f"The floors of all {kind}NAME together are more than the budget, or their smallest shares more than 1: "
                "no allocation could keep them.",
                "LIMIT_INVALID",
            )
    if not 0 <= terms.adoption_max_pence <= AMOUNT_PENCE_MAX:
        raise Refused(f"adoption_max_pence is from 0 to {AMOUNT_PENCE_MAX}.", "AMOUNT_OUT_OF_RANGE")
    return terms


def _check_question(question: Question) -> None:
    if not _QUESTION_ID.fullmatch(question.id):
        raise Refused(
            "questions: an id has 1 to 40 lower case letters, digits or _, a letter first.", "QUESTION_INVALID"
        )
    checked_text("questions.text", question.text, TITLE_CHARACTERS_MAX * 5)
    if not 1 <= question.characters_max <= ANSWER_CHARACTERS_MAX:
        raise Refused(f"{question.id}: characters_max is from 1 to {ANSWER_CHARACTERS_MAX}.", "QUESTION_INVALID")
    bounds = [bound for bound in (question.least, question.most) if bound is not None]
    if any(abs(bound) > WHOLE_NUMBER_MAX for bound in bounds) or bounds != sorted(bounds):
        raise Refused(f"{question.id}: least is at most most, both up to {WHOLE_NUMBER_MAX}.", "QUESTION_INVALID")
    choices = [checked_text("choices", choice, TITLE_CHARACTERS_MAX) for choice in question.choices]
    if (question.kind is AnswerKind.CHOICE) != (2 <= len(set(choices)) == len(choices) <= CHOICES_MAX):
        raise Refused(
            f"{question.id}: a choice has 2 to {CHOICES_MAX} different choices, other kinds have none.",
            "QUESTION_INVALID",
        )


def _check_limit(limit: PotLimit, method: Method, budget_pence: int) -> None:
    if not _POT.fullmatch(limit.pot):
        raise Refused("limits: a pot is region:NAME, size:NAME or first-time, in lower case.", "LIMIT_INVALID")
    for name, pence in (("floor_pence", limit.floor_pence), ("ceiling_pence", limit.ceiling_pence)):
        if pence is not None and not 0 <= pence <= budget_pence:
            raise Refused(f"{limit.pot}: {name} is from 0 to the budget.", "LIMIT_INVALID")
    if limit.floor_pence is not None and limit.ceiling_pence is not None and limit.floor_pence > limit.ceiling_pence:
        raise Refused(f"{limit.pot}: the floor is above the ceiling.", "LIMIT_INVALID")
    for name, share in (("share_min", limit.share_min), ("share_max", limit.share_max)):
        if share is not None:
            checked_rate(f"{limit.pot}: {name}", share)
    beyond = limit.floor_pence or limit.share_min is not None or limit.share_max is not None
    if beyond and method is not Method.PORTFOLIO:
        raise Refused(
            f"{limit.pot}: a ranking keeps ceilings only; floors and shares need the method portfolio.",
            "LIMIT_NEEDS_PORTFOLIO",
        )


def checked_content(content: Content, terms: Terms) -> Content:
    """The content, once every question is answered in its form. Raises Refused."""
    answers = _checked_answers(dict(content.answers), terms)
    if len(content.partners) > PARTNERS_MAX or len(content.attachments) > ATTACHMENTS_MAX:
        raise Refused(
            f"At most {PARTNERS_MAX} partners and {ATTACHMENTS_MAX} attachments are taken.", "CONTENT_TOO_MANY"
        )
    if len(content.machine_ids) > MACHINES_MAX or len(set(content.machine_ids)) < len(content.machine_ids):
        raise Refused(f"machine_ids: at most {MACHINES_MAX}, each once.", "MACHINES_INVALID")
    names = [checked_text("partners.name", partner.name, TITLE_CHARACTERS_MAX) for partner in content.partners]
    if len({name.casefold() for name in names}) < len(names):
        raise Refused("partners: two have the same name.", "PARTNER_INVALID")
    for partner in content.partners:
        _check_partner(partner)
    for attachment in content.attachments:
        _check_attachment(attachment)
    return Content(
        answers=answers,
        partners=content.partners,
        attachments=content.attachments,
        machine_ids=content.machine_ids,
    )


def _checked_answers(given: Mapping[str, str], terms: Terms) -> tuple[tuple[str, str], ...]:
    unknown = given.keys() - {question.id for question in terms.questions}
    if unknown:
        raise Refused(f"answers: the call does not ask {min(unknown)[:40]!r}.", "ANSWER_UNKNOWN")
    answers = []
    for question in terms.questions:
        answer = given.get(question.id, "").strip()
        if not answer:
            if question.required:
                raise Refused(f"answers: {question.id} is needed: {question.text}", "ANSWER_MISSING")
            continue
        _check_answer(question, answer)
        answers.append((question.id, answer))
    return tuple(answers)


def _check_answer(question: Question, answer: str) -> None:
    wrong = ""
    if question.kind is AnswerKind.TEXT:
        checked_text(question.id, answer, question.characters_max)
    elif question.kind is AnswerKind.WHOLE_NUMBER:
        number = int(answer) if _WHOLE.fullmatch(answer) else None
        if number is None or abs(number) > WHOLE_NUMBER_MAX:
            wrong = "a whole number"
        elif question.least is not None and number < question.least:
            wrong = f"at least {question.least}"
        elif question.most is not None and number > question.most:
            wrong = f"at most {question.most}"
    elif question.kind is AnswerKind.YES_NO:
        wrong = "" if answer in ("yes", "no") else "yes or no"
    elif question.kind is AnswerKind.CHOICE:
        wrong = "" if answer in question.choices else "one of " + ", ".join(question.choices)
    else:
        checked_date(question.id, answer)
    if wrong:
        raise Refused(f"answers: {question.id} is {wrong}.", "ANSWER_INVALID")


def _check_partner(partner: ProjectPartner) -> None:
    checked_costs(partner.costs)
    checked_amount("partners.other_public_pence", partner.other_public_pence, least=0)
    if (partner.organisation is Organisation.BUSINESS) != (partner.size is not None):
        raise Refused(
            f"{partner.name}: a business states its figures (size), other organisations do not.", "PARTNER_INVALID"
        )
    if partner.size is not None:
        check_size(f"{partner.name}: size", partner.size)


def _check_attachment(attachment: Attachment) -> None:
    checked_text("attachments.name", attachment.name, TITLE_CHARACTERS_MAX)
    if not _SHA256.fullmatch(attachment.sha256):
        raise Refused("attachments.sha256: 64 lower case hexadecimal digits.", "ATTACHMENT_INVALID")
    if not 0 < attachment.size_bytes <= ATTACHMENT_BYTES_MAX:
        raise Refused(f"attachments.size_bytes is from 1 to {ATTACHMENT_BYTES_MAX}.", "ATTACHMENT_INVALID")
    if not _MEDIA_TYPE.fullmatch(attachment.media_type):
        raise Refused("attachments.media_type: such as application/pdf.", "ATTACHMENT_INVALID")


def pots_of(*, region: str, size: str, first_time: bool) -> frozenset[str]:
    """What an application counts towards in the limits of a call."""
    slug = re.sub(r"[^a-z0-9]+", "-", region.casefold()).strip("-")
    pots = {f"size:{size}"}
    if slug:
        pots.add(f"region:{slug}")
    if first_time:
        pots.add("first-time")
    return frozenset(pots)
