"""A sender in a process of its own, so that no fault in the hub can falsify what it writes down:

    python -m chaos.gateway TARGET MACHINES(first:last) START_S SEED LEDGER [HTTP]   (the key in SMDIH_KEY, and SMDIH_TLS_CA)

HTTP: the door's base URL; then two more connections send JSON and line protocol. Sends batches of new frames until a line comes on
standard input, some of them twice and some late, reconnects whatever happens, and goes on until all are acknowledged.
LEDGER gets a line "machine first_row rows" for each batch, written after its acknowledgement only. Ends with one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
import sys
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import grpc
import httpx
import numpy as np

from bench.plant import SIGNALS
from services.ingest.historian.binarycopy import Floats, Ints
from smdih.ingest.v1 import telemetry_pb2 as pb
from smdih.ingest.v1 import telemetry_pb2_grpc
from smdih_client.tls import Tls, open_channel

ROWS_A_BATCH = 20
TURN_S = 0.25
IN_FLIGHT_MAX = 300
BATCHES_A_CALL = 50
REPEAT_SHARE = 0.05
LATE_SHARE = 0.05
LATE_TURNS_MAX = 5
CALL_TIMEOUT_S = 20
DRAIN_DEADLINE_S = 120


def frames(machine: int, rows: Ints) -> Floats:
    """What a machine measures at its rows: to be had again by whoever judges."""
    signals = np.arange(SIGNALS)
    found: Floats = ((machine * 31 + rows[:, None] * 7 + signals * 13) % 10_007) / 8.0
    return found


@dataclass
class _Batch:
    machine: int
    first_row: int
    sequence: int

    def message(self, start_s: int) -> pb.Batch:
        rows = np.arange(self.first_row, self.first_row + ROWS_A_BATCH, dtype=np.int64)
        return pb.Batch(
            sequence=self.sequence,
            machine_id=self.machine,
            times_us=((start_s + rows) * 1_000_000).tolist(),
            values=frames(self.machine, rows).ravel().tolist(),
        )


class _Connection:
    """One connection's machines, what is to be sent and what is on its way."""

    def __init__(self, number: int, machines: list[int], start_s: int, seed: int, ledger: TextIO) -> None:
        self.source = f"chaos-{seed}-{number}"
        self._machines, self.start_s, self._ledger = machines, start_s, ledger
        self._random = random.Random(seed * 1_000 + number)
        self._sequence = time.time_ns() // 1_000
        self._row = 0
        self._turn = 0
        self._late: list[tuple[int, _Batch]] = []
        self.to_send: deque[_Batch] = deque()
        self.in_flight: deque[_Batch] = deque()
        # The connection that may take what is to be sent: one that is lost may still ask for a moment.
        self.current: object = None
        self.sent = self.acknowledged = self.repeats = self.late = self.reconnects = 0
        self.problems: list[str] = []

    @property
    def is_drained(self) -> bool:
        return not self.to_send and not self.in_flight and not self._late

    def make(self) -> None:
        """A turn's batches; a backlog is worked off first."""
        self._turn += 1
        self._release(self._turn)
        if len(self.to_send) + len(self.in_flight) >= IN_FLIGHT_MAX:
            return
        for machine in self._machines:
            self._sequence += 1
            batch = _Batch(machine, self._row, self._sequence)
            self.sent += 1
            if self._random.random() < LATE_SHARE:
                self.late += 1
                self._late.append((self._turn + self._random.randint(1, LATE_TURNS_MAX), batch))
            else:
                self.to_send.append(batch)
        self._row += ROWS_A_BATCH

    def release_all(self) -> None:
        self._release(self._turn + LATE_TURNS_MAX)

    def _release(self, turn: int) -> None:
        for item in [item for item in self._late if item[0] <= turn]:
            self._late.remove(item)
            self.to_send.append(item[1])

    def take(self, limit: int) -> list[_Batch]:
        """What goes next; from now on it is in flight."""
        batches = [self.to_send.popleft() for _ in range(min(limit, len(self.to_send)))]
        self.in_flight.extend(batches)
        return batches

    def take_message(self, limit: int) -> pb.StreamBatchesRequest | None:
        batches = self.take(limit)
        if not batches:
            return None
        return pb.StreamBatchesRequest(source=self.source, batches=[batch.message(self.start_s) for batch in batches])

    def acknowledge(self, count: int) -> None:
        for _ in range(count):
            batch = self.in_flight.popleft()
            self._ledger.write(f"{batch.machine} {batch.first_row} {ROWS_A_BATCH}\n")
            self.acknowledged += 1
            if self._random.random() < REPEAT_SHARE:
                # As after an acknowledgement that got lost: with its own sequence, or read again by a sender that has none.
                self.repeats += 1
                self.sent += 1
                self.to_send.append(_Batch(batch.machine, batch.first_row, self._random.choice([batch.sequence, 0])))
        self._ledger.flush()

    def lost_connection(self) -> None:
        self.current = None
        self.reconnects += 1
        self.to_send.extendleft(reversed(self.in_flight))
        self.in_flight.clear()


