"""`diagnosis` with an encoder of its own: what learns, and the terms that go with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.data.records import Record
from client.privacy.admission import admit
from client.tasks import notes
from client.tasks.kinds import code_of
from client.tasks.rows import rows_learner
from common.config import ConfigFileError, parse
from common.outcomes import Classes, LabelSet
from common.study import Study

torch.set_num_threads(1)
TASK = {
    "kind": "diagnosis",
    "labels": ["flu", "cold", "ulcer"],
    "max_tokens": 24,
    "encoder": {"vocabulary": "gb2312-level-1", "width": 8, "channels": 8, "kernels": [1, 2]},
}


def study(**terms):
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "notes",
            "task": TASK | terms,
            "privacy": {"mode": "local", "epsilon": 3, "delta": 1e-5, "clip_norm": 1.0},
            "sites": [{"id": "a"}, {"id": "b"}, {"id": "c"}],
        }
    )


def note(text):
    return Record("p", text, None, None, "notes.csv", 2)


def test_the_task_brings_its_own_code():
    task = study().task
    assert code_of(task) is notes
    assert not task.pretrained
    assert task.outcome == Classes(("flu", "cold", "ulcer"))
    assert study(several=True).task.outcome == LabelSet(("flu", "cold", "ulcer"))
    assert task.network_name == "text convolutions over gb2312-level-1"


def test_first_values_are_the_same_every_time_and_favour_no_label():
    task = study().task
    torch.manual_seed(1)
    first = notes.network(task)
    torch.manual_seed(2)
    second = notes.network(task).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.state_dict().items())
    assert not first(*notes.encode(task, notes.probes(task)).tensors).any()
    table = first.text.embedding.weight.detach()
    assert float(table[1:].std()) == pytest.approx(0.2, rel=0.05)
    assert not table[0].any()


@pytest.mark.parametrize("terms", [{}, {"several": True}, {"encoder": {"buckets": 64}}])
def test_it_is_admitted_by_the_quick_engine(terms):
    made = study(**terms)
    learner = rows_learner(notes, made, notes.probes(made.task), (), device=torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in learner.module.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    assert admit(learner).startswith("bookkeeping")


def test_stop_words_and_stems_are_taken_out_before():
    plain = study(encoder={"buckets": 500}).task
    cleaned = study(encoder={"buckets": 500}, stop_words="english", stemming="english").task
    (all_words,) = notes.encode(plain, [note("the fevers and the coughs")]).tensors
    (left,) = notes.encode(cleaned, [note("the fevers and the coughs")]).tensors
    (bare,) = notes.encode(plain, [note("fever cough")]).tensors
    assert torch.equal(left, bare)
    assert np.count_nonzero(all_words) == 5


def test_the_architecture_is_what_the_bundle_names():
    task = study().task
    digest, told = notes.architecture(task)
    assert "wardround-notes/1" in told
    assert notes.architecture(study(max_notes=3).task)[0] == digest
    for other in ({"max_tokens": 30}, {"labels": ["a", "b", "c"]}, {"several": True}):
        assert notes.architecture(study(**other).task)[0] != digest


BASE = """\
format: wardround-study/1
name: trial
task: {kind: diagnosis, labels: [flu, cold]%s}
%sprivacy: {mode: none}
sites: [{id: a}, {id: b}, {id: c}]
"""


@pytest.mark.parametrize(
    ("task", "model", "told"),
    [
        ("", "", "model: is missing"),
        (", encoder: {}", "model: {backbone: x}\n", "model: has no effect"),
        (", encoder: {vocabulary: gbk}", "", "vocabulary"),
        (", encoder: {kernels: [9]}", "", "kernels"),
        (", encoder: {}, long_notes: window", "", "long_notes: must be truncate"),
    ],
)
def test_terms_that_cannot_be_meant_are_refused(task, model, told):
    with pytest.raises(ConfigFileError) as caught:
        parse(BASE % (task, model), "study.yaml", Study)
    assert told in str(caught.value)


def test_a_label_may_not_hold_what_parts_labels():
    text = BASE.replace("[flu, cold]", "[flu;a, cold]")
    assert parse(text % (", encoder: {}", ""), "study.yaml", Study).labels[0] == "flu;a"
    with pytest.raises(ConfigFileError) as caught:
        parse(text % (", encoder: {}, several: true", ""), "study.yaml", Study)
    assert "task.labels.0: has a semicolon" in str(caught.value)
