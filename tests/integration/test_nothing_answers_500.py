"""Every route of every service, with values that nobody expects: refused with a reason, never a 500."""

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from localstack.hub import Hub
from localstack.servers import Servers
from services.common.settings import Settings

NASTY: tuple[Any, ...] = (
    *(
        -1,
        0,
        2**31,
        2**63 - 1,
        2**63,
        2**70,
        1e308,
        "",
        "x" * 5000,
        "\x00",
        "nul\x00inside",
        "🙂",
        "../..",
        "%00",
        "'; --",
    ),
    *("NaN", "9999-12-31", "99999999999999999999999.x", None, True, [], {}, [None], {"a": 1}),
)
AT_ONCE = 8


@pytest_asyncio.fixture(scope="module")
async def hub(servers: Servers, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hub]:
    own = Servers(settings.kafka_bootstrap, settings.database_dsn)
    made = Hub(
        own,
        Path(tmp_path_factory.mktemp("hub")),
        topic_prefix=settings.kafka_topic_prefix,
        roles=("door", "anomaly", "matching", "funding"),
    )
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


def _resolved(schema: dict[str, Any], document: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def _example(schema: dict[str, Any], document: dict[str, Any]) -> Any:
    """A value that the schema allows, as far as it says."""
    schema = _resolved(schema, document)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return _example(schema[key][0], document)
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: _example(field, document) for name, field in schema.get("properties", {}).items()}
    if kind == "array":
        return [_example(schema["items"], document)]
    return {"integer": 1, "number": 1.5, "boolean": True}.get(str(kind), "text")


def _nasty_for(value: Any, turn: Iterator[int]) -> Iterator[Any]:
    """None and every nasty value of the same kind; one in turn of the other kinds, which never reach code of ours."""
    kind = _kind(value)
    others = [nasty for nasty in NASTY if nasty is not None and _kind(nasty) is not kind]
    yield None
    yield from (nasty for nasty in NASTY if nasty is not None and _kind(nasty) is kind)
    yield others[next(turn) % len(others)]


def _kind(value: Any) -> type:
    return float if isinstance(value, int) and not isinstance(value, bool) else type(value)


def _mutations(value: Any, turn: Iterator[int]) -> Iterator[Any]:
    """The value with each of its parts replaced by nasty values."""
    yield from _nasty_for(value, turn)
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for nasty in _mutations(part, turn):
            changed = copy.deepcopy(value)
            changed[key] = nasty
            yield changed


def _requests(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    turn = itertools.count()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            # One answers for as long as one listens, the others would end the key that this test uses.
            if path.endswith("/watch") or (path.startswith("/v1/credentials/{") and method in ("delete", "post")):
                continue
            parameters = operation.get("parameters", [])
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            body = _example(content["schema"], document) if content else None
            in_path = {p["name"]: "1" for p in parameters if p["in"] == "path"}
            queries = {
                p["name"]: _example(p["schema"], document)
                for p in parameters
                if p["in"] == "query" and p.get("required")
            }
            plain = {"params": queries} | ({"json": body} if content else {})
            yield method, path.format(**in_path), plain
            for name in in_path:
                for nasty in NASTY:
                    quoted = httpx.QueryParams({"v": str(nasty)[:200]}).__str__()[2:] or "%20"
                    yield method, path.format(**(in_path | {name: quoted})), plain
            for parameter in parameters:
                if parameter["in"] == "query":
                    for nasty in _nasty_for(_example(parameter["schema"], document), turn):
                        yield (
                            method,
                            path.format(**in_path),
                            plain | {"params": queries | {parameter["name"]: str(nasty)}},
                        )
            if content:
                for changed in _mutations(body, turn):
                    yield method, path.format(**in_path), plain | {"json": changed}


@pytest.mark.parametrize("service", ["ingest", "anomaly", "matching", "funding"])
async def test_no_request_is_answered_with_500(hub: Hub, service: str) -> None:
    base = hub.endpoints()[service]["http"]
    answered: dict[int, int] = {}
    broken: list[str] = []
    async with httpx.AsyncClient(
        base_url=base, headers={"Authorization": f"Bearer {hub.operator_key}"}, timeout=30
    ) as client:
        document = (await client.get("/openapi.json")).json()
        requests = _requests(document)

        async def ask() -> None:
            for method, path, given in requests:
                answer = await client.request(method, path, **given)
                answered[answer.status_code] = answered.get(answer.status_code, 0) + 1
                if answer.status_code >= 500:
                    broken.append(f"{method} {path} {given!r:.300}: {answer.text:.200}")
                elif answer.status_code >= 400:
                    assert answer.json()["reason"], f"{method} {path}: no reason"

        await asyncio.gather(*(ask() for _ in range(AT_ONCE)))
    print(service, answered)
    assert not broken, "\n".join(broken[:20])
    assert sum(answered.values()) > 100
    assert 401 not in answered, "the key of this test was ended on the way; what came after was not tested"
