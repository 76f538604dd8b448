"""What a study will do, before anything runs: with whom, for what epsilon, at what cost.

Pure: it reads the study's public terms and a number of parameters, and asks the accountant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from common.accountant import DpEvent, epsilon, solve_noise_multiplier, solve_sigma
from common.errors import Code, ConfigError
from common.joint import audiences, joint_noise
from common.metrics import TITLES, scoring_of
from common.secagg.quorum import tolerates
from common.statistics import StatisticsLayout
from common.study import Study

__all__ = [
    "AudiencePlan",
    "CostModel",
    "EvaluationPlan",
    "JointPlan",
    "Plan",
    "StatisticsPlan",
    "TrainingPlan",
    "evaluation_rounds",
    "message_bytes",
    "noise_to_signal",
    "plan",
    "render",
]

_CURVE_POINTS = 50
_WEAK_EPSILON = 10.0
_ROUNDING = 0.02
STATISTICS_SHARE = 0.1
"""The part of epsilon that the normalisation statistics get where the study does not say."""

_PLACES_CHECKED = 8


@dataclass(frozen=True, slots=True)
class CostModel:
    """The small cost model behind the seconds of a plan: one CPU core and an ordinary line.

    Units:
        flops: floating-point operations per second of training (BERT on one core: about 1e11).
        mask_bytes: AES-256-CTR bytes per second. link_bytes: bytes per second up and down.
        fixed: seconds per round for everything that does not grow with the model.
    """

    flops: float = 1e11
    mask_bytes: float = 7e9
    link_bytes: float = 12.5e6
    fixed: float = 0.05


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Differential privacy of the training, for one patient of one hospital.

    Units:
        epsilon: after all rounds and all spare rounds, the most that the study can spend.
        curve: (round, epsilon after it), every round, or about 50 points of a long study,
            where none is burned.
        noise_to_signal: the noise of a round's mean update against its largest possible
            signal, in L2; 0.3 or less is comfortable. With mode local sigma * sqrt(d) / B, divided
            by sqrt(n * steps) because every hospital's every step draws its own noise; with mode
            joint sigma * sqrt(d) / (n * B), times sqrt(n / h) because all n shares are in the sum
            where nobody drops out.
        budget_rounds: how many rounds, burned ones included, the study's epsilon pays for.
    """

    sampling_rate: float
    expected_batch: float
    local_steps: int
    spare_rounds: int
    clip_norm: float
    noise_multiplier: float
    solved: bool
    epsilon: float
    budget: float
    delta: float
    curve: tuple[tuple[int, float], ...]
    budget_rounds: int
    noise_to_signal: float


@dataclass(frozen=True, slots=True)
class AudiencePlan:
    """What the training costs a patient against one audience, all spare rounds included."""

    name: str
    told: str
    noise_multiplier: float
    epsilon: float


@dataclass(frozen=True, slots=True)
class JointPlan:
    """The noise of a joint study.

    Units:
        honest: h = Q - c, the survivors whose shares are counted on.
        exponent: of the grid 2**-exponent.
        share_std: standard deviation of one hospital's share, in grid units.
        rounding: how much larger the noise is because of the grid; 0.01 is one per cent.
        audiences: epsilon by who conspires; the ledger charges the one of `colluders`.
    """

    honest: int
    exponent: int
    share_std: float
    rounding: float
    audiences: tuple[AudiencePlan, ...]


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """The evaluation's releases; under DP, what they cost a held-out patient.

    Held-out patients never train, so a patient pays for training or for evaluation, never
    for both: the study's epsilon for a patient is the larger of the two.

    Units:
        noise_multiplier: Gaussian noise over the sensitivity of one patient.
        epsilon: of all releases, those of spare rounds included.
        count_noise: standard deviation, in patients, of one cell of the summed metrics.
        score: what models are compared by, in words.
        score_noise: about its standard deviation, where the number of held-out patients is known.
    """

    rounds: tuple[int, ...]
    words: int
    score: str
    noise_multiplier: float | None
    epsilon: float | None
    count_noise: float | None
    score_noise: float | None


