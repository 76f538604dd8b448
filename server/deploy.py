"""The composition root of a coordinator: one run of one study over Flower, with real hospitals.

It contains no protocol and holds no hospital's secret: it opens the run's folder, connects the
round machine with the Flower listeners, and keeps what an operator and an auditor look at.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from common import integrity
from common.audit import ALONE, AuditLog, Value, run_audit_verify, write_keys
from common.bundle import Bundle
from common.cli import VERSION
from common.crypto.identity import SiteKey
from common.errors import Code, ConfigError, StorageError
from common.evidence import AuditEvidence, Evidence
from common.logs import ALLOWED, Log
from common.metrics import scoring_of
from common.offer import OFFER_FILE, open_offer
from common.plan import evaluation_rounds
from common.ports import Clock, Entropy, Transport
from common.protocol.envelope import COORDINATOR
from common.protocol.transcript import Chain
from common.strategy import model_tensors
from common.tensors import filed, save_tensors
from common.world import (
    FileJournal,
    SystemClock,
    SystemEntropy,
    give_back_memory,
    make_folder,
    unix_seconds,
    write_durably,
)
from server.driver import CoordinatorDriver, deadlines_of
from server.history import History
from server.keeper import Keeper, lost
from server.network import WireTap
from server.report import (
    Conclusion,
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
from server.watch import RunStatus, SiteStatus

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from common.study import Study

_KEYED = "AES-256-CTR keyed by the hospital's operating system"
RANDOMNESS = f"{_KEYED}, noise rounded to a grid"
JOINT_RANDOMNESS = f"{_KEYED}, training noise by exact draws of whole numbers"
_DIGITS = 8
_STANDS_ON = ("flwr", "cryptography")


@dataclass(frozen=True)
class RunFolder:
    """The places of one run on the coordinator."""

    root: Path

    @property
    def bundle(self) -> Path:
        """The published study bundle, with its roster and offer."""
        return self.root / "bundle"

    @property
    def journal(self) -> Path:
        """What a restart goes on from."""
        return self.root / "journal"

    @property
    def audit(self) -> Path:
        """The coordinator's audit log, and everybody's public keys."""
        return self.root / "audit"

    @property
    def history(self) -> Path:
        """What became of every round."""
        return self.root / "history.jsonl"

    @property
    def wire(self) -> Path:
        """How many updates came, masked and readable."""
        return self.root / "wire"

    @property
    def started(self) -> Path:
        """When the run began."""
        return self.root / "started.json"

    @property
    def model(self) -> Path:
        """The trained tensors; hospitals hold the folder that `from_pretrained` loads."""
        return self.root / "model"

    @property
    def conclusion(self) -> Path:
        """What was said at the end; its presence says that the run is over."""
        return self.root / "conclusion.json"


@dataclass(frozen=True)
class Published:
    """A study as the coordinator published it: bundle, and the keys of its hospitals."""

    bundle: Bundle
    keys: Mapping[str, bytes]

    @staticmethod
    def load(folder: Path, coordinator: bytes) -> Published:
        """Read a bundle folder and check what was signed about it.

        Raises:
            ConfigError: not published, or not by this coordinator.
            StorageError: the bundle is damaged.
        """
        bundle = Bundle.load(folder)
        if not (folder / OFFER_FILE).exists():
            raise ConfigError(
                Code.NOT_PUBLISHED,
                f"{folder}: this bundle has no roster and no offer.",
                remedy=f"Publish it: wardround server publish {folder}",
            )
        roster = open_offer(folder, public=coordinator, study=bundle.digest).roster
        members = {str(site): key for site, key in roster.keys().items()}
        missing = [site.id for site in bundle.study.sites if site.id not in members]
        if missing:
            raise ConfigError(
                Code.NOT_PUBLISHED, f"{folder}: {', '.join(missing)} is not in the roster."
            )
        return Published(bundle, {site.id: members[site.id] for site in bundle.study.sites})


def run_folder(state: Path, bundle: Bundle) -> RunFolder:
    """Where the run of this study lies; one run per study, for good."""
    name = f"{bundle.study.name}-{bundle.digest.hex()[:_DIGITS]}"
    return RunFolder(state / "runs" / name)


def runs(state: Path) -> tuple[RunFolder, ...]:
    """Every run of this coordinator, the newest last."""
    found = [path for path in (state / "runs").glob("*") if (path / "started.json").exists()]
    return tuple(RunFolder(p) for p in sorted(found, key=lambda p: _began(RunFolder(p))))


def _began(folder: RunFolder) -> int:
    return int(json.loads(folder.started.read_text())["at"])


def prepare(state: Path, source: Path, coordinator: bytes) -> RunFolder:
    """The folder of a run, made from a published bundle; of a run that exists, its own.

    Raises ConfigError, StorageError.
    """
    published = Published.load(source, coordinator)
    folder = run_folder(state, published.bundle)
    if not folder.started.exists():
        make_folder(folder.root, mode=0o700)
        if folder.bundle.exists():
            shutil.rmtree(folder.bundle)
        try:
            shutil.copytree(source, folder.bundle)
        except OSError as error:
            raise StorageError(
                Code.JOURNAL_WRITE, f"{folder.bundle}: cannot be written ({error.strerror})."
            ) from None
        # Last: a folder with it has all of it.
        write_durably(folder.started, [json.dumps({"at": unix_seconds()}).encode()])
    return folder


class _Witnessed:
    """The coordinator's evidence: into its audit log, and into the log for looking."""

    def __init__(self, audit: Evidence, log: Log) -> None:
        self._audit = audit
        self._log = log
        self.codes: Counter[str] = Counter()

    def record(self, event: str, fields: Mapping[str, Value]) -> None:
        """Append one event."""
        self._audit.record(event, fields)
        self._log.info(event, **{key: fields[key] for key in fields if key in ALLOWED})
        if "code" in fields:
            self.codes[str(fields["code"])] += 1


