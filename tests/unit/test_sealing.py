"""Sealed secrets are opened by who has the key and says whose they are, and by nobody else."""

import pytest

from services.common.sealing import Seal, Unreadable, new_key


def test_what_is_sealed_is_opened_and_never_looks_the_same() -> None:
    seal = Seal(new_key())
    first, second = seal.seal("secret", of="a"), seal.seal("secret", of="a")
    assert first != second
    assert "secret" not in first
    assert seal.open(first, of="a") == seal.open(second, of="a") == "secret"


def test_it_is_not_opened_as_anothers_nor_when_changed_nor_without_the_key() -> None:
    seal = Seal(new_key())
    sealed = seal.seal("secret", of="a")
    for reader, text, of in (
        (seal, sealed, "b"),
        (seal, sealed[:-5] + "AAAA=", "a"),
        (seal, "sealed.", "a"),
        (seal, "sealed.0.%%%", "a"),
        (Seal(new_key()), sealed, "a"),
        (Seal(), sealed, "a"),
    ):
        with pytest.raises(Unreadable):
            reader.open(text, of=of)


def test_keys_are_changed_without_a_gap() -> None:
    old, new = new_key(), new_key()
    sealed = Seal(old).seal("secret", of="a")
    both = Seal(f"{new} {old}")
    assert both.open(sealed, of="a") == "secret"
    assert not both.is_current(sealed)
    again = both.seal(both.open(sealed, of="a"), of="a")
    assert both.is_current(again)
    assert Seal(new).open(again, of="a") == "secret"


def test_without_a_key_texts_stay_as_they_are_and_are_sealed_once_there_is_one() -> None:
    assert Seal().seal("plain", of="a") == Seal().open("plain", of="a") == "plain"
    assert Seal().is_current("plain")
    seal = Seal(new_key())
    assert seal.open("plain", of="a") == "plain"
    assert not seal.is_current("plain")
    assert seal.seal("", of="a") == ""
    assert seal.is_current("")


@pytest.mark.parametrize("keys", ["short", "====", "A" * 43])
def test_what_is_no_key_is_refused(keys: str) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        Seal(keys)
