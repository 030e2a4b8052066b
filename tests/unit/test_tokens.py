"""Tokens against the keys that a real HTTP server publishes; every wrong one is refused."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from services.common.errors import Forbidden, HubError, TryAgain, Unauthenticated
from services.common.gate import Gate
from services.common.identity import Caller, Role
from services.common.limits import Limits
from services.common.tokens import Issuer, Tokens
from tests.oidc import AUDIENCE, ISSUER, Provider, running_provider
from tests.polling import eventually


class StandingClock:
    def __init__(self) -> None:
        self.at_us = time.time_ns() // 1000

    def now_us(self) -> int:
        return self.at_us


@pytest_asyncio.fixture
async def provider() -> AsyncIterator[Provider]:
    async with running_provider() as made:
        yield made


@pytest.fixture
def clock() -> StandingClock:
    return StandingClock()


@pytest.fixture
def checked(provider: Provider, clock: StandingClock) -> Tokens:
    return Tokens(Issuer(ISSUER, AUDIENCE, provider.address), clock=clock)


async def reason(checked: Tokens, token: str) -> str:
    try:
        await checked.caller_of(token)
    except HubError as error:
        return error.reason
    return ""


@pytest.mark.parametrize("key_id", ["rsa", "ec", "ed"])
async def test_a_good_token_is_its_bearer(provider: Provider, checked: Tokens, key_id: str) -> None:
    alice = await checked.caller_of(provider.token(key_id))
    assert (alice.role, alice.subject, alice.is_person) == (Role.OPERATOR, "alice", True)
    again = await checked.caller_of(provider.token(key_id, exp=int(time.time()) + 300))
    bob = await checked.caller_of(provider.token(key_id, sub="bob"))
    assert alice.credential_id == again.credential_id != bob.credential_id
    assert -(2**63) <= bob.credential_id < 0
    assert provider.reads == 1


async def test_every_wrong_token_is_refused(provider: Provider, checked: Tokens) -> None:
    now = int(time.time())
    good = provider.token()
    head, body, signature = good.split(".")
    public = provider.signers["rsa"][1].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def forged(header: dict[str, Any], secret: bytes | None) -> str:
        first = base64.urlsafe_b64encode(json.dumps(header).encode()).decode().rstrip("=")
        mac = hmac.new(secret, f"{first}.{body}".encode(), hashlib.sha256).digest() if secret is not None else b""
        return f"{first}.{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"

    provider.signers["other"] = ("RS256", rsa.generate_private_key(public_exponent=65537, key_size=2048))
    changed = base64.urlsafe_b64encode(base64.urlsafe_b64decode(body + "==").replace(b"alice", b"mallo")).decode()
    wrong = {
        "no algorithm": forged({"alg": "none", "kid": "rsa"}, None),
        "no algorithm, in capitals": forged({"alg": "NONE", "kid": "rsa"}, None),
        "the public key as a secret": forged({"alg": "HS256", "kid": "rsa"}, public),
        "a symmetric key in the set": forged({"alg": "HS256", "kid": "shared"}, b"x" * 32),
        "another key of that name": provider.token("other", headers={"kid": "rsa"}),
        "a key that is not published": provider.token("other"),
        "the algorithm of another key": provider.token("ec", headers={"kid": "rsa"}),
        "another algorithm of the key": jwt.encode({}, provider.signers["rsa"][1], "RS512", headers={"kid": "rsa"}),
        "no key named": provider.token(headers={"kid": None}),
        "a key of its own": provider.token("other", headers={"jwk": {"kty": "RSA"}, "jku": provider.address}),
        "demands": provider.token(headers={"crit": ["exp"]}),
        "wrong audience": provider.token(aud="elsewhere"),
        "no audience": provider.token(aud=None),
        "wrong issuer": provider.token(iss=ISSUER + "/"),
        "no issuer": provider.token(iss=None),
        "nobody": provider.token(sub=None),
        "no end": provider.token(exp=None),
        "an end far away": provider.token(exp=now + 10 * 24 * 3600),
        "an end that is no time": provider.token(exp="soon"),
        "changed": f"{head}.{changed.rstrip('=')}.{signature}",
        "without signature": f"{head}.{body}.",
        "cut": good[:-8],
        "too long": provider.token(padding="x" * 9000),
        "nothing": "..",
        "no token": "a.b.c",
    }
    assert {name: await reason(checked, token) for name, token in wrong.items()} == dict.fromkeys(
        wrong, "TOKEN_REFUSED"
    )
    for name, off in (("exp", -120), ("nbf", 120), ("iat", 120)):
        claims: dict[str, Any] = {name: now + off}
        with pytest.raises(Unauthenticated):
            await checked.caller_of(provider.token(**claims))
    assert await reason(checked, good) == ""


async def test_clocks_may_differ_a_little_and_a_token_ends(
    provider: Provider, checked: Tokens, clock: StandingClock
) -> None:
    """Also one that was found good before."""
    now = int(time.time())
    for name, off in (("exp", -20), ("nbf", 20), ("iat", 20)):
        claims: dict[str, Any] = {name: now + off}
        await checked.caller_of(provider.token(**claims))
    token = provider.token(exp=now + 60)
    alice = await checked.caller_of(token)
    clock.at_us += 100 * 1_000_000
    assert await reason(checked, token) == "TOKEN_EXPIRED"
    with pytest.raises(Unauthenticated):
        checked.check_still_valid(alice)


async def test_keys_are_rotated_and_taken_back(provider: Provider, clock: StandingClock) -> None:
    checked = Tokens(Issuer(ISSUER, AUDIENCE, provider.address), clock=clock, keys_interval_s_min=2.0)
    old = provider.token("rsa")
    provider.signers["new"] = ("ES256", ec.generate_private_key(ec.SECP256R1()))
    fresh = provider.token("new")
    await checked.caller_of(old)
    provider.published.append("new")
    # Too soon after the last look: whoever sends unknown key ids does not make us read as often as he likes.
    for _ in range(50):
        assert await reason(checked, fresh) == "TOKEN_REFUSED"
    assert provider.reads == 1

    async def known() -> bool:
        return await reason(checked, provider.token("new")) == ""

    await eventually(known, deadline_s=20)
    await asyncio.gather(*(checked.caller_of(provider.token("new", sub=str(n))) for n in range(20)))
    assert provider.reads == 2
    provider.published.remove("rsa")
    provider.signers["newer"] = ("EdDSA", ed25519.Ed25519PrivateKey.generate())
    provider.published.append("newer")

    async def newer_known() -> bool:
        return await reason(checked, provider.token("newer")) == ""

    await eventually(newer_known, deadline_s=20)
    assert await reason(checked, old) == "TOKEN_REFUSED"


async def test_an_issuer_that_is_away_shuts_nobody_out_who_is_known(provider: Provider, clock: StandingClock) -> None:
    checked = Tokens(Issuer(ISSUER, AUDIENCE, provider.address), clock=clock, keys_interval_s_min=0.0)
    provider.is_away = True
    with pytest.raises(TryAgain):
        await checked.caller_of(provider.token())
    provider.is_away = False
    await checked.caller_of(provider.token())
    provider.is_away = True
    # It may have changed its key meanwhile: that the token is bad is not known.
    rotated = provider.token("rsa", headers={"kid": "unknown"})
    with pytest.raises(TryAgain) as told:
        await checked.caller_of(rotated)
    assert (told.value.reason, told.value.retry_after_s) == ("TOKEN_KEYS_AWAY", 1)
    assert (await checked.caller_of(provider.token(sub="bob"))).subject == "bob"
    provider.is_away = False
    assert await reason(checked, rotated) == "TOKEN_REFUSED"


async def test_keys_may_come_from_a_file(provider: Provider, clock: StandingClock, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text(provider.document())
    checked = Tokens(Issuer(ISSUER, AUDIENCE, str(path)), clock=clock)
    assert (await checked.caller_of(provider.token("ed"))).role is Role.OPERATOR


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"smdih_role": "operator"}, (Role.OPERATOR, 0, 0, "")),
        ({"smdih_role": ["offline_access", "firm"], "smdih_firm_id": 7}, (Role.FIRM, 7, 0, "")),
        ({"smdih_role": "firm", "smdih_firm_id": "7"}, (Role.FIRM, 7, 0, "")),
        ({"smdih_role": "partner", "smdih_partner_id": 3, "smdih_firm_id": 7}, (Role.PARTNER, 0, 3, "")),
        ({"smdih_role": "provider", "smdih_provider_id": "lab-1"}, (Role.PROVIDER, 0, 0, "lab-1")),
        ({"smdih_role": "assessor", "smdih_provider_id": "lab-1"}, (Role.ASSESSOR, 0, 0, "lab-1")),
    ],
)
async def test_claims_say_who_somebody_is(
    provider: Provider, checked: Tokens, claims: dict[str, Any], expected: tuple[Role, int, int, str]
) -> None:
    caller: Caller = await checked.caller_of(provider.token(**claims))
    assert (caller.role, caller.firm_id, caller.partner_id, caller.provider_id) == expected


@pytest.mark.parametrize(
    "claims",
    [
        {"smdih_role": None},
        {"smdih_role": "admin"},
        {"smdih_role": "Operator"},
        {"smdih_role": "device"},  # gateways have keys
        {"smdih_role": ["operator", "partner"], "smdih_partner_id": 1},
        {"smdih_role": {"operator": True}},
        {"smdih_role": "firm"},
        {"smdih_role": "firm", "smdih_firm_id": 0},
        {"smdih_role": "firm", "smdih_firm_id": -1},
        {"smdih_role": "firm", "smdih_firm_id": True},
        {"smdih_role": "firm", "smdih_firm_id": 2**63},
        {"smdih_role": "firm", "smdih_firm_id": "07"},
        {"smdih_role": "firm", "smdih_firm_id": [7]},
        {"smdih_role": "partner", "smdih_firm_id": 7},
        {"smdih_role": "provider", "smdih_partner_id": 3},
        {"smdih_role": "assessor", "smdih_provider_id": ""},
    ],
)
async def test_a_genuine_token_of_nobody_here_opens_nothing(
    provider: Provider, checked: Tokens, claims: dict[str, Any]
) -> None:
    token = provider.token(**claims)
    told = set()
    for _ in range(2):  # the second time it is remembered
        with pytest.raises(Forbidden) as refused:
            await checked.caller_of(token)
        told.add((refused.value.reason, refused.value.detail))
    assert len(told) == 1


async def test_who_has_no_place_here_is_slowed_whatever_they_show(provider: Provider, clock: StandingClock) -> None:
    checked = Tokens(Issuer(ISSUER, AUDIENCE, provider.address), clock=clock, keys_interval_s_min=0.0)

    class Known:
        async def is_caught_up(self) -> bool:
            return True

    known: Any = Known()
    gate = Gate(known, tokens=checked, limits=Limits(failures_per_minute=3))

    async def told(address: str, token: str) -> list[str]:
        found = []
        for _ in range(4):
            with pytest.raises(HubError) as refused:
                await gate.admit(token, address)
            found.append(refused.value.reason)
        return found

    nobody, unknown = provider.token(smdih_role=None), provider.token(headers={"kid": "unknown"})
    assert await told("a", nobody) == ["TOKEN_ROLE"] * 3 + ["LIMIT_FAILURES"]
    provider.is_away = True
    assert await told("b", unknown) == ["TOKEN_KEYS_AWAY"] * 3 + ["LIMIT_FAILURES"]
    assert (await gate.admit(provider.token(), "b")).subject == "alice"


async def test_claims_may_lie_deeper_or_be_named_like_an_address(provider: Provider, clock: StandingClock) -> None:
    deeper = Tokens(
        Issuer(ISSUER, AUDIENCE, provider.address, "realm_access.roles", firm_claim="https://smdih.example/firm"),
        clock=clock,
    )
    claims: dict[str, Any] = {"realm_access": {"roles": ["firm"]}, "https://smdih.example/firm": 9, "smdih_role": None}
    token = provider.token(**claims)
    assert (await deeper.caller_of(token)).firm_id == 9
