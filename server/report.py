"""What a run leaves behind beside the model: metrics, privacy statement, model card, plots.

The per-site table exists only in a simulation, where one user owns all hospitals' data; a
real coordinator never has those numbers, and asking for them here is a bug.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import Code, StorageError
from common.joint import audiences
from common.metrics import FALLING, TITLES, Interval, Metrics, Scoring
from common.tasks.diagnosis import OWN_NETWORK
from server.table import Rollbacks, amount, duration, epsilon_range

if TYPE_CHECKING:
    from common.accountant import DpEvent
    from common.bundle import Bundle

__all__ = [
    "SITE_COLUMNS",
    "Conclusion",
    "Evaluation",
    "PrivacyFacts",
    "RoundResult",
    "RunResult",
    "SiteResult",
    "conclude",
    "metrics_json",
    "model_card",
    "privacy_statement",
    "site_rows",
    "site_table",
    "write_report",
]

METRICS_FILE = "metrics.json"
PRIVACY_FILE = "privacy.json"
CARD_FILE = "MODEL_CARD.md"
CURVE_FILE = "plots/learning_curve.png"
SITES_FILE = "plots/sites.png"
# So many models in a row that got worse are no accident of one round.
_MANY_ROLLBACKS = 2


@dataclass(frozen=True, slots=True)
class RoundResult:
    """One round as it is reported.

    Units:
        round: its number in the protocol and in the audit logs, burned rounds counted.
        turn: which training round it was, or tried to be; the evaluation at the end carries
            one more than the last.
        metrics: of the model that the round made; measured in a later round.
        epsilon: largest training epsilon that any site had reserved after the round.
        code: why the round was aborted; None where it completed.
        rejected: whether the acceptance gate rolled its model back.
    """

    round: int
    turn: int
    kind: str
    cohort: int
    survivors: int
    dropouts: tuple[str, ...]
    metrics: Metrics | None
    epsilon: float | None
    bytes_up: int
    seconds: float
    code: str | None = None
    rejected: bool = False

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> RoundResult:
        """The round in what `asdict` gave. Raises ValueError where it is not one."""
        try:
            fields = dict(found)
            measured = fields.pop("metrics")
            metrics = None if measured is None else Metrics.from_json(measured)
            fields["dropouts"] = tuple(fields["dropouts"])
            return RoundResult(metrics=metrics, **fields)
        except (KeyError, TypeError) as error:
            raise ValueError("not a round of a run") from error


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Exact metrics of one model at one site; only a simulation may hold them.

    Attributes:
        scores: by name, the one that models are compared by first; None where it cannot be said.
        intervals: 95 %, by name; a score without one is left out.
    """

    n: int
    scores: Mapping[str, float | None]
    intervals: Mapping[str, Interval]

    @property
    def primary(self) -> float | None:
        """The score that models are compared by."""
        return next(iter(self.scores.values()))

    @property
    def ends(self) -> Interval:
        """The interval of that score; the score itself where there is none."""
        name, value = next(iter(self.scores.items()))
        known = 0.0 if value is None else value
        return self.intervals.get(name, (known, known))


@dataclass(frozen=True, slots=True)
class SiteResult:
    """One site: what its ledger says, and, in a simulation, how well it is served.

    Units:
        epsilon: spent by its training patients, of `cap`; None without privacy.
        together, alone: the federated model, and the site's own, on its held-out patients.
        alone_everywhere: the site's own model on the held-out patients of all sites.
    """

    site: str
    weight: float
    epsilon: float | None
    cap: float | None
    rounds_reserved: int
    rounds_released: int
    patients: int | None = None
    together: Evaluation | None = None
    alone: Evaluation | None = None
    alone_everywhere: Evaluation | None = None


@dataclass(frozen=True, slots=True)
class AudienceFacts:
    """Against whom joint training gives which epsilon: `told` says who that is."""

    name: str
    told: str
    noise_multiplier: float
    epsilon: float


def audience_facts(bundle: Bundle, events: Sequence[DpEvent]) -> tuple[AudienceFacts, ...]:
    """What a training patient's `events` cost against everybody; empty without joint privacy.

    Only the training's noise is shared: every hospital adds all of its statistics' noise itself.
    """
    from common.accountant import DpEvent, epsilon

    study, sigma, delta = bundle.study, bundle.noise_multiplier, bundle.study.privacy.delta
    if study.privacy.mode != "joint" or sigma is None or delta is None:
        return ()
    count, rate = len(study.sites), study.training.sampling_rate
    # Steps and statistics of the very same noise are one event: never told better than it is.
    merged = (bundle.statistics_noise, 1.0) == (sigma, rate)
    facts = []
    for seen in audiences(count, study.quorum_size(count), study.colluders(count)):
        factor = min(1.0, seen.factor) if merged else seen.factor
        scaled = [
            DpEvent(sigma * factor, rate, e.steps)
            if (e.noise_multiplier, e.sampling_rate) == (sigma, rate)
            else e
            for e in events
        ]
        spent = epsilon(scaled, delta)
        facts.append(AudienceFacts(seen.name, seen.told, sigma * seen.factor, spent))
    return tuple(facts)


