"""HTTP edges of the telemetry door."""

import math
import zlib
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from services.common.clock import to_us
from services.common.errors import HubError, Invalid, TooLarge
from services.common.http import BODY_BYTES_MAX, Authenticated, authenticated, problem
from services.common.logs import get_logger
from services.ingest.domain import Reason
from services.ingest.telemetry.door import Door, LinesResult
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
        200: all or part is durable; 422: all of it went to quarantine; 503 and 429: send again after Retry-After seconds.
        """
        raw = await request.body()
        sender = door.sender(caller, "", "http")
        try:
            document = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            detail = f"The body is not JSON: {error}"
            await door.set_aside(sender, Reason.MALFORMED, detail, raw)
            return problem(Invalid(detail, reason=Reason.MALFORMED))
        try:
            source, batches = _batches(document)
            sender = door.sender(caller, source, "http")
        except _NotTelemetry as error:
            await door.set_aside(sender, error.reason, str(error), raw)
            return problem(Invalid(str(error), reason=error.reason))
        if not batches:
            await door.set_aside(sender, Reason.EMPTY_BATCH, "The body holds no batches.", raw)
            return problem(Invalid("The body holds no batches.", reason=Reason.EMPTY_BATCH))
        results = await door.send(sender, batches)
        return _answer(results)

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


def _answer(results: list[telemetry_pb2.BatchResult]) -> Response:
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


class _NotTelemetry(Exception):
    """The body is JSON, but not telemetry."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def _batches(document: Any) -> tuple[str, list[telemetry_pb2.Batch]]:
    if not isinstance(document, dict) or not isinstance(document.get("batches"), list):
        raise _NotTelemetry(Reason.MALFORMED, 'The body should be {"batches": [...]}.')
    source = document.get("source", "")
    if not isinstance(source, str):
        raise _NotTelemetry(Reason.WRONG_TYPE, "source: a text.")
    return source, [_batch(number, batch) for number, batch in enumerate(document["batches"])]


def _batch(number: int, batch: Any) -> telemetry_pb2.Batch:
    where = f"batches.{number}"
    if not isinstance(batch, dict):
        raise _NotTelemetry(Reason.WRONG_TYPE, f"{where}: an object.")
    machine, sequence, frames = batch.get("machine"), batch.get("sequence", 0), batch.get("frames", [])
    if (
        not isinstance(machine, str | int)
        or isinstance(machine, bool)
        or (isinstance(machine, int) and not 0 < machine < 2**63)
    ):
        raise _NotTelemetry(Reason.WRONG_TYPE, f"{where}.machine: a path or an id.")
    if not isinstance(sequence, int) or isinstance(sequence, bool) or not 0 <= sequence < 2**64:
        raise _NotTelemetry(Reason.WRONG_TYPE, f"{where}.sequence: a number from 0 up.")
    if not isinstance(frames, list):
        raise _NotTelemetry(Reason.WRONG_TYPE, f"{where}.frames: a list.")
    times: list[int] = []
    rows: list[dict[str, Any]] = []
    for index, frame in enumerate(frames):
        if not isinstance(frame, dict) or not isinstance(frame.get("values"), dict):
            raise _NotTelemetry(Reason.WRONG_TYPE, f'{where}.frames.{index}: {{"ts": ..., "values": {{...}}}}.')
        ts = frame.get("ts")
        times.append(ts * 1000 if type(ts) is int and 0 < ts < 2**53 else _time_us(ts, f"{where}.frames.{index}"))
        rows.append(frame["values"])
    names = list(rows[0]) if rows else []
    values, absent = [value for row in rows for value in row.values()], b""
    if not (_NUMBERS.issuperset(map(type, values)) and all(list(row) == names for row in rows)):
        # Not every value in every frame in the same order, or not every one a number.
        names, values, absent = _ragged(rows, where)
    path, machine_id = (machine, 0) if isinstance(machine, str) else ("", machine)
    return telemetry_pb2.Batch(
        sequence=sequence,
        machine_path=path,
        machine_id=machine_id,
        times_us=times,
        signals=names,
        values=values,
        absent=absent,
    )


_NUMBERS = frozenset((float, int, bool))


def _ragged(rows: list[dict[str, Any]], where: str) -> tuple[list[str], list[Any], bytes]:
    """Names, the values of every row for all of them, and which of these are absent."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    values: list[Any] = []
    absent = bytearray((len(rows) * len(names) + 7) // 8)
    for index, row in enumerate(rows):
        for name in names:
            value = row.get(name)
            if value is None:
                absent[len(values) >> 3] |= 1 << (len(values) & 7)
                values.append(0.0)
            elif isinstance(value, bool | int | float):
                values.append(value)
            else:
                raise _NotTelemetry(
                    Reason.WRONG_TYPE,
                    f"{where}.frames.{index}.values.{name}: a number, true, false or null, not {value!r:.40}.",
                )
    return names, values, bytes(absent) if any(absent) else b""


def _time_us(ts: Any, where: str) -> int:
    if isinstance(ts, int | float) and not isinstance(ts, bool) and math.isfinite(ts):
        time_us = round(ts * 1000)
        if -(2**63) <= time_us < 2**63:
            return time_us
    if isinstance(ts, str):
        try:
            parsed = datetime.fromisoformat(ts)
            if parsed.tzinfo is not None:
                return to_us(parsed)
        except ValueError:
            pass
    raise _NotTelemetry(Reason.WRONG_TYPE, f"{where}.ts: milliseconds since 1970 UTC, or RFC 3339 with a zone.")


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
