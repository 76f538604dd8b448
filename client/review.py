"""What a study would do here, for a person to read; and that person's approval.

A review runs nothing. It reads the bundle, the records and the ledger, compares the study with
the hospital's own ceilings, and lists every reason to refuse. Counts of fewer than ten patients
are not shown, nor what they could be worked out from.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from client.approval import Approval, objections
from client.budget import StudyForecast, forecast_study
from client.config import SiteConfig
from client.data.records import Record
from client.enrol import Pinned, key_of, pinned
from client.folders import HospitalFolder, StudyFolder
from client.hospital import ApprovedStudy, binding_ceilings, open_approved, roster_for
from client.knowledge.shelf import read_knowledge
from client.local import divide, local_files
from client.privacy.ledger import HeldOutSplit, Ledger, LedgerRow
from client.site import facts_of
from client.trainer import PACKAGES
from common.bundle import FACTS_FILE, STUDY_FILE, WEIGHTS_FILE, Bundle
from common.crypto.identity import fingerprint
from common.errors import Code, ConfigError, DataError, RefusedError, StorageError, WardroundError
from common.ids import short
from common.integrity import code_digest
from common.offer import OFFER_FILE, ROSTER_FILE, open_offer
from common.plan import Plan
from common.roster import Roster, SignedRoster
from common.world import WallClock, make_folder

__all__ = ["SMALL", "Review", "approve_study", "render", "review", "shown_counts"]

SMALL: Final = 10
"""Counts of fewer patients than this are not shown."""

LINK_MEGABITS: Final = 100.0
"""What a hospital's line is taken for where nobody says."""

LONGEST_NAME: Final = 200

_FILES: Final = (STUDY_FILE, FACTS_FILE, WEIGHTS_FILE, ROSTER_FILE, OFFER_FILE)
_HIDDEN: Final = f"fewer than {SMALL}"


@dataclass(frozen=True)
class Peer:
    """One hospital of the study."""

    site: str
    fingerprint: str
    weight: float


