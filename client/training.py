"""Local training: one round of DP-SGD, or of plain mini-batches, and the metric words after it.

With joint privacy a round is this hospital's part of one step of all hospitals.

Everything public about a step (sampling rate, expected batch, steps, clip norm, noise) comes
from the study; nothing is derived from how many patients this site has.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from client.devices import choose_device
from client.privacy.admission import admit
from client.privacy.discrete import DiscreteGaussian
from client.privacy.engine import EngineKind, PerSampleEngine, choose_engine
from client.privacy.noise import SecureNoise
from client.privacy.sampling import sample_patients
from client.tasks.base import Learner, Normalising, Probing, Varying
from common.errors import Code, DataError
from common.joint import SLACK as JOINT_SLACK
from common.joint import JointNoise
from common.metrics import METRIC_SCALE, scoring_of, words_from_counts
from common.ports import Tensors
from common.statistics import DEVIATION, MEAN, STATISTIC_SCALE, StatisticsLayout
from common.strategy import CORRECTION, released
from common.study import Optimizer, Study
from common.tensors import Layout

# Noise on the metrics is rounded to words; this many words hide the float's low-order bits.
_WORD_STD_FLOOR = 1000.0
_STATISTICS_FLOOR = _WORD_STD_FLOOR / (STATISTIC_SCALE * StatisticsLayout(1).sensitivity)


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What the study says about a round inside a hospital.

    Args:
        mode: `joint`, one noised part of a common step; `local`, DP-SGD; `none`, plain
            mini-batches without any promise to a patient.
        sampling_rate: q, with `local`.
        expected_batch: B, the public divisor of a step's sum; without DP, the batch in patients.
        micro_batch: rows in memory at a time; a patient's rows are never parted.
        clip_norm: C, without `none`.
        noise_multiplier: sigma over C, with `local`.
        joint: the grid and this hospital's share of the noise, with `joint`.
        engine: what computes clipped sums.
        evaluation_noise: the same for the metrics, over their sensitivity, without `none`.
        statistics_noise: the same for the statistics of numeric features.
        evaluation_sensitivity: of the metric vector to one patient.
    """

    mode: Literal["joint", "local", "none"]
    local_steps: int
    expected_batch: float
    micro_batch: int
    learning_rate: float
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.0
    proximal: float = 0.0
    sampling_rate: float = 1.0
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    evaluation_noise: float | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    statistics_noise: float | None = None
    evaluation_sensitivity: float = math.sqrt(2)
    joint: JointNoise | None = None
    engine: EngineKind = "auto"

    def __post_init__(self) -> None:
        if self.mode == "local" and not (self.clip_norm and self.noise_multiplier):
            raise ValueError("mode local needs a clip norm and a noise multiplier")
        if self.mode == "joint" and not (self.clip_norm and self.joint and self.local_steps == 1):
            raise ValueError("mode joint needs a clip norm, shares of noise, and a single step")
        if self.evaluation_noise is not None and self._word_std < _WORD_STD_FLOOR:
            raise ValueError("the evaluation noise is too small to be rounded safely")
        if self.statistics_noise is not None and self.statistics_noise < _STATISTICS_FLOOR:
            raise ValueError("the statistics' noise is too small to be rounded safely")

    @property
    def _word_std(self) -> float:
        return math.fabs(self.evaluation_noise or 0) * self.evaluation_sensitivity * METRIC_SCALE

    @staticmethod
    def from_study(
        study: Study,
        *,
        noise_multiplier: float | None,
        evaluation_noise: float | None,
        statistics_noise: float | None = None,
        joint: JointNoise | None = None,
    ) -> TrainingSettings:
        """The study's settings with the noise that its bundle resolved.

        A joint study without `joint` is what a hospital does on its own: its update is its part
        of the step, in real numbers that the secure sum does not take.
        """
        training, optimizer = study.training, study.training.optimizer
        private = study.privacy.mode != "none"
        mode = study.privacy.mode
        if mode == "joint" and joint is None:
            mode, optimizer = "local", Optimizer(name="sgd", learning_rate=1.0)
        return TrainingSettings(
            mode=mode,
            local_steps=training.local_steps,
            expected_batch=training.expected_batch,
            micro_batch=training.micro_batch,
            learning_rate=optimizer.learning_rate,
            optimizer=optimizer.name,
            weight_decay=optimizer.weight_decay,
            momentum=optimizer.momentum,
            proximal=training.proximal,
            sampling_rate=training.sampling_rate,
            clip_norm=study.privacy.clip_norm,
            noise_multiplier=noise_multiplier if private else None,
            evaluation_noise=evaluation_noise if private else None,
            # Rounding in bfloat16 couples the patients of a batch beyond any fixed slack.
            precision="float32" if private or study.model is None else study.model.precision,
            statistics_noise=statistics_noise if private else None,
            evaluation_sensitivity=scoring_of(study).sensitivity,
            joint=joint,
            engine=study.privacy.engine,
        )


