"""`make up` and `make down`: the stack and all services, left running. Usage: python -m localstack up|down."""

import asyncio
import json
import secrets
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import psutil

from localstack import mosquitto
from localstack.hub import Hub, HubError, write_endpoints
from localstack.prometheus import write_targets
from localstack.servers import LOCAL, ROOT, LocalServers, ServersError, named_in_environment
from services.common import logs

NAME = "up"
ENDPOINTS = LOCAL / "endpoints.json"
STATE = LOCAL / "stacks" / NAME / "supervisor.json"
MQTT = LOCAL / "stacks" / NAME / "mosquitto"
LOGS = LOCAL / "log" / NAME
# deploy/prometheus/prometheus.yml reads it.
PROMETHEUS_TARGETS = LOCAL / "prometheus-targets.json"
UP_TIMEOUT_S = 120
DOWN_TIMEOUT_S = 60

# The firm that `up` makes to try things with; it has an account at the MQTT broker.
FIRM = "local-firm"
FIRST_TRIES = """
The hub is up. Keys and addresses: .local/endpoints.json   Logs: .local/log/up/   Stop it: make down

  telemetry   curl -H "Authorization: Bearer {device}" {ingest}/v1/telemetry \\
                -d '{{"batches": [{{"machine": "{machine}", "frames": [{{"ts": {now_ms}, "values": {{"temperature": 21.5}}}}]}}]}}'
{mqtt}  stored      curl -H "Authorization: Bearer {device}" {ingest}/v1/machines/{machine_id}/latest
  no data?    curl -H "Authorization: Bearer {device}" {ingest}/v1/machines/{machine_id}/diagnosis
  alarms      curl -H "Authorization: Bearer {operator}" {anomaly}/v1/alarms   (drawn: .../v1/alarms/ID/picture)
  rules       curl -H "Authorization: Bearer {operator}" {anomaly}/v1/rules   (who is told: .../v1/escalations?firm_id=1)
  providers   curl -H "Authorization: Bearer {partner}" {matching}/v1/providers
  the fund    curl -H "Authorization: Bearer {operator}" {funding}/v1/ledger/trial-balance
  gRPC        ingest {ingest_grpc}  anomaly {anomaly_grpc}  matching {matching_grpc}  funding {funding_grpc}
              (health and reflection on each; contracts in proto/)
  metrics     prometheus --config.file=deploy/prometheus/prometheus.yml --storage.tsdb.path=.local/prometheus   (docs/watch.md)
  Kafka       {kafka}
  database    {database}
"""

MQTT_TRY = """\
  MQTT        mosquitto_pub -h {host} -p {port} -u {user} -P {password} -q 1 \\
                -t smdih/v1/{machine}/temperature -m '{{"timestamp_ms": {now_ms}, "value": 21.5}}'
"""


def _supervisor() -> psutil.Process | None:
    try:
        state = json.loads(STATE.read_text())
        process = psutil.Process(state["pid"])
        return process if abs(process.create_time() - state["started"]) < 0.01 else None
    except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
        return None


