"""An HTTP application as every service has it: probes, metrics, keys, correlation ids, sizes, errors as problem details."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Annotated, Any, TypeVar

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.common import tracing
from services.common.audit import ChangeLog
from services.common.connections import KEEP_ALIVE_S, LIMITS, LimitedConnection, Limits, with_small_buffers
from services.common.directory import Directory
from services.common.errors import HubError, TooLarge, TryAgain
from services.common.gate import Gate
from services.common.identity import Caller, bearer_key
from services.common.logs import accepted_correlation_id, correlated, get_logger
from services.common.metrics import count_fault, method_label, watch_queue
from services.common.noting import Noting
from services.common.runtime import Runtime
from services.common.tenancy import narrow_to
from services.common.tls import Tls

log = get_logger(__name__)

BODY_BYTES_MAX = 4 * 1024 * 1024
# Of routes that need no key: what anybody may make a process read.
OPEN_BODY_BYTES_MAX = 64 * 1024
Part = TypeVar("Part")
PROBLEM_JSON = "application/problem+json"
START_TIMEOUT_S = 10
REQUESTS_MAX = 1_000
# From the head of a request to the end of its body.
BODY_S = 120
FULL_RETRY_AFTER_S = 5
# Of what the framework refuses by itself.
PLAIN_REASONS = {404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED", 408: "BODY_TOO_SLOW"}

# Answered requests by route (not path: paths hold ids) and status.
requests_total = Counter("smdih_http_requests_total", "HTTP requests answered", ["method", "route", "status"])
# Time to the answer.
request_seconds = Histogram("smdih_http_request_seconds", "Time to answer an HTTP request", ["method", "route"])
# Requests that are being answered; a watcher's stream is one for as long as it lasts.
requests_in_progress = Gauge("smdih_http_requests_in_progress", "HTTP requests being answered")


# Why the request that is being answered is refused, as it was told last. In a list of its own, because it is told from within.
_told: ContextVar[list[str]] = ContextVar("told")


async def authenticated(request: Request) -> Caller:
    """The caller behind the request's key or token, who counts once. Raises Unauthenticated, Forbidden, SlowDown, TryAgain."""
    admitted: Caller | None = getattr(request.state, "caller", None)
    if admitted is not None:
        return admitted
    gate: Gate = request.app.state.gate
    address = request.client.host if request.client else ""
    caller = await gate.admit(bearer_key(request.headers.get("authorization", "")), address)
    request.scope["exits"].enter_context(gate.stream(caller))
    request.state.caller = caller
    narrow_to(caller)
    return caller


async def while_admitted(request: Request, parts: AsyncIterator[Part]) -> AsyncIterator[Part]:
    """The parts of an answer that may outlive the key that it began with. Raises Unauthenticated once that is over."""
    gate: Gate = request.app.state.gate
    async for part in parts:
        gate.check_still_valid(request.state.caller)
        yield part


# Told of a body over the limit, and of its bytes, before it is refused.
OnTooLarge = Callable[[Request, int], Awaitable[None]]

Authenticated = Annotated[Caller, Depends(authenticated)]


def problem(error: HubError) -> JSONResponse:
    """The error as RFC 9457 problem details, with the hub's stable reason."""
    _told.get([]).append(error.reason)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.HTTP_STATUS == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"type": "about:blank", "title": type(error).__name__, "status": error.HTTP_STATUS}
    body |= {"detail": error.detail, "reason": error.reason}
    return JSONResponse(body, status_code=error.HTTP_STATUS, headers=headers, media_type=PROBLEM_JSON)


