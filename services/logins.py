"""Makes the logins by which the hub comes to its database, each with no more than it needs. Safe to repeat.

    SMDIH_DATABASE_DSN=... python -m services.logins FOLDER     as the server's administrator

FOLDER has a file for each login (LOGINS) with the DSN that it will come by: the user and the password in it are made so. What has
no file is left as it is. See docs/security.md.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import asyncpg

from services.common.database import AWAY, CONNECT_TIMEOUT_S, READER_ROLE, SETTER_ROLE, Connection, make_role, role_of
from services.common.settings import DatabaseSettings
from services.common.tenancy import ALL
from services.migrate import SCHEMAS

USAGE: Final = "usage: python -m services.logins FOLDER"
OWNER: Final = "owner"
# Not in any service's schema, and made with them.
DASHBOARDS: Final = "shopfloor"
SCRAM_ITERATIONS: Final = 4096
_FIRMS = re.compile(r"smdih_firm_")


@dataclass(frozen=True)
class Login:
    """What a login may do: take these roles, or have their rights from the start."""

    roles: tuple[str, ...]
    # Without it, it can do nothing before it takes a role, as each pool does.
    inherits: bool = True
    sees_all_firms: bool = False
    # A dump holds every row, whatever policies say.
    passes_policies: bool = False
    only_reads: bool = False


LOGINS: Final[Mapping[str, Login]] = {
    **{schema: Login((role_of(schema),), inherits=False) for schema in SCHEMAS},
    # Migrates, and owns what it makes; it needs the roles to give them rights.
    OWNER: Login((*(role_of(schema) for schema in SCHEMAS), READER_ROLE, SETTER_ROLE)),
    "backup": Login(("pg_read_all_data",), passes_policies=True, only_reads=True),
    "reconcile": Login((*(role_of(schema) for schema in SCHEMAS), SETTER_ROLE), sees_all_firms=True),
    "grafana": Login((READER_ROLE,), sees_all_firms=True, only_reads=True),
}


class LoginError(Exception):
    """Nothing was changed by the step that failed; the text says why and what to do."""


@dataclass(frozen=True)
class Identity:
    user: str
    password: str


def read(folder: Path) -> dict[str, Identity]:
    """The identities that there are files for. Raises LoginError."""
    found: dict[str, Identity] = {}
    for name in LOGINS:
        path = folder / name
        if not path.is_file():
            continue
        parts = urlsplit(path.read_text().strip())
        identity = Identity(unquote(parts.username or ""), unquote(parts.password or ""))
        if not identity.user or not re.fullmatch(r"[!-~]{12,}", identity.password):
            raise LoginError(
                f"{path}: wants postgresql://USER:PASSWORD@..., the password of 12 ASCII characters or more."
            )
        if identity.user in _ROLES or _FIRMS.match(identity.user):
            raise LoginError(
                f"{path}: {identity.user} is the name of a role; choose another, such as {identity.user}_login."
            )
        if identity.user in {other.user for other in found.values()}:
            raise LoginError(f"{path}: {identity.user} is another's login too; each needs its own.")
        found[name] = identity
    if not found:
        raise LoginError(f"{folder} has none of the files {', '.join(LOGINS)}.")
    return found


_ROLES = frozenset(role for login in LOGINS.values() for role in login.roles)


async def make(connection: Connection, identities: Mapping[str, Identity]) -> list[str]:
    """Make them, or make them as they should be; returns the names of those that were new. Raises LoginError."""
    administrator = await connection.fetchval("SELECT current_user")
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(hashtext('smdih-logins'))")
            for role in sorted(_ROLES):
                if not role.startswith("pg_"):
                    await make_role(connection, role)
            return [name for name in identities if await _is_new(connection, name, identities[name], administrator)]
    except asyncpg.InsufficientPrivilegeError as error:
        raise LoginError(
            f"{administrator} may not make the logins: {error}. Name the server's administrator."
        ) from error
    except PermissionError as error:  # from make_role, which says what to do
        raise LoginError(str(error)) from error


async def _is_new(connection: Connection, name: str, identity: Identity, administrator: str) -> bool:
    if identity.user == administrator:
        if name == OWNER:  # where no owner is named apart, the administrator migrates
            return False
        raise LoginError(f"{name}: {administrator} is the administrator; give it a login of its own.")
    is_new = await _make(connection, identity, LOGINS[name])
    if name == OWNER:
        await _hand_over(connection, identity.user)
    return is_new


async def _make(connection: Connection, identity: Identity, login: Login) -> bool:
    user = await connection.fetchval("SELECT quote_ident($1)", identity.user)
    found = await connection.fetchrow(
        "SELECT rolsuper, rolbypassrls, rolcreaterole, rolcreatedb, rolreplication FROM pg_roles WHERE rolname = $1",
        identity.user,
    )
    if found is None:
        await connection.execute(f"CREATE ROLE {user}")
    elif found["rolsuper"] or (found["rolbypassrls"] and not login.passes_policies):
        raise LoginError(f"{identity.user} would pass over row-level security; take SUPERUSER and BYPASSRLS from it.")
    elif found["rolcreaterole"] or found["rolcreatedb"] or found["rolreplication"]:
        raise LoginError(
            f"{identity.user} may do more than its work: take CREATEROLE, CREATEDB and REPLICATION from it."
        )
    inherit = "INHERIT" if login.inherits else "NOINHERIT"
    await connection.execute(f"ALTER ROLE {user} LOGIN {inherit} PASSWORD '{_verifier(identity.password)}'")
    if login.passes_policies and not (found and found["rolbypassrls"]):
        await connection.execute(f"ALTER ROLE {user} BYPASSRLS")
    rows = await connection.fetch(
        "SELECT DISTINCT r.rolname FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.roleid "
        "WHERE m.member = (SELECT oid FROM pg_roles WHERE rolname = $1)",
        identity.user,
    )
    for row in rows:
        if row["rolname"] not in login.roles:
            beyond = await connection.fetchval("SELECT quote_ident($1)", row["rolname"])
            await connection.execute(f"REVOKE {beyond} FROM {user}")
    for role in login.roles:
        await connection.execute(f"GRANT {role} TO {user}")
    await connection.execute(f"ALTER ROLE {user} RESET ALL")
    if login.sees_all_firms:
        await connection.execute(f"ALTER ROLE {user} SET smdih.firm_id = '{ALL}'")
    if login.only_reads:
        await connection.execute(f"ALTER ROLE {user} SET default_transaction_read_only = on")
    return found is None


async def _hand_over(connection: Connection, owner: str) -> None:
    """The database is its own, so that it may make schemas there; those of somebody else are not taken from them."""
    others = await connection.fetchrow(
        "SELECT nspname, nspowner::regrole::text AS owner FROM pg_namespace "
        "WHERE nspname = ANY($1::text[]) AND nspowner <> (SELECT oid FROM pg_roles WHERE rolname = $2)",
        [*SCHEMAS, DASHBOARDS],
        owner,
    )
    if others is not None:
        raise LoginError(
            f"The schema {others['nspname']} is {others['owner']}'s: name {others['owner']} as the owner, or hand all that it owns "
            f"there over to {owner} first (REASSIGN OWNED)."
        )
    names = await connection.fetchrow("SELECT quote_ident($1) AS owner, quote_ident(current_database()) AS mine", owner)
    assert names is not None
    await connection.execute(f"ALTER DATABASE {names['mine']} OWNER TO {names['owner']}")


def _verifier(password: str) -> str:
    """As PostgreSQL keeps it (RFC 5802), so that the password itself never reaches the server, nor its log."""
    salt = secrets.token_bytes(16)
    salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, SCRAM_ITERATIONS)
    stored = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server = hmac.digest(salted, b"Server Key", "sha256")
    of = {"salt": salt, "stored": stored, "server": server}
    text = {name: base64.b64encode(value).decode() for name, value in of.items()}
    return f"SCRAM-SHA-256${SCRAM_ITERATIONS}:{text['salt']}${text['stored']}:{text['server']}"


async def make_from(folder: Path, *, administrator: str) -> list[str]:
    """The same from the files of a folder, by the DSN of the server's administrator. Raises LoginError."""
    identities = read(folder)
    try:
        connection = await asyncpg.connect(administrator, timeout=CONNECT_TIMEOUT_S)
    except (*AWAY, asyncpg.PostgresError) as error:
        raise LoginError(f"The database does not answer: {error!r}. Look at SMDIH_DATABASE_DSN.") from error
    try:
        return await make(connection, identities)
    finally:
        await connection.close()


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return 2
    if not os.environ.get("SMDIH_DATABASE_DSN"):
        print(json.dumps({"done": "nothing", "why": "no administrator is named: logins are made elsewhere"}))
        return 0
    try:
        made = asyncio.run(make_from(Path(arguments[0]), administrator=DatabaseSettings().database_dsn))
    except LoginError as error:
        print(f"logins: {error}", file=sys.stderr)
        return 1
    print(json.dumps({"done": "logins", "made": made}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
