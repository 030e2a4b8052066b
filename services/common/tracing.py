"""Traces, for those who set SMDIH_TRACE_ENDPOINT: an OTLP receiver of OpenTelemetry spans. Without it nothing here costs anything,
and the libraries are not even loaded.

The trace is the correlation id: whatever runs under one correlation id, in any process and however much later, is a span of the
same trace, though alarms, needs and awards know nothing of traces. So a trace goes as far as the correlation goes, from the door
to the award. Parents are added where they are known: HTTP, gRPC and Kafka carry W3C `traceparent` headers, and the outbox keeps
the one that an event was written under.
"""

import hashlib
import re
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opentelemetry.trace import Span, SpanContext, Tracer

HEADER: Final = "traceparent"
FLUSH_TIMEOUT_MS: Final = 3_000
# Traces whose next parent is remembered, from the headers of records that are being taken in.
REMEMBERED_MAX: Final = 10_000

_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")
_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_NO_TRACE = "0" * 32

_tracing: "_Tracing | None" = None
_current: ContextVar["Span | None"] = ContextVar("span", default=None)


def start(endpoint: str, *, process: str, ratio: float) -> None:
    """Send this process's spans to `endpoint` (http://host:port of an OTLP receiver by gRPC); empty: do nothing."""
    global _tracing
    if endpoint and _tracing is None:
        _tracing = _Tracing(endpoint, process, ratio)


def stop() -> None:
    """Send what is left."""
    global _tracing
    if _tracing is not None:
        _tracing.stop()
        _tracing = None


def is_on() -> bool:
    return _tracing is not None


def trace_id_of(correlation_id: str) -> str:
    """In hex. A correlation id that the hub made is a trace id; others are hashed to one."""
    if _TRACE_ID.fullmatch(correlation_id) and correlation_id != _NO_TRACE:
        return correlation_id
    return hashlib.sha256(correlation_id.encode()).hexdigest()[:32]


def is_sampled(trace_id: str, ratio: float) -> bool:
    """Whether a trace is of the share that is kept."""
    return int.from_bytes(hashlib.sha256(trace_id.encode()).digest()[:8]) < ratio * 2**64


def correlation_id_of(traceparent: str) -> str:
    """The trace that a caller is in, as the correlation id of what it asks for; empty if it names none."""
    found = _TRACEPARENT.fullmatch(traceparent)
    return found[1] if found and found[1] != _NO_TRACE else ""


@contextmanager
def span(
    name: str,
    correlation_id: str,
    *,
    kind: str = "internal",
    parent: str = "",
    attributes: Mapping[str, Any] | None = None,
) -> Iterator["Span | None"]:
    """A span of the trace of this correlation id. Its parent: the span around it if that is of the same trace, else the one that
    `parent` (a traceparent) or the record being taken in names."""
    if _tracing is None:
        yield None
        return
    made = _tracing.begin(name, correlation_id, kind, parent, attributes)
    token = _current.set(made)
    try:
        yield made
    except Exception as error:
        _tracing.failed(made, error)
        raise
    finally:
        _current.reset(token)
        made.end()


def enter(name: str, correlation_id: str, *, parent: str, **attributes: str) -> "Span | None":
    """Begin a span for the rest of this task, which `leave` ends: the edges' way, where a `with` would wrap everything."""
    if _tracing is None:
        return None
    made = _tracing.begin(name, correlation_id, "server", parent, attributes)
    _current.set(made)
    return made


def leave(entered: "Span | None", name: str, *, failed: bool, **attributes: str | int) -> None:
    """End it, under the name that is known by now."""
    if entered is not None:
        entered.update_name(name)
        entered.set_attributes(attributes)
        if failed and _tracing is not None:
            _tracing.mark_failed(entered)
        entered.end()
        _current.set(None)


@contextmanager
def continued(name: str, correlation_id: str) -> Iterator[None]:
    """A span where work goes on under another correlation id; none where the span around is of the same trace already."""
    around = _current.get()
    if _tracing is None or (around is not None and _hex(around) == trace_id_of(correlation_id)):
        yield
        return
    with span(name, correlation_id):
        yield


def note(name: str, correlation_ids: Iterable[str], *, seconds: float, kind: str = "consumer") -> None:
    """Spans of what has just been done together for many: one in each trace."""
    if _tracing is None:
        return
    end_ns = time.time_ns()
    for correlation_id in dict.fromkeys(correlation_ids):
        if correlation_id:
            _tracing.begin(name, correlation_id, kind, "", None, start_ns=end_ns - int(seconds * 1e9)).end(end_ns)


