import gc
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.build import build_model
from client.explain import attribution
from client.explain.attribution import Target, deletion
from client.explain.text import TextModel
from client.export import export_model
from client.predict import predict
from client.tasks.backbone import load_backbone
from client.tasks.text import Cleaner
from common.errors import Code, DataError

WINDOWS = {"long_notes": "window", "window_stride": 6, "max_windows": 4}
CLASSIC = {**WINDOWS, "stemming": "english", "stop_words": "english"}
FAMILIES = ("bert", "sentence-bert", "roberta", "distilbert", "electra", "modernbert")


@pytest.fixture(scope="module")
def saved(tiny, study_of, tmp_path_factory):
    """Exports a tiny family with invented weights of every trainable tensor."""

    def make(family, task=None, tuning="full"):
        folder = tmp_path_factory.mktemp("model") / family
        study = study_of(tiny(family), tuning, task=task)
        stream = np.random.default_rng(0)
        state = {
            name: (value + stream.normal(0, 0.15, value.shape)).astype(np.float32)
            for name, value in build_model(study).initial.items()
        }
        export_model(folder, study, load_backbone(str(tiny(family))), state)
        return folder

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_words_of_every_family_add_up_to_the_difference_of_logits(saved, notes, family):
    model = TextModel(saved(family), "cpu")
    for note in notes[:3]:
        found = model.explain(note.text)
        balance = found.found.balance
        assert balance.complete
        assert found.values.sum() == pytest.approx(balance.total, abs=1e-9), "no share is lost"
        assert found.found.curve.ours[-1] == pytest.approx(found.found.curve.random[-1])


def test_control_too_few_points_do_not_add_up(learned):
    folder, test = learned
    model = TextModel(folder, "cpu")
    note = model.locate(test[0].text)
    target = Target(model.outcome, 0)
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr(attribution.integrated_gradients, "__kwdefaults__", {"steps": 1})
        patch.setattr(attribution, "MOST_STEPS", 1)
        _, rough = model._attribute(note, target)
    _, fine = model._attribute(note, target)
    assert rough.gap > 5 * fine.gap
    assert fine.complete
    assert not rough.complete


@pytest.mark.parametrize("task", [WINDOWS, CLASSIC, {}])
def test_the_answer_is_what_predict_tells(saved, notes, task, tmp_path):
    folder = saved("bert", task, "head")
    model = TextModel(folder, "cpu")
    table = tmp_path / "notes.ndjson"
    table.write_text("".join(json.dumps({"text": note.text}) + "\n" for note in notes))
    predict(folder, table, tmp_path / "out.ndjson", device="cpu")
    for note, line in zip(notes, (tmp_path / "out.ndjson").read_text().splitlines(), strict=True):
        found = model.explain(note.text).found
        told = json.loads(line)
        assert found.answer["label"] == told["label"]
        assert found.answer["probabilities"] == pytest.approx(told["probabilities"], abs=1e-5)
        assert found.curve.ours[0] == pytest.approx(told["probabilities"][told["label"]], abs=1e-5)


def test_every_token_of_every_window_belongs_to_the_word_it_was_made_of(saved, notes):
    model = TextModel(saved("bert", CLASSIC, "head"), "cpu")
    clean = Cleaner(model._reading)
    seen = 0
    for record in notes:
        note = model.locate(record.text)
        for row, owner in zip(note.rows, note.owners, strict=True):
            assert owner[0] == owner[-1] == -1, "special tokens belong to no word"
            for token, at in zip(row[1:-1], owner[1:-1], strict=True):
                first, last = note.words[at]
                piece = model._tokenizer.convert_ids_to_tokens(token).removeprefix("##")
                if piece != "[UNK]":
                    assert piece in clean(note.text[first:last])
                    seen += 1
    assert seen > 40


def test_a_word_that_is_not_read_has_no_share(saved):
    model = TextModel(saved("bert"), "cpu")
    text = "fever cough " * 4 + "wheeze chest pain swollen legs"
    found = model.explain(text)
    assert found.note.read.sum() == 10, "twelve tokens, two of them special"
    assert not found.values[~found.note.read].any()
    assert found.values[found.note.read].all()
    assert text[: found.note.end].endswith("fever cough wheeze chest")


