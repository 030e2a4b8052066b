"""Refuses what has the shape of a key in a file that git keeps: `python -m localstack.secrets_scan`."""

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from detect_secrets.core.scan import scan_file
from detect_secrets.settings import transient_settings

from localstack.servers import ROOT

# Long texts without a meaning: hashes of packages, pictures, generated data.
NOT_READ: Final = (
    ".png",
    ".ico",
    "base.txt",
    "dev.txt",
    "model.txt",
    "uv.txt",
)
MADE_HERE: Final = (".venv", ".local", "gen", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", ".git")
# Made from code that is read; by far the longest.
GENERATED: Final = ROOT / "deploy/grafana/dashboards"
# What has the shape of a key of something known. The detectors of plain randomness and of words such as "password" find
# hundreds of test fixtures here, and a scan that is always red is not read.
PLUGINS: Final = (
    "AWSKeyDetector",
    "ArtifactoryDetector",
    "AzureStorageKeyDetector",
    "BasicAuthDetector",
    "CloudantDetector",
    "DiscordBotTokenDetector",
    "GitHubTokenDetector",
    "GitLabTokenDetector",
    "IbmCloudIamDetector",
    "JwtTokenDetector",
    "MailchimpDetector",
    "NpmDetector",
    "OpenAIDetector",
    "PrivateKeyDetector",
    "PypiTokenDetector",
    "SendGridDetector",
    "SlackDetector",
    "SquareOAuthDetector",
    "StripeDetector",
    "TelegramBotTokenDetector",
    "TwilioKeyDetector",
)
# Such as PASSWORD in postgresql://USER:PASSWORD@HOST.
PLACEHOLDER: Final = re.compile(r"[A-Z]{3,20}")
# A key of the hub's own, as people get it.
OWN_KEY: Final = re.compile(r"smdih_(?:device|firm|partner|operator)_[A-Za-z0-9_-]{43}")


def found(paths: Iterable[Path]) -> list[tuple[Path, int, str]]:
    """File, line and kind of everything in these files that looks like a key."""
    secrets: list[tuple[Path, int, str]] = []
    with transient_settings({"plugins_used": [{"name": name} for name in PLUGINS]}):
        for path in paths:
            secrets += [
                (path, one.line_number, one.type)
                for one in scan_file(str(path))
                if not (one.type == "Basic Auth Credentials" and PLACEHOLDER.fullmatch(one.secret_value or ""))
            ]
            lines = enumerate(path.read_text(errors="replace").splitlines(), start=1)
            secrets += [(path, number, "Key of the hub") for number, line in lines if OWN_KEY.search(line)]
    return secrets


def kept_files() -> list[Path]:
    """What git keeps; of a copy without git everything that is not made here."""
    asked = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False
    )
    if asked.returncode == 0:
        paths = [ROOT / name for name in asked.stdout.decode().split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if path.relative_to(ROOT).parts[0] not in MADE_HERE]
    paths = [path for path in paths if GENERATED not in path.parents and not path.name.endswith(NOT_READ)]
    return [path for path in paths if path.is_file()]


def main() -> int:
    secrets = found(kept_files())
    for path, line, kind in secrets:
        print(
            f"{path.relative_to(ROOT)}:{line}: looks like a secret ({kind}). Take it out; if it was ever real, end it: "
            "git keeps what was there."
        )
    return 1 if secrets else 0


if __name__ == "__main__":
    sys.exit(main())
