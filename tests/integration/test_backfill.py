"""History from files: looked at, sent, killed in the middle and taken up again, with rollups that agree with the rows."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytest_asyncio

from localstack.hub import Hub
from localstack.servers import ROOT, Servers
from services.common.settings import Settings
from tests.polling import eventually

# Years back, and not at a full minute.
START_S = 1_500_000_007
SIGNALS = [{"name": "temperature", "range_max": 5_000}, {"name": "current"}, {"name": "speed"}]


@dataclass
class Plant:
    hub: Hub
    site_id: int
    operator: httpx.AsyncClient
    key: str
    database: "asyncpg.Pool[asyncpg.Record]"

    async def machine(self, path: str) -> dict[str, Any]:
        body = {"site_id": self.site_id, "path": path, "name": path, "kind": "press", "signals": SIGNALS}
        found: dict[str, Any] = (await self.operator.post("/v1/machines", json=body)).json()
        return found

    async def start(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "smdih_client", *arguments, "--target", self.hub.processes["door"].grpc),
            env=os.environ | {"SMDIH_KEY": self.key, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )

    async def run(self, *arguments: str) -> tuple[int | None, str, str]:
        process = await self.start(*arguments)
        out, err = await process.communicate()
        return process.returncode, out.decode(), err.decode()

    async def frames(self, machine_id: int) -> dict[int, list[float | None]]:
        rows = await self.database.fetch(
            "SELECT extract(epoch FROM ts)::bigint AS s, values FROM ingest.frame WHERE machine_id = $1", machine_id
        )
        found = {row["s"]: row["values"] for row in rows}
        assert len(found) == len(rows)
        return found


@pytest_asyncio.fixture(scope="module")
async def plant(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    hub = Hub(
        Servers(settings.kafka_bootstrap, settings.database_dsn),
        Path(tmp_path_factory.mktemp("hub")),
        topic_prefix=settings.kafka_topic_prefix,
        roles=("door", "historian"),
    )
    try:
        await hub.start()
        headers = {"Authorization": f"Bearer {hub.operator_key}"}
        async with (
            httpx.AsyncClient(base_url=hub.processes["door"].http, headers=headers) as operator,
            asyncpg.create_pool(
                settings.database_dsn, min_size=1, max_size=2, server_settings={"search_path": "ingest,public"}
            ) as database,
        ):
            firm = {"name": "Acme", "slug": "acme", "sic": "25.62", "region": "Wales", "size": "small"}
            firm_id = (await operator.post("/v1/firms", json=firm)).json()["id"]
            site = (
                await operator.post("/v1/sites", json={"firm_id": firm_id, "slug": "leeds", "name": "Leeds"})
            ).json()
            key = (await operator.post("/v1/credentials", json={"role": "device", "firm_id": firm_id})).json()["key"]
            yield Plant(hub, site["id"], operator, key, database)
    finally:
        await hub.stop()


def _history(rows: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Seconds and values; one row in eleven has no second value."""
    times = START_S + np.arange(rows)
    values = np.stack([np.arange(rows) % 4_000, np.sin(np.arange(rows) / 50), np.arange(rows) / 8], axis=1)
    values[::11, 1] = np.nan
    return times, values


