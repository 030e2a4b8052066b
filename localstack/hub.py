"""All processes of the hub on this machine: started, watched, started again when they die."""

import asyncio
import json
import os
import ssl
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from localstack.mosquitto import BRIDGE, Mosquitto
from localstack.servers import ROOT, Servers, free_port
from services.common.evidence import Signer, new_key
from services.common.kafka import Identity
from services.common.settings import Settings
from services.ingest.main import operator_key
from services.migrate import migrate_all

# A busy machine needs long for the first start.
READY_TIMEOUT_S = 180
STOP_TIMEOUT_S = 15
RESTART_DELAY_S = 0.5
RESTART_DELAY_S_MAX = 10.0


@dataclass(frozen=True)
class Role:
    """One process: what it is called, how it is started, which edges it has."""

    name: str
    module: str
    role: str
    has_grpc: bool
    needs_mqtt: bool = False
    number: int = 1

    @property
    def access(self) -> str:
        """Its name in services/common/access.py, also of a second process of the role."""
        return self.name if self.number == 1 else self.name.removesuffix(f"-{self.number}")


ROLES = (
    Role("door", "services.ingest.main", "door", has_grpc=True),
    Role("historian", "services.ingest.main", "historian", has_grpc=False),
    Role("mqtt-bridge", "services.ingest.main", "mqtt", has_grpc=False, needs_mqtt=True),
    Role("anomaly-worker", "services.anomaly.main", "worker", has_grpc=False),
    Role("anomaly", "services.anomaly.main", "api", has_grpc=True),
    Role("anomaly-notifier", "services.anomaly.main", "notifier", has_grpc=False),
    Role("matching", "services.matching.main", "api", has_grpc=True),
    Role("funding", "services.funding.main", "api", has_grpc=True),
)


@dataclass
class Running:
    """A process with its ports, which it keeps when it is started again."""

    role: Role
    http_port: int
    grpc_port: int
    process: asyncio.subprocess.Process | None = None
    starts: int = 0
    watcher: asyncio.Task[None] | None = None
    host: str = "127.0.0.1"
    scheme: str = "http"
    probe_port: int = 0

    @property
    def probes(self) -> str:
        """Where /readyz and /metrics are."""
        return f"http://{self.host}:{self.probe_port}" if self.probe_port else self.http

    @property
    def http(self) -> str:
        return f"{self.scheme}://{self.host}:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"{self.host}:{self.grpc_port}"


class HubError(Exception):
    """A process did not come up; the message names its log."""


