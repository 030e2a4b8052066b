"""The manifests against the code: who speaks to whom, which settings are set, how long a stop may take, which topics there are."""

import ast
import functools
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.k8s import write
from localstack.hub import ROLES
from services.anomaly.settings import AnomalySettings
from services.backup import BackupSettings
from services.common.access import access_of
from services.common.runtime import STOP_TIMEOUT_S
from services.common.settings import DatabaseSettings, Settings
from services.common.tls import HUB_SERVICES
from services.funding.main import FundingSettings
from services.ingest.settings import MqttSettings
from services.logins import LOGINS, OWNER
from services.matching.main import MatchingSettings

BASE = Path("deploy/k8s/base")
# How each process is wired: the function that is given the settings, and their class.
ENTRIES: dict[str, tuple[str, str, type[Settings]]] = {
    "door": ("services.ingest.door_process", "start", Settings),
    "historian": ("services.ingest.historian_process", "start", Settings),
    "mqtt-bridge": ("services.ingest.mqtt_process", "start", MqttSettings),
    "anomaly-worker": ("services.anomaly.worker_process", "start", AnomalySettings),
    "anomaly": ("services.anomaly.api_process", "start", AnomalySettings),
    "anomaly-notifier": ("services.anomaly.notifier_process", "start", AnomalySettings),
    "matching": ("services.matching.main", "start_api", MatchingSettings),
    "funding": ("services.funding.main", "start_api", FundingSettings),
    "migrate": ("services.migrate", "migrate_all", Settings),
    "reconcile": ("services.reconcile", "after_restore", Settings),
}
PROCESSES = [role.name for role in ROLES]
# What a setting that is read leads to: a label that a policy selects, or another process.
LABEL_OF = {
    "kafka_bootstrap": "smdih/kafka",
    "database_dsn": "smdih/database",
    "mqtt_host": "smdih/mqtt",
    "anomaly_smtp_port": "smdih/outside",
    "anomaly_webhook_networks": "smdih/outside",
}
# Reached only where a component of this name is added, which brings the way.
COMPONENT_OF = {"oidc_keys": "oidc", "trace_endpoint": "tracing"}
# Named like addresses of others, and none: where a process listens, and what goes along with an address above.
NO_WAY = {
    *("http_host", "http_port", "grpc_host", "grpc_port", "grpc_internal_port", "probe_port"),
    *("mqtt_host_id", "mqtt_port", "anomaly_smtp_host", "oidc_issuer"),
}
ADDRESS = re.compile(r"bootstrap|dsn|host|port$|_grpc|endpoint|url|server|issuer|networks|oidc_keys")
PROCESS_OF = {"ingest_grpc": "door", "matching_grpc": "matching"}
# Without these a process runs, but not as it should; so where they are read they must be set.
MUST_BE_SET = {*PROCESS_OF, "mqtt_host", "mqtt_password", "evidence_key", "evidence_public_keys", "database_disk_bytes"}
# Set by the image for every process.
IMAGE = Path("deploy/image/Containerfile")


def settings_read(name: str) -> set[str]:
    """The settings that a process reads in its wiring, by its source: attributes of `settings`, also where it is passed on."""
    module, function, _ = ENTRIES[name]
    return _read_in(getattr(importlib.import_module(module), function), "settings")


def _read_in(function: Any, parameter: str) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    module = inspect.getmodule(function)
    names = {parameter}
    # found = MqttSettings()
    names |= {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Call)
        and ast.unparse(node.value.func).endswith("Settings")
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            found.add(node.attr)
        if isinstance(node, ast.Call):
            found |= _read_by_callee(node, module, names)
    return found


