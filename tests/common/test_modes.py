"""Both modes side by side: the same steps, what differs, and what is recommended."""

from __future__ import annotations

import math

import pytest

from common.modes import compare, render_comparison
from common.plan import plan
from common.study import Study

SITES = tuple({"id": f"site-{i:02d}"} for i in range(10))


def study(mode="local", **override):
    steps = {"rounds": 4, "local_steps": 5} if mode == "local" else {"rounds": 20, "local_steps": 1}
    base = {
        "format": "wardround-study/1",
        "name": "demo",
        "task": {"kind": "diagnosis", "labels": ("a", "b")},
        "model": {"backbone": "package:x/y"},
        "training": {**steps, "sampling_rate": 0.5, "expected_batch": 50.0, "spare_rounds": 0},
        "privacy": {"mode": mode, "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0},
        "evaluation": {"every": 2},
        "sites": SITES,
    }
    return Study.model_validate({**base, **override})


def compared(chosen, parameters=1000):
    return compare(chosen, plan(chosen, parameters))


def test_both_modes_make_the_same_steps_for_the_same_epsilon():
    for chosen in (study(), study("joint")):
        joint, local = compared(chosen).modes
        assert (joint.mode, local.mode) == ("joint", "local")
        assert joint.steps == local.steps == 20
        assert joint.noise_multiplier == local.noise_multiplier
        assert joint.epsilon <= 3.0
        assert local.epsilon <= 3.0
        ratio = local.noise_to_signal / joint.noise_to_signal
        assert ratio == pytest.approx(math.sqrt(chosen.honest(10)))


def test_joint_is_recommended_unless_its_rounds_would_not_fit_the_line():
    assert compared(study()).recommended == "joint"
    heavy = compared(study(), parameters=2_000_000_000)
    assert heavy.recommended == "local"
    assert "lora" in heavy.reason


def test_a_larger_quorum_buys_less_noise_for_fewer_dropouts():
    rows = compared(study("joint")).quorums
    assert sum(row.chosen for row in rows) == 1
    (chosen,) = [row for row in rows if row.chosen]
    assert (chosen.colluders, chosen.quorum, chosen.honest, chosen.dropouts) == (3, 7, 4, 3)
    assert chosen.noise == pytest.approx(math.sqrt(10 / 4))
    same = sorted((row.quorum, row.noise) for row in rows if row.colluders == 3)
    assert [q for q, _ in same] == [7, 8, 9, 10]
    assert [n for _, n in same] == sorted((n for _, n in same), reverse=True)
    fewer = [row for row in rows if row.colluders == 1]
    assert fewer
    assert all(row.noise < chosen.noise for row in fewer)


def test_no_privacy_has_nothing_to_compare():
    chosen = study(privacy={"mode": "none"})
    assert compared(chosen) is None


def test_weights_and_proximal_terms_of_a_local_study_are_left_out_of_its_joint_form():
    sites = ({**SITES[0], "weight": 2.0}, *SITES[1:])
    training = {**study().training.model_dump(), "proximal": 0.1}
    assert compared(study(sites=sites, training=training)).modes[0].mode == "joint"


def test_the_table_marks_the_study_and_ends_with_the_recommendation():
    text = render_comparison(compared(study("joint")))
    assert text.count("this study") == 1
    assert "recommended: joint: 2.0 times less noise" in text
