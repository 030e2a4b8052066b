"""What every use case does with a request: refusals of the domain become the caller's, repeats are known by their content."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from services.common.errors import Invalid
from services.funding.domain import Refused
from services.funding.ledger import RequestIdReused


@contextmanager
def understood() -> Iterator[None]:
    """What the domain refuses is the request's fault."""
    try:
        yield
    except Refused as error:
        raise Invalid(str(error), reason=error.reason) from error


def content_sha256(thing: Any) -> bytes:
    """Hash of what a request says (a dataclass), without what the hub adds."""
    return hashlib.sha256(json.dumps(dataclasses.asdict(thing), sort_keys=True, default=str).encode()).digest()


def check_same(first_content: bytes, content: bytes) -> None:
    """Raises RequestIdReused when a repeat says something else than the first."""
    if first_content != content:
        raise RequestIdReused()
