"""Fusion: what is there counts, what is missing does not, and every row stands alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client.privacy.admission import admit
from client.tasks import multimodal
from client.tasks.kinds import code_of
from client.tasks.rows import inputs_of, rows_learner
from common.errors import Code, DataError
from common.study import Study

torch.set_num_threads(1)
SMALL = {
    "text": {
        "max_tokens": 12,
        "encoder": {"buckets": 64, "width": 8, "channels": 8, "kernels": [1, 2]},
    },
    "image": {"size": 8, "network": {"kind": "resnet", "widths": [4, 4], "groups": 2}},
    "numbers": {
        "features": [{"name": "crp", "low": 0.0, "high": 80.0}],
        "categories": [{"name": "sex", "values": ["f", "m"]}],
        "hidden": [4],
    },
    "series": {
        "hours": 4,
        "width": 6,
        "features": [
            {"name": "hr", "low": 30.0, "high": 200.0},
            {"name": "lactate", "low": 0.3, "high": 20.0, "scale": "log"},
        ],
    },
}
EVERY = tuple(SMALL)


def study(names=EVERY, **terms):
    task = {"kind": "multimodal", "labels": ["no", "yes"], "width": 6}
    return Study.model_validate(
        {
            "format": "wardround-study/1",
            "name": "fusion",
            "task": task | {name: SMALL[name] for name in names} | terms,
            "privacy": {"mode": "local", "epsilon": 3, "delta": 1e-5, "clip_norm": 1.0},
            "sites": [{"id": "a"}, {"id": "b"}, {"id": "c"}],
        }
    )


def started(module):
    """With gates and an output that are not zero, so that everything gets a gradient."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return module


def inputs(task, records):
    count = len(task.features)
    return inputs_of(
        multimodal.encode(task, records), np.zeros(count, np.float32), np.ones(count, np.float32)
    )


def without(record, name):
    empty = {
        "text": {"text": " "},
        "image": {"image": None},
        "numbers": {"values": (np.nan,), "codes": ("",)},
        "series": {"series": None},
    }
    return replace(record, **empty[name])


def test_first_values_are_the_same_every_time_and_favour_no_answer():
    task = study().task
    torch.manual_seed(1)
    first = multimodal.network(task).state_dict()
    torch.manual_seed(2)
    second = multimodal.network(task).state_dict()
    assert all(torch.equal(first[name], value) for name, value in second.items())
    assert not multimodal.network(task)(*inputs(task, multimodal.probes(task))).any()
    # Gates start half open: nothing is weighed down before anything is known.
    assert not first["gate.weight"].any()
    # The LSTM starts as the one of the task that has it alone: forget gates open.
    (bias,) = (first[name] for name in first if name.endswith("input.bias"))
    assert bias.tolist() == [0] * 6 + [1] * 6 + [0] * 12


@pytest.mark.parametrize("names", [*((name,) for name in EVERY), ("text", "series"), EVERY])
def test_every_choice_of_inputs_is_admitted_by_the_quick_engine(names):
    terms = study(names)
    code = code_of(terms.task)
    probes = multimodal.probes(terms.task)
    learner = rows_learner(code, terms, probes, (), device=torch.device("cpu"))
    started(learner.module)
    assert admit(learner).startswith("bookkeeping")
    assert len({probe.patient for probe in probes}) >= 3


def test_the_probes_have_every_input_and_lack_every_input():
    task = study().task
    there = np.array([multimodal.present(task, probe) for probe in multimodal.probes(task)])
    assert there.any(axis=0).all()
    assert not there.all(axis=0).any()


@pytest.mark.parametrize("name", EVERY)
def test_an_input_that_is_there_counts_and_a_missing_one_has_no_part(name):
    task = study().task
    module = started(multimodal.network(task))
    whole = multimodal.probes(task)[0]
    poor = without(whole, name)
    both = module(*inputs(task, [whole, poor]))
    assert not torch.allclose(both[0], both[1])
    # Whatever stood in its place, be it not a number: the answer is the same.
    place = task.modalities.index(name)
    given = inputs(task, [whole])
    at = 1 if task.features else 0
    masked = [tensor.clone() for tensor in given]
    masked[at][0, place] = 0
    assert torch.allclose(module(*masked)[0], both[1], atol=1e-6)


def test_a_row_depends_on_itself_alone():
    task = study().task
    module = started(multimodal.network(task))
    probes = multimodal.probes(task)
    together = module(*inputs(task, probes))
    alone = torch.cat([module(*inputs(task, [probe])) for probe in probes])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.isfinite(together).all()


def test_a_patient_of_whom_nothing_is_known_gets_an_answer():
    task = study().task
    nothing = multimodal.probes(task)[0]
    for name in EVERY:
        nothing = without(nothing, name)
    module = started(multimodal.network(task))
    assert multimodal.present(task, nothing) == (False,) * 4
    assert torch.isfinite(module(*inputs(task, [nothing]))).all()


def test_what_is_missing_of_the_numbers_is_told_beside_them():
    task = study(("numbers",)).task
    known, partly = multimodal.probes(task)[0], multimodal.probes(task)[2]
    partly = replace(partly, values=(np.nan,))
    encoded = multimodal.encode(task, [known, partly])
    assert encoded.values.shape == (2, 1, 1)
    assert encoded.tensors[1][:, -1].tolist() == [0, 1]


def test_the_numbers_of_a_row_hold_through_its_hours():
    task = study().task
    encoded = multimodal.encode(task, multimodal.probes(task)[:1])
    assert encoded.values.shape == (1, 4, 3)
    assert len(set(encoded.values[0, :, 0])) == 1


def test_the_architecture_is_what_the_bundle_names():
    task = study().task
    digest, told = multimodal.architecture(task)
    assert multimodal.architecture(task) == (digest, told)
    assert "wardround-multimodal/1" in told
    assert multimodal.architecture(study(width=8).task)[0] != digest
    assert multimodal.architecture(study(EVERY[:3]).task)[0] != digest
    # How much of a patient is read is a term of the study and no part of the network.
    assert multimodal.architecture(study(max_records=3).task)[0] == digest


def test_a_colour_image_is_refused_where_gray_is_declared():
    task = study(("image",)).task
    colour = np.zeros((8, 8, 3), np.uint8)
    colour[..., 0] = 9
    record = replace(multimodal.probes(task)[0], image=colour)
    with pytest.raises(DataError) as caught:
        multimodal.encode(task, [record])
    assert caught.value.code is Code.IMAGE_KIND
