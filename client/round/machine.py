"""The hospital's side of a run as a pure state machine: (state, message) -> effects.

No clock, no disk, no network, no torch: `client.daemon` executes the effects in order and
makes `Persist` durable before any `Send`. Two kinds of state: the `SiteRecord`, which is
persisted (sealed), and the `RoundSecrets` of the open round, which never touch a disk: a site
that crashes between Ready and Upload is a dropout of that round and nothing else.

A failed check raises ProtocolError and changes nothing: the round stays where it was, so a
damaged or hostile message cannot burn it (docs/PROTOCOL.md, "Failure").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from client.round.closing import on_agreements, on_burn, on_ended, on_finished, on_survivors
from client.round.effects import UPLOAD_BLOB, Effect, Worked
from client.round.epochs import on_confirmations, on_encapsulations, on_open, on_reveal, on_run_keys
from client.round.record import SiteRecord
from client.round.start import on_start, worked
from client.round.state import SiteState
from client.round.upload import on_participants
from common.crypto.identity import SiteKey
from common.errors import Code, ProtocolError
from common.ports import Entropy
from common.protocol.effects import DropBlob, Note
from common.protocol.terms import Terms
from common.protocol.wire import (
    Agreements,
    BurnRequest,
    ConfirmSet,
    EncapsulationSet,
    Ended,
    Finished,
    HandshakeOpen,
    Hello,
    Participants,
    Refusal,
    RevealRequest,
    RoundStart,
    RunKeys,
    Survivors,
    unpack_from_coordinator,
)

# What answers each of the coordinator's messages.
HANDLERS: dict[type[Any], Callable[[SiteState, Any], list[Effect]]] = {
    HandshakeOpen: on_open,
    RunKeys: on_run_keys,
    EncapsulationSet: on_encapsulations,
    ConfirmSet: on_confirmations,
    RevealRequest: on_reveal,
    RoundStart: on_start,
    Participants: on_participants,
    Survivors: on_survivors,
    Agreements: on_agreements,
    BurnRequest: on_burn,
    Finished: on_finished,
    Ended: on_ended,
}


class SiteRound:
    """One hospital in one run of one study.

    Args:
        terms: the signed study.
        site: this hospital.
        key: its identity key.
        entropy: where round secrets come from.
        ledger_contains: whether the hospital's ledger holds this row hash at this count;
            answers what other hospitals have witnessed.
        record: the last durable record, or None at the first start.
    """

    def __init__(
        self,
        terms: Terms,
        site: str,
        key: SiteKey,
        entropy: Entropy,
        *,
        ledger_contains: Callable[[int, bytes], bool],
        record: bytes | None,
    ) -> None:
        known = SiteRecord.fresh(terms.study) if record is None else SiteRecord.load(record)
        if known.study != terms.study:
            raise ProtocolError(
                Code.RUN_SECOND,
                "This folder's journal belongs to another study.",
                remedy="Give each study its own state folder.",
            )
        self.state = SiteState(terms, site, key, entropy, ledger_contains, known)
        self._about = 0  # the round that the last message named, 0 where it names none

    @property
    def record(self) -> SiteRecord:
        """What this site must remember across a crash."""
        return self.state.record

    def hello(self) -> list[Effect]:
        """Tell the coordinator that this site is here and how far it has come."""
        seen = self.record
        statement = Hello(seen.study, self.state.site, seen.epoch, seen.round, seen.version)
        return [self.state.say(statement)]

    def handle(self, payload: bytes) -> list[Effect]:
        """React to a coordinator's message. Raises ProtocolError, having changed nothing."""
        self._about = 0
        message = unpack_from_coordinator(payload, self.state.terms.upload_bytes())
        self._about = getattr(message, "round", 0)
        if self.record.ended:
            raise ProtocolError(Code.RUN_ENDED, f"This site ended the run ({self.record.ended}).")
        return HANDLERS[type(message)](self.state, message)

    def refusal(self, code: Code, culprit: str | None) -> list[Effect]:
        """Tell the coordinator, by code alone, that something about a round was refused."""
        study, at = self.record.study, self._about
        statement = Refusal(study, self.state.site, at, code.label, culprit or "")
        fields: dict[str, str | int | tuple[str, ...]] = {"code": code.label, "round": at}
        if culprit is not None:
            fields["site"] = culprit
        return [Note("peer.refused", fields), self.state.say(statement)]

    def decline(self, round_number: int) -> list[Effect]:
        """Sit this round out: approval or budget refused the work."""
        if self.state.pending is None or self.state.pending[0].round != round_number:
            return []
        self.state.forget()
        return [self.state.persist(stage="idle")]

    def end(self, code: Code) -> list[Effect]:
        """End the run at this hospital for good."""
        self.state.forget()
        self.state.handshake = None
        closed = self.state.persist(
            ended=code.label, keys={}, shares={}, sent={}, stage="idle", cohort=(), survivor_set=()
        )
        return [closed, DropBlob(UPLOAD_BLOB), Note("study.stopped", {"reason": code.label})]

    def worked(self, round_number: int, result: Worked) -> list[Effect]:
        """Commit to fresh secrets and share them, once the work is done."""
        return worked(self.state, round_number, result)
