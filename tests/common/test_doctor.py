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
