"""`make k8s-test`: the hub on a real cluster, from admission to a roll-out under load. Usage: python -m deploy.k8s.check

Runs on whatever cluster KUBECONFIG and KUBECTL (default: kubectl) reach; docs/kubernetes.md says how on kind. Kafka, TimescaleDB
and Mosquitto are started on this machine, with TLS, users and rules as in production, and removed with the namespace at the end.

  K8S_LOAD_IMAGE    a command that brings the image's archive onto the nodes; {} stands for the archive
  K8S_IMAGE         the image (localhost/smdih-hub:dev)
  K8S_NEXT_IMAGE    the version that is rolled out under load; without it the same one is rolled once more
  K8S_NODE          an address at which node ports answer     K8S_SERVERS_HOST  this machine's address as pods reach it
  K8S_KEEP=1        leave everything running at the end
"""

import asyncio
import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import numpy as np

from bench.plant import Plant, register
from chaos.stage import Outcome, poll
from chaos.telemetry import HISTORY_S, judge, load
from demo.__main__ import told
from demo.journey import Journey, JourneyError, Observer
from demo.story import Story
from deploy.k8s.builtin import OPERATORS, builtin
from deploy.k8s.cluster import (
    DATABASE,
    NAMESPACE,
    Around,
    Cluster,
    ClusterError,
    Mqtt,
    this_machine_as_seen_from,
    write_overlay,
)
from localstack.certificates import Authority
from localstack.hub import Hub
from localstack.mosquitto import BRIDGE, Mosquitto
from localstack.secured import SecuredKafka, database_by_tls
from localstack.servers import LOCAL, ROOT, LocalServers, Servers, ServersError
from services.common import logs
from services.common.kafka import Cluster as KafkaCluster

HERE = Path(__file__).parent
ARCHIVE = LOCAL / "image/smdih-hub.tar"
MACHINES = 30
REQUESTS_A_SECOND = 10  # to each service
DEPLOY_DEADLINE_S = 1_800
TWO_DOORS_DEADLINE_S = 120
OLD_PODS_DEADLINE_S = 90  # more than they are given to end in
DRAINED_WITHIN_S = 300.0  # a node may have little to spare
KAFKA_AWAY_S, KAFKA_BACK_S = 30.0, 60.0
JOB_DEADLINE_S = 300


class Claims:
    """What was seen to hold, and what was not."""

    def __init__(self) -> None:
        self.failed = 0
        self.passed = 0

    def that(self, claim: str, holds: bool, why: str = "") -> None:
        self.passed += holds
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {claim}{'' if holds or not why else ': ' + why}", flush=True)


@asynccontextmanager
async def servers_for(host: str, node: str) -> AsyncIterator[Around]:
    """A broker, a database and an MQTT broker of this run, at an address that pods reach."""
    folder = LOCAL / "stacks/k8s"
    local = LocalServers("k8s", host=host)
    broker = Mosquitto(folder / "mosquitto", host=host)
    await local.remove()
    folder.mkdir(parents=True)
    authority = Authority(folder)
    kafka = SecuredKafka(folder / "kafka", host=host, names=["kafka"], authority=authority, watched=True)
    try:
        administrator, _ = await asyncio.gather(local.start_database(), kafka.start())
        await kafka.admit()
        connection = await asyncpg.connect(administrator)
        await connection.execute(f"CREATE DATABASE {DATABASE}")
        await connection.close()
        pair = authority.issue(["mqtt"], addresses=[host])
        broker.start(more=f"cafile {authority.file}\ncertfile {pair.certificate}\nkeyfile {pair.key}\n")
        mqtt = Mqtt(broker.port, BRIDGE, broker.passwords[BRIDGE])
        # By the name that pods come to it by.
        async with database_by_tls(administrator, authority.issue(["timescaledb"])):
            yield Around(host, node, administrator=administrator, kafka=kafka, mqtt=mqtt, authority=authority)
    finally:
        if not os.environ.get("K8S_KEEP"):
            broker.stop()
            kafka.remove()
            await local.remove()


