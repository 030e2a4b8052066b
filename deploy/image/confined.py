"""Runs the built image as confined as on the cluster: read-only root, uid 10001, no capability, no new privileges, no network.

Usage (as root): python -m deploy.image.confined [IMAGE]. Every module of every service must load, so nothing that a process needs
was left out; and every command must know its roles.
"""

import json
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from localstack.hub import ROLES

IMAGE = "localhost/smdih-hub:dev"
UID = 10001
DEADLINE_S = 180
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
