"""A whole joint study: noise in shares inside the secure sum, one plan in every ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from schedule import kind_of

import client.training
from client.privacy.ledger import Ledger
from common.accountant import DpEvent, epsilon
from common.audit import verify_folder
from common.bundle import Bundle
from common.cli import main
from common.config import load
from common.errors import Code
from common.gate import Gate
from common.protocol.terms import Terms
from common.study import Study
from common.tensors import load_tensors
from common.world import WallClock
from server.network import InProcessNetwork
from server.simulate import SimulatedRun

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
HOSPITALS = ("east", "north", "south", "west")
ROUNDS, SPARE = 6, 2
QUIET = {"rounds": ROUNDS, "spare_rounds": SPARE}


def study_file(folder, *, faults=(), training=None, evaluation=None, **sections):
    """The example of joint privacy, shortened, its data where they are."""
    example = load(CONFIGS / "joint.yaml", Study)
    study = example.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    study["training"] |= QUIET | (training or {})
    study["evaluation"] = evaluation or {"every": 3}
    study["simulation"]["data"]["files"] = [str(CONFIGS / "data" / "synthetic-labs.csv")]
    study["simulation"]["faults"] = list(faults)
    path = folder / "study.yaml"
    path.write_text(json.dumps(study | sections))
    return path


def drop(number, *sites):
    return [{"round": number, "site": site, "fault": "drop"} for site in sites]


def ledger_of(out, site):
    """(the rows, what is spent, what is spent by rounds that ran)."""
    path = out / "state" / "sites" / site / "ledger.sqlite"
    ledger = Ledger.open_existing(path, clock=WallClock())
    try:
        return ledger.history(), ledger.spent(), ledger.run_so_far()
    finally:
        ledger.close()


def drawn(rows):
    """What rounds took out of the plan: steps by kind of work, and by round."""
    steps = Counter()
    for row in rows:
        if row.kind == "draw":
            for use in row.body["uses"]:
                steps[use["work"]] += sum(count for _, _, count in use["events"])
    return steps, [(row.body["round"], row.body["attempt"]) for row in rows if row.kind == "draw"]


def training_epsilon(rows, delta):
    """Of what rounds drew, composed anew and not by the ledger."""
    events = Counter()
    for row in rows:
        for use in row.body["uses"] if row.kind == "draw" else ():
            if use["part"] == "train":
                for sigma, rate, steps in use["events"]:
                    events[(sigma, rate)] += steps
    return epsilon([DpEvent(s, q, count) for (s, q), count in sorted(events.items())], delta)


def plans(rows):
    return {row.body["plan"] for row in rows if row.kind == "charge" and "plan" in row.body}


@dataclass
class Watched:
    """What passed through the coordinator's hands, and the folder that was left."""

    out: Path
    chains: list = field(default_factory=list)
    results: list = field(default_factory=list)
    sums: list = field(default_factory=list)
    status: int = -1


