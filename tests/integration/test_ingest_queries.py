"""Buckets, plots and files of stored data, by HTTP and gRPC."""

import csv
import gzip
import io
import zlib
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.clock import to_us
from services.common.settings import Settings
from services.ingest.queries.lttb import chosen
from smdih.ingest.v1 import query_pb2, series_pb2, series_pb2_grpc
from smdih_client.recording import read as read_recording
from tests.integration.stored_plant import StoredPlant, stored_plant
from tests.polling import eventually

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

START_US = 1_760_000_040 * 1_000_000  # on a minute, not on an hour
FIGURES = ("count", "mean", "min", "max", "last")
MEGABYTE = 1024 * 1024
# While millions of samples leave, the door grows by no more than this; Parquet brings its library with it.
CSV_GROWTH_BYTES_MAX = 60 * MEGABYTE
PARQUET_GROWTH_BYTES_MAX = 160 * MEGABYTE


class Stored:
    """What stands in the database: a machine of three signals over three hours, a wide one, and a long one."""

    def __init__(self, plant: StoredPlant) -> None:
        self.plant = plant
        rng = np.random.default_rng(4)
        # A second apart, with half an hour of nothing and a tenth of the values missing; the last hour is still open.
        seconds = np.concatenate([np.arange(0, 4_000), np.arange(5_800, 10_900)])
        self.times = START_US + seconds * 1_000_000 + rng.integers(0, 900_000, len(seconds))
        self.values = rng.normal(20, 3, (len(seconds), 3))
        self.values[rng.random(self.values.shape) < 0.1] = np.nan
        self.wide_times = START_US + np.arange(0, 300) * 7_000_000
        self.wide_values = rng.normal(0, 1, (300, 230))
        # Three million samples.
        self.long_times = START_US + np.arange(150_000) * 1_000_000
        self.long_values = rng.normal(100, 30, (150_000, 20)).round(3)
        self.long_values[::7, 3] = np.nan
        self.machine: dict[str, Any] = {}
        self.wide: dict[str, Any] = {}
        self.long: dict[str, Any] = {}

    async def fill(self) -> None:
        plant = self.plant
        self.machine = await plant.machine("press-1", [{"name": name} for name in ("temp", "current, A", "speed")])
        self.wide = await plant.machine("wide-1", [{"name": f"s{n}"} for n in range(230)])
        self.long = await plant.machine("long-1", [{"name": f"c{n}"} for n in range(20)])
        await plant.store(self.machine, self.times, self.values)
        await plant.store(self.wide, self.wide_times, self.wide_values)
        await plant.store(self.long, self.long_times, self.long_values, rollups=False)

    @property
    def signals(self) -> list[int]:
        return [signal["id"] for signal in self.machine["signals"]]

    def range(self, **more: Any) -> dict[str, Any]:
        return {"from_us": START_US, "to_us": START_US + 4 * 3600 * 1_000_000, **more}


@pytest_asyncio.fixture(scope="module")
async def stored(
    servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Stored]:
    async with stored_plant(servers, settings, Path(tmp_path_factory.mktemp("hub"))) as plant:
        made = Stored(plant)
        await made.fill()
        yield made


def _expected(times: Ints, column: Floats, width_s: int) -> dict[int, Floats]:
    some = ~np.isnan(column)
    numbers = times[some] // (width_s * 1_000_000)
    return {int(n) * width_s * 1_000_000: column[some][numbers == n] for n in np.unique(numbers)}


