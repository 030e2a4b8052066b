"""Signed evidence: one figure about one machine over a time range, that anybody with the public key can check.

The signature (Ed25519) is over the statement as canonical JSON in the sense of RFC 8785, with a prefix that no other use of the
key has. So that there is one spelling only, a statement holds texts and whole numbers: measured figures are decimal texts.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from decimal import Decimal
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.common.errors import Invalid

ALGORITHM: Final = "Ed25519"
VERSION: Final = 1
TEXT_CHARACTERS_MAX: Final = 2_000
# Beyond, a reader whose numbers are doubles would see another number than was signed.
WHOLE_NUMBER_MAX: Final = 2**53 - 1
KEY_BYTES: Final = 32
KEY_ID_CHARACTERS: Final = 16
SIGNED_PREFIX: Final = b"smdih-evidence-v1\n"

BAD_EVIDENCE: Final = "BAD_EVIDENCE"
UNKNOWN_EVIDENCE_KEY: Final = "UNKNOWN_EVIDENCE_KEY"
WRONG_SIGNATURE: Final = "WRONG_SIGNATURE"

_DECIMAL = re.compile(r"-?[0-9]{1,15}(\.[0-9]{1,9})?")


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What is attested."""

    # What was measured: energy_kwh, working_hours, samples.
    measure: str
    firm_id: int
    machine_id: int
    machine_path: str
    # From (inclusive) to (exclusive), microseconds since 1970 UTC.
    from_us: int
    to_us: int
    # Decimal text, such as "1532.25".
    value: str
    unit: str
    # Share of the time range that data stood for, decimal text from 0 to 1.
    coverage: str
    # How the figure was made, in words, with the parameters that shaped it.
    method: str
    issued_us: int
    version: int = VERSION

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name), field.type)
        for name in ("value", "coverage"):
            if not _DECIMAL.fullmatch(getattr(self, name)):
                raise Invalid(f"{name}: a decimal number as text, such as 1532.25.", reason=BAD_EVIDENCE)
        if self.version != VERSION:
            raise Invalid(f"version: {self.version} is not known here; ask for new evidence.", reason=BAD_EVIDENCE)
        if self.from_us >= self.to_us:
            raise Invalid("from_us must be before to_us.", reason=BAD_EVIDENCE)

    @property
    def figure(self) -> Decimal:
        return Decimal(self.value)

    @property
    def id(self) -> str:
        """The same for the same statement, wherever it is."""
        return hashlib.sha256(_signed(self)).hexdigest()[:32]


class Signer:
    """Signs with one private key (base64 of its 32 bytes, as `new_key` makes it). Raises ValueError when it is none."""

    def __init__(self, private_key: str) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(_key_bytes(private_key))
        self.public_key = _text(self._key.public_key().public_bytes_raw())
        self.key_id = key_id(self.public_key)

    def sign(self, statement: Statement) -> dict[str, Any]:
        """The evidence, ready to be sent as JSON."""
        return {
            "statement": asdict(statement),
            "algorithm": ALGORITHM,
            "key_id": self.key_id,
            "signature": _text(self._key.sign(_signed(statement))),
        }


class Verifier:
    """Takes evidence signed with one of these public keys (base64). Raises ValueError when one is no key."""

    def __init__(self, public_keys: Iterable[str]) -> None:
        self._keys = {key_id(key): Ed25519PublicKey.from_public_bytes(_key_bytes(key)) for key in public_keys}

    def verify(self, evidence: Mapping[str, Any]) -> Statement:
        """The statement, once its signature has been checked; use this and nothing else of what was sent. Raises Invalid."""
        if set(evidence) != {"statement", "algorithm", "key_id", "signature"}:
            raise Invalid("Evidence has the fields statement, algorithm, key_id and signature.", reason=BAD_EVIDENCE)
        stated, name, signature = evidence["statement"], evidence["key_id"], evidence["signature"]
        if evidence["algorithm"] != ALGORITHM or not isinstance(name, str) or not isinstance(signature, str):
            raise Invalid(f"algorithm: {ALGORITHM}; key_id and signature: texts.", reason=BAD_EVIDENCE)
        if not isinstance(stated, Mapping) or set(stated) != _FIELDS:
            raise Invalid(f"statement: the fields {', '.join(sorted(_FIELDS))}.", reason=BAD_EVIDENCE)
        statement = Statement(**stated)
        key = self._keys.get(name)
        if key is None:
            raise Invalid(
                "This evidence is signed with a key that is not trusted here; ask for new evidence.",
                reason=UNKNOWN_EVIDENCE_KEY,
            )
        try:
            key.verify(base64.b64decode(signature, validate=True), _signed(statement))
        except (InvalidSignature, binascii.Error, ValueError) as error:
            raise Invalid(
                "The signature does not belong to this statement; send the evidence exactly as it was given out.",
                reason=WRONG_SIGNATURE,
            ) from error
        return statement


_FIELDS: Final = frozenset(field.name for field in fields(Statement))


def new_key() -> str:
    """A fresh private key: base64 of its 32 bytes."""
    return _text(Ed25519PrivateKey.generate().private_bytes_raw())


def key_id(public_key: str) -> str:
    """A short name for a public key, by which evidence says what it was signed with. Raises ValueError."""
    return hashlib.sha256(_key_bytes(public_key)).hexdigest()[:KEY_ID_CHARACTERS]


def canonical(value: Mapping[str, str | int]) -> bytes:
    """RFC 8785 for texts and whole numbers under ASCII names, where Python's own order and escapes are those of the standard."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _signed(statement: Statement) -> bytes:
    return SIGNED_PREFIX + canonical(asdict(statement))


def _check(name: str, value: object, kind: object) -> None:
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > WHOLE_NUMBER_MAX:
            raise Invalid(f"{name}: a whole number of at most {WHOLE_NUMBER_MAX}.", reason=BAD_EVIDENCE)
        return
    if not isinstance(value, str) or len(value) > TEXT_CHARACTERS_MAX:
        raise Invalid(f"{name}: a text of at most {TEXT_CHARACTERS_MAX} characters.", reason=BAD_EVIDENCE)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Invalid(f"{name}: not valid Unicode.", reason=BAD_EVIDENCE) from error


def _key_bytes(key: str) -> bytes:
    try:
        raw = base64.b64decode(key, validate=True)
    except binascii.Error as error:
        raise ValueError("an evidence key is base64") from error
    if len(raw) != KEY_BYTES:
        raise ValueError(f"an evidence key has {KEY_BYTES} bytes")
    return raw


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
