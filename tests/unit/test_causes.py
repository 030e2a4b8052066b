"""Why is there no data? The rules that need hours to pass, or servers to be away."""

from dataclasses import replace

import pytest

from services.ingest.diagnosis.causes import QUIET_AFTER_S, Facts, Key, Refusal, diagnose

NOW_US = 1_764_000_000_000_000
HOUR_US = 3_600_000_000
KEY = Key(7, "smdih_device_Ab3x", "gateway 1", NOW_US - 90 * 24 * HOUR_US, 0, 0, NOW_US - 5 * HOUR_US)
SEEN = Facts(
    5,
    "acme/leeds/press-1",
    NOW_US,
    received_us=NOW_US - 5 * HOUR_US,
    newest_us=NOW_US - 5 * HOUR_US,
    stored_us=NOW_US - 5 * HOUR_US,
    credential_id=7,
    source="gateway-1",
    keys=[KEY],
)


def refusal(reason: str, **fields: object) -> Refusal:
    known = {"machine_id": 0, "credential_id": 7, "subject": "", "source": "gateway-1", "door": "http", "times": 3}
    known |= {"samples": 3, "first_us": NOW_US - 2 * HOUR_US, "last_us": NOW_US - HOUR_US, "example": "Because."}
    return Refusal(**(known | {"reason": reason, "clock_off_us": 0} | fields))  # type: ignore[arg-type]


def verdict(facts: Facts) -> str:
    return diagnose(facts).verdict.cause


def test_a_gateway_that_fell_silent_and_one_that_still_sends_for_others() -> None:
    assert verdict(SEEN) == "GATEWAY_SILENT"
    used = replace(SEEN, keys=[replace(KEY, used_us=NOW_US - 1)])
    assert verdict(used) == "MACHINE_SILENT"
    assert "the way to the hub works" in diagnose(used).verdict.text


def test_refusals_older_than_the_last_good_data_are_history() -> None:
    old = refusal("OUT_OF_RANGE", machine_id=5, last_us=SEEN.received_us - HOUR_US)
    assert verdict(replace(SEEN, refusals=[old])) == "GATEWAY_SILENT"
    assert verdict(replace(SEEN, refusals=[replace(old, last_us=NOW_US - HOUR_US)])) == "OUT_OF_RANGE"


def test_what_another_gateway_did_wrong_is_not_this_machines_trouble() -> None:
    assert verdict(replace(SEEN, refusals=[refusal("MALFORMED", credential_id=8)])) == "GATEWAY_SILENT"
    assert verdict(replace(SEEN, refusals=[refusal("MALFORMED")])) == "MALFORMED"
    assert verdict(replace(SEEN, refusals=[refusal("QUOTA_SAMPLES")])) == "QUOTA_SAMPLES"
    assert verdict(replace(SEEN, refusals=[refusal("KEY_EXPIRED", credential_id=8)])) == "GATEWAY_SILENT"


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        (replace(KEY, valid_to_us=NOW_US - 1), "KEY_EXPIRED"),
        (replace(KEY, revoked_us=NOW_US - 1), "KEY_REVOKED"),
        (replace(KEY, valid_from_us=NOW_US + HOUR_US), "KEY_NOT_YET_VALID"),
    ],
)
def test_a_key_that_is_not_valid_now_is_named_before_it_is_refused(key: Key, cause: str) -> None:
    found = diagnose(replace(SEEN, keys=[key]))
    assert [one.cause for one in found.causes] == [cause, "NO_VALID_KEY", "GATEWAY_SILENT"]


def test_a_key_that_was_refused_right_after_the_last_data_is_named_at_once() -> None:
    now = replace(SEEN, received_us=NOW_US - 10_000_000, newest_us=NOW_US - 10_000_000, stored_us=NOW_US - 10_000_000)
    assert verdict(now) == "FLOWING"
    assert verdict(replace(now, refusals=[refusal("KEY_REVOKED", last_us=NOW_US - 1)])) == "KEY_REVOKED"


def test_data_that_bears_old_times_is_a_wrong_clock() -> None:
    behind = replace(SEEN, received_us=NOW_US, newest_us=NOW_US - HOUR_US, stored_us=NOW_US - HOUR_US)
    assert verdict(behind) == "CLOCK_BEHIND"
    assert "1 hour" in diagnose(behind).verdict.text


def test_acknowledged_data_is_behind_only_when_it_should_have_been_stored() -> None:
    now = replace(SEEN, received_us=NOW_US, newest_us=NOW_US, waiting_records=3)
    assert verdict(replace(now, stored_us=0)) == "FLOWING"
    assert verdict(replace(now, stored_us=NOW_US - 1_000_000)) == "FLOWING"
    assert verdict(replace(now, stored_us=NOW_US - 60_000_000)) == "NOT_STORED_YET"
    assert verdict(replace(now, stored_us=0, received_us=NOW_US - 60_000_000)) == "NOT_STORED_YET"
    assert verdict(replace(now, stored_us=0, waiting_records=0)) == "FLOWING"


def test_a_message_log_that_is_away_is_an_answer() -> None:
    assert verdict(replace(SEEN, waiting_records=None)) == "MESSAGE_LOG_AWAY"


def test_no_time_that_a_sender_can_send_breaks_the_answer() -> None:
    for off in (2**63 - 1, -(2**63 - 1), 1, -1, 0):
        one = refusal("TIME_OUT_OF_WINDOW", machine_id=5, clock_off_us=off)
        assert diagnose(replace(SEEN, refusals=[one])).verdict.next_step


def test_a_machine_is_quiet_only_after_a_while() -> None:
    just = NOW_US - QUIET_AFTER_S * 1_000_000
    assert verdict(replace(SEEN, received_us=just, newest_us=just)) == "FLOWING"
    assert verdict(replace(SEEN, received_us=just - 1, newest_us=just)) != "FLOWING"