@pytest.mark.parametrize(
    ("width_s", "resolution"),
    [
        (2, "raw"),
        (7, "raw"),
        (59, "raw"),
        (60, "minute"),
        (420, "minute"),
        (5400, "minute"),
        (3600, "hour"),
        (7200, "hour"),
    ],
)
async def test_buckets_of_any_width_are_those_of_the_samples(stored: Stored, width_s: int, resolution: str) -> None:
    wanted = [stored.wide["signals"][n]["id"] for n in (229, 0)] + stored.signals
    answer = await stored.plant.http.get("/v1/buckets", params=stored.range(signal_id=wanted, width_s=width_s))
    found = answer.json()
    assert (answer.status_code, found["resolution"]) == (200, resolution), answer.text
    columns = [(stored.wide_times, stored.wide_values[:, n]) for n in (229, 0)]
    columns += [(stored.times, stored.values[:, n]) for n in range(3)]
    for one, signal_id, (times, column) in zip(found["series"], wanted, columns, strict=True):
        expected = _expected(times, column, width_s)
        assert one["signal_id"] == signal_id
        assert one["times_us"] == list(expected)
        assert one["counts"] == [len(e) for e in expected.values()]
        np.testing.assert_allclose(one["sums"], [e.sum() for e in expected.values()])
        np.testing.assert_allclose(one["means"], [e.mean() for e in expected.values()])
        assert one["mins"] == [e.min() for e in expected.values()]
        assert one["maxs"] == [e.max() for e in expected.values()]
        assert one["lasts"] == [e[-1] for e in expected.values()]


async def test_empty_buckets_are_listed_or_carry_the_last_value_as_asked(stored: Stored) -> None:
    params = stored.range(signal_id=stored.signals[0], width_s=300)
    plain, empty, carried = [
        (await stored.plant.http.get("/v1/buckets", params=params | {"fill": fill})).json()
        for fill in ("none", "empty", "locf")
    ]
    # The range begins a minute after five: it is widened to whole buckets.
    assert (empty["from_us"], empty["to_us"]) == (START_US - 240_000_000, START_US + (4 * 3600 + 60) * 1_000_000)
    whole = list(range(empty["from_us"], empty["to_us"], 300_000_000))
    for found in (empty, carried):
        assert found["series"][0]["times_us"] == whole
    filled = plain["series"][0]
    by_time = {
        time_us: (count, mean, last)
        for time_us, count, mean, last in zip(
            filled["times_us"], filled["counts"], filled["means"], filled["lasts"], strict=True
        )
    }
    last = None
    for number, time_us in enumerate(whole):
        counts, means, lasts = (
            [f["series"][0][k][number] for f in (empty, carried)] for k in ("counts", "means", "lasts")
        )
        if time_us in by_time:
            count, mean, last = by_time[time_us]
            assert (counts, means, lasts) == ([count] * 2, [mean] * 2, [last] * 2)
        else:
            assert (counts, means, lasts) == ([0, 0], [None, last], [None, last])
    assert len(by_time) < len(whole)


async def test_a_plot_shows_chosen_samples_of_a_short_range_and_extremes_of_a_long_one(stored: Stored) -> None:
    some = ~np.isnan(stored.values[:, 0])
    times, column = stored.times[some], stored.values[:, 0][some]
    answer = await stored.plant.http.get("/v1/plot", params=stored.range(signal_id=stored.signals, points=200))
    found = answer.json()
    which = chosen(times, column, 200)
    assert found["resolution"] == "raw"
    assert found["series"][0]["times_us"] == times[which].tolist()
    assert found["series"][0]["values"] == column[which].tolist()
    assert all(len(one["times_us"]) == 200 for one in found["series"])
    # So few points that minutes have enough to choose from; whole minutes only.
    found = (await stored.plant.http.get("/v1/plot", params=stored.range(signal_id=stored.signals, points=20))).json()
    assert found["resolution"] == "minute"
    first = found["series"][0]
    assert len(first["values"]) == 20
    assert set(first["values"]) <= set(column)
    found = (await stored.plant.http.get("/v1/plot", params=stored.range(signal_id=stored.signals, points=3))).json()
    assert found["resolution"] == "minute"
    nothing = {"signal_id": stored.signals[0], "from_us": 0, "to_us": START_US - 1}
    found = (await stored.plant.http.get("/v1/plot", params=nothing)).json()
    assert found["series"][0]["values"] == []


