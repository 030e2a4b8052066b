"""The MQTT bridge as gateways meet it: a real Mosquitto, two bridges, Sparkplug nodes and plain JSON."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import aiomqtt
import httpx
import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from localstack.hub import Hub
from localstack.mosquitto import BRIDGE, Mosquitto
from localstack.servers import Servers
from services.common.settings import Settings
from services.ingest.mqtt import link
from services.ingest.mqtt.link import Broker, Link, LinkLost, LinkRefused
from tests.integration.mqtt_plant import (
    FIRMS,
    PASSWORD,
    Plant,
    edge_node,
    metric,
    now_ms,
    paused,
    plain,
    running_plant,
    tahu_edge,
)
from tests.integration.wire import Wire
from tests.polling import eventually


@pytest_asyncio.fixture(scope="module")
async def wire(settings: Settings) -> AsyncIterator[Wire]:
    """Between the hub and its database."""
    made = Wire(settings.database_dsn)
    await made.mend()
    yield made
    await made.cut()


@pytest_asyncio.fixture(scope="module")
async def plant(settings: Settings, wire: Wire, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plant]:
    mosquitto = Mosquitto(tmp_path_factory.mktemp("mosquitto"))
    mosquitto.start(dict.fromkeys(FIRMS, PASSWORD))
    hub = Hub(
        Servers(settings.kafka_bootstrap, wire.dsn),
        Path(tmp_path_factory.mktemp("hub")),
        topic_prefix=settings.kafka_topic_prefix,
        roles=("door", "historian", "mqtt-bridge"),
        mqtt=mosquitto,
        copies={"mqtt-bridge": 2},
    )
    try:
        async with running_plant(hub, mosquitto, settings.database_dsn) as made:
            yield made
    finally:
        await hub.stop()
        mosquitto.stop()


async def test_plain_json_of_both_forms_is_stored_and_the_rest_has_a_reason(plant: Plant) -> None:
    machine = plant.machines["acme"]
    at = now_ms() - 60_000
    root = "smdih/v1/acme/works/press-1"
    async with plant.client("acme") as client:
        for second in range(20):
            await client.publish(f"{root}/temperature", plain(20 + second, at + second * 1000), qos=1)
            await client.publish(f"{root}/current", plain(second / 2, at + second * 1000), qos=2)
        values: dict[str, Any] = {"temperature": 99.5, "current": None, "Drive.speed": True}
        await client.publish(root, json.dumps({"ts": at + 30_000, "values": values}), qos=1)
        # Of each of these something is wrong.
        wrong: list[tuple[str, Any]] = [
            ("smdih/v1/acme/works/press-9/temperature", {"timestamp_ms": at, "value": 1}),
            (f"{root}/pressure", {"timestamp_ms": at, "value": 1}),
            (f"{root}/temperature", {"timestamp_ms": at, "value": "hot"}),
            (f"{root}/temperature", {"timestamp_ms": "noon", "value": 1}),
            (f"{root}/temperature", {"timestamp_ms": at * 1000, "value": 1}),
            (f"{root}/temperature", {"timestamp_ms": at, "value": 1, "unit": "degC"}),
            (root, {"ts": at + 31_000, "values": {"temperature": 5, "current": "much", "no-such": 2}}),
        ]
        for topic, body in wrong:
            await client.publish(topic, json.dumps(body), qos=1)
        await client.publish(f"{root}/temperature", b"{not json", qos=1)

    async def all_there() -> bool:
        reasons = await _samples_by_reason(plant, machine["firm_id"])
        return len(await plant.stored(machine["id"])) >= 43 and sum(reasons.values()) >= 7

    await eventually(all_there)
    expected = {(0, at + s * 1000): 20.0 + s for s in range(20)} | {(1, at + s * 1000): s / 2 for s in range(20)}
    expected |= {(0, at + 30_000): 99.5, (2, at + 30_000): 1.0, (0, at + 31_000): 5.0}
    assert await plant.stored(machine["id"]) == expected
    # Several messages of one turn may share a record: samples are counted.
    assert await _samples_by_reason(plant, machine["firm_id"]) == {
        "MALFORMED": 0,
        "TIME_OUT_OF_WINDOW": 2,
        "UNKNOWN_MACHINE": 1,
        "UNKNOWN_SIGNAL": 2,
        "WRONG_TYPE": 2,
    }
    assert [reason for reason, _ in await plant.quarantined(machine["firm_id"])].count("MALFORMED") == 2
    item = await plant.database.fetchrow("SELECT detail, door FROM ingest.quarantine WHERE reason = 'UNKNOWN_MACHINE'")
    assert item is not None
    assert item["door"] == "mqtt"
    assert "'acme/works/press-9'" in item["detail"]


async def _samples_by_reason(plant: Plant, firm_id: int) -> dict[str, int]:
    found: dict[str, int] = {}
    for reason, samples in await plant.quarantined(firm_id):
        found[reason] = found.get(reason, 0) + samples
    return found


async def test_a_firms_account_cannot_publish_for_another_firm(plant: Plant) -> None:
    at = now_ms()
    with suppress(aiomqtt.MqttError):  # this broker ends the connection of an MQTT 3.1.1 client that tries
        async with plant.client("acme", timeout=2) as client:
            await client.publish("smdih/v1/birch/works/press-1/temperature", plain(666, at), qos=1)
    async with plant.client("birch") as client:
        await client.publish("smdih/v1/birch/works/press-1/temperature", plain(1, at + 1), qos=1)

    async def arrived() -> bool:
        return bool(await plant.stored(plant.machines["birch"]["id"]))

    await eventually(arrived)
    assert await plant.stored(plant.machines["birch"]["id"]) == {(0, at + 1): 1.0}


async def test_values_of_one_time_sent_one_by_one_become_one_frame(plant: Plant) -> None:
    machine = plant.machines["acme"]
    at = now_ms() - 20_000
    async with plant.client("acme") as client:
        for second in range(10):
            for name in ("temperature", "current", "Drive.speed"):
                topic = f"smdih/v1/acme/works/press-1/{name}"
                await client.publish(topic, plain(second, at + second * 1000), qos=1)

    async def all_there() -> bool:
        return sum(1 for _, ms in await plant.stored(machine["id"]) if ms >= at) == 30

    await eventually(all_there)


def _device_birth() -> list[Any]:
    return [
        metric(20.0, name="temperature", alias=1),
        metric(-7, name="current", alias=2, kind=2),
        metric(-3, name="Drive/speed", alias=3, kind=1),
        metric("ACME", name="Properties/maker", alias=4, kind=12),
        metric(None, name="Device Control/Scan Rate", alias=5, kind=4),
    ]


async def test_a_sparkplug_device_is_stored_by_its_aliases(plant: Plant) -> None:
    machine = plant.machines["acme"]
    before = await plant.stored(machine["id"])
    at = now_ms() - 5_000
    async with edge_node(plant, "acme", "works:gateway-1") as node:
        await node.birth()
        await node.send("DBIRTH", _device_birth(), device="press-1", timestamp=at)
        await node.send(
            "DDATA", [metric(21.5, alias=1), metric(-8, alias=2, kind=2)], device="press-1", timestamp=at + 1
        )
        older = metric(1.5, alias=1, timestamp=at - 1000, is_historical=True)
        transient = metric(9.0, alias=1, timestamp=at + 2, is_transient=True)
        bad = metric(9.0, alias=1, timestamp=at + 3)
        bad.properties.keys.append("Quality")
        bad.properties.values.add(type=3, int_value=0)
        await node.send("DDATA", [older, transient, bad, metric(None, alias=2, kind=2)], device="press-1")
        for turn in range(300):  # past 255 and round
            await node.send("DDATA", [metric(turn, alias=3, kind=1)], device="press-1", timestamp=at + 10 + turn)

    def expected() -> dict[tuple[int, int], float]:
        found = {(0, at): 20.0, (1, at): -7.0, (2, at): -3.0, (0, at + 1): 21.5, (1, at + 1): -8.0, (0, at - 1000): 1.5}
        return found | {(2, at + 10 + turn): float((turn + 128) % 256 - 128) for turn in range(300)}

    async def all_there() -> bool:
        return len(await plant.stored(machine["id"])) >= len(before) + len(expected())

    await eventually(all_there)
    after = await plant.stored(machine["id"])
    assert {key: value for key, value in after.items() if key not in before} == expected()

    async def set_aside() -> bool:
        found = (await plant.quarantined(machine["firm_id"]))[-2:]
        return sorted(found) == [("BAD_QUALITY", 1), ("WRONG_TYPE", 1)]

    await eventually(set_aside)


async def test_a_message_that_repeats_a_metric_beyond_all_measure_stops_nobody(plant: Plant) -> None:
    machine = plant.machines["acme"]
    at = now_ms() - 60_000
    async with edge_node(plant, "acme", "works:gateway-9") as node:
        await node.birth()
        await node.send("DBIRTH", _device_birth(), device="press-1")
        await node.send("DDATA", [metric(n, alias=1) for n in range(10_002)], device="press-1", timestamp=at)
        await node.send("DDATA", [metric(7.0, alias=1)], device="press-1", timestamp=at + 1)

    async def both_there() -> bool:
        found = await plant.stored(machine["id"])
        return found.get((0, at)) == 10_001.0 and found.get((0, at + 1)) == 7.0

    await eventually(both_there)


async def test_a_gap_an_unknown_alias_and_data_before_a_birth_ask_for_a_rebirth_and_deaths_count_once(
    plant: Plant,
) -> None:
    machine = plant.machines["birch"]
    async with asyncio.timeout(40), edge_node(plant, "birch", "works") as node:

        async def born(value: float) -> None:
            await node.birth(seq=3)
            await node.send("DBIRTH", [metric(value, name="temperature", alias=7)], device="press-1")

        async def reasons() -> list[tuple[str, int]]:
            return await plant.quarantined(machine["firm_id"])

        async def stored() -> set[float]:
            return set((await plant.stored(machine["id"])).values())

        await node.send("DDATA", [metric(1.0, alias=7)], device="press-1")
        await node.rebirth_asked()
        await eventually(lambda: _equals(reasons, [("DATA_BEFORE_BIRTH", 1)]))
        await born(2.0)
        await node.send("DDATA", [metric(3.0, alias=8), metric(4.0, alias=7)], device="press-1")
        await node.rebirth_asked()
        await born(5.0)
        node.skip()
        await node.send("DDATA", [metric(6.0, alias=7)], device="press-1")
        await node.rebirth_asked()
        await born(7.0)
        # The will of an earlier connection comes late: it means nothing.
        node.death_sequence = 1
        await born(8.0)
        await node.death(0)
        await node.send("DDATA", [metric(9.0, alias=7)], device="press-1")
        await node.send("DDEATH", [], device="press-1")
        await node.send("DDATA", [metric(10.0, alias=7)], device="press-1")
        await node.rebirth_asked()
        await born(11.0)
        await node.death(1)
        await node.send("DDATA", [metric(12.0, alias=7)], device="press-1")
        await node.rebirth_asked()
        await eventually(lambda: _equals(stored, {1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 11.0}))
        reasons_expected = ["DATA_BEFORE_BIRTH", "NOT_IN_BIRTH", "DATA_BEFORE_BIRTH", "DATA_BEFORE_BIRTH"]
        await eventually(lambda: _equals(reasons, [(reason, 1) for reason in reasons_expected]))

    async def told_offline() -> bool:
        found = (await plant.operator.get(f"/v1/machines/{machine['id']}/diagnosis")).json()
        return bool(found["verdict"] == "NODE_OFFLINE" and "the device 'press-1' of the node 'works'" in found["text"])

    await eventually(told_offline)


async def test_an_edge_node_of_another_make_is_born_by_the_hubs_word_sends_by_alias_and_answers_a_rebirth(
    plant: Plant,
) -> None:
    """Eclipse Tahu waits for our STATE, and believes neither our births nor our commands unless they are as specified."""
    machine = plant.machines["birch"]
    at = now_ms() - 1_800_000
    device = {
        "temperature": ("Double", 20.5),
        "current": ("Int8", -7),
        "Drive/speed": ("Boolean", True),
        "Properties/maker": ("String", "ACME"),
    }

    async def stored() -> set[tuple[int, int, float]]:
        found = (await plant.stored(machine["id"])).items()
        return {(position, ms, value) for (position, ms), value in found if at <= ms < at + 1_000_000}

    async with tahu_edge(plant, "birch", "works:tahu", {"press-1": device}) as edge:
        await edge.born()
        for turn in range(300):  # past 255 and round
            await edge.send(
                "press-1", at + turn, {"temperature": turn / 2, "current": -turn % 100, "Drive/speed": turn % 2}
            )
        sent = {(0, at + turn, turn / 2) for turn in range(300)}
        sent |= {(1, at + turn, float(-turn % 100)) for turn in range(300)}
        sent |= {(2, at + turn, float(turn % 2)) for turn in range(300)}
        await eventually(lambda: _equals(stored, sent))
        # A message under its name that it did not send: the hub no longer trusts what it knows of the node.
        async with edge_node(plant, "birch", "works:tahu") as other:
            await other.send("DDATA", [metric(1.0, alias=999)], device="press-1")
        await edge.born()
        await edge.send("press-1", at + 500, {"temperature": 77.0})
        sent |= {(0, at + 500, 77.0)}
        await eventually(lambda: _equals(stored, sent))
        await edge.stop()

    async def told_offline() -> bool:
        found = (await plant.operator.get(f"/v1/machines/{machine['id']}/diagnosis")).json()
        return bool(found["verdict"] == "NODE_OFFLINE" and "the node 'works:tahu'" in found["text"])

    await eventually(told_offline)


async def _equals(ask: Any, expected: Any) -> bool:
    return bool(await ask() == expected)


async def test_a_firm_over_its_quota_has_its_samples_in_quarantine_and_others_are_not_held_up(plant: Plant) -> None:
    firm_id, at = plant.machines["acme"]["firm_id"], now_ms() - 7_200_000
    answer = await plant.operator.put(f"/v1/firms/{firm_id}/quota", json={"samples_per_s": 1})
    assert answer.status_code == 200, answer.text
    try:
        sent = 0

        async def is_over() -> bool:
            nonlocal sent
            async with plant.client("acme") as client:
                for _ in range(30):
                    await client.publish("smdih/v1/acme/works/press-1/current", plain(sent, at + sent), qos=1)
                    sent += 1
            return (await _samples_by_reason(plant, firm_id)).get("QUOTA_SAMPLES", 0) > 0

        await eventually(is_over)

        async def all_there() -> bool:
            stored = sum(1 for _, ms in await plant.stored(plant.machines["acme"]["id"]) if at <= ms < at + sent)
            return stored + (await _samples_by_reason(plant, firm_id))["QUOTA_SAMPLES"] == sent

        await eventually(all_there)
    finally:
        await plant.operator.put(f"/v1/firms/{firm_id}/quota", json={})
        item = (await plant.operator.get("/v1/quarantine")).json()["items"][0]
    assert item["reason"] == "QUOTA_SAMPLES"
    replayed = await plant.operator.post(f"/v1/quarantine/{item['id']}/replay", json={})
    assert (replayed.status_code, replayed.json()["accepted"]) == (200, item["samples"]), replayed.text


async def test_the_host_says_that_it_is_there_and_says_it_again_when_someone_denies_it(plant: Plant) -> None:
    async with asyncio.timeout(20), plant.client("acme") as client:
        await client.subscribe("spBv1.0/STATE/smdih", qos=1)
        messages = aiter(client.messages)
        first = await anext(messages)
        assert first.retain
        said = json.loads(bytes(first.payload))
        assert said["online"] is True
        assert 0 < now_ms() - said["timestamp"] < 600_000
        bridge = plant.mosquitto.passwords["smdih_bridge"]
        async with aiomqtt.Client(
            "127.0.0.1", plant.mosquitto.port, username="smdih_bridge", password=bridge
        ) as impostor:
            await impostor.publish("spBv1.0/STATE/smdih", json.dumps(said | {"online": False}), qos=1, retain=True)
        assert json.loads(bytes((await anext(messages)).payload))["online"] is False
        assert json.loads(bytes((await anext(messages)).payload)) == said


def _certificate(folder: Path, host: str) -> Path:
    """A certificate of its own authority, and its key beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(host))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


