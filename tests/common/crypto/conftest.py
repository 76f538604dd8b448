from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


class SeededEntropy:
    """Reproducible bytes for tests; never in a package."""

    def __init__(self, seed: int) -> None:
        self._seed = seed.to_bytes(8, "big")
        self._count = 0

    def take(self, count: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(self._seed + self._count.to_bytes(8, "big")).digest(count)


@pytest.fixture(scope="session")
def seeded():
    return SeededEntropy


@pytest.fixture(scope="session")
def wycheproof():
    """A function from a file's stem to its (group, test) pairs."""
    shared = Path(os.environ.get("WARDROUND_DATA", ROOT.parent / "shared" / "data"))

    def load(stem: str) -> list[tuple[dict, dict]]:
        path = shared / "wycheproof" / f"{stem}.json"
        if not path.is_file():
            pytest.skip(f"Wycheproof vectors are not at {path}")
        document = json.loads(path.read_text())
        pairs = [(group, test) for group in document["testGroups"] for test in group["tests"]]
        assert len(pairs) == document["numberOfTests"]
        return pairs

    return load