@dataclass(frozen=True, slots=True)
class PrivacyFacts:
    """What the privacy statement is made of; the largest site's numbers.

    Units:
        epsilon, evaluation_epsilon: what the study promises at most; what was spent is in the
            answers and in the sites.
        answers: training epsilon by accountant, from the ledger of the site that spent most.
        evaluation_answers: the same for its held-out patients.
        evaluation_noise: Gaussian noise over the sensitivity of one patient.
        statistics_noise: the same for the normalisation statistics, over sqrt(3/8 x features); None
            where the study has none. Their epsilon is part of the training's.
        audiences: with joint privacy, the training's epsilon by who conspires.
        steps: private steps that were charged, of the site that spent most.
        engine: what computes clipped sums, and why; empty where the hospitals alone know.
    """

    mode: str
    epsilon: float | None
    delta: float | None
    sampling_rate: float
    expected_batch: float
    local_steps: int
    clip_norm: float | None
    noise_multiplier: float | None
    answers: Mapping[str, float]
    evaluation_epsilon: float | None
    evaluation_noise: float | None
    evaluation_releases: int
    evaluation_answers: Mapping[str, float]
    randomness: str
    statistics_noise: float | None = None
    audiences: tuple[AudienceFacts, ...] = ()
    steps: int = 0
    engine: str = ""

    def __post_init__(self) -> None:
        promised = (self.epsilon, self.delta, self.clip_norm, self.noise_multiplier)
        measured = (self.evaluation_epsilon, self.evaluation_noise)
        if self.mode != "none" and None in (*promised, *measured):
            raise ValueError("a private run states epsilon, delta, C, and both noise multipliers")
        if self.mode == "none" and set(promised) | set(measured) != {None}:
            raise ValueError("a run without privacy states no privacy numbers")


@dataclass(frozen=True, slots=True)
class RunResult:
    """Everything that the report of a run says.

    Units:
        digests in hex. created: ISO 8601, UTC. software: version by package name.
        everywhere: the final model on the held-out patients of all sites, exact.
        test: the same where these are the records of the study's test files.
        ended: why the run ended before its last round; None where it did not.
        scoring: what was measured. labels: what the model tells apart, if anything.
        parameters: that the secure sum holds; `personal`: that stay at each hospital.
        subgroups: the final model on the held-out patients of each, over all sites, exact; named
            `kind:value`.
    """

    study: str
    study_digest: str
    run: str
    created: str
    simulated: bool
    scoring: Scoring
    labels: tuple[str, ...]
    task: str
    backbone: str
    tuning: str
    parameters: int
    rounds_planned: int
    rounds: tuple[RoundResult, ...]
    sites: tuple[SiteResult, ...]
    final: Metrics | None
    privacy: PrivacyFacts
    quorum: int
    colluders: int
    masked_updates: int
    plain_updates: int
    audit_verified: bool
    model_digest: str
    wall_seconds: float
    peak_memory_bytes: int
    everywhere: Evaluation | None = None
    test: Evaluation | None = None
    central: Evaluation | None = None
    software: Mapping[str, str] = field(default_factory=dict)
    subgroups: Mapping[str, Evaluation] = field(default_factory=dict)
    personal: int = 0
    ended: Code | None = None

    def __post_init__(self) -> None:
        revealing = [s.together or s.alone or s.patients for s in self.sites]
        exact = self.everywhere or self.test or self.central
        if not self.simulated and (any(revealing) or exact):
            raise ValueError("only a simulation may hold one site's metrics or counts")

    @property
    def score(self) -> str:
        """What models are compared by, in words."""
        return TITLES[self.scoring.names[0]]

    @property
    def completed(self) -> tuple[RoundResult, ...]:
        """The training rounds that ended with an aggregate."""
        return tuple(r for r in self.rounds if r.code is None and r.kind == "train")

    @property
    def rounds_aborted(self) -> int:
        """How many rounds ended without an aggregate."""
        return sum(r.code is not None for r in self.rounds)

    @property
    def models_rejected(self) -> int:
        """How many models the acceptance gate rolled back."""
        return sum(r.rejected for r in self.rounds)

    @property
    def models_accepted(self) -> int:
        """How many models were measured and stand or stood; the initial one is not counted."""
        gone = {r.turn for r in self.completed if r.rejected}
        # What follows a rolled back model is the one before it, measured once more.
        return sum(
            r.metrics is not None and r.turn not in gone and r.turn - 1 not in gone
            for r in self.completed
        )

    @property
    def rejected_in_a_row(self) -> int:
        """How many of the last models were rolled back, with none accepted after them."""
        seen = Rollbacks()
        for entry in self.completed:
            if entry.metrics is not None:
                seen.measured(entry.turn, rejected=entry.rejected)
        return seen.row

    @property
    def evaluations(self) -> int:
        """How many rounds ended that only measured the model."""
        return sum(r.code is None and r.kind == "evaluate" for r in self.rounds)


