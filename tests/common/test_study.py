"""The study: bounds, rules across keys, and the signed terms."""

from __future__ import annotations

import pytest

from common.config import ConfigFileError, parse
from common.crypto.digest import encode
from common.study import MAX_SITES, Fault, Site, Study, simulated_sites

BASE = """\
format: wardround-study/1
name: trial
task: {kind: diagnosis, labels: [flu, cold]}
model: {backbone: hub/model}
privacy: {mode: local, epsilon: 3, delta: 1e-5, clip_norm: 1}
"""
JOINT = BASE.replace("local", "joint")
STEP = "training: {local_steps: 1}\n"
SITES = "sites: [{id: a}, {id: b}, {id: c}]\n"
FIVE = "sites: [{id: a}, {id: b}, {id: c}, {id: d}, {id: e}]\n"
SIMULATION = "simulation:\n  data: {files: [f.csv]}\n"


def study(text: str) -> Study:
    return parse(text, "study.yaml", Study)


def complaint(text: str) -> str:
    with pytest.raises(ConfigFileError) as caught:
        study(text)
    (problem,) = caught.value.problems
    return f"{problem.line}:{problem.column}: {problem.where}: {problem.message}"


def test_a_minimal_study_needs_six_lines() -> None:
    made = study(BASE + SITES)
    assert made.party_count == 3
    assert made.quorum_size(3) == 3
    assert made.colluders(3) == 1
    assert made.ring_bits == 24
    assert made.task.columns.patient == "patient"


