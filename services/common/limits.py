"""How much one caller may ask for, in this process: named limits, and what keeps count of them."""

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one process; with more processes behind one address a caller has more. All are settings (SMDIH_LIMIT_...)."""

    # Requests and calls of one credential; a stream counts once. The burst may be used up at once.
    requests_per_s: float = 100.0
    operator_requests_per_s: float = 1_000.0
    burst_s: float = 20.0
    # Streams and requests of one credential at a time.
    streams_max: int = 200
    # Requests without a good key, of one address; who has a good key is not touched, though he shares the address.
    failures_per_minute: float = 60.0


class Allowances:
    """Token buckets by whom they belong to, at most `holders_max`: who has not asked for longest is forgotten, so has all again."""

    def __init__(self, *, holders_max: int = 20_000, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._holders_max = holders_max
        self._monotonic_s = monotonic_s
        self._left: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()

    def take(self, holder: Hashable, *, per_s: float, most: float) -> int:
        """0, or after how many seconds there is one again. What is refused costs nothing, so who keeps asking is not shut out."""
        now_s = self._monotonic_s()
        left, since_s = self._left.pop(holder, (most, now_s))
        left = min(most, left + (now_s - since_s) * per_s)
        is_taken = left >= 1
        self._left[holder] = (left - 1 if is_taken else left, now_s)
        if len(self._left) > self._holders_max:
            self._left.popitem(last=False)
        return 0 if is_taken else max(1, math.ceil((1 - left) / per_s))
