"""Wires one hospital together: identity, journal, ledger, audit log, trainer, round machine.

The one factory of a site, used by the hospital's daemon and by simulation. Torch is never
imported here: the trainer is handed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from client.approval import Approval, StudyFacts, approve
from client.aside import Aside
from client.config import Ceilings
from client.daemon import SiteDaemon, told
from client.personal import PersonalLayers
from client.privacy.ledger import (
    Charge,
    Ledger,
    PlanReservation,
    Reservation,
    RoundId,
    Spending,
)
from client.round.effects import Work, Worked
from client.round.machine import SiteRound
from client.variate import ControlVariate
from common.audit import ALONE, AuditLog, Value
from common.bundle import Bundle
from common.crypto.identity import SiteKey
from common.crypto.seal import Vault
from common.errors import Code, DataError, RefusedError, WardroundError
from common.evidence import AuditEvidence, Evidence
from common.keys import secret_file
from common.plan import evaluation_rounds
from common.ports import Entropy, Journal, Tensors, Trainer, Transport
from common.protocol.transcript import Chain
from common.protocol.wire import Witness
from common.world import (
    FileJournal,
    JournalGroup,
    SealedJournal,
    WallClock,
    make_folder,
    unix_seconds,
)

if TYPE_CHECKING:
    from client.federation import Federation
    from client.holdings import Holdings
    from common.study import Study

__all__ = [
    "Ceilings",
    "Federation",
    "HospitalWorker",
    "Site",
    "SiteSetup",
    "built_parameters",
    "charges_of",
    "facts_of",
    "forecast",
    "open_audit",
    "open_federation",
    "open_ledger",
    "open_site",
    "plan_charges",
    "site_key",
    "switch_is_on",
    "write_demo",
]

IDENTITY_FILE = "identity.key"
VAULT_FILE = "vault.key"
LEDGER_FILE = "ledger.sqlite"


@dataclass(frozen=True)
class SiteSetup:
    """What one hospital brings to a run.

    Args:
        site: its id.
        folder: its own state folder (keys, journal, ledger).
        audit: the folder of the run's audit logs.
        bundle: the study it approved.
        roster: every party's public key.
        keys_digest: what the audit log says of the roster.
        ceilings: the hospital's own limits.
        kill_switch: the file whose presence stops everything.
        trainer: the trainer, ready to work; asked for before every reservation, so that a fault
            in the records costs no budget.
        split_id: names the fixed division into training and held-out patients.
        entropy: secrets and noise; the operating system's in every real run.
        code_digest: what this installation's code hashes to.
        approval: what a person here signed for this study; None in a simulation.
        journal: the study's journal folder; absent: `journal` in `folder`.
        journals: in a simulation, the group that syncs the records of all hospitals at once.
        watch: told of every event, beside the audit log.
        key: this hospital's identity in the study's roster; absent: the folder's own.
        alone: whether it keeps its audit log in a folder of its own, as a real hospital does.
        keep: puts a model where it lies between two uses, and gives what reads it.
    """

    site: str
    folder: Path
    audit: Path
    bundle: Bundle
    roster: Mapping[str, bytes]
    keys_digest: str
    ceilings: Ceilings
    kill_switch: Path
    trainer: Callable[[], Trainer]
    split_id: str
    entropy: Entropy
    code_digest: bytes = bytes(32)
    approval: Approval | None = None
    journal: Path | None = None
    journals: JournalGroup | None = None
    watch: Evidence | None = None
    key: SiteKey | None = None
    alone: bool = False
    keep: Callable[[Tensors], Tensors] = lambda state: state


def switch_is_on(path: Path) -> bool:
    """Whether a kill switch is on: its file is there, or nobody can say that it is not."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