def up() -> int:
    """Start the supervisor, wait until everything is ready, say where it is."""
    if _supervisor() is None:
        ENDPOINTS.unlink(missing_ok=True)
        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / "supervisor.log").open("ab") as log:
            child = subprocess.Popen(
                [sys.executable, "-m", "localstack", "supervise"],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        print("starting Kafka, TimescaleDB and the services ...", flush=True)
        until = time.monotonic() + UP_TIMEOUT_S
        while not ENDPOINTS.exists():
            if child.poll() is not None or time.monotonic() > until:
                print(f"the hub did not start: see {LOGS / 'supervisor.log'}", file=sys.stderr)
                child.terminate()
                return 1
            time.sleep(0.2)
    found = json.loads(ENDPOINTS.read_text())
    now_ms = int(time.time() * 1000)
    mqtt = found.get("mqtt")
    print(
        FIRST_TRIES.format(
            **{service: found[service]["http"] for service in ("ingest", "anomaly", "matching", "funding")},
            **{f"{service}_grpc": found[service]["grpc"] for service in ("ingest", "anomaly", "matching", "funding")},
            **found["credentials"],
            **found["example"],
            kafka=found["kafka"],
            database=found["database"],
            now_ms=now_ms,
            mqtt=MQTT_TRY.format(**mqtt, **found["example"], now_ms=now_ms) if mqtt else "",
        )
    )
    return 0


def down() -> int:
    """Stop what `up` started, and nothing else."""
    process = _supervisor()
    if process is not None:
        process.terminate()
        try:
            process.wait(DOWN_TIMEOUT_S)
        except psutil.TimeoutExpired:
            process.kill()
    asyncio.run(LocalServers(NAME).stop())  # also what a killed supervisor has left
    mosquitto.Mosquitto(MQTT).stop()
    ENDPOINTS.unlink(missing_ok=True)
    print("the hub is down" if process else "the hub was not up")
    return 0


async def supervise() -> None:
    """Run the stack and the services until told to stop."""
    logs.configure("supervisor", "WARNING")
    STATE.parent.mkdir(parents=True, exist_ok=True)
    me = psutil.Process()
    STATE.write_text(json.dumps({"pid": me.pid, "started": me.create_time()}))
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    local = LocalServers(NAME)
    hub: Hub | None = None
    # Where only the other servers are named and it is not installed, the hub runs without an MQTT bridge.
    broker = mosquitto.Mosquitto(MQTT) if mosquitto.program() else None
    try:
        servers = named_in_environment() or await local.start()
        if broker is not None:
            broker.start({FIRM: secrets.token_urlsafe(12)})
        hub = Hub(servers, LOGS, mqtt=broker)
        await hub.start()
        found = hub.endpoints() | await _example(hub)
        if broker is not None:
            found["mqtt"] = {
                "host": "127.0.0.1",
                "port": broker.port,
                "user": FIRM,
                "password": broker.passwords[FIRM],
            }
        write_targets(PROMETHEUS_TARGETS, found["processes"])
        write_endpoints(ENDPOINTS, found)
        await stop.wait()
    finally:
        ENDPOINTS.unlink(missing_ok=True)
        if hub is not None:
            await hub.stop()
        if broker is not None:
            broker.stop()
        await local.stop()
        STATE.unlink(missing_ok=True)


async def _example(hub: Hub) -> dict[str, Any]:
    """A firm with a machine and a partner to try things with, and throw-away keys for each role."""
    door = hub.processes["door"].http
    async with httpx.AsyncClient(base_url=door, headers={"Authorization": f"Bearer {hub.operator_key}"}) as operator:

        async def made(path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = await operator.post(path, json=body)
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

        firm = await made(
            "/v1/firms",
            {
                "name": "Local Firm Ltd",
                "slug": FIRM,
                "sic": "25.62",
                "region": "Northern Ireland",
                "size": "small",
            },
        )
        site = await made("/v1/sites", {"firm_id": firm["id"], "slug": "works", "name": "Works"})
        signals = [{"name": "temperature", "unit": "degC"}, {"name": "current", "unit": "A"}]
        body = {"site_id": site["id"], "path": "press-1", "name": "Press 1", "kind": "press", "signals": signals}
        machine = await made("/v1/machines", body)
        partner = await made("/v1/partners", {"name": "Local Partner", "region": "Northern Ireland"})
        keys = {
            role: (await made("/v1/credentials", {"role": role, "label": "local stack", **owner}))["key"]
            for role, owner in (
                ("device", {"firm_id": firm["id"]}),
                ("firm", {"firm_id": firm["id"]}),
                ("partner", {"partner_id": partner["id"]}),
            )
        }
    return {
        "credentials": keys | {"operator": hub.operator_key},
        "example": {"machine": machine["path"], "machine_id": machine["id"]},
    }


def main(arguments: list[str]) -> int:
    if arguments == ["up"]:
        return up()
    if arguments == ["down"]:
        return down()
    if arguments == ["supervise"]:
        try:
            asyncio.run(supervise())
        except (ServersError, HubError) as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
