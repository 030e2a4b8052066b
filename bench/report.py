"""How a measure is told."""

import json
from typing import Any


def tell(measure: str, value: float, unit: str, limit: float | None = None, **detail: Any) -> None:
    """One line of the result; `ratio` is value over limit."""
    line = {
        "measure": measure,
        "value": round(value, 4),
        "unit": unit,
        "limit": None if limit is None else round(limit, 4),
        "ratio": None if limit is None else round(value / limit, 4),
        "detail": detail,
    }
    print(json.dumps(line), flush=True)
