import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional

from client.privacy.noise import SecureNoise
from client.tasks.backbone import load_backbone
from client.tasks.base import owners_of
from client.tasks.diagnosis import DiagnosisLearner
from client.tasks.network import Plan, bare_model, network_for
from client.tasks.outcomes import targets_of
from client.tasks.text import Encoder, Reading
from client.training import LocalTrainer, TrainingSettings
from common.errors import Code, DataError
from common.tensors import Layout, TensorSpec
from common.world import SeededEntropy

CPU = torch.device("cpu")
FAMILIES = ("bert", "sentence-bert", "roberta", "electra", "distilbert", "modernbert")
LORA = {
    "distilbert": {"rank": 2, "modules": ("q_lin", "v_lin")},
    "modernbert": {"rank": 2, "modules": ("Wqkv",)},
}
TUNINGS = ("head", "bitfit", "lora", "full")
CASES = [(f, t) for f in FAMILIES for t in TUNINGS if (f, t) != ("modernbert", "bitfit")]


def _study(study_of, folder, family, tuning, **task):
    lora = LORA.get(family, {"rank": 2})
    return study_of(folder, tuning, task=task, model={"lora": lora})


@pytest.fixture
def make(tiny, study_of, notes):
    def learner(family="bert", tuning="head", train=None, held_out=(), **task):
        folder = tiny(family)
        study = _study(study_of, folder, family, tuning, **task)
        backbone = load_backbone(str(folder))
        made = DiagnosisLearner(
            study, notes if train is None else train, held_out, backbone, device=CPU
        )
        made.study, made.backbone = study, backbone
        return made

    return learner


def _all_rows(learner):
    return learner.rows_of(np.arange(learner.patient_count(), dtype=np.int64))


def _whole(learner):
    """The stock model with this learner's classifier in it."""
    model = bare_model(Plan.of(learner.study), learner.backbone)
    _, unexpected = model.load_state_dict(learner.module.state_dict(), strict=False)
    assert not unexpected
    return model


def _encode(learner, texts):
    return Encoder(learner.backbone.tokenizer, Reading.of(learner.study.task))(texts)


