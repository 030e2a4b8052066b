"""HTTP edges of the telemetry door."""

import zlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from services.common.errors import HubError, Invalid, TooLarge
from services.common.http import BODY_BYTES_MAX, Authenticated, authenticated, problem
from services.common.logs import get_logger
from services.ingest.domain import Reason, Sender
from services.ingest.telemetry.door import Door, LinesResult, Unread
from services.ingest.telemetry.jsonbatches import NotTelemetry, Read, read_body
from services.ingest.telemetry.lineprotocol import PRECISIONS
from smdih.ingest.v1 import telemetry_pb2

log = get_logger(__name__)

LINES_PATHS = ("/api/v2/write", "/write")
LINES_BYTES_MAX = BODY_BYTES_MAX
LINES_PROBLEMS_SHOWN = 20
# Every member copies what is behind it.
GZIP_MEMBERS_MAX = 100


def telemetry_router(door: Door) -> APIRouter:
    """The JSON door."""
    router = APIRouter(prefix="/v1", tags=["telemetry"])

    @router.post("/telemetry")
    async def send(request: Request, caller: Authenticated) -> Response:
        """Send samples as JSON; the answer says of each batch what was stored and what was quarantined, and why.

        Body: `{"source": "gateway-1", "batches": [{"machine": "acme/leeds/press-3", "sequence": 7, "frames":
        [{"ts": 1764000000000, "values": {"temperature": 21.5}}]}]}`. `ts`: milliseconds since 1970 UTC or RFC 3339;
        `machine`: path or id; a value that is missing or null is absent; `source` and `sequence` may be left out.
        200: all or part is durable; 422: all of it went to quarantine; 400: no batches could be found in the body, which is in
        quarantine whole; 503 and 429: send again after Retry-After seconds. `results` has one entry for each batch, in order.
        """
        sender = door.sender(caller, "", "http")
        raw = await request.body()
        try:
            source, reads = read_body(orjson.loads(raw))
        except orjson.JSONDecodeError as error:
            detail = f"The body is not JSON: {error}"
            await door.set_aside(sender, Reason.MALFORMED, detail, raw)
            return problem(Invalid(detail, reason=Reason.MALFORMED))
        except NotTelemetry as error:
            await door.set_aside(sender, error.reason, str(error), raw)
            return problem(Invalid(str(error), reason=error.reason))
        sender = door.sender(caller, source, "http")
        return _answer(await _taken(door, sender, reads, raw))

    return router


class _LinesRoute(APIRoute):
    """Answers errors in the form that senders of line protocol read: {code, message}."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                return await handler(request)
            except HubError as error:
                log.info("lines refused", path=request.url.path, reason=error.reason, detail=error.detail)
                body = {"code": _LINES_CODES.get(error.HTTP_STATUS, "internal error"), "message": error.detail}
                answer = problem(error)
                return JSONResponse(
                    body | {"reason": error.reason},
                    status_code=error.HTTP_STATUS,
                    headers={name: value for name, value in answer.headers.items() if name in _KEPT_HEADERS},
                )

        return handle


# The words of InfluxDB's own write call.
_LINES_CODES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    413: "request too large",
    422: "unprocessable entity",
    429: "too many requests",
    503: "unavailable",
}
_KEPT_HEADERS = ("retry-after", "www-authenticate")


def lines_router(door: Door) -> APIRouter:
    """The door for InfluxDB line protocol, as Telegraf's outputs.influxdb_v2 sends it."""
    router = APIRouter(route_class=_LinesRoute, tags=["telemetry"])

    async def write(request: Request, caller: Authenticated, precision: str = "ns") -> Response:
        """Send samples as InfluxDB line protocol, plain or gzip.

        Machine: the tag `machine` (path or id), else the measurement as a path. Signal: the field's name, or else
        `measurement.field`. `precision`: ns, us, ms or s; `bucket` and `org` are ignored.
        204: everything is durable. 400 (a line could not be read) and 422: the good part is durable, the rest stands in quarantine;
        these two because senders drop what they sent on them and log the message, while after any other error they send
        the same again for ever. 413: send smaller parts; 429 and 503: send again after Retry-After seconds.
        """
        sender = door.sender(caller, "", "lines")
        if precision not in PRECISIONS:
            unknown = Invalid(f"precision: one of {', '.join(PRECISIONS)}.")
            door.note_refused(sender, unknown)
            raise unknown
        raw = await request.body()
        try:
            body = _inflated(request.headers.get("content-encoding", ""), raw)
        except TooLarge as error:
            await door.set_aside(sender, Reason.TOO_LARGE, error.detail, b"")
            raise
        except zlib.error as error:
            await door.set_aside(sender, Reason.MALFORMED, "The body is not gzip.", raw)
            raise Invalid(f"The body is not gzip: {error}.", reason=Reason.MALFORMED) from error
        return _lines_answer(await door.send_lines(sender, body, precision))

    for path in LINES_PATHS:
        router.add_api_route(path, write, methods=["POST"], status_code=204, response_class=Response)
    return router


