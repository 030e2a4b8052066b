"""Rules that firms write themselves: kept, changed, stopped, and tried on what was stored."""

import asyncio
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, nan

import numpy as np

from services.anomaly.domain import MICROSECONDS, Severity
from services.anomaly.samples import HOUR_US, MINUTE_US, Floats, Ints, Samples
from services.anomaly.service import actor_of, changing, check_role, check_text
from services.anomaly.tuning import HISTORY_MAX, LIST_MAX, check_id, known_machine, lock_at_pace, position_of
from services.anomaly.tuning_store import NewTuning, StoredRule, TuningEntry, TuningStore
from services.anomaly.tunings import (
    DELAY_S_MAX,
    HISTORY_S_MAX,
    MACHINE_POSITION,
    SILENCE_S_MIN,
    WINDOW_S_MAX,
    Rule,
    RuleKind,
    TuningKind,
)
from services.common.clock import Clock
from services.common.database import Connection, Pool, transaction
from services.common.directory import Directory
from services.common.errors import Conflict, Invalid, NotFound
from services.common.identity import Caller

# Rules of a firm that are evaluated.
RULES_MAX = 1_000
RULES_OF_SIGNAL_MAX = 20
NAME_CHARACTERS_MAX = 100
PREVIEW_S_DEFAULT = 7 * 86_400
# More than that is tried on rollups of a minute.
PREVIEW_SAMPLES_MAX = 100_000
PREVIEW_ALARMS_MAX = 100
# A window shorter than that has nothing to look back on in rollups of a minute.
_ROLLUP_WINDOW_S_MIN = 8 * 60

