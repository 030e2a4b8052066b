"""Telling contacts of alarms: real notifiers, a real database, a receiver and a mail server of the test."""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from aiosmtpd.controller import Controller

from localstack.servers import free_port
from services.anomaly.contact_store import SENT_KEPT_DAYS
from services.anomaly.contacts import CODE_DIGITS, CODE_TRIES_MAX, CODES_A_DAY_MAX, CONTACTS_MAX, TRIALS_MAX
from services.anomaly.delivery import ATTEMPTS_MAX, GIVE_UP_S, MESSAGES_A_MINUTE_MAX
from services.anomaly.domain import Alarm, Return, Severity, alarm_id
from services.anomaly.store import AlarmStore
from services.common.clock import from_us
from services.common.database import Pool, create_pool, transaction
from services.common.identity import Role
from services.common.kafka import Publisher
from services.common.sealing import Seal, new_key
from services.common.settings import Settings
from smdih.anomaly.v1 import notification_pb2 as pb
from smdih.anomaly.v1 import notification_pb2_grpc as pb_grpc
from tests import anomaly_plant as plant
from tests.polling import eventually

FIRM, OTHER_FIRM = 7, 8


@dataclass
class Receiver:
    """Takes webhooks; answers with `status` once `answering` is set."""

    port: int = 0
    status: int = 204
    answering: asyncio.Event = field(default_factory=asyncio.Event)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                headers = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
                self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
                await self.answering.wait()
                writer.write(f"HTTP/1.1 {self.status} x\r\ncontent-length: 0\r\n\r\n".encode())
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def of(self, alarm: Alarm) -> list[str]:
        bodies = [json.loads(body) for _, body in self.got]
        return [body["transition"] for body in bodies if (body["alarm"] or {}).get("id") == alarm.id]


class Mailbox:
    """A mail server's memory."""

    def __init__(self) -> None:
        self.got: list[Message] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:
        self.got.append(message_from_bytes(envelope.content))
        return "250 OK"


