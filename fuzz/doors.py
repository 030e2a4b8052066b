"""The doors of a real hub: every HTTP route by its own description, every gRPC method with any bytes, in several roles."""

import importlib
import json
import pkgutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import ed25519
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from hypothesis import strategies as st

from fuzz.messages import bodies
from fuzz.rounds import Outcome, Target
from localstack.hub import Hub
from localstack.servers import Servers

SERVICES: Final = {"ingest": "door", "anomaly": "anomaly", "matching": "matching", "funding": "funding"}
# With keys, but for the assessor, who comes by token only.
WHO: Final = ("operator", "firm", "partner", "assessor")
# They would end the keys that the run uses.
NOT_CALLED: Final = frozenset({"RevokeCredential", "RotateCredential"})
NOT_ASKED: Final = r"^/v1/credentials/\{"
# Answers as long as one listens.
ENDLESS: Final = "/watch$"
# A stream that goes on is well; a call that is not answered in this time hangs.
STREAM_S: Final = 0.3
CALL_S_MAX: Final = 30.0
FAILURES_MAX: Final = 10
TOKEN_S: Final = 12 * 3600
# Schemathesis ends what it is at before it looks at the time again.
OVERTIME_S_MAX: Final = 90.0
_OURS: Final = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS})


@dataclass(frozen=True)
class Doors:
    """A running hub and keys to it."""

    hub: Hub
    keys: dict[str, str]

    def restarts(self) -> list[str]:
        """Processes that ended by themselves on the way."""
        return [name for name, running in self.hub.processes.items() if running.starts > 1]


