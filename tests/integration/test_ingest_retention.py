"""What is removed, what is kept, and that everything goes on afterwards; the historian and the door run meanwhile."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import httpx
import numpy as np
import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.clock import SystemClock
from services.common.database import create_pool
from services.common.settings import Settings
from services.ingest.historian.historian import Historian
from services.ingest.retention import service as retention
from services.ingest.retention.service import Enforcer
from services.ingest.telemetry import quarantine_store
from smdih.ingest.v1 import records_pb2
from tests.integration.stored_plant import StoredPlant, stored_plant
from tests.polling import eventually

DAY_US = 86_400 * 1_000_000
NOW_US = int(time.time()) // 3600 * 3600 * 1_000_000


class Kept:
    def __init__(self, plant: StoredPlant, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self.plant = plant
        self.pool = pool
        # More than one step for each machine, and what was just loaded counts as old.
        self.enforcer = Enforcer(pool, SystemClock(), rows_per_step=100, grace_days=0)
        self.by_default = Enforcer(pool, SystemClock())

    async def enforce(self) -> dict[str, Any]:
        """One whole run (the historian may be at one of its own); what it noted."""
        await eventually(self.enforcer.once)
        run: dict[str, Any] = (await self.plant.operator.get("/v1/retention")).json()["runs"][0]
        assert run["finished_us"] is not None
        return run

    async def machine(self, path: str, *days_ago: int, firm: str = "") -> dict[str, Any]:
        """A machine with an hour and a half of data, ten seconds apart, on each of these days."""
        plant = self.plant
        site = plant.site
        if firm:
            body = {"name": firm, "slug": firm, "sic": "25.62", "region": "Wales", "size": "small"}
            made = (await plant.operator.post("/v1/firms", json=body)).json()
            site = (
                await plant.operator.post("/v1/sites", json={"firm_id": made["id"], "slug": "one", "name": "One"})
            ).json()
        signals = [{"name": "power", "unit": "kW"}, {"name": "temp"}]
        new = {"site_id": site["id"], "path": path, "name": path, "kind": "press", "signals": signals}
        machine: dict[str, Any] = (await plant.operator.post("/v1/machines", json=new)).json()
        times = np.concatenate(
            [np.zeros(0, dtype=np.int64), *(NOW_US - days * DAY_US + np.arange(540) * 10_000_000 for days in days_ago)]
        )
        rng = np.random.default_rng(machine["id"])
        await plant.store(machine, times, rng.normal(10, 1, (len(times), 2)))
        return machine

    async def send(self, machine: dict[str, Any], *times_us: int) -> None:
        """Frames through the door."""
        key = await self.plant.key("device", firm_id=machine["firm_id"])
        frames = [{"ts": time_us // 1000, "values": {"power": 1.0}} for time_us in times_us]
        door = self.plant.hub.processes["door"].http
        async with httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {key}"}) as device:
            answer = await device.post(
                "/v1/telemetry", json={"batches": [{"machine": machine["id"], "frames": frames}]}
            )
        assert answer.json()["accepted"] == len(frames), answer.text

    async def frames(self, machine: dict[str, Any]) -> list[int]:
        """Days ago, of each stored frame once a day."""
        rows = await self.plant.database.fetch("SELECT ts FROM frame WHERE machine_id = $1 ORDER BY ts", machine["id"])
        ages = [round((NOW_US - row["ts"].timestamp() * 1_000_000) / DAY_US) for row in rows]
        return sorted(set(ages), reverse=True)

    async def buckets(self, machine: dict[str, Any], width_s: int, days_ago: int) -> dict[str, Any]:
        start = NOW_US - days_ago * DAY_US
        answer = await self.plant.operator.get(
            "/v1/buckets",
            params={
                "signal_id": [signal["id"] for signal in machine["signals"]],
                "from_us": start,
                "to_us": start + 2 * 3_600_000_000,
                "width_s": width_s,
            },
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def chunks(self, table: str = "frame") -> int:
        count: int = await self.plant.database.fetchval(
            "SELECT count(*) FROM timescaledb_information.chunks WHERE hypertable_name = $1 AND hypertable_schema = 'ingest'",
            table,
        )
        return count


@pytest_asyncio.fixture(scope="module")
async def kept(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Kept]:
    folder = Path(tmp_path_factory.mktemp("hub"))
    async with stored_plant(servers, settings, folder, roles=("door", "historian")) as plant:
        pool = await create_pool(settings.database_dsn, schema="ingest", size_max=3)
        try:
            yield Kept(plant, pool)
        finally:
            await pool.close()


async def test_history_that_was_just_loaded_stays_for_a_while(kept: Kept) -> None:
    machine = await kept.machine("loaded-1", 1_000, 500, 10)
    short = await kept.machine("loaded-2", 100, firm="loaded")
    rule = {"raw_days": 30, "reason": "less"}
    await kept.plant.operator.put(f"/v1/firms/{short['firm_id']}/retention", json=rule)
    # A machine of years, and history that is loaded now.
    await kept.plant.database.execute(
        "UPDATE machine SET created = created - interval '3 years' WHERE id = $1", short["id"]
    )
    await kept.send(short, NOW_US - 500 * DAY_US, NOW_US - 50 * DAY_US)

    async def is_stored() -> bool:
        return await kept.frames(short) == [500, 100, 50]

    await eventually(is_stored)
    await eventually(kept.by_default.once)
    run = (await kept.plant.operator.get("/v1/retention")).json()["runs"][0]
    assert (run["chunks_dropped"], run["rows_removed"], run["problem"]) == (0, 0, None)
    assert (await kept.frames(machine), await kept.frames(short)) == ([1_000, 500, 10], [500, 100, 50])
    # A month later; what is sent now has a month of its own, and puts off nothing that is older than it.
    await kept.plant.database.execute("UPDATE history_load SET loaded = loaded - interval '31 days', day = day - 31")
    await kept.send(short, NOW_US - 40 * DAY_US)

    async def came() -> bool:
        return await kept.frames(short) == [500, 100, 50, 40]

    await eventually(came)
    await eventually(kept.by_default.once)
    assert await kept.frames(short) == [40]
    await kept.plant.database.execute(
        "UPDATE machine SET created = created + interval '3 years' WHERE id = $1", short["id"]
    )


async def test_history_that_is_loaded_into_an_old_chunk_keeps_it(kept: Kept) -> None:
    first, second = [await kept.machine(f"same-week-{n}") for n in (1, 2)]
    await kept.send(first, NOW_US - 450 * DAY_US)

    async def is_stored() -> bool:
        return await kept.frames(first) == [450]

    await eventually(is_stored)
    # That was long ago; another machine's history of that week is loaded now.
    await kept.plant.database.execute(
        "UPDATE _timescaledb_catalog.chunk SET creation_time = creation_time - interval '31 days'"
    )
    await kept.plant.database.execute("UPDATE history_load SET loaded = loaded - interval '31 days', day = day - 31")
    await kept.send(second, NOW_US - 450 * DAY_US)

    async def came() -> bool:
        return await kept.frames(second) == [450]

    await eventually(came)
    await eventually(kept.by_default.once)
    assert await kept.frames(second) == [450]
    # It keeps nobody else's.
    assert await kept.frames(first) == []
    await kept.plant.database.execute("UPDATE history_load SET loaded = loaded - interval '31 days', day = day - 31")
    await eventually(kept.by_default.once)
    assert await kept.frames(second) == []


async def test_old_samples_go_by_chunks_and_their_minutes_and_hours_stay(kept: Kept) -> None:
    running, stopped = await kept.machine("running-1", 500, 10), await kept.machine("stopped-1", 500)
    before = [await kept.buckets(machine, width, 500) for machine in (running, stopped) for width in (60, 3600)]
    assert all(len(found["series"][0]["counts"]) > 1 for found in before)
    chunks = await kept.chunks()
    run = await kept.enforce()
    assert (run["chunks_dropped"], run["problem"]) == (chunks - await kept.chunks(), None)
    assert run["chunks_dropped"] > 0
    assert (await kept.frames(running), await kept.frames(stopped)) == ([10], [])
    # Also the bucket that was still open when the machine stopped, for which there was no row.
    after = [await kept.buckets(machine, width, 500) for machine in (running, stopped) for width in (60, 3600)]
    assert after == before
    again = await kept.enforce()
    assert (again["chunks_dropped"], again["rows_removed"]) == (0, 0)


async def test_a_firm_that_keeps_less_loses_its_own_old_rows_only(kept: Kept) -> None:
    short, other = await kept.machine("short-1", 100, 10, firm="short"), await kept.machine("long-1", 100, 10)
    before = await kept.buckets(short, 60, 100)
    rule = {"raw_days": 30, "reason": "asked for by the firm"}
    answer = await kept.plant.operator.put(f"/v1/firms/{short['firm_id']}/retention", json=rule)
    assert answer.json()["in_force"] == {"raw_days": 30, "minute_days": 1_100, "hour_days": 3_660}
    run = await kept.enforce()
    assert (run["chunks_dropped"], run["rows_removed"]) == (0, 540)
    assert await kept.frames(short) == [10]
    assert await kept.frames(other) == [100, 10]
    assert await kept.buckets(short, 60, 100) == before
    assert (await kept.enforce())["rows_removed"] == 0


async def test_nothing_is_removed_of_a_firm_on_hold_and_the_others_go_on(kept: Kept) -> None:
    held, free = await kept.machine("held-1", 600, 10, firm="held"), await kept.machine("free-1", 600, 10)
    url = f"/v1/firms/{held['firm_id']}/retention"
    answer = await kept.plant.operator.put(url, json={"is_on_hold": True, "reason": "court case 7"})
    assert answer.json()["in_force"] is None
    run = await kept.enforce()
    assert (run["chunks_dropped"], run["rows_removed"]) == (0, 540)
    assert (await kept.frames(held), await kept.frames(free)) == ([600, 10], [10])
    await kept.plant.operator.put(url, json={"reason": "the case is closed"})
    run = await kept.enforce()
    assert run["chunks_dropped"] > 0
    assert await kept.frames(held) == [10]


async def test_a_hold_stops_the_run_that_is_removing(kept: Kept) -> None:
    machine = await kept.machine("hold-now-1", 200, firm="hold-now")
    url = f"/v1/firms/{machine['firm_id']}/retention"
    await kept.plant.operator.put(url, json={"raw_days": 30, "reason": "less"})
    slow = Enforcer(kept.pool, SystemClock(), rows_per_step=5, grace_days=0)

    async def count() -> int:
        query = "SELECT count(*) FROM frame WHERE machine_id = $1"
        found: int = await kept.plant.database.fetchval(query, machine["id"])
        return found

    async def some_are_gone() -> bool:
        return await count() < 540

    run = asyncio.create_task(eventually(slow.once))
    await eventually(some_are_gone)
    answer = await kept.plant.operator.put(url, json={"is_on_hold": True, "reason": "court case 9"})
    left = await count()
    assert (answer.status_code, left > 0) == (200, True)
    await run
    assert await count() == left
    noted = (await kept.plant.operator.get("/v1/retention")).json()["runs"][0]
    assert noted["problem"] is None
    await kept.plant.operator.put(url, json={"reason": "closed"})


async def test_a_run_that_is_cut_off_is_noted_and_the_next_one_goes_on(kept: Kept) -> None:
    machine = await kept.machine("cut-1", 200, firm="cut")
    rule = {"raw_days": 30, "reason": "less"}
    await kept.plant.operator.put(f"/v1/firms/{machine['firm_id']}/retention", json=rule)
    before = await kept.buckets(machine, 60, 200)

    async def count() -> int:
        found: int = await kept.plant.database.fetchval(
            "SELECT count(*) FROM frame WHERE machine_id = $1", machine["id"]
        )
        return found

    async def some_are_gone() -> bool:
        return await count() < 540

    run = asyncio.create_task(kept.enforcer.once())
    await eventually(some_are_gone)
    run.cancel()
    await asyncio.gather(run, return_exceptions=True)
    # Whether it was in the middle or just through, what is left is whole.
    assert await kept.buckets(machine, 60, 200) == before
    if await count():
        noted = (await kept.plant.operator.get("/v1/retention")).json()["runs"][0]
        assert (noted["finished_us"], noted["problem"]) == (None, "It was cut off.")
    await kept.enforce()
    assert await count() == 0
    assert await kept.buckets(machine, 60, 200) == before


async def test_old_items_leave_quarantine_but_not_of_a_firm_on_hold(kept: Kept) -> None:
    firms = [kept.plant.firm["id"], (await kept.machine("hold-2", 1, firm="hold-2"))["firm_id"]]
    rule = {"is_on_hold": True, "reason": "court case 8"}
    await kept.plant.operator.put(f"/v1/firms/{firms[1]}/retention", json=rule)
    for firm_id in firms:
        await kept.plant.database.execute(
            "INSERT INTO quarantine (id, firm_id, credential_id, source, door, reason, detail, samples, received, correlation_id) "
            "SELECT $1::bigint::text || '-' || n, $1, 1, '', 'http', 'MALFORMED', '', 0, now() - n * interval '1 day', '' "
            "FROM generate_series(1, 250) AS n",
            firm_id,
        )
    assert (await kept.enforce())["rows_removed"] >= 160
    left = [
        await kept.plant.database.fetchval(
            "SELECT count(*) FROM quarantine WHERE firm_id = $1 AND reason = 'MALFORMED'", firm_id
        )
        for firm_id in firms
    ]
    assert left[1] == 250
    assert left[0] in (89, 90)
    await kept.plant.operator.put(f"/v1/firms/{firms[1]}/retention", json={"reason": "closed"})


async def test_quarantine_of_a_firm_is_bounded_and_what_is_refused_there_is_counted(kept: Kept) -> None:
    firms = [(await kept.machine(f"full-{n}", 1, firm=f"full-{n}"))["firm_id"] for n in (1, 2)]
    database, historian = kept.plant.database, Historian(SystemClock(), quarantine_bytes_max=45_000)
    long_ago_us = NOW_US - 91 * DAY_US

    def record(firm_id: int, number: int) -> Any:
        value = records_pb2.QuarantineRecord(
            id=f"full-{firm_id}-{number}",
            firm_id=firm_id,
            reason="MALFORMED",
            samples=3,
            received_us=long_ago_us,
            raw=b"x" * 9_500,
        )
        return SimpleNamespace(value=value.SerializeToString())

    async def use(firm_id: int) -> dict[str, Any]:
        query = "SELECT refused_items, refused_samples FROM quarantine_use WHERE firm_id = $1"
        found = await database.fetchrow(query, firm_id)
        told = (await kept.plant.operator.get(f"/v1/firms/{firm_id}/quota")).json()["use"]
        stands = await database.fetchrow(
            "SELECT count(*) AS items, coalesce(sum(quarantine_bytes(batch, raw)), 0)::bigint AS bytes FROM quarantine "
            "WHERE firm_id = $1",
            firm_id,
        )
        assert stands is not None
        # What is counted is what is in the table.
        assert told["quarantine_bytes"] == stands["bytes"]
        return {**dict(found or {}), **dict(stands)}

    async def store(polled: list[Any]) -> None:
        async with database.acquire() as connection, connection.transaction():
            assert await historian.store_quarantine(connection, polled) == []

    for first in (0, 4):
        await store([record(firms[0], number) for number in range(first, first + 4)] + [record(firms[1], first)])
    assert await use(firms[0]) == {"bytes": 50_000, "refused_items": 3, "refused_samples": 9, "items": 5}
    # What is sent again is the same item: it takes no room, also where there is none.
    for _ in range(5):
        await store([record(firms[0], 0), record(firms[1], 4), record(firms[1], 4)])
    assert await use(firms[0]) == {"bytes": 50_000, "refused_items": 3, "refused_samples": 9, "items": 5}
    assert await use(firms[1]) == {"bytes": 20_000, "items": 2}
    # There is room again when what was there was replayed, and what then comes again waits again.
    async with database.acquire() as connection:
        await quarantine_store.mark_replayed(connection, [f"full-{firms[0]}-{number}" for number in range(4)])
    assert (await use(firms[0]))["bytes"] == 12_000
    await store([record(firms[0], number) for number in (0, 5)])
    assert await use(firms[0]) == {"bytes": 31_500, "refused_items": 3, "refused_samples": 9, "items": 6}
    again = await database.fetchrow("SELECT replayed, raw FROM quarantine WHERE id = $1", f"full-{firms[0]}-0")
    assert again is not None
    assert dict(again) == {"replayed": None, "raw": b"x" * 9_500}
    # And when the old has gone.
    await kept.enforce()
    assert await use(firms[0]) == {"bytes": 0, "refused_items": 3, "refused_samples": 9, "items": 0}
    assert not await database.fetchval("SELECT count(*) FROM quarantine_day WHERE firm_id = ANY($1)", firms)


async def test_what_arrives_after_its_time_was_removed_is_stored_and_spoils_no_bucket(kept: Kept) -> None:
    machine = await kept.machine("late-1", 500)
    before = [await kept.buckets(machine, width, 500) for width in (60, 3600)]
    await kept.enforce()
    assert await kept.frames(machine) == []
    key = await kept.plant.key("device", firm_id=kept.plant.firm["id"])

    async def send(time_us: int, value: float) -> dict[str, Any]:
        frame = {"ts": time_us // 1000, "values": {"power": value, "temp": value}}
        answer = await device.post("/v1/telemetry", json={"batches": [{"machine": machine["id"], "frames": [frame]}]})
        found: dict[str, Any] = answer.json()
        return found

    async def stored(count: int) -> None:
        async def there() -> bool:
            found = await kept.plant.database.fetchval(
                "SELECT count(*) FROM frame WHERE machine_id = $1", machine["id"]
            )
            return bool(found == count)

        await eventually(there)

    door = kept.plant.hub.processes["door"].http
    async with httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {key}"}) as device:
        # Into the first bucket, into the one that was open when the machine stopped, and behind it.
        for number, second in enumerate((5, 5_395, 5_405, 7_000)):
            assert (await send(NOW_US - 500 * DAY_US + second * 1_000_000, 999.0))["accepted"] == 2
            await stored(number + 1)
        # And now, so that all that was open is closed.
        for second in (0, 60, 3_700):
            assert (await send(NOW_US - 2 * DAY_US + second * 1_000_000, 1.0))["accepted"] == 2
        await stored(7)
        for width, was, more in zip((60, 3600), before, (0, 2), strict=True):
            now = await kept.buckets(machine, width, 500)
            times = was["series"][0]["times_us"]
            shown = dict(zip(now["series"][0]["times_us"], now["series"][0]["counts"], strict=True))
            # Two came into minutes that had nothing: the hour has them too.
            *whole, last = was["series"][0]["counts"]
            assert [shown[at] for at in times] == [*whole, last + more]
        recent = await kept.buckets(machine, 60, 2)
        assert recent["series"][0]["counts"] == [1, 1, 1]
        # A time in the far future, or before everything, makes no chunk.
        chunks = await kept.chunks()
        for time_us in (NOW_US + DAY_US, 253_402_300_000_000_000, 0, -1_000_000):
            assert (await send(time_us, 1.0))["reason"] == "TIME_OUT_OF_WINDOW"
        assert (await send(NOW_US - 2 * DAY_US + 3_800_000_000, 1.0))["accepted"] == 2
        await stored(8)
        assert await kept.chunks() == chunks
    await kept.enforce()
    assert await kept.frames(machine) == [2]


async def test_the_disk_forecast_says_what_there_is_and_for_how_long_it_lasts(kept: Kept) -> None:
    found = (await kept.plant.operator.get("/v1/storage")).json()
    assert [store["resolution"] for store in found["stores"]] == ["raw", "minute", "hour", "quarantine"]
    assert found["database_bytes"] > sum(store["bytes"] for store in found["stores"]) > 0
    assert (found["days_left"], found["reason"]) == (None, "NO_DISK_SIZE")
    # The hub is some seconds old: that says nothing about a day.
    assert found["growth_bytes_a_day"] is None
    # Had it begun ten days ago:
    async with kept.plant.database.acquire() as connection, connection.transaction():
        await connection.execute("UPDATE machine SET created = created - interval '10 days'")
        few, many = [
            await retention.forecast(connection, NOW_US, size) for size in (found["database_bytes"] + 10_000, 10**15)
        ]
        assert few.growth_bytes_a_day is not None
        assert few.growth_bytes_a_day > 0
        assert few.days_left is not None
        assert 0 <= few.days_left < 1
        assert (many.days_left, many.reason) == (None, "FITS")
        # What fills quarantine fills the disk: 70 MB in a week, to be kept for 90 days.
        free = sum(size.full_bytes - size.size_bytes for size in many.stores if size.full_bytes) + many.database_bytes
        await connection.execute(
            "INSERT INTO quarantine (id, firm_id, credential_id, source, door, reason, detail, samples, received, "
            "correlation_id, raw) SELECT 'fills-' || n, $1, 1, '', 'mqtt', 'QUOTA_SAMPLES', '', 0, now(), '', "
            "convert_to(repeat('x', 7000000), 'UTF8') "
            "FROM generate_series(1, 10) AS n",
            kept.plant.firm["id"],
        )
        filling = await retention.forecast(connection, NOW_US, int(free) + 1_000_000)
        growth = 70e6 / (7 + NOW_US % DAY_US / DAY_US)  # in seven whole days and today
        assert filling.stores[-1].growth_bytes_a_day == pytest.approx(growth, rel=0.01)
        assert filling.stores[-1].full_bytes == pytest.approx(90 * growth, rel=0.01)
        assert filling.days_left is not None
        await connection.execute("DELETE FROM quarantine WHERE id LIKE 'fills-%'")
        await connection.execute(
            "INSERT INTO retention (firm_id, is_on_hold, reason, changed_by) SELECT min(id), true, 'x', 0 FROM firm "
            "ON CONFLICT (firm_id) DO UPDATE SET is_on_hold = true"
        )
        # On hold nothing is removed: however large, it will be full one day.
        held = await retention.forecast(connection, NOW_US, 10**15)
        assert held.days_left is not None
        assert held.days_left > 1_000
        await connection.execute("DELETE FROM retention WHERE reason = 'x'")
        await connection.execute("UPDATE machine SET created = created + interval '10 days'")


async def test_only_operators_decide_what_is_kept(kept: Kept) -> None:
    firm, plant = kept.plant.firm["id"], kept.plant
    rule = {"raw_days": 30, "reason": "less"}
    own = await plant.http.get(f"/v1/firms/{firm}/retention")
    assert own.json()["in_force"]["raw_days"] == 400
    refused = [
        await plant.http.put(f"/v1/firms/{firm}/retention", json=rule),
        await plant.http.get("/v1/retention"),
        await plant.http.get("/v1/storage"),
    ]
    assert [answer.status_code for answer in refused] == [403] * 3
    assert (await plant.stranger.get(f"/v1/firms/{firm}/retention")).status_code == 404
    assert (await plant.operator.get("/v1/firms/1000000/retention")).status_code == 404
    for wrong in ({"raw_days": 6}, {"minute_days": 10}, {"reason": ""}, {"days": 3}):
        answer = await plant.operator.put(f"/v1/firms/{firm}/retention", json=rule | wrong)
        assert (answer.status_code, answer.json()["reason"]) == (400, "INVALID")
    async with httpx.AsyncClient(base_url=plant.hub.processes["door"].http) as nobody:
        for path in ("retention", "storage", f"firms/{firm}/retention"):
            assert (await nobody.get(f"/v1/{path}")).status_code == 401
