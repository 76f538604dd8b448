"""The study bundle: what `wardround study build` resolves, and what every party then reads.

    study.yaml            the study as written, without its simulation
    bundle.json           sites, tensor shapes, backbone digest, noise, exponents, model config
    initial.safetensors   the trainable tensors before the first round

The study digest covers all three; hospitals approve that digest and pin it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.config import load
from common.crypto import labels
from common.crypto.digest import digest
from common.errors import Code, StorageError
from common.gate import Gate
from common.joint import JointNoise, joint_noise
from common.metrics import scoring_of
from common.plan import CostModel, Plan, plan
from common.ports import Tensors
from common.protocol.terms import Terms
from common.secagg.quantise import limit
from common.statistics import StatisticsLayout
from common.strategy import OptimizerSettings, ServerOptimizer, initial_exponents
from common.study import Site, Study
from common.tensors import Layout, load_tensors, save_tensors, state_digest
from common.world import make_folder, write_durably

STUDY_FILE = "study.yaml"
FACTS_FILE = "bundle.json"
WEIGHTS_FILE = "initial.safetensors"
_FORMAT = "wardround-bundle/1"
# The first round's quantisation range, in steps of the local optimiser; no aggregate is there yet
# to tell a better one. AdamW moves a weight by about one learning rate per step.
_ADAM_STEPS = 4.0
_SGD_GRADIENT = 10.0


@dataclass(frozen=True)
class Bundle:
    """A resolved study.

    The noise multipliers are None without differential privacy; `statistics_noise` also where
    the study has no numeric features. `personal` are those of the initial tensors that stay at each
    hospital, sorted.
    """

    study: Study
    initial: Tensors
    backbone_digest: bytes
    model_config: str
    noise_multiplier: float | None
    evaluation_noise: float | None
    statistics_noise: float | None = None
    personal: tuple[str, ...] = ()

    @property
    def layout(self) -> Layout:
        """The tensors that the secure sum holds, sorted by name."""
        own = self.personal
        return Layout(tuple(spec for spec in self.trained.specs if spec.name not in own))

    @property
    def own_layout(self) -> Layout:
        """The tensors that stay at each hospital, sorted by name."""
        own = self.personal
        return Layout(tuple(spec for spec in self.trained.specs if spec.name in own))

    @property
    def trained(self) -> Layout:
        """All trainable tensors, sorted by name."""
        return Layout.of(self.initial)

    @property
    def weights(self) -> dict[str, float]:
        """Every site's public weight, scaled so that the largest is 1."""
        largest = max(site.weight for site in self.study.sites)
        return {site.id: site.weight / largest for site in self.study.sites}

    @cached_property
    def digest(self) -> bytes:
        """The study digest: terms, tensors, backbone and noise, as every party computes it.

        Hashed once: a bundle's tensors are never written to.
        """
        return digest(
            labels.STUDY,
            self.study.terms(),
            state_digest(self.initial),
            self.backbone_digest,
            self.model_config,
            repr(self.noise_multiplier),
            repr(self.evaluation_noise),
            repr(self.statistics_noise),
            " ".join(self.personal),
        )

    def optimizer(self) -> ServerOptimizer:
        """The server optimiser of the study."""
        chosen, training = self.study.aggregation.optimizer, self.study.training
        reach = training.local_steps * training.optimizer.learning_rate
        return ServerOptimizer(
            OptimizerSettings(
                name=chosen.name,
                learning_rate=chosen.learning_rate,
                momentum=chosen.momentum,
                beta1=chosen.beta1,
                beta2=chosen.beta2,
                tau=chosen.tau,
                average=self.study.aggregation.average,
                reach=reach if chosen.name == "scaffold" else 0.0,
            )
        )

    @cached_property
    def _start(self) -> Tensors:
        """The state before the first round: one for all parties of a process, never written to."""
        own = self.personal
        common = {n: v for n, v in self.initial.items() if n not in own} if own else self.initial
        state = self.optimizer().initial(common)
        for value in state.values():
            value.setflags(write=False)
        return state

    def forget_start(self) -> None:
        """Free the state before the first round: for a party that keeps its terms in files."""
        self.__dict__.pop("_start", None)

    def joint_noise(self) -> JointNoise | None:
        """The grid and the noise shares of a joint study; None with any other mode.

        Raises ConfigError where the ring has no room for them.
        """
        study, sigma = self.study, self.noise_multiplier
        if study.privacy.mode != "joint":
            return None
        if sigma is None or study.privacy.clip_norm is None:
            raise AssertionError("a joint study has a clip norm and resolved noise")
        count = len(study.sites)
        return joint_noise(
            parties=count,
            honest=study.honest(count),
            parameters=self.layout.size,
            clip_norm=study.privacy.clip_norm,
            expected_batch=study.training.expected_batch,
            noise_multiplier=sigma,
        )

    def terms(self, roster: Mapping[str, bytes]) -> Terms:
        """What the round machines need."""
        study, layout, optimizer = self.study, self.layout, self.optimizer()
        count, bits = len(study.sites), study.ring_bits
        if set(roster) != {site.id for site in study.sites}:
            raise StorageError(
                Code.BUNDLE_DAMAGED, "The roster does not hold exactly the study's sites."
            )
        exponents = self._exponents(count)
        spare = study.training.spare_rounds
        features = study.feature_count
        noise = self.statistics_noise or 0.0
        statistics = StatisticsLayout(features, noise) if features else None
        counted: Tensors = {} if statistics is None else statistics.initial()
        ordered = tuple(exponents[spec.name] for spec in layout.specs)
        initial: Tensors = {**self._start, **counted}
        gate = None
        if study.acceptance is not None:
            gate = Gate(study.acceptance.tolerance, scoring_of(study))
            initial = gate.initial(initial, ordered)
        return Terms(
            study=self.digest,
            roster=dict(roster),
            quorum=study.quorum_size(count),
            weights=self.weights,
            layout=layout,
            ring_bits=bits,
            metric_words=scoring_of(study).length,
            initial=initial,
            exponents=ordered,
            optimizer=optimizer,
            turns=study.training.rounds,
            evaluate_every=study.evaluation.every,
            rounds=study.training.rounds + 1 + spare + bool(features),
            private=study.privacy.mode != "none",
            burns_tolerated=spare,
            statistic_words=0 if statistics is None else statistics.words,
            statistics=statistics,
            gate=gate,
            joint=study.privacy.mode == "joint",
        )

    def _exponents(self, count: int) -> dict[str, int]:
        """The first round's grid, by tensor; with joint privacy that of all rounds."""
        study, specs, joint = self.study, self.layout.specs, self.joint_noise()
        if joint is not None:
            return {spec.name: joint.exponent for spec in specs}
        largest = first_range(study, self.noise_multiplier)
        return initial_exponents(specs, limit=limit(study.ring_bits, count), largest=largest)

    def plan(
        self, patients: Mapping[str, int] | None = None, *, cost: CostModel | None = None
    ) -> Plan:
        """What this bundle will do."""
        return plan(self.study, self.layout.size, patients=patients, cost=cost)

    def save(self, folder: Path) -> None:
        """Write the bundle. Raises StorageError."""
        make_folder(folder)
        save_tensors(folder / WEIGHTS_FILE, self.initial)
        facts = {
            "format": _FORMAT,
            "digest": self.digest.hex(),
            "backbone": self.backbone_digest.hex(),
            "noise_multiplier": self.noise_multiplier,
            "evaluation_noise": self.evaluation_noise,
            "statistics_noise": self.statistics_noise,
            "shapes": {s.name: list(s.shape) for s in self.trained.specs},
            "personal": list(self.personal),
            "model_config": json.loads(self.model_config),
        }
        text = json.dumps(facts, indent=1, sort_keys=True)
        write_durably(folder / FACTS_FILE, [text.encode()])
        # JSON is YAML: the study as resolved, with its sites, in one canonical form.
        # Absent values are written as null: a default may be something else than absent.
        written = self.study.model_dump(mode="json", exclude={"simulation"})
        write_durably(folder / STUDY_FILE, [json.dumps(written, indent=1).encode()])

    @staticmethod
    def load(folder: Path) -> Bundle:
        """Read and check a bundle. Raises StorageError, ConfigError."""
        study = load(folder / STUDY_FILE, Study)
        try:
            facts: dict[str, Any] = json.loads((folder / FACTS_FILE).read_text())
            bundle = Bundle(
                study,
                load_tensors(folder / WEIGHTS_FILE),
                bytes.fromhex(facts["backbone"]),
                json.dumps(facts["model_config"], sort_keys=True),
                facts["noise_multiplier"],
                facts["evaluation_noise"],
                facts["statistics_noise"],
                tuple(facts["personal"]),
            )
            expected = facts["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(
                Code.BUNDLE_DAMAGED, f"{folder}: not a study bundle ({type(error).__name__})."
            ) from None
        if bundle.digest.hex() != expected:
            raise StorageError(Code.BUNDLE_DAMAGED, f"{folder}: the bundle was changed.")
        return bundle