def _write_csv(path: Path, times: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
    with path.open("w") as file:
        file.write("time,temperature,current,speed\n")
        for at, row in zip(times, values, strict=True):
            file.write(f"{at}," + ",".join("" if np.isnan(value) else repr(float(value)) for value in row) + "\n")


async def _assert_rollups_agree(
    plant: Plant, machine_id: int, times: npt.NDArray[np.int64], values: npt.NDArray[np.float64]
) -> None:
    """Every minute and hour as the hub answers it is what the rows say."""
    for table, width in (("1m", 60), ("1h", 3600)):
        rows = await plant.database.fetch(
            f"SELECT extract(epoch FROM ts)::bigint AS s, counts, sums, mins, maxs, lasts "
            f"FROM ingest.buckets_{table}($1, 0, '2000-01-01', '2100-01-01') ORDER BY ts",
            machine_id,
        )
        starts = np.unique(times // width) * width
        assert [row["s"] for row in rows] == starts.tolist()
        for row in rows:
            here = values[(times >= row["s"]) & (times < row["s"] + width)]
            assert row["counts"] == np.count_nonzero(~np.isnan(here), axis=0).tolist()
            np.testing.assert_allclose(row["sums"], np.nansum(here, axis=0), rtol=1e-9)
            np.testing.assert_array_equal(np.array(row["mins"]), np.nanmin(here, axis=0))
            np.testing.assert_array_equal(np.array(row["maxs"]), np.nanmax(here, axis=0))


async def test_a_look_at_a_file_says_what_would_be_refused_and_why_and_keeps_nothing(
    plant: Plant, tmp_path: Path
) -> None:
    machine = await plant.machine("press-look")
    times, values = _history(1_200)
    values[700, 0] = 9_999
    path = tmp_path / "press.csv"
    _write_csv(path, times, values)
    text = path.read_text().splitlines()
    text[0] += ",humidity"
    text[1:] = [line + (",1" if row % 400 == 0 else ",") for row, line in enumerate(text[1:])]
    text[6] = f"{times[5]},hot,,,"
    text.append("1970-01-02,1,2,3,")
    text.append("someday,1,2,3,")
    path.write_text("\n".join(text))
    code, out, err = await plant.run("backfill", str(path), "--machine", machine["path"], "--dry-run")
    assert code == 1, err
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].startswith(f"press.csv -> {machine['path']}: 1,202 rows, 1970-01-02")
    samples = int(np.count_nonzero(~np.isnan(values))) - 3
    assert lines[1] == f"would be stored: {samples - 1:,} samples; in quarantine: 7; left out: 4"
    assert "NO_NUMBER: 1 samples" in lines
    assert "row 6: temperature: 'hot' is no number" in lines
    assert "OUT_OF_RANGE: 1 samples" in lines
    assert any(line.startswith("row 701 2017-07-14T02:51:47") and "sensor" in line for line in lines)
    assert "UNKNOWN_SIGNAL: 3 samples" in lines
    assert any(line.startswith("row 801 ") and "'humidity'" in line for line in lines)
    assert "TIME_OUT_OF_WINDOW: 3 samples" in lines
    assert "NO_TIME: 3 samples" in lines
    await asyncio.sleep(0.5)
    assert await plant.frames(machine["id"]) == {}
    assert await plant.database.fetchval("SELECT count(*) FROM ingest.quarantine") == 0


async def test_a_backfill_that_is_killed_goes_on_and_stores_everything_once_with_right_rollups(
    plant: Plant, tmp_path: Path
) -> None:
    machine = await plant.machine("press-killed")
    times, values = _history(12_000)
    path = tmp_path / "press.csv"
    _write_csv(path, times, values)
    progress = tmp_path / "press.csv.progress.json"
    command = ("backfill", str(path), "--machine", machine["path"])
    process = await plant.start(*command, "--rate", "8000")
    try:

        async def begun() -> bool:
            return progress.exists()

        await eventually(begun)
    finally:
        process.kill()
        await process.communicate()
    part = len(await plant.frames(machine["id"]))
    assert part < len(times)

    plant.hub.kill("door")
    code, out, err = await plant.run(*command)
    assert (code, "going on behind row" in err) == (0, True)
    samples = int(np.count_nonzero(~np.isnan(values)))
    assert (
        out == f"press.csv -> {machine['path']}: 12,000 rows; {samples:,} samples stored, 0 in quarantine, 0 left out\n"
    )

    async def all_there() -> bool:
        return len(await plant.frames(machine["id"])) >= len(times)

    await eventually(all_there)
    # Sent again without the progress file: everything is known for a repeat.
    progress.unlink()
    assert (await plant.run(*command))[0] == 0
    expected = {
        int(at): [None if np.isnan(value) else float(value) for value in row]
        for at, row in zip(times, values, strict=True)
    }
    assert await plant.frames(machine["id"]) == expected
    await _assert_rollups_agree(plant, machine["id"], times, values)
    code, out, err = await plant.run(*command)
    assert (code, "all of it is in the hub already" in err) == (0, True)


async def test_a_folder_of_parquet_older_than_what_is_stored_is_merged_into_rows_and_rollups(
    plant: Plant, tmp_path: Path
) -> None:
    machine = await plant.machine("press-folder")
    times, values = _history(2_000)
    folder = tmp_path / "acme" / "leeds"
    folder.mkdir(parents=True)

    def write(name: str, rows: slice) -> None:
        columns = {"at": pa.array(times[rows] * 1000, pa.timestamp("ms", tz="UTC"))}
        for number, signal in enumerate(("temperature", "current", "speed")):
            columns[signal] = pa.array(values[rows, number], mask=np.isnan(values[rows, number]))
        pq.write_table(pa.table(columns), folder / name, row_group_size=700)

    write("press-folder.parquet", slice(1_000, 2_000))
    assert (await plant.run("backfill", str(tmp_path)))[0] == 0
    write("press-folder.parquet", slice(0, 1_000))
    code, _, err = await plant.run("backfill", str(tmp_path))
    assert (code, "has changed" in err) == (1, True)
    code, out, err = await plant.run("backfill", str(tmp_path), "--progress", str(tmp_path / "second.json"))
    assert code == 0, err
    assert out.startswith("acme/leeds/press-folder.parquet -> acme/leeds/press-folder: 1,000 rows; ")

    async def all_there() -> bool:
        return len(await plant.frames(machine["id"])) >= len(times)

    await eventually(all_there)
    await _assert_rollups_agree(plant, machine["id"], times, values)


async def test_a_replay_with_a_buffer_outlives_the_hub_and_a_kill(plant: Plant, tmp_path: Path) -> None:
    machine = await plant.machine("press-replay")
    path, buffer = tmp_path / "press-replay.csv", tmp_path / "buffer"
    times, values = _history(2_000)
    _write_csv(path, times, values)
    arguments = ("replay", "--file", str(path), "--machine", machine["path"], "--buffer", str(buffer))
    await plant.hub.pause("door")
    first = await plant.start(*arguments)

    def kept() -> int:
        return sum(file.stat().st_size for file in buffer.rglob("*") if file.is_file()) if buffer.is_dir() else 0

    async def is_kept() -> bool:  # each value has 8 bytes
        return kept() > values.size * 8

    await eventually(is_kept)
    code, _, err = await plant.run(*arguments)
    assert (code, "Traceback" in err, "buffer" in err) == (1, False, True)
    first.kill()
    await first.communicate()
    assert await plant.frames(machine["id"]) == {}
    plant.hub.resume("door")
    await plant.hub.wait_ready("door")
    # Again: first what the buffer has, then the file once more, which the hub has then.
    code, out, err = await plant.run(*arguments)
    assert code == 0, err
    present = int(np.count_nonzero(~np.isnan(values)))
    sent = int(out.split(" samples sent")[0].replace(",", ""))
    assert present < sent <= 2 * present

    async def all_there() -> bool:
        return len(await plant.frames(machine["id"])) >= len(times)

    await eventually(all_there)
    stored = await plant.frames(machine["id"])
    assert len(stored) == len(times)
    found = np.array([[np.nan if value is None else value for value in stored[at]] for at in times.tolist()])
    np.testing.assert_array_equal(found, values)
    await _assert_rollups_agree(plant, machine["id"], times, values)


async def test_what_cannot_go_on_says_why(plant: Plant, tmp_path: Path) -> None:
    path = tmp_path / "press.csv"
    path.write_text("time,a\n1500000000,1\n")
    code, _, err = await plant.run("backfill", str(path))
    assert (code, "--machine" in err) == (1, True)
    code, _, err = await plant.run("backfill", str(tmp_path / "none.csv"), "--machine", "acme/leeds/press")
    assert (code, "cannot be read" in err) == (1, True)
    code, out, _ = await plant.run("backfill", str(path), "--machine", "acme/leeds/nowhere")
    assert (code, "UNKNOWN_MACHINE: 1 samples" in out) == (1, True)
    # Another firm's machine does not exist for this key, and an operator's key sends no telemetry.
    firm = {"name": "Birch", "slug": "birch", "sic": "25.62", "region": "Wales", "size": "small"}
    firm_id = (await plant.operator.post("/v1/firms", json=firm)).json()["id"]
    site = (await plant.operator.post("/v1/sites", json={"firm_id": firm_id, "slug": "york", "name": "York"})).json()
    other = {"site_id": site["id"], "path": "saw", "name": "Saw", "kind": "saw", "signals": [{"name": "a"}]}
    assert (await plant.operator.post("/v1/machines", json=other)).status_code == 201
    code, out, _ = await plant.run("backfill", str(path), "--machine", "birch/york/saw", "--dry-run")
    assert (code, "UNKNOWN_MACHINE: 1 samples" in out) == (1, True)
    plant.key = plant.hub.operator_key
    code, _, err = await plant.run("backfill", str(path), "--machine", "birch/york/saw", "--dry-run")
    assert (code, err.startswith("FORBIDDEN")) == (1, True)
    plant.key = "smdih_device_wrong"
    for dry in ([], ["--dry-run"]):
        progress = ("--progress", str(tmp_path / "other.json"))
        code, _, err = await plant.run("backfill", str(path), "--machine", "acme/leeds/press", *progress, *dry)
        assert (code, "UNAUTHENTICATED" in err) == (1, True)
