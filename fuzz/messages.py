"""Messages of any type, as hypothesis strategies: well-formed with odd values, and bytes that are nearly one."""

from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

DEPTH_MAX: Final = 4
REPEATED_MAX: Final = 4
TEXT_MAX: Final = 40

ODD_TEXTS: Final = (
    "",
    "\x00",
    "a" * 300,
    "🙂",
    "../..",
    "%00",
    "'; --",
    "NaN",
    "-1",
    "1",
    "acme/leeds/press-1",
    "9" * 30,
)
texts: Final = st.sampled_from(ODD_TEXTS) | st.text(max_size=TEXT_MAX)

_Kind = FieldDescriptor
_NUMBERS: Final[dict[int, SearchStrategy[Any]]] = {
    _Kind.CPPTYPE_INT32: st.integers(-(2**31), 2**31 - 1) | st.integers(-2, 9),
    _Kind.CPPTYPE_INT64: st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 9),
    _Kind.CPPTYPE_UINT32: st.integers(0, 2**32 - 1) | st.integers(0, 9),
    _Kind.CPPTYPE_UINT64: st.integers(0, 2**64 - 1) | st.integers(0, 9),
    _Kind.CPPTYPE_DOUBLE: st.floats(width=64),
    _Kind.CPPTYPE_FLOAT: st.floats(width=32),
    _Kind.CPPTYPE_BOOL: st.booleans(),
}


def messages(descriptor: Descriptor, depth: int = DEPTH_MAX) -> SearchStrategy[Message]:
    """Messages of the type with some of their fields set."""
    return _fields(descriptor, depth).map(lambda fields: _made(descriptor, fields))


def _fields(descriptor: Descriptor, depth: int) -> SearchStrategy[dict[str, Any]]:
    optional = {}
    for one in descriptor.fields:
        if one.message_type is not None and depth == 0:
            continue
        value = _value(one, depth)
        if one.is_repeated and not _is_map(one):
            value = st.lists(value, max_size=REPEATED_MAX)
        optional[one.name] = value
    return st.fixed_dictionaries({}, optional=optional)


def _value(one: FieldDescriptor, depth: int) -> SearchStrategy[Any]:
    if _is_map(one):
        key, value = _map_parts(one)
        return st.dictionaries(_value(key, depth - 1), _value(value, depth - 1), max_size=REPEATED_MAX)
    if one.message_type is not None:
        return messages(one.message_type, depth - 1)
    if one.enum_type is not None:
        return st.sampled_from([value.number for value in one.enum_type.values]) | st.just(99)
    if one.cpp_type == _Kind.CPPTYPE_STRING:
        return st.binary(max_size=64) if one.type == _Kind.TYPE_BYTES else texts.map(_without_surrogates)
    return _NUMBERS[one.cpp_type]


def _is_map(one: FieldDescriptor) -> bool:
    return one.message_type is not None and one.message_type.GetOptions().map_entry


def _map_parts(one: FieldDescriptor) -> tuple[FieldDescriptor, FieldDescriptor]:
    """Key and value."""
    assert one.message_type is not None
    return one.message_type.fields_by_name["key"], one.message_type.fields_by_name["value"]


def _made(descriptor: Descriptor, fields: dict[str, Any]) -> Message:
    message: Message = GetMessageClass(descriptor)()
    for name, value in fields.items():
        one = descriptor.fields_by_name[name]
        if one.message_type is not None and not one.is_repeated:
            getattr(message, name).CopyFrom(value)
        elif one.message_type is not None and not _is_map(one):
            getattr(message, name).extend(value)
        elif _is_map(one) and _map_parts(one)[1].message_type is not None:
            for key, part in value.items():
                getattr(message, name)[key].CopyFrom(part)
        elif one.is_repeated:
            held = getattr(message, name)
            held.update(value) if _is_map(one) else held.extend(value)
        else:
            setattr(message, name, value)
    return message


def _without_surrogates(text: str) -> str:
    return text.encode("utf-8", "ignore").decode()


def bodies(descriptor: Descriptor) -> SearchStrategy[bytes]:
    """Bytes as they may arrive: messages, messages with a part of them changed, and anything."""
    whole = messages(descriptor).map(lambda message: message.SerializePartialToString())
    return whole | damaged(whole) | st.binary(max_size=200)


def damaged(whole: SearchStrategy[bytes]) -> SearchStrategy[bytes]:
    """The same bytes with a run of them replaced, left out or doubled."""

    def damage(body: bytes, start: int, end: int, between: bytes) -> bytes:
        first, last = sorted((start % (len(body) + 1), end % (len(body) + 1)))
        return body[:first] + between + body[last:]

    place = st.integers(0, 2**16)
    return st.builds(damage, whole, place, place, st.binary(max_size=8))
