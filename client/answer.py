"""What a hospital answers to one signed question: whose question it takes, what leaves, signed.

Shared by the shell of the link (client.app) and by the resident process (client.resident). No
Flower, no torch.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from client.daemon import told
from common.crypto.identity import SiteKey
from common.errors import Code, ProtocolError, WardroundError
from common.protocol.envelope import COORDINATOR, Envelope, check_envelope, sign_envelope

__all__ = ["Answer", "Hospital", "answered", "report"]

_LOG: Final = logging.getLogger("wardround.hospital")


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back: payloads in order, and, where something was refused, why as a code."""

    payloads: tuple[bytes, ...] = ()
    code: Code | None = None


class Hospital(Protocol):
    """The hospital behind the link. Asked from one thread, one question at a time."""

    @property
    def site(self) -> str:
        """Its id in the roster."""
        ...

    @property
    def key(self) -> SiteKey:
        """Its newest identity key."""
        ...

    @property
    def coordinator(self) -> bytes:
        """The coordinator's public key, pinned at enrolment."""
        ...

    def key_for(self, study: bytes) -> SiteKey:
        """The key that signs answers about a study: the one that the study's roster lists."""
        ...

    def ask(self, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
        """Handle the payloads in order and return what was sent meanwhile.

        Args:
            study: digest of the study that the signed question names.
            payloads: messages of the round protocol; none where `hello`.
            hello: the coordinator asks who is here; the answer holds the site's Hello.

        Raises:
            WardroundError: leaves as its code; a DataError as DATA_DECLINED.
        """
        ...


def answered(
    hospital: Hospital, question: Envelope, payloads: Sequence[bytes], *, hello: bool
) -> tuple[Envelope, tuple[bytes, ...]]:
    """The hospital's signed answer to one question.

    Guarantee: the hospital is asked only what its pinned coordinator signed for exactly this
    site; what leaves is a payload of our protocol or a code, never an exception's text.

    Raises:
        ProtocolError: the question is not the coordinator's. Nothing is signed over it.
    """
    _check(hospital, question, payloads, hello=hello)
    answer = _asked(hospital, question.study, payloads, hello=hello)
    envelope = sign_envelope(
        hospital.key_for(question.study),
        study=question.study,
        sender=hospital.site,
        recipient=COORDINATOR,
        nonce=question.nonce,
        payloads=answer.payloads,
        code="" if answer.code is None else answer.code.label,
    )
    return envelope, answer.payloads


def _check(
    hospital: Hospital, question: Envelope, payloads: Sequence[bytes], *, hello: bool
) -> None:
    """Return if the pinned coordinator asks exactly this site. Raises ProtocolError."""
    if hello and payloads:
        raise ProtocolError(Code.MALFORMED, "A hello question carries nothing.")
    # Who sits behind a node is not known before its first hello, so that one has no recipient.
    recipient = "" if hello and not question.recipient else hospital.site
    check_envelope(
        question,
        payloads,
        public=hospital.coordinator,
        study=question.study,
        sender=COORDINATOR,
        recipient=recipient,
        nonce=question.nonce,
    )


def _asked(hospital: Hospital, study: bytes, payloads: Sequence[bytes], *, hello: bool) -> Answer:
    try:
        return hospital.ask(study, payloads, hello=hello)
    except WardroundError as error:
        return Answer((), told(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, only a code may leave
        report(error)
        return Answer((), Code.INTERNAL_FAULT)


def report(error: Exception) -> None:
    """Write a program error into the hospital's own log: its kind and place, not its text.

    An exception's text may quote a record, and a record is in no log.
    """
    place = "".join(traceback.format_tb(error.__traceback__))
    _LOG.error("%s: %s at\n%s", Code.INTERNAL_FAULT.label, type(error).__name__, place)
