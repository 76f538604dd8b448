"""The plan: the numbers a person agrees to before anything runs."""

from __future__ import annotations

import json
import math

import pytest

from common.accountant import DpEvent, epsilon
from common.errors import Code, ConfigError
from common.plan import CostModel, evaluation_rounds, message_bytes, plan, render
from common.study import Study

PATIENTS = {f"site-{i:02d}": 250 for i in range(10)}


TRAINING = {
    "rounds": 4,
    "local_steps": 5,
    "sampling_rate": 0.1,
    "expected_batch": 20.0,
    "spare_rounds": 1,
}


def study(**override):
    base = {
        "format": "wardround-study/1",
        "name": "demo",
        "task": {"kind": "diagnosis", "labels": ("a", "b", "c", "d", "e")},
        "model": {"backbone": "package:x/y"},
        "training": TRAINING,
        "privacy": {"mode": "local", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0},
        "evaluation": {"every": 2},
        "sites": tuple({"id": site} for site in PATIENTS),
    }
    return Study.model_validate({**base, **override})


def test_sigma_is_solved_for_all_rounds_and_the_spare_ones():
    found = plan(study(), 1925)
    training = found.training
    assert training.solved
    assert training.spare_rounds == 1
    assert training.epsilon <= 3.0
    assert training.epsilon == epsilon([DpEvent(training.noise_multiplier, 0.1, 25)], 1e-5)
    assert epsilon([DpEvent(training.noise_multiplier * 0.99, 0.1, 25)], 1e-5) > 3.0
    assert [r for r, _ in training.curve] == [1, 2, 3, 4]
    assert [e for _, e in training.curve] == sorted(e for _, e in training.curve)
    assert training.curve[-1][1] == epsilon([DpEvent(training.noise_multiplier, 0.1, 20)], 1e-5)
    assert training.curve[-1][1] < training.epsilon
    assert training.budget_rounds == 5


def test_without_spare_rounds_the_curve_ends_at_the_budget():
    training = plan(study(training={**TRAINING, "spare_rounds": 0}), 1925).training
    assert training.curve[-1][1] == training.epsilon
    assert 2.99 < training.epsilon <= 3.0
    assert training.budget_rounds == 4


def test_the_quorum_is_the_studys():
    found = plan(study(), 1925)
    assert (found.parties, found.quorum, found.dropouts_tolerated, found.colluders_tolerated) == (
        10,
        7,
        3,
        3,
    )
    one = plan(study(quorum={"colluders": 1}), 1925)
    assert (one.quorum, one.dropouts_tolerated, one.colluders_tolerated) == (6, 4, 1)


def test_a_given_sigma_that_spends_too_much_says_when_hospitals_refuse():
    privacy = {
        "mode": "local",
        "epsilon": 2.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "noise_multiplier": 1.2,
    }
    found = plan(study(privacy=privacy), 1925)
    assert not found.training.solved
    assert found.training.epsilon > 2.0
    rounds = found.training.budget_rounds
    assert all((e <= 2.0) == (r <= rounds) for r, e in found.training.curve)
    assert 1 <= rounds < 4
    assert any(f"refuse after {rounds} rounds" in w for w in found.warnings)


def test_evaluation_is_charged_to_held_out_patients_and_defaults_to_the_studys_epsilon():
    found = plan(study(), 1925, patients=PATIENTS)
    evaluation = found.evaluation
    assert evaluation.rounds == (2, 4)
    assert evaluation.words == 26
    assert evaluation.epsilon <= 3.0
    assert evaluation.epsilon == epsilon([DpEvent(evaluation.noise_multiplier, 1.0, 3)], 1e-5)
    assert evaluation.count_noise == pytest.approx(
        evaluation.noise_multiplier * math.sqrt(2) * math.sqrt(10)
    )
    assert evaluation.score_noise == pytest.approx(evaluation.count_noise * 2.5 / 500)
    given = plan(
        study(
            privacy={
                "mode": "local",
                "epsilon": 3.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "evaluation_epsilon": 1.0,
            }
        ),
        1925,
    )
    assert 0.99 < given.evaluation.epsilon <= 1.0


def test_the_last_round_is_always_measured():
    for rounds, every, expected in (
        (5, 2, (2, 4, 5)),
        (4, 2, (2, 4)),
        (3, 1, (1, 2, 3)),
        (1, 1, (1,)),
    ):
        given = study(training={**TRAINING, "rounds": rounds}, evaluation={"every": every})
        assert evaluation_rounds(given) == expected


def test_an_acceptance_gate_measures_the_initial_model_too_and_pays_for_it():
    gated = study(evaluation={"every": 1}, acceptance={"tolerance": 0.2})
    plain = study(evaluation={"every": 1})
    assert evaluation_rounds(gated) == (0, 1, 2, 3, 4)
    noise = [plan(s, 1925).evaluation.noise_multiplier for s in (gated, plain)]
    assert noise[0] > noise[1]


