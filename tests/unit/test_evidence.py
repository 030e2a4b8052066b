"""Evidence can be checked by who has the public key, and nothing of it can be changed unseen."""

import base64
import json
from dataclasses import asdict, replace
from decimal import Decimal
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.common.errors import Invalid
from services.common.evidence import Signer, Statement, Verifier, canonical, new_key

STATEMENT = Statement(
    measure="energy_kwh",
    firm_id=3,
    machine_id=17,
    machine_path="acme/leeds/press-3",
    from_us=1_764_000_000_000_000,
    to_us=1_764_086_400_000_000,
    value="152.250",
    unit="kWh",
    coverage="0.998",
    method='power integrated; "largest gap" 5 min, Größe\n',
    issued_us=1_764_086_500_000_000,
)


def test_what_was_signed_is_what_is_read() -> None:
    signer = Signer(new_key())
    sent = json.loads(json.dumps(signer.sign(STATEMENT)))
    found = Verifier([signer.public_key]).verify(sent)
    assert found == STATEMENT
    assert found.figure == Decimal("152.25")
    assert found.id == STATEMENT.id != replace(STATEMENT, value="153").id


def test_a_stranger_can_check_it_with_the_public_key_and_plain_json() -> None:
    signer = Signer(new_key())
    sent = signer.sign(STATEMENT)
    text = json.dumps(sent["statement"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    Ed25519PublicKey.from_public_bytes(base64.b64decode(signer.public_key)).verify(
        base64.b64decode(sent["signature"]), b"smdih-evidence-v1\n" + text.encode()
    )
    assert canonical({"b": 1, "a": 'é\x01"\n'}) == '{"a":"é\\u0001\\"\\n","b":1}'.encode()


@pytest.mark.parametrize("field", list(asdict(STATEMENT)))
def test_no_field_can_be_changed(field: str) -> None:
    signer = Signer(new_key())
    sent = signer.sign(STATEMENT)
    value = sent["statement"][field]
    sent["statement"][field] = value + 1 if isinstance(value, int) else "7" + value
    with pytest.raises(Invalid) as caught:
        Verifier([signer.public_key]).verify(sent)
    assert caught.value.reason == ("BAD_EVIDENCE" if field == "version" else "WRONG_SIGNATURE")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"signature": "AAAA"}, "WRONG_SIGNATURE"),
        ({"signature": "not base64"}, "WRONG_SIGNATURE"),
        ({"signature": 7}, "BAD_EVIDENCE"),
        ({"algorithm": "none"}, "BAD_EVIDENCE"),
        ({"key_id": "0" * 16}, "UNKNOWN_EVIDENCE_KEY"),
        ({"statement": "energy"}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"value": 152.25}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"value": "much"}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"value": "NaN"}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"method": "\ud800"}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"firm_id": 2**53}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"firm_id": True}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"to_us": 0}}, "BAD_EVIDENCE"),
        ({"statement": asdict(STATEMENT) | {"more": 1}}, "BAD_EVIDENCE"),
        ({"more": 1}, "BAD_EVIDENCE"),
    ],
)
def test_what_is_no_evidence_is_refused_with_a_reason(change: dict[str, Any], reason: str) -> None:
    signer = Signer(new_key())
    with pytest.raises(Invalid) as caught:
        Verifier([signer.public_key]).verify(signer.sign(STATEMENT) | change)
    assert caught.value.reason == reason


def test_a_key_that_is_none_is_refused_at_the_start() -> None:
    for key in ("", "short", "A" * 43, "AAAA"):
        with pytest.raises(ValueError, match="evidence key"):
            Signer(key)
