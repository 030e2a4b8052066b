"""Who may read which signals at which times."""

from collections.abc import Collection

import pytest

from services.common.errors import Forbidden, NotFound
from services.common.identity import Caller, Role
from services.ingest.queries.access import Access, Grant
from services.ingest.queries.store import SignalPlace

FIRM = Caller(1, Role.FIRM, firm_id=7)
DEVICE = Caller(2, Role.DEVICE, firm_id=7)
EXPERT = Caller(3, Role.PARTNER, partner_id=5)
OPERATOR = Caller(4, Role.OPERATOR)
OWN = SignalPlace(10, 7, 1, 0, "power", "kW")
OTHERS = SignalPlace(11, 8, 2, 0, "power", "kW")


def test_a_firm_and_its_devices_read_their_own_and_operators_all() -> None:
    for caller in (FIRM, DEVICE, OPERATOR):
        Access().check(caller, [OWN], 0, 2**60)
    Access().check(OPERATOR, [OWN, OTHERS], 0, 2**60)
    for caller in (FIRM, DEVICE, EXPERT):
        with pytest.raises(NotFound):
            Access().check(caller, [OWN, OTHERS], 0, 1)
    with pytest.raises(NotFound):
        Access().check(Caller(5, Role.PARTNER), [SignalPlace(12, 0, 3, 0, "x", "")], 0, 1)


def test_what_is_lent_is_read_within_its_time_and_until_it_is_taken_back() -> None:
    lent = [Grant({11}, 100, 200), Grant({11, 12}, 300, 2**62)]
    access = Access(lambda caller: [], lambda caller: lent if caller.partner_id == 5 else [])
    for start, end in ((100, 200), (150, 151), (300, 2**60)):
        access.check(EXPERT, [OTHERS], start, end)
    for start, end in ((99, 200), (100, 201), (150, 350), (0, 2**60)):
        with pytest.raises(Forbidden) as caught:
            access.check(EXPERT, [OTHERS], start, end)
        assert caught.value.reason == "NOT_LENT"
        assert "1970-01-01T00:00:00+00:00" in caught.value.detail
    with pytest.raises(NotFound):
        access.check(EXPERT, [OTHERS, OWN], 100, 200)
    with pytest.raises(NotFound):
        access.check(FIRM, [OWN, OTHERS], 100, 200)
    assert not access.owns(EXPERT, 8)
    lent.clear()
    with pytest.raises(NotFound):
        access.check(EXPERT, [OTHERS], 100, 200)


async def test_what_is_read_through_a_room_is_noted_before_it_is_read() -> None:
    noted: list[tuple[str, list[int], int, int]] = []

    async def note(caller: Caller, room_id: str, signal_ids: Collection[int], from_us: int, to_us: int) -> None:
        noted.append((room_id, list(signal_ids), from_us, to_us))

    access = Access(lambda caller: [Grant({11}, 100, 200, room_id="r"), Grant({10}, 0, 500)], note=note)
    await access.admit(EXPERT, [OTHERS, OWN], 100, 200)
    await access.admit(FIRM, [OWN], 100, 200)
    assert noted == [("r", [11], 100, 200)]
    with pytest.raises(Forbidden):
        await access.admit(EXPERT, [OTHERS], 100, 201)
    assert len(noted) == 1
