"""A real Prometheus on this machine, with the project's own rules, scraping a hub's processes."""

import asyncio
import json
import math
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from localstack.servers import ROOT, ServersError, free_port

CONFIG = ROOT / "deploy" / "prometheus" / "prometheus.yml"
START_TIMEOUT_S = 20
STOP_TIMEOUT_S = 10


def write_targets(path: Path, processes: Mapping[str, str]) -> None:
    """Where the processes are (name to address), for a `file_sd_configs` of Prometheus; each is an instance of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = [
        {"targets": [address.removeprefix("http://")], "labels": {"instance": name}}
        for name, address in processes.items()
    ]
    path.write_text(json.dumps(found, indent=1) + "\n")


class Prometheus:
    """Runs within the context; everything it writes is in `folder`."""

    def __init__(self, folder: Path, processes: Mapping[str, str], *, interval_s: int = 1) -> None:
        self._folder = folder
        self._processes = processes
        self._interval_s = interval_s
        self._process: subprocess.Popen[bytes] | None = None
        self._client = httpx.AsyncClient(timeout=30)
        self.started_s = time.time()

    async def __aenter__(self) -> Self:
        """Raises ServersError."""
        program = shutil.which("prometheus")
        if program is None:
            raise ServersError("Prometheus is not installed: run `make setup`, or apt-get install prometheus")
        self._folder.mkdir(parents=True, exist_ok=True)
        targets = self._folder / "targets.json"
        write_targets(targets, self._processes)
        # The project's own configuration, with what differs here: how often, and where the targets stand.
        config = CONFIG.read_text().replace("interval: 15s", f"interval: {self._interval_s}s")
        config = config.replace("../../.local/prometheus-targets.json", str(targets))
        config = config.replace("rules.yml", str(CONFIG.parent / "rules.yml"))
        (self._folder / "prometheus.yml").write_text(config)
        port = free_port()
        self._client.base_url = httpx.URL(f"http://127.0.0.1:{port}")
        with (self._folder / "prometheus.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={self._folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + START_TIMEOUT_S
        while not await self._is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                raise ServersError(f"Prometheus did not start: see {self._folder / 'prometheus.log'}")
            await asyncio.sleep(0.1)
        self.started_s = time.time()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    async def series(self, expr: str) -> list[dict[str, Any]]:
        """What the expression was since the start, as a dashboard asks: each series with its numbers. Raises ValueError."""
        now_s = time.time()
        answer = await self._client.post(
            "/api/v1/query_range", data={"query": expr, "start": self.started_s, "end": now_s, "step": 2}
        )
        found = answer.json()
        if found["status"] != "success":
            raise ValueError(f"{expr}: {found['error']}")
        return [
            {"labels": one["metric"], "values": [float(value) for _, value in one["values"]]}
            for one in found["data"]["result"]
        ]

    async def has_data(self, expr: str) -> bool:
        """Whether the expression was a number at any time. Raises ValueError."""
        return any(math.isfinite(value) for one in await self.series(expr) for value in one["values"])

    async def names(self) -> set[str]:
        """Names of all metrics that have come."""
        answer = await self._client.get("/api/v1/label/__name__/values")
        return set(answer.json()["data"])

    async def rules(self) -> list[dict[str, Any]]:
        """The rules, with their health and state."""
        answer = await self._client.get("/api/v1/rules")
        return [rule for group in answer.json()["data"]["groups"] for rule in group["rules"]]

    async def _is_ready(self) -> bool:
        try:
            return (await self._client.get("/-/ready")).status_code == 200
        except httpx.HTTPError:
            return False
