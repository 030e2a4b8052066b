"""A press with an OPC UA server, in a process of its own, to be killed: arguments PORT FIRST [FOLDER].

With a folder (server.der, server.pem, trusted.der in it) it speaks only encrypted, to one trusted client, and wants a login.

Its temperature counts up from FIRST twenty times a second; each value is said with its time in microseconds once the server has it.
"""

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from asyncua import Node, Server, ua
from asyncua.common.utils import ServiceError
from asyncua.crypto.permission_rules import User, UserRole
from asyncua.crypto.validator import CertificateValidator, CertificateValidatorOptions
from cryptography import x509

USER, PASSWORD = "reader", "only for this test"


class OneUser:
    def get_user(self, _server: Any, username: str | None = None, password: Any = None, certificate: Any = None) -> Any:
        return User(role=UserRole.User, name=USER) if (username, password) == (USER, PASSWORD) else None


async def secure(server: Server, folder: Path) -> None:
    server.set_security_policy([ua.SecurityPolicyType.Basic256Sha256_SignAndEncrypt])
    server.set_identity_tokens([ua.UserNameIdentityToken])
    await server.load_certificate(str(folder / "server.der"))
    await server.load_private_key(str(folder / "server.pem"))
    trusted = x509.load_der_x509_certificate((folder / "trusted.der").read_bytes())
    names = CertificateValidator(CertificateValidatorOptions.EXT_VALIDATION | CertificateValidatorOptions.PEER_CLIENT)

    async def validate(certificate: x509.Certificate, described: ua.ApplicationDescription) -> None:
        if certificate != trusted:
            raise ServiceError(ua.StatusCodes.BadCertificateUntrusted)
        await names.validate(certificate, described)

    server.set_certificate_validator(validate)


async def main(port: int, first: int, folder: Path | None) -> None:
    server = Server(user_manager=OneUser() if folder else None)
    await server.init()
    if folder is not None:
        await secure(server, folder)
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
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None))
