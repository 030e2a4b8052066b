"""A gateway for OPC UA: values of servers' variables into the hub, through a disk buffer, for as long as it runs.

The configuration is a TOML file; `browse` writes one. asyncua (LGPL) is used as the library that it is.
"""

import asyncio
import csv
import io
import logging
import os
import random
import re
import time
import tomllib
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from asyncua import Client, Node, ua
from asyncua.crypto import security_policies
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_pem_private_key

from smdih_client.buffer import BufferFull
from smdih_client.telemetry import TelemetryClient
from smdih_client.tls import Tls

log = logging.getLogger(__name__)

RECONNECT_DELAY_S = 0.5
RECONNECT_DELAY_S_MAX = 30.0
REQUEST_TIMEOUT_S = 10.0
CHECK_EVERY_S = 1.0
SEND_EVERY_S = 1.0
REPORT_EVERY_S = 60.0
# A value that does not change is read anew after this long, so that "unchanged" and "gone" can be told apart.
UNCHANGED_S = 60.0
# Values that a server keeps for us of each variable between two publications.
QUEUE_SIZE = 1_000
NODES_PER_REQUEST_MAX = 500
ROWS_PER_BATCH_MAX = 500
# Rows x signals of a batch: 800 kB.
CELLS_PER_BATCH_MAX = 100_000
WAITING_SAMPLES_MAX = 1_000_000
BROWSE_NODES_MAX = 100_000

_NUMBERS = (
    *(ua.VariantType.Boolean, ua.VariantType.SByte, ua.VariantType.Byte, ua.VariantType.Int16, ua.VariantType.UInt16),
    *(ua.VariantType.Int32, ua.VariantType.UInt32, ua.VariantType.Int64, ua.VariantType.UInt64),
    *(ua.VariantType.Float, ua.VariantType.Double),
)
# The policies that are not broken.
_POLICIES = {
    "Basic256Sha256": security_policies.SecurityPolicyBasic256Sha256,
    "Aes128Sha256RsaOaep": security_policies.SecurityPolicyAes128Sha256RsaOaep,
    "Aes256Sha256RsaPss": security_policies.SecurityPolicyAes256Sha256RsaPss,
}
_MODES = {"Sign": ua.MessageSecurityMode.Sign, "SignAndEncrypt": ua.MessageSecurityMode.SignAndEncrypt}
# What asyncua raises when a server is away, is going away, or says no.
_AWAY = (OSError, TimeoutError, ua.UaError)


