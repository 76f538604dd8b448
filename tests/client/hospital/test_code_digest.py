"""The code digest: what is approved is what may run, wherever it lies."""

from __future__ import annotations

import pytest

from common.errors import Code, RefusedError
from common.integrity import code_digest


@pytest.fixture
def tree(tmp_path):
    def make(name="a"):
        root = tmp_path / name
        for package in ("common", "client"):
            (root / package / "inner").mkdir(parents=True)
            (root / package / "__init__.py").write_text("")
            (root / package / "inner" / "work.py").write_text("x = 1\n")
        return root

    return make


def digest_of(root, packages=("common", "client")):
    return code_digest(packages, search=[str(root)])


def test_the_same_code_in_another_place_has_the_same_digest(tree):
    assert digest_of(tree("a")) == digest_of(tree("b"))


def _edit(root):
    (root / "client" / "inner" / "work.py").write_text("x = 2\n")


def _add(root):
    (root / "client" / "extra.py").write_text("")


def _remove(root):
    (root / "client" / "inner" / "work.py").unlink()


def _rename(root):
    (root / "client" / "inner" / "work.py").rename(root / "client" / "inner" / "werk.py")


def _move(root):
    (root / "client" / "inner" / "work.py").rename(root / "common" / "moved.py")


def _compiled(root):
    (root / "client" / "fast.so").write_bytes(b"\x7fELF")


@pytest.mark.parametrize("change", [_edit, _add, _remove, _rename, _move, _compiled])
def test_any_change_of_what_may_run_changes_the_digest(tree, change):
    root = tree()
    before = digest_of(root)
    change(root)
    assert digest_of(root) != before


def test_what_does_not_run_is_not_counted(tree):
    root = tree()
    before = digest_of(root)
    (root / "client" / "__pycache__").mkdir()
    (root / "client" / "__pycache__" / "work.cpython-311.pyc").write_bytes(b"compiled")
    (root / "client" / "notes.txt").write_text("no code")
    assert digest_of(root) == before


def test_a_package_that_is_not_there_has_no_digest(tree):
    with pytest.raises(RefusedError) as refused:
        digest_of(tree(), ("common", "nobody"))
    assert refused.value.code is Code.CODE_ALTERED


def test_the_coordinators_package_is_not_part_of_what_a_hospital_approves(tree):
    root = tree()
    before = digest_of(root)
    (root / "server").mkdir()
    (root / "server" / "__init__.py").write_text("")
    assert digest_of(root) == before