@dataclass
class Hub:
    settings: Settings
    logs: Path
    environment: dict[str, str]
    http: httpx.AsyncClient
    grpc: str
    pool: Pool
    receiver: Receiver
    mailbox: Mailbox
    firm: str
    other_firm: str
    device: str
    notifiers: list[plant.Process]
    started_us: int = 0

    async def notifier(self) -> plant.Process:
        log = self.logs / f"notifier-{time.monotonic_ns()}.log"
        made = await plant.start_process("notifier", self.settings, log, **self.environment)
        self.notifiers.append(made)
        return made

    async def call(self, method: str, path: str, *, status: int = 200, key: str = "", **body: Any) -> Any:
        headers = {"authorization": f"Bearer {key or self.firm}"}
        given: dict[str, Any] = {"json": body} if method == "POST" else {"params": body}
        answer = await self.http.request(method, path, headers=headers, **given)
        assert answer.status_code == status, answer.text
        return answer.json() if answer.content else None

    async def webhook(self) -> tuple[str, str]:
        """(contact, secret)."""
        address = f"http://127.0.0.1:{self.receiver.port}/alarms"
        made = await self.call("POST", "/v1/contacts", status=201, name="shift", kind="webhook", address=address)
        return made["contact"]["id"], made["secret"]

    async def mail(self, address: str) -> str:
        """A contact that is confirmed by the code that came."""
        made = await self.call("POST", "/v1/contacts", status=201, name="mail", kind="email", address=address)
        contact = str(made["contact"]["id"])
        assert (made["secret"], made["contact"]["confirmed"]) == ("", False)
        confirmed = await self.call("POST", f"/v1/contacts/{contact}/confirm", code=f" {await self.code(address)}\n")
        assert confirmed["confirmed"]
        return contact

    async def code(self, address: str) -> str:
        """The newest that came to an address."""

        async def has_come() -> bool:
            return any(message["To"] == address for message in self.mailbox.got)

        await eventually(has_come)
        newest = next(message for message in reversed(self.mailbox.got) if message["To"] == address)
        return str(newest.get_payload()).split("code:")[1].split()[0]

    async def escalation(self, *steps: tuple[int, str], site: str, **given: Any) -> str:
        parts = [{"after_s": after_s, "contact_ids": [contact]} for after_s, contact in steps]
        made = await self.call("POST", "/v1/escalations", status=201, name="test", site=site, steps=parts, **given)
        return str(made["id"])

    async def raised(self, site: str, severity: Severity = Severity.MEDIUM, *, age_s: int = 0) -> Alarm:
        """An alarm; `age_s`: of history, which came late."""
        alarm = self.new_alarm(site, severity, age_s=age_s)
        async with transaction(self.pool) as connection:
            stored = await AlarmStore().raise_alarm(connection, alarm, now_us=time.time_ns() // 1000)
        assert stored is not None
        return stored

    def new_alarm(self, site: str, severity: Severity = Severity.MEDIUM, *, age_s: int = 0) -> Alarm:
        self.started_us = max(self.started_us + 1, time.time_ns() // 1000)
        started_us = self.started_us - age_s * 1_000_000
        return Alarm(
            id=alarm_id(machine_id=1, position=0, started_us=started_us),
            firm_id=FIRM,
            machine_id=1,
            position=0,
            signal_id=1000,
            machine_path=f"acme/{site}/press",
            machine_kind="press",
            signal_name="temperature",
            unit="degC",
            started_us=started_us,
            ended_us=None,
            severity=severity,
            component="record",
            explanation="too hot",
            value=float("nan"),
            score=5.0,
            shares=(),
            correlation_id="test",
            episode_id="",
        )

    async def ends(self, alarm: Alarm) -> None:
        async with transaction(self.pool) as connection:
            over = Return(alarm_id=alarm.id, ended_us=alarm.started_us + 1, correlation_id="")
            await AlarmStore().end_alarm(connection, over, now_us=time.time_ns() // 1000)

    async def deliveries(self, alarm: Alarm) -> list[dict[str, Any]]:
        found = await self.call("GET", "/v1/deliveries", alarm_id=alarm.id)
        return list(reversed(found["deliveries"]))

    async def becomes(self, alarm: Alarm, *expected: tuple[str, str]) -> None:
        async def has_become() -> bool:
            found = [(one["transition"], one["state"]) for one in await self.deliveries(alarm)]
            return sorted(found) == sorted(expected)

        await eventually(has_become)


@pytest_asyncio.fixture(scope="module")
async def hub(settings: Settings, publisher: Publisher, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hub]:
    logs = tmp_path_factory.mktemp("logs")
    keys = [
        await plant.publish_key(publisher, credential_id=1, role=Role.FIRM, firm_id=FIRM),
        await plant.publish_key(publisher, credential_id=2, role=Role.FIRM, firm_id=OTHER_FIRM),
        await plant.publish_key(publisher, credential_id=3, role=Role.DEVICE, firm_id=FIRM),
    ]
    receiver, mailbox = Receiver(), Mailbox()
    receiver.answering.set()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    mail = Controller(mailbox, hostname="127.0.0.1", port=free_port())
    mail.start()
    environment = {
        "SMDIH_ANOMALY_WEBHOOK_NETWORKS": '["127.0.0.0/8"]',
        "SMDIH_ANOMALY_SMTP_HOST": "127.0.0.1",
        "SMDIH_ANOMALY_SMTP_PORT": str(mail.port),
        "SMDIH_ANOMALY_SMTP_TLS": "none",
        "SMDIH_ANOMALY_SEAL_KEYS": new_key(),
    }
    pool = await create_pool(settings.database_dsn, schema="anomaly", size_max=2)
    async with (
        plant.running("api", settings, logs / "api.log", **environment) as api,
        httpx.AsyncClient(base_url=api.http, timeout=30) as client,
    ):
        made = Hub(
            settings, logs, environment, client, api.grpc, pool, receiver, mailbox, keys[0], keys[1], keys[2], []
        )
        await asyncio.gather(made.notifier(), made.notifier())
        yield made
        for one in made.notifiers:
            if one.process.returncode is None:
                one.process.terminate()
                assert await one.ended(deadline_s=30) == 0, one.log.read_text()
    await pool.close()
    await asyncio.to_thread(mail.stop)
    server.close()


async def test_contacts_are_told_once_each_signed_and_in_order_of_steps(hub: Hub) -> None:
    contact, secret = await hub.webhook()
    second, _ = await hub.webhook()
    await hub.escalation((0, contact), (1, second), (2, contact), site="north", tell_changes=True)
    quiet = await hub.raised("north", Severity.LOW)
    await hub.call("POST", f"/v1/alarms/{quiet.id}/acknowledge")
    await hub.becomes(quiet, ("raised", "sent"), ("acknowledged", "sent"))
    alarm = await hub.raised("north")
    other_site = await hub.raised("south")
    await hub.becomes(alarm, ("raised", "sent"), ("escalated_1", "sent"), ("escalated_2", "sent"))
    await hub.ends(alarm)
    sent = [("raised", "sent"), ("escalated_1", "sent"), ("escalated_2", "sent")]
    await hub.becomes(alarm, *sent, ("returned", "sent"), ("returned", "sent"))
    # Two notifiers worked at it all the time.
    assert sorted(hub.receiver.of(alarm)) == ["escalated_1", "escalated_2", "raised", "returned", "returned"]
    assert sorted(hub.receiver.of(quiet)) == ["acknowledged", "raised"]
    assert hub.receiver.of(other_site) == []
    headers, body = next((headers, body) for headers, body in hub.receiver.got if alarm.id.encode() in body)
    digest = hmac.new(secret.encode(), f"{headers['x-smdih-timestamp']}.".encode() + body, hashlib.sha256)
    assert headers["x-smdih-signature"] == f"v1={digest.hexdigest()}"
    assert abs(int(headers["x-smdih-timestamp"]) - time.time()) < 60
    assert json.loads(body)["delivery_id"] == headers["x-smdih-delivery"]
    assert json.loads(body)["alarm"]["value"] is None


async def test_secrets_stand_sealed_also_those_from_before_there_was_a_key(hub: Hub) -> None:
    made, secret = await hub.webhook()
    before, _ = await hub.webhook()
    query = "SELECT secret FROM contact WHERE id = $1"
    stored = await hub.pool.fetchval(query, made)
    assert stored.startswith("sealed.")
    assert secret not in stored
    await hub.pool.execute("UPDATE contact SET secret = 'readable' WHERE id = $1", before)
    await hub.notifier()

    async def is_sealed() -> bool:
        return bool((await hub.pool.fetchval(query, before)).startswith("sealed."))

    await eventually(is_sealed)
    assert await hub.pool.fetchval(query, made) == stored
    seal = Seal(hub.environment["SMDIH_ANOMALY_SEAL_KEYS"])
    assert seal.open(await hub.pool.fetchval(query, before), of=before) == "readable"


async def test_a_receiver_that_fails_is_tried_again_given_up_and_sent_again_by_a_person(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    await hub.escalation((0, contact), site="east", severity_min="medium")
    hub.receiver.status = 500
    assert await hub.deliveries(await hub.raised("east", Severity.LOW)) == []
    alarm = await hub.raised("east")

    async def has_failed() -> bool:
        return any(one["last_error"] for one in await hub.deliveries(alarm))

    await eventually(has_failed)
    (one,) = await hub.deliveries(alarm)
    assert (one["state"], one["attempts"], one["last_error"]) == ("pending", 1, "Answered with status 500.")
    assert 3 < (one["due_us"] - time.time_ns() // 1000) / 1e6 < 7
    await hub.pool.execute(
        "UPDATE delivery SET attempts = $1, due = now() WHERE alarm_id = $2", ATTEMPTS_MAX - 1, alarm.id
    )
    # Another one is left alone meanwhile; as the contact has failed for long, it is given up without a try.
    await hub.pool.execute("UPDATE contact SET free = now() + interval '1 hour' WHERE id = $1", contact)
    waiting = await hub.raised("east")
    await hub.becomes(waiting, ("raised", "pending"))
    await hub.pool.execute(
        "UPDATE delivery SET made = $2, due = now() + interval '1 hour' WHERE alarm_id = $1",
        waiting.id,
        from_us(time.time_ns() // 1000 - (GIVE_UP_S + 60) * 1_000_000),
    )
    await hub.pool.execute("UPDATE contact SET free = now(), failures = $2 WHERE id = $1", contact, ATTEMPTS_MAX - 1)
    await hub.becomes(alarm, ("raised", "dead"))
    (untried,) = await hub.deliveries(waiting)
    assert (untried["state"], untried["attempts"]) == ("dead", 0)
    dead, _ = (await hub.call("GET", "/v1/deliveries", state="dead"))["deliveries"]
    hub.receiver.status = 204
    await hub.call("POST", f"/v1/deliveries/{dead['id']}/resend", key=hub.other_firm, status=404)
    assert (await hub.call("POST", f"/v1/deliveries/{dead['id']}/resend"))["state"] == "pending"
    await hub.becomes(alarm, ("raised", "sent"))
    assert (await hub.call("POST", f"/v1/deliveries/{dead['id']}/resend"))["state"] == "sent"
    await hub.call("POST", f"/v1/deliveries/{untried['id']}/resend")
    await hub.becomes(waiting, ("raised", "sent"))


async def test_a_notifier_killed_after_sending_lets_it_go_out_again_with_the_same_id(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    await hub.escalation((0, contact), site="west")
    long_ago = await hub.raised("west")
    await hub.becomes(long_ago, ("raised", "sent"))
    hub.receiver.answering.clear()
    alarm = await hub.raised("west")

    async def has_arrived() -> bool:
        return hub.receiver.of(alarm) == ["raised"]

    await eventually(has_arrived)
    for one in hub.notifiers:
        await one.kill()
    hub.receiver.answering.set()
    assert [one["state"] for one in await hub.deliveries(alarm)] == ["pending"]
    async with hub.pool.acquire() as connection:  # the claim runs out after a minute, which is long for a test
        await connection.execute("UPDATE delivery SET due = now() WHERE state = 'pending'")
        await connection.execute("UPDATE contact SET free = now()")
        await connection.execute(
            "WITH alarm AS (UPDATE alarm SET raised = raised - make_interval(days => $2) WHERE id = $1) "
            "UPDATE delivery SET finished = finished - make_interval(days => $2) WHERE alarm_id = $1",
            long_ago.id,
            SENT_KEPT_DAYS + 1,
        )
    await asyncio.gather(hub.notifier(), hub.notifier())
    await hub.becomes(alarm, ("raised", "sent"))
    ids = {headers["x-smdih-delivery"] for headers, body in hub.receiver.got if alarm.id.encode() in body}
    assert (hub.receiver.of(alarm), len(ids)) == (["raised", "raised"], 1)
    await hub.becomes(long_ago)  # what went out long ago is forgotten when a notifier starts, and each hour


async def test_mail_is_sent_and_what_is_off_the_list_is_told_when_it_is_back(hub: Hub) -> None:
    await hub.escalation((0, await hub.mail("shift@acme.example")), site="mail")
    alarm = await hub.raised("mail")
    await hub.becomes(alarm, ("raised", "sent"))
    message = hub.mailbox.got[-1]
    assert message["Subject"] == "[medium] raised: temperature of acme/mail/press"
    assert "too hot" in message.get_payload()
    assert message["To"] == "shift@acme.example"
    await hub.call("POST", f"/v1/alarms/{alarm.id}/take-out-of-service", reason="repair")
    hidden = await hub.raised("mail")
    await hub.call("POST", f"/v1/alarms/{hidden.id}/return-to-service", reason="done")
    await hub.becomes(hidden, ("back_on_list", "sent"))


async def test_an_alarm_that_is_stored_late_is_told_all_the_same(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    await hub.escalation((0, contact), site="late")
    late = hub.new_alarm("late")
    await hub.pool.execute("UPDATE escalation SET made = now() - interval '1 hour' WHERE site = 'late'")
    async with transaction(hub.pool) as connection:  # a long one: by its commit the others are minutes ahead
        await AlarmStore().raise_alarm(connection, late, now_us=time.time_ns() // 1000 - 90_000_000)
        meanwhile = hub.new_alarm("late")
        async with transaction(hub.pool) as other:
            await AlarmStore().raise_alarm(other, meanwhile, now_us=time.time_ns() // 1000)
        await hub.becomes(meanwhile, ("raised", "sent"))
    await hub.becomes(late, ("raised", "sent"))


async def test_what_comes_back_on_the_list_is_told_each_time_with_the_steps_that_fell_due_meanwhile(hub: Hub) -> None:
    first, _ = await hub.webhook()
    second, _ = await hub.webhook()
    await hub.escalation((0, first), (3600, second), site="shelf")
    alarm = await hub.raised("shelf")
    sent = [("raised", "sent")]
    for _ in range(2):
        await hub.becomes(alarm, *sent)
        await hub.call("POST", f"/v1/alarms/{alarm.id}/take-out-of-service", reason="repair")
        await hub.pool.execute("UPDATE alarm SET raised = raised - interval '2 hours' WHERE id = $1", alarm.id)
        await hub.pool.execute("UPDATE escalation SET made = made - interval '2 hours' WHERE site = 'shelf'")
        await hub.pool.execute("UPDATE escalation_due SET due = now() WHERE alarm_id = $1", alarm.id)

        async def is_past() -> bool:
            query = "SELECT count(*) FROM escalation_due WHERE alarm_id = $1"
            return bool(await hub.pool.fetchval(query, alarm.id) == 0)

        await eventually(is_past)
        assert len(await hub.deliveries(alarm)) == len(sent)
        await hub.call("POST", f"/v1/alarms/{alarm.id}/return-to-service", reason="done")
        sent.append(("back_on_list", "sent"))
        if len(sent) == 2:
            sent.append(("escalated_1", "sent"))
    await hub.becomes(alarm, *sent)


async def test_history_that_is_over_is_told_to_nobody(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    await hub.escalation((0, contact), (60, contact), site="past", tell_changes=True)
    over, lasting = [await hub.raised("past", age_s=3 * 86_400) for _ in range(2)]
    await hub.ends(over)

    async def is_planned() -> bool:
        query = "SELECT count(*) FROM escalation_due WHERE alarm_id = ANY($1::text[])"
        return bool(await hub.pool.fetchval(query, [over.id, lasting.id]) == 4)

    await eventually(is_planned)  # a minute later, which is long for a test
    await hub.pool.execute("UPDATE escalation_due SET due = now() WHERE step = 0")
    await hub.becomes(lasting, ("raised", "sent"))
    assert await hub.deliveries(over) == []


async def test_a_silent_contact_keeps_nobody_waiting(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    await hub.escalation((0, contact), site="good")

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    made = await hub.call("POST", "/v1/contacts", status=201, name="silent", kind="webhook", address=address)
    silent = made["contact"]["id"]
    await hub.escalation((0, silent), site="silent")
    flood = [await hub.raised("silent") for _ in range(60)]

    async def is_tried() -> bool:
        found = await hub.call("GET", "/v1/deliveries", state="pending")
        return any(one["attempts"] for one in found["deliveries"] if one["contact_id"] == silent)

    await eventually(is_tried)
    alarm = await hub.raised("good")
    since = time.monotonic()
    await hub.becomes(alarm, ("raised", "sent"))
    assert time.monotonic() - since < 5
    # One try at a time; what waits for a contact that is removed is dropped, and no operator has to look at it.
    assert [one["attempts"] for one in (await hub.call("GET", "/v1/deliveries", state="pending"))["deliveries"]].count(
        1
    ) == 1
    await hub.call("DELETE", f"/v1/contacts/{silent}", status=204)
    assert await hub.deliveries(flood[0]) == []
    server.close()


async def test_a_flood_is_told_by_urgency_slowly_and_without_what_is_over(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    await hub.escalation((0, contact), site="flood")
    hub.receiver.answering.clear()
    first = await hub.raised("flood", Severity.LOW)

    async def has_arrived() -> bool:
        return hub.receiver.of(first) == ["raised"]

    await eventually(has_arrived)
    over, *rest = [await hub.raised("flood", Severity.LOW) for _ in range(MESSAGES_A_MINUTE_MAX + 10)]
    await hub.call("POST", f"/v1/alarms/{over.id}/acknowledge")
    await hub.ends(over)
    urgent = await hub.raised("flood", Severity.HIGH)
    await hub.becomes(urgent, ("raised", "pending"))
    before = len(hub.receiver.got)
    hub.receiver.answering.set()
    await hub.becomes(urgent, ("raised", "sent"))
    headers, body = hub.receiver.got[before]
    assert json.loads(body)["alarm"]["id"] == urgent.id
    assert int(headers["x-smdih-waiting"]) == len(rest)

    async def is_full() -> bool:
        return len(hub.receiver.got) >= before + MESSAGES_A_MINUTE_MAX - 1

    await eventually(is_full)
    # Notifiers have looked again when another contact has been told.
    other, _ = await hub.webhook()
    await hub.escalation((0, other), site="calm")
    calm = await hub.raised("calm")
    await hub.becomes(calm, ("raised", "sent"))
    assert len(hub.receiver.got) == before + MESSAGES_A_MINUTE_MAX - 1 + 1
    assert await hub.deliveries(over) == []
    waiting = (await hub.call("GET", "/v1/deliveries", state="pending"))["deliveries"]
    assert len([one for one in waiting if one["contact_id"] == contact]) == len(rest) - (MESSAGES_A_MINUTE_MAX - 2)
    await hub.call("DELETE", f"/v1/contacts/{contact}", status=204)


async def test_a_contact_that_nothing_can_be_sent_to_does_not_keep_others_from_being_told(hub: Hub) -> None:
    wrong = "=?x?b?!?=@x.yy"  # no mail can be addressed to it
    await hub.call("POST", "/v1/contacts", status=400, name="mail", kind="email", address=wrong)
    contact, good = await hub.mail("x@acme.example"), (await hub.webhook())[0]
    await hub.pool.execute("UPDATE contact SET address = $2 WHERE id = $1", contact, wrong)
    await hub.escalation((0, contact), site="wrong")
    await hub.escalation((0, good), site="wrong")
    alarm = await hub.raised("wrong")
    await hub.becomes(alarm, ("raised", "pending"), ("raised", "sent"))

    async def has_failed() -> bool:
        return any("could not send" in one["last_error"] for one in await hub.deliveries(alarm))

    await eventually(has_failed)
    # Whatever ends a notifier before it can note the outcome is given up too.
    await hub.pool.execute(
        "UPDATE delivery SET attempts = $2, due = now(), last_error = '' WHERE alarm_id = $1", alarm.id, ATTEMPTS_MAX
    )
    await hub.becomes(alarm, ("raised", "dead"), ("raised", "sent"))
    assert all(one.process.returncode is None for one in hub.notifiers[-2:])
    await hub.call("DELETE", f"/v1/contacts/{contact}", status=204)


async def test_a_stranger_gets_a_few_codes_and_no_alarms(hub: Hub) -> None:
    there = {"name": "buy my goods", "kind": "email", "address": "stranger@acme.example"}
    made = await hub.call("POST", "/v1/contacts", status=201, **there)
    contact = made["contact"]["id"]
    code = await hub.code("stranger@acme.example")
    assert "goods" not in hub.mailbox.got[-1].as_string()
    good, _ = await hub.webhook()
    await hub.escalation((0, contact), site="stranger")
    await hub.escalation((0, good), site="stranger")
    alarm = await hub.raised("stranger")
    await hub.becomes(alarm, ("raised", "sent"))
    wrong = str((int(code) + 1) % 10**CODE_DIGITS).zfill(CODE_DIGITS)
    await hub.call("POST", f"/v1/contacts/{contact}/confirm", status=400, code=wrong)
    await hub.call("POST", f"/v1/contacts/{contact}/confirm", status=404, code=code, key=hub.other_firm)
    for _ in range(CODE_TRIES_MAX - 1):
        await hub.call("POST", f"/v1/contacts/{contact}/confirm", status=400, code="x")
    await hub.call("POST", f"/v1/contacts/{contact}/confirm", status=409, code=code)
    # Also when many are asked for at the same time.
    headers = {"authorization": f"Bearer {hub.firm}"}
    asked = [hub.http.post(f"/v1/contacts/{contact}/try", headers=headers) for _ in range(4 * CODES_A_DAY_MAX)]
    answers = [answer.status_code for answer in await asyncio.gather(*asked)]
    assert sorted(answers) == [200] * (CODES_A_DAY_MAX - 1) + [409] * (3 * CODES_A_DAY_MAX + 1)

    async def are_sent() -> bool:
        return [message["To"] for message in hub.mailbox.got].count("stranger@acme.example") == CODES_A_DAY_MAX

    await eventually(are_sent)
    # Another contact of that address gets none either.
    await hub.call("DELETE", f"/v1/contacts/{contact}", status=204)
    await hub.call("POST", "/v1/contacts", status=409, **there)


async def test_contacts_are_tried_removed_and_nobody_elses(hub: Hub) -> None:
    contact, _ = await hub.webhook()
    before = len(hub.receiver.got)
    for _ in range(TRIALS_MAX):
        await hub.call("POST", f"/v1/contacts/{contact}/try")
    await hub.call("POST", f"/v1/contacts/{contact}/try", status=409)

    async def tried() -> bool:
        return len(hub.receiver.got) == before + TRIALS_MAX

    await eventually(tried)
    escalation = await hub.escalation((0, contact), site="x")
    step = {"after_s": 0, "contact_ids": [contact]}
    for key, status in ((hub.other_firm, 404), (hub.device, 403), ("nobody", 401)):
        await hub.call("POST", f"/v1/contacts/{contact}/try", key=key, status=status)
        await hub.call("DELETE", f"/v1/contacts/{contact}", key=key, status=status)
        await hub.call("DELETE", f"/v1/escalations/{escalation}", key=key, status=status)
        await hub.call("POST", "/v1/escalations", key=key, status=status, name="x", steps=[step])
    for path in ("/v1/contacts", "/v1/escalations", "/v1/deliveries"):
        assert list((await hub.call("GET", path, key=hub.other_firm)).values()) == [[]]
        await hub.call("GET", path, key=hub.other_firm, status=403, firm_id=FIRM)
        await hub.call("GET", path, key=hub.device, status=403)
    wrongs: tuple[dict[str, Any], ...] = (
        {"steps": []},
        {"steps": [step, step]},
        {"steps": [step | {"after_s": -1}]},
        {"steps": [step | {"contact_ids": []}]},
        {"steps": [step], "site": "No Such"},
        {"steps": [step], "name": ""},
    )
    for wrong in wrongs:
        await hub.call("POST", "/v1/escalations", status=400, **({"name": "x"} | wrong))
    for address in ("ftp://x.example", "x", "http://"):
        await hub.call("POST", "/v1/contacts", status=400, name="x", kind="webhook", address=address)
    await hub.call("POST", "/v1/contacts", status=400, name="x", kind="email", address="x@y\nBcc: z@z.example")
    by = (("authorization", f"Bearer {hub.firm}"),)
    async with grpc.aio.insecure_channel(hub.grpc) as channel:
        stub: Any = pb_grpc.NotificationServiceStub(channel)
        listed = (await stub.ListEscalations(pb.ListEscalationsRequest(), metadata=by)).escalations
        assert listed[0].id == escalation
        assert list(listed[0].steps[0].contact_ids) == [contact]
        await stub.RemoveEscalation(pb.RemoveEscalationRequest(id=escalation), metadata=by)
        made = await stub.CreateContact(
            pb.CreateContactRequest(name="x", kind=pb.CONTACT_KIND_WEBHOOK, address="https://x.example"), metadata=by
        )
        assert len(made.secret) > 40
        for _ in range(2):
            await stub.RemoveContact(pb.RemoveContactRequest(id=contact), metadata=by)
    there = (await hub.call("GET", "/v1/contacts"))["contacts"]
    assert contact not in {one["id"] for one in there}
    for _ in range(CONTACTS_MAX - len(there)):
        await hub.webhook()
    await hub.call("POST", "/v1/contacts", status=409, name="x", kind="webhook", address="https://x.example")
