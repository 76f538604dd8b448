"""The composition root of a simulation: throw-away identities, one process, the real code.

It divides data, makes keys, connects hospitals and coordinator, and writes the output folder.
It contains no protocol: every byte that a hospital sends here it would send over a network.

    OUT/study.yaml            the study, as resumed from
    OUT/state/                coordinator, sites (keys, journals, ledgers), bundle, history
    OUT/audit/                one log per party, and the public keys
    OUT/model/ metrics.json privacy.json MODEL_CARD.md plots/ manifest.json
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.site import (
    Ceilings,
    Site,
    SiteSetup,
    built_parameters,
    open_federation,
    open_ledger,
    open_site,
    site_key,
    write_demo,
)
from common.audit import AuditLog, run_audit_verify, write_keys
from common.bundle import Bundle
from common.config import load
from common.crypto.identity import SiteKey
from common.errors import Code, StorageError
from common.evidence import AuditEvidence
from common.ids import short
from common.metrics import Metrics, bootstrap_interval, metrics_from_words, words_from_counts
from common.plan import evaluation_rounds
from common.protocol.transcript import Chain
from common.strategy import model_tensors
from common.study import Study
from common.world import (
    FileJournal,
    SeededEntropy,
    SkippingClock,
    SystemEntropy,
    unix_seconds,
    write_durably,
)
from server.driver import CoordinatorDriver
from server.network import InProcessNetwork, SiteHandle, WireTap
from server.report import (
    Evaluation,
    PrivacyFacts,
    RoundResult,
    RunResult,
    SiteResult,
    write_report,
)
from server.round import Aborted, Completed, CoordinatorRound, Deadlines
from server.table import RoundSummary, RunView

if TYPE_CHECKING:
    from client.site import Federation

# Deadlines that brought nothing, in a row, before a simulation says what it waits for.
PATIENCE = 6
STUDY_FILE = "study.yaml"
RANDOMNESS = "AES-256-CTR keyed by the operating system (os.urandom), noise rounded to a grid"


@dataclass(frozen=True)
class Paths:
    """The output folder's places."""

    root: Path

    @property
    def state(self) -> Path:
        """Everything that a resume needs."""
        return self.root / "state"

    @property
    def bundle(self) -> Path:
        """The study bundle."""
        return self.state / "bundle"

    @property
    def audit(self) -> Path:
        """The audit logs."""
        return self.root / "audit"

    @property
    def model(self) -> Path:
        """The Hugging Face folder."""
        return self.root / "model"

    @property
    def history(self) -> Path:
        """One line per round, for the learning curve."""
        return self.state / "history.jsonl"

    def site(self, name: str) -> Path:
        """A hospital's own folder."""
        return self.state / "sites" / name


@dataclass(frozen=True)
class Outcome:
    """What a simulation ended with."""

    result: RunResult
    folder: Path
    warnings: tuple[str, ...]


def simulate(config: Path, out: Path, *, view: RunView, device: str = "auto") -> Outcome:
    """Run a study's simulation from the start.

    Raises ConfigError, DataError, RefusedError, AbortedRound, StorageError; what was reached
    lies in `out` and `resume` goes on from there.
    """
    study = load(config, Study)
    paths = Paths(out)
    if out.exists() and any(out.iterdir()):
        raise StorageError(
            Code.OUTPUT_NOT_EMPTY,
            f"{out}: is not empty.",
            remedy=f"Name another folder with --out, or type: wardround resume {out}",
        )
    federation = open_federation(study, config, device=device)
    paths.state.mkdir(parents=True)
    _keep_study(config, paths)
    return _run(federation, federation.build_bundle(), paths, view, device)


def resume(out: Path, *, view: RunView, device: str = "auto") -> Outcome:
    """Go on with a simulation after any interruption. Raises as `simulate`."""
    paths = Paths(out)
    if not (paths.state / STUDY_FILE).is_file():
        raise StorageError(Code.NOT_A_RUN, f"{out}: there is no run to resume here.")
    where = json.loads((paths.state / "origin.json").read_text())
    study = load(paths.state / STUDY_FILE, Study)
    federation = open_federation(study, Path(where["config"]), device=device)
    _require_same_inputs(federation.manifest, paths)
    bundle = (
        Bundle.load(paths.bundle)
        if (paths.bundle / "bundle.json").exists()
        else federation.build_bundle()
    )
    return _run(federation, bundle, paths, view, device)


