import json

import numpy as np
import pytest

from client.build import build_model
from client.tasks.backbone import load_backbone
from common.errors import Code, DataError, RefusedError
from common.study import Study


@pytest.mark.parametrize("tuning", ["head", "bitfit", "lora", "full"])
def test_the_same_study_builds_the_same_bytes(tuning, tiny, study_of, monkeypatch):
    import torch

    from client.tasks import network

    study = study_of(tiny("bert"), tuning)
    first = build_model(study)
    monkeypatch.setattr(network, "_CACHE", {})
    torch.manual_seed(123)  # what came before must not matter
    second = build_model(study)
    assert list(first.initial) == sorted(first.initial) == list(second.initial)
    assert first.config == second.config
    assert all(np.array_equal(first.initial[n], second.initial[n]) for n in first.initial)
    assert all(value.dtype == np.float32 for value in first.initial.values())
    assert first.shapes == {n: v.shape for n, v in first.initial.items()}


def test_a_head_starts_from_zeros_and_names_the_backbone(tiny, study_of):
    built = build_model(study_of(tiny("bert")))
    assert built.shapes == {"classifier.bias": (3,), "classifier.weight": (3, 16)}
    assert not any(value.any() for value in built.initial.values())
    assert built.backbone_digest == load_backbone(str(tiny("bert"))).digest


def test_the_config_carries_the_studys_labels_and_way_of_reading(tiny, study_of):
    built = build_model(study_of(tiny("bert"), task={"max_tokens": 20}))
    config = json.loads(built.config)
    assert config["id2label"] == {"0": "pneumonia", "1": "asthma", "2": "heart failure"}
    assert config["wardround"]["max_tokens"] == 20
    assert config["wardround"]["pooling_layer"] is True
    assert str(tiny("bert")) not in built.config, "a local path is nobody's business"


def test_adapters_start_as_no_change_but_not_as_nothing(tiny, study_of):
    initial = build_model(study_of(tiny("bert"), "lora")).initial
    down = [v for n, v in initial.items() if ".lora_A." in n]
    up = [v for n, v in initial.items() if ".lora_B." in n]
    assert len(down) == len(up) == 4
    assert all(value.any() for value in down)
    assert not any(value.any() for value in up)
    assert not np.array_equal(down[0], down[1])


def test_changing_the_built_tensors_changes_no_later_build(tiny, study_of):
    study = study_of(tiny("bert"), "full")
    first = build_model(study)
    before = {n: v.copy() for n, v in first.initial.items()}
    for value in first.initial.values():
        value.fill(9.0)
    again = build_model(study).initial
    assert all(np.array_equal(before[n], again[n]) for n in before)


def test_a_study_without_a_backbone_here_says_what_to_do(study_of, tmp_path):
    with pytest.raises(DataError) as caught:
        build_model(study_of(tmp_path / "nothing"))
    assert caught.value.code is Code.MODEL_FOLDER


@pytest.mark.parametrize("mode", ["joint", "local"])
def test_a_network_that_no_hospital_could_train_privately_is_not_built(
    mode, tiny, study_of, monkeypatch
):
    from torch import nn

    from client.tasks import network

    class Strange(nn.LayerNorm):
        """Computes with the parameters of a layer norm, but nobody knows what."""

    study = study_of(tiny("bert"), "full")
    private = {"mode": mode, "epsilon": 3.0, "delta": 1e-5, "clip_norm": 1.0}
    steps = {**study.training.model_dump(), "local_steps": 1}
    data = {**study.model_dump(exclude={"simulation"}), "privacy": private, "training": steps}
    secret = Study.model_validate(data)
    monkeypatch.setattr(network, "_CACHE", {})
    bare = network.bare_model

    def strange_model(plan, backbone):
        model = bare(plan, backbone)
        for layer in [m for m in model.modules() if type(m) is nn.LayerNorm]:
            layer.__class__ = Strange
        return model

    build_model(secret)
    monkeypatch.setattr(network, "_CACHE", {})
    monkeypatch.setattr(network, "bare_model", strange_model)
    build_model(study)  # without a privacy mode it may train
    with pytest.raises(RefusedError) as caught:
        build_model(secret)
    assert caught.value.code is Code.MODEL_UNSUPPORTED