@dataclass(frozen=True)
class Review:
    """A study as this hospital sees it.

    Attributes:
        patients: how many qualify, and by label, small counts hidden; empty where the records
            cannot be read.
        objections: every reason to refuse; a study with one cannot be approved.
        notes: what a person should know besides.

    Units:
        bytes of one round of this hospital; minutes of the whole study on the line named.
    """

    study: str
    digest: bytes
    code: bytes
    backbone: bytes
    backbone_name: str
    task: str
    labels: tuple[str, ...]
    rounds: int
    plan: Plan
    patients: Mapping[str, str]
    forecast: StudyForecast | None
    ceiling: float
    peers: tuple[Peer, ...]
    megabits: float
    minutes: float
    roster: Roster | None
    approved_by: str
    objections: tuple[WardroundError, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for `--json`."""
        forecast = None
        if self.forecast is not None:
            forecast = {**asdict(self.forecast), "left": self.forecast.left}
        return {
            "study": self.study,
            "digest": self.digest.hex(),
            "code": self.code.hex(),
            "backbone": self.backbone.hex(),
            "backbone_name": self.backbone_name,
            "task": self.task,
            "labels": list(self.labels),
            "rounds": self.rounds,
            "patients": dict(self.patients),
            "epsilon": forecast,
            "epsilon_ceiling": self.ceiling,
            "peers": [asdict(peer) for peer in self.peers],
            "quorum": self.plan.quorum,
            "dropouts_tolerated": self.plan.dropouts_tolerated,
            "colluders_tolerated": self.plan.colluders_tolerated,
            "joint": None if self.plan.joint is None else asdict(self.plan.joint),
            "parameters": self.plan.parameters,
            "bytes_up": self.plan.bytes_up,
            "bytes_down": self.plan.bytes_down,
            "megabits": self.megabits,
            "minutes": self.minutes,
            "approved_by": self.approved_by,
            "objections": [
                {"code": o.code.label, "message": o.message, "remedy": o.remedy}
                for o in self.objections
            ],
            "notes": list(self.notes),
        }


def review(
    folder: Path, config: SiteConfig, path: Path, *, megabits: float | None = None
) -> Review:
    """What the study in the bundle folder would do at the hospital of `site.yaml` at `path`.

    Raises:
        ConfigError: the folder holds no bundle, or this hospital is not enrolled.
        StorageError: a file of this hospital cannot be used.
    """
    bundle = Bundle.load(folder)
    state = HospitalFolder(config.state_folder(path))
    pin = pinned(state.root)
    against: list[WardroundError] = []
    roster = _offered(folder, bundle, pin, state, against)
    records = _records(bundle, config, path, against)
    rows, split = _population(state, bundle)
    _judge_records(records, split, against)
    plan = bundle.plan()
    releases = len(plan.evaluation.rounds)
    forecast = forecast_study(
        bundle,
        rows,
        releases=releases,
        split="new" if split is None else split.identity,
        cap=config.budget.epsilon,
        delta=config.budget.delta,
    )
    _judge_budget(forecast, against)
    _judge_backbone(bundle, against)
    _judge_knowledge(bundle, config.knowledge_folder(path), against)
    code = code_digest(PACKAGES)
    ceilings = binding_ceilings(config)
    facts = facts_of(bundle, code)
    # Which study is for the reader of this to say; everything else is for the ceilings.
    reader = Approval(config.site, bundle.digest, code, b"", "", 0, None, None)
    against += objections(facts, ceilings, stopped=False, approval=reader)
    rate = megabits or config.link.megabits or LINK_MEGABITS
    keys = {} if roster is None else {str(s): k for s, k in roster.roster.keys().items()}
    return Review(
        study=bundle.study.name,
        digest=bundle.digest,
        code=code,
        backbone=bundle.backbone_digest,
        backbone_name=bundle.study.architecture[0],
        task=bundle.study.task.kind,
        labels=bundle.study.labels,
        rounds=bundle.study.training.rounds,
        plan=plan,
        patients={} if records is None else shown_counts(records, bundle.study.labels),
        forecast=forecast,
        ceiling=ceilings.epsilon,
        peers=tuple(
            Peer(party.id, fingerprint(keys[party.id]) if party.id in keys else "-", party.weight)
            for party in bundle.study.sites
        ),
        megabits=rate,
        minutes=_minutes(plan, rate),
        roster=None if roster is None else roster.roster,
        approved_by=_approved_by(state, bundle, config.site, pin),
        objections=tuple(against),
        notes=tuple(_notes(config, path, plan)),
    )


def _offered(
    folder: Path,
    bundle: Bundle,
    pin: Pinned,
    state: HospitalFolder,
    against: list[WardroundError],
) -> SignedRoster | None:
    """The roster that the pinned coordinator offers the study with, this hospital in it."""
    try:
        in_use = None
        if state.roster.exists():
            in_use = SignedRoster.load(state.roster).verified(pin.coordinator)
        signed = open_offer(folder, public=pin.coordinator, study=bundle.digest, in_use=in_use)
        keys = roster_for(bundle.study, signed.roster, site=pin.site)
        key_of(state.root, keys[pin.site])
    except (ConfigError, RefusedError) as error:
        against.append(error)
        return None
    return signed


def _records(
    bundle: Bundle, config: SiteConfig, path: Path, against: list[WardroundError]
) -> tuple[Record, ...] | None:
    try:
        return local_files(config, path).read(bundle.study)
    except DataError as error:
        against.append(error)
        return None


def _population(
    state: HospitalFolder, bundle: Bundle
) -> tuple[tuple[LedgerRow, ...], HeldOutSplit | None]:
    """The ledger's rows and the study's split; a review founds no ledger."""
    if not state.ledger.exists():
        return (), None
    ledger = Ledger.open_existing(state.ledger, clock=WallClock())
    try:
        return ledger.history(), ledger.split(bundle.study.evaluation.held_out)
    finally:
        ledger.close()


def _judge_records(
    records: Sequence[Record] | None, split: HeldOutSplit | None, against: list[WardroundError]
) -> None:
    if records is None:
        return
    if split is not None:
        try:
            divide(records, split)
        except DataError as error:
            against.append(error)
    elif len({record.patient for record in records}) < SMALL:
        against.append(
            DataError(Code.SITE_TOO_SMALL, f"There are {_HIDDEN} patients to take part with.")
        )


def _judge_budget(forecast: StudyForecast | None, against: list[WardroundError]) -> None:
    if forecast is not None and not forecast.fits:
        against.append(
            RefusedError(
                Code.BUDGET_EXCEEDED,
                f"With this study a patient would have spent epsilon {forecast.after:.3f}; the "
                f"cap of all studies is {forecast.cap:g} (spent {forecast.before:.3f}).",
            )
        )


def _judge_backbone(bundle: Bundle, against: list[WardroundError]) -> None:
    if bundle.study.model is None:
        return
    from client.tasks.backbone import backbone_digest

    try:
        found = backbone_digest(bundle.study.model.backbone)
    except DataError as error:
        against.append(error)
        return
    if found != bundle.backbone_digest:
        against.append(
            DataError(
                Code.BACKBONE_DIFFERS,
                f"{bundle.study.model.backbone}: the folder here has another digest "
                f"({found.hex()[:12]}…).",
            )
        )


def _judge_knowledge(bundle: Bundle, folder: Path | None, against: list[WardroundError]) -> None:
    try:
        read_knowledge(bundle.study.task, folder)
    except DataError as error:
        against.append(error)


def _approved_by(state: HospitalFolder, bundle: Bundle, site: str, pin: Pinned) -> str:
    """Who approved exactly this before; empty where nobody did, or not validly."""
    try:
        approved = open_approved(
            state.study(bundle.digest), site=site, state=state.root, coordinator=pin.coordinator
        )
    except WardroundError:
        return ""
    return approved.approval.by if approved.bundle.digest == bundle.digest else ""


def _notes(config: SiteConfig, path: Path, plan: Plan) -> Iterator[str]:
    if config.kill_switch_file(path).exists():
        yield "The kill switch is on: nothing runs until `wardround client start`."
    if plan.personal:
        told = " and ".join(plan.personal)
        yield f"The model's {told} stay at each hospital and learn there alone; the rest is summed."
    yield from plan.warnings


def _minutes(plan: Plan, megabits: float) -> float:
    line = 8 * (plan.bytes_up + plan.bytes_down) / (megabits * 1e6)
    rounds = plan.rounds + 1 + (plan.statistics is not None)
    return rounds * (plan.seconds_training + plan.seconds_masking + line) / 60


def shown_counts(records: Sequence[Record], labels: Sequence[str]) -> dict[str, str]:
    """Patients in all, and with each label, as they may be shown.

    Guarantee: no count below `SMALL` is shown. Where exactly one would be hidden, the next
    smallest is hidden, too: the total and the others would give it away.
    """
    everybody = {record.patient for record in records}
    of_label: dict[str, set[str]] = {label: set() for label in labels}
    for record in records:
        if record.label is not None:
            of_label[record.label].add(record.patient)
    counts = {label: len(patients) for label, patients in of_label.items()}
    hidden = {label for label, count in counts.items() if count < SMALL}
    rest = sorted((count, label) for label, count in counts.items() if label not in hidden)
    if len(hidden) == 1 and rest:
        hidden.add(rest[0][1])
    total = str(len(everybody)) if len(everybody) >= SMALL else _HIDDEN
    told = {
        label: str(count) if label not in hidden else (_HIDDEN if count < SMALL else "not shown")
        for label, count in counts.items()
    }
    # What is hidden for another's sake must look like that other.
    if any(shown == "not shown" for shown in told.values()):
        told = {label: "not shown" if label in hidden else told[label] for label in told}
    return {"all": total, **told}


# ---------------------------------------------------------------------------- approving


def approve_study(
    folder: Path, config: SiteConfig, path: Path, *, by: str, now: int, reviewed: str = ""
) -> tuple[ApprovedStudy, bool]:
    """Approve the study in the bundle folder: (it, whether that is new).

    What is reviewed is a copy in the state folder, and that copy is what runs. Approving again
    what is approved changes nothing; after an update of the code it approves the new code.

    Args:
        folder: the bundle with its roster and offer.
        config: site.yaml.
        path: where it lies.
        by: who approves, as the record shall name them.
        now: Unix seconds.
        reviewed: first digits of the digest that the person saw; the folder may hold another
            study by now. Empty: whatever is there.

    Raises:
        RefusedError: APPROVAL_STUDY where it is not the study that was reviewed.
        WardroundError: the first objection of the review, or a file that cannot be used.
    """
    if not (by.isprintable() and by == by.strip() and 0 < len(by) <= LONGEST_NAME):
        raise ConfigError(Code.USAGE, "The name of who approves is not printable text.")
    state = HospitalFolder(config.state_folder(path))
    pin = pinned(state.root)
    make_folder(state.studies, mode=0o700)
    staged = StudyFolder(state.studies / f".new-{os.getpid()}")
    try:
        _copy(folder, staged.bundle)
        found = review(staged.bundle, config, path)
        if not found.digest.hex().startswith(reviewed):
            raise RefusedError(
                Code.APPROVAL_STUDY,
                f"{folder}: holds the study {short(found.digest)}…, not the one that was reviewed.",
                remedy="Review it again: wardround client review.",
            )
        for objection in found.objections:
            raise objection
        roster = SignedRoster.load(staged.bundle / ROSTER_FILE)
        target = state.study(found.digest)
        kept = _still(target, found, roster.roster, config.site, state, pin)
        if kept is not None:
            return kept, False
        _settle(staged, target, roster.roster)
        # Before the signature: a kill between the two leaves no approval with an older pin.
        _pin_roster(state, roster, pin)
        _sign(target, config.site, state, pin, by=by, now=now, code=found.code)
    finally:
        shutil.rmtree(staged.root, ignore_errors=True)
    approved = open_approved(
        target, site=config.site, state=state.root, coordinator=pin.coordinator
    )
    return approved, True


def _copy(source: Path, target: Path) -> None:
    """The bundle's own files and no others, durably."""
    make_folder(target, mode=0o700)
    for name in _FILES:
        try:
            shutil.copyfile(source / name, target / name)
            handle = os.open(target / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except FileNotFoundError:
            continue  # the review says what is missing
        except OSError as error:
            raise StorageError(
                Code.JOURNAL_WRITE, f"{target}: cannot be written ({error.strerror})."
            ) from None


def _still(
    target: StudyFolder,
    found: Review,
    roster: Roster,
    site: str,
    state: HospitalFolder,
    pin: Pinned,
) -> ApprovedStudy | None:
    """The approval that holds already for exactly this, or None."""
    try:
        kept = open_approved(target, site=site, state=state.root, coordinator=pin.coordinator)
    except (RefusedError, ConfigError, StorageError):
        return None
    same = (kept.approval.study, kept.approval.code, kept.approval.roster)
    return kept if same == (found.digest, found.code, roster.digest()) else None


def _settle(staged: StudyFolder, target: StudyFolder, roster: Roster) -> None:
    """Put the copy in its place; a study that has begun keeps its hospitals' keys."""
    if (target.journal / "record").exists():
        try:
            before = SignedRoster.load(target.bundle / ROSTER_FILE).roster
        except ConfigError:
            before = roster
        study = Bundle.load(staged.bundle).study
        old, new = before.keys(), roster.keys()
        if any(old.get(party.id) != new.get(party.id) for party in study.sites):  # type: ignore[call-overload]
            raise RefusedError(
                Code.APPROVAL_SITE,
                "The study has begun here under other keys, and keeps them to its end.",
            )
    try:
        target.root.mkdir(mode=0o700, exist_ok=True)
        # Nothing is approved while the copy is exchanged.
        with suppress(FileNotFoundError):
            target.approval.unlink()
        shutil.rmtree(target.bundle, ignore_errors=True)
        staged.bundle.rename(target.bundle)
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{target.root}: cannot be written ({error.strerror})."
        ) from None


def _sign(
    target: StudyFolder,
    site: str,
    state: HospitalFolder,
    pin: Pinned,
    *,
    by: str,
    now: int,
    code: bytes,
) -> None:
    bundle = Bundle.load(target.bundle)
    signed = open_offer(target.bundle, public=pin.coordinator, study=bundle.digest)
    roster = roster_for(bundle.study, signed.roster, site=site)
    privacy = bundle.study.privacy
    approval = Approval(
        site,
        bundle.digest,
        code,
        signed.roster.digest(),
        by,
        now,
        privacy.epsilon,
        privacy.delta,
    )
    approval.signed(key_of(state.root, roster[site])).save(target.approval)


def _pin_roster(state: HospitalFolder, roster: SignedRoster, pin: Pinned) -> None:
    """Keep the newest roster that was accepted, so that no older one is accepted after it."""
    if state.roster.exists():
        in_use = SignedRoster.load(state.roster).verified(pin.coordinator)
        if in_use.version >= roster.roster.version:
            return
    roster.save(state.roster)


# ---------------------------------------------------------------------------- showing


def render(found: Review) -> str:
    """The review as a person reads it."""
    plan = found.plan
    lines = [
        f"study      {found.study}  {found.digest.hex()}",
        f"code       {found.code.hex()}",
        f"model      {found.backbone_name}  {found.backbone.hex()}",
        f"task       {found.task}: {len(found.labels)} labels, {plan.parameters} parameters",
        *_patient_lines(found.patients),
        *_epsilon_lines(found),
        f"rounds     {found.rounds}",
        (
            f"hospitals  {plan.parties}; a round needs {plan.quorum}, so "
            f"{plan.dropouts_tolerated} may be missing; {plan.colluders_tolerated} may conspire"
        ),
        *(f"           {peer.site}  {peer.fingerprint}" for peer in found.peers),
        f"per round  {_size(plan.bytes_up)} up, {_size(plan.bytes_down)} down",
        (
            f"time       about {max(1, round(found.minutes))} min at {found.megabits:g} Mbit/s, "
            "without waiting for others"
        ),
    ]
    if found.approved_by:
        lines.append(f"approved   by {found.approved_by}")
    lines += [f"note: {note}" for note in found.notes]
    if found.objections:
        lines.append("")
        lines.append(f"{len(found.objections)} reason(s) to refuse:")
        for objection in found.objections:
            lines += [f"  {objection}", f"    what to do: {objection.remedy}"]
    return "\n".join(lines)


def _patient_lines(patients: Mapping[str, str]) -> list[str]:
    if not patients:
        return ["patients   the records cannot be read"]
    rest = [f"           {name}: {count}" for name, count in patients.items() if name != "all"]
    return [f"patients   {patients['all']} qualify, by label:", *rest]


def _epsilon_lines(found: Review) -> list[str]:
    forecast = found.forecast
    if forecast is None:
        return ["epsilon    no differential privacy: the study promises patients nothing"]
    agreed = found.plan.training
    declared = "" if agreed is None else f" (it declares {agreed.budget:g} at {agreed.delta:g})"
    joint = found.plan.joint
    counted = (
        ["noise      added by this hospital alone: the epsilon counts on nobody else"]
        if joint is None
        else [
            (
                f"noise      shared: the epsilon counts on {joint.honest} honest hospitals in "
                "every round; of this study's training it is"
            ),
            *(f"           {a.epsilon:.3f} against {a.told}" for a in joint.audiences),
        ]
    )
    return [
        *counted,
        f"epsilon    {forecast.own:.3f} for this study{declared}; the ceiling is {found.ceiling:g}",
        (
            f"           all studies: {forecast.before:.3f} before, at most {forecast.after:.3f} "
            f"after; cap {forecast.cap:g}, left {forecast.left:.3f} (delta {forecast.delta:g})"
        ),
    ]


def _size(count: int) -> str:
    if count < 10**6:
        return f"{count / 1e3:.0f} kB"
    return f"{count / 1e6:.1f} MB"
