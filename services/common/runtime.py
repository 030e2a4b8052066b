"""The life of a process: start in order, run until told to stop or until a part fails, stop in reverse."""

import asyncio
import resource
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import asyncpg

from services.common import logs, tracing
from services.common.database import AWAY
from services.common.errors import TryAgain
from services.common.metrics import name_process, watch_loop
from services.common.settings import Settings

log = logs.get_logger(__name__)

T = TypeVar("T")
STOP_TIMEOUT_S = 20


class Runtime:
    """Owns the signals and the background tasks of one process.

    A background task that ends with an error ends the process with exit code 1: the orchestrator starts it again, and what it
    did is safe to repeat. Nothing limps on with a dead part.
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._stopping = asyncio.Event()
        self._failure: BaseException | None = None
        self._ready: dict[str, Callable[[], Awaitable[bool]]] = {}
        self._alive: dict[str, Callable[[], Awaitable[bool]]] = {}
        self.started = False

    async def enter(self, part: AbstractAsyncContextManager[T]) -> T:
        """Start a part; it is stopped in reverse order of starting."""
        return await self._stack.enter_async_context(part)

    def on_stop(self, stop: Callable[[], Awaitable[Any]]) -> None:
        self._stack.push_async_callback(stop)

    def background(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a loop until the process stops; its failure stops the process."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._ended)
        self._stack.push_async_callback(_cancel, task)
        return task

    def ready_when(self, name: str, check: Callable[[], Awaitable[bool]]) -> None:
        """Readiness needs this dependency to answer."""
        self._ready[name] = check

    def alive_when(self, name: str, check: Callable[[], Awaitable[bool]]) -> None:
        """Liveness needs this loop to turn."""
        self._alive[name] = check

    @property
    def is_stopping(self) -> bool:
        """It was told to stop; it answers until everybody had the time to go elsewhere."""
        return self._stopping.is_set()

    async def not_ready(self, *, excluded: Collection[str] = ()) -> list[str]:
        """Names of the dependencies that do not answer, but for those `excluded`; empty when the process is ready."""
        if not self.started or self._stopping.is_set():
            return ["process"]
        return [name for name, check in self._ready.items() if name not in excluded and not await check()]

    async def not_alive(self) -> list[str]:
        """Names of the loops that are stuck; empty when all turn."""
        return [name for name, check in self._alive.items() if not await check()]

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self._stopping.is_set():
            return
        # Cancelled by nobody: a library let out the cancellation of something of its own.
        ended = None if task.cancelled() else task.exception()
        self._failure = ended or RuntimeError(f"{task.get_name()} ended by itself")
        log.error("background task failed", task=task.get_name(), exc_info=self._failure)
        self._stopping.set()


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _running(runtime: Runtime) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, runtime._stopping.set)
    try:
        yield
    finally:
        runtime._stopping.set()
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await runtime._stack.aclose()


async def _started(start: Callable[[Runtime], Awaitable[None]], runtime: Runtime) -> bool:
    """False where it was told to stop, or a part failed, before it had started: it may be waiting for what does not come."""
    starting = asyncio.ensure_future(start(runtime))
    stopping = asyncio.create_task(runtime._stopping.wait())
    try:
        await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            await starting
            return True
        log.info("stopped before it had started")
        return False
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def _main(start: Callable[[Runtime], Awaitable[None]], drain_s: float) -> int:
    runtime = Runtime()
    async with _running(runtime):
        runtime.background("loop", watch_loop())
        if await _started(start, runtime):
            runtime.started = True
            log.info("ready")
            await runtime._stopping.wait()
            log.info("stopping")
            if runtime._failure is None:
                await asyncio.sleep(drain_s)
    tracing.stop()
    return 1 if runtime._failure else 0


def _take_all_files() -> None:
    """Each connection is an open file, and many systems give a process 1,024 of those that it may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run(name: str, settings: Settings, start: Callable[[Runtime], Awaitable[None]]) -> None:
    """Run the process of this name: `start` brings its parts up through the runtime and returns; SIGTERM or SIGINT ends it.

    Never returns. For `drain_s` of the settings after the signal it is not ready, but still answers, and closes each kept
    connection behind an answer.
    """
    logs.configure(name, settings.log_level)
    _take_all_files()
    name_process(name)
    tracing.start(settings.trace_endpoint, process=name, ratio=settings.trace_ratio)
    try:
        code = asyncio.run(_main(start, settings.drain_s))
    except Exception:
        log.exception("process failed")
        code = 1
    sys.exit(code)


def run_once(name: str, settings: Settings, work: Coroutine[Any, Any, T]) -> T:
    """Run a command line that asks the database and ends. One sentence and exit code 1 where the database does not do its part."""
    logs.configure(name, settings.log_level)
    try:
        return asyncio.run(work)
    except (*AWAY, TryAgain, asyncpg.PostgresError) as error:
        said = f"{name}: the database does not do its part: {error!r}. Look at SMDIH_DATABASE_DSN."
        print(said, file=sys.stderr)  # noqa: T201  a command line
        sys.exit(1)
