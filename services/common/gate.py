"""Who comes in: keys and tokens into callers, within the limits, alike for HTTP and gRPC."""

from collections import Counter as Counting
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import Counter

from services.common.directory import STALE, Directory
from services.common.errors import Forbidden, HubError, SlowDown, TryAgain, Unauthenticated
from services.common.identity import Caller, Role
from services.common.limits import Allowances, Limits

if TYPE_CHECKING:  # loads an HTTP client and cryptography, which a hub without tokens does without
    from services.common.tokens import Tokens

# Why a token cannot be checked: whoever makes up key ids hears it as well.
KEYS_AWAY = "TOKEN_KEYS_AWAY"
# Refusals that say nothing of a key, and are heard with one that is made up.
_UNKNOWING = (KEYS_AWAY, STALE)
# Of bodies that are being read or answered: of one firm, or caller of no firm, as much as may be on its way to the message log, and
# of all callers what a process can do without.
BODY_BYTES_PER_CALLER_MAX = 32 * 1024 * 1024
BODY_BYTES_MAX = 128 * 1024 * 1024

# Requests over a limit, by its name.
limited_total = Counter("smdih_limited_requests_total", "Requests over a limit of the doors", ["limit"])


class Gate:
    """One for a process, so that a caller's limits hold over all its doors."""

    def __init__(self, directory: Directory, *, tokens: "Tokens | None" = None, limits: Limits | None = None) -> None:
        self._directory = directory
        self._tokens = tokens
        self._limits = limits or Limits()
        self._requests = Allowances()
        self._failures = Allowances()
        self._streams: Counting[int] = Counting()
        # By firm, whose keys are many; callers of no firm by themselves.
        self._body_bytes: Counting[tuple[int, int]] = Counting()
        self._body_bytes_of_all = 0

    async def admit(self, bearer: str, address: str) -> Caller:
        """The caller behind a key or token. Raises Unauthenticated, Forbidden, SlowDown, TryAgain."""
        try:
            return await self.caller_of(bearer)
        except HubError as error:
            self.check_refused(error, address)
            raise

    async def caller_of(self, bearer: str) -> Caller:
        """The same while it is not known where the request comes from: after a refusal `check_refused` is to be asked."""
        if not await self._directory.is_caught_up():
            detail = "The hub has just started and does not know its keys yet."
            raise TryAgain(detail, reason="STARTING", retry_after_s=1)
        if self._tokens is not None and _is_token(bearer):
            caller = await self._tokens.caller_of(bearer)
        else:
            caller = self._directory.caller_of(bearer)
        limits = self._limits
        per_s = limits.operator_requests_per_s if caller.role is Role.OPERATOR else limits.requests_per_s
        wait_s = self._requests.take(caller.credential_id, per_s=per_s, most=per_s * limits.burst_s)
        if wait_s:
            raise _slow_down("requests", f"This key asks more often than {per_s:g} times a second.", wait_s)
        return caller

    def check_refused(self, error: HubError, address: str) -> None:
        """Count a request that `caller_of` refused for want of a good key or token. Raises SlowDown past its limit."""
        if not isinstance(error, Unauthenticated | Forbidden) and error.reason not in _UNKNOWING:
            return
        per_minute = self._limits.failures_per_minute
        wait_s = self._failures.take(address, per_s=per_minute / 60, most=per_minute)
        if wait_s:
            raise _slow_down("failures", "Too many requests without a good key come from here.", wait_s) from None

    def check_still_valid(self, caller: Caller) -> None:
        """For calls that last: raise Unauthenticated once the key is revoked, or key or token are over."""
        if caller.is_person:
            assert self._tokens is not None
            self._tokens.check_still_valid(caller)
        else:
            self._directory.check_still_valid(caller.credential_id)

    def shown(self, caller: Caller) -> str:
        """What may be shown of how the caller came in: the key's first characters, or the token's subject."""
        return caller.subject if caller.is_person else self._directory.prefix_of(caller.credential_id)

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[None]:
        """While something that lasts is being answered. Raises SlowDown past the limit."""
        if self._streams[caller.credential_id] >= self._limits.streams_max:
            raise _slow_down("streams", f"This key has {self._limits.streams_max} open streams; close some first.", 5)
        self._streams[caller.credential_id] += 1
        try:
            yield
        finally:
            self._streams[caller.credential_id] -= 1
            if not self._streams[caller.credential_id]:
                del self._streams[caller.credential_id]

    @contextmanager
    def body(self, caller: Caller) -> Iterator[Callable[[int], None]]:
        """While a body is held: to be told of the bytes as they come. Raises SlowDown, TryAgain past the limits."""
        held = 0
        whose = (caller.firm_id, 0) if caller.firm_id else (0, caller.credential_id)

        def more(size: int) -> None:
            nonlocal held
            if self._body_bytes[whose] + size > BODY_BYTES_PER_CALLER_MAX:
                detail = f"Bodies of this firm or key that are here now have {BODY_BYTES_PER_CALLER_MAX} bytes; send fewer at once."
                raise _slow_down("bodies", detail, 5)
            if self._body_bytes_of_all + size > BODY_BYTES_MAX:
                limited_total.labels("all_bodies").inc()
                raise TryAgain("Too many bodies are here at once; send again.", reason="FULL", retry_after_s=5)
            held += size
            self._body_bytes[whose] += size
            self._body_bytes_of_all += size

        try:
            yield more
        finally:
            self._body_bytes_of_all -= held
            self._body_bytes[whose] -= held
            if not self._body_bytes[whose]:
                del self._body_bytes[whose]


def _slow_down(limit: str, detail: str, wait_s: int) -> SlowDown:
    limited_total.labels(limit).inc()
    return SlowDown(f"{detail} Send again in {wait_s} s.", reason=f"LIMIT_{limit.upper()}", retry_after_s=wait_s)


def _is_token(bearer: str) -> bool:
    """Keys of the hub have no dots."""
    return bearer.count(".") == 2
