"""What an unknown signal may be, guessed from its name and its values. A person decides."""

import re
from typing import Final

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|%")
_PARTS = re.compile(r"[a-z0-9]+|%")

# The last word of a name often is the unit ...
_UNITS: Final = {
    "c": "degC",
    "degc": "degC",
    "celsius": "degC",
    "k": "K",
    "bar": "bar",
    "mbar": "mbar",
    "kpa": "kPa",
    "pa": "Pa",
    "psi": "psi",
    "a": "A",
    "amps": "A",
    "ma": "mA",
    "v": "V",
    "volts": "V",
    "w": "W",
    "kw": "kW",
    "kwh": "kWh",
    "wh": "Wh",
    "hz": "Hz",
    "khz": "kHz",
    "rpm": "1/min",
    "pct": "%",
    "percent": "%",
    "%": "%",
    "mm": "mm",
    "um": "um",
    "nm": "Nm",
    "n": "N",
    "kn": "kN",
    "kg": "kg",
    "s": "s",
    "ms": "ms",
    "lpm": "l/min",
}
# ... or the quantity says it.
_QUANTITIES: Final = {
    "temperature": "degC",
    "temp": "degC",
    "current": "A",
    "voltage": "V",
    "power": "kW",
    "energy": "kWh",
    "pressure": "bar",
    "frequency": "Hz",
    "speed": "1/min",
    "humidity": "%",
    "vibration": "mm/s",
    "torque": "Nm",
    "flow": "l/min",
    "weight": "kg",
}


def unit(name: str) -> str:
    """The unit that the name speaks of; empty where it does not."""
    words = [word.lower() for word in _WORDS.findall(name)]
    for parts in (_PARTS.findall(name.lower()), words):  # current_mA is written like camelCase and is none
        if len(parts) > 1 and parts[-1] in _UNITS:
            return _UNITS[parts[-1]]
    return next((_QUANTITIES[word] for word in words if word in _QUANTITIES), "")


def kind(*, lowest: float, highest: float, is_whole: bool) -> str:
    """switch (0 and 1 only), whole (whole numbers, such as a counter or a code) or measure."""
    if not is_whole:
        return "measure"
    return "switch" if lowest >= 0 and highest <= 1 else "whole"
