"""The consortium of the tabular example, enrolled once for all tests of a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own, about click
    import flwr.app  # noqa: F401

from tests.flower.consortium import Consortium, small_bundle


@pytest.fixture(scope="session")
def small() -> Any:
    return small_bundle()


@pytest.fixture
def consortium(tmp_path: Path, small: Any) -> Consortium:
    return Consortium(tmp_path, small)
