"""A small plant, simulated: five kinds of machines at one frame a second, each with one fault of known time and cause.

Deterministic: the same seed gives the same samples. The machines run in cycles, warm up and wander a little, as real ones do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

SEED = 7
DURATION_S = 2 * 60 * 60


@dataclass(frozen=True)
class Signal:
    name: str
    unit: str


@dataclass(frozen=True)
class Fault:
    """What went wrong, on which signals it shows, and when (seconds from the start)."""

    cause: str
    signals: tuple[str, ...]
    start_s: int
    end_s: int


@dataclass(frozen=True)
class Machine:
    """A machine with all that it will send: values is seconds x signals, NaN where it sent nothing."""

    path: str
    name: str
    kind: str
    signals: tuple[Signal, ...]
    values: Floats
    faults: tuple[Fault, ...]


def build(seed: int = SEED, duration_s: int = DURATION_S) -> list[Machine]:
    """The plant's five machines."""
    makers: tuple[Callable[[np.random.Generator, int], Machine], ...] = (
        _spindle,
        _extruder,
        _compressor,
        _oven,
        _packer,
    )
    rng = np.random.default_rng(seed)
    return [make(rng, duration_s) for make in makers]


def _noise(rng: np.random.Generator, n: int, sd: float) -> Floats:
    return rng.normal(0.0, sd, n)


def _wander(rng: np.random.Generator, n: int, sd: float, memory_s: float) -> Floats:
    """Slow, bounded drift: an autoregressive process with the given spread and memory."""
    keep = np.exp(-1.0 / memory_s)
    steps = rng.normal(0.0, sd * np.sqrt(1 - keep**2), n)
    out = np.empty(n)
    level = 0.0
    for i, step in enumerate(steps):
        level = keep * level + step
        out[i] = level
    return out


def _cycle(n: int, period_s: float, duty: float) -> Floats:
    """1 while working, 0 while idle."""
    return ((np.arange(n) % period_s) < duty * period_s).astype(float)


def _ramp(n: int, start_s: int, end_s: int) -> Floats:
    """0 before the fault, growing to 1 at its end, 0 after it."""
    t = np.arange(n, dtype=float)
    return np.where((t >= start_s) & (t < end_s), (t - start_s) / (end_s - start_s), 0.0)


def _during(n: int, start_s: int, end_s: int) -> Floats:
    t = np.arange(n)
    return ((t >= start_s) & (t < end_s)).astype(float)


def _spindle(rng: np.random.Generator, n: int) -> Machine:
    start, end = int(n * 0.70), int(n * 0.80)
    wear = _ramp(n, start, end)
    busy = _cycle(n, 90, 0.7)
    vibration = 1.2 + 0.6 * busy + _noise(rng, n, 0.08) + 4.0 * wear
    temperature = 41 + 2.0 * busy + _wander(rng, n, 0.8, 600) + _noise(rng, n, 0.15) + 9.0 * wear
    current = 3.0 + 8.0 * busy + _noise(rng, n, 0.25) + 1.5 * wear
    return Machine(
        path="machining/spindle-1",
        name="Spindle 1",
        kind="machining centre spindle",
        signals=(Signal("vibration", "mm/s"), Signal("bearing temperature", "degC"), Signal("motor current", "A")),
        values=np.column_stack([vibration, temperature, current]),
        faults=(Fault("bearing wear", ("vibration", "bearing temperature", "motor current"), start, end),),
    )


def _extruder(rng: np.random.Generator, n: int) -> Machine:
    start, end = int(n * 0.62), int(n * 0.72)
    swing = _during(n, start, end) * np.sin(2 * np.pi * np.arange(n) / 240) * 6.0
    melt = 212 + _wander(rng, n, 0.7, 900) + _noise(rng, n, 0.25) + swing
    pressure = 148 + _wander(rng, n, 1.2, 300) + _noise(rng, n, 0.6) - 1.1 * swing
    screw = 61 + _noise(rng, n, 0.7) + _wander(rng, n, 0.5, 400)
    return Machine(
        path="plastics/extruder-2",
        name="Extruder 2",
        kind="extruder",
        signals=(Signal("melt temperature", "degC"), Signal("melt pressure", "bar"), Signal("screw current", "A")),
        values=np.column_stack([melt, pressure, screw]),
        faults=(Fault("heater control hunting", ("melt temperature", "melt pressure"), start, end),),
    )


def _compressor(rng: np.random.Generator, n: int) -> Machine:
    start, end = int(n * 0.76), int(n * 0.86)
    leak = _during(n, start, end)
    loaded = _cycle(n, 40, 0.55)
    pressure = 7.1 + 0.25 * loaded + _noise(rng, n, 0.03) - 0.9 * leak
    current = 22 + 31 * loaded + _noise(rng, n, 0.8) + 16 * leak * (1 - loaded)
    oil = 76 + _wander(rng, n, 1.0, 900) + _noise(rng, n, 0.2) + 3.0 * leak
    return Machine(
        path="utilities/compressor-1",
        name="Compressor 1",
        kind="screw compressor",
        signals=(Signal("line pressure", "bar"), Signal("motor current", "A"), Signal("oil temperature", "degC")),
        values=np.column_stack([pressure, current, oil]),
        faults=(Fault("compressed air leak", ("line pressure", "motor current", "oil temperature"), start, end),),
    )


def _oven(rng: np.random.Generator, n: int) -> Machine:
    start, end = int(n * 0.66), int(n * 0.76)
    zones = [setpoint + _wander(rng, n, 0.9, 500) + _noise(rng, n, 0.3) for setpoint in (180.0, 205.0, 195.0)]
    zones[1][start:end] = zones[1][start]
    gas = 14 + _wander(rng, n, 0.4, 500) + _noise(rng, n, 0.15)
    return Machine(
        path="finishing/oven-1",
        name="Curing oven 1",
        kind="curing oven",
        signals=(
            Signal("zone 1 temperature", "degC"),
            Signal("zone 2 temperature", "degC"),
            Signal("zone 3 temperature", "degC"),
            Signal("gas flow", "m3/h"),
        ),
        values=np.column_stack([*zones, gas]),
        faults=(Fault("thermocouple stuck", ("zone 2 temperature",), start, end),),
    )


def _packer(rng: np.random.Generator, n: int) -> Machine:
    start, end = int(n * 0.82), int(n * 0.84)
    jam = _during(n, start, end)
    power = 2.4 + 1.1 * _cycle(n, 12, 0.5) + _noise(rng, n, 0.08) + 5.5 * jam
    rate = (58 + _noise(rng, n, 1.2)) * (1 - 0.9 * jam)
    values = np.column_stack([power, rate])
    values[rng.random(n) < 0.01, 1] = np.nan  # its counter now and then sends nothing, which is normal
    return Machine(
        path="packing/packer-1",
        name="Packer 1",
        kind="packing machine",
        signals=(Signal("power", "kW"), Signal("packs a minute", "1/min")),
        values=values,
        faults=(Fault("jam in the infeed", ("power", "packs a minute"), start, end),),
    )
