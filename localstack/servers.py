"""A real Kafka and a real TimescaleDB on this machine: started on free ports, found again, and stopped by who started them."""

import asyncio
import contextlib
import fcntl
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT / ".local"
KAFKA_LIBS = LOCAL / "servers/kafka"
PG_ROOT = LOCAL / "servers/timescaledb/root"
PG_BIN = "/usr/lib/postgresql/17/bin"
# A broker for one small machine: little compiling, one collector thread.
JAVA_OPTIONS = ("-Xmx512m", "-Xms256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 20


IN_THE_CLEAR = ("listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",)


def broker_settings(listener: str, controller_port: int, data: Path) -> list[str]:
    """Properties of a broker that is alone, for one machine."""
    listeners = f"{listener},CONTROLLER://127.0.0.1:{controller_port}"
    return [
        "process.roles=broker,controller",
        "node.id=1",
        f"controller.quorum.bootstrap.servers=127.0.0.1:{controller_port}",
        f"listeners={listeners}",
        f"advertised.listeners={listeners}",
        "controller.listener.names=CONTROLLER",
        f"log.dirs={data}",
        "offsets.topic.replication.factor=1",
        "transaction.state.log.replication.factor=1",
        "transaction.state.log.min.isr=1",
        "share.coordinator.state.topic.replication.factor=1",
        "share.coordinator.state.topic.min.isr=1",
        "offsets.topic.num.partitions=8",
        "transaction.state.log.num.partitions=4",
        "group.initial.rebalance.delay.ms=0",
        "auto.create.topics.enable=false",
        "message.max.bytes=8388608",
    ]


@dataclass(frozen=True)
class Servers:
    """Where a broker and a database answer."""

    kafka_bootstrap: str
    database_dsn: str


class ServersError(Exception):
    """The local servers cannot be started; the message says what to do."""


def named_in_environment() -> Servers | None:
    """The servers named in SMDIH_KAFKA_BOOTSTRAP and SMDIH_DATABASE_DSN, if both are."""
    bootstrap, dsn = os.environ.get("SMDIH_KAFKA_BOOTSTRAP"), os.environ.get("SMDIH_DATABASE_DSN")
    return Servers(bootstrap, dsn) if bootstrap and dsn else None


def free_port() -> int:
    """A port that nobody listens on, below the range from which the system takes ports for outgoing connections. It is given once:
    neither this process nor another one that asks here gets it too before somebody listens there."""
    while True:
        if not _ports:
            _ports.extend(_block_of_ports())
        port = _ports.pop()
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


PORTS = range(15_000, 32_000)
PORTS_A_BLOCK = 250
# What is left of this process's blocks, and the locks that make them its own until it ends.
_ports: list[int] = []
_blocks: dict[int, int] = {}


def _block_of_ports() -> list[int]:
    folder = Path(tempfile.gettempdir()) / f"smdih-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    firsts = list(PORTS[::PORTS_A_BLOCK])
    random.shuffle(firsts)
    for first in firsts:
        if first in _blocks:
            continue
        lock = os.open(folder / str(first), os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            continue
        _blocks[first] = lock
        return list(range(first, first + PORTS_A_BLOCK))
    if not _blocks:
        raise RuntimeError(f"other processes of this machine hold all ports from {PORTS.start} to {PORTS.stop}")
    return [port for first in _blocks for port in range(first, first + PORTS_A_BLOCK)]  # given long ago


class LocalServers:
    """One Kafka and one PostgreSQL with TimescaleDB, with their data below .local; several sets may run side by side by name."""

    def __init__(self, name: str, *, host: str = "127.0.0.1", outlives_power: bool = True) -> None:
        """`host`: an address of this machine that others reach; by default only the machine itself gets through.

        `outlives_power`: without it the database leaves writing to the disk to the system: what is committed outlives the
        database's end, also by SIGKILL, but not the machine's. For what is thrown away afterwards; much quicker.
        """
        self.folder = LOCAL / "stacks" / name
        self.host = host
        self._outlives_power = outlives_power
        self._state_file = self.folder / "servers.json"
        # PostgreSQL runs in a root folder of its own: paths are as seen from inside.
        self._pg_data = f"/var/lib/postgresql/{name}"
        self._kafka: subprocess.Popen[bytes] | None = None

    async def start(self) -> Servers:
        """Start what does not run yet. Raises ServersError with the next step when that is not possible."""
        state = self._made()
        await asyncio.gather(self._start_kafka(state), self._start_postgres(state))
        servers = Servers(f"{self.host}:{state['kafka']['port']}", self._dsn(state))
        await asyncio.gather(self._prove_kafka(servers, state), self._prove_postgres(servers, state))
        return servers

    async def start_database(self) -> str:
        """The same for the database alone; returns its DSN, as its superuser."""
        state = self._made()
        await self._start_postgres(state)
        await self._prove_postgres(Servers("", self._dsn(state)), state)
        return self._dsn(state)

    def _made(self) -> dict[str, Any]:
        if not KAFKA_LIBS.is_dir() or not PG_ROOT.is_dir():
            raise ServersError("the local servers are not installed: run `make setup`")
        self.folder.mkdir(parents=True, exist_ok=True)
        state = self._read() or {"secret": secrets.token_hex(16), "kafka": {}, "postgres": {}}
        self._write(state)
        return state

    def _dsn(self, state: dict[str, Any]) -> str:
        return f"postgresql://postgres:{state['secret']}@{self.host}:{state['postgres']['port']}/postgres"

    async def stop(self) -> None:
        """Stop what `start` started, and nothing else; the data stay."""
        state = self._read()
        if state is None:
            return
        kafka = self._running(state["kafka"])
        if kafka is not None:
            kafka.terminate()
        if self._running(state["postgres"]) is not None:
            await self._pg("pg_ctl", "-D", self._pg_data, "-m", "fast", "-w", "stop")
        if kafka is not None:
            try:
                await asyncio.to_thread(kafka.wait, STOP_TIMEOUT_S)
            except psutil.TimeoutExpired:
                kafka.kill()
        if self._kafka is not None:
            self._kafka.wait()
        for part in ("kafka", "postgres"):
            state[part].pop("pid", None)
        self._write(state)

    async def remove(self) -> None:
        """Delete the data; the servers are ended at once, since nothing of theirs is wanted any more."""
        state = self._read()
        if state is not None:
            self._kill("kafka")
            if self._running(state["postgres"]) is not None:
                await self.stop_postgres_at_once()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(PG_ROOT / self._pg_data.lstrip("/"), ignore_errors=True)

    # Single servers, for tests that take one away.

    def kill_kafka(self) -> None:
        """SIGKILL the broker."""
        self._kill("kafka")

    async def restart_kafka(self) -> None:
        """Start the broker again on the same data and port."""
        state = self._read()
        assert state is not None
        await self._start_kafka(state)
        await self._prove_kafka(Servers(f"{self.host}:{state['kafka']['port']}", ""), state)

    def pause_kafka(self, paused: bool) -> None:
        """Stop the broker from answering while its connections stay open, or let it go on."""
        state = self._read()
        process = self._running(state["kafka"]) if state else None
        if process is not None:
            (process.suspend if paused else process.resume)()

    def kill_postgres(self) -> None:
        """SIGKILL the database server and every process of it."""
        state = self._read()
        server = self._running(state["postgres"]) if state else None
        if server is None:
            return
        processes = [server, *server.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)

    async def stop_postgres_at_once(self) -> None:
        """Stop the database without a clean shutdown, as a crash would."""
        await self._pg("pg_ctl", "-D", self._pg_data, "-m", "immediate", "-w", "stop")

    async def restart_postgres(self) -> None:
        """Start the database again on the same data and port."""
        state = self._read()
        assert state is not None
        await self._start_postgres(state)

    def _kill(self, part: str) -> None:
        state = self._read()
        process = self._running(state[part]) if state else None
        if process is not None:
            process.kill()
            process.wait()
        if part == "kafka" and self._kafka is not None:
            self._kafka.wait()

    async def _start_kafka(self, state: dict[str, Any]) -> None:
        kafka = state["kafka"]
        if self._running(kafka) is not None:
            return
        kafka["port"] = port_again(kafka.get("port"))
        controller_port = free_port()
        data = self.folder / "kafka"
        config = self.folder / "kafka.properties"
        listener = f"PLAINTEXT://{self.host}:{kafka['port']}"
        config.write_text("\n".join([*broker_settings(listener, controller_port, data), *IN_THE_CLEAR]))
        java = ["java", "-cp", f"{KAFKA_LIBS}/*"]
        if not (data / "meta.properties").exists():
            kafka["cluster_id"] = cluster_id()
            await run_to_end(
                [
                    *java,
                    "kafka.tools.StorageTool",
                    "format",
                    "--standalone",
                    "-t",
                    kafka["cluster_id"],
                    "-c",
                    str(config),
                ],
                self.folder / "kafka.log",
            )
        with (self.folder / "kafka.log").open("ab") as log:
            process = self._kafka = subprocess.Popen(
                [*java[:1], *JAVA_OPTIONS, *java[1:], "kafka.Kafka", str(config)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        kafka["pid"], kafka["started"] = process.pid, psutil.Process(process.pid).create_time()
        self._write_part("kafka", kafka)

    async def _start_postgres(self, state: dict[str, Any]) -> None:
        postgres = state["postgres"]
        if self._running(postgres) is not None:
            return
        if os.geteuid() != 0:
            raise ServersError(
                "the local database needs root (a chroot): run as root, or name running servers in "
                "SMDIH_KAFKA_BOOTSTRAP and SMDIH_DATABASE_DSN, or use compose.yaml"
            )
        postgres["port"] = port_again(postgres.get("port"))
        data = PG_ROOT / self._pg_data.lstrip("/")
        if not (data / "PG_VERSION").exists():
            shutil.rmtree(data, ignore_errors=True)
            password_file = PG_ROOT / "tmp" / f"password-{secrets.token_hex(4)}"
            password_file.write_text(state["secret"])
            password_file.chmod(0o644)
            postgres["cluster_name"] = f"smdih-{secrets.token_hex(6)}"
            try:
                await self._pg(
                    *("initdb", "-D", self._pg_data, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8"),
                    *("--auth=scram-sha-256", f"--pwfile=/tmp/{password_file.name}"),
                    *("-c", "shared_preload_libraries=timescaledb", "-c", "timescaledb.telemetry_level=off"),
                    *("-c", f"listen_addresses={self.host}", "-c", "unix_socket_directories=/tmp"),
                    *("-c", f"cluster_name={postgres['cluster_name']}", "-c", "max_connections=200"),
                    *("-c", "max_wal_size=4GB", "-c", "shared_buffers=512MB"),
                    *(() if self._outlives_power else ("--no-sync", "-c", "fsync=off", "-c", "full_page_writes=off")),
                )
            finally:
                password_file.unlink()
            if self.host != "127.0.0.1":
                with (data / "pg_hba.conf").open("a") as access:
                    access.write("host all all samenet scram-sha-256\n")
        await self._pg(
            "pg_ctl",
            "-D",
            self._pg_data,
            "-o",
            f"-p {postgres['port']}",
            "-l",
            f"{self._pg_data}/server.log",
            "-w",
            "start",
        )
        pid = int((data / "postmaster.pid").read_text().split("\n")[0])
        postgres["pid"], postgres["started"] = pid, psutil.Process(pid).create_time()
        self._write_part("postgres", postgres)

    async def _pg(self, program: str, *arguments: str) -> None:
        command = ["chroot", "--userspec=postgres:postgres", str(PG_ROOT), f"{PG_BIN}/{program}", *arguments]
        await run_to_end(command, self.folder / "postgres.log", cwd=PG_ROOT)

    async def _prove_kafka(self, servers: Servers, state: dict[str, Any]) -> None:
        until = time.monotonic() + START_TIMEOUT_S
        while (
            time.monotonic() < until
            and self._running(state["kafka"])
            and not listens(state["kafka"]["port"], self.host)
        ):
            await asyncio.sleep(0.1)
        while True:
            admin = AIOKafkaAdminClient(bootstrap_servers=servers.kafka_bootstrap)
            try:
                await admin.start()
                found = (await admin.describe_cluster())["cluster_id"]
                break
            except (KafkaError, OSError) as error:
                if time.monotonic() > until or self._running(state["kafka"]) is None:
                    raise ServersError(f"Kafka did not start: see {self.folder / 'kafka.log'}") from error
                await asyncio.sleep(0.1)
            finally:
                await admin.close()
        if found != state["kafka"]["cluster_id"]:
            raise ServersError(f"another Kafka answers at {servers.kafka_bootstrap}; stop it or remove {self.folder}")

    async def _prove_postgres(self, servers: Servers, state: dict[str, Any]) -> None:
        connection = await asyncpg.connect(servers.database_dsn)
        try:
            found = await connection.fetchval("SHOW cluster_name")
        finally:
            await connection.close()
        if found != state["postgres"]["cluster_name"]:
            raise ServersError(
                f"another PostgreSQL answers at port {state['postgres']['port']}; stop it or remove {self.folder}"
            )

    def _running(self, part: dict[str, Any]) -> psutil.Process | None:
        # A process id alone may have been given to someone else since.
        try:
            process = psutil.Process(part["pid"])
            return process if abs(process.create_time() - part["started"]) < 0.01 and process.is_running() else None
        except (KeyError, psutil.NoSuchProcess):
            return None

    def _read(self) -> dict[str, Any] | None:
        if not self._state_file.exists():
            return None
        state: dict[str, Any] = json.loads(self._state_file.read_text())
        return state

    def _write_part(self, part: str, found: dict[str, Any]) -> None:
        # The other one may have been started anew meanwhile.
        state = self._read()
        assert state is not None
        self._write({**state, part: found})

    def _write(self, state: dict[str, Any]) -> None:
        temporary = self._state_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(state, indent=1))
        temporary.chmod(0o600)
        temporary.replace(self._state_file)


def pg_prefix() -> str:
    """What stands before pg_dump and pg_restore on this machine (SMDIH_PG_PREFIX); empty where they are installed as usual."""
    return f"chroot --userspec=postgres:postgres {PG_ROOT} env PATH={PG_BIN}:/usr/bin" if PG_ROOT.is_dir() else ""


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Whether somebody answers there."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def port_again(port: int | None) -> int:
    """The port of last time if it is still free, else a free one."""
    if port is None:
        return free_port()
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return free_port()
        return port


def cluster_id() -> str:
    # Kafka's form of a random id: 16 bytes in URL-safe base64 without padding, not beginning with a dash.
    while (text := secrets.token_urlsafe(16)).startswith("-"):
        pass
    return text


async def run_to_end(command: list[str], log_file: Path, cwd: Path | None = None) -> None:
    with log_file.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=cwd, start_new_session=True
        )
        if await process.wait() != 0:
            raise ServersError(f"{Path(command[-1]).name if len(command) < 4 else command[3]} failed: see {log_file}")
