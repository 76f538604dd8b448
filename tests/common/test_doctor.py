"""doctor: every line with a verdict, every complaint with a fix."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common import doctor, integrity
from common.cli import main
from common.errors import Code, RefusedError


def found(folder: Path) -> dict[str, doctor.Finding]:
    return {item.name: item for item in doctor.findings(folder)}


def test_every_part_of_the_machine_gets_a_line(tmp_path) -> None:
    assert set(found(tmp_path)) >= {
        *("python", "packages", "requirements", "torch", "threads", "disk", "folder"),
        *("entropy", "cryptography", "integrity", "offline model"),
    }


def test_a_complaint_comes_with_a_fix_and_good_news_without() -> None:
    for item in doctor.findings(Path()):
        assert bool(item.fix) == (item.status != "ok"), item


def test_a_folder_that_is_not_there_fails_with_the_exit_status_of_a_failed_check(
    tmp_path, capsys
) -> None:
    assert main(["doctor", "--folder", str(tmp_path / "gone")]) == 1
    assert "there is no such folder" in capsys.readouterr().out
    assert main(["doctor", "--folder", str(tmp_path)]) == 0


def test_a_folder_that_everybody_may_write_to_is_noticed(tmp_path) -> None:
    tmp_path.chmod(0o777)
    assert found(tmp_path)["folder"].status == "warn"
    tmp_path.chmod(0o700)
    assert found(tmp_path)["folder"].status == "ok"


def test_a_full_disk_is_noticed(tmp_path, monkeypatch) -> None:
    usage = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    assert usage.f_bavail == 0
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    assert found(tmp_path)["disk"].status == "fail"


@pytest.mark.parametrize(
    ("name", "line", "status"),
    [
        ("cryptography", "cryptography", "fail"),
        ("numpy", "requirements", "fail"),
        ("opacus", "client extra", "warn"),
        ("torch", "torch", "ok"),
    ],
)
def test_a_missing_package_is_noticed(tmp_path, monkeypatch, name, line, status) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda asked: None if asked == name else real(asked))
    assert found(tmp_path)[line].status == status


def test_a_missing_backbone_is_noticed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "BACKBONE", "no_such_backbone")
    assert found(tmp_path)["offline model"].status == "warn"


def test_a_gpu_that_a_cpu_build_leaves_idle_is_noticed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "_gpu_count", lambda: 2)
    monkeypatch.setattr(doctor, "_version", lambda _: "2.15.0+cpu")
    assert found(tmp_path)["torch"].status == "warn"
    monkeypatch.setattr(doctor, "_version", lambda _: "2.15.0")
    assert found(tmp_path)["torch"].detail == "2.15.0, 2 GPU(s)"


def test_an_altered_installation_fails(tmp_path, monkeypatch) -> None:
    def altered(_packages):
        raise RefusedError(Code.CODE_ALTERED, "The file common/x.py is altered or missing.")

    monkeypatch.setattr(integrity, "verify", altered)
    finding = found(tmp_path)["integrity"]
    assert finding.status == "fail"
    assert "WR-3110" in finding.detail


def test_the_report_is_also_one_json_object(tmp_path, capsys) -> None:
    assert main(["doctor", "--json", "--folder", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["ok"] is True
    assert {"name", "status", "detail", "fix"} == set(report["findings"][0])


# ---------------------------------------------------------------------------- the device


@pytest.mark.parametrize(
    ("wanted", "version", "gpus", "cuda", "driver", "status", "says"),
    [
        ("auto", "2.15.0", 0, "13.2", False, "ok", "no GPU"),
        ("auto", "2.15.0", 2, "13.2", True, "ok", "2 GPU(s)"),
        ("auto", "2.15.0", 2, None, True, "warn", "built for the CPU"),
        ("cuda", "2.15.0", 2, None, True, "fail", "built for the CPU"),
        ("cpu", "2.15.0", 2, None, True, "ok", "as site.yaml says"),
        ("auto", "2.15.0", 0, "13.2", True, "warn", "shows this user no GPU"),
        ("cuda", "2.15.0", 0, "13.2", True, "fail", "shows this user no GPU"),
        ("cuda", "2.15.0", 0, "13.2", False, "fail", "no NVIDIA driver"),
        ("cuda", "2.15.0", 1, "13.2", True, "ok", "1 GPU(s)"),
        ("cuda", None, 1, None, True, "fail", "not installed"),
        ("auto", None, 1, None, True, "ok", "does not need it"),
    ],
)
def test_a_device_that_torch_cannot_use_is_named(
    monkeypatch, wanted, version, gpus, cuda, driver, status, says
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda _: version)
    monkeypatch.setattr(doctor, "_gpu_count", lambda: gpus)
    monkeypatch.setattr(doctor, "_cuda_of_torch", lambda _: cuda)
    monkeypatch.setattr(doctor, "_driver_is_loaded", lambda: driver)
    found = doctor.device(wanted)
    assert (found.status, bool(found.fix)) == (status, status != "ok")
    assert says in found.detail


@pytest.mark.parametrize(
    ("line", "cuda"),
    [
        ("cuda: Optional[str] = '13.2'\n", "13.2"),
        ("cuda: Optional[str] = None\n", None),
        ("", None),
    ],
)
def test_what_torch_was_built_for_is_read_from_its_file(tmp_path, monkeypatch, line, cuda) -> None:
    (tmp_path / "version.py").write_text(
        f"__version__ = '2.15.0'\n{line}hip: Optional[str] = None\n"
    )
    spec = type("S", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _: spec)
    assert doctor._cuda_of_torch("2.15.0") == cuda
    assert doctor._cuda_of_torch("2.15.0+cpu") is None


# ---------------------------------------------------------------------------- clock, keys, release


@pytest.mark.parametrize(("state", "status"), [(0, "ok"), (5, "warn"), (None, None)])
def test_a_clock_that_nobody_keeps_right_is_noticed(monkeypatch, state, status) -> None:
    monkeypatch.setattr(doctor, "_clock_state", lambda: state)
    assert [item.status for item in doctor.clock()] == ([] if status is None else [status])


def test_the_kernel_is_asked_about_the_clock_and_told_nothing() -> None:
    assert doctor._clock_state() in {None, *range(6)}


def test_an_open_key_is_named_with_its_fix_and_a_closed_one_is_not(tmp_path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "identity.key"
    path.write_bytes(b"k" * 32)
    path.chmod(0o600)
    assert [item.status for item in doctor.keys([path])] == ["ok"]
    tmp_path.chmod(0o755)
    (found,) = doctor.keys([path])
    assert (found.status, found.fix) == ("warn", f"Type: chmod 700 {tmp_path}")
    path.chmod(0o640)
    (found,) = doctor.keys([path])
    assert found.status == "fail"
    assert f"chmod 600 {path}" in found.fix
    path.unlink()
    (found,) = doctor.keys([path])
    assert found.status == "fail"


def test_another_release_of_flower_is_noticed(tmp_path, monkeypatch) -> None:
    assert found(tmp_path)["flower"].status == "ok"
    monkeypatch.setattr(doctor, "_version", lambda _: "1.42.0")
    assert found(tmp_path)["flower"].status == "fail"


@pytest.mark.parametrize(
    ("own", "other", "far"),
    [
        ("0.1.0", "0.1.9", False),
        ("0.1.0", "0.2.0", False),
        ("0.2.0", "0.1.0", False),
        ("0.1.0", "0.3.0", True),
        ("0.9.0", "1.0.0", True),
        ("0.1.0", "nightly", True),
        ("0.1.0", "0.1.0.dev1", True),
        ("0.1.0", "", True),
    ],
)
def test_one_minor_version_apart_is_fine_and_two_are_not(own, other, far) -> None:
    from common.skew import far_apart

    assert far_apart(own, other) is far


@pytest.mark.parametrize("format_line", ["format: wardround-study/1", "format: x", "other: 1"])
def test_a_file_of_no_side_is_refused_as_a_configuration(tmp_path, capsys, format_line) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(format_line + "\n")
    assert main(["doctor", "--config", str(path)]) == 2
    assert "must be one of wardround-site/1" in capsys.readouterr().err


def test_a_side_that_is_not_installed_is_named(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("format: wardround-site/1\n")
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util, "find_spec", lambda name: None if name == "client" else real(name)
    )
    assert main(["doctor", "--config", str(path)]) == 2
    assert "not installed" in capsys.readouterr().err