async def test_the_bridges_connection_is_encrypted_and_checks_the_broker(tmp_path: Path) -> None:
    authority = _certificate(tmp_path, "127.0.0.1")
    mosquitto = Mosquitto(tmp_path / "mosquitto")
    mosquitto.start(more=f"certfile {authority}\nkeyfile {tmp_path}/key.pem\n")
    try:
        user, password = BRIDGE, mosquitto.passwords[BRIDGE]
        trusted = Broker("127.0.0.1", mosquitto.port, user, password, True, str(authority))
        async with Link(trusted, client_id="c") as link:
            await link.subscribe(["spBv1.0/#"])
            await link.publish("spBv1.0/STATE/other", b"x" * 500_000, qos=1)
            (message,) = await link.messages(messages_max=10, timeout_s=10)
            assert (message.topic, len(message.payload)) == ("spBv1.0/STATE/other", 500_000)
        with pytest.raises(LinkLost, match="certificate verify failed"):
            await Link(replace(trusted, ca=""), client_id="c").__aenter__()
        with pytest.raises(LinkRefused):
            await Link(replace(trusted, password="wrong"), client_id="c").__aenter__()
    finally:
        mosquitto.stop()


async def test_nothing_is_lost_though_bridges_are_killed_kafka_is_away_and_the_broker_is_restarted(
    plant: Plant,
) -> None:
    """Sent = stored + quarantined, of plain messages and of Sparkplug data by alias; births outlive the processes."""
    at = now_ms() - 3_600_000
    turns, bad_every = 400, 10

    async def faults() -> None:
        await asyncio.sleep(0.3)
        plant.hub.kill("mqtt-bridge")
        await asyncio.sleep(1.5)
        plant.hub.kill("mqtt-bridge-2")
        plant.hub.kill("historian")
        with paused(plant.hub.settings.kafka_bootstrap):
            await asyncio.sleep(2)
        plant.hub.kill("mqtt-bridge")

    async def send(firm: str) -> None:
        root = f"smdih/v1/{firm}/works/press-1"
        async with edge_node(plant, firm, "works:chaos") as node:
            await node.birth()
            await node.send("DBIRTH", [metric(0.5, name="current", alias=1)], device="press-1", timestamp=at - 1)
            for turn in range(turns):
                await node.publish(f"{root}/temperature", plain(turn, at + turn))
                if turn % bad_every == 0:
                    await node.publish(f"{root}/temperature", b"malformed %d" % turn)
                await node.send("DDATA", [metric(turn + 0.5, alias=1)], device="press-1", timestamp=at + turn)
                await asyncio.sleep(0.008)

    before = {firm: len(await plant.quarantined(plant.machines[firm]["firm_id"])) for firm in FIRMS}
    await asyncio.gather(faults(), *(send(firm) for firm in FIRMS))
    plant.mosquitto.stop()
    plant.mosquitto.start(dict.fromkeys(FIRMS, PASSWORD))

    for firm in FIRMS:
        machine = plant.machines[firm]
        expected = {(0, at + turn): float(turn) for turn in range(turns)}
        expected |= {(1, at + turn): turn + 0.5 for turn in range(-1, turns)} | {(1, at - 1): 0.5}

        async def all_there(machine: dict[str, Any] = machine, expected: dict[Any, float] = expected) -> bool:
            found = {key: value for key, value in (await plant.stored(machine["id"])).items() if key[1] <= at + turns}
            return found.items() >= expected.items()

        await eventually(all_there, deadline_s=40)
        reasons = (await plant.quarantined(machine["firm_id"]))[before[firm] :]
        assert sorted(reasons) == [("MALFORMED", 0)] * (turns // bad_every)


async def test_a_share_comes_back_though_the_broker_sends_more_than_it_may_before_it_answers(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosquitto 2.0.11 keeps to our Receive Maximum only until the first acknowledgement on a session that was taken up again."""
    machine, at, bridges = plant.machines["acme"], now_ms() - 7_000_000, ("mqtt-bridge", "mqtt-bridge-2")
    monkeypatch.setattr(link, "WAITING_MESSAGES_MAX", 100_000)
    for name in bridges:
        await plant.hub.pause(name)
    try:
        async with plant.client("acme") as client:
            for number in range(4_000):
                await client.publish("smdih/v1/acme/works/press-1/current", plain(number, at + number), qos=0)
            await client.publish("smdih/v1/acme/works/press-1/current", plain(4_000, at + 4_000), qos=1)
        broker = Broker("127.0.0.1", plant.mosquitto.port, BRIDGE, plant.mosquitto.passwords[BRIDGE])
        prefix = plant.hub.settings.kafka_topic_prefix
        async with Link(broker, client_id=f"{prefix}smdih-bridge-6", session_expiry_s=3600) as stolen:
            first = await stolen.messages(messages_max=100, timeout_s=5)
            stolen.ack(first)
            sent = len(first)
            while more := await stolen.messages(messages_max=5_000, timeout_s=1):
                sent += len(more)
            assert sent > 2_500
    finally:
        for name in bridges:
            plant.hub.resume(name)
    for name in bridges:
        await plant.hub.wait_ready(name)

    async def stored() -> int:
        return sum(1 for _, ms in await plant.stored(machine["id"]) if at <= ms <= at + 4_000)

    await eventually(lambda: _equals(stored, 4_001 - len(first)))


async def test_the_ways_in_come_up_while_the_database_is_away_and_what_they_take_is_stored_afterwards(
    plant: Plant, wire: Wire
) -> None:
    machine, at = plant.machines["acme"], now_ms() - 600_000
    frame = {"ts": at, "values": {"temperature": 2.5}}
    body = {"source": "away", "batches": [{"machine": machine["id"], "frames": [frame]}]}
    headers = {"Authorization": f"Bearer {await plant.device_key(machine['firm_id'])}"}

    async def historian_waits() -> bool:
        async with httpx.AsyncClient() as client:
            with suppress(httpx.TransportError):
                answer = await client.get(f"{plant.hub.processes['historian'].http}/readyz")
                return answer.status_code == 503 and "database" in answer.text
        return False

    await wire.cut()
    try:
        for name in ("door", "mqtt-bridge", "mqtt-bridge-2", "historian"):
            plant.hub.kill(name)
        for name in ("door", "mqtt-bridge", "mqtt-bridge-2"):
            await plant.hub.wait_ready(name)
        async with httpx.AsyncClient() as gateway:
            url = f"{plant.hub.processes['door'].http}/v1/telemetry"
            answer = await gateway.post(url, json=body, headers=headers)
            assert answer.status_code == 200, answer.text
        async with plant.client("acme") as client:
            await client.publish("smdih/v1/acme/works/press-1/current", plain(3.5, at + 1), qos=1)
        await eventually(historian_waits)
    finally:
        await wire.mend()

    async def stored() -> dict[tuple[int, int], float]:
        return {key: value for key, value in (await plant.stored(machine["id"])).items() if at <= key[1] <= at + 1}

    await eventually(lambda: _equals(stored, {(0, at): 2.5, (1, at + 1): 3.5}))
