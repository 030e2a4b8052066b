"""Settings of ingest's processes."""

from pydantic import Field

from services.common.settings import Settings

SCHEMA = "ingest"


class MqttSettings(Settings):
    """What the MQTT bridge needs besides: the broker, and as whom to come."""

    mqtt_host: str = "127.0.0.1"
    mqtt_port: int = Field(1883, ge=1, le=65535)
    mqtt_user: str = ""
    mqtt_password: str = Field("", repr=False)
    mqtt_tls: bool = False
    mqtt_ca: str = Field("", description="file of the broker's certificate authority; the system's without it")
    mqtt_host_id: str = Field("smdih", description="the Sparkplug host that nodes wait for: spBv1.0/STATE/<this>")
