"""Records of any task explained part by part, on answers whose shares are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.data.records import Record
from client.explain.attribution import Target
from client.explain.page import Case, page
from client.explain.parts import explain_parts, parts_of
from common.outcomes import LabelSet, Number
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.medication import MedicationTask
from common.tasks.multimodal import MultimodalTask

NASTY = "<script>alert(1)</script> \u202e </p>"
MIXED = MultimodalTask.model_validate(
    {
        "kind": "multimodal",
        "labels": ["a", "b"],
        "text": {"column": "note"},
        "image": {"column": "film", "size": 8},
        "numbers": {
            "features": [{"name": n, "low": 0.0, "high": 9.0} for n in ("crp", "urea")],
            "categories": [{"name": "sex", "values": ["f", "m"]}],
        },
        "series": {
            "stay": "stay",
            "time": "hour",
            "hours": 2,
            "features": [{"name": n, "low": 0.0, "high": 9.0} for n in ("rate", "spo2")],
        },
    }
)
CODES = MedicationTask.model_validate(
    {"kind": "medication", "labels": ["X", "Y"], "codes": ["a"], "code_system": "none"}
)
WORDS = DiagnosisTask.model_validate(
    {"kind": "diagnosis", "labels": ["a", "b"], "encoder": {"vocabulary": "words"}}
)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def record(**given):
    plain = {"patient": "p", "text": "", "label": None, "site": None, "file": "f", "line": 2}
    return Record(**{**plain, **given})


def whole(**given):
    return record(
        text="short of breath",
        values=(3.0, float("nan")),
        codes=("m",),
        series=np.array([[1, np.nan], [2, np.nan]], np.float32),
        image=np.ones((4, 4), np.uint8),
        **given,
    )


def told(of, explained, weigh, outcome=None, column=0):
    outcome = outcome or LabelSet(("X", "Y"))

    def outputs(records):
        return torch.tensor([weigh(one) for one in records]).float()

    return explain_parts(outputs, parts_of(of, explained), Target(outcome, column))


def test_every_part_that_is_there_can_be_left_out_and_no_other():
    parts = parts_of(MIXED, whole())
    assert parts.names == ("crp", "sex", "note", "note", "note", "rate", "image")
    none = parts.kept(np.zeros(7, bool))
    assert none.text.split() == []
    assert np.isnan(none.values).all()
    assert none.codes == ("",)
    assert np.isnan(none.series).all()
    assert none.image is None
    same = parts.kept(np.ones(7, bool))
    assert (same.text, same.codes, same.values[0]) == ("short of breath", ("m",), 3.0)
    assert (same.image == 1).all()
    alone = parts.kept(np.array([1, 0, 0, 1, 0, 0, 0], bool))
    assert (alone.values[0], alone.text.split()) == (3.0, ["of"])


def test_a_sum_of_parts_gives_each_its_own_term():
    weights = {"a": 2.0, "b": -1.0, "c": 0.5}

    def weigh(one):
        return [sum(weights[code] for code in one.codes), 0.0]

    found = told(CODES, record(codes=("a", "b", "c")), weigh)
    np.testing.assert_allclose(found.values, [2.0, -1.0, 0.5], atol=1e-6)
    assert found.shown == ("a", "b", "c")
    assert found.found.balance.complete
    assert found.found.balance.difference == pytest.approx(1.5)
    assert found.found.curve.gain > 0


def test_what_only_two_parts_do_together_is_shared_and_adds_up():
    found = told(
        CODES, record(codes=("a", "b", "c")), lambda one: [float({"a", "b"} <= set(one.codes)), 0.0]
    )
    assert found.values.sum() == pytest.approx(1.0)
    assert found.values[2] == 0
    assert found.values[:2].min() > 0.2


def test_the_same_record_gives_the_same_shares_and_leaves_the_stream_alone():
    def once():
        found = told(CODES, record(codes=tuple("abcd")), lambda o: [len(o.codes) ** 2.0, 0.0])
        return found.values

    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first = once()
    assert torch.rand(1) == expected
    torch.manual_seed(4)
    np.testing.assert_array_equal(first, once())


def test_a_record_of_nothing_is_explained_by_nothing():
    found = told(CODES, record(), lambda one: [0.3, 0.0])
    assert found.values.shape == (0,)
    assert found.found.balance.complete


def test_a_long_note_becomes_few_pieces_that_cover_it():
    text = " ".join(f"word{n}" for n in range(500))
    parts = parts_of(WORDS, record(text=text))
    assert len(parts.names) <= 48
    assert parts.kept(np.zeros(len(parts.names), bool)).text.split() == []
    one = np.ones(len(parts.names), bool)
    one[3] = False
    assert len(parts.kept(one).text) == len(text)
    assert 480 <= len(parts.kept(one).text.split()) < 500


def test_a_quantity_is_explained_in_its_units():
    found = told(
        MIXED,
        whole(),
        lambda one: [0.0 if np.isnan(one.values[0]) else one.values[0] / 10],
        Number(10.0, 30.0, "mmol"),
    )
    assert found.found.explained == "value"
    assert found.values[0] == pytest.approx(6.0)
    assert np.abs(found.values[1:]).max() == 0


def test_what_stands_in_a_part_stays_text():
    found = told(
        MIXED, record(text=NASTY, values=(1.0, 1.0), codes=(NASTY,)), lambda one: [1.0, 0.0]
    )
    shown = "".join(page([Case(2, "p", found)]))
    assert "<script" not in shown
    assert "&lt;" in shown
    assert "\u202e" not in shown
    assert "<script" in found.shown[found.names.index("sex")], "control: it was there"
