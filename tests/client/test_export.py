import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from client.build import build_model
from client.export import export_model
from client.tasks.backbone import load_backbone
from client.tasks.diagnosis import DiagnosisLearner
from common.errors import Code, DataError, StorageError

CPU = torch.device("cpu")
STRANGER = """
import json, sys

class Closed:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"client", "common", "server"}:
            raise ImportError(name)

sys.meta_path.insert(0, Closed())
try:
    import client
except ImportError:
    pass
else:
    raise SystemExit("this program can still see Wardround")
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

torch.set_num_threads(1)
answers = []
for folder in json.loads(sys.argv[1]):
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(json.loads(sys.argv[2]), truncation=True, max_length=12, padding=True,
                      return_tensors="pt")
    batch = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        answers.append({"logits": model.eval()(**batch).logits.tolist(),
                        "labels": model.config.id2label, "kind": type(model).__name__})
print(json.dumps(answers))
"""
CASES = [
    ("bert", "head"),
    ("sentence-bert", "bitfit"),
    ("sentence-bert", "lora"),
    ("bert", "full"),
    ("roberta", "head"),
    ("roberta", "lora"),
    ("distilbert", "head"),
    ("modernbert", "head"),
    ("modernbert", "full"),
]


def _trained(initial, seed=1):
    stream = np.random.default_rng(seed)
    return {
        name: (value + stream.normal(0, 0.3, value.shape)).astype(np.float32)
        for name, value in initial.items()
    }


def _our_logits(study, backbone, state, notes):
    learner = DiagnosisLearner(study, notes, (), backbone, device=CPU)
    with torch.no_grad():
        for name, parameter in learner.trainable().items():
            parameter.copy_(torch.from_numpy(state[name]))
        return learner._logits(learner._train).numpy()


def test_a_stranger_loads_the_folder_and_gets_our_logits(tiny, study_of, notes, tmp_path):
    folders, expected = [], []
    ordered = [notes[at] for at in (0, 2, 1, 3, 5, 4)]
    for family, tuning in CASES:
        study = study_of(tiny(family), tuning, model={"lora": {"rank": 2, "alpha": 6.0}})
        backbone = load_backbone(str(tiny(family)))
        state = _trained(build_model(study).initial)
        folder = tmp_path / f"{family}-{tuning}"
        export_model(folder, study, backbone, state)
        folders.append(str(folder))
        expected.append(_our_logits(study, backbone, state, ordered))
    texts = json.dumps([note.text for note in ordered])
    program = [sys.executable, "-I", "-c", STRANGER, json.dumps(folders), texts]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    answers = json.loads(done.stdout)
    for (family, tuning), answer, ours in zip(CASES, answers, expected, strict=True):
        found = np.array(answer["logits"])
        np.testing.assert_allclose(found, ours, atol=5e-5, rtol=1e-4, err_msg=f"{family} {tuning}")
        assert np.ptp(found, axis=0).max() > 0.05, "the notes are told apart"
        assert answer["labels"]["2"] == "heart failure"
        assert answer["kind"].endswith("ForSequenceClassification")


def test_the_folder_holds_safetensors_config_and_tokenizer_and_no_local_path(
    tiny, study_of, tmp_path
):
    study = study_of(tiny("bert"))
    export_model(
        tmp_path / "m", study, load_backbone(str(tiny("bert"))), build_model(study).initial
    )
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    for name in ("config.json", "tokenizer_config.json"):
        assert str(tiny("bert")) not in (tmp_path / "m" / name).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "no temporary folder is left"


def test_a_saved_model_can_be_a_backbone_and_goes_on_from_its_classifier(tiny, study_of, tmp_path):
    study = study_of(tiny("bert"))
    state = _trained(build_model(study).initial)
    export_model(tmp_path / "m", study, load_backbone(str(tiny("bert"))), state)
    again = build_model(study_of(tmp_path / "m"))
    assert all(np.array_equal(again.initial[n], state[n]) for n in state)
    assert json.loads(again.config)["num_hidden_layers"] == 3, "one pooling layer, not two"
    other = build_model(study_of(tmp_path / "m", labels=("x", "y")))
    assert other.shapes["classifier.weight"] == (2, 16)
    assert not other.initial["classifier.weight"].any()


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_of_another_study_are_refused_and_nothing_is_written(
    change, tiny, study_of, tmp_path
):
    study = study_of(tiny("bert"))
    state = dict(build_model(study).initial)
    if change == "missing":
        del state["classifier.bias"]
    elif change == "extra":
        state["classifier.more"] = np.zeros(1, np.float32)
    else:
        state["classifier.bias"] = np.zeros(4, np.float32)
    with pytest.raises(DataError) as caught:
        export_model(tmp_path / "m", study, load_backbone(str(tiny("bert"))), state)
    assert caught.value.code is Code.MODEL_STATE
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_touched(tiny, study_of, tmp_path):
    study = study_of(tiny("bert"))
    (tmp_path / "m").mkdir()
    with pytest.raises(DataError) as caught:
        export_model(
            tmp_path / "m", study, load_backbone(str(tiny("bert"))), build_model(study).initial
        )
    assert caught.value.code is Code.OUTPUT_EXISTS
    assert list((tmp_path / "m").iterdir()) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(tiny, study_of, tmp_path, monkeypatch):
    study = study_of(tiny("bert"))
    backbone = load_backbone(str(tiny("bert")))

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backbone.tokenizer, "save_pretrained", full, raising=False)
    with pytest.raises(StorageError) as caught:
        export_model(tmp_path / "m", study, backbone, build_model(study).initial)
    assert caught.value.code is Code.MODEL_OUTPUT
    assert "No space left" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