def _keep_study(config: Path, paths: Paths) -> None:
    shutil.copyfile(config, paths.state / STUDY_FILE)
    origin = {"config": str(config.resolve())}
    write_durably(paths.state / "origin.json", [json.dumps(origin).encode()])


def _require_same_inputs(manifest: Mapping[str, Any], paths: Paths) -> None:
    kept = paths.root / "manifest.json"
    if kept.exists() and json.loads(kept.read_text())["inputs"] != manifest["inputs"]:
        raise StorageError(
            Code.INPUTS_CHANGED,
            "The data files differ from those the run began with.",
            remedy="Put the original files back, or start a new run.",
        )


def _run(
    federation: Federation, bundle: Bundle, paths: Paths, view: RunView, device: str
) -> Outcome:
    started = time.monotonic()
    bundle.save(paths.bundle)
    write_durably(
        paths.root / "manifest.json", [json.dumps(federation.manifest, indent=1).encode()]
    )
    run = _Run(federation, bundle, paths, view, device)
    try:
        run.play()
        result = run.finish(started)
    finally:
        run.close()
    return Outcome(result, paths.root, federation.warnings)


class _Run:
    """One simulation while it goes on; also the observer of its coordinator."""

    def __init__(
        self, federation: Federation, bundle: Bundle, paths: Paths, view: RunView, device: str
    ) -> None:
        self._federation, self._bundle, self._paths = federation, bundle, paths
        self._view, self._device = view, device
        self._entropy = SystemEntropy()
        self._names = tuple(sorted(site.id for site in bundle.study.sites))
        self._keys = {v: site_key(paths.site(v), self._entropy) for v in self._names}
        coordinator = site_key(paths.state / "coordinator", self._entropy)
        publics = {v: key.public for v, key in self._keys.items()}
        self._keys_digest = write_keys(paths.audit, {**publics, "coordinator": coordinator.public})
        self._roster = publics
        terms = bundle.terms(publics)
        self._clock = SkippingClock()
        self._tap = WireTap(terms.upload_bytes())
        self._network = InProcessNetwork(self._clock, self._tap)
        self._sites: dict[str, Site] = {}
        self._ledgers = self._open_ledgers()
        self._history = _load_history(paths.history)
        self._final: Chain | None = None
        self._round_began = time.monotonic()
        self._bytes_before = 0
        self._journal = FileJournal(paths.state / "coordinator" / "journal")
        self._log = self._open_log(coordinator)
        machine = CoordinatorRound(
            terms,
            _deadlines(bundle.study),
            self._entropy,
            patience=PATIENCE,
            record=self._journal.load(),
            blob=self._journal.get_blob,
        )
        self._driver = CoordinatorDriver(
            machine,
            journal=self._journal,
            transport=self._network,
            clock=self._clock,
            evidence=AuditEvidence(self._log),
            observer=self,
        )
        self._network.driver = self._driver
        self._network.dropping, self._network.crashing = _accidents(bundle, federation)
        self._recover_history()

    def _open_log(self, key: SiteKey) -> AuditLog:
        return AuditLog.open(
            self._paths.audit / "coordinator.jsonl",
            owner="coordinator",
            sign=key.sign_bytes,
            clock=unix_seconds,
            facts={"keys": self._keys_digest, "study": self._bundle.digest.hex()},
        )

    def _open_ledgers(self) -> dict[str, Any]:
        """Ledgers outlive a simulated crash of their process, as a database server would."""
        cap = self._bundle.study.privacy.epsilon or 1.0
        seed = self._federation.manifest["seed"]
        return {
            v: open_ledger(
                self._bundle,
                self._paths.site(v),
                cap=cap,
                # The seed fixes who is held out, so that a split can be repeated; never noise.
                founding=SeededEntropy(f"held-out {seed} {v}"),
            )
            for v in self._names
        }

    # ------------------------------------------------------------ playing

    def play(self) -> None:
        """Until the run is over."""
        for name in self._names:
            self._network.sites[name] = self._handle(name)
            self._network.sites[name].start()
            self._network.sites[name].up = True
        self._driver.start()
        while self._final is None or self._pending_farewells():
            self._network.step()

    def _pending_farewells(self) -> bool:
        return any(site.worker.final is None for site in self._sites.values())

    def _handle(self, name: str) -> SiteHandle:
        setup = self._setup(name)

        def start() -> None:
            port = self._network.from_site(name)
            self._sites[name] = open_site(setup, self._ledgers[name], port)
            self._sites[name].daemon.start()

        def receive(payload: bytes) -> None:
            self._sites[name].daemon.receive(payload)

        def kill() -> None:
            self._sites[name].close()

        return SiteHandle(start, receive, kill)

    def _setup(self, name: str) -> SiteSetup:
        study, ledger = self._bundle.study, self._ledgers[name]
        split = None if ledger is None else ledger.split(study.evaluation.held_out)
        records = self._federation.divide(name, split)
        folder = self._paths.site(name)
        return SiteSetup(
            site=name,
            folder=folder,
            audit=self._paths.audit,
            bundle=self._bundle,
            roster=self._roster,
            keys_digest=self._keys_digest,
            ceilings=_permissive(study, self._bundle.digest),
            kill_switch=folder / "STOP",
            learner=lambda: self._federation.learner(name),
            split_id=records.split_id,
            device=self._device,
            entropy=self._entropy,
        )

    # ------------------------------------------------------------ observing

    def completed(self, result: Completed, chain: Chain) -> None:
        """A round ended in an aggregate."""
        del chain
        entry = self._entry(result)
        if any(known.round == entry.round for known in self._history):
            return
        self._keep(entry)
        measured = entry.metrics
        self._view.round_completed(
            RoundSummary(
                round=result.turn,
                kind=result.kind,
                cohort=self._names,
                survivors=result.survivors,
                dropouts=tuple(v for v in self._names if v not in result.survivors),
                quorum=self._driver.machine.quorum,
                loss=None if measured is None else measured.loss,
                accuracy=None if measured is None else measured.accuracy,
                epsilon=self._epsilon(),
                bytes_up=entry.bytes_up,
                seconds=entry.seconds,
            )
        )

    def _entry(self, result: Completed) -> RoundResult:
        now, sent = time.monotonic(), self._tap.bytes_up
        seconds, up = now - self._round_began, sent - self._bytes_before
        self._round_began, self._bytes_before = now, sent
        spent = [value for value, _ in self._epsilon().values()]
        return RoundResult(
            round=result.round,
            kind=result.kind,
            cohort=len(self._names),
            survivors=len(result.survivors),
            dropouts=tuple(v for v in self._names if v not in result.survivors),
            metrics=self._metrics(result.metrics),
            epsilon=max(spent, default=None),
            bytes_up=up,
            seconds=seconds,
        )

    def _metrics(self, words: NDArray[np.int64] | None) -> Metrics | None:
        study = self._bundle.study
        if words is None:
            return None
        return metrics_from_words(words, study.task.labels, loss_cap=study.evaluation.loss_cap)

    def aborted(self, result: Aborted) -> None:
        """A round ended without an aggregate."""
        self._keep(
            RoundResult(
                round=result.round,
                kind="aborted",
                cohort=len(self._names),
                survivors=0,
                dropouts=result.missing,
                metrics=None,
                epsilon=None,
                bytes_up=0,
                seconds=0.0,
                code=result.code.label,
            )
        )
        self._view.round_aborted(result.round, "train", result.code.meaning, result.missing)

    def refused(self, site: str, code: Code) -> None:
        """A site's message was refused; the audit log says so."""

    def over(self, chain: Chain) -> None:
        """The run is complete."""
        self._final = chain

    def _epsilon(self) -> dict[str, tuple[float, float]]:
        spending = {v: ledger.spent() for v, ledger in self._ledgers.items() if ledger is not None}
        return {v: (s.epsilon, s.cap) for v, s in spending.items()}

    def _keep(self, entry: RoundResult) -> None:
        self._history.append(entry)
        with self._paths.history.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(entry)) + "\n")

    def _recover_history(self) -> None:
        """A crash between a round's last write and its history line loses no round."""
        last = self._driver.machine.last_completed()
        if last is not None and all(known.round != last.round for known in self._history):
            self._keep(self._entry(last))

    # ------------------------------------------------------------ the end

    def finish(self, started: float) -> RunResult:
        """Measure, export and report."""
        if self._final is None:
            raise AssertionError("a run is finished after it is over")
        for site in self._sites.values():
            site.close(finish=True)
        self._log.finish()
        state = model_tensors(self._final.state)
        if not self._paths.model.exists():
            self._federation.export(self._paths.model, state)
        verified = run_audit_verify(self._paths.audit)
        result = self._result(state, audit_verified=verified.verified, started=started)
        write_report(self._paths.root, result)
        return result

    def _result(
        self, state: Mapping[str, NDArray[np.float32]], *, audit_verified: bool, started: float
    ) -> RunResult:
        study, bundle = self._bundle.study, self._bundle
        machine = self._driver.machine
        sites = tuple(self._site_result(v, state) for v in self._names)
        final = next((r.metrics for r in reversed(self._history) if r.metrics is not None), None)
        if self._final is None:
            raise AssertionError("a result needs the final model")
        return RunResult(
            study=study.name,
            study_digest=bundle.digest.hex(),
            run=machine.record.run.hex(),
            created=datetime.fromtimestamp(unix_seconds(), UTC).isoformat(),
            simulated=True,
            labels=tuple(study.task.labels),
            task=study.task.kind,
            backbone=study.model.backbone,
            tuning=study.model.tuning,
            parameters=bundle.layout.size,
            rounds_planned=study.training.rounds,
            rounds=tuple(self._history),
            sites=sites,
            final=final,
            privacy=self._privacy(),
            quorum=machine.quorum,
            colluders=study.colluders(len(self._names)),
            masked_updates=self._tap.masked,
            plain_updates=self._tap.plain,
            audit_verified=audit_verified,
            model_digest=self._final.state_digest.hex(),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            software=self._federation.versions(),
        )

    def _site_result(self, name: str, state: Mapping[str, NDArray[np.float32]]) -> SiteResult:
        ledger = self._ledgers[name]
        rows = () if ledger is None else ledger.history()
        spending = None if ledger is None else ledger.spent()
        alone = self._federation.alone(name, self._bundle, self._entropy)
        return SiteResult(
            site=name,
            weight=self._bundle.weights[name],
            epsilon=None if spending is None else spending.epsilon,
            cap=None if spending is None else spending.cap,
            rounds_reserved=len(
                {(r.body.get("round"), r.body.get("attempt")) for r in rows if r.kind == "charge"}
            ),
            rounds_released=sum(r.kind == "release" for r in rows),
            patients=self._federation.patients[name],
            together=self._evaluation(self._federation.counts(name, state)),
            alone=self._evaluation(self._federation.counts(name, alone)),
        )

    def _evaluation(self, counts: NDArray[np.float64]) -> Evaluation:
        study = self._bundle.study
        labels = study.task.labels
        measured = metrics_from_words(
            words_from_counts(counts), labels, loss_cap=study.evaluation.loss_cap
        )
        confusion = counts[:-1].reshape(len(labels), len(labels))
        return Evaluation(
            n=round(float(confusion.sum())),
            accuracy=measured.accuracy or 0.0,
            macro_f1=measured.macro_f1 or 0.0,
            intervals=bootstrap_interval(confusion),
        )

    def _privacy(self) -> PrivacyFacts:
        from common.accountant import epsilon, epsilon_rdp

        study, bundle = self._bundle.study, self._bundle
        privacy, training = study.privacy, study.training
        releases = len(evaluation_rounds(training.rounds, study.evaluation.every))
        ledgers = [ledger for ledger in self._ledgers.values() if ledger is not None]
        if privacy.mode == "none" or privacy.delta is None or not ledgers:
            return PrivacyFacts(
                "none",
                None,
                None,
                training.sampling_rate,
                training.expected_batch,
                training.local_steps,
                None,
                None,
                {},
                None,
                None,
                releases,
                {},
                RANDOMNESS,
            )
        most = max(ledgers, key=lambda ledger: ledger.spent().epsilon)
        answers: dict[str, dict[str, float]] = {}
        for part in ("train", "held_out"):
            events = most.events(part)
            answers[part] = {
                "PLD (dp-accounting)": epsilon(events, privacy.delta),
                "RDP (dp-accounting)": epsilon_rdp(events, privacy.delta),
            }
        spent = most.spent()
        return PrivacyFacts(
            mode=privacy.mode,
            epsilon=spent.epsilon,
            delta=privacy.delta,
            sampling_rate=training.sampling_rate,
            expected_batch=training.expected_batch,
            local_steps=training.local_steps,
            clip_norm=privacy.clip_norm,
            noise_multiplier=bundle.noise_multiplier,
            answers=answers["train"],
            evaluation_epsilon=spent.held_out,
            evaluation_noise=bundle.evaluation_noise,
            evaluation_releases=releases,
            evaluation_answers=answers["held_out"],
            randomness=RANDOMNESS,
        )

    def close(self) -> None:
        """Let go of every file."""
        for site in self._sites.values():
            site.close()
        for ledger in self._ledgers.values():
            if ledger is not None:
                ledger.close()
        self._log.close()
        self._journal.close()


