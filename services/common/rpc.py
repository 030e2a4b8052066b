"""A gRPC server as every service has it: authenticated, correlated, errors from the one table, health and reflection."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import Counter, Gauge, Histogram

from services.common import tracing
from services.common.audit import ChangeLog, changes_by_call, ids_in
from services.common.connections import established
from services.common.directory import Directory
from services.common.errors import HubError, Invalid
from services.common.gate import Gate
from services.common.identity import Caller, bearer_key
from services.common.logs import accepted_correlation_id, correlated, current_correlation_id, get_logger
from services.common.metrics import count_fault, watch_queue
from services.common.tenancy import narrow_to
from services.common.tls import Peers, Tls, peer_names

log = get_logger(__name__)

MESSAGE_BYTES_MAX = 4 * 1024 * 1024
STOP_GRACE_S = 5
STREAMS_PER_CONNECTION_MAX = 1_000
# Of a port, streams too: each connection that there may be has room for two.
CALLS_MAX = 10_000

# What may be called without a key.
OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")

# Answered calls by method and status; streams count when they end.
calls_total = Counter("smdih_rpc_calls_total", "gRPC calls answered", ["method", "status"])
# Time to the answer of unary calls.
call_seconds = Histogram("smdih_rpc_call_seconds", "Time to answer a unary gRPC call", ["method"])
# Calls that are being answered; a stream is one for as long as it lasts.
calls_in_progress = Gauge("smdih_rpc_calls_in_progress", "gRPC calls being answered", ["method"])


@dataclass(frozen=True)
class Limits:
    """What is held for whoever connects, before any key is looked at."""

    # Of each port. Past it a new connection is closed at once, which clients take for a server that is away: they try again.
    # One takes 17 kB, with TLS 47 kB (measured): 235 MB when all are there.
    connections_max: int = 5_000
    # From the connection to the client's first settings, TLS included.
    handshake_s: float = 20
    # Without a call. Gateways keep a stream open; others connect again by themselves when they call.
    idle_s: float = 300


LIMITS: Final = Limits()

_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who made the call that is being answered."""
    return _caller.get()


# Told of a body that is not the message it should be, and who sent it to which method.
OnMalformed = Callable[[Caller, str, bytes], Awaitable[None]]


class _Malformed:
    """Stands in for a request whose bytes are not the message they should be."""

    def __init__(self, data: bytes) -> None:
        self.data = data


