"""Pages of lists: newest first, each with the token of the one behind it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import Invalid

PAGE_SIZE = 50
PAGE_SIZE_MAX = 100
# The year 2100: no token of ours says more, and any later time would not be one for the database.
_TIME_US_MAX = 4_102_444_800_000_000
_TOKEN = re.compile(r"(\d{1,18})-([A-Za-z0-9._:-]{1,100})", re.ASCII)


@dataclass(frozen=True)
class Place:
    """Where a page ended: the next one starts behind it."""

    created_us: int
    id: str


class Listed(Protocol):
    """What has a place in a list."""

    @property
    def id(self) -> str: ...

    @property
    def created_us(self) -> int: ...


def page_size_of(asked: int) -> int:
    if not 0 <= asked <= PAGE_SIZE_MAX:
        raise Invalid(f"page_size is at most {PAGE_SIZE_MAX}; 0 means {PAGE_SIZE}.", reason="PAGE_SIZE_OUT_OF_RANGE")
    return asked or PAGE_SIZE


def page(page_size: int, page_token: str) -> tuple[int, Place | None]:
    limit = page_size_of(page_size)
    if not page_token:
        return limit, None
    found = _TOKEN.fullmatch(page_token)
    if found is None or int(found[1]) > _TIME_US_MAX:
        raise Invalid("page_token is not one that was given here.", reason="PAGE_TOKEN_INVALID")
    return limit, Place(int(found[1]), found[2])


def next_token(found: Sequence[Listed], limit: int) -> str:
    return f"{found[limit - 1].created_us}-{found[limit - 1].id}" if len(found) > limit else ""