@dataclass(frozen=True, slots=True)
class StatisticsPlan:
    """The statistics of numeric features; under DP, what they cost a training patient.

    Units:
        noise_multiplier: Gaussian noise over the sensitivity sqrt(3F/8) of one patient.
        epsilon: of one release alone; the training's epsilon counts it, and its retries, too.
        count_noise: standard deviation of the summed values of a feature, in patients at the
            full width of the declared range.
    """

    features: int
    words: int
    noise_multiplier: float | None
    epsilon: float | None
    count_noise: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a study will do.

    Units:
        bytes: one hospital, one round; the update is 3 (24-bit ring) or 4 bytes per parameter,
            each metric word 8 bytes, the rest `message_bytes`.
        seconds: one round, from `CostModel`; an order of magnitude, not a promise.
    """

    study: str
    mode: str
    parties: int
    sites: tuple[str, ...]
    quorum: int
    dropouts_tolerated: int
    colluders_tolerated: int
    rounds: int
    parameters: int
    ring_bits: int
    labels: int
    patients: Mapping[str, int]
    training: TrainingPlan | None
    evaluation: EvaluationPlan
    bytes_up: int
    bytes_down: int
    seconds_training: float
    seconds_masking: float
    seconds_network: float
    warnings: tuple[str, ...] = field(default=())
    statistics: StatisticsPlan | None = None
    joint: JointPlan | None = None
    engine: str = ""
    personal: tuple[str, ...] = ()

    @property
    def seconds_per_round(self) -> float:
        """All of a round's estimated seconds."""
        return self.seconds_training + self.seconds_masking + self.seconds_network

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        return {**asdict(self), "seconds_per_round": self.seconds_per_round}


def evaluation_rounds(study: Study) -> tuple[int, ...]:
    """The rounds after which the model is measured: every `every`-th, and always the last.

    Round 0 is the initial model: with an acceptance gate the first round is compared with it.
    """
    rounds, every = study.training.rounds, study.evaluation.every
    first = (0,) if study.acceptance is not None else ()
    return first + tuple(r for r in range(1, rounds + 1) if r % every == 0 or r == rounds)


def message_bytes(parties: int) -> tuple[int, int]:
    """About how many bytes of protocol messages one hospital sends and receives per round.

    Up: per other hospital a sealed pair of shares, its commitments and a tag (330 bytes), an
    unmasking share (70), and about 800 bytes of fixed fields and signatures. Down: everyone's
    head with its tags and commitments (about 700 + 130 per hospital and hospital).
    """
    return 800 + 400 * parties, 800 + 700 * parties + 130 * parties * parties


def plan(
    study: Study,
    parameters: int,
    *,
    sites: tuple[str, ...] | None = None,
    patients: Mapping[str, int] | None = None,
    backbone_parameters: int = 0,
    cost: CostModel | None = None,
    engine: str = "",
    crowded: Mapping[str, int] | None = None,
) -> Plan:
    """What `study` will do with a model of `parameters` trainable parameters.

    Args:
        study: the terms.
        parameters: d, trainable parameters.
        sites: the hospitals, where only the data of a simulation names them.
        patients: patients by hospital, where one user may know them (a simulation).
        backbone_parameters: parameters of the frozen part, for the seconds.
        cost: another cost model.
        engine: what computes clipped sums, and why, where the model was built.
        crowded: patients with more notes than the study reads, by hospital.

    Raises:
        ConfigError: no noise reaches the study's epsilon, or its hospitals are not known.
    """
    cost = CostModel() if cost is None else cost
    names = tuple(site.id for site in study.sites) if sites is None else sites
    parties = len(names) or study.party_count
    if not parties:
        raise ConfigError(Code.PLAN_IMPOSSIBLE, "The study does not say which hospitals there are.")
    counts = {} if patients is None else dict(patients)
    quorum = study.quorum_size(parties)
    statistics = _statistics(study, parties)
    training = _training(study, parameters, parties, statistics)
    evaluation = _evaluation(study, parties, counts)
    up, down = message_bytes(parties)
    joint = None if training is None else _joint(study, parameters, parties, training, statistics)
    vector = parameters * study.ring_bits // 8 + 8 * evaluation.words
    seconds = _seconds(study, parameters, backbone_parameters, parties, cost)
    return Plan(
        study=study.name,
        mode=study.privacy.mode,
        parties=parties,
        sites=names,
        quorum=quorum,
        dropouts_tolerated=tolerates(parties, quorum),
        colluders_tolerated=study.colluders(parties),
        rounds=study.training.rounds,
        parameters=parameters,
        ring_bits=study.ring_bits,
        labels=len(study.labels),
        patients=counts,
        training=training,
        evaluation=evaluation,
        bytes_up=up + vector,
        bytes_down=down + vector,
        seconds_training=seconds[0],
        seconds_masking=seconds[1],
        seconds_network=(up + down + 2 * vector) / cost.link_bytes,
        warnings=(
            *_warnings(study, parties - quorum, training, evaluation, counts, joint),
            *_crowded(study, {} if crowded is None else crowded),
        ),
        statistics=statistics,
        joint=joint,
        engine=engine,
        personal=study.training.personal,
    )


