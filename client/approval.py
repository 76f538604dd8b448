"""Whether this hospital takes part in a study: its own ceilings, and what a person here signed.

A study that asks for more than a ceiling is refused with the two numbers. Nothing is ever
trimmed to fit: trimmed terms would be terms that nobody signed. An approval names a study, the
code that may train it and the roster of its hospitals, and carries the hospital's signature: a
file that somebody wrote into the state folder approves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from client.config import Ceilings
from common.config import Frozen, load
from common.crypto import labels
from common.crypto.identity import SiteKey, verify
from common.errors import Code, ConfigError, RefusedError
from common.fields import Name, Text
from common.ids import short
from common.world import write_durably

__all__ = ["FORMAT", "Approval", "StudyFacts", "approve", "objections"]

FORMAT: Final = "wardround-approval/1"

_Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _File(Frozen):
    """approval.json."""

    format: Literal["wardround-approval/1"]
    site: Name
    study: _Hex32
    code: _Hex32
    roster: _Hex32
    by: Text
    at: Annotated[int, Field(ge=0, lt=2**53)]
    epsilon: Annotated[float, Field(gt=0)] | None
    delta: Annotated[float, Field(gt=0)] | None
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True)
class Approval:
    """That somebody at a hospital approved a study, under the hospital's own signature.

    Attributes:
        site: the hospital.
        study: the study digest.
        code: what the installed code hashes to; other code is refused.
        roster: the roster's digest.
        by: who approved.
        at: when, in Unix seconds.
        epsilon: what the study may spend; None without differential privacy.
        delta: the same.
        signature: the hospital's, over all of it.
    """

    site: str
    study: bytes
    code: bytes
    roster: bytes
    by: str
    at: int
    epsilon: float | None
    delta: float | None
    signature: bytes = b""

    def signed(self, key: SiteKey) -> Approval:
        """The same under the hospital's key."""
        signature = key.sign(labels.APPROVAL, *self._parts())
        return Approval(*self._fields(), signature)

    def verified(self, public: bytes, site: str) -> Approval:
        """This approval, if `site` made it with the key `public`.

        Raises:
            RefusedError: APPROVAL_FORGED.
        """
        held = verify(public, self.signature, labels.APPROVAL, *self._parts())
        if not held or self.site != site:
            raise _forged()
        return self

    def _fields(self) -> tuple[str, bytes, bytes, bytes, str, int, float | None, float | None]:
        return (
            self.site,
            self.study,
            self.code,
            self.roster,
            self.by,
            self.at,
            self.epsilon,
            self.delta,
        )

    def _parts(self) -> tuple[str | bytes | int, ...]:
        return (*self._fields()[:6], repr(self.epsilon), repr(self.delta))

    def save(self, path: Path) -> None:
        """Write the approval, whole or not at all. Raises StorageError."""
        told = {
            "format": FORMAT,
            "site": self.site,
            "study": self.study.hex(),
            "code": self.code.hex(),
            "roster": self.roster.hex(),
            "by": self.by,
            "at": self.at,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "signature": self.signature.hex(),
        }
        write_durably(path, [json.dumps(told, indent=1).encode() + b"\n"])

    @staticmethod
    def load(path: Path) -> Approval:
        """The file at `path`; its signature is judged by `verified`.

        Raises:
            RefusedError: APPROVAL_STUDY where there is none, APPROVAL_FORGED where it is damaged.
        """
        if not path.exists():
            raise RefusedError(Code.APPROVAL_STUDY, "Nobody here has approved this study.")
        try:
            file = load(path, _File)
        except ConfigError:
            raise _forged() from None
        return Approval(
            file.site,
            bytes.fromhex(file.study),
            bytes.fromhex(file.code),
            bytes.fromhex(file.roster),
            file.by,
            file.at,
            file.epsilon,
            file.delta,
            bytes.fromhex(file.signature),
        )


def _forged() -> RefusedError:
    return RefusedError(
        Code.APPROVAL_FORGED, "The record of this study's approval is not as it was signed here."
    )


