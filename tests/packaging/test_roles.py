"""Each role's own installation: made as its image makes it, with nothing of the other side."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from common.integrity import code_digest

ROOT = Path(__file__).parents[2]


def script(name):
    spec = importlib.util.spec_from_file_location(f"docker_{name}", ROOT / "docker" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


roles = script("check_roles")
wheels = script("wheel")


@pytest.fixture(scope="module")
def hospital(tmp_path_factory):
    """The hospital: its wheel installed, of everything else only what its lock file names."""
    return roles.prepare("client", tmp_path_factory.mktemp("hospital"), real=False)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory):
    """The coordinator: installed as in its image, from the locked hashes."""
    return roles.prepare("server", tmp_path_factory.mktemp("coordinator"), real=True)


def test_a_really_installed_coordinator_has_no_torch_and_no_code_of_a_hospital(coordinator):
    assert coordinator.faults() == []
    for name in ("torch", "client"):
        done = coordinator.run("-c", f"import {name}")
        assert done.returncode == 1
        assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


def test_a_hospital_has_no_code_of_the_coordinator(hospital):
    assert hospital.faults() == []
    done = hospital.run("-c", "import server")
    assert done.returncode == 1
    assert "ModuleNotFoundError: No module named 'server'" in done.stderr
    assert hospital.run("-c", "import pytest").returncode == 1, "only what is locked is lent"


@pytest.mark.parametrize("role", ["hospital", "coordinator"])
def test_doctor_says_that_the_installed_files_are_the_released_ones(role, request):
    done = request.getfixturevalue(role).wardround("doctor")
    assert "files as released" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0, done.stdout


def test_a_command_of_the_other_side_is_named_and_not_run(hospital, coordinator):
    for environment, words in (
        (hospital, ("server", "run", "x")),
        (coordinator, ("client", "run")),
    ):
        done = environment.wardround(*words)
        assert done.returncode == 2
        assert "WR-7002" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    os.environ.get("WARDROUND_ROLES") != "full",
    reason="installs gigabytes: set WARDROUND_ROLES=full to install a hospital from its hashes",
)
def test_a_really_installed_hospital_has_no_code_of_the_coordinator(tmp_path):
    assert roles.prepare("client", tmp_path, real=True).faults() == []


# ------------------------------------------------------------------------- positive controls

# Needed by a hospital, and slow to load: a control has no use for them.
HEAVY = ("torch", "opacus", "peft")


def packages(environment):
    (found,) = (environment.folder / "lib").glob("python*/site-packages")
    return found


def test_control_code_of_the_coordinator_at_a_hospital_is_noticed(tmp_path):
    environment = roles.prepare("client", tmp_path, real=False)
    (packages(environment) / "server").symlink_to(ROOT / "server")
    found = environment.faults(*HEAVY)
    assert "server can be imported" in found
    assert "the verb `server run` is here" in found


def test_control_torch_at_a_coordinator_is_noticed(tmp_path):
    environment = roles.prepare("server", tmp_path, real=False)
    roles.lend(environment, roles.locked_names(ROOT / "requirements" / "client.txt"))
    found = environment.faults()
    assert "torch can be imported" in found
    assert "client can be imported" not in found


def test_control_an_altered_file_is_noticed(tmp_path):
    environment = roles.prepare("server", tmp_path, real=False)
    with (packages(environment) / "server" / "driver.py").open("a") as file:
        file.write("# another line\n")
    assert environment.faults() == ["integrity: The file server/driver.py is altered or missing."]


def test_control_a_missing_requirement_is_noticed(tmp_path):
    environment = roles.prepare("server", tmp_path, real=False)
    locked = roles.locked_names(ROOT / "requirements" / "coordinator.txt") - {"grpcio"}
    roles.lend(environment, locked)
    assert any("grpc" in fault for fault in environment.faults())


# ------------------------------------------------------------------------------- the wheels


def unpacked(path, folder):
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
    return folder


def metadata(path):
    with zipfile.ZipFile(path) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return archive.read(name).decode().split("\n\n")[0].splitlines()


@pytest.mark.parametrize("role", wheels.ROLES)
def test_a_roles_wheel_holds_common_and_its_own_package_and_nothing_else(role, tmp_path):
    path = wheels.build(ROOT, role, tmp_path)
    with zipfile.ZipFile(path) as archive:
        tops = {name.partition("/")[0] for name in archive.namelist()}
        assert archive.testzip() is None
    assert {top for top in tops if not top.endswith(".dist-info")} == {"common", role}


def test_the_same_sources_give_the_same_wheel(tmp_path):
    first = wheels.build(ROOT, "client", tmp_path / "a").read_bytes()
    assert wheels.build(ROOT, "client", tmp_path / "b").read_bytes() == first


def test_a_roles_wheel_says_of_itself_what_the_release_says(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    builder = WheelBuilder(str(ROOT))
    (release,) = builder.build(directory=str(tmp_path / "release"), versions=["standard"])
    whole = metadata(release)
    skipped = ("Metadata-Version:", "Description-Content-Type:")
    for role in wheels.ROLES:
        told = metadata(wheels.build(ROOT, role, tmp_path / role))
        assert [line for line in told if line not in whole and not line.startswith(skipped)] == []
        extra = "; extra == '"
        wanted = [
            line
            for line in whole
            if not line.startswith((*skipped, "Provides-Extra:"))
            and (extra not in line or f"{extra}{role}'" in line)
        ]
        assert [line for line in wanted if line not in told] == []
        assert told.count("Provides-Extra: client") == (role == "client")


def test_what_a_hospital_approves_is_the_same_in_a_wheel_and_in_the_checkout(tmp_path):
    folder = unpacked(wheels.build(ROOT, "client", tmp_path), tmp_path / "site")
    parts = ("common", "client")
    assert code_digest(parts, search=[str(folder)]) == code_digest(parts, search=[str(ROOT)])
    shutil.copy(folder / "client" / "daemon.py", folder / "client" / "another.py")
    assert code_digest(parts, search=[str(folder)]) != code_digest(parts, search=[str(ROOT)])