async def test_a_plot_of_a_time_whose_samples_are_gone_shows_its_minutes_or_hours(stored: Stored) -> None:
    plant = stored.plant
    machine = await plant.machine("removed-1", [{"name": "a"}])
    hour_us = START_US // 3_600_000_000 * 3_600_000_000
    times = hour_us + np.arange(4 * 360) * 10_000_000
    values = np.random.default_rng(1).normal(5, 1, (len(times), 1))
    await plant.store(machine, times, values)
    asked = {"signal_id": machine["signals"][0]["id"], "from_us": hour_us, "to_us": hour_us + 7_200_000_000}

    async def plot() -> tuple[str, list[float]]:
        found = (await plant.http.get("/v1/plot", params=asked)).json()
        return found["resolution"], found["series"][0]["values"]

    assert (await plot())[0] == "raw"
    for table, resolution in (("frame", "minute"), ("rollup_1m", "hour")):
        query = f"DELETE FROM {table} WHERE machine_id = $1 AND ts < to_timestamp($2)"
        await plant.database.execute(query, machine["id"], hour_us / 1e6 + 10_800)
        shown, points = await plot()
        assert (shown, max(points)) == (resolution, values[:720].max())


async def test_the_newest_value_of_a_signal_that_is_seldom_sent_is_found_behind_many_frames(stored: Stored) -> None:
    plant = stored.plant
    names = ["always", "this-minute", "this-hour", "days-ago", "never"]
    machine = await plant.machine("acme/one/changes-1", [{"name": name} for name in names])
    hour_us = START_US // 3_600_000_000 * 3_600_000_000
    old = hour_us - 3 * 86_400_000_000 + np.arange(600) * 10_000_000
    new = hour_us + np.arange(12_400) * 100_000  # 10 Hz, until 40 s into the 21st minute
    times = np.concatenate([old, new])
    values = np.full((len(times), 5), np.nan)
    values[:, 0] = np.arange(len(times))
    seldom = {"this-minute": len(times) - 350, "this-hour": len(times) - 6_000, "days-ago": 407}
    for name, row in seldom.items():
        values[row, names.index(name)] = row
    await plant.store(machine, times, values)

    async def latest() -> dict[str, tuple[int, float]]:
        answer = await plant.http.get(f"/v1/machines/{machine['id']}/latest")
        return {one["name"]: (one["time_us"], one["value"]) for one in answer.json()["values"]}

    expected = {name: (int(times[row]), float(row)) for name, row in seldom.items()}
    assert await latest() == expected | {"always": (int(times[-1]), len(times) - 1.0)}
    # Again, now that it is known of one that it was never sent.
    assert await latest() == expected | {"always": (int(times[-1]), len(times) - 1.0)}
    found = (await plant.http.get(f"/v1/machines/{machine['id']}/diagnosis")).json()["signals"]
    assert {one["name"] for one in found if one["last_us"]} == set(expected) | {"always"}
    # Where samples, then minutes, are kept no longer: the time is right to the bucket.
    for table, width_us in (("frame", 60_000_000), ("rollup_1m", 3_600_000_000)):
        query = f"DELETE FROM {table} WHERE machine_id = $1 AND ts < to_timestamp($2)"
        await plant.database.execute(query, machine["id"], hour_us / 1e6)
        at_us = expected["days-ago"][0] // width_us * width_us
        assert (await latest())["days-ago"] == (at_us, 407.0)


