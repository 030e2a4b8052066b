"""The two ways out of the hub: signed webhooks, to public addresses only, and mail."""

import asyncio
import ipaddress
import json
import math
import socket
import ssl
from collections.abc import Iterable, Sequence
from email.message import EmailMessage
from typing import Any
from urllib.parse import urlsplit

import aiosmtplib
import httpcore

from services.anomaly.contact_store import WAITING_COUNTED_MAX, Claimed
from services.anomaly.delivery import Contact, NotDelivered, signature
from services.anomaly.messages import alarm_message
from services.common.clock import from_us
from services.common.logs import get_logger
from services.common.sealing import Seal, Unreadable

log = get_logger(__name__)

TRY_TIMEOUT_S = 10
# A mail server is asked eight things, each within TRY_TIMEOUT_S; all of them together, less than a claim lasts.
MAIL_TIMEOUT_S = 30
ANSWER_BYTES_MAX = 64 * 1024
USER_AGENT = "smdih-alarms/1"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# What Python counts as global and is not for us: a gateway turns the first into any IPv4 address, also private ones; the others
# are for sites (deprecated), for relays from IPv6 (deprecated), and a dummy.
_NOT_PUBLIC = [ipaddress.ip_network(text) for text in ("64:ff9b::/96", "fec0::/10", "192.88.99.0/24", "192.0.0.0/24")]


class Forbidden(Exception):
    """The address is not one that the hub calls."""


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only. A name is resolved once, every address it has is judged, and that address is connected
    to: a name that leads elsewhere the next moment gains nothing."""

    def __init__(self, allowed: Sequence[Network]) -> None:
        self._allowed = allowed
        self._backend = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"the name {host} leads nowhere") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not may_call(address, self._allowed):
                raise Forbidden(f"{host} leads to an address that is not public")
        *others, last = addresses
        for address in others:
            try:
                return await self._backend.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                continue  # a machine without IPv6 has such addresses all the same
        return await self._backend.connect_tcp(last, port, timeout, local_address, socket_options)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def may_call(address: str, allowed: Sequence[Network]) -> bool:
    """Public addresses, and those that the operator allows. An IPv4 address in IPv6 clothes is judged as what it is."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        ip = ip.ipv4_mapped or ip.sixtofour or ip
    if any(ip.version == network.version and ip in network for network in allowed):
        return True
    return (
        ip.is_global
        and not ip.is_multicast
        and not ip.is_reserved
        and not any(ip in network for network in _NOT_PUBLIC)
    )


def is_allowed_literal(host: str, allowed: Sequence[Network]) -> bool:
    try:
        return any(ipaddress.ip_address(host) in network for network in allowed)
    except (ValueError, TypeError):
        return False


class WebhookSender:
    """POSTs to contacts; nothing is followed, and of the answer only the status counts."""

    def __init__(self, allowed: Sequence[Network], seal: Seal) -> None:
        self._allowed = allowed
        self._seal = seal
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl.create_default_context(),
            max_connections=50,
            keepalive_expiry=15,
            network_backend=GuardedBackend(allowed),
        )

    async def close(self) -> None:
        await self._pool.aclose()

    async def send(self, claimed: Claimed, *, now_us: int) -> None:
        """Raises NotDelivered."""
        contact = claimed.contact
        url = urlsplit(contact.address)
        if url.scheme != "https" and not is_allowed_literal(url.hostname or "", self._allowed):
            raise NotDelivered("Only https addresses are called.")
        secret = _opened(self._seal, contact)
        body = webhook_body(claimed)
        timestamp_s = now_us // 1_000_000
        headers: dict[bytes | str, bytes | str] = {
            "Content-Type": "application/json",
            "User-Agent": USER_AGENT,
            "X-SMDIH-Delivery": claimed.delivery.id,
            "X-SMDIH-Timestamp": str(timestamp_s),
            "X-SMDIH-Signature": signature(secret, timestamp_s=timestamp_s, body=body),
            "X-SMDIH-Waiting": str(claimed.waiting),
            "X-Correlation-Id": claimed.delivery.correlation_id,
        }
        timeouts = dict.fromkeys(("connect", "read", "write", "pool"), float(TRY_TIMEOUT_S))
        try:
            async with (
                asyncio.timeout(TRY_TIMEOUT_S),
                self._pool.stream(
                    "POST", contact.address, headers=headers, content=body, extensions={"timeout": timeouts}
                ) as answer,
            ):
                read = 0
                async for part in answer.aiter_stream():
                    read += len(part)
                    if read > ANSWER_BYTES_MAX:
                        break
                status = answer.status
        except Forbidden as error:
            raise NotDelivered(f"Not called: {error}.") from error
        except TimeoutError as error:
            raise NotDelivered(f"No answer within {TRY_TIMEOUT_S} s.") from error
        except (httpcore.NetworkError, httpcore.TimeoutException, httpcore.ProtocolError, OSError) as error:
            raise NotDelivered(f"No answer: {type(error).__name__} {error}") from error
        except (ValueError, httpcore.UnsupportedProtocol) as error:  # an address that no request can be made of
            raise NotDelivered("The address cannot be called.") from error
        if not 200 <= status < 300:
            raise NotDelivered(f"Answered with status {status}.")


