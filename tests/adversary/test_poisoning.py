"""One poisoning hospital of five in whole simulations: what the acceptance gate stops, and what not.

Masks hide an update from everybody, so nothing here looks at one. Controls: the gate off. What
the gate cannot see is asserted, too, so that the documents stay true.
"""

from __future__ import annotations

import importlib.util
import json
import math
import statistics
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from client.privacy.ledger import Ledger
from common.audit import run_audit_verify
from common.bundle import Bundle
from common.plan import plan
from common.tensors import load_tensors
from common.world import WallClock

ROOT = Path(__file__).parents[2]
ROUNDS, SINCE = 8, 4
LATE = range(SINCE, ROUNDS + 1)
ALWAYS = range(1, ROUNDS + 1)
# A measurement has 220 patients, the test 1,000 others: two standard errors between them.
SAMPLING = 0.06
GROSS = ("scaled", "sign-flipped", "random")


@pytest.fixture(scope="module")
def poisoning():
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("poisoning", ROOT / "benchmarks" / "poisoning.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["poisoning"] = module  # its dataclasses look their annotations up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["poisoning"]


@pytest.fixture(scope="module")
def play(poisoning, tmp_path_factory):
    @cache
    def run(attack, *, gate, turns=LATE, mode="none", attempt=0):
        folder = tmp_path_factory.mktemp("poisoning") / "study"
        chosen = poisoning.ATTACKS[attack]
        return poisoning.play(chosen, folder, gate=gate, rounds=ROUNDS, turns=turns, mode=mode)

    return run


def rounds(got):
    return json.loads((got.folder / "metrics.json").read_text())["rounds"]


def events(got, party):
    lines = (got.folder / "audit" / f"{party}.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line)).get("event") == "model.rejected"]


def card(got):
    return (got.folder / "MODEL_CARD.md").read_text()


# ---------------------------------------------------------------- gross attacks


@pytest.mark.parametrize("attack", GROSS)
def test_control_without_the_gate_one_hospital_of_five_ruins_the_model(play, attack):
    # In one try of twenty or so the last rounds mend a part of it: the middle one of five counts.
    tries = [play(attack, gate=False, attempt=number) for number in range(5)]
    assert statistics.median(got.accuracy for got in tries) < 0.72
    assert all(got.rejected == 0 for got in tries)


@pytest.mark.parametrize("attack", GROSS)
def test_with_the_gate_the_model_stays_within_the_tolerance(play, poisoning, attack):
    honest, got = play("none", gate=True), play(attack, gate=True)
    assert got.rejected >= 2
    measured = [r["accuracy"] for r in rounds(got) if r["kind"] == "train"]
    best = max(a for a, r in zip(measured, rounds(got)[1:-1], strict=True) if not r["rejected"])
    assert (
        got.said["final_metrics"]["released"]["scores"]["accuracy"]
        >= best - poisoning.TOLERANCE - 1e-6
    )
    # The best model and the one that stayed were both measured on the same few patients.
    assert got.accuracy >= honest.accuracy - poisoning.TOLERANCE - math.sqrt(2) * SAMPLING


def test_without_a_poisoner_the_gate_changes_nothing(play):
    off, on = play("none", gate=False), play("none", gate=True)
    assert on.rejected == 0
    assert abs(on.accuracy - off.accuracy) < SAMPLING
    assert "rolled back" not in card(on)


@pytest.mark.parametrize("attack", ["scaled", "sign-flipped"])
def test_under_differential_privacy_the_gate_holds_too(play, poisoning, attack):
    """Noise on the updates and on the measurements; the tolerance is five times that, or more."""
    off, on = play(attack, gate=False, mode="local"), play(attack, gate=True, mode="local")
    assert off.accuracy < 0.75
    assert on.rejected >= 2
    assert on.accuracy >= 0.75
    bundle = Bundle.load(on.folder / "state" / "bundle")
    counts = dict.fromkeys(poisoning.HOSPITALS, poisoning.PATIENTS)
    noise = plan(bundle.study, bundle.layout.size, patients=counts).evaluation.score_noise
    assert 0 < 5 * noise <= poisoning.TOLERANCE


# ---------------------------------------------------------------- what is told


def test_a_rollback_is_in_every_audit_log_and_they_verify(play, poisoning):
    got = play("sign-flipped", gate=True)
    logs = [events(got, party) for party in ("coordinator", *poisoning.HOSPITALS)]
    found = [[entry["fields"] for entry in log] for log in logs]
    assert len(found[0]) == got.rejected
    assert all(log == found[0] for log in found)
    report = run_audit_verify(got.folder / "audit")
    assert report.verified
    assert report.complete


def test_the_run_says_how_many_models_were_rolled_back_and_what_to_do(play):
    got = play("scaled", gate=True)
    row = got.said["models_rejected_in_a_row"]
    assert row == got.said["models_rejected"] == got.rejected
    lines = json.loads((got.folder / "state" / "conclusion.json").read_text())["lines"]
    assert f"{got.rejected} of their models rolled back by the acceptance gate" in lines[0]
    assert f"the last {row} models in a row were rolled back" in lines[1]
    assert any("leave one out" in line for line in lines)
    assert f"the last accepted model: {row} newer rolled back" in lines[-1]
    assert f"{got.rejected} of their models rolled back" in card(got)
    # One bad model may lie within the tolerance; what comes on top of it does not.
    assert next(r["turn"] for r in rounds(got) if r["rejected"]) in {SINCE, SINCE + 1}


def test_a_poisoner_from_the_start_blocks_progress_and_the_run_says_so(play):
    # By chance of the draws, now and then the inverted model beats the untrained one and stands.
    tries = (play("scaled", gate=True, turns=ALWAYS, attempt=number) for number in range(4))
    got = next(one for one in tries if one.rejected == one.judged)
    assert got.judged == ROUNDS // 2
    bundle = Bundle.load(got.folder / "state" / "bundle")
    model = load_tensors(got.folder / "model" / "model.safetensors")
    assert all((model[name] == value).all() for name, value in bundle.initial.items())
    lines = json.loads((got.folder / "state" / "conclusion.json").read_text())["lines"]
    assert "the final model is the INITIAL model" in lines[-1]


# ---------------------------------------------------------------- what it does not see


def test_one_hospital_with_wrong_labels_passes_because_four_right_ones_outweigh_it(play):
    off, on = play("label-flipped", gate=False), play("label-flipped", gate=True)
    assert on.rejected == 0
    assert min(off.accuracy, on.accuracy) > 0.8


def test_a_backdoor_passes_the_gate(play):
    """Held-out patients do not carry its mark: a documented limit."""
    clean = play("none", gate=True)
    for attack in ("backdoor", "boosted door"):
        got = play(attack, gate=True)
        assert got.rejected == 0
        assert got.accuracy > clean.accuracy - 0.1
    assert clean.door < 0.5
    assert play("boosted door", gate=True).door > 0.75


def test_a_hospital_that_lies_about_its_measurement_passes_the_gate(play):
    """The measurements are masked sums of what hospitals say: a documented limit."""
    got = play("liar", gate=True)
    assert got.rejected == 0
    assert got.accuracy < 0.75
    # Control: the same updates with an honest measurement are rolled back.
    assert play("sign-flipped", gate=True).rejected >= 2


# ---------------------------------------------------------------- privacy


def test_every_measurement_is_charged_the_initial_models_too(play, poisoning):
    got = play("scaled", gate=True, mode="local")
    for site in poisoning.HOSPITALS:
        path = got.folder / "state" / "sites" / site / "ledger.sqlite"
        ledger = Ledger.open_existing(path, clock=WallClock())
        charged = [row.body for row in ledger.history() if row.kind == "charge"]
        spent = ledger.spent()
        ledger.close()
        held = sorted(body["round"] for body in charged if body["part"] == "held_out")
        # Round 1 counts statistics; turns 1 to T and the final evaluation measure, rolled back or not.
        assert held == list(range(2, ROUNDS + 3))
        trained = [body["round"] for body in charged if body["work"] == "train"]
        assert sorted(trained) == list(range(2, ROUNDS + 2))
        assert spent.held_out <= 20
        assert spent.train <= 20
