"""Messages of the contracts from values of the domain, and words of the domain from the numbers of the contracts.

An edge names only what differs; everything else has the same name on both sides and is carried over here.
"""

import functools
from collections.abc import Callable, Mapping
from datetime import date, datetime
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from services.common.clock import to_us

M = TypeVar("M", bound=Message)
Word = TypeVar("Word", bound=StrEnum)

_ZERO = "UNSPECIFIED"


def message_of(kind: type[M], value: object, **given: Any) -> M:
    """A message of that kind whose fields are `given`, or else the value's attributes of the same names.

    | attribute | field |
    | --- | --- |
    | None | not set |
    | a word (StrEnum) for an enum | the number that the contract has for it |
    | a time, also under the field's name without "_us" | microseconds since 1970 UTC |
    | a date | ISO text |
    | another value for a message | that message, made in the same way |
    | several of those | repeated |

    Raises AttributeError for a field that is neither given nor an attribute: the edge has forgotten it.
    """
    fields: dict[str, Any] = {}
    for field in _plan(kind.DESCRIPTOR):
        if field.name in given:
            found = given[field.name]
        else:
            found = getattr(value, field.name if hasattr(value, field.name) else field.otherwise)
        if found is not None:
            fields[field.name] = field.convert(found)
    return kind(**fields)


def word_of(words: type[Word], numbers: Any, number: int) -> Word | None:
    """The domain's word for a number of the enum `numbers`; None for zero and for numbers that the contract does not have."""
    try:
        name = numbers.Name(number)
    except ValueError:
        return None
    return _words(words, prefix_of(numbers)).get(name)


def number_of(numbers: Any, word: StrEnum) -> Any:
    """The number of the enum `numbers` for a word: its value in capitals behind the enum's prefix."""
    return _number(numbers.DESCRIPTOR, word)


def prefix_of(numbers: Any) -> str:
    """What all names of an enum of the contracts begin with, such as "CALL_STATE_"."""
    return _prefix(numbers.DESCRIPTOR)


class _Field(NamedTuple):
    name: str
    # The attribute to look for if the value has none of this name.
    otherwise: str
    convert: Callable[[Any], Any]


@functools.cache
def _plan(descriptor: Any) -> tuple[_Field, ...]:
    return tuple(
        _Field(field.name, field.name.removesuffix("_us"), functools.partial(_converter(field), field))
        for field in descriptor.fields
    )


def _converter(field: FieldDescriptor) -> Callable[[FieldDescriptor, Any], Any]:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return _map
    return _several if field.is_repeated else _one


def _map(field: FieldDescriptor, found: Mapping[Any, Any]) -> dict[Any, Any]:
    return dict(found)


def _several(field: FieldDescriptor, found: Any) -> list[Any]:
    return [_one(field, each) for each in found]


def _one(field: FieldDescriptor, found: Any) -> Any:
    if field.message_type is not None:
        return found if isinstance(found, Message) else message_of(GetMessageClass(field.message_type), found)
    if field.enum_type is not None:
        return _number(field.enum_type, found) if isinstance(found, StrEnum) else found
    if isinstance(found, datetime):
        return to_us(found)
    return found.isoformat() if isinstance(found, date) else found


def _number(descriptor: EnumDescriptor, word: StrEnum) -> int:
    number: int = descriptor.values_by_name[f"{_prefix(descriptor)}{word.value.upper()}"].number
    return number


@functools.cache
def _prefix(descriptor: Any) -> str:
    return str(descriptor.values_by_number[0].name).removesuffix(_ZERO)


@functools.cache
def _words(words: type[Word], prefix: str) -> Mapping[str, Word]:
    return {f"{prefix}{word.value.upper()}": word for word in words}