async def test_grpc_answers_the_same(stored: Stored) -> None:
    metadata = (("authorization", f"Bearer {stored.plant.firm_key}"),)
    times: dict[str, Any] = {"from_us": START_US, "to_us": START_US + 4 * 3600 * 1_000_000}
    async with grpc.aio.insecure_channel(stored.plant.hub.processes["door"].grpc) as channel:
        stub = series_pb2_grpc.SeriesServiceStub(channel)
        buckets = await stub.ListBuckets(
            series_pb2.ListBucketsRequest(signal_ids=stored.signals, width_s=600, fill=series_pb2.FILL_EMPTY, **times),
            metadata=metadata,
        )
        plot = await stub.Plot(series_pb2.PlotRequest(signal_ids=stored.signals, points=50, **times), metadata=metadata)
        for format_, suffix in (
            (series_pb2.EXPORT_FORMAT_UNSPECIFIED, {}),
            (series_pb2.EXPORT_FORMAT_CSV_GZIP, {"gzip": True}),
            (series_pb2.EXPORT_FORMAT_PARQUET, {"format": "parquet"}),
            (series_pb2.EXPORT_FORMAT_CSV, {"resolution": "minute"}),
        ):
            resolution = query_pb2.RESOLUTION_MINUTE if "resolution" in suffix else query_pb2.RESOLUTION_UNSPECIFIED
            request = series_pb2.ExportRequest(
                machine_id=stored.machine["id"], format=format_, resolution=resolution, **times
            )
            data = b"".join([part.data async for part in stub.Export(request, metadata=metadata)])
            answer = await stored.plant.http.get(
                "/v1/export", params=stored.range(machine_id=stored.machine["id"], **suffix)
            )
            assert data == answer.content
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Export(series_pb2.ExportRequest(machine_id=10**9, **times), metadata=metadata).read()
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    http = stored.plant.http
    same = (
        await http.get("/v1/buckets", params=stored.range(signal_id=stored.signals, width_s=600, fill="empty"))
    ).json()
    assert buckets.resolution == same["resolution"]
    for one, other in zip(buckets.series, same["series"], strict=True):
        assert list(one.times_us) == other["times_us"]
        np.testing.assert_array_equal(one.means, np.array(other["means"], dtype=float))
    same = (await http.get("/v1/plot", params=stored.range(signal_id=stored.signals, points=50))).json()
    assert [list(one.values) for one in plot.series] == [one["values"] for one in same["series"]]


def _cells(text: str) -> tuple[list[str], list[list[str]]]:
    head, *rows = csv.reader(io.StringIO(text))
    return head, rows


def _us(text: str) -> int:
    return to_us(datetime.fromisoformat(text))


async def test_a_csv_file_holds_every_sample_once_in_order_and_can_be_continued(stored: Stored, tmp_path: Path) -> None:
    http, machine_id = stored.plant.http, stored.machine["id"]
    answer = await http.get("/v1/export", params=stored.range(machine_id=machine_id))
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="samples.csv"'
    head, rows = _cells(answer.text)
    assert head == ["time", "temp", "current, A", "speed"]
    some = ~np.isnan(stored.values).all(axis=1)
    assert [_us(row[0]) for row in rows] == stored.times[some].tolist()
    found = np.array([[float(cell) if cell else np.nan for cell in row[1:]] for row in rows])
    np.testing.assert_array_equal(found, stored.values[some])
    # The client that sends recordings reads it as it is.
    (tmp_path / "samples.csv").write_text(answer.text)
    recording = read_recording(tmp_path / "samples.csv")
    assert (recording.names, recording.refused) == (("temp", "current, A", "speed"), 0)
    assert recording.times_us.tolist() == stored.times[some].tolist()
    np.testing.assert_array_equal(recording.values, stored.values[some])
    # Broken off after some line, continued, packed.
    lines = answer.text.splitlines(keepends=True)[:1234]
    rest = await http.get(
        "/v1/export",
        params=stored.range(machine_id=machine_id, header=False, gzip=True)
        | {"from_us": _us(lines[-1].split(",")[0]) + 1},
    )
    assert rest.headers["content-type"] == "application/gzip"
    assert "".join(lines) + gzip.decompress(rest.content).decode() == answer.text
    narrow = await http.get("/v1/export", params=stored.range(signal_id=stored.signals[1:], layout="narrow"))
    head, rows = _cells(narrow.text)
    assert head == ["time", "signal", "value"]
    expected = [
        [t, name, v]
        for t, row in zip(stored.times.tolist(), stored.values.tolist(), strict=True)
        for name, v in zip(("current, A", "speed"), row[1:], strict=True)
        if v == v
    ]
    assert [[_us(time), name, float(value)] for time, name, value in rows] == expected
    empty = await http.get("/v1/export", params={"machine_id": machine_id, "from_us": 0, "to_us": 1})
    assert empty.text == 'time,temp,"current, A",speed\n'
    empty = await http.get("/v1/export", params={"machine_id": machine_id, "from_us": 0, "to_us": 1, "header": False})
    assert (empty.status_code, empty.content) == (200, b"")


