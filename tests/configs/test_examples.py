"""Every example in configs/ is right, and says what its comments say."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from client.config import SiteConfig
from common.cli import main
from common.config import load
from common.study import Study
from server.config import CoordinatorConfig

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_examples_of_every_kind() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names >= {"diagnosis-minilm", "diagnosis-bert", "simulation", "site", "coordinator"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_passes_check(path: Path, capsys) -> None:
    assert main(["check", str(path)]) == 0
    assert "ok" in capsys.readouterr().out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_teaches(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert sum(line.lstrip().startswith("#") for line in lines) >= 3
    assert all(len(line) <= 100 for line in lines)


def test_the_bert_example_is_the_textbook_recipe() -> None:
    study = load(CONFIGS / "diagnosis-bert.yaml", Study)
    assert study.model.backbone == "bert-base-uncased"
    assert len(study.labels) == 2
    assert (study.model.tuning, study.model.freeze_embeddings) == ("full", False)
    assert (study.training.optimizer.name, study.training.optimizer.learning_rate) == (
        "adamw",
        5e-5,
    )
    assert study.training.expected_batch == 32
    assert study.quorum_size(4) == 4


def test_the_minilm_example_is_private_and_offline() -> None:
    study = load(CONFIGS / "diagnosis-minilm.yaml", Study)
    assert (study.privacy.mode, study.privacy.epsilon) == ("local", 3.0)
    assert study.model.backbone.startswith("package:")
    assert study.model.tuning == "head"
    assert study.party_count == 10


def test_the_simulation_names_hospitals_and_labels_that_its_data_has() -> None:
    study = load(CONFIGS / "simulation.yaml", Study)
    assert study.simulation is not None
    (name,) = study.simulation.data.files
    with (CONFIGS / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {"patient", "hospital", "text", "label"}
    assert {row["label"] for row in rows} == set(study.labels)
    hospitals = {row["hospital"] for row in rows}
    assert {fault.site for fault in study.simulation.faults} <= hospitals
    homes = {(row["patient"], row["hospital"]) for row in rows}
    assert len(homes) == len({row["patient"] for row in rows})


@pytest.mark.parametrize("name", ["simulation", "tabular", "diagnosis-minilm"])
def test_no_private_example_is_planned_with_a_warning(name: str, capsys) -> None:
    assert main(["plan", str(CONFIGS / f"{name}.yaml"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["warnings"] == []


def test_control_measuring_every_round_is_warned_of(tmp_path: Path, capsys) -> None:
    text = (CONFIGS / "simulation.yaml").read_text()
    assert "every: 3, held_out: 0.35" in text
    often = text.replace("every: 3, held_out: 0.35", "every: 1").replace(
        "[data/", f"[{CONFIGS}/data/"
    )
    (tmp_path / "s.yaml").write_text(often)
    assert main(["plan", str(tmp_path / "s.yaml"), "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "evaluation.every" in warning


def test_the_site_example_approves_nothing_by_itself() -> None:
    config = load(CONFIGS / "site.yaml", SiteConfig)
    assert config.ceilings.approved_studies == ()
    assert config.ceilings.require_privacy


def test_the_coordinator_example_has_no_say_in_privacy() -> None:
    load(CONFIGS / "coordinator.yaml", CoordinatorConfig)
    forbidden = {"epsilon", "delta", "quorum", "rounds", "privacy", "deadlines", "sites"}
    assert forbidden.isdisjoint(CoordinatorConfig.model_fields)