# ---------------------------------------------------------------- helpers


def _deadlines(study: Study) -> Deadlines:
    limits = study.deadlines
    return Deadlines(
        limits.handshake_s, limits.train_s, limits.upload_s, limits.agree_s, limits.unmask_s
    )


def _permissive(study: Study, digest: bytes) -> Ceilings:
    """A simulated hospital approves exactly the study its one user wrote."""
    privacy = study.privacy
    return Ceilings.model_validate(
        {
            "epsilon": privacy.epsilon or 100.0,
            "delta": privacy.delta or 1e-5,
            "rounds": study.training.rounds,
            "require_privacy": privacy.mode != "none",
            "approved_studies": [digest.hex()],
            "approved_backbones": "any",
            "approved_code": "any",
        }
    )


def _accidents(
    bundle: Bundle, federation: Federation
) -> tuple[dict[int, frozenset[str]], dict[int, frozenset[str]]]:
    """Which sites drop out, and which crash, in which round: planned, or drawn by the seed."""
    simulation = federation.study.simulation
    dropping: dict[int, set[str]] = {}
    crashing: dict[int, set[str]] = {}
    if simulation is None:
        return {}, {}
    for fault in simulation.faults:
        chosen = dropping if fault.fault == "drop" else crashing
        chosen.setdefault(fault.round, set()).add(fault.site)
    stream = np.random.default_rng(simulation.seed)
    names = sorted(site.id for site in bundle.study.sites)
    for number in range(1, bundle.study.training.rounds + 1):
        drawn = stream.choice(len(names), simulation.dropouts_per_round, replace=False)
        dropping.setdefault(number, set()).update(names[int(i)] for i in drawn)
    freeze: Callable[[dict[int, set[str]]], dict[int, frozenset[str]]] = lambda table: {  # noqa: E731
        k: frozenset(v) for k, v in table.items()
    }
    return freeze(dropping), freeze(crashing)


