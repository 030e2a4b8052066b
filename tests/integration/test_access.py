"""Who may do what: every route and every call of every service, for every role, with the ids of another firm's things.

What is expected stands in one table (tests/access_matrix.py); a route or call that is not in it fails the test.
"""

import asyncio
import importlib
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

import smdih
from localstack.hub import Hub
from localstack.servers import Servers
from services.common.audit import changes_by_call
from services.common.settings import Settings
from tests.access_matrix import CALLS, ENDLESS, ROUTES
from tests.integration.access_world import (
    EXAMPLES,
    MARK,
    SERVICES,
    World,
    bodies,
    build,
    filled,
    names_in,
)
from tests.oidc import AUDIENCE, ISSUER, running_provider

AT_ONCE = 8
# The letter of each asker in the table.
ASKERS = {
    "none": "",
    "wrong key": "",
    "wrong token": "",
    "nobody's token": "",
    "device": "d",
    "firm": "f",
    "firm by token": "f",
    "partner": "p",
    "partner by token": "p",
    "provider": "v",
    "assessor": "a",
    "operator": "o",
    "operator by token": "o",
    # These have what is named.
    "own device": "d",
    "own partner": "p",
    "own provider": "v",
    "own firm": "f",
}
# How a bearer becomes a caller is the same for all routes, so these try only some of them.
SAMPLED = {"wrong key", "wrong token", "nobody's token", "firm by token", "partner by token", "operator by token"}
SAMPLED_EVERY = 8
STREAM_PAUSE_S = 0.2
STREAM_TIMEOUT_S = 5
STREAM_TRIES = 3
# Writes what is answered to this file instead of judging it: how the table is made for new routes.
SHOW = os.environ.get("SMDIH_SHOW_ACCESS", "")


