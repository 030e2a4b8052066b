"""Writes what in the manifests follows from elsewhere: topics and users as Strimzi's objects, how each process comes to the brokers
as its user, and the alert rules as the Prometheus operator's object.

Usage: python -m deploy.k8s.write
"""

from pathlib import Path
from typing import Any

import yaml

from services.common import topics
from services.common.access import ACCESSES, Access, rules
from services.common.kafka import REQUEST_BYTES_MAX

COMPONENTS = Path(__file__).parent / "components"
RULES = Path(__file__).parents[1] / "prometheus/rules.yml"
CLUSTER = "kafka"
# As the production overlay sets SMDIH_KAFKA_PARTITIONS and SMDIH_KAFKA_REPLICATION.
PARTITIONS = 16
REPLICAS = 3
KINDS = {"anomaly-worker": ("StatefulSet", "apps/v1"), "migrate": ("Job", "batch/v1")}
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
    metadata = {"name": access.process}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": {"template": {"spec": spec}}}


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"strimzi.io/cluster": CLUSTER}}
    return {"apiVersion": "kafka.strimzi.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def rule_object() -> dict[str, Any]:
    """The alert rules, as they are tested."""
    metadata = {"name": "smdih", "labels": {"app.kubernetes.io/name": "smdih"}}
    spec = {"groups": yaml.safe_load(RULES.read_text())["groups"]}
    return {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": metadata, "spec": spec}


def files() -> dict[Path, str]:
    """What the written files hold."""
    topics_from, accesses, rules_from = (
        "services/common/topics.py",
        "services/common/access.py",
        "deploy/prometheus/rules.yml",
    )
    return {
        COMPONENTS / "strimzi/topics.yaml": HEAD.format(source=topics_from) + _yaml(topic_objects()),
        COMPONENTS / "strimzi/users.yaml": HEAD.format(source=accesses) + _yaml(user_objects()),
        COMPONENTS / "strimzi/clients.yaml": HEAD.format(source=accesses) + _yaml(client_patches()),
        COMPONENTS / "monitoring/rules.yaml": HEAD.format(source=rules_from) + _yaml([rule_object()]),
    }


def _yaml(objects: list[dict[str, Any]]) -> str:
    return "---\n".join(str(yaml.safe_dump(one, sort_keys=False)) for one in objects)


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
