"""The hospital behind the link: its folder, the studies it approved, one trainer, its answers.

A study is opened when the coordinator first asks about it, and only where a person here approved
it. Nothing here imports torch or Flower.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from client.answer import Answer
from client.approval import Approval
from client.config import Ceilings, SiteConfig
from client.enrol import key_of
from client.folders import NAME_DIGITS, HospitalFolder, StudyFolder
from client.local import local_files
from client.privacy.ledger import HeldOutSplit, Ledger
from client.site import Site, SiteSetup, open_site, switch_is_on
from client.trainer import PACKAGES, TrainerProcess, TrainerTask
from common.audit import Value, write_keys
from common.bundle import Bundle
from common.crypto.identity import KEY_BYTES, SiteKey
from common.errors import Code, RefusedError, StorageError, WardroundError
from common.integrity import code_digest
from common.keys import key_file, secret_file
from common.logs import ALLOWED, Log
from common.offer import open_offer
from common.ports import Entropy, Tensors, Trainer
from common.protocol.envelope import COORDINATOR
from common.roster import Roster
from common.strategy import model_tensors
from common.study import Study
from common.tensors import filed
from common.world import (
    SystemEntropy,
    WallClock,
    give_back_memory,
    make_folder,
    unix_seconds,
    write_durably,
)

__all__ = [
    "ApprovedStudy",
    "HospitalHost",
    "KeptTrainer",
    "binding_ceilings",
    "open_approved",
    "open_population",
    "roster_for",
]


class KeptTrainer(Trainer, Protocol):
    """A trainer that outlives rounds."""

    def ready(self) -> None:
        """Read the records and build the model, where that is not done."""
        ...

    def export(self, folder: Path, state: Tensors) -> None:
        """Write the trained model as a folder."""
        ...

    def close(self) -> None:
        """Let go of memory and devices."""
        ...


TrainerMaker = Callable[[TrainerTask], KeptTrainer]

# A message that moves a model.
_LARGE_BYTES = 1 << 20


# ---------------------------------------------------------------------------- what is approved


@dataclass(frozen=True)
class ApprovedStudy:
    """A study that this hospital approved, every signature checked.

    `key` is this hospital's identity in the study's roster.
    """

    folder: StudyFolder
    bundle: Bundle
    approval: Approval
    roster: Mapping[str, bytes]
    key: SiteKey


def open_approved(
    folder: StudyFolder, *, site: str, state: Path, coordinator: bytes
) -> ApprovedStudy:
    """The approved study in `folder`.

    Guarantee: this hospital signed the approval; bundle and roster are those it names, and the
    pinned coordinator offered the one with the other.

    Raises:
        RefusedError: APPROVAL_STUDY, APPROVAL_FORGED, APPROVAL_SITE.
        ConfigError, StorageError: a file of the bundle is damaged, not the coordinator's, or
            names a key that is not this hospital's.
    """
    approval = Approval.load(folder.approval)
    bundle = Bundle.load(folder.bundle)
    signed = open_offer(folder.bundle, public=coordinator, study=bundle.digest)
    roster = roster_for(bundle.study, signed.roster, site=site)
    key = key_of(state, roster[site])
    approval.verified(key.public, site)
    named = approval.study.hex()[:NAME_DIGITS] == folder.root.name
    if bundle.digest != approval.study or signed.roster.digest() != approval.roster or not named:
        raise RefusedError(
            Code.APPROVAL_FORGED, "The approval here is of another study or another roster."
        )
    return ApprovedStudy(folder, bundle, approval, roster, key)


def roster_for(study: Study, roster: Roster, *, site: str) -> dict[str, bytes]:
    """The keys of the study's hospitals, this one's own among them. Raises RefusedError."""
    keys = {str(name): key for name, key in roster.keys().items()}
    parties = [party.id for party in study.sites]
    missing = sorted(set(parties) - set(keys))
    if missing:
        raise RefusedError(Code.APPROVAL_SITE, f"The roster has no key of {', '.join(missing)}.")
    if site not in parties:
        raise RefusedError(Code.APPROVAL_SITE, f"The study does not name {site}.")
    return {name: keys[name] for name in parties}


def binding_ceilings(config: SiteConfig) -> Ceilings:
    """The hospital's ceilings; no study's delta may be above what its ledger counts at."""
    ceilings = config.ceilings
    return ceilings.model_copy(update={"delta": min(ceilings.delta, config.budget.delta)})


def open_population(config: SiteConfig, folder: HospitalFolder, entropy: Entropy) -> Ledger:
    """The population's ledger, founded on first use: one for all studies.

    Raises StorageError, RefusedError.
    """
    budget = config.budget
    return Ledger.open(
        folder.ledger,
        epsilon_cap=budget.epsilon,
        delta=budget.delta,
        clock=WallClock(),
        entropy=entropy,
    )


# ---------------------------------------------------------------------------- the host


class _Outbox:
    """The transport of one question: what the site sends is its answer."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, recipient: str, payload: bytes) -> None:
        """Keep one payload."""
        if recipient != COORDINATOR:
            raise AssertionError("a site speaks to the coordinator alone")
        self.sent.append(payload)

    def take(self) -> tuple[bytes, ...]:
        """What was sent since the last call."""
        sent, self.sent = tuple(self.sent), []
        return sent


