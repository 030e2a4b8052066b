"""A process that was told to stop: what it still answers, and how its connections end."""

import asyncio
import sys

import httpx
import pytest
from fastapi import APIRouter

from services.common import http
from services.common.runtime import Runtime


async def fails() -> None:
    raise RuntimeError("a part that ends")


async def test_a_stopping_process_is_not_ready_but_answers_and_closes_each_kept_connection_behind_an_answer() -> None:
    runtime, router = Runtime(), APIRouter()
    runtime.started = True

    @router.get("/v1/answer")
    async def answer() -> str:
        return "here"

    app = http.application("test", runtime=runtime, directory=None, open_routers=[router])
    async with (
        http.serve(app, host="127.0.0.1", port=0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        before = await client.get("/v1/answer")
        assert before.status_code == 200
        assert before.headers.get("connection") != "close"
        assert (await client.get("/readyz")).status_code == 200
        task = runtime.background("part", fails())
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0)
        assert runtime.is_stopping
        after = await client.get("/v1/answer")
        assert (after.status_code, after.headers["connection"]) == (200, "close")
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/livez")).status_code == 200


async def test_readiness_leaves_out_what_it_is_told_to_leave_out() -> None:
    async def away() -> bool:
        return False

    runtime = Runtime()
    runtime.started = True
    runtime.ready_when("kafka", away)
    runtime.ready_when("database", away)
    app = http.application("test", runtime=runtime, directory=None)
    async with (
        http.serve(app, host="127.0.0.1", port=0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        answers = [
            await client.get("/readyz", params={"exclude": left_out})
            for left_out in ([], ["kafka"], ["kafka", "database"])
        ]
    assert [(answer.status_code, answer.json()["missing"]) for answer in answers] == [
        (503, ["kafka", "database"]),
        (503, ["database"]),
        (200, []),
    ]


WAITS = """
import asyncio
import sys
from services.common.runtime import Runtime, run
from services.common.settings import Settings

async def start(runtime: Runtime) -> None:
    async def stopped() -> None:
        print("stopped", flush=True)
    runtime.on_stop(stopped)
    {part}
    print("waiting", flush=True)
    await asyncio.sleep(60)  # for what does not come

run("test", Settings(kafka_bootstrap="nowhere:1", database_dsn="postgresql://nowhere/x"), start)
"""
FAILS = """
    async def fails() -> None:
        await asyncio.sleep(0.1)
        raise RuntimeError("a part that ends")
    runtime.background("part", fails())
"""


@pytest.mark.parametrize(("part", "code"), [("", 0), (FAILS.strip(), 1)])
async def test_a_process_ends_at_once_when_it_is_told_to_or_fails_before_it_has_started(part: str, code: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", WAITS.format(part=part)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(20):
            assert await process.stdout.readline() == b"waiting\n"
            if not part:
                process.terminate()
            assert b"stopped\n" in await process.stdout.read()
            assert await process.wait() == code
    finally:
        if process.returncode is None:
            process.kill()


async def test_a_loop_that_ends_cancelled_though_nobody_stops_the_process_stops_it() -> None:
    async def let_out() -> None:
        raise asyncio.CancelledError

    runtime = Runtime()
    task = runtime.background("loop", let_out())
    await asyncio.wait([task])
    await asyncio.sleep(0)
    assert runtime.is_stopping
