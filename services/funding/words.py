"""The domain's words for the numbers of the gRPC contracts, as requests need them."""

from enum import StrEnum
from typing import Any, TypeVar

from services.common import messages
from services.common.errors import Invalid
from services.common.messages import prefix_of

Word = TypeVar("Word", bound=StrEnum)


def word_of(words: type[Word], numbers: Any, number: int) -> Word:
    """Raises Invalid for none and for what the contract does not have."""
    word = messages.word_of(words, numbers, number)
    if word is None:
        prefix = prefix_of(numbers)
        known = ", ".join(f"{prefix}{each.value.upper()}" for each in words)
        name = prefix.removesuffix("_")
        raise Invalid(f"{name.lower()} is needed: one of {known}.", reason=f"{name}_MISSING")
    return word
