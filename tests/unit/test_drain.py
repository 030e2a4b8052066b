"""A process that was told to stop: what it still answers, and how its connections end."""

import asyncio

import httpx
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
