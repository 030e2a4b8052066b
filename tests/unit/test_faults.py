"""What is the hub's fault is counted where the answer leaves, whoever refused: the gate, a use case, or nobody who meant to."""

import httpx
import pytest
from fastapi import APIRouter, Depends
from prometheus_client import REGISTRY

from services.common import http
from services.common.errors import Invalid, SlowDown, TryAgain
from services.common.runtime import Runtime

REFUSALS = {
    "gate": TryAgain("The keys are away.", reason="TOKEN_KEYS_AWAY"),
    "broken": RuntimeError("a bug"),
    "busy": SlowDown("Too much."),
    "limit": SlowDown("You ask too often.", reason="LIMIT_REQUESTS"),
    "wrong": Invalid("No."),
    "fine": None,
}


def counted(call: str) -> dict[str, float]:
    (family,) = (one for one in REGISTRY.collect() if one.name == "smdih_faults")
    return {
        sample.labels["reason"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["call"] == call and sample.value
    }


@pytest.mark.parametrize(
    ("asked", "faults"),
    [
        ("gate", {"TOKEN_KEYS_AWAY": 2}),
        ("broken", {"INTERNAL": 2}),
        ("busy", {"SLOW_DOWN": 2}),
        ("limit", {}),
        ("wrong", {}),
        ("fine", {}),
    ],
)
async def test_by_http_what_is_our_fault_is_counted_by_call_and_reason(asked: str, faults: dict[str, float]) -> None:
    async def check() -> None:
        if refusal := REFUSALS[asked]:
            raise refusal

    router = APIRouter(dependencies=[Depends(check)])

    @router.get(f"/v1/faults/{asked}/{{number}}")
    async def answer(number: int) -> int:
        return number

    app = http.application("test", runtime=Runtime(), directory=None, open_routers=[router])
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://hub") as client:
        for number in range(2):
            await client.get(f"/v1/faults/{asked}/{number}")
    assert counted(f"GET /v1/faults/{asked}/{{number}}") == faults