def watched(folder, study, *, lost=(0, ())):
    """Runs a study and keeps every released sum and model; uploads may be lost: (round, sites)."""
    torch.set_num_threads(1)
    seen = Watched(folder / "out")
    completed, apply, post = SimulatedRun.completed, Terms.apply, InProcessNetwork.post

    def posted(self, site, payload):
        number = self.driver.machine.record.round
        if (number, kind_of(payload)) != (lost[0], "Upload") or site not in lost[1]:
            post(self, site, payload)

    def keep(self, result, chain):
        seen.results.append(result)
        seen.chains.append(chain)
        completed(self, result, chain)

    def applied(self, state, exponents, total, survivors):
        words = total[0 : total.size].astype(np.int64)
        if not seen.sums or not np.array_equal(seen.sums[-1][0], words):  # every party sums
            seen.sums.append((words.copy(), survivors, exponents))
        return apply(self, state, exponents, total, survivors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedRun, "completed", keep)
        patch.setattr(Terms, "apply", applied)
        patch.setattr(InProcessNetwork, "post", posted)
        seen.status = main(["simulate", str(study), "--out", str(seen.out), "--no-alone"])
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six rounds: one hospital missing in round 3, two uploads in round 5, one too many."""
    folder = tmp_path_factory.mktemp("joint")
    study = study_file(folder, faults=drop(3, "east"))
    seen = watched(folder, study, lost=(5, ("east", "west")))
    assert seen.status == 0
    return seen


# ------------------------------------------------------------------ rounds


def test_a_round_with_a_quorum_completes_and_one_with_less_burns_and_is_tried_again(run):
    found = json.loads((run.out / "metrics.json").read_text())
    assert (found["rounds_completed"], found["rounds_aborted"]) == (ROUNDS, 1)
    kinds = [r["kind"] for r in found["rounds"] if r["survivors"]]
    assert kinds == ["statistics", *["train"] * ROUNDS, "evaluate"]
    by_round = {r["round"]: r for r in found["rounds"]}
    assert by_round[3]["dropouts"] == ["east"]
    assert by_round[3]["survivors"] == 3
    assert by_round[5]["survivors"] == 0
    assert by_round[6]["turn"] == by_round[5]["turn"]


def test_nothing_that_the_coordinator_saw_was_readable(run):
    told = json.loads((run.out / "state" / "conclusion.json").read_text())["summary"]
    assert told["coordinator_saw"]["plain_updates"] == 0
    assert told["coordinator_saw"]["masked_updates"] >= 3 * (ROUNDS + 2)
    assert told["audit_verified"] is True
    report = verify_folder(run.out)
    assert report.complete, [str(problem) for problem in report.problems]


def test_the_grid_is_one_for_all_rounds(run):
    bundle = Bundle.load(run.out / "state" / "bundle")
    wanted = bundle.joint_noise().exponent
    assert {e for chain in run.chains for e in chain.exponents} == {wanted}


def test_a_run_without_a_quorum_waits_with_its_plan_charged(tmp_path, wardround):
    study = study_file(tmp_path, faults=drop(4, "east", "west"))
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "out", "--no-alone")
    assert status == 6
    assert "waited for east, west" in told
    assert "wardround resume" in problems
    bundle = Bundle.load(tmp_path / "out" / "state" / "bundle")
    for site in HOSPITALS:
        rows, spent, so_far = ledger_of(tmp_path / "out", site)
        assert Counter(row.kind for row in rows)["settle"] == 0
        assert spent.train == pytest.approx(bundle.plan().training.epsilon, abs=1e-6)
        assert so_far.train < spent.train


# ------------------------------------------------------------------ the ledger


def test_every_ledger_holds_one_plan_drawn_by_rounds_and_settled_once(run):
    for site in HOSPITALS:
        rows, spent, so_far = ledger_of(run.out, site)
        assert len(plans(rows)) == 1
        assert all("plan" in row.body for row in rows if row.kind == "charge")
        kinds = Counter(row.kind for row in rows)
        assert kinds["settle"] == 1
        assert rows[-1].kind == "settle"
        _, rounds = drawn(rows)
        assert len(rounds) == len(set(rounds)) == kinds["draw"]
        assert spent == so_far, "settled: nothing is held back"


def test_the_plan_is_charged_before_the_first_round_and_for_every_spare_one(run):
    bundle = Bundle.load(run.out / "state" / "bundle")
    planned = bundle.plan()
    for site in HOSPITALS:
        rows, *_ = ledger_of(run.out, site)
        charged = [row for row in rows if row.kind == "charge"]
        first = next(row for row in rows if row.kind == "draw")
        assert max(row.sequence for row in charged) < first.sequence
        steps = {row.body["work"]: row.body["events"][0][2] for row in charged}
        assert steps == {"statistics": 1 + SPARE, "train": ROUNDS + SPARE, "evaluate": 2 + SPARE}
        after = charged[-1].body["after"]
        assert after[1] == pytest.approx(planned.training.epsilon, abs=1e-6)
        assert after[0] <= bundle.study.privacy.epsilon


def test_a_burned_round_stays_charged(run):
    """Round 5 released nothing readable; who drew for it has a step and a measurement more."""
    rows, *_ = ledger_of(run.out, "north")
    steps, rounds = drawn(rows)
    assert steps == {"statistics": 1, "train": ROUNDS + 1, "evaluate": 3}
    assert 5 in {number for number, _ in rounds}
    settled = rows[-1].body["drawn"]
    told = {use["work"]: sum(count for *_, count in use["events"]) for use in settled}
    assert told == steps


def test_what_is_reported_is_what_was_drawn_and_never_more_than_the_plan(run):
    bundle = Bundle.load(run.out / "state" / "bundle")
    statement = json.loads((run.out / "privacy.json").read_text())
    most = 0.0
    for site in HOSPITALS:
        rows, spent, _ = ledger_of(run.out, site)
        exact = training_epsilon(rows, bundle.study.privacy.delta)
        assert spent.train == pytest.approx(exact, abs=1e-9)
        assert spent.train < bundle.plan().training.epsilon
        assert spent.epsilon <= spent.cap == bundle.study.privacy.epsilon
        assert statement["sites"][site]["epsilon"] == spent.epsilon
        most = max(most, exact)
    assert statement["epsilon_spent"] == pytest.approx(most, abs=1e-9)


def test_the_statement_names_three_audiences_whose_epsilons_rise(run):
    statement = json.loads((run.out / "privacy.json").read_text())
    assert statement["mode"] == "joint"
    seen = statement["audiences"]
    assert [audience["name"] for audience in seen] == ["coordinator", "colluders", "all_others"]
    assert seen[0]["epsilon"] < seen[1]["epsilon"] < seen[2]["epsilon"]
    assert seen[1]["epsilon"] == pytest.approx(statement["epsilon_spent"], abs=1e-9)
    sigma = Bundle.load(run.out / "state" / "bundle").noise_multiplier
    # Q = 3, c = 1, h = 2.
    factors = [audience["noise_multiplier"] / sigma for audience in seen]
    assert factors == pytest.approx([(3 / 2) ** 0.5, 1.0, (1 / 2) ** 0.5])


# ------------------------------------------------------------------ the model


def recomputed(run):
    """(the last model, the average of the models), from the released sums alone, in float64."""
    initial = load_tensors(run.out / "state" / "bundle" / "initial.safetensors")
    names = sorted(initial)
    weights = np.concatenate([initial[name].reshape(-1) for name in names]).astype(np.float64)
    velocity, average = np.zeros_like(weights), weights.copy()
    for turn, (total, survivors, exponents) in enumerate(run.sums, start=1):
        mean = total * 2.0 ** -exponents[0] / len(survivors)
        velocity = 0.8 * velocity + mean
        weights = weights + 2.0 * velocity
        average += (1 - min(0.9, (1 + turn) / (10 + turn))) * (weights - average)
    return weights, average


def test_the_exported_model_is_the_average_of_all_and_not_the_last(run):
    assert len(run.sums) == ROUNDS
    model = load_tensors(run.out / "model" / "model.safetensors")
    names = sorted(load_tensors(run.out / "state" / "bundle" / "initial.safetensors"))
    exported = np.concatenate([model[name].reshape(-1) for name in names])
    last, average = recomputed(run)
    assert np.abs(exported - average).max() < 1e-5
    held = run.chains[-1].state
    assert np.abs(np.concatenate([held[name].reshape(-1) for name in names]) - last).max() < 1e-5
    assert np.abs(exported - last).max() > 0.05, "the average is another model"


# ------------------------------------------------------------------ killed and resumed

_KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from client.privacy.ledger import Ledger
from common.cli import main
from common.config import load
moment, number, study, out = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if moment == "drawn":
    real, count = Ledger.draw_round, 0
    def draw(self, plan, round_id, charges):
        global count
        done = real(self, plan, round_id, charges)
        count += round_id.number == number
        return done if count < 2 else die()
    Ledger.draw_round = draw
else:
    import server.simulate
    real = server.simulate.SimulatedRun.completed
    def completed(self, result, chain):
        real(self, result, chain)
        if result.round == number:
            die()
    server.simulate.SimulatedRun.completed = completed
main(["simulate", study, "--out", out, "--no-alone"])
"""


