"""The processes of ingest: `python -m services.ingest.main door|historian|mqtt`, and `... operator-key` to make the first key."""

import functools
import sys
from importlib import import_module

from services.common.clock import SystemClock
from services.common.database import create_pool, transaction
from services.common.identity import Role
from services.common.runtime import run, run_once
from services.common.settings import Settings
from services.ingest.registry import credential_store
from services.ingest.registry.credentials import make_credential
from services.ingest.settings import SCHEMA, MqttSettings

# Each is wired in a module of its own, so that no process loads what only another needs.
ROLES: dict[str, tuple[str, type[Settings]]] = {
    "door": ("services.ingest.door_process", Settings),
    "historian": ("services.ingest.historian_process", Settings),
    "mqtt": ("services.ingest.mqtt_process", MqttSettings),
}
USAGE = "usage: python -m services.ingest.main door|historian|mqtt|operator-key"


async def operator_key(settings: Settings) -> str:
    """Make an operator's key; needs the database only, so it is how the first one is had."""
    now_us = SystemClock().now_us()
    key, credential = make_credential(Role.OPERATOR, 0, 0, "made on the command line", now_us)
    pool = await create_pool(settings.database_dsn, schema=SCHEMA, size_max=1)
    try:
        async with transaction(pool) as connection:
            await credential_store.create(connection, credential, Role.OPERATOR, now_us)
    finally:
        await pool.close()
    return key


def main(arguments: list[str]) -> None:
    if len(arguments) != 1 or arguments[0] not in (*ROLES, "operator-key"):
        print(USAGE, file=sys.stderr)  # noqa: T201  a command line
        sys.exit(2)
    name = f"ingest-{arguments[0]}"
    if arguments[0] == "operator-key":
        settings = Settings()
        print(run_once(name, settings, operator_key(settings)))  # noqa: T201  a command line
        return
    module, settings_of_role = ROLES[arguments[0]]
    settings = settings_of_role()
    run(name, settings, functools.partial(import_module(module).start, settings=settings))


if __name__ == "__main__":
    main(sys.argv[1:])