@pytest_asyncio.fixture(scope="module")
async def world(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with running_provider() as provider:
        hub = Hub(
            Servers(settings.kafka_bootstrap, settings.database_dsn),
            Path(tmp_path_factory.mktemp("hub")),
            topic_prefix=settings.kafka_topic_prefix,
            roles=("door", "anomaly", "matching", "funding"),
            environment={
                "SMDIH_OIDC_ISSUER": ISSUER,
                "SMDIH_OIDC_AUDIENCE": AUDIENCE,
                "SMDIH_OIDC_KEYS": provider.address,
                "SMDIH_LIMIT_FAILURES_PER_MINUTE": "1000000",
            },
        )
        try:
            await hub.start()
            made = await build(hub, provider)
            yield made
            for client in made.clients.values():
                await client.aclose()
        finally:
            await hub.stop()


@pytest.mark.timeout(600)
async def test_every_route(world: World) -> None:
    documents = {name: (await world.clients[name].get("/openapi.json")).json() for name in SERVICES}
    routes = {
        f"{name} {method.upper()} {path}": (name, method, path, operation)
        for name, document in documents.items()
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    tried = Tried("ROUTES", ROUTES, list(routes))
    whole = bodies(world.ids)

    async def ask(route: str, asker: str) -> None:
        name, method, path, operation = routes[route]
        named: set[str] = set(re.findall(r"{(\w+)}", path))
        ids = {one: world.ids.get(one, EXAMPLES.get(one, "1")) for one in named}
        queries = {}
        for parameter in (one for one in operation.get("parameters", []) if one["in"] == "query"):
            what = parameter["name"]
            if what in world.ids:
                named.add(what)
                queries[what] = world.ids[what]
            elif parameter.get("required"):
                example = filled(parameter["schema"], documents[name], {}, set())
                queries[what] = EXAMPLES.get(what, example)
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        if (body := whole.get(route)) is not None:
            named |= names_in(body, world.ids)
        elif content:
            body = filled(content["schema"], documents[name], world.ids, named)
        bearer = world.bearers[asker]
        request = world.clients[name].build_request(
            method,
            path.format(**ids),
            params=queries,
            json=body,
            headers={"Authorization": f"Bearer {bearer}"} if bearer else {},
        )
        answer = await world.clients[name].send(request, stream=True)
        try:
            text = "" if route in ENDLESS else (await answer.aread()).decode(errors="replace")
        finally:
            await answer.aclose()
        status = answer.status_code
        tried.note(
            route,
            asker,
            answer=status,
            is_refused=status in (401, 403, 404),
            is_unknown=status in (401, 403),
            is_invalid=status in (400, 422),
            is_broken=status >= 500,
            names_things=bool(named),
            text=text,
        )

    await tried.each(ask, lambda route: routes[route][1] != "get")


@pytest.mark.timeout(600)
async def test_every_call(world: World) -> None:
    generated = Path(next(iter(smdih.__path__)))
    for module in generated.rglob("*_pb2.py"):
        importlib.import_module(".".join(("smdih", *module.relative_to(generated).with_suffix("").parts)))
    methods: dict[str, tuple[str, MethodDescriptor]] = {}
    channels = {name: grpc.aio.insecure_channel(world.hub.endpoints()[name]["grpc"]) for name in SERVICES}
    for name, channel in channels.items():
        for service in await _services(channel):
            for method in descriptor_pool.Default().FindServiceByName(service).methods:
                methods[f"/{service}/{method.name}"] = (name, method)
    tried = Tried("CALLS", CALLS, list(methods))
    whole = bodies(world.ids)

    async def ask(path: str, asker: str) -> None:
        name, method = methods[path]
        request = message_factory.GetMessageClass(method.input_type)()
        named: set[str] = set()
        if (body := whole.get(path)) is not None:
            json_format.ParseDict(body, request)
            named |= names_in(body, world.ids)
        else:
            _fill(request, world.ids, named)
        code, text = await _call(channels[name], path, method, request, world.bearers[asker])
        unknown = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        tried.note(
            path,
            asker,
            answer=code.name,
            is_refused=code in (*unknown, grpc.StatusCode.NOT_FOUND),
            is_unknown=code in unknown,
            is_invalid=code is grpc.StatusCode.INVALID_ARGUMENT,
            is_broken=code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN),
            names_things=bool(named),
            text=text,
        )

    try:
        await tried.each(ask, lambda path: changes_by_call(path))
    finally:
        for channel in channels.values():
            await channel.close()


class Tried:
    """What came of the tries, compared with the table."""

    def __init__(self, name: str, table: Mapping[str, str], found: list[str]) -> None:
        self._name = name
        self._table = table
        self._found = found
        self._observed: dict[str, dict[str, Any]] = {}
        self._wrong: list[str] = []
        # Asked for another's things and told only that the request was no good; and what was answered well to anybody.
        self._invalid: set[str] = set()
        self._good: set[str] = set()
        if not SHOW:
            assert sorted(found) == sorted(table), "tests/access_matrix.py has not what the services have"

    def verdict(self, what: str, asker: str) -> str:
        """open, allowed, own (allowed, but not for the things of others) or denied."""
        letters, letter = self._table.get(what, ""), ASKERS[asker]
        if letters == "*":
            return "open"
        if letter and (letter.upper() in letters or (letter in letters and asker.startswith("own "))):
            return "allowed"
        return "own" if letter and letter in letters else "denied"

    async def each(self, ask: Callable[[str, str], Awaitable[None]], changes: Callable[[str], bool]) -> None:
        """Those who may not first, and those who may change things last, so that all are there while others try."""
        pairs = [
            (what, asker)
            for asker in ASKERS
            for number, what in enumerate(self._found)
            if asker not in SAMPLED or number % SAMPLED_EVERY == 0
        ]
        phases = {"denied": 0, "own": 0, "open": 0, "allowed": 1}
        by_phase: dict[int, list[tuple[str, str]]] = {}
        for what, asker in pairs:
            verdict = self.verdict(what, asker)
            by_phase.setdefault(phases[verdict] + (verdict == "allowed" and changes(what)), []).append((what, asker))
        for _, some in sorted(by_phase.items()):
            waiting = iter(some)

            async def work(waiting: Iterator[tuple[str, str]] = waiting) -> None:
                for what, asker in waiting:
                    await ask(what, asker)

            await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        if SHOW:
            shown = "".join(f"{self._name} {what} {answers}\n" for what, answers in self._observed.items())
            Path(SHOW).with_suffix(f".{self._name.lower()}").write_text(shown)
            return
        assert not self._wrong, "\n".join(sorted(self._wrong))
        # A request that is good for nobody shows nothing about whose things it names: access_world.bodies has to have a better one.
        nothing_shown = sorted(self._invalid - self._good)
        assert not nothing_shown, "Asked for another's things in no good form:\n" + "\n".join(nothing_shown)

    def note(
        self,
        what: str,
        asker: str,
        *,
        answer: int | str,
        is_refused: bool,
        is_unknown: bool,
        is_invalid: bool,
        is_broken: bool,
        names_things: bool,
        text: str,
    ) -> None:
        if answer == "OK" or (isinstance(answer, int) and answer < 300):
            self._good.add(what)
        if is_invalid and not is_refused and names_things and self.verdict(what, asker) == "own":
            self._invalid.add(what)
        self._observed.setdefault(what, {})[asker] = answer
        verdict = self.verdict(what, asker)
        is_fine = {
            "open": not is_unknown,
            "allowed": not is_unknown,
            # Where a thing of the other firm is named there must be a refusal (of telemetry: batch by batch), or the request
            # was no good at all.
            "own": is_refused or is_invalid or ((not names_things or "UNKNOWN_MACHINE" in text) and MARK not in text),
            "denied": is_refused,
        }[verdict]
        if is_broken or not is_fine:
            self._wrong.append(f"{what}: {asker} is {verdict} and gets {answer}: {text[:150]}")


async def _services(channel: grpc.aio.Channel) -> list[str]:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]  # it serves asyncio too
    asked = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for answer in asked:
        return [one.name for one in answer.list_services_response.service if one.name.startswith("smdih.")]
    raise AssertionError("the server does not tell its services")


