"""Wardround under stock Flower: SuperLink, SuperNodes and `flwr run`, on loopback.

Stock Flower takes seconds for every message (it starts a process for each), so the whole run
takes one to three minutes. It is run where WARDROUND_STOCK_FLOWER=1.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.audit import run_audit_verify
from common.tensors import load_tensors, state_digest
from tests.flower.consortium import CODE, SITES, Consortium
from tests.flower.stock import APP, PROGRAMS, Stock


def test_the_stub_holds_nothing_but_the_two_imports():
    found = {path.name for path in APP.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert found == {"README.md", "pyproject.toml", "__init__.py", "coordinator.py", "hospital.py"}
    for name, package in (("coordinator", "server"), ("hospital", "client")):
        lines = (APP / "wardround_app" / f"{name}.py").read_text().splitlines()
        code = [line for line in lines if line and not line.startswith('"""')]
        assert code == [f"from {package} import app as installed", "app = installed.app"]


@pytest.mark.parametrize("folder", [APP, CODE])
def test_flower_takes_the_app_tables(folder: Path):
    told = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            "import sys, pathlib; from flwr.cli.config_utils import load_and_validate;"
            "print(load_and_validate(pathlib.Path(sys.argv[1]))[0]['tool']['flwr']['app'])",
            str(folder / "pyproject.toml"),
        ],
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    assert "clientapp" in told.stdout


def residents(consortium: Consortium) -> dict[str, int]:
    found = {}
    for site in SITES:
        beat = consortium.home(site) / "heartbeat.json"
        if beat.exists():
            found[site] = int(json.loads(beat.read_text())["pid"])
    return found


@pytest.mark.timeout(400)
@pytest.mark.skipif(
    os.environ.get("WARDROUND_STOCK_FLOWER") != "1" or not (PROGRAMS / "flwr").exists(),
    reason="takes minutes: set WARDROUND_STOCK_FLOWER=1 to run under stock Flower's programs",
)
def test_a_run_under_stock_superlink_and_supernodes_comes_to_its_end(
    consortium: Consortium, tmp_path: Path
):
    run = consortium.prepared()
    with Stock(tmp_path) as stock:
        try:
            stock.superlink()
            for site in SITES:
                stock.supernode(site, {"wardround-site": str(consortium.yaml(site))})
            stock.run({"wardround-run": str(run.root)})
            stock.wait(run.conclusion.exists, "the run does not end", 300)
            alive = residents(consortium)
            # Every message ran in a process of its own; one process a hospital held the secrets.
            for site in SITES:
                assert stock.started(site) >= 8
                assert Path(f"/proc/{alive[site]}").exists()
                started = (consortium.home(site) / "log.jsonl").read_text()
                assert started.count('"resident.started"') == 1
        finally:
            for number in residents(consortium).values():
                os.kill(number, signal.SIGTERM)
    concluded = json.loads(run.conclusion.read_text())
    summary = concluded["summary"]
    assert concluded["good"], summary
    assert (summary["rounds_completed"], summary["rounds_aborted"]) == (1, 0)
    # Statistics, training and the evaluation of the final model, from three hospitals each.
    assert summary["coordinator_saw"] == {"masked_updates": 9, "plain_updates": 0}
    assert run_audit_verify(run.audit).verified
    model = load_tensors(run.model / "weights.safetensors")
    assert state_digest(model) != state_digest(consortium.bundle.initial)
