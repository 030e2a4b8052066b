"""Ingest as its users meet it: real processes, real broker, real database."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import pytest_asyncio

from localstack.servers import free_port
from services.common.settings import Settings
from smdih.ingest.v1 import telemetry_pb2, telemetry_pb2_grpc
from smdih_client import Refused, TelemetryClient
from tests.integration.buffered_gateway import ROWS, values
from tests.integration.ingest_plant import Plant, running_plant, two_hours_ago_s
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def plant(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    async with running_plant(settings, Path(tmp_path_factory.mktemp("hub"))) as made:
        yield made


async def test_streamed_frames_are_stored_exactly_though_door_and_historian_are_killed(plant: Plant) -> None:
    machine = await plant.new_machine("kill-me")
    start, rows, batches = two_hours_ago_s(), 50, 60
    rng = np.random.default_rng(1)
    sent = rng.normal(20, 1, (rows * batches, 3))
    sent[rng.random(sent.shape) < 0.05] = np.nan
    async with plant.client("gateway-kill") as client:
        for number in range(batches):
            at = (start + np.arange(number * rows, (number + 1) * rows)) * 1_000_000
            await client.send(machine["path"], at, sent[number * rows : (number + 1) * rows])
            if number == 20:
                plant.hub.kill("door")
            if number in (10, 40):
                plant.hub.kill("historian")
            await asyncio.sleep(0.01)
        await client.flush()
        assert client.totals.acknowledged == client.totals.sent == int((~np.isnan(sent)).sum())
        assert client.totals.quarantined == 0
    whole = int((~np.isnan(sent).all(axis=1)).sum())

    async def all_stored() -> bool:
        return len(await plant.frames(machine["id"])) >= whole

    await eventually(all_stored, deadline_s=40)
    stored = await plant.frames(machine["id"])
    assert len(stored) == whole
    values = np.array([row for _, row in stored], dtype=float)
    np.testing.assert_array_equal(values, sent[~np.isnan(sent).all(axis=1)])

    signal = machine["signals"][0]["id"]
    window = {"from_us": start * 1_000_000, "to_us": (start + 7200) * 1_000_000, "page_size": 10_000}
    for resolution, width_s in (("minute", 60), ("hour", 3600)):
        answer = await plant.http.get(f"/v1/signals/{signal}/history", params=window | {"resolution": resolution})
        column = sent[:, 0]
        bucket_of = np.arange(len(column)) // width_s
        expected = [column[(bucket_of == b) & ~np.isnan(column)] for b in np.unique(bucket_of)]
        buckets = answer.json()["buckets"]
        assert [b["count"] for b in buckets] == [len(e) for e in expected]
        np.testing.assert_allclose([b["sum"] for b in buckets], [e.sum() for e in expected])
        assert [b["min"] for b in buckets] == [e.min() for e in expected]
        assert [b["max"] for b in buckets] == [e.max() for e in expected]
        assert [b["last"] for b in buckets] == [e[-1] for e in expected]


async def test_late_and_corrected_frames_are_merged_and_rollups_made_anew(plant: Plant) -> None:
    machine = await plant.new_machine("late-1")
    start = two_hours_ago_s()
    even = (start + np.arange(0, 300, 2)) * 1_000_000
    odd = (start + np.arange(1, 300, 2)) * 1_000_000
    async with plant.client("gateway-late") as client:
        await client.send(machine["id"], even, np.full((150, 3), 1.0))
        await client.flush()
        await client.send(machine["id"], odd, np.full((150, 3), 2.0))  # late: older than the newest
        await client.send(
            machine["id"], even[:10], np.full((10, 1), 5.0), signals=["speed"]
        )  # a correction of one signal
        await client.flush()

    async def merged() -> bool:
        rows = await plant.frames(machine["id"])
        return len(rows) == 300 and rows[0][1] == [1.0, 1.0, 5.0]

    await eventually(merged)
    speed = machine["signals"][2]["id"]
    answer = await plant.http.get(
        f"/v1/signals/{speed}/history",
        params={"from_us": start * 1_000_000, "to_us": (start + 600) * 1_000_000, "resolution": "minute"},
    )
    buckets = answer.json()["buckets"]
    assert [b["count"] for b in buckets] == [60] * 5
    assert buckets[0]["sum"] == 10 * 5.0 + 20 * 1.0 + 30 * 2.0
    assert buckets[0]["max"] == 5.0


async def test_history_behind_the_newest_frame_is_merged_in_the_order_of_delivery(plant: Plant) -> None:
    machine = await plant.new_machine("late-2")
    start = two_hours_ago_s() - 5 * 3600
    rng = np.random.default_rng(3)
    seconds = np.arange(0, 3 * 3600, 20)
    expected = np.full((len(seconds), 3), np.nan)
    batches = [
        telemetry_pb2.Batch(
            sequence=1, machine_id=machine["id"], times_us=[two_hours_ago_s() * 1_000_000], values=[1, 1, 1]
        )
    ]
    for sequence in range(2, 62):
        # Some of its frames have come before, and one comes twice in the same batch: the later one corrects, where it has a value.
        rows = rng.choice(len(seconds), 20, replace=False)
        rows[-1] = rows[0]
        values = rng.normal(20, 5, (20, 3))
        values[rng.random(values.shape) < 0.3] = np.nan
        for row, cells in zip(rows, values, strict=True):
            expected[row] = np.where(np.isnan(cells), expected[row], cells)
        batch = telemetry_pb2.Batch(sequence=sequence, machine_id=machine["id"])
        batch.times_us.extend(((start + seconds[rows]) * 1_000_000).tolist())
        batch.values.extend(values.ravel().tolist())
        batches.append(batch)
    # Sent again, after other batches have corrected some of the same frames: nothing changes.
    batches += batches[1:10]
    async with grpc.aio.insecure_channel(plant.hub.processes["door"].grpc) as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        for some in (
            batches[:1],
            batches[1:],
            [
                telemetry_pb2.Batch(
                    sequence=99,
                    machine_id=machine["id"],
                    times_us=[(two_hours_ago_s() + 1) * 1_000_000],
                    values=[1, 1, 1],
                )
            ],
        ):
            await stub.SendBatches(
                telemetry_pb2.SendBatchesRequest(source="late-2", batches=some),
                metadata=(("authorization", f"Bearer {plant.device_key}"),),
            )
    known = ~np.isnan(expected).all(axis=1)

    async def stored() -> bool:
        frames = await plant.frames(machine["id"])
        return len(frames) == int(known.sum()) + 2

    await eventually(stored)
    frames = (await plant.frames(machine["id"]))[:-2]
    np.testing.assert_array_equal(np.array([row for _, row in frames], dtype=float), expected[known])
    for number, signal in enumerate(machine["signals"]):
        window = {"from_us": start * 1_000_000, "to_us": (start + 3 * 3600) * 1_000_000, "page_size": 10_000}
        for resolution, width_s in (("minute", 60), ("hour", 3600)):
            answer = await plant.http.get(
                f"/v1/signals/{signal['id']}/history", params=window | {"resolution": resolution}
            )
            buckets = answer.json()["buckets"]
            column = expected[:, number]
            cells = [column[(seconds // width_s == b) & ~np.isnan(column)] for b in np.unique(seconds // width_s)]
            cells = [found for found in cells if len(found)]
            assert [b["count"] for b in buckets] == [len(found) for found in cells]
            np.testing.assert_allclose([b["sum"] for b in buckets], [found.sum() for found in cells])
            for name, of in (("min", np.min), ("max", np.max), ("last", lambda found: found[-1])):
                assert [b[name] for b in buckets] == [of(found) for found in cells]


async def test_values_whose_sum_no_number_holds_do_not_stop_the_historian(plant: Plant) -> None:
    machine = await plant.new_machine("huge-1", [{"name": "n"}])
    start, huge = two_hours_ago_s(), 1.7e308
    async with plant.client("gateway-huge") as client:
        seconds = np.array([0, 10, 70])
        await client.send(machine["id"], (start + seconds) * 1_000_000, np.array([[huge], [huge], [1.0]]))
        await client.flush()
        window = {"from_us": start * 1_000_000, "to_us": (start + 120) * 1_000_000}
        signal = machine["signals"][0]["id"]

        async def shown() -> list[tuple[int, float, float, float]]:
            answer = await plant.http.get(f"/v1/signals/{signal}/history", params=window | {"resolution": "minute"})
            return [(b["count"], b["sum"], b["max"], b["last"]) for b in answer.json()["buckets"]]

        async def closed() -> bool:
            return await shown() == [(2, 2e280, huge, huge), (1, 1.0, 1.0, 1.0)]

        await eventually(closed)
        # Late: the bucket is made anew from its frames.
        await client.send(machine["id"], [(start + 20) * 1_000_000], [[huge]])
        await client.flush()

    async def made_anew() -> bool:
        return await shown() == [(3, 3e280, huge, huge), (1, 1.0, 1.0, 1.0)]

    await eventually(made_anew)
    for path in ("buckets", "plot"):
        answer = await plant.http.get(f"/v1/{path}", params=window | {"signal_id": signal, "width_s": 10})
        assert answer.status_code == 200, answer.text


async def test_a_batch_sent_again_changes_nothing_even_after_a_correction(plant: Plant) -> None:
    machine = await plant.new_machine("again-1")
    start = two_hours_ago_s()
    stub_metadata = (("authorization", f"Bearer {plant.device_key}"),)

    def batch(sequence: int, value: float) -> telemetry_pb2.Batch:
        return telemetry_pb2.Batch(
            sequence=sequence, machine_id=machine["id"], times_us=[start * 1_000_000], values=[value, value, value]
        )

    async with grpc.aio.insecure_channel(plant.hub.processes["door"].grpc) as channel:
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        for one in (batch(7, 1.0), batch(8, 2.0), batch(7, 1.0)):
            answer = await stub.SendBatches(
                telemetry_pb2.SendBatchesRequest(source="again", batches=[one]), metadata=stub_metadata
            )
            assert answer.results[0].accepted == 3

    async def corrected() -> bool:
        lag = await plant.database.fetchval("SELECT max(sequence) FROM ingest.source_head WHERE source = 'again'")
        return lag == 8 and bool(await plant.frames(machine["id"]))

    await eventually(corrected)
    assert await plant.frames(machine["id"]) == [(start, [2.0, 2.0, 2.0])]


async def test_what_cannot_be_stored_is_quarantined_with_a_reason_and_the_rest_is_stored(plant: Plant) -> None:
    machine = await plant.new_machine("mixed-1")
    now_ms = two_hours_ago_s() * 1000
    body = {
        "source": "mixed",
        "batches": [
            {
                "machine": machine["path"],
                "frames": [
                    {"ts": now_ms, "values": {"temperature": 20.5, "current": None, "vibration": 3}},
                    {"ts": now_ms + 1000, "values": {"temperature": 900, "current": 1.5}},
                    {"ts": 253_402_300_000_000, "values": {"temperature": 21}},
                ],
            },
            {"machine": "acme/leeds/nowhere", "frames": [{"ts": now_ms, "values": {"temperature": 1}}]},
        ],
    }
    answer = await plant.http.post("/v1/telemetry", json=body)
    assert answer.status_code == 200
    assert answer.json()["accepted"] == 2
    assert answer.json()["quarantined"] == 4
    reasons = {p["reason"]: p["samples"] for r in answer.json()["results"] for p in r["problems"]}
    assert reasons == {"UNKNOWN_SIGNAL": 1, "TIME_OUT_OF_WINDOW": 1, "OUT_OF_RANGE": 1, "UNKNOWN_MACHINE": 1}

    async def there() -> bool:
        items = [item for reason in reasons for item in await plant.quarantined(reason)]
        return {item["reason"]: item["samples"] for item in items if item["source"] == "mixed"} == reasons

    await eventually(there)

    async def stored() -> bool:
        return await plant.frames(machine["id"]) == [
            (now_ms // 1000, [20.5, None, None]),
            (now_ms // 1000 + 1, [None, 1.5, None]),
        ]

    await eventually(stored)
    # Mended and sent again: the machine gets the signal, the item is replayed.
    await plant.operator.post(f"/v1/machines/{machine['id']}/signals", json={"signals": [{"name": "vibration"}]})
    (item,) = [i for i in await plant.quarantined("UNKNOWN_SIGNAL") if i["source"] == "mixed"]
    replay = await plant.operator.post(f"/v1/quarantine/{item['id']}/replay", json={})
    assert replay.json() == {"accepted": 1, "quarantined": 0}
    again = await plant.operator.post(f"/v1/quarantine/{item['id']}/replay", json={})
    assert (again.status_code, again.json()["reason"]) == (409, "ALREADY_REPLAYED")

    async def vibration_stored() -> bool:
        return (await plant.frames(machine["id"]))[0][1] == [20.5, None, None, 3.0]

    await eventually(vibration_stored)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "MALFORMED"),
        (b"[]", 400, "MALFORMED"),
        (b'{"batches": []}', 400, "EMPTY_BATCH"),
        (b'{"batches": [{"machine": "acme/leeds/press-1", "frames": []}]}', 422, "EMPTY_BATCH"),
        (
            b'{"batches": [{"machine": "acme/leeds/press-1", "frames": [{"ts": 1, "values": {"current": "hot"}}]}]}',
            422,
            "WRONG_TYPE",
        ),
        (
            b'{"batches": [{"machine": "acme/leeds/press-1", "frames": [{"ts": 1, "values": {"current": NaN}}]}]}',
            400,
            "MALFORMED",
        ),
        (
            b'{"batches": [{"machine": "acme/leeds/press-1", "frames": [{"ts": 1, "values": {"a\\u0000b": "hot"}}]}]}',
            422,
            "WRONG_TYPE",
        ),
        (b'{"batches": [{"machine": 0, "frames": [{"ts": "soon", "values": {"current": 1}}]}]}', 422, "WRONG_TYPE"),
        (
            b'{"batches": [{"machine": "acme/leeds/press-1", "frames": [{"ts": 1, "values": {"current": 1}}]}]}',
            422,
            "TIME_OUT_OF_WINDOW",
        ),
        (b" " * 50_000_000, 413, "TOO_LARGE"),
    ],
)
async def test_bad_input_at_the_http_door_gets_a_reason_and_stands_in_quarantine(
    plant: Plant, body: bytes, status: int, reason: str
) -> None:
    answer = await plant.http.post("/v1/telemetry", content=body)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason)

    async def there() -> bool:
        return bool(await plant.quarantined(reason))

    await eventually(there)


async def test_one_machines_bad_json_keeps_nothing_of_the_others_back(plant: Plant) -> None:
    good, torn = await plant.new_machine("json-good"), await plant.new_machine("json-torn")
    at = two_hours_ago_s() * 1_000
    batches: list[Any] = [
        {"machine": good["path"], "sequence": 1, "frames": [{"ts": at, "values": {"temperature": 1, "current": 2}}]},
        {
            "machine": torn["id"],
            "sequence": 2,
            "frames": [
                {"ts": at, "values": {"temperature": 1.5, "current": "hot", "speed": [1]}},
                {"ts": "soon", "values": {"temperature": 3, "speed": 4, "current": None}},
                {"ts": at + 2_000, "values": {"current": 5.5}},
            ],
        },
        "no object",
        {"machine": "acme/leeds/nobody", "sequence": 4, "frames": [{"ts": at, "values": {"a": 1}}]},
        {"machine": good["path"], "sequence": 5, "frames": [{"ts": at + 1_000, "values": {"speed": 3}}]},
    ]
    answer = (await plant.http.post("/v1/telemetry", json={"source": "torn", "batches": batches})).json()
    assert (answer["accepted"], answer["quarantined"]) == (5, 5)
    told = [
        (one["sequence"], one["accepted"], [(p["reason"], p["samples"]) for p in one["problems"]])
        for one in answer["results"]
    ]
    assert told == [
        (1, 2, []),
        (2, 2, [("WRONG_TYPE", 4)]),
        (0, 0, [("WRONG_TYPE", 0)]),
        (4, 0, [("UNKNOWN_MACHINE", 1)]),
        (5, 1, []),
    ]

    async def all_there() -> bool:
        items = [item for item in await plant.quarantined("WRONG_TYPE") if item["source"] == "torn"]
        rows = [(await plant.frames(machine["id"])) for machine in (good, torn)]
        return list(map(len, rows)) == [2, 2] and sorted(item["samples"] for item in items) == [0, 4]

    await eventually(all_there)
    assert [values for _, values in await plant.frames(torn["id"])] == [[1.5, None, None], [None, 5.5, None]]


async def test_wrong_keys_are_refused_at_every_door(plant: Plant) -> None:
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic eDp5"}):
        async with httpx.AsyncClient(base_url=plant.hub.processes["door"].http, headers=header) as stranger:
            for answer in (await stranger.post("/v1/telemetry", content=b"{}"), await stranger.get("/v1/quarantine")):
                assert (answer.status_code, answer.json()["reason"]) == (401, "UNAUTHENTICATED")

    async def send_with_wrong_key() -> None:
        async with TelemetryClient(plant.hub.processes["door"].grpc, "wrong", source="stranger") as client:
            await client.send(plant.machine["path"], [0], [[1.0, 2.0, 3.0]])

    with pytest.raises(Refused, match="UNAUTHENTICATED"):
        await send_with_wrong_key()


async def test_a_malformed_grpc_body_is_refused_and_stands_in_quarantine(plant: Plant) -> None:
    async with grpc.aio.insecure_channel(plant.hub.processes["door"].grpc) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(
            "/smdih.ingest.v1.TelemetryService/SendBatches"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\xff\xff\xff", metadata=(("authorization", f"Bearer {plant.device_key}"),))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["reason"] == "MALFORMED"

    async def there() -> bool:
        return any(item["door"] == "grpc" for item in await plant.quarantined("MALFORMED"))

    await eventually(there)


async def test_nan_over_grpc_is_quarantined_and_the_rest_stored(plant: Plant) -> None:
    machine = await plant.new_machine("nan-1")
    start = two_hours_ago_s() * 1_000_000
    batch = telemetry_pb2.Batch(machine_id=machine["id"], times_us=[start], values=[1.0, float("nan"), float("inf")])
    async with grpc.aio.insecure_channel(plant.hub.processes["door"].grpc) as channel:
        answer = await telemetry_pb2_grpc.TelemetryServiceStub(channel).SendBatches(
            telemetry_pb2.SendBatchesRequest(batches=[batch]),
            metadata=(("authorization", f"Bearer {plant.device_key}"),),
        )
    (result,) = answer.results
    assert (result.accepted, result.quarantined, result.problems[0].reason) == (1, 2, "NOT_FINITE")


async def test_a_machine_with_more_signals_than_a_row_holds_is_stored_in_groups(plant: Plant) -> None:
    machine = await plant.new_machine("wide-1", [{"name": f"s{n}"} for n in range(450)])
    start = two_hours_ago_s()
    values = np.arange(900, dtype=float).reshape(2, 450)
    async with plant.client("wide") as client:
        await client.send(machine["id"], [start * 1_000_000, (start + 1) * 1_000_000], values)

    async def stored() -> bool:
        return len(await plant.frames(machine["id"])) == 6

    await eventually(stored)
    latest = (await plant.http.get(f"/v1/machines/{machine['id']}/latest")).json()["values"]
    assert [one["value"] for one in latest] == values[1].tolist()


async def test_another_firms_things_do_not_exist_for_a_key(plant: Plant) -> None:
    body = {"name": "Other", "slug": "other", "sic": "10.11", "region": "London", "size": "micro"}
    other = (await plant.operator.post("/v1/firms", json=body)).json()
    key = (await plant.operator.post("/v1/credentials", json={"role": "firm", "firm_id": other["id"]})).json()["key"]
    async with httpx.AsyncClient(
        base_url=plant.hub.processes["door"].http, headers={"Authorization": f"Bearer {key}"}
    ) as stranger:
        machine, signal = plant.machine["id"], plant.machine["signals"][0]["id"]
        for answer in (
            await stranger.get(f"/v1/machines/{machine}"),
            await stranger.get(f"/v1/machines/{machine}/latest"),
            await stranger.get(f"/v1/signals/{signal}/history", params={"from_us": 0, "to_us": 1}),
            await stranger.post(f"/v1/machines/{machine}/signals", json={"signals": [{"name": "x"}]}),
        ):
            assert (answer.status_code, answer.json()["reason"]) == (404, "NOT_FOUND")
        assert (await stranger.get("/v1/quarantine")).json()["items"] == []
        sent = await stranger.post(
            "/v1/telemetry",
            json={
                "batches": [
                    {"machine": machine, "frames": [{"ts": two_hours_ago_s() * 1000, "values": {"current": 1}}]}
                ]
            },
        )
        assert (sent.status_code, sent.json()["reason"]) == (422, "UNKNOWN_MACHINE")
        assert (await stranger.post("/v1/firms", json=body)).status_code == 403


async def test_registering_the_same_twice_makes_it_once_and_something_else_of_that_name_is_refused(
    plant: Plant,
) -> None:
    one = await plant.new_machine("twice-1")
    assert await plant.new_machine("twice-1") == one
    body = {"site_id": plant.site["id"], "path": "twice-1", "name": "another", "kind": "press"}
    answer = await plant.operator.post("/v1/machines", json=body)
    assert (answer.status_code, answer.json()["reason"]) == (409, "ALREADY_EXISTS")
    for kind, same, other in (
        ("partners", {"name": "Centre", "region": "Wales"}, {"region": "London"}),
        ("sites", {"firm_id": plant.firm["id"], "slug": "hull", "name": "Hull"}, {"name": "Kingston upon Hull"}),
        ("firms", {"name": "B", "slug": "b", "sic": "10.11", "region": "Wales", "size": "micro"}, {"size": "large"}),
    ):
        first, again = [(await plant.operator.post(f"/v1/{kind}", json=same)).json() for _ in range(2)]
        assert first == again
        answer = await plant.operator.post(f"/v1/{kind}", json=same | other)
        assert (answer.status_code, answer.json()["reason"]) == (409, "ALREADY_EXISTS")
    for path in ("Twice", "a/b/c/d/e", "", "x//y", "-x"):
        answer = await plant.operator.post("/v1/machines", json=body | {"path": path})
        assert (answer.status_code, answer.json()["reason"]) == (400, "BAD_NAME")


async def test_a_revoked_key_stops_working(plant: Plant) -> None:
    made = (await plant.operator.post("/v1/credentials", json={"role": "device", "firm_id": plant.firm["id"]})).json()
    async with httpx.AsyncClient(
        base_url=plant.hub.processes["door"].http, headers={"Authorization": f"Bearer {made['key']}"}
    ) as device:
        assert (await device.get("/v1/quarantine")).status_code == 200
        assert (await plant.operator.delete(f"/v1/credentials/{made['id']}")).status_code == 204

        async def refused() -> bool:
            return (await device.get("/v1/quarantine")).status_code == 401

        await eventually(refused)
    stored = await plant.database.fetchval(
        "SELECT count(*) FROM ingest.credential WHERE position($1::bytea IN sha256) > 0", b"smdih"
    )
    assert stored == 0


async def test_the_samples_view_shows_a_firm_its_own_samples_only(plant: Plant) -> None:
    async with plant.database.acquire() as connection, connection.transaction():
        assert await connection.fetchval("SELECT count(*) FROM ingest.samples") == 0
        await connection.execute("SELECT set_config('smdih.firm_id', $1, true)", str(plant.firm["id"]))
        signal = plant.machine["signals"][0]["id"]
        assert await connection.fetchval("SELECT count(*) FROM ingest.samples WHERE signal_id = $1", signal) == 0
        assert await connection.fetchval("SELECT count(*) FROM ingest.samples") > 0
        await connection.execute("SELECT set_config('smdih.firm_id', '999999', true)")
        assert await connection.fetchval("SELECT count(*) FROM ingest.samples") == 0


async def test_every_process_answers_its_probes(plant: Plant) -> None:
    for running in plant.hub.processes.values():
        async with httpx.AsyncClient(base_url=running.http) as client:
            assert (await client.get("/livez")).status_code == 200
            assert (await client.get("/readyz")).status_code == 200
            assert "smdih_" in (await client.get("/metrics")).text


@dataclass
class _Gateway:
    """buffered_gateway as a process."""

    process: asyncio.subprocess.Process

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 60)).decode().strip()

    async def kill_after(self, number: int) -> int:
        """SIGKILL once it has said that this batch is kept; the number of the last one that it said."""
        while int(last := await self.line()) < number:
            pass
        self.process.kill()
        await self.process.wait()
        while said := await self.line():
            last = said
        return int(last)


async def test_a_gateway_cut_off_and_killed_twice_delivers_everything_once_and_in_order(
    plant: Plant, tmp_path: Path
) -> None:
    machine, start = await plant.new_machine("buffered-1"), two_hours_ago_s()
    target = plant.hub.processes["door"].grpc

    async def gateway(where: str, first: int, end: int) -> _Gateway:
        arguments = (where, machine["path"], str(tmp_path / "buffer"), str(first), str(end), str(start))
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration.buffered_gateway", *arguments),
            env=os.environ | {"SMDIH_KEY": plant.device_key, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=asyncio.subprocess.PIPE,
        )
        return _Gateway(process)

    # Nobody listens: it is cut off from its first batch on, and killed.
    last = await (await gateway(f"127.0.0.1:{free_port()}", 0, 10_000)).kill_after(150)
    assert await plant.frames(machine["id"]) == []
    # Killed again while it sends the backlog (which takes it more than a second).
    second = await gateway(target, last + 1, 10_000)
    last = await second.kill_after(last + 50)
    end = last + 100
    third = await gateway(target, last + 1, end)
    for number in range(last + 1, end):
        assert await third.line() == str(number)
        if number == last + 20:
            plant.hub.kill("door")
    word, sent, quarantined = (await third.line()).split()
    assert (word, quarantined, await third.process.wait()) == ("flushed", "0", 0)
    assert int(sent) < end * ROWS * 3, "what was acknowledged before the second kill is not sent again"
    expected = [(start + n * ROWS + row, v) for n in range(end) for row, v in enumerate(values(n).tolist())]

    async def stored() -> bool:
        return len(await plant.frames(machine["id"])) >= len(expected)

    await eventually(stored, deadline_s=40)
    assert await plant.frames(machine["id"]) == expected
    # Opened once more there is nothing left to send.
    async with TelemetryClient(
        target, plant.device_key, source="gateway-buffered", buffer=tmp_path / "buffer"
    ) as client:
        await client.flush()
        assert client.totals.sent == 0
