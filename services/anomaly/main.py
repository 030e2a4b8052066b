"""The processes of the anomaly service: `python -m services.anomaly.main worker|api|notifier`."""

import functools
import sys
from importlib import import_module

from services.anomaly.settings import AnomalySettings
from services.common.runtime import run

# Each is wired in a module of its own, so that no process loads what only another needs (the compiler, Faust).
ROLES = {
    "worker": "services.anomaly.worker_process",
    "api": "services.anomaly.api_process",
    "notifier": "services.anomaly.notifier_process",
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ROLES:
        print("usage: python -m services.anomaly.main worker|api|notifier", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    settings = AnomalySettings()
    start = import_module(ROLES[sys.argv[1]]).start
    run(f"anomaly-{sys.argv[1]}", settings, functools.partial(start, settings=settings))


if __name__ == "__main__":
    main()