def admission(cluster: Cluster, overlay: Path, claims: Claims) -> None:
    """What the server says of every object, and that it refuses what is not restricted."""
    cluster.run("apply", "--server-side", "-f", str(HERE / "base/namespace.yaml"))
    strict = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--warnings-as-errors")
    production = HERE / "overlays/production"
    groups = {line.partition("/")[0] for line in cluster.run("api-versions").stdout.split()}
    operators = [group for group in OPERATORS if group in groups]
    missing = [group for group in OPERATORS if group not in groups]
    whole = "production" + (f", but for those of {', '.join(missing)}" if missing else "")
    for what, folder in (("this run", overlay), (whole, production)):
        rendered = builtin(cluster.run("kustomize", str(folder)).stdout, beside=operators)
        done = cluster.run("apply", *strict, "-f", "-", given=rendered, check=False)
        claims.that(
            f"the server accepts all {rendered.count(chr(10) + 'kind: ')} objects of {what}, strictly, without a warning",
            done.returncode == 0,
            done.stderr,
        )
    for path in sorted((HERE / "refused").glob("*.yaml")):
        done = cluster.run("apply", "--dry-run=server", "-f", "-", given=path.read_text(), check=False)
        claims.that(f"the namespace refuses {path.stem}", "violates PodSecurity" in done.stderr, done.stderr)