@dataclass(frozen=True, slots=True)
class Heard:
    """What the transport knows of one hospital; `heard` in seconds of the run's clock."""

    online: bool = False
    heard: float | None = None
    asked: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    code: str = ""


class CoordinatorRun:
    """One run of one study, from its folder; also the observer of its coordinator.

    Args:
        folder: as `prepare` made it.
        key: the coordinator's identity.
        log: the operator's log.
        clock: monotonic seconds.
        entropy: where the run id comes from.

    Raises StorageError, ConfigError where the folder cannot be used.
    """

    def __init__(
        self,
        folder: RunFolder,
        key: SiteKey,
        *,
        log: Log,
        clock: Clock | None = None,
        entropy: Entropy | None = None,
    ) -> None:
        integrity.verify(("common", "server"))
        self.folder, self.key = folder, key
        self._clock = SystemClock() if clock is None else clock
        published = Published.load(folder.bundle, key.public)
        self._journal = FileJournal(folder.journal)
        # Models lie beside the journal: in memory there is room for a sum and an upload.
        keep = partial(filed, folder=folder.journal)
        self.keys = published.keys
        self.bundle = replace(published.bundle, initial=keep(published.bundle.initial))
        del published
        terms = self.bundle.terms(self.keys)
        self.terms = replace(terms, initial=keep(terms.initial))
        # What the terms were made from is in memory only for a simulation's many parties.
        self.bundle.forget_start()
        self.tap = WireTap(self.terms.upload_bytes(), folder.wire)
        self._history = History(folder.history)
        digest = write_keys(folder.audit, {**self.keys, COORDINATOR: key.public})
        self._audit = AuditLog.open(
            folder.audit / f"{COORDINATOR}.jsonl",
            owner=COORDINATOR,
            sign=key.sign_bytes,
            clock=unix_seconds,
            facts={"keys": digest, "study": self.bundle.digest.hex(), "kept": ALONE},
        )
        self._log = log
        self._witness = _Witnessed(AuditEvidence(self._audit), log)
        self.machine = CoordinatorRound(
            self.terms,
            deadlines_of(self.bundle.study),
            SystemEntropy() if entropy is None else entropy,
            patience=None,
            record=self._journal.load(),
            blob=self._journal.get_blob,
            keep=keep,
        )
        self.final: Chain | None = None
        self.ended = 0.0
        self._keeper = Keeper(
            self._history,
            self.bundle.study,
            self.terms,
            now=self._clock.now,
            sent=lambda: self.tap.bytes_up,
        )
        self._recover_history()

    @property
    def study(self) -> Study:
        """The signed terms."""
        return self.bundle.study

    def driver(self, transport: Transport) -> CoordinatorDriver:
        """The running process over `transport`."""
        return CoordinatorDriver(
            self.machine,
            journal=self._journal,
            transport=transport,
            clock=self._clock,
            evidence=self._witness,
            observer=self,
            tidy=give_back_memory,
        )

    def seal(self) -> None:
        """Sign the end of the audit log again, after a look at a run that was concluded before.

        Raises StorageError.
        """
        self._audit.finish()

    def close(self) -> None:
        """Let go of the files."""
        self._audit.close()
        self._journal.close()

    # ------------------------------------------------------------ observing

    def completed(self, result: Completed, chain: Chain) -> None:
        """A round ended in an aggregate."""
        del chain
        self._keeper.completed(result)

    def aborted(self, result: Aborted) -> None:
        """A round ended without one."""
        self._keeper.aborted(result, self.machine.chain.turn)

    def refused(self, site: str, code: Code) -> None:
        """A site's message was refused; the audit log says so."""

    def over(self, chain: Chain) -> None:
        """The run is complete; from `ended` on, hospitals are told."""
        self.final, self.ended = chain, self._clock.now()

    def _recover_history(self) -> None:
        """A crash between a round's last write and its history line loses no round."""
        last = self.machine.last_completed()
        if last is not None:
            self._keeper.completed(last)
        missed = lost(self.machine, self._history)
        if missed is not None:
            self.aborted(missed)

    # ------------------------------------------------------------ what an operator sees

    def status(self, heard: Mapping[str, Heard], revoked: Sequence[str] = ()) -> RunStatus:
        """The run at this moment."""
        machine, now = self.machine, self._clock.now()
        rounds = self._history.rounds
        over = machine.phase == "done"
        missing = machine.waiting_for()
        return RunStatus(
            at=unix_seconds(),
            study=self.study.name,
            digest=self.bundle.digest.hex(),
            run=machine.record.run.hex(),
            phase=machine.phase,
            round=machine.record.round,
            kind=self.terms.kind(machine.chain.turn),
            turn=min(machine.chain.turn, self.terms.turns),
            turns=self.terms.turns,
            completed=sum(r.code is None and r.kind == "train" for r in rounds),
            aborted=sum(r.code is not None for r in rounds),
            rejected=sum(r.rejected for r in rounds),
            quorum=machine.quorum,
            waiting_for=missing,
            deadline=None if over else max(0.0, machine.deadline - now),
            ends=None if over else self._ends(rounds),
            refused=dict(self._witness.codes),
            sites=tuple(
                self._site(site, heard.get(site, Heard()), now, revoked=site in revoked)
                for site in self.terms.parties
            ),
        )

    def _site(self, site: str, heard: Heard, now: float, *, revoked: bool) -> SiteStatus:
        if revoked:
            state = "revoked"
        elif not heard.online:
            state = "offline"
        elif heard.code:
            state = "waiting"
        else:
            state = "asked" if heard.asked else "ready"
        age = None if heard.heard is None else max(0.0, now - heard.heard)
        up, down = heard.bytes_up, heard.bytes_down
        return SiteStatus(site, state, heard.online, age, up, down, heard.code)

    def _ends(self, rounds: Sequence[RoundResult]) -> float | None:
        """Seconds until the end, if rounds go on as the last ones did."""
        took = [r.seconds for r in rounds if r.code is None and r.seconds > 0][-5:]
        if not took:
            return None
        left = self.terms.turns + 1 - self.machine.chain.turn + 1
        return max(0, left) * sum(took) / len(took)

    # ------------------------------------------------------------ the end

    def conclude(self) -> Conclusion:
        """Keep the model, verify the audit log, write the report. The run is over.

        Raises StorageError.
        """
        chain = self.machine.chain if self.final is None else self.final
        self._audit.finish()
        make_folder(self.folder.model)
        save_tensors(self.folder.model / "weights.safetensors", model_tensors(chain.state))
        write_durably(self.folder.model / "model_config.json", [self.bundle.model_config.encode()])
        verified = run_audit_verify(self.folder.audit).verified
        result = self._result(chain, audit_verified=verified)
        plots = importlib.util.find_spec("matplotlib") is not None
        write_report(self.folder.root, result, plots=plots)
        concluded = conclude(result, self.folder.root, ())
        write_durably(self.folder.conclusion, [json.dumps(concluded.to_json()).encode()])
        return concluded

    def _result(self, chain: Chain, *, audit_verified: bool) -> RunResult:
        study, bundle, machine = self.study, self.bundle, self.machine
        facts = self._privacy()
        charged = sum(r.kind == "train" for r in self._history.rounds)
        most = max(facts.answers.values(), default=None) if facts.answers else None
        cap = facts.epsilon
        return RunResult(
            study=study.name,
            study_digest=bundle.digest.hex(),
            run=machine.record.run.hex(),
            created=datetime.fromtimestamp(unix_seconds(), UTC).isoformat(),
            simulated=False,
            scoring=scoring_of(study),
            labels=study.labels,
            task=study.task.kind,
            backbone=study.architecture[0],
            tuning=study.architecture[1],
            parameters=bundle.layout.size,
            personal=bundle.own_layout.size,
            rounds_planned=study.training.rounds,
            rounds=self._history.rounds,
            sites=tuple(
                SiteResult(v, bundle.weights[v], most, cap, charged, 0) for v in self.terms.parties
            ),
            final=self._history.of_model(study.training.rounds),
            privacy=facts,
            quorum=machine.quorum,
            colluders=study.colluders(len(self.terms.parties)),
            masked_updates=self.tap.masked,
            plain_updates=self.tap.plain,
            audit_verified=audit_verified,
            model_digest=chain.state_digest.hex(),
            wall_seconds=float(unix_seconds() - _began(self.folder)),
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            ended=machine.ended,
            software={"wardround": VERSION, **{name: version(name) for name in _STANDS_ON}},
        )

    def _privacy(self) -> PrivacyFacts:
        """The most that any hospital can have spent, from the rounds that the coordinator saw.

        Every hospital's own ledger is the truth; it can only say less, where a hospital missed
        a round.
        """
        from common.accountant import DpEvent, epsilon

        study, bundle = self.study, self.bundle
        privacy, training = study.privacy, study.training
        releases = len(evaluation_rounds(study))
        if privacy.mode == "none" or privacy.delta is None or bundle.noise_multiplier is None:
            return _no_privacy(study, releases)
        rounds = self._history.rounds
        trained = sum(r.kind == "train" for r in rounds)
        counted = sum(r.kind == "statistics" for r in rounds)
        events = []
        if trained:
            steps = trained * training.local_steps
            events.append(DpEvent(bundle.noise_multiplier, training.sampling_rate, steps))
        if counted and bundle.statistics_noise is not None:
            events.append(DpEvent(bundle.statistics_noise, 1.0, counted))
        measured = sum(r.kind != "statistics" for r in rounds)
        held = []
        if measured and bundle.evaluation_noise is not None:
            held.append(DpEvent(bundle.evaluation_noise, 1.0, min(measured, len(rounds))))
        name = "PLD (dp-accounting), at most"
        return PrivacyFacts(
            mode=privacy.mode,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=training.sampling_rate,
            expected_batch=training.expected_batch,
            local_steps=training.local_steps,
            clip_norm=privacy.clip_norm,
            noise_multiplier=bundle.noise_multiplier,
            answers={name: epsilon(events, privacy.delta)} if events else {name: 0.0},
            evaluation_epsilon=privacy.evaluation_epsilon or privacy.epsilon,
            evaluation_noise=bundle.evaluation_noise,
            evaluation_releases=releases,
            evaluation_answers={name: epsilon(held, privacy.delta)} if held else {name: 0.0},
            randomness=JOINT_RANDOMNESS if privacy.mode == "joint" else RANDOMNESS,
            statistics_noise=bundle.statistics_noise,
            audiences=audience_facts(bundle, events),
            steps=trained * training.local_steps,
        )


