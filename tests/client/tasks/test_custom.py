"""A task of another package: the guide's own example, installed, run and refused."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from client.predict import predict
from client.tasks import kinds
from client.trainer import _require_backbone
from common.bundle import Bundle
from common.cli import main
from common.errors import Code, ConfigError, DataError
from common.tasks.custom import CustomTask

torch.set_num_threads(1)

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "ADDING_A_TASK.md").read_text(encoding="utf-8")
DATA = ROOT / "configs" / "data" / "synthetic-labs.csv"
MODULE = "wardround_additive"
PRIVACY = {
    "none": {"mode": "none"},
    "local": {"mode": "local", "epsilon": 10, "delta": 1e-4, "clip_norm": 1.0},
    "joint": {"mode": "joint", "epsilon": 10, "delta": 1e-4, "clip_norm": 1.0},
}


def block(language):
    (found,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)
    return found


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts the package on the path as pip would: the module, and what names it."""

    def installed(code=None, *, name="one", offers="additive = wardround_additive"):
        folder = tmp_path / f"site-{name}"
        facts = folder / "wardround_additive-1.dist-info"
        facts.mkdir(parents=True)
        (folder / f"{MODULE}.py").write_text(block("python") if code is None else code)
        (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1\n")
        (facts / "entry_points.txt").write_text(f"[{kinds.GROUP}]\n{offers}\n")
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop(MODULE, None)
        kinds._installed.cache_clear()

    yield installed
    sys.modules.pop(MODULE, None)
    kinds._installed.cache_clear()


@pytest.fixture
def study(tmp_path):
    def written(**changes):
        found = yaml.safe_load(block("yaml"))
        found["simulation"]["data"]["files"] = [str(DATA)]
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**found, **changes}))
        return path

    return written


def task():
    return CustomTask.model_validate(yaml.safe_load(block("yaml"))["task"])


def test_the_package_names_the_module_of_the_guide():
    assert f'additive = "{MODULE}"' in block("toml")
    assert f'"{kinds.GROUP}"' in block("toml")
    assert f'py-modules = ["{MODULE}"]' in block("toml")


@pytest.mark.parametrize("mode", PRIVACY)
def test_the_guides_example_runs_and_predicts(mode, install, study, tmp_path):
    install()
    changes = {"privacy": PRIVACY[mode]}
    if mode == "joint":
        changes["training"] = {
            "rounds": 6, "local_steps": 1, "sampling_rate": 0.5, "expected_batch": 24
        }  # fmt: skip
    out = tmp_path / "run"
    path = study(**changes)
    assert main(["simulate", str(path), "--out", str(out), "--device", "cpu"]) == 0
    rounds = json.loads((out / "metrics.json").read_text())["rounds"]
    assert [r["kind"] for r in rounds].count("train") == (6 if mode == "joint" else 3)
    answers = tmp_path / "answers.csv"
    with DATA.open() as stream:
        rows = list(csv.DictReader(stream))
    assert predict(out / "model", DATA, answers) == len(rows)
    with answers.open() as stream:
        told = [row["label"] for row in csv.DictReader(stream)]
    assert set(told) <= {"none", "sepsis"}
    if mode == "none":
        right = sum(a == row["label"] for a, row in zip(told, rows, strict=True))
        assert right > 0.7 * len(rows)


def test_a_row_depends_on_itself_alone(install):
    install()
    code = kinds.code_of(task())
    encoded = code.encode(task(), code.probes(task()))
    values = torch.tensor(encoded.values, dtype=torch.float32)
    network = code.network(task())
    together = network(values, *encoded.tensors)
    alone = torch.cat(
        [network(values[i : i + 1], encoded.tensors[0][i : i + 1]) for i in range(len(values))]
    )
    assert torch.allclose(together, alone, atol=1e-6)


def test_a_network_that_mixes_patients_is_refused_before_any_record_is_read(
    install, study, tmp_path, capsys
):
    mixed = block("python").replace(
        "        return total\n", "        return total + total.mean(0)\n"
    )
    assert mixed != block("python")
    install(mixed)
    assert main(["simulate", str(study()), "--out", str(tmp_path / "run")]) != 0
    assert Code.GRADIENT_INEXACT.label in capsys.readouterr().err


def test_another_version_of_the_file_is_another_network(install, study, tmp_path):
    install()
    ours = kinds.code_of(task()).architecture(task())[0]
    out = tmp_path / "bundle"
    path = study(sites=[{"id": name} for name in ("east", "north", "south")])
    assert main(["study", "build", str(path), "--out", str(out)]) == 0
    bundle = Bundle.load(out)
    assert bundle.backbone_digest == ours
    _require_backbone(bundle)  # control: the same file is taken
    install(block("python") + "\n# altered\n", name="other")
    with pytest.raises(DataError) as caught:
        _require_backbone(bundle)
    assert caught.value.code is Code.BACKBONE_DIFFERS


def test_a_study_that_names_what_is_not_installed_is_told_so(study, tmp_path, capsys):
    assert main(["simulate", str(study()), "--out", str(tmp_path / "run")]) != 0
    told = capsys.readouterr().err
    assert "No installed package offers the task additive" in told
    assert Code.TASK_ABSENT.label in told


@pytest.mark.parametrize(
    ("code", "offers", "expected"),
    [
        ("import nowhere_at_all\n", "additive = wardround_additive", "does not load"),
        ("network = encode = probes = print\n", "additive = wardround_additive", "architecture"),
        (None, "additive = wardround_additive:Nothing", "does not load"),
    ],
)
def test_an_installed_task_that_is_not_whole_is_told(code, offers, expected, install):
    install(code, offers=offers)
    with pytest.raises(ConfigError) as caught:
        kinds.code_of(task())
    assert caught.value.code is Code.TASK_ABSENT
    assert expected in str(caught.value)


def test_a_name_that_two_packages_offer_is_not_guessed(install):
    install(offers="additive = wardround_additive\nadditive = os")
    with pytest.raises(ConfigError, match="Several installed packages"):
        kinds.code_of(task())
