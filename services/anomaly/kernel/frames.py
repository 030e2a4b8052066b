"""The pass over the frames of a batch, in order."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from services.anomaly.kernel.alarms import (
    alarm_step,
    eased_by,
    write_event,
    write_leads,
)
from services.anomaly.kernel.compiling import (
    Floats,
    Ints,
    compiled,
    digest_of_package,
    part,
)
from services.anomaly.kernel.joint import joint_step, joint_value
from services.anomaly.kernel.layout import (
    BLOCK,
    C_JOINT_RAISE,
    C_JOINT_SETTLING,
    C_RAISE,
    C_YOUNG,
    CYCLE,
    DROPOUT,
    E_DISTANCE,
    E_EXPECTED,
    E_PERIOD_US,
    E_SAMPLES,
    E_SPREAD,
    E_VALUE,
    FLAT,
    JOINT,
    MACHINE_ALARM_US,
    MACHINE_CALM,
    MACHINE_FRAMES,
    MACHINE_INTERVAL_US,
    MACHINE_LAST_US,
    MACHINE_OFFSET,
    MACHINE_STATE,
    ROW_ALARM_US,
    ROW_CALM,
    ROW_LAST_US,
    ROW_N,
    ROW_OFFSET,
    SEASON,
    US_PER_DAY,
    VALUE_MAX,
    block_size,
)
from services.anomaly.kernel.scores import hold_rows
from services.anomaly.kernel.series import absent_step, series_step

_block_size = part(block_size)


def _score_frames(sources: int) -> Callable[..., tuple[int, int]]:
    @compiled
    def score_frames(
        cfg: Floats, slots: NDArray[np.int32], times_us: Ints, starts: Ints, values: Floats,
        places: Ints, machines: Floats, series: Floats, joint: Floats,
        onset: Floats, state: Floats, component: NDArray[np.int8], joint_onset: Floats, joint_state: Floats,
        share: Floats, events: Floats,
    ) -> tuple[int, int]:  # fmt: skip
        """Run every frame in order.  Returns (events written, frames skipped as not newer).

        Signals of one machine may come in frames of their own, at the same time or one behind the other: each has its
        own clock. What a frame says of the machine as a whole (its pace, what is absent, the signals together) counts
        where it is newer than all frames before.
        """
        sources  # noqa: B018 (see digest_of_package)
        figures = np.zeros(8)
        together = np.empty(BLOCK)
        n_events = 0
        skipped = 0
        for f in range(slots.shape[0]):
            slot = slots[f]
            machine = machines[slot]
            first_row, width, joint_at = places[slot, 0], places[slot, 1], places[slot, 2]
            begin = starts[f]
            count = starts[f + 1] - begin
            t_us = float(times_us[f])
            joint_onset[f] = 0.0
            joint_state[f] = 0.0
            for i in range(begin, begin + count):
                onset[i] = 0.0
                state[i] = 0.0
                component[i] = -1
                share[i] = 0.0
            newest = machine[MACHINE_FRAMES] == 0.0 or t_us > machine[MACHINE_LAST_US]
            if newest and machine[MACHINE_FRAMES] > 0.0:
                step = min(t_us - machine[MACHINE_LAST_US], float(US_PER_DAY))
                if machine[MACHINE_FRAMES] == 1.0:
                    machine[MACHINE_INTERVAL_US] = step
                limited = min(step, 4.0 * machine[MACHINE_INTERVAL_US])
                machine[MACHINE_INTERVAL_US] += max(1.0 / machine[MACHINE_FRAMES], 0.01) * (
                    limited - machine[MACHINE_INTERVAL_US]
                )
            if newest:
                machine[MACHINE_LAST_US] = t_us
                machine[MACHINE_FRAMES] += 1.0
            heard = newest
            eased = eased_by(cfg, machine[MACHINE_INTERVAL_US])
            for i in range(min(count, width)):
                row = series[first_row + i]
                x = values[begin + i]
                if abs(x) <= VALUE_MAX:  # NaN is not
                    if t_us <= row[ROW_LAST_US]:
                        continue
                    row[ROW_LAST_US] = t_us
                    heard = True
                    o, s, c = series_step(cfg, row, x, times_us[f], machine[MACHINE_INTERVAL_US], figures)
                elif newest:
                    o, s, c = absent_step(cfg, row, figures)
                else:
                    continue
                onset[begin + i] = o
                state[begin + i] = s
                component[begin + i] = c
                lasting = s if c in (FLAT, DROPOUT) else o  # these two have no onset: being long is what is wrong
                alarming = max(o, lasting) if row[ROW_N] >= cfg[C_YOUNG] else 0.0
                what = alarm_step(
                    cfg, row, ROW_ALARM_US, ROW_CALM, cfg[C_RAISE] - eased, row[ROW_OFFSET], alarming, s, t_us
                )
                if what:
                    event = events[n_events]
                    write_event(event, f, i, what, c, t_us, row[ROW_ALARM_US], s)
                    event[E_VALUE] = x
                    event[E_EXPECTED] = figures[0]
                    event[E_SPREAD] = figures[1]
                    event[E_DISTANCE] = figures[2]
                    event[E_SAMPLES] = figures[3]
                    event[E_PERIOD_US] = figures[7] if c in (SEASON, CYCLE) else 0.0
                    n_events += 1
                    if what == 2:
                        row[ROW_ALARM_US] = 0.0
            if not heard:
                skipped += 1
            if not newest or width < 2 or count < 2:
                continue
            distance = 0.0
            joint_now = 0.0
            for lo in range(0, min(count, width), BLOCK):
                k = min(BLOCK, width - lo)
                if lo + k > count:
                    break
                block = joint[joint_at + (lo // BLOCK) * _block_size(BLOCK) :][: _block_size(k)]
                for i in range(k):
                    together[i] = joint_value(cfg, series[first_row + lo + i], values[begin + lo + i])
                o, s, d = joint_step(
                    cfg,
                    block,
                    k,
                    together[:k],
                    share[begin + lo : begin + lo + k],
                    hold_rows(cfg, machine[MACHINE_INTERVAL_US]),
                )
                distance = max(distance, d)
                joint_onset[f] = max(joint_onset[f], o)
                joint_now = max(joint_now, s)
            # A machine does not change its state from one row to the next and back: what is said of it settles over a
            # few rows.  An alarm is raised by the row itself.
            machine[MACHINE_STATE] += cfg[C_JOINT_SETTLING] * (joint_now - machine[MACHINE_STATE])
            joint_state[f] = machine[MACHINE_STATE]
            what = alarm_step(
                cfg,
                machine,
                MACHINE_ALARM_US,
                MACHINE_CALM,
                cfg[C_JOINT_RAISE] - eased,
                machine[MACHINE_OFFSET],
                joint_now,
                joint_state[f],
                t_us,
            )
            if what:
                event = events[n_events]
                write_event(event, f, -1, what, JOINT, t_us, machine[MACHINE_ALARM_US], joint_now)
                event[E_DISTANCE] = distance
                event[E_SAMPLES] = machine[MACHINE_FRAMES]
                write_leads(event, share[begin : begin + count])
                n_events += 1
                if what == 2:
                    machine[MACHINE_ALARM_US] = 0.0
        return n_events, skipped

    return score_frames


score_frames = _score_frames(digest_of_package())
