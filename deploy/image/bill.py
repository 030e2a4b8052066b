"""The bill of materials of the image: what localstack.sbom knows of, and the Debian packages beneath, as CycloneDX JSON.

Usage (as root): python -m deploy.image.bill IMAGE FILE. The packages are those that the image itself names in its package
manager's notes (status.sh writes them), their licences those of the copyright files beside them. Fails where the image holds
something that the bill does not name.
"""

import json
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from packageurl import PackageURL
from packaging.utils import canonicalize_name

from deploy.image.confined import root_of
from localstack import sbom

# Of the base and of PostgreSQL's programs: the notes of the package manager, the copyright files, the release of Debian.
BASE: Final = ("var/lib/dpkg", "usr/share/doc", "bookworm")
POSTGRES: Final = ("hub/postgres/packages", "hub/postgres/packages/doc", "trixie")
# Made while the image is built: not of a package, or of what is in the bill by its hash.
OWN: Final = (
    *("hub", "etc/ssl/certs", "etc/apt", "etc/dpkg", "etc/fstab", "etc/hostname", "etc/resolv.conf"),
    *("var/lib/apt", "var/lib/dpkg", "var/cache"),
)
_MACHINE_READABLE: Final = re.compile(r"^License:[ \t]*(\S.*)$", re.MULTILINE)
_COMMON: Final = re.compile(r"/usr/share/common-licenses/([A-Za-z0-9.+-]*[A-Za-z0-9])")


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    source: str
    architecture: str
    release: str
    licences: tuple[str, ...]
    files: frozenset[str]

    def component(self) -> dict[str, Any]:
        qualifiers = {"arch": self.architecture, "distro": self.release}
        if self.source != self.name:
            qualifiers["upstream"] = self.source
        purl = PackageURL("deb", "debian", self.name, self.version, qualifiers).to_string()
        made = {"type": "library", "bom-ref": purl, "name": self.name, "version": self.version, "purl": purl}
        return {**made, "licenses": [{"license": {"name": name}} for name in self.licences]}


def packages(root: Path) -> list[Package]:
    """Every Debian package that the image holds, or part of it."""
    # Of PostgreSQL's packages only programs and libraries were taken, into one folder.
    taken = {path.name for path in (root / "hub/postgres").iterdir() if path.is_file()}
    of_postgres = (one for one in _packages(root, *POSTGRES) if taken & {Path(name).name for name in one.files})
    return [*_packages(root, *BASE), *of_postgres]


def _packages(root: Path, notes: str, docs: str, release: str) -> Iterator[Package]:
    fields = list(_fields((root / notes / "status").read_text()))
    licences = {one["Package"]: _licences(root / docs / one["Package"] / "copyright") for one in fields}
    for one in fields:
        name, source = one["Package"], _source(one)
        # Packages of one source may share a file, by a link that is not here.
        siblings = (licences[other["Package"]] for other in fields if _source(other) == source)
        lists = (root / notes / "info").glob(f"{name}[.:]*list")
        yield Package(
            name,
            one["Version"],
            source,
            one["Architecture"],
            release,
            licences[name] or next(filter(None, siblings), ()),
            frozenset(line for path in lists for line in path.read_text().splitlines()),
        )


def _fields(status: str) -> Iterator[Mapping[str, str]]:
    for stanza in filter(None, map(str.strip, status.split("\n\n"))):
        yield dict(re.findall(r"^([A-Za-z-]+): *(.*)$", stanza, re.MULTILINE))


def _source(fields: Mapping[str, str]) -> str:
    """Without a version of its own."""
    return fields.get("Source", fields["Package"]).partition(" ")[0]


def _licences(copyright_file: Path) -> tuple[str, ...]:
    """The short names of the machine-readable form; of another text where it is, and which of the common licences it names."""
    if not copyright_file.is_file():
        return ()
    text = copyright_file.read_text(errors="replace")
    if "/copyright-format/" in text:
        return tuple(sorted(set(map(str.strip, _MACHINE_READABLE.findall(text)))))
    named = ", ".join(sorted(set(_COMMON.findall(text))))
    return (f"see {copyright_file.parent.name}/copyright" + (f", which names {named}" if named else ""),)


def without_origin(found: Collection[Package], root: Path) -> list[str]:
    """Files of the image that are of no package and not made while it is built."""
    of_packages = {name.lstrip("/") for one in found for name in one.files}
    # In Debian 12 some packages still say /lib for /usr/lib.
    of_packages |= {f"usr/{name}" for name in of_packages if name.startswith(("lib", "bin/", "sbin/"))}
    files = (path.relative_to(root) for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(str(path) for path in files if str(path) not in of_packages and not _is_own(path))


def _is_own(path: Path) -> bool:
    return any(path.is_relative_to(own) for own in OWN)


def made(found: Collection[Package]) -> dict[str, Any]:
    """The bill of an image with these packages."""
    bill = sbom.made()
    bill["components"] += [one.component() for one in found]
    bill["components"].sort(key=lambda part: (str(part["name"]), str(part["purl"])))
    bill["dependencies"] = list(sbom.dependencies(bill))
    return bill


def not_named(bill: Mapping[str, Any], root: Path) -> list[str]:
    """Python packages of the image that the bill lacks."""
    named = {canonicalize_name(part["name"]) for part in bill["components"] if part["purl"].startswith("pkg:pypi/")}
    there = metadata.distributions(path=[str(root / "hub/libraries")])
    return sorted({one.name for one in there if canonicalize_name(one.name) not in named})


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m deploy.image.bill IMAGE FILE", file=sys.stderr)
        return 2
    image, file = arguments
    with root_of(image) as folder:
        root = Path(folder)
        found = packages(root)
        bill = made(found)
        missing = [*without_origin(found, root), *not_named(bill, root)]
    if missing:
        print(f"bill: not of what it names: {', '.join(missing[:20])} ({len(missing)} in all)", file=sys.stderr)
        return 1
    Path(file).write_text(json.dumps(bill, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