def write_report(folder: Path, result: RunResult, *, plots: bool = True) -> tuple[Path, ...]:
    """Write the report's files into `folder`, each atomically, and return their paths.

    `plots` asks for the pictures, which need the simulation extra.

    Raises:
        StorageError: a file cannot be written.
    """
    pieces: dict[str, bytes] = {
        METRICS_FILE: _json(metrics_json(result)),
        PRIVACY_FILE: _json(privacy_statement(result)),
        CARD_FILE: model_card(result).encode(),
    }
    if plots:
        from server import figures

        pieces[CURVE_FILE] = figures.learning_curve(result)
        sites = figures.sites(result)
        if sites is not None:
            pieces[SITES_FILE] = sites
    return tuple(_write(folder / name, data) for name, data in pieces.items())


def metrics_json(result: RunResult) -> dict[str, Any]:
    """The content of `metrics.json`, and the core of `--json`."""
    return {
        "study": result.study,
        "run": result.run,
        "simulation": result.simulated,
        "rounds_completed": len(result.completed),
        "rounds_aborted": result.rounds_aborted,
        "models_rejected": result.models_rejected,
        "models_rejected_in_a_row": result.rejected_in_a_row,
        "evaluation_rounds": result.evaluations,
        "final_metrics": _final_metrics(result),
        "epsilon": {
            site.site: {"spent": site.epsilon, "cap": site.cap, "delta": result.privacy.delta}
            for site in result.sites
        },
        "coordinator_saw": {
            "masked_updates": result.masked_updates,
            "plain_updates": result.plain_updates,
        },
        "audit_verified": result.audit_verified,
        "wall_seconds": result.wall_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "rounds": [_round_json(entry, result.scoring.names) for entry in result.rounds],
    }


def _final_metrics(result: RunResult) -> dict[str, Any]:
    final = result.final
    found: dict[str, Any] = {
        **(dict.fromkeys(result.scoring.names) if final is None else final.scores),
        "noised": result.privacy.evaluation_noise is not None,
        "released": None if final is None else final.to_json(),
    }
    if result.simulated:
        found["simulation_only"] = (
            "The tables below are exact. They exist because one user owns all the data, and the "
            "privacy statement does not cover them."
        )
        found["per_site"] = {site.site: _site_json(site) for site in result.sites}
        found["everywhere"] = _evaluation_json(result.everywhere)
        found["test"] = _evaluation_json(result.test)
        found["subgroups"] = {name: _evaluation_json(one) for name, one in result.subgroups.items()}
        found["central"] = _evaluation_json(result.central)
    return found


def _round_json(entry: RoundResult, names: Sequence[str]) -> dict[str, Any]:
    metrics = entry.metrics
    values = asdict(replace(entry, metrics=None))
    del values["metrics"]
    return {
        **values,
        **(dict.fromkeys(names) if metrics is None else metrics.scores),
        "loss": None if metrics is None else metrics.loss,
    }


def _site_json(site: SiteResult) -> dict[str, Any]:
    """A site's own row: the federated model on its held-out patients, then the comparisons."""
    return {
        **(_evaluation_json(site.together) or {}),
        "patients": site.patients,
        "alone": _evaluation_json(site.alone),
        "alone_everywhere": _evaluation_json(site.alone_everywhere),
    }


def _evaluation_json(found: Evaluation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "n": found.n,
        **found.scores,
        "interval_95": {name: list(ends) for name, ends in found.intervals.items()},
    }


# ------------------------------------------------------------------------------- privacy


_TRAINED = "whether a patient's records took part in training, and what they say"
_EVERYBODY = (
    "everyone who sees the model or any message: the coordinator, other hospitals, outsiders, "
    "all of them together"
)
_PROTECTED_LOCAL = {
    "what": _TRAINED,
    "against": _EVERYBODY,
    "by": "DP-SGD inside the hospital before anything is masked; needs nobody's honesty but the "
    "hospital's own",
}
_PROTECTED_MEASURED = {
    "what": "whether a held-out patient was measured, and with what result",
    "against": _EVERYBODY,
    "by": "Gaussian noise on the metric words inside the hospital before they are masked",
}
_PROTECTED_MASKS = {
    "what": "one hospital's update and metrics",
    "by": "secure aggregation: only the sum over the survivors is ever readable",
}
_NOT_PROTECTED = [
    "which hospitals took part, and when",
    "that a hospital lies about its own data: masks hide its update too",
    "root on a hospital's own machine while it trains",
    "a patient who is a patient of several of the hospitals: their epsilons add up",
]


