"""The installed program is the released one, or it does not start."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from pathlib import Path

import pytest

from common.errors import Code, RefusedError
from common.integrity import verify

FILES = {
    "common/__init__.py": "",
    "common/crypto/__init__.py": "",
    "common/crypto/mask.py": "SECRET = 1\n",
    "client/__init__.py": "",
    "server/__init__.py": "",
    "server/round.py": "ROUND = 1\n",
}


def install(site: Path, name: str, files: dict[str, str], *, direct_url: object = None) -> None:
    """What a wheel installer leaves: the files, METADATA and RECORD."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    record = [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,"]
    for path, text in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(text)
        digest = hashlib.sha256(text.encode()).digest()
        encoded = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
        record.append(f"{path},sha256={encoded},{len(text)}")
    record.append("common/__pycache__/__init__.cpython-311.pyc,,")
    (info / "RECORD").write_text("\n".join(record) + "\n")
    if direct_url is not None:
        (info / "direct_url.json").write_text(json.dumps(direct_url))


@pytest.fixture
def site(tmp_path):
    install(tmp_path / "site", "wardround", FILES)
    return tmp_path / "site"


ROLES = ("common", "client", "server")


def refused(code: Code, site: Path, *more: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        verify(ROLES, search=[*(str(path) for path in more), str(site)])
    assert caught.value.code is code
    return caught.value.message


def test_an_untouched_installation_is_verified(site) -> None:
    outcome = verify(ROLES, search=[str(site)])
    assert (outcome.status, outcome.files, outcome.version) == ("verified", 6, "1.0")


def test_a_role_image_without_the_other_side_is_verified(site) -> None:
    shutil.rmtree(site / "server")
    assert verify(("common", "client"), search=[str(site)]).status == "verified"
    assert "server" in refused(Code.CODE_ALTERED, site)


def test_an_altered_file_is_refused(site) -> None:
    (site / "common/crypto/mask.py").write_text("SECRET = 2\n")
    assert "common/crypto/mask.py" in refused(Code.CODE_ALTERED, site)


def test_a_missing_file_is_refused(site) -> None:
    (site / "server/round.py").unlink()
    assert "server/round.py" in refused(Code.CODE_ALTERED, site)


@pytest.mark.parametrize("extra", ["common/sitecustomize.py", "client/fast.so", "server/x.pyc"])
def test_an_extra_file_that_could_run_is_refused(site, extra: str) -> None:
    (site / extra).write_text("")
    assert extra in refused(Code.CODE_ALTERED, site)


def test_a_file_without_a_digest_in_the_record_is_refused(site) -> None:
    record = site / "wardround-1.0.dist-info/RECORD"
    lines = [
        line if "mask.py" not in line else "common/crypto/mask.py,,"
        for line in record.read_text().split("\n")
    ]
    record.write_text("\n".join(lines))
    assert "common/crypto/mask.py" in refused(Code.CODE_ALTERED, site)


def test_a_package_that_pip_let_overwrite_ours_is_refused(site) -> None:
    # pip does this silently: the stranger's files are simply written over ours.
    install(site, "stranger", {"common/__init__.py": "print('mine')\n"})
    assert "stranger" in refused(Code.CODE_SHADOWED, site)


def test_a_package_that_is_found_before_ours_is_refused(site, tmp_path) -> None:
    before = tmp_path / "before"
    (before / "client").mkdir(parents=True)
    (before / "client/__init__.py").write_text("")
    assert "client" in refused(Code.CODE_SHADOWED, site, before)
    # Control: behind ours on the path it does no harm.
    assert verify(ROLES, search=[str(site), str(before)]).status == "verified"


def test_an_editable_install_is_reported_and_not_checked(tmp_path) -> None:
    site = tmp_path / "site"
    install(
        site, "wardround", FILES, direct_url={"dir_info": {"editable": True}, "url": "file:///x"}
    )
    (site / "common/crypto/mask.py").write_text("changed\n")
    assert verify(ROLES, search=[str(site)]).status == "development"
    # Control: an install from a folder that is not editable is checked.
    (site / "wardround-1.0.dist-info/direct_url.json").write_text('{"dir_info": {}, "url": "x"}')
    refused(Code.CODE_ALTERED, site)


def test_a_checkout_that_was_never_installed_is_reported(tmp_path) -> None:
    assert verify(ROLES, search=[str(tmp_path)]).status == "development"


def test_the_installation_that_runs_this_test_is_not_refused() -> None:
    assert verify(("common",)).status in {"development", "verified"}
