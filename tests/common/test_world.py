"""The journal on a real disk: torn writes, wiped slots, damage, disk full."""

import os
import shutil

import pytest

from common.crypto.seal import Vault
from common.errors import Code, StorageError
from common.world import FileJournal, JournalGroup, SealedJournal, SeededEntropy, SkippingClock


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


def grouped(folder, *names):
    group = JournalGroup(folder, names)
    return group, [group.member(name, folder / name) for name in names]


def recalled(folder, *names):
    group, members = grouped(folder, *names)
    found = [member.load() for member in members]
    group.close()
    return found


def watched(monkeypatch):
    """Writes and syncs, in order: `W` a record, `0` a wipe, `S` a sync."""
    order = []
    real_write, real_sync = os.pwrite, os.fdatasync
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda h, d, at: (
            order.append("W" if bytes(d[:4]) == b"WRJ1" else "0") or real_write(h, d, at)
        ),
    )
    monkeypatch.setattr(os, "fdatasync", lambda h: order.append("S") or real_sync(h))
    return order


def test_one_sync_makes_the_records_of_a_whole_group_durable(tmp_path, monkeypatch):
    group, members = grouped(tmp_path, "a", "b", "c")
    members[0].store(b"first")
    order = watched(monkeypatch)
    for member in members:
        member.store(b"next")
    assert order == ["W", "W", "W"]
    group.settle()
    assert order == ["W", "W", "W", "S", "0", "0", "0"], "wiped after the sync, not before"
    group.settle()
    assert order.count("S") == 1, "nothing new, no sync"
    group.close()
    assert b"first" not in (tmp_path / "records").read_bytes()


def test_a_stored_record_survives_the_process_before_the_group_settles(tmp_path):
    group, members = grouped(tmp_path / "live", "a", "b")
    members[0].store(b"settled")
    members[1].store(b"settled")
    group.settle()
    members[1].store(b"only written")
    shutil.copytree(tmp_path / "live", tmp_path / "killed")
    assert recalled(tmp_path / "killed", "a", "b") == [b"settled", b"only written"]
    group.close()


def test_a_second_record_before_the_sync_never_overwrites_the_only_durable_one(
    tmp_path, monkeypatch
):
    group, members = grouped(tmp_path, "a", "b")
    members[0].store(b"durable")
    order = watched(monkeypatch)
    members[0].store(b"written")
    members[0].store(b"written over")
    assert order == ["W", "S", "0", "W"]
    group.close()
    assert recalled(tmp_path, "a", "b") == [b"written over", None]


def test_what_a_killed_process_left_is_synced_before_anything_is_overwritten(tmp_path, monkeypatch):
    group, members = grouped(tmp_path, "a")
    members[0].store(b"one")
    members[0].store(b"two")
    group.close()
    order = watched(monkeypatch)
    group, members = grouped(tmp_path, "a")
    members[0].store(b"three")
    assert order[:2] == ["S", "W"]
    group.close()


def test_a_record_that_outgrows_the_group_keeps_the_others(tmp_path):
    group, members = grouped(tmp_path, "a", "b", "c")
    members[0].store(b"small")
    members[1].store(b"x" * 50_000)
    assert [member.load() for member in members] == [b"small", b"x" * 50_000, None]
    members[0].store(b"again")
    group.close()
    assert recalled(tmp_path, "a", "b", "c") == [b"again", b"x" * 50_000, None]


def test_a_record_moved_to_another_member_is_damage(tmp_path):
    group, members = grouped(tmp_path, "a", "b")
    members[0].store(b"record of a")
    members[1].store(b"record of b")
    group.close()
    path = tmp_path / "records"
    whole = path.read_bytes()
    half = len(whole) // 2
    assert recalled(tmp_path, "a", "b") == [b"record of a", b"record of b"]
    path.write_bytes(whole[half:] + whole[:half])
    with pytest.raises(StorageError) as caught:
        JournalGroup(tmp_path, ["a", "b"])
    assert caught.value.code is Code.JOURNAL_DAMAGED


def test_a_blob_goes_only_when_the_record_that_gave_it_up_is_durable(tmp_path):
    group, (member,) = grouped(tmp_path, "a")
    path = tmp_path / "a" / "blob-upload"
    member.put_blob("upload", [b"sent"], durable=False)
    member.store(b"a new round")
    member.drop_blob("upload")
    assert path.exists()
    assert member.get_blob("upload") is None
    group.settle()
    assert not path.exists()
    member.put_blob("upload", [b"old"], durable=False)
    member.drop_blob("upload")
    member.put_blob("upload", [b"new"], durable=False)
    group.settle()
    assert member.get_blob("upload") == b"new"
    group.close()


def test_after_a_failed_sync_a_group_is_not_used_again(tmp_path, monkeypatch):
    group, (member,) = grouped(tmp_path, "a")
    member.store(b"one")
    member.store(b"two")

    def failing(handle):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", failing)
    with pytest.raises(StorageError):
        group.settle()
    monkeypatch.undo()
    for action in (group.settle, lambda: member.store(b"three")):
        with pytest.raises(StorageError):
            action()
    group.close()
    assert recalled(tmp_path, "a") == [b"two"]
