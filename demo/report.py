"""The report of a demo run: one self-contained page with the signals, alarms, reasons, and the way from alarm to award."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np

from demo.plant import Floats
from demo.story import Source, Story
from services.common.clock import from_us

WIDTH, HEIGHT = 720.0, 90.0
PIXELS = 360  # columns of a chart; each shows the least and the greatest value in it


@dataclass(frozen=True)
class Chart:
    """A signal as SVG coordinates."""

    name: str
    unit: str
    low: float
    high: float
    path: str
    faults: list[tuple[float, float]]
    alarms: list[tuple[float, str, str]]  # x, severity, words


def page(story: Story) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["pounds"] = lambda pence: f"£{pence // 100:,}.{pence % 100:02d}"
    environment.filters["clock"] = lambda us: from_us(us).strftime("%d %b %Y %H:%M:%S")
    template = environment.from_string((resources.files("demo") / "report.html.j2").read_text())
    machines = [(source, charts(source, story)) for source in story.sources]
    return template.render(story=story, summary=story.summary(), machines=machines, width=WIDTH, height=HEIGHT)


def charts(source: Source, story: Story) -> list[Chart]:
    """One chart a signal, with the known faults as bands and the alarms as lines."""
    order = np.argsort(source.times_us, kind="stable")
    times, values = source.times_us[order].astype(float), source.values[order]
    start, span = times[0], max(times[-1] - times[0], 1.0)
    found = []
    for index, signal in enumerate(source.signals):
        alarms = [
            (float((alarm["started_us"] - start) / span * WIDTH), alarm["severity"], alarm["explanation"])
            for alarm in story.alarms
            if alarm["machine_id"] == source.machine_id and _concerns(alarm, source.signal_ids[index], index)
        ]
        faults = [
            (fault.start_s * 1e6 / span * WIDTH, (fault.end_s - fault.start_s) * 1e6 / span * WIDTH)
            for fault in source.faults or ()
            if signal.name in fault.signals
        ]
        path, low, high = _line((times - start) / span, values[:, index])
        found.append(Chart(signal.name, signal.unit, low, high, path, faults, alarms))
    return found


def _concerns(alarm: dict[str, Any], signal_id: int, index: int) -> bool:
    """An alarm of several signals together is drawn on those with the largest shares."""
    if alarm["signal_id"]:
        return bool(alarm["signal_id"] == signal_id)
    leading = [share["signal_id"] for share in alarm["shares"][:2]]
    return signal_id in leading if leading else index == 0


def _line(x: Floats, y: Floats) -> tuple[str, float, float]:
    """SVG path of a series (x from 0 to 1), its least and its greatest value."""
    present = ~np.isnan(y)
    x, y = x[present], y[present]
    if not len(y):
        return "", 0.0, 0.0
    low, high = float(y.min()), float(y.max())
    scale = high - low or 1.0
    column = np.minimum((x * PIXELS).astype(int), PIXELS - 1)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    least, greatest = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    points = [
        f"{at:.1f},{HEIGHT - 6 - (value - low) / scale * (HEIGHT - 12):.1f}"
        for at, lower, upper in zip(x[starts] * WIDTH, least, greatest, strict=True)
        for value in ((lower, upper) if upper > lower else (lower,))
    ]
    return "M" + "L".join(points), low, high
