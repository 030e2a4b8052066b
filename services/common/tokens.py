"""People's tokens: JSON Web Tokens of an OpenID Connect provider, checked against its published keys.

A token is taken only where everything is as expected; nothing that stands in it chooses how it is checked. The algorithm is that of
the provider's key, never the one that the token names.
"""

import asyncio
import hashlib
import json
import math
import re
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from prometheus_client import Counter

from services.common.clock import Clock
from services.common.errors import Forbidden, HubError, TryAgain, Unauthenticated
from services.common.gate import KEYS_AWAY
from services.common.identity import Caller, Role
from services.common.logs import get_logger

log = get_logger(__name__)

LEEWAY_S = 30
# A token that was stolen is of use for at most so long, whatever its issuer thinks.
LIFETIME_S_MAX = 24 * 60 * 60
TOKEN_BYTES_MAX = 8 * 1024
KEYS_REFRESH_INTERVAL_S = 600.0
# A key id that is not known makes the keys be read again, but at most so often, whatever is sent to us.
KEYS_REFRESH_INTERVAL_S_MIN = 10.0
KEYS_TIMEOUT_S = 5.0
KEYS_BYTES_MAX = 256 * 1024
KEYS_MAX = 50
RSA_BITS_MIN = 2048
CHECKED_MAX = 10_000

_PROVIDER_ID = re.compile(r"[!-~]{1,200}")

# Tokens by what became of them: taken, refused, forbidden (genuine, but of nobody here).
tokens_total = Counter("smdih_tokens_total", "Tokens looked at", ["outcome"])
# Looks at the issuer's keys.
key_reads_total = Counter("smdih_token_key_reads_total", "Reads of the issuer's keys", ["outcome"])


@dataclass(frozen=True)
class Issuer:
    """Whose tokens are taken, and which of their claims say who somebody is.

    `keys`: address (https://...) or path of the JSON Web Key Set. A claim's name may be a path: `realm_access.roles`.
    """

    issuer: str
    audience: str
    keys: str
    role_claim: str = "smdih_role"
    firm_claim: str = "smdih_firm_id"
    partner_claim: str = "smdih_partner_id"
    provider_claim: str = "smdih_provider_id"


@dataclass(frozen=True)
class _Key:
    algorithm: str
    key: Any


# What a person may be. Gateways have keys.
_ROLES = {role.value: role for role in (Role.FIRM, Role.PROVIDER, Role.ASSESSOR, Role.PARTNER, Role.OPERATOR)}


