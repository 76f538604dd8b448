"""The places in a hospital's state folder; nothing heavy is imported here.

STATE/identity.key transport.key vault.key split.key coordinator.json ca.crt roster.json
STATE/ledger.sqlite daemon.lock heartbeat.json status.json log.jsonl trainer.log stop
STATE/studies/DIGEST16/   bundle/ approval.json journal/ audit/ model/ privacy.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import Code, RefusedError, StorageError
from common.logs import open_log

__all__ = [
    "FRESH_SECONDS",
    "NAME_DIGITS",
    "HospitalFolder",
    "StudyFolder",
    "heartbeat_age",
    "withdraw",
]

NAME_DIGITS: Final = 16
"""Hex digits of a study's digest that name its folder; what is in it is checked in full."""

_DIGITS: Final = 8

FRESH_SECONDS: Final = 120
"""A heartbeat younger than this says that the daemon lives and hears its coordinator."""


@dataclass(frozen=True)
class StudyFolder:
    """One study's places."""

    root: Path

    @property
    def bundle(self) -> Path:
        """The bundle, with roster and offer, as it was approved."""
        return self.root / "bundle"

    @property
    def approval(self) -> Path:
        """Who approved it."""
        return self.root / "approval.json"

    @property
    def journal(self) -> Path:
        """The round machine's durable state."""
        return self.root / "journal"

    @property
    def audit(self) -> Path:
        """This hospital's audit log of the run."""
        return self.root / "audit"

    @property
    def model(self) -> Path:
        """The trained model, once the run is over."""
        return self.root / "model"

    @property
    def privacy(self) -> Path:
        """What the study has cost this hospital's patients, once the run is over."""
        return self.root / "privacy.json"


@dataclass(frozen=True)
class HospitalFolder:
    """The state folder's places."""

    root: Path

    @property
    def identity(self) -> Path:
        """The key that signs; made at enrolment."""
        return self.root / "identity.key"

    @property
    def transport(self) -> Path:
        """The key that Flower's node authentication wants; made at enrolment."""
        return self.root / "transport.key"

    @property
    def authority(self) -> Path:
        """The certificate authority of the coordinator's TLS, pinned."""
        return self.root / "ca.crt"

    @property
    def roster(self) -> Path:
        """The newest roster that was accepted."""
        return self.root / "roster.json"

    @property
    def ledger(self) -> Path:
        """The population's privacy ledger."""
        return self.root / "ledger.sqlite"

    @property
    def split_key(self) -> Path:
        """What divides patients in studies without a ledger."""
        return self.root / "split.key"

    @property
    def studies(self) -> Path:
        """One folder for each approved study."""
        return self.root / "studies"

    @property
    def lock(self) -> Path:
        """Held by the daemon while it lives."""
        return self.root / "daemon.lock"

    @property
    def heartbeat(self) -> Path:
        """When the daemon last lived."""
        return self.root / "heartbeat.json"

    @property
    def status(self) -> Path:
        """What the daemon last said of itself."""
        return self.root / "status.json"

    @property
    def log(self) -> Path:
        """The log for looking."""
        return self.root / "log.jsonl"

    @property
    def trainer_log(self) -> Path:
        """What the trainer and its libraries print."""
        return self.root / "trainer.log"

    def study(self, digest: bytes) -> StudyFolder:
        """The folder of the study with this digest."""
        return StudyFolder(self.studies / digest.hex()[:NAME_DIGITS])

    def approved(self) -> tuple[StudyFolder, ...]:
        """Every study folder with an approval, whether or not it holds; by name."""
        found = sorted(self.studies.glob("*/approval.json"))
        return tuple(StudyFolder(path.parent) for path in found)


def withdraw(folder: HospitalFolder, study: str, *, now: int) -> Path:
    """Take the approval of a study back; the signed record stays, under another name.

    Args:
        folder: the hospital's state.
        study: its name, or the first digits of its digest, at least eight.
        now: Unix seconds.

    Guarantee: from the next message on nothing is trained or sent for the study.
    Raises RefusedError APPROVAL_STUDY where no approved study is meant, or more than one;
        StorageError.
    """
    found = [one for one in folder.approved() if _meant(one, study)]
    if len(found) != 1:
        several = "more than one approved study" if found else "no approved study"
        raise RefusedError(
            Code.APPROVAL_STUDY,
            f"{study}: {several} of this name or digest.",
            remedy="`wardround client status` shows what is approved.",
        )
    place = found[0]
    try:
        place.approval.rename(place.root / f"withdrawn-{now}.json")
    except OSError as error:
        raise StorageError(
            Code.JOURNAL_WRITE, f"{place.approval}: cannot be moved ({error.strerror})."
        ) from None
    open_log(folder.log).info("study.withdrawn", study_digest=place.root.name)
    return place.root


def _meant(place: StudyFolder, study: str) -> bool:
    if len(study) >= _DIGITS and place.root.name.startswith(study):
        return True
    try:
        told = json.loads((place.bundle / "study.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("name") == study


def heartbeat_age(folder: HospitalFolder, now: int) -> int | None:
    """Seconds since the coordinator was last heard; None where it never was."""
    try:
        told = json.loads(folder.heartbeat.read_text(encoding="utf-8"))
        return max(0, now - int(told["at"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