def application(
    title: str,
    *,
    runtime: Runtime,
    directory: Directory | None,
    routers: Sequence[APIRouter] = (),
    open_routers: Sequence[APIRouter] = (),
    body_bytes_max: int = BODY_BYTES_MAX,
    on_too_large: OnTooLarge | None = None,
    gate: Gate | None = None,
    changes: ChangeLog | None = None,
    has_probes: bool = True,
) -> FastAPI:
    """The application of one process. Every route of `routers` needs a key, before a byte of the body is read; a route says itself
    which roles it takes. Those of `open_routers` need none and guard themselves.

    `gate`: without one, that of the directory's keys with the usual limits. `changes`: where to note what people change.
    `has_probes`: it answers /livez, /readyz and /metrics as well, which need no key.
    """
    app = FastAPI(title=title, version="1", docs_url="/docs", redoc_url=None)
    if directory is not None:
        app.state.gate = gate or Gate(directory)
    if has_probes:
        app.include_router(_probes(runtime))
    for router in routers:
        app.include_router(router, dependencies=[Depends(authenticated)])
    for router in open_routers:
        app.include_router(router)

    @app.exception_handler(HubError)
    async def refused(request: Request, error: HubError) -> Response:
        log.info("request refused", path=request.url.path, reason=error.reason, detail=error.detail)
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        malformed = first["type"] == "json_invalid"
        invalid = HubError(f"{where or 'body'}: {first['msg']}", reason="MALFORMED" if malformed else "INVALID")
        invalid.HTTP_STATUS = 400
        return problem(invalid)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        # Whatever stops the reading of a body the framework makes a 400 of its own.
        if isinstance(error.__cause__, HubError):
            return await refused(request, error.__cause__)
        if isinstance(error.__cause__, _BodyTooLarge):
            raise error.__cause__
        plain = HubError(str(error.detail), reason=PLAIN_REASONS.get(error.status_code, "INVALID"))
        plain.HTTP_STATUS = error.status_code
        return problem(plain)

    if changes is not None:
        app.add_middleware(Noting, changes=changes, gate=app.state.gate)
    app.add_middleware(
        _Entry,
        runtime=runtime,
        body_bytes_max=body_bytes_max,
        on_too_large=on_too_large,
        open_endpoints=[
            route.endpoint for router in open_routers for route in router.routes if isinstance(route, Route)
        ],
    )
    return app


def _probes(runtime: Runtime) -> APIRouter:
    probes = APIRouter(include_in_schema=False)

    @probes.get("/livez")
    async def livez() -> Response:
        stuck = await runtime.not_alive()
        return JSONResponse({"stuck": stuck}, status_code=503 if stuck else 200)

    @probes.get("/readyz")
    async def readyz(exclude: Annotated[list[str], Query()] = []) -> Response:  # noqa: B006  read only
        """`exclude`: names that are not asked, for who wants to be told by the requests themselves that those are away."""
        missing = await runtime.not_ready(excluded=exclude)
        return JSONResponse({"missing": missing}, status_code=503 if missing else 200)

    @probes.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return probes