async def test_machines_with_clocks_of_their_own_are_merged_by_time(stored: Stored) -> None:
    wanted = [stored.signals[2], stored.wide["signals"][229]["id"], stored.wide["signals"][0]["id"]]
    answer = await stored.plant.http.get("/v1/export", params=stored.range(signal_id=wanted))
    head, rows = _cells(answer.text)
    assert head == ["time", "acme/derry/press-1/speed", "acme/derry/wide-1/s229", "acme/derry/wide-1/s0"]
    expected: dict[int, list[float]] = {}
    for column, (times, values) in enumerate(
        (
            (stored.times, stored.values[:, 2]),
            (stored.wide_times, stored.wide_values[:, 229]),
            (stored.wide_times, stored.wide_values[:, 0]),
        )
    ):
        for t, v in zip(times.tolist(), values.tolist(), strict=True):
            if v == v:
                expected.setdefault(t, [np.nan] * 3)[column] = v
    assert [_us(row[0]) for row in rows] == sorted(expected)
    found = np.array([[float(cell) if cell else np.nan for cell in row[1:]] for row in rows])
    np.testing.assert_array_equal(found, np.array([expected[t] for t in sorted(expected)]))


@pytest.mark.parametrize(("resolution", "width_s"), [("minute", 60), ("hour", 3600)])
async def test_stored_buckets_leave_as_files_too(stored: Stored, resolution: str, width_s: int) -> None:
    wanted = [stored.signals[0], stored.wide["signals"][229]["id"]]
    odd = {"from_us": START_US + 61_000_000, "to_us": START_US + 3 * 3600 * 1_000_000 + 1}
    answer = await stored.plant.http.get("/v1/export", params={"signal_id": wanted, "resolution": resolution, **odd})
    head, rows = _cells(answer.text)
    names = [f"{name} {figure}" for name in ("acme/derry/press-1/temp", "acme/derry/wide-1/s229") for figure in FIGURES]
    assert head == ["time", *names]
    found = (
        await stored.plant.http.get("/v1/buckets", params={"signal_id": wanted, "width_s": width_s, **odd})
    ).json()["series"]
    expected: dict[int, list[float | None]] = {}
    for number, one in enumerate(found):
        for at, *figures in zip(one["times_us"], *(one[f"{figure}s"] for figure in FIGURES), strict=True):
            expected.setdefault(at, [None] * 10)[5 * number : 5 * number + 5] = figures
    assert [_us(row[0]) for row in rows] == sorted(expected)
    assert [[float(cell) if cell else None for cell in row[1:]] for row in rows] == [
        expected[at] for at in sorted(expected)
    ]
    assert len(rows) > 2
    parquet = await stored.plant.http.get(
        "/v1/export", params={"signal_id": wanted, "resolution": resolution, "format": "parquet", **odd}
    )
    table = pq.read_table(io.BytesIO(parquet.content))
    assert table.num_rows == len(rows)
    assert table.column_names == ["time", *names]


