"""When an alarm begins and ends, and what an event tells."""

import math

from services.anomaly.kernel.compiling import Floats, part
from services.anomaly.kernel.layout import (
    C_BUDGET_US,
    C_CALM_ROWS,
    C_CLEAR,
    C_RAISE,
    C_RAISE_MIN,
    E_COMPONENT,
    E_FRAME,
    E_LEAD,
    E_LEAD_SHARE,
    E_NEXT,
    E_NEXT_SHARE,
    E_RAISED,
    E_SCORE,
    E_SIGNAL,
    E_STARTED_US,
    E_TIME_US,
)


@part
def eased_by(cfg: Floats, interval_us: float) -> float:
    """How far alarms are raised below `raise_at` where frames are rare: the budget is in time, the score in rows."""
    if interval_us <= 0.0:
        return 0.0
    asked = math.log10(max(cfg[C_BUDGET_US] / interval_us, 1.0))
    return float(cfg[C_RAISE] - min(cfg[C_RAISE], max(cfg[C_RAISE_MIN], asked)))


@part
def alarm_step(
    cfg: Floats,
    alarm: Floats,
    started_at: int,
    calm_at: int,
    raise_at: float,
    offset: float,
    onset: float,
    state: float,
    t_us: float,
) -> int:
    """The alarm of one series or machine: 1 raised now, 2 cleared now, 0 nothing new."""
    if alarm[started_at] == 0.0:
        if onset >= raise_at + offset:
            alarm[started_at] = t_us
            alarm[calm_at] = 0.0
            return 1
        return 0
    if state >= cfg[C_CLEAR] + offset:
        alarm[calm_at] = 0.0
        return 0
    alarm[calm_at] += 1.0
    return 2 if alarm[calm_at] >= cfg[C_CALM_ROWS] else 0


@part
def write_event(
    event: Floats, frame: int, signal: int, what: int, component: int, t_us: float, started_us: float, score: float
) -> None:
    """Begin a row of `events`; the figures follow."""
    event[:] = 0.0
    event[E_FRAME] = frame
    event[E_SIGNAL] = signal
    event[E_RAISED] = 1.0 if what == 1 else 0.0
    event[E_COMPONENT] = component
    event[E_TIME_US] = t_us
    event[E_STARTED_US] = started_us
    event[E_SCORE] = score


@part
def write_leads(event: Floats, share: Floats) -> None:
    """The two signals with the largest share of the joint distance; share: float64[k], k >= 2."""
    lead = 0
    for i in range(1, share.shape[0]):
        if share[i] > share[lead]:
            lead = i
    second = 1 if lead == 0 else 0
    for i in range(share.shape[0]):
        if i != lead and share[i] > share[second]:
            second = i
    event[E_LEAD] = lead
    event[E_LEAD_SHARE] = share[lead]
    event[E_NEXT] = second
    event[E_NEXT_SHARE] = share[second]