class LocalTrainer:
    """The Trainer port over a learner.

    Args:
        layout: the tensors of an update.
        own: tensors that stay at this hospital; they are trained with the others, in the same
            clipped and noised steps.

    Guarantee: with mode `local`, `train` is `local_steps` Poisson-subsampled Gaussian mechanisms
        of noise multiplier `noise_multiplier` with the patient as the unit (docs/PRIVACY.md),
        and the model was admitted first. With mode `joint` it is one clipped sum with this
        hospital's share of the noise: the promise is the sum's, over the quorum. After `train`
        the object holds neither the sample, nor the key of the noise, nor the local weights.
    """

    def __init__(
        self,
        learner: Learner,
        layout: Layout,
        settings: TrainingSettings,
        noise: SecureNoise,
        device: str = "auto",
        own: Layout | None = None,
    ) -> None:
        self._learner = learner
        self._parts = (layout, Layout(()) if own is None else own)
        specs = (spec for part in self._parts for spec in part.specs)
        self._layout = Layout(tuple(sorted(specs, key=lambda spec: spec.name)))
        self._settings = settings
        self._noise = noise
        self._device = choose_device(device)
        self._reduced = _reduced(settings.precision, self._device)
        self._admitted = False
        if settings.mode != "none" and self._device.type == "cuda":
            # TF32 keeps ten bits of a product: its error grows with the number of patients.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        learner.module.to(self._device)
        self._parameters = learner.trainable()
        shapes = {name: tuple(p.shape) for name, p in sorted(self._parameters.items())}
        if shapes != {spec.name: spec.shape for spec in self._layout.specs}:
            raise DataError(
                Code.TRAINABLES_DIFFER,
                f"the model trains {len(shapes)} tensors, the study names "
                f"{len(self._layout.specs)} or other shapes.",
            )

    def train(self, state: Tensors, round_number: int) -> NDArray[np.float32] | NDArray[np.int32]:
        """The update of one round, (d,) in layout order; words on the grid with mode `joint`.

        Where tensors stay here, theirs follow: (d + p,).

        Raises:
            RefusedError: the model does not pass admission.
            DataError: the update is not finite; nothing of it is returned.
        """
        del round_number  # a round has fresh noise and a fresh optimiser, whatever its number
        start = self._layout.flatten(state)
        self._load(start)
        self._normalise(state)
        self._learner.module.train()
        try:
            if self._settings.mode == "joint":
                return self._joint_words()
            if self._settings.mode == "local":
                self._train_privately(start, self._correction(state))
            else:
                self._train_plainly(start, self._correction(state))
            update = self._weights() - start
        finally:
            self._forget(start)
        if not np.isfinite(update).all():
            raise DataError(Code.UPDATE_NOT_FINITE, "the local update is not finite.")
        if not self._parts[1].specs:
            return update
        named = self._layout.unflatten(update)
        return np.concatenate([part.flatten(named) for part in self._parts])

    def measure(self, state: Tensors, round_number: int) -> NDArray[np.int64]:
        """The metric words of `state` on the held-out patients, (m,), noised under DP.

        Measured is the model that would be released: the average, where one is kept.

        Guarantee: one Gaussian mechanism of noise multiplier `evaluation_noise`; the words are
            rounded after the noise, which is post-processing.
        """
        del round_number
        self._load(self._layout.flatten(released(state)))
        self._normalise(state)
        self._learner.module.eval()
        with torch.no_grad(), self._autocast():
            counts = self._learner.measure()
        if self._settings.mode == "none":
            return words_from_counts(counts)
        if self._settings.evaluation_noise is None:
            raise ValueError("a privacy mode needs evaluation noise to measure")
        std = self._settings.evaluation_noise * self._settings.evaluation_sensitivity
        words = words_from_counts(self._noise.add_gaussian(counts, std))
        self._noise.renew()
        return words

    def statistics(self) -> NDArray[np.int64]:
        """The statistic words of the training patients, (3F,), noised under DP.

        Guarantee: one Gaussian mechanism of noise multiplier `statistics_noise`; the words are
            rounded after the noise, which is post-processing.
        """
        if not isinstance(self._learner, Normalising):
            raise TypeError("statistics are asked of a task with numeric features")
        words = self._learner.statistic_words()
        if self._settings.mode == "none":
            return words
        if self._settings.statistics_noise is None:
            raise ValueError("a privacy mode needs statistics noise to count")
        layout = StatisticsLayout(len(words) // 3)
        std = self._settings.statistics_noise * layout.sensitivity * STATISTIC_SCALE
        noised = self._noise.add_gaussian(words.astype(np.float64), std)
        self._noise.renew()
        return np.rint(noised).astype(np.int64)

    def admit(self) -> None:
        """Refuse, before anything is charged, a model that cannot be trained privately.

        Raises RefusedError. Once is enough; without a privacy mode there is nothing to refuse.
        """
        if self._settings.mode != "none" and not self._admitted:
            admit(self._probe(), kind=self._settings.engine)
            self._admitted = True

    # ------------------------------------------------------------------ private steps

    def _train_privately(
        self, start: NDArray[np.float32], correction: Sequence[torch.Tensor]
    ) -> None:
        settings = self._settings
        assert settings.noise_multiplier is not None  # noqa: S101 - checked by the settings
        with self._engine() as engine:
            optimizer, anchor = self._optimizer(), self._anchor(start)
            for _ in range(settings.local_steps):
                self._private_step(engine, settings.noise_multiplier)
                self._pull(anchor)
                self._steer(correction)
                optimizer.step()

    @contextlib.contextmanager
    def _engine(self) -> Iterator[PerSampleEngine]:
        """What computes clipped sums, for an admitted model."""
        settings = self._settings
        assert settings.clip_norm is not None  # noqa: S101 - checked by the settings
        self.admit()
        engine = choose_engine(
            settings.engine,
            self._learner.module,
            self._parameters,
            settings.clip_norm,
            reduced_precision=self._reduced,
        )
        try:
            yield engine
        finally:
            engine.close()

    def _joint_words(self) -> NDArray[np.int32]:
        """-(clipped sum) / B on the grid, plus this hospital's share of the noise, (d,).

        Guarantee: one patient moves the words before the noise by at most `joint.sensitivity`;
            the share is an exact discrete Gaussian that depends on nothing. No word is larger
            than the ring lets any party's be.
        """
        joint = self._settings.joint
        assert joint is not None  # noqa: S101 - checked by the settings
        share = DiscreteGaussian(self._noise, joint.share_std)
        with self._engine() as engine:
            if engine.sensitivity > JOINT_SLACK * engine.clip_norm:
                raise AssertionError("joint noise is sized for float32 sums")
            total = self._clipped_total(engine)
        words = total.to("cpu", torch.float64).numpy()
        # Towards lower loss, as every other update; ldexp is exact, so is the later division.
        words *= -math.ldexp(1.0 / self._settings.expected_batch, joint.exponent)
        np.rint(words, out=words)
        np.clip(words, -joint.signal_bound, joint.signal_bound, out=words)
        if not np.isfinite(words).all():
            raise DataError(Code.UPDATE_NOT_FINITE, "the clipped sum is not finite.")
        noised = words.astype(np.int32)
        share.add_to(noised)
        return noised

    def _probe(self) -> Learner:
        """What is tried at admission: this model over public records, where the task has some."""
        if not isinstance(self._learner, Probing):
            return self._learner
        probe = self._learner.probe()
        probe.module.to(self._device)
        with torch.no_grad():
            for name, parameter in probe.trainable().items():
                parameter.copy_(self._parameters[name])
        return probe

    def _private_step(self, engine: PerSampleEngine, noise_multiplier: float) -> None:
        """Set every gradient to (clipped sum + noise) / B; an empty sample is noise alone."""
        if self._device.type == "cuda":  # the processors are idle while the GPU computes
            self._noise.prefetch(self._layout.size)
        total = self._clipped_total(engine)
        noisy = self._noise.add_gaussian(total, noise_multiplier * engine.sensitivity)
        noisy /= self._settings.expected_batch
        for parameter, gradient in zip(
            self._ordered(), torch.split(noisy, list(self._layout.sizes)), strict=True
        ):
            parameter.grad = gradient.reshape(parameter.shape).to(parameter.dtype)

    def _clipped_total(self, engine: PerSampleEngine) -> torch.Tensor:
        """The clipped sum of one fresh Poisson sample, flat, (d,) float32."""
        self._vary()
        count = self._learner.patient_count()
        sample = sample_patients(self._noise, count, self._settings.sampling_rate)
        total = torch.zeros(self._layout.size, dtype=torch.float32, device=self._device)
        parts = torch.split(total, list(self._layout.sizes))
        for rows, owner, patients in self._micro_batches(sample):
            with self._autocast():
                losses = self._learner.losses(rows)
            sums = engine.clipped_sum(losses, owner, patients).gradients
            for spec, part in zip(self._layout.specs, parts, strict=True):
                part.add_(sums[spec.name].reshape(-1))
        return total

    def _micro_batches(
        self, patients: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], int]]:
        """(rows, owner, patients) pieces of at most `micro_batch` rows, whole patients each."""
        if not len(patients):
            return
        rows, owner = self._learner.rows_of(patients)
        if 0 < len(rows) <= self._settings.micro_batch:
            yield rows, owner, len(patients)
            return
        order = np.argsort(owner, kind="stable")
        rows, owner = rows[order], owner[order]
        ends = np.searchsorted(owner, np.arange(len(patients)), side="right")
        first = begin = 0
        while first < len(patients):
            fitting = np.searchsorted(ends, begin + self._settings.micro_batch, side="right")
            last = max(int(fitting), first + 1)
            end = int(ends[last - 1])
            if end > begin:
                yield rows[begin:end], owner[begin:end] - first, last - first
            first, begin = last, end

    # ------------------------------------------------------------------ plain steps

    def _train_plainly(
        self, start: NDArray[np.float32], correction: Sequence[torch.Tensor]
    ) -> None:
        optimizer, anchor = self._optimizer(), self._anchor(start)
        for batch in self._plain_batches():
            optimizer.clear()
            self._vary()
            pieces = list(self._micro_batches(batch))
            count = sum(len(rows) for rows, _, _ in pieces)
            for rows, _, _ in pieces:
                with self._autocast():
                    losses = self._learner.losses(rows)
                (losses.sum() / count).backward()  # type: ignore[no-untyped-call]
            self._pull(anchor)
            self._steer(correction)
            optimizer.step()

    def _plain_batches(self) -> Iterator[NDArray[np.int64]]:
        """`local_steps` batches; every patient is seen once before any is seen again."""
        count = self._learner.patient_count()
        size = min(count, max(1, round(self._settings.expected_batch)))
        order = np.zeros(0, np.int64)
        for _ in range(self._settings.local_steps if count else 0):
            if not len(order):
                order = self._noise.permutation(count)
            yield order[:size]
            order = order[size:]

    def _vary(self) -> None:
        """A new variation of the inputs, for one step, where the study asks for any."""
        if isinstance(self._learner, Varying) and self._learner.varies:
            self._learner.vary(int(self._noise.uint64(1)[0]))

    # ------------------------------------------------------------------ weights

    def _ordered(self) -> list[nn.Parameter]:
        return [self._parameters[spec.name] for spec in self._layout.specs]

    def _load(self, flat: NDArray[np.float32]) -> None:
        pieces = torch.split(torch.from_numpy(flat), list(self._layout.sizes))
        with torch.no_grad():
            for parameter, piece in zip(self._ordered(), pieces, strict=True):
                parameter.copy_(piece.reshape(parameter.shape))

    def _normalise(self, state: Tensors) -> None:
        """Normalise as the state says: every site alike, because its digest covers it."""
        if isinstance(self._learner, Normalising) and MEAN in state:
            self._learner.set_statistics(state[MEAN], state[DEVIATION])

    def _weights(self) -> NDArray[np.float32]:
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in self._ordered()])
        weights: NDArray[np.float32] = flat.float().cpu().numpy()
        return weights

    def _forget(self, start: NDArray[np.float32]) -> None:
        """Leave nothing behind but the state that came in."""
        self._load(start)
        if isinstance(self._learner, Varying):
            self._learner.vary(None)
        for parameter in self._parameters.values():
            parameter.grad = None
        self._noise.renew()

    def _optimizer(self) -> LocalOptimizer:
        return LocalOptimizer(self._ordered(), self._settings)

    def _anchor(self, start: NDArray[np.float32]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """The parameters that FedProx pulls, and the round's start of each; else nothing.

        What stays here need not agree with anybody's, and is not pulled.
        """
        if not self._settings.proximal:
            return []
        named = self._layout.unflatten(start)
        return [
            (self._parameters[spec.name], torch.from_numpy(named[spec.name]).to(self._device))
            for spec in self._parts[0].specs
        ]

    def _pull(self, anchor: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
        """Add mu * (w - start): under DP after the noise, a function of what is private already.

        Source: Li et al. 2020 (FedProx).
        """
        with torch.no_grad():
            for parameter, home in anchor:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - home, alpha=self._settings.proximal)

    def _correction(self, state: Tensors) -> list[torch.Tensor]:
        """What moves every step's gradient, per parameter; nothing but with scaffold."""
        found = [state.get(CORRECTION + spec.name) for spec in self._layout.specs]
        return [torch.from_numpy(np.array(v)).to(self._device) for v in found if v is not None]

    def _steer(self, correction: Sequence[torch.Tensor]) -> None:
        """Add c - c_i: under DP after the noise, and both are functions of noised updates.

        Source: Karimireddy et al. 2020 (SCAFFOLD).
        """
        with torch.no_grad():
            for parameter, moved in zip(
                self._ordered() if correction else [], correction, strict=True
            ):
                if parameter.grad is not None:
                    parameter.grad.add_(moved)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if not self._reduced:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)


