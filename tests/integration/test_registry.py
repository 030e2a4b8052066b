"""The registry as firms and operators meet it."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from localstack.servers import Servers
from services.common.settings import Settings
from tests.integration.registry_hub import FirmAtHub, RegistryHub, created, import_table, running, set_quota
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def hub(
    servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[RegistryHub]:
    async with running(servers, settings, tmp_path_factory.mktemp("hub")) as made:
        yield made


@pytest_asyncio.fixture
async def firm(hub: RegistryHub) -> FirmAtHub:
    return await hub.firm()


async def test_firms_and_sites_are_listed_for_those_who_may_see_them(hub: RegistryHub, firm: FirmAtHub) -> None:
    other = await hub.firm()
    assert [one["id"] for one in (await firm.admin.get("/v1/firms")).json()["firms"]] == [firm.id]
    assert [one["id"] for one in (await firm.admin.get("/v1/sites")).json()["sites"]] == [firm.site_id]
    seen: list[int] = []
    token = ""
    while True:
        page = (await firm.operator.get("/v1/firms", params={"page_size": 2, "page_token": token})).json()
        seen += [one["id"] for one in page["firms"]]
        token = page["next_page_token"]
        if not token:
            break
    assert seen == sorted(set(seen))
    assert {firm.id, other.id} <= set(seen)
    sites = (await firm.operator.get("/v1/sites", params={"firm_id": other.id})).json()["sites"]
    assert [(one["id"], one["slug"]) for one in sites] == [(other.site_id, "leeds")]
    assert (await firm.admin.get("/v1/sites", params={"firm_id": other.id})).status_code == 403
    for path in ("/v1/firms", "/v1/sites"):
        assert (await firm.device.get(path)).status_code == 403
        assert (await hub.client("").get(path)).status_code == 401


async def test_names_are_checked_and_every_change_leaves_one_entry(firm: FirmAtHub) -> None:
    machine = await firm.machine()
    signals = f"/v1/machines/{machine['id']}/signals"
    for names in (["Temperature"], ["a", "A"]):
        refused = await firm.admin.post(signals, json={"signals": [{"name": name} for name in names]})
        assert (refused.status_code, refused.json()["reason"]) == (400, "BAD_NAME")
    same = await firm.admin.post(signals, json={"signals": [{"name": "temperature"}]})
    assert (same.status_code, same.json()["reason"]) == (409, "ALREADY_EXISTS")
    body = {"site_id": firm.site_id, "name": "x", "kind": "press"}
    for path in ("unknown", "a/null", "/".join(["x" * 63] * 4) + "y", "Press", ""):
        refused = await firm.admin.post("/v1/machines", json=body | {"path": path})
        assert (refused.status_code, refused.json()["reason"]) == (400, "BAD_NAME")
    await created(firm.admin, signals, {"signals": [{"name": "speed"}]})
    entries = (await firm.admin.get("/v1/audit")).json()["entries"]
    assert [one["action"] for one in entries] == [
        *("signals added", "machine registered", "key issued", "key issued", "site registered", "firm registered"),
    ]
    assert all(one["firm_id"] == firm.id and one["credential_id"] and one["correlation_id"] for one in entries)


TABLE = """machine,machine_name,kind,signal,unit,range_min,range_max
leeds/line-1/saw,Saw,saw,speed,1/min,0,9000
leeds/line-1/saw,,,current,A,,
leeds/drill,Drill,drill,,,,
"""


async def machines_of(firm: FirmAtHub) -> dict[str, dict[str, Any]]:
    found = (await firm.admin.get("/v1/machines", params={"page_size": 1000})).json()["machines"]
    return {machine["path"]: machine for machine in found}


async def test_a_table_is_looked_at_imported_and_imported_again_without_a_change(firm: FirmAtHub) -> None:
    preview = await import_table(firm, TABLE, preview=True)
    assert preview.status_code == 200, preview.text
    assert (preview.json()["applied"], preview.json()["machines_created"], preview.json()["signals_created"]) == (
        False,
        2,
        2,
    )
    assert await machines_of(firm) == {}

    done = await import_table(firm, TABLE)
    assert done.json() == preview.json() | {"preview": False, "applied": True}
    saw = (await machines_of(firm))[f"{firm.slug}/leeds/line-1/saw"]
    assert (saw["name"], saw["kind"]) == ("Saw", "saw")
    assert [(s["name"], s["unit"], s.get("range_max")) for s in saw["signals"]] == [
        ("speed", "1/min", 9000),
        ("current", "A", None),
    ]
    assert (await firm.send(saw["path"], {"speed": 100, "current": 3})).json()["accepted"] == 2

    again = (await import_table(firm, TABLE)).json()
    assert {one["action"] for one in again["lines"]} == {"same"}
    assert (again["machines_changed"], again["signals_created"]) == (0, 0)
    entries = (await firm.admin.get("/v1/audit")).json()["entries"]
    assert [one["action"] for one in entries].count("table of machines imported") == 1

    exported = await firm.admin.get(f"/v1/firms/{firm.id}/machines.csv")
    assert exported.headers["content-type"].startswith("text/csv")
    same = (await import_table(firm, exported.content)).json()
    assert {one["action"] for one in same["lines"]} == {"same"}


async def test_a_table_changes_what_differs_and_the_door_knows_it(firm: FirmAtHub) -> None:
    await import_table(firm, TABLE)
    text = (
        TABLE.replace("0,9000", "0,12000").replace("Drill,drill", "Bench drill,drill") + "leeds/drill,,,torque,Nm,,\n"
    )
    changed = (await import_table(firm, text)).json()
    assert [one["action"] for one in changed["lines"]] == ["change", "same", "change", "create"]
    assert (changed["machines_changed"], changed["signals_changed"], changed["signals_created"]) == (2, 1, 1)
    path = f"{firm.slug}/leeds/line-1/saw"

    async def wider() -> bool:
        return (await firm.send(path, {"speed": 10_000})).status_code == 200

    await eventually(wider)
    drill = (await machines_of(firm))[f"{firm.slug}/leeds/drill"]
    assert (drill["name"], [signal["name"] for signal in drill["signals"]]) == ("Bench drill", ["torque"])
    assert (await firm.send(drill["path"], {"torque": 5})).json()["accepted"] == 1


async def test_one_bad_line_refuses_the_table_and_nothing_is_changed(firm: FirmAtHub) -> None:
    refused = await import_table(firm, TABLE + "hull/saw,,saw,speed,,,\nleeds/drill,,,a+b,,,\n")
    assert (refused.status_code, refused.json()["reason"], refused.json()["applied"]) == (422, "IMPORT_REFUSED", False)
    assert {one["line"]: one["reason"] for one in refused.json()["lines"] if one["action"] == "refuse"} == {
        5: "UNKNOWN_SITE",
        6: "BAD_NAME",
    }
    assert await machines_of(firm) == {}
    await set_quota(firm, signals=1)
    for preview in (True, False):
        over = await import_table(firm, TABLE, preview=preview)
        assert (over.status_code, over.json()["reason"]) == (409, "QUOTA_SIGNALS")
    assert await machines_of(firm) == {}


async def test_the_same_table_twice_at_the_same_time_makes_it_once(firm: FirmAtHub) -> None:
    answers = await asyncio.gather(*(import_table(firm, TABLE) for _ in range(4)))
    assert {answer.status_code for answer in answers} == {200}
    assert sum(answer.json()["machines_created"] for answer in answers) == 2
    assert len((await machines_of(firm))[f"{firm.slug}/leeds/line-1/saw"]["signals"]) == 2


async def test_a_large_table_is_imported_while_the_door_goes_on_answering(firm: FirmAtHub) -> None:
    lines = [f"leeds/hall-{n // 1000}/m-{n},,robot,s{k},V,," for n in range(2000) for k in range(10)]
    body = TABLE.splitlines()[0] + "\n" + "\n".join(lines)
    importing = asyncio.create_task(import_table(firm, body))
    slowest_s = 0.0
    while not importing.done():
        asked = time.monotonic()
        assert (await firm.device.get("/livez")).status_code == 200
        slowest_s = max(slowest_s, time.monotonic() - asked)
        await asyncio.sleep(0.02)
    done = (await importing).json()
    assert (done["machines_created"], done["signals_created"]) == (2000, 20_000)
    assert slowest_s < 2
    assert (await firm.send(f"{firm.slug}/leeds/hall-1/m-1999", {"s9": 1})).status_code == 200
    assert (await import_table(firm, body + "\nleeds/hall-0/m-0,,,s10,,,")).json()["reason"] == "BAD_TABLE"


async def test_tables_of_others_are_neither_read_nor_written(hub: RegistryHub, firm: FirmAtHub) -> None:
    other = await hub.firm()
    path = f"/v1/firms/{firm.id}/machines.csv"
    for client, status in ((other.admin, 404), (firm.device, 403), (hub.client(""), 401)):
        assert (await client.get(path)).status_code == status
        assert (await import_table(firm, TABLE, client=client)).status_code == status
    assert (await firm.operator.get("/v1/firms/99999999/machines.csv")).status_code == 404
    assert (await firm.operator.get(path)).status_code == 200
    template = await firm.device.get("/v1/templates/machines.csv")
    assert (await import_table(firm, template.content, preview=True)).json()["signals_created"] == 2
    multipart = await firm.admin.post(path, files={"file": ("m.csv", TABLE)})
    assert (multipart.status_code, multipart.json()["reason"]) == (400, "BAD_TABLE")
    # A path that leads into another firm is a path of this firm, and there is no such site.
    foreign = await import_table(firm, TABLE.replace("leeds/drill", f"{other.slug}/leeds/drill"))
    assert foreign.json()["lines"][2]["reason"] == "UNKNOWN_SITE"
