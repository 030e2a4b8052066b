"""Writes what in the manifests follows from elsewhere: topics and users as Strimzi's objects, how each process comes to the brokers
as its user, and the alert rules and who is told of them as the Prometheus operator's objects.

Usage: python -m deploy.k8s.write
"""

import re
from pathlib import Path
from typing import Any

import yaml

from localstack.hub import ROLES, Role
from services.common import topics
from services.common.access import ACCESSES, Access, rules
from services.common.kafka import REQUEST_BYTES_MAX

COMPONENTS = Path(__file__).parent / "components"
RULES = Path(__file__).parents[1] / "prometheus/rules.yml"
ALERTMANAGER = Path(__file__).parents[1] / "alertmanager/alertmanager.yml"
NAMESPACE = "smdih"
# The secret with the addresses of the receivers, each by the receiver's name.
RECEIVERS = "smdih-alert-receivers"
CLUSTER = "kafka"
# As the production overlay sets SMDIH_KAFKA_PARTITIONS and SMDIH_KAFKA_REPLICATION.
PARTITIONS = 16
REPLICAS = 3
KINDS = {
    "anomaly-worker": ("StatefulSet", "apps/v1"),
    "migrate": ("Job", "batch/v1"),
    "reconcile": ("CronJob", "batch/v1"),
}
# Who calls whom inside, by which setting, and where with TLS.
INTERNAL = (
    ("anomaly", "SMDIH_INGEST_GRPC", "door:9091"),
    ("funding", "SMDIH_MATCHING_GRPC", "matching:9091"),
)
HEAD = "# Written by `python -m deploy.k8s.write` from {source}; do not edit.\n"


def topic_objects() -> list[dict[str, Any]]:
    """One object a topic, as services/common/kafka.py would create it."""
    return [_object("KafkaTopic", topic.name, _topic(topic)) for topic in topics.TOPICS]


def _topic(topic: topics.Topic) -> dict[str, Any]:
    config: dict[str, Any] = {"max.message.bytes": REQUEST_BYTES_MAX, "min.insync.replicas": 2}
    if topic.retention_ms is None:
        config["cleanup.policy"] = "compact"
    else:
        config["retention.ms"] = topic.retention_ms
    return {"partitions": topic.partitions or PARTITIONS, "replicas": REPLICAS, "config": config}


def user_objects() -> list[dict[str, Any]]:
    """A user for each process that comes to the brokers, with what it may do there."""
    return [_object("KafkaUser", access.user, _user(access)) for access in ACCESSES if rules(access)]


def _user(access: Access) -> dict[str, Any]:
    acls = [
        {
            "resource": {"type": str(rule.resource), "name": rule.name, "patternType": "literal"},
            "operations": [str(rule.operation)],
        }
        for rule in rules(access)
    ]
    return {"authentication": {"type": "scram-sha-512"}, "authorization": {"type": "simple", "acls": acls}}


def client_patches() -> list[dict[str, Any]]:
    """What is added to the processes of the base: their user, its password, and the brokers' authority."""
    return [_client(access) for access in ACCESSES if rules(access)]


def _client(access: Access) -> dict[str, Any]:
    kind, api = KINDS.get(access.process, ("Deployment", "apps/v1"))
    password = {"secretKeyRef": {"name": access.user, "key": "password"}}
    container = {
        "name": "hub",
        "env": [
            {"name": "SMDIH_KAFKA_SECURITY_PROTOCOL", "value": "SASL_SSL"},
            {"name": "SMDIH_KAFKA_USERNAME", "value": access.user},
            {"name": "SMDIH_KAFKA_PASSWORD", "valueFrom": password},
            {"name": "SMDIH_KAFKA_CA_FILE", "value": "/run/secrets/kafka/ca.crt"},
        ],
        "volumeMounts": [{"name": "kafka-ca", "mountPath": "/run/secrets/kafka", "readOnly": True}],
    }
    authority = {"secretName": f"{CLUSTER}-cluster-ca-cert", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    spec = {"containers": [container], "volumes": [{"name": "kafka-ca", "secret": authority}]}
    made: dict[str, Any] = {"template": {"spec": spec}}
    if kind == "CronJob":
        made = {"jobTemplate": {"spec": made}}
    return {"apiVersion": api, "kind": kind, "metadata": {"name": access.process}, "spec": made}


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"strimzi.io/cluster": CLUSTER}}
    return {"apiVersion": "kafka.strimzi.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def certificate_objects() -> list[dict[str, Any]]:
    """A certificate for each process that callers come to, by cert-manager; its URI names the service inside the hub."""
    return [_certificate(role) for role in ROLES if role.has_grpc]


def _certificate(role: Role) -> dict[str, Any]:
    spec = {
        "secretName": f"smdih-tls-{role.name}",
        "issuerRef": {"kind": "Issuer", "name": "smdih"},
        "privateKey": {"algorithm": "ECDSA", "size": 256, "rotationPolicy": "Always"},
        "usages": ["digital signature", "server auth", "client auth"],
        "dnsNames": [role.name, f"{role.name}.smdih.svc"],
        "uris": [f"spiffe://smdih/{service_of(role)}"],
    }
    return {"apiVersion": "cert-manager.io/v1", "kind": "Certificate", "metadata": {"name": role.name}, "spec": spec}


def tls_patches() -> list[dict[str, Any]]:
    """What is added to these processes: their certificate, and the port for each other."""
    return [_tls(role) for role in ROLES if role.has_grpc]


def _tls(role: Role) -> dict[str, Any]:
    folder = "/run/secrets/tls"
    environment = {
        "SMDIH_TLS_CERTIFICATE": f"{folder}/tls.crt",
        "SMDIH_TLS_KEY": f"{folder}/tls.key",
        "SMDIH_TLS_CA": f"{folder}/ca.crt",
        "SMDIH_TLS_CLIENT_CA": f"{folder}/ca.crt",
        "SMDIH_GRPC_INTERNAL_PORT": "9091",
        **{variable: address for process, variable, address in INTERNAL if process == role.name},
    }
    container = {
        "name": "hub",
        "env": [{"name": name, "value": value} for name, value in environment.items()],
        "ports": [{"name": "grpc-internal", "containerPort": 9091}],
        "volumeMounts": [{"name": "tls", "mountPath": folder, "readOnly": True}],
    }
    # Not defaultMode 0400: the files belong to root, and the process reads them as the pod's group.
    volume = {"name": "tls", "secret": {"secretName": f"smdih-tls-{role.name}", "defaultMode": 0o440}}
    spec = {"containers": [container], "volumes": [volume]}
    metadata = {"name": role.name}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": {"template": {"spec": spec}}}


def service_of(role: Role) -> str:
    """The service that a process belongs to."""
    return role.module.split(".")[1]


def rule_object() -> dict[str, Any]:
    """The alert rules, as they are tested; each alert says its namespace, by which the operator knows whose route it takes."""
    metadata = {"name": "smdih", "labels": {"app.kubernetes.io/name": "smdih"}}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    for rule in (one for group in groups for one in group["rules"] if "alert" in one):
        rule["labels"]["namespace"] = NAMESPACE
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": metadata,
        "spec": {"groups": groups},
    }


