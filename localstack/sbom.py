"""The bill of materials of the product: every pinned requirement with its hashes and licence, as CycloneDX JSON.

`python -m localstack.sbom FILE`. The same requirements give the same bytes: it can be made again wherever the lock file is.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from localstack.servers import ROOT

# What the product runs with; the rest is for building and testing it.
LOCKS: Final = (ROOT / "requirements/base.txt", ROOT / "requirements/model.txt")
_PINNED: Final = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\\n]+)", re.MULTILINE)


def pinned(lock: Path) -> dict[str, str]:
    """Versions by name."""
    return dict(_PINNED.findall(lock.read_text()))


def licence_of(name: str) -> str:
    """As the installed package says it. Raises PackageNotFoundError."""
    found = metadata.metadata(name)
    classifiers = [text.rpartition("::")[2].strip() for text in found.get_all("Classifier", ()) if "License ::" in text]
    (expression,), (text,) = found.get_all("License-Expression", [""]), found.get_all("License", [""])
    return str(expression or "; ".join(classifiers) or text.partition("\n")[0])


def made() -> dict[str, Any]:
    """The bill, its parts in order of their names."""
    command = [
        *(str(Path(sys.executable).parent / "cyclonedx-py"), "requirements", "-"),
        *("--output-reproducible", "--of", "JSON", "--sv", "1.6", "--pyproject", str(ROOT / "pyproject.toml")),
    ]
    locked = "".join(lock.read_text() for lock in LOCKS)
    bill: dict[str, Any] = json.loads(
        subprocess.run(command, input=locked.encode(), capture_output=True, check=True, cwd=ROOT).stdout
    )
    parts = [_with_licence(part) for part in bill["components"]]
    bill["components"] = sorted(parts, key=lambda part: str(part["name"]))
    bill["dependencies"] = list(dependencies(bill))
    return bill


def _with_licence(part: dict[str, Any]) -> dict[str, Any]:
    """A part, named by its package rather than by its line, so that a line more does not rename all below it."""
    hashes = [one for reference in part.pop("externalReferences", ()) for one in reference.get("hashes", ())]
    part.pop("description", None)
    licence = [{"license": {"name": licence_of(part["name"])}}]
    return {**part, "bom-ref": part["purl"], "licenses": licence, "hashes": hashes}


def dependencies(bill: dict[str, Any]) -> Iterator[dict[str, Any]]:
    root = bill["metadata"]["component"]["bom-ref"]
    yield {"ref": root, "dependsOn": [part["bom-ref"] for part in bill["components"]]}


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m localstack.sbom FILE", file=sys.stderr)
        return 2
    Path(arguments[0]).write_text(json.dumps(made(), indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
