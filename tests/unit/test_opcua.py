"""The OPC UA gateway without a server: its configuration, what it keeps of a value, what it proposes."""

import asyncio
import csv
import io
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from asyncua import ua

from smdih_client.buffer import BufferFull
from smdih_client.opcua import (
    BadConfiguration,
    Configuration,
    Gateway,
    Proposal,
    Server,
    Source,
    Variable,
    Waiting,
    _free,
    _signal_name,
    configuration_text,
    load,
    table,
)
from smdih_client.telemetry import TelemetryClient


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("target = ", "gateway.toml: Invalid value"),
        ('target = "h:1"', "server is missing"),
        ('target = "h:1"\nserver = []', "at least one"),
        ('target = "h:1"\ntempo = 3\n[[server]]', "'tempo' is not known"),
        ('target = "h:1"\n[[server]]\nurl = "u"\nmachine = []', "names no signals"),
        ('target = "h:1"\n[[server]]\nurl = "u"\nmode = "guess"\nmachine = []', "subscribe or poll"),
        ('target = "h:1"\n[[server]]\nurl = "u"\n[[server.machine]]\npath = "p"\nsignals = {a = "x"}', "no node id"),
        ('target = "h:1"\n[[server]]\nurl = "u"\n[[server.machine]]\npath = "p"\nsignals = {a = 5}', "no node id"),
    ],
)
def test_a_wrong_configuration_says_where_and_why(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    with pytest.raises(BadConfiguration, match=re.escape(why)):
        load(path)


def test_a_signal_named_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    server = '[[server]]\nurl = "u"\n[[server.machine]]\npath = "p"\nsignals = {a = "ns=2;i=5"}\n'
    path.write_text('target = "h:1"\n' + server + server)
    with pytest.raises(BadConfiguration, match="'a' of p is named twice"):
        load(path)


def _value(value: object, kind: ua.VariantType, status: int = ua.StatusCodes.Good) -> ua.DataValue:
    return ua.DataValue(ua.Variant(value, kind), StatusCode=ua.StatusCode(status))


def test_only_good_finite_numbers_are_kept_and_everything_is_counted() -> None:
    waiting, variable = Waiting(), Variable("m", "s", "ns=2;i=1")
    for number, value in enumerate(
        (
            _value(1.5, ua.VariantType.Double),
            _value(True, ua.VariantType.Boolean),
            _value(-3, ua.VariantType.Int16),
            _value(1.5, ua.VariantType.Double, ua.StatusCodes.BadSensorFailure),
            _value(1.5, ua.VariantType.Double, ua.StatusCodes.UncertainLastUsableValue),
            _value(float("nan"), ua.VariantType.Double),
            _value("hot", ua.VariantType.String),
            _value([1.0], ua.VariantType.Double),
            _value(datetime(2026, 1, 1, tzinfo=UTC), ua.VariantType.DateTime),
            ua.DataValue(),
        )
    ):
        waiting.add(variable, number, value)
    waiting.add(variable, 0, _value(2.5, ua.VariantType.Double))
    totals = waiting.totals
    assert (totals.received, totals.unusable, totals.replaced, waiting.samples) == (11, 7, 1, 3)


class Buffering:
    """Stands in for the client: a disk that takes its time, and may be full or failing."""

    def __init__(self, meanwhile: Callable[[], None], *errors: BaseException) -> None:
        self._meanwhile = meanwhile
        self._errors = list(errors)
        self.sent: list[tuple[str, list[int], tuple[str, ...], list[list[float]]]] = []

    async def send(self, machine: str, times: list[int], values: Any, *, signals: list[str]) -> None:
        await asyncio.sleep(0)
        self._meanwhile()
        if self._errors:
            raise self._errors.pop(0)
        self.sent.append((machine, times, tuple(signals), values.tolist()))


async def test_what_comes_while_the_disk_is_written_is_sent_too_also_of_the_same_machine_and_time() -> None:
    waiting = Waiting()
    late = [("b", 1, 2.0), ("a", 1, 9.0), ("b", 2, 3.0)]

    def meanwhile() -> None:
        for signal, at, number in late:
            waiting.add(Variable("m", signal, "ns=2;i=1"), at, _value(number, ua.VariantType.Double))
        late.clear()

    waiting.add(Variable("m", "a", "ns=2;i=1"), 1, _value(1.0, ua.VariantType.Double))
    client = Buffering(meanwhile)
    await waiting.send(cast(TelemetryClient, client))
    assert (client.sent, waiting.samples) == ([("m", [1], ("a",), [[1.0]])], 3)
    await waiting.send(cast(TelemetryClient, client))
    ((_, times, names, values),) = client.sent[1:]
    assert (times, names, values[0]) == ([1, 2], ("a", "b"), [9.0, 2.0])
    totals = waiting.totals
    assert (totals.received, totals.kept, totals.replaced, waiting.samples) == (4, 4, 0, 0)


@pytest.mark.parametrize("error", [OSError("disk"), asyncio.CancelledError()])
async def test_what_the_disk_did_not_take_waits_and_newer_values_win(error: BaseException) -> None:
    waiting = Waiting()
    late = [("m", "a", 9.0)]

    def meanwhile() -> None:
        for machine, signal, number in late:
            waiting.add(Variable(machine, signal, "ns=2;i=1"), 1, _value(number, ua.VariantType.Double))
        late.clear()

    for machine, signal in (("m", "a"), ("m", "b"), ("n", "a")):
        waiting.add(Variable(machine, signal, "ns=2;i=1"), 1, _value(1.0, ua.VariantType.Double))
    client = Buffering(meanwhile, error)
    with pytest.raises(type(error)):
        await waiting.send(cast(TelemetryClient, client))
    assert (waiting.samples, waiting.totals.replaced) == (3, 1)
    await waiting.send(cast(TelemetryClient, client))
    assert sorted(client.sent) == [("m", [1], ("a", "b"), [[9.0, 1.0]]), ("n", [1], ("a",), [[1.0]])]
    totals = waiting.totals
    assert (totals.received, totals.kept + totals.replaced, waiting.samples) == (4, 4, 0)
    waiting.add(Variable("m", "a", "ns=2;i=1"), 2, _value(1.0, ua.VariantType.Double))
    await waiting.send(cast(TelemetryClient, Buffering(meanwhile, BufferFull("full"))))
    assert (totals.refused, waiting.samples) == (1, 0)


async def test_what_comes_while_a_stopped_gateway_writes_goes_to_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server("opc.tcp://127.0.0.1:1", False, 1000, (Variable("m", "s", "ns=2;i=1"),))
    gateway = Gateway(Configuration("127.0.0.1:1", "opcua", tmp_path / "buffer", (server,)), "key")
    number = iter(range(100))

    def comes() -> None:
        gateway.waiting.add(server.variables[0], next(number), _value(1.0, ua.VariantType.Double))

    write = TelemetryClient.send

    async def slow(client: TelemetryClient, *args: Any, **named: Any) -> None:
        if gateway.waiting.totals.received == 1:
            comes()
        await write(client, *args, **named)

    reading = asyncio.Event()

    async def read(_: Source) -> None:
        reading.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(TelemetryClient, "send", slow)
    monkeypatch.setattr(Source, "run", read)
    running = asyncio.create_task(gateway.run())
    await reading.wait()
    comes()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (gateway.waiting.totals.kept, gateway.waiting.samples) == (2, 0)


def test_names_are_made_fit_for_the_registry_and_told_apart_without_regard_to_case() -> None:
    assert _signal_name("Axis/1.Speed #2 $") == "Axis-1.Speed -2 -"
    assert len(_signal_name("x" * 300)) == 100
    taken: set[str] = set()
    assert [_free(name, taken) for name in ("Speed", "speed", "SPEED")] == ["Speed", "speed-2", "SPEED-3"]


def test_what_is_proposed_can_be_read_back(tmp_path: Path) -> None:
    proposals = [
        Proposal('a "quoted" \\ name', "degC", -5.0, 5.5, 'ns=2;s=x"y', "Double"),
        Proposal("=sum", "", None, None, "ns=2;i=7", "Int32"),
    ]
    path = tmp_path / "gateway.toml"
    path.write_text(configuration_text("opc.tcp://h:4840", proposals, target="hub:1", machine="acme/leeds/press"))
    (server,) = load(path).servers
    assert [(one.machine, one.signal, one.node_id) for one in server.variables] == [
        ("acme/leeds/press", one.signal, one.node_id) for one in proposals
    ]
    rows = list(csv.reader(io.StringIO(table(proposals, "acme/leeds/press"))))
    assert rows[1] == ["acme/leeds/press", "press", "machine", 'a "quoted" \\ name', "degC", "-5.0", "5.5"]
    assert rows[2] == ["acme/leeds/press", "", "", "'=sum", "", "", ""]
