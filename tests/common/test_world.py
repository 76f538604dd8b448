"""The journal on a real disk: torn writes, wiped slots, damage, disk full."""

import os

import pytest

from common.crypto.seal import Vault
from common.errors import Code, StorageError
from common.world import FileJournal, SealedJournal, SeededEntropy, SkippingClock


def reopened(folder):
    journal = FileJournal(folder)
    try:
        return journal.load()
    finally:
        journal.close()


def test_the_last_record_is_found_again(tmp_path):
    journal = FileJournal(tmp_path)
    for number in range(7):
        journal.store(f"record {number}".encode())
    journal.close()
    assert reopened(tmp_path) == b"record 6"


def test_a_record_that_outgrows_its_slot_is_kept(tmp_path):
    journal = FileJournal(tmp_path)
    journal.store(b"small")
    journal.store(b"x" * 50_000)
    journal.store(b"y" * 50_001)
    journal.close()
    assert reopened(tmp_path) == b"y" * 50_001


@pytest.mark.parametrize("cut", [0, 1, 30, 52, 60, 4095])
def test_a_torn_write_leaves_the_old_record(tmp_path, monkeypatch, cut):
    journal = FileJournal(tmp_path)
    journal.store(b"one")
    journal.store(b"two")
    real = os.pwrite

    def torn(handle, data, at):
        real(handle, bytes(data)[:cut], at)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", torn)
    with pytest.raises(StorageError) as caught:
        journal.store(b"three")
    assert caught.value.code is Code.JOURNAL_WRITE
    monkeypatch.undo()
    journal.close()
    # Whole before the write failed: then the new record may be there, but never half of it.
    assert reopened(tmp_path) == (b"two" if cut < 57 else b"three")


def test_an_old_record_is_wiped_only_after_the_new_one_is_synced(tmp_path, monkeypatch):
    journal = FileJournal(tmp_path)
    journal.store(b"old keys and shares")
    order = []
    real_write, real_sync = os.pwrite, os.fdatasync
    monkeypatch.setattr(
        os, "pwrite", lambda h, d, at: order.append(bytes(d[:4])) or real_write(h, d, at)
    )
    monkeypatch.setattr(os, "fdatasync", lambda h: order.append("sync") or real_sync(h))
    journal.store(b"new")
    assert order == [b"WRJ1", "sync", b"\0\0\0\0"]
    journal.close()
    content = (tmp_path / "record").read_bytes()
    assert b"old keys" not in content
    assert b"new" in content


def test_a_wiped_file_is_damage_and_never_a_fresh_start(tmp_path):
    journal = FileJournal(tmp_path)
    journal.store(b"agreed in round 3")
    journal.close()
    path = tmp_path / "record"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(StorageError) as caught:
        FileJournal(tmp_path)
    assert caught.value.code is Code.JOURNAL_DAMAGED


def test_every_flipped_byte_of_the_record_is_noticed(tmp_path):
    journal = FileJournal(tmp_path)
    journal.store(b"agreed in round 3")
    journal.close()
    path = tmp_path / "record"
    whole = path.read_bytes()
    for at in range(52 + len(b"agreed in round 3")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StorageError):
            FileJournal(tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path):
    journal = FileJournal(tmp_path)
    with pytest.raises(StorageError) as caught:
        FileJournal(tmp_path)
    assert caught.value.code is Code.FOLDER_IN_USE
    journal.close()
    FileJournal(tmp_path).close()


def test_a_sealed_record_opens_for_its_owner_only(tmp_path):
    entropy = SeededEntropy("vault")
    vault = Vault(entropy.take(32), entropy)
    journal = FileJournal(tmp_path)
    SealedJournal(journal, vault, "site-a").store(b"pair keys")
    journal.close()
    assert b"pair keys" not in (tmp_path / "record").read_bytes()
    journal = FileJournal(tmp_path)
    assert SealedJournal(journal, vault, "site-a").load() == b"pair keys"
    with pytest.raises(StorageError):
        SealedJournal(journal, vault, "site-b").load()
    journal.close()


def test_a_skipping_clock_only_goes_forward():
    clock = SkippingClock()
    before = clock.now()
    clock.skip_to(before + 1000)
    assert clock.now() >= before + 1000
    clock.skip_to(before)
    assert clock.now() >= before + 1000