def _training(
    study: Study, parameters: int, parties: int, statistics: StatisticsPlan | None
) -> TrainingPlan | None:
    privacy, terms = study.privacy, study.training
    if privacy.mode == "none":
        return None
    budget, delta, clip = privacy.epsilon, privacy.delta, privacy.clip_norm
    if budget is None or delta is None or clip is None:
        raise ValueError("a checked study with a privacy mode names epsilon, delta and clip_norm")
    # A burned round is charged and tried again: the noise is solved for the spare rounds, too.
    most = terms.rounds + terms.spare_rounds
    releases = _Releases(study, statistics, delta)
    sigma = privacy.noise_multiplier
    if sigma is None:
        sigma = _solve_training(study, releases, budget)
    chosen = sigma

    def spent(rounds: int) -> float:
        return releases.epsilon(chosen, rounds)

    total = releases.most(sigma)
    if privacy.mode == "joint" and total > budget:
        raise ConfigError(
            Code.PLAN_IMPOSSIBLE,
            f"noise_multiplier {sigma:g} spends epsilon {total:.2f} of {budget:g}, and joint "
            "hospitals reserve all of it at once.",
        )
    return TrainingPlan(
        sampling_rate=terms.sampling_rate,
        expected_batch=terms.expected_batch,
        local_steps=terms.local_steps,
        spare_rounds=terms.spare_rounds,
        clip_norm=clip,
        noise_multiplier=sigma,
        solved=privacy.noise_multiplier is None,
        epsilon=total,
        budget=budget,
        delta=delta,
        curve=tuple((r, spent(r)) for r in _curve_rounds(terms.rounds)),
        budget_rounds=most if total <= budget else _affordable(spent, most, budget),
        noise_to_signal=noise_to_signal(
            study, sigma, parameters=parameters, parties=parties, batch=terms.expected_batch
        ),
    )


def noise_to_signal(
    study: Study, sigma: float, *, parameters: int, parties: int, batch: float
) -> float:
    """A round's noise over its largest possible signal (`TrainingPlan`), at B = `batch`."""
    root = sigma * math.sqrt(parameters) / batch
    if study.privacy.mode == "joint":
        return root / math.sqrt(parties * study.honest(parties))
    return root / math.sqrt(parties * study.training.local_steps)


def _joint(
    study: Study,
    parameters: int,
    parties: int,
    training: TrainingPlan,
    statistics: StatisticsPlan | None,
) -> JointPlan | None:
    if study.privacy.mode != "joint":
        return None
    sigma = training.noise_multiplier
    honest = study.honest(parties)
    noise = joint_noise(
        parties=parties,
        honest=honest,
        parameters=parameters,
        clip_norm=training.clip_norm,
        expected_batch=training.expected_batch,
        noise_multiplier=sigma,
    )
    releases = _Releases(study, statistics, training.delta)
    quorum, colluders = study.quorum_size(parties), study.colluders(parties)
    seen = tuple(
        AudiencePlan(a.name, a.told, sigma * a.factor, releases.most(sigma * a.factor))
        for a in audiences(parties, quorum, colluders)
    )
    return JointPlan(honest, noise.exponent, noise.share_std, noise.rounding, seen)


