"""Everything that reads what others wrote, called as the doors call it. What each may raise is what its docstring says, no more."""

import asyncio
import base64
import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any, Final

import jwt
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import strategies as st

from fuzz.messages import bodies, damaged, messages, texts
from fuzz.rounds import Target
from services.anomaly import scorer
from services.anomaly import service as alarms
from services.common.directory import Directory
from services.common.errors import HubError
from services.common.evidence import Signer, Statement, Verifier, new_key
from services.common.identity import Role, bearer_key
from services.common.kafka import Cluster, Poison
from services.common.logs import accepted_correlation_id
from services.common.tokens import Issuer, Tokens, keys_in
from services.funding import paging
from services.ingest import asked
from services.ingest.domain import Sender
from services.ingest.mqtt import payload as mqttpayload
from services.ingest.mqtt import sparkplug
from services.ingest.registry import claimcodes, machinetable
from services.ingest.telemetry import jsonbatches, lineprotocol
from services.ingest.telemetry.frames import FrameCheck
from services.matching.service import checks
from smdih.directory.v1 import directory_pb2
from smdih.ingest.v1 import births_pb2, records_pb2, telemetry_pb2
from smdih.sparkplug.v1 import payload_pb2
from smdih_client import history
from smdih_client.recording import NotARecording

NOW_US: Final = 1_764_000_000_000_000
BLOCKS_MAX: Final = 10

json_values: Final = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


class _Clock:
    def now_us(self) -> int:
        return NOW_US


def _check() -> FrameCheck:
    """One machine of the firm 1 with two signals, one of them in a range."""
    directory = Directory(Cluster("nowhere"), clock=_Clock(), kinds=("machine",))
    signals = (directory_pb2.Signal(id=1, name="a", range_min=-10, range_max=10), directory_pb2.Signal(id=2, name="b"))
    machine = directory_pb2.Machine(id=5, firm_id=1, path="acme/works/press", signals=signals)
    directory.machines.entries[5] = directory_pb2.DirectoryEntry(machine=machine).SerializeToString()
    return FrameCheck(directory, _Clock())


_CHECK: Final = _check()
_SENDER: Final = Sender(firm_id=1, credential_id=1, source="fuzz", door="grpc", correlation_id="c")


# --- batches of telemetry ---------------------------------------------------------------------------------------------


def _checked(batch: telemetry_pb2.Batch) -> None:
    checked = _CHECK.check(_SENDER, batch)
    for part in checked.frames:
        scorer.decode(records_pb2.SamplesRecord(batches=[part]).SerializeToString())


def _json_telemetry(document: Any) -> None:
    try:
        _, reads = jsonbatches.read_body(document)
    except jsonbatches.NotTelemetry:
        return
    for read in reads:
        for batch in read.batches:
            _checked(batch)
        for fault in read.faults.values():
            read.raw(fault, b"")


def _record(body: bytes) -> None:
    with contextlib.suppress(Poison):
        scorer.decode(body)


# --- line protocol ----------------------------------------------------------------------------------------------------

_LINE_PARTS: Final = (
    *(b",", b"=", b" ", b"\n", b"\r", b'"', b"\\", b"#", b"\x00", b"\xff", "ü".encode()),
    *(
        b"machine=5",
        b"acme/works/press",
        b"a=1",
        b"b=2i",
        b"c=t",
        b'd="x"',
        b"1764000000000000",
        b"-1",
        b"1e308",
        b"9" * 25,
        b"NaN",
        b"i",
        b"u",
    ),
)
_lines: Final = st.binary(max_size=400) | st.lists(st.sampled_from(_LINE_PARTS), max_size=60).map(b"".join)


def _line_protocol(given: tuple[bytes, str]) -> None:
    body, precision = given
    try:
        reading = lineprotocol.read(body, precision=precision, now_us=NOW_US)
        batches = lineprotocol.batches(reading.blocks, lambda machine_id, path: ("a", "b"))
    except lineprotocol.TooMany:
        return
    for batch in batches:
        _checked(batch)
    lineprotocol.by_reason(reading.faults)


# --- MQTT -------------------------------------------------------------------------------------------------------------

_SPARKPLUG_TOPICS: Final = [
    f"spBv1.0/acme/{kind}/node{rest}"
    for kind in ("NBIRTH", "NDEATH", "NDATA", "DBIRTH", "DDATA", "DDEATH", "NCMD", "X")
    for rest in ("", "/press", "/a/b")
]


