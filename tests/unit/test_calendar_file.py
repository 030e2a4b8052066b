"""Times in calendar files."""

from datetime import UTC, datetime, timedelta

import pytest

from services.matching.calendar_file import sessions_file
from services.matching.sessions import Session

TURN = datetime(2026, 10, 25, 1, tzinfo=UTC)  # 2:00 in London becomes 1:00


@pytest.mark.parametrize(
    ("starts", "written"),
    [
        (TURN - timedelta(minutes=30), "DTSTART;TZID=Europe/London:20261025T013000"),
        # The standard reads a local time that comes twice as the first.
        (TURN + timedelta(minutes=30), "DTSTART:20261025T013000Z"),
        (TURN + timedelta(hours=1), "DTSTART;TZID=Europe/London:20261025T020000"),
    ],
)
def test_the_hour_that_comes_twice_is_written_so_that_it_is_read_right(starts: datetime, written: str) -> None:
    session = Session(
        id="night",
        provider_id="rigs",
        partner_id=1,
        title="Night shift",
        place="",
        starts=starts,
        ends=starts + timedelta(hours=1),
        seats=1,
        confirm_within=timedelta(days=1),
    )
    assert written in sessions_file([session]).decode().split("\r\n")