def traceparent(correlation_id: str) -> str:
    """What to send along with work under this correlation id; empty when there is nothing to say."""
    around = _current.get()
    if _tracing is None or around is None or _hex(around) != trace_id_of(correlation_id):
        return ""
    context = around.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def metadata(correlation_id: str) -> tuple[tuple[str, str], ...]:
    """The same as metadata of a gRPC call or headers of an HTTP request."""
    sent = traceparent(correlation_id)
    return ((HEADER, sent),) if sent else ()


def record_headers(sent: str) -> tuple[tuple[str, bytes], ...]:
    """The same as headers of a record."""
    return ((HEADER, sent.encode()),) if sent else ()


def remember(records: Sequence[Any]) -> None:
    """Records are about to be taken in: what goes on in their traces is a child of what wrote them."""
    if _tracing is None:
        return
    for record in records:
        for name, value in record.headers:
            if name == HEADER:
                _tracing.remember(value.decode("ascii", "replace"))


def _hex(of: "Span") -> str:
    return f"{of.get_span_context().trace_id:032x}"


class _Tracing:
    """The only place that knows OpenTelemetry."""

    def __init__(self, endpoint: str, process: str, ratio: float) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult

        class Ids(RandomIdGenerator):
            """A span without a parent begins the trace that its correlation id names."""

            next_trace_id = 0

            def generate_trace_id(self) -> int:
                return self.next_trace_id

        class ByTrace(Sampler):
            """Keeps a share of the traces, by their ids alone: all processes keep, or leave out, the same ones. Not the SDK's own
            sampler: it takes some bits for random that a correlation id, being a UUID, has fixed."""

            def should_sample(
                self, parent_context: Any, trace_id: int, name: str, *_: Any, attributes: Any = None, **__: Any
            ) -> SamplingResult:
                is_kept = is_sampled(f"{trace_id:032x}", ratio)
                return SamplingResult(Decision.RECORD_AND_SAMPLE if is_kept else Decision.DROP, attributes)

            def get_description(self) -> str:
                return f"ByTrace({ratio})"

        self._api = trace
        self._ids = Ids()
        self._provider: TracerProvider = TracerProvider(
            resource=Resource.create({"service.name": f"smdih-{process}"}),
            sampler=ByTrace(),
            id_generator=self._ids,
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=1_000))
        self._tracer: Tracer = self._provider.get_tracer("smdih")
        self._parents: OrderedDict[str, SpanContext] = OrderedDict()

    def begin(
        self,
        name: str,
        correlation_id: str,
        kind: str,
        parent: str,
        attributes: Mapping[str, Any] | None,
        *,
        start_ns: int | None = None,
    ) -> "Span":
        trace_id = trace_id_of(correlation_id)
        around = _current.get()
        context = self._api.set_span_in_context(self._api.INVALID_SPAN)
        links = []
        said = self._context_of(parent)
        if around is not None and _hex(around) == trace_id:
            context = self._api.set_span_in_context(around)
        elif said is not None and f"{said.trace_id:032x}" == trace_id:
            context = self._api.set_span_in_context(self._api.NonRecordingSpan(said))
        elif (known := self._parents.get(trace_id)) is not None:
            context = self._api.set_span_in_context(self._api.NonRecordingSpan(known))
        if said is not None and f"{said.trace_id:032x}" != trace_id:
            links.append(self._api.Link(said))
        if around is not None and _hex(around) != trace_id:
            links.append(self._api.Link(around.get_span_context()))
        self._ids.next_trace_id = int(trace_id, 16)
        return self._tracer.start_span(
            name,
            context=context,
            kind=self._api.SpanKind[kind.upper()],
            attributes={"smdih.correlation_id": correlation_id} | dict(attributes or {}),
            links=links,
            start_time=start_ns,
        )

    def failed(self, of: "Span", error: Exception) -> None:
        of.record_exception(error)
        self.mark_failed(of)

    def mark_failed(self, of: "Span") -> None:
        of.set_status(self._api.StatusCode.ERROR)

    def remember(self, sent: str) -> None:
        context = self._context_of(sent)
        if context is None:
            return
        key = f"{context.trace_id:032x}"
        self._parents[key] = context
        self._parents.move_to_end(key)
        while len(self._parents) > REMEMBERED_MAX:
            self._parents.popitem(last=False)

    def stop(self) -> None:
        self._provider.force_flush(FLUSH_TIMEOUT_MS)
        self._provider.shutdown()

    def _context_of(self, sent: str) -> "SpanContext | None":
        if not correlation_id_of(sent):
            return None
        _, trace_id, span_id, flags = sent.split("-")
        found = self._api.SpanContext(
            int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=self._api.TraceFlags(int(flags, 16))
        )
        return found if found.is_valid else None
