"""History from files into the hub: looked at first if wanted, sent at a limited rate, taken up again where it was killed.

Blocks of a file are numbered alike in every run and the source is named after the file's content, so what is sent twice is known
for a repeat even if the progress file is lost.
"""

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from smdih.ingest.v1 import telemetry_pb2, telemetry_pb2_grpc
from smdih_client.history import Block, LeftOut, blocks, files
from smdih_client.recording import NotARecording
from smdih_client.telemetry import RECONNECT_DELAY_S_MAX, Refused, TelemetryClient, batch_of
from smdih_client.tls import Tls, open_channel

# Past one of these everything sent is waited for and the progress is written.
BLOCKS_PER_STEP = 100
STEP_S_MAX = 1.0
BLOCKS_PER_CHECK = 8
EXAMPLES_MAX = 3
CHECK_ATTEMPTS_MAX = 10
SHOW_EVERY_S = 2.0


@dataclass
class Counts:
    """Samples (cells with a value) of a file: read = stored + quarantined + left_out."""

    rows: int = 0
    stored: int = 0
    quarantined: int = 0
    # Cells that are no numbers and rows whose time cannot be read: they stayed here.
    left_out: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def leave_out(self, found: Sequence[LeftOut]) -> None:
        for one in found:
            self.left_out += one.cells
            self.add(one.reason, one.cells)

    def add(self, reason: str, samples: int) -> None:
        self.reasons[reason] = self.reasons.get(reason, 0) + samples


@dataclass(frozen=True)
class Example:
    """The first rows that something is wrong with, for whoever mends them."""

    row: int
    time: str
    detail: str


@dataclass
class Forecast:
    """What would become of a file."""

    counts: Counts = field(default_factory=Counts)
    first_us: int | None = None
    last_us: int | None = None
    examples: dict[str, list[Example]] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A file and the machine that it belongs to."""

    path: Path
    name: str
    machine: str


def jobs(path: Path, machine: str) -> list[Job]:
    """The files to send. Without `machine` a folder's files name their machines: acme/leeds/press-3.csv. Raises NotARecording."""
    if not machine and not path.is_dir():
        raise NotARecording("name the machine with --machine, such as acme/leeds/press-3")
    if not path.exists():
        raise NotARecording(f"{path} cannot be read: there is no such file or folder")
    found = []
    for file in files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        found.append(Job(file, name, machine or name.rpartition(".")[0]))
    return found


