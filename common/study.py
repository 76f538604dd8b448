"""The study: the terms of one training, agreed and signed by every site.

`study.yaml` is the only source of what is public about a run: labels, model, rounds, sampling
rate, expected batch, clip norm, budget, sites and quorum. Nothing in it is discovered from data.
The section `simulation` is not part of the signed terms: it says how one machine plays all sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, Field, model_validator

from common.config import Frozen, Rules
from common.fields import FilePath, Listed, Name, Seconds, Text, repeats
from common.joint import RING_BITS as JOINT_RING_BITS
from common.outcomes import Classes
from common.secagg import quorum as quorums
from common.tasks.cases import CaseRules, SystemChoice
from common.tasks.custom import CustomTask
from common.tasks.diagnosis import DiagnosisTask
from common.tasks.fit import misfits
from common.tasks.imaging import ImagingTask
from common.tasks.medication import MedicationTask
from common.tasks.multimodal import MultimodalTask
from common.tasks.prognosis import PrognosisTask
from common.tasks.tabular import TabularTask

__all__ = [
    "FORMAT",
    "MAX_SITES",
    "MIN_SITES",
    "Aggregation",
    "Deadlines",
    "Evaluation",
    "Fault",
    "Lora",
    "ModelChoice",
    "Optimizer",
    "Privacy",
    "Quorum",
    "ServerOptimizer",
    "Simulation",
    "SimulationData",
    "Site",
    "Split",
    "Study",
    "Task",
    "Term",
    "Training",
    "simulated_sites",
]

FORMAT: Final = "wardround-study/1"
MIN_SITES: Final = quorums.MIN_PARTIES
MAX_SITES: Final = 255  # Shamir's x-coordinates are one byte

Term = str | int | tuple["Term", ...] | dict[str, "Term"]
Task = Annotated[
    DiagnosisTask
    | TabularTask
    | ImagingTask
    | PrognosisTask
    | MedicationTask
    | MultimodalTask
    | CustomTask,
    Field(discriminator="kind"),
]


class Lora(Frozen):
    """Low-rank adapters; read where model.tuning is lora."""

    rank: int = Field(8, ge=1, le=256, description="rank of each adapter")
    alpha: float = Field(16.0, gt=0, le=4096, description="scale: alpha / rank")
    modules: Annotated[Listed[Text], Field(min_length=1, max_length=64)] = Field(
        ("query", "value"), description="names of the linear layers that get an adapter"
    )


class ModelChoice(Frozen):
    """Which network, and which part of it learns."""

    backbone: Text = Field(
        description="package:NAME/FOLDER (inside an installed Python package), a folder, or a "
        "Hugging Face hub id"
    )
    tuning: Literal["head", "bitfit", "lora", "full"] = Field(
        "head", description="what is trained: the classifier, also biases, adapters, or everything"
    )
    lora: Lora = Field(Lora(), description="adapters, with tuning: lora")
    freeze_embeddings: bool = Field(
        default=True, description="with tuning: full, leave the word embeddings as they are"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="auto: float32 under privacy, else bfloat16 where the device computes in it",
    )


class Optimizer(Frozen):
    """The optimiser inside each hospital, new in every round."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="adamw or sgd")
    learning_rate: float = Field(1e-3, gt=0, le=100, description="step size")
    weight_decay: float = Field(0.0, ge=0, le=1, description="decoupled decay in each step")
    momentum: float = Field(0.0, ge=0, lt=1, description="with name: sgd")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(
            self.name == "sgd" or self.momentum == 0,
            "momentum",
            f"has no effect with name: {self.name}; remove it",
        )
        rules.done()
        return self


