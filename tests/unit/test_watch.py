"""Dashboards, alert rules and runbooks fit each other and the metrics that there are."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.__main__ import FOLDER, dashboards, text_of

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"
RUNBOOKS = ROOT / "docs" / "runbooks.md"
ALERT = re.compile(r'alertname="(\w+)"')
# The one that always fires.
WATCHDOG = "SmdihWatchdog"
INTRODUCTION = "how-to-use-this-page"


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if "alert" in rule]


def sections() -> set[str]:
    return {title.lower().replace(" ", "-") for title in re.findall(r"^## (.+)$", RUNBOOKS.read_text(), re.M)}


def test_the_dashboards_are_those_that_the_code_makes() -> None:
    made = {f"{name}.json": text_of(one) for name, one in dashboards().items()}
    assert made == {path.name: path.read_text() for path in FOLDER.glob("*.json")}, "run: python -m deploy.grafana"


def test_panels_fill_the_grid_and_say_what_they_show() -> None:
    for name in dashboards():
        board = json.loads((FOLDER / f"{name}.json").read_text())
        taken: set[tuple[int, int]] = set()
        for panel in board["panels"]:
            at = panel["gridPos"]
            cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
            assert max(x for x, _ in cells) < 24, panel["title"]
            assert not cells & taken, f"{name}: {panel['title']} covers another panel"
            taken |= cells
            assert panel["type"] == "row" or panel["description"].endswith((".", "?")), panel["title"]


def test_links_of_panels_lead_to_a_section() -> None:
    found = {
        link["url"].rpartition("#")[2]
        for name in dashboards()
        for panel in json.loads((FOLDER / f"{name}.json").read_text())["panels"]
        for link in panel.get("links", [])
    }
    assert len(found) > 10
    assert found <= sections()


def test_each_alert_has_its_section_and_each_section_its_alert() -> None:
    named = {alert["alert"].removeprefix("Smdih").lower() for alert in alerts()}
    assert all(alert["alert"].startswith("Smdih") for alert in alerts())
    assert named == sections() - {INTRODUCTION}


def test_alerts_say_what_is_wrong_and_what_to_do() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] in ("page", "ticket") or alert["alert"] == WATCHDOG
        section = alert["alert"].removeprefix("Smdih").lower()
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{section}"
        assert alert["annotations"]["summary"]
        assert len(alert["annotations"]["description"]) > 40
    for section in RUNBOOKS.read_text().split("\n## ")[2:]:
        for word in ("Means: ", "Look: ", "Do: "):
            assert f"\n{word}" in section, section.partition("\n")[0]


def test_every_alert_has_a_case() -> None:
    cases = yaml.safe_load((RULES.parent / "rules_test.yml").read_text())["tests"]
    asked = [(ALERT.findall(one["expr"])[0], one["exp_samples"]) for case in cases for one in case["promql_expr_test"]]
    fires = {name for name, samples in asked if samples}
    silent = {name for name, samples in asked if not samples}
    names = {alert["alert"] for alert in alerts()}
    assert fires == names
    assert silent == names - {WATCHDOG}


@pytest.mark.parametrize(
    "command",
    [
        ("promtool", "check", "rules", "deploy/prometheus/rules.yml"),
        ("promtool", "test", "rules", "deploy/prometheus/rules_test.yml"),
        ("promtool", "check", "config", "--syntax-only", "deploy/prometheus/prometheus.yml"),
        ("amtool", "check-config", "deploy/alertmanager/alertmanager.yml"),
    ],
    ids=" ".join,
)
def test_prometheus_own_tools_agree(command: tuple[str, ...]) -> None:
    assert shutil.which(command[0]), f"{command[0]} is not installed: run `make setup`"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("severity", "receiver"), [("page", "on-call"), ("ticket", "tickets"), ("unheard-of", "tickets")]
)
def test_alerts_find_their_receiver(severity: str, receiver: str) -> None:
    command = ["amtool", "config", "routes", "test", "--config.file=deploy/alertmanager/alertmanager.yml"]
    done = subprocess.run([*command, f"severity={severity}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [receiver], done.stderr


def test_who_waits_for_the_heartbeat_gets_it() -> None:
    command = ["amtool", "config", "routes", "test", "--config.file=deploy/alertmanager/alertmanager.yml"]
    done = subprocess.run(
        [*command, f"alertname={WATCHDOG}", "severity=none"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["heartbeat"], done.stderr


def test_inhibitions_name_alerts_that_there_are() -> None:
    names = {alert["alert"] for alert in alerts()}
    config = yaml.safe_load((ROOT / "deploy" / "alertmanager" / "alertmanager.yml").read_text())
    matchers = [one for rule in config["inhibit_rules"] for each in rule.values() for one in each]
    assert set(re.findall(r"Smdih\w+", " ".join(matchers))) <= names


def test_provisioned_sources_are_those_that_panels_ask() -> None:
    provisioning = ROOT / "deploy" / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "smdih.yaml").read_text())["datasources"]
    asked = {
        panel["datasource"]["uid"]
        for name in dashboards()
        for panel in json.loads((FOLDER / f"{name}.json").read_text())["panels"]
        if panel["type"] != "row"
    }
    assert asked == {source["uid"] for source in sources}
    assert not any("password" in source for source in sources)
    assert yaml.safe_load((provisioning / "dashboards" / "smdih.yaml").read_text())["providers"]
