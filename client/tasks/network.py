"""The study's network: a stock Hugging Face classifier, the same at every site, without dice.

What is trained here loads anywhere, because it never leaves the stock architecture. New parts
start from zeros, identities and constants, adapters from a stream keyed by their names.

Frozen features are best pooled over all tokens, but BERT's stock classifier reads the first
token only. The *pooling layer* closes that gap within the stock architecture: one more encoder
layer whose attention weighs every token alike (queries and keys are zero), passes the values on
unchanged and drowns the residual, so that the first token becomes LayerNorm(mean of all tokens).
It is constant, never trained, and part of the saved model.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from client.tasks.backbone import Backbone, quiet_transformers
from client.tasks.text import Reading
from common.errors import Code, DataError
from common.study import Lora, Study

__all__ = [
    "POOLING_GAIN",
    "Head",
    "Network",
    "Plan",
    "bare_model",
    "input_maker",
    "network_for",
    "saved_reading",
]

POOLING_GAIN: Final = 1024.0
"""How much louder the mean of all tokens is than the first token in the pooling layer."""

FEATURE_NORM: Final = 4.0
"""Norm of a pooled feature vector: the bias of the classifier is 1/17 of a record's gradient."""

WARDROUND_KEY: Final = "wardround"
_POOLED_FAMILIES: Final = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})
_OWN_POSITIONS: Final = frozenset(
    {"roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "modernbert"}
)
"""Families that make a [B, T] position themselves (from the ids, or by rotation)."""

_OFFSET_POSITIONS: Final = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet", "longformer"})
_MATRIX: Final = 2
_CACHE: dict[tuple[bytes, Plan, str], Network] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a study that shapes its network."""

    labels: tuple[str, ...]
    several: bool
    tuning: str
    lora: Lora
    freeze_embeddings: bool
    reading: Reading

    @staticmethod
    def of(study: Study) -> Plan:
        """The study's network, in short."""
        return Plan(
            labels=study.labels,
            several=study.diagnosis.several,
            tuning=study.network.tuning,
            lora=study.network.lora,
            freeze_embeddings=study.network.freeze_embeddings,
            reading=Reading.of(study.diagnosis),
        )


@dataclass(frozen=True, eq=False)
class Network:
    """A study's network: the shared master, and what learns in it.

    `model` is never trained and never written to. `names` are the trainable parameters, sorted.
    """

    model: nn.Module
    names: tuple[str, ...]
    classifier: str
    pooling_layer: bool
    inputs: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]
    extractor: nn.Module | None

    def initial(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """A copy of the trainable parameters' first values, by name."""
        parameters = dict(self.model.named_parameters())
        return {
            name: parameters[name].detach().to("cpu", torch.float32).numpy().copy()
            for name in self.names
        }

    def replica(self) -> nn.Module:
        """A module of one's own: trainable parameters copied, all others shared in memory."""
        chosen = set(self.names)
        if self.extractor is not None:
            linear = self.model.get_submodule(self.classifier)
            return Head(self.classifier, copy.deepcopy(linear).requires_grad_(True))  # noqa: FBT003
        module = _share(self.model, keep={n for n, _ in self.model.named_parameters()} - chosen)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in chosen)
        return module