class Training(Frozen):
    """What happens inside a hospital in one round; all of it is public."""

    rounds: int = Field(20, ge=1, le=10_000, description="rounds of the whole study")
    local_steps: int = Field(10, ge=1, le=10_000, description="DP steps in a hospital per round")
    sampling_rate: float = Field(
        0.1, gt=0, le=1, description="q: chance that a patient takes part in a step"
    )
    expected_batch: float = Field(
        32.0, gt=0, le=1e6, description="B: patients a step counts on; sums are divided by it"
    )
    micro_batch: int = Field(32, ge=1, le=65_536, description="records in memory at a time")
    optimizer: Optimizer = Field(Optimizer(), description="the optimiser inside each hospital")
    proximal: float = Field(0.0, ge=0, le=1000, description="FedProx mu; 0 is plain FedAvg")
    spare_rounds: int = Field(
        2, ge=0, le=10_000, description="rounds that may be burned and tried again within epsilon"
    )
    personal: Annotated[Listed[Literal["head", "norms"]], Field(max_length=2)] = Field(
        (),
        description="layers that stay at each hospital and learn there alone: head, the last "
        "layer; norms, scales and biases of normalising layers",
    )


class ServerOptimizer(Frozen):
    """What the coordinator does with the mean update, and every hospital repeats."""

    name: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold"] = Field(
        "fedavg",
        description="Reddi et al. 2021 (arXiv 2003.00295); scaffold: Karimireddy et al. 2020",
    )
    learning_rate: float = Field(1.0, gt=0, le=100, description="server step size")
    momentum: float = Field(0.9, ge=0, lt=1, description="with fedavgm")
    beta1: float = Field(0.9, ge=0, lt=1, description="with fedadam, fedyogi, fedadagrad")
    beta2: float = Field(0.99, ge=0, lt=1, description="with fedadam, fedyogi")
    tau: float = Field(1e-3, gt=0, le=1, description="adaptivity; with the adaptive three")


class Aggregation(Frozen):
    """How masked updates become the next model."""

    optimizer: ServerOptimizer = Field(ServerOptimizer(), description="applied to the mean update")
    ring_bits: Literal[24, 32] | None = Field(
        None, description="bits of a masked word; absent: 32 with privacy.mode: joint, else 24"
    )
    average: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="release the running average of the models, with this decay; absent: the last",
    )


