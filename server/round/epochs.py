"""An epoch's handshake, as the coordinator's machine carries it on."""

from __future__ import annotations

from common.errors import Code
from common.protocol.effects import Note
from common.protocol.wire import EncapsulationUpload, Signed, pack
from server.round.asking import forward
from server.round.begin import begin_round, open_epoch
from server.round.burning import stall
from server.round.effects import Effect, SendTo
from server.round.state import CoordinatorState


def on_run_key(state: CoordinatorState, site: str, message: Signed, _now: float) -> list[Effect]:
    """Take a member's run key."""
    if state.opening is None:
        return []
    return forward(state.opening.run_key(site, message))


def on_encapsulations(
    state: CoordinatorState, site: str, message: EncapsulationUpload, _now: float
) -> list[Effect]:
    """Take a member's ciphertexts."""
    if state.opening is None:
        return []
    return forward(state.opening.encapsulations(site, message))


def on_confirm(state: CoordinatorState, site: str, message: Signed, _now: float) -> list[Effect]:
    """Take a member's confirmation."""
    if state.opening is None:
        return []
    return forward(state.opening.confirm(site, message))


def on_established(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """Note that a member is done; with the last one the epoch stands."""
    opening = state.opening
    if opening is None or not opening.established(site, message):
        return []
    state.progress()
    state.opening = None
    state.joining -= set(opening.members)
    kept = state.persist(members=opening.members, transcript=opening.transcript, phase="idle")
    note = Note(
        "handshake.completed", {"transcript": opening.transcript.hex(), "present": opening.members}
    )
    return [kept, note, *begin_round(state, now)]


def on_dispute(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """Judge a pair that does not confirm, and go on without the culprit."""
    if state.opening is None:
        return []
    culprit, requests = state.opening.dispute(site, message)
    if culprit is None:
        return [SendTo(v, pack(request)) for v, request in requests.items()]
    kept = state.exclude(culprit)
    note = Note(
        "peer.refused", {"site": culprit, "code": Code.DISPUTE_LOST.label, "phase": "handshake"}
    )
    members = set(state.opening.members) - {culprit}
    return [kept, note, *open_epoch(state, now, members)]


def handshake_over(state: CoordinatorState, now: float) -> list[Effect]:
    """Some members have not answered: open another epoch, without them if that is enough."""
    opening = state.opening
    if opening is None:
        return open_epoch(state, now)
    missing = opening.missing()
    answered = set(opening.members) - missing
    state.absent |= missing
    if len(answered) >= state.terms.quorum:
        return open_epoch(state, now, answered)
    state.absent.clear()
    state.fruitless += 1
    if state.patience is not None and state.fruitless > state.patience:
        return stall(state, now)
    return open_epoch(state, now, set(state.terms.parties))