@dataclass(frozen=True)
class StudyFacts:
    """What a hospital knows about a study from its own copy of the signed bundle.

    `epsilon` and `delta` are None exactly where the study has no differential privacy. `joint`:
    its epsilon counts on other hospitals' shares of the noise.
    """

    study_digest: bytes
    backbone_digest: bytes
    code_digest: bytes
    parties: int
    rounds: int
    epsilon: float | None
    delta: float | None
    joint: bool = False


def approve(
    facts: StudyFacts, ceilings: Ceilings, *, stopped: bool, approval: Approval | None = None
) -> None:
    """Return if the hospital takes part.

    Args:
        facts: the study.
        ceilings: the hospital's own limits.
        stopped: whether the kill switch is on.
        approval: what a person here signed; where there is one it says which study, and besides
            `ceilings.approved_code` it says which code.

    Raises:
        RefusedError: the first objection, with its own code and the numbers.
    """
    for objection in objections(facts, ceilings, stopped=stopped, approval=approval):
        raise objection


def objections(
    facts: StudyFacts, ceilings: Ceilings, *, stopped: bool, approval: Approval | None = None
) -> tuple[RefusedError, ...]:
    """Every reason to refuse, in a fixed order; empty where there is none."""
    return (
        *_switch(stopped=stopped),
        *_digests(facts, ceilings, approval),
        *_privacy(facts, ceilings),
        *_sizes(facts, ceilings),
    )


def _switch(*, stopped: bool) -> Iterator[RefusedError]:
    if stopped:
        yield RefusedError(Code.APPROVAL_STOPPED, "The kill switch of this hospital is on.")


def _digests(
    facts: StudyFacts, ceilings: Ceilings, approval: Approval | None
) -> Iterator[RefusedError]:
    studies, codes = ceilings.approved_studies, ceilings.approved_code
    if approval is not None:
        studies = (approval.study.hex(),)
        own = approval.code.hex()
        codes = (own,) if codes is None or own in codes else ()
    table: Sequence[tuple[Code, str, bytes, tuple[str, ...] | None]] = (
        (Code.APPROVAL_STUDY, "study", facts.study_digest, studies),
        (Code.APPROVAL_BACKBONE, "backbone", facts.backbone_digest, ceilings.approved_backbones),
        (Code.APPROVAL_CODE, "code", facts.code_digest, codes),
    )
    for code, what, digest, approved in table:
        if approved is not None and digest.hex() not in approved:
            yield RefusedError(
                code,
                f"The {what} {short(digest)}… is not among the {len(approved)} approved here.",
            )


def _privacy(facts: StudyFacts, ceilings: Ceilings) -> Iterator[RefusedError]:
    if facts.epsilon is None or facts.delta is None:
        if ceilings.require_privacy:
            yield RefusedError(
                Code.APPROVAL_NO_PRIVACY,
                "The study has no differential privacy; this hospital requires it.",
            )
        return
    if facts.joint and not ceilings.accept_joint:
        yield RefusedError(
            Code.APPROVAL_JOINT,
            "The study counts on other hospitals' noise; this hospital trusts its own alone.",
        )
    # Written so that a value that is not a number is refused too.
    if not 0 < facts.epsilon <= ceilings.epsilon:
        yield RefusedError(
            Code.APPROVAL_EPSILON,
            f"The study would spend epsilon {facts.epsilon:g}; the ceiling here is "
            f"{ceilings.epsilon:g}.",
        )
    if not 0 < facts.delta <= ceilings.delta:
        yield RefusedError(
            Code.APPROVAL_DELTA,
            f"The study's delta is {facts.delta:g}; the ceiling here is {ceilings.delta:g}.",
        )


def _sizes(facts: StudyFacts, ceilings: Ceilings) -> Iterator[RefusedError]:
    if not 0 < facts.rounds <= ceilings.rounds:
        yield RefusedError(
            Code.APPROVAL_ROUNDS,
            f"The study has {facts.rounds} rounds; the ceiling here is {ceilings.rounds}.",
        )
    if facts.parties < ceilings.minimum_sites:
        yield RefusedError(
            Code.APPROVAL_PARTIES,
            f"The study has {facts.parties} hospitals; the floor here is {ceilings.minimum_sites}.",
        )