async def _call(
    channel: grpc.aio.Channel, path: str, method: MethodDescriptor, request: Message, bearer: str
) -> tuple[grpc.StatusCode, str]:
    answer_class = message_factory.GetMessageClass(method.output_type)
    metadata = (("authorization", f"Bearer {bearer}"),)
    kinds = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }
    open_call: Any = kinds[method.client_streaming, method.server_streaming]
    stub = open_call(
        path, request_serializer=lambda one: one.SerializeToString(), response_deserializer=answer_class.FromString
    )
    try:
        if not method.server_streaming:
            return grpc.StatusCode.OK, str(await stub(request, metadata=metadata, timeout=20))
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""

    async def asking(after_s: float) -> AsyncIterator[Message]:
        await asyncio.sleep(after_s)
        yield request

    for number in range(STREAM_TRIES):
        try:
            asked = asking(number * STREAM_PAUSE_S) if method.client_streaming else request
            call = stub(asked, metadata=metadata, timeout=STREAM_TIMEOUT_S)
            first = await call.read()
            call.cancel()
        except grpc.aio.AioRpcError as error:
            code, detail = error.code(), error.details() or ""
            if (
                "from Core" not in detail
            ):  # else the refusal came while the client wrote; the next try lets it come first
                break
        else:
            return grpc.StatusCode.OK, str(first)
    return code, detail


def _fill(message: Message, ids: Mapping[str, Any], named: set[str], depth: int = 0) -> None:
    """Name things of the first firm wherever the message names things, and give all else a value of its kind."""
    for one in message.DESCRIPTOR.fields:
        if one.containing_oneof is not None and message.WhichOneof(one.containing_oneof.name):
            continue
        if one.message_type is not None:
            if (
                depth < 3
                and not one.message_type.GetOptions().map_entry
                and one.message_type.full_name.startswith("smdih.")
            ):
                part = getattr(message, one.name)
                _fill(part.add() if one.is_repeated else part, ids, named, depth + 1)
            continue
        value = ids.get(one.name)
        if value is not None and isinstance(value, str) == (one.cpp_type == FieldDescriptor.CPPTYPE_STRING):
            named.add(one.name)
        elif one.name == "page_token":
            continue
        else:
            value = _example(one)
        if not one.is_repeated:
            setattr(message, one.name, value)
        elif not isinstance(value, bytes):
            getattr(message, one.name).extend(value if isinstance(value, list) else [value])


def _example(one: Any) -> Any:
    kinds = FieldDescriptor
    if one.cpp_type == kinds.CPPTYPE_STRING:
        text = one.type == kinds.TYPE_STRING
        return str(EXAMPLES.get(one.name, "text")) if text else b""
    if one.cpp_type == kinds.CPPTYPE_BOOL:
        return one.name == "one_shot"
    found = EXAMPLES.get(one.name, 1)
    return found if isinstance(found, int) and one.cpp_type != kinds.CPPTYPE_ENUM else 1
