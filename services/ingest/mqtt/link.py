"""A connection to an MQTT 5 broker that acknowledges a message only when it is told to.

The usual clients for asyncio acknowledge on delivery and take in without limit. Here a QoS 1 message stays the broker's until
`ack`, and past a bound nothing more is read from the socket, which the broker feels as back-pressure.
"""

import asyncio
import ssl
import struct
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

CONNECT_TIMEOUT_S = 10
ANSWER_TIMEOUT_S = 10
KEEPALIVE_S = 30
# Unacknowledged QoS 1 messages that the broker may have on their way to us.
RECEIVE_MAX = 1_000
PACKET_BYTES_MAX = 1024 * 1024
# Past one of these the socket is not read until messages are taken.
WAITING_MESSAGES_MAX = 2_000
WAITING_BYTES_MAX = 8 * 1024 * 1024
FILTERS_PER_SUBSCRIBE_MAX = 200

TAKEN_OVER: Final = 0x8E

_CONNACK, _PUBLISH, _PUBACK, _SUBACK, _PINGRESP, _DISCONNECT = 2, 3, 4, 9, 13, 14
_REFUSED_FROM = 0x80
_SERVER_KEEPALIVE = 0x13
# Property identifiers by the form of their value.
_FORMS = (
    dict.fromkeys((0x01, 0x17, 0x19, 0x24, 0x25, 0x28, 0x29, 0x2A), "B")
    | dict.fromkeys((0x13, 0x21, 0x22, 0x23), ">H")
    | dict.fromkeys((0x02, 0x11, 0x18, 0x27), ">I")
    | dict.fromkeys((0x03, 0x08, 0x09, 0x12, 0x15, 0x16, 0x1A, 0x1C, 0x1F), "text")
    | {0x0B: "varint", 0x26: "pair"}
)


class LinkLost(Exception):
    """The connection to the broker is gone; what was not acknowledged comes again on the next one."""

    def __init__(self, detail: str, code: int = 0) -> None:
        self.code = code
        super().__init__(detail)


class LinkRefused(LinkLost):
    """The broker does not let us in or does not let us subscribe: look at user, password and access list."""


@dataclass(frozen=True)
class Received:
    """A message from the broker. packet_id 0: QoS 0, nothing to acknowledge; `is_again`: it was on its way to us before."""

    topic: str
    payload: bytes
    packet_id: int
    is_again: bool = False


@dataclass(frozen=True)
class Will:
    """What the broker publishes when the connection is lost without a goodbye (QoS 1, retained)."""

    topic: str
    payload: bytes


@dataclass(frozen=True)
class Broker:
    """Where the broker is, and as whom to come."""

    host: str
    port: int
    user: str = ""
    password: str = field(default="", repr=False)
    tls: bool = False
    # File of the certificate authority; empty: those of the system.
    ca: str = ""