def _inflated(encoding: str, raw: bytes) -> bytes:
    """The body without its gzip. Raises TooLarge as soon as it is too large, zlib.error, Invalid."""
    if encoding in ("", "identity"):
        return raw
    if encoding != "gzip":
        raise Invalid(f"Content-Encoding {encoding!r}: send gzip or nothing.")
    parts: list[bytes] = []
    left = LINES_BYTES_MAX
    members = 0
    while raw:
        members += 1
        if members > GZIP_MEMBERS_MAX:
            raise zlib.error(f"it has more than {GZIP_MEMBERS_MAX} members")
        member = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        parts.append(member.decompress(raw, left + 1))
        left -= len(parts[-1])
        if left < 0:
            raise TooLarge(f"The body has more than {LINES_BYTES_MAX} bytes once unpacked; send it in smaller parts.")
        if not member.eof:
            raise zlib.error("it ends too early")
        raw = member.unused_data
    return b"".join(parts)


def _lines_answer(result: LinesResult) -> Response:
    problems = [p for one in result.results for p in one.problems]
    if not problems and not result.faults:
        return Response(status_code=204)
    status = 400 if any(fault.reason == Reason.MALFORMED for fault in result.faults) else 422
    sentences = [f"line {fault.line}: {fault.detail} ({fault.reason})" for fault in result.faults]
    sentences += [f"{p.detail} ({p.reason}, {p.samples} samples)" for p in problems]
    body = {
        "code": _LINES_CODES[status],
        "message": f"{result.accepted} samples stored; in quarantine: " + "; ".join(sentences[:LINES_PROBLEMS_SHOWN]),
        "reason": result.faults[0].reason if result.faults else problems[0].reason,
        "accepted": result.accepted,
        "quarantined": result.quarantined,
        "lines": [
            {"line": fault.line, "reason": fault.reason, "detail": fault.detail}
            for fault in result.faults[:LINES_PROBLEMS_SHOWN]
        ],
        "problems": [
            {"reason": p.reason, "detail": p.detail, "samples": p.samples} for p in problems[:LINES_PROBLEMS_SHOWN]
        ],
    }
    return JSONResponse(body, status_code=status)


async def _taken(door: Door, sender: Sender, reads: Sequence[Read], raw: bytes) -> list[telemetry_pb2.BatchResult]:
    """Send what could be read, set aside what could not; one result for each batch of the body. Raises SlowDown, TryAgain."""
    unread = (
        Unread(
            *(fault.reason, fault.sentence, read.raw(fault, raw), fault.samples),
            machine_id=door.machine_id(sender, read.machine_id, read.machine_path),
        )
        for read in reads
        for fault in read.faults.values()
    )
    sent = iter(await door.send(sender, [batch for read in reads for batch in read.batches], unread))
    results = []
    for read in reads:
        result = telemetry_pb2.BatchResult(sequence=read.sequence)
        for _ in read.batches:
            _add(result, next(sent))
        for fault in read.faults.values():
            result.quarantined += fault.samples
            result.problems.add(reason=fault.reason, detail=fault.sentence, samples=fault.samples)
        results.append(result)
    return results


def _add(result: telemetry_pb2.BatchResult, more: telemetry_pb2.BatchResult) -> None:
    result.accepted += more.accepted
    result.quarantined += more.quarantined
    told = {one.reason: one for one in result.problems}
    for one in more.problems:
        if one.reason in told:
            told[one.reason].samples += one.samples
        else:
            result.problems.append(one)


def _answer(results: Sequence[telemetry_pb2.BatchResult]) -> Response:
    problems = [one for result in results for one in result.problems]
    body: dict[str, Any] = {
        "accepted": sum(result.accepted for result in results),
        "quarantined": sum(result.quarantined for result in results),
        "results": [
            {
                "sequence": result.sequence,
                "accepted": result.accepted,
                "quarantined": result.quarantined,
                "problems": [{"reason": p.reason, "detail": p.detail, "samples": p.samples} for p in result.problems],
            }
            for result in results
        ],
    }
    if problems and not body["accepted"]:
        body |= {"status": 422, "reason": problems[0].reason, "detail": problems[0].detail}
        return JSONResponse(body, status_code=422)
    return JSONResponse(body)


async def note_too_large(request: Request, size: int, *, door: Door) -> None:
    """A telemetry body over the limit is refused unread; if its sender is known, quarantine says that it came."""
    doors = {"/v1/telemetry": "http"} | dict.fromkeys(LINES_PATHS, "lines")
    if request.url.path not in doors:
        return
    try:
        sender = door.sender(await authenticated(request), "", doors[request.url.path])
        await door.set_aside(sender, Reason.TOO_LARGE, f"A body of {size} bytes was refused unread.", b"")
    except HubError as error:
        log.info("too large, not noted", reason=error.reason)
