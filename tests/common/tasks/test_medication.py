"""What a medication study may say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from common.outcomes import LabelSet
from common.tasks.medication import MedicationTask

BASE = {"kind": "medication", "labels": ["C07A", "N02B"]}
DIGEST = "0" * 64


def made(**more):
    return MedicationTask.model_validate({**BASE, **more})


def test_a_task_needs_nothing_but_its_drugs():
    task = made()
    assert task.outcome == LabelSet(("C07A", "N02B"))
    assert task.features == ()
    assert not task.pretrained
    assert "icd9:categories" in task.codes
    assert "self-attention" in task.network_name


def test_the_squared_error_is_an_option():
    assert made(objective="mse").outcome == LabelSet(("C07A", "N02B"), squared=True)


def test_a_graph_is_named_by_files_and_digest():
    task = made(graph={"files": ["kg.tsv"], "digest": DIGEST})
    assert task.graph.files == ("kg.tsv",)
    assert "knowledge graph" in task.network_name


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"labels": ["C07A"]}, "at least 2"),
        ({"labels": ["C07A", "C07A"]}, "labels.1: is listed twice"),
        ({"codes": []}, "at least 1"),
        ({"codes": ["icd9:428", "icd9:428"]}, "codes.1: is listed twice"),
        ({"width": 30}, "must divide width"),
        ({"objective": "hinge"}, "'bce' or 'mse'"),
        ({"code_system": "snomed"}, "code_system"),
        ({"columns": {"patient": "a", "codes": "a"}}, "is also the patient column"),
        ({"columns": {"codes": "a", "drugs": "a"}}, "is also another column"),
        ({"graph": {"files": ["kg.tsv"]}}, "digest"),
        ({"graph": {"files": [], "digest": DIGEST}}, "at least 1"),
        ({"graph": {"files": ["kg.tsv"], "digest": "ABC"}}, "pattern"),
        ({"depth": 3}, "depth"),
    ],
)
def test_what_a_task_may_not_say_is_refused(more, words):
    with pytest.raises(ValidationError, match=words):
        made(**more)


def test_checking_a_task_loads_nothing_heavy():
    code = (
        "import sys, common.tasks.medication; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'networkx', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
