"""TLS of the doors, with real certificates and connections on this machine."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from pydantic import ValidationError

from localstack.certificates import Authority, Pair
from services.common import http, rpc, tls
from services.common.clock import SystemClock
from services.common.directory import Directory
from services.common.entrance import NotForProduction, open_entrance
from services.common.errors import Forbidden
from services.common.kafka import Cluster
from services.common.runtime import Runtime
from services.common.settings import Settings
from services.common.tls import BadCertificate, Files, PeerChannel, Peers, Tls
from smdih.ingest.v1 import claim_pb2, claim_pb2_grpc
from smdih_client.tls import Tls as ClientTls
from smdih_client.tls import open_channel

METHOD = "/smdih.ingest.v1.ClaimService/ExchangeClaimCode"


class Echo(claim_pb2_grpc.ClaimServiceServicer):
    """Answers after as long as it is asked to, in milliseconds."""

    async def ExchangeClaimCode(
        self, request: claim_pb2.ExchangeClaimCodeRequest, context: Any
    ) -> claim_pb2.ExchangeClaimCodeResponse:
        await asyncio.sleep(float(request.code or 0) / 1000)
        return claim_pb2.ExchangeClaimCodeResponse(site=request.request_id)

    async def CreateClaimCode(self, request: object, context: Any) -> claim_pb2.CreateClaimCodeResponse:
        raise AssertionError("nobody calls this")

    async def CancelClaimCode(self, request: object, context: Any) -> claim_pb2.CancelClaimCodeResponse:
        raise AssertionError("nobody calls this")


def files(pair: Pair, **more: Path) -> Files:
    return Files(str(pair.certificate), str(pair.key), **{name: str(path) for name, path in more.items()})


def signed_by(authority: Authority, key: Any, path: Path) -> Pair:
    """A certificate without any name."""
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(authority._name, x509.Name([]), key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(authority._key, hashes.SHA256())
    )
    pair = Pair(path.with_suffix(".pem"), path.with_suffix(".key"))
    pair.certificate.write_bytes(certificate.public_bytes(Encoding.PEM))
    pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return pair


@asynccontextmanager
async def serving(served: Tls | None, **settings: Any) -> AsyncIterator[str]:
    nowhere = Directory(Cluster("127.0.0.1:1", ""), clock=SystemClock(), kinds=())
    async with rpc.serve(
        host="127.0.0.1",
        port=0,
        directory=nowhere,
        register=[(claim_pb2_grpc.add_ClaimServiceServicer_to_server, Echo())],
        open_methods=[METHOD],
        tls=served,
        **settings,
    ) as port:
        yield f"127.0.0.1:{port}"


async def ask(channel: grpc.aio.Channel, *, ms: int = 0) -> str:
    request = claim_pb2.ExchangeClaimCodeRequest(code=str(ms), request_id="hello")
    answer: claim_pb2.ExchangeClaimCodeResponse = await claim_pb2_grpc.ClaimServiceStub(channel).ExchangeClaimCode(
        request, timeout=10
    )
    return answer.site


async def status(target: str, credentials: ClientTls | None) -> grpc.StatusCode:
    async with open_channel(target, credentials) as channel:
        try:
            await ask(channel)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def served_serial(port: str) -> int:
    """Number of the certificate that the port shows to a new connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", int(port), ssl=context)
    from cryptography import x509

    shown = x509.load_der_x509_certificate(writer.get_extra_info("ssl_object").getpeercert(True))
    writer.transport.abort()
    return shown.serial_number


async def test_only_those_come_in_who_know_the_hub_and_are_known(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path, "other")
    served = Tls(files(authority.issue(["ingest"]), client_ca=authority.file))
    mine, stranger = authority.issue(["gateway-1"]), other.issue(["gateway-1"])
    ended = authority.issue(["gateway-1"], valid=timedelta(days=-1))
    async with serving(served) as target:
        assert await status(target, ClientTls(authority.file, mine.certificate, mine.key)) is grpc.StatusCode.OK
        for refused in (
            None,  # no TLS
            ClientTls(authority.file),  # no certificate
            ClientTls(authority.file, stranger.certificate, stranger.key),  # of another authority
            ClientTls(authority.file, ended.certificate, ended.key),
            ClientTls(other.file, mine.certificate, mine.key),  # takes the hub for somebody else
        ):
            assert await status(target, refused) is grpc.StatusCode.UNAVAILABLE
    async with serving(Tls(files(authority.issue(["ingest"])))) as target:
        assert await status(target, ClientTls(authority.file)) is grpc.StatusCode.OK


