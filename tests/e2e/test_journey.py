"""The whole journey on real servers, from a sample to an award, with every process killed once on the way."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from demo import plant, report
from demo.journey import Journey, Observer
from demo.story import Source, Story
from localstack.hub import Hub
from localstack.prometheus import Prometheus
from localstack.secured import SecuredKafka
from localstack.servers import KAFKA_LIBS, Servers
from services.common.settings import Settings
from tests.e2e import watching
from tests.integration.otlp_receiver import receiving


def story_of_the_plant() -> Story:
    start_us = time.time_ns() // 1000 - plant.DURATION_S * 1_000_000
    sources = [
        Source(
            machine.path,
            machine.name,
            machine.kind,
            machine.signals,
            start_us + np.arange(len(machine.values)) * 1_000_000,
            machine.values,
            machine.faults,
        )
        for machine in plant.build()
    ]
    story = Story("the plant", sources)
    story.total_samples = sum(int((~np.isnan(source.values)).sum()) for source in sources)
    return story


async def kill_every_process_once(hub: Hub, story: Story) -> None:
    """One after the other, while telemetry flows."""
    while story.counts.acknowledged < story.total_samples * 0.05:
        await asyncio.sleep(0.05)
    for name in hub.processes:
        hub.kill(name)
        await asyncio.sleep(0.8)


@pytest_asyncio.fixture
async def secured(settings: Settings, tmp_path: Path) -> AsyncIterator[SecuredKafka | None]:
    """A broker that refuses what services/common/access.py does not give; None where only a named one is to be had."""
    if not KAFKA_LIBS.is_dir():
        yield None
        return
    broker = SecuredKafka(tmp_path / "kafka")
    try:
        await broker.start()
        await broker.admit(prefix=settings.kafka_topic_prefix)
        yield broker
    finally:
        broker.remove()


async def test_telemetry_becomes_an_award_and_nothing_is_lost_though_every_process_is_killed(
    settings: Settings, secured: SecuredKafka | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = AsyncExitStack()
    traces = await watched.enter_async_context(receiving())
    monkeypatch.setenv("SMDIH_TRACE_ENDPOINT", traces.address)
    monkeypatch.setenv("SMDIH_TRACE_RATIO", "1")
    hub = Hub(
        Servers(secured.bootstrap if secured else settings.kafka_bootstrap, settings.database_dsn),
        tmp_path,
        topic_prefix=settings.kafka_topic_prefix,
        identities=secured.identities() if secured else None,
    )
    story = story_of_the_plant()
    tasks: list[asyncio.Task[None]] = []
    try:
        await hub.start()
        addresses = {name: running.http for name, running in hub.processes.items()}
        prometheus = await watched.enter_async_context(Prometheus(tmp_path / "prometheus", addresses))
        tasks.append(asyncio.create_task(Observer(hub, story).run()))
        tasks.append(asyncio.create_task(kill_every_process_once(hub, story)))
        await Journey(hub, story).walk()
        summary = story.summary()
        assert summary["samples"]["sent"] == summary["samples"]["acknowledged"] == story.total_samples
        assert summary["samples"]["stored"] == story.total_samples
        assert (summary["samples"]["lost"], summary["samples"]["duplicated"]) == (0, 0)
        assert summary["alarms"]["faults_known"] == 5
        assert summary["alarms"]["faults_found"] == 5
        assert story.need is not None
        assert story.need["source"] == "anomaly"
        assert summary["offers"] >= 1
        assert summary["award"]["grant_pence"] == 19_200_00
        assert summary["award"]["co_investment_pence"] == 28_800_00
        assert summary["trial_balance_pence"] == 0
        assert all(alarm["explanation"] for alarm in story.alarms)
        # One thread from the samples to the ledger.
        assert story.application is not None
        alarm = next(alarm for alarm in story.alarms if alarm["id"] in story.need["alarm_ids"])
        ids = {alarm["correlation_id"], story.need["correlation_id"], story.application["correlation_id"]}
        assert len(ids) == 1
        page = report.page(story)
        assert page.count("<svg") == 15
        assert story.restarts >= len(hub.processes)
        async with httpx.AsyncClient(timeout=5) as client:
            for running in hub.processes.values():
                for probe in ("livez", "readyz", "metrics"):
                    assert (await client.get(f"{running.http}/{probe}")).status_code == 200
        for name in ("door", "anomaly", "matching", "funding"):
            async with grpc.aio.insecure_channel(hub.processes[name].grpc) as channel:
                check = channel.unary_unary(
                    "/grpc.health.v1.Health/Check",
                    request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                    response_deserializer=health_pb2.HealthCheckResponse.FromString,
                )
                answer = await check(health_pb2.HealthCheckRequest())
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                ask = channel.stream_stream(
                    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                    request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
                    response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
                )
                listed = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
                services = {one.name async for response in listed for one in response.list_services_response.service}
                assert any(one.startswith("smdih.") for one in services)
        # What happened can be seen.
        await watching.one_trace_goes_from_the_door_to_the_award(traces, ids.pop())
        await watching.every_panel_on_timescaledb_has_data(hub)
        await watching.every_panel_on_prometheus_has_data(prometheus, hub)
        await watching.every_rule_is_well_and_silent(prometheus)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await hub.stop()
        await watched.aclose()
