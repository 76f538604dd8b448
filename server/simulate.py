"""The composition root of a simulation: throw-away identities, one process, the real code.

It divides data, makes keys, connects hospitals and coordinator, and writes the output folder.
It contains no protocol: every byte that a hospital sends here it would send over a network.
"""

from __future__ import annotations

import json
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
    forecast,
    open_federation,
    open_ledger,
    open_site,
    site_key,
    write_demo,
)
from common import integrity
from common.audit import AuditLog, Value, run_audit_verify, write_keys
from common.bundle import Bundle
from common.config import load
from common.crypto.identity import SiteKey
from common.errors import AbortedRound, Code, StorageError, WardroundError
from common.evidence import AuditEvidence, Evidence
from common.metrics import scoring_of, words_from_counts
from common.plan import evaluation_rounds, plan
from common.ports import Entropy, Tensors, Transport
from common.protocol.transcript import Chain
from common.protocol.wire import Refusal, unpack_body
from common.strategy import model_tensors
from common.study import Study
from common.world import (
    FileJournal,
    JournalGroup,
    SeededEntropy,
    SkippingClock,
    SystemEntropy,
    unix_seconds,
    write_durably,
)
from server.driver import CoordinatorDriver, deadlines_of
from server.folder import Paths, keep_study, kept_json, origin, require_room, study_of
from server.history import History
from server.keeper import Keeper, lost
from server.network import InProcessNetwork, SiteHandle, WireTap
from server.report import (
    Conclusion,
    Evaluation,
    PrivacyFacts,
    RoundResult,
    RunResult,
    SiteResult,
    audience_facts,
    conclude,
    write_report,
)
from server.round.effects import Aborted, Completed
from server.round.machine import CoordinatorRound
from server.table import RoundSummary, RunView

if TYPE_CHECKING:
    from client.privacy.ledger import Ledger
    from client.site import Federation
    from common.logs import Log
    from server.records import Holdings

# Deadlines that brought nothing, in a row, before a simulation says what it waits for.
PATIENCE = 6
# How often, at most, a live view is redrawn within a phase.
REDRAW_SECONDS = 0.1
# What a phase is called on the screen.
PHASES = {
    "handshake": "handshake",
    "ready": "training",
    "upload": "masked uploads",
    "agree": "agreeing on the survivors",
    "unmask": "opening the sum",
    "burn": "burning the round",
}
_KEYED = "AES-256-CTR keyed by the operating system (os.urandom)"
RANDOMNESS = f"{_KEYED}, noise rounded to a grid"
JOINT_RANDOMNESS = f"{_KEYED}, training noise by exact draws of whole numbers"


def simulate(
    config: Path,
    out: Path,
    *,
    view: RunView,
    device: str = "auto",
    compare: bool = True,
    engine: Engine | None = None,
    holdings: Holdings | None = None,
) -> Conclusion:
    """Run a study's simulation from the start.

    Args:
        config: the study; it may lie in `out`, with its data.
        out: the output folder; holds no run yet.
        view: where the run shows itself.
        device: auto, cpu or cuda.
        compare: whether every hospital also trains alone, at the end.
        engine: where the hospitals run; absent: in this process.
        holdings: the study's data, where they were read before (`server.records`).

    Raises ConfigError, DataError, RefusedError, AbortedRound, StorageError; what was reached
    lies in `out` and `resume` goes on from there.
    """
    study = load(config, Study)
    paths = Paths(out)
    require_room(paths, study, config)
    view.note("reading the data and the backbone")
    federation = open_federation(study, config, device=device, holdings=holdings)
    bundle = federation.build_bundle()
    keep_study(config, paths, compare=compare)
    with _guided(paths):
        return _run(federation, bundle, paths, view, engine)


def resume(
    out: Path,
    *,
    view: RunView,
    device: str = "auto",
    engine: Engine | None = None,
    holdings: Holdings | None = None,
) -> Conclusion:
    """Go on with a simulation after any interruption; of a finished one, say its end again.

    The engine is the one that the run began with; `holdings` are as for `simulate`.

    Raises as `simulate`.
    """
    paths = Paths(out)
    study = study_of(out)
    if paths.conclusion.exists():
        return Conclusion.from_json(kept_json(paths.conclusion))
    view.note("reading the data and the backbone")
    federation = open_federation(study, origin(paths)[0], device=device, holdings=holdings)
    _require_same_inputs(federation.manifest, paths)
    with _guided(paths):
        bundle = (
            Bundle.load(paths.bundle)
            if (paths.bundle / "bundle.json").exists()
            else federation.build_bundle()
        )
        return _run(federation, bundle, paths, view, engine)