class _Releases:
    """Everything that a training patient takes part in, by how often each was done."""

    def __init__(self, study: Study, statistics: StatisticsPlan | None, delta: float) -> None:
        self._terms, self._delta = study.training, delta
        self._whole = study.privacy.mode == "joint"
        self._statistics = None if statistics is None else statistics.noise_multiplier

    def epsilon(self, sigma: float, rounds: int, counted: int = 1) -> float:
        """Epsilon of `rounds` training rounds, after statistics that were counted so often."""
        terms = self._terms
        events = [DpEvent(sigma, terms.sampling_rate, terms.local_steps * rounds)]
        if self._statistics is not None:
            events.append(DpEvent(self._statistics, 1.0, counted))
        return epsilon(events, self._delta)

    def most(self, sigma: float) -> float:
        """Epsilon of all rounds, wherever the spare rounds burn: in statistics or in training.

        Many spare rounds are counted in both places, which is an upper bound. So are those of a
        joint study: its hospitals reserve everything at once, before anybody knows where.
        """
        rounds, spare = self._terms.rounds, self._terms.spare_rounds
        if self._statistics is None:
            return self.epsilon(sigma, rounds + spare)
        if self._whole or spare > _PLACES_CHECKED:
            return self.epsilon(sigma, rounds + spare, 1 + spare)
        return max(self.epsilon(sigma, rounds + spare - k, 1 + k) for k in range(spare + 1))


def _solve_training(study: Study, releases: _Releases, budget: float) -> float:
    terms = study.training
    try:
        return solve_sigma(budget, releases.most)
    except ValueError as error:
        steps = terms.local_steps * (terms.rounds + terms.spare_rounds)
        raise ConfigError(
            Code.PLAN_IMPOSSIBLE, f"No noise reaches epsilon {budget:g} in {steps} steps."
        ) from error


def _statistics(study: Study, parties: int) -> StatisticsPlan | None:
    if not study.feature_count:
        return None
    layout, privacy = StatisticsLayout(study.feature_count), study.privacy
    if privacy.epsilon is None or privacy.delta is None:
        return StatisticsPlan(layout.features, layout.words, None, None, None)
    share = privacy.statistics_epsilon
    if share is None:
        share = STATISTICS_SHARE * privacy.epsilon
    sigma = _solve(share, privacy.delta, sampling_rate=1.0, steps=1)
    return StatisticsPlan(
        features=layout.features,
        words=layout.words,
        noise_multiplier=sigma,
        epsilon=epsilon([DpEvent(sigma, 1.0, 1)], privacy.delta),
        count_noise=sigma * layout.sensitivity * math.sqrt(parties),
    )


def _evaluation(study: Study, parties: int, patients: Mapping[str, int]) -> EvaluationPlan:
    privacy = study.privacy
    rounds = evaluation_rounds(study)
    scoring = scoring_of(study)
    score = TITLES[scoring.names[0]]
    if privacy.mode == "none" or privacy.delta is None:
        return EvaluationPlan(rounds, scoring.length, score, None, None, None, None)
    share = privacy.epsilon if privacy.evaluation_epsilon is None else privacy.evaluation_epsilon
    if share is None:
        raise ValueError("a checked study with a privacy mode names epsilon")
    steps = len(rounds) + study.training.spare_rounds
    sigma = _solve(share, privacy.delta, sampling_rate=1.0, steps=steps)
    count_noise = sigma * scoring.sensitivity * math.sqrt(parties)
    held_out = study.evaluation.held_out * sum(patients.values())
    return EvaluationPlan(
        rounds=rounds,
        words=scoring.length,
        score=score,
        noise_multiplier=sigma,
        epsilon=epsilon([DpEvent(sigma, 1.0, steps)], privacy.delta),
        count_noise=count_noise,
        score_noise=scoring.noise(count_noise, held_out) if held_out else None,
    )


