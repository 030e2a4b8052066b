"""A real Mosquitto on this machine for the MQTT bridge: its own port, accounts and access list."""

import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from localstack.servers import ServersError, listens, port_again

START_TIMEOUT_S = 10
STOP_TIMEOUT_S = 10
# The bridge's account; with an underscore it can be no firm's short name.
BRIDGE = "smdih_bridge"

# docs/mqtt.md explains each line; a test compares the two.
CONFIG = """\
persistence true
autosave_interval 30
max_inflight_messages 1000
max_queued_messages 0
max_queued_bytes 1073741824
max_packet_size 1048576
queue_qos0_messages true
upgrade_outgoing_qos true
allow_anonymous false
"""
ACCESS = """\
user smdih_bridge
topic read smdih/v1/#
topic read spBv1.0/#
topic write spBv1.0/+/NCMD/#
topic write spBv1.0/STATE/#

pattern write smdih/v1/%u/#
pattern readwrite spBv1.0/%u/#
pattern read spBv1.0/STATE/#
"""


def program() -> str | None:
    """Where the broker is installed, if it is."""
    return shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")


class Mosquitto:
    """One broker with its data in a folder; found again and stopped by who started it."""

    def __init__(self, folder: Path, *, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.host = host
        self._state_file = folder / "mosquitto.json"
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.passwords: dict[str, str] = {}

    def start(self, firms: Mapping[str, str] | None = None, *, more: str = "") -> None:
        """Start with an account for the bridge and one for each firm (short name to password). Raises ServersError.

        `more`: lines for the listener.
        """
        path = program()
        if path is None:
            raise ServersError("Mosquitto is not installed: run `make setup`, or apt-get install mosquitto")
        self.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port_again(self.port or None)
        self.passwords = {BRIDGE: self.passwords.get(BRIDGE) or secrets.token_urlsafe(16), **(firms or {})}
        self._write_accounts()
        (self.folder / "access").write_text(ACCESS)
        (self.folder / "mosquitto.conf").write_text(
            CONFIG + f"listener {self.port} {self.host}\n{more}persistence_location {self.folder}/\n"
            f"password_file {self.folder}/passwords\nacl_file {self.folder}/access\nuser root\n"
        )
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen(
                [path, "-c", str(self.folder / "mosquitto.conf")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        started = psutil.Process(self._process.pid).create_time()
        self._state_file.write_text(json.dumps({"pid": self._process.pid, "started": started}))
        until = time.monotonic() + START_TIMEOUT_S
        while not listens(self.port, self.host):
            if self._process.poll() is not None or time.monotonic() > until:
                raise ServersError(f"Mosquitto did not start: see {self.folder / 'mosquitto.log'}")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop politely; what waits for the bridge is kept on disk."""
        process = self._running()
        if process is not None:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT_S)
            except psutil.TimeoutExpired:
                process.kill()
        if self._process is not None:
            self._process.wait()
            self._process = None
        self._state_file.unlink(missing_ok=True)

    def _write_accounts(self) -> None:
        path = self.folder / "passwords"
        path.write_text("".join(f"{user}:{password}\n" for user, password in self.passwords.items()))
        path.chmod(0o600)
        subprocess.run(["mosquitto_passwd", "-U", str(path)], check=True, capture_output=True)

    def _running(self) -> psutil.Process | None:
        try:
            state = json.loads(self._state_file.read_text())
            process = psutil.Process(state["pid"])
            # A process id alone may have been given to someone else since.
            return process if abs(process.create_time() - state["started"]) < 0.01 else None
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            return None