def _sparkplug(heard: list[tuple[str, bytes, bool]]) -> None:
    """One node hears all of it, and what it knows can be kept and taken up again."""
    node = sparkplug.Node("acme", "node")
    for number, (name, body, is_again) in enumerate(heard):
        topic = sparkplug.read_topic(name)
        if topic is not None:
            node.hear(topic, body, float(number), is_again=is_again)
            node.overdue(float(number))
            kept = node.record(NOW_US).SerializeToString()
            node = sparkplug.Node("acme", "node", births_pb2.NodeRecord.FromString(kept))
        sparkplug.says_offline(body)


def _mqtt(given: tuple[str, bytes]) -> None:
    path, body = given
    read = mqttpayload.read(path, body)
    for sample in read.samples:
        _checked(telemetry_pb2.Batch(machine_id=5, times_us=[sample.time_us], signals=["a"], values=[sample.value]))


# --- tables, files, codes and tokens ----------------------------------------------------------------------------------

_CELLS: Final = st.sampled_from(
    [
        "machine",
        "signal",
        "site",
        "leeds",
        "press",
        "unit",
        "kind",
        "=1+1",
        "'=x",
        "-5",
        "1e400",
        "nan",
        '"',
        ",",
        ";",
        "\t",
        "\n",
        "\r",
        "\ufeff",
        "machine,signal\n",
    ]
) | st.text(max_size=8)
_tables: Final = st.binary(max_size=300) | st.lists(_CELLS, max_size=40).map("".join).map(
    lambda text: text.encode("utf-8", "ignore")
)


def _machine_table(body: bytes) -> None:
    for whole in (body, (",".join(machinetable.COLUMNS) + "\n").encode() + body):
        try:
            lines = machinetable.read(whole)
        except machinetable.BadTable:
            continue
        machinetable.plan(lines, firm_slug="acme", sites={"leeds": 1}, known={})


_HISTORY: Final = st.sampled_from(
    [
        "time,a,b\n",
        "time;a;b\n",
        "2026-11-23T12:00:00Z,1,2\n",
        "1764000000,1,\n",
        "x,y,z\n",
        '"',
        ",",
        "\r",
        "\n",
        "\x00",
        "1e999",
        "NaN",
        "-",
        "9" * 30,
        "\ufeff",
    ]
) | st.text(max_size=6)
_histories: Final = st.binary(max_size=300) | st.lists(_HISTORY, max_size=30).map("".join).map(
    lambda text: text.encode("utf-8", "ignore")
)