_RULE_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a person asks for."""

    machine_id: int
    signal_id: int  # 0: the whole machine
    kind: RuleKind
    name: str
    severity: Severity
    limit: float
    hysteresis: float
    delay_s: int
    window_s: int


@dataclass(frozen=True)
class PreviewAlarm:
    started_us: int
    ended_us: int | None  # None: it would still last
    value: float  # NaN: none


@dataclass(frozen=True)
class Preview:
    """What a rule would have raised, had it been there."""

    from_us: int
    to_us: int
    samples: int
    by_minute: bool  # tried on the least and greatest value of each minute, not on each sample
    count: int
    alarms: Sequence[PreviewAlarm]  # the newest PREVIEW_ALARMS_MAX


class RuleService:
    def __init__(self, store: TuningStore, pool: Pool, directory: Directory, samples: Samples, clock: Clock) -> None:
        self._store = store
        self._pool = pool
        self._directory = directory
        self._samples = samples
        self._clock = clock

    async def create(self, caller: Caller, wanted: Wanted) -> StoredRule:
        """Raises Invalid, NotFound, and Conflict when the firm has too many."""
        rule = await self._checked(caller, wanted, rule_id=uuid.uuid4().hex, version=1)
        return await self._store_rule(caller, rule, cause="rule_written")

    async def change(self, caller: Caller, rule_id: str, wanted: Wanted, *, version: int) -> StoredRule:
        """Write a new version over `version` (0: over whatever it is); a stopped rule starts again. A repeat changes nothing.

        An alarm of the version before ends with it. Raises Conflict when somebody else has changed it meanwhile.
        """
        async with transaction(self._pool) as connection:
            before = await self._seen(connection, caller, rule_id)
        rule = await self._checked(caller, wanted, rule_id=rule_id, version=before.rule.version)
        if rule.machine_id != before.rule.machine_id:
            raise Conflict("A rule stays with its machine; write another one.", reason="OTHER_MACHINE")
        if rule == before.rule and before.enabled:
            return before
        if version not in (0, before.rule.version):
            raise Conflict(f"The rule is at version {before.rule.version} by now; look at it first.", reason="CHANGED")
        return await self._store_rule(caller, replace(rule, version=rule.version + 1), cause="rule_written")

    async def stop(self, caller: Caller, rule_id: str, *, reason: str) -> StoredRule:
        """Evaluate it no more; it stays to be read and to be started again. A repeat changes nothing."""
        check_text(reason, "reason")
        async with changing(self._pool) as connection:
            await self._store.lock(connection)
            before = await self._seen(connection, caller, rule_id)
            if not before.enabled:
                return before
            now_us = self._clock.now_us()
            new = _tuning(before.rule, None, cause="rule_stopped", reason=reason)
            await self._store.add(connection, new, now_us=now_us, actor=actor_of(caller))
            return await self._store.save_rule(connection, before.rule, enabled=False, now_us=now_us)

    async def get(self, caller: Caller, rule_id: str) -> tuple[StoredRule, Sequence[TuningEntry]]:
        """With what was done to it, newest first."""
        async with transaction(self._pool) as connection:
            found = await self._seen(connection, caller, rule_id)
            history = await self._store.history(
                connection, machine_id=found.rule.machine_id, position=None, rule_id=rule_id, limit=HISTORY_MAX
            )
            return found, history

    async def list(self, caller: Caller, *, firm_id: int, machine_id: int) -> Sequence[StoredRule]:
        """Newest first; at most LIST_MAX."""
        check_role(caller)
        firm_id = caller.firm_or(check_id(firm_id, "firm_id"))
        async with transaction(self._pool) as connection:
            return await self._store.rules(
                connection,
                firm_id=firm_id or None,
                machine_id=check_id(machine_id, "machine_id") or None,
                limit=LIST_MAX,
            )

    async def preview(self, caller: Caller, key: str, wanted: Wanted, *, seconds: int) -> Preview:
        """Try a rule on the last so many seconds (0: a week) of what is stored, without keeping it."""
        if not 0 <= seconds <= HISTORY_S_MAX:
            raise Invalid(f"seconds is at most {HISTORY_S_MAX:,}, or 0 for a week.")
        rule = await self._checked(caller, wanted, rule_id="0" * 32, version=1)
        machine = await known_machine(self._directory, caller, wanted.machine_id)
        if rule.position == MACHINE_POSITION and not machine.signals:
            raise Conflict("The machine has no signals yet, so there is nothing to try it on.", reason="NO_SIGNALS")
        signal_id = machine.signals[max(0, rule.position)].id
        to_us = self._clock.now_us()
        from_us = to_us - (seconds or PREVIEW_S_DEFAULT) * MICROSECONDS
        hours = await self._samples.buckets(key, signal_id, from_us=from_us, to_us=to_us, resolution=HOUR_US)
        by_minute = int(hours.counts.sum()) > PREVIEW_SAMPLES_MAX
        if by_minute:
            if rule.kind in (RuleKind.RISE, RuleKind.FALL) and rule.window_s < _ROLLUP_WINDOW_S_MIN:
                raise Conflict(
                    f"There are more than {PREVIEW_SAMPLES_MAX:,} samples, so only windows of {_ROLLUP_WINDOW_S_MIN // 60} "
                    "minutes or more can be tried; ask for fewer seconds.",
                    reason="TOO_MANY_SAMPLES",
                )
            found = await self._samples.buckets(key, signal_id, from_us=from_us, to_us=to_us, resolution=MINUTE_US)
            counted = int(found.counts.sum())
            low = rule.kind in (RuleKind.BELOW, RuleKind.FALL)
            times, values = found.times_us, found.least if low else found.greatest
        else:
            times, values = await self._samples.raw(
                key, signal_id, from_us=from_us, to_us=to_us, limit=PREVIEW_SAMPLES_MAX
            )
            counted = len(times)
        # Not in the loop: the first time it loads the compiled code.
        alarms = await asyncio.to_thread(tried, rule, times, values, now_us=to_us)
        return Preview(from_us, to_us, counted, by_minute, len(alarms), alarms[-PREVIEW_ALARMS_MAX:])

    async def _store_rule(self, caller: Caller, rule: Rule, *, cause: str) -> StoredRule:
        async with changing(self._pool) as connection:
            await lock_at_pace(self._store, connection, rule.firm_id, now_us=self._clock.now_us())
            stands = await self._store.rule(connection, rule.id)
            if stands is not None and stands.rule.version != rule.version - 1:
                raise Conflict(
                    f"The rule is at version {stands.rule.version} by now; look at it first.", reason="CHANGED"
                )
            now_us = self._clock.now_us()
            saved = await self._store.save_rule(connection, rule, enabled=True, now_us=now_us)
            if await self._store.rule_count(connection, rule.firm_id) > RULES_MAX:
                raise Conflict(f"A firm has at most {RULES_MAX:,} rules; stop one first.", reason="TOO_MANY_RULES")
            of_signal = await self._store.rule_count_of(connection, rule)
            if of_signal > RULES_OF_SIGNAL_MAX:
                raise Conflict(
                    f"A signal has at most {RULES_OF_SIGNAL_MAX} rules; stop one first.", reason="TOO_MANY_RULES"
                )
            reason = f"version {rule.version}: {rule.name}"
            new = _tuning(rule, rule, cause=cause, reason=reason)
            await self._store.add(connection, new, now_us=now_us, actor=actor_of(caller))
        return saved

    async def _checked(self, caller: Caller, wanted: Wanted, *, rule_id: str, version: int) -> Rule:
        check_text(wanted.name, "name", needed=True, characters_max=NAME_CHARACTERS_MAX)
        machine = await known_machine(self._directory, caller, wanted.machine_id)
        position = MACHINE_POSITION
        if wanted.signal_id:
            position = position_of(machine, check_id(wanted.signal_id, "signal_id"))
        rule = Rule(
            id=rule_id,
            version=version,
            firm_id=machine.firm_id,
            machine_id=wanted.machine_id,
            position=position,
            kind=wanted.kind,
            name=wanted.name.strip(),
            severity=wanted.severity,
            limit=wanted.limit,
            hysteresis=wanted.hysteresis,
            delay_s=wanted.delay_s,
            window_s=wanted.window_s,
        )
        check_rule(rule)
        return rule

    async def _seen(self, connection: Connection, caller: Caller, rule_id: str) -> StoredRule:
        check_role(caller)
        found = await self._store.rule(connection, rule_id) if _RULE_ID.fullmatch(rule_id) else None
        if found is None:
            raise NotFound("There is no such rule, or this key may not see it.")
        caller.check_sees_firm(found.rule.firm_id)
        return found


def check_rule(rule: Rule) -> None:
    """Raises Invalid where the figures do not fit the kind of rule."""
    if not all(isfinite(number) for number in (rule.limit, rule.hysteresis)):
        raise Invalid("limit and hysteresis are numbers.")
    if rule.hysteresis < 0:
        raise Invalid("hysteresis is how far inside the limit the value must come back: 0 or more.")
    if rule.kind is RuleKind.NO_DATA:
        if not SILENCE_S_MIN <= rule.window_s <= WINDOW_S_MAX:
            raise Invalid(f"window_s of no_data is {SILENCE_S_MIN} to {WINDOW_S_MAX:,} seconds of silence.")
        if rule.limit or rule.hysteresis or rule.delay_s:
            raise Invalid("no_data has no limit, hysteresis or delay_s: window_s says how long the silence may be.")
        return
    if rule.position == MACHINE_POSITION:
        raise Invalid("signal_id says which signal; only no_data can be about a whole machine.")
    if rule.kind in (RuleKind.ABOVE, RuleKind.BELOW):
        if not 0 <= rule.delay_s <= DELAY_S_MAX:
            raise Invalid(f"delay_s is 0 to {DELAY_S_MAX:,} seconds.")
        if rule.window_s:
            raise Invalid("window_s belongs to rise, fall and no_data; above and below have delay_s.")
        return
    if not 1 <= rule.window_s <= WINDOW_S_MAX:
        raise Invalid(f"window_s says how far to look back: 1 to {WINDOW_S_MAX:,} seconds.")
    if rule.limit <= 0 or rule.hysteresis > rule.limit:
        raise Invalid(
            "limit is by how much the value may change in window_s: more than 0, and not less than hysteresis."
        )
    if rule.delay_s:
        raise Invalid("delay_s belongs to above and below; rise and fall have window_s.")


def tried(rule: Rule, times_us: Ints, values: Floats, *, now_us: int) -> Sequence[PreviewAlarm]:
    """The alarms of a rule on samples of its signal, by the code that the worker runs."""
    if rule.kind is RuleKind.NO_DATA:
        # Silence is told by when batches came; here each sample is taken to have come when it was measured.
        gaps = np.flatnonzero(np.diff(times_us) > rule.silence_us)
        silent = [PreviewAlarm(int(times_us[at]), int(times_us[at + 1]), nan) for at in gaps]
        if len(times_us) and now_us - int(times_us[-1]) > rule.silence_us:
            silent.append(PreviewAlarm(int(times_us[-1]), None, nan))
        return silent
    if not len(times_us):
        return []
    # Only here: the compiler is large, and most processes of the API never try a rule.
    from services.anomaly.rulebook import RuleBook, place

    # As if the machine had only this signal.
    rule = replace(rule, position=0)
    book = RuleBook()
    book.set(rule, last_us=0, made_us=0, saved=False)
    found = book.evaluate(
        [place(rule)[0]], [0], np.array([len(times_us)]), np.ones(1, dtype=np.int64), times_us, values
    )
    alarms: list[PreviewAlarm] = []
    for _, event in found:
        if event.raised:
            alarms.append(PreviewAlarm(event.started_us, None, event.value))
        else:
            alarms[-1] = replace(alarms[-1], ended_us=event.time_us)
    return alarms


def _tuning(of: Rule, rule: Rule | None, *, cause: str, reason: str) -> NewTuning:
    return NewTuning(
        kind=TuningKind.RULE,
        firm_id=of.firm_id,
        machine_id=of.machine_id,
        position=of.position,
        cause=cause,
        reason=reason,
        rule_id=of.id,
        rule=rule,
    )
