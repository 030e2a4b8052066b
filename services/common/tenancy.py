"""Whose data a piece of work may touch: those of one firm, or of all.

The database keeps to it by itself (row-level security): inside a request of a firm a forgotten WHERE finds nothing of another one.
Work that nobody narrowed is for all firms: consumers, relays, operators' and partners' requests. The edges (`http.py`, `rpc.py`)
narrow what a firm or one of its devices asked for.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

from services.common.identity import Caller, Role

ALL: Final = "all"

# 0: all firms.
_firm_id: ContextVar[int] = ContextVar("firm_id", default=0)


def narrow_to(caller: Caller) -> None:
    """From here on, in this task, only what the caller's firm owns, if they speak for a firm."""
    _firm_id.set(caller.firm_id if caller.role in (Role.FIRM, Role.DEVICE) else 0)


def current_firm_id() -> int:
    """The firm that the current work is for; 0: for all."""
    return _firm_id.get()


@contextmanager
def for_all_firms() -> Iterator[None]:
    """For a step of a firm's request that must know of others: what falls due for everybody, limits that firms share.

    Transactions that begin inside see everything; say beside the call why.
    """
    token = _firm_id.set(0)
    try:
        yield
    finally:
        _firm_id.reset(token)
