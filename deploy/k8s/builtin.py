"""Writes FILE.builtin for each FILE: only the objects that Kubernetes itself defines. Runs with the lint's own tools."""

import sys
from pathlib import Path

import yaml

OPERATORS = ("kafka.strimzi.io", "keda.sh", "monitoring.coreos.com", "cert-manager.io")

for name in sys.argv[1:]:
    objects = [one for one in yaml.safe_load_all(Path(name).read_text()) if one]
    kept = [one for one in objects if one["apiVersion"].partition("/")[0] not in OPERATORS]
    Path(f"{name}.builtin").write_text(yaml.safe_dump_all(kept))
