"""A whole federation in one process, from the command line to the folder it leaves."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from client.approval import StudyFacts, approve
from client.config import SiteConfig
from common.audit import verify_folder
from common.config import load
from common.errors import Code, RefusedError
from common.study import Study

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
HOSPITALS = ("east", "north", "south", "west")
PLAIN = {"privacy": {"mode": "none", "epsilon": None, "delta": None, "clip_norm": None}}
FAULTS = {
    "simulation": {
        "faults": [
            {"round": 2, "site": "north", "fault": "drop"},
            {"round": 3, "site": "west", "fault": "crash"},
        ]
    }
}


@pytest.fixture
def simulated(make_study, wardround, tmp_path):
    """Runs a study of tiny parts; returns (the object of --json, the output folder)."""

    def run(changes=None, *, out="out", **options):
        study = make_study(changes, **options)
        status, told, problems = wardround(
            "simulate", study, "--out", tmp_path / out, "--json", "--device", "cpu"
        )
        assert status == 0, problems + told
        lines = told.splitlines()
        assert len(lines) == 1, "with --json nothing else is on standard output"
        return json.loads(lines[0]), tmp_path / out

    return run


def history(folder):
    return json.loads((folder / "metrics.json").read_text())["rounds"]


# ------------------------------------------------------------------ one run, looked at closely


@pytest.fixture
def accident(simulated):
    return simulated(FAULTS)


def test_a_run_with_a_dropout_and_a_crash_completes_and_says_everything(accident):
    found, folder = accident
    assert (found["rounds_completed"], found["rounds_aborted"]) == (3, 0)
    assert found["evaluation_rounds"] == 1
    final = found["final_metrics"]
    for name in ("accuracy", "macro_f1"):
        # The noise on so few patients' counts may leave none above zero: then nothing is said.
        assert final[name] is None or 0 <= final[name] <= 1
    assert set(final["per_site"]) == set(HOSPITALS)
    for site in final["per_site"].values():
        low, high = site["interval_95"]["accuracy"]
        assert site["n"] > 0
        assert low <= site["accuracy"] <= high
    for name in HOSPITALS:
        spent = found["epsilon"][name]
        assert 0 < spent["spent"] <= spent["cap"] == 8
        assert spent["delta"] == 5e-4
    saw = found["coordinator_saw"]
    # Four hospitals, three training rounds and one evaluation; one drop and one crash.
    assert saw == {"masked_updates": 4 * 4 - 2, "plain_updates": 0}
    assert found["audit_verified"] is True
    assert found["wall_seconds"] > 0
    assert found["peak_memory_bytes"] > 2**20
    assert found["output"] == str(folder)


def test_the_folder_holds_everything_and_the_audit_is_closed(accident):
    _, folder = accident
    for name in (
        *("model/config.json", "model/model.safetensors", "metrics.json", "privacy.json"),
        *("MODEL_CARD.md", "manifest.json", "plots/learning_curve.png", "plots/sites.png"),
        "wardround.log.jsonl",
    ):
        assert (folder / name).is_file(), name
    report = verify_folder(folder)
    assert report.verified
    assert report.complete, [str(problem) for problem in report.problems]
    assert all(log.closed for log in report.logs), "the crashed hospital's log, too"
    statement = json.loads((folder / "privacy.json").read_text())
    assert statement["unit"] == "patient"
    assert statement["mechanism"]["noise_multiplier"] > 0
    dropped = [entry["dropouts"] for entry in history(folder)]
    assert dropped == [[], ["north"], ["west"], []]


def test_the_log_is_events_and_allowed_fields_only(accident):
    from common.logs import ALLOWED

    _, folder = accident
    lines = (folder / "wardround.log.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    assert {"run.started", "round.completed", "run.finished"} <= {e["event"] for e in events}
    assert all(set(event) <= ALLOWED for event in events)


def test_the_verbs_it_names_next_accept_the_folder(accident, wardround):
    _, folder = accident
    status, told, _ = wardround("privacy", folder)
    assert status == 0
    assert all(name in told for name in HOSPITALS)
    assert wardround("audit", "verify", folder)[0] == 0
    notes = folder.parent / "notes.csv"
    out = folder.parent / "answers.csv"
    assert wardround("predict", folder / "model", notes, "--out", out)[0] == 0
    with notes.open() as given, out.open() as answered:
        assert len(list(csv.reader(given))) == len(list(csv.reader(answered)))
    status, told, _ = wardround("resume", folder, "--json")
    assert status == 0
    assert json.loads(told)["coordinator_saw"]["masked_updates"] == 14, "the end, once more"


def test_a_second_privacy_verb_answers_from_what_was_kept(accident, wardround, monkeypatch):
    _, folder = accident
    monkeypatch.setattr("client.budget._computed", None)
    assert wardround("privacy", folder)[0] == 0
    ledger = folder / "state" / "sites" / "east" / "ledger.forecast.json"
    kept = json.loads(ledger.read_text())
    ledger.write_text(json.dumps({**kept, "head": "00" * 32}))
    with pytest.raises(TypeError):
        wardround("privacy", folder)  # the control: another head is computed anew


def test_a_plain_run_prints_a_line_a_round_and_ends_with_the_verdict(
    make_study, wardround, tmp_path
):
    study = make_study({**PLAIN, "training": {"rounds": 2}, "evaluation": {"every": 2}})
    status, told, _ = wardround("simulate", study, "--out", tmp_path / "out")
    assert status == 0
    lines = told.splitlines()
    rounds = [line for line in lines if line.startswith("round ")]
    assert [line.split()[1] for line in rounds] == ["1/2", "2/2"]
    # What was measured is told of the model that it is about.
    assert next(line for line in lines if "model after round" in line).startswith(
        "  model after round 2:"
    )
    assert "coordinator saw: 12 masked updates, 0 readable" in lines
    assert lines[-1].startswith("verdict: nobody's update was readable")
    assert any(line.startswith("next: wardround predict") for line in lines)


def test_alone_is_measured_at_home_and_everywhere_and_can_be_left_out(
    make_study, wardround, tmp_path, simulated
):
    found, _ = simulated(PLAIN)
    site = found["final_metrics"]["per_site"]["east"]
    everybody = sum(s["n"] for s in found["final_metrics"]["per_site"].values())
    assert site["alone"]["n"] == site["n"]
    assert site["alone_everywhere"]["n"] == everybody == found["final_metrics"]["everywhere"]["n"]
    study = make_study(PLAIN)
    status, told, _ = wardround("simulate", study, "--out", tmp_path / "b", "--json", "--no-alone")
    assert status == 0
    assert json.loads(told)["final_metrics"]["per_site"]["east"]["alone"] is None


# ------------------------------------------------------------------ whose metrics these are


def test_metrics_belong_to_the_model_they_measured(simulated):
    found, folder = simulated({**PLAIN, "training": {"rounds": 4}})
    rounds = history(folder)
    assert [r["kind"] for r in rounds] == ["train"] * 4 + ["evaluate"]
    assert [r["turn"] for r in rounds] == [1, 2, 3, 4, 5]
    assert all(r["accuracy"] is not None for r in rounds[:4])
    assert rounds[4]["accuracy"] is None, "an evaluation makes no model"
    # Without privacy the masked sum is exact: it must be the final model's, not an earlier one's.
    exact = found["final_metrics"]["everywhere"]["accuracy"]
    assert found["final_metrics"]["accuracy"] == pytest.approx(exact, abs=1e-3)
    assert rounds[3]["accuracy"] == pytest.approx(exact, abs=1e-3)


def test_metrics_of_every_second_round_stand_at_the_second_round(simulated):
    _, folder = simulated({**PLAIN, "training": {"rounds": 4}, "evaluation": {"every": 2}})
    known = [r["turn"] for r in history(folder) if r["accuracy"] is not None]
    assert known == [2, 4]


def test_test_files_are_measured_exactly(make_study, wardround, tmp_path, write_notes):
    held = write_notes(tmp_path / "test.csv", patients=5, seed=9, mark="t")
    study = make_study({**PLAIN, "simulation": {"data": {"test_files": ["test.csv"]}}})
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "o", "--json")
    assert status == 0, problems + told
    test = json.loads(told)["final_metrics"]["test"]
    assert test["n"] == len({row["patient"] for row in held}) == 20
    assert set(test["interval_95"]) == {"accuracy", "macro_f1"}


# ------------------------------------------------------------------ every way a study may go


SPLITS = {
    "iid": {"by": "iid", "column": None, "sites": 4},
    "dirichlet": {"by": "dirichlet", "column": None, "sites": 4, "alpha": 1.0},
    "quantity": {"by": "quantity", "column": None, "sites": 4, "skew": "linear"},
    "pathological": {"by": "pathological", "column": None, "sites": 3, "classes_per_site": 2},
}


@pytest.mark.parametrize("name", SPLITS)
def test_every_split_makes_a_federation(simulated, name):
    found, folder = simulated(
        {**PLAIN, "training": {"rounds": 1}, "simulation": {"split": SPLITS[name]}}, patients=40
    )
    assert found["rounds_completed"] == 1
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["split"]["by"] == name
    assert len(manifest["sites"]) == SPLITS[name]["sites"]
    assert len(manifest["inputs"][0]["sha256"]) == 64
    assert sum(site["patients"] for site in manifest["sites"].values()) == 160


@pytest.mark.parametrize("name", ["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_every_server_optimiser_runs(simulated, name):
    found, _ = simulated(
        {
            **PLAIN,
            "training": {"rounds": 2},
            "aggregation": {"optimizer": {"name": name, "learning_rate": 0.1}},
        }
    )
    assert found["rounds_completed"] == 2


@pytest.mark.parametrize("mode", ["none", "local"])
@pytest.mark.parametrize("tuning", ["head", "bitfit", "lora", "full"])
def test_every_tuning_goes_the_whole_way(simulated, tuning, mode):
    model = {"tuning": tuning}
    if tuning == "full":
        model["freeze_embeddings"] = True
    base = PLAIN if mode == "none" else {}
    found, folder = simulated(
        {**base, "model": model, "training": {"rounds": 1}, "aggregation": {"ring_bits": 32}}
    )
    assert found["rounds_completed"] == 1
    assert (folder / "model" / "model.safetensors").stat().st_size > 1000
    assert found["final_metrics"]["noised"] is (mode == "local")


def test_dropouts_can_be_drawn_for_every_round(simulated):
    found, folder = simulated({**PLAIN, "simulation": {"dropouts_per_round": 1}})
    trained = [r for r in history(folder) if r["kind"] == "train"]
    assert all(len(r["dropouts"]) == 1 for r in trained)
    assert found["rounds_completed"] == 3


# ------------------------------------------------------------------ the exported model


_STRANGER = """
import sys, json, csv
for name in ("client", "server", "common", "opacus", "peft"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
folder, notes = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
with open(notes, newline="") as stream:
    texts = [row["text"] for row in csv.DictReader(stream)]
inputs = tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1).tolist()
print(json.dumps({"labels": model.config.id2label, "probabilities": probabilities}))
"""


@pytest.mark.parametrize("tuning", ["head", "lora"])
def test_a_stranger_loads_the_model_and_predicts_the_same(simulated, wardround, tmp_path, tuning):
    _, folder = simulated({**PLAIN, "model": {"tuning": tuning}, "training": {"rounds": 1}})
    out = tmp_path / "answers.csv"
    notes = tmp_path / "notes.csv"
    assert wardround("predict", folder / "model", notes, "--out", out, "--device", "cpu")[0] == 0
    with out.open(newline="") as stream:
        ours = list(csv.DictReader(stream))
    done = subprocess.run(
        [sys.executable, "-I", "-c", _STRANGER, folder / "model", notes],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    theirs = json.loads(done.stdout)
    labels = [theirs["labels"][str(i)] for i in range(3)]
    mine = np.array([[float(row[f"p({label})"]) for label in labels] for row in ours])
    assert np.allclose(mine, theirs["probabilities"], atol=2e-6)
    assert [row["label"] for row in ours] == [labels[i] for i in mine.argmax(1)]


# ------------------------------------------------------------------ when it cannot go on


def test_spent_budgets_end_the_run_early_and_keep_what_was_reached(make_study, wardround, tmp_path):
    # This noise spends the whole budget within the first rounds.
    study = make_study({"privacy": {"noise_multiplier": 0.75}, "training": {"rounds": 12}})
    out = tmp_path / "out"
    status, told, problems = wardround("simulate", study, "--out", out)
    assert status == 6
    assert "Traceback" not in problems + told
    assert problems.startswith(Code.BUDGETS_SPENT.label)
    assert "above the cap of 8.000" in problems
    assert "of 12 rounds are complete" in problems
    assert f"wardround resume {out}" in problems
    assert (out / "model-so-far" / "model.safetensors").is_file()
    for owner in ("coordinator", "east"):  # the machine decided, and every hospital checked it
        events = [
            json.loads(e) for e in (out / "audit" / f"{owner}.jsonl").read_text().splitlines()
        ]
        (end,) = [e for e in events if e["event"] == "run.finished"]
        assert end["fields"]["verdict"] == Code.BUDGETS_SPENT.label
    spent = json.loads(wardround("privacy", out, "--json")[1])["ledgers"]
    assert all(line["epsilon"] <= 8 for line in spent)
    before = [line["epsilon"] for line in spent]
    status, _, problems = wardround("resume", out)
    assert (status, problems[:7]) == (6, Code.BUDGETS_SPENT.label)
    after = json.loads(wardround("privacy", out, "--json")[1])["ledgers"]
    assert [line["epsilon"] for line in after] == before


def test_too_many_dropouts_say_who_is_missing(make_study, wardround, tmp_path):
    faults = [
        {"round": number, "site": site, "fault": "drop"}
        for number in range(1, 4)
        for site in ("east", "north")
    ]
    study = make_study({**PLAIN, "simulation": {"faults": faults}})
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "out")
    assert status == 6
    assert "waited for east, north" in told
    assert "wardround resume" in problems
    assert "Traceback" not in problems


def test_a_run_never_writes_among_other_files(make_study, wardround, tmp_path):
    study = make_study(PLAIN)
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years of work")
    status, _, problems = wardround("simulate", study, "--out", out)
    assert status == 7
    assert Code.OUTPUT_NOT_EMPTY.label in problems
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_changed_inputs_are_not_resumed(make_study, wardround, tmp_path):
    faults = [{"round": 2, "site": s, "fault": "drop"} for s in ("east", "north")]
    study = make_study({**PLAIN, "simulation": {"faults": faults}, "training": {"rounds": 2}})
    out = tmp_path / "out"
    wardround("simulate", study, "--out", out)
    (out / "state" / "conclusion.json").unlink(missing_ok=True)
    with (tmp_path / "notes.csv").open("a") as stream:
        stream.write("east-new,east,a cough,asthma\n")
    status, _, problems = wardround("resume", out)
    assert status == 7
    assert Code.INPUTS_CHANGED.label in problems


# ------------------------------------------------------------------ the examples


def test_the_simulation_example_runs_as_it_is(wardround, tmp_path):
    status, told, problems = wardround(
        "simulate", CONFIGS / "simulation.yaml", "--out", tmp_path / "o", "--json"
    )
    assert status == 0, problems + told
    assert json.loads(told)["rounds_completed"] == 3


@pytest.fixture
def adopt(tmp_path, write_notes, merged):
    """Gives an example data of its own, so that it can be run here."""
    return lambda name, changes, patients: _adopt(
        tmp_path, write_notes, merged, name, changes, patients
    )


def _adopt(tmp_path, write_notes, merged, name, changes, patients):
    study = load(CONFIGS / name, Study)
    labels = study.labels
    write_notes(tmp_path / "notes.csv", labels=labels, hospitals=("x",), patients=patients)
    terms = study.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    count = len(study.sites)
    simulation = {
        "data": {"files": ["notes.csv"]},
        "split": {"by": "iid", "sites": count},
        "seed": 1,
    }
    terms = merged({**terms, "simulation": simulation}, changes)
    path = tmp_path / name
    path.write_text(json.dumps(terms))
    return path


def test_the_minilm_example_runs_shortened(wardround, tmp_path, tiny_bert, adopt):
    study = adopt(
        "diagnosis-minilm.yaml",
        {"training": {"rounds": 2}, "evaluation": {"every": 2}, "task": {"max_tokens": 16}},
        200,
    )
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "o", "--json")
    assert status == 0, problems + told
    assert len(json.loads(told)["epsilon"]) == 10


def test_the_bert_example_runs_on_a_tiny_bert(wardround, tmp_path, tiny_bert, adopt):
    study = adopt(
        "diagnosis-bert.yaml",
        {"model": {"backbone": str(tiny_bert)}, "training": {"rounds": 2, "local_steps": 3}},
        120,
    )
    status, told, problems = wardround("simulate", study, "--out", tmp_path / "o", "--json")
    assert status == 0, problems + told
    found = json.loads(told)
    assert found["rounds_completed"] == 2
    assert found["final_metrics"]["noised"] is False


def test_the_site_example_approves_a_study_once_its_digest_is_listed():
    config = load(CONFIGS / "site.yaml", SiteConfig)
    facts = StudyFacts(bytes([1]) * 32, bytes(32), bytes(32), 10, 20, 3.0, 1e-5)
    with pytest.raises(RefusedError):
        approve(facts, config.ceilings, stopped=False)
    listed = config.ceilings.model_copy(update={"approved_studies": ("01" * 32,)})
    approve(facts, listed, stopped=False)


# ------------------------------------------------------------------ plans


def test_a_plan_needs_no_bundle(make_study, wardround, tmp_path):
    study = make_study()
    status, told, _ = wardround("plan", study, "--json")
    assert status == 0
    found = json.loads(told)
    assert found["patients"] == dict.fromkeys(HOSPITALS, 30)
    assert found["parameters"] == 3 * 16 + 3
    told = wardround("plan", study)[1]
    assert told.splitlines()[-1] == f"next: wardround simulate {study}"


def test_a_plan_says_the_seconds_of_a_round_on_a_given_line(make_study, wardround):
    study = make_study()

    def seconds(*more):
        return json.loads(wardround("plan", study, "--json", *more)[1])["seconds_network"]

    assert seconds("--megabits", 4) == pytest.approx(25 * seconds())  # 100 Mbit/s unless told
    assert wardround("plan", study, "--megabits", 0)[0] == 2


@pytest.mark.parametrize("given", [True, False], ids=["parameters given", "model built"])
def test_a_plan_of_listed_sites(make_study, wardround, given):
    sites = [{"id": f"site-{i}"} for i in range(5)]
    study = make_study({"simulation": None, "sites": sites}, notes=False)
    status, told, problems = wardround(
        "plan", study, "--json", *(("--parameters", 51) if given else ())
    )
    assert status == 0, problems + told
    found = json.loads(told)
    assert (found["parameters"], found["parties"], found["quorum"]) == (51, 5, 4)
    told = wardround("plan", study, "--parameters", 51)[1]
    assert told.splitlines()[-1] == f"next: wardround study build {study}"


def test_a_built_bundle_is_planned(make_study, wardround, tmp_path):
    study = make_study()
    bundle = tmp_path / "bundle"
    status, told, problems = wardround("study", "build", study, "--out", bundle, "--json")
    assert status == 0, problems + told
    assert json.loads(told)["parameters"] == 51
    assert wardround("plan", bundle)[0] == 0


def test_altered_code_does_not_run(make_study, tmp_path, monkeypatch):
    from common import integrity
    from common.errors import Code, RefusedError
    from server.simulate import simulate
    from server.table import Silent

    def altered(packages):
        assert set(packages) == {"common", "client", "server"}
        raise RefusedError(Code.CODE_ALTERED, "common/ids.py differs from what was installed.")

    monkeypatch.setattr(integrity, "verify", altered)
    with pytest.raises(RefusedError) as caught:
        simulate(make_study(), tmp_path / "out", view=Silent())
    assert caught.value.code is Code.CODE_ALTERED
    assert not list((tmp_path / "out").rglob("ledger.sqlite"))