class Hub:
    """Asks the hub what would become of batches."""

    def __init__(self, target: str, key: str, tls: Tls | None = None) -> None:
        self._target = target
        self._tls = tls
        self._metadata = (("authorization", f"Bearer {key}"),)

    async def forecast(self, job: Job) -> Forecast:
        """Run the hub's checks over a whole file; nothing is sent to be kept. Raises Refused, NotARecording."""
        forecast = Forecast()
        shown_s = time.monotonic()
        async with open_channel(self._target, self._tls) as channel:
            stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)
            for part in _parts(blocks(job.path), BLOCKS_PER_CHECK):
                if time.monotonic() - shown_s >= SHOW_EVERY_S:
                    shown_s = time.monotonic()
                    print(f"{job.name}: {forecast.counts.rows:,} rows looked at", file=sys.stderr)
                results = await self._check(stub, [_batch(job, block) for block in part])
                for block, result in zip(part, results, strict=True):
                    self._count(forecast, block, result)
                    for problem in result.problems if block.samples else ():
                        examples = forecast.examples.setdefault(problem.reason, [])
                        if len(examples) < EXAMPLES_MAX:
                            examples.append(await self._example(stub, job, block, problem.reason))
        return forecast

    @staticmethod
    def _count(forecast: Forecast, block: Block, result: telemetry_pb2.BatchResult) -> None:
        counts = forecast.counts
        counts.rows += block.rows_read
        counts.leave_out(block.left_out)
        for one in block.left_out:
            examples = forecast.examples.setdefault(one.reason, [])
            if len(examples) < EXAMPLES_MAX:
                examples.append(Example(one.row, "", one.detail))
        if not block.samples:
            return
        counts.stored += result.accepted
        counts.quarantined += result.quarantined
        for problem in result.problems:
            counts.add(problem.reason, problem.samples)
        first, last = int(block.times_us.min()), int(block.times_us.max())
        forecast.first_us = first if forecast.first_us is None else min(first, forecast.first_us)
        forecast.last_us = last if forecast.last_us is None else max(last, forecast.last_us)

    async def _example(
        self, stub: "telemetry_pb2_grpc.TelemetryServiceAsyncStub", job: Job, block: Block, reason: str
    ) -> Example:
        """The first row of a block that the hub has this against, found by halving."""

        async def told(rows: slice) -> str | None:
            (result,) = await self._check(stub, [_batch(job, block, rows)])
            return next((problem.detail for problem in result.problems if problem.reason == reason), None)

        good, bad = 0, len(block.rows)  # rows before `good` are, and one before `bad` is not
        while bad - good > 1:
            middle = (good + bad) // 2
            if await told(slice(good, middle)) is None:
                good = middle
            else:
                bad = middle
        detail = await told(slice(good, bad))
        return Example(int(block.rows[good]), when(int(block.times_us[good])), detail or "")

    async def _check(
        self, stub: "telemetry_pb2_grpc.TelemetryServiceAsyncStub", batches: list[telemetry_pb2.Batch]
    ) -> Sequence[telemetry_pb2.BatchResult]:
        delay_s = 0.2
        for attempt in range(CHECK_ATTEMPTS_MAX):
            try:
                request = telemetry_pb2.CheckBatchesRequest(batches=batches)
                answer: telemetry_pb2.CheckBatchesResponse = await stub.CheckBatches(request, metadata=self._metadata)
                return answer.results
            except grpc.aio.AioRpcError as error:
                reason = dict(error.trailing_metadata() or ()).get("reason", error.code().name)
                if error.code() != grpc.StatusCode.UNAVAILABLE or attempt == CHECK_ATTEMPTS_MAX - 1:
                    raise Refused(str(reason), error.details() or "") from error
            await asyncio.sleep(delay_s)
            delay_s = min(delay_s * 2, RECONNECT_DELAY_S_MAX)
        raise AssertionError("returned or raised")