def privacy_statement(result: RunResult) -> dict[str, Any]:
    """The content of `privacy.json`: what is promised to whom, and on what grounds.

    Source: NIST SP 800-226, "Guidelines for Evaluating Differential Privacy Guarantees": unit,
    neighbouring relation, epsilon and delta, trust model, mechanism, randomness, composition.
    """
    facts = result.privacy
    masks = {
        **_PROTECTED_MASKS,
        "against": f"the coordinator, even an active one, with up to {result.colluders} of the "
        f"other hospitals; {result.quorum} of {len(result.sites)} hospitals must agree before "
        "a sum is revealed",
    }
    statement: dict[str, Any] = {
        "format": "wardround-privacy/1",
        "study": result.study,
        "study_digest": result.study_digest,
        "run": result.run,
        "simulation": result.simulated,
        "mode": facts.mode,
        "protected": [masks]
        if facts.mode == "none"
        else [_protected_training(result), _PROTECTED_MEASURED, masks],
        "not_protected": list(_NOT_PROTECTED),
    }
    if facts.mode == "none":
        statement["guarantee"] = (
            "None for patients: updates are masked, but the sums and the model are not private."
        )
        return statement
    return {**statement, **_guarantee(result)}


def _protected_training(result: RunResult) -> dict[str, str]:
    """Against whom training patients are protected, and by what."""
    if result.privacy.mode != "joint":
        return _PROTECTED_LOCAL
    honest = result.quorum - result.colluders
    return {
        "what": _TRAINED,
        "against": f"everyone who sees the model or any message, the coordinator together with up "
        f"to {result.colluders} of the hospitals included; against more of them by a larger "
        "epsilon (see `audiences`)",
        "by": f"one DP-SGD step of all hospitals per round, with discrete Gaussian noise inside "
        f"the secure sum: the shares of {honest} honest hospitals of a quorum of {result.quorum} "
        "are all of it",
    }


def _guarantee(result: RunResult) -> dict[str, Any]:
    facts = result.privacy
    spent = [site.epsilon for site in result.sites if site.epsilon is not None]
    reserved = max((site.rounds_reserved for site in result.sites), default=0)
    normalisation: dict[str, Any] = {}
    if facts.statistics_noise is not None:
        normalisation["normalisation"] = {
            "name": "Gaussian mechanism on sums, squares and counts of numeric features, "
            "sensitivity sqrt(3/8 x features)",
            "noise_multiplier": facts.statistics_noise,
            "charged_to": "training patients",
        }
    against: dict[str, Any] = {}
    if facts.audiences:
        against["audiences"] = [asdict(one) for one in facts.audiences]
    return {
        **normalisation,
        **against,
        "unit": "patient",
        "relation": "add-or-remove-one patient, at one hospital",
        "epsilon_target": facts.epsilon,
        "epsilon_spent": max(spent, default=None),
        "delta": facts.delta,
        "mechanism": {
            "name": "DP-SGD, Poisson sampling of patients, one clipped gradient per patient",
            "sampling_rate": facts.sampling_rate,
            "expected_batch": facts.expected_batch,
            "noise_multiplier": facts.noise_multiplier,
            "clip_norm": facts.clip_norm,
            **({"clipped_sums_by": facts.engine} if facts.engine else {}),
            "steps_per_round": facts.local_steps,
            "rounds_reserved": reserved,
            "steps_reserved": facts.steps,
            "rounds_released": max((s.rounds_released for s in result.sites), default=0),
        },
        "evaluation": {
            "name": f"Gaussian mechanism on {result.scoring.told}, sensitivity "
            f"sqrt({round(result.scoring.sensitivity**2)})",
            "noise_multiplier": facts.evaluation_noise,
            "releases": facts.evaluation_releases,
            "epsilon_target": facts.evaluation_epsilon,
            "accountants": _finite(facts.evaluation_answers),
        },
        "accountants": _finite(facts.answers),
        "composition": (
            "Sequential over rounds, by the ledger of each hospital, over every reserved round, "
            "also those that were aborted. Parallel between training and held-out patients: a "
            "patient is one or the other, chosen by a fixed keyed hash, so a patient's epsilon is "
            "the larger of the two. Parallel between hospitals for a patient of one hospital."
        ),
        "randomness": facts.randomness,
        "sites": {
            site.site: {
                "epsilon": site.epsilon,
                "cap": site.cap,
                "rounds_reserved": site.rounds_reserved,
                "rounds_released": site.rounds_released,
            }
            for site in result.sites
        },
    }