class BadConfiguration(Exception):
    """The configuration cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Variable:
    """A variable of a server, and the signal that it is."""

    machine: str
    signal: str
    node_id: str


@dataclass(frozen=True)
class Security:
    """How the connection to a server is signed or encrypted."""

    policy: str
    mode: str
    certificate: Path
    private_key: Path
    # None: whatever certificate the server shows is taken.
    server_certificate: Path | None
    # The URI in our certificate: servers compare it with the one that a client says.
    application_uri: str


@dataclass(frozen=True)
class Server:
    url: str
    # True: read every interval; False: the server tells of changes.
    is_polled: bool
    interval_ms: int
    variables: tuple[Variable, ...]
    user: str = ""
    password: str = field(default="", repr=False)
    security: Security | None = None


@dataclass(frozen=True)
class Configuration:
    target: str
    source: str
    buffer: Path
    servers: tuple[Server, ...]


def load(path: Path) -> Configuration:
    """Read a configuration. Raises BadConfiguration."""
    try:
        document = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfiguration(f"{path.name}: {error}") from error
    _check_keys(
        path.name, document, {"target": str, "source": str, "buffer": str, "server": list}, ("target", "server")
    )
    servers = tuple(_server(f"server {number}", one, path.parent) for number, one in enumerate(document["server"], 1))
    if not servers:
        raise BadConfiguration(f"{path}: name at least one [[server]]")
    signals = [(one.machine, one.signal) for server in servers for one in server.variables]
    for twice in {one for one in signals if signals.count(one) > 1} if len(set(signals)) < len(signals) else ():
        raise BadConfiguration(f"{path}: {twice[1]!r} of {twice[0]} is named twice")
    buffer = path.parent / document.get("buffer", "buffer")
    return Configuration(document["target"], document.get("source", "opcua"), buffer, servers)


def _server(where: str, document: Any, folder: Path) -> Server:
    kinds = {"url": str, "mode": str, "interval_ms": int, "user": str, "password_env": str, "security": str}
    _check_keys(where, document, kinds | {"machine": list}, ("url", "machine"))
    mode = document.get("mode", "subscribe")
    if mode not in ("subscribe", "poll"):
        raise BadConfiguration(f"{where}: mode is subscribe or poll, not {mode!r}")
    interval_ms = document.get("interval_ms", 1_000)
    if not 10 <= interval_ms <= 86_400_000:
        raise BadConfiguration(f"{where}: interval_ms is 10 to 86,400,000, not {interval_ms}")
    variables: list[Variable] = []
    for number, machine in enumerate(document["machine"], 1):
        inside = f"{where}, machine {number}"
        _check_keys(inside, machine, {"path": str, "signals": dict}, ("path", "signals"))
        for signal, node_id in machine["signals"].items():
            try:
                ua.NodeId.from_string(node_id)
            except (ua.UaError, AttributeError, TypeError) as error:
                raise BadConfiguration(
                    f"{inside}: {signal}: {node_id!r} is no node id, such as ns=2;s=Press3.Speed"
                ) from error
            variables.append(Variable(machine["path"], signal, node_id))
    if not variables:
        raise BadConfiguration(f"{where}: names no signals")
    password_env = document.get("password_env", "")
    return Server(
        document["url"],
        mode == "poll",
        interval_ms,
        tuple(variables),
        document.get("user", ""),
        os.environ.get(password_env, "") if password_env else "",
        security(f"{where}: security", document["security"], folder) if document.get("security") else None,
    )


def security(where: str, text: str, folder: Path) -> Security:
    """Of "policy,mode,certificate,private key[,server's certificate]", files beside `folder`. Raises BadConfiguration."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (4, 5) or parts[0] not in _POLICIES or parts[1] not in _MODES:
        raise BadConfiguration(
            f"{where}: needs policy ({', '.join(_POLICIES)}), mode ({', '.join(_MODES)}), certificate, private key and, "
            "where it is known, the server's certificate, separated by commas"
        )
    files = [folder / part for part in parts[2:]]
    try:
        own, *known = (_certificate(file) for file in (files[0], *files[2:]))
        key = files[1].read_bytes()
        (load_pem_private_key if key.startswith(b"-----") else load_der_private_key)(key, None)
    except (OSError, ValueError, TypeError) as error:
        raise BadConfiguration(f"{where}: {error}") from error
    try:
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    if not uris:
        raise BadConfiguration(
            f"{where}: {files[0]} has no URI as subject alternative name, by which servers know a client"
        )
    return Security(parts[0], parts[1], files[0], files[1], files[2] if known else None, uris[0])


def _certificate(file: Path) -> x509.Certificate:
    content = file.read_bytes()
    return (x509.load_pem_x509_certificate if content.startswith(b"-----") else x509.load_der_x509_certificate)(content)