async def deploy(overlay: Path) -> tuple[bool, str, float]:
    """The deploy script as an operator runs it: whether it succeeded, what it said, how many seconds it took."""
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *("bash", str(HERE / "deploy.sh"), str(overlay)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(DEPLOY_DEADLINE_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
    return process.returncode == 0, output.decode(), time.monotonic() - began


async def roll_out(overlay: Path, claims: Claims) -> None:
    """The first time."""
    done, said, seconds = await deploy(overlay)
    claims.that(f"migrated and rolled out in {seconds:.0f} s", done, said)
    if not done:
        raise ClusterError("the roll-out failed")


async def journey(hub: Hub, claims: Claims) -> None:
    """From telemetry to an award, through the Services."""
    story: Story = told(None)
    observing = asyncio.create_task(Observer(hub, story).run())
    try:
        await Journey(hub, story).walk()
        await asyncio.sleep(1)  # the observer's last look
    finally:
        observing.cancel()
        await asyncio.gather(observing, return_exceptions=True)
    summary = story.summary()
    samples = summary["samples"]
    kept = samples["stored"] == samples["acknowledged"] == samples["sent"] and samples["duplicated"] == 0
    claims.that(f"{samples['acknowledged']:,} samples through the door, each stored once", kept, str(samples))
    alarms = summary["alarms"]
    claims.that(f"{alarms['raised']} alarms, all known faults found", alarms["faults_found"] == alarms["faults_known"])
    claims.that(f"an award of {summary['award']['grant_pence']} pence", summary["trial_balance_pence"] == 0)


@dataclass
class Asked:
    """Requests that went out and what came back."""

    answered: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0


async def ask(hub: Hub, name: str, path: str, asked: Asked) -> None:
    """Ask a process over kept connections until cancelled; nothing is tried twice."""
    headers = {"Authorization": f"Bearer {hub.operator_key}"}
    base = hub.processes[name].http
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=10, verify=hub.verify) as client:
        while True:
            began = time.monotonic()
            try:
                answer = await client.get(path)
                counter = asked.answered if answer.status_code == 200 else asked.failed
                counter[f"{path} {answer.status_code}"] += 1
            except httpx.HTTPError as error:
                asked.failed[f"{path} {error!r}"] += 1
            asked.slowest_s = max(asked.slowest_s, time.monotonic() - began)
            await asyncio.sleep(max(0.0, 1 / REQUESTS_A_SECOND - (time.monotonic() - began)))


PATHS = {
    "door": "/v1/firms?page_size=1",
    "anomaly": "/v1/alarms?page_size=1",
    "matching": "/v1/providers?page_size=1",
    "funding": "/v1/fund",
}


async def kafka_away(cluster: Cluster, around: Around, hub: Hub, plant: Plant, claims: Claims) -> None:
    """A door that cannot keep telemetry says so to whoever sends, for as long as it lasts, and stays in its Service to say it."""

    def ready() -> int:
        slices = cluster.get("endpointslice", "-l", "kubernetes.io/service-name in (door, anomaly, matching, funding)")
        endpoints = [each for one in slices["items"] for each in one["endpoints"] or ()]
        return sum(bool(each["conditions"].get("ready")) for each in endpoints)

    frame = {"ts": time.time_ns() // 1_000_000, "values": {"no such signal": 1.0}}
    body = {"batches": [{"machine": plant.machine_ids[0], "frames": [frame]}]}
    headers = {"Authorization": f"Bearer {plant.key}"}
    asked, told, before = Asked(), Counter[str](), ready()
    async with httpx.AsyncClient(headers=headers, timeout=60, verify=hub.verify) as client:

        async def send() -> httpx.Response:
            return await client.post(f"{hub.processes['door'].http}/v1/telemetry", json=body)

        around.kafka.pause(True)
        asking = [asyncio.create_task(ask(hub, name, path, asked)) for name, path in PATHS.items()]
        try:
            until = time.monotonic() + KAFKA_AWAY_S
            while time.monotonic() < until:
                answer = await send()
                told[f"{answer.status_code} retry after {answer.headers.get('retry-after', 'unknown')}"] += 1
            stayed = ready()
        finally:
            around.kafka.pause(False)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

        async def is_back() -> bool:
            return (await send()).status_code in (200, 422)

        await poll("the door takes telemetry again", is_back, deadline_s=KAFKA_BACK_S, interval_s=1)
    clearly = bool(told) and all(what.startswith("503 retry after ") and "unknown" not in what for what in told)
    claims.that(f"while Kafka is away, the door says so with a delay ({told.total()} times)", clearly, str(dict(told)))
    claims.that(
        f"all {before} endpoints stay meanwhile, and {sum(asked.answered.values())} questions are answered",
        stayed == before and not asked.failed,
        f"{stayed} stayed, {dict(asked.failed)}",
    )


async def job(cluster: Cluster, name: str) -> tuple[dict[str, Any], str]:
    """Run one of a CronJob now; what it told at its end (nothing when it failed), and all that it said."""
    made = f"{name}-now"
    cluster.run("-n", NAMESPACE, "create", "job", made, f"--from=cronjob/{name}")
    return await job_ended(cluster, made)


async def job_ended(cluster: Cluster, made: str) -> tuple[dict[str, Any], str]:
    """What a job told at its end (nothing when it failed), and all that it said."""

    def state() -> set[str]:
        conditions = cluster.get("job", made)["status"].get("conditions", ())
        return {one["type"] for one in conditions if one["status"] == "True"}

    async def has_ended() -> bool:
        return bool(state() & {"Complete", "Failed"})

    await poll(f"{made} ends", has_ended, deadline_s=JOB_DEADLINE_S, interval_s=2)
    said = cluster.run("-n", NAMESPACE, "logs", f"job/{made}", check=False).stdout.strip()
    return json.loads(said.splitlines()[-1]) if "Complete" in state() else {}, said


async def backup(cluster: Cluster, claims: Claims) -> None:
    """As the clock would start it."""
    told, said = await job(cluster, "backup")
    claims.that(
        f"a dump of {told.get('tables', 0)} tables with {told.get('rows', 0):,} rows by its own login",
        told.get("done") == "keep" and told["rows"] > 0,
        said,
    )


async def restore(cluster: Cluster, around: Around, claims: Claims) -> None:
    """A dump comes back by the job for it, into a database beside the one that it is of. No volume is provided here, so one pod
    takes the dump and then restores it."""
    beside = around.secrets()["smdih-database-admin"]["dsn"].removesuffix(f"/{DATABASE}") + "/restored"
    given = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "restored"}, "stringData": {"dsn": beside}}
    cluster.run("-n", NAMESPACE, "apply", "-f", "-", given=json.dumps(given))
    made, dumping = (cluster.get("cronjob", name)["spec"]["jobTemplate"]["spec"] for name in ("restore", "backup"))
    pod = made["template"]["spec"]
    pod["initContainers"] = [dumping["template"]["spec"]["containers"][0] | {"name": "dump"}]
    (dsn,) = (one for one in pod["containers"][0]["env"] if one["name"] == "SMDIH_DATABASE_DSN")
    dsn["valueFrom"]["secretKeyRef"]["name"] = "restored"
    wanted = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "restore-now"}, "spec": made}
    cluster.run("-n", NAMESPACE, "create", "-f", "-", given=json.dumps(wanted))
    told, said = await job_ended(cluster, "restore-now")
    claims.that(
        f"a dump of {told.get('rows', 0):,} rows comes back by its job, and is compared",
        told.get("done") == "restore" and told["rows"] > 0,
        said,
    )


