"""Samples in, through Faust."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import faust
import faust.auth
from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from faust.types import TP
from prometheus_client import Counter, Gauge, Histogram

from services.anomaly.domain import Change, Severity
from services.anomaly.raiser import AlarmRaiser
from services.anomaly.scorer import Found, Frames, Scorer, Taken, decode
from services.anomaly.settings import CHECKPOINT_INTERVAL_S
from services.anomaly.store import Checkpoint, StateStore
from services.anomaly.tuning_store import Horizon, HorizonStore
from services.common import topics, tracing
from services.common.clock import Clock
from services.common.database import AWAY
from services.common.errors import TryAgain
from services.common.kafka import (
    REQUEST_BYTES_MAX,
    RETRY_DELAY_S_MAX,
    Attempts,
    Cluster,
    DeadLetters,
    Fenced,
    Identity,
    Poison,
    Position,
    consumed_total,
    show_consumer,
    topic_ids,
)
from services.common.logs import get_logger

log = get_logger(__name__)

GROUP = "smdih.anomaly.worker"
# Records scored together, at most; what is there is taken at once, nothing waits for more.
RECORDS_MAX = 256
RECORDS_BYTES_MAX = 2 * 1024 * 1024
# Records that Faust asks the broker for at a time, and holds ready for us: few, since one may have megabytes. (More is not
# faster: 4,400 records/s with 1,024 as with 128.)
FETCH_RECORDS_MAX = 64
BUFFER_RECORDS_MAX = 128
# Of one partition in one go: bounds the pause, and what the worker writes, to this much an interval. Less of it means more to score
# again after a crash, which goes many times faster than samples come.
CHECKPOINT_BYTES_MAX = 4 * 1024 * 1024
# Records taken but not yet covered by a checkpoint (without their bytes); past it the worker waits for one.
UNCOVERED_RECORDS_MAX = 100_000
# Alarms that begin or end in one transaction; one record may hold years of history with thousands.
ALARMS_AT_ONCE_MAX = 500
# What a rebalance or a stop may wait for a last checkpoint; without it the next owner replays from the one before.
LAST_CHECKPOINT_TIMEOUT_S = 6.0
SESSION_TIMEOUT_S = 10.0
CRASH_POLL_S = 1.0
OFFSET_COMMIT_INTERVAL_S = 1.0
# Kafka's offset may be ahead of the position in the database, as after a restore. A partition that has more and gives nothing for
# so long is asked again from the position on.
QUIET_S = 5.0

# Values that went through the detector.
samples_scored_total = Counter("smdih_anomaly_samples_scored_total", "Values scored by the detector")
# Frames that were not newer than the newest of their machine: the historian has them, the detector does not go back.
frames_skipped_total = Counter("smdih_anomaly_frames_skipped_total", "Frames that came too late for the detector")
# Alarms by severity at the start; repeats after a restart are not counted.
alarms_raised_total = Counter("smdih_anomaly_alarms_raised_total", "Alarms raised", ["severity"])
for _severity in Severity:
    alarms_raised_total.labels(_severity.name.lower())
# From the door to the stored alarm.
alarm_seconds = Histogram(
    "smdih_anomaly_alarm_seconds",
    "Time from the receipt of a sample to its stored alarm",
    buckets=(0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300),
)
# One slice of one partition.
checkpoint_seconds = Histogram("smdih_anomaly_checkpoint_seconds", "Time to store a checkpoint")
# Bytes of detector state stored.
checkpoint_bytes_total = Counter("smdih_anomaly_checkpoint_bytes_total", "Bytes of detector state stored")
# Machines (channel groups) whose state this process holds.
machines_held = Gauge("smdih_anomaly_machines", "Machines in the detector's memory")
# Bytes of their state.
state_bytes = Gauge("smdih_anomaly_state_bytes", "Bytes of detector state in memory")
# From the assignment of partitions to their states in memory.
load_seconds = Histogram("smdih_anomaly_load_seconds", "Time to load the states of newly assigned partitions")
# Records that retention deleted before they were scored.


class _App(faust.App):
    logger = logging.getLogger("faust.app")  # else its routine messages come in our name

    def _create_directories(self) -> None:
        """There are no tables, so nothing is written: the file system may be read-only."""


def _credentials(identity: Identity) -> faust.auth.Credentials | None:
    """As whom Faust's own clients come to the brokers."""
    tls = identity.tls()
    if identity.is_sasl:
        return faust.auth.SASLCredentials(
            username=identity.username, password=identity.password, mechanism=identity.mechanism, ssl_context=tls
        )
    return None if tls is None else faust.auth.SSLCredentials(tls)


