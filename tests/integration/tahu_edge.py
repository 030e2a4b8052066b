"""An edge node that is not ours: Eclipse Tahu, the reference implementation of Sparkplug, in a process of its own.

Each line of standard input is a JSON object {"device", "ts", "metrics": {name: value}} that is sent as DDATA by alias, or the word
`births` (send all births anew) or `stop` (say goodbye). Standard output: `births` each time that it has sent them.
"""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import jpype
from jpype import JImplements, JOverride

JARS = Path(__file__).resolve().parents[2] / ".local/servers/tahu"
KEEP_ALIVE_S = 5


def main(
    port: int, password: str, group: str, node: str, host_id: str, devices: dict[str, dict[str, list[Any]]]
) -> None:
    """`devices`: device to metric to [type of Sparkplug, value at birth]."""
    jpype.startJVM("-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", classpath=[str(JARS / "*")])
    java = jpype.JPackage("java")
    tahu = jpype.JPackage("org.eclipse.tahu")
    kinds = tahu.message.model.MetricDataType
    described = tahu.message.model.EdgeNodeDescriptor(group, node)
    said = threading.Lock()
    edge: Any = None
    next_death = 0

    def metric(name: str, kind: str, value: Any) -> Any:
        java_type = {"Double": java.lang.Double, "Int8": java.lang.Byte, "Boolean": java.lang.Boolean}
        java_type |= {"Int64": java.lang.Long, "String": java.lang.String}
        return tahu.message.model.Metric.MetricBuilder(
            java.lang.String(name), getattr(kinds, kind), java_type[kind](value)
        )

    def payload(metrics: list[Any], ts: int = 0) -> Any:
        at = java.util.Date(ts) if ts else java.util.Date()
        built = tahu.message.model.SparkplugBPayload.SparkplugBPayloadBuilder().setTimestamp(at)
        for one in metrics:
            built.addMetric(one.timestamp(at).createMetric())
        return built.createPayload()

    @JImplements(tahu.edge.api.MetricHandler)
    class Metrics:
        @JOverride
        def getDeathTopic(self) -> Any:
            return tahu.message.model.Topic("spBv1.0", described, tahu.message.model.MessageType.NDEATH)

        @JOverride
        def getDeathPayloadBytes(self) -> Any:
            nonlocal next_death
            death = payload([metric("bdSeq", "Int64", next_death)])
            next_death = (next_death + 1) % 256
            return tahu.message.SparkplugBPayloadEncoder().getBytes(death, True)

        @JOverride
        def publishBirthSequence(self) -> None:
            born = tahu.message.model.SparkplugBPayloadMap.SparkplugBPayloadMapBuilder()
            born.setTimestamp(java.util.Date())
            born.addMetric(metric("bdSeq", "Int64", (next_death - 1) % 256).createMetric())
            born.addMetric(metric("Node Control/Rebirth", "Boolean", False).createMetric())
            edge.publishNodeBirth(born.createPayload())
            for device, metrics in devices.items():
                edge.publishDeviceBirth(device, payload([metric(name, *one) for name, one in metrics.items()]))
            with said:
                print("births", flush=True)

        @JOverride
        def hasMetric(self, described: Any, name: Any) -> bool:
            return str(name) in devices.get(str(described.getDeviceId()), {})

    @JImplements(tahu.mqtt.ClientCallback)
    class Callback:
        @JOverride
        def shutdown(self) -> None: ...

        @JOverride
        def messageArrived(self, server: Any, url: Any, client: Any, topic: Any, message: Any) -> None:
            levels = str(topic).split("/")
            if levels[1] == "STATE":
                state = json.loads(bytes(message.getPayload()))
                said_state = tahu.message.model.StatePayload(
                    java.lang.Boolean(state["online"]), java.lang.Long(state["timestamp"])
                )
                edge.handleStateMessage(levels[2], said_state)
            elif levels[2] == "NCMD":
                command = tahu.message.SparkplugBPayloadDecoder().buildFromByteArray(message.getPayload(), None)
                if any(str(one.getName()) == "Node Control/Rebirth" and one.getValue() for one in command.getMetrics()):
                    edge.handleRebirthRequest(True)

        @JOverride
        def connectionLost(self, server: Any, url: Any, client: Any, cause: Any) -> None: ...

        @JOverride
        def connectComplete(self, again: Any, server: Any, url: Any, client: Any) -> None: ...

    handler = Metrics()
    server = tahu.model.MqttServerDefinition(
        tahu.mqtt.MqttServerName("hub"),
        tahu.mqtt.MqttClientId(f"tahu-{node}".replace(":", "-"), False),
        tahu.mqtt.MqttServerUrl(f"tcp://127.0.0.1:{port}"),
        group,
        password,
        KEEP_ALIVE_S,
        handler.getDeathTopic(),
    )
    edge = tahu.edge.EdgeClient(
        handler,
        described,
        java.util.ArrayList(list(devices)),
        host_id,
        True,  # metrics by their aliases
        java.lang.Long(0),
        java.util.ArrayList([server]),
        Callback(),
        None,
    )
    running = java.lang.Thread(edge)
    running.start()
    for line in sys.stdin:
        word = line.strip()
        if word == "stop":
            break
        if word == "births":
            handler.publishBirthSequence()
            continue
        wanted = json.loads(word)
        metrics = devices[wanted["device"]]
        sent = payload(
            [metric(name, metrics[name][0], value) for name, value in wanted["metrics"].items()], wanted["ts"]
        )
        edge.publishDeviceData(wanted["device"], sent)
    edge.shutdown()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
