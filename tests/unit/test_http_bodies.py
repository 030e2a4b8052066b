"""What bodies may take of a process while they come: for a caller, and for all together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request

from services.common import http
from services.common.gate import BODY_BYTES_MAX, BODY_BYTES_PER_CALLER_MAX, Gate
from services.common.http import Authenticated
from services.common.identity import Caller, Role
from services.common.runtime import Runtime
from tests.polling import eventually

CHUNK = bytes(64 * 1024)
CHUNKS = 63  # just less than a body may have


class Keys:
    """Keys are numbers here, each of a gateway; ten in a row are one firm's."""

    async def is_caught_up(self) -> bool:
        return True

    def caller_of(self, key: str) -> Caller:
        return Caller(int(key), Role.DEVICE, firm_id=int(key) // 10 + 1)

    def prefix_of(self, credential_id: int) -> str:
        return ""


class Client:
    """Requests without a server; their bodies stop before the end until `go_on`."""

    def __init__(self) -> None:
        routes = APIRouter()

        @routes.post("/taken")
        async def taken(request: Request, caller: Authenticated) -> int:
            return len(await request.body())

        keys: Any = Keys()
        self._app: FastAPI = http.application(
            "bodies", runtime=Runtime(), directory=keys, routers=[routes], gate=Gate(keys)
        )
        self.waiting = 0
        self.go_on = asyncio.Event()

    async def post(self, key: int) -> int:
        """The status of the answer."""
        left, status = CHUNKS, 0

        async def receive() -> dict[str, Any]:
            nonlocal left
            if left:
                left -= 1
                return {"type": "http.request", "body": CHUNK, "more_body": True}
            self.waiting += 1
            await self.go_on.wait()
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)

        headers = [(b"authorization", f"Bearer {key}".encode())]
        scope = {"type": "http", "method": "POST", "path": "/taken", "query_string": b"", "headers": headers}
        await self._app({**scope, "client": ("here", 1), "http_version": "1.1", "scheme": "http"}, receive, send)
        return status


@asynccontextmanager
async def held(client: Client, keys: list[int]) -> AsyncIterator[None]:
    """While these have sent all but the end of their bodies, and are taken once they have."""
    posts = [asyncio.create_task(client.post(key)) for key in keys]

    async def all_wait() -> bool:
        return client.waiting == len(keys)

    await eventually(all_wait, deadline_s=10)
    yield
    client.go_on.set()
    assert set(await asyncio.gather(*posts)) == {200}


async def test_bodies_that_do_not_end_take_a_bounded_part_of_the_memory() -> None:
    client = Client()
    # Of a firm, however many keys it has.
    async with held(client, [10 + n % 3 for n in range(BODY_BYTES_PER_CALLER_MAX // (CHUNKS * len(CHUNK)))]):
        assert await client.post(19) == 429
    assert await client.post(19) == 200

    client = Client()
    most = BODY_BYTES_MAX // (CHUNKS * len(CHUNK))
    async with held(client, [key // 4 * 10 for key in range(most)]):
        assert await client.post(1_000) == 503
    assert await client.post(1_000) == 200