@contextmanager
def _guided(paths: Paths) -> Iterator[None]:
    """Every fault that leaves a run to resume says how, and is in the log."""
    try:
        yield
    except WardroundError as error:
        _log_fault(paths, error)
        if isinstance(error, AbortedRound | StorageError):
            remedy = f"{error.remedy} Then type: wardround resume {paths.root}"
            raise type(error)(error.code, error.message, remedy=remedy) from error
        raise


def _log_fault(paths: Paths, error: WardroundError) -> None:
    from common.logs import open_log

    try:
        open_log(paths.log).error("run.failed", code=error.code)
    except StorageError:
        return  # the disk is what failed, and the fault itself is on its way to the reader


def _require_same_inputs(manifest: Mapping[str, Any], paths: Paths) -> None:
    kept = paths.manifest
    if kept.exists() and kept_json(kept)["inputs"] != manifest["inputs"]:
        raise StorageError(
            Code.INPUTS_CHANGED,
            "The data files differ from those the run began with.",
            remedy="Put the original files back, or start a new run.",
        )


def _run(
    federation: Federation, bundle: Bundle, paths: Paths, view: RunView, engine: Engine | None
) -> Conclusion:
    started = time.monotonic()
    # The code that runs is the code that was installed; a checkout cannot be checked.
    integrity.verify(("common", "client", "server"))
    if not (paths.bundle / "bundle.json").exists():
        bundle.save(paths.bundle)
    manifest = json.dumps(federation.manifest, indent=1, ensure_ascii=False)
    write_durably(paths.manifest, [manifest.encode()])
    make = SimulatedRun if engine is None else engine
    run = make(federation, bundle, paths, view)
    try:
        run.play()
        result = run.finish(started)
    finally:
        run.close()
    if bundle.study.privacy.mode != "none":
        forecast(paths.root)
    concluded = conclude(result, paths.root, federation.warnings)
    write_durably(paths.conclusion, [json.dumps(concluded.to_json()).encode()])
    return concluded


class _Witnessed:
    """The coordinator's evidence: into its audit log, into the log, and to whoever watches."""

    def __init__(self, audit: Evidence, log: Log) -> None:
        from common.logs import ALLOWED

        self._audit = audit
        self._log = log
        self._allowed = ALLOWED
        self.declined: dict[str, str] = {}

    def record(self, event: str, fields: Mapping[str, Value]) -> None:
        """Append one event, and remember who declined the round and why."""
        self._audit.record(event, fields)
        self._log.info(event, **{key: fields[key] for key in fields if key in self._allowed})
        if event == "round.started":
            self.declined = {}
        if event == "peer.refused":
            self.declined[str(fields["site"])] = str(fields["code"])