class Hub:
    """The hub's processes on given servers. Logs go to `folder`/<name>.log."""

    def __init__(
        self,
        servers: Servers,
        folder: Path,
        *,
        topic_prefix: str = "",
        roles: Collection[str] | None = None,
        copies: Mapping[str, int] | None = None,
        mqtt: Mosquitto | None = None,
        identities: Mapping[str, Identity] | None = None,
        code: Path = ROOT,
        instance_suffix: str = "",
        environment: Mapping[str, str] | None = None,
        ca: Path | None = None,
    ) -> None:
        """`roles`: only these, by name. `copies`: more than one process of a role; the second is called NAME-2.

        `mqtt`: the broker that the bridge connects to; without it there is no bridge. `identities`: as whom each process, and
        "migrate", comes to Kafka; without it as nobody. `code`: the checkout that is run, with its gen/. `instance_suffix`: keeps
        workers apart from those of another hub on the same servers. `environment`: further settings of every process; `ca`: the
        authority of their certificates, where these settings name some.
        """
        self._folder = folder
        self._code = code
        self._instance_suffix = instance_suffix
        self._mqtt = mqtt
        self._identities = identities or {}
        self._further = dict(environment or {})
        self.ca = ca
        # By what httpx knows the processes.
        self.verify = ssl.create_default_context(cafile=ca) if ca else True
        self.settings = Settings(
            kafka_bootstrap=servers.kafka_bootstrap,
            database_dsn=servers.database_dsn,
            kafka_topic_prefix=topic_prefix,
            **{f"kafka_{name}": value for name, value in self._identity("migrate").items()},
        )
        self._roles = [
            role if number == 1 else replace(role, name=f"{role.name}-{number}", number=number)
            for role in ROLES
            if (roles is None or role.name in roles) and (mqtt is not None or not role.needs_mqtt)
            for number in range(1, (copies or {}).get(role.name, 1) + 1)
        ]
        self.processes: dict[str, Running] = {}
        self.operator_key = ""
        # Throw-away, like the keys: evidence of one run is checked with the key of that run.
        self.evidence_key = new_key()
        self._stopping = False

    async def start(self) -> None:
        """Bring databases and topics up to date, start every process and wait until all are ready. Raises HubError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for role in self._roles:
            self.processes[role.name] = Running(
                role,
                free_port(),
                free_port(),
                scheme="https" if self.ca else "http",
                # As in production, where TLS is.
                probe_port=free_port() if self.ca else 0,
            )
        if self._code == ROOT:
            await migrate_all(self.settings)
            self.operator_key = await operator_key(self.settings)
        else:
            await self._command("services.migrate")
            self.operator_key = (await self._command("services.ingest.main", "operator-key")).strip()
        for running in self.processes.values():
            running.watcher = asyncio.create_task(self._watch(running))
        await asyncio.gather(*(self.wait_ready(name) for name in self.processes))

    async def wait_ready(self, name: str) -> None:
        """Return once the process says that it is ready. Raises HubError when that takes too long."""
        running = self.processes[name]
        until = time.monotonic() + READY_TIMEOUT_S
        async with httpx.AsyncClient(timeout=5, verify=self.verify) as client:
            while True:
                try:
                    answer = await client.get(f"{running.probes}/readyz")
                    if answer.status_code == 200:
                        return
                    missing = answer.text
                except httpx.HTTPError as error:
                    missing = repr(error)
                if time.monotonic() > until:
                    raise HubError(f"{name} is not ready after {READY_TIMEOUT_S} s ({missing}): see {self._log(name)}")
                await asyncio.sleep(0.1)

    def kill(self, name: str) -> None:
        """SIGKILL a process, as a fault; it is started again."""
        process = self.processes[name].process
        if process is not None and process.returncode is None:
            process.kill()

    async def pause(self, name: str) -> None:
        """Stop one process politely and do not start it again until `resume`."""
        running = self.processes[name]
        if running.watcher is not None:
            running.watcher.cancel()
            await asyncio.gather(running.watcher, return_exceptions=True)
        if running.process is not None and running.process.returncode is None:
            running.process.terminate()
            await running.process.wait()

    def resume(self, name: str) -> None:
        """Start a paused process again."""
        running = self.processes[name]
        running.watcher = asyncio.create_task(self._watch(running))

    async def stop(self) -> None:
        """Stop all processes politely, in reverse order of starting."""
        self._stopping = True
        for running in reversed(self.processes.values()):
            process = running.process
            if process is not None and process.returncode is None:
                process.terminate()
        for running in self.processes.values():
            if running.process is not None:
                try:
                    async with asyncio.timeout(STOP_TIMEOUT_S):
                        await running.process.wait()
                except TimeoutError:
                    running.process.kill()
                    await running.process.wait()
            if running.watcher is not None:
                running.watcher.cancel()
                await asyncio.gather(running.watcher, return_exceptions=True)

    def endpoints(self) -> dict[str, Any]:
        """Where everything answers."""
        found: dict[str, Any] = {
            "kafka": self.settings.kafka_bootstrap,
            "database": self.settings.database_dsn,
            "processes": {name: running.probes for name, running in self.processes.items()},
        }
        for service, name in (
            ("ingest", "door"),
            ("anomaly", "anomaly"),
            ("matching", "matching"),
            ("funding", "funding"),
        ):
            if name in self.processes:
                found[service] = {"grpc": self.processes[name].grpc, "http": self.processes[name].http}
        return found

    def _identity(self, process: str) -> dict[str, Any]:
        """Settings (without their prefix) of a process's identity at Kafka."""
        identity = self._identities.get(process, Identity())
        return {
            "security_protocol": identity.protocol,
            "sasl_mechanism": identity.mechanism,
            "username": identity.username,
            "password": identity.password,
            "ca_file": identity.ca_file,
        }

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        return os.environ | {
            "SMDIH_KAFKA_BOOTSTRAP": self.settings.kafka_bootstrap,
            "SMDIH_KAFKA_TOPIC_PREFIX": self.settings.kafka_topic_prefix,
            "SMDIH_DATABASE_DSN": self.settings.database_dsn,
            "PYTHONPATH": f"{self._code}:{self._code / 'gen'}",
        }

    async def _command(self, module: str, *arguments: str) -> str:
        """What a command of the code that is run prints. Raises HubError."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module, *arguments),
            cwd=self._code,
            env=self._environment(),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, told = await process.communicate()
        if process.returncode:
            raise HubError(f"{module} failed: {told.decode()[-2000:]}")
        return output.decode()

    async def _watch(self, running: Running) -> None:
        environment = self._environment() | {
            "SMDIH_HTTP_PORT": str(running.http_port),
            "SMDIH_PROBE_PORT": str(running.probe_port),
            "SMDIH_GRPC_PORT": str(running.grpc_port),
            # A worker that was killed gets its partitions back at once.
            "SMDIH_ANOMALY_INSTANCE": running.role.name + self._instance_suffix,
            # Where explanations of alarms get their samples.
            "SMDIH_INGEST_GRPC": self.processes["door"].grpc if "door" in self.processes else "",
            # One arithmetic thread a process: on a small machine more only get into each other's way.
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        environment |= self._further
        for name, value in self._identity(running.role.access).items():
            environment[f"SMDIH_KAFKA_{name.upper()}"] = value
        if "matching" in self.processes:
            environment["SMDIH_MATCHING_GRPC"] = self.processes["matching"].grpc
        if self._mqtt is not None and running.role.needs_mqtt:
            environment |= {
                "SMDIH_MQTT_PORT": str(self._mqtt.port),
                "SMDIH_MQTT_USER": BRIDGE,
                "SMDIH_MQTT_PASSWORD": self._mqtt.passwords[BRIDGE],
            }
        if running.role.name == "door":  # nobody else signs
            environment["SMDIH_EVIDENCE_KEY"] = self.evidence_key
        if running.role.module == "services.funding.main":
            environment["SMDIH_EVIDENCE_PUBLIC_KEYS"] = Signer(self.evidence_key).public_key
        delay_s = RESTART_DELAY_S
        while not self._stopping:
            started = time.monotonic()
            with self._log(running.role.name).open("ab") as log:
                running.process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *("-m", running.role.module, running.role.role),
                    cwd=self._code,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            running.starts += 1
            await running.process.wait()
            delay_s = RESTART_DELAY_S if time.monotonic() - started > 30 else min(delay_s * 2, RESTART_DELAY_S_MAX)
            await asyncio.sleep(delay_s)


def write_endpoints(path: Path, endpoints: dict[str, Any]) -> None:
    """For people and scripts; holds keys, so only its owner may read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    path.write_text(json.dumps(endpoints, indent=1) + "\n")
