"""The line protocol door, as senders of it meet it; Telegraf itself where it is installed."""

import asyncio
import gzip
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from services.common.settings import Settings
from tests.integration.ingest_plant import SIGNALS, Plant, running_plant, two_hours_ago_s
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def plant(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    async with running_plant(settings, Path(tmp_path_factory.mktemp("hub"))) as made:
        yield made


async def test_line_protocol_is_stored_as_telegraf_sends_it(plant: Plant) -> None:
    machine = await plant.new_machine("lines-1")
    start, path = two_hours_ago_s(), machine["path"]
    body = "\n".join(
        f"press,host=edge\\ 1,machine={path} temperature={20 + n / 8},current={n}i,speed={'true' if n % 2 else 'f'} {start + n}"
        for n in range(50)
    )
    async with httpx.AsyncClient(
        base_url=plant.hub.processes["door"].http, headers={"Authorization": f"Token {plant.device_key}"}
    ) as telegraf:
        for where in (
            "/api/v2/write?bucket=b&org=o&precision=s",
            "/write?precision=s",
        ):  # the same twice is stored once
            answer = await telegraf.post(
                where, content=gzip.compress(body.encode()), headers={"Content-Encoding": "gzip"}
            )
            assert (answer.status_code, answer.content) == (204, b"")
    expected = [(start + n, [20 + n / 8, float(n), float(n % 2)]) for n in range(50)]

    async def stored() -> bool:
        return await plant.frames(machine["id"]) == expected

    await eventually(stored)


async def test_bad_lines_are_quarantined_and_the_good_ones_stored(plant: Plant) -> None:
    machine = await plant.new_machine("lines-2")
    start, path = two_hours_ago_s(), machine["path"]
    body = (
        f"# by measurement, by id, and with a longer name\n{path} temperature=1 {start}\n"
        f"m,machine={machine['id']} current=2 {start}\n\n"
        f'm,machine={path} speed=3,state="run" {start}\n'
        f"m,machine={path} temperature= {start}\nm,machine={path} temperature=900 {start + 1}\n"
    )
    answer = await plant.http.post("/api/v2/write", params={"precision": "s"}, content=body)
    found = answer.json()
    assert (answer.status_code, found["code"], found["accepted"], found["quarantined"]) == (400, "invalid", 3, 2)
    assert [(one["line"], one["reason"]) for one in found["lines"]] == [(5, "WRONG_TYPE"), (6, "MALFORMED")]
    assert [(one["reason"], one["samples"]) for one in found["problems"]] == [("OUT_OF_RANGE", 1)]
    assert "line 6" in found["message"]

    async def stored() -> bool:
        return await plant.frames(machine["id"]) == [(start, [1.0, 2.0, 3.0])]

    await eventually(stored)

    async def set_aside() -> bool:
        items = [i for r in ("WRONG_TYPE", "MALFORMED", "OUT_OF_RANGE") for i in await plant.quarantined(r)]
        return {(i["reason"], i["samples"]) for i in items if i["door"] == "lines"} == {
            ("WRONG_TYPE", 1),
            ("MALFORMED", 0),
            ("OUT_OF_RANGE", 1),
        }

    await eventually(set_aside)


@pytest.mark.parametrize(
    ("content", "headers", "params", "status", "code", "reason"),
    [
        (b"m a=1 1", {}, {"precision": "s"}, 422, "unprocessable entity", "UNKNOWN_MACHINE"),
        (b"m", {}, {}, 400, "invalid", "MALFORMED"),
        (b"m a=1 1", {}, {"precision": "h"}, 400, "invalid", "INVALID"),
        (b"m a=1 1", {"Content-Encoding": "gzip"}, {}, 400, "invalid", "MALFORMED"),
        (gzip.compress(b"m a=1 1")[:-9], {"Content-Encoding": "gzip"}, {}, 400, "invalid", "MALFORMED"),
        (gzip.compress(b" " * 500_000_000, 1), {"Content-Encoding": "gzip"}, {}, 413, "request too large", "TOO_LARGE"),
        (b"m a=1 1", {"Content-Encoding": "br"}, {}, 400, "invalid", "INVALID"),
        (b"m a=1 1", {"Authorization": "Token wrong"}, {}, 401, "unauthorized", "UNAUTHENTICATED"),
        (b"\n".join(b"m%d a=1" % n for n in range(10_001)), {}, {}, 413, "request too large", "TOO_LARGE"),
    ],
)
async def test_refused_lines_get_a_code_and_a_reason(
    plant: Plant, content: bytes, headers: dict[str, str], params: dict[str, str], status: int, code: str, reason: str
) -> None:
    answer = await plant.http.post("/api/v2/write", content=content, headers=headers, params=params)
    found = answer.json()
    assert (answer.status_code, found["code"], found["reason"]) == (status, code, reason)
    assert found["message"]


TELEGRAF = """
[agent]
  interval = "100ms"
  round_interval = false
  flush_interval = "300ms"
  omit_hostname = true
[[inputs.mock]]
  metric_name = "press"
  [inputs.mock.tags]
    machine = "{path}"
  [[inputs.mock.random]]
    name = "temperature"
    min = 20.0
    max = 40.0
  [[inputs.mock.sine_wave]]
    name = "current"
    amplitude = 7.5
    period = 0.05
  [[inputs.mock.step]]
    name = "speed"
    start = 1.0
    step = 1.0
[[outputs.influxdb_v2]]
  urls = ["{door}"]
  token = "{key}"
  organization = "any"
  bucket = "any"
  timeout = "2s"
# Telegraf's own record of what it took up, as field, value and time.
[[outputs.file]]
  files = ["{taken}"]
  data_format = "json"
  json_timestamp_units = "1us"
"""


@pytest.mark.skipif(shutil.which("telegraf") is None, reason="no telegraf on the PATH")
async def test_what_an_unmodified_telegraf_takes_up_is_stored_once_though_the_door_is_killed(
    plant: Plant, tmp_path: Path
) -> None:
    machine, taken = await plant.new_machine("telegraf-1"), tmp_path / "taken.json"
    settings = tmp_path / "telegraf.conf"
    settings.write_text(
        TELEGRAF.format(path=machine["path"], door=plant.hub.processes["door"].http, key=plant.device_key, taken=taken)
    )
    taken.touch()
    with (tmp_path / "log").open("wb") as log:
        telegraf = await asyncio.create_subprocess_exec("telegraf", "--config", str(settings), stdout=log, stderr=log)
    try:
        for rows in (20, 60, 100):
            if rows > 20:
                plant.hub.kill("door")

            async def has_taken(rows: int = rows) -> bool:
                return len(taken.read_text().splitlines()) >= rows

            await eventually(has_taken)

        async def stored_so_far() -> bool:
            return len(await plant.frames(machine["id"])) >= 100

        await eventually(stored_so_far)
        # It sends what it still holds before it ends, once: the door is there by now.
        telegraf.terminate()
        assert await asyncio.wait_for(telegraf.wait(), 20) == 0, (tmp_path / "log").read_text()
    finally:
        if telegraf.returncode is None:
            telegraf.kill()
    lines = [json.loads(line) for line in taken.read_text().splitlines()]
    expected = {one["timestamp"]: [one["fields"][signal["name"]] for signal in SIGNALS] for one in lines}

    async def stored() -> bool:
        return len(await plant.frames(machine["id"])) >= len(expected)

    await eventually(stored)
    found = await plant.database.fetch(
        "SELECT (extract(epoch FROM ts) * 1e6)::bigint AS ts, values FROM ingest.frame WHERE machine_id = $1",
        machine["id"],
    )
    assert len(found) == len(lines)
    assert {row["ts"]: row["values"] for row in found} == expected
