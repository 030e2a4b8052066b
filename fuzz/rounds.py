"""A target is tried in rounds, each with a seed of its own, until its time is over or something breaks."""

import faulthandler
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis.strategies import SearchStrategy

# Of one round; a round that broke is played again as a whole.
EXAMPLES_PER_ROUND = 300
# Of processor time for one input: the largest take a few milliseconds, and what takes more could be sent a thousand times.
CALL_CPU_S_MAX = 1.0
# A round that takes longer than this hangs: all threads' stacks are printed and the run ends.
ROUND_S_MAX = 120.0


class TooSlow(Exception):
    """An input took more processor time than CALL_CPU_S_MAX."""


@dataclass(frozen=True)
class Target:
    """Inputs, and what is done with each: `attempt` raises for whatever should not be."""

    name: str
    inputs: SearchStrategy[Any]
    attempt: Callable[[Any], None]
    examples: int = EXAMPLES_PER_ROUND


@dataclass
class Outcome:
    """`seed` is the one to replay: of the round that broke, else of the first."""

    target: str
    seed: int
    tried: int = 0
    broken: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0


def fuzz(target: Target, *, seconds: float, seed: int) -> Outcome:
    """Round after round; the seed of the first is given, the next has the next number. A break ends it."""
    outcome = Outcome(target.name, seed)
    began = time.monotonic()
    number = seed
    while not outcome.broken and (number == seed or time.monotonic() - began < seconds):
        faulthandler.dump_traceback_later(ROUND_S_MAX, exit=True)
        try:
            _play(target, number, outcome)
        except Exception as error:  # whatever it is, it is the result
            outcome.seed = number
            outcome.broken.append("\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]))
        finally:
            faulthandler.cancel_dump_traceback_later()
        number += 1
    outcome.elapsed_s = round(time.monotonic() - began, 1)
    return outcome


def _play(target: Target, seed: int, outcome: Outcome) -> None:
    @hypothesis.seed(seed)
    @settings(
        max_examples=target.examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    @hypothesis.given(target.inputs)
    def attempt(value: Any) -> None:
        outcome.tried += 1
        began = time.process_time()
        target.attempt(value)
        if (took := time.process_time() - began) > CALL_CPU_S_MAX:
            raise TooSlow(f"{took:.1f} s")

    attempt()