def route_object() -> dict[str, Any]:
    """Who is told of what, as Alertmanager's own file says; the addresses come from a secret."""
    config = yaml.safe_load(ALERTMANAGER.read_text())
    spec = {
        "route": _route(config["route"]),
        "inhibitRules": [
            {
                "sourceMatch": _matchers(rule["source_matchers"]),
                "targetMatch": _matchers(rule["target_matchers"]),
                **({"equal": rule["equal"]} if "equal" in rule else {}),
            }
            for rule in config["inhibit_rules"]
        ],
        "receivers": [
            {"name": one["name"], "webhookConfigs": [_webhook(one["name"], each) for each in one["webhook_configs"]]}
            for one in config["receivers"]
        ],
    }
    metadata = {"name": "smdih", "labels": {"app.kubernetes.io/name": "smdih"}}
    return {
        "apiVersion": "monitoring.coreos.com/v1alpha1",
        "kind": "AlertmanagerConfig",
        "metadata": metadata,
        "spec": spec,
    }


def _route(route: dict[str, Any]) -> dict[str, Any]:
    made = {_camel(name): value for name, value in route.items() if name not in ("matchers", "routes")}
    if "matchers" in route:
        made["matchers"] = _matchers(route["matchers"])
    if "routes" in route:
        made["routes"] = [_route(one) for one in route["routes"]]
    return made


def _matchers(texts: list[str]) -> list[dict[str, str]]:
    found = (re.fullmatch(r'(\w+)(=~|!~|!=|=)"(.*)"', text) for text in texts)
    # Equality is what is meant without a type; as a word of its own in YAML it is read in more than one way.
    return [
        {"name": one[1], **({} if one[2] == "=" else {"matchType": one[2]}), "value": one[3]} for one in found if one
    ]


def _webhook(receiver: str, webhook: dict[str, Any]) -> dict[str, Any]:
    rest = {_camel(name): value for name, value in webhook.items() if name != "url"}
    return {"urlSecret": {"name": RECEIVERS, "key": receiver}, **rest}


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


def files() -> dict[Path, str]:
    """What the written files hold."""
    roles = "the processes in localstack/hub.py"
    topics_from, accesses, rules_from = (
        "services/common/topics.py",
        "services/common/access.py",
        "deploy/prometheus/rules.yml",
    )
    return {
        COMPONENTS / "strimzi/topics.yaml": HEAD.format(source=topics_from) + _yaml(topic_objects()),
        COMPONENTS / "strimzi/users.yaml": HEAD.format(source=accesses) + _yaml(user_objects()),
        COMPONENTS / "strimzi/clients.yaml": HEAD.format(source=accesses) + _yaml(client_patches()),
        COMPONENTS / "tls/certificates.yaml": HEAD.format(source=roles) + _yaml(certificate_objects()),
        COMPONENTS / "tls/processes.yaml": HEAD.format(source=roles) + _yaml(tls_patches()),
        COMPONENTS / "monitoring/rules.yaml": HEAD.format(source=rules_from) + _yaml([rule_object()]),
        COMPONENTS / "monitoring/alertmanager.yaml": HEAD.format(source="deploy/alertmanager/alertmanager.yml")
        + _yaml([route_object()]),
    }


def _yaml(objects: list[dict[str, Any]]) -> str:
    return "---\n".join(str(yaml.safe_dump(one, sort_keys=False)) for one in objects)


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
