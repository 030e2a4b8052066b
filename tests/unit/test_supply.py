"""What the product is made of: pinned by hash, licensed so that it may be given on, and no key among the files."""

import re
from pathlib import Path

import pytest

from localstack import sbom, secrets_scan
from localstack.servers import ROOT

LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
# Words of licences that let the product be used and given on under its own.
PERMISSIVE = re.compile(
    r"Apache|BSD|MIT|ISC|0BSD|PSF|Python Software Foundation|MPL|Mozilla|Zlib|CC0|Repoze Public License|DFSG",
    re.IGNORECASE,
)
# Used as libraries, unchanged and exchangeable, which their licences allow; named here so that nobody overlooks them.
LIBRARIES = {"asyncua": "LGPLv3+: OPC UA client; loaded only by the gateway's client"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_is_pinned_by_version_and_hash(lock: Path) -> None:
    requirements = [text for text in re.split(r"\n(?=\S)", lock.read_text()) if text and not text.startswith("#")]
    assert requirements
    for text in requirements:
        assert re.match(r"[A-Za-z0-9._-]+(\[[a-z,]+\])?==[^ ]+ \\\n", text), text[:80]
        assert "--hash=sha256:" in text, text[:80]
    assert "--index-url" not in lock.read_text()
    assert "://" not in lock.read_text()


def test_every_licence_is_known_and_none_binds_the_product() -> None:
    for lock in sbom.LOCKS:
        for name in sbom.pinned(lock):
            licence = sbom.licence_of(name)
            if name in LIBRARIES:
                assert "Lesser" in licence, f"{name}: {licence}"
                continue
            assert PERMISSIVE.search(licence), f"{name}: {licence!r} is not known to be permissive"
            assert not re.search(r"GPL|General Public|AGPL|SSPL|Commons Clause", licence), f"{name}: {licence}"


def test_the_bill_names_what_is_installed_and_is_made_the_same_again() -> None:
    bill = sbom.made()
    wanted = {name: version for lock in sbom.LOCKS for name, version in sbom.pinned(lock).items()}
    assert {part["name"]: part["version"] for part in bill["components"]} == wanted
    assert all(part["hashes"] and part["licenses"] for part in bill["components"])
    references = [part["bom-ref"] for part in bill["components"]]
    assert len(set(references)) == len(references)
    assert "timestamp" not in bill["metadata"]
    assert "serialNumber" not in bill


def test_a_key_in_a_file_is_found_and_its_line_told(tmp_path: Path) -> None:
    leak = tmp_path / "notes.md"
    key = "smdih_" + "operator_" + "Ab3-" * 10 + "xyz"
    aws = "AKIA" + "ZX7Q2M9LKD4TPB3W"
    leak.write_text(f"fine\n{key}\n-----BEGIN RSA " + f"PRIVATE KEY-----\n{aws}\n")
    assert {(line, kind) for _, line, kind in secrets_scan.found([leak])} == {
        (2, "Key of the hub"),
        (3, "Private Key"),
        (4, "AWS Access Key"),
    }