def test_a_tolerance_below_the_noise_is_warned_about():
    def told(tolerance):
        gated = study(evaluation={"every": 1}, acceptance={"tolerance": tolerance})
        return [w for w in plan(gated, 1925, patients=PATIENTS).warnings if "acceptance" in w]

    assert told(0.01)
    assert not told(0.99)


def test_without_privacy_nothing_is_promised_and_it_says_so():
    found = plan(study(privacy={"mode": "none"}), 1925)
    assert found.training is None
    assert found.evaluation.noise_multiplier is None
    assert any("nothing is promised" in w for w in found.warnings)
    assert "no promise to a patient" in render(found)


def test_the_bytes_are_the_stated_formula():
    up, down = message_bytes(10)
    narrow, wide = plan(study(), 100_000), plan(study(aggregation={"ring_bits": 32}), 100_000)
    assert narrow.bytes_up == 300_000 + 8 * 26 + up
    assert narrow.bytes_down == 300_000 + 8 * 26 + down
    assert wide.bytes_up - narrow.bytes_up == 100_000
    assert plan(study(), 110_000_000).bytes_up == pytest.approx(3 * 110e6, rel=1e-3)


def test_the_seconds_follow_the_cost_model():
    cost = CostModel(flops=1e9, mask_bytes=1e9, link_bytes=1e6, fixed=0.5)
    found = plan(study(), 1_000_000, cost=cost)
    assert found.seconds_training == pytest.approx(0.5 + 6e6 * 5 * 20 / 1e9)
    assert found.seconds_masking == pytest.approx(4e6 * 12 / 1e9)
    assert found.seconds_network == pytest.approx((found.bytes_up + found.bytes_down) / 1e6)
    assert (
        found.seconds_per_round
        == found.seconds_training + found.seconds_masking + found.seconds_network
    )
    lora = study(model={"backbone": "x", "tuning": "lora"})
    slow = plan(lora, 1_000, backbone_parameters=22_000_000, cost=cost)
    assert slow.seconds_training == pytest.approx(0.5 + 6 * 22e6 * 128 * 100 / 1e9)


def test_patients_that_do_not_fit_the_batch_are_named():
    fitting = plan(study(), 1925, patients=PATIENTS)
    assert not any("suits about" in w for w in fitting.warnings), "the control: 200 patients fit"
    odd = plan(study(), 1925, patients={**PATIENTS, "site-03": 60, "site-07": 900})
    (warning,) = [w for w in odd.warnings if "suits about" in w]
    assert "200 training patients" in warning
    assert "site-03 (48), site-07 (720)" in warning


def test_noise_that_drowns_the_signal_is_named():
    small, large = plan(study(), 1925), plan(study(), 1_000_000)
    assert not any("times the largest signal" in w for w in small.warnings)
    assert any("times the largest signal" in w for w in large.warnings)
    ratio = small.training.noise_multiplier * math.sqrt(1925) / (20 * math.sqrt(10 * 5))
    assert small.training.noise_to_signal == pytest.approx(ratio)


def test_a_quorum_without_spare_hospitals_is_named():
    three = study(sites=tuple({"id": s} for s in ("a", "b", "c")))
    assert any("no hospital may drop out" in w for w in plan(three, 10).warnings)
    assert not any("no hospital may drop out" in w for w in plan(study(), 10).warnings)


def test_a_target_no_noise_can_reach_is_refused(monkeypatch):
    def hopeless(*_, **__):
        raise ValueError("no")

    monkeypatch.setattr("common.plan.solve_noise_multiplier", hopeless)
    with pytest.raises(ConfigError) as caught:
        plan(study(), 1925)
    assert caught.value.code is Code.PLAN_IMPOSSIBLE


def test_hospitals_that_only_the_data_names_must_be_given():
    simulation = {"data": {"files": ("x.csv",)}, "split": {"by": "column", "column": "hospital"}}
    unnamed = study(sites=(), simulation=simulation)
    with pytest.raises(ConfigError):
        plan(unnamed, 1925)
    assert plan(unnamed, 1925, sites=("a", "b", "c", "d")).quorum == 3


def test_the_rendered_plan_is_a_table_with_the_numbers():
    found = plan(study(), 1925, patients=PATIENTS)
    lines = render(found).splitlines()
    assert lines[0] == "Plan of study demo"
    assert "  quorum               7 of 10" in lines
    assert "  patients             2500 in all, 250 to 250 per hospital" in lines
    assert f"  noise multiplier     {found.training.noise_multiplier:g} (solved)" in lines
    assert max(map(len, lines)) <= 160


def test_the_json_is_plain_and_finite():
    text = json.dumps(plan(study(), 1925, patients=PATIENTS).to_json(), allow_nan=False)
    assert json.loads(text)["training"]["epsilon"] <= 3.0


def test_a_long_study_shows_about_fifty_points():
    long = study(
        training={"rounds": 1000, "local_steps": 1, "sampling_rate": 1.0, "expected_batch": 200.0}
    )
    curve = plan(long, 1925).training.curve
    assert len(curve) <= 52
    assert (curve[0][0], curve[-1][0]) == (1, 1000)


# ------------------------------------------------------------------------------ joint