class Progress:
    """How far every file has come, in a file of its own that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        """Raises NotARecording when the file is something else."""
        self._path = path
        self._files: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self._files = json.loads(path.read_text())["files"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise NotARecording(f"{path} is no progress file: name another with --progress") from error

    def of(self, job: Job, identity: str) -> tuple[int, Counts, bool]:
        """Blocks that are in the hub, what became of them, and whether that was all. Raises NotARecording."""
        found = self._files.get(job.name)
        if found is None:
            return 0, Counts(), False
        if found["fingerprint"] != identity:
            raise NotARecording(
                f"{job.path} has changed since a part of it was sent, or goes to another machine; "
                f"to send all of it anew, delete {self._path}"
            )
        return found["blocks"], Counts(**found["counts"]), found["is_done"]

    def move(self, job: Job, identity: str, block: int, counts: Counts, *, is_done: bool) -> None:
        """Raises OSError."""
        entry = {"fingerprint": identity, "blocks": block, "counts": asdict(counts), "is_done": is_done}
        self._files[job.name] = entry
        temporary = self._path.with_name(self._path.name + ".tmp")
        temporary.write_text(json.dumps({"files": self._files}, indent=1))
        temporary.replace(self._path)


def fingerprint(job: Job) -> str:
    """Tells files apart by machine and all of their content."""
    with job.path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(f"{job.machine}\0".encode()))
    return digest.hexdigest()[:32]


async def send(
    job: Job, progress: Progress, *, target: str, key: str, samples_per_s_max: float, tls: Tls | None = None
) -> Counts:
    """Send what a file still has to send and wait until the hub has it. Raises Refused, NotARecording, OSError."""
    identity = await asyncio.to_thread(fingerprint, job)
    first, counts, is_done = progress.of(job, identity)
    if is_done:
        print(f"{job.name}: all of it is in the hub already", file=sys.stderr)
        return counts
    if first:
        print(f"{job.name}: going on behind row {counts.rows:,}", file=sys.stderr)
    pace = _Pace(samples_per_s_max)
    show = _Show(job.name, counts)
    async with TelemetryClient(target, key, source=f"backfill-{identity}", credentials=tls) as client:
        tally = _Tally(client, counts)
        for block in blocks(job.path, first=first):
            counts.rows += block.rows_read
            counts.leave_out(block.left_out)
            if block.samples:
                await pace.wait(block.samples)
                await client.send(
                    job.machine, block.times_us, block.values, signals=block.names, sequence=block.number + 1
                )
            if tally.is_due():
                await tally.settle()
                progress.move(job, identity, block.number + 1, counts, is_done=False)
                show.now()
            first = block.number + 1
        await tally.settle()
    progress.move(job, identity, first, counts, is_done=True)
    return counts


class _Tally:
    """Waits for the hub now and then, and adds what it says to the counts."""

    def __init__(self, client: TelemetryClient, counts: Counts) -> None:
        self._client = client
        self._counts = counts
        self._blocks = 0
        self._settled_s = time.monotonic()
        self._acknowledged = self._quarantined = 0
        self._problems: dict[str, int] = {}

    def is_due(self) -> bool:
        self._blocks += 1
        return self._blocks >= BLOCKS_PER_STEP or time.monotonic() - self._settled_s >= STEP_S_MAX

    async def settle(self) -> None:
        await self._client.flush()
        totals, counts = self._client.totals, self._counts
        quarantined = totals.quarantined - self._quarantined
        counts.quarantined += quarantined
        counts.stored += totals.acknowledged - self._acknowledged - quarantined
        for reason, samples in self._client.problems.items():
            counts.add(reason, samples - self._problems.get(reason, 0))
        self._acknowledged, self._quarantined = totals.acknowledged, totals.quarantined
        self._problems, self._blocks, self._settled_s = dict(self._client.problems), 0, time.monotonic()


class _Pace:
    def __init__(self, samples_per_s_max: float) -> None:
        self._samples_per_s_max = samples_per_s_max
        self._until_s = 0.0

    async def wait(self, samples: int) -> None:
        now_s = time.monotonic()
        await asyncio.sleep(max(0.0, self._until_s - now_s))
        self._until_s = max(now_s, self._until_s) + samples / self._samples_per_s_max


class _Show:
    def __init__(self, name: str, counts: Counts) -> None:
        self._name = name
        self._counts = counts
        self._started_s = self._shown_s = time.monotonic()
        self._before = counts.stored + counts.quarantined

    def now(self) -> None:
        now_s = time.monotonic()
        if now_s - self._shown_s < SHOW_EVERY_S:
            return
        self._shown_s, counts = now_s, self._counts
        rate = (counts.stored + counts.quarantined - self._before) / (now_s - self._started_s)
        print(
            f"{self._name}: {counts.rows:,} rows, {counts.stored:,} samples in the hub, {counts.quarantined:,} in quarantine, "
            f"{rate:,.0f} samples/s, {now_s - self._started_s:.0f} s",
            file=sys.stderr,
        )


def when(time_us_: int) -> str:
    """The time for people; the number where it is beyond the calendar."""
    try:
        return datetime.fromtimestamp(time_us_ / 1e6, UTC).isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):
        return f"{time_us_} us after 1970"


def _batch(job: Job, block: Block, rows: slice = slice(None)) -> telemetry_pb2.Batch:
    return batch_of(job.machine, block.times_us[rows], np.asarray(block.values)[rows], block.names)[0]


def _parts(found: Iterator[Block], size: int) -> Iterator[list[Block]]:
    part: list[Block] = []
    for block in found:
        part.append(block)
        if len(part) == size:
            yield part
            part = []
    if part:
        yield part