async def test_millions_of_samples_leave_in_constant_memory_and_parquet_equals_the_database(
    stored: Stored, tmp_path: Path
) -> None:
    plant, most = stored.plant, 0
    wanted = {"machine_id": stored.long["id"], "from_us": 0, "to_us": START_US * 2}

    async def download(into: Path, **more: Any) -> int:
        nonlocal most
        before = most = plant.memory_bytes()
        with into.open("wb") as file:
            async with plant.http.stream("GET", "/v1/export", params=wanted | more) as answer:
                assert answer.status_code == 200
                async for chunk in answer.aiter_raw():
                    file.write(chunk)
                    most = max(most, plant.memory_bytes())
        return most - before

    for layout in ("wide", "narrow"):
        grown = await download(tmp_path / "samples.csv", layout=layout)
        print(layout, "csv", grown / MEGABYTE, "MB")
        assert grown < CSV_GROWTH_BYTES_MAX
    with (tmp_path / "samples.csv").open() as file:
        assert sum(1 for _ in file) - 1 == np.count_nonzero(~np.isnan(stored.long_values))
    for layout in ("wide", "narrow"):
        grown = await download(tmp_path / f"{layout}.parquet", format="parquet", layout=layout)
        print(layout, "parquet", grown / MEGABYTE, "MB")
        assert grown < PARQUET_GROWTH_BYTES_MAX
    table = pq.read_table(tmp_path / "wide.parquet")
    assert table.column_names == ["time", *(f"c{n}" for n in range(20))]
    assert str(table.schema.field("time").type) == "timestamp[us, tz=UTC]"
    assert table["time"].cast("int64").to_numpy().tolist() == stored.long_times.tolist()
    for n in range(20):
        np.testing.assert_array_equal(table[f"c{n}"].to_numpy(zero_copy_only=False), stored.long_values[:, n])
    assert table["c3"].null_count == int(np.isnan(stored.long_values[:, 3]).sum())
    narrow = pq.read_table(tmp_path / "narrow.parquet")
    assert narrow.num_rows == np.count_nonzero(~np.isnan(stored.long_values))
    np.testing.assert_array_equal(narrow["value"].to_numpy(), stored.long_values[~np.isnan(stored.long_values)])


async def test_a_machine_of_more_than_a_thousand_signals_leaves_whole(stored: Stored) -> None:
    plant, width = stored.plant, 1_201
    machine = await plant.machine("acme/one/many-1", [{"name": f"s{n}"} for n in range(width)])
    times = START_US // 60_000_000 * 60_000_000 + np.arange(130) * 60_000_000
    values = np.arange(130.0 * width).reshape(130, width)
    await plant.store(machine, times, values)
    wanted = {"machine_id": machine["id"], "from_us": 0, "to_us": START_US * 2}
    rows = list(csv.reader(io.StringIO((await plant.http.get("/v1/export", params=wanted)).text)))
    assert rows[0] == ["time", *(f"s{n}" for n in range(width))]
    assert np.array_equal(np.array([row[1:] for row in rows[1:]], dtype=float), values)
    answer = await plant.http.get("/v1/export", params={**wanted, "format": "parquet", "layout": "narrow"})
    assert np.array_equal(pq.read_table(io.BytesIO(answer.content))["value"].to_numpy(), values.ravel())
    minutes = await plant.http.get("/v1/export", params={**wanted, "resolution": "minute"})
    counts = [row[1::5] for row in csv.reader(io.StringIO(minutes.text))][1:]
    assert counts == [["1.0"] * width] * 130
    refused = await plant.http.get("/v1/export", params={**wanted, "format": "parquet"})
    assert refused.status_code == 400
    assert "layout=narrow" in refused.json()["detail"]
    five_each = {**wanted, "machine_id": stored.wide["id"], "format": "parquet", "resolution": "minute"}
    refused = await plant.http.get("/v1/export", params=five_each)
    assert refused.status_code == 400
    assert "1150 columns" in refused.json()["detail"]


