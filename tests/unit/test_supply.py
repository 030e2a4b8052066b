"""What the product is made of: pinned by hash, licensed so that it may be given on, and no key among the files."""

import re
from pathlib import Path

import pytest

from deploy.image import bill
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


def test_the_bill_of_an_image_names_its_debian_packages_and_misses_no_file(tmp_path: Path) -> None:
    note(tmp_path / "var/lib/dpkg", "libssl3", "openssl (1:3.0)", "1:3.0+deb12", ["/usr/lib/libssl.so.3"])
    note(tmp_path / "var/lib/dpkg", "libgomp1", "gcc-12", "12.2", ["/lib/libgomp.so.1"])
    note(tmp_path / "var/lib/dpkg", "gcc-12-base", "gcc-12", "12.2", ["/usr/share/doc/gcc-12-base/copyright"])
    note(tmp_path / "hub/postgres/packages", "libpq5", "postgresql-17", "17.6", ["/usr/lib/libpq.so.5"])
    note(tmp_path / "hub/postgres/packages", "perl", "perl", "5.40", ["/usr/bin/perl"])
    texts = {
        "usr/share/doc/libssl3/copyright": "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n"
        "Files: *\nLicense: Apache-2.0\n The text.\nFiles: x\nLicense: BSD-3-clause\n",
        "usr/share/doc/gcc-12-base/copyright": "see `/usr/share/common-licenses/GPL-3'.",
        "hub/postgres/packages/doc/libpq5/copyright": "in words of its own",
        "usr/lib/libssl.so.3": "",
        "usr/lib/libgomp.so.1": "",
        "hub/postgres/libpq.so.5": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = bill.packages(tmp_path)
    parts = {one.name: one.component() for one in found}
    assert set(parts) == {"libssl3", "libgomp1", "gcc-12-base", "libpq5"}
    assert parts["libssl3"]["purl"] == (
        "pkg:deb/debian/libssl3@1:3.0%2Bdeb12?arch=amd64&distro=bookworm&upstream=openssl"
    )
    licences = {name: [one["license"]["name"] for one in part["licenses"]] for name, part in parts.items()}
    assert licences == {
        "libssl3": ["Apache-2.0", "BSD-3-clause"],
        "libgomp1": ["see gcc-12-base/copyright, which names GPL-3"],
        "gcc-12-base": ["see gcc-12-base/copyright, which names GPL-3"],
        "libpq5": ["see libpq5/copyright"],
    }
    assert bill.without_origin(found, tmp_path) == ["usr/share/doc/libssl3/copyright"]
    made = bill.made(found)
    assert set(parts) < {part["name"] for part in made["components"]}
    assert len(made["dependencies"][0]["dependsOn"]) == len(made["components"])


def note(folder: Path, name: str, source: str, version: str, files: list[str]) -> None:
    """As the package manager does."""
    (folder / "info").mkdir(parents=True, exist_ok=True)
    with (folder / "status").open("a") as status:
        status.write(f"Package: {name}\nSource: {source}\nVersion: {version}\nArchitecture: amd64\n\n")
    (folder / f"info/{name}.list").write_text("/.\n" + "\n".join(files))


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