class Tokens:
    def __init__(
        self, issuer: Issuer, *, clock: Clock, keys_interval_s_min: float = KEYS_REFRESH_INTERVAL_S_MIN
    ) -> None:
        self._issuer = issuer
        self._keys_interval_s_min = keys_interval_s_min
        self._clock = clock
        self._keys: dict[str, _Key] = {}
        self._read_s: float | None = None
        self._are_keys_away = True  # until they were read
        self._reading = asyncio.Lock()
        self._document = b""
        # Callers of tokens whose signature was found good, by their digests; why, where they are of nobody here.
        self._checked: OrderedDict[bytes, Caller | Forbidden] = OrderedDict()

    async def run(self) -> None:
        """Read the issuer's keys now and then until cancelled: a key that it has taken back is forgotten."""
        while True:
            await self._refresh()
            await asyncio.sleep(KEYS_REFRESH_INTERVAL_S)

    async def caller_of(self, token: str) -> Caller:
        """Raises Unauthenticated; Forbidden for a genuine token of nobody known here; TryAgain without the issuer's keys."""
        try:
            caller = await self._caller_of(token)
        except HubError as error:
            tokens_total.labels("forbidden" if isinstance(error, Forbidden) else "refused").inc()
            raise
        tokens_total.labels("taken").inc()
        return caller

    async def _caller_of(self, token: str) -> Caller:
        digest = hashlib.sha256(token.encode()).digest()
        caller = self._checked.get(digest)
        if caller is None:
            claims = await self._claims(token)
            try:
                caller = self._who(claims)
            except Forbidden as error:
                caller = error
            self._checked[digest] = caller
            if len(self._checked) > CHECKED_MAX:
                self._checked.popitem(last=False)
        if isinstance(caller, Forbidden):
            raise Forbidden(caller.detail, reason=caller.reason)
        self.check_still_valid(caller)
        return caller

    def check_still_valid(self, caller: Caller) -> None:
        """Raise Unauthenticated once the token is over."""
        if self._clock.now_us() >= caller.valid_to_us + LEEWAY_S * 1_000_000:
            raise Unauthenticated("This token is over; get a new one.", reason="TOKEN_EXPIRED")

    async def _claims(self, token: str) -> dict[str, Any]:
        if len(token) > TOKEN_BYTES_MAX:
            raise _refused("It is too long.")
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise _refused("It is no JSON Web Token.") from error
        key_id = header.get("kid")
        if not isinstance(key_id, str) or "crit" in header:
            raise _refused("Its header names no key, or demands what is not known here.")
        key = await self._key(key_id)
        if header.get("alg") != key.algorithm:
            raise _refused("Its algorithm is not that of its key.")
        now_s = self._clock.now_us() / 1e6
        try:
            claims: dict[str, Any] = jwt.decode(
                token,
                key=key.key,
                algorithms=[key.algorithm],
                audience=self._issuer.audience,
                issuer=self._issuer.issuer,
                # Times are looked at below, by the hub's own clock.
                options={
                    "require": ["exp", "iss", "aud", "sub"],
                    "verify_exp": False,
                    "verify_nbf": False,
                    "verify_iat": False,
                },
            )
            ends, begins, issued = (_time(claims.get(name)) for name in ("exp", "nbf", "iat"))
        except (jwt.InvalidTokenError, ValueError) as error:
            raise _refused("Signature, issuer, audience or a needed claim is not right.") from error
        if ends is None or now_s >= ends + LEEWAY_S:
            raise Unauthenticated("This token is over; get a new one.", reason="TOKEN_EXPIRED")
        if ends > now_s + LIFETIME_S_MAX + LEEWAY_S:
            raise _refused(f"It is valid for longer than {LIFETIME_S_MAX} s.")
        if max(begins or 0.0, issued or 0.0) > now_s + LEEWAY_S:
            raise Unauthenticated("This token is not valid yet.", reason="TOKEN_NOT_YET_VALID")
        return claims

    async def _key(self, key_id: str) -> _Key:
        if key_id not in self._keys:
            await self._refresh(key_id)
        if key_id not in self._keys and self._are_keys_away:  # its issuer may have changed its key meanwhile
            since_s = time.monotonic() - (self._read_s or 0.0)
            raise TryAgain(
                "The keys of the token's issuer cannot be read.",
                reason=KEYS_AWAY,
                retry_after_s=max(1, math.ceil(self._keys_interval_s_min - since_s)),
            )
        if key_id not in self._keys:
            raise _refused("Its key is not one of its issuer's.")
        return self._keys[key_id]

    async def _refresh(self, wanted: str = "") -> None:
        async with self._reading:
            if wanted in self._keys:
                return  # somebody else has read them meanwhile
            if self._read_s is not None and time.monotonic() - self._read_s < self._keys_interval_s_min:
                return
            self._read_s = time.monotonic()
            try:
                document = await self._read()
                found = keys_in(document)
            except (OSError, httpx.HTTPError, ValueError) as error:
                # The keys that are known go on: an issuer that is away for a while shuts nobody out.
                self._are_keys_away = True
                key_reads_total.labels("failed").inc()
                log.warning("keys of the token issuer not read", error=repr(error))
                return
            self._are_keys_away = False
            key_reads_total.labels("read").inc()
            if document != self._document:
                self._checked.clear()
                log.info("keys of the token issuer", keys=sorted(found))
            self._keys, self._document = found, document

    async def _read(self) -> bytes:
        where = self._issuer.keys
        if not where.startswith(("http://", "https://")):
            return await asyncio.to_thread(Path(where).read_bytes)
        async with (
            httpx.AsyncClient(timeout=KEYS_TIMEOUT_S, follow_redirects=False) as client,
            client.stream("GET", where) as answer,
        ):
            answer.raise_for_status()
            if answer.is_redirect:
                raise ValueError("the keys are elsewhere; name that address")
            data = b""
            async for part in answer.aiter_bytes():
                data += part
                if len(data) > KEYS_BYTES_MAX:
                    raise ValueError(f"the keys have more than {KEYS_BYTES_MAX} bytes")
            return data

    def _who(self, claims: Mapping[str, Any]) -> Caller:
        issuer = self._issuer
        told = _claim(claims, issuer.role_claim)
        names = told if isinstance(told, list) else [told]
        roles = {_ROLES[name] for name in names if isinstance(name, str) and name in _ROLES}
        if len(roles) != 1:
            raise Forbidden(
                f"The token has {'no role' if not roles else 'several roles'} of this hub in {issuer.role_claim!r}; it needs "
                f"one of {', '.join(_ROLES)}.",
                reason="TOKEN_ROLE",
            )
        caller = Caller(
            credential_id=_credential_id(issuer.issuer, str(claims["sub"])),
            role=roles.pop(),
            subject=str(claims["sub"])[:200],
            valid_to_us=int((_time(claims["exp"]) or 0) * 1e6),
        )
        if caller.role is Role.FIRM:
            return replace(caller, firm_id=_id(claims, issuer.firm_claim))
        if caller.role is Role.PARTNER:
            return replace(caller, partner_id=_id(claims, issuer.partner_claim))
        if caller.role in (Role.PROVIDER, Role.ASSESSOR):
            provider_id = _claim(claims, issuer.provider_claim)
            if not isinstance(provider_id, str) or not _PROVIDER_ID.fullmatch(provider_id):
                raise _unnamed(issuer.provider_claim)
            return replace(caller, provider_id=provider_id)
        return caller


