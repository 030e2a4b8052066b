"""A Kafka that knows who comes and refuses what is not theirs: TLS, SCRAM and access rules, beside the open one of the local stack.
And TLS for the stack's database.

The users and rules of that Kafka are those of services/common/access.py.
"""

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import asyncpg
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from localstack.certificates import Authority, Pair
from localstack.servers import (
    JAVA_OPTIONS,
    KAFKA_LIBS,
    PG_ROOT,
    START_TIMEOUT_S,
    ServersError,
    broker_settings,
    cluster_id,
    free_port,
    listens,
    run_to_end,
)
from services.common.access import ACCESSES, Access, Operation, Resource, rules
from services.common.kafka import Cluster, Identity

ADMIN: Final = "admin"
ADMIN_TIMEOUT_S: Final = 20
SCRAM_ITERATIONS: Final = 4096

_OPERATIONS: Final = {
    Operation.READ: AclOperation.READ,
    Operation.WRITE: AclOperation.WRITE,
    Operation.CREATE: AclOperation.CREATE,
    Operation.DESCRIBE: AclOperation.DESCRIBE,
}
_RESOURCES: Final = {Resource.TOPIC: ResourceType.TOPIC, Resource.GROUP: ResourceType.GROUP}


@asynccontextmanager
async def database_by_tls(administrator: str, pair: Pair) -> AsyncIterator[None]:
    """While this lasts, a database of the local stack takes connections by TLS too. `administrator`: its DSN."""
    connection = await asyncpg.connect(administrator)
    data = PG_ROOT / (await connection.fetchval("SHOW data_directory")).lstrip("/")
    owner = data.stat()
    files = {data / "server.crt": pair.certificate, data / "server.key": pair.key}
    try:
        for path, source in files.items():
            path.touch(mode=0o600)
            path.write_bytes(source.read_bytes())
            os.chown(path, owner.st_uid, owner.st_gid)
        await connection.execute("ALTER SYSTEM SET ssl = on")
        await connection.execute("SELECT pg_reload_conf()")
        yield
    finally:
        await connection.execute("ALTER SYSTEM RESET ssl")
        await connection.execute("SELECT pg_reload_conf()")
        await connection.close()
        for path in files:
            path.unlink(missing_ok=True)


