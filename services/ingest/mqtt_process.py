"""The process that brings telemetry from an MQTT broker into the message log."""

from services.common.entrance import NotForProduction, open_entrance
from services.common.runtime import Runtime
from services.ingest.mqtt.bridge import Births, Bridge, Host, Share
from services.ingest.mqtt.link import Broker
from services.ingest.settings import MqttSettings
from services.ingest.taking import open_taking


async def start(runtime: Runtime, settings: MqttSettings) -> None:
    if settings.production and not settings.mqtt_tls:
        raise NotForProduction(
            "SMDIH_PRODUCTION is on, and the broker would be reached without TLS: set SMDIH_MQTT_TLS."
        )
    broker = Broker(
        settings.mqtt_host,
        settings.mqtt_port,
        settings.mqtt_user,
        settings.mqtt_password,
        settings.mqtt_tls,
        settings.mqtt_ca,
    )
    entrance = open_entrance(runtime, settings, takes_keys=False)
    await entrance.serve_probes("SMDIH MQTT bridge")
    taking = await open_taking(runtime, settings, kinds=("firm", "machine"))
    births = Births(taking.cluster, taking.publisher)
    name = taking.cluster.name("smdih-bridge")

    def share(number: int, shares: int) -> Share:
        return Share(
            number,
            shares,
            broker=broker,
            client_id=f"{name}-{number}",
            births=births,
            directory=taking.directory,
            door=taking.door,
            clock=taking.clock,
        )

    host = Host(broker, host_id=settings.mqtt_host_id, client_id=f"{name}-host", clock=taking.clock)
    bridge = Bridge(taking.cluster, births, share=share, host=host)

    async def serve() -> None:
        await taking.directory.wait_caught_up()  # a message of a firm that is not known yet would be nobody's
        await bridge.run()

    runtime.background("bridge", serve())
    runtime.ready_when("kafka", taking.publisher.answers)
    runtime.ready_when("mqtt", bridge.is_serving)
