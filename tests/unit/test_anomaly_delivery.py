"""What goes out of the hub: to public addresses only, signed, again later and later."""

import asyncio
import hashlib
import hmac
import ipaddress
from dataclasses import replace
from email.message import EmailMessage

import pytest

from services.anomaly import senders
from services.anomaly.contact_store import WAITING_COUNTED_MAX, Claimed
from services.anomaly.contacts import check_webhook
from services.anomaly.delivery import (
    ATTEMPTS_MAX,
    CLAIM_S,
    ERROR_CHARACTERS_MAX,
    PAUSE_S_MAX,
    RETRY_S_MAX,
    Contact,
    ContactKind,
    Delivery,
    DeliveryState,
    NotDelivered,
    retry_after_s,
    signature,
)
from services.anomaly.senders import MAIL_TIMEOUT_S, MailSender, WebhookSender, may_call, subject, text, webhook_body
from services.common.errors import Invalid
from services.common.sealing import Seal
from tests.alarms import ALARM

CONTACT = Contact(
    id="c" * 32, firm_id=1, name="shift", kind=ContactKind.WEBHOOK, address="https://localhost:9/x", secret="s"
)
DELIVERY = Delivery(
    id="d" * 32,
    firm_id=1,
    alarm_id="",
    transition="trial_1",
    contact_id=CONTACT.id,
    correlation_id="test",
    state=DeliveryState.PENDING,
    attempts=1,
    due_us=0,
    made_us=0,
    finished_us=None,
    last_error="",
)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("2002:7f00:1::", "::ffff:169.254.169.254", "fe80::1%eth0", "64:ff9b::7f00:1", "::7f00:1"),
        *("fec0::1", "192.0.0.8", "192.88.99.1", "::ffff:192.0.0.8"),
    ],
)
def test_addresses_that_are_not_public_are_not_called(address: str) -> None:
    assert not may_call(address, [])


def test_public_addresses_and_those_that_the_operator_allows_are_called() -> None:
    assert may_call("93.184.215.14", [])
    assert may_call("2606:4700::1111", [])
    assert may_call("10.2.0.5", [ipaddress.ip_network("10.2.0.0/16")])
    assert not may_call("10.3.0.5", [ipaddress.ip_network("10.2.0.0/16")])


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("https://localhost:9/x", "not public"),
        ("https://127.0.0.1:9/x", "not public"),
        ("https://[::1]:9/x", "not public"),
        ("https://0x7f000001:9/x", "not public"),
        ("https://name.invalid/x", "leads nowhere"),
        ("http://93.184.215.14/x", "Only https"),
    ],
)
async def test_a_webhook_to_a_private_place_is_refused_when_it_is_sent(address: str, why: str) -> None:
    sender = WebhookSender([], Seal())
    with pytest.raises(NotDelivered, match=why):
        await sender.send(Claimed(DELIVERY, replace(CONTACT, address=address), None), now_us=1)
    await sender.close()


@pytest.mark.parametrize(
    "address",
    [
        *("ftp://x.example", "https://", "https://u:p@x.example", "https://x.example/#a", "https://x.example/a b", "x"),
        *("https://x.example:99999/", "https://x.example/\n", "https://[x", "https://é.example/"),
    ],
)
def test_what_is_no_web_address_is_refused_when_it_is_written(address: str) -> None:
    with pytest.raises(Invalid):
        check_webhook(address)


def test_the_signature_covers_time_and_body() -> None:
    body = webhook_body(Claimed(DELIVERY, CONTACT, None))
    digest = hmac.new(b"s", b"1700000000." + body, hashlib.sha256).hexdigest()
    assert signature("s", timestamp_s=1_700_000_000, body=body) == f"v1={digest}"
    assert subject(Claimed(DELIVERY, CONTACT, None))
    assert text(Claimed(DELIVERY, CONTACT, None))


@pytest.mark.parametrize("name", ["=?utf-8?q?a=0aBcc:_z@x.yy?=", "==??utf-8?q?a=0a=0ab?=", "two\nlines"])
def test_a_name_adds_no_line_to_a_mail(name: str) -> None:
    message = EmailMessage()
    message["Subject"] = subject(
        Claimed(replace(DELIVERY, transition="raised"), CONTACT, replace(ALARM, signal_name=name))
    )
    lines = message.as_bytes().split(b"\n")
    assert [line for line in lines if line and not line.startswith((b"Subject:", b" "))] == []


def test_a_mail_says_how_many_wait_behind_it() -> None:
    raised = Claimed(replace(DELIVERY, transition="raised"), CONTACT, ALARM)
    assert "waiting" not in text(raised)
    assert "waiting for this address: 7 more\n" in text(replace(raised, waiting=7))
    assert "at least 1,000 more" in text(replace(raised, waiting=WAITING_COUNTED_MAX))


def test_what_a_server_says_can_be_stored() -> None:
    said = str(NotDelivered("stopp\udcfc\0" + "x" * 1_000))
    assert said.startswith("stopp\\udcfc x")
    assert len(said) == ERROR_CHARACTERS_MAX


async def test_a_mail_server_that_answers_slowly_does_not_outlast_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(senders, "MAIL_TIMEOUT_S", 0.3)

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 x\r\n")
        while await reader.readline():
            await asyncio.sleep(0.2)  # within the time for each command
            writer.write(b"250 x\r\n")
        writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        mail = MailSender(
            Seal(), host="127.0.0.1", port=server.sockets[0].getsockname()[1], sender="a@b.cc", tls="none"
        )
        with pytest.raises(NotDelivered):
            await mail.send(Claimed(DELIVERY, replace(CONTACT, address="x@y.zz"), None), now_us=1)
    assert CLAIM_S > MAIL_TIMEOUT_S


def test_tries_come_later_and_later_and_span_hours() -> None:
    waits = [retry_after_s(attempt, longest_s=RETRY_S_MAX) for attempt in range(1, ATTEMPTS_MAX)]
    assert 4 <= waits[0] <= 6
    assert max(waits) <= RETRY_S_MAX * 1.2
    assert 1.5 * 3600 < sum(waits) < 5 * 3600
    assert retry_after_s(1_000_000, longest_s=PAUSE_S_MAX) <= PAUSE_S_MAX * 1.2
