"""Traces that cost nothing when they are off, and are the correlation id when they are on."""

import asyncio
import contextlib
import subprocess
import sys

import httpx
from fastapi import APIRouter

from services.common import http, logs, tracing
from services.common.runtime import Runtime
from tests.integration.otlp_receiver import receiving

CORRELATION_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_without_an_endpoint_no_library_is_loaded() -> None:
    code = (
        "import sys; import services.common.http, services.common.rpc, services.common.outbox; "
        "from services.common import tracing; tracing.start('', process='p', ratio=1); "
        "sys.exit(any(name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_correlation_id_names_a_trace_and_a_traceparent_a_correlation_id() -> None:
    assert tracing.trace_id_of(CORRELATION_ID) == CORRELATION_ID
    assert len(tracing.trace_id_of("order-5")) == 32
    assert tracing.trace_id_of("order-5") == tracing.trace_id_of("order-5") != tracing.trace_id_of("order-6")
    assert tracing.correlation_id_of(f"00-{CORRELATION_ID}-00f067aa0ba902b7-01") == CORRELATION_ID
    for wrong in ("", "00-xyz-1-01", f"00-{'0' * 32}-00f067aa0ba902b7-01", f"01{CORRELATION_ID}"):
        assert tracing.correlation_id_of(wrong) == ""


def test_a_share_of_the_correlation_ids_that_the_hub_makes_is_kept() -> None:
    kept = sum(tracing.is_sampled(tracing.trace_id_of(logs.new_correlation_id()), 0.25) for _ in range(2_000))
    assert 400 < kept < 600
    assert tracing.is_sampled(CORRELATION_ID, 1)
    assert not tracing.is_sampled(CORRELATION_ID, 0)


def test_off_it_says_nothing() -> None:
    with tracing.span("a", CORRELATION_ID) as made, logs.correlated(CORRELATION_ID):
        assert made is None
        assert tracing.traceparent(CORRELATION_ID) == ""
        assert tracing.metadata(CORRELATION_ID) == ()


async def test_spans_of_a_correlation_id_are_one_trace_with_the_parents_that_are_known() -> None:
    async with receiving() as receiver:
        tracing.start(receiver.address, process="trial", ratio=1)
        try:
            with contextlib.suppress(ValueError), tracing.span("outer", CORRELATION_ID):
                sent = tracing.traceparent(CORRELATION_ID)
                assert tracing.traceparent("order-5") == ""
                with logs.correlated(CORRELATION_ID):  # the same trace: no span of its own
                    pass
                with logs.correlated("order-5"):
                    assert tracing.traceparent("order-5")
                raise ValueError("no")
            with tracing.span("far away", CORRELATION_ID, parent=sent):
                pass
            tracing.note("together", [CORRELATION_ID, "order-5", CORRELATION_ID, ""], seconds=0.5)
        finally:
            await asyncio.to_thread(tracing.stop)
    ours = {span.name: span for span in receiver.of(CORRELATION_ID)}
    assert set(ours) == {"outer", "far away", "together"}
    assert ours["far away"].parent_id == ours["outer"].span_id
    assert ours["outer"].parent_id == ""
    others = receiver.of(tracing.trace_id_of("order-5"))
    assert sorted(span.name for span in others) == [
        "test_spans_of_a_correlation_id_are_one_trace_with_the_parents_that_are_known",
        "together",
    ]


async def test_only_the_asked_share_is_kept() -> None:
    async with receiving() as receiver:
        tracing.start(receiver.address, process="trial", ratio=0)
        try:
            with tracing.span("left out", CORRELATION_ID):
                flags = int(tracing.traceparent(CORRELATION_ID)[-2:], 16)
                assert not flags & 1
        finally:
            await asyncio.to_thread(tracing.stop)
    assert receiver.spans == []


async def test_a_request_goes_on_in_the_callers_trace_and_says_so() -> None:
    router = APIRouter()

    @router.get("/things/{thing_id}")
    async def thing(thing_id: int) -> dict[str, str]:
        return {"seen": tracing.traceparent(CORRELATION_ID)}

    app = http.application("trial", runtime=Runtime(), directory=None, open_routers=[router])
    sent = f"00-{CORRELATION_ID}-00f067aa0ba902b7-01"
    async with receiving() as receiver:
        tracing.start(receiver.address, process="trial", ratio=1)
        try:
            async with (
                http.serve(app, host="127.0.0.1", port=0) as port,
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
            ):
                answer = await client.get("/things/5", headers={"traceparent": sent})
                # A correlation id that is said counts, and the caller's trace is linked.
                other = await client.get("/things/6", headers={"traceparent": sent, "x-correlation-id": "order-5"})
        finally:
            await asyncio.to_thread(tracing.stop)
    assert answer.headers["x-correlation-id"] == CORRELATION_ID
    (span,) = receiver.of(CORRELATION_ID)
    assert (span.name, span.parent_id) == ("GET /things/{thing_id}", "00f067aa0ba902b7")
    assert answer.json()["seen"] == f"00-{CORRELATION_ID}-{span.span_id}-{answer.json()['seen'][-2:]}"
    assert other.headers["x-correlation-id"] == "order-5"
    assert len(receiver.of(tracing.trace_id_of("order-5"))) == 1