def _no_privacy(study: Study, releases: int) -> PrivacyFacts:
    training = study.training
    return PrivacyFacts(
        mode="none",
        epsilon=None,
        delta=None,
        sampling_rate=training.sampling_rate,
        expected_batch=training.expected_batch,
        local_steps=training.local_steps,
        clip_norm=None,
        noise_multiplier=None,
        answers={},
        evaluation_epsilon=None,
        evaluation_noise=None,
        evaluation_releases=releases,
        evaluation_answers={},
        randomness=RANDOMNESS,
    )


@dataclass
class Tapped:
    """The driver, with an eye on what the coordinator could read of every message."""

    driver: CoordinatorDriver
    see: Callable[[bytes], None]

    @property
    def machine(self) -> CoordinatorRound:
        """The round machine."""
        return self.driver.machine

    def start(self) -> None:
        """Begin or resume."""
        self.driver.start()

    def receive(self, site: str, payload: bytes) -> None:
        """Look at a message, then handle it."""
        self.see(payload)
        self.driver.receive(site, payload)

    def tick(self) -> None:
        """Act on the time."""
        self.driver.tick()


def serve_folder(folder: str, grid: Grid) -> None:
    """Serve a run over any Grid of Flower's, without listeners of our own: under stock Flower.

    Raises StorageError, ConfigError, AbortedRound.
    """
    from common.logs import open_log
    from server.app import Exchange, Pace
    from server.enrol import coordinator_key

    place = RunFolder(Path(folder))
    if place.conclusion.exists():
        return
    state = place.root.parent.parent
    run = CoordinatorRun(place, coordinator_key(state), log=open_log(state / "log.jsonl"))
    exchange = Exchange(
        grid,
        run.key,
        run.bundle.digest,
        run.keys,
        SystemClock(),
        registered=lambda _node: None,
        watch=Unwatched(),
        # Every look is a call to the SuperLink, and its answers come seconds apart.
        pace=Pace(poll_s=0.5, look_s=2.0),
    )
    try:
        exchange.serve(Tapped(run.driver(exchange), run.tap.see), lambda: run.final is not None)
        run.conclude()
    finally:
        run.close()


class Unwatched:
    """Hears what passes on a transport, and keeps nothing of it."""

    def arrived(self, site: str) -> None:
        """A hospital is here."""

    def left(self, site: str) -> None:
        """A hospital's node is gone."""

    def answered(self, site: str, size: int, seconds: float, code: str) -> None:
        """An answer was taken."""

    def refused(self, site: str, code: Code) -> None:
        """An answer was refused."""

    def lost(self, site: str, code: str) -> None:
        """A question will not be answered."""
