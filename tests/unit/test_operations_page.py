"""The operators' page names commands, files and settings that exist."""

import importlib.util
import re

from chaos.__main__ import SCENARIOS
from localstack.servers import ROOT
from services import backup
from services.common.settings import Settings

PAGE = (ROOT / "docs/operations.md").read_text()
REHEARSED = (ROOT / "tests/e2e/test_backup.py").read_text()


def test_every_command_of_the_page_can_be_typed() -> None:
    modules = set(re.findall(r"python -m ([\w.]+)", PAGE))
    assert {"services.migrate", "services.backup", "services.reconcile", "chaos"} <= modules
    for module in modules:
        assert importlib.util.find_spec(module) is not None, module
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", PAGE):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for scenario in re.findall(r"--scenario (\w+)", PAGE):
        assert scenario in {each.name for each in SCENARIOS}


def test_what_is_to_be_typed_after_a_loss_is_what_the_rehearsal_types() -> None:
    typed = re.findall(r"^ *python -m services\.(backup|reconcile) ([\w-]+)", PAGE, re.M)
    assert sorted(typed) == [
        ("backup", "dump"),
        ("backup", "restore"),
        ("reconcile", "after-kafka-loss"),
        ("reconcile", "after-restore"),
    ]
    for module, command in typed:
        assert f'"services.{module}", "{command}"' in REHEARSED


def test_every_test_that_the_page_points_to_is_there() -> None:
    paths = set(re.findall(r"`((?:tests|chaos)/[\w/]+\.py)`", PAGE))
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).is_file(), path


def test_every_setting_of_the_page_is_one() -> None:
    known = {f"SMDIH_{name.upper()}" for name in (*Settings.model_fields, *backup.BackupSettings.model_fields)}
    named = set(re.findall(r"SMDIH_[A-Z_]+", PAGE))
    assert named
    assert named <= known, named - known
