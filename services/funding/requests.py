"""What every use case does with a request: refusals of the domain become the caller's, repeats are known by their content."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from services.common.errors import Invalid
from services.funding.domain import Content, Refused, Terms
from services.funding.ledger import RequestIdReused

LATER = {"terms": (Terms(),), "content": (Content(),)}


@contextmanager
def understood() -> Iterator[None]:
    """What the domain refuses is the request's fault."""
    try:
        yield
    except Refused as error:
        raise Invalid(str(error), reason=error.reason) from error


def content_sha256(thing: Any) -> bytes:
    """Hash of what a request says (a dataclass), without what the hub adds."""
    said = {
        field.name: value
        for field in dataclasses.fields(thing)
        # Fields that came later count once they say something: so a request of an earlier release keeps its hash.
        if (value := getattr(thing, field.name)) not in LATER.get(field.name, ())
    }
    plain = dataclasses.asdict(thing)
    return hashlib.sha256(
        json.dumps({name: plain[name] for name in said}, sort_keys=True, default=str).encode()
    ).digest()


def check_same(first_content: bytes, content: bytes) -> None:
    """Raises RequestIdReused when a repeat says something else than the first."""
    if first_content != content:
        raise RequestIdReused()
