"""`simulate --engine ray`: hospitals as Ray actors, messages through Flower's simulation engine.

Ray is an extra that few installations have; without it, only its absence is tested.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flower.consortium import CODE, CONFIGS

HAS_RAY = importlib.util.find_spec("ray") is not None
needs_ray = pytest.mark.skipif(not HAS_RAY, reason="the extra `ray` is not installed")


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Path]:
    """The tabular example, shorter, with these faults planned."""

    def make(*faults: dict[str, Any]) -> Path:
        plain = yaml.safe_load((CONFIGS / "tabular.yaml").read_text())
        plain["training"] |= {"rounds": 2}
        plain["evaluation"] = {"every": 2}
        simulation = plain["simulation"]
        simulation["data"]["files"] = [str(CONFIGS / "data" / "synthetic-labs.csv")]
        simulation["faults"] = list(faults)
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(plain))
        return path

    return make


def wardround(*words: object) -> tuple[int, dict[str, Any], str]:
    """A process of its own: Ray and its workers end with it."""
    done = subprocess.run(
        [sys.executable, "-m", "common.cli", *(str(word) for word in words), "--json"],
        env={**os.environ, "PYTHONPATH": str(CODE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.skipif(HAS_RAY, reason="the extra `ray` is installed")
def test_without_ray_the_extra_is_named_before_anything_is_made(study: Any, tmp_path: Path):
    status, told, _ = wardround("simulate", study(), "--engine", "ray", "--out", tmp_path / "out")
    assert status != 0
    assert told["error"]["code"] == "WR-7002"
    assert "wardround[ray]" in told["error"]["remedy"]
    assert not (tmp_path / "out").exists()


@needs_ray
def test_a_run_on_ray_loses_who_drops_and_comes_to_its_end(study: Any, tmp_path: Path):
    out = tmp_path / "out"
    path = study({"round": 2, "site": "east", "fault": "drop"})
    status, told, error = wardround(
        *("simulate", path, "--engine", "ray", "--out", out, "--device", "cpu", "--no-alone")
    )
    assert status == 0, error
    assert (told["rounds_completed"], told["rounds_aborted"]) == (2, 0)
    assert told["audit_verified"]
    # Four rounds of four hospitals, less the one that dropped out of one.
    assert told["coordinator_saw"] == {"masked_updates": 15, "plain_updates": 0}
    assert all(0 < spent["spent"] <= 10 for spent in told["epsilon"].values())
    assert (out / "state" / "on-ray").exists()


@needs_ray
def test_a_crash_is_not_simulated_on_ray_and_said_so(study: Any, tmp_path: Path):
    path = study({"round": 2, "site": "east", "fault": "crash"})
    status, told, _ = wardround("simulate", path, "--engine", "ray", "--out", tmp_path / "out")
    assert status == 2
    assert told["error"]["code"] == "WR-8303"
