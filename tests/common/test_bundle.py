"""A study bundle on disk: read back as it was written, or refused as damaged."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from common.bundle import FACTS_FILE, STUDY_FILE, WEIGHTS_FILE, Bundle, resolve
from common.errors import Code, StorageError
from common.study import Study
from common.tensors import load_tensors, save_tensors

TERMS = {
    "format": "wardround-study/1",
    "name": "tiny",
    "task": {"kind": "diagnosis", "labels": ["asthma", "pneumonia"]},
    "model": {"backbone": "package:nothing/model", "tuning": "head"},
    "training": {"rounds": 2, "local_steps": 2, "sampling_rate": 0.1, "expected_batch": 8},
    "privacy": {"mode": "local", "epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0},
    "sites": [{"id": f"site-{i}"} for i in range(3)],
}


@pytest.fixture(scope="module")
def bundle():
    weights = {"head.weight": np.ones((2, 4), np.float32), "head.bias": np.zeros(2, np.float32)}
    study = Study.model_validate_json(json.dumps(TERMS))
    return resolve(study, weights, bytes(range(32)), '{"hidden_size": 4}')


@pytest.fixture
def folder(bundle, tmp_path):
    bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_a_bundle_is_read_back_as_it_was_written(bundle, folder):
    again = Bundle.load(folder)
    assert again.digest == bundle.digest
    assert again.study == bundle.study
    assert again.noise_multiplier == bundle.noise_multiplier


def facts(folder, **changes):
    path = folder / FACTS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def terms(folder, section, **changes):
    path = folder / STUDY_FILE
    study = json.loads(path.read_text())
    study[section] |= changes
    path.write_text(json.dumps(study))


def weights(folder, **changes):
    path = folder / WEIGHTS_FILE
    save_tensors(path, {**load_tensors(path), **changes})


def not_finite(folder):
    weights(folder, **{"head.bias": np.array([0, np.nan], np.float32)})


def in_half(folder):
    weights(folder, **{"head.bias": np.zeros(2, np.float16)})


def cut_short(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:-3])


DAMAGES = {
    "less noise": lambda folder: facts(folder, noise_multiplier=0.01),
    "no noise for the metrics": lambda folder: facts(folder, evaluation_noise=None),
    "another backbone": lambda folder: facts(folder, backbone=bytes(32).hex()),
    "another model configuration": lambda folder: facts(folder, model_config={"hidden_size": 5}),
    "another digest": lambda folder: facts(folder, digest=bytes(32).hex()),
    "a fact that is no text": lambda folder: facts(folder, backbone=7),
    "more rounds": lambda folder: terms(folder, "training", rounds=3),
    "a larger clip norm": lambda folder: terms(folder, "privacy", clip_norm=2.0),
    "other weights": lambda folder: weights(folder, **{"head.bias": np.ones(2, np.float32)}),
    "a tensor more": lambda folder: weights(folder, more=np.ones(2, np.float32)),
    "weights that are not finite": not_finite,
    "weights of another type": in_half,
    "weights cut short": cut_short,
    "weights missing": lambda folder: (folder / WEIGHTS_FILE).unlink(),
    "facts missing": lambda folder: (folder / FACTS_FILE).unlink(),
    "facts that are no JSON": lambda folder: (folder / FACTS_FILE).write_text("{"),
    "facts that are not UTF-8": lambda folder: (folder / FACTS_FILE).write_bytes(b'{"a": "\xff"}'),
    "facts that are a list": lambda folder: (folder / FACTS_FILE).write_text("[]"),
    "facts that lack one": lambda folder: (folder / FACTS_FILE).write_text('{"backbone": ""}'),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_bundle_whose_files_do_not_match_is_refused(name, folder):
    DAMAGES[name](folder)
    with pytest.raises(StorageError) as refused:
        Bundle.load(folder)
    assert refused.value.code is Code.BUNDLE_DAMAGED
    assert folder.name in str(refused.value)
    assert len(str(refused.value)) < 400


def test_files_of_two_bundles_are_not_one(bundle, folder, tmp_path):
    other = resolve(bundle.study, {"head.bias": np.zeros(2, np.float32)}, bytes(32), "{}")
    other.save(tmp_path / "other")
    assert Bundle.load(tmp_path / "other").digest == other.digest  # control
    shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with pytest.raises(StorageError) as refused:
        Bundle.load(folder)
    assert refused.value.code is Code.BUNDLE_DAMAGED


def test_a_roster_of_other_sites_makes_no_terms(bundle):
    keys = {site.id: bytes([i]) * 32 for i, site in enumerate(bundle.study.sites)}
    assert set(bundle.terms(keys).parties) == set(keys)  # control
    missing = dict(list(keys.items())[1:])
    for wrong in (missing, {**keys, "site-9": bytes(32)}, {**missing, "site-9": bytes(32)}):
        with pytest.raises(StorageError) as refused:
            bundle.terms(wrong)
        assert refused.value.code is Code.BUNDLE_DAMAGED
