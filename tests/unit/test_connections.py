"""Connections past their number are told to come again, those that say nothing end, and probes are not in the same queue."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx
import pytest
from fastapi import APIRouter
from prometheus_client import REGISTRY

from services.common import http, rpc
from services.common.clock import SystemClock
from services.common.connections import KEEP_ALIVE_S, Limits
from services.common.directory import Directory
from services.common.entrance import open_entrance
from services.common.kafka import Cluster
from services.common.runtime import Runtime
from services.common.settings import Settings

GET = b"GET /v1/here HTTP/1.1\r\nHost: hub\r\n\r\n"
Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(limits: Limits) -> AsyncIterator[int]:
    router = APIRouter()

    @router.get("/v1/here")
    async def here() -> str:
        return "here"

    @router.post("/v1/said")
    async def said(what: dict[str, str]) -> dict[str, str]:
        return what

    app = http.application("test", runtime=Runtime(), directory=None, open_routers=[router])
    async with http.serve(app, host="127.0.0.1", port=0, limits=limits) as port:
        yield port


async def opened(port: int, count: int) -> list[Opened]:
    return [await asyncio.open_connection("127.0.0.1", port) for _ in range(count)]


async def answer_on(connection: Opened) -> bytes:
    reader, writer = connection
    writer.write(GET)
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    return head.lower() + await reader.readexactly(length)


async def close(connections: list[Opened]) -> None:
    for _, writer in connections:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_a_connection_too_many_is_told_to_come_again_and_those_that_are_there_go_on() -> None:
    async with serving(Limits(connections_max=3)) as port:
        there = await opened(port, 3)
        late = await opened(port, 1)
        refused = await answer_on(late[0])
        assert b" 503 " in refused
        assert b"retry-after: 5" in refused
        assert b'"reason":"FULL"' in refused
        assert await late[0][0].read() == b""  # and then it is closed
        assert [b" 200 " in await answer_on(one) for one in there] == [True] * 3
        await close([there.pop()])
        async with asyncio.timeout(5):
            while b" 200 " not in await answer_on((again := await opened(port, 1))[0]):
                await close(again)
        await close([*there, *again, *late])


async def test_past_twice_the_limit_a_connection_is_closed_unheard() -> None:
    async with serving(Limits(connections_max=1)) as port:
        first = await opened(port, 2)
        (third,) = await opened(port, 1)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await answer_on(third)
        await close([*first, third])


@pytest.mark.parametrize("said", [b"", GET[:-2]])
async def test_a_connection_that_begins_no_request_in_time_ends(said: bytes) -> None:
    async with serving(Limits(request_head_s=0.2)) as port:
        (one,) = await opened(port, 1)
        reader, writer = one
        writer.write(said)
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        await close([one])


async def test_a_kept_connection_has_its_time_anew_after_each_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEEP_ALIVE_S", 1)
    assert KEEP_ALIVE_S > 60
    async with serving(Limits(request_head_s=0.3)) as port:
        (one,) = await opened(port, 1)
        for _ in range(3):
            assert b" 200 " in await answer_on(one)
            await asyncio.sleep(0.4)
        one[1].write(GET[:-2])  # a head that does not end
        async with asyncio.timeout(5):
            assert await one[0].read() == b""
        await close([one])


async def test_a_body_that_does_not_come_ends_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_S", 0.2)
    async with serving(Limits()) as port:
        (one,) = await opened(port, 1)
        reader, writer = one
        writer.write(b"POST /v1/said HTTP/1.1\r\nHost: hub\r\nContent-Length: 10\r\n\r\n{")
        async with asyncio.timeout(5):
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 408 " in head
            assert b'"reason":"BODY_TOO_SLOW"' in await reader.readuntil(b"}")
        await close([one])


async def test_with_a_port_of_their_own_probes_and_metrics_are_not_at_the_door() -> None:
    runtime = Runtime()
    runtime.started = True
    door, inside = await _free_port(), await _free_port()
    settings = Settings(
        kafka_bootstrap="nowhere:1", database_dsn="postgresql://nowhere/x", http_port=door, probe_port=inside
    )
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await entrance.serve_probes("test")
    app = http.application("door", runtime=runtime, directory=None, has_probes=False)
    await runtime.enter(http.serve(app, host="127.0.0.1", port=door))
    async with httpx.AsyncClient() as client:
        for path in ("livez", "readyz", "metrics"):
            assert (await client.get(f"http://127.0.0.1:{inside}/{path}")).status_code == 200
            assert (await client.get(f"http://127.0.0.1:{door}/{path}")).status_code == 404
    await runtime._stack.aclose()


async def _free_port() -> int:
    server = await asyncio.start_server(lambda _, __: None, "127.0.0.1", 0)
    port: int = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


@asynccontextmanager
async def answering(limits: rpc.Limits) -> AsyncIterator[int]:
    nowhere = Directory(Cluster("127.0.0.1:1"), clock=SystemClock(), kinds=())
    async with rpc.serve(host="127.0.0.1", port=0, directory=nowhere, register=(), limits=limits) as port:
        yield port


async def answers(channel: grpc.aio.Channel) -> bool:
    ask: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
    code = await ask(b"", timeout=5).code()
    assert code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    return code is grpc.StatusCode.OK


def _shown(name: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"queue": "grpc connections"})


async def test_a_grpc_connection_too_many_is_closed_and_those_that_are_there_go_on() -> None:
    async with answering(rpc.Limits(connections_max=2)) as port:
        # Else channels to one address share a connection.
        apart = (("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 100))
        there = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=apart) for _ in range(2)]
        late = grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=apart)
        try:
            assert [await answers(one) for one in there] == [True, True]
            assert not await answers(late)
            assert [await answers(one) for one in there] == [True, True]
            assert _shown("smdih_queue_items") == 2
            assert _shown("smdih_queue_limit_items") == 2
            await there.pop().close()
            async with asyncio.timeout(5):
                while not await answers(late):
                    pass
        finally:
            for channel in (*there, late):
                await channel.close()


async def test_who_connects_to_grpc_and_says_nothing_keeps_no_place() -> None:
    async with answering(rpc.Limits(connections_max=2, handshake_s=1)) as port:
        silent = await opened(port, 2)
        async with asyncio.timeout(5):
            for reader, _ in silent:
                while await reader.read(1024):  # the server's own settings come first
                    pass
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert await answers(channel)
        await close(silent)
