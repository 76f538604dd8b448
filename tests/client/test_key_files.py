"""Secrets in files: made once, readable by their owner alone, never used where they are not."""

from __future__ import annotations

import os

import pytest

from client.site import IDENTITY_FILE, VAULT_FILE, site_key
from common.errors import Code, StorageError
from common.keys import secret_file
from common.world import SystemEntropy


@pytest.fixture(params=[IDENTITY_FILE, VAULT_FILE])
def key_file(request, tmp_path):
    path = tmp_path / request.param
    secret_file(path, SystemEntropy())
    return path


def test_a_secret_is_made_once_for_its_owner_alone(key_file):
    assert key_file.stat().st_mode & 0o777 == 0o600
    secret = key_file.read_bytes()
    assert len(set(secret)) > 1
    assert secret_file(key_file, SystemEntropy()) == secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o601, 0o644, 0o666, 0o777])
def test_a_secret_that_others_may_touch_is_refused_and_left_as_it_is(key_file, mode):
    before = key_file.read_bytes()
    key_file.chmod(mode)
    with pytest.raises(StorageError) as refused:
        secret_file(key_file, SystemEntropy())
    assert refused.value.code is Code.KEY_FILE_OPEN
    assert str(key_file) in str(refused.value)
    assert before.hex() not in str(refused.value)
    assert key_file.read_bytes() == before
    key_file.chmod(0o600)
    assert secret_file(key_file, SystemEntropy()) == before  # control


@pytest.mark.parametrize("change", [lambda k: b"", lambda k: k[:-1], lambda k: k + b"\n"])
def test_a_secret_of_another_length_is_refused_and_never_made_anew(key_file, change):
    damaged = change(key_file.read_bytes())
    key_file.write_bytes(damaged)
    with pytest.raises(StorageError) as refused:
        secret_file(key_file, SystemEntropy())
    assert refused.value.code is Code.KEY_FILE_DAMAGED
    assert key_file.read_bytes() == damaged, "a new identity is the hospital's decision"


def test_a_hospital_with_an_open_or_damaged_identity_does_not_start(tmp_path):
    site_key(tmp_path, SystemEntropy())
    path = tmp_path / IDENTITY_FILE
    path.chmod(0o644)
    with pytest.raises(StorageError) as refused:
        site_key(tmp_path, SystemEntropy())
    assert refused.value.code is Code.KEY_FILE_OPEN
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(StorageError) as refused:
        site_key(tmp_path, SystemEntropy())
    assert refused.value.code is Code.KEY_FILE_DAMAGED


def test_a_secret_of_another_user_is_a_named_fault(key_file, monkeypatch):
    real = os.open

    def deny(path, *flags, **more):
        if path == key_file:
            raise PermissionError(13, "Permission denied")
        return real(path, *flags, **more)

    # Root may read everything, so the operating system's answer is played.
    monkeypatch.setattr(os, "open", deny)
    with pytest.raises(StorageError, match="Permission denied") as refused:
        secret_file(key_file, SystemEntropy())
    assert refused.value.code is Code.KEY_FILE_DAMAGED
