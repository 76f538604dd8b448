import json
import pickle  # noqa: TID251 - the control shows what is refused
import shutil

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from client.tasks.backbone import load_backbone
from client.tasks.network import network_for
from common.errors import Code, DataError


def _refusal(spec):
    with pytest.raises(DataError) as caught:
        load_backbone(str(spec))
    assert caught.value.remedy
    return caught.value.code


@pytest.fixture
def copy(tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert"), folder)
    return folder


def test_a_missing_folder_a_file_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "note.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    assert _refusal(tmp_path / "absent") is Code.MODEL_FOLDER
    assert _refusal(tmp_path / "note.txt") is Code.MODEL_FOLDER
    assert _refusal(tmp_path / "empty") is Code.MODEL_FOLDER


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\x00\xff"])
def test_a_broken_config_is_not_a_model_folder(text, copy):
    (copy / "config.json").write_text(text)
    assert _refusal(copy) is Code.MODEL_FOLDER


def test_a_folder_without_tokenizer_is_refused(copy):
    for path in copy.glob("*token*"):
        path.unlink()
    assert _refusal(copy) is Code.MODEL_FOLDER


class _Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_refused_and_never_opened(copy, tmp_path):
    (copy / "model.safetensors").unlink()
    weights = copy / "pytorch_model.bin"
    weights.write_bytes(pickle.dumps(_Bomb(tmp_path / "exploded")))
    assert _refusal(copy) is Code.MODEL_UNSAFE
    assert not (tmp_path / "exploded").exists()


def test_control_the_same_pickle_does_run_code_when_opened(tmp_path):
    pickle.loads(pickle.dumps(_Bomb(tmp_path / "exploded"))).close()  # noqa: S301
    assert (tmp_path / "exploded").exists()


def test_damaged_weights_are_an_error_of_the_model(copy, study_of):
    (copy / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(DataError) as caught:
        network_for(study_of(copy), load_backbone(str(copy)), torch.device("cpu"))
    assert caught.value.code is Code.MODEL_FAMILY


@pytest.mark.parametrize("kind", ["resnet", "no-such-architecture"])
def test_what_is_no_text_classifier_is_refused(kind, copy, study_of):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    with pytest.raises(DataError) as caught:
        network_for(study_of(copy), load_backbone(str(copy)), torch.device("cpu"))
    assert caught.value.code in {Code.MODEL_FAMILY, Code.MODEL_FOLDER}


def test_code_in_a_model_folder_is_never_run(copy, study_of):
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.M"}
    config["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError) as caught:
        network_for(study_of(copy), load_backbone(str(copy)), torch.device("cpu"))
    assert caught.value.code in {Code.MODEL_FAMILY, Code.MODEL_FOLDER}


@pytest.mark.parametrize(
    "spec", ["package:no_such_package_here/model", "package:json/none", "package:../x", "package:"]
)
def test_a_missing_package_or_folder_in_it_is_refused(spec):
    assert _refusal(spec) is Code.MODEL_FOLDER


def test_a_package_spec_cannot_climb_out_of_the_package(tmp_path):
    assert _refusal("package:json/../../..") is Code.MODEL_FOLDER


@pytest.mark.parametrize(
    "error",
    [LocalEntryNotFoundError("offline"), httpx.ConnectError("no route"), OSError("disk")],
)
def test_an_unreachable_hub_says_to_name_a_folder(error, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError) as caught:
        load_backbone("someone/some-model")
    assert caught.value.code is Code.MODEL_UNREACHABLE
    assert "folder" in caught.value.remedy


def test_a_name_that_cannot_be_a_hub_id_is_refused_without_asking_the_hub():
    assert _refusal("a/b/c/d") is Code.MODEL_FOLDER


def test_the_hub_gives_a_folder_like_any_other(tiny, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_a, **_k: str(tiny("bert")))
    assert load_backbone("someone/tiny").digest == load_backbone(str(tiny("bert"))).digest


def test_the_digest_covers_weights_config_and_tokenizer_but_not_the_readme(copy):
    first = load_backbone(str(copy))
    (copy / "README.md").write_text("words")
    assert load_backbone(str(copy)) is first
    seen = {first.digest}
    for name in ("config.json", "tokenizer.json"):
        path = copy / name
        path.write_text(path.read_text() + "\n")
        seen.add(load_backbone(str(copy)).digest)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    seen.add(load_backbone(str(copy)).digest)
    assert len(seen) == 4


def test_the_same_files_elsewhere_have_the_same_digest(tiny, copy):
    assert load_backbone(str(copy)).digest == load_backbone(str(tiny("bert"))).digest


def test_an_equal_backbone_is_shared_until_its_folder_is_gone(copy, tmp_path, study_of):
    twin = tmp_path / "twin"
    shutil.copytree(copy, twin)
    # Unlike every other test's, so that only this one is known by its digest.
    for folder in (copy, twin):
        config = json.loads((folder / "config.json").read_text()) | {"note": "twins"}
        (folder / "config.json").write_text(json.dumps(config))
    first = load_backbone(str(copy))
    assert load_backbone(str(twin)) is first
    shutil.rmtree(copy)
    second = load_backbone(str(twin))
    assert second.folder == twin
    network_for(study_of(twin), second, torch.device("cpu"))