class Privacy(Frozen):
    """What a patient is promised; the unit is the patient."""

    mode: Literal["joint", "local", "none"] = Field(
        description="joint: every round is one DP step of all hospitals, noised once inside the "
        "secure sum; local: DP-SGD inside every hospital; none: masks only, no promise to a patient"
    )
    engine: Literal["auto", "bookkeeping", "opacus"] = Field(
        "auto",
        description="what computes clipped sums: bookkeeping is fast and small, opacus keeps every "
        "record's gradient; auto: bookkeeping where it knows every layer",
    )
    epsilon: float | None = Field(
        None, gt=0, le=100, description="budget of the whole study per patient"
    )
    delta: float | None = Field(None, gt=0, lt=1e-3, description="well below 1 / patients")
    clip_norm: float | None = Field(
        None, ge=1e-3, le=1e6, description="C: largest L2 norm of a patient's gradient"
    )
    noise_multiplier: float | None = Field(
        None, gt=0, le=1e4, description="sigma; absent: solved for epsilon"
    )
    evaluation_epsilon: float | None = Field(
        None,
        gt=0,
        le=100,
        description="what metrics may cost a held-out patient, who never trains; absent: epsilon",
    )
    statistics_epsilon: float | None = Field(
        None,
        gt=0,
        le=100,
        description="the part of epsilon for normalising, with task.kind: tabular; absent: a tenth",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        if self.mode != "none":
            for key in ("epsilon", "delta", "clip_norm"):
                given = getattr(self, key) is not None
                rules.require(given, key, f"is needed with mode: {self.mode}")
            share, whole = self.evaluation_epsilon, self.epsilon
            rules.require(
                share is None or whole is None or share <= whole,
                "evaluation_epsilon",
                f"must not be more than epsilon (got {share} of {whole})",
            )
            part = self.statistics_epsilon
            rules.require(
                part is None or whole is None or part < whole,
                "statistics_epsilon",
                f"must leave something of epsilon for training (got {part} of {whole})",
            )
        else:
            for key, field in type(self).model_fields.items():
                given = key != "mode" and getattr(self, key) != field.default
                rules.require(not given, key, "has no effect with mode: none; remove it")
        rules.done()
        return self


class Evaluation(Frozen):
    """How the model is measured on held-out patients."""

    every: int = Field(1, ge=1, le=10_000, description="measure after every so many rounds")
    held_out: float = Field(0.2, gt=0, lt=1, description="part of each hospital's patients")
    loss_cap: float = Field(8.0, gt=0, le=64, description="nats at which one loss is cut")
    score_bins: int = Field(
        0,
        ge=0,
        le=1024,
        description="with two labels: bins of the scores' histogram, for AUROC, AUPRC and "
        "calibration; 0 counts hits alone. More bins are finer, and under privacy noisier",
    )
    threshold: float = Field(
        0.5, gt=0, lt=1, description="probability from which the second label is told"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(self.score_bins % 2 == 0, "score_bins", "must be even")
        rules.require(
            self.score_bins > 0 or self.threshold == 0.5,  # noqa: PLR2004 - the default
            "threshold",
            "has no effect without score_bins; remove it",
        )
        rules.done()
        return self


class Acceptance(Frozen):
    """When a round's model is rolled back; every hospital judges alike, from the masked sums."""

    tolerance: float = Field(
        ge=0,
        lt=1,
        description="score, in [0, 1], that a model may lose against the best accepted one; at "
        "least five times the released score's noise (`wardround plan` says it)",
    )


class Site(Frozen):
    """One hospital of the study."""

    id: Name = Field(description="the hospital's name on the wire, in files and in logs")
    weight: float = Field(
        1.0, gt=0, le=1e6, description="weight in the mean update; a public constant"
    )


class Quorum(Frozen):
    """How many hospitals may conspire, and how many must stay to the end of a round."""

    colluders: int | None = Field(
        None, ge=1, description="c: hospitals that may conspire; absent: a third, at least one"
    )
    survivors: int | None = Field(
        None,
        ge=MIN_SITES,
        description="Q: hospitals that a round needs; absent: the fewest that withstand the "
        "colluders. With privacy.mode: joint a larger Q means less noise and fewer dropouts",
    )


class Deadlines(Frozen):
    """How long the coordinator waits in each phase."""

    handshake_s: Seconds = Field(120.0, description="seconds")
    train_s: Seconds = Field(3600.0, description="seconds")
    upload_s: Seconds = Field(600.0, description="seconds")
    agree_s: Seconds = Field(120.0, description="seconds")
    unmask_s: Seconds = Field(120.0, description="seconds")


class SimulationData(Frozen):
    """The files of a simulation."""

    files: Annotated[Listed[FilePath], Field(max_length=10_000)] = Field(
        (), description="CSV, Parquet or NDJSON; relative to the folder of this file"
    )
    test_files: Annotated[Listed[FilePath], Field(max_length=10_000)] = Field(
        (), description="held out for a last test of the models; the same columns"
    )
    system: SystemChoice | None = Field(
        None, description="instead of files: a hospital's system, read by the section cases"
    )
    groups: Annotated[Listed[Text], Field(max_length=10)] = Field(
        (),
        description="columns whose values are subgroups (sex, an age band): how well each is "
        "served is told; a system has those of cases.groups",
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        told = "has no effect with a system, whose subgroups cases.groups names; remove it"
        rules.require(self.system is None or not self.groups, "groups", told)
        either = bool(self.files) != (self.system is not None)
        rules.require(either, "files", "is missing: name files, or a system; not both")
        told = "has no effect with a system; remove it"
        rules.require(self.system is None or not self.test_files, "test_files", told)
        rules.done()
        return self


class Split(Frozen):
    """How one data set becomes several hospitals; a patient is never divided."""

    by: Literal["column", "iid", "dirichlet", "quantity", "pathological"] = Field(
        description="column: as the data says; iid: at random; dirichlet: skewed labels; "
        "quantity: skewed sizes; pathological: few classes each"
    )
    sites: int | None = Field(
        None, ge=MIN_SITES, le=MAX_SITES, description="number of hospitals; not with by: column"
    )
    column: Text | None = Field(
        None, description="the hospital's column; with by: column, except with a system"
    )
    alpha: float | None = Field(
        None, gt=0, le=1e6, description="small is skewed; with by: dirichlet"
    )
    skew: Literal["uniform", "linear", "square", "exponential"] | None = Field(
        None, description="how sizes fall; with by: quantity"
    )
    classes_per_site: int | None = Field(
        None, ge=1, le=1000, description="classes a hospital sees; with by: pathological"
    )

    @model_validator(mode="after")
    def _rules(self) -> Self:
        needs = {
            "dirichlet": "alpha",
            "quantity": "skew",
            "pathological": "classes_per_site",
        }
        rules = Rules()
        for kind, key in needs.items():
            given = getattr(self, key) is not None
            rules.require(given or self.by != kind, key, f"is needed with by: {kind}")
            message = f"has no effect with by: {self.by}; remove it"
            rules.require(not given or self.by == kind, key, message)
        told = f"has no effect with by: {self.by}; remove it"
        rules.require(self.column is None or self.by == "column", "column", told)
        rules.require(
            self.by != "column" or self.sites is None,
            "sites",
            "has no effect with by: column, where the data says which hospitals there are; "
            "remove it",
        )
        rules.done()
        return self


class Fault(Frozen):
    """One planned accident in a simulation."""

    round: int = Field(ge=1, description="in which round, counted from 1")
    site: Name = Field(description="which hospital")
    fault: Literal["drop", "crash"] = Field(
        description="drop: gone for the round; crash: the process dies and comes back"
    )


class Simulation(Frozen):
    """How one machine plays all hospitals; not part of the signed terms."""

    data: SimulationData = Field(description="the files")
    split: Split = Field(description="how they become hospitals")
    seed: int = Field(0, ge=0, lt=2**63, description="of the split; never of noise or masks")
    dropouts_per_round: int = Field(0, ge=0, description="hospitals that vanish in every round")
    faults: Annotated[Listed[Fault], Field(max_length=10_000)] = Field(
        (), description="planned accidents"
    )


class Study(Frozen):
    """The terms of one training.

    Guarantee: two studies have equal `terms()` exactly when they agree in everything but
    `simulation`.
    """

    format: Literal["wardround-study/1"] = Field(description="this file's kind and version")
    name: Name = Field(description="the study's name")
    task: Task = Field(description="what is learned")
    model: ModelChoice | None = Field(
        None, description="which network, and which part of it learns; with task.kind: diagnosis"
    )
    training: Training = Field(Training(), description="what happens inside a hospital")
    aggregation: Aggregation = Field(Aggregation(), description="how updates become a model")
    privacy: Privacy = Field(description="what a patient is promised")
    evaluation: Evaluation = Field(Evaluation(), description="how the model is measured")
    acceptance: Acceptance | None = Field(
        None, description="roll back a model that got worse; absent: every model is accepted"
    )
    sites: Annotated[Listed[Site], Field(max_length=MAX_SITES)] = Field(
        (), description="every hospital; may be absent where `simulation` makes them"
    )
    quorum: Quorum = Field(Quorum(), description="who may conspire, and how many must answer")
    deadlines: Deadlines = Field(Deadlines(), description="how long the coordinator waits")
    cases: CaseRules | None = Field(
        None,
        description="what is made of encounters, for hospitals whose records lie in a system; "
        "tables hold cases already",
    )
    simulation: Simulation | None = Field(None, description="how one machine plays all hospitals")

    @model_validator(mode="after")
    def _rules(self) -> Self:
        rules = Rules()
        rules.require(
            self.evaluation.every <= self.training.rounds,
            "evaluation.every",
            f"is more than training.rounds ({self.training.rounds}): nothing would be measured",
        )
        rules.require(
            self.acceptance is None or self.evaluation.every == 1,
            "evaluation.every",
            "must be 1 with a section acceptance: every model is judged",
        )
        half = self.model is not None and self.model.precision == "bfloat16"
        rules.require(
            not half or self.privacy.mode == "none",
            "model.precision",
            "must not be bfloat16 with a privacy mode: its rounding lets one patient change what "
            "others contribute",
        )
        if self.privacy.mode == "joint":
            self._joint_rules(rules)
        if self.aggregation.optimizer.name == "scaffold":
            self._scaffold_rules(rules)
        if self.training.personal:
            self._personal_rules(rules)
        self._task_rules(rules)
        self._site_rules(rules)
        if self.party_count is not None and self.party_count >= MIN_SITES:
            self._quorum_rules(rules, self.party_count)
        if self.simulation is not None:
            self._simulation_rules(rules, self.simulation)
        rules.done()
        return self

    def _task_rules(self, rules: Rules) -> None:
        task = self.task
        message = f"has no effect with task.kind: {task.kind}"
        if task.pretrained:
            rules.require(self.model is not None, "model", "is missing")
        else:
            told = f"{message}, which says what learns; remove it"
            rules.require(self.model is None, "model", told)
        share = self.privacy.statistics_epsilon
        told = f"{message}, whose inputs are not normalised; remove it"
        rules.require(share is None or bool(task.features), "privacy.statistics_epsilon", told)
        two = isinstance(task.outcome, Classes) and len(task.outcome.labels) == 2  # noqa: PLR2004
        for key, wrong in () if self.cases is None else misfits(task, self.cases):
            rules.require(False, f"cases.{key}", wrong)  # noqa: FBT003
        told = "needs a task with exactly two labels"
        rules.require(two or not self.evaluation.score_bins, "evaluation.score_bins", told)

    def _joint_rules(self, rules: Rules) -> None:
        """A joint round is one step of the server's optimiser on everybody's clipped gradients."""
        steps = self.training.local_steps
        rules.require(
            steps == 1,
            "training.local_steps",
            f"must be 1 with privacy.mode: joint, where a round is one step (got {steps})",
        )
        message = "has no effect with privacy.mode: joint, where only the server's optimiser steps"
        plain = self.training.optimizer == Optimizer()
        rules.require(plain, "training.optimizer", message + "; remove it")
        rules.require(not self.training.proximal, "training.proximal", message + "; remove it")
        rules.require(
            self.aggregation.ring_bits in {None, JOINT_RING_BITS},
            "aggregation.ring_bits",
            f"must be {JOINT_RING_BITS} with privacy.mode: joint, or be left out",
        )
        for index, site in enumerate(self.sites):
            where = f"sites.{index}.weight"
            message = "must be 1 with privacy.mode: joint: every patient counts alike"
            rules.require(site.weight == 1, where, message)

    def _scaffold_rules(self, rules: Rules) -> None:
        """Control variates are mean gradients, read off the way that equal plain steps went."""
        name = "aggregation.optimizer.name"
        rules.require(
            self.privacy.mode != "joint",
            name,
            "must not be scaffold with privacy.mode: joint, where a round is one step: hospitals "
            "cannot drift apart in it, and a correction of one's own would lie outside the noise",
        )
        local = self.training.optimizer
        plain = local.name == "sgd" and not local.momentum and not local.weight_decay
        rules.require(
            self.privacy.mode == "joint" or plain,
            "training.optimizer",
            "must be sgd without momentum and weight_decay with aggregation.optimizer.name: "
            "scaffold, which reads mean gradients off plain steps",
        )
        rules.require(
            not self.training.proximal,
            "training.proximal",
            "must be 0 with aggregation.optimizer.name: scaffold, which corrects drift itself",
        )
        rules.require(
            self.acceptance is None,
            "acceptance",
            "must be absent with aggregation.optimizer.name: scaffold: hospitals' control variates "
            "cannot be rolled back with a model",
        )

    def _personal_rules(self, rules: Rules) -> None:
        """What stays at a hospital is in no sum: nothing that needs everybody's can hold it."""
        for index in repeats(self.training.personal):
            rules.require(False, f"training.personal.{index}", "is listed twice")  # noqa: FBT003
        rules.require(
            self.privacy.mode != "joint",
            "training.personal",
            "must be absent with privacy.mode: joint: what stays at a hospital would carry its own "
            "small share of the noise alone, and the next update would tell of it",
        )
        told = "must be absent with training.personal: "
        rules.require(
            self.aggregation.optimizer.name != "scaffold",
            "aggregation.optimizer.name",
            "must not be scaffold with training.personal: control variates correct what is common",
        )
        rules.require(
            self.acceptance is None,
            "acceptance",
            told + "hospitals' own layers cannot be rolled back with a model",
        )
        rules.require(
            self.aggregation.average is None,
            "aggregation.average",
            told + "hospitals' own layers fit the last model, not an average",
        )

    def _site_rules(self, rules: Rules) -> None:
        count = len(self.sites)
        if count == 0:
            message = "is missing: list the hospitals, or describe a simulation"
            rules.require(self.simulation is not None, "sites", message)
            return
        rules.require(
            count >= MIN_SITES, "sites", f"must list at least {MIN_SITES} hospitals (got {count})"
        )
        for index in repeats(site.id for site in self.sites):
            rules.require(False, f"sites.{index}.id", "is listed twice")  # noqa: FBT003

    def _quorum_rules(self, rules: Rules, count: int) -> None:
        colluders = self.colluders(count)
        rules.require(
            colluders <= count - 2,
            "quorum.colluders",
            f"must be at most {count - 2} of {count} hospitals: a sum over fewer than two honest "
            f"ones hides nothing (got {colluders})",
        )
        asked = self.quorum.survivors
        if asked is None or colluders > count - 2:
            return
        least = quorums.quorum(count, colluders)
        rules.require(
            least <= asked <= count,
            "quorum.survivors",
            f"must lie between {least}, which withstands {colluders} colluders, and the {count} "
            f"hospitals (got {asked})",
        )

    def _simulation_rules(self, rules: Rules, simulation: Simulation) -> None:
        split, listed = simulation.split, len(self.sites)
        system = simulation.data.system is not None
        told = "is missing: it says what of a hospital's system is a case"
        rules.require(not system or self.cases is not None, "cases", told)
        told = "has no effect with a system, which knows its hospitals; remove it"
        rules.require(not system or split.column is None, "simulation.split.column", told)
        named = system or split.by != "column" or split.column is not None
        rules.require(named, "simulation.split.column", "is needed with by: column")
        if split.by != "column":
            rules.require(
                split.sites is not None or listed > 0,
                "simulation.split.sites",
                f"is needed with by: {split.by} where the study lists no sites",
            )
            rules.require(
                listed == 0 or split.sites in {None, listed},
                "simulation.split.sites",
                f"differs from the {listed} sites that the study lists",
            )
        if split.classes_per_site is not None:
            rules.require(
                split.classes_per_site <= len(self.labels),
                "simulation.split.classes_per_site",
                f"is more than the {len(self.labels)} labels",
            )
        rules.require(
            split.by not in {"dirichlet", "pathological"} or isinstance(self.task.outcome, Classes),
            "simulation.split.by",
            f"must be column, iid or quantity with task.kind: {self.task.kind}, where a record has "
            "no single label",
        )
        known = {site.id for site in self.sites} or set(simulated_sites(split.sites or 0))
        for index, fault in enumerate(simulation.faults):
            where = f"simulation.faults.{index}"
            message = f"is after the last round ({self.training.rounds})"
            rules.require(fault.round <= self.training.rounds, f"{where}.round", message)
            message = "is not a site of the study"
            rules.require(not known or fault.site in known, f"{where}.site", message)
        count = self.party_count
        if count is not None and count >= MIN_SITES and self.colluders(count) <= count - 2:
            spare = count - self.quorum_size(count)
            rules.require(
                simulation.dropouts_per_round <= spare,
                "simulation.dropouts_per_round",
                f"is more than the {spare} that the quorum can spare: no round would end",
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes or labels that the model tells apart; none where it predicts a number."""
        return self.task.outcome.labels

    @property
    def diagnosis(self) -> DiagnosisTask:
        """The task, where it is about notes. Raises TypeError where it is another."""
        if not isinstance(self.task, DiagnosisTask):
            raise TypeError(f"a study of kind {self.task.kind} reads no notes")
        return self.task

    @property
    def tabular(self) -> TabularTask:
        """The task, where it is about numbers. Raises TypeError where it is another."""
        if not isinstance(self.task, TabularTask):
            raise TypeError(f"a study of kind {self.task.kind} has no numeric features")
        return self.task

    @property
    def network(self) -> ModelChoice:
        """Which network learns. Raises TypeError where the task itself says it."""
        if self.model is None:
            raise TypeError(f"a study of kind {self.task.kind} has no section model")
        return self.model

    @property
    def architecture(self) -> tuple[str, str]:
        """What learns and which part of it, in words: (backbone, tuning)."""
        if self.model is not None:
            return self.model.backbone, self.model.tuning
        return self.task.network_name, "full"

    @property
    def feature_count(self) -> int:
        """F, the numeric features whose statistics are counted; 0 where there are none."""
        return len(self.task.features)

    @property
    def party_count(self) -> int | None:
        """n, or None where only the data of a simulation says which hospitals there are."""
        if self.sites:
            return len(self.sites)
        return None if self.simulation is None else self.simulation.split.sites

    def colluders(self, count: int) -> int:
        """C among `count` hospitals: as signed, or a third of them and at least one."""
        named = self.quorum.colluders
        return quorums.colluders(count) if named is None else named

    def quorum_size(self, count: int) -> int:
        """Q: how many of `count` hospitals must agree before anything is revealed."""
        asked = self.quorum.survivors
        return quorums.quorum(count, self.colluders(count)) if asked is None else asked

    def honest(self, count: int) -> int:
        """H = Q - c: honest survivors of `count` hospitals that every round has at least."""
        return self.quorum_size(count) - self.colluders(count)

    @property
    def ring_bits(self) -> Literal[24, 32]:
        """Bits of a masked word of the update."""
        named = self.aggregation.ring_bits
        if named is not None:
            return named
        return JOINT_RING_BITS if self.privacy.mode == "joint" else 24

    def with_sites(self, sites: Sequence[Site]) -> Study:
        """The same study with these sites, and the simulation's own list gone; checked anew."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**fields, "sites": tuple(sites)})

    def terms(self) -> dict[str, Term]:
        """What every site signs: all fields but `simulation`, as text, integers and tuples.

        Floats are their shortest round-trip decimal (`repr`), true and false are text, and an
        absent value is the text `none`, so that every language encodes the same bytes.
        """
        chosen = {name: _term(getattr(self, name)) for name in sorted(type(self).model_fields)}
        del chosen["simulation"]
        return chosen


def _term(value: object) -> Term:
    """One value of the signed terms."""
    if isinstance(value, BaseModel):
        return {name: _term(getattr(value, name)) for name in sorted(type(value).model_fields)}
    if isinstance(value, dict):
        return {name: _term(value[name]) for name in sorted(value)}
    if isinstance(value, tuple):
        return tuple(_term(item) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return repr(value)
    if value is None:
        return "none"
    if isinstance(value, str | int):
        return value
    raise TypeError(f"a study has no field of type {type(value).__name__}")


def simulated_sites(count: int) -> tuple[str, ...]:
    """The ids of hospitals that only a split makes: site-01, site-02 and so on."""
    width = max(2, len(str(count)))
    return tuple(f"site-{number:0{width}d}" for number in range(1, count + 1))