async def reconcile(cluster: Cluster, claims: Claims) -> None:
    """As after a disaster: it wants to be alone, and here finds that both sides agree."""
    cluster.run("-n", NAMESPACE, "scale", "deployment,statefulset", "--all", "--replicas=0")

    async def is_empty() -> bool:
        phases = {pod["status"]["phase"] for pod in cluster.get("pod")["items"]}
        return not phases - {"Succeeded", "Failed"}

    await poll("every process ends", is_empty, deadline_s=OLD_PODS_DEADLINE_S, interval_s=1)
    told, said = await job(cluster, "reconcile")
    claims.that(
        "with no process left, database and Kafka are found to agree by a login and a user of its own",
        told.get("done") == "after-restore" and told["records_lost"] == told["keys_revoked"] == 0,
        said,
    )


async def eviction(cluster: Cluster, claims: Claims) -> None:
    """A drain may take one door, and has to wait with the other."""

    async def are_two_ready() -> bool:
        ready = [
            pod
            for pod in cluster.pods("door")
            if any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))
        ]
        return len(ready) >= 2

    await poll("two doors are ready", are_two_ready, deadline_s=TWO_DOORS_DEADLINE_S, interval_s=1)
    first, second, *_ = (pod["metadata"]["name"] for pod in cluster.pods("door"))
    claims.that("the budget lets one door be evicted", cluster.evict(first))
    claims.that("the budget refuses the next one meanwhile", not cluster.evict(second))
    await poll("two doors are ready again", are_two_ready, deadline_s=TWO_DOORS_DEADLINE_S, interval_s=1)


async def roll_out_under_load(cluster: Cluster, next_overlay: Path, hub: Hub, plant: Plant, claims: Claims) -> None:
    """The next version: migrated, and every process replaced, while gateways send and people ask."""
    start_s = int(time.time()) - HISTORY_S
    asked, outcome = Asked(), Outcome()
    async with load(hub, plant, start_s, secrets.randbelow(2**31)) as sender:
        asking = [asyncio.create_task(ask(hub, name, path, asked)) for name, path in PATHS.items()]
        await asyncio.sleep(3)
        before = cluster.pod_ids()
        done, said, seconds = await deploy(next_overlay)

        async def has_the_last_of_them_ended() -> bool:
            return not before & cluster.pod_ids()

        with contextlib.suppress(TimeoutError):
            await poll("old pods end", has_the_last_of_them_ended, deadline_s=OLD_PODS_DEADLINE_S, interval_s=1)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        sent = await sender.stop()
        ledger = np.loadtxt(sender.ledger, dtype=np.int64, ndmin=2)
    left = before & cluster.pod_ids()
    claims.that(f"every process was replaced in {seconds:.0f} s under load", done and not left, f"{left} {said}")
    await judge(hub, plant, ledger, start_s, time.monotonic(), outcome, DRAINED_WITHIN_S)
    whole = sent["sent"] == sent["acknowledged"] and not sent["problems"] and not outcome.broken
    claims.that(
        f"{outcome.acknowledged:,} samples acknowledged meanwhile ({sent['reconnects']} reconnects), "
        f"{outcome.lost} lost, {outcome.duplicated} twice",
        outcome.ok and whole,
        f"{sent} {outcome.broken}",
    )
    total = sum(asked.answered.values()) + sum(asked.failed.values())
    claims.that(
        f"{total:,} requests meanwhile, {sum(asked.failed.values())} failed, the slowest took {asked.slowest_s:.1f} s",
        not asked.failed and total > 0,
        str(dict(asked.failed)),
    )