class SimulatedRun:
    """One simulation while it goes on; also the observer of its coordinator.

    Its hospitals live in this process; `server.ray` has them live elsewhere.
    """

    def __init__(self, federation: Federation, bundle: Bundle, paths: Paths, view: RunView) -> None:
        self._federation, self._bundle, self._paths = federation, bundle, paths
        self._view = view
        self._entropy = SystemEntropy()
        self._names = tuple(sorted(site.id for site in bundle.study.sites))
        self._keys = {v: site_key(paths.site(v), self._entropy) for v in self._names}
        coordinator = site_key(paths.state / "coordinator", self._entropy)
        publics = {v: key.public for v, key in self._keys.items()}
        self._keys_digest = write_keys(paths.audit, {**publics, "coordinator": coordinator.public})
        self._roster = publics
        terms = bundle.terms(publics)
        self._clock = SkippingClock()
        self._tap = WireTap(terms.upload_bytes(), paths.state / "wire")
        self._journals = JournalGroup(paths.state / "journals", self._names)
        self._network = InProcessNetwork(self._clock, self._tap, self._journals.settle)
        self._sites: dict[str, Site] = {}
        self._ledgers = self._open_ledgers()
        self._history = History(paths.history)
        from common.logs import open_log

        self._events = open_log(paths.log)
        self._terms = terms
        self._final: Chain | None = None
        # What is each hospital's alone, of the final model.
        self._own: dict[str, Tensors] = {}
        self._starved: AbortedRound | None = None
        self._shown = (0, "", 0, 0.0)
        self._journal = FileJournal(paths.state / "coordinator" / "journal")
        self._log = self._open_log(coordinator)
        self._witness = _Witnessed(AuditEvidence(self._log), self._events)
        machine = CoordinatorRound(
            terms,
            deadlines_of(bundle.study),
            self._entropy,
            patience=PATIENCE,
            record=self._journal.load(),
            blob=self._journal.get_blob,
        )
        self._driver = CoordinatorDriver(
            machine,
            journal=self._journal,
            transport=self._transport(),
            clock=self._clock,
            evidence=self._witness,
            observer=self,
        )
        self._network.driver = self._driver
        self._network.dropping, self._network.crashing = _accidents(bundle, federation)
        self._scoring = scoring_of(bundle.study)
        # How far, about, a released score may be off; one user knows all patient counts here.
        self._score_noise = plan(
            bundle.study, bundle.layout.size, patients=federation.patients
        ).evaluation.score_noise
        self._keeper = Keeper(
            self._history,
            bundle.study,
            terms,
            now=time.monotonic,
            sent=lambda: self._tap.bytes_up,
            epsilon=self._largest_epsilon,
        )
        self._recover_history()

    def _transport(self) -> Transport:
        """What carries the coordinator's messages."""
        return self._network

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
        return {
            v: founded_ledger(self._federation, self._bundle, self._paths, v) for v in self._names
        }

    # ------------------------------------------------------------ playing

    def play(self) -> None:
        """Until the run is over. Raises AbortedRound where it cannot go on."""
        self._view.note("connecting the hospitals")
        for name in self._names:
            self._network.sites[name] = self._handle(name)
            self._network.sites[name].start()
            self._network.sites[name].up = True
        try:
            machine = self._driver.machine
            self._driver.start()
            while self._final is None or not self._network.quiet:
                self._network.step()
                self._show()
                if self._starved is not None:
                    raise self._starved
            if machine.ended is not None:
                raise self._ended_early(machine.ended)
        except AbortedRound as error:
            raise self._saved(error) from error

    def _show(self) -> None:
        """Tell a live view what goes on, not more often than a person can read."""
        if not self._view.live or self._final is not None:
            return
        machine, now = self._driver.machine, time.monotonic()
        number, phase, left, shown = self._shown
        missing = machine.waiting_for()
        if (machine.record.round, machine.phase) == (number, phase) and (
            len(missing) == left or now - shown < REDRAW_SECONDS
        ):
            return
        self._shown = (machine.record.round, machine.phase, len(missing), now)
        turn = machine.chain.turn
        cohort = machine.record.members or self._names
        if machine.record.round != number or not number:
            self._view.round_started(
                min(turn, self._terms.turns), self._terms.kind(turn), cohort, machine.quorum
            )
        called = PHASES.get(machine.phase, machine.phase)
        self._view.phase(called, len(cohort) - len(missing), len(cohort), missing)

    def _saved(self, error: AbortedRound) -> AbortedRound:
        """What was reached is kept as a model, too, and the fault says where."""
        chain = self._driver.machine.chain
        done = min(chain.turn - 1, self._terms.turns)
        if done < 1:
            return error
        folder = self._paths.so_far
        shutil.rmtree(folder, ignore_errors=True)
        self._collect()
        self._export(folder, model_tensors(chain.state))
        message = (
            f"{error.message} {done} of {self._terms.turns} rounds are complete; the model after "
            f"them is in {folder}."
        )
        return AbortedRound(error.code, message, remedy=error.remedy)

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
        hospital = Hosted(self._federation, self._bundle, self._paths, name)
        return hospital.setup(
            self._ledgers[name],
            roster=self._roster,
            keys_digest=self._keys_digest,
            entropy=self._entropy,
            journals=self._journals,
        )

    # ------------------------------------------------------------ observing

    def completed(self, result: Completed, chain: Chain) -> None:
        """A round ended in an aggregate."""
        del chain
        entry = self._keep(result)
        if entry is None:
            return
        self._view.round_completed(
            RoundSummary(
                round=min(result.turn, self._terms.turns),
                kind=result.kind,
                cohort=self._names,
                survivors=result.survivors,
                dropouts=entry.dropouts,
                quorum=self._driver.machine.quorum,
                epsilon=self._epsilon(),
                bytes_up=entry.bytes_up,
                seconds=entry.seconds,
            )
        )

    def _keep(self, result: Completed) -> RoundResult | None:
        kept = self._keeper.completed(result)
        if kept is None:
            return None
        entry, metrics = kept
        if metrics is not None:
            self._view.measured(
                result.turn - 1,
                metrics.loss,
                metrics.primary,
                noise=self._score_noise,
                rejected=result.rejected,
            )
        self._events.info(
            "round.kept", round=entry.round, seconds=round(entry.seconds, 3), epsilon=entry.epsilon
        )
        return entry

    def _largest_epsilon(self) -> float | None:
        return max((value for value, _ in self._epsilon().values()), default=None)

    def aborted(self, result: Aborted) -> None:
        """A round ended without an aggregate."""
        turn = self._driver.machine.chain.turn
        kind = self._terms.kind(turn)
        self._keeper.aborted(result, turn)
        self._view.round_aborted(
            min(turn, self._terms.turns), kind, result.code.meaning, result.missing
        )
        if self._driver.machine.ended is None:
            self._starved = self._refused_by_too_many()

    def _refused_by_too_many(self) -> AbortedRound | None:
        """A round that failed because hospitals will not do its work would fail again, and again.

        Only what a hospital's own approval, budget or data said counts; a message that it could
        not follow, after a crash say, is mended by the next round.
        """
        declined = {
            site: code
            for site, code in self._witness.declined.items()
            if site in self._sites and self._sites[site].declined_with(code)
        }
        if len(self._names) - len(declined) >= self._driver.machine.quorum:
            return None
        return self._declining(Code.RUN_STARVED, declined)

    def _ended_early(self, why: Code) -> AbortedRound:
        """The coordinator's machine has ended the run; this says by whose word."""
        spent = self._driver.machine.record.spent
        words = {site: unpack_body(Refusal, signed).code for site, signed in spent.items()}
        return self._declining(why, words)

    def _declining(self, code: Code, declined: Mapping[str, str]) -> AbortedRound:
        """Which hospitals decline, with the code that most of them said, and what one told."""
        label, _ = Counter(declined.values()).most_common(1)[0]
        who = sorted(site for site, said in declined.items() if said == label)
        told = self._sites[who[0]].worker.declined
        meaning = "" if told is None else f" {who[0]} says: {told}"
        return AbortedRound(
            code,
            f"{', '.join(who)} decline ({label}); {self._driver.machine.quorum} of "
            f"{len(self._names)} hospitals are needed.{meaning}",
            remedy=None if told is None or code is Code.BUDGETS_SPENT else told.remedy,
        )

    def refused(self, site: str, code: Code) -> None:
        """A site's message was refused; the audit log says so."""

    def over(self, chain: Chain) -> None:
        """The run is complete."""
        self._final = chain

    def _epsilon(self) -> dict[str, tuple[float, float]]:
        spending = {v: ledger.spent() for v, ledger in self._ledgers.items() if ledger is not None}
        return {v: (s.epsilon, s.cap) for v, s in spending.items()}

    def _recover_history(self) -> None:
        """A crash between a round's last write and its history line loses no round."""
        machine = self._driver.machine
        last = machine.last_completed()
        if last is not None:
            self._keep(last)
        missed = lost(machine, self._history)
        if missed is not None:
            self.aborted(missed)

    # ------------------------------------------------------------ the end

    def finish(self, started: float) -> RunResult:
        """Measure, export and report."""
        if self._final is None:
            raise AssertionError("a run is finished after it is over")
        self._journals.settle()
        self._events.info("run.finished", model_digest=self._final.state_digest.hex())
        self._collect()
        for site in self._sites.values():
            site.close(finish=True)
        self._log.finish()
        state = model_tensors(self._final.state)
        self._export(self._paths.model, state)
        report = run_audit_verify(self._paths.audit)
        good = report.verified and report.complete
        self._view.note("measuring the model at every hospital")
        result = self._result(state, audit_verified=good, started=started)
        write_report(self._paths.root, result)
        return result

    def _collect(self) -> None:
        """What is each hospital's alone, while its journal is open."""
        if self._bundle.personal:
            self._own |= {name: site.worker.own() for name, site in self._sites.items()}

    def _export(self, folder: Path, state: Tensors) -> None:
        """The model as a folder; one for each hospital where layers are theirs alone."""
        own = self._own or {"": {}}
        for name, tensors in own.items():
            if not (folder / name).exists():
                self._federation.export(folder / name, {**state, **tensors})

    def _result(
        self, state: Mapping[str, NDArray[np.float32]], *, audit_verified: bool, started: float
    ) -> RunResult:
        study, bundle = self._bundle.study, self._bundle
        machine = self._driver.machine
        states = {v: {**state, **self._own.get(v, {})} for v in self._names}
        counts = {v: self._federation.counts(v, states[v]) for v in self._names}
        everywhere = self._evaluation(np.concatenate(list(counts.values())))
        sites = tuple(self._site_result(v, counts[v]) for v in self._names)
        if self._final is None:
            raise AssertionError("a result needs the final model")
        return RunResult(
            study=study.name,
            study_digest=bundle.digest.hex(),
            run=machine.record.run.hex(),
            created=datetime.fromtimestamp(unix_seconds(), UTC).isoformat(),
            simulated=True,
            scoring=self._scoring,
            labels=study.labels,
            task=study.task.kind,
            backbone=study.architecture[0],
            tuning=study.architecture[1],
            parameters=bundle.layout.size,
            personal=bundle.own_layout.size,
            rounds_planned=study.training.rounds,
            rounds=self._history.rounds,
            sites=sites,
            final=self._history.of_model(study.training.rounds),
            privacy=self._privacy(),
            quorum=machine.quorum,
            colluders=study.colluders(len(self._names)),
            masked_updates=self._tap.masked,
            plain_updates=self._tap.plain,
            audit_verified=audit_verified,
            model_digest=self._final.state_digest.hex(),
            wall_seconds=time.monotonic() - started,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            everywhere=everywhere,
            test=everywhere if self._federation.tested else None,
            subgroups={
                name: self._evaluation(own)
                for name, own in self._federation.subgroups(states).items()
            },
            software=self._federation.versions(),
        )

    def _alone(self, name: str) -> tuple[Evaluation | None, Evaluation | None]:
        """The hospital's own model on its own held-out patients, and on everybody's."""
        if not origin(self._paths)[1]:
            return None, None
        self._view.note(f"training {name} alone, for the comparison")
        state = self._federation.alone(name, self._bundle)
        counts = {v: self._federation.counts(v, state) for v in self._names}
        everywhere = np.concatenate(list(counts.values()))
        return self._evaluation(counts[name]), self._evaluation(everywhere)

    def _site_result(self, name: str, counts: NDArray[np.float64]) -> SiteResult:
        ledger = self._ledgers[name]
        rows = () if ledger is None else ledger.history()
        spending = None if ledger is None else ledger.spent()
        alone, everywhere = self._alone(name)
        return SiteResult(
            site=name,
            weight=self._bundle.weights[name],
            epsilon=None if spending is None else spending.epsilon,
            cap=None if spending is None else spending.cap,
            rounds_reserved=0 if ledger is None else ledger.rounds_charged(),
            rounds_released=sum(r.kind == "release" for r in rows),
            patients=self._federation.patients[name],
            together=self._evaluation(counts),
            alone=alone,
            alone_everywhere=everywhere,
        )

    def _evaluation(self, counts: NDArray[np.float64]) -> Evaluation:
        """Of exact metric vectors (k, M): a patient's each, or of many summed."""
        measured = self._scoring.read(words_from_counts(counts.sum(axis=0)))
        return Evaluation(round(measured.n), measured.scores, self._scoring.intervals(counts))

    def _privacy(self) -> PrivacyFacts:
        from common.accountant import epsilon, epsilon_rdp

        study, bundle = self._bundle.study, self._bundle
        privacy, training = study.privacy, study.training
        releases = len(evaluation_rounds(study))
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
        return PrivacyFacts(
            mode=privacy.mode,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=training.sampling_rate,
            expected_batch=training.expected_batch,
            local_steps=training.local_steps,
            clip_norm=privacy.clip_norm,
            noise_multiplier=bundle.noise_multiplier,
            answers=answers["train"],
            evaluation_epsilon=privacy.evaluation_epsilon or privacy.epsilon,
            evaluation_noise=bundle.evaluation_noise,
            evaluation_releases=releases,
            evaluation_answers=answers["held_out"],
            randomness=JOINT_RANDOMNESS if privacy.mode == "joint" else RANDOMNESS,
            statistics_noise=bundle.statistics_noise,
            audiences=audience_facts(bundle, most.events("train")),
            steps=sum(
                event.steps
                for event in most.events("train")
                if event.noise_multiplier == bundle.noise_multiplier
            ),
            engine=self._federation.engine,
        )

    def close(self) -> None:
        """Let go of every file."""
        for site in self._sites.values():
            site.close()
        for ledger in self._ledgers.values():
            if ledger is not None:
                ledger.close()
        self._log.close()
        self._journals.close()
        self._journal.close()


