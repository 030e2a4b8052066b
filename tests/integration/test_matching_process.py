"""The matching process as it is run: started, killed between commit and publish, started again, stopped."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from localstack.servers import free_port
from services.common.kafka import Cluster, Publisher
from services.common.settings import Settings
from smdih.matching.v1 import events_pb2
from tests.integration.matching_hub import KEYS, offer_events, publish_world, running_hub
from tests.polling import eventually


@asynccontextmanager
async def process(settings: Settings) -> AsyncIterator[tuple[asyncio.subprocess.Process, httpx.AsyncClient]]:
    port = free_port()
    environment = {
        **os.environ,
        "SMDIH_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "SMDIH_KAFKA_TOPIC_PREFIX": settings.kafka_topic_prefix,
        "SMDIH_DATABASE_DSN": settings.database_dsn,
        "SMDIH_HTTP_PORT": str(port),
        "SMDIH_LOG_LEVEL": "WARNING",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    started = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.matching.main", "api", env=environment
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:

            async def ready() -> bool:
                assert started.returncode is None
                try:
                    return bool((await client.get("/readyz")).status_code == 200)
                except httpx.TransportError:
                    return False

            await eventually(ready, deadline_s=60)
            yield started, client
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()


async def test_what_was_committed_before_a_kill_is_published_after_it(
    settings: Settings, cluster: Cluster, publisher: Publisher
) -> None:
    await publish_world(publisher)
    # Ends after the commit and before anything is published: what a kill at that moment leaves behind.
    async with running_hub(settings, publishing=False, taking_alarms=False, upkeep_runs=False) as dying:
        await dying.put_providers()
        opened = await dying.ok("firm", "POST", "/v1/needs", {"text": "Our gears whine."})
        await dying.ok("firm", "POST", f"/v1/offers/{opened['offers'][0]['id']}/accept")
        left: int = await dying.pool.fetchval("SELECT count(*) FROM outbox")
    made = len(opened["offers"])
    assert left == 2 * made + 1  # and the match
    assert await offer_events(cluster) == []
    async with process(settings) as (running, client):

        async def published() -> bool:
            return len(await offer_events(cluster)) >= 2 * made

        await eventually(published)
        events = await offer_events(cluster)
        assert len({event.event_id for event in events}) == 2 * made
        assert [event.change for event in events].count(events_pb2.OFFER_CHANGE_ACCEPTED) == 1
        # Killed for real in the middle of its work, and nothing is made twice afterwards.
        key = {"authorization": f"Bearer {KEYS['firm']}"}
        body = {"text": "The oil is full of debris.", "request_id": "once"}
        first = (await client.post("/v1/needs", json=body, headers=key)).json()
        running.send_signal(signal.SIGKILL)
        await running.wait()
    async with process(settings) as (running, client):
        again = (await client.post("/v1/needs", json=body, headers=key)).json()
        assert again["need"]["id"] == first["need"]["id"]

        async def all_published() -> bool:
            of_need = [event for event in await offer_events(cluster) if event.offer.need_id == first["need"]["id"]]
            return {event.offer.id for event in of_need} == {offer["id"] for offer in first["offers"]}

        await eventually(all_published)
        running.terminate()
        assert await asyncio.wait_for(running.wait(), 20) == 0


async def test_an_unknown_role_is_answered_with_the_usage() -> None:
    started = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.matching.main",
        "nonsense",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await started.communicate()
    assert started.returncode == 2
    assert errors.decode().splitlines() == ["usage: python -m services.matching.main api"]
