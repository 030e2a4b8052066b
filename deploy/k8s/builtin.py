"""Writes FILE.builtin for each FILE: only the objects that Kubernetes itself defines. Runs with the lint's own tools."""

import sys
from collections.abc import Collection
from pathlib import Path

import yaml

OPERATORS = ("kafka.strimzi.io", "keda.sh", "monitoring.coreos.com", "cert-manager.io")


def builtin(rendered: str, *, beside: Collection[str] = ()) -> str:
    """Without what operators define, but for the groups of those that the cluster has."""
    left_out = set(OPERATORS) - set(beside)
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    return str(yaml.safe_dump_all([one for one in objects if one["apiVersion"].partition("/")[0] not in left_out]))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(f"{name}.builtin").write_text(builtin(Path(name).read_text()))
