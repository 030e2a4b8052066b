"""The cluster of the check: kubectl, the local overlay with this machine's servers filled in, where Services answer."""

import base64
import json
import os
import shlex
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from localstack.hub import ROLES, Running
from localstack.servers import LOCAL, ROOT, Servers
from services.common.evidence import Signer

NAMESPACE = "smdih"
OVERLAY = LOCAL / "k8s/overlay"
COMMAND_TIMEOUT_S = 900


class ClusterError(Exception):
    """The cluster cannot be used; the message says why."""


@dataclass(frozen=True)
class Mqtt:
    port: int
    user: str
    password: str


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
                found[role.name] = Running(role, ports["http"], ports.get("grpc", 0), host=node)
        return found


def this_machine_as_seen_from(node: str) -> str:
    """The address by which pods reach this machine: K8S_SERVERS_HOST, or the one that the way to the node leaves from."""
    if named := os.environ.get("K8S_SERVERS_HOST"):
        return named
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((node, 9))
        return str(probe.getsockname()[0])


def write_overlay(
    servers: Servers, mqtt: Mqtt, host: str, image: str, evidence: str, *, log_level: str = "INFO"
) -> Path:
    """The local overlay with addresses and throw-away secrets of one run; returns its folder."""
    kafka_host, _, kafka_port = servers.kafka_bootstrap.rpartition(":")
    dsn = urlsplit(servers.database_dsn)
    assert dsn.hostname is not None
    inside = urlunsplit(dsn._replace(netloc=f"{dsn.netloc.rpartition('@')[0]}@timescaledb:5432"))
    behind = {
        "kafka": ("kafka", kafka_host, int(kafka_port)),
        "timescaledb": ("postgresql", dsn.hostname, dsn.port or 5432),
        "mqtt": ("mqtt", host, mqtt.port),
    }
    secrets = {
        "smdih-database": {"dsn": inside},
        "smdih-database-owner": {"dsn": inside},
        "smdih-evidence": {"private": evidence, "public": Signer(evidence).public_key},
        "smdih-mqtt": {"password": mqtt.password},
    }
    made = [_endpoints(service, *where) for service, where in behind.items()]
    made += [_secret(name, values) for name, values in secrets.items()]
    policies = {"to-kafka": "kafka", "to-database": "timescaledb", "to-mqtt": "mqtt"}
    name, _, tag = image.rpartition(":")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": NAMESPACE,
        "resources": [os.path.relpath(ROOT / "deploy/k8s/overlays/local", OVERLAY), "run.json"],
        "images": [{"name": "localhost/smdih-hub", "newName": name, "newTag": tag}],
        "configMapGenerator": [
            {"name": "mqtt", "behavior": "merge", "literals": [f"SMDIH_MQTT_USER={mqtt.user}"]},
            {"name": "hub", "behavior": "merge", "literals": [f"SMDIH_LOG_LEVEL={log_level}"]},
        ],
        "patches": [
            {
                "target": {"kind": "NetworkPolicy", "name": policy},
                "patch": json.dumps([{"op": "replace", "path": "/spec/egress", "value": [_egress(*behind[service])]}]),
            }
            for policy, service in policies.items()
        ],
    }
    OVERLAY.mkdir(parents=True, exist_ok=True)
    OVERLAY.chmod(0o700)
    (OVERLAY / "run.json").write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": made}))
    (OVERLAY / "kustomization.yaml").write_text(json.dumps(kustomization, indent=1))
    return OVERLAY


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
