"""Whether this hospital takes part in a study: a pure comparison with its own ceilings.

A study that asks for more than a ceiling is refused with the two numbers. Nothing is ever
trimmed to fit: trimmed terms would be terms that nobody signed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from client.config import Ceilings
from common.errors import Code, RefusedError
from common.ids import short

__all__ = ["StudyFacts", "approve", "objections"]


@dataclass(frozen=True)
class StudyFacts:
    """What a hospital knows about a study from its own copy of the signed bundle.

    `epsilon` and `delta` are None exactly where the study has no differential privacy.
    """

    study_digest: bytes
    backbone_digest: bytes
    code_digest: bytes
    parties: int
    rounds: int
    epsilon: float | None
    delta: float | None


def approve(facts: StudyFacts, ceilings: Ceilings, *, stopped: bool) -> None:
    """Return if the hospital takes part.

    Args:
        facts: the study.
        ceilings: the hospital's own limits.
        stopped: whether the kill switch is on.

    Raises:
        RefusedError: the first objection, with its own code and the numbers.
    """
    for objection in objections(facts, ceilings, stopped=stopped):
        raise objection


def objections(facts: StudyFacts, ceilings: Ceilings, *, stopped: bool) -> tuple[RefusedError, ...]:
    """Every reason to refuse, in a fixed order; empty where there is none."""
    return (
        *_switch(stopped=stopped),
        *_digests(facts, ceilings),
        *_privacy(facts, ceilings),
        *_sizes(facts, ceilings),
    )


def _switch(*, stopped: bool) -> Iterator[RefusedError]:
    if stopped:
        yield RefusedError(Code.APPROVAL_STOPPED, "The kill switch of this hospital is on.")


def _digests(facts: StudyFacts, ceilings: Ceilings) -> Iterator[RefusedError]:
    table: Sequence[tuple[Code, str, bytes, tuple[str, ...] | None]] = (
        (Code.APPROVAL_STUDY, "study", facts.study_digest, ceilings.approved_studies),
        (Code.APPROVAL_BACKBONE, "backbone", facts.backbone_digest, ceilings.approved_backbones),
        (Code.APPROVAL_CODE, "code", facts.code_digest, ceilings.approved_code),
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