def _read_by_callee(call: ast.Call, module: Any, names: set[str]) -> set[str]:
    given: list[int | str] = [n for n, one in enumerate(call.args) if isinstance(one, ast.Name) and one.id in names]
    given += [one.arg for one in call.keywords if one.arg and isinstance(one.value, ast.Name) and one.value.id in names]
    if not given:
        return set()
    try:
        callee = functools.reduce(getattr, ast.unparse(call.func).split("."), module)
    except AttributeError:
        return set()
    parameters = list(inspect.signature(callee).parameters)
    source = callee.__init__ if inspect.isclass(callee) else inspect.unwrap(callee)
    read: set[str] = set()
    for which in given:
        read |= _read_in(source, parameters[which] if isinstance(which, int) else which)
    return read


@functools.cache
def objects() -> list[dict[str, Any]]:
    files = [path for path in sorted(BASE.glob("*.yaml")) if path.name != "kustomization.yaml"]
    return [one for path in files for one in yaml.safe_load_all(path.read_text()) if one]


def kind(*kinds: str) -> dict[str, dict[str, Any]]:
    return {one["metadata"]["name"]: one for one in objects() if one["kind"] in kinds}


def workloads() -> dict[str, dict[str, Any]]:
    return kind("Deployment", "StatefulSet", "Job", "CronJob")


def pod(name: str) -> dict[str, Any]:
    return template(workloads()[name])


def template(one: dict[str, Any]) -> dict[str, Any]:
    spec = one["spec"]["jobTemplate"]["spec"] if one["kind"] == "CronJob" else one["spec"]
    found: dict[str, Any] = spec["template"]
    return found


@functools.cache
def config() -> dict[str, dict[str, str]]:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    return {
        one["name"]: dict(literal.split("=", 1) for literal in one["literals"])
        for one in kustomization["configMapGenerator"]
    }


def variables(name: str) -> set[str]:
    """The environment of a process, its image's included as far as it reads that."""
    (container,) = pod(name)["spec"]["containers"]
    found = {one["name"] for one in container.get("env", ())}
    for source in container.get("envFrom", ()):
        found |= set(config()[source["configMapRef"]["name"]])
    return found | (of_image() & set(fields(name)))


def of_image() -> set[str]:
    return set(re.findall(r"(SMDIH_\w+)=", IMAGE.read_text()))


def fields(name: str) -> dict[str, Any]:
    return {f"SMDIH_{field.upper()}": info for field, info in ENTRIES[name][2].model_fields.items()}


def policies_of(labels: dict[str, str], direction: str) -> list[dict[str, Any]]:
    """The rules of all policies that select a pod with these labels."""
    rules: list[dict[str, Any]] = []
    for policy in kind("NetworkPolicy").values():
        if _selects(policy["spec"]["podSelector"], labels):
            rules += policy["spec"].get(direction, [])
    return rules


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    # Kustomize gives every pod of the base this label.
    labels = labels | {"app.kubernetes.io/part-of": "smdih"}
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return exact and all(
        labels.get(one["key"]) in one["values"]
        for one in selector.get("matchExpressions", ())
        if one["operator"] == "In"
    )


def reaches(labels: dict[str, str], target: dict[str, str], port: str) -> bool:
    """Whether policies let a pod with `labels` speak to one with `target`, on both sides."""
    out = any(
        any(_selects(to.get("podSelector", {"matchLabels": {"no": "pod"}}), target) for to in rule["to"])
        and port in {one["port"] for one in rule["ports"]}
        for rule in policies_of(labels, "egress")
    )
    into = any(
        any(_selects(one["podSelector"], labels) for one in rule["from"] if "podSelector" in one)
        and port in {one["port"] for one in rule["ports"]}
        for rule in policies_of(target, "ingress")
    )
    assert out == into, f"{labels} to {target}: one side says {out}, the other {into}"
    return out


def labels_of(name: str) -> dict[str, str]:
    found: dict[str, str] = pod(name)["metadata"]["labels"]
    return found