class SecuredKafka:
    """A broker of its own in `folder`. Its administrator may do everything."""

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        names: Sequence[str] = (),
        authority: Authority | None = None,
        watched: bool = False,
    ) -> None:
        """`host`: an address of this machine that others reach, `names` by which they may know it. `authority`: of its
        certificate; without one it makes its own. `watched`: has `open_bootstrap` as well.
        """
        self._folder = folder
        self._host, self._names = host, names
        self._authority = authority
        self._port, self._open_port = free_port(), free_port() if watched else None
        self._process: subprocess.Popen[bytes] | None = None
        self._passwords = {ADMIN: secrets.token_hex(16)}

    @property
    def ca(self) -> Path:
        """Of the broker's certificate, once it was started."""
        assert self._authority is not None
        return self._authority.file

    @property
    def bootstrap(self) -> str:
        return f"{self._host}:{self._port}"

    @property
    def open_bootstrap(self) -> str:
        """Where this machine alone gets in, and may do everything: for who watches from beside."""
        assert self._open_port is not None
        return f"127.0.0.1:{self._open_port}"

    def identity(self, user: str) -> Identity:
        """Raises KeyError for a user that `admit` has not made."""
        return Identity("SASL_SSL", "SCRAM-SHA-512", user, self._passwords[user], str(self.ca))

    def identities(self) -> dict[str, Identity]:
        """By the process that each is for."""
        return {access.process: self.identity(access.user) for access in ACCESSES if access.user in self._passwords}

    async def start(self) -> None:
        """Raises ServersError with the next step."""
        if not KAFKA_LIBS.is_dir():
            raise ServersError("the local Kafka is not installed: run `make setup`")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._certify()
        config, log_file = self._folder / "kafka.properties", self._folder / "kafka.log"
        config.write_text("\n".join(self._settings()))
        config.chmod(0o600)
        java = ["java", "-cp", f"{KAFKA_LIBS}/*"]
        scram = f"SCRAM-SHA-512=[name={ADMIN},password={self._passwords[ADMIN]}]"
        await run_to_end(
            [
                *(*java, "kafka.tools.StorageTool", "format", "--standalone"),
                *("-t", cluster_id(), "-c", str(config), "--add-scram", scram),
            ],
            log_file,
        )
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*java[:1], *JAVA_OPTIONS, *java[1:], "kafka.Kafka", str(config)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not await self._answers():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise ServersError(f"Kafka did not start: see {log_file}") from None

    def pause(self, paused: bool) -> None:
        """Let it answer nobody while its connections stay open, or go on."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def remove(self) -> None:
        """End it and delete its data."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    async def admit(self, accesses: Iterable[Access] = ACCESSES, *, prefix: str = "") -> None:
        """Make the users and rules of these processes, for a hub whose topics have this prefix."""
        await asyncio.to_thread(self._admit, tuple(accesses), prefix)
        for access in accesses:
            if access.user in self._passwords:
                await self._until_known(access.user)

    def _admit(self, accesses: tuple[Access, ...], prefix: str) -> None:
        admin = AdminClient(
            {
                "bootstrap.servers": self.bootstrap,
                "security.protocol": "SASL_SSL",
                "ssl.ca.location": str(self.ca),
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": ADMIN,
                "sasl.password": self._passwords[ADMIN],
            }
        )
        scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, SCRAM_ITERATIONS)
        users = {access.user: secrets.token_hex(16) for access in accesses if access.user not in self._passwords}
        if users:
            _wait(
                admin.alter_user_scram_credentials(
                    [UserScramCredentialUpsertion(user, scram, password.encode()) for user, password in users.items()]
                )
            )
        self._passwords |= users
        bindings = [
            AclBinding(
                _RESOURCES[rule.resource],
                rule.name,
                ResourcePatternType.LITERAL,
                f"User:{access.user}",
                "*",
                _OPERATIONS[rule.operation],
                AclPermissionType.ALLOW,
            )
            for access in accesses
            for rule in rules(access, prefix=prefix)
        ]
        _wait(admin.create_acls(bindings))

    async def _until_known(self, user: str) -> None:
        async with asyncio.timeout(ADMIN_TIMEOUT_S):
            while not await self._answers(user):
                await asyncio.sleep(0.05)

    async def _answers(self, user: str = ADMIN) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise ServersError(f"Kafka ended by itself: see {self._folder / 'kafka.log'}")
        if not listens(self._port, self._host):
            return False
        admin = AIOKafkaAdminClient(**Cluster(self.bootstrap, identity=self.identity(user)).client())
        try:
            await admin.start()
            return True
        except (KafkaError, OSError):
            return False
        finally:
            await admin.close()

    def _certify(self) -> None:
        if self._authority is None:
            self._authority = Authority(self._folder)
        pair = self._authority.issue(self._names, addresses=[self._host])
        file = self._folder / "broker.pem"
        file.touch(mode=0o600)
        file.write_bytes(pair.key.read_bytes() + pair.certificate.read_bytes())

    def _settings(self) -> list[str]:
        listener = "listener.name.sasl_ssl"
        login = (
            "org.apache.kafka.common.security.scram.ScramLoginModule required "
            f'username="{ADMIN}" password="{self._passwords[ADMIN]}";'
        )
        listeners = f"SASL_SSL://{self.bootstrap}"
        if self._open_port is not None:
            listeners += f",OPEN://{self.open_bootstrap}"
        return [
            *broker_settings(listeners, free_port(), self._folder / "data"),
            "listener.security.protocol.map=SASL_SSL:SASL_SSL,OPEN:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name=SASL_SSL",
            "sasl.mechanism.inter.broker.protocol=SCRAM-SHA-512",
            "sasl.enabled.mechanisms=SCRAM-SHA-512",
            f"{listener}.scram-sha-512.sasl.jaas.config={login}",
            f"{listener}.ssl.keystore.type=PEM",
            f"{listener}.ssl.keystore.location={self._folder / 'broker.pem'}",
            f"{listener}.ssl.truststore.type=PEM",
            f"{listener}.ssl.truststore.location={self.ca}",
            "authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer",
            # Nobody is who comes over the controller's own listener, or over the open one of this machine.
            f"super.users=User:{ADMIN};User:ANONYMOUS",
        ]


def _wait(futures: dict[Any, "Future[Any]"]) -> None:
    for future in futures.values():
        future.result(timeout=ADMIN_TIMEOUT_S)