SIM = BASE + SIMULATION
RULES = [
    (BASE, "1:1: sites: is missing: list the hospitals, or describe a simulation"),
    (
        BASE + "sites: [{id: a}, {id: b}]\n",
        "6:8: sites: must list at least 3 hospitals (got 2)",
    ),
    (BASE + "sites: [{id: a}, {id: b}, {id: a}]\n", "6:32: sites.2.id: is listed twice"),
    (
        BASE + SITES + "quorum: {colluders: 2}\n",
        (
            "7:21: quorum.colluders: must be at most 1 of 3 hospitals: a sum over fewer than two "
            "honest ones hides nothing (got 2)"
        ),
    ),
    (
        BASE + SITES + "quorum: {colluders: 0}\n",
        "7:21: quorum.colluders: must be at least 1 (got 0)",
    ),
    (
        BASE.replace("[flu, cold]", "[flu, cold, flu]") + SITES,
        "3:45: task.labels.2: is listed twice",
    ),
    (
        BASE.replace("[flu, cold]", "[flu, ' cold']") + SITES,
        "3:39: task.labels.1: must be printable text without spaces at its ends",
    ),
    (
        BASE.replace("cold]", "cold], columns: {text: patient}") + SITES,
        "3:62: task.columns.text: is also the patient column",
    ),
    (
        BASE.replace("cold]", "cold], long_notes: window, max_tokens: 64") + SITES,
        (
            "3:1: task.window_stride: must be less than max_tokens (64), or tokens between two windows "
            "are never read (is 64)"
        ),
    ),
    (
        BASE.replace("clip_norm: 1", "clip_norm: 1, evaluation_epsilon: 4") + SITES,
        "5:83: privacy.evaluation_epsilon: must not be more than epsilon (got 4.0 of 3.0)",
    ),
    (
        BASE.replace("mode: local, epsilon: 3, delta: 1e-5, clip_norm: 1", "mode: none, epsilon: 3")
        + SITES,
        "5:32: privacy.epsilon: has no effect with mode: none; remove it",
    ),
    (
        BASE.replace("clip_norm: 1", "clip_norm: 1, noise_multiplier: 0") + SITES,
        "5:81: privacy.noise_multiplier: must be greater than 0 (got 0)",
    ),
    (
        BASE + SITES + "training: {sampling_rate: 1.1}\n",
        "7:27: training.sampling_rate: must be at most 1 (got 1.1)",
    ),
    (
        BASE + SITES + "training: {sampling_rate: 0}\n",
        "7:27: training.sampling_rate: must be greater than 0 (got 0)",
    ),
    (
        BASE + SITES + "training: {expected_batch: 0}\n",
        "7:28: training.expected_batch: must be greater than 0 (got 0)",
    ),
    (
        BASE + SITES + "training: {optimizer: {momentum: 0.9}}\n",
        "7:34: training.optimizer.momentum: has no effect with name: adamw; remove it",
    ),
    (
        BASE + SITES + "evaluation: {every: 21}\n",
        "7:21: evaluation.every: is more than training.rounds (20): nothing would be measured",
    ),
    (
        SIM + "  split: {by: column}\n",
        "8:3: simulation.split.column: is needed with by: column",
    ),
    (
        SIM + "  split: {by: column, column: h, sites: 4}\n",
        (
            "8:41: simulation.split.sites: has no effect with by: column, where the data says which "
            "hospitals there are; remove it"
        ),
    ),
    (
        SIM + "  split: {by: iid}\n",
        "8:3: simulation.split.sites: is needed with by: iid where the study lists no sites",
    ),
    (
        SIM + SITES.replace("sites", "  split: {by: iid, sites: 4}\nsites"),
        "8:27: simulation.split.sites: differs from the 3 sites that the study lists",
    ),
    (
        SIM + "  split: {by: dirichlet, sites: 4}\n",
        "8:3: simulation.split.alpha: is needed with by: dirichlet",
    ),
    (
        SIM + "  split: {by: dirichlet, sites: 4, alpha: 0}\n",
        "8:43: simulation.split.alpha: must be greater than 0 (got 0)",
    ),
    (
        SIM + "  split: {by: iid, sites: 4, alpha: 1}\n",
        "8:37: simulation.split.alpha: has no effect with by: iid; remove it",
    ),
    (
        SIM + "  split: {by: pathological, sites: 4, classes_per_site: 3}\n",
        "8:57: simulation.split.classes_per_site: is more than the 2 labels",
    ),
    (
        SIM + "  split: {by: iid, sites: 5}\n  dropouts_per_round: 2\n",
        (
            "9:23: simulation.dropouts_per_round: is more than the 1 that the quorum can spare: no "
            "round would end"
        ),
    ),
    (
        SIM + "  split: {by: iid, sites: 5}\n  faults: [{round: 21, site: site-01, fault: drop}]\n",
        "9:20: simulation.faults.0.round: is after the last round (20)",
    ),
    (
        SIM + "  split: {by: iid, sites: 5}\n  faults: [{round: 1, site: site-06, fault: drop}]\n",
        "9:29: simulation.faults.0.site: is not a site of the study",
    ),
    (
        BASE + FIVE + "quorum: {colluders: 1, survivors: 3}\n",
        (
            "7:35: quorum.survivors: must lie between 4, which withstands 1 colluders, and the 5 "
            "hospitals (got 3)"
        ),
    ),
    (
        BASE + FIVE + "quorum: {survivors: 6}\n",
        (
            "7:21: quorum.survivors: must lie between 4, which withstands 1 colluders, and the 5 "
            "hospitals (got 6)"
        ),
    ),
    (
        JOINT + SITES,
        (
            "1:1: training.local_steps: must be 1 with privacy.mode: joint, where a round is one "
            "step (got 10)"
        ),
    ),
    (
        JOINT + SITES + "training: {local_steps: 1, optimizer: {learning_rate: 2}}\n",
        (
            "7:39: training.optimizer: has no effect with privacy.mode: joint, where only the "
            "server's optimiser steps; remove it"
        ),
    ),
    (
        JOINT + SITES + "training: {local_steps: 1, proximal: 0.1}\n",
        (
            "7:38: training.proximal: has no effect with privacy.mode: joint, where only the "
            "server's optimiser steps; remove it"
        ),
    ),
    (
        JOINT + SITES + STEP + "aggregation: {ring_bits: 24}\n",
        ("8:26: aggregation.ring_bits: must be 32 with privacy.mode: joint, or be left out"),
    ),
    (
        JOINT + SITES.replace("{id: b}", "{id: b, weight: 0.5}") + STEP,
        "6:34: sites.1.weight: must be 1 with privacy.mode: joint: every patient counts alike",
    ),
    (
        JOINT.replace("epsilon: 3, ", "") + SITES + STEP,
        "5:1: privacy.epsilon: is needed with mode: joint",
    ),
    (
        BASE.replace(
            "mode: local, epsilon: 3, delta: 1e-5, clip_norm: 1", "mode: none, engine: opacus"
        )
        + SITES,
        "5:31: privacy.engine: has no effect with mode: none; remove it",
    ),
    (
        SIM + "  split: {by: iid, sites: 5}\n  faults: [{round: 1, site: site-01, fault: nap}]\n",
        "9:45: simulation.faults.0.fault: must be 'drop' or 'crash' (got 'nap')",
    ),
]


@pytest.mark.parametrize(("text", "message"), RULES)
def test_a_study_that_breaks_a_rule_is_refused_at_the_key(text: str, message: str) -> None:
    assert complaint(text) == message