class HospitalWorker:
    """The hospital's own systems behind the round machine: approval, ledger, trainer."""

    def __init__(self, setup: SiteSetup, ledger: Ledger | None, aside: Aside | None = None) -> None:
        self._setup = setup
        self._aside = aside
        self._ledger = ledger
        self._reservations: dict[int, Reservation] = {}
        self.final: Chain | None = None
        self.declined: WardroundError | None = None

    def work(self, request: Work) -> Worked:
        """Approve, reserve, then count, measure, train; nothing before the reservation.

        Raises RefusedError or DataError, and keeps it in `declined` for the hospital to look at:
        its text stays here, the coordinator is told the code alone.
        """
        try:
            return self._work(request)
        except (RefusedError, DataError) as error:
            self.declined = error
            raise

    def _work(self, request: Work) -> Worked:
        setup = self._setup
        approve(
            facts_of(setup.bundle, setup.code_digest),
            setup.ceilings,
            stopped=self.stopped(),
            approval=setup.approval,
        )
        trainer = setup.trainer()
        if self._aside is not None:
            self._aside.settle(request.counted)
        self._reserve(request)
        # Reserved and durable: from here the budget stays charged, whatever happens.
        metrics: NDArray[np.int64] | None = None
        update: NDArray[np.float32] | NDArray[np.int32] | None = None
        statistics: NDArray[np.int64] | None = None
        if request.counts:
            statistics = trainer.statistics()
        if request.measures:
            metrics = trainer.measure({**request.state, **self.own()}, request.round)
        if request.trains:
            update = self._train(trainer, request)
        return Worked(update, metrics, self._witness(), statistics)

    def _train(self, trainer: Trainer, request: Work) -> NDArray[np.float32] | NDArray[np.int32]:
        """The update; zeros where a model that the gate is to judge cannot be trained on.

        A poisoned model may send every hospital's training to infinity. If that kept them from
        answering, the round that rolls it back could not end.
        """
        try:
            if self._aside is None:
                return trainer.train(request.state, request.round)
            state = {**request.state, **self._aside.given(request.state)}
            trained = cast("NDArray[np.float32]", trainer.train(state, request.round))
            return self._aside.keep(request.round, request.state, trained)
        except DataError as error:
            bundle = self._setup.bundle
            joint = bundle.study.privacy.mode == "joint"  # its zeros would lack their noise
            judged = bundle.study.acceptance is not None and not joint
            if not judged or error.code is not Code.UPDATE_NOT_FINITE:
                raise
            return np.zeros(bundle.layout.size, np.float32)

    def own(self) -> Tensors:
        """Tensors of the model that are this hospital's alone; none but with personal layers."""
        return {} if self._aside is None else self._aside.own()

    def _witness(self) -> Witness:
        if self._ledger is None:
            return Witness(0, bytes(32))
        return Witness(self._ledger.counter, self._ledger.head)

    def _reserve(self, request: Work) -> None:
        if self._ledger is None:
            return
        bundle = self._setup.bundle
        charges = charges_of(bundle, request)
        round_id = RoundId(bundle.digest, "", request.round)
        if bundle.study.privacy.mode == "joint":
            reservation = self._ledger.draw_round(self._plan(self._ledger), round_id, charges)
        else:
            reservation = self._ledger.reserve_round(
                round_id, charges, self._setup.split_id, study_limit=self._limit
            )
        self._ledger.begin(reservation)
        self._reservations = {request.round: reservation}

    @property
    def _limit(self) -> float:
        return self._setup.bundle.study.privacy.epsilon or math.inf

    def _plan(self, ledger: Ledger) -> PlanReservation:
        """The study's plan: the one that is open, also after a restart, or a new one."""
        bundle = self._setup.bundle
        known = ledger.open_plan(bundle.digest)
        if known is not None:
            return known
        return ledger.reserve_plan(
            bundle.digest, "", plan_charges(bundle), self._setup.split_id, study_limit=self._limit
        )

    def release(self, round_number: int) -> None:
        """Record that the round's masked update leaves the hospital."""
        reservation = self._reservations.get(round_number)
        if self._ledger is not None and reservation is not None:
            self._ledger.release(reservation)

    def stopped(self) -> bool:
        """Whether the kill switch file is there."""
        return switch_is_on(self._setup.kill_switch)

    def finished(self, chain: Chain) -> None:
        """Keep the final model; what the study reserved and did not run is free again."""
        if self._ledger is not None:
            plan = self._ledger.open_plan(self._setup.bundle.digest)
            if plan is not None:
                self._ledger.settle_plan(plan)
        self.final = chain


