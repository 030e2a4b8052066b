"""Claim codes as people read them out and type them: XXXX-XXXX-XXXX.

The first four characters find the code, the next seven are its secret, the last one tells a typing error from a wrong code.
"""

import base64
import hashlib
import hmac
import secrets
from typing import Final

from services.common.identity import Role

# Crockford's: without I, L, O and U, which are read as 1, 1, 0 and V.
ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_READ_AS: Final = str.maketrans("ILOU", "110V", " -_.")
LOOKUP_CHARACTERS: Final = 4
CHARACTERS: Final = 12
SALT_BYTES: Final = 16
KEY_SALT_BYTES: Final = 32
_TEXT_LENGTH_MAX: Final = 64

# 35 bits of secret stand against a few attempts, and against a stolen database for as long as the code lives: 16 MiB and some
# 40 ms a guess.
_SCRYPT_COST: Final = 2**14


class Mistyped(ValueError):
    """The text is no claim code; the message says what is wrong with it."""


def new_code() -> str:
    """A fresh code, without its dashes."""
    characters = "".join(secrets.choice(ALPHABET) for _ in range(CHARACTERS - 1))
    return characters + _check_character(characters)


def shown(code: str) -> str:
    return "-".join(code[start : start + 4] for start in range(0, CHARACTERS, 4))


def read(typed: str) -> str:
    """The code in what somebody typed, in any case, with or without dashes. Raises Mistyped."""
    code = typed[:_TEXT_LENGTH_MAX].strip().upper().translate(_READ_AS)
    if len(code) != CHARACTERS or any(character not in ALPHABET for character in code):
        raise Mistyped(f"A claim code has {CHARACTERS} letters and digits, such as 7KQ4-M2XP-9RTV.")
    if _check_character(code[:-1]) != code[-1]:
        raise Mistyped("A character of the claim code is mistyped; compare it once more.")
    return code


def lookup(code: str) -> str:
    return code[:LOOKUP_CHARACTERS]


def digest(code: str, salt: bytes) -> bytes:
    """What is kept of the secret part. Slow on purpose: call it in a thread."""
    return hashlib.scrypt(code[LOOKUP_CHARACTERS:].encode(), salt=salt, n=_SCRYPT_COST, r=8, p=1, dklen=32)


def device_key(code: str, request_id: str, key_salt: bytes) -> str:
    """The key of this request: random by `key_salt`, and the same for a repeat of the request."""
    secret = hmac.new(key_salt, f"smdih claim\0{code}\0{request_id}".encode(), hashlib.sha256).digest()
    return f"smdih_{Role.DEVICE}_{base64.urlsafe_b64encode(secret).rstrip(b'=').decode()}"


def _check_character(characters: str) -> str:
    """Changes with any one wrong character (odd weights modulo 32) and with 97 of 100 swaps of two neighbours."""
    total = sum((2 * place + 1) * ALPHABET.index(character) for place, character in enumerate(characters))
    return ALPHABET[total % len(ALPHABET)]