def _check_keys(where: str, document: Any, kinds: dict[str, type], needed: Sequence[str]) -> None:
    if not isinstance(document, dict):
        raise BadConfiguration(f"{where}: a table is needed here")
    for key, value in document.items():
        if key not in kinds:
            raise BadConfiguration(f"{where}: {key!r} is not known; known are {', '.join(kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise BadConfiguration(f"{where}: {key} has to be a {kinds[key].__name__}")
    for key in needed:
        if key not in document:
            raise BadConfiguration(f"{where}: {key} is missing")


@dataclass
class Totals:
    """Values since the start. received = kept + waiting + unusable + replaced + refused."""

    received: int = 0
    # On disk, on their way to the hub.
    kept: int = 0
    # The server itself says that they are bad, or they are no numbers.
    unusable: int = 0
    # Of the same signal and time as a later one.
    replaced: int = 0
    # The disk buffer is full.
    refused: int = 0


class Waiting:
    """Values on their way to the disk buffer: by machine, time and signal."""

    def __init__(self) -> None:
        self._machines: dict[str, dict[int, dict[str, float]]] = {}
        self.samples = 0
        self.totals = Totals()

    def add(self, variable: Variable, time_us: int, value: ua.DataValue) -> None:
        totals = self.totals
        totals.received += 1
        number = _number(value)
        if number is None:
            totals.unusable += 1
            return
        if self.samples >= WAITING_SAMPLES_MAX:
            totals.refused += 1
            return
        row = self._machines.setdefault(variable.machine, {}).setdefault(time_us, {})
        if variable.signal in row:
            totals.replaced += 1
        else:
            self.samples += 1
        row[variable.signal] = number

    async def send(self, client: TelemetryClient) -> None:
        """Into the disk buffer; what raises stays here, but for what does not fit. Raises OSError.

        What comes meanwhile, also of the same machine and time, waits for the next call.
        """
        machines, self._machines = self._machines, {}
        try:
            for machine, rows in machines.items():
                while rows:
                    await self._send_some(client, machine, rows)
        finally:
            self._put_back(machines)

    async def _send_some(self, client: TelemetryClient, machine: str, rows: dict[int, dict[str, float]]) -> None:
        times = sorted(rows)[:ROWS_PER_BATCH_MAX]
        names = sorted({name for at in times for name in rows[at]})
        times = times[: max(1, CELLS_PER_BATCH_MAX // len(names))]
        values = np.array([[rows[at].get(name, np.nan) for name in names] for at in times])
        samples = sum(len(rows[at]) for at in times)
        try:
            await client.send(machine, times, values, signals=names)
            self.totals.kept += samples
        except BufferFull as error:
            log.error("%d values of %s are refused: %s", samples, machine, error)
            self.totals.refused += samples
        self.samples -= samples
        for at in times:
            del rows[at]

    def _put_back(self, machines: dict[str, dict[int, dict[str, float]]]) -> None:
        for machine, rows in machines.items():
            for at, values in rows.items():
                newer = self._machines.setdefault(machine, {}).setdefault(at, {})
                replaced = len(values.keys() & newer.keys())
                self.totals.replaced += replaced
                self.samples -= replaced
                self._machines[machine][at] = values | newer


def _number(value: ua.DataValue) -> float | None:
    """The value as a number; None where it is none, or the server does not call it good."""
    variant = value.Value
    if variant is None or variant.is_array or variant.VariantType not in _NUMBERS or variant.Value is None:
        return None
    if value.StatusCode is not None and not value.StatusCode.is_good():
        return None
    number = float(variant.Value)
    return number if np.isfinite(number) else None


class _Changes:
    """Told by asyncua of every change."""

    def __init__(self, source: "Source") -> None:
        self._source = source

    def datachange_notification(self, node: Node, value: Any, data: Any) -> None:
        self._source.changed(node, data.monitored_item.Value)

    def status_change_notification(self, status: Any) -> None:
        self._source.is_broken = True


class Source:
    """One OPC UA server: connected again for ever."""

    def __init__(self, server: Server, waiting: Waiting) -> None:
        self._server = server
        self._waiting = waiting
        self._by_node: dict[ua.NodeId, list[Variable]] = {}
        for variable in server.variables:
            self._by_node.setdefault(ua.NodeId.from_string(variable.node_id), []).append(variable)
        self.connections = 0
        self.is_broken = False

    async def run(self) -> None:
        """Until cancelled."""
        delay_s = RECONNECT_DELAY_S
        while True:
            started_s = time.monotonic()
            try:
                await self._connection()
            except _AWAY as error:
                log.warning("%s: connection lost or refused: %r", self._server.url, error)
            except Exception:  # whatever a server makes the library stumble over: it may be different the next time
                log.exception("%s: connection given up", self._server.url)
            if time.monotonic() - started_s > RECONNECT_DELAY_S_MAX:
                delay_s = RECONNECT_DELAY_S
            await asyncio.sleep(delay_s * random.uniform(1, 1.5))  # noqa: S311  spreads, hides nothing
            delay_s = min(delay_s * 2, RECONNECT_DELAY_S_MAX)

    def changed(self, node: Node, value: ua.DataValue) -> None:
        at = value.SourceTimestamp or value.ServerTimestamp
        for variable in self._by_node[node.nodeid]:
            self._waiting.add(variable, _time_us(at) if at else time.time_ns() // 1000, value)

    async def _connection(self) -> None:
        client = await connected(self._server)
        try:
            self.connections += 1
            self.is_broken = False
            log.info("%s: connected", self._server.url)
            nodes = [client.get_node(node_id) for node_id in self._by_node]
            interval_s = self._server.interval_ms / 1000
            if not self._server.is_polled:
                await self._subscribe(client, nodes)
                interval_s = max(interval_s, UNCHANGED_S)
            due_s = time.monotonic() + (0.0 if self._server.is_polled else interval_s)
            while not self.is_broken:
                now_s = time.monotonic()
                if now_s >= due_s:
                    await self._poll(client, nodes)
                    # No catching up: what was not read when it was due cannot be read any more.
                    due_s += interval_s * max(1, np.ceil((time.monotonic() - due_s) / interval_s))
                else:
                    await client.check_connection()
                await asyncio.sleep(min(CHECK_EVERY_S, max(0.0, due_s - time.monotonic())))
            log.warning("%s: the server ended the subscription", self._server.url)
        finally:
            await _disconnected(client)

    async def _subscribe(self, client: Client, nodes: Sequence[Node]) -> None:
        subscription = await client.create_subscription(self._server.interval_ms, _Changes(self))
        for first in range(0, len(nodes), NODES_PER_REQUEST_MAX):
            part = nodes[first : first + NODES_PER_REQUEST_MAX]
            handles = await subscription.subscribe_data_change(
                part, queuesize=QUEUE_SIZE, sampling_interval=self._server.interval_ms
            )
            for node, handle in zip(part, handles if isinstance(handles, list) else [handles], strict=True):
                if isinstance(handle, ua.StatusCode):
                    log.error("%s: %s cannot be subscribed to: %s", self._server.url, node, handle.name)

    async def _poll(self, client: Client, nodes: Sequence[Node]) -> None:
        for first in range(0, len(nodes), NODES_PER_REQUEST_MAX):
            part = nodes[first : first + NODES_PER_REQUEST_MAX]
            values = await client.read_attributes(part, ua.AttributeIds.Value)
            # All of one read are values of this moment, whenever they last changed.
            now_us = time.time_ns() // 1000
            for node, value in zip(part, values, strict=True):
                for variable in self._by_node[node.nodeid]:
                    self._waiting.add(variable, now_us, value)


class Gateway:
    """All servers of a configuration, and the way to the hub."""

    def __init__(self, configuration: Configuration, key: str | Path, tls: Tls | None = None) -> None:
        self._configuration = configuration
        self._key = key
        self._tls = tls
        self.waiting = Waiting()
        self.sources = [Source(server, self.waiting) for server in configuration.servers]

    async def run(self) -> None:
        """Until cancelled; then what waits goes to the disk. Raises BufferInUse, OSError."""
        to = self._configuration
        async with TelemetryClient(
            to.target, self._key, source=to.source, buffer=to.buffer, credentials=self._tls
        ) as client:
            readers = [asyncio.create_task(source.run()) for source in self.sources]
            try:
                await self._send(client)
            finally:
                try:
                    await self.waiting.send(client)  # first of all: a server may be slow to let go
                finally:
                    for reader in readers:
                        reader.cancel()
                    await asyncio.gather(*readers, return_exceptions=True)
                await self.waiting.send(client)  # what came while that was written

    async def _send(self, client: TelemetryClient) -> None:
        reported_s = time.monotonic()
        while True:
            await asyncio.sleep(SEND_EVERY_S)
            await self.waiting.send(client)
            if time.monotonic() - reported_s >= REPORT_EVERY_S:
                reported_s = time.monotonic()
                log.info("%s; hub: %s", self.waiting.totals, client.totals)


async def connected(server: Server) -> Client:
    """A connection to a server; to be disconnected by the caller. Raises one of _AWAY."""
    client = Client(server.url, timeout=REQUEST_TIMEOUT_S)
    if server.user:
        client.set_user(server.user)
        client.set_password(server.password)
    try:
        if (how := server.security) is not None:
            client.application_uri = how.application_uri
            await client.set_security(
                _POLICIES[how.policy],
                how.certificate,
                how.private_key,
                server_certificate=str(how.server_certificate) if how.server_certificate else None,
                mode=_MODES[how.mode],
            )
        await client.connect()
    except BaseException:
        await _disconnected(client)
        raise
    return client


async def _disconnected(client: Client) -> None:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await client.disconnect()
    except Exception as error:  # whatever it is: the connection is not wanted any more
        log.debug("disconnect: %r", error)


def _time_us(at: datetime) -> int:
    delta = (at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


# Browsing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """A variable that could be a signal."""

    signal: str
    unit: str
    range_min: float | None
    range_max: float | None
    node_id: str
    kind: str


async def browse(server: Server, root: str) -> list[Proposal]:
    """The variables below a node (or below Objects) that are numbers, in order of name. Raises one of _AWAY."""
    client = await connected(server)
    try:
        start = client.get_node(root) if root else client.nodes.objects
        found = [(name, node) async for name, node in _variables(client, start)]
        values: list[ua.DataValue] = []
        types: list[ua.DataValue] = []
        for first in range(0, len(found), NODES_PER_REQUEST_MAX):
            part = [node for _, node in found[first : first + NODES_PER_REQUEST_MAX]]
            values += await client.read_attributes(part, ua.AttributeIds.Value)
            types += await client.read_attributes(part, ua.AttributeIds.DataType)
        taken: set[str] = set()
        proposals = []
        for (name, node), value, of_type in zip(found, values, types, strict=True):
            kind = _kind(value, of_type)
            if kind is None:
                continue
            unit, low, high = await _properties(node)
            signal = _free(_signal_name(name), taken)
            proposals.append(Proposal(signal, unit, low, high, node.nodeid.to_string(), kind.name))
        return sorted(proposals, key=lambda one: one.signal)
    finally:
        await _disconnected(client)


def _kind(value: ua.DataValue, of_type: ua.DataValue) -> ua.VariantType | None:
    """The type of a variable that is a number; by its declared type where it has no value now."""
    variant = value.Value
    if variant is not None and variant.Value is not None:
        return variant.VariantType if variant.VariantType in _NUMBERS and not variant.is_array else None
    declared = of_type.Value.Value if of_type.Value is not None else None
    return next((kind for kind in _NUMBERS if declared == ua.NodeId(kind.value)), None)


async def _variables(client: Client, start: Node) -> AsyncIterator[tuple[str, Node]]:
    """(Path of names below the start, node) of every variable; each node once."""
    waiting: list[tuple[str, Node]] = [("", start)]
    seen = {start.nodeid, ua.NodeId(ua.ObjectIds.Server)}
    while waiting:
        path, node = waiting.pop()
        references = await node.get_references(
            refs=ua.ObjectIds.HierarchicalReferences, direction=ua.BrowseDirection.Forward
        )
        for reference in references:
            node_id = ua.NodeId(reference.NodeId.Identifier, reference.NodeId.NamespaceIndex)
            is_property = reference.ReferenceTypeId == ua.NodeId(ua.ObjectIds.HasProperty)
            if (
                node_id in seen
                or is_property
                or reference.NodeClass not in (ua.NodeClass.Object, ua.NodeClass.Variable)
            ):
                continue
            seen.add(node_id)
            if len(seen) > BROWSE_NODES_MAX:
                raise BadConfiguration(f"more than {BROWSE_NODES_MAX} nodes: name a node to begin below with --root")
            name = f"{path}.{reference.BrowseName.Name}" if path else str(reference.BrowseName.Name)
            waiting.append((name, client.get_node(node_id)))
            if reference.NodeClass == ua.NodeClass.Variable:
                yield name, client.get_node(node_id)


async def _properties(node: Node) -> tuple[str, float | None, float | None]:
    """Unit and instrument range, where the server tells."""
    unit, low, high = "", None, None
    for one in await node.get_properties():
        name = (await one.read_browse_name()).Name
        if name in ("EngineeringUnits", "InstrumentRange"):
            value = await one.read_value()
            if name == "EngineeringUnits" and isinstance(value, ua.EUInformation):
                unit = str(value.DisplayName.Text or "")[:32]
            elif isinstance(value, ua.Range) and value.Low < value.High:
                low, high = float(value.Low), float(value.High)
    return unit, low, high


def _signal_name(path: str) -> str:
    """A name that the registry takes."""
    return re.sub(r"[+#/$\x00-\x1f\x7f]", "-", path).strip()[:100].strip() or "unnamed"


def _free(name: str, taken: set[str]) -> str:
    """Names may not differ in case only."""
    found, number = name, 2
    while found.lower() in taken:
        found, number = f"{name[:94]}-{number}", number + 1
    taken.add(found.lower())
    return found


def table(proposals: Iterable[Proposal], machine: str) -> str:
    """The proposals as the table that the registry imports; `machine` is the path from the site on."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(("machine", "machine_name", "kind", "signal", "unit", "range_min", "range_max"))
    name = machine.rpartition("/")[2]
    for number, one in enumerate(proposals):
        bounds = ("" if bound is None else repr(bound) for bound in (one.range_min, one.range_max))
        # A cell that begins like a formula is kept a text by an apostrophe, for spreadsheets and for the import.
        texts = ("'" + text if text[:1] in "=+-@" and text else text for text in (one.signal, one.unit))
        writer.writerow((machine, *((name, "machine") if number == 0 else ("", "")), *texts, *bounds))
    return out.getvalue()


def configuration_text(
    url: str, proposals: Sequence[Proposal], *, target: str, machine: str, login: dict[str, str] | None = None
) -> str:
    """A configuration for the proposals; `machine` is the whole path, `login` has user, password_env and security."""
    lines = [f"target = {_toml(target)}", 'source = "opcua"', 'buffer = "buffer"', "", "[[server]]"]
    lines += [f"url = {_toml(url)}", 'mode = "subscribe"', "interval_ms = 1000"]
    lines += [f"{key} = {_toml(value)}" for key, value in (login or {}).items() if value]
    lines += ["", "[[server.machine]]"]
    lines += [f"path = {_toml(machine)}", "", "[server.machine.signals]"]
    lines += [f"{_toml(one.signal)} = {_toml(one.node_id)} # {one.kind} {one.unit}".rstrip() for one in proposals]
    return "\n".join(lines) + "\n"


def _toml(text: str) -> str:
    escaped = re.sub(r'["\\]', lambda found: "\\" + found[0], text)
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\u{ord(found[0]):04x}", escaped) + '"'
