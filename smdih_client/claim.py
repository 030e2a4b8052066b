"""A new gateway exchanges its claim code for a key, which goes into a file that only its owner may read."""

import asyncio
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from smdih.ingest.v1 import claim_pb2, claim_pb2_grpc
from smdih_client.telemetry import Refused
from smdih_client.tls import Tls, open_channel

DEADLINE_S = 60.0
ATTEMPT_TIMEOUT_S = 15.0
RETRY_DELAY_S = 1.0

_TRANSIENT = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)


class KeyFileExists(Exception):
    """There is a key already; the message says where."""


@dataclass(frozen=True)
class Claimed:
    """`site`: what the key is for, `machine`: path of the machine that it was made for, or empty."""

    key_file: Path
    site: str
    machine: str


async def claim(
    code: str, *, target: str, key_file: Path, credentials: grpc.ChannelCredentials | Tls | None = None
) -> Claimed:
    """Exchange the code and write the key to `key_file`, with mode 0600.

    A call that was broken off (no answer, no power) is taken up again by calling once more: the request id waits beside the key
    file, and the hub gives the same key again for ten minutes. Raises KeyFileExists, Refused, OSError.
    """
    if key_file.exists():
        raise KeyFileExists(f"{key_file} exists already; move it away if this gateway needs another key.")
    request_id, request_file = _request_id(key_file)
    answer = await _exchange(code, request_id, target, credentials)
    _write_private(key_file, answer.key)
    request_file.unlink(missing_ok=True)
    return Claimed(key_file, answer.site, answer.machine)


def _request_id(key_file: Path) -> tuple[str, Path]:
    """Of the call that was broken off, or a new one, kept before it is used."""
    path = key_file.with_name(key_file.name + ".request")
    try:
        kept = path.read_text().strip()
    except FileNotFoundError:
        kept = ""
    if not kept:
        path.unlink(missing_ok=True)
        kept = secrets.token_hex(16)
        _write_private(path, kept)
    return kept, path


async def _exchange(
    code: str, request_id: str, target: str, credentials: grpc.ChannelCredentials | Tls | None
) -> claim_pb2.ExchangeClaimCodeResponse:
    request = claim_pb2.ExchangeClaimCodeRequest(code=code, request_id=request_id)
    until_s = time.monotonic() + DEADLINE_S
    async with open_channel(target, credentials) as channel:
        stub = claim_pb2_grpc.ClaimServiceStub(channel)
        while True:
            try:
                answer: claim_pb2.ExchangeClaimCodeResponse = await stub.ExchangeClaimCode(
                    request, timeout=ATTEMPT_TIMEOUT_S
                )
                return answer
            except grpc.aio.AioRpcError as error:
                told = dict(error.trailing_metadata() or ())
                if error.code() not in _TRANSIENT or time.monotonic() > until_s:
                    reason = str(told.get("reason", error.code().name))
                    raise Refused(reason, error.details() or "the hub does not answer") from error
                await asyncio.sleep(max(RETRY_DELAY_S, float(str(told.get("retry-after", 0)))))


def _write_private(path: Path, text: str) -> None:
    """Whole or not at all, readable by its owner only, and never over a file that is there."""
    half = path.with_name(path.name + ".half")
    half.unlink(missing_ok=True)
    with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(half, path)
    finally:
        half.unlink()
