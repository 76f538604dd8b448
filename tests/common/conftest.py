"""Reproducible bytes, and Wycheproof's vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.world import SeededEntropy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def seeded() -> Callable[[int], SeededEntropy]:
    """An entropy for tests, by number."""
    return lambda seed: SeededEntropy(str(seed))


@pytest.fixture(scope="session")
def wycheproof() -> Callable[[str], list[tuple[dict[str, Any], dict[str, Any]]]]:
    """A function from a file's stem to its (group, test) pairs."""
    shared = Path(os.environ.get("WARDROUND_DATA", ROOT.parent / "shared" / "data"))

    def load(stem: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        path = shared / "wycheproof" / f"{stem}.json"
        if not path.is_file():
            pytest.skip(f"Wycheproof vectors are not at {path}")
        document = json.loads(path.read_text())
        pairs = [(group, test) for group in document["testGroups"] for test in group["tests"]]
        assert len(pairs) == document["numberOfTests"]
        return pairs

    return load