def joint(**override):
    training = {
        "rounds": 20,
        "local_steps": 1,
        "sampling_rate": 0.5,
        "expected_batch": 100.0,
        "spare_rounds": 1,
    }
    privacy = {"mode": "joint", "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
    return study(**{"training": training, "privacy": privacy, **override})


def test_joint_noise_is_solved_against_the_colluders_and_stated_against_three_audiences():
    found = plan(joint(), 1925)
    sigma = found.training.noise_multiplier
    assert (found.quorum, found.colluders_tolerated, found.joint.honest) == (7, 3, 4)
    assert found.ring_bits == 32
    told = {audience.name: audience for audience in found.joint.audiences}
    assert list(told) == ["coordinator", "colluders", "all_others"]
    for name, factor in (
        ("coordinator", math.sqrt(7 / 4)),
        ("colluders", 1.0),
        ("all_others", 0.5),
    ):
        assert told[name].epsilon == epsilon([DpEvent(sigma * factor, 0.5, 21)], 1e-5)
    assert told["colluders"].epsilon == found.training.epsilon <= 3.0
    assert told["coordinator"].epsilon < 3.0 < told["all_others"].epsilon


def test_joint_noise_is_smaller_by_the_root_of_the_honest_hospitals():
    one = joint()
    local = study(training=one.training.model_dump())
    ratio = plan(local, 1925).training.noise_to_signal / plan(one, 1925).training.noise_to_signal
    assert ratio == pytest.approx(math.sqrt(4))
    more = joint(quorum={"colluders": 1, "survivors": 9})
    assert plan(more, 1925).joint.honest == 8
    less = plan(local, 1925).training.noise_to_signal / plan(more, 1925).training.noise_to_signal
    assert less == pytest.approx(math.sqrt(8))


def test_too_few_patients_for_the_noise_are_told_how_many_are_needed():
    few = dict.fromkeys(PATIENTS, 40)
    (warning,) = [
        w for w in plan(joint(), 100_000, patients=few).warnings if "would make them equal" in w
    ]
    needed = int(warning.split("about ")[1].split(" patients")[0].replace(",", ""))
    enough = dict.fromkeys(PATIENTS, needed + 1)
    assert not [
        w for w in plan(joint(), 100_000, patients=enough).warnings if "would make them equal" in w
    ]
    short = {site: int(needed * 0.98) for site in PATIENTS}
    assert [
        w for w in plan(joint(), 100_000, patients=short).warnings if "would make them equal" in w
    ]


def test_a_ring_without_room_for_the_noise_is_refused_at_the_plan():
    training = {**joint().training.model_dump(), "expected_batch": 1e6}
    with pytest.raises(ConfigError) as caught:
        plan(joint(training=training), 110_000_000)
    assert caught.value.code is Code.JOINT_RING


def test_a_joint_study_that_nobody_could_reserve_is_refused_at_the_plan():
    privacy = joint().privacy.model_dump()
    with pytest.raises(ConfigError) as caught:
        plan(joint(privacy={**privacy, "noise_multiplier": 1.0}), 1925)
    assert caught.value.code is Code.PLAN_IMPOSSIBLE
    assert "of 3" in caught.value.message
    assert plan(joint(privacy={**privacy, "noise_multiplier": 50.0}), 1925).training.epsilon < 3


def test_a_coarse_grid_is_said():
    training = {**joint().training.model_dump(), "expected_batch": 20_000.0, "sampling_rate": 1.0}
    found = plan(joint(training=training), 10_000_000)
    assert found.joint.rounding > 0.02
    assert [w for w in found.warnings if w.startswith("the grid of the ring")]
    assert not [w for w in plan(joint(), 1925).warnings if w.startswith("the grid")]


def test_statistics_and_steps_of_a_joint_study_fit_wherever_rounds_burn():
    features = tuple({"name": f"f{i}", "low": 0.0, "high": 1.0} for i in range(3))
    task = {"kind": "tabular", "labels": ("a", "b"), "features": features}
    found = plan(joint(task=task, model=None), 8)
    events = [
        DpEvent(found.training.noise_multiplier, 0.5, 21),
        DpEvent(found.statistics.noise_multiplier, 1.0, 2),
    ]
    assert epsilon(events, 1e-5) == found.training.epsilon <= 3.0


def test_the_rendered_plan_says_against_whom_joint_noise_holds():
    text = render(plan(joint(), 1925))
    assert "joint: one noise for all hospitals" in text
    assert "the coordinator with 3 of 10 hospitals" in text
    assert "the coordinator with all 9 other hospitals" in text
    assert "each hospital's own noise" in render(plan(study(), 1925))


def test_patients_with_more_notes_than_are_read_are_told_by_hospital():
    many = plan(study(), 1925, patients=PATIENTS, crowded={"site-03": 2, "site-01": 1}).warnings
    assert many[-1] == "patients with more than 64 notes, the rest unread: site-01 (1), site-03 (2)"
    assert not [w for w in plan(study(), 1925, patients=PATIENTS).warnings if "unread" in w]