async def test_a_file_whose_database_goes_away_is_seen_to_be_broken(stored: Stored) -> None:
    wanted = {"machine_id": stored.long["id"], "from_us": 0, "to_us": START_US * 2, "layout": "narrow", "gzip": True}
    channel = grpc.aio.insecure_channel(stored.plant.hub.processes["door"].grpc)
    request = series_pb2.ExportRequest(machine_id=stored.long["id"], to_us=START_US * 2)
    call = series_pb2_grpc.SeriesServiceStub(channel).Export(
        request, metadata=(("authorization", f"Bearer {stored.plant.firm_key}"),)
    )
    try:
        unpack = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        async with stored.plant.http.stream("GET", "/v1/export", params=wanted) as answer:
            chunks = answer.aiter_raw()
            unpack.decompress(await anext(chunks))
            await call.read()
            stored.plant.wire.cut()

            async def rest() -> None:
                async for chunk in chunks:
                    unpack.decompress(chunk)

            with pytest.raises(httpx.RemoteProtocolError):
                await rest()
        assert not unpack.eof

        async def rest_of_call() -> None:
            while await call.read() is not grpc.aio.EOF:
                pass

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rest_of_call()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # A file that cannot begin is refused as every other request.
        answer = await stored.plant.http.get("/v1/export", params=wanted)
        assert (answer.status_code, answer.json()["reason"]) == (503, "TRY_AGAIN")
    finally:
        stored.plant.wire.mend()
        await channel.close()

    async def back() -> bool:
        return (await stored.plant.http.get("/v1/export", params=wanted | {"to_us": 1})).status_code == 200

    await eventually(back)


async def test_a_file_ends_broken_once_its_key_is_revoked(stored: Stored) -> None:
    plant = stored.plant
    made = (await plant.operator.post("/v1/credentials", json={"role": "firm", "firm_id": plant.firm["id"]})).json()
    wanted = {"machine_id": stored.long["id"], "from_us": 0, "to_us": START_US * 2, "layout": "narrow"}
    headers = {"Authorization": f"Bearer {made['key']}"}
    async with plant.http.stream("GET", "/v1/export", params=wanted, headers=headers) as answer:
        chunks = answer.aiter_raw()
        await anext(chunks)
        assert (await plant.operator.delete(f"/v1/credentials/{made['id']}")).status_code == 204

        async def is_over() -> bool:
            return (await plant.http.get("/v1/machines", headers=headers)).status_code == 401

        await eventually(is_over)

        async def rest() -> None:
            async for _ in chunks:
                pass

        with pytest.raises(httpx.RemoteProtocolError):
            await rest()


async def test_readers_that_leave_give_up_their_place_and_too_many_are_told_to_wait(stored: Stored) -> None:
    plant, door = stored.plant, stored.plant.hub.processes["door"].http
    wanted = {"machine_id": stored.long["id"], "from_us": 0, "to_us": START_US * 2, "layout": "narrow"}
    async with plant.http.stream("GET", "/v1/export", params=wanted) as one:
        first = one.aiter_raw()
        await anext(first)
        async with plant.http.stream("GET", "/v1/export", params=wanted) as two:
            second = two.aiter_raw()
            await anext(second)
            third = await plant.http.get("/v1/export", params=wanted)
            assert (third.status_code, third.json()["reason"]) == (429, "TOO_MANY_EXPORTS")
            assert int(third.headers["retry-after"]) > 0
            other = await plant.operator.get("/v1/export", params=stored.range(machine_id=stored.machine["id"]))
            assert other.status_code == 200

    async def nobody() -> bool:
        async with httpx.AsyncClient(base_url=door) as client:
            metrics = (await client.get("/metrics")).text
        busy = await plant.database.fetchval(
            "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE 'COPY%' AND datname = current_database()"
        )
        return 'smdih_queue_items{queue="exports"} 0.0' in metrics and busy == 0

    await eventually(nobody, deadline_s=5)


