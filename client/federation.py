"""All hospitals of a simulation, on the client's side: data, partition, learners, export.

One user owns everything here, so it may also measure what no coordinator ever sees: exact
results per site, and what each hospital would reach alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from client.build import build_model
from client.data.partition import MIN_PATIENTS
from client.data.records import Record, by_patient
from client.devices import choose_device
from client.export import export_model, export_rows
from client.holdings import Holdings, read_holdings
from client.knowledge.shelf import read_knowledge
from client.privacy.ledger import HeldOutSplit
from client.privacy.noise import SecureNoise
from client.tasks.backbone import load_backbone
from client.tasks.base import Learner, Normalising
from client.tasks.diagnosis import DiagnosisLearner
from client.tasks.kinds import code_of
from client.tasks.rows import RowsLearner, rows_learner
from client.training import LocalTrainer, TrainingSettings
from common.bundle import Bundle, resolve, with_sites
from common.errors import Code, DataError
from common.ports import Entropy, Tensors
from common.statistics import DEVIATION, MEAN, StatisticsLayout
from common.strategy import model_tensors
from common.study import Study
from common.world import SeededEntropy

__all__ = [
    "Federation",
    "SiteRecords",
    "build_bundle",
    "build_learner",
    "build_trainer",
    "export_final",
]

Array = NDArray[np.float32]

# Subgroups smaller than this say nothing, and columns with more values are none.
_FEWEST = 10
_MOST_GROUPS = 20
# Far below what float32 can tell: the private steps as they are, but for the noise.
_NO_NOISE = 1e-9


@dataclass(frozen=True)
class SiteRecords:
    """One hospital's records, and the name of their division into training and held out."""

    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    split_id: str


