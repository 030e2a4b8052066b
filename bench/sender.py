"""A sender in a process of its own:

    python -m bench.sender TARGET KEY CONNECTIONS MACHINES(first:last) ROWS FRAMES_A_BATCH AGE_S RATE

Streams ROWS frames of every machine, the last one AGE_S old, and prints one JSON line: samples, `began` (the first send, on the
machine's monotonic clock) and the seconds until all were acknowledged. With a RATE above 0 every machine sends so many batches a
second, the connections one after the other, and a frame's time is the time at which it was to be sent: what waits in the sender
counts as late too.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator

import grpc
import numpy as np

from bench.plant import frames, seconds
from smdih.ingest.v1 import telemetry_pb2

IN_FLIGHT_MAX = 400  # batches a connection


async def main(
    target: str, key: str, connections: int, machines: range, rows: int, rows_a_batch: int, age_s: int, rate: float
) -> None:
    start_us = (time.time_ns() // 1000 // 1_000_000 - rows - age_s) * 1_000_000
    values, times = frames(rows), seconds(rows, start_us)
    rounds = range(0, rows, rows_a_batch)
    # Encoded once: what is measured is the hub, not this sender's protobuf.
    encoded = [
        telemetry_pb2.Batch(
            times_us=times[row : row + rows_a_batch].tolist(), values=values[row : row + rows_a_batch].ravel().tolist()
        ).SerializeToString()
        for row in rounds
    ]
    shares = [machines[number::connections] for number in range(connections)]
    began, began_us = time.monotonic(), time.time_ns() // 1000

    async def connection(number: int) -> None:
        mine, source = shares[number], _source(number)
        window = _Window(max(IN_FLIGHT_MAX, len(mine)))

        async def requests() -> AsyncIterator[bytes]:
            sequence = 0
            for number_of_round, body in enumerate(encoded):
                if rate:
                    due_s = (number_of_round + number / connections) / rate
                    await asyncio.sleep(max(0.0, began + due_s - time.monotonic()))
                    due_us = began_us + round(due_s * 1e6)
                    row = values[number_of_round].tolist()
                    body = telemetry_pb2.Batch(times_us=[due_us], values=row).SerializeToString()
                for chunk in range(0, len(mine), 100):
                    parts = []
                    for machine in mine[chunk : chunk + 100]:
                        sequence += 1
                        head = telemetry_pb2.Batch(sequence=sequence, machine_id=machine).SerializeToString()
                        batch = head + body
                        parts.append(b"\x12" + _varint(len(batch)) + batch)
                    await window.enter(len(parts))
                    yield source + b"".join(parts)

        async with grpc.aio.insecure_channel(target) as channel:
            open_stream: grpc.aio.StreamStreamMultiCallable[bytes, telemetry_pb2.StreamBatchesResponse] = (
                channel.stream_stream(
                    "/smdih.ingest.v1.TelemetryService/StreamBatches",
                    response_deserializer=telemetry_pb2.StreamBatchesResponse.FromString,
                )
            )
            async for answer in open_stream(requests(), metadata=(("authorization", f"Bearer {key}"),)):
                await window.acknowledge(answer.acknowledged_batches)
                if answer.quarantined:
                    raise RuntimeError(f"quarantined: {answer.problems[0]}")
                if answer.acknowledged_batches == len(encoded) * len(mine):
                    break

    await asyncio.gather(*(connection(number) for number in range(connections)))
    samples = len(machines) * rows * values.shape[1]
    print(json.dumps({"samples": samples, "began": began, "seconds": time.monotonic() - began}))


class _Window:
    """How many batches of a connection are on their way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sent = self._acknowledged = 0
        self._changed = asyncio.Condition()

    async def enter(self, batches: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._sent - self._acknowledged < self._limit)
        self._sent += batches

    async def acknowledge(self, batches: int) -> None:
        async with self._changed:
            self._acknowledged = batches
            self._changed.notify_all()


def _source(number: int) -> bytes:
    name = f"bench-{number}-{int(np.random.default_rng().integers(1 << 30))}".encode()
    return b"\x0a" + _varint(len(name)) + name


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


if __name__ == "__main__":
    target, key, connections, span, rows, rows_a_batch, age_s, rate = sys.argv[1:]
    first, last = (int(part) for part in span.split(":"))
    asyncio.run(
        main(
            target,
            key,
            int(connections),
            range(first, last + 1),
            int(rows),
            int(rows_a_batch),
            int(age_s),
            float(rate),
        )
    )