def keys_in(data: bytes) -> dict[str, _Key]:
    """Keys for signatures of the kinds that are taken, by their ids. Raises ValueError."""
    try:
        document = json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("there is no JSON Web Key Set")
    found: dict[str, _Key] = {}
    for one in listed[:KEYS_MAX]:
        if not isinstance(one, dict) or one.get("use", "sig") != "sig" or not isinstance(one.get("kid"), str):
            continue
        try:
            key = jwt.PyJWK.from_dict(one).key
        except (jwt.PyJWTError, ValueError, KeyError, TypeError):
            continue
        algorithm = _algorithm_of(key)
        if algorithm and one.get("alg", algorithm) == algorithm:
            found[one["kid"]] = _Key(algorithm, key)
    return found


def _algorithm_of(key: Any) -> str:
    """The only algorithm that a key is used with; "": none. Private and symmetric keys have no business in a published set."""
    if isinstance(key, RSAPublicKey) and key.key_size >= RSA_BITS_MIN:
        return "RS256"
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256"
    if isinstance(key, Ed25519PublicKey):
        return "EdDSA"
    return ""


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """By its whole name first: names that are addresses have dots too."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _id(claims: Mapping[str, Any], path: str) -> int:
    value = _claim(claims, path)
    if isinstance(value, str) and re.fullmatch(r"[1-9][0-9]{0,17}", value):
        return int(value)
    if type(value) is int and 0 < value < 2**63:
        return value
    raise _unnamed(path)


def _unnamed(claim: str) -> Forbidden:
    return Forbidden(f"The token's {claim!r} does not say whom it is for.", reason="TOKEN_NOT_ASSIGNED")


def _time(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**40:
        raise ValueError("a time is no number of seconds")
    return float(value)


def _credential_id(issuer: str, subject: str) -> int:
    """The same person always has the same; below 0, where no key is."""
    digest = hashlib.sha256(json.dumps([issuer, subject]).encode()).digest()
    return -1 - (int.from_bytes(digest[:8]) >> 1)


def _refused(why: str) -> Unauthenticated:
    return Unauthenticated(f"This token is not taken. {why}", reason="TOKEN_REFUSED")