class MailSender:
    """Sends mail through the operator's server."""

    def __init__(
        self,
        seal: Seal,
        *,
        host: str,
        port: int,
        sender: str,
        username: str = "",
        password: str = "",
        tls: str = "starttls",
    ) -> None:
        self._seal = seal
        self._host = host
        self._port = port
        self._sender = sender
        self._login = {"username": username, "password": password} if username else {}
        self._tls = tls

    async def send(self, claimed: Claimed, *, now_us: int) -> None:
        """Raises NotDelivered."""
        if not self._host:
            raise NotDelivered("This hub was not told how to send mail.")
        message = EmailMessage()
        message["From"] = self._sender
        message["To"] = claimed.contact.address
        message["Subject"] = subject(claimed) if claimed.contact.confirmed else "Code for messages about alarms"
        message["Message-ID"] = f"<{claimed.delivery.id}@smdih>"
        message["Date"] = from_us(now_us)
        message["Auto-Submitted"] = "auto-generated"
        message["X-SMDIH-Delivery"] = claimed.delivery.id
        message.set_content(
            text(claimed) if claimed.contact.confirmed else code_text(_opened(self._seal, claimed.contact))
        )
        try:
            async with asyncio.timeout(MAIL_TIMEOUT_S):
                await aiosmtplib.send(
                    message,
                    hostname=self._host,
                    port=self._port,
                    timeout=TRY_TIMEOUT_S,
                    use_tls=self._tls == "tls",
                    start_tls=self._tls == "starttls",
                    **self._login,  # type: ignore[arg-type]
                )
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            raise NotDelivered(f"The mail server did not take it: {error}") from error


def _opened(seal: Seal, contact: Contact) -> str:
    try:
        return seal.open(contact.secret, of=contact.id)
    except Unreadable as error:
        raise NotDelivered("The hub cannot read the contact's secret; its operator has to look.") from error


def webhook_body(claimed: Claimed) -> bytes:
    """The same bytes at every try, as long as the alarm does not change."""
    delivery = claimed.delivery
    body: dict[str, Any] = {
        "delivery_id": delivery.id,
        "transition": delivery.transition if delivery.alarm_id else "trial",
        "contact": claimed.contact.name,
        "alarm": None,
    }
    if claimed.alarm is not None:
        alarm = alarm_message(claimed.alarm)
        body["alarm"] = {
            name: getattr(alarm, name)
            for name in (
                *("id", "firm_id", "machine_id", "signal_id", "machine_path", "machine_kind", "signal_name", "unit"),
                *("started_us", "component", "explanation", "active", "acknowledged", "cleared", "assignee"),
                *("episode_id", "correlation_id", "rule_id"),
            )
        } | {
            "severity": claimed.alarm.severity.name.lower(),
            "state": claimed.alarm.state.value,
            "ended_us": claimed.alarm.ended_us,
            "value": claimed.alarm.value if math.isfinite(claimed.alarm.value) else None,
        }
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def subject(claimed: Claimed) -> str:
    alarm = claimed.alarm
    if alarm is None:
        return "Trial message of the alarms"
    what = (
        claimed.delivery.transition.partition("_")[0]
        if claimed.delivery.transition != "back_on_list"
        else "back on the list"
    )
    source = " of ".join(part for part in (alarm.signal_name, alarm.machine_path) if part)
    line = " ".join(f"[{alarm.severity.name.lower()}] {what}: {source}".split())
    # A mail header would take what follows for encoded text, which may hold line ends.
    return line.replace("=?", "= ?")[:200]


def text(claimed: Claimed) -> str:
    alarm = claimed.alarm
    if alarm is None:
        return "This is a trial: messages about alarms reach this address.\n"
    lines = [
        alarm.explanation,
        "",
        f"machine: {alarm.machine_path}",
        f"started: {from_us(alarm.started_us).isoformat(timespec='seconds')}",
        f"ended: {from_us(alarm.ended_us).isoformat(timespec='seconds') if alarm.ended_us else 'not yet'}",
        f"severity: {alarm.severity.name.lower()}",
        f"state: {alarm.state.value.replace('_', ' ')}",
        f"alarm: {alarm.id}",
    ]
    if claimed.waiting:  # in a flood the list of alarms tells sooner than the messages
        at_least = "at least " * (claimed.waiting == WAITING_COUNTED_MAX)
        lines += ["", f"waiting for this address: {at_least}{claimed.waiting:,} more"]
    return "\n".join(lines) + "\n"


def code_text(code: str) -> str:
    """No word of it is the firm's: whoever reads this may have nothing to do with it."""
    return (
        "Somebody wants messages about alarms of machines sent to this address. If you know of it, give them this code:\n\n"
        f"    {code}\n\nIf not, do nothing: no such message is sent without the code.\n"
    )
