"""A press with an OPC UA server, in a process of its own, to be killed: arguments PORT FIRST.

Its temperature counts up from FIRST twenty times a second; each value is said with its time in microseconds once the server has it.
"""

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

from asyncua import Node, Server, ua


async def main(port: int, first: int) -> None:
    server = Server()
    await server.init()
    server.set_endpoint(f"opc.tcp://127.0.0.1:{port}")
    space = await server.register_namespace("http://press.example")
    press = await server.nodes.objects.add_object(ua.NodeId("Press3", space), ua.QualifiedName("Press 3", space))

    async def variable(name: str, value: Any, kind: ua.VariantType) -> Node:
        return await press.add_variable(ua.NodeId(f"Press3.{name}", space), ua.QualifiedName(name, space), value, kind)

    temperature = await variable("Temperature", float(first), ua.VariantType.Double)
    unit = ua.EUInformation(DisplayName=ua.LocalizedText("degC"))
    await temperature.add_property(space, "EngineeringUnits", unit)
    await temperature.add_property(space, "InstrumentRange", ua.Range(-50.0, 1e6))
    running = await variable("Running", True, ua.VariantType.Boolean)
    broken = await variable("Broken", 1.0, ua.VariantType.Float)
    await variable("Maker", "Acme", ua.VariantType.String)
    await variable("Curve", [1.0, 2.0], ua.VariantType.Double)
    axis = await press.add_object(ua.NodeId("Press3.Axis", space), ua.QualifiedName("Axis/1", space))
    await axis.add_variable(
        ua.NodeId("Press3.Axis.Speed", space), ua.QualifiedName("Speed", space), 7, ua.VariantType.Int32
    )
    async with server:
        bad = ua.DataValue(
            ua.Variant(1.0, ua.VariantType.Float), StatusCode=ua.StatusCode(ua.StatusCodes.BadSensorFailure)
        )
        await broken.write_value(bad)
        print("serves", flush=True)
        number = first
        while True:
            at = datetime.now(UTC)
            value = ua.DataValue(ua.Variant(float(number), ua.VariantType.Double), SourceTimestamp=at)
            await temperature.write_value(value)
            print(number, (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1), flush=True)
            number += 1
            if number % 20 == 0:
                await running.write_value(number % 40 == 0)
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
