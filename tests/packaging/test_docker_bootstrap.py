"""The demonstration's bootstrap.sh does what it says, with a stand-in for the container engine.

The stand-in reads the compose files as they are, runs each command line with only the packages of
the service's image, and puts the service's volumes where the container would see them.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from client.approval import Approval
from client.folders import HospitalFolder
from common.invite import Join
from server.deploy import Published
from server.enrol import admitted, coordinator_key

ROOT = Path(__file__).parents[2]
HOSPITALS = ("st-mary", "north-general", "lakeside", "riverside", "old-town")

ENGINE = '''\
#!{python} -I
"""docker compose -f FILE... run --rm --no-deps -T [--entrypoint PROGRAM] SERVICE WORDS..."""
import os, shutil, subprocess, sys
from pathlib import Path
import yaml

WORLD, HOUSE = Path({world!r}), Path({house!r})
words = sys.argv[1:]
assert words.pop(0) == "compose", words
files = []
while words[0] == "-f":
    files.append(words[1])
    del words[:2]
assert words[:4] == ["run", "--rm", "--no-deps", "-T"], words
del words[:4]
program = None
if words[0] == "--entrypoint":
    program = words[1]
    del words[:2]
name = words.pop(0)
mounts, image, network = {{}}, None, None
for file in files:
    service = yaml.safe_load(open(file))["services"][name]
    image = service.get("image", image)
    network = service.get("network_mode", network)
    for volume in service.get("volumes", []):
        if isinstance(volume, str):
            source, target = volume.split(":")[:2]
        else:
            source, target = volume["source"], volume["target"]
        mounts[target] = Path(source).resolve() if source[0] == "." else WORLD / "volumes" / source
assert network in (None, "none"), f"{{network}} does not run"
for target, source in mounts.items():
    if target == "/var/lib/wardround":
        source.mkdir(parents=True, exist_ok=True)
    assert source.exists(), source
state = mounts["/var/lib/wardround"]
# What a container sees under /etc/wardround says where its state lies on this machine.
seen = WORLD / "etc" / name
shutil.rmtree(seen, ignore_errors=True)
seen.mkdir(parents=True)
for target, source in list(mounts.items()):
    if target.startswith("/etc/wardround"):
        for path in [source] if source.is_file() else source.iterdir():
            text = path.read_text().replace("/var/lib/wardround", str(state))
            (seen / path.name).write_text(text)
mounts = {{t: s for t, s in mounts.items() if not t.startswith("/etc/")}} | {{"/etc/wardround": seen}}

def here(word):
    for target, source in mounts.items():
        if word == target or word.startswith(target + "/"):
            return str(source) + word[len(target):]
    assert not word.startswith("/"), f"{{word}} is not mounted"
    return word

words = [here(word) for word in words]
if program is not None:
    sys.exit(subprocess.run([program, *words]).returncode)
sys.path = [str(HOUSE / image), *(p for p in sys.path if Path(p).resolve() != Path({root!r}))]
os.chdir(state)
from common.cli import main
sys.exit(main(words))
'''


def engine(folder: Path) -> Path:
    """A folder with the stand-in `docker` in it."""
    for role in ("client", "server"):
        house = folder / "house" / f"wardround-{role}"
        house.mkdir(parents=True)
        for package in ("common", role):
            (house / package).symlink_to(ROOT / package)
    places = {"world": str(folder), "house": str(folder / "house"), "root": str(ROOT)}
    program = folder / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(ENGINE.format(python=sys.executable, **places))
    program.chmod(0o755)
    return program.parent


def bootstrap(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", folder / "project" / "docker" / "bootstrap.sh"],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A machine on which bootstrap.sh has run."""
    folder = tmp_path_factory.mktemp("world")
    engine(folder)
    kept = shutil.ignore_patterns("demo", "secrets", "__pycache__")
    shutil.copytree(ROOT / "docker", folder / "project" / "docker", ignore=kept)
    shutil.copytree(ROOT / "configs" / "data", folder / "project" / "configs" / "data")
    done = bootstrap(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_everybody_is_enrolled_and_has_approved_the_published_study(world):
    state = world / "volumes" / "coordinator"
    coordinator = coordinator_key(state).public
    assert {site.site for site in admitted(state)} == set(HOSPITALS)
    published = Published.load(state / "study", coordinator)
    assert set(published.keys) == set(HOSPITALS)
    for hospital in HOSPITALS:
        folder = HospitalFolder(world / "volumes" / hospital)
        (study,) = folder.approved()
        assert Approval.load(study.approval).study == published.bundle.digest


def test_every_patient_of_the_demonstration_is_at_one_hospital(world):
    demo = world / "project" / "docker" / "demo"
    whole = (ROOT / "configs" / "data" / "synthetic-labs.csv").read_text().splitlines()
    shares = {h: (demo / h / "records.csv").read_text().splitlines() for h in HOSPITALS}
    assert all(share[0] == whole[0] for share in shares.values())
    assert sorted(row for share in shares.values() for row in share[1:]) == sorted(whole[1:])
    patients = [{row.split(",")[0] for row in share[1:]} for share in shares.values()]
    assert sum(map(len, patients)) == len(set().union(*patients))


def test_secrets_are_files_that_only_their_owner_can_reach(world):
    docker = world / "project" / "docker"
    for name in ("demo", "secrets"):
        assert stat.S_IMODE((docker / name).stat().st_mode) == 0o700
    token = (docker / "secrets" / "admin.token").read_text().strip()
    assert token == (world / "volumes" / "coordinator" / "admin.token").read_text().strip()
    assert len((docker / "secrets" / "grafana.password").read_text()) == 32
    ignored = (docker / ".gitignore").read_text().split()
    assert {"demo/", "secrets/"} <= set(ignored)


def test_the_words_were_compared_and_no_private_key_left_its_volume(world):
    exchange = world / "project" / "docker" / "demo" / "exchange"
    seeds = [path.read_bytes() for path in world.glob("volumes/*/*.key")]
    assert len(seeds) >= 1 + 2 * len(HOSPITALS)
    for path in exchange.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(seed in content or seed.hex().encode() in content for seed in seeds)
    joins = [Join.load(exchange / f"{hospital}.join") for hospital in HOSPITALS]
    assert len({join.words for join in joins}) == len(HOSPITALS)


def test_a_second_bootstrap_over_the_first_is_refused(world):
    before = json.dumps(sorted(str(p) for p in world.rglob("*")))
    done = bootstrap(world)
    assert done.returncode == 1
    assert "is here already" in done.stderr
    assert json.dumps(sorted(str(p) for p in world.rglob("*"))) == before


def test_control_the_stand_in_has_no_code_of_the_other_role(world):
    done = subprocess.run(
        [world / "bin" / "docker", "compose", "-f", "compose.yaml", "-f", "bootstrap.yaml", "run",
         "--rm", "--no-deps", "-T", "st-mary", "server", "roster"],
        capture_output=True, text=True, check=False, cwd=world / "project" / "docker",
    )  # fmt: skip
    assert done.returncode == 2
    assert "WR-7002" in done.stderr
