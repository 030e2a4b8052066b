"""Writes the topics (and users) of the hub as Strimzi's objects. Usage: python -m deploy.k8s.strimzi"""

from pathlib import Path
from typing import Any

import yaml

from services.common import topics
from services.common.kafka import REQUEST_BYTES_MAX

HERE = Path(__file__).parent / "components/strimzi"
CLUSTER = "kafka"
# As the production overlay sets SMDIH_KAFKA_PARTITIONS and SMDIH_KAFKA_REPLICATION.
PARTITIONS = 16
REPLICAS = 3
HEAD = "# Written by `python -m deploy.k8s.strimzi` from services/common/{source}; do not edit.\n"


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


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "labels": {"strimzi.io/cluster": CLUSTER}}
    return {"apiVersion": "kafka.strimzi.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def files() -> dict[Path, str]:
    """What the component's written files hold."""
    return {HERE / "topics.yaml": HEAD.format(source="topics.py") + _yaml(topic_objects())}


def _yaml(objects: list[dict[str, Any]]) -> str:
    return "---\n".join(str(yaml.safe_dump(one, sort_keys=False)) for one in objects)


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