def test_the_words_whose_weight_is_known_get_just_that(saved, monkeypatch):
    model = TextModel(saved("bert"), "cpu")
    width = model._table.weight.shape[1]
    weights = torch.linspace(-1, 1, width * 3).reshape(width, 3)

    def outputs(vectors, mask):
        return (vectors * mask[..., None]).sum(1) @ weights

    monkeypatch.setattr(model, "_outputs", outputs)
    monkeypatch.setattr(model, "_check", lambda *_: None)
    text = "old man with fever , no cough"
    found = model.explain(text, "asthma")
    ids = model._encode([text]).rows[0][1:-1]
    logits = (model._table(torch.tensor(ids)) - model._table.weight[model._blank]) @ weights
    expected = logits[:, 1] - (logits[:, 0] + logits[:, 2]) / 2
    np.testing.assert_allclose(found.values, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_explained_answers_the_same_twice_and_learns_nothing(saved, notes):
    model = TextModel(saved("bert", WINDOWS), "cpu")
    first, second = (model.explain(notes[1].text) for _ in range(2))
    assert len(first.note.rows) > 1
    np.testing.assert_array_equal(first.values, second.values)
    assert first.found == second.found
    assert all(p.grad is None and not p.requires_grad for p in model._model.parameters())
    assert not any(
        part._forward_hooks or part._backward_hooks or part._forward_pre_hooks
        for part in model._model.modules()
    )
    assert torch.is_grad_enabled()
    gc.collect()
    assert not any(
        type(found) is torch.Tensor and found.grad_fn is not None for found in gc.get_objects()
    ), "no graph is kept"


def test_a_label_can_be_chosen_and_an_unknown_one_is_named(saved, notes):
    model = TextModel(saved("bert"), "cpu")
    found = model.explain(notes[0].text, "heart failure")
    assert found.found.explained == "heart failure"
    with pytest.raises(DataError) as error:
        model.explain(notes[0].text, "gout<b>")
    assert error.value.code is Code.DATA_LABEL
    assert "pneumonia" in error.value.remedy


def test_several_labels_are_explained_each_for_itself(saved, notes):
    folder = saved("bert")
    config = json.loads((folder / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (folder / "config.json").write_text(json.dumps(config))
    found = TextModel(folder, "cpu").explain(notes[0].text).found
    assert found.balance.complete
    chance = found.answer["probabilities"][found.explained]
    assert 1 / (1 + np.exp(-found.balance.score)) == pytest.approx(chance, abs=1e-4)


def test_a_model_that_reads_embeddings_otherwise_is_refused(saved, notes, monkeypatch):
    model = TextModel(saved("bert"), "cpu")
    plain = model._outputs
    monkeypatch.setattr(model, "_outputs", lambda vectors, mask: plain(vectors, mask) + 0.5)
    with pytest.raises(DataError) as error:
        model.explain(notes[0].text)
    assert error.value.code is Code.MODEL_FAMILY


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60).filter(str.strip))
def test_any_note_is_divided_as_it_is_read(text):
    model = _CLASSIC_MODEL[0]
    note = model.locate(text)
    assert [len(row) for row in note.rows] == [len(owner) for owner in note.owners]
    assert "".join(text[a:b] for a, b in note.words) == "".join(c for c in text if not c.isspace())


_CLASSIC_MODEL = []


@pytest.fixture(scope="module", autouse=True)
def _classic(saved):
    _CLASSIC_MODEL.append(TextModel(saved("bert", CLASSIC, "head"), "cpu"))
    yield
    _CLASSIC_MODEL.clear()


@pytest.fixture(scope="module")
def areas(learned):
    """Deletion areas over unseen notes: by attribution, random order, nonsense and inverted."""
    folder, test = learned
    model = TextModel(folder, "cpu")
    stream = np.random.default_rng(1)
    rows = []
    for record in test[::4][:30]:
        found = model.explain(record.text)
        note, target = found.note, _target(model, found)

        def chances(kept, note=note, target=target):
            return target.chances(model._mean(note, kept))

        nonsense = deletion(chances, stream.permutation(found.values))
        inverted = deletion(chances, -found.values)
        curve = found.found.curve
        rows.append((curve.area, curve.random_area, nonsense.area, inverted.area, found))
    return rows


def _target(model, found):
    return Target(model.outcome, model.outcome.labels.index(found.found.explained))


def test_the_classifier_of_these_tests_has_learned_something(learned):
    folder, test = learned
    model = TextModel(folder, "cpu")
    right = 0
    for first in range(0, len(test), 16):
        for record in test[first : first + 16]:
            note = model.locate(record.text)
            outputs = model._mean(note, np.ones((1, len(note.words)), bool))
            right += model.outcome.labels[int(outputs[0].argmax())] == record.label
    assert right / len(test) > 0.7


def test_blanking_by_attribution_beats_random_order(areas):
    ours, random = (np.array([row[at] for row in areas]) for at in (0, 1))
    assert random.mean() - ours.mean() > 0.15
    assert np.mean(ours < random) > 0.9


def test_control_a_random_attribution_does_not_beat_random_order(areas):
    ours, random, nonsense = (np.array([row[at] for row in areas]) for at in (0, 1, 2))
    gain = random.mean() - ours.mean()
    assert abs(random.mean() - nonsense.mean()) < 0.25 * gain


def test_control_an_inverted_attribution_is_worse_than_random_order(areas):
    random, inverted = (np.array([row[at] for row in areas]) for at in (1, 3))
    assert inverted.mean() - random.mean() > 0.05
    assert np.mean(inverted > random) > 0.8


def test_the_attributions_of_a_learned_model_add_up(areas):
    assert all(row[4].found.balance.complete for row in areas)


def test_a_long_note_shares_memory_by_chunks_of_tokens(saved, monkeypatch):
    model = TextModel(saved("bert", WINDOWS), "cpu")
    seen = []
    plain = model._outputs

    def outputs(vectors, mask):
        seen.append(mask.numel())
        return plain(vectors, mask)

    monkeypatch.setattr(model, "_outputs", outputs)
    model.explain("fever cough wheeze no chest pain " * 400)
    assert max(seen) <= 1024
