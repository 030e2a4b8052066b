"""The processes of the anomaly service: `python -m services.anomaly.main worker|api|notifier`."""

import sys
from importlib import import_module

from services.anomaly.settings import AnomalySettings
from services.common import logs, tracing
from services.common.metrics import name_process
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
    logs.configure(f"anomaly-{sys.argv[1]}", settings.log_level)
    name_process(f"anomaly-{sys.argv[1]}")
    tracing.start(settings.trace_endpoint, process=f"anomaly-{sys.argv[1]}", ratio=settings.trace_ratio)
    run(import_module(ROLES[sys.argv[1]]).process(settings), drain_s=settings.drain_s)


if __name__ == "__main__":
    main()
