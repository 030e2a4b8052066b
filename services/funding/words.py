"""The domain's words and the numbers that stand for them in the gRPC contracts."""

from enum import StrEnum
from typing import Any, TypeVar

from services.common.errors import Invalid

Word = TypeVar("Word", bound=StrEnum)


def word_of(words: type[Word], numbers: Any, prefix: str, number: int) -> Word:
    """The domain's word for a number of the contract. Raises Invalid for none and for unknown ones."""
    try:
        name = numbers.Name(number).removeprefix(f"{prefix}_")
    except ValueError:
        name = ""
    for word in words:
        if word.value.upper() == name:
            return word
    raise Invalid(
        f"{prefix.lower()} is needed: one of {', '.join(f'{prefix}_{word.value.upper()}' for word in words)}.",
        reason=f"{prefix}_MISSING",
    )


def number_of(numbers: Any, prefix: str, word: StrEnum) -> Any:
    return numbers.Value(f"{prefix}_{word.value.upper()}")
