"""An epoch's handshake, as the hospital's machine answers it."""

from __future__ import annotations

from client.handshake import Handshake
from client.round.effects import Effect, Send
from client.round.state import NO_RUN, SiteState
from common.errors import Code, ProtocolError
from common.protocol.effects import Note, Persist
from common.protocol.wire import (
    ConfirmSet,
    EncapsulationSet,
    EncapsulationUpload,
    HandshakeOpen,
    RevealRequest,
    RunKeys,
    pack,
)


def on_open(state: SiteState, message: HandshakeOpen) -> list[Effect]:
    """Answer an opened epoch with a fresh run key."""
    seen = state.record
    if message.study != seen.study:
        raise ProtocolError(Code.HANDSHAKE_WRONG_STUDY, "A handshake names another study.")
    if seen.run not in {NO_RUN, message.run}:
        raise ProtocolError(Code.RUN_SECOND, "A second run of this study was offered.")
    if state.handshake is not None and message.epoch == state.handshake.epoch:
        if message.members != state.handshake.members:
            raise ProtocolError(Code.HANDSHAKE_MEMBERS, "An epoch changed its members.")
        return [state.say_signed(type(state.handshake.run_key), state.handshake.signed)]
    if message.epoch <= seen.epoch:
        raise ProtocolError(Code.HANDSHAKE_STALE, f"Epoch {message.epoch} is over.")
    _check_members(state, message.members)
    if state.handshake is not None and message.epoch < state.handshake.confirmed_epoch:
        raise ProtocolError(Code.HANDSHAKE_STALE, f"Epoch {message.epoch} is over.")
    # Nobody signed this message: nothing durable follows from it, and the epoch that is
    # in use stays until every member has confirmed the new one.
    state.handshake = Handshake.open(state.terms, state.site, state.key, state.entropy, message)
    return [state.say_signed(type(state.handshake.run_key), state.handshake.signed)]


def _check_members(state: SiteState, members: tuple[str, ...]) -> None:
    distinct = list(members) == sorted(set(members))
    known = set(members) <= set(state.terms.roster) and state.site in members
    if not distinct or not known or len(members) < state.terms.quorum:
        raise ProtocolError(
            Code.HANDSHAKE_MEMBERS,
            f"{len(members)} members do not make a quorum of {state.terms.quorum} "
            f"of the study's {len(state.terms.roster)} parties.",
        )


def on_run_keys(state: SiteState, message: RunKeys) -> list[Effect]:
    """Check every member's run key and encapsulate to the later members."""
    statement, ciphertexts = _current(state, message.epoch).encapsulate(message.keys)
    return [Send(pack(EncapsulationUpload(statement, ciphertexts)))]


def on_encapsulations(state: SiteState, message: EncapsulationSet) -> list[Effect]:
    """Compute the pair keys and confirm them."""
    confirm = _live(state, message.transcript).finish(message)
    return [state.say(confirm)]


def on_confirmations(state: SiteState, message: ConfirmSet) -> list[Effect]:
    """Take the epoch's keys into use, or reveal it where a pair does not confirm."""
    handshake = _live(state, message.transcript)
    loser = handshake.unconfirmed(message.confirmations)
    if loser is not None:
        reveal = handshake.dispute(loser)
        note = Note("peer.refused", {"site": loser, "code": Code.HANDSHAKE_CONFIRMATION.label})
        return [_kill_epoch(state), note, state.say(reveal)]
    established = handshake.established()
    if state.record.transcript == handshake.transcript:
        return [state.say(established)]
    # The new keys replace the old: a round that was not uploaded yet ends here.
    state.forget()
    stage = "idle" if state.record.stage in {"started", "ready"} else state.record.stage
    kept = state.persist(
        run=handshake.run_key.run,
        epoch=handshake.epoch,
        transcript=handshake.transcript,
        keys=handshake.keys,
        ratchet=0,
        stage=stage,
    )
    note = Note(
        "handshake.completed",
        {"transcript": handshake.transcript.hex(), "present": handshake.members},
    )
    return [kept, note, state.say(established)]


def on_reveal(state: SiteState, message: RevealRequest) -> list[Effect]:
    """Reveal this epoch's ephemeral keys, whose use ends first."""
    handshake = _live(state, message.transcript)
    reveal = handshake.dispute(message.peer)
    return [_kill_epoch(state), state.say(reveal)]


def _kill_epoch(state: SiteState) -> Persist:
    # Goes before every reveal: keys that anybody may know must never mask anything.
    state.handshake = None
    return state.persist(keys={}, transcript=bytes(32))


def _current(state: SiteState, epoch: int) -> Handshake:
    if state.handshake is None or state.handshake.epoch != epoch:
        raise ProtocolError(Code.HANDSHAKE_STALE, f"Epoch {epoch} is not open here.")
    return state.handshake


def _live(state: SiteState, transcript: bytes) -> Handshake:
    if state.handshake is None:
        raise ProtocolError(Code.HANDSHAKE_STALE, "No handshake is open here.")
    if state.handshake.transcript != transcript:
        raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, "Another handshake transcript.")
    return state.handshake
