"""What callers ask with: ids, times, pages, one word of several; each raises Invalid with what to send instead."""

from datetime import datetime

from services.common.clock import from_us
from services.common.errors import Invalid
from services.ingest.domain import BadName

PAGE_SIZE_DEFAULT = 100
ID_MAX = 2**63 - 1


def check_one_of(value: str, allowed: tuple[str, ...], what: str) -> None:
    if value not in allowed:
        raise Invalid(f"{what}: {value!r} is not one of {', '.join(allowed)}.")


def check_id(value: int, what: str) -> None:
    if not 0 < value <= ID_MAX:
        raise Invalid(f"{what}: an id is a number from 1 up.")


def page_size_of(asked: int, default: int, most: int) -> int:
    if asked < 0:
        raise Invalid("page_size: 0 or more.")
    return min(asked or default, most)


def number_in_token(token: str) -> int:
    try:
        return int(token or "0")
    except ValueError as error:
        raise Invalid("page_token: send back exactly what the page before gave.") from error


def checked_time(time_us: int, what: str) -> datetime:
    try:
        return from_us(time_us)
    except OverflowError as error:
        raise Invalid(f"{what}: microseconds since 1970, in the years 1 to 9999.") from error


class names:
    """Inside, a broken name is an invalid request."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BadName):
            raise Invalid(str(error), reason="BAD_NAME") from error
