"""Federations of real processes; one zygote for each worker of the test run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from federation import Federation, Zygote


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process from which all others are forked."""
    made = Zygote()
    yield made
    made.close()


@pytest.fixture
def federation(tmp_path: Path, zygote: Zygote) -> Iterator[Callable[..., Federation]]:
    """Makes federations in the test's folder; all their processes end with the test."""
    made: list[Federation] = []

    def make(**options: Any) -> Federation:
        options.setdefault("zygote", zygote)
        made.append(Federation(tmp_path / f"federation-{len(made)}", **options))
        return made[-1]

    yield make
    for fed in made:
        fed.close()
