"""What every use case asks of a request: texts, ids, pages, and whether firm and machine are known."""

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import TypeVar

from services.common.clock import from_us, to_us
from services.common.directory import Directory
from services.common.errors import AlreadyExists, Invalid, NotFound

T = TypeVar("T")
TEXT_CHARACTERS_MAX = 4_000
TITLE_CHARACTERS_MAX = 200
NOTE_CHARACTERS_MAX = 500
LIST_ITEMS_MAX = 50
PAGE_SIZE_DEFAULT = 100
PAGE_SIZE_MAX = 500
# What was registered a moment ago may still be on its way here.
KNOWN_TIMEOUT_S = 0.5

_ID = re.compile(r"[0-9a-f]{32}")
_PAGE_TOKEN = re.compile(r"(\d{1,16})\.([0-9a-f]{32})")
_MICROSECONDS = re.compile(r"[0-9]{1,16}")
CHOSEN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# A term or a group of terms.
_ESCO_SKILL = re.compile(
    r"http://data\.europa\.eu/esco/skill/([0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[A-Z]\d?(\.\d{1,2}){0,3})"
)
# Tabs and line ends are part of texts; other control characters are not, and the database refuses NUL.
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class Known:
    """Whether what a request names is in the directory; what was made a moment ago is waited for."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    async def firm(self, firm_id: int) -> int:
        if not firm_id:
            raise Invalid("Say which firm it is about.", reason="FIRM_MISSING")
        if not await self._directory.wait_for("firm", firm_id, timeout_s=KNOWN_TIMEOUT_S):
            raise NotFound(f"There is no firm {firm_id}.", reason="UNKNOWN_FIRM")
        return firm_id

    async def check_machine(self, firm_id: int, machine_id: int) -> None:
        known = await self._directory.wait_for("machine", machine_id, timeout_s=KNOWN_TIMEOUT_S)
        if not known or self._directory.machines[machine_id].firm_id != firm_id:
            raise NotFound(f"The firm has no machine {machine_id}.", reason="UNKNOWN_MACHINE")


def check_text(name: str, text: str, characters_max: int) -> None:
    if len(text) > characters_max:
        raise Invalid(f"{name} has more than {characters_max} characters.", reason="TEXT_TOO_LONG")
    if _NOT_TEXT.search(text):
        raise Invalid(f"{name} has characters that are not text.", reason="NOT_TEXT")


def check_esco_skills(skills: Sequence[str]) -> None:
    if len(skills) > LIST_ITEMS_MAX:
        raise Invalid(f"esco_skills has more than {LIST_ITEMS_MAX} items.", reason="TOO_MANY")
    if not all(map(_ESCO_SKILL.fullmatch, skills)):
        raise Invalid(
            "An ESCO skill is named by its address, such as "
            "http://data.europa.eu/esco/skill/ccd0a1d9-afda-43d9-b901-96344886e14d.",
            reason="BAD_ESCO_SKILL",
        )


def chosen_id(provider_id: str) -> str:
    if not CHOSEN_ID.fullmatch(provider_id):
        raise NotFound("There is no such provider.")
    return provider_id


def known_form(identifier: str) -> str:
    """Ids of needs and offers; what does not look like one cannot exist."""
    if not _ID.fullmatch(identifier):
        raise NotFound()
    return identifier


def checked_request_id(request_id: str) -> bool:
    """Whether there is one. Raises Invalid for one that cannot be stored."""
    if request_id and not CHOSEN_ID.fullmatch(request_id):
        raise Invalid(
            "A request_id has 1 to 64 letters, digits, dots, dashes and underscores.", reason="BAD_REQUEST_ID"
        )
    return bool(request_id)


def digest(**content: object) -> bytes:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def first_answer(answer: T, first_sha256: bytes, sha256: bytes) -> T:
    if first_sha256 != sha256:
        raise AlreadyExists(
            "This request_id was used for a request with other content; use a new one.", reason="REQUEST_ID_REUSED"
        )
    return answer


def page_size_of(asked: int) -> int:
    if asked < 0 or asked > PAGE_SIZE_MAX:
        raise Invalid(f"page_size is at most {PAGE_SIZE_MAX}.", reason="BAD_PAGE_SIZE")
    return asked or PAGE_SIZE_DEFAULT


def after_id(page_token: str) -> str:
    if page_token and not CHOSEN_ID.fullmatch(page_token):
        raise _bad_page_token()
    return page_token


def page_token_of(when: datetime, identifier: str) -> str:
    return f"{to_us(when)}.{identifier}"


def before_token(page_token: str) -> tuple[datetime, str] | None:
    if not page_token:
        return None
    found = _PAGE_TOKEN.fullmatch(page_token)
    if found is None:
        raise _bad_page_token()
    return from_us(int(found[1])), found[2]


def session_token(page_token: str) -> tuple[datetime, str] | None:
    """Of a page token whose id was chosen by a partner."""
    if not page_token:
        return None
    when, _, identifier = page_token.partition(".")
    if not _MICROSECONDS.fullmatch(when) or not CHOSEN_ID.fullmatch(identifier):
        raise _bad_page_token()
    return from_us(int(when)), identifier


def _bad_page_token() -> Invalid:
    return Invalid("This page token is not one of ours; begin with the first page.", reason="BAD_PAGE_TOKEN")
