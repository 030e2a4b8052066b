"""Secrets that must be used again, kept so that a copy of the database does not give them away: sealed by a key of the settings."""

import base64
import binascii
import hashlib
import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12
_SEALED: Final = "sealed"


class Unreadable(Exception):
    """The secret is sealed with a key that is not here, or it is not where it was sealed."""


def new_key() -> str:
    return base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()


class Seal:
    """Seals with the first of the keys (base64 of 32 bytes each, blanks between) and opens with all of them.

    A new key is put in front, and the old one is taken away when nothing is sealed with it any more. Without a key texts stay
    as they are.

    Raises ValueError when one is no key.
    """

    def __init__(self, keys: str = "") -> None:
        raw = [_key_bytes(key) for key in keys.split()]
        self._ciphers = {hashlib.sha256(key).hexdigest()[:8]: AESGCM(key) for key in raw}

    def seal(self, text: str, *, of: str) -> str:
        """`of`: whose it is; it cannot be opened as another's."""
        if not self._ciphers or not text:
            return text
        key_id, cipher = next(iter(self._ciphers.items()))
        nonce = secrets.token_bytes(_NONCE_BYTES)
        body = nonce + cipher.encrypt(nonce, text.encode(), of.encode())
        return f"{_SEALED}.{key_id}.{base64.urlsafe_b64encode(body).decode()}"

    def open(self, text: str, *, of: str) -> str:
        """What was sealed, or the text itself where it never was. Raises Unreadable."""
        name, _, rest = text.partition(".")
        if name != _SEALED:
            return text
        key_id, _, encoded = rest.partition(".")
        try:
            body = base64.urlsafe_b64decode(encoded)
            return self._ciphers[key_id].decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], of.encode()).decode()
        except (KeyError, ValueError, InvalidTag) as error:
            raise Unreadable(
                f"It is sealed with the key {key_id[:8]!r}, which is not among ours, or was moved."
            ) from error

    def is_current(self, text: str) -> bool:
        """Whether it is sealed with the first key, or needs no seal."""
        return not text or not self._ciphers or text.startswith(f"{_SEALED}.{next(iter(self._ciphers))}.")


def _key_bytes(key: str) -> bytes:
    try:
        raw = base64.b64decode(key, validate=True)
    except binascii.Error as error:
        raise ValueError("a key that seals is base64 of 32 bytes") from error
    if len(raw) != KEY_BYTES:
        raise ValueError("a key that seals is base64 of 32 bytes")
    return raw