def _finite(answers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in answers.items()}


# ---------------------------------------------------------------------------- model card


def model_card(result: RunResult) -> str:
    """The content of `MODEL_CARD.md`: short, for the person who is handed the model."""
    sections = [_card_head(result), _card_training(result), _card_privacy(result)]
    sections.append(_card_quality(result))
    if result.simulated:
        sections.append(site_table(result))
    sections.append(_card_limits(result))
    return "\n\n".join(sections) + "\n"


def _card_head(result: RunResult) -> str:
    origin = (
        "**Simulation**: one machine played all hospitals."
        if result.simulated
        else f"Trained across {len(result.sites)} hospitals; no record left a hospital."
    )
    return "\n".join(
        [
            "---",
            *_card_tags(result),
            "tags: [federated-learning, differential-privacy, secure-aggregation]",
            "---",
            "",
            f"# {result.study}",
            "",
            origin,
            "",
            f"- Task: {result.task}{_told_labels(result.labels)}",
            (
                f"- Backbone: `{result.backbone}`, tuning `{result.tuning}`, "
                f"{result.parameters:,} trained parameters"
                + (
                    f", and {result.personal:,} that stay at each hospital"
                    if result.personal
                    else ""
                )
            ),
            f"- Created: {result.created}",
            f"- Model digest: `{result.model_digest}`",
            f"- Study digest: `{result.study_digest}`",
        ]
    )


def _card_tags(result: RunResult) -> list[str]:
    if result.task in {"tabular", "custom"}:
        kind = "classification" if result.labels else "regression"
        return ["library_name: wardround", f"pipeline_tag: tabular-{kind}"]
    if result.task in {"multimodal", "medication"}:
        return ["library_name: wardround"]
    if result.backbone.startswith(OWN_NETWORK):
        return ["library_name: wardround", "pipeline_tag: text-classification"]
    if result.task == "prognosis":
        return ["library_name: wardround", "pipeline_tag: time-series-forecasting"]
    if result.task == "imaging":
        return ["library_name: wardround", "pipeline_tag: image-classification"]
    return ["library_name: transformers", "pipeline_tag: text-classification"]


def _card_training(result: RunResult) -> str:
    up = sum(entry.bytes_up for entry in result.rounds)
    lost = sum(len(entry.dropouts) for entry in result.rounds)
    lines = [
        "## Training",
        "",
        (
            f"- Rounds: {len(result.completed)} of {result.rounds_planned} completed, "
            f"{result.rounds_aborted} aborted{_rolled(result)}; {lost} dropouts in all"
        ),
        (
            f"- Quorum: {result.quorum} of {len(result.sites)} hospitals, "
            f"against {result.colluders} colluding ones"
        ),
        (
            f"- The coordinator saw {result.masked_updates} masked updates and "
            f"{result.plain_updates} readable ones"
        ),
        f"- Audit logs verified: {'yes' if result.audit_verified else 'NO'}",
        (
            f"- Cost: {duration(result.wall_seconds)}, {amount(up)} up, "
            f"{amount(result.peak_memory_bytes)} peak memory"
        ),
    ]
    return "\n".join(lines)


def _where(facts: PrivacyFacts) -> str:
    return "of all hospitals together" if facts.mode == "joint" else "in each hospital"


def _card_privacy(result: RunResult) -> str:
    facts = result.privacy
    lines = ["## Privacy", ""]
    if facts.mode == "none":
        lines.append(
            "**No differential privacy.** Updates were masked, but the model itself may reveal "
            "training records. Do not publish it."
        )
        return "\n".join(lines)
    pairs = {
        site.site: (site.epsilon, site.cap)
        for site in result.sites
        if site.epsilon is not None and site.cap is not None
    }
    answers = ", ".join(f"{name} {value:.3f}" for name, value in facts.answers.items())
    lines += [
        (
            f"- Promise: (ε, δ) = ({facts.epsilon:g}, {facts.delta:g}) for every **patient** of a "
            "hospital, adding or removing all of the patient's records"
        ),
        f"- Spent: ε {epsilon_range(pairs)} by hospital ({answers})",
        *(f"- Against {one.told}: ε {one.epsilon:.3f}" for one in facts.audiences),
        (
            f"- How: DP-SGD {_where(facts)}, q = {facts.sampling_rate:g}, "
            f"B = {facts.expected_batch:g}, noise multiplier {facts.noise_multiplier:g}, "
            f"C = {facts.clip_norm:g}, {facts.local_steps} steps a round"
        ),
        f"- Randomness: {facts.randomness}",
        (
            "- Held-out patients are protected too: every released metric is noised "
            f"(ε ≤ {facts.evaluation_epsilon:g} over {facts.evaluation_releases} releases)"
        ),
        "",
        "The whole statement is `privacy.json`.",
    ]
    return "\n".join(lines)