class _Signer:
    """An issuer of tokens, as far as a file with its key set goes."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._key = ed25519.Ed25519PrivateKey.generate()
        shown = json.loads(jwt.get_algorithm_by_name("EdDSA").to_jwk(self._key.public_key()))
        file.write_text(json.dumps({"keys": [shown | {"kid": "fuzz", "use": "sig"}]}))

    def token(self, role: str) -> str:
        """For somebody of this role, for the time of a run."""
        claims = {"iss": "fuzz", "aud": "hub", "sub": "somebody", "exp": int(time.time()) + TOKEN_S}
        claims |= {"smdih_role": role, "smdih_provider_id": "somebody"}
        return jwt.encode(claims, self._key, algorithm="EdDSA", headers={"kid": "fuzz"})


@asynccontextmanager
async def opened(servers: Servers, folder: Path) -> AsyncIterator[Doors]:
    """A hub with a firm, a machine, keys of an operator, the firm and a partner, and a token of an assessor."""
    folder.mkdir(parents=True, exist_ok=True)
    signer = _Signer(folder / "keys.json")
    issuer = {"SMDIH_OIDC_ISSUER": "fuzz", "SMDIH_OIDC_AUDIENCE": "hub", "SMDIH_OIDC_KEYS": str(signer.file)}
    hub = Hub(servers, folder, environment=issuer)
    try:
        await hub.start()
        headers = {"Authorization": f"Bearer {hub.operator_key}"}
        async with httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers, timeout=30) as client:

            async def made(route: str, **body: Any) -> Any:
                answer = await client.post(route, json=body)
                answer.raise_for_status()
                return answer.json()

            firm = await made("/v1/firms", name="Acme", slug="acme", sic="25.62", region="Wales", size="small")
            site = await made("/v1/sites", firm_id=firm["id"], slug="works", name="Works")
            signals = [{"name": "a", "unit": "A"}, {"name": "b", "unit": "A"}]
            await made("/v1/machines", site_id=site["id"], path="press", name="press", kind="press", signals=signals)
            key = await made("/v1/credentials", role="firm", firm_id=firm["id"])
            partner = await made("/v1/partners", name="Centre", region="Wales")
            of_partner = await made("/v1/credentials", role="partner", partner_id=partner["id"])
        bearers = (hub.operator_key, key["key"], of_partner["key"], signer.token("assessor"))
        yield Doors(hub, dict(zip(WHO, bearers, strict=True)))
    finally:
        await hub.stop()


# --- gRPC -------------------------------------------------------------------------------------------------------------


def methods(service: str) -> Iterator[MethodDescriptor]:
    """Of every contract of the service."""
    package = importlib.import_module(f"smdih.{service}.v1")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.endswith("_pb2"):
            continue
        file: FileDescriptor = importlib.import_module(f"{package.__name__}.{module.name}").DESCRIPTOR
        for found in file.services_by_name.values():
            yield from (method for method in found.methods if method.name not in NOT_CALLED)


class _Broken(Exception):
    """A door answered that it is broken, or not at all."""


def grpc_target(doors: Doors, service: str) -> Target:
    """Every method of the service, with messages of its type, damaged ones and any bytes."""
    channel = grpc.insecure_channel(doors.hub.processes[SERVICES[service]].grpc)
    inputs = st.one_of(
        [
            st.tuples(st.just(method), bodies(method.input_type), st.sampled_from(sorted(doors.keys)))
            for method in methods(service)
        ]
    )

    def attempt(given: tuple[MethodDescriptor, bytes, str]) -> None:
        method, body, who = given
        path = f"/{method.containing_service.full_name}/{method.name}"
        try:
            _call(channel, method, path, body, (("authorization", f"Bearer {doors.keys[who]}"),))
        except grpc.RpcError as error:
            code = error.code()
            if code in _OURS or (code is grpc.StatusCode.DEADLINE_EXCEEDED and not method.server_streaming):
                raise _Broken(f"{path} as {who}: {code.name} {error.details()}") from error

    return Target(f"grpc-{service}", inputs, attempt, examples=200)


def _call(
    # Untyped: bytes go out as they are.
    channel: Any,
    method: MethodDescriptor,
    path: str,
    body: bytes,
    metadata: tuple[tuple[str, str], ...],
) -> None:
    timeout_s = STREAM_S if method.server_streaming else CALL_S_MAX
    if method.client_streaming:
        for _ in channel.stream_stream(path)(iter([body]), timeout=timeout_s, metadata=metadata):
            pass
    elif method.server_streaming:
        for _ in channel.unary_stream(path)(body, timeout=timeout_s, metadata=metadata):
            pass
    else:
        channel.unary_unary(path)(body, timeout=timeout_s, metadata=metadata)


# --- HTTP -------------------------------------------------------------------------------------------------------------


def fuzz_http(doors: Doors, service: str, who: str, *, seconds: float, seed: int, folder: Path) -> Outcome:
    """Schemathesis over the service's own description; its findings, with the request to repeat them, are in the outcome."""
    base = doors.hub.processes[SERVICES[service]].http
    outcome = Outcome(f"http-{service}-as-{who}", seed)
    report = folder / f"{outcome.target}.ndjson"
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        *("run", f"{base}/openapi.json", "--header", f"Authorization: Bearer {doors.keys[who]}"),
        *("--checks", "not_a_server_error", "--seed", str(seed), "--max-time", str(int(seconds))),
        *("--exclude-path-regex", f"{ENDLESS}|{NOT_ASKED}", "--request-timeout", str(CALL_S_MAX)),
        *("--continue-on-failure", "--max-failures", str(FAILURES_MAX), "--suppress-health-check", "all"),
        *("--warnings", "off", "--no-color", "--report", "ndjson", "--report-ndjson-path", str(report)),
    ]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=seconds + OVERTIME_S_MAX, check=False
        )
        if done.returncode != 0:
            outcome.broken.append((done.stdout[-6000:] + done.stderr[-2000:]).replace(doors.keys[who], "KEY"))
    except subprocess.TimeoutExpired:
        outcome.broken.append(f"not finished {OVERTIME_S_MAX:.0f} s after its time")
    outcome.tried = _requests_in(report)
    outcome.elapsed_s = round(time.monotonic() - began, 1)
    return outcome


def _requests_in(report: Path) -> int:
    if not report.exists():
        return 0
    with report.open() as lines:
        return sum(_recorded(json.loads(line)) for line in lines if line.strip())


def _recorded(event: dict[str, Any]) -> int:
    return len(event.get("ScenarioFinished", {}).get("recorder", {}).get("interactions", {}))