class Head(nn.Module):
    """The classifier alone, under the name it has in the whole model.

    Shapes: features (B, H) to logits (B, L).
    """

    def __init__(self, path: str, linear: nn.Module) -> None:
        super().__init__()
        self._path = path
        parent: nn.Module = self
        *containers, last = path.split(".")
        for name in containers:
            child = nn.Module()
            parent.add_module(name, child)
            parent = child
        parent.add_module(last, linear)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The logits of cached features."""
        logits: torch.Tensor = self.get_submodule(self._path)(features)
        return logits


def network_for(study: Study, backbone: Backbone, device: torch.device) -> Network:
    """The study's network on `device`, made once per process and shared by every site.

    Raises:
        DataError: the model is no text classifier, has too few positions, or lacks the layers
            that the tuning asks for.
    """
    plan = Plan.of(study)
    key = (backbone.digest, plan, str(device))
    if key not in _CACHE:
        _CACHE[key] = _make_network(plan, backbone, device)
    return _CACHE[key]


def bare_model(plan: Plan, backbone: Backbone) -> nn.Module:
    """A fresh stock classifier of the study, without adapters, all parts at their first values.

    Raises:
        DataError: as `network_for`.
    """
    import transformers
    from safetensors import SafetensorError

    config = _config(plan, backbone)
    keep_classifier = _named_labels(config) == plan.labels
    _set_labels(config, plan)
    pooling = _wants_pooling_layer(plan, backbone, config)
    fresh = pooling and not _wardround(config).get("pooling_layer", False)
    if fresh:
        config.num_hidden_layers += 1
    setattr(config, WARDROUND_KEY, _reading_record(plan.reading, pooling_layer=pooling))
    if getattr(config, "classifier_pooling", None) is not None and plan.tuning == "head":
        config.classifier_pooling = "mean"
    quiet_transformers(transformers)
    try:
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            backbone.folder,
            config=config,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise _not_a_classifier(backbone.spec, error) from None
    model.config.name_or_path = ""  # where the backbone lay is nobody's business
    missing = set(report["missing_keys"]) | {key[0] for key in report["mismatched_keys"]}
    classifier = _classifier_name(model, backbone.spec, len(plan.labels))
    with torch.no_grad():
        _fill_missing(model, missing, keep_classifier=keep_classifier, classifier=classifier)
        if fresh:
            _set_pooling_layer(model)
            _set_pooler(model, classifier)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # noqa: FBT003
    checked: nn.Module = model
    return checked


def _make_network(plan: Plan, backbone: Backbone, device: torch.device) -> Network:
    model = bare_model(plan, backbone)
    config: Any = model.config
    classifier = _classifier_name(model, backbone.spec, len(plan.labels))
    pooling = bool(_wardround(config).get("pooling_layer", False))
    inputs = input_maker(model)
    if plan.tuning == "lora":
        model = _with_adapters(model, plan.lora, backbone.spec, pooling=pooling)
    names = _trainable_names(model, plan, classifier, pooling=pooling)
    model.to(device)
    extractor = None
    if plan.tuning == "head":
        extractor = _share(model, keep={name for name, _ in model.named_parameters()})
        extractor.set_submodule(classifier, nn.Identity())
    return Network(model, names, classifier, pooling, inputs, extractor)


def _config(plan: Plan, backbone: Backbone) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            backbone.folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise _not_a_classifier(backbone.spec, error) from None
    for key, value in config.to_dict().items():
        if "dropout" in key and isinstance(value, (int, float)):
            setattr(config, key, 0.0)
    positions = _position_count(config)
    if positions is not None and plan.reading.max_tokens > positions:
        raise DataError(
            Code.MODEL_TOKENS,
            f"task.max_tokens is {plan.reading.max_tokens}, but {backbone.spec} has {positions} "
            "positions.",
        )
    return config


def _named_labels(config: Any) -> tuple[str, ...]:
    """The labels a checkpoint was trained with; its classifier is kept where they are ours."""
    return tuple(str(config.id2label[index]) for index in sorted(config.id2label))


def _set_labels(config: Any, plan: Plan) -> None:
    labels = plan.labels
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = f"{'multi' if plan.several else 'single'}_label_classification"


def _position_count(config: Any) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    if config.model_type in _OFFSET_POSITIONS:
        return positions - (config.pad_token_id or 0) - 1
    return positions


def _reading_record(reading: Reading, *, pooling_layer: bool) -> dict[str, Any]:
    return {
        "format": "wardround-model/1",
        "pooling_layer": pooling_layer,
        "max_tokens": reading.max_tokens,
        "long_notes": reading.long_notes,
        "window_stride": reading.window_stride,
        "max_windows": reading.max_windows,
        "stop_words": reading.stop_words,
        "stemming": reading.stemming,
    }


def saved_reading(config: Any) -> Reading:
    """How a saved model wants its notes read; for a stranger's model, plain truncation.

    Raises:
        DataError: the model's own record of it is damaged.
    """
    record = _wardround(config)
    if not record:
        room = _position_count(config)
        limit = min(512, room) if room is not None else 512
        return Reading(limit, "truncate", limit // 2, 1, "none", "none")
    try:
        return Reading(**{name: record[name] for name in Reading.__dataclass_fields__})
    except KeyError:
        message = "the model's config.json lacks part of its `wardround` record."
        raise DataError(Code.MODEL_FOLDER, message) from None


def _wardround(config: Any) -> Mapping[str, Any]:
    record = getattr(config, WARDROUND_KEY, None)
    return record if isinstance(record, Mapping) else {}


def _wants_pooling_layer(plan: Plan, backbone: Backbone, config: Any) -> bool:
    """Whether mean pooling is meant: frozen features, or a sentence encoder made for it."""
    if config.model_type not in _POOLED_FAMILIES:
        return False
    if plan.tuning == "head" or _wardround(config).get("pooling_layer", False):
        return True
    try:
        pooling = json.loads((backbone.folder / "1_Pooling" / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(pooling, dict) and pooling.get("pooling_mode_mean_tokens") is True


def _not_a_classifier(spec: str, error: Exception) -> DataError:
    message = f"{spec}: does not load as a text classifier ({type(error).__name__})."
    return DataError(Code.MODEL_FAMILY, message)


def _classifier_name(model: nn.Module, spec: str, labels: int) -> str:
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not linears or linears[-1][1].out_features != labels:
        raise DataError(Code.MODEL_FAMILY, f"{spec}: has no linear classifier at its end.")
    name: str = linears[-1][0]
    return name


def _fill_missing(
    model: nn.Module, missing: set[str], *, keep_classifier: bool, classifier: str
) -> None:
    """First values of what the checkpoint lacks: a zero classifier, identities, constants.

    A zero classifier gives every label the same chance and, under clipping, every record of the
    first step the same direction in label space; nothing here depends on a random number.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(f"{classifier}."):
            if name in missing or not keep_classifier:
                parameter.zero_()
        elif name in missing and parameter.ndim == _MATRIX:
            parameter.copy_(torch.eye(*parameter.shape))
        elif name in missing:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _set_pooling_layer(model: Any) -> None:
    """Constants of the pooling layer: its first token is LayerNorm(mean over all tokens)."""
    layer = model.base_model.encoder.layer[-1]
    width = model.config.hidden_size
    for parameter in layer.parameters():
        parameter.zero_()
    layer.attention.self.value.weight.copy_(torch.eye(width))
    layer.attention.output.dense.weight.copy_(torch.eye(width) * POOLING_GAIN)
    for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
        norm.weight.fill_(1.0)


