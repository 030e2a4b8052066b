"""The cluster of the check: kubectl, the local overlay with this machine's servers filled in and secured as in production, where
Services answer."""

import base64
import json
import os
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from secrets import token_bytes, token_hex
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from deploy.k8s import write
from localstack.certificates import Authority
from localstack.hub import ROLES, Running
from localstack.secured import SecuredKafka
from localstack.servers import LOCAL, ROOT
from services.common.access import ACCESSES, rules
from services.common.evidence import Signer, new_key
from services.logins import LOGINS

NAMESPACE = "smdih"
DATABASE = "smdih"
OVERLAY = LOCAL / "k8s/overlay"
COMMAND_TIMEOUT_S = 900


class ClusterError(Exception):
    """The cluster cannot be used; the message says why."""


@dataclass(frozen=True)
class Mqtt:
    port: int
    user: str
    password: str


class Around:
    """What the hub of one run stands on, at an address of this machine that pods reach; everybody comes as in production."""

    def __init__(
        self, host: str, node: str, *, administrator: str, kafka: SecuredKafka, mqtt: Mqtt, authority: Authority
    ) -> None:
        """`administrator`: a DSN of the database server. `node`: where node ports answer, so certificates are for it too."""
        self.host, self.kafka, self.mqtt = host, kafka, mqtt
        self._authority = authority
        at = urlsplit(administrator)
        assert at.hostname is not None
        self.database = (at.hostname, at.port or 5432)
        # For who watches from beside.
        self.watching = urlunsplit(at._replace(path=f"/{DATABASE}"))
        inside = at._replace(path=f"/{DATABASE}", netloc=f"{at.username}:{at.password}@timescaledb:5432")
        self._dsns = {"admin": urlunsplit(inside)} | {
            name: urlunsplit(inside._replace(netloc=f"smdih_{name}_login:{token_hex(16)}@timescaledb:5432"))
            for name in LOGINS
        }
        self._evidence = new_key()
        self._pairs = {
            role.name: authority.issue([role.name], uris=[f"spiffe://smdih/{write.service_of(role)}"], addresses=[node])
            for role in ROLES
            if role.has_grpc
        }

    @property
    def ca(self) -> Path:
        return self._authority.file

    def secrets(self) -> dict[str, dict[str, str]]:
        """By name; in production operators make them, Strimzi and cert-manager."""
        ca = self.ca.read_text()
        return {
            **{f"smdih-database-{name}": {"dsn": dsn} for name, dsn in self._dsns.items()},
            "smdih-evidence": {"private": self._evidence, "public": Signer(self._evidence).public_key},
            "smdih-mqtt": {"password": self.mqtt.password},
            "smdih-seal": {"keys": base64.b64encode(token_bytes(32)).decode()},
            **{
                access.user: {"password": self.kafka.identity(access.user).password}
                for access in ACCESSES
                if rules(access)
            },
            f"{write.CLUSTER}-cluster-ca-cert": {"ca.crt": ca},
            "smdih-tls-database": {"ca.crt": ca},
            **{
                f"smdih-tls-{name}": {
                    "tls.crt": pair.certificate.read_text(),
                    "tls.key": pair.key.read_text(),
                    "ca.crt": ca,
                }
                for name, pair in self._pairs.items()
            },
        }