class LocalOptimizer:
    """One round's SGD or AdamW, by the functional forms in `torch.optim`.

    The optimiser objects import PyTorch's compiler at their first step: 0.15 GB that nothing
    here uses. For a small model they also cost more than the step itself.

    Guarantee: bit for bit the steps of `torch.optim.SGD` and `torch.optim.AdamW` with their
        defaults; a parameter without a gradient stays as it is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], settings: TrainingSettings) -> None:
        self._parameters = parameters
        self._settings = settings
        # PyTorch's own choice where it may depend on the device, and known beforehand on a CPU.
        self._foreach = None if any(p.is_cuda for p in parameters) else False
        self._velocities: dict[torch.Tensor, torch.Tensor | None] = {}
        self._moments: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters:
            parameter.grad = None

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        moved = [(p, p.grad) for p in self._parameters if p.grad is not None]
        parameters: list[torch.Tensor] = [p for p, _ in moved]
        gradients = [gradient for _, gradient in moved]
        with torch.no_grad():
            if self._settings.optimizer == "sgd":
                self._sgd(parameters, gradients)
            elif moved:
                self._adamw(parameters, gradients)

    def _sgd(self, parameters: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        settings = self._settings
        velocities = [self._velocities.get(p) for p in parameters]
        sgd(
            parameters,
            gradients,
            velocities,
            foreach=self._foreach,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            lr=settings.learning_rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if settings.momentum:
            self._velocities.update(zip(parameters, velocities, strict=True))

    def _adamw(self, parameters: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        settings = self._settings
        for p in parameters:
            if p not in self._moments:
                self._moments[p] = torch.zeros_like(p), torch.zeros_like(p), torch.tensor(0.0)
        moments = [self._moments[p] for p in parameters]
        adamw(
            parameters,
            gradients,
            [mean for mean, _, _ in moments],
            [square for _, square, _ in moments],
            [],
            [steps for _, _, steps in moments],
            foreach=self._foreach,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def _reduced(precision: str, device: torch.device) -> bool:
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.is_bf16_supported()
    return precision == "bfloat16"
