"""What shows an alarm to people: the samples around it, its figures, and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from services.anomaly.domain import MICROSECONDS, Alarm
from services.anomaly.samples import MINUTE_US, Floats, Ints, Samples
from services.anomaly.service import AlarmService
from services.anomaly.tunings import MACHINE_POSITION
from services.common.clock import Clock, from_us
from services.common.directory import Directory
from services.common.errors import Conflict, HubError, Invalid, NotFound, SlowDown, TryAgain
from services.common.identity import Caller

MINUTES_DEFAULT = 60
MINUTES_MAX = 1_440
# A long alarm is not shown to its end.
AFTER_US_MAX = 24 * 3600 * MICROSECONDS
# Of a signal; where there are more, each minute's least and greatest value are shown.
SAMPLES_MAX = 5_000
TRACKS_MAX = 3

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 240, 64, 36, 28


@dataclass(frozen=True)
class Track:
    """Samples of one signal; by_minute: starts of minutes, and the least and greatest value in each."""

    signal_id: int
    name: str
    unit: str
    share: float
    by_minute: bool
    times_us: Ints
    least: Floats
    greatest: Floats  # the same as `least`, sample by sample, unless by_minute


@dataclass(frozen=True)
class Evidence:
    alarm: Alarm
    from_us: int
    to_us: int
    tracks: Sequence[Track]
    samples_missing: str  # why there are none; empty: there are


class EvidenceService:
    def __init__(self, alarms: AlarmService, directory: Directory, samples: Samples, clock: Clock) -> None:
        self._alarms = alarms
        self._directory = directory
        self._samples = samples
        self._clock = clock

    async def evidence(self, caller: Caller, key: str, alarm_id: str, *, minutes: int) -> Evidence:
        """The alarm and the samples so many minutes (0: an hour) around it. Where samples cannot be had the rest is still told."""
        if not 0 <= minutes <= MINUTES_MAX:
            raise Invalid(f"minutes is at most {MINUTES_MAX:,}, or 0 for {MINUTES_DEFAULT}.")
        alarm = await self._alarms.get(caller, alarm_id)
        around_us = (minutes or MINUTES_DEFAULT) * 60 * MICROSECONDS
        from_us = alarm.started_us - around_us
        end_us = min(alarm.ended_us or alarm.started_us, alarm.started_us + AFTER_US_MAX)
        to_us = max(end_us + around_us, from_us + MINUTE_US)
        tracks: list[Track] = []
        missing = ""
        try:
            for signal_id, name, unit, share in self._signals(alarm):
                tracks.append(await self._track(key, signal_id, name, unit, share, from_us, to_us))
        except (Conflict, NotFound, SlowDown, TryAgain) as error:
            missing = _sentence(error)
        return Evidence(alarm, from_us, to_us, tracks, missing)

    def _signals(self, alarm: Alarm) -> Sequence[tuple[int, str, str, float]]:
        if alarm.shares:
            machine = self._directory.machines.get(alarm.machine_id)
            units = {signal.id: signal.unit for signal in machine.signals} if machine else {}
            return [
                (share.signal_id, share.signal_name, units.get(share.signal_id, ""), share.share)
                for share in alarm.shares[:TRACKS_MAX]
            ]
        if alarm.position == MACHINE_POSITION:
            machine = self._directory.machines.get(alarm.machine_id)
            first = machine.signals[0] if machine and machine.signals else None
            return [(first.id, first.name, first.unit, 0.0)] if first else []
        return [(alarm.signal_id, alarm.signal_name, alarm.unit, 1.0)]

    async def _track(
        self, key: str, signal_id: int, name: str, unit: str, share: float, from_us: int, to_us: int
    ) -> Track:
        found = await self._samples.buckets(key, signal_id, from_us=from_us, to_us=to_us, resolution=MINUTE_US)
        if int(found.counts.sum()) > SAMPLES_MAX:
            return Track(signal_id, name, unit, share, True, found.times_us, found.least, found.greatest)
        times, values = await self._samples.raw(key, signal_id, from_us=from_us, to_us=to_us, limit=SAMPLES_MAX)
        return Track(signal_id, name, unit, share, False, times, values, values)


def _sentence(error: HubError) -> str:
    return f"{error.reason}: {error.detail}"


def picture(evidence: Evidence) -> str:
    """The tracks one below the other as SVG: the values, when the alarm lasted, and what was expected or the limit."""
    tracks = evidence.tracks
    height = _TOP + max(1, len(tracks)) * _HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" font-family="sans-serif" font-size="12" '
        'role="img">',
        f"<title>{escape(evidence.alarm.explanation)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#fff"/>',
        f'<text x="8" y="20">{escape(_shortened(evidence.alarm.explanation))}</text>',
    ]
    if not tracks:
        parts.append(f'<text x="8" y="60" fill="#666">{escape(evidence.samples_missing or "No samples.")}</text>')
    for number, track in enumerate(tracks):
        parts += _panel(evidence, track, _TOP + number * _HEIGHT)
    return "".join([*parts, "</svg>"])


def _panel(evidence: Evidence, track: Track, top: int) -> list[str]:
    alarm = evidence.alarm
    figures = dict(alarm.figures)
    level = figures.get("limit", figures.get("expected")) if alarm.signal_id == track.signal_id else None
    if alarm.component in ("rise", "fall", "flat", "dropout"):
        level = None  # not in the signal's unit, or not a level
    low, high = top + _HEIGHT - _BOTTOM, top + 8
    shown = [value for value in (level,) if value is not None]
    values = np.concatenate([track.least, track.greatest, shown])
    least, greatest = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    span = (greatest - least) or 1.0

    def x(time_us: float) -> float:
        share = (time_us - evidence.from_us) / (evidence.to_us - evidence.from_us)
        return round(_LEFT + min(max(share, 0.0), 1.0) * (_WIDTH - _LEFT - 8), 1)

    def y(value: float) -> float:
        return round(low - (value - least) / span * (low - high), 1)

    started, ended = x(alarm.started_us), x(alarm.ended_us or evidence.to_us)
    parts = [
        f'<rect x="{started}" y="{high}" width="{max(1.0, round(ended - started, 1))}" height="{low - high}" fill="#fbe3df"/>',
        f'<path d="M{_LEFT} {high}V{low}H{_WIDTH - 8}" fill="none" stroke="#999"/>',
        f'<text x="{_LEFT}" y="{high}" fill="#333">{escape(_shortened(f"{track.name} {track.unit}"))}</text>',
    ]
    parts += [
        f'<text x="{_LEFT - 4}" y="{y(value) + 4}" text-anchor="end" fill="#666">{value:.4g}</text>'
        for value in (least, greatest)
    ]
    for time_us, anchor in ((evidence.from_us, "start"), (evidence.to_us, "end")):
        stamp = from_us(time_us).strftime("%Y-%m-%d %H:%M")
        parts.append(f'<text x="{x(time_us)}" y="{low + 16}" text-anchor="{anchor}" fill="#666">{stamp}</text>')
    if level is not None:
        parts.append(f'<path d="M{_LEFT} {y(level)}H{_WIDTH - 8}" stroke="#2b6" stroke-dasharray="4 3"/>')
    points = [(x(time), y(a), y(b)) for time, a, b in zip(track.times_us, track.least, track.greatest, strict=True)]
    if track.by_minute:
        drawn = "".join(f"M{at} {a}V{b if b != a else b - 1}" for at, a, b in points)
    else:
        drawn = "".join(f"{'L' if number else 'M'}{at} {a}" for number, (at, a, _) in enumerate(points))
    if drawn:
        parts.append(f'<path d="{drawn}" fill="none" stroke="#245"/>')
    return parts


def _shortened(text: str) -> str:
    return text if len(text) <= 110 else text[:109] + "…"