def _card_quality(result: RunResult) -> str:
    lines = ["## Quality", ""]
    final = result.final
    if final is None or final.primary is None:
        return "\n".join([*lines, "The model was not measured."])
    noised = result.privacy.evaluation_noise is not None
    origin = "released, with privacy noise" if noised else "exact masked sums"
    lines += [
        (f"Over the held-out patients of all hospitals ({origin}): {_scores(final.scores)}."),
    ]
    if final.classes:
        header = "| label | precision | recall | F1 | patients |"
        lines += ["", header, "|---|---:|---:|---:|---:|"]
    lines += [
        f"| {_escaped((row.label,))} | {row.precision:.3f} | {row.recall:.3f} | {row.f1:.3f} "
        f"| {row.support:.0f} |"
        for row in final.classes
    ]
    for name, found in (
        ("Test files, exact", result.test),
        ("Trained centrally", result.central),
    ):
        if found is not None:
            lines += ["", f"{name}: {_sentence(found)}."]
    return "\n".join(lines)


SITE_COLUMNS = (
    *("hospital", "patients", "held out", "alone", "together"),
    *("alone on all", "ε spent"),
)


def site_table(result: RunResult) -> str:
    """The per-site table in Markdown: exact, so only for a simulation.

    Raises:
        ValueError: the run was no simulation.
    """
    lines = [
        "## By hospital (simulation only)",
        "",
        (
            f"{result.score} on the hospital's own held-out patients, exact, with 95 % bootstrap "
            "intervals; `alone on all` is the hospital's own model on the held-out patients "
            "of all hospitals. One user owns all the data here; a real run never shows these "
            "numbers, and no promise above covers them."
        ),
        "",
        f"| {' | '.join(SITE_COLUMNS)} |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in site_rows(result, cell=_cell)]
    if result.everywhere is not None:
        lines += ["", f"Together on all: {_sentence(result.everywhere)}."]
    return "\n".join([*lines, *_subgroup_table(result)])


def _subgroup_table(result: RunResult) -> list[str]:
    if not result.subgroups:
        return []
    return [
        "",
        "## By subgroup (simulation only)",
        "",
        (
            f"{result.score} of the final model on the held-out patients of all hospitals. "
            "Overlapping intervals are no difference; a gap is no proof of unfairness, and none is "
            "no proof of fairness."
        ),
        "",
        "| subgroup | held out | together |",
        "|---|---:|---:|",
        *(f"| {name} | {one.n} | {_cell(one)} |" for name, one in result.subgroups.items()),
        "",
        *(f"- {line}" for line in _gap_lines(result)),
    ]


def _gap_lines(result: RunResult) -> list[str]:
    """For each kind of subgroup, the best and the worst served."""
    kinds: dict[str, dict[str, float]] = {}
    for name, one in result.subgroups.items():
        kind, _, value = name.partition(":")
        if one.primary is not None:
            kinds.setdefault(kind, {})[value] = one.primary
    lines = []
    for kind, scores in kinds.items():
        if len(scores) > 1:
            low, high = (choose(scores, key=scores.__getitem__) for choose in (min, max))
            gap = scores[high] - scores[low]
            lines.append(
                f"{result.score} by {kind}: from {scores[low]:.3f} ({low}) to {scores[high]:.3f} "
                f"({high}), gap {gap:.3f}"
            )
    return lines


def site_rows(
    result: RunResult, *, cell: Callable[[Evaluation | None], str]
) -> list[tuple[str, ...]]:
    """The rows of `SITE_COLUMNS`, the mean last; `cell` writes one score.

    Raises:
        ValueError: the run was no simulation.
    """
    if not result.simulated:
        raise ValueError("a per-site table exists only in a simulation")
    rows = [_site_row(site, cell) for site in result.sites]
    means = [
        _mean([getattr(site, name) for site in result.sites])
        for name in ("alone", "together", "alone_everywhere")
    ]
    if any(mean is not None for mean in means):
        rows.append(("mean", "", "", *("-" if m is None else f"{m:.3f}" for m in means), ""))
    return rows


def _site_row(site: SiteResult, cell: Callable[[Evaluation | None], str]) -> tuple[str, ...]:
    found = site.together or site.alone
    return (
        site.site,
        _or_dash(site.patients),
        _or_dash(None if found is None else found.n),
        cell(site.alone),
        cell(site.together),
        cell(site.alone_everywhere),
        "-" if site.epsilon is None else f"{site.epsilon:.2f} of {site.cap:g}",
    )


def _mean(found: Sequence[Evaluation | None]) -> float | None:
    values = [one.primary for one in found if one is not None and one.primary is not None]
    return math.fsum(values) / len(values) if values else None


# ----------------------------------------------------------------------------- the verdict


@dataclass(frozen=True, slots=True)
class Conclusion:
    """What a command prints when a run is over; kept, so that it can be printed again.

    Attributes:
        summary: the object of `--json`.
        rows: the per-site table, under `SITE_COLUMNS`.
        lines: what was seen, verified, spent and reached, and what to type next.
        good: nothing readable was seen, the audit logs verify and no budget was passed.
    """

    summary: Mapping[str, Any]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]
    good: bool

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Conclusion:
        """The conclusion in what `to_json` gave. Raises ValueError where it is not one."""
        try:
            rows = tuple(tuple(row) for row in found["rows"])
            return Conclusion(found["summary"], rows, tuple(found["lines"]), found["good"])
        except (KeyError, TypeError) as error:
            raise ValueError("not the conclusion of a run") from error