class Cluster:
    """What KUBECTL reaches."""

    def __init__(self) -> None:
        self._command = shlex.split(os.environ.get("KUBECTL", "kubectl"))

    def run(self, *arguments: str, given: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """kubectl with these arguments. Raises ClusterError when it fails and `check` is set."""
        done = subprocess.run(
            [*self._command, *arguments], input=given, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S
        )
        if check and done.returncode:
            raise ClusterError(f"kubectl {' '.join(arguments)}: {done.stderr.strip()}")
        return done

    def get(self, *arguments: str) -> Any:
        """The objects, read from JSON."""
        return json.loads(self.run("-n", NAMESPACE, "get", *arguments, "-o", "json").stdout)

    def node_address(self) -> str:
        """Where node ports answer: K8S_NODE, or the first node's own address."""
        if named := os.environ.get("K8S_NODE"):
            return named
        nodes = json.loads(self.run("get", "nodes", "-o", "json").stdout)["items"]
        for address in (one for node in nodes for one in node["status"]["addresses"]):
            if address["type"] == "InternalIP":
                return str(address["address"])
        raise ClusterError("no node says its address: name one that node ports answer at in K8S_NODE")

    def pods(self, name: str) -> list[dict[str, Any]]:
        """The pods of a process that are not on their way out."""
        found = self.get("pod", "-l", f"app.kubernetes.io/name={name}")["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def pod_ids(self) -> set[str]:
        """All pods of the namespace, each by an id that no other will have."""
        return {str(pod["metadata"]["uid"]) for pod in self.get("pod")["items"]}

    def evict(self, pod: str) -> bool:
        """Ask for an eviction, as a drain would; False when the disruption budget refuses it."""
        wanted = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": NAMESPACE},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        done = self.run("create", "--raw", path, "-f", "-", given=json.dumps(wanted), check=False)
        if done.returncode and "disruption budget" not in done.stderr + done.stdout:
            raise ClusterError(f"evicting {pod}: {done.stderr.strip()}")
        return done.returncode == 0

    def processes(self, node: str) -> dict[str, Running]:
        """The hub's processes by the node ports of their Services."""
        found = {}
        services = {one["metadata"]["name"]: one for one in self.get("service")["items"]}
        for role in ROLES:
            ports = {port["name"]: port.get("nodePort", 0) for port in services[role.name]["spec"]["ports"]}
            if any(ports.values()):
                scheme = "https" if role.has_grpc else "http"
                found[role.name] = Running(
                    role,
                    ports.get("http", 0),
                    ports.get("grpc", 0),
                    host=node,
                    scheme=scheme,
                    probe_port=ports["probes"],
                )
        return found


def this_machine_as_seen_from(node: str) -> str:
    """The address by which pods reach this machine: K8S_SERVERS_HOST, or the one that the way to the node leaves from."""
    if named := os.environ.get("K8S_SERVERS_HOST"):
        return named
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((node, 9))
        return str(probe.getsockname()[0])


def write_overlay(around: Around, image: str, *, log_level: str = "INFO") -> Path:
    """The local overlay with addresses and throw-away secrets of one run, and with TLS, the brokers' users and a backup; returns
    its folder."""
    kafka_host, _, kafka_port = around.kafka.bootstrap.rpartition(":")
    behind = {
        "kafka": ("kafka", kafka_host, int(kafka_port)),
        "timescaledb": ("postgresql", *around.database),
        "mqtt": ("mqtt", around.host, around.mqtt.port),
    }
    made = [_endpoints(service, *where) for service, where in behind.items()]
    made += [_secret(name, values) for name, values in around.secrets().items()]
    policies = {"to-kafka": "kafka", "to-database": "timescaledb", "to-mqtt": "mqtt"}
    name, _, tag = image.rpartition(":")
    components = [
        os.path.relpath(ROOT / f"deploy/k8s/components/{name}", OVERLAY) for name in ("tls", "backup", "database-tls")
    ]
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": [os.path.relpath(ROOT / "deploy/k8s/overlays/local", OVERLAY), "run.json"],
        "components": components,
        "images": [
            {"name": image_name, "newName": name, "newTag": tag} for image_name in ("localhost/smdih-hub", "smdih-hub")
        ],
        "configMapGenerator": [
            {
                "name": "mqtt",
                "behavior": "merge",
                # The broker's authority is that of Kafka here, whose certificate the bridge has.
                "literals": [f"SMDIH_MQTT_USER={around.mqtt.user}", "SMDIH_MQTT_CA=/run/secrets/kafka/ca.crt"],
            },
            {"name": "hub", "behavior": "merge", "literals": [f"SMDIH_LOG_LEVEL={log_level}"]},
        ],
        "patches": [
            # What the operators do that are not on this cluster: Strimzi's users are made at the broker, certificates here.
            *({"patch": json.dumps(patch)} for patch in write.client_patches()),
            *({"patch": json.dumps(_without(one))} for one in write.certificate_objects()),
            # No storage is provided here.
            {
                "patch": json.dumps(
                    _without({"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "backup"}})
                )
            },
            {
                "target": {"kind": "CronJob", "name": "(backup|restore|backup-shelf)"},
                "patch": json.dumps(_volume_of_job("backup", {"emptyDir": {"sizeLimit": "1Gi"}})),
            },
            # Where the component tls looks for it.
            {
                "target": {"kind": "Service", "name": "mqtt"},
                "patch": json.dumps([{"op": "replace", "path": "/spec/ports/0/port", "value": 8883}]),
            },
            *(
                {
                    "target": {"kind": "NetworkPolicy", "name": policy},
                    "patch": json.dumps(
                        [{"op": "replace", "path": "/spec/egress", "value": [_egress(*behind[service])]}]
                    ),
                }
                for policy, service in policies.items()
            ),
        ],
    }
    OVERLAY.mkdir(parents=True, exist_ok=True)
    OVERLAY.chmod(0o700)
    (OVERLAY / "run.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": made}))
    (OVERLAY / "kustomization.yaml").write_text(json.dumps(kustomization, indent=1))
    return OVERLAY


def _without(one: dict[str, Any]) -> dict[str, Any]:
    return {"$patch": "delete", **{key: one[key] for key in ("apiVersion", "kind", "metadata")}}


def _volume_of_job(name: str, source: dict[str, Any]) -> dict[str, Any]:
    """This in place of the volume's claim."""
    spec = {"volumes": [{"name": name, "persistentVolumeClaim": None, **source}]}
    job = {"jobTemplate": {"spec": {"template": {"spec": spec}}}}
    return {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "any"}, "spec": job}


def _endpoints(service: str, port: str, address: str, number: int) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-outside", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": port, "port": number, "protocol": "TCP"}],
        "endpoints": [{"addresses": [address]}],
    }


def _egress(_: str, address: str, number: int) -> dict[str, Any]:
    return {"to": [{"ipBlock": {"cidr": f"{address}/32"}}], "ports": [{"port": number, "protocol": "TCP"}]}


def _secret(name: str, values: dict[str, str]) -> dict[str, Any]:
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "type": "Opaque", "data": data}