class _Partition:
    """One partition that is ours."""

    def __init__(self, scorer: Scorer, position: int, horizon: Horizon, unreadable_in_a_row: int) -> None:
        self.scorer = scorer
        self.saved_position = position
        self.taken_at = time.monotonic()
        # Records below it may be scored with the tunings up to the one known last.
        self.horizon = horizon.next_offset
        self.known_tuning = horizon.known
        # Taken, but not below the saved position: acknowledged once a checkpoint covers them.
        self.uncovered: deque[Any] = deque()
        # Up to what was taken last; stored with the position, so that a worker started again and again does not empty the topic.
        self.unreadable_in_a_row = unreadable_in_a_row
        # The hole that the consumer was last sent back for.
        self.sought: int | None = None
        # Where records were gone, and how many; until a checkpoint behind it has told.
        self.holes: dict[int, int] = {}
        # A checkpoint failed half-way: nothing more is stored, the next owner goes on from the one before.
        self.given_up = False


class Worker:
    """Scores the samples and raises alarms.

    What is stored, and when: alarms at once, before anything counts as taken; detector states and the partition's position
    together, every few seconds; Kafka's offsets only for what a checkpoint covers. After a crash the worker goes on from the
    last checkpoint: it sees the same samples again, finds the same alarms again, and they are recognised by their ids.

    Faust acknowledges what was in flight, skips what raised, and commits past work in progress if it is let (0.15.3). So: one
    agent, acknowledgement by hand, and an error inside never reaches Faust: it ends the process.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        states: StateStore,
        horizons: HorizonStore,
        raiser: AlarmRaiser,
        dead_letters: DeadLetters,
        clock: Clock,
        instance: str = "",
        checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S,
    ) -> None:
        self._cluster = cluster
        self._states = states
        self._horizons = horizons
        self._raiser = raiser
        self._dead_letters = dead_letters
        self._clock = clock
        self._checkpoint_interval_s = checkpoint_interval_s
        self._partitions: dict[int, _Partition] = {}
        self._pending: list[Any] = []
        self._loaded = asyncio.Event()
        # Held while records are taken and their alarms stored: a checkpoint must not come between.
        self._working = asyncio.Lock()
        self._saving = asyncio.Lock()
        self._covered = asyncio.Condition()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = asyncio.Event()
        self._checkpointing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._attempts = Attempts(dead_letters.answers)
        self._last_progress = time.monotonic()
        self._topic_name = cluster.name(topics.SAMPLES)
        self._app = _App(
            cluster.name(GROUP),
            broker=[f"kafka://{address.strip()}" for address in cluster.bootstrap.split(",")],
            broker_credentials=_credentials(cluster.identity),
            store="memory://",
            autodiscover=False,
            web_enabled=False,
            topic_allow_declare=False,
            topic_disable_leader=True,
            stream_wait_empty=False,  # we wait for our own work, in the handlers below
            stream_buffer_maxsize=BUFFER_RECORDS_MAX,
            consumer_auto_offset_reset="earliest",
            consumer_max_fetch_size=REQUEST_BYTES_MAX,
            consumer_group_instance_id=instance or None,
            broker_max_poll_records=FETCH_RECORDS_MAX,
            broker_session_timeout=SESSION_TIMEOUT_S,
            broker_heartbeat_interval=SESSION_TIMEOUT_S / 4,
            broker_commit_interval=OFFSET_COMMIT_INTERVAL_S,
        )
        self._topic = self._app.topic(self._topic_name, key_serializer="raw", value_serializer="raw")
        self._stream: Any = None
        self._app.agent(self._topic, concurrency=1, name="scorer")(self._consume)
        self._app.on_partitions_revoked.connect(self._on_revoked)
        self._app.on_partitions_assigned.connect(self._on_assigned)

    @asynccontextmanager
    async def consuming(self) -> AsyncIterator[None]:
        """Consume until the context ends; then everything taken is stored."""
        self._checkpointing = asyncio.create_task(self._checkpoints(), name="checkpoints")
        await self._app.start()
        try:
            yield
        finally:
            self._loaded.clear()
            self._stopping.set()
            await self._last_checkpoint()
            await self._app.stop()
            self._checkpointing.cancel()
            await asyncio.gather(self._checkpointing, return_exceptions=True)

    async def run(self) -> None:
        """Wait, until cancelled, for what the worker cannot go on from, and raise it."""
        show_consumer([self], [topics.SAMPLES], GROUP)
        while True:
            parts = [self._failed, self._checkpointing]
            done, _ = await asyncio.wait(parts, timeout=CRASH_POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for part in done:
                part.result()
            if self._app.crashed:
                raise RuntimeError("the Kafka consumer broke") from self._app.crash_reason

    async def is_assigned(self) -> bool:
        """Readiness: partitions have been given out and their state is loaded."""
        return self._loaded.is_set()

    async def is_turning(self) -> bool:
        """Liveness: the worker tries, or has nothing to do."""
        if self._loaded.is_set() and self.lag == 0:
            self._attempts.ended()
        return not self._failed.done() and await self._attempts.go_on()

    @property
    def stalled_s(self) -> float:
        """For how long there has been work and no progress; 0 when all is well."""
        if self._loaded.is_set() and self.lag == 0:
            return 0.0
        return time.monotonic() - self._last_progress

    def lag_of(self, name: str) -> int:
        return self.lag

    def unreadable_of(self, name: str) -> int:
        return max((partition.unreadable_in_a_row for partition in self._partitions.values()), default=0)

    def is_of(self, name: str, group: str) -> bool:
        return True

    @property
    def lag(self) -> int:
        """Records that stand in the topic and have not been taken; a partition whose end is not known counts 1."""
        ends = (
            (self._app.consumer.highwater(TP(self._topic_name, number)), partition.scorer.next_offset)
            for number, partition in self._partitions.items()
        )
        return sum(1 if end is None else max(0, end - taken) for end, taken in ends)

    # -- taking records --

    async def _consume(self, stream: Any) -> None:
        self._stream = stream.noack()
        size = 0
        async for event in self._stream.events():
            self._pending.append(event)
            size += len(event.value or b"")
            more = not self._stream.channel.queue.empty()
            if more and len(self._pending) < RECORDS_MAX and size < RECORDS_BYTES_MAX:
                continue
            events, self._pending, size = self._pending, [], 0
            try:
                await self._take(events)
            except Exception as error:
                self._fail(error)
                # Nothing behind the record that failed may be taken: the process ends now and starts again before it.
                await asyncio.get_running_loop().create_future()

    def _fail(self, error: BaseException) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _take(self, events: Sequence[Any]) -> None:
        await self._loaded.wait()
        ends: dict[int, int] = {}
        for event in events:
            ends[event.message.partition] = max(ends.get(event.message.partition, 0), event.message.offset + 1)
        async with self._working:
            ours = [(self._partitions[number], end) for number, end in ends.items() if number in self._partitions]
            await self._move_horizons([(partition, end) for partition, end in ours if end > partition.horizon])
            for number in ends:
                partition = self._partitions.get(number)
                if partition is not None:
                    await self._take_partition(
                        partition, [event for event in events if event.message.partition == number]
                    )
        async with self._covered:
            await self._covered.wait_for(self._has_room)

    def _has_room(self) -> bool:
        return all(len(partition.uncovered) < UNCOVERED_RECORDS_MAX for partition in self._partitions.values())

    async def _take_partition(self, partition: _Partition, events: Sequence[Any]) -> None:
        events = await self._in_order(partition, events)
        if not events:
            return
        records: list[tuple[int, Sequence[Frames]]] = []
        bad: list[tuple[Any, str]] = []
        for event in events:
            try:
                records.append((event.message.offset, decode(event.value)))
            except Poison as error:
                bad.append((event.message, str(error)))
                records.append((event.message.offset, ()))
        messages = [event.message for event in events]
        partition.unreadable_in_a_row = await self._until_answered(
            lambda: self._dead_letters.bury(topics.SAMPLES, messages, bad, in_a_row=partition.unreadable_in_a_row)
        )
        if records[-1][0] >= partition.horizon:  # a rebalance came between
            await self._move_horizons([(partition, records[-1][0] + 1)])
        taken = partition.scorer.take(records)
        await self._raise_alarms(taken)
        for event in events:
            event.value = event.message.value = None  # only the offset is needed from here on
            partition.uncovered.append(event)
        self._last_progress = partition.taken_at = time.monotonic()
        self._attempts.ended()
        consumed_total.labels(topics.SAMPLES, GROUP).inc(len(events))
        samples_scored_total.inc(taken.samples)
        frames_skipped_total.inc(taken.frames_skipped)

    async def _in_order(self, partition: _Partition, events: Sequence[Any]) -> Sequence[Any]:
        """Those that come next: without what is stored already, what a rebalance left over, and what follows a hole."""
        wanted: list[Any] = []
        expected = partition.scorer.next_offset
        for event in events:
            offset = event.message.offset
            if event.message.generation_id != self._app.consumer_generation_id:
                continue
            if offset < expected:
                if offset < partition.saved_position:
                    await self._stream.ack(event)
                continue
            if offset > expected:
                expected = await self._after_hole(partition, event.message, expected)
                if offset != expected:
                    break
            wanted.append(event)
            expected = offset + 1
        return wanted

    async def _after_hole(self, partition: _Partition, message: Any, expected: int) -> int:
        """Where to go on when records are missing: retention has deleted them, or the consumer is sent back for them."""
        tp = TP(message.topic, message.partition)
        earliest = (await self._app.consumer.earliest_offsets(tp))[tp]
        if earliest > expected:
            log.error(
                "records were deleted before they were scored", partition=tp.partition, records=earliest - expected
            )
            partition.holes[expected] = int(earliest) - expected
            return int(earliest)
        if partition.sought != expected:
            partition.sought = expected
            log.warning("going back for missing records", partition=tp.partition, missing=expected, got=message.offset)
            await self._app.consumer.seek(tp, expected)
        return expected

    async def _move_horizons(self, ends: Sequence[tuple[_Partition, int]]) -> None:
        """Before anything up to these ends is scored: learn of the tunings that hold there.

        Not further than what is in hand: where little comes, a tuning would wait for what is ahead. One question for all records
        that are taken together is not much.
        """
        if not ends:
            return
        wanted = {partition.scorer.partition: end for partition, end in ends}
        known = {partition.scorer.partition: partition.known_tuning for partition, _ in ends}
        moved = await self._until_answered(lambda: self._horizons.move(wanted, known=known))
        for partition, _ in ends:
            found = moved[partition.scorer.partition]
            partition.horizon, partition.known_tuning = found.next_offset, found.known
            if found.tunings:
                partition.scorer.tune(found.tunings)

    async def _raise_alarms(self, taken: Taken) -> None:
        for first in range(0, len(taken.found), ALARMS_AT_ONCE_MAX):
            await self._raise_some(taken.found[first : first + ALARMS_AT_ONCE_MAX])
            self._last_progress = time.monotonic()
            self._attempts.ended()

    async def _raise_some(self, found: Sequence[Found]) -> None:
        stored = await self._until_answered(lambda: self._raiser.store(found))
        tracing.note("anomaly alarm", (event.alarm.correlation_id for event in stored), seconds=0, kind="producer")
        received_us = {one.frames.correlation_id: one.frames.received_us for one in found}
        for event in stored:
            if event.change is Change.RAISED:
                alarms_raised_total.labels(event.alarm.severity.name.lower()).inc()
                received = received_us.get(event.alarm.correlation_id)
                if received is None:
                    continue  # found by the clock, not in a sample
                seconds = (self._clock.now_us() - received) / 1e6
                alarm_seconds.observe(max(0.0, seconds))

    async def _until_answered(self, work: Any) -> Any:
        """Repeat until the database and the broker answer; the partitions wait meanwhile."""
        delay_s = 0.1
        while True:
            try:
                return await work()
            except (*AWAY, asyncpg.DeadlockDetectedError, asyncpg.SerializationError, TryAgain) as error:
                log.warning("the worker waits", error=repr(error), delay_s=delay_s)
                self._attempts.ended()
                await asyncio.sleep(delay_s)
                delay_s = min(delay_s * 2, RETRY_DELAY_S_MAX)

    # -- checkpoints --

    async def _checkpoints(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._checkpoint_interval_s):
                    await self._stopping.wait()
            for number in list(self._partitions):
                await self._look_at_clock(number)
                await self._checkpoint(number, bytes_max=CHECKPOINT_BYTES_MAX)
            machines_held.set(sum(len(partition.scorer) for partition in self._partitions.values()))
            state_bytes.set(sum(partition.scorer.nbytes for partition in self._partitions.values()))

    async def _look_at_clock(self, number: int) -> None:
        """What has to happen though no record comes: tunings of a quiet partition, and silence that rules look for."""
        async with self._working:
            partition = self._partitions.get(number)
            if partition is None or partition.given_up or not self._loaded.is_set():
                return
            await self._move_horizons([(partition, partition.scorer.next_offset)])
            await self._raise_alarms(partition.scorer.settle())
            end = self._app.consumer.highwater(TP(self._topic_name, number))
            if end is not None and end <= partition.scorer.next_offset:
                await self._raise_alarms(partition.scorer.silences(self._clock.now_us()))
            elif end is not None:
                await self._ask_again(partition)

    async def _ask_again(self, partition: _Partition) -> None:
        expected = partition.scorer.next_offset
        if partition.sought == expected or time.monotonic() - partition.taken_at < QUIET_S:
            return
        partition.sought = expected
        log.warning("asking again from the stored position", partition=partition.scorer.partition, position=expected)
        await self._app.consumer.seek(TP(self._topic_name, partition.scorer.partition), expected)

    async def _checkpoint(self, number: int, *, bytes_max: int | None) -> None:
        async with self._saving:
            async with self._working:
                partition = self._partitions.get(number)
                if partition is None or partition.given_up:
                    return
                checkpoint = partition.scorer.checkpoint(saved_position=partition.saved_position, bytes_max=bytes_max)
                # Where the position stays behind what was taken, a readable record comes next, and the run begins anew.
                run = partition.unreadable_in_a_row
            if checkpoint is not None:
                # Scoring goes on meanwhile: the checkpoint is a copy.
                await self._save(partition, checkpoint, run)

    async def _save(self, partition: _Partition, checkpoint: Checkpoint, run: int) -> None:
        started = time.perf_counter()
        expected = partition.saved_position
        told = [start for start in partition.holes if start < checkpoint.position]
        lost = sum(partition.holes[start] for start in told)
        try:
            await self._until_answered(
                lambda: self._states.save(checkpoint, expected=expected, unreadable_in_a_row=run, records_lost=lost)
            )
        except BaseException as error:
            # The scorer counts these states as saved: a later checkpoint without them would be wrong.
            partition.given_up = True
            if isinstance(error, Fenced) and self._partitions.get(checkpoint.partition) is not partition:
                return  # it had gone to another owner already
            raise
        for start in told:
            del partition.holes[start]
        checkpoint_seconds.observe(time.perf_counter() - started)
        checkpoint_bytes_total.inc(sum(len(saved.state) for saved in checkpoint.states))
        await self._acknowledge(partition, checkpoint)

    async def _acknowledge(self, partition: _Partition, checkpoint: Checkpoint) -> None:
        partition.saved_position = checkpoint.position
        if self._partitions.get(checkpoint.partition) is not partition:
            return
        while partition.uncovered and partition.uncovered[0].message.offset < checkpoint.position:
            await self._stream.ack(partition.uncovered.popleft())
        async with self._covered:
            self._covered.notify_all()

    async def _last_checkpoint(self) -> None:
        """Before the partitions go."""
        try:
            async with asyncio.timeout(LAST_CHECKPOINT_TIMEOUT_S):
                for number in list(self._partitions):
                    await self._checkpoint(number, bytes_max=None)
        except Exception as error:
            # The next owner replays from the checkpoint before; alarms are stored already.
            log.warning("no last checkpoint", error=repr(error))

    # -- rebalances --

    async def _on_revoked(self, *_: Any, **_kwargs: Any) -> None:
        self._loaded.clear()
        self._pending.clear()
        await self._last_checkpoint()
        self._partitions.clear()
        async with self._covered:
            self._covered.notify_all()

    async def _on_assigned(self, *arguments: Any, **_kwargs: Any) -> None:
        assigned: Collection[TP] = arguments[-1]
        started = time.perf_counter()
        numbers = [tp.partition for tp in assigned if tp.topic == self._topic_name]
        try:
            positions = await self._until_answered(lambda: self._positions(numbers)) if numbers else {}
            loaded = {
                number: await self._until_answered(lambda number=number: self._load(number, positions[number]))
                for number in numbers
            }
        except Exception as error:
            self._fail(error)
            return
        load_seconds.observe(time.perf_counter() - started)
        self._partitions = loaded
        self._last_progress = time.monotonic()
        self._attempts.ended()
        self._loaded.set()
        log.info("partitions assigned", partitions=sorted(loaded))

    async def _positions(self, numbers: Collection[int]) -> Mapping[int, Position]:
        """Raises MadeAnew; TryAgain when no broker answers."""
        try:
            ids = await topic_ids(self._cluster, [self._topic_name])
            return await self._states.positions(
                numbers, topic_id=ids[self._topic_name], first_offsets=self._first_offsets
            )
        except KafkaError as error:
            raise TryAgain(f"No broker tells of the topic: {error!r}") from error

    async def _first_offsets(self, partitions: Collection[TopicPartition]) -> Mapping[TopicPartition, int]:
        firsts: Mapping[TopicPartition, int] = await self._app.consumer.earliest_offsets(*partitions)
        return firsts

    async def _load(self, number: int, position: Position) -> _Partition:
        scorer = Scorer(number, position=position.next_offset)
        async for saved in self._states.states(number):
            scorer.load(saved)
        horizon = await self._horizons.load(number, position=position.next_offset)
        scorer.tune(horizon.tunings)
        return _Partition(scorer, position.next_offset, horizon, position.unreadable_in_a_row)