def test_what_the_rules_refuse_is_accepted_one_step_inside_the_bound() -> None:
    study(BASE + FIVE + "quorum: {colluders: 3}\n")
    study(BASE + SITES + "training: {sampling_rate: 1}\nevaluation: {every: 20}\n")
    study(SIM + "  split: {by: iid, sites: 5}\n  dropouts_per_round: 1\n")
    study(SIM + "  split: {by: pathological, sites: 4, classes_per_site: 2}\n")
    study(SIM + "  split: {by: column, column: h}\n")
    study(JOINT + SITES + STEP + "aggregation: {ring_bits: 32}\n")


def test_a_joint_study_has_the_wide_ring_and_counts_on_the_quorum_without_the_colluders() -> None:
    made = study(JOINT + FIVE + STEP + "quorum: {colluders: 1, survivors: 5}\n")
    assert made.ring_bits == 32
    assert (made.quorum_size(5), made.colluders(5), made.honest(5)) == (5, 1, 4)
    least = study(JOINT + FIVE + STEP)
    assert (least.quorum_size(5), least.honest(5)) == (4, 3)


def test_more_sites_than_shares_have_coordinates_are_refused() -> None:
    sites = ", ".join(f"{{id: s{i}}}" for i in range(MAX_SITES + 1))
    assert "must list at most 255" in complaint(f"{BASE}sites: [{sites}]\n")


def test_the_signed_terms_have_a_canonical_encoding() -> None:
    terms = study(BASE + SITES).terms()
    assert encode(terms)  # type: ignore[arg-type]
    assert terms["privacy"]["delta"] == "1e-05"  # type: ignore[index,call-overload]
    assert terms["privacy"]["noise_multiplier"] == "none"  # type: ignore[index,call-overload]
    assert terms["model"]["freeze_embeddings"] == "true"  # type: ignore[index,call-overload]
    assert terms["sites"][0] == {"id": "a", "weight": "1.0"}  # type: ignore[index]


def test_the_simulation_is_not_part_of_the_signed_terms() -> None:
    plain = study(BASE + FIVE)
    played = study(BASE + FIVE + SIMULATION + "  split: {by: iid}\n  seed: 7\n")
    assert plain != played
    assert plain.terms() == played.terms()
    assert "simulation" not in plain.terms()


CHANGES = [
    ("name: trial", "name: trial2"),
    ("flu, cold", "cold, flu"),
    ("hub/model", "hub/model2"),
    ("epsilon: 3", "epsilon: 3.0000001"),
    ("1e-5", "1.1e-5"),
    ("{id: b}", "{id: b, weight: 2}"),
    ("{id: b}", "{id: bb}"),
    (SITES, SITES + "quorum: {colluders: 1}\n"),
    (SITES, SITES + "aggregation: {ring_bits: 32}\n"),
    (SITES, SITES + "aggregation: {average: 0.9}\n"),
    (SITES, SITES + "quorum: {survivors: 3}\n"),
    ("clip_norm: 1", "clip_norm: 1, engine: opacus"),
    (SITES, SITES + "deadlines: {train_s: 5}\n"),
]


@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_every_other_change_changes_the_signed_terms(old: str, new: str) -> None:
    text = BASE + SITES
    assert text.count(old) == 1
    changed = study(text.replace(old, new)).terms()
    assert encode(changed) != encode(study(text).terms())  # type: ignore[arg-type]


def test_the_signed_terms_hold_every_field_but_the_simulation() -> None:
    assert set(study(BASE + SITES).terms()) == set(Study.model_fields) - {"simulation"}


def test_writing_a_whole_number_as_a_decimal_does_not_change_the_terms() -> None:
    text = BASE + SITES
    assert study(text.replace("epsilon: 3", "epsilon: 3.0")).terms() == study(text).terms()


def test_a_simulation_becomes_a_study_with_sites_and_keeps_its_terms() -> None:
    played = study(SIM + "  split: {by: column, column: hospital}\n")
    assert played.party_count is None
    resolved = played.with_sites([Site(id=name) for name in ("a", "b", "c")])
    assert resolved.terms() == study(BASE + SITES).terms()
    with pytest.raises(ValueError, match="at least 3"):
        played.with_sites([Site(id="a")])


def test_simulated_sites_have_valid_ascending_names() -> None:
    names = simulated_sites(255)
    assert names == tuple(sorted(names))
    assert names[0] == "site-001"
    assert simulated_sites(3) == ("site-01", "site-02", "site-03")
    for name in names:
        Fault(round=1, site=name, fault="drop")


def test_every_key_of_a_study_is_described() -> None:
    def undescribed(schema: dict, path: str) -> list[str]:
        return [
            f"{path}.{key}"
            for key, field in schema.get("properties", {}).items()
            if not field.get("description")
        ]

    schema = Study.model_json_schema()
    missing = undescribed(schema, "Study")
    for name, part in schema["$defs"].items():
        missing += undescribed(part, name)
    assert missing == []
