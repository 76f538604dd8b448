"""The frozen studies of benchmarks/quality.py are what the benchmark says they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config import load
from common.study import Study

FROZEN = Path(__file__).parents[2] / "configs" / "quality"
STUDIES = {path.stem: load(path, Study) for path in sorted(FROZEN.glob("*.yaml"))}


def test_there_is_one_study_for_each_row() -> None:
    assert set(STUDIES) == {"none", "eps8", "eps3"}
    assert all(study.name == f"quality-{stem}" for stem, study in STUDIES.items())


def test_they_share_task_model_and_hospitals() -> None:
    first = STUDIES["none"]
    for study in STUDIES.values():
        assert (study.task, study.model) == (first.task, first.model)
        assert study.simulation == first.simulation
        assert study.party_count == 10


@pytest.mark.parametrize(("stem", "epsilon"), [("eps8", 8.0), ("eps3", 3.0)])
def test_the_private_ones_leave_the_noise_to_the_accountant(stem: str, epsilon: float) -> None:
    privacy = STUDIES[stem].privacy
    assert (privacy.mode, privacy.epsilon, privacy.delta) == ("local", epsilon, 1e-5)
    assert privacy.noise_multiplier is None


def test_the_committed_studies_never_name_the_test_set() -> None:
    for study in STUDIES.values():
        assert study.simulation is not None
        assert study.simulation.data.test_files == ()
        assert all("test" not in name for name in study.simulation.data.files)