def _solve(target: float, delta: float, *, sampling_rate: float, steps: int) -> float:
    try:
        return solve_noise_multiplier(target, delta, sampling_rate=sampling_rate, steps=steps)
    except ValueError as error:
        raise ConfigError(
            Code.PLAN_IMPOSSIBLE, f"No noise reaches epsilon {target:g} in {steps} steps."
        ) from error


def _curve_rounds(rounds: int) -> tuple[int, ...]:
    stride = max(1, math.ceil(rounds / _CURVE_POINTS))
    return tuple(sorted({*range(stride, rounds + 1, stride), 1, rounds}))


def _affordable(spent: Callable[[int], float], rounds: int, budget: float) -> int:
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if spent(middle) <= budget else (low, middle)
    return low


def _seconds(
    study: Study, parameters: int, backbone: int, parties: int, cost: CostModel
) -> tuple[float, float]:
    """Training: 6 operations per parameter and token.

    A head sees one cached feature per note, a perceptron one row: one token.

    Masking: one stream per party over 4-byte words, and about two more passes of the same
    size for quantising, packing and hashing.
    """
    terms = study.training
    whole = study.model is not None and study.model.tuning != "head"
    tokens = study.diagnosis.max_tokens if whole else 1
    size = max(parameters, backbone) if whole else parameters
    operations = 6.0 * size * tokens * terms.local_steps * terms.expected_batch
    masking = 4.0 * parameters * (parties + 2) / cost.mask_bytes
    return operations / cost.flops + cost.fixed, masking


def _warnings(
    study: Study,
    spare: int,
    training: TrainingPlan | None,
    evaluation: EvaluationPlan,
    patients: Mapping[str, int],
    joint: JointPlan | None,
) -> list[str]:
    found: list[str] = []
    if spare == 0:
        found.append("no hospital may drop out of any round: more hospitals, or fewer colluders")
    if training is None:
        found.append("mode none: updates are masked, but nothing is promised to a patient")
        return found
    found.extend(_privacy_warnings(training, patients))
    found.extend(_noise_warnings(study, training, patients))
    if joint is not None and joint.rounding > _ROUNDING:
        found.append(
            f"the grid of the ring makes the noise {joint.rounding:.0%} larger: lower "
            "expected_batch and sampling_rate together, or train fewer parameters"
        )
    found.extend(_patient_warnings(study, training, patients))
    if evaluation.score_noise is not None and evaluation.score_noise > 0.05:  # noqa: PLR2004
        found.append(
            f"the measured {evaluation.score} carries noise of about "
            f"±{evaluation.score_noise:.2f}: "
            "measure less often (evaluation.every)"
        )
    found.extend(_gate_warnings(study, evaluation))
    return found


def _crowded(study: Study, crowded: Mapping[str, int]) -> list[str]:
    if not crowded:
        return []
    shown = ", ".join(f"{site} ({count})" for site, count in sorted(crowded.items()))
    return [f"patients with more than {study.diagnosis.max_notes} notes, the rest unread: {shown}"]


# The bar is the best of many noised scores: of 100 of them about 2.5 deviations too high.
_GATE_NOISES = 5


def _gate_warnings(study: Study, evaluation: EvaluationPlan) -> list[str]:
    noise = evaluation.score_noise
    if study.acceptance is None or noise is None:
        return []
    if study.acceptance.tolerance >= _GATE_NOISES * noise:
        return []
    message = (
        f"acceptance.tolerance {study.acceptance.tolerance:g} is less than five times the noise "
        f"of a measured {evaluation.score} (±{noise:.3f}): good models will be rolled back "
        "by chance"
    )
    return [message]