async def test_rotation_serves_new_connections_and_fails_no_call(tmp_path: Path) -> None:
    """Certificates and authorities of both sides are replaced under load; a call that is under way ends on its connection."""
    old, new = Authority(tmp_path, "old"), Authority(tmp_path, "new")
    both = tmp_path / "both.pem"
    both.write_bytes(old.file.read_bytes())
    server, client = old.issue(["ingest"]), old.issue(["anomaly"])
    served = Tls(files(server, client_ca=both))
    calling = Tls(files(client, ca=both))
    answered = 0
    async with (
        serving(served, internal_calls={"anomaly": (METHOD,)}) as target,
        AsyncExitStack() as stack,
        asyncio.timeout(30),
    ):
        peer = PeerChannel(target, calling)
        stack.push_async_callback(peer.close)
        slow = asyncio.create_task(ask(peer.channel(), ms=1_000))
        rotated = asyncio.Event()

        async def keep_asking() -> None:
            nonlocal answered
            while not rotated.is_set():
                assert await ask(peer.channel()) == "hello"
                answered += 1

        asking = asyncio.create_task(keep_asking())
        before = await served_serial(target.rpartition(":")[2])
        # Both know both authorities first, then the certificates change, then the old authority goes.
        for both_bytes, pairs in (
            (old.file.read_bytes() + new.file.read_bytes(), ()),
            (None, ((server, new.issue(["ingest"])), (client, new.issue(["anomaly"])))),
            (new.file.read_bytes(), ()),
        ):
            if both_bytes is not None:
                both.write_bytes(both_bytes)
            for mine, fresh in pairs:
                mine.replace_by(fresh)
            assert served.reload()
            assert calling.reload()
            assert not served.reload()
            seen = answered
            while answered < seen + 20:
                assert not asking.done()
                await asyncio.sleep(0.01)
        assert await served_serial(target.rpartition(":")[2]) != before
        rotated.set()
        await asking
        assert await slow == "hello"
        # Who still comes with the old ones is refused now.
        stale = old.issue(["anomaly"])
        assert await status(target, ClientTls(new.file, stale.certificate, stale.key)) is grpc.StatusCode.UNAVAILABLE
    assert answered > 60


async def test_http_serves_the_new_certificate_to_new_connections(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue(["ingest"])
    served = Tls(files(pair))
    app = http.application("test", runtime=Runtime(), directory=None)
    context = ssl.create_default_context(cafile=authority.file)
    async with http.serve(app, host="127.0.0.1", port=0, tls=served) as port:
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=context) as client:
            assert (await client.get("/livez")).status_code == 200
            before = await served_serial(str(port))
            pair.replace_by(authority.issue(["ingest"]))
            assert served.reload()
            assert await served_serial(str(port)) != before
            assert (await client.get("/livez")).status_code == 200
        async with httpx.AsyncClient(base_url=f"https://127.0.0.1:{port}", verify=context) as client:
            assert (await client.get("/livez")).status_code == 200
        with pytest.raises(httpx.ConnectError):
            await httpx.AsyncClient().get(f"https://127.0.0.1:{port}/livez")


async def test_files_that_do_not_fit_together_are_left_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, fresh = authority.issue(["ingest"]), authority.issue(["ingest"])
    served = Tls(files(pair))
    async with serving(served) as target:
        before = await served_serial(target.rpartition(":")[2])
        fresh.certificate.replace(pair.certificate)  # the key has not come yet
        assert not served.reload()
        assert await served_serial(target.rpartition(":")[2]) == before
        fresh.key.replace(pair.key)
        assert served.reload()
        assert await served_serial(target.rpartition(":")[2]) != before
        pair.key.unlink()
        assert not served.reload()
        pair.key.write_text("no key")
        assert not served.reload()
        weak = signed_by(authority, rsa.generate_private_key(65537, 1024), tmp_path / "weak")
        pair.replace_by(weak)
        assert not served.reload()
        assert await status(target, ClientTls(authority.file)) is grpc.StatusCode.OK


def test_what_makes_no_certificate_is_refused_at_the_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, two = authority.issue(["a"]), authority.issue(["b"])
    text = tmp_path / "text"
    text.write_text("hello")
    for bad, why in (
        (Files(str(one.certificate), ""), "go together"),
        (Files(str(one.certificate), str(two.key)), "is not the key of"),
        (Files(str(text), str(one.key)), "no PEM certificate"),
        (Files(str(one.certificate), str(text)), "no PEM key"),
    ):
        with pytest.raises(BadCertificate, match=why):
            Tls(bad)
    with pytest.raises(OSError, match="missing"):
        Tls(Files(str(tmp_path / "missing"), str(one.key)))


def test_the_end_of_certificates_is_a_metric(tmp_path: Path) -> None:
    """Also of one that has ended: it is served, so that the probes go on telling, and the metric calls somebody."""
    authority = Authority(tmp_path)
    Tls(files(authority.issue(["ingest"], valid=timedelta(hours=-1)), client_ca=authority.file))
    found = {sample.labels["file"]: sample.value for metric in tls.expires.collect() for sample in metric.samples}
    assert found["certificate"] == pytest.approx(time.time() - 3600, abs=60)
    assert found["client_ca"] == pytest.approx(authority.ends.timestamp(), abs=1)