@pytest.mark.parametrize("moment", ["drawn", "completed"])
def test_a_killed_run_goes_on_from_its_one_plan_and_never_tells_less(tmp_path, moment):
    torch.set_num_threads(1)
    study, out = study_file(tmp_path), tmp_path / "out"
    words = [sys.executable, "-W", "ignore", "-c", _KILLED, moment, "4", str(study), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(words, cwd=ROOT, env=environment, check=False, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    bundle = Bundle.load(out / "state" / "bundle")
    whole = bundle.plan().training.epsilon
    before = {}
    for site in HOSPITALS:
        rows, spent, so_far = ledger_of(out, site)
        before[site] = drawn(rows)
        assert len(plans(rows)) == 1
        assert spent.train == pytest.approx(whole, abs=1e-6), "all of the plan counts"
        assert so_far.train == pytest.approx(
            training_epsilon(rows, bundle.study.privacy.delta), abs=1e-9
        )
        assert so_far.train < spent.train
    assert main(["resume", str(out)]) == 0
    told = json.loads((out / "metrics.json").read_text())
    assert told["rounds_completed"] == ROUNDS
    for site in HOSPITALS:
        rows, spent, _ = ledger_of(out, site)
        steps, rounds = drawn(rows)
        assert len(plans(rows)) == 1
        assert Counter(row.kind for row in rows)["settle"] == 1
        # What was drawn before the kill is still there, and nothing of it was given back.
        earlier, known = before[site]
        assert rounds[: len(known)] == known
        assert all(steps[work] >= earlier[work] for work in earlier)
        released = [row for row in rows if row.kind == "release"]
        assert steps["train"] >= ROUNDS
        assert len(rounds) >= len(released)
        assert spent.train == pytest.approx(
            training_epsilon(rows, bundle.study.privacy.delta), abs=1e-9
        )
        assert spent.epsilon <= spent.cap


# ------------------------------------------------------------------ notes


@pytest.mark.parametrize("tuning", ["head", "lora", "full"])
def test_a_joint_study_of_notes_goes_the_whole_way(make_study, wardround, tmp_path, tuning):
    study = make_study(
        {
            "model": {"tuning": tuning},
            "training": {"rounds": 2, "local_steps": 1, "optimizer": None},
            "privacy": {"mode": "joint"},
        }
    )
    out = tmp_path / "out"
    words = ("simulate", study, "--out", out, "--json", "--device", "cpu")
    status, told, problems = wardround(*words, *(() if tuning == "head" else ("--no-alone",)))
    assert status == 0, problems + told
    found = json.loads(told)
    assert found["rounds_completed"] == 2
    assert found["coordinator_saw"]["plain_updates"] == 0
    alone = found["final_metrics"]["per_site"]["east"]["alone"]
    assert (alone is not None) is (tuning == "head"), "a hospital on its own makes the same steps"
    for site in HOSPITALS:
        rows, spent, _ = ledger_of(out, site)
        assert drawn(rows)[0] == {"train": 2, "evaluate": 2}
        assert spent.epsilon <= spent.cap == 8


# ------------------------------------------------------------------ the gate


def test_a_poisoned_joint_model_is_rolled_back_and_the_grid_stays(tmp_path, monkeypatch):
    """Four rounds, each measured; all hospitals push the second model the wrong way."""
    real = client.training.LocalTrainer.train
    calls = Counter()

    def poisoned(self, state, number):
        words = real(self, state, number)
        calls[id(self)] += 1
        if calls[id(self)] != 2:
            return words
        bound = self._settings.joint.signal_bound
        return np.where(np.arange(words.size) % 2, bound, -bound).astype(np.int32)

    monkeypatch.setattr(client.training.LocalTrainer, "train", poisoned)
    judged = []
    judge = Gate.judge

    def listening(self, state, exponents, words):
        verdict = judge(self, state, exponents, words)
        judged.append((exponents, verdict.exponents, verdict.rejected))
        return verdict

    monkeypatch.setattr(Gate, "judge", listening)
    study = study_file(
        tmp_path,
        training={"rounds": 4},
        evaluation={"every": 1},
        acceptance={"tolerance": 0.1},
        aggregation={"optimizer": {"name": "fedavg", "learning_rate": 1.5}},
        privacy={
            "mode": "joint",
            "epsilon": 60,
            "delta": 1e-4,
            "clip_norm": 0.5,
            "statistics_epsilon": 20,
        },
    )
    seen = watched(tmp_path, study)
    assert seen.status == 0
    told = json.loads((seen.out / "metrics.json").read_text())
    assert told["rounds_completed"] == 4
    assert told["models_rejected"] >= 1
    rejected = [result.turn - 1 for result in seen.results if result.rejected]
    assert 2 in rejected
    wanted = Bundle.load(seen.out / "state" / "bundle").joint_noise().exponent
    assert {e for before, after, _ in judged for e in (*before, *after)} == {wanted}
    assert {e for chain in seen.chains for e in chain.exponents} == {wanted}
    for site in HOSPITALS:
        rows, spent, _ = ledger_of(seen.out, site)
        # A rejected model's round stays charged.
        assert drawn(rows)[0] == {"statistics": 1, "train": 4, "evaluate": 5}
        assert spent.epsilon <= spent.cap


# ------------------------------------------------------------------ plans


def test_a_plan_of_a_joint_study_says_the_noise_and_both_modes(tmp_path, wardround):
    status, told, problems = wardround("plan", study_file(tmp_path), "--json")
    assert status == 0, problems
    found = json.loads(told)
    joint = found["joint"]
    assert joint["honest"] == 2
    assert [a["name"] for a in joint["audiences"]] == ["coordinator", "colluders", "all_others"]
    assert joint["audiences"][1]["epsilon"] == pytest.approx(found["training"]["epsilon"])
    assert found["training"]["epsilon"] <= found["training"]["budget"] == 5
    assert joint["share_std"] >= 1024
    modes = found["modes"]
    assert {row["mode"] for row in modes["modes"]} == {"joint", "local"}
    assert modes["recommended"] in {"joint", "local"}
    assert sum(row["chosen"] for row in modes["quorums"]) == 1
    shown = wardround("plan", study_file(tmp_path))[1]
    assert "one noise for all hospitals" in shown
    assert shown.count("epsilon against") == 3


# ------------------------------------------------------------------ what is refused beforehand


def refused(wardround, *words):
    status, told, problems = wardround(*words)
    assert status != 0
    assert "Traceback" not in told + problems
    return problems


def test_too_few_patients_for_the_noise_are_told_how_many_it_takes(tmp_path, wardround):
    private = {"mode": "joint", "epsilon": 0.3, "delta": 1e-4, "clip_norm": 0.5}
    path = study_file(tmp_path, training={"rounds": 200}, privacy=private)
    found = json.loads(wardround("plan", path, "--json")[1])
    (warning,) = [w for w in found["warnings"] if "times the largest signal" in w]
    assert "patients per hospital" in warning
    needed = float(warning.split("about ")[1].split(" patients")[0].replace(",", ""))
    assert needed > found["patients"]["east"]
    # Control: the example has enough.
    calm = json.loads(wardround("plan", study_file(tmp_path), "--json")[1])
    assert not any("times the largest signal" in w for w in calm["warnings"])


@pytest.mark.parametrize("mode", ["joint", "local"])
def test_an_epsilon_that_no_noise_reaches_is_refused_at_the_plan(tmp_path, wardround, mode):
    private = {"mode": mode, "epsilon": 1e-9, "delta": 1e-12, "clip_norm": 0.5}
    problems = refused(wardround, "plan", study_file(tmp_path, privacy=private))
    assert problems.startswith(Code.PLAN_IMPOSSIBLE.label)


@pytest.mark.parametrize("verb", ["plan", "simulate", "study build"])
def test_a_ring_without_room_for_the_noise_is_refused_before_anything_runs(
    tmp_path, wardround, verb
):
    """A million patients a step share the grid with a hundred thousand parameters."""
    task = load(CONFIGS / "joint.yaml", Study).task.model_dump(mode="json") | {"hidden": [4096, 64]}
    crowded = {"expected_batch": 1e6}
    path = study_file(tmp_path, training=crowded, task=task)
    extra = () if verb == "plan" else ("--out", tmp_path / "out")
    problems = refused(wardround, *verb.split(), path, *extra)
    assert problems.startswith(Code.JOINT_RING.label)
    assert not list(tmp_path.rglob("ledger.sqlite"))
    assert not list(tmp_path.rglob("bundle.json"))
    # Control: either alone has room.
    assert wardround("plan", study_file(tmp_path, task=task))[0] == 0
    assert wardround("plan", study_file(tmp_path, training=crowded))[0] == 0


def test_a_study_in_which_no_hospital_may_be_missing_says_so(tmp_path, wardround):
    path = study_file(tmp_path, quorum={"colluders": 1, "survivors": 4})
    found = json.loads(wardround("plan", path, "--json")[1])
    assert found["joint"]["honest"] == 3
    assert found["dropouts_tolerated"] == 0
    assert any("no hospital may drop out" in warning for warning in found["warnings"])
