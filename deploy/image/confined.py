"""Runs the built image as confined as on the cluster: read-only root, uid 10001, no capability, no new privileges, no network.

Usage (as root): python -m deploy.image.confined [IMAGE]. Every module of every service must load, so nothing that a process needs
was left out; and every command must know its roles.
"""

import json
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from localstack.hub import ROLES

IMAGE = "localhost/smdih-hub:dev"
UID = 10001
DEADLINE_S = 180
STOP_S = 15
LOAD_ALL = """
import importlib, os, pkgutil, services, smdih_client
from services.matching.text import Embedder
assert os.getuid() == 10001 and not os.access("/hub", os.W_OK)
found = (m.name for p in (services, smdih_client) for m in pkgutil.walk_packages(p.__path__, p.__name__ + "."))
names = [name for name in found if "__main__" not in name]
for name in names:
    importlib.import_module(name)
import pyarrow.parquet, ortools.sat.python.cp_model
assert len(Embedder.installed().embed(["a worn bearing"])[0]) == 384
try:
    open("/hub/code/written", "w")
except OSError:
    print(len(names), "modules load")
"""
# Everything that the worker needs came with the image: it compiles nothing that it would keep.
KERNEL = """
import os
from pathlib import Path
from services.anomaly.worker_process import make_kernel_ready
brought = {path.name for path in Path(os.environ["SMDIH_ANOMALY_KERNEL"]).rglob("*.nbc")}
make_kernel_ready(os.environ["SMDIH_ANOMALY_KERNEL"])
kept = {path.name for path in Path(os.environ["NUMBA_CACHE_DIR"]).rglob("*.nbc")}
print(len(kept), "parts", "loaded" if brought and kept == brought else f"of which {len(kept - brought)} were compiled")
"""
# As it would come while the first libraries load.
STOPPED = "import os, signal, time; os.kill(1, signal.SIGTERM); time.sleep(30)"
DUMP = """
import asyncio, pathlib
from services.backup import BackupSettings, _run
for program in ("pg_dump", "pg_restore"):
    said = pathlib.Path(f"/tmp/{program}")
    asyncio.run(_run(BackupSettings(), program, ["--version"], to=said))
    print(said.read_text(), end="")
"""


@contextmanager
def root_of(image: str) -> Iterator[str]:
    """The image's file system, mounted."""
    container = _told("buildah", "from", "--pull-never", image)
    try:
        yield _told("buildah", "mount", container)
    finally:
        _told("buildah", "rm", container)


def run_confined(root: str, environment: Sequence[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """python3 with these arguments, as the image's own entry point would run it."""
    config = {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": UID, "gid": UID},
            "args": ["python3", *arguments],
            "env": [*environment, "SMDIH_KAFKA_BOOTSTRAP=127.0.0.1:1", "SMDIH_DATABASE_DSN=postgresql://127.0.0.1:1/x"],
            "cwd": "/tmp",
            "noNewPrivileges": True,
            "capabilities": {kind: [] for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")},
        },
        "root": {"path": root, "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]},
        ],
        "linux": {"namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")]},
    }
    with tempfile.TemporaryDirectory() as bundle:
        (Path(bundle) / "config.json").write_text(json.dumps(config))
        return subprocess.run(
            ["runc", "--root", f"{bundle}/state", "run", "--bundle", bundle, f"smdih-{secrets.token_hex(4)}"],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )


def main(arguments: list[str]) -> int:
    wrong = 0
    image = arguments[0] if arguments else IMAGE
    environment = _environment(image)
    with root_of(image) as root:
        loaded = run_confined(root, environment, "-c", LOAD_ALL)
        wrong += _judge("every module loads", loaded.returncode == 0 and "modules load" in loaded.stdout, loaded)
        made = run_confined(root, environment, "-c", KERNEL)
        wrong += _judge("the detector's kernel came compiled", "parts loaded" in made.stdout, made)
        dumps = run_confined(root, environment, "-c", DUMP)
        wrong += _judge("pg_dump and pg_restore are of version 17", dumps.stdout.count("(PostgreSQL) 17.") == 2, dumps)
        began = time.monotonic()
        stopped = run_confined(root, environment, "-c", STOPPED)
        at_once = stopped.returncode == 128 + signal.SIGTERM and time.monotonic() - began < STOP_S
        wrong += _judge("a stop while libraries load ends the first process", at_once, stopped)
        for module in sorted({role.module for role in ROLES}):
            asked = run_confined(root, environment, "-m", module, "no-such-role")
            named = [role.role for role in ROLES if role.module == module]
            known = asked.returncode == 2 and all(role in asked.stderr for role in named)
            wrong += _judge(f"{module} names its roles {', '.join(named)}", known, asked)
    return 1 if wrong else 0


def _environment(image: str) -> list[str]:
    found: list[str] = json.loads(_told("buildah", "inspect", "--type", "image", image))["OCIv1"]["config"]["Env"]
    return found


def _judge(claim: str, holds: bool, ran: subprocess.CompletedProcess[str]) -> int:
    print("ok  " if holds else "FAIL", claim, "" if holds else f"\n{ran.returncode} {ran.stdout}{ran.stderr}")
    return not holds


def _told(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