def charges_of(bundle: Bundle, request: Work) -> tuple[Charge, ...]:
    """What a round of a private study does to training patients and to held-out patients."""
    return _charges(
        bundle,
        counted=int(request.counts),
        trained=int(request.trains),
        measured=int(request.measures),
    )


def plan_charges(bundle: Bundle) -> tuple[Charge, ...]:
    """Everything a study may do to them, its spare rounds in every kind of work included.

    Which kind of round will burn, nobody knows beforehand.
    """
    study = bundle.study
    spare = study.training.spare_rounds
    return _charges(
        bundle,
        counted=1 + spare if study.feature_count else 0,
        trained=study.training.rounds + spare,
        measured=len(evaluation_rounds(study)) + spare,
    )


def _charges(bundle: Bundle, *, counted: int, trained: int, measured: int) -> tuple[Charge, ...]:
    from common.accountant import DpEvent

    training = bundle.study.training
    charges: list[Charge] = []
    if bundle.noise_multiplier is None or bundle.evaluation_noise is None:
        raise AssertionError("a study with a ledger has resolved noise")
    if counted:
        if bundle.statistics_noise is None:
            raise AssertionError("a study that counts statistics has resolved their noise")
        counting = DpEvent(bundle.statistics_noise, 1.0, counted)
        charges.append(Charge("statistics", "train", (counting,)))
    if trained:
        steps = training.local_steps * trained
        stepping = DpEvent(bundle.noise_multiplier, training.sampling_rate, steps)
        charges.append(Charge("train", "train", (stepping,)))
    if measured:
        release = DpEvent(bundle.evaluation_noise, 1.0, measured)
        charges.append(Charge("evaluate", "held_out", (release,)))
    return tuple(charges)


def facts_of(bundle: Bundle, code_digest: bytes) -> StudyFacts:
    """What a hospital compares with its ceilings."""
    privacy = bundle.study.privacy
    return StudyFacts(
        study_digest=bundle.digest,
        backbone_digest=bundle.backbone_digest,
        code_digest=code_digest,
        parties=len(bundle.study.sites),
        rounds=bundle.study.training.rounds,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        joint=privacy.mode == "joint",
    )


@dataclass
class _Told:
    """The audit log first; then whoever watches."""

    evidence: Evidence
    watch: Evidence

    def record(self, event: str, fields: Mapping[str, Value]) -> None:
        """Pass one event on."""
        self.evidence.record(event, fields)
        self.watch.record(event, fields)


@dataclass
class Site:
    """One hospital, open: its daemon and what belongs to it."""

    setup: SiteSetup
    daemon: SiteDaemon
    machine: SiteRound
    worker: HospitalWorker
    ledger: Ledger | None
    log: AuditLog
    _closers: list[Callable[[], None]] = field(default_factory=list)

    def spending(self) -> Spending | None:
        """Where the ledger stands, or None without DP."""
        return None if self.ledger is None else self.ledger.spent()

    def declined_with(self, label: str) -> bool:
        """Whether the last work this hospital would not do is what it told by this code."""
        declined = self.worker.declined
        return declined is not None and told(declined).label == label

    def close(self, *, finish: bool = False) -> None:
        """Let go of files; `finish` ends the audit log for good."""
        if finish:
            self.log.finish()
        self.log.close()
        for closer in self._closers:
            closer()


def site_key(folder: Path, entropy: Entropy) -> SiteKey:
    """The hospital's identity, made on first use. Raises StorageError."""
    make_folder(folder, mode=0o700)
    return SiteKey.from_seed(secret_file(folder / IDENTITY_FILE, entropy))


def open_ledger(bundle: Bundle, folder: Path, *, cap: float, founding: Entropy) -> Ledger | None:
    """The population's ledger, or None where the study has no privacy mode.

    `founding` makes the key that divides training from held-out patients, once.
    """
    delta = bundle.study.privacy.delta
    if bundle.study.privacy.mode == "none" or delta is None:
        return None
    return Ledger.open(
        folder / LEDGER_FILE, epsilon_cap=cap, delta=delta, clock=WallClock(), entropy=founding
    )


