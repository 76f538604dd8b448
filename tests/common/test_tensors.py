"""Tensors that take no memory while nobody looks at them."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from common import tensors
from common.errors import Code, StorageError
from common.tensors import FiledTensors, Layout, LazyTensors, filed, state_digest

MIB = 1 << 20
MANY = {f"t{at}": np.full(MIB // 4, at, np.float32) for at in range(16)}
ODD = {
    "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "none": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
}


def resident(folder: Path) -> int:
    """Bytes of nameless files of the folder that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = str(folder) in line and line.endswith("(deleted)")
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def test_filed_tensors_are_the_same_tensors(tmp_path):
    found = filed(ODD, tmp_path)
    assert list(found) == list(ODD)
    assert len(found) == len(ODD)
    assert state_digest(found) == state_digest(ODD)
    assert all(found[name].shape == value.shape for name, value in ODD.items())
    assert state_digest(filed({}, tmp_path)) == state_digest({})


def test_filed_tensors_are_not_filed_again(tmp_path):
    found = filed(ODD, tmp_path)
    assert filed(found, tmp_path) is found


def test_nobody_can_write_to_a_filed_tensor_or_find_its_file(tmp_path):
    found = filed(ODD, tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        found["matrix"][0, 0] = 1
    assert list(tmp_path.iterdir()) == []


def test_going_through_filed_tensors_takes_the_memory_of_a_few(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_RESIDENT_BYTES", 2 * MIB)
    found = filed(MANY, tmp_path)
    most = 0
    for value in found.values():
        assert value.any() or not value[0]
        most = max(most, resident(tmp_path))
    assert MIB <= most <= 5 * MIB
    monkeypatch.setattr(tensors, "_RESIDENT_BYTES", 64 * MIB)
    assert sum(value.sum() for value in found.values()) == sum(v.sum() for v in MANY.values())
    assert resident(tmp_path) > 12 * MIB


def test_a_filed_tensor_stays_good_while_others_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_RESIDENT_BYTES", MIB)
    found = filed(MANY, tmp_path)
    held = {name: found[name] for name in found}
    assert state_digest(held) == state_digest(MANY)
    del found
    gc.collect()
    assert state_digest(held) == state_digest(MANY)
    assert resident(tmp_path)
    held.clear()
    gc.collect()
    assert not resident(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageError) as caught:
        FiledTensors(ODD, tmp_path / "absent")
    assert caught.value.code is Code.JOURNAL_WRITE


def test_lazy_tensors_are_made_when_they_are_asked_for():
    asked: list[str] = []

    def make(name: str) -> np.ndarray:
        asked.append(name)
        return np.ones(2, np.float32)

    found = LazyTensors(["b", "a"], make)
    assert list(found) == ["b", "a"]
    assert len(found) == 2
    assert asked == []
    assert found["a"].tolist() == [1, 1]
    assert asked == ["a"]
    with pytest.raises(KeyError):
        found["c"]
    assert asked == ["a"]


def test_a_layout_knows_where_each_tensor_lies():
    layout = Layout.of({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.float32)})
    assert layout.places == (slice(0, 6), slice(6, 10))
    assert Layout(()).places == ()