@pytest.mark.parametrize(
    ("path", "params", "status", "reason"),
    [
        ("buckets", {"width_s": 0}, 400, "INVALID"),
        ("buckets", {"width_s": 90}, 400, "INVALID"),
        ("buckets", {"width_s": 60, "fill": "linear"}, 400, "INVALID"),
        ("buckets", {"width_s": 60, "to_us": START_US}, 400, "INVALID"),
        ("buckets", {"width_s": 60, "signal_id": 10**9}, 404, "NOT_FOUND"),
        ("buckets", {"width_s": 60, "signal_id": list(range(1, 60))}, 400, "INVALID"),
        ("buckets", {"width_s": 60, "to_us": START_US + 10**13}, 413, "TOO_MANY_BUCKETS"),
        ("buckets", {"width_s": 604_860, "to_us": START_US + 10**15}, 413, "TOO_MUCH_TO_READ"),
        ("plot", {"points": 2}, 400, "INVALID"),
        ("plot", {"points": 2001}, 400, "INVALID"),
        ("plot", {"signal_id": 0}, 400, "INVALID"),
        ("export", {"format": "xlsx"}, 400, "INVALID"),
        ("export", {"layout": "tall"}, 400, "INVALID"),
        ("export", {"resolution": "week"}, 400, "INVALID"),
        ("export", {"format": "parquet", "gzip": True}, 400, "INVALID"),
        ("export", {"signal_id": []}, 400, "INVALID"),
        ("export", {"machine_id": 10**9}, 404, "NOT_FOUND"),
    ],
)
async def test_what_cannot_be_answered_is_refused_with_a_reason(
    stored: Stored, path: str, params: dict[str, Any], status: int, reason: str
) -> None:
    asked = stored.range(signal_id=stored.signals[0]) | params
    answer = await stored.plant.http.get(f"/v1/{path}", params=asked)
    assert (answer.status_code, answer.json()["reason"]) == (status, reason), answer.text


async def test_signals_of_another_firm_do_not_exist(stored: Stored) -> None:
    partner = (await stored.plant.operator.post("/v1/partners", json={"name": "Centre", "region": "Wales"})).json()
    key = await stored.plant.key("partner", partner_id=partner["id"])
    async with httpx.AsyncClient(
        base_url=stored.plant.hub.processes["door"].http, headers={"Authorization": f"Bearer {key}"}
    ) as expert:
        for client in (stored.plant.stranger, expert):
            for path, more in (
                ("buckets", {"signal_id": stored.signals[0], "width_s": 60}),
                ("plot", {"signal_id": stored.signals[0]}),
                ("export", {"signal_id": stored.signals[0]}),
                ("export", {"machine_id": stored.machine["id"]}),
                (f"signals/{stored.signals[0]}/history", {}),
            ):
                answer = await client.get(f"/v1/{path}", params=stored.range(**more))
                assert (answer.status_code, answer.json()["reason"]) == (404, "NOT_FOUND")
    async with httpx.AsyncClient(base_url=stored.plant.hub.processes["door"].http) as nobody:
        for path in ("buckets", "plot", "export"):
            assert (await nobody.get(f"/v1/{path}", params=stored.range(signal_id=1, width_s=60))).status_code == 401


async def test_the_table_of_the_plan_is_the_index(stored: Stored) -> None:
    """A page of an export reads its rows by the index and sorts nothing."""
    plan = await stored.plant.database.fetch(
        "EXPLAIN SELECT ts, values[1] FROM frame WHERE machine_id = $1 AND first_position = 0 AND ts >= '2025-10-01' "
        "AND ts < '2025-11-05' ORDER BY ts LIMIT 5000",
        stored.long["id"],
    )
    text = "\n".join(row[0] for row in plan)
    assert "Sort" not in text
    assert "Seq Scan" not in text