async def _stream(stub: telemetry_pb2_grpc.TelemetryServiceAsyncStub, mine: _Connection, key: str) -> None:
    mine.current = this = object()

    async def requests() -> AsyncIterator[pb.StreamBatchesRequest]:
        while mine.current is this:
            request = mine.take_message(IN_FLIGHT_MAX - len(mine.in_flight))
            if request is None:
                await asyncio.sleep(0.02)
            else:
                yield request

    seen = 0
    answers = stub.StreamBatches(requests(), metadata=(("authorization", f"Bearer {key}"),))
    last = time.monotonic()
    while True:
        try:
            answer = await asyncio.wait_for(answers.read(), CALL_TIMEOUT_S)
        except TimeoutError:
            if mine.in_flight or time.monotonic() - last > 10 * CALL_TIMEOUT_S:
                answers.cancel()
                raise
            continue
        if answer is grpc.aio.EOF:
            raise TimeoutError("the stream ended")
        assert isinstance(answer, pb.StreamBatchesResponse)
        mine.acknowledge(answer.acknowledged_batches - seen)
        seen = answer.acknowledged_batches
        mine.problems.extend(problem.reason for result in answer.problems for problem in result.problems)


async def _unary(stub: telemetry_pb2_grpc.TelemetryServiceAsyncStub, mine: _Connection, key: str) -> None:
    while True:
        taken = mine.take_message(BATCHES_A_CALL)
        if taken is None:
            await asyncio.sleep(0.02)
            continue
        answer = await stub.SendBatches(
            pb.SendBatchesRequest(source=taken.source, batches=taken.batches),
            metadata=(("authorization", f"Bearer {key}"),),
            timeout=CALL_TIMEOUT_S,
        )
        mine.problems.extend(problem.reason for result in answer.results for problem in result.problems)
        mine.acknowledge(len(answer.results))


def _json_body(mine: _Connection, batches: list[_Batch]) -> tuple[str, bytes]:
    """Where it is posted, and what."""
    made = []
    for batch in batches:
        rows = np.arange(batch.first_row, batch.first_row + ROWS_A_BATCH, dtype=np.int64)
        of_rows = zip(rows.tolist(), frames(batch.machine, rows).tolist(), strict=True)
        sent = [
            {"ts": (mine.start_s + row) * 1000, "values": dict(zip(_NAMES, of, strict=True))} for row, of in of_rows
        ]
        made.append({"machine": batch.machine, "sequence": batch.sequence, "frames": sent})
    return "/v1/telemetry", json.dumps({"source": mine.source, "batches": made}).encode()