class Link:
    """One connection, as a context manager. Every call raises LinkLost once the connection is gone."""

    def __init__(
        self,
        broker: Broker,
        *,
        client_id: str,
        session_expiry_s: int = 0,
        will: Will | None = None,
    ) -> None:
        """`session_expiry_s`: how long the broker keeps what is for us while we are away; 0: a clean session."""
        self._broker = broker
        self._client_id = client_id
        self._session_expiry_s = session_expiry_s
        self._will = will
        self._wire = _Wire()
        self._pinging: asyncio.Task[None] | None = None
        self._last_id = 0

    async def __aenter__(self) -> Self:
        """Raises LinkLost, LinkRefused."""
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context(cafile=self._broker.ca or None) if self._broker.tls else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await loop.create_connection(lambda: self._wire, self._broker.host, self._broker.port, ssl=context)
                self._wire.write(self._connect())
                code, properties = await self._wire.connected
        except (OSError, TimeoutError) as error:
            self._wire.abort()
            raise LinkLost(f"no answer from {self._broker.host}:{self._broker.port}: {error!r}") from error
        if code >= _REFUSED_FROM:
            self._wire.abort()
            raise LinkRefused(f"the broker refuses the connection with code 0x{code:02x}", code)
        keepalive_s = properties.get(_SERVER_KEEPALIVE, KEEPALIVE_S) or KEEPALIVE_S
        self._pinging = asyncio.create_task(self._ping(keepalive_s))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.gather(self._pinging, return_exceptions=True)
        self._wire.close()

    async def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe at QoS 1; retained messages come for new subscriptions only. Raises LinkRefused when one is not granted."""
        for first in range(0, len(filters), FILTERS_PER_SUBSCRIBE_MAX):
            part = filters[first : first + FILTERS_PER_SUBSCRIBE_MAX]
            packet_id = self._next_id()
            body = struct.pack(">HB", packet_id, 0) + b"".join(_text(one) + b"\x11" for one in part)
            answer = self._wire.expect(packet_id)
            self._wire.write(_packet(0x82, body))
            codes = await self._answered(answer)
            for name, code in zip(part, codes, strict=False):
                if code >= _REFUSED_FROM:
                    raise LinkRefused(f"the broker refuses the subscription {name!r} with code 0x{code:02x}", code)

    async def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        """Publish at QoS 0, or at QoS 1 and wait until the broker has it."""
        head = 0x30 | qos << 1 | retain
        if not qos:
            self._wire.write(_packet(head, _text(topic) + b"\x00" + payload))
            return
        packet_id = self._next_id()
        answer = self._wire.expect(packet_id)
        self._wire.write(_packet(head, _text(topic) + struct.pack(">HB", packet_id, 0) + payload))
        (code,) = await self._answered(answer)
        if code >= _REFUSED_FROM:
            raise LinkRefused(f"the broker refuses a message to {topic!r} with code 0x{code:02x}", code)

    async def messages(self, *, messages_max: int, timeout_s: float) -> list[Received]:
        """The next messages in order; none when none comes in time."""
        return await self._wire.take(messages_max, timeout_s)

    def ack(self, messages: Sequence[Received]) -> None:
        """Tell the broker that these are safe with us; in the order in which they came."""
        acks = (struct.pack(">BBH", 0x40, 2, message.packet_id) for message in messages if message.packet_id)
        self._wire.write(b"".join(acks))

    def _connect(self) -> bytes:
        flags = 0x00 if self._session_expiry_s else 0x02
        payload = _text(self._client_id)
        if self._will is not None:
            flags |= 0x04 | 0x08 | 0x20
            payload += b"\x00" + _text(self._will.topic) + _binary(self._will.payload)
        if self._broker.user:
            flags |= 0x80 | 0x40
            payload += _text(self._broker.user) + _binary(self._broker.password.encode())
        properties = struct.pack(">BIBHBI", 0x11, self._session_expiry_s, 0x21, RECEIVE_MAX, 0x27, PACKET_BYTES_MAX)
        head = _text("MQTT") + struct.pack(">BBHB", 5, flags, KEEPALIVE_S, len(properties))
        return _packet(0x10, head + properties + payload)

    async def _answered(self, answer: "asyncio.Future[bytes]") -> bytes:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await answer
        except TimeoutError as error:
            self._wire.abort()
            raise LinkLost(f"the broker did not answer in {ANSWER_TIMEOUT_S} s") from error

    def _next_id(self) -> int:
        self._last_id = self._last_id % 65_535 + 1
        return self._last_id

    async def _ping(self, keepalive_s: int) -> None:
        while True:
            await asyncio.sleep(keepalive_s / 2)
            if self._wire.silent_s > keepalive_s * 1.5:
                self._wire.abort()
                return
            with suppress(LinkLost):
                self._wire.write(b"\xc0\x00")


class _Wire(asyncio.Protocol):
    """Bytes to packets and back."""

    def __init__(self) -> None:
        self.connected: asyncio.Future[tuple[int, dict[int, int]]] = asyncio.get_running_loop().create_future()
        # A connection that breaks while nobody waits for it leaves nobody to look.
        self.connected.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: deque[Received] = deque()
        self._waiting_bytes = 0
        self._arrived = asyncio.Event()
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._lost: LinkLost | None = None
        self._is_paused = False
        self._heard_s = time.monotonic()

    @property
    def silent_s(self) -> float:
        """For how long the broker has said nothing; 0 while it is we who do not listen."""
        return 0.0 if self._is_paused else time.monotonic() - self._heard_s

    # What the link does.

    def write(self, packet: bytes) -> None:
        if self._lost is not None:
            raise self._lost
        assert self._transport is not None
        if packet:
            self._transport.write(packet)

    def expect(self, packet_id: int) -> "asyncio.Future[bytes]":
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._answers[packet_id] = answer
        return answer

    async def take(self, messages_max: int, timeout_s: float) -> list[Received]:
        if not self._waiting and self._lost is None:
            self._arrived.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
        if self._lost is not None:
            raise self._lost
        taken = [self._waiting.popleft() for _ in range(min(messages_max, len(self._waiting)))]
        self._waiting_bytes -= sum(len(message.payload) for message in taken)
        if self._is_paused and not self._is_full():
            assert self._transport is not None
            self._is_paused, self._heard_s = False, time.monotonic()
            self._transport.resume_reading()
        return taken

    def close(self) -> None:
        if self._transport is not None and self._lost is None:
            self._transport.write(b"\xe0\x00")
            self._transport.close()
        self._lose(LinkLost("closed by us"))

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        self._lose(LinkLost("the broker says nothing"))

    # What the loop does.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._lose(LinkLost(f"the connection broke: {error!r}"))

    def data_received(self, data: bytes) -> None:
        self._heard_s = time.monotonic()
        self._buffer += data
        try:
            self._read_packets()
        except (IndexError, struct.error, UnicodeDecodeError, ValueError) as error:
            self._lose(LinkLost(f"the broker sent something that is not MQTT 5: {error!r}"))
            assert self._transport is not None
            self._transport.abort()
        if self._is_full() and not self._is_paused and self._lost is None:
            assert self._transport is not None
            self._is_paused = True
            self._transport.pause_reading()

    def _is_full(self) -> bool:
        return len(self._waiting) >= WAITING_MESSAGES_MAX or self._waiting_bytes >= WAITING_BYTES_MAX

    def _read_packets(self) -> None:
        buffer, at = bytes(self._buffer), 0
        while len(buffer) - at >= 2:
            size, start = _varint(buffer, at + 1)
            if size is not None and size > PACKET_BYTES_MAX:
                raise ValueError(f"a packet of {size} bytes")
            if size is None or start + size > len(buffer):
                break
            self._packet(buffer[at], buffer[start : start + size])
            at = start + size
        del self._buffer[:at]

    def _packet(self, head: int, body: bytes) -> None:
        kind = head >> 4
        if kind == _PUBLISH:
            self._published(head, body)
        elif kind == _PUBACK:
            self._answer(body, body[2:3] or b"\x00")
        elif kind == _SUBACK:
            size, start = _whole_varint(body, 2)
            self._answer(body, body[start + size :])
        elif kind == _CONNACK and not self.connected.done():
            self.connected.set_result((body[1], _properties(body, 2)))
        elif kind == _DISCONNECT:
            code = body[0] if body else 0
            self._lose(LinkLost(f"the broker closed the connection with code 0x{code:02x}", code))
        elif kind != _PINGRESP:
            raise ValueError(f"packet of kind {kind}")

    def _published(self, head: int, body: bytes) -> None:
        (length,) = struct.unpack_from(">H", body)
        at = 2 + length
        topic = body[2:at].decode()
        packet_id = 0
        if head & 0x06:
            (packet_id,) = struct.unpack_from(">H", body, at)
            at += 2
        size, at = _whole_varint(body, at)
        message = Received(topic, body[at + size :], packet_id, bool(head & 0x08))
        self._waiting.append(message)
        self._waiting_bytes += len(message.payload)
        self._arrived.set()

    def _answer(self, body: bytes, codes: bytes) -> None:
        (packet_id,) = struct.unpack_from(">H", body)
        answer = self._answers.pop(packet_id, None)
        if answer is not None and not answer.done():
            answer.set_result(codes)

    def _lose(self, why: LinkLost) -> None:
        if self._lost is None:
            self._lost = why
        if not self.connected.done():
            self.connected.set_exception(self._lost)
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._lost)
        self._answers.clear()
        # Unacknowledged: they come again on the next connection.
        self._waiting.clear()
        self._arrived.set()


def _packet(head: int, body: bytes) -> bytes:
    size, sizes = len(body), bytearray()
    while size > 0x7F:
        sizes.append(size & 0x7F | 0x80)
        size >>= 7
    sizes.append(size)
    return bytes((head, *sizes)) + body


def _text(text: str) -> bytes:
    return _binary(text.encode())


def _binary(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def _varint(data: bytes, at: int) -> tuple[int | None, int]:
    """The number and where it ends; None where its end has not come yet. Raises ValueError."""
    value = 0
    for shift in (0, 7, 14, 21):
        if at >= len(data):
            return None, at
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a length of more than four bytes")


def _whole_varint(data: bytes, at: int) -> tuple[int, int]:
    value, end = _varint(data, at)
    if value is None:
        raise ValueError("a packet ends too early")
    return value, end


def _properties(body: bytes, at: int) -> dict[int, int]:
    """The properties that are numbers."""
    size, at = _whole_varint(body, at)
    end, found = at + size, {}
    while at < end:
        identifier, at = body[at], at + 1
        form = _FORMS.get(identifier, "")
        if form in ("text", "pair"):
            for _ in range(2 if form == "pair" else 1):
                at += 2 + struct.unpack_from(">H", body, at)[0]
        elif form == "varint":
            found[identifier], at = _whole_varint(body, at)
        elif form:
            (found[identifier],) = struct.unpack_from(form, body, at)
            at += struct.calcsize(form)
        else:
            raise ValueError(f"property 0x{identifier:02x}")
    return found