Engine = Callable[["Federation", Bundle, Paths, RunView], SimulatedRun]


# ---------------------------------------------------------------- a simulated hospital


def founded_ledger(
    federation: Federation, bundle: Bundle, paths: Paths, name: str
) -> Ledger | None:
    """A simulated hospital's ledger, or None where the study has no privacy mode."""
    seed = federation.manifest["seed"]
    return open_ledger(
        bundle,
        paths.site(name),
        cap=bundle.study.privacy.epsilon or 1.0,
        # The seed fixes who is held out, so that a split can be repeated; never noise.
        founding=SeededEntropy(f"held-out {seed} {name}"),
    )


@dataclass(frozen=True)
class Hosted:
    """Where one simulated hospital's things are."""

    federation: Federation
    bundle: Bundle
    paths: Paths
    name: str

    def divide(self, ledger: Ledger | None) -> str:
        """Fix who is held out; returns the division's name. Raises DataError."""
        fraction = self.bundle.study.evaluation.held_out
        split = None if ledger is None else ledger.split(fraction)
        return self.federation.divide(self.name, split).split_id

    def setup(
        self,
        ledger: Ledger | None,
        *,
        roster: Mapping[str, bytes],
        keys_digest: str,
        entropy: Entropy,
        journals: JournalGroup | None,
    ) -> SiteSetup:
        """What the hospital brings to the run."""
        folder = self.paths.site(self.name)
        return SiteSetup(
            site=self.name,
            folder=folder,
            audit=self.paths.audit,
            bundle=self.bundle,
            roster=roster,
            keys_digest=keys_digest,
            ceilings=_permissive(self.bundle.study, self.bundle.digest),
            kill_switch=folder / "STOP",
            trainer=lambda: self.federation.trainer(self.name, self.bundle, entropy),
            split_id=self.divide(ledger),
            entropy=entropy,
            journals=journals,
        )