def _set_pooler(model: Any, classifier: str) -> None:
    """The stock dense layer before the classifier becomes a small multiple of the identity.

    A LayerNorm output has norm sqrt(width); the features get norm FEATURE_NORM, for which the
    layer's tanh is nearly linear, whatever the width.
    """
    width = model.config.hidden_size
    parent = classifier.rpartition(".")[0]
    dense = model.get_submodule(f"{parent}.dense") if parent else model.base_model.pooler.dense
    dense.weight.copy_(torch.eye(width) * (FEATURE_NORM / math.sqrt(width)))
    dense.bias.zero_()


def input_maker(
    model: nn.Module,
) -> Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """How this family is called.

    Per-record gradients need every input with the record on its first axis: a broadcast
    position or segment embedding would mix records, so both are given in full, contiguous.
    """
    config: Any = model.config
    accepted = inspect.signature(model.forward).parameters
    positions = "position_ids" in accepted and config.model_type not in _OWN_POSITIONS
    segments = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 0

    def make(ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        given = {"input_ids": ids, "attention_mask": mask}
        if positions:
            given["position_ids"] = torch.arange(ids.shape[1], device=ids.device).repeat(
                ids.shape[0], 1
            )
        if segments:
            given["token_type_ids"] = torch.zeros_like(ids)
        return given

    return make


def _with_adapters(model: nn.Module, lora: Lora, spec: str, *, pooling: bool) -> nn.Module:
    import peft

    shape: Any = model.config
    fixed = rf".*encoder\.layer\.{shape.num_hidden_layers - 1}\..*" if pooling else None
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.modules),
        lora_dropout=0.0,
        bias="none",
        exclude_modules=fixed,
    )
    try:
        adapted: nn.Module = peft.inject_adapter_in_model(config, model)
    except ValueError:
        names = ", ".join(lora.modules)
        raise DataError(
            Code.MODEL_LAYERS, f"{spec}: has no linear layer named {names} for an adapter."
        ) from None
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(_adapter_start(name, parameter.shape))
            elif ".lora_B." in name:
                parameter.zero_()
    return adapted


def _adapter_start(name: str, shape: torch.Size) -> torch.Tensor:
    """Uniform within 1/sqrt(inputs), as peft starts, from a stream that the name alone keys."""
    seed = int.from_bytes(hashlib.sha256(b"wardround/1/adapter/" + name.encode()).digest())
    stream = np.random.Generator(np.random.PCG64(seed))
    bound = 1.0 / math.sqrt(shape[1])
    return torch.from_numpy(stream.uniform(-bound, bound, tuple(shape)).astype(np.float32))


def _trainable_names(
    model: nn.Module, plan: Plan, classifier: str, *, pooling: bool
) -> tuple[str, ...]:
    config: Any = model.config
    fixed = f".encoder.layer.{config.num_hidden_layers - 1}." if pooling else None
    tables = {
        f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.Embedding)
    }

    def learns(name: str) -> bool:
        if name.startswith(f"{classifier}."):
            return True
        if fixed is not None and fixed in name:
            return False
        if plan.tuning == "bitfit":
            return name.endswith(".bias")
        if plan.tuning == "lora":
            return ".lora_" in name
        return plan.tuning == "full" and not (plan.freeze_embeddings and name in tables)

    names = tuple(sorted(name for name, _ in model.named_parameters() if learns(name)))
    if plan.tuning == "bitfit" and all(name.startswith(f"{classifier}.") for name in names):
        raise DataError(
            Code.MODEL_LAYERS, "the model has no biases, so bitfit has nothing to tune."
        )
    return names


def _share(model: nn.Module, *, keep: set[str]) -> nn.Module:
    """A copy of `model` whose parameters named in `keep` are the very same objects."""
    shared: dict[int, Any] = {id(p): p for n, p in model.named_parameters() if n in keep}
    shared.update({id(buffer): buffer for buffer in model.buffers()})
    return copy.deepcopy(model, shared)