async def test_a_services_certificate_opens_only_what_the_service_calls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    served = Tls(files(authority.issue(["ingest"]), client_ca=authority.file))
    by_uri = authority.issue([], uris=["spiffe://smdih/anomaly"])
    by_name, other, gateway = (authority.issue([name]) for name in ("anomaly", "funding", "gateway-1"))

    def shown(pair: Pair) -> ClientTls:
        return ClientTls(authority.file, pair.certificate, pair.key)

    calls = {"anomaly": (METHOD,), "funding": ("/smdih.ingest.v1.ClaimService/Else",)}
    async with serving(served, internal_calls=calls) as target:
        assert await status(target, shown(by_name)) is grpc.StatusCode.OK
        assert await status(target, shown(by_uri)) is grpc.StatusCode.OK
        assert await status(target, shown(gateway)) is grpc.StatusCode.OK
        assert await status(target, shown(other)) is grpc.StatusCode.PERMISSION_DENIED


async def test_the_internal_port_is_for_services_and_the_other_asks_for_no_certificate(tmp_path: Path) -> None:
    from localstack.servers import free_port

    authority = Authority(tmp_path)
    served = Tls(files(authority.issue(["ingest"]), client_ca=authority.file))
    anomaly, gateway = authority.issue(["anomaly"]), authority.issue(["gateway-1"])
    nameless = signed_by(authority, ec.generate_private_key(ec.SECP256R1()), tmp_path / "nameless")
    port = free_port()
    async with serving(served, internal_port=port, internal_calls={"anomaly": (METHOD,)}) as public:
        internal = f"127.0.0.1:{port}"
        assert await status(public, ClientTls(authority.file)) is grpc.StatusCode.OK
        assert await status(internal, ClientTls(authority.file)) is grpc.StatusCode.UNAVAILABLE
        denied = grpc.StatusCode.PERMISSION_DENIED
        for pair, expected in ((anomaly, grpc.StatusCode.OK), (gateway, denied), (nameless, denied)):
            assert await status(internal, ClientTls(authority.file, pair.certificate, pair.key)) is expected


def test_peers_are_known_by_whole_names() -> None:
    peers = Peers({"anomaly": ("/a/B",)}, services_only=True)
    peers.check({"anomaly", "anomaly.smdih.svc"}, "/a/B")
    for names in ({"anomaly.example.com"}, {"spiffe://other/anomaly"}, {"xanomaly"}, {"number-1"}):
        with pytest.raises(Forbidden):
            peers.check(names, "/a/B")
    with pytest.raises(Forbidden):
        peers.check({"anomaly"}, "/a/C")


async def test_production_refuses_plain_text(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair = authority.issue(["ingest"])
    runtime = Runtime()
    base = {"kafka_bootstrap": "k:1", "database_dsn": "postgresql://x", "database_in_the_clear": True}
    named = {"tls_certificate": str(pair.certificate), "tls_key": str(pair.key)}
    with pytest.raises(NotForProduction, match="SMDIH_TLS_CERTIFICATE"):
        open_entrance(runtime, Settings.model_validate(base | {"production": True}), takes_keys=True)
    assert open_entrance(runtime, Settings.model_validate(base), takes_keys=True).tls is None
    probes = open_entrance(runtime, Settings.model_validate(base | {"production": True}), takes_keys=False)
    with pytest.raises(NotForProduction, match="SMDIH_TLS_CA"):
        probes.peer("ingest:9000")
    with pytest.raises(BadCertificate, match="SMDIH_TLS_CLIENT_CA"):
        open_entrance(runtime, Settings.model_validate(base | named | {"grpc_internal_port": 9}), takes_keys=True)
    with pytest.raises(NotForProduction, match="SMDIH_PROBE_PORT"):
        open_entrance(runtime, Settings.model_validate(base | named | {"production": True}), takes_keys=True)
    whole = base | named | {"production": True, "probe_port": 1}
    good = open_entrance(runtime, Settings.model_validate(whole), takes_keys=True)
    assert good.tls is not None
    assert good.tls.serves
    await runtime._stack.aclose()


def test_production_refuses_a_database_that_could_be_another() -> None:
    given = {
        "kafka_bootstrap": "k:1",
        "production": True,
        "database_dsn": "postgresql://db:5432/hub?user=hidden&sslmode=require",
    }
    with pytest.raises(ValidationError, match="SMDIH_DATABASE_CA_FILE") as told:
        Settings.model_validate(given)
    assert "hidden" not in str(told.value)
    Settings.model_validate(given | {"production": False})
    Settings.model_validate(given | {"database_in_the_clear": True})
    Settings.model_validate(given | {"database_dsn": "postgresql://db/hub?sslmode=verify-full&sslrootcert=/ca"})
    made = Settings.model_validate(given | {"database_ca_file": "/run/a b/ca.crt"}).database_dsn
    assert made == "postgresql://db:5432/hub?user=hidden&sslmode=verify-full&sslrootcert=/run/a%20b/ca.crt"