class Federation:
    """The hospitals of one simulation: their records, learners and shared backbone.

    Args:
        study: the study; its simulation says where the data lies and how it is divided.
        config: the study's file: paths are relative to its folder.
        device: auto, cpu or cuda.
        holdings: its data, where they were read before.

    Raises:
        DataError: naming file and line. ConfigError: the study has no simulation.
    """

    def __init__(
        self, study: Study, config: Path, *, device: str = "auto", holdings: Holdings | None = None
    ) -> None:
        self._device = device
        self._learners: dict[str, Learner] = {}
        self._trainers: dict[str, LocalTrainer] = {}
        self._module: nn.Module | None = None
        self._divided: dict[str, SiteRecords] = {}
        held = read_holdings(study, config) if holdings is None else holdings
        read_knowledge(study.task, config.parent)
        self._seed = held.seed
        self.sites = tuple(held.records)
        self.warnings = held.warnings
        self.manifest: dict[str, Any] = held.manifest
        self.engine = ""
        self.study = with_sites(study, self.sites)
        self._records, self._test = held.records, held.tests

    @property
    def tested(self) -> bool:
        """Whether the held-out patients are those of the study's test files."""
        return bool(self._test)

    @property
    def patients(self) -> dict[str, int]:
        """Patients by site."""
        return {site: len({r.patient for r in rows}) for site, rows in self._records.items()}

    @property
    def crowded(self) -> dict[str, int]:
        """Patients with more notes than the study reads, by site; sites without any left out."""
        if self.study.task.kind != "diagnosis":
            return {}
        most = self.study.diagnosis.max_notes
        notes = {site: Counter(r.patient for r in rows) for site, rows in self._records.items()}
        found = {site: sum(n > most for n in counts.values()) for site, counts in notes.items()}
        return {site: count for site, count in found.items() if count}

    def build_bundle(self) -> Bundle:
        """The study's bundle; `engine` then says what computes clipped sums.

        Raises DataError, ConfigError, RefusedError.
        """
        bundle, self.engine = build_bundle(self.study)
        return bundle

    def divide(self, site: str, split: HeldOutSplit | None) -> SiteRecords:
        """One site's training and held-out records, fixed on the first call.

        Args:
            site: which.
            split: the ledger's division; None where the study has no ledger.

        Raises:
            DataError: either part is too small.
        """
        if site not in self._divided:
            self._divided[site] = self._divide(site, split)
        return self._divided[site]

    def _divide(self, site: str, split: HeldOutSplit | None) -> SiteRecords:
        records, test = self._records[site], self._test.get(site, ())
        if test:
            told = sorted({r.patient.encode() for r in test})
            name = hashlib.sha256(b"\n".join(told)).hexdigest()
            return SiteRecords(records, test, name)
        if split is None:
            key = hashlib.sha256(f"held-out {self._seed} {site}".encode()).digest()
            split = HeldOutSplit(key, self.study.evaluation.held_out)
        train = tuple(r for r in records if not split.holds_out(r.patient))
        held = tuple(r for r in records if split.holds_out(r.patient))
        if len({r.patient for r in train}) < MIN_PATIENTS // 2 or not held:
            raise DataError(
                Code.SPLIT_IMPOSSIBLE,
                f"{site}: {len(train)} training and {len(held)} held-out records are too few.",
            )
        return SiteRecords(train, held, split.identity)

    def learner(self, site: str) -> Learner:
        """The site's learner, built once; all sites share the frozen backbone.

        Sites train one after the other, so they share the trainable module as well: whoever works
        in it loads a state first, and leaves nothing of its own behind.
        """
        if site not in self._learners:
            records = self._divided[site]
            learner = build_learner(
                self.study,
                records.train,
                records.held_out,
                choose_device(self._device),
                module=self._module,
            )
            self._module = learner.module
            self._learners[site] = learner
        return self._learners[site]

    def trainer(self, site: str, bundle: Bundle, entropy: Entropy) -> LocalTrainer:
        """The site's trainer, made once; noise comes from `entropy`."""
        if site not in self._trainers:
            learner = self.learner(site)
            self._trainers[site] = build_trainer(bundle, learner, entropy, self._device)
        return self._trainers[site]

    def alone(self, site: str, bundle: Bundle) -> dict[str, Array]:
        """What one hospital reaches with its own records only: the study's recipe without noise.

        The same steps, clipping and optimisers as together (its own part of each step, where the
        study is joint); its model never leaves the hospital
        and needs no noise, so the comparison favours it. Sampling follows the simulation's seed.
        """
        learner, study = self.learner(site), self.study
        silent = _NO_NOISE if study.privacy.mode != "none" else None
        settings = TrainingSettings.from_study(
            study, noise_multiplier=silent, evaluation_noise=None, statistics_noise=None
        )
        noise = SecureNoise(SeededEntropy(f"alone {self._seed} {site}"))
        trainer = LocalTrainer(learner, bundle.trained, settings, noise, self._device)
        own: dict[str, Array] = {}
        if isinstance(learner, Normalising):
            words = learner.statistic_words()
            own = StatisticsLayout(len(words) // 3).resolve(words, 1)
        optimizer = bundle.optimizer()
        state = optimizer.initial(bundle.initial)
        for number in range(1, study.training.rounds + 1):
            # Settings without noise shares give real numbers.
            update = cast("NDArray[np.float32]", trainer.train({**state, **own}, number))
            state = optimizer.apply(state, bundle.trained.unflatten(update))
        return {**model_tensors(state), **own}

    def counts(self, site: str, state: Tensors) -> NDArray[np.float64]:
        """The un-noised metric vectors of `state` over one site's held-out patients.

        Shapes: (P, M), one by patient where the study's scoring needs them, else (1, M) summed.
        """
        return self._counted(self.learner(site), state)

    def _counted(self, learner: Learner, state: Tensors) -> NDArray[np.float64]:
        if isinstance(learner, Normalising):
            learner.set_statistics(state[MEAN], state[DEVIATION])
        with torch.no_grad():
            for name, parameter in learner.trainable().items():
                parameter.copy_(torch.from_numpy(np.array(state[name])))
            learner.module.eval()
            if isinstance(learner, RowsLearner | DiagnosisLearner):
                return learner.measure_patients()
            return learner.measure()[None]

    def subgroups(self, states: Mapping[str, Tensors]) -> dict[str, NDArray[np.float64]]:
        """The metric vectors over the held-out patients of each subgroup, as `counts`.

        `states`: by site, as the model is there.

        A patient belongs to the subgroups of the first record. Those of few patients, and columns
        with so many values that they are no subgroups, are left out.
        """
        members: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
        for site, divided in self._divided.items():
            held = divided.held_out
            own = {patient: held[rows[0]].groups for patient, rows in by_patient(held).items()}
            for record in held:
                for group in own[record.patient]:
                    members[group][site].append(record)
        kinds = Counter(group.partition(":")[0] for group in members)
        found = {}
        for group, sites in sorted(members.items()):
            people = {(site, record.patient) for site, rows in sites.items() for record in rows}
            if len(people) < _FEWEST or kinds[group.partition(":")[0]] > _MOST_GROUPS:
                continue
            found[group] = np.concatenate(
                [self._counted(self._over(rows), states[site]) for site, rows in sites.items()]
            )
        return found

    def _over(self, records: Sequence[Record]) -> Learner:
        """A learner that measures on these records."""
        device = choose_device(self._device)
        return build_learner(self.study, records, records, device, module=self._module)

    def versions(self) -> dict[str, str]:
        """Versions of what training stands on, for the report."""
        return {name: version(name) for name in ("torch", "transformers", "opacus")}

    def export(self, folder: Path, state: Tensors) -> None:
        """Write the model as a folder. Raises DataError, StorageError."""
        export_final(folder, self.study, state)


def build_learner(
    study: Study,
    train: Sequence[Record],
    held_out: Sequence[Record],
    device: torch.device,
    *,
    module: nn.Module | None = None,
) -> Learner:
    """The task's learner over one hospital's records. Raises DataError.

    `module`: of another learner of the same study, to take turns in.
    """
    if study.model is None:
        code = code_of(study.task)
        return rows_learner(code, study, train, held_out, device=device, module=module)
    backbone = load_backbone(study.model.backbone)
    return DiagnosisLearner(study, train, held_out, backbone, device=device, module=module)


def build_trainer(bundle: Bundle, learner: Learner, entropy: Entropy, device: str) -> LocalTrainer:
    """The trainer of a study over a hospital's learner; noise comes from `entropy`.

    Raises RefusedError where the model cannot be trained privately: before any budget is charged.
    """
    settings = TrainingSettings.from_study(
        bundle.study,
        noise_multiplier=bundle.noise_multiplier,
        evaluation_noise=bundle.evaluation_noise,
        statistics_noise=bundle.statistics_noise,
        joint=bundle.joint_noise(),
    )
    drawn = SecureNoise(entropy)
    trainer = LocalTrainer(learner, bundle.layout, settings, drawn, device, bundle.own_layout)
    trainer.admit()
    return trainer


def export_final(folder: Path, study: Study, state: Tensors) -> None:
    """Write a trained model as a folder. Raises DataError, StorageError."""
    if study.model is None:
        export_rows(folder, study, state)
        return
    export_model(folder, study, load_backbone(study.model.backbone), state)


def build_bundle(study: Study) -> tuple[Bundle, str]:
    """A study's bundle, and what computes its clipped sums (`BuiltModel.engine`).

    Raises DataError, ConfigError, RefusedError.
    """
    built = build_model(study)
    known = (built.initial, built.backbone_digest, built.config, built.personal)
    return resolve(study, *known), built.engine