def _load_history(path: Path) -> list[RoundResult]:
    """The rounds of the run so far; a torn last line is one that `_recover_history` writes."""
    if not path.exists():
        return []
    entries: list[RoundResult] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(RoundResult.from_json(json.loads(line)))
        except ValueError:
            break
    return entries


def describe(outcome: Outcome) -> str:
    """One line on where everything lies."""
    return f"{outcome.folder} (model {short(bytes.fromhex(outcome.result.model_digest))})"


def study_of(out: Path) -> Study:
    """The study of a run's folder. Raises StorageError where there is none."""
    kept = Paths(out).state / STUDY_FILE
    if not kept.is_file():
        raise StorageError(Code.NOT_A_RUN, f"{out}: there is no run here.")
    return load(kept, Study)


def prepare_demo(out: Path) -> tuple[Path, Study]:
    """The demo's study file, written into `out`, and the study."""
    if out.exists() and any(out.iterdir()):
        raise StorageError(
            Code.OUTPUT_NOT_EMPTY,
            f"{out}: is not empty.",
            remedy="Name another folder with --out.",
        )
    config = write_demo(out)
    return config, load(config, Study)


def preview(path: Path, parameters: int | None) -> tuple[Study, int, dict[str, int]]:
    """(study, trainable parameters, patients by site) for a plan before anything is built.

    A simulation's data are read, so patients are known; the model is built for its size
    where `parameters` does not say it.
    """
    study = load(path, Study)
    patients: dict[str, int] = {}
    if study.simulation is not None:
        federation = open_federation(study, path, device="cpu")
        study, patients = federation.study, federation.patients
    if parameters is None:
        parameters = built_parameters(study)
    return study, parameters, patients