# ---------------------------------------------------------------- settings and faults


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
    return _frozen(dropping), _frozen(crashing)


def _frozen(table: Mapping[int, set[str]]) -> dict[int, frozenset[str]]:
    return {number: frozenset(sites) for number, sites in table.items()}


def prepare_demo(out: Path) -> tuple[Path, Study]:
    """The demo's study file, written into `out` where its run will lie, and the study."""
    if out.exists() and any(out.iterdir()):
        raise StorageError(
            Code.OUTPUT_NOT_EMPTY,
            f"{out}: is not empty.",
            remedy="Name another folder with --out.",
        )
    config = write_demo(out)
    return config, load(config, Study)


@dataclass(frozen=True)
class Preview:
    """A study with its sites, and what is known of its model and its patients.

    Attributes:
        parameters: trainable ones.
        patients: by site; empty where nobody's data were read.
        crowded: those with more notes than the study reads, by site.
        engine: what computes clipped sums, and why, where the model was built.
    """

    study: Study
    parameters: int
    patients: dict[str, int]
    crowded: dict[str, int]
    engine: str


def preview(study: Study, path: Path, parameters: int | None, holdings: Holdings | None) -> Preview:
    """What a plan needs, before anything is built.

    A simulation's data were read (`server.records`), so patients are known; the model is built
    for its size where `parameters` does not say it.
    """
    patients: dict[str, int] = {}
    crowded: dict[str, int] = {}
    engine = ""
    if holdings is not None:
        federation = open_federation(study, path, device="cpu", holdings=holdings)
        study, patients, crowded = federation.study, federation.patients, federation.crowded
    if parameters is None:
        parameters, engine = built_parameters(study, path)
    return Preview(study, parameters, patients, crowded, engine)
