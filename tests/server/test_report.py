"""The report: what it says, what it may not say, and that it is written at once."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.errors import Code, StorageError
from common.metrics import ClassScoring, words_from_counts
from server import figures, report
from server.report import (
    Evaluation,
    PrivacyFacts,
    RoundResult,
    RunResult,
    SiteResult,
    metrics_json,
    model_card,
    privacy_statement,
    site_table,
    write_report,
)

LABELS = ("asthma", "copd", "other")
SCORING = ClassScoring(LABELS, 8.0)
SITES = tuple(f"site-{i:02d}" for i in range(1, 6))


def evaluation(right, total=100):
    confusion = np.array([[right, total - right], [0, 0]], float)
    return Evaluation(
        n=total,
        scores={"accuracy": right / total, "macro_f1": right / total - 0.02},
        intervals=ClassScoring(("a", "b"), 8.0).intervals(np.append(confusion, 0.0)[None]),
    )


def metrics(number):
    right = 40.0 + 4 * np.sqrt(number)
    cells = np.diag([right] * 3) + (100 - right) / 2 * (1 - np.eye(3))
    return SCORING.read(words_from_counts(np.append(cells.ravel(), 30.0)))


def rounds(count, *, private=True):
    return tuple(
        RoundResult(
            round=number,
            turn=number,
            kind="train",
            cohort=5,
            survivors=2 if number == 4 else 4,
            dropouts=SITES[:3] if number == 4 else SITES[:1],
            metrics=None if number == 4 else metrics(number),
            epsilon=3.0 * (number / count) ** 0.5 if private else None,
            bytes_up=24_000,
            seconds=1.5,
            code="WR-5001" if number == 4 else None,
        )
        for number in range(1, count + 1)
    )


PRIVATE = PrivacyFacts(
    mode="local",
    epsilon=3.0,
    delta=1e-5,
    sampling_rate=0.1,
    expected_batch=20.0,
    local_steps=10,
    clip_norm=1.0,
    noise_multiplier=2.1782,
    answers={"PLD": 2.999, "RDP": 3.21},
    evaluation_epsilon=3.0,
    evaluation_noise=6.219,
    evaluation_releases=20,
    evaluation_answers={"PLD": 2.998},
    randomness="AES-256-CTR keyed by the operating system",
    steps=200,
)
OPEN = PrivacyFacts(
    mode="none",
    epsilon=None,
    delta=None,
    sampling_rate=0.1,
    expected_batch=20.0,
    local_steps=10,
    clip_norm=None,
    noise_multiplier=None,
    answers={},
    evaluation_epsilon=None,
    evaluation_noise=None,
    evaluation_releases=20,
    evaluation_answers={},
    randomness="none used",
)


def site(index, *, simulated=True, private=True):
    return SiteResult(
        site=SITES[index],
        weight=1.0,
        epsilon=2.9 - index / 100 if private else None,
        cap=3.0 if private else None,
        rounds_reserved=20,
        rounds_released=19,
        patients=200 + index if simulated else None,
        together=evaluation(55 + 3 * index) if simulated else None,
        alone=evaluation(50 + (7 * index) % 13) if simulated else None,
    )


def result(*, simulated=True, private=True, **override):
    values = {
        "study": "lungs",
        "study_digest": "ab" * 32,
        "run": "cd" * 32,
        "created": "2026-11-23T14:00:00Z",
        "simulated": simulated,
        "labels": LABELS,
        "scoring": SCORING,
        "task": "diagnosis",
        "backbone": "package:x/y",
        "tuning": "head",
        "parameters": 1155,
        "rounds_planned": 20,
        "rounds": rounds(20, private=private),
        "sites": tuple(site(i, simulated=simulated, private=private) for i in range(5)),
        "final": metrics(20),
        "privacy": PRIVATE if private else OPEN,
        "quorum": 4,
        "colluders": 1,
        "masked_updates": 76,
        "plain_updates": 0,
        "audit_verified": True,
        "model_digest": "ef" * 32,
        "wall_seconds": 33.3,
        "peak_memory_bytes": 1_234_000_000,
        "test": evaluation(60) if simulated else None,
        "central": evaluation(62) if simulated else None,
        "software": {"wardround": "0.1.0"},
    }
    return RunResult(**{**values, **override})


# ------------------------------------------------------------------------------ metrics


def test_the_metrics_carry_what_a_script_reads():
    found = metrics_json(result())
    assert (found["rounds_completed"], found["rounds_aborted"]) == (19, 1)
    assert found["coordinator_saw"] == {"masked_updates": 76, "plain_updates": 0}
    assert found["epsilon"]["site-02"] == {"spent": 2.89, "cap": 3.0, "delta": 1e-5}
    assert found["final_metrics"]["accuracy"] == pytest.approx(0.5789, abs=1e-4)
    assert found["final_metrics"]["noised"] is True
    together = found["final_metrics"]["per_site"]["site-02"]
    assert (together["n"], together["accuracy"]) == (100, 0.58)
    low, high = together["interval_95"]["accuracy"]
    assert low < 0.58 < high
    assert found["rounds"][3]["code"] == "WR-5001"
    assert {"audit_verified", "wall_seconds", "peak_memory_bytes"} <= set(found)
    json.dumps(found, allow_nan=False)


def test_a_real_run_has_no_per_site_metrics_anywhere():
    real = result(simulated=False)
    texts = [json.dumps(metrics_json(real)), json.dumps(privacy_statement(real)), model_card(real)]
    for text in texts:
        assert "alone" not in text
        assert "together" not in text.replace("all of them together", "")
    assert "per_site" not in metrics_json(real)["final_metrics"]
    assert figures.sites(real) is None
    with pytest.raises(ValueError, match="simulation"):
        site_table(real)
    assert "alone" in model_card(result()), "the control: a simulation does show them"


@pytest.mark.parametrize(
    "override",
    [
        {"sites": (site(0),)},
        {"sites": (SiteResult("a", 1.0, None, None, 0, 0, patients=5),)},
        {"test": evaluation(5)},
        {"central": evaluation(5)},
    ],
)
def test_per_site_numbers_cannot_enter_a_real_runs_result(override):
    with pytest.raises(ValueError, match="simulation"):
        result(simulated=False, **override)


# ------------------------------------------------------------------------------ privacy


def test_the_privacy_statement_states_everything_it_must():
    found = privacy_statement(result())
    assert found["unit"] == "patient"
    assert found["relation"].startswith("add-or-remove-one")
    assert (found["epsilon_target"], found["epsilon_spent"], found["delta"]) == (3.0, 2.9, 1e-5)
    assert found["mechanism"] == {
        "name": "DP-SGD, Poisson sampling of patients, one clipped gradient per patient",
        "sampling_rate": 0.1,
        "expected_batch": 20.0,
        "noise_multiplier": 2.1782,
        "clip_norm": 1.0,
        "steps_per_round": 10,
        "rounds_reserved": 20,
        "steps_reserved": 200,
        "rounds_released": 19,
    }
    assert found["accountants"] == {"PLD": 2.999, "RDP": 3.21}
    assert found["evaluation"]["noise_multiplier"] == 6.219
    assert "Parallel between training and held-out" in found["composition"]
    assert found["randomness"].startswith("AES-256-CTR")
    assert len(found["protected"]) == 3
    assert "up to 1 of the other hospitals; 4 of 5" in found["protected"][2]["against"]
    assert any("masks hide its update too" in line for line in found["not_protected"])
    json.dumps(found, allow_nan=False)


def test_without_privacy_the_statement_promises_nothing():
    found = privacy_statement(result(private=False))
    assert found["guarantee"].startswith("None for patients")
    assert "unit" not in found
    assert "epsilon_target" not in found
    assert len(found["protected"]) == 1
    assert "**No differential privacy.**" in model_card(result(private=False))


@pytest.mark.parametrize(
    "missing", ["epsilon", "delta", "clip_norm", "noise_multiplier", "evaluation_noise"]
)
def test_a_private_run_cannot_leave_a_number_out(missing):
    with pytest.raises(ValueError, match="private"):
        dataclasses.replace(PRIVATE, **{missing: None})
    with pytest.raises(ValueError, match="without privacy"):
        dataclasses.replace(OPEN, **{missing: 1.0})


def test_an_infinite_answer_is_null_not_a_broken_file():
    facts = dataclasses.replace(PRIVATE, answers={"PLD": float("inf")})
    found = privacy_statement(result(privacy=facts))
    assert found["accountants"] == {"PLD": None}


# ------------------------------------------------------------------------ card and table


def test_the_card_says_what_the_model_is_and_costs():
    card = model_card(result())
    assert card.startswith("---\nlibrary_name: transformers\n")
    for line in (
        "# lungs",
        "**Simulation**: one machine played all hospitals.",
        "- Task: diagnosis, 3 labels: asthma, copd, other",
        "- Rounds: 19 of 20 completed, 1 aborted; 22 dropouts in all",
        "- Quorum: 4 of 5 hospitals, against 1 colluding ones",
        "- The coordinator saw 76 masked updates and 0 readable ones",
        "- Audit logs verified: yes",
        "- Cost: 33 s, 480 kB up, 1.2 GB peak memory",
        "- Spent: ε 2.86-2.90 of 3 by hospital (PLD 2.999, RDP 3.210)",
        "- Not a medical device. Check it on your own patients before any use.",
    ):
        assert line in card.splitlines()


def test_the_site_table_is_marked_and_compares_alone_with_together():
    table = site_table(result()).splitlines()
    assert table[0] == "## By hospital (simulation only)"
    rows = [line for line in table if line.startswith("| site")]
    assert len(rows) == 5
    assert rows[1].startswith("| site-02 | 201 | 100 | 0.570 (0.")
    assert "| 0.580 (0." in rows[1]
    assert rows[1].endswith("| 2.89 of 3 |")
    assert table[-1] == "| mean |  |  | 0.536 | 0.610 | - |  |"


def test_a_label_cannot_break_the_table():
    card = model_card(result(labels=("a|b", "c", "d")))
    assert "a\\|b" in card


# -------------------------------------------------------------------------------- files


def test_the_folder_holds_the_pieces(tmp_path):
    paths = write_report(tmp_path / "out", result())
    assert [p.relative_to(tmp_path / "out").as_posix() for p in paths] == [
        "metrics.json",
        "privacy.json",
        "MODEL_CARD.md",
        "plots/learning_curve.png",
        "plots/sites.png",
    ]
    assert json.loads(paths[0].read_text())["study"] == "lungs"
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.part")) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_report(tmp_path, result())
    before = (tmp_path / "metrics.json").read_bytes()

    def full(*_):
        raise OSError(28, "no space")

    monkeypatch.setattr(report.os, "fsync", full)
    with pytest.raises(StorageError) as caught:
        write_report(tmp_path, result(study="other"))
    assert caught.value.code is Code.REPORT_WRITE
    assert (tmp_path / "metrics.json").read_bytes() == before
    assert list(tmp_path.rglob("*.part")) == []


def picture(data):
    from matplotlib.image import imread

    return imread(io.BytesIO(data), format="png")


@pytest.mark.parametrize(
    "found",
    [
        result(),
        result(private=False),
        result(simulated=False),
        result(rounds=rounds(1), rounds_planned=1),
        result(rounds=(), final=None, central=None),
        result(rounds=rounds(20)[3:4]),
    ],
    ids=["simulated", "open", "real", "one round", "no round", "only aborted"],
)
def test_every_kind_of_run_has_a_learning_curve(found):
    image = picture(figures.learning_curve(found))
    assert image.shape[0] > 400
    assert image.shape[1] > 1000
    assert image.std() > 0.02, "the picture is not blank"
    assert "Quality" in model_card(found)


def test_the_same_run_gives_the_same_picture():
    assert figures.learning_curve(result()) == figures.learning_curve(result())
    other = result(rounds=rounds(20)[:10])
    assert figures.learning_curve(result()) != figures.learning_curve(other)


def test_sites_without_their_own_model_are_still_drawn():
    half = tuple(dataclasses.replace(s, alone=None) for s in result().sites)
    assert picture(figures.sites(result(sites=half))).std() > 0.02


def test_the_report_loads_no_drawing_library_before_it_draws():
    script = "import sys, server.report, server.figures, server.table; print({m.split('.')[0] for m in sys.modules} & {'matplotlib', 'rich', 'torch'})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
    assert Path(report.__file__).name == "report.py"
