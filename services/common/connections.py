"""Connections within limits: how many, and how long one of HTTP may say nothing.

What a door holds for a connection is small, but it is held for whoever opens one, before any key is looked at. So a connection has
to begin a request in time; where there are too many the new ones are told to come again, while those that are there go on.
"""

import asyncio
from asyncio import sslproto
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import h11
from prometheus_client import Counter
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from services.common.logs import get_logger

log = get_logger(__name__)

# One takes 9 kB, with TLS 55 kB (measured): 275 MB when all are there. 10,000 gateways that keep one have room on two doors.
CONNECTIONS_MAX: Final = 5_000
# From the connection, or from the answer before, to the last line of a request's head.
REQUEST_HEAD_S: Final = 20
# Longer than clients (5 s) and load balancers (60 s) keep an idle connection: the side that sends must be the one that closes, or
# a request now and then meets a connection that is just being closed.
KEEP_ALIVE_S: Final = 75
# asyncio keeps so many bytes to read into for each TLS connection, 256 KiB by itself: a record of TLS has 16 at most.
TLS_BUFFER_BYTES: Final = 32 * 1024

# Connections that were not served, by why: told to come again, not even told (twice the limit), or closed as they said nothing.
refused_total = Counter("smdih_http_connections_refused_total", "HTTP connections not served", ["reason"])
for _reason in ("full", "unheard", "silent"):
    refused_total.labels(_reason)

_SOCKETS = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_ESTABLISHED = "01"


def established(port: int) -> int:
    """How many connections to this port the kernel holds; of a server whose library does not tell. 0 where there is no Linux."""
    at_port, found = f":{port:04X}", 0
    for sockets in _SOCKETS:
        if sockets.exists():
            # Each line: number, local address, remote address, state, ...
            for line in sockets.read_text().splitlines()[1:]:
                _, local, _, state, *_ = line.split(maxsplit=4)
                found += state == _ESTABLISHED and local.endswith(at_port)
    return found


@dataclass(frozen=True)
class Limits:
    connections_max: int = CONNECTIONS_MAX
    request_head_s: float = REQUEST_HEAD_S


LIMITS: Final = Limits()


def with_small_buffers() -> None:
    """For all TLS connections of this process from now on."""
    sslproto.SSLProtocol.max_size = TLS_BUFFER_BYTES


class LimitedConnection(H11Protocol):
    """`full`: answers instead of the application on connections past the limit."""

    def __init__(self, *args: Any, limits: Limits, full: ASGIApp, **more: Any) -> None:
        super().__init__(*args, **more)
        self._limits = limits
        self._full = full
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        here = len(self.connections)
        if here > 2 * self._limits.connections_max:
            refused_total.labels("unheard").inc()
            transport.abort()
        elif here > self._limits.connections_max:
            refused_total.labels("full").inc()
            self.app = self._full
        self._wait(self._limits.request_head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._heard()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._heard()

    def on_response_complete(self) -> None:
        # Before the rest of it: a request that stands behind this one is taken up there. Of a body that was refused unread the rest
        # is let go by, so that its sender hears why, but not for as long as an idle connection is kept.
        is_unread = self.conn.their_state is h11.SEND_BODY
        self._wait(self._limits.request_head_s + (0 if is_unread else self.timeout_keep_alive))
        super().on_response_complete()

    def _wait(self, seconds: float) -> None:
        self._heard()
        self._waiting = self.loop.call_later(seconds, self._is_silent)

    def _heard(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _is_silent(self) -> None:
        if not self.transport.is_closing():
            refused_total.labels("silent").inc()
            self.transport.close()