def test_every_process_has_its_manifest_and_is_started_as_the_hub_starts_it() -> None:
    assert set(workloads()) == set(ENTRIES)
    for role in ROLES:
        (container,) = pod(role.name)["spec"]["containers"]
        assert container["args"] == ["-m", role.module, role.role]
        assert ("grpc" in {port["name"] for port in container.get("ports", ())}) == role.has_grpc
        for other in ("Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "ServiceAccount"):
            assert role.name in kind(other), f"{role.name} has no {other}"


@pytest.mark.parametrize("name", ENTRIES)
def test_a_process_may_reach_what_its_wiring_reads_the_address_of_and_nothing_else(name: str) -> None:
    read = settings_read(name)
    assert read, "the wiring reads no setting: this test looks in the wrong place"
    wanted = {label for setting, label in LABEL_OF.items() if setting in read}
    assert {label for label in labels_of(name) if label.startswith("smdih/")} == wanted
    called = {process for setting, process in PROCESS_OF.items() if setting in read}
    assert {other for other in PROCESSES if reaches(labels_of(name), labels_of(other), "grpc")} == called
    for port in ("http", "probes"):
        assert not [other for other in PROCESSES if reaches(labels_of(name), labels_of(other), port)]


def test_every_setting_that_looks_like_an_address_has_its_way_or_needs_none() -> None:
    """A new one fails here until somebody has said what a process reaches by it."""
    settings = {field: info for _, _, kind in ENTRIES.values() for field, info in kind.model_fields.items()}
    addresses = {
        field
        for field, info in settings.items()
        if ADDRESS.search(field) or re.search(r"host:port|https?\b.*address|address of|://", info.description or "")
    }
    placed = set(LABEL_OF) | set(PROCESS_OF) | set(COMPONENT_OF) | NO_WAY
    assert addresses - placed == set()
    assert placed <= set(settings)


def test_who_takes_tokens_reaches_their_issuer_by_its_component() -> None:
    folder = BASE.parent / "components/oidc"
    (policy,) = yaml.safe_load_all((folder / "network.yaml").read_text())
    assert policy["spec"]["podSelector"] == {"matchLabels": {"smdih/oidc": "client"}}
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    (patch,) = kustomization["patches"]
    assert "smdih~1oidc" in patch["patch"]
    taking = {name for name in PROCESSES if "takes_keys=True" in _source(name)}
    assert set(re.findall(r"[\w-]+", patch["target"]["name"])) == taking


def test_everything_is_denied_and_each_label_opens_one_way() -> None:
    denied = kind("NetworkPolicy")["default-deny"]["spec"]
    assert denied == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for label in set(LABEL_OF.values()):
        opened = [
            name
            for name, policy in kind("NetworkPolicy").items()
            if label in policy["spec"]["podSelector"].get("matchLabels", {})
        ]
        assert opened == [f"to-{label.rpartition('/')[2]}"]


def test_only_what_serves_people_is_open_to_the_ingress() -> None:
    outside = {"namespaceSelector": {"matchLabels": {"smdih/ingress": "true"}}}
    open_to_it = {
        name for name in ENTRIES if any(outside in rule["from"] for rule in policies_of(labels_of(name), "ingress"))
    }
    assert open_to_it == {role.name for role in ROLES if role.has_grpc}


def test_probes_and_metrics_are_on_a_port_that_only_prometheus_and_the_kubelet_reach() -> None:
    process = yaml.safe_load((BASE / "patches/process.yaml").read_text())["spec"]["template"]["spec"]["containers"][0]
    assert process["ports"] == [{"name": "probes", "containerPort": 8081}]
    assert "SMDIH_PROBE_PORT=8081" in IMAGE.read_text()
    asked = [process[f"{probe}Probe"]["httpGet"]["port"] for probe in ("startup", "readiness", "liveness")]
    assert asked == ["probes"] * 3
    monitoring = {"namespaceSelector": {"matchLabels": {"smdih/monitoring": "true"}}}
    for name in PROCESSES:
        let_in = [
            rule
            for rule in policies_of(labels_of(name), "ingress")
            if {"port": "probes"}.items() <= rule["ports"][0].items()
        ]
        assert [rule["from"] for rule in let_in] == [[monitoring]]


def test_the_outside_is_never_the_inside() -> None:
    (rule,) = kind("NetworkPolicy")["to-outside"]["spec"]["egress"]
    (block,) = (one["ipBlock"] for one in rule["to"])
    assert {"10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "127.0.0.0/8"} <= set(block["except"])


@pytest.mark.parametrize("name", ENTRIES)
def test_every_variable_is_a_setting_of_the_process_and_every_needed_one_is_set(name: str) -> None:
    known, given = fields(name), variables(name)
    assert given <= set(known), f"unknown settings: {given - set(known)}"
    assert {variable for variable, field in known.items() if field.is_required()} <= given
    read = {f"SMDIH_{field.upper()}" for field in settings_read(name) & MUST_BE_SET}
    assert read <= given, f"read but not set: {read - given}"
    # What is secret goes to those only who read it.
    secret = {
        one["name"] for one in pod(name)["spec"]["containers"][0]["env"] if "secretKeyRef" in one.get("valueFrom", {})
    }
    read_at_all = {f"SMDIH_{field.upper()}" for field in settings_read(name)}
    assert secret <= read_at_all, f"secrets that nobody there reads: {secret - read_at_all}"


def test_what_the_image_sets_is_read_by_something() -> None:
    commands = {f"SMDIH_{name.upper()}" for name in BackupSettings.model_fields}
    assert of_image() <= commands.union(*(fields(name) for name in ENTRIES))


def test_the_database_has_a_connection_for_every_process_that_there_may_be() -> None:
    """At the ceilings of the production overlay, while each kind is being replaced, and with some left for people and jobs."""
    scaled = yaml.safe_load_all((BASE.parent / "components/keda/scaledobjects.yaml").read_text())
    by_lag = {
        one["metadata"]["name"]: one["spec"]["maxReplicaCount"] for one in scaled if one["kind"] == "ScaledObject"
    }
    wanted = 0
    for name in PROCESSES:
        given = {one["name"]: one.get("value") for one in pod(name)["spec"]["containers"][0]["env"]}
        pool = int(given.get("SMDIH_DATABASE_POOL_MAX") or Settings.model_fields["database_pool_max"].default)
        most = by_lag.get(name) or kind("HorizontalPodAutoscaler")[name]["spec"]["maxReplicas"]
        surge = 1 if name in kind("Deployment") else 0
        wanted += (most + surge) * (pool + (1 if name == "door" else 0))
    (database,) = (
        one
        for one in yaml.safe_load_all((BASE.parent / "components/timescaledb/timescaledb.yaml").read_text())
        if one["kind"] == "StatefulSet"
    )
    arguments = database["spec"]["template"]["spec"]["containers"][0]["args"]
    (limit,) = (int(one.partition("=")[2]) for one in arguments if one.startswith("-cmax_connections="))
    assert wanted + 20 <= limit


@pytest.mark.parametrize("name", ENTRIES)
def test_each_comes_to_the_database_by_its_own_login(name: str) -> None:
    (container,) = pod(name)["spec"]["containers"]
    (dsn,) = (
        one["valueFrom"]["secretKeyRef"]["name"] for one in container["env"] if one["name"] == "SMDIH_DATABASE_DSN"
    )
    login = {"migrate": OWNER, "reconcile": "reconcile"}.get(name) or access_of(name).schema
    assert dsn == f"smdih-database-{login}"


def test_every_login_is_made_before_the_migration_from_the_secret_that_it_is_used_from() -> None:
    (made,) = pod("migrate")["spec"]["initContainers"]
    assert made["args"] == ["-m", "services.logins", made["volumeMounts"][0]["mountPath"]]
    (volume,) = pod("migrate")["spec"]["volumes"]
    mounted = {one["secret"]["name"]: one["secret"]["items"][0]["path"] for one in volume["projected"]["sources"]}
    assert mounted == {f"smdih-database-{name}": name for name in LOGINS}
    # Nobody but this one comes as the administrator, and who restores, which is suspended.
    secrets = re.findall(
        r"name: (smdih-database[a-z-]*)", "".join(path.read_text() for path in BASE.parent.rglob("*.yaml"))
    )
    assert secrets.count("smdih-database-admin") == 2
    assert set(secrets) - {"smdih-database-admin"} == set(mounted)


def test_the_backup_is_the_command_that_it_says_and_reaches_the_database_only() -> None:
    found = yaml.safe_load_all(Path("deploy/k8s/components/backup/backup.yaml").read_text())
    (job,) = (one for one in found if one["kind"] == "CronJob")
    (container,) = template(job)["spec"]["containers"]
    assert container["args"][:3] == ["-m", "services.backup", "keep"]
    assert container["args"][3] in {mount["mountPath"] for mount in container["volumeMounts"]}
    given = {one["name"] for one in container["env"]}
    assert given <= {f"SMDIH_{name.upper()}" for name in BackupSettings.model_fields}
    labels = template(job)["metadata"]["labels"]
    assert [label for label in labels if label.startswith("smdih/")] == ["smdih/database"]


def test_a_dump_comes_back_and_out_by_jobs_that_only_people_start() -> None:
    found = yaml.safe_load_all(Path("deploy/k8s/components/backup/restore.yaml").read_text())
    jobs = {one["metadata"]["name"]: one for one in found if one["kind"] == "CronJob"}
    assert set(jobs) == {"restore", "backup-shelf"}
    assert all(one["spec"]["suspend"] for one in jobs.values())
    (container,) = template(jobs["restore"])["spec"]["containers"]
    assert container["args"] == ["-m", "services.backup", "restore", "/backup"]
    (dsn,) = container["env"]
    assert dsn["valueFrom"]["secretKeyRef"]["name"] == "smdih-database-admin"
    reached = [[one for one in template(job)["metadata"]["labels"] if "smdih/" in one] for job in jobs.values()]
    assert reached == [["smdih/database"], []]
    for job in jobs.values():
        spec = template(job)["spec"]
        assert {"name": "backup", "persistentVolumeClaim": {"claimName": "backup"}} in spec["volumes"]
        assert {"name": "backup", "mountPath": "/backup", "readOnly": True} in spec["containers"][0]["volumeMounts"]


@pytest.mark.parametrize("name", ENTRIES)
def test_what_may_not_be_shown_comes_from_a_secret(name: str) -> None:
    hidden = {variable for variable, field in fields(name).items() if field.repr is False}
    for one in pod(name)["spec"]["containers"][0]["env"]:
        if one["name"] in hidden:
            assert "secretKeyRef" in one["valueFrom"]
    assert not hidden & {variable for values in config().values() for variable in values}


def test_an_upgrade_replaces_every_process_and_the_door_last() -> None:
    (order,) = re.findall(r"for name in (.*); do", Path("deploy/k8s/deploy.sh").read_text())
    assert sorted(order.split()) == sorted(PROCESSES)
    assert order.endswith(" door")


def test_who_serves_people_stays_in_its_service_while_kafka_or_the_database_is_away() -> None:
    patch = yaml.safe_load((BASE / "patches/serving.yaml").read_text())["spec"]["template"]["spec"]
    path = patch["containers"][0]["readinessProbe"]["httpGet"]["path"]
    excluded = re.findall(r"[?&]exclude=(\w+)", path)
    assert excluded == ["kafka", "database", "feed"]
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    (target,) = (one["target"] for one in kustomization["patches"] if one["path"] == "patches/serving.yaml")
    assert set(re.findall(r"[\w-]+", target["name"])) == {role.name for role in ROLES if role.has_grpc}
    # By the names that the processes give them.
    named = {one for role in ROLES for one in re.findall(r'ready_when\("(\w+)"', _source(role.name))}
    assert set(excluded) <= named


def _source(process: str) -> str:
    return inspect.getsource(importlib.import_module(ENTRIES[process][0]))


def test_a_stop_has_the_time_that_the_processes_take() -> None:
    patch = yaml.safe_load((BASE / "patches/process.yaml").read_text())["spec"]["template"]["spec"]
    before = patch["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain = int(config()["hub"]["SMDIH_DRAIN_S"])
    assert drain > 0
    assert patch["terminationGracePeriodSeconds"] >= before + drain + STOP_TIMEOUT_S + 5


def test_what_follows_from_elsewhere_is_as_it_is_there() -> None:
    for path, text in write.files().items():
        assert path.read_text() == text, "run `python -m deploy.k8s.write`"
    production = yaml.safe_load(Path("deploy/k8s/overlays/production/kustomization.yaml").read_text())
    (migrate,) = (one["literals"] for one in production["configMapGenerator"] if one["name"] == "migrate")
    assert f"SMDIH_KAFKA_PARTITIONS={write.PARTITIONS}" in migrate
    assert f"SMDIH_KAFKA_REPLICATION={write.REPLICAS}" in migrate


def test_whoever_comes_to_the_database_in_production_knows_it_by_its_authority() -> None:
    components = BASE.parent / "components"
    production = yaml.safe_load((BASE.parent / "overlays/production/kustomization.yaml").read_text())["components"]
    # Behind all that bring somebody who comes there.
    assert production[-1] == "../../components/database-tls"
    kustomization = yaml.safe_load((components / "database-tls/kustomization.yaml").read_text())
    targets = {one["path"]: one["target"] for one in kustomization["patches"]}
    others = [one for path in (components / "backup").glob("*.yaml") for one in yaml.safe_load_all(path.read_text())]
    coming = [
        one
        for one in [*workloads().values(), *others]
        if one["kind"] in ("Deployment", "StatefulSet", "Job", "CronJob")
        and "smdih/database" in template(one)["metadata"]["labels"]
    ]
    patched = "jobs.yaml", "processes.yaml"
    for one in coming:
        (path,) = (path for path in patched if re.fullmatch(targets[path]["kind"], one["kind"]))
        assert re.fullmatch(targets[path]["name"], one["metadata"]["name"]), one["metadata"]["name"]
    assert {one["metadata"]["name"] for one in coming} == {
        name for path in patched for name in re.findall(r"[\w-]+", targets[path]["name"])
    }
    for path in patched:
        spec = template(yaml.safe_load((components / "database-tls" / path).read_text()))["spec"]
        (variable,) = spec["containers"][0]["env"]
        assert variable["name"] in {f"SMDIH_{name.upper()}" for name in DatabaseSettings.model_fields}
        certificate = yaml.safe_load((components / "timescaledb/certificate.yaml").read_text())["spec"]
        assert spec["volumes"][0]["secret"]["secretName"] == certificate["secretName"]


def test_each_process_comes_to_the_brokers_as_its_own_user() -> None:
    users = {one["metadata"]["name"] for one in write.user_objects()}
    patched = {one["metadata"]["name"]: one for one in write.client_patches()}
    assert set(patched) == {name for name in ENTRIES if "smdih/kafka" in labels_of(name)}
    for name, patch in patched.items():
        assert patch["kind"] == workloads()[name]["kind"]
        (container,) = template(patch)["spec"]["containers"]
        given = {one["name"]: one for one in container["env"]}
        assert set(given) <= set(fields(name))
        assert given["SMDIH_KAFKA_USERNAME"]["value"] == f"smdih-{name}"
        assert given["SMDIH_KAFKA_USERNAME"]["value"] in users
        assert given["SMDIH_KAFKA_PASSWORD"]["valueFrom"]["secretKeyRef"]["name"] == f"smdih-{name}"


def test_with_tls_each_process_has_a_certificate_of_its_service_and_calls_others_by_the_internal_port() -> None:
    certificates = {one["metadata"]["name"]: one["spec"] for one in write.certificate_objects()}
    patched = {one["metadata"]["name"]: one for one in write.tls_patches()}
    assert set(certificates) == set(patched) == {role.name for role in ROLES if role.has_grpc}
    called = {
        (name, f"SMDIH_{setting.upper()}", f"{process}:9091")
        for name in PROCESSES
        for setting, process in PROCESS_OF.items()
        if setting in settings_read(name)
    }
    assert called == set(write.INTERNAL)
    for name, patch in patched.items():
        (container,) = patch["spec"]["template"]["spec"]["containers"]
        assert {one["name"] for one in container["env"]} <= set(fields(name))
        (uri,) = certificates[name]["uris"]
        assert uri.removeprefix("spiffe://smdih/") in HUB_SERVICES
        assert (
            patch["spec"]["template"]["spec"]["volumes"][0]["secret"]["secretName"] == certificates[name]["secretName"]
        )


def test_every_dashboard_is_given_to_grafana() -> None:
    folder = Path("deploy/grafana")
    made = yaml.safe_load((folder / "kustomization.yaml").read_text())["configMapGenerator"]
    dashboards = {file for one in made for file in one["files"] if "grafana_dashboard" in one["options"]["labels"]}
    assert dashboards == {f"dashboards/{path.name}" for path in (folder / "dashboards").glob("*.json")}
    monitoring = Path("deploy/k8s/components/monitoring")
    resources = yaml.safe_load((monitoring / "kustomization.yaml").read_text())["resources"]
    assert folder.resolve() in {(monitoring / one).resolve() for one in resources}


@pytest.mark.parametrize("component", ["strimzi", "tls", "tracing", "oidc"])
def test_what_a_component_configures_are_settings_that_there_are(component: str) -> None:
    kustomization = yaml.safe_load(Path(f"deploy/k8s/components/{component}/kustomization.yaml").read_text())
    for made in kustomization["configMapGenerator"]:
        assert made["name"] in config()
        known = set(fields("mqtt-bridge")) if made["name"] == "mqtt" else set(fields("migrate"))
        assert {literal.split("=")[0] for literal in made["literals"]} <= known


def test_alertmanager_is_told_by_the_operator_what_its_own_file_says() -> None:
    """The operator gives a route the alerts of its namespace only, so each alert has to say that."""
    config = yaml.safe_load(write.ALERTMANAGER.read_text())
    spec = write.route_object()["spec"]
    assert [one["receiver"] for one in spec["route"]["routes"]] == [
        one["receiver"] for one in config["route"]["routes"]
    ]
    for kept, wanted in zip(spec["inhibitRules"], config["inhibit_rules"], strict=True):
        for side in ("source", "target"):
            texts = [f'{one["name"]}{one.get("matchType", "=")}"{one["value"]}"' for one in kept[f"{side}Match"]]
            assert texts == wanted[f"{side}_matchers"]
    webhooks = {one["name"]: one["webhookConfigs"] for one in spec["receivers"]}
    assert {name: [one["urlSecret"]["key"] for one in each] for name, each in webhooks.items()} == {
        name: [name] for name in ("on-call", "heartbeat", "tickets")
    }
    alerts = [one for group in write.rule_object()["spec"]["groups"] for one in group["rules"] if "alert" in one]
    assert {one["labels"]["namespace"] for one in alerts} == {
        yaml.safe_load((BASE / "kustomization.yaml").read_text())["namespace"]
    }


def test_scaling_by_lag_looks_at_groups_and_topics_that_there_are() -> None:
    for one in yaml.safe_load_all(Path("deploy/k8s/components/keda/scaledobjects.yaml").read_text()):
        if one["kind"] != "ScaledObject":
            continue
        name = one["metadata"]["name"]
        (trigger,) = one["spec"]["triggers"]
        assert one["spec"]["scaleTargetRef"]["name"] == name
        assert access_of(name).consumes[trigger["metadata"]["consumerGroup"]] == trigger["metadata"]["topic"]
