"""Folders written out of texts, and the shared data sets."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[4]


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[[Mapping[str, str | bytes | None]], Path]:
    """Writes files (packed where the name ends in .gz); None leaves a file out."""

    def write(files: Mapping[str, str | bytes | None]) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        for name, content in files.items():
            if content is None:
                continue
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif name.lower().endswith(".gz"):
                path.write_bytes(gzip.compress(content.encode(), mtime=0))
            else:
                path.write_bytes(content.encode())
        return folder

    return write


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """The folder of a shared data set; skips where it is absent."""

    def find(name: str) -> Path:
        data = Path(os.environ.get("WARDROUND_DATA", _ROOT.parent / "shared" / "data"))
        if not (data / name).is_dir():
            pytest.skip(f"{name} is not there (WARDROUND_DATA names another folder)")
        return data / name

    return find