def open_site(setup: SiteSetup, ledger: Ledger | None, transport: Transport) -> Site:
    """Open one hospital from its folder: the first time, or after a crash.

    Raises StorageError where its files cannot be used, ProtocolError where its journal
    belongs to another study.
    """
    key = site_key(setup.folder, setup.entropy) if setup.key is None else setup.key
    vault = Vault(secret_file(setup.folder / VAULT_FILE, setup.entropy), setup.entropy)
    files, closers = _journal(setup)
    with ExitStack() as undone:
        for closer in closers:
            undone.callback(closer)
        journal = SealedJournal(files, vault, setup.site)
        log = open_audit(setup, key)
        undone.callback(log.close)
        evidence: Evidence = AuditEvidence(log)
        if setup.watch is not None:
            evidence = _Told(evidence, setup.watch)
        worker = HospitalWorker(setup, ledger, _aside(setup, journal, vault))
        terms = setup.bundle.terms(setup.roster)
        terms = replace(terms, initial=setup.keep(terms.initial))
        if setup.journals is None:  # alone in its process: nobody else begins from the same state
            setup.bundle.forget_start()
        machine = SiteRound(
            terms,
            setup.site,
            key,
            setup.entropy,
            ledger_contains=_contains(ledger),
            record=journal.load(),
        )
        daemon = SiteDaemon(
            machine, journal=journal, transport=transport, worker=worker, evidence=evidence
        )
        undone.pop_all()
    return Site(setup, daemon, machine, worker, ledger, log, closers)


def _aside(setup: SiteSetup, journal: Journal, vault: Vault) -> Aside | None:
    """What the study's strategy has the hospital keep for itself, if anything."""
    bundle = setup.bundle
    if bundle.personal:
        return PersonalLayers(journal, vault, setup.site, bundle.own_layout, bundle.initial)
    settings = bundle.optimizer().settings
    if settings.name != "scaffold":
        return None
    return ControlVariate(journal, vault, setup.site, bundle.layout, settings)


def _journal(setup: SiteSetup) -> tuple[Journal, list[Callable[[], None]]]:
    """The hospital's journal, and what closes it: its own, or its part of a group."""
    folder = setup.journal or setup.folder / "journal"
    if setup.journals is not None:
        return setup.journals.member(setup.site, folder), []
    own = FileJournal(folder)
    return own, [own.close]


def open_audit(setup: SiteSetup, key: SiteKey) -> AuditLog:
    """This hospital's audit log of a run. Raises StorageError."""
    facts = {"keys": setup.keys_digest, "study": setup.bundle.digest.hex()}
    return AuditLog.open(
        setup.audit / f"{setup.site}.jsonl",
        owner=setup.site,
        sign=key.sign_bytes,
        clock=unix_seconds,
        facts={**facts, "kept": ALONE} if setup.alone else facts,
    )


def _contains(ledger: Ledger | None) -> Callable[[int, bytes], bool]:
    if ledger is None:
        return lambda counter, _: counter == 0
    return ledger.contains


def open_federation(
    study: Study, config: Path, *, device: str, holdings: Holdings | None = None
) -> Federation:
    """All hospitals of a simulation; torch is loaded once their data have been read.

    `holdings`: their data, where they were read before.
    """
    from client.holdings import read_holdings

    if holdings is None:
        holdings = read_holdings(study, config)
    from client.federation import Federation

    return Federation(study, config, device=device, holdings=holdings)


def built_parameters(study: Study, config: Path) -> tuple[int, str]:
    """How many parameters the sum of the study in the file `config` holds; builds the model."""
    from client.build import build_model
    from client.knowledge.shelf import read_knowledge

    read_knowledge(study.task, config.parent)

    built = build_model(study)
    return built.shared, built.engine


def forecast(folder: Path) -> None:
    """Compute what `wardround privacy` will be asked, while the accountant still remembers."""
    from client.budget import budget_report

    budget_report(folder)


def write_demo(folder: Path) -> Path:
    """Write the demo's study and synthetic notes; returns the study's path."""
    from client.demo import write_demo as write

    return write(folder)