def _wake(learner, seed=0):
    """Move every trainable value, as training does: a zero classifier hides what is behind it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learner.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize(("family", "tuning"), CASES)
def test_names_are_the_stock_models_names_sorted_and_learn(family, tuning, make):
    learner = make(family, tuning)
    names = list(learner.trainable())
    assert names == sorted(names) == list(learner.network.initial())
    stock = set(dict(learner.network.model.named_parameters()))
    assert {name for name in names if ".lora_" not in name} <= stock
    _wake(learner)
    rows, _ = _all_rows(learner)
    learner.losses(rows).sum().backward()
    grads = {name: p.grad for name, p in learner.trainable().items()}
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads.values())
    moved = sum(bool(grad.any()) for grad in grads.values())
    assert moved >= 0.8 * len(names)  # key biases have no gradient: softmax ignores them


@pytest.mark.parametrize(("family", "tuning"), CASES)
def test_a_rows_loss_depends_on_its_own_patient_alone(family, tuning, make, notes):
    other = list(notes)
    other[4] = dataclasses.replace(notes[4], text="swollen heart with sudden onset of pain , old")
    first, second = make(family, tuning), make(family, tuning, train=other)
    _wake(first)
    _wake(second)
    rows, owner = _all_rows(first)
    rows_other, owner_other = _all_rows(second)
    before, after = first.losses(rows), second.losses(rows_other)
    for patient in (0, 1, 2):
        torch.testing.assert_close(before[owner == patient], after[owner_other == patient])
    assert not torch.allclose(before[owner == 3], after[owner_other == 3])


def test_control_a_batch_statistic_is_caught_by_the_same_comparison(make, notes, monkeypatch):
    other = [*notes[:4], dataclasses.replace(notes[4], text="swollen heart , old"), notes[5]]
    first, second = make("bert", "full"), make("bert", "full", train=other)
    for learner in (first, second):
        _wake(learner)
        plain = learner._forward

        def mixed(module, rows, plain=plain):
            logits = plain(module, rows)
            return logits - logits.mean(dim=0)

        monkeypatch.setattr(learner, "_forward", mixed)
    rows, owner = _all_rows(first)
    assert not torch.allclose(
        first.losses(rows)[owner == 0], second.losses(rows)[owner == 0], atol=1e-4
    )


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_positions_and_segments_are_given_for_every_record_and_contiguous(family, make):
    learner = make(family, "full")
    ids = torch.ones(3, 5, dtype=torch.int64)
    given = learner.network.inputs(ids, torch.ones_like(ids))
    assert given["position_ids"].shape == (3, 5)
    assert given["position_ids"].is_contiguous()
    assert given["position_ids"].stride() == (5, 1)
    if family != "distilbert":
        assert given["token_type_ids"].shape == (3, 5)
        assert given["token_type_ids"].is_contiguous()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_sites_share_frozen_weights_and_own_their_trainable_ones(tuning, make):
    first, second = make("bert", tuning), make("bert", tuning)
    chosen = set(first.trainable())
    theirs = dict(second.module.named_parameters())
    for name, parameter in first.module.named_parameters():
        same = parameter.data_ptr() == theirs[name].data_ptr()
        assert same == (name not in chosen), name
        assert parameter.requires_grad == (name in chosen)
    master = dict(first.network.model.named_parameters())
    before = {name: master[name].clone() for name in chosen}
    _wake(first)
    assert all(torch.equal(master[name], before[name]) for name in chosen)


def _updates(learners, turns):
    """What plain trainers over `learners` give, in the order of `turns`."""
    settings = TrainingSettings("none", 2, 2.0, 4, 0.1)
    start = learners[0].network.initial()
    layout = Layout(tuple(TensorSpec(name, value.shape) for name, value in start.items()))
    trainers = [
        LocalTrainer(learner, layout, settings, SecureNoise(SeededEntropy(f"{at}")), "cpu")
        for at, learner in enumerate(learners)
    ]
    return [trainers[at].train(start, 1) for at in turns]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_sites_that_take_turns_in_one_module_train_as_if_each_had_its_own(tuning, make, notes):
    half = len(notes) // 2
    halves = (notes[:half], notes[half:])
    own = [make("bert", tuning, train=part) for part in halves]
    first = make("bert", tuning, train=halves[0])
    second = DiagnosisLearner(
        first.study, halves[1], (), first.backbone, device=CPU, module=first.module
    )
    assert second.module is first.module
    turns = (0, 1, 0, 1)
    for alone, shared in zip(_updates(own, turns), _updates([first, second], turns), strict=True):
        assert np.array_equal(alone, shared)
        assert np.abs(alone).max() > 0  # control: there was something to train
    assert all(parameter.grad is None for parameter in first.trainable().values())


def test_the_pooling_layer_is_layer_norm_of_the_mean_over_real_tokens(tiny, study_of):
    from transformers import AutoModel

    folder = tiny("bert")
    backbone = load_backbone(str(folder))
    model = bare_model(Plan.of(study_of(folder)), backbone)
    stock = AutoModel.from_pretrained(folder).eval()
    batch = backbone.tokenizer(
        ["fever", "old man with swollen legs ."], padding=True, return_tensors="pt"
    )
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        hidden = stock(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        pooled = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]
    assert mask.min() == 0
    torch.testing.assert_close(pooled, functional.layer_norm(mean, (16,)), atol=0.02, rtol=0.02)
    assert not torch.allclose(functional.layer_norm(hidden[:, 0], (16,)), pooled, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_features_give_the_logits_of_the_whole_model(family, make, notes):
    learner = make(family)
    _wake(learner)
    model = _whole(learner)
    order = (0, 2, 1, 3, 5, 4)
    encoded = _encode(learner, [notes[at].text for at in order])
    rows, _ = _all_rows(learner)
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits for row in encoded.rows]
        found = learner.module(learner._train.features[torch.from_numpy(rows)])
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-4)
    assert found.std() > 0.05


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_a_long_note_is_one_loss_on_the_mean_logits_of_its_windows(tuning, make, notes):
    task = {"long_notes": "window", "window_stride": 6, "max_windows": 3}
    learner = make("bert", tuning, **task)
    _wake(learner)
    rows, owner = _all_rows(learner)
    by_patient = [learner.losses(rows)[owner == p].mean().item() for p in range(4)]
    module = learner.module if tuning == "full" else _whole(learner)
    expected = []
    for patient in ("p1", "p2", "p3", "p4"):
        losses = []
        for note in (n for n in notes if n.patient == patient):
            encoded = _encode(learner, [note.text])
            with torch.no_grad():
                windows = [module(input_ids=torch.tensor([row])).logits for row in encoded.rows]
            target = targets_of(learner._study.task.outcome, [note])
            losses.append(functional.cross_entropy(torch.cat(windows).mean(0, True), target).item())
        expected.append(float(np.mean(losses)))
    assert by_patient == pytest.approx(expected, rel=1e-4)
    assert len(_encode(learner, [notes[1].text]).rows) == 3
    if tuning == "full":
        assert len(rows) > len(notes)


def test_truncation_is_the_default_and_reads_one_row_a_note(make, notes):
    learner = make("bert", "full")
    rows, owner = _all_rows(learner)
    assert len(rows) == len(notes)
    assert owner.tolist() == [0, 0, 1, 2, 2, 3]


def test_rows_of_follows_the_order_asked_for(make):
    learner = make("bert", "full")
    rows, owner = learner.rows_of(np.array([3, 0], np.int64))
    assert rows.tolist() == [5, 0, 1]
    assert owner.tolist() == [0, 1, 1]
    none, owners = learner.rows_of(np.zeros(0, np.int64))
    assert len(none) == len(owners) == 0


def test_owners_of_reads_uneven_groups():
    members, owner = owners_of(np.array([0, 2, 2, 5]), np.array([2, 1, 0]))
    assert members.tolist() == [2, 3, 4, 0, 1]
    assert owner.tolist() == [0, 0, 0, 2, 2]


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_every_held_out_patient_weighs_one(tuning, make, notes):
    learner = make("bert", tuning, train=notes[4:5], held_out=[*notes[:4], notes[5]])
    _wake(learner)
    vector = learner.measure()
    assert learner.held_out_count() == 3
    assert vector.shape == (10,)
    rows = vector[:-1].reshape(3, 3).sum(axis=1)
    assert rows.tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert 0 < vector[-1] <= 3


def test_the_measured_loss_is_capped_even_where_the_model_is_broken(make, notes):
    learner = make("bert", "head", train=notes[:1], held_out=notes[1:2])
    with torch.no_grad():
        learner.module.get_parameter("classifier.bias").copy_(torch.tensor([500.0, -500.0, 0.0]))
    assert learner.measure()[-1] == pytest.approx(1.0)
    with torch.no_grad():
        learner.module.get_parameter("classifier.bias").fill_(float("nan"))
    assert learner.measure()[-1] == pytest.approx(1.0)


def test_a_site_without_held_out_patients_measures_zeros(make):
    assert not make().measure().any()


def test_no_dropout_is_left_so_training_mode_is_deterministic(make):
    learner = make("bert", "full")
    _wake(learner)
    learner.module.train()
    rows, _ = _all_rows(learner)
    assert torch.equal(learner.losses(rows), learner.losses(rows))


def test_a_label_outside_the_study_names_its_place_and_nothing_else(make, notes):
    strange = dataclasses.replace(notes[0], label="gout", text="canary words")
    with pytest.raises(DataError) as caught:
        make(train=[strange])
    assert caught.value.code is Code.DATA_LABEL
    assert "notes.csv:2" in str(caught.value)
    assert "canary" not in str(caught.value)
    assert "gout" not in str(caught.value)
    assert "canary" not in repr(strange)


def test_bitfit_tunes_biases_and_the_classifier_only(make):
    names = make("sentence-bert", "bitfit").trainable()
    assert all(name.endswith(".bias") or name.startswith("classifier.") for name in names)
    assert "bert.encoder.layer.1.output.LayerNorm.bias" in names
    assert not any(".layer.2." in name for name in names), "the pooling layer is constant"


def test_lora_tunes_adapters_outside_the_pooling_layer_and_the_classifier(make):
    names = list(make("sentence-bert", "lora").trainable())
    adapters = [name for name in names if ".lora_" in name]
    assert len(adapters) == 2 * 2 * 2
    assert set(names) - set(adapters) == {"classifier.weight", "classifier.bias"}
    assert not any(".layer.2." in name for name in names)


def test_full_leaves_embedding_tables_where_the_study_freezes_them(tiny, study_of):
    folder = tiny("bert")
    backbone = load_backbone(str(folder))
    frozen = network_for(study_of(folder, "full"), backbone, CPU).names
    free = network_for(
        study_of(folder, "full", model={"freeze_embeddings": False}), backbone, CPU
    ).names
    tables = {n for n in free if n.endswith("embeddings.weight")}
    assert len(tables) == 3
    assert set(free) - set(frozen) == tables


def test_the_textbook_recipe_has_no_pooling_layer(tiny, study_of):
    folder = tiny("bert")
    network = network_for(study_of(folder, "full"), load_backbone(str(folder)), CPU)
    assert not network.pooling_layer
    assert network.model.config.num_hidden_layers == 2


@pytest.mark.parametrize(
    ("family", "tuning", "code"),
    [("modernbert", "bitfit", Code.MODEL_LAYERS), ("distilbert", "lora", Code.MODEL_LAYERS)],
)
def test_a_tuning_without_layers_is_an_error(family, tuning, code, tiny, study_of):
    folder = tiny(family)
    study = study_of(folder, tuning, model={"lora": {"rank": 2, "modules": ("absent",)}})
    with pytest.raises(DataError) as caught:
        network_for(study, load_backbone(str(folder)), CPU)
    assert caught.value.code is code


def test_more_tokens_than_positions_is_an_error(tiny, study_of):
    for family, tokens in (("bert", 41), ("roberta", 39)):
        folder = tiny(family)
        study = study_of(folder, task={"max_tokens": tokens})
        with pytest.raises(DataError) as caught:
            network_for(study, load_backbone(str(folder)), CPU)
        assert caught.value.code is Code.MODEL_TOKENS


def test_bfloat16_features_stay_close_to_float32(tiny, study_of, notes):
    backbone = load_backbone(str(tiny("bert")))
    features = {}
    for precision in ("float32", "bfloat16"):
        study = study_of(tiny("bert"), model={"precision": precision})
        features[precision] = DiagnosisLearner(
            study, notes, (), backbone, device=CPU
        )._train.features
    assert features["bfloat16"].dtype == torch.float32
    torch.testing.assert_close(features["bfloat16"], features["float32"], atol=0.1, rtol=0.05)
    assert not torch.equal(features["bfloat16"], features["float32"])


def test_losses_run_in_the_precision_of_the_caller(make):
    learner = make("bert", "full")
    _wake(learner)
    rows, _ = _all_rows(learner)
    plain = learner.losses(rows)
    with torch.autocast("cpu", torch.bfloat16):
        reduced = learner.losses(rows)
    assert reduced.dtype == torch.float32
    torch.testing.assert_close(reduced, plain, atol=0.15, rtol=0.1)
    assert not torch.equal(reduced, plain)
