from __future__ import annotations

import hashlib

import pytest


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