def conclude(result: RunResult, folder: Path, warnings: Sequence[str]) -> Conclusion:
    """What `result`, written to `folder`, is to say on the screen and in `--json`."""
    held = _budgets_held(result)
    good = result.audit_verified and not result.plain_updates and held
    told = metrics_json(result)
    summary = {
        **{name: told[name] for name in _SUMMARY},
        "score": result.score,
        "output": str(folder),
        "warnings": list(warnings),
    }
    model = folder / "model"
    if result.personal:  # every hospital has a model of its own
        model /= result.sites[0].site
    verbs = [f"privacy {folder}", f"audit verify {folder}", f"predict {model} FILE"]
    if not result.simulated:  # ledgers and the folder that loads are the hospitals'
        verbs = [f"audit verify {folder}", "client status  (at a hospital: its model and ledger)"]
    elif result.privacy.mode == "none":
        del verbs[0]
    lines = [
        f"rounds: {len(result.completed)} completed, {result.rounds_aborted} aborted"
        + _rolled(result),
        *_rolled_lines(result),
        f"coordinator saw: {result.masked_updates} masked updates, {result.plain_updates} readable",
        f"audit logs: {'verified' if result.audit_verified else 'NOT VERIFIED'}",
        _budget_line(result, held=held),
        *_quality_lines(result),
        *_gap_lines(result),
        *([] if result.ended is None else [f"ended early: {result.ended.meaning}"]),
        f"output: {folder}",
        *(f"next: wardround {verb}" for verb in verbs),
        "verdict: " + _verdict(result, held=held),
    ]
    rows = tuple(site_rows(result, cell=_short_cell)) if result.simulated else ()
    return Conclusion(summary, rows, tuple(lines), good)


_SUMMARY = (
    *("rounds_completed", "rounds_aborted", "models_rejected", "models_rejected_in_a_row"),
    "evaluation_rounds",
    *("final_metrics", "epsilon"),
    *("coordinator_saw", "audit_verified", "wall_seconds", "peak_memory_bytes"),
)


def _rolled(result: RunResult) -> str:
    count = result.models_rejected
    return f", {count} of their models rolled back by the acceptance gate" if count else ""


def _rolled_lines(result: RunResult) -> list[str]:
    """What to know and do where models were rolled back again and again."""
    row = result.rejected_in_a_row
    if row < _MANY_ROLLBACKS:
        return []
    stands = "the last that was accepted" if result.models_accepted else "the initial one"
    return [
        f"warning: the last {row} models in a row were rolled back; the final model is {stands}",
        "  a hospital may send harmful updates, by its data or on purpose; the masks hide which. A",
        "  learning rate too high, or a tolerance below the noise (`wardround plan`), looks alike.",
        "  let every hospital check its labels and columns; then sign studies that leave one out",
        "  and compare: with mode local only, as two exact sums would show that one's update.",
    ]


def _budgets_held(result: RunResult) -> bool:
    return all(
        site.epsilon is None or site.cap is None or site.epsilon <= site.cap + 1e-6
        for site in result.sites
    )


def _budget_line(result: RunResult, *, held: bool) -> str:
    spent = [site.epsilon for site in result.sites if site.epsilon is not None]
    if not spent:
        return "budgets: none; this study has no differential privacy"
    said = "held" if held else "EXCEEDED"
    cap = max(site.cap or 0.0 for site in result.sites)
    return f"budgets: {said}, at most epsilon {max(spent):.2f} of {cap:g} for any patient"