def _history(body: bytes) -> None:
    """As a gateway's owner would feed it: from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "press.csv"
        path.write_bytes(body)
        with contextlib.suppress(NotARecording):
            for _, block in zip(range(BLOCKS_MAX), history.blocks(path), strict=False):
                assert len(block.times_us) == len(block.values) == len(block.rows)


def _claim_code(text: str) -> None:
    with contextlib.suppress(claimcodes.Mistyped):
        claimcodes.lookup(claimcodes.read(text))


def _tokens(text: str) -> None:
    """Tokens of pages and watches, keys and correlation ids: refused as invalid, or read."""
    bearer_key(text)
    accepted_correlation_id(text)
    for read in (
        asked.number_in_token,
        lambda token: paging.page(0, token),
        checks.after_id,
        checks.before_token,
        checks.session_token,
        alarms._place_of,
        alarms._after,
    ):
        with contextlib.suppress(HubError):
            read(text)


_token_texts: Final = (
    texts | st.from_regex(r"\A[0-9.\-]{0,20}[0-9a-f]{0,32}\Z") | st.from_regex(r"\A\d{1,30}([.,-]\d{0,30}){0,4}\Z")
)

_SIGNER: Final = Signer(new_key())
_EVIDENCE: Final = _SIGNER.sign(
    Statement(
        measure="energy_kwh", firm_id=1, machine_id=5, machine_path="acme/works/press", from_us=1, to_us=2, value="1.5",
        unit="kWh", coverage="1", method="m", issued_us=3,
    )
)  # fmt: skip


@st.composite
def _evidence_given(draw: st.DrawFn) -> Any:
    """Good evidence with a part of it replaced."""
    changed = json.loads(json.dumps(_EVIDENCE))
    where = draw(st.sampled_from([changed, changed["statement"]]))
    where[draw(st.sampled_from([*where, "extra"]))] = draw(json_values)
    return changed


def _evidence(given: Any) -> None:
    """Only what was signed passes."""
    with contextlib.suppress(HubError):
        statement = Verifier([_SIGNER.public_key]).verify(given)
        assert given == _EVIDENCE, statement


# --- tokens of people -------------------------------------------------------------------------------------------------

_KEY: Final = ed25519.Ed25519PrivateKey.generate()
_JWK: Final = json.loads(jwt.get_algorithm_by_name("EdDSA").to_jwk(_KEY.public_key())) | {"kid": "ed", "use": "sig"}
_RIGHT: Final = {"iss": "us", "aud": "hub", "sub": "alice", "exp": NOW_US // 1_000_000 + 600, "smdih_role": "operator"}
_CLAIMS: Final = (*_RIGHT, "iat", "nbf", "smdih_firm_id", "smdih_partner_id", "smdih_provider_id")


def _signed(given: tuple[dict[str, Any], dict[str, Any]]) -> str:
    """By the right key, whatever it says."""
    claims, header = given
    parts = [json.dumps(header | {"typ": "JWT"}), json.dumps(_RIGHT | claims)]
    text = b".".join(base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in parts)
    return (text + b"." + base64.urlsafe_b64encode(_KEY.sign(text)).rstrip(b"=")).decode()


_roles: Final = st.sampled_from(["firm", "partner", "provider", "assessor", "operator"])
_signed_tokens: Final = st.tuples(
    st.dictionaries(st.sampled_from(_CLAIMS), json_values | _roles | texts | st.integers(0, 2**63), max_size=4),
    st.just({"alg": "EdDSA", "kid": "ed"})
    | st.fixed_dictionaries({"alg": st.just("EdDSA") | json_values, "kid": st.just("ed") | json_values}),
).map(_signed)
_bearers: Final = (
    _signed_tokens | damaged(_signed_tokens.map(str.encode)).map(lambda raw: raw.decode("latin-1")) | texts
)


def _token(bearer: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"keys": [_JWK]}, file)
        file.flush()
        taken = Tokens(Issuer("us", "hub", file.name), clock=_Clock())
        with contextlib.suppress(HubError):
            caller = asyncio.run(taken.caller_of(bearer))
            assert caller.role is not Role.DEVICE


_key_sets: Final = damaged(st.just(json.dumps({"keys": [_JWK]}).encode())) | st.fixed_dictionaries(
    {"keys": json_values | st.lists(st.dictionaries(st.sampled_from(sorted(_JWK)), json_values) | st.just(_JWK))}
).map(lambda document: json.dumps(document).encode())


def _key_set(document: bytes) -> None:
    with contextlib.suppress(ValueError):
        keys_in(document)


TARGETS: Final = (
    Target("batch", messages(telemetry_pb2.Batch.DESCRIPTOR), _checked),
    Target("json-telemetry", json_values | st.fixed_dictionaries(
        {"batches": st.lists(st.fixed_dictionaries(
            {"machine": st.just(5) | json_values},
            optional={"sequence": json_values, "frames": st.lists(st.fixed_dictionaries(
                {
                    "ts": st.integers(0, 2**63) | json_values,
                    "values": st.dictionaries(st.sampled_from("abc"), json_values, max_size=3),
                }
            ), max_size=3)},
        ), max_size=2)}, optional={"source": json_values}), _json_telemetry),
    Target("samples-record", bodies(records_pb2.SamplesRecord.DESCRIPTOR), _record),
    Target("line-protocol", st.tuples(_lines, st.sampled_from(sorted(lineprotocol.PRECISIONS))), _line_protocol),
    Target("sparkplug", st.lists(
        st.tuples(st.sampled_from(_SPARKPLUG_TOPICS) | texts, bodies(payload_pb2.Payload.DESCRIPTOR), st.booleans()), max_size=6
    ), _sparkplug),
    Target("mqtt-json", st.tuples(texts, json_values.map(lambda value: json.dumps(value).encode()) | damaged(
        st.just(b'{"timestamp_ms": 1764000000000, "value": 21.5}')
        | st.just(b'{"ts": 1764000000000, "values": {"a": 1, "b": null}}')
    )), _mqtt),
    Target("machine-table", _tables, _machine_table),
    Target("history-file", _histories, _history),
    Target("claim-code", st.text(max_size=80) | texts, _claim_code),
    Target("tokens", _token_texts, _tokens),
    Target("token", _bearers, _token),
    Target("key-set", _key_sets, _key_set),
    Target("evidence", _evidence_given(), _evidence),
)  # fmt: skip
