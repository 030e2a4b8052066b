"""Claim codes are read as people type them, and a slip of the finger is told from a wrong code."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ingest.registry import claimcodes
from services.ingest.registry.claimcodes import ALPHABET, Mistyped, new_code, read, shown


@pytest.mark.parametrize(
    "change", [str.lower, lambda s: s.replace("-", ""), lambda s: f"  {s} ", lambda s: s.replace("-", " ")]
)
def test_any_way_to_type_a_code_is_read(change: "object") -> None:
    for _ in range(50):
        code = new_code()
        assert read(change(shown(code))) == code  # type: ignore[operator]


def test_letters_that_look_like_digits_are_read_as_digits() -> None:
    code = next(code for code in iter(new_code, "") if "0" in code and "1" in code)
    assert read(code.replace("0", "o").replace("1", "l")) == code


@given(place=st.integers(0, 11), other=st.sampled_from(ALPHABET))
def test_any_one_wrong_character_is_noticed(place: int, other: str) -> None:
    code = new_code()
    wrong = code[:place] + other + code[place + 1 :]
    if wrong != code:
        with pytest.raises(Mistyped):
            read(wrong)


@given(st.text(max_size=200))
def test_no_text_breaks_the_reading(text: str) -> None:
    with contextlib.suppress(Mistyped):
        read(text)


def test_the_key_depends_on_code_request_and_salt() -> None:
    code, salt = new_code(), b"s" * 32
    key = claimcodes.device_key(code, "request-1", salt)
    assert key == claimcodes.device_key(code, "request-1", salt)
    others = {
        claimcodes.device_key(code, "request-2", salt),
        claimcodes.device_key(code, "request-1", b"t" * 32),
        claimcodes.device_key(new_code(), "request-1", salt),
    }
    assert key not in others
    assert len(others) == 3
    assert key.startswith("smdih_device_")
    assert len(key) == len("smdih_device_") + 43