def _quality_lines(result: RunResult) -> list[str]:
    alone = _mean([site.alone for site in result.sites])
    own = _mean([site.together for site in result.sites])
    wide = _mean([site.alone_everywhere for site in result.sites])
    score, lines = result.score, []
    if own is not None:
        compared = "" if alone is None else f"alone {alone:.3f}, "
        lines.append(f"{score} on a hospital's own patients (mean): {compared}together {own:.3f}")
    # With layers of their own there is no common model to hold against what each reaches alone.
    if result.personal:
        return lines
    if result.everywhere is not None and result.everywhere.primary is not None:
        compared = "" if wide is None else f"alone {wide:.3f} (mean), "
        together = result.everywhere.primary
        lines.append(f"{score} on everybody's patients: {compared}together {together:.3f}")
    final = result.final
    if not result.simulated and final is not None and final.primary is not None:
        noised = "" if result.privacy.evaluation_noise is None else ", with noise for privacy"
        told = f"{score} on everybody's held-out patients{noised}: {final.primary:.3f}"
        lines.append(told)
    return lines


def _verdict(result: RunResult, *, held: bool) -> str:
    faults = []
    if result.plain_updates:
        faults.append(f"the coordinator could read {result.plain_updates} updates")
    if not result.audit_verified:
        faults.append("the audit logs do not verify")
    if not held:
        faults.append("a privacy budget was exceeded")
    if faults:
        return "NOT GOOD: " + "; ".join(faults)
    unread = "nobody's update was readable, the audit logs verify"
    private = "" if result.privacy.mode == "none" else ", every privacy budget held"
    return f"{unread}{private}{_gain(result)}{_standing(result)}"


def _gain(result: RunResult) -> str:
    """Together against alone: on everybody's patients, or each on its own where models differ."""
    if result.personal:
        alone, whose = _mean([site.alone for site in result.sites]), "a hospital's own"
        together = _mean([site.together for site in result.sites])
    else:
        alone, whose = _mean([site.alone_everywhere for site in result.sites]), "everybody's"
        together = None if result.everywhere is None else result.everywhere.primary
    if alone is None or together is None:
        return ""
    gained = together - alone
    if result.scoring.names[0] in FALLING:
        told = f"{gained / alone:+.0%} {result.score}" if alone else f"{gained:+.3g}"
    else:
        told = f"{100 * gained:+.1f} points"
    return f"; together {told} on {whose} patients against alone"


def _standing(result: RunResult) -> str:
    """For a run that ends with an older model than its last round made."""
    row = result.rejected_in_a_row
    if not row:
        return ""
    which = "the last accepted model" if result.models_accepted else "the INITIAL model"
    return f"; the final model is {which}: {row} newer rolled back by the acceptance gate"


def _card_limits(result: RunResult) -> str:
    lines = [
        "## Limits",
        "",
        "- Not a medical device. Check it on your own patients before any use.",
        "- Hospitals whose patients differ from these may be served worse.",
        "- Secure aggregation hides a malicious hospital's update too.",
    ]
    if result.software:
        versions = ", ".join(f"{name} {version}" for name, version in result.software.items())
        lines += ["", f"Made with {versions}."]
    return "\n".join(lines)


def _sentence(found: Evaluation) -> str:
    (name, first), *others = found.scores.items()
    low, high = found.ends
    lines = [f"{_scores({name: first})} (95 % interval {low:.3f} to {high:.3f})"]
    return ", ".join([*lines, *([_scores(dict(others))] if others else []), f"n = {found.n}"])


def _scores(scores: Mapping[str, float | None]) -> str:
    """Scores in words; one that cannot be said is a dash."""
    return ", ".join(
        f"{TITLES[name]} {'-' if value is None else f'{value:.3f}'}"
        for name, value in scores.items()
    )


def _cell(found: Evaluation | None) -> str:
    if found is None or found.primary is None:
        return "-"
    low, high = found.ends
    return f"{found.primary:.3f} ({low:.3f}-{high:.3f})"


def _short_cell(found: Evaluation | None) -> str:
    """For a narrow screen: half the width of the interval behind the number."""
    if found is None or found.primary is None:
        return "-"
    low, high = found.ends
    return f"{found.primary:.2f} ±{(high - low) / 2:.2f}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _told_labels(labels: tuple[str, ...]) -> str:
    return f", {len(labels)} labels: {_escaped(labels)}" if labels else ""


def _escaped(labels: tuple[str, ...]) -> str:
    return ", ".join(label.replace("|", "\\|") for label in labels)


# --------------------------------------------------------------------------------- files


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _write(path: Path, data: bytes) -> Path:
    """Replace `path` at once: a crash leaves the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(Code.REPORT_WRITE, f"{path.name} cannot be written.") from error
    return path