@dataclass
class _Open:
    """A study that is open: its site, and where what it sends is gathered."""

    approved: ApprovedStudy
    site: Site
    outbox: _Outbox
    split: HeldOutSplit
    stamp: tuple[int, int, int]


@dataclass
class _Progress:
    """What an operator wants to know of a study; from its events."""

    round: int = 0
    event: str = ""
    code: str = ""
    completed: int = 0
    at: int = 0


class _Watch:
    """Tells the operator's log, and remembers how far a study has come."""

    def __init__(self, name: str, log: Log | None) -> None:
        self.name, self._log = name, log
        self.progress = _Progress()

    def record(self, event: str, fields: Mapping[str, Value]) -> None:
        """Take note of one event."""
        kept = self.progress
        kept.event, kept.at = event, unix_seconds()
        number = fields.get("round")
        if isinstance(number, int):
            kept.round = max(kept.round, number)
        if event == "round.completed" and isinstance(number, int):
            kept.completed, kept.code = number, ""
        if event in {"round.declined", "peer.refused", "study.stopped"}:
            kept.code = str(fields.get("code", fields.get("reason", "")))
        if self._log is not None:
            told = {key: value for key, value in fields.items() if key in ALLOWED}
            self._log.info(event, **{**told, "study": self.name})


class HospitalHost:
    """One hospital, as the link asks it (`client.answer.Hospital`).

    Args:
        config: site.yaml.
        path: where it lies: its paths are relative to that folder.
        coordinator: the coordinator's public key, pinned at enrolment.
        log: the operator's log.
        entropy: secrets; the operating system's in every real run.
        maker: makes the trainer of a study; absent: a child process.

    Guarantee: a study that nobody here approved, or whose approval was altered, is refused
    before a byte of it is looked at; while the kill switch is on nothing leaves.

    Raises:
        StorageError: FOLDER_IN_USE where another daemon holds the state folder; a key file is
            missing or can be read by others.
    """

    def __init__(
        self,
        config: SiteConfig,
        path: Path,
        *,
        coordinator: bytes,
        log: Log | None = None,
        entropy: Entropy | None = None,
        maker: TrainerMaker | None = None,
    ) -> None:
        self.site = config.site
        self.coordinator = coordinator
        self.folder = HospitalFolder(config.state_folder(path))
        self._config = config
        self._files = local_files(config, path)
        self._switch = config.kill_switch_file(path)
        self._log = log
        self._entropy = SystemEntropy() if entropy is None else entropy
        self._maker = self._child if maker is None else maker
        self._code = code_digest(PACKAGES)
        self._open_studies: dict[bytes, _Open] = {}
        self._watches: dict[bytes, _Watch] = {}
        self._trainers: dict[bytes, KeptTrainer] = {}
        self._ledger: Ledger | None = None
        self._closing = threading.Event()
        self._asking = threading.Lock()
        self._lock = _locked(self.folder.lock)
        try:
            self.key = _identity(self.folder.identity)
        except StorageError:
            os.close(self._lock)
            raise

    # ------------------------------------------------------------ the link's questions

    def ask(self, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
        """Handle the coordinator's payloads about a study, in order.

        Raises:
            StorageError: the study is let go of, and goes on from its journal the next time.
            RefusedError, ConfigError: the study is not approved, or not as it was approved.
        """
        with self._asking:
            if self.stopped():
                return Answer((), Code.APPROVAL_STOPPED)
            whole = False
            try:
                answer = self._answer(study, payloads, hello=hello)
                whole = True
            finally:
                # Crash-only: what was begun and not ended goes on from the journal.
                if not whole:
                    self._let_go(study)
            # Looked at before every single send, and once more before all of them.
            if self.stopped():
                return Answer((), Code.APPROVAL_STOPPED)
            return answer if self.may_leave(study) else Answer((), Code.APPROVAL_STUDY)

    def _answer(self, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
        opened = self._opened(study)
        if hello:
            opened.site.daemon.start()
        for payload in payloads:
            opened.site.daemon.receive(payload)
            if len(payload) > _LARGE_BYTES:
                give_back_memory()
        self._conclude(opened)
        return Answer(opened.outbox.take())

    def key_for(self, study: bytes) -> SiteKey:
        """The key that signs answers about a study: the one that the study's roster lists."""
        opened = self._open_studies.get(study)
        return self.key if opened is None else opened.approved.key

    def stopped(self) -> bool:
        """Whether the kill switch is on, or the daemon is about to end."""
        return switch_is_on(self._switch) or self._closing.is_set()

    def may_leave(self, study: bytes) -> bool:
        """Whether an answer about a study, made some time ago, may still leave; from any thread.

        The line may hold one back for hours: for its window, or because it is thin.
        """
        return not self.stopped() and self.folder.study(study).approval.exists()

    def stop(self) -> None:
        """Begin to end: work in hand is given up, and nothing is sent any more."""
        self._closing.set()

    def close(self) -> None:
        """End the trainers, close every study and give the folder back."""
        self.stop()
        with self._asking:
            for study in list(self._open_studies):
                self._let_go(study)
            for trainer in self._trainers.values():
                trainer.close()
            self._trainers.clear()
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1

    # ------------------------------------------------------------ studies

    def _opened(self, study: bytes) -> _Open:
        folder = self.folder.study(study)
        known = self._open_studies.get(study)
        if known is not None and known.stamp == _stamp(folder.approval):
            return known
        self._let_go(study)
        approved = open_approved(
            folder, site=self.site, state=self.folder.root, coordinator=self.coordinator
        )
        if approved.bundle.digest != study:
            raise RefusedError(Code.APPROVAL_STUDY, "Nobody here has approved this study.")
        opened = self._open(_filed(approved))
        self._open_studies[study] = opened
        return opened

    def _open(self, approved: ApprovedStudy) -> _Open:
        bundle, folder = approved.bundle, approved.folder
        private = bundle.study.privacy.mode != "none"
        ledger = self._population() if private else None
        split = self._split(bundle, ledger)
        watch = self._watches.setdefault(bundle.digest, _Watch(bundle.study.name, self._log))
        outbox = _Outbox()
        keys = {**approved.roster, COORDINATOR: self.coordinator}
        setup = SiteSetup(
            site=self.site,
            folder=self.folder.root,
            audit=folder.audit,
            bundle=bundle,
            roster=approved.roster,
            keys_digest=write_keys(folder.audit, keys),
            ceilings=binding_ceilings(self._config),
            kill_switch=self._switch,
            trainer=lambda: self._trainer(approved, split),
            split_id=split.identity,
            entropy=self._entropy,
            code_digest=self._code,
            approval=approved.approval,
            journal=folder.journal,
            watch=watch,
            key=approved.key,
            alone=True,
            keep=partial(filed, folder=folder.journal),
        )
        site = open_site(setup, ledger, outbox)
        try:
            site.log.append("study.approved", _approved_fields(approved))
        except StorageError:
            site.close()
            raise
        return _Open(approved, site, outbox, split, _stamp(folder.approval))

    def _let_go(self, study: bytes) -> None:
        opened = self._open_studies.pop(study, None)
        if opened is not None:
            with contextlib.suppress(StorageError):
                opened.site.close(finish=opened.approved.folder.model.exists())

    def _population(self) -> Ledger:
        if self._ledger is None:
            from client.budget import settle_unapproved

            self._ledger = open_population(self._config, self.folder, self._entropy)
            # A withdrawal that was cut off, or raced with a round, has left its plan open.
            settle_unapproved(self._ledger, self.folder)
        return self._ledger

    def _split(self, bundle: Bundle, ledger: Ledger | None) -> HeldOutSplit:
        fraction = bundle.study.evaluation.held_out
        if ledger is not None:
            return ledger.split(fraction)
        return HeldOutSplit(secret_file(self.folder.split_key, self._entropy), fraction)

    # ------------------------------------------------------------ the trainer

    def _trainer(self, approved: ApprovedStudy, split: HeldOutSplit) -> KeptTrainer:
        """The study's trainer, ready to work; another study's is ended: there is one device."""
        study = approved.bundle.digest
        for other in [known for known in self._trainers if known != study]:
            self._trainers.pop(other).close()
        if study not in self._trainers:
            task = TrainerTask(
                site=self.site,
                folder=approved.folder.bundle,
                bundle=approved.bundle,
                files=self._files,
                split_key=split.key,
                device=self._config.device,
                code=self._code,
            )
            self._trainers[study] = self._maker(task)
        trainer = self._trainers[study]
        trainer.ready()
        return trainer

    def _child(self, task: TrainerTask) -> TrainerProcess:
        return TrainerProcess(task, log=self.folder.trainer_log, cancelled=self.stopped)

    # ------------------------------------------------------------ the end of a run

    def _conclude(self, opened: _Open) -> None:
        """Keep the final model; a fault in that is the hospital's own, and tried again later."""
        chain = opened.site.worker.final
        if chain is None:
            return
        folder, bundle = opened.approved.folder, opened.approved.bundle
        try:
            if not folder.model.exists():
                trainer = self._trainer(opened.approved, opened.split)
                own = opened.site.worker.own()
                trainer.export(folder.model, {**model_tensors(chain.state), **own})
            self._state_privacy(opened)
        except WardroundError as error:
            if self._log is not None:
                self._log.error("model.not_exported", study=bundle.study.name, code=error.code)
            return
        opened.site.worker.final = None
        if bundle.digest in self._trainers:
            self._trainers.pop(bundle.digest).close()

    def _state_privacy(self, opened: _Open) -> None:
        from client.budget import privacy_statement

        approved = opened.approved
        rows = () if opened.site.ledger is None else opened.site.ledger.history()
        told = privacy_statement(approved.bundle, rows, site=self.site)
        write_durably(approved.folder.privacy, [json.dumps(told, indent=1).encode()])

    # ------------------------------------------------------------ status

    def facts(self) -> dict[str, Any]:
        """What `client status` shows of this process; numbers and names only."""
        studies = []
        for study, watch in list(self._watches.items()):
            kept = watch.progress
            studies.append(
                {
                    "study": study.hex(),
                    "name": watch.name,
                    "round": kept.round,
                    "completed": kept.completed,
                    "event": kept.event,
                    "code": kept.code,
                    "at": kept.at,
                }
            )
        trainers = [
            {"study": study.hex(), "pid": getattr(trainer, "pid", None)}
            for study, trainer in list(self._trainers.items())
        ]
        return {"pid": os.getpid(), "site": self.site, "studies": studies, "trainers": trainers}


def _filed(approved: ApprovedStudy) -> ApprovedStudy:
    """The study with its initial weights in a file: they are used once. Raises StorageError."""
    journal = approved.folder.journal
    make_folder(journal, mode=0o700)
    bundle = replace(approved.bundle, initial=filed(approved.bundle.initial, journal))
    return replace(approved, bundle=bundle)


def _approved_fields(approved: ApprovedStudy) -> dict[str, Value]:
    bundle, approval = approved.bundle, approved.approval
    return {
        "study": approval.study.hex(),
        "roster": approval.roster.hex(),
        "model": bundle.backbone_digest.hex(),
        "epsilon": approval.epsilon,
        "delta": approval.delta,
        "rounds": bundle.study.training.rounds,
    }


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file is replaced or removed."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_mtime_ns, found.st_size, found.st_ino


def _identity(path: Path) -> SiteKey:
    """The hospital's newest key; enrolment makes it, and nothing else does."""
    seed = key_file(path)
    if len(seed) != KEY_BYTES:
        raise StorageError(Code.KEY_FILE_DAMAGED, f"{path}: not a key file of this software.")
    return SiteKey.from_seed(seed)


def _locked(path: Path) -> int:
    """Hold the state folder; the kernel gives it back when this process ends, however."""
    make_folder(path.parent, mode=0o700)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{path}: cannot be written ({error.strerror})."
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise StorageError(
            Code.FOLDER_IN_USE, f"{path.parent}: another daemon of this hospital is running."
        ) from None
    return handle
