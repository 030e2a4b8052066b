"""Every panel of every dashboard, asked of a real Prometheus and a real TimescaleDB that a journey has filled."""

import json
import re
import secrets
import time
from pathlib import Path
from typing import Any

import asyncpg
import grpc
import httpx
import numpy as np
import pytest

from localstack.hub import Hub
from localstack.prometheus import Prometheus
from smdih.funding.v1 import funding_pb2, funding_pb2_grpc
from smdih_client import TelemetryClient
from tests.integration.otlp_receiver import Receiver
from tests.polling import eventually

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
CELL_MINUTES = 120
METRIC = re.compile(r"\bsmdih_[a-z0-9_]+")


def dashboards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}


# Of what the journey goes without: TLS and the MQTT bridge.
NOT_HERE = {"smdih_tls_certificate_expires_timestamp_seconds", "smdih_ingest_mqtt_shares_connected"}


def targets(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The queries of a dashboard, each with its panel's title."""
    return [(panel["title"], target) for panel in found["panels"] for target in panel.get("targets", [])]


async def one_trace_goes_from_the_door_to_the_award(traces: Receiver, correlation_id: str) -> None:
    """And crosses Kafka with its parents: what the fund does with a match is a child of what matching did. A process that is
    killed takes the spans of its last second along, so the parent that the fund names may be one that nobody has sent."""
    processes = {
        f"smdih-{name}" for name in ("ingest-door", "ingest-historian", "anomaly-worker", "matching-api", "funding-api")
    }
    handed_on: set[tuple[str | None, str]] = set()

    async def is_whole() -> bool:
        nonlocal handed_on
        spans = traces.of(correlation_id)
        process_of = {span.span_id: span.process for span in spans}
        handed_on = {(process_of.get(span.parent_id, "killed"), span.process) for span in spans if span.parent_id}
        return {span.process for span in spans} >= processes and any(
            parent in {"smdih-matching-api", "killed"} and child == "smdih-funding-api" for parent, child in handed_on
        )

    try:
        await eventually(is_whole)
    except AssertionError as error:
        raise AssertionError(f"handed on: {sorted(map(str, handed_on))}") from error


async def every_panel_on_prometheus_has_data(prometheus: Prometheus, hub: Hub) -> None:
    """Now or within a moment: gauges of what is in the database are measured every 15 s."""
    empty = [
        (f"{name}: {title}", target["expr"].replace("$__rate_interval", "30s").replace("$__interval", "5s"))
        for name, found in dashboards().items()
        for title, target in targets(found)
        if "expr" in target
    ]
    metadata = (("authorization", f"Bearer {hub.operator_key}"),)
    async with grpc.aio.insecure_channel(hub.processes["funding"].grpc) as channel:
        fund = funding_pb2_grpc.FundingServiceStub(channel)

        async def every_panel_has_data() -> bool:
            nonlocal empty
            await fund.TrialBalance(funding_pb2.TrialBalanceRequest(), metadata=metadata)  # unary: the journey has none
            empty = [(panel, expr) for panel, expr in empty if not await prometheus.has_data(expr)]
            return not empty

        try:
            await eventually(every_panel_has_data)
        except AssertionError as error:
            raise AssertionError("no data:\n" + "\n".join(map(": ".join, empty))) from error


async def every_rule_is_well_and_silent(prometheus: Prometheus) -> None:
    """Processes were killed one after the other and nobody is woken: each came back in time, and nothing was lost."""
    rules = await prometheus.rules()
    unwell = [rule["name"] for rule in rules if rule["health"] != "ok"]
    assert not unwell, f"rules that cannot be evaluated: {unwell}"
    firing = [
        (rule["name"], rule["alerts"])
        for rule in rules
        if rule.get("state") == "firing" and rule["name"] != "SmdihWatchdog"
    ]
    assert not firing, f"alerts that fire: {firing}"
    known = {re.sub(r"_(bucket|count|sum)$", "", name) for name in await prometheus.names()}
    asked = {re.sub(r"_(bucket|count|sum)$", "", name) for name in METRIC.findall(RULES.read_text())}
    assert asked <= known | NOT_HERE, f"metrics that nobody has: {sorted(asked - known)}"


async def every_panel_on_timescaledb_has_data(hub: Hub) -> None:
    """Asked as Grafana asks, by a login that sees one firm."""
    admin = await asyncpg.connect(hub.settings.database_dsn)
    firm_id = await admin.fetchval("SELECT min(id) FROM ingest.firm")
    await _cell_with_counters(hub, firm_id)
    since, to = "now() - INTERVAL '4 hours'", "now() + INTERVAL '1 minute'"
    board = dashboards()["shopfloor"]
    queries = [(title, target["rawSql"]) for title, target in targets(board)]
    queries += [("annotation", board["annotations"]["list"][0]["target"]["rawSql"])]
    logins = {f"smdih_firm_{firm_id}": True, f"smdih_firm_{firm_id + 1_000}": False}
    try:
        for login, sees in logins.items():
            password = secrets.token_hex(8)
            await admin.execute(f"CREATE ROLE {login} LOGIN PASSWORD '{password}' IN ROLE smdih_reader")
            reader = await asyncpg.connect(hub.settings.database_dsn, user=login, password=password)
            try:
                # What a login sets itself opens nothing.
                await reader.execute("SET smdih.firm_id = 'all'; SET search_path = public")
                firms = await reader.fetch(board["templating"]["list"][1]["query"])
                assert [row["__value"] for row in firms] == ([firm_id] if sees else [])
                query = board["templating"]["list"][2]["query"].replace("${firm}", str(firm_id))
                machines = [row["__value"] for row in await reader.fetch(query)]
                assert bool(machines) is sees
                values: dict[str, list[object]] = {}
                for title, sql in queries:
                    rows = await reader.fetch(_expanded(sql, firm_id, machines or [1], since, to))
                    values[title] = [value for row in rows for value in row.values() if value is not None]
                if sees:
                    empty = [title for title, found in values.items() if not found]
                    assert not empty, f"no data: {empty}"
                else:
                    seen = [title for title, found in values.items() if any(found)]
                    assert not seen, f"another firm sees: {seen}"
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await reader.fetchval("SELECT count(*) FROM ingest.credential")
            finally:
                await reader.close()
    finally:
        for login in logins:
            await admin.execute(f"DROP ROLE IF EXISTS {login}")
        await admin.close()


def _expanded(sql: str, firm_id: int, machines: list[int], since: str, to: str) -> str:
    """What Grafana makes of its macros and variables."""
    sql = re.sub(r"\$__timeFilter\(([^)]+)\)", rf"\1 BETWEEN {since} AND {to}", sql)
    sql = re.sub(
        r"\$__timeGroupAlias\(([^,]+), \$__interval\)", r'floor(extract(epoch FROM \1) / 60) * 60 AS "time"', sql
    )
    sql = sql.replace("$__timeFrom()", f"({since})").replace("$__timeTo()", f"({to})")
    sql = sql.replace("${firm}", str(firm_id)).replace("${machine:csv}", ",".join(map(str, machines)))
    assert "$" not in sql, sql
    return sql


async def _cell_with_counters(hub: Hub, firm_id: int) -> None:
    """A machine with power and counters, and two hours of it: busy, idle and off by turns."""
    door = hub.processes["door"]
    headers = {"Authorization": f"Bearer {hub.operator_key}"}
    async with httpx.AsyncClient(base_url=door.http, headers=headers, timeout=10) as operator:

        async def made(method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = await operator.request(method, path, json=body)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

        site = await made("POST", "/v1/sites", {"firm_id": firm_id, "slug": "cells", "name": "Cells"})
        signals = [{"name": "drawn", "unit": "kW"}, {"name": "made", "unit": "1"}, {"name": "good", "unit": "1"}]
        body = {"site_id": site["id"], "path": "cell-1", "name": "Cell 1", "kind": "cell", "signals": signals}
        machine = await made("POST", "/v1/machines", body)
        made_id, good_id = (signal["id"] for signal in machine["signals"][1:])
        settings = {"total_count_signal_id": made_id, "good_count_signal_id": good_id, "ideal_cycle_s": 20}
        await made("PUT", f"/v1/machines/{machine['id']}/kpi-settings", settings)
        key = (await made("POST", "/v1/credentials", {"role": "device", "label": "cell", "firm_id": firm_id}))["key"]
    minutes = np.arange(CELL_MINUTES)
    power = np.choose(minutes // 10 % 3, [8.0, 2.0, 0.1])
    made_items = np.cumsum(np.where(power > 5, 2.0, 0.0))
    values = np.column_stack([power, made_items, np.floor(made_items * 0.95)])
    times_us = (int(time.time()) // 60 - CELL_MINUTES + minutes) * 60_000_000
    async with TelemetryClient(door.grpc, key, source="cell") as client:
        await client.send(machine["id"], times_us, values)
        await client.flush()
    admin = await asyncpg.connect(hub.settings.database_dsn)
    try:

        async def is_stored() -> bool:
            query = "SELECT count(*) FROM ingest.rollup_1m WHERE machine_id = $1"
            return bool(await admin.fetchval(query, machine["id"]) >= CELL_MINUTES - 2)

        await eventually(is_stored)
    finally:
        await admin.close()
