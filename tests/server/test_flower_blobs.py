"""Parts of messages on disk: shared, bounded, kept after a cut, never trusted unread."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Code, ProtocolError, StorageError
from server.blobs import KEEP_SECONDS, MAX_PARTS, BlobStore


def name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "objects")


def tree(*leaves: bytes, root: bytes = b"root") -> list[tuple[str, tuple[str, ...]]]:
    names = tuple(name(leaf) for leaf in leaves)
    return [*((n, ()) for n in names), (name(root), names)]


def fill(store: BlobStore, *contents: bytes) -> None:
    for content in contents:
        store.put(name(content), content)


def files(store: BlobStore) -> set[str]:
    return {path.name for path in store._folder.iterdir()}


def test_a_tree_is_complete_when_its_last_part_is_here(store: BlobStore):
    missing = store.expect(tree(b"a", b"b"))
    assert missing == [name(b"a"), name(b"b"), name(b"root")]
    fill(store, b"a", b"root")
    assert not store.complete(name(b"root"))
    assert store.get(name(b"b")) == b""
    fill(store, b"b")
    assert store.complete(name(b"root"))
    assert store.get(name(b"b")) == b"b"
    assert store.size(name(b"root")) == 6


def test_what_two_trees_name_lies_there_once_until_both_are_dropped(store: BlobStore):
    store.expect(tree(b"shared", root=b"one"))
    fill(store, b"shared", b"one")
    assert store.expect(tree(b"shared", root=b"two")) == [name(b"two")]
    fill(store, b"two")
    store.drop(name(b"one"))
    assert store.get(name(b"shared")) == b"shared"
    store.drop(name(b"shared"))  # of a tree that is still here: nothing
    assert store.get(name(b"shared")) == b"shared"
    store.drop(name(b"two"))
    assert (files(store), store.bytes, len(store)) == (set(), 0, 0)


def test_parts_of_an_upload_cut_off_are_not_asked_for_again(store: BlobStore):
    store.expect(tree(b"a", b"b"))
    fill(store, b"a")
    store.drop(name(b"root"))
    assert name(b"a") in files(store)
    assert store.expect(tree(b"a", b"b", root=b"other")) == [name(b"b"), name(b"other")]
    fill(store, b"b", b"other")
    store.drop(name(b"other"))
    assert files(store) == set()


def test_parts_of_an_upload_cut_off_survive_a_restart(tmp_path: Path):
    before = BlobStore(tmp_path)
    before.expect(tree(b"a", b"b"))
    fill(before, b"a")
    (tmp_path / f"{name(b'b')}.123").write_bytes(b"half")
    after = BlobStore(tmp_path)
    assert files(after) == {name(b"a")}
    assert after.expect(tree(b"a", b"b")) == [name(b"b"), name(b"root")]


def test_a_kept_part_that_was_damaged_is_asked_for_again(tmp_path: Path):
    before = BlobStore(tmp_path)
    before.expect(tree(b"a"))
    fill(before, b"a")
    (tmp_path / name(b"a")).write_bytes(b"A")
    after = BlobStore(tmp_path)
    assert name(b"a") in after.expect(tree(b"a"))


def test_kept_parts_go_after_a_day(tmp_path: Path):
    time = Time()
    store = BlobStore(tmp_path, now=time)
    store.expect(tree(b"a", b"b"))
    fill(store, b"a")
    store.drop(name(b"root"))
    time.now = KEEP_SECONDS + 1
    assert store.expect(tree(b"a", root=b"other")) == [name(b"a"), name(b"other")]
    assert files(store) == set()


def test_kept_parts_make_room_and_a_full_store_says_so(tmp_path: Path):
    store = BlobStore(tmp_path, most_bytes=10)
    store.expect(tree(b"12345678", b"never"))
    fill(store, b"12345678")
    store.drop(name(b"root"))
    assert store.bytes == 8
    store.expect(tree(b"abcdefgh", b"ijklmnop"))
    fill(store, b"abcdefgh")
    assert store.bytes == 8
    with pytest.raises(StorageError) as full:
        fill(store, b"ijklmnop")
    assert full.value.code is Code.JOURNAL_WRITE
    assert files(store) == {name(b"abcdefgh")}


def test_a_disk_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch):
    store = BlobStore(tmp_path)
    store.expect(tree(b"a"))

    def full(*_told: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError):
        fill(store, b"a")
    assert files(store) == set()
    monkeypatch.undo()
    fill(store, b"a")
    assert store.get(name(b"a")) == b"a"


@pytest.mark.parametrize(
    "nodes",
    [
        [("../../etc/passwd", ())],
        [("A" * 64, ())],
        [("0" * 63, ())],
        [("+" + "0" * 63, ())],
        [("0" * 64, ("1" * 64,))],
        [("1" * 64, ()), ("0" * 64, ("1" * 64, "1" * 64))],
        [("0" * 64, ("0" * 64,))],
        [("1" * 64, ()), ("0" * 64, ()), ("0" * 64, ("1" * 64,))],
    ],
)
def test_a_tree_that_is_none_is_refused_whole(store: BlobStore, nodes):
    with pytest.raises(ProtocolError) as refused:
        store.expect(nodes)
    assert refused.value.code is Code.MALFORMED
    assert len(store) == 0


def test_a_tree_that_contradicts_one_before_is_refused(store: BlobStore):
    store.expect(tree(b"a", b"b"))
    with pytest.raises(ProtocolError):
        store.expect(tree(b"a"))
    assert store.children(name(b"root")) == (name(b"a"), name(b"b"))


def test_a_tree_with_too_many_parts_is_refused(store: BlobStore):
    with pytest.raises(ProtocolError) as refused:
        store.expect([("0" * 64, ())] * (MAX_PARTS + 1))
    assert refused.value.code is Code.OVERSIZED


def test_what_was_not_announced_is_not_kept(store: BlobStore):
    with pytest.raises(KeyError):
        fill(store, b"a")
    assert store.get(name(b"a")) is None
    assert store.children(name(b"a")) is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["expect", "fill", "drop"]),
            st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True),
        ),
        max_size=30,
    )
)
def test_files_and_counts_agree_whatever_happens(tmp_path_factory: pytest.TempPathFactory, steps):
    store = BlobStore(tmp_path_factory.mktemp("blobs"))
    for action, numbers in steps:
        leaves = [b"%d" % i * 10 for i in numbers]
        root = b"root" + bytes(numbers)
        if action == "expect":
            store.expect(tree(*leaves, root=root))
        elif action == "fill":
            for content in (*leaves, root):
                if name(content) in store:
                    store.put(name(content), content)
        else:
            store.drop(name(root))
    on_disk = files(store)
    assert store.bytes == sum((store._folder / n).stat().st_size for n in on_disk)
    here = {n for n, entry in store._entries.items() if entry.size >= 0}
    assert on_disk == here | set(store._kept)
    for known in store._entries:
        want = sum(known in entry.children for entry in store._entries.values())
        assert store._entries[known].parents == want
    store.clear()
    assert (files(store), store.bytes) == (set(), 0)
    assert store._folder.is_dir()
