"""Builds what a study's bundle needs from torch: initial tensors, shapes, digest, model config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.study import Study

if TYPE_CHECKING:
    from client.tasks.backbone import Backbone

__all__ = ["BuiltModel", "build_model"]


@dataclass(frozen=True)
class BuiltModel:
    """The trainable part of a study's network, at its first values.

    Guarantee: the same study and backbone files give the same bytes on every machine; no secret
    random number is drawn. `config` is the Hugging Face config.json of the saved model, as JSON,
    or the description of a task's own network; its digest then stands for the backbone's.
    `engine` says what computes clipped sums, and why; empty without a privacy mode. `personal` are
    the tensors that stay at each hospital, sorted.
    """

    initial: dict[str, NDArray[np.float32]]
    backbone_digest: bytes
    config: str
    engine: str = ""
    personal: tuple[str, ...] = ()

    @property
    def shared(self) -> int:
        """How many numbers of them the secure sum holds."""
        return sum(value.size for n, value in self.initial.items() if n not in self.personal)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, sorted by name."""
        return {name: tuple(value.shape) for name, value in self.initial.items()}


def build_model(study: Study) -> BuiltModel:
    """Resolve a study's backbone and tuning, or its task's own network, into tensors.

    Under a privacy mode the network is admitted first, on public records: what no hospital could
    train is refused here, not in the first round.

    Raises:
        DataError: the backbone cannot be used, or does not fit the study.
        RefusedError: its patients' gradients cannot be told apart.
        ConfigError: it does not have the layers that shall stay at each hospital.
    """
    from client.tasks.personal import HEAD, personal_names

    parts = study.training.personal
    if study.model is None:
        from client.tasks.kinds import code_of
        from client.tasks.rows import initial_tensors

        code = code_of(study.task)
        engine = _admit_rows(study) if study.privacy.mode != "none" else ""
        known, description = code.architecture(study.task)
        initial = initial_tensors(code, study.task)
        own = personal_names(code.network(study.task), initial, HEAD, parts) if parts else ()
        return BuiltModel(initial, known, description, engine, own)
    import torch

    from client.tasks.backbone import load_backbone
    from client.tasks.network import network_for

    backbone = load_backbone(study.model.backbone)
    network = network_for(study, backbone, torch.device("cpu"))
    engine = _admit_notes(study, backbone) if study.privacy.mode != "none" else ""
    config: Any = network.model.config
    plain = json.loads(config.to_json_string(use_diff=False))
    plain.pop("transformers_version", None)  # a patch release is no other study
    return BuiltModel(
        initial=network.initial(),
        personal=personal_names(network.model, network.names, network.classifier, parts),
        backbone_digest=backbone.digest,
        config=json.dumps(plain, sort_keys=True),
        engine=engine,
    )


def _admit_rows(study: Study) -> str:
    import torch

    from client.privacy.admission import admit
    from client.tasks.kinds import code_of
    from client.tasks.rows import probe_of

    probe = probe_of(code_of(study.task), study, torch.device("cpu"))
    return admit(probe, kind=study.privacy.engine)


def _admit_notes(study: Study, backbone: Backbone) -> str:
    import torch

    from client.privacy.admission import admit
    from client.tasks.diagnosis import probe_of

    return admit(probe_of(study, backbone, torch.device("cpu")), kind=study.privacy.engine)
