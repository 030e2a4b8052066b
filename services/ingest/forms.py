"""JSON as the HTTP edges take and give it."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class Body(BaseModel):
    """A body that says nothing we do not know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def as_dict(message: Any) -> dict[str, Any]:
    # Not protobuf's own JSON: it writes 64-bit integers as text, which would make ids unlike those in every other answer.
    found: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None:
            found[field.name] = [as_dict(one) for one in value] if field.is_repeated else as_dict(value)
        elif field.type != field.TYPE_BYTES:
            found[field.name] = value
    return found