def resolve(
    study: Study,
    initial: Tensors,
    backbone_digest: bytes,
    model_config: str,
    personal: tuple[str, ...] = (),
) -> Bundle:
    """Fix what the study leaves open: the noise for its epsilon, from public numbers alone."""
    planned = plan(study, Layout.of(initial).size)
    return Bundle(
        study,
        dict(initial),
        backbone_digest,
        model_config,
        planned.training.noise_multiplier if planned.training is not None else None,
        planned.evaluation.noise_multiplier,
        None if planned.statistics is None else planned.statistics.noise_multiplier,
        personal,
    )


def with_sites(study: Study, sites: tuple[str, ...]) -> Study:
    """The study of a simulation, with the sites that its data gave."""
    if study.sites:
        return study
    return study.with_sites([Site(id=site) for site in sites])


def first_range(study: Study, noise_multiplier: float | None) -> float:
    """How far a weight may move in a hospital's first round, from the study's public numbers.

    A guess with room, not a bound: what lies beyond it is cut in integers, which changes
    neither privacy nor the ring, and from the second round on the range follows the last
    published aggregate.
    """
    training, optimizer = study.training, study.training.optimizer
    reach = optimizer.learning_rate * training.local_steps
    if optimizer.name == "adamw":
        return _ADAM_STEPS * reach
    gradient = _SGD_GRADIENT
    clip = study.privacy.clip_norm
    if clip is not None and noise_multiplier is not None:
        gradient = 2 * clip + 8 * noise_multiplier * clip / training.expected_batch
    return reach * gradient / (1 - optimizer.momentum)
