"""Key files: for their owner only, whole, and plain."""

from __future__ import annotations

import os

import pytest

from common.errors import Code, StorageError
from common.keys import MAX_KEY_FILE, key_file, secret_file
from common.world import SystemEntropy


def code_of(action) -> Code:
    with pytest.raises(StorageError) as caught:
        action()
    return caught.value.code


def test_a_secret_is_made_once_and_for_its_owner_only(tmp_path) -> None:
    path = tmp_path / "a.key"
    secret = secret_file(path, SystemEntropy())
    assert len(secret) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert secret_file(path, SystemEntropy()) == key_file(path) == secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601, 0o777])
def test_a_key_that_is_open_to_others_is_refused_with_its_fix(tmp_path, mode: int) -> None:
    path = tmp_path / "a.key"
    secret_file(path, SystemEntropy())
    path.chmod(mode)
    with pytest.raises(StorageError) as caught:
        key_file(path)
    assert caught.value.code is Code.KEY_FILE_OPEN
    assert "chmod 600" in caught.value.remedy
    path.chmod(0o400)
    key_file(path)  # control


def test_what_is_missing_empty_too_long_or_no_plain_file_is_refused(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    for name, content in (("empty", b""), ("long", b"x" * (MAX_KEY_FILE + 1))):
        (tmp_path / name).write_bytes(content)
        (tmp_path / name).chmod(0o600)
    for name in ("gone", "pipe", "folder", "empty", "long"):
        assert code_of(lambda name=name: key_file(tmp_path / name)) is Code.KEY_FILE_DAMAGED


@pytest.mark.parametrize("size", [1, 31, 33])
def test_a_secret_of_another_length_is_refused(tmp_path, size: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * size)
    (tmp_path / "a").chmod(0o600)
    assert code_of(lambda: secret_file(tmp_path / "a", SystemEntropy())) is Code.KEY_FILE_DAMAGED