def _privacy_warnings(training: TrainingPlan, patients: Mapping[str, int]) -> list[str]:
    found: list[str] = []
    if training.epsilon > training.budget:
        found.append(
            f"noise_multiplier {training.noise_multiplier:g} spends epsilon "
            f"{training.epsilon:.2f} of {training.budget:g}: hospitals will refuse after "
            f"{training.budget_rounds} rounds, burned ones included"
        )
    if training.epsilon > _WEAK_EPSILON:
        found.append(f"epsilon {training.epsilon:.1f} is a weak promise")
    largest = max(patients.values(), default=0)
    if largest and training.delta > 1 / (10 * largest):
        found.append(f"delta {training.delta:g} is above 1/(10 x {largest} patients)")
    return found


def _noise_warnings(study: Study, training: TrainingPlan, patients: Mapping[str, int]) -> list[str]:
    """Where the noise drowns what there is to learn: how many patients would be needed.

    Signal grows with q times the patients of a hospital; B is only what the study expects of it.
    """
    ratio = training.noise_to_signal
    batch = training.expected_batch
    if patients:
        mean = sum(patients.values()) / len(patients)
        there = training.sampling_rate * mean * (1 - study.evaluation.held_out)
        # The mean is over everybody: one step's signal is what all patients of it add up to.
        ratio *= batch / there
    if ratio <= 1:
        return []
    needed = ratio * (there if patients else batch) / training.sampling_rate
    needed /= 1 - study.evaluation.held_out
    message = (
        f"noise is {ratio:.1f} times the largest signal of a round: about {needed:,.0f} patients "
        "per hospital would make them equal; or train fewer parameters, raise sampling_rate with "
        "expected_batch, or plan fewer rounds"
    )
    if study.privacy.mode == "local":
        message += "; privacy.mode: joint adds the noise once instead of at every hospital"
    return [message]


def _patient_warnings(
    study: Study, training: TrainingPlan, patients: Mapping[str, int]
) -> list[str]:
    needed = training.expected_batch / training.sampling_rate
    off: list[str] = []
    for site, count in sorted(patients.items()):
        there = count * (1 - study.evaluation.held_out)
        if not needed / 2 <= there <= needed * 2:
            off.append(f"{site} ({there:.0f})")
    if not off:
        return []
    shown = ", ".join(off[:5]) + (f" and {len(off) - 5} more" if len(off) > 5 else "")  # noqa: PLR2004
    message = (
        f"expected_batch {training.expected_batch:g} at sampling_rate "
        f"{training.sampling_rate:g} suits about {needed:.0f} training patients per hospital; "
        f"far from it: {shown}"
    )
    return [message]


# ------------------------------------------------------------------------------ rendering


def render(plan: Plan) -> str:
    """The plan as a text table, one fact a line."""
    rows = [*_party_rows(plan), *_training_rows(plan), *_joint_rows(plan)]
    rows += _statistics_rows(plan)
    rows += [*_evaluation_rows(plan), *_cost_rows(plan)]
    width = max(len(name) for name, _ in rows)
    lines = [f"Plan of study {plan.study}", ""]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows]
    if plan.training is not None:
        lines += ["", "  epsilon after each round", *_curve_lines(plan.training.curve)]
    if plan.warnings:
        lines += ["", *(f"  warning: {warning}" for warning in plan.warnings)]
    return "\n".join(lines)


def _party_rows(plan: Plan) -> list[tuple[str, str]]:
    rows = [
        ("hospitals", str(plan.parties)),
        ("quorum", f"{plan.quorum} of {plan.parties}"),
        ("tolerates", f"{plan.dropouts_tolerated} dropouts, {plan.colluders_tolerated} colluders"),
        ("rounds", str(plan.rounds)),
    ]
    if plan.patients:
        counts = plan.patients.values()
        total = f"{sum(counts)} in all, {min(counts)} to {max(counts)} per hospital"
        rows.insert(1, ("patients", total))
    return rows