class _Entry(grpc.aio.ServerInterceptor):
    """Every call passes here: key (before its message is read), correlation id, errors, metrics. Deny by default."""

    def __init__(
        self,
        gate: Gate,
        on_malformed: OnMalformed | None,
        open_methods: Sequence[str],
        peers: Peers,
        changes: ChangeLog | None,
    ) -> None:
        self._changes = changes
        self._gate = gate
        self._open_methods = frozenset(open_methods)
        self._on_malformed = on_malformed
        self._peers = peers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(details)
        if handler is None or details.method.startswith(OPEN_SERVICES):
            return handler
        metadata = dict(details.invocation_metadata or ())
        key = bearer_key(str(metadata.get("authorization", "")))
        parent = str(metadata.get(tracing.HEADER, ""))
        correlation_id = accepted_correlation_id(
            str(metadata.get("x-correlation-id", "")) or tracing.correlation_id_of(parent)
        )
        caller: Caller | None = None
        if details.method not in self._open_methods:
            try:
                caller = await self._gate.caller_of(key)
            except HubError as error:
                return self._refusing(error, details.method, correlation_id)
        return self._guarded(handler, details.method, caller, correlation_id)

    def _refusing(self, error: HubError, method: str, correlation_id: str) -> Any:
        """As a stream, whatever the call is: of a stream no message is read before it is answered."""

        async def refuse(requests: Any, context: Any) -> None:
            with correlated(correlation_id, is_entry=True):
                async with _answered(context, method):
                    self._gate.check_refused(error, _address(context))
                    raise error

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _guarded(self, handler: Any, method: str, caller: Caller | None, correlation_id: str) -> Any:
        """`caller`: nobody where the method is open."""
        gate = self._gate
        is_open = caller is None

        def enter(context: Any) -> None:
            names = peer_names(context.auth_context())
            if names:
                self._peers.check(names, method)
            if caller is not None:
                _caller.set(caller)
                narrow_to(caller)

        def counted() -> AbstractContextManager[None]:
            return nullcontext() if is_open else gate.stream(current_caller())

        def still_admitted() -> None:
            """A stream may outlive the key that it began with."""
            if not is_open:
                gate.check_still_valid(current_caller())

        def parse(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return _Malformed(data)

        async def well_formed(request: Any) -> None:
            if isinstance(request, _Malformed):
                if self._on_malformed is not None and not is_open:
                    await self._on_malformed(current_caller(), method, request.data)
                raise Invalid("The body is not a message of this call.", reason="MALFORMED")

        @asynccontextmanager
        async def noted(request: Any, context: Any) -> AsyncIterator[list[Any]]:
            """In the change log, with what came of it: the answer, once it is in the list."""
            answered: list[Any] = []
            outcome = "BROKEN_OFF"
            try:
                yield answered
                outcome = "OK"
            except HubError as error:
                outcome = error.reason
                raise
            finally:
                if self._changes is not None and not is_open and changes_by_call(method):
                    caller = current_caller()
                    made = ids_in((field.name, value) for one in answered for field, value in one.ListFields())
                    await self._changes.note(
                        caller,
                        shown=gate.shown(caller),
                        action=method,
                        ids=made | ids_in((field.name, value) for field, value in request.ListFields()),
                        outcome=outcome,
                        address=_address(context),
                    )

        async def unary(request: Any, context: Any) -> Any:
            started = time.perf_counter()
            with correlated(correlation_id, is_entry=True):
                async with _answered(context, method):
                    enter(context)
                    await well_formed(request)
                    with counted():
                        async with noted(request, context) as answered:
                            response = await handler.unary_unary(request, context)
                            answered.append(response)
                call_seconds.labels(method).observe(time.perf_counter() - started)
                return response

        async def checked(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
            async for request in requests:
                still_admitted()
                await well_formed(request)
                yield request

        async def unary_stream(request: Any, context: Any) -> AsyncIterator[Any]:
            with correlated(correlation_id, is_entry=True):
                async with _answered(context, method):
                    enter(context)
                    await well_formed(request)
                    with counted():
                        async for response in handler.unary_stream(request, context):
                            still_admitted()
                            yield response

        async def stream_stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            with correlated(correlation_id, is_entry=True):
                async with _answered(context, method):
                    enter(context)
                    with counted():
                        async for response in handler.stream_stream(checked(requests), context):
                            yield response

        serializers = {"request_deserializer": parse, "response_serializer": handler.response_serializer}
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(unary, **serializers)
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(unary_stream, **serializers)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(stream_stream, **serializers)
        raise TypeError(f"{method}: client streaming is not used in this hub")


def _address(context: Any) -> str:
    """Without the port: "ipv4:10.0.0.1:4711", "ipv6:%5B::1%5D:4711"."""
    return str(context.peer()).rpartition(":")[0]


@asynccontextmanager
async def _answered(context: Any, method: str) -> AsyncIterator[None]:
    in_progress = calls_in_progress.labels(method)
    in_progress.inc()
    entered = tracing.enter(method, current_correlation_id(), parent=_parent_of(context), rpc_system="grpc")
    failed = False
    try:
        yield
    except HubError as error:
        calls_total.labels(method, error.GRPC_STATUS.name).inc()
        count_fault(method, error.reason, status=error.HTTP_STATUS)
        log.info("call refused", method=method, reason=error.reason, detail=error.detail)
        await _abort(context, error)
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except Exception:
        failed = True
        calls_total.labels(method, "INTERNAL").inc()
        count_fault(method, HubError.REASON, status=HubError.HTTP_STATUS)
        log.exception("call failed", method=method)
        await _abort(context, HubError("Something in the hub went wrong; it has been logged."))
    except (asyncio.CancelledError, GeneratorExit):  # the caller went away, or the server stops
        calls_total.labels(method, "CANCELLED").inc()
        raise
    else:
        calls_total.labels(method, "OK").inc()
    finally:
        in_progress.dec()
        tracing.leave(entered, method, failed=failed)


def _parent_of(context: Any) -> str:
    if not tracing.is_on():
        return ""
    return str(dict(context.invocation_metadata() or ()).get(tracing.HEADER, ""))


async def _abort(context: Any, error: HubError) -> NoReturn:
    metadata = [("reason", error.reason)]
    if error.retry_after_s is not None:
        metadata.append(("retry-after", str(error.retry_after_s)))
    await context.abort(error.GRPC_STATUS, error.detail, trailing_metadata=tuple(metadata))
    raise AssertionError("abort raises")


# A generated add_..._to_server function, and the servicer.
Registered = tuple[Callable[[Any, Any], None], Any]


class _Named:
    """Stands for the server while services are added to it, and remembers what they are called."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server
        self.names: list[str] = []

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.ServiceRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers(handlers)
        self.names += [str(handler.service_name()) for handler in handlers]

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self._server.add_registered_method_handlers(service, handlers)


@asynccontextmanager
async def serve(
    *,
    host: str,
    port: int,
    directory: Directory,
    register: Sequence[Registered],
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    on_malformed: OnMalformed | None = None,
    open_methods: Sequence[str] = (),
    tls: Tls | None = None,
    internal_port: int = 0,
    internal_calls: Mapping[str, Collection[str]] = MappingProxyType({}),
    gate: Gate | None = None,
    changes: ChangeLog | None = None,
    limits: Limits = LIMITS,
) -> AsyncIterator[int]:
    """Serve until the context ends; yields the port.

    `open_methods` ("/package.Service/Method") need no key and guard themselves. Where `tls` has an authority of clients, these need
    a certificate of it: on `internal_port` if that is given, which is then for the hub's own services only, else on `port`.
    `internal_calls`: service -> the methods that it calls here; with its certificate nothing else can be called.
    `gate`: without one, that of the directory's keys with the usual limits. `changes`: where to note what people change.
    """
    peers = Peers(internal_calls, services_only=bool(internal_port))
    server = grpc.aio.server(
        interceptors=[_Entry(gate or Gate(directory), on_malformed, open_methods, peers, changes)],
        maximum_concurrent_rpcs=CALLS_MAX,
        options=[
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_allowed_incoming_connections", limits.connections_max),
            ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
            ("grpc.server_handshake_timeout_ms", round(limits.handshake_s * 1_000)),
            ("grpc.max_connection_idle_ms", round(limits.idle_s * 1_000)),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ],
    )
    services = _Named(server)
    for add, servicer in register:
        add(servicer, services)
    status = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(status, server)
    reflection.enable_server_reflection((*services.names, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    if tls is None or not tls.serves:
        bound = server.add_insecure_port(f"{host}:{port}")
    else:
        mutual = tls.asks_clients and not internal_port
        bound = server.add_secure_port(f"{host}:{port}", tls.server_credentials(mutual=mutual))
        if internal_port:
            server.add_secure_port(f"{host}:{internal_port}", tls.server_credentials(mutual=True))
    await server.start()
    watch_queue("grpc connections", partial(established, bound), limit=limits.connections_max)
    if internal_port:
        watch_queue("grpc connections of services", partial(established, internal_port), limit=limits.connections_max)
    for name in ("", *services.names):
        await status.set(name, health_pb2.HealthCheckResponse.SERVING)
    log.info("gRPC serves", host=host, port=bound, tls=tls is not None and tls.serves)
    try:
        yield bound
    finally:
        await status.enter_graceful_shutdown()
        await server.stop(STOP_GRACE_S)
