"""An OpenID Connect provider for tests: it signs tokens and publishes its keys at a real address."""

import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fastapi import FastAPI, Response

from services.common import http

ISSUER, AUDIENCE = "https://id.example.org/realms/smdih", "smdih"


class Provider:
    """An OpenID Connect provider as far as the hub sees it: a key set at an address."""

    def __init__(self) -> None:
        self.signers: dict[str, tuple[str, Any]] = {
            "rsa": ("RS256", rsa.generate_private_key(public_exponent=65537, key_size=2048)),
            "ec": ("ES256", ec.generate_private_key(ec.SECP256R1())),
            "ed": ("EdDSA", ed25519.Ed25519PrivateKey.generate()),
        }
        self.published = ["rsa", "ec", "ed"]
        self.reads = 0
        self.is_away = False
        self.address = ""

    def document(self) -> str:
        shown = []
        for key_id in self.published:
            algorithm, key = self.signers[key_id]
            found = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key()))
            shown.append(found | {"kid": key_id, "use": "sig", "alg": algorithm})
        shown += [
            # What has no business there, or is too weak, is not used.
            {"kty": "oct", "kid": "shared", "k": base64.urlsafe_b64encode(b"x" * 32).decode().rstrip("=")},
            {"kty": "weird", "kid": "weird"},
            {"kty": "RSA", "kid": "no-parts"},
        ]
        return json.dumps({"keys": shown})

    def token(self, key_id: str = "rsa", *, headers: dict[str, Any] | None = None, **claims: Any) -> str:
        now = int(time.time())
        body: dict[str, Any] = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "alice",
            "exp": now + 600,
            "iat": now,
            "nbf": now,
        }
        body |= {"smdih_role": "operator"} | claims
        algorithm, key = self.signers[key_id]
        given = {name: value for name, value in body.items() if value is not None}
        named = {"kid": key_id} | (headers or {})
        return jwt.encode(
            given, key, algorithm=algorithm, headers={name: value for name, value in named.items() if value is not None}
        )


@asynccontextmanager
async def running_provider() -> AsyncIterator[Provider]:
    made = Provider()
    app = FastAPI()

    @app.get("/keys")
    async def keys() -> Response:
        made.reads += 1
        return Response(status_code=500) if made.is_away else Response(made.document(), media_type="application/json")

    async with http.serve(app, host="127.0.0.1", port=0) as port:
        made.address = f"http://127.0.0.1:{port}/keys"
        yield made
