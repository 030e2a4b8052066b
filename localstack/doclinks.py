"""Checks that relative links in Markdown files lead somewhere: python -m localstack.doclinks README.md docs."""

import re
import sys
from pathlib import Path

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def broken_links(paths: list[Path]) -> list[str]:
    """One line for each link whose file does not exist."""
    files = [file for path in paths for file in (sorted(path.rglob("*.md")) if path.is_dir() else [path])]
    found = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for target in _LINK.findall(line):
                if target.startswith(("http://", "https://", "#", "mailto:")):
                    continue
                if not (file.parent / target.partition("#")[0]).exists():
                    found.append(f"{file}:{number}: {target} does not exist")
    return found


if __name__ == "__main__":
    lines = broken_links([Path(argument) for argument in sys.argv[1:]])
    print("\n".join(lines) or "doc links: all there")
    sys.exit(1 if lines else 0)
