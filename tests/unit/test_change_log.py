"""What an entry of the change log may take, and how many a caller brings about who is refused."""

import asyncio
import json
from typing import Any

from services.common.audit import IDS_CHARACTERS_MAX, REFUSALS_AT_ONCE, ChangeLog, ids_in, ids_in_json
from services.common.clock import SystemClock
from services.common.identity import Caller, Role


def test_ids_have_a_size_each_and_together() -> None:
    assert ids_in_json(b'{"a_id": %s, "b_id": 7}' % (b"9" * 4_000)) == {"b_id": 7}
    assert ids_in([("a_id", 2**63), ("b_id", 2**63 - 1), ("c_ids", [1, -(2**63) - 1])]) == {
        "b_id": 2**63 - 1,
        "c_ids": [1],
    }
    many = {f"{'x' * 30}{chr(97 + n)}_ids": ["y" * 64] * 100 for n in range(26)}
    found = ids_in_json(json.dumps({"id": 5, **many}).encode())
    assert len(found) > 1
    assert len(json.dumps(found)) < 1.5 * IDS_CHARACTERS_MAX


async def test_refusals_of_one_caller_do_not_fill_the_database() -> None:
    nowhere: Any = None  # nothing is written: `run` does not
    log = ChangeLog(nowhere, clock=SystemClock())

    async def note(count: int, *, caller: int, outcome: str) -> int:
        """So many of these wait to be written then."""
        before = len(log._waiting)
        who = Caller(caller, Role.FIRM, firm_id=1)
        notes = [
            asyncio.create_task(log.note(who, shown="", action="POST /v1/x", ids={}, outcome=outcome, address=""))
            for _ in range(count)
        ]
        await asyncio.sleep(0)
        for one in notes:
            one.cancel()
        await asyncio.gather(*notes, return_exceptions=True)
        return len(log._waiting) - before

    assert REFUSALS_AT_ONCE <= await note(REFUSALS_AT_ONCE * 2, caller=1, outcome="FORBIDDEN") < REFUSALS_AT_ONCE + 10
    assert await note(5, caller=2, outcome="FORBIDDEN") == 5
    assert await note(2_000, caller=1, outcome="OK") == 2_000
    assert await note(5, caller=1, outcome="TRY_AGAIN") == 5