def _lines_body(mine: _Connection, batches: list[_Batch]) -> tuple[str, bytes]:
    lines = []
    for batch in batches:
        rows = np.arange(batch.first_row, batch.first_row + ROWS_A_BATCH, dtype=np.int64)
        for row, of in zip(rows.tolist(), frames(batch.machine, rows).tolist(), strict=True):
            fields = ",".join(f"{name}={value}" for name, value in zip(_NAMES, of, strict=True))
            lines.append(f"chaos,machine={batch.machine} {fields} {mine.start_s + row}")
    return "/api/v2/write?precision=s", "\n".join(lines).encode()


_NAMES = [f"s{number}" for number in range(SIGNALS)]
_BODIES = {"json": _json_body, "lines": _lines_body}


async def _post(client: httpx.AsyncClient, mine: _Connection, kind: str) -> None:
    while True:
        taken = mine.take(BATCHES_A_CALL)
        if not taken:
            await asyncio.sleep(0.02)
            continue
        path, body = _BODIES[kind](mine, taken)
        answer = await client.post(path, content=body)
        if answer.status_code in (429, 503):
            raise TimeoutError(answer.text)
        if answer.status_code not in (200, 204):
            mine.problems.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
            return
        mine.acknowledge(len(taken))


async def _for_ever(target: str, http: str, mine: _Connection, key: str, kind: str) -> None:
    while not mine.problems:
        try:
            if kind in _BODIES:
                headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
                verify = ssl.create_default_context(cafile=os.environ.get("SMDIH_TLS_CA") or None)
                async with httpx.AsyncClient(
                    base_url=http, headers=headers, timeout=CALL_TIMEOUT_S, verify=verify
                ) as client:
                    await _post(client, mine, kind)
            else:
                async with open_channel(target, Tls.named_in()) as channel:
                    stub: telemetry_pb2_grpc.TelemetryServiceAsyncStub = telemetry_pb2_grpc.TelemetryServiceStub(
                        channel
                    )
                    await (_unary if kind == "unary" else _stream)(stub, mine, key)
        except (grpc.aio.AioRpcError, TimeoutError, httpx.TransportError) as error:
            if isinstance(error, grpc.aio.AioRpcError) and error.code() in _FINAL:
                mine.problems.append(f"{error.code().name}: {error.details()}")
            mine.lost_connection()
        await asyncio.sleep(0.2)


_FINAL = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)


async def main(target: str, machines: range, start_s: int, seed: int, ledger_path: str, http: str = "") -> None:
    key = os.environ["SMDIH_KEY"]
    kinds = ("stream", "stream", "unary", *(_BODIES if http else ()))
    with Path(ledger_path).open("w") as ledger:  # noqa: ASYNC230  a few lines at a time
        connections = [
            _Connection(number, list(machines[number :: len(kinds)]), start_s, seed, ledger)
            for number in range(len(kinds))
        ]
        senders = [
            asyncio.create_task(_for_ever(target, http, mine, key, kind))
            for mine, kind in zip(connections, kinds, strict=True)
        ]
        told = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
        while not told.done():
            for mine in connections:
                mine.make()
            await asyncio.sleep(TURN_S)
        until = time.monotonic() + DRAIN_DEADLINE_S
        for mine in connections:
            mine.release_all()
        while time.monotonic() < until and not all(mine.is_drained for mine in connections):
            await asyncio.sleep(0.05)
        for task in senders:
            task.cancel()
        await asyncio.gather(*senders, return_exceptions=True)
    counts = ("sent", "acknowledged", "repeats", "late", "reconnects")
    told_at_end = {name: sum(getattr(mine, name) for mine in connections) for name in counts}
    problems = sorted({problem for mine in connections for problem in mine.problems})
    print(json.dumps({**told_at_end, "problems": problems}))


if __name__ == "__main__":
    target, span, start_s, seed, ledger_path, *http = sys.argv[1:]
    first, last = (int(part) for part in span.split(":"))
    asyncio.run(main(target, range(first, last + 1), int(start_s), int(seed), ledger_path, *http))