def _training_rows(plan: Plan) -> list[tuple[str, str]]:
    training = plan.training
    if training is None:
        return [("privacy", "none: masks only, no promise to a patient")]
    each = "each hospital's own noise" if plan.joint is None else "one noise for all hospitals"
    origin = "solved" if training.solved else "given"
    return [
        ("privacy", f"{plan.mode}: {each}"),
        ("unit of privacy", "patient (add or remove one)"),
        ("sampling rate q", f"{training.sampling_rate:g}"),
        ("expected batch B", f"{training.expected_batch:g}"),
        ("steps", f"{training.local_steps} a round, {training.local_steps * plan.rounds} in all"),
        ("clip norm C", f"{training.clip_norm:g}"),
        ("noise multiplier", f"{training.noise_multiplier:g} ({origin})"),
        *([("clipped sums by", plan.engine)] if plan.engine else []),
        ("epsilon, training", f"{training.curve[-1][1]:.3f} after round {plan.rounds}"),
        (
            "at most",
            (
                f"{training.epsilon:.3f} of {training.budget:g} at delta {training.delta:g}, "
                f"if {training.spare_rounds} rounds burn and are tried again"
            ),
        ),
        ("noise / signal", f"{training.noise_to_signal:.2f} (0.3 or less is comfortable)"),
    ]


def _joint_rows(plan: Plan) -> list[tuple[str, str]]:
    joint = plan.joint
    if joint is None:
        return []
    rows = [
        (
            "noise added",
            (
                f"once, in shares: {joint.honest} honest survivors, quorum {plan.quorum} less "
                f"{plan.colluders_tolerated} colluders, are enough"
            ),
        )
    ]
    rows += [("epsilon against", f"{a.epsilon:.3f}  {a.told}") for a in joint.audiences]
    return rows


def _statistics_rows(plan: Plan) -> list[tuple[str, str]]:
    statistics = plan.statistics
    if statistics is None:
        return []
    counted = f"mean and deviation of {statistics.features} features, before training"
    if statistics.epsilon is None or statistics.count_noise is None:
        return [("normalisation", counted)]
    cost = (
        f"{statistics.epsilon:.3f} of the above (noise multiplier "
        f"{statistics.noise_multiplier:g}, ±{statistics.count_noise:.0f} patients)"
    )
    return [("normalisation", counted), ("epsilon, statistics", cost)]


def _evaluation_rows(plan: Plan) -> list[tuple[str, str]]:
    evaluation = plan.evaluation
    rows = [("evaluations", f"{len(evaluation.rounds)}, the last after round {plan.rounds}")]
    if evaluation.epsilon is None or evaluation.noise_multiplier is None:
        return rows
    noise = f"noise multiplier {evaluation.noise_multiplier:g}"
    if evaluation.score_noise is not None:
        noise += f", {evaluation.score} ±{evaluation.score_noise:.3f}"
    return [
        *rows,
        ("epsilon, evaluation", f"{evaluation.epsilon:.3f}, held-out patients only ({noise})"),
    ]


def _cost_rows(plan: Plan) -> list[tuple[str, str]]:
    seconds = plan.seconds_per_round
    own = [("stay at each hospital", " and ".join(plan.personal))] if plan.personal else []
    return [
        ("parameters trained", f"{plan.parameters:,} in a {plan.ring_bits}-bit ring"),
        *own,
        ("bytes up", f"{_size(plan.bytes_up)} per hospital and round"),
        ("bytes down", f"{_size(plan.bytes_down)} per hospital and round"),
        ("time", f"about {_time(seconds)} a round, {_time(seconds * plan.rounds)} in all"),
    ]


def _curve_lines(curve: tuple[tuple[int, float], ...]) -> list[str]:
    cells = [f"{number:>5} {value:6.3f}" for number, value in curve]
    return ["  " + "   ".join(cells[start : start + 5]) for start in range(0, len(cells), 5)]


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:  # noqa: PLR2004
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} GB"


def _time(seconds: float) -> str:
    if seconds < 90:  # noqa: PLR2004
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"  # noqa: PLR2004
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"  # noqa: PLR2004