async def tell_memory(hub: Hub) -> None:
    """What the processes hold after all this: the requests in the manifests are to be above it."""
    async with httpx.AsyncClient(timeout=5, verify=hub.verify) as client:
        for name, running in hub.processes.items():
            text = (await client.get(f"{running.probes}/metrics")).text
            held = [line for line in text.splitlines() if line.startswith("process_resident_memory_bytes")]
            print(f"     {name}: {float(held[0].split()[1]) / 2**20:.0f} MiB resident", flush=True)


async def check() -> int:
    """Everything, one after the other. Told to stop, it first removes what it made."""
    me = asyncio.current_task()
    assert me is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, me.cancel)
    cluster, claims = Cluster(), Claims()
    image = os.environ.get("K8S_IMAGE", "localhost/smdih-hub:dev")
    node = cluster.node_address()
    host = this_machine_as_seen_from(node)
    if command := os.environ.get("K8S_LOAD_IMAGE"):
        subprocess.run([part.replace("{}", str(ARCHIVE)) for part in shlex.split(command)], check=True)
    async with servers_for(host, node) as around:
        overlay = write_overlay(around, image)
        try:
            admission(cluster, overlay, claims)
            await roll_out(overlay, claims)
            # As an operator makes the first key.
            made = ("deploy/door", "--", "python3", "-m", "services.ingest.main", "operator-key")
            key = cluster.run("-n", NAMESPACE, "exec", *made).stdout.strip()
            # Who watches from beside comes as the administrator, and to Kafka by the way that only this machine has.
            hub = Hub(Servers(around.kafka.open_bootstrap, around.watching), LOCAL / "log/k8s", ca=around.ca)
            hub.operator_key, hub.processes = key, cluster.processes(node)
            await journey(hub, claims)
            await eviction(cluster, claims)
            plant = await register(hub.settings.database_dsn, KafkaCluster.of(hub.settings), MACHINES)
            await asyncio.sleep(2)  # the doors' directories follow
            await kafka_away(cluster, around, hub, plant, claims)
            # Another image, or else another setting: either replaces every pod.
            next_image = os.environ.get("K8S_NEXT_IMAGE", image)
            write_overlay(around, next_image, log_level="WARNING")
            await roll_out_under_load(cluster, overlay, hub, plant, claims)
            await backup(cluster, claims)
            await restore(cluster, around, claims)
            await tell_memory(hub)
            await reconcile(cluster, claims)
        finally:
            if not os.environ.get("K8S_KEEP"):
                with contextlib.suppress(ClusterError):
                    cluster.run("delete", "namespace", NAMESPACE, "--wait")
    print(f"{claims.passed} passed, {claims.failed} failed")
    return 1 if claims.failed else 0


def main() -> int:
    logs.configure("k8s-test", "ERROR")
    os.chdir(ROOT)
    try:
        return asyncio.run(check())
    except (ClusterError, ServersError, JourneyError, TimeoutError) as error:
        print(f"k8s-test: {error}", file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        return 130


if __name__ == "__main__":
    sys.exit(main())
