"""The medication network: private by construction, the same everywhere, and it learns."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from client.data.records import Record
from client.knowledge import visits
from client.knowledge.files import write_edges
from client.knowledge.graph import Edge, KnowledgeGraph, Node, Source
from client.knowledge.shelf import read_knowledge
from client.privacy.admission import admit
from client.tasks import medication
from client.tasks.rows import RowsLearner
from common.errors import Code, DataError, RefusedError
from common.tasks.medication import MedicationTask

torch.set_num_threads(1)

LABELS = ("C07A", "N02B", "A02B")
CODES = ("icd9:401.9", "icd9:401", "icd9:428", "icd10:I10", "icd10:chapters", "word")
FREE = Source("a table", "CC0-1.0")
EDGES = [
    Edge(Node("disease", "DOID:10763"), "coded_as", Node("icd9", "401"), (FREE,)),
    Edge(Node("atc", "C07AB02"), "treats", Node("disease", "DOID:10763"), (FREE,)),
]


@pytest.fixture
def graph(tmp_path):
    write_edges(tmp_path / "kg.tsv", EDGES)
    found = {"files": ["kg.tsv"], "digest": KnowledgeGraph(EDGES).digest, "width": 8}
    read_knowledge(task(graph=found), tmp_path)
    return found


def task(**more):
    given = {"kind": "medication", "labels": LABELS, "codes": CODES, "max_codes": 8, "width": 8}
    return MedicationTask.model_validate({**given, **more})


def record(patient, codes, labels=()):
    return Record(patient, "", None, None, "visits", 2, codes=tuple(codes), labels=tuple(labels))


def learner(of, records, mode="joint"):
    study = SimpleNamespace(
        task=of,
        feature_count=0,
        evaluation=SimpleNamespace(loss_cap=8.0, score_bins=0, threshold=0.5),
        privacy=SimpleNamespace(mode=mode),
    )
    return RowsLearner(medication, study, records, (), device=torch.device("cpu"))


def stirred(module):
    """Every parameter away from its first value, so that no gradient is zero by symmetry."""
    stream = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=stream))
    return module


# ---------------------------------------------------------------------- privacy


@pytest.mark.parametrize("kind", ["bookkeeping", "opacus"])
@pytest.mark.parametrize("more", [{}, {"layers": 2, "objective": "mse"}])
def test_the_network_is_admitted(kind, more):
    of = task(**more)
    tried = learner(of, medication.probes(of))
    stirred(tried.module)
    assert kind in admit(tried, kind=kind)


def test_the_network_with_a_graph_is_admitted_by_the_fast_engine(graph):
    of = task(graph=graph)
    tried = learner(of, medication.probes(of))
    stirred(tried.module)
    assert admit(tried).startswith("bookkeeping")


def test_a_network_whose_visits_see_each_other_is_refused():
    of = task()
    tried = learner(of, medication.probes(of))

    class Mixed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, codes):
            found = self.inner(codes)
            return found + found.mean(0, keepdim=True)

    tried.module = Mixed(stirred(tried.module))
    tried.trainable = lambda: dict(sorted(tried.module.named_parameters()))
    with pytest.raises(RefusedError):
        admit(tried)


def test_a_visits_answer_depends_on_its_own_codes_alone():
    of = task()
    module = stirred(medication.network(of)).eval()
    (whole,) = medication.encode(of, medication.probes(of)).tensors
    with torch.no_grad():
        together = module(whole)
        alone = torch.cat([module(row[None]) for row in whole])
        others = whole.flip(0)
        turned = module(others).flip(0)
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together, turned, atol=1e-6)


def test_every_row_has_the_same_length_whoever_else_is_there():
    of = task()
    few = medication.encode(of, [record("a", ["401.9"])]).tensors[0]
    many = medication.encode(of, [record("a", ["401.9"]), record("b", CODES)]).tensors[0]
    assert few.shape == (1, 9)
    assert torch.equal(few[0], many[0])


def test_empty_places_change_nothing():
    short, long = task(max_codes=3), task(max_codes=8)
    visit = [record("a", ["401.9"])]
    module = stirred(medication.network(long)).eval()
    with torch.no_grad():
        module.embedding.weight[0] = 0  # as torch keeps it in training
        module.direct.weight[0] = 0
        found = [module(medication.encode(of, visit).tensors[0]) for of in (short, long)]
    assert torch.allclose(*found, atol=1e-6)


def test_the_order_of_codes_changes_nothing():
    of = task()
    module = stirred(medication.network(of)).eval()
    first, second = (
        medication.encode(of, [record("a", codes)]).tensors[0]
        for codes in (["401.9", "428.0"], ["428.0", "401.9"])
    )
    with torch.no_grad():
        assert torch.allclose(module(first), module(second), atol=1e-5)


# ---------------------------------------------------------------------- codes


def test_codes_bring_the_groups_above_them_that_the_vocabulary_holds():
    of = task()
    known = visits.vocabulary(of)
    (row,) = medication.encode(of, [record("a", ["icd9:4019", "I10", "I10"])]).tensors[0]
    seen = [known[at - 2] for at in row.tolist() if at > 1]
    assert seen == ["icd9:401.9", "icd9:401", "icd10:I10", "icd10:chapter-09"]


def test_codes_that_are_not_seen_are_counted_by_reason():
    of = task(max_codes=1)
    records = [record("a", ["401.9", "V45.01", "486", "junk"])]
    assert visits.unseen(of, records) == {
        "codes in no form of their system": 2,
        "codes that the vocabulary does not hold": 1,
        "codes and groups beyond task.max_codes": 1,
    }


def test_words_of_the_studys_own_are_seen_as_they_stand():
    of = task(code_system="none")
    (row,) = medication.encode(of, [record("a", ["word", "other"])]).tensors[0]
    assert (row > 1).sum() == 1


def test_a_visit_without_codes_still_has_an_answer():
    of = task()
    module = stirred(medication.network(of))
    found = module(medication.encode(of, [record("a", [])]).tensors[0])
    assert torch.isfinite(found).all()


# ---------------------------------------------------------------------- network


def test_the_first_predictions_favour_no_drug(graph):
    for of in (task(), task(graph=graph)):
        found = medication.network(of)(medication.encode(of, medication.probes(of)).tensors[0])
        assert torch.equal(found, torch.zeros(4, 3))


def test_first_values_are_the_same_bits_each_time(graph):
    of = task(graph=graph)
    torch.manual_seed(1)
    first = medication.network(of).state_dict()
    torch.manual_seed(2)
    second = medication.network(of).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_graphs_rows_are_constants_and_no_parameters(graph):
    of = task(graph=graph)
    module = medication.network(of)
    names = set(dict(module.named_parameters()))
    assert not any("rows" in name for name in names)
    assert not any("rows" in name for name in module.state_dict())
    assert module.code_rows[2:4].abs().sum() > 0
    assert module.drug_rows[0].abs().sum() > 0
    assert module.drug_rows[1].abs().sum() == 0  # nothing is known of N02B


def test_a_graph_that_nobody_read_is_named(graph):
    with pytest.raises(DataError) as caught:
        medication.network(task(graph={**graph, "digest": "0" * 64}))
    assert caught.value.code is Code.GRAPH_ABSENT


def test_the_digest_tells_what_changes_the_network_and_nothing_else():
    first = medication.architecture(task())[0]
    assert medication.architecture(task(columns={"codes": "c"}, objective="mse"))[0] == first
    for more in ({"width": 16}, {"layers": 2}, {"codes": CODES[1:]}, {"labels": LABELS[::-1]}):
        assert medication.architecture(task(**more))[0] != first


def test_the_digest_names_the_graph_and_not_where_it_lies():
    one = {"files": ["a.tsv"], "digest": "1" * 64}
    found = [
        medication.architecture(task(graph=g))[0]
        for g in (one, {**one, "files": ["b.tsv"]}, {**one, "digest": "2" * 64})
    ]
    assert found[0] == found[1] != found[2]


def test_probes_fit_their_task_and_are_three_patients():
    for of in (task(), task(codes=("word",), code_system="none"), task(codes=("icd9:chapters",))):
        records = medication.probes(of)
        assert len({r.patient for r in records}) >= 3
        assert {label for r in records for label in r.labels} <= set(LABELS)
        assert not visits.unseen(of, records)


# ---------------------------------------------------------------------- learning


@pytest.mark.parametrize("objective", ["bce", "mse"])
def test_it_learns_what_only_two_codes_together_tell(objective):
    """Given for exactly one of two codes: no sum of weights of single codes can say so."""
    of = task(codes=("a", "b"), code_system="none", objective=objective, labels=("X", "Y"))
    cases = [((), ()), (("a",), ("X",)), (("b",), ("X",)), (("a", "b"), ())]
    records = [record(str(n), codes, labels) for n, (codes, labels) in enumerate(cases)]
    tried = learner(of, records, mode="none")
    rows = np.arange(4)

    def fitted(module, parameters):
        tried.module = module
        step = torch.optim.Adam(parameters, lr=0.02)
        for _ in range(250):
            step.zero_grad()
            tried.losses(rows).mean().backward()
            step.step()
        return torch.sigmoid(module(medication.encode(of, records).tensors[0]))[:, 0].detach()

    whole, linear = tried.module, copy.deepcopy(tried.module)
    found = fitted(whole, whole.parameters())
    assert ((found > 0.5) == torch.tensor([False, True, True, False])).all()
    found = fitted(linear, linear.direct.parameters())
    assert not ((found > 0.5) == torch.tensor([False, True, True, False])).all()


def test_codes_of_one_disease_are_nearer_to_each_other_with_the_graph(graph):
    """Where nothing of their own is known, the graph alone tells codes apart."""
    of = task(codes=("icd9:401.1", "icd9:401.9", "icd9:820"), graph={**graph, "width": 64})
    module = stirred(medication.network(of))
    with torch.no_grad():
        module.embedding.weight.zero_()
        module.direct.weight.zero_()
        visits = [record(str(n), [code]) for n, code in enumerate(of.codes)]
        one, same, other = module(medication.encode(of, visits).tensors[0])
    assert (one - same).norm() < 0.5 * (one - other).norm()
    assert (one - same).norm() > 0