class _Entry:
    """Outermost layer: correlation id, key and limit before a body is read, metrics, and no bare 500."""

    def __init__(
        self,
        app: ASGIApp,
        runtime: Runtime,
        body_bytes_max: int,
        on_too_large: OnTooLarge | None,
        open_endpoints: Sequence[Callable[..., Any]],
    ) -> None:
        self._app = app
        self._open_endpoints = frozenset(open_endpoints)
        self._runtime = runtime
        self._body_bytes_max = body_bytes_max
        self._on_too_large = on_too_large
        self._in_progress = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._in_progress >= REQUESTS_MAX:
            await problem(_full("requests"))(scope, receive, send)
            return
        self._in_progress += 1
        try:
            with requests_in_progress.track_inprogress():
                await self._answer(scope, receive, send)
        finally:
            self._in_progress -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        told: list[str] = []
        _told.set(told)
        parent = request.headers.get(tracing.HEADER, "")
        correlation_id = accepted_correlation_id(
            request.headers.get("x-correlation-id") or tracing.correlation_id_of(parent)
        )
        entered = tracing.enter(request.method, correlation_id, parent=parent)
        started = time.perf_counter()
        status = 500
        has_started = False
        announced = int(request.headers.get("content-length") or 0)
        received = 0
        bytes_max = self._body_bytes_max
        body_until = asyncio.get_running_loop().time() + BODY_S
        is_begun = is_whole = False
        more: Callable[[int], None] | None = None

        async def limited() -> Message:
            nonlocal received, bytes_max, is_begun, is_whole, more
            if not is_begun:
                is_begun = True
                if scope.get("endpoint") in self._open_endpoints:
                    bytes_max = OPEN_BODY_BYTES_MAX
                    _check_size(announced, bytes_max)
                else:
                    caller = await authenticated(request)
                    more = exits.enter_context(request.app.state.gate.body(caller))
            try:
                async with asyncio.timeout_at(None if is_whole else body_until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"The body did not come within {BODY_S} s; send it in smaller parts."
                ) from None
            is_whole = not message.get("more_body")
            received += len(message.get("body", b""))
            _check_size(received, bytes_max)
            if more is not None:
                more(len(message.get("body", b"")))
            return message

        async def sending(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                status, has_started = message["status"], True
                message["headers"] = [*message.get("headers", ()), (b"x-correlation-id", correlation_id.encode())]
                if self._runtime.is_stopping:
                    # Else the next request might meet a connection that is just being closed.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        with correlated(correlation_id), ExitStack() as exits:
            scope["exits"] = exits
            try:
                _check_size(announced, bytes_max)
                await self._app(scope, limited, sending)
            except _BodyTooLarge as error:
                await self._refuse_too_large(request, error, scope, receive, sending)
            except Exception as error:
                if has_started:  # the server breaks the connection off, so that no reader takes a part for the whole
                    log.exception("answer broken off", path=request.url.path)
                    raise
                if (too_large := _too_large_in(error)) is not None:
                    await self._refuse_too_large(request, too_large, scope, receive, sending)
                else:
                    log.exception("request failed", path=request.url.path)
                    failed = HubError("Something in the hub went wrong; it has been logged.")
                    await problem(failed)(scope, receive, sending)
        route = getattr(scope.get("route"), "path", "none")
        method = method_label(request.method)
        tracing.leave(entered, f"{method} {route}", failed=status >= 500, http_route=route, http_status=status)
        requests_total.labels(method, route, str(status)).inc()
        if told:
            count_fault(f"{method} {route}", told[-1], status=status)
        request_seconds.labels(method, route).observe(time.perf_counter() - started)

    async def _refuse_too_large(
        self, request: Request, why: "_BodyTooLarge", scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._on_too_large is not None:
            await self._on_too_large(request, why.size)
        error = TooLarge(f"The body has more than {why.bytes_max} bytes; send it in smaller parts.")
        await problem(error)(scope, receive, send)


def _full(what: str) -> TryAgain:
    return TryAgain(f"Too many {what} are here at once; send again.", reason="FULL", retry_after_s=FULL_RETRY_AFTER_S)


async def _no_room(scope: Scope, receive: Receive, send: Send) -> None:
    """The answer on a connection past the limit."""
    answer = problem(_full("connections"))
    answer.headers["Connection"] = "close"
    await answer(scope, receive, send)


class _BodyTooLarge(Exception):
    def __init__(self, size: int, bytes_max: int) -> None:
        self.size = size
        self.bytes_max = bytes_max


def _check_size(size: int, bytes_max: int) -> None:
    if size > bytes_max:
        raise _BodyTooLarge(size, bytes_max)


def _too_large_in(error: BaseException | None) -> _BodyTooLarge | None:
    while error is not None:
        if isinstance(error, _BodyTooLarge):
            return error
        if isinstance(error, BaseExceptionGroup):
            return next(filter(None, map(_too_large_in, error.exceptions)), None)
        error = error.__cause__ or error.__context__
    return None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the runtime owns the signals


@asynccontextmanager
async def serve(
    app: Any, *, host: str, port: int, tls: Tls | None = None, limits: Limits = LIMITS
) -> AsyncIterator[int]:
    """Serve until the context ends; yields the port. `tls`: where it has a certificate. Raises OSError when the port is taken."""
    protocol: Any = partial(LimitedConnection, limits=limits, full=_no_room)
    context = None
    if tls is not None and tls.serves:
        with_small_buffers()
        context = tls.server_context()
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=KEEP_ALIVE_S,
        h11_max_incomplete_event_size=64 * 1024,
        http=protocol,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(), name="http")
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while not server.started:
                if task.done():
                    raise OSError(f"HTTP cannot listen on {host}:{port}")
                await asyncio.sleep(0.01)
        bound: int = server.servers[0].sockets[0].getsockname()[1]
        watch_queue("http connections", lambda: len(server.server_state.connections), limit=limits.connections_max)
        log.info("HTTP serves", host=host, port=bound, tls=context is not None)
        yield bound
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
