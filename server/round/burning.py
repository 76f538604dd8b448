"""A round without an aggregate: it is burned, left undecided, or waited for."""

from __future__ import annotations

from dataclasses import replace

from common.crypto.identity import verify
from common.errors import AbortedRound, Code, ProtocolError
from common.protocol.effects import DropBlob, Note
from common.protocol.wire import Burn, Signed, unpack_body
from server.round.asking import resend
from server.round.begin import begin_round, finish
from server.round.effects import Aborted, Effect
from server.round.record import READY_BLOB, SUM_BLOB
from server.round.state import CoordinatorState


def abort(state: CoordinatorState, now: float, code: Code) -> list[Effect]:
    """No agreement can exist yet: collect a quorum's word that none ever will, or end the run."""
    seen = state.record
    missing = state.waiting_for()
    state.absent |= state.missing()
    phase = seen.phase
    note = Note(
        "round.aborted",
        {
            "round": seen.round,
            "kind": state.terms.kind(state.chain.turn),
            "code": code.label,
            "phase": phase,
            "dropouts": missing,
            "quorum": state.terms.quorum,
        },
    )
    aborted = Aborted(seen.round, code, phase, missing)
    if state.exhausted:
        state.record = replace(seen, aborted=seen.aborted + 1)
        kept, *ending = finish(state, Code.BUDGETS_SPENT)
        return [kept, note, aborted, *ending]
    state.burns = {}
    kept = state.persist(phase="burn", aborted=seen.aborted + 1)
    state.set_timers(now)
    return [kept, note, aborted, *resend(state, set(state.terms.parties))]


def on_burn(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """Count a site's oath never to agree; a quorum of them burns the round."""
    seen = state.record
    if seen.phase != "burn":
        return []
    burn: Burn = unpack_body(Burn, message)
    valid = verify(state.terms.roster[site], message.signature, Burn.LABEL, message.body)
    expected = (seen.study, seen.run, seen.round, site)
    if not valid or (burn.study, burn.run, burn.round, burn.site) != expected:
        raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The burn of {site} is not for now.")
    state.burns[site] = message
    if len(state.burns) < state.terms.quorum:
        return []
    return burned(state, now)


def burned(state: CoordinatorState, now: float) -> list[Effect]:
    """The round is burned: keep the certificate and begin the next."""
    state.progress()
    certificate = tuple(state.burns[v] for v in sorted(state.burns))
    kept = state.persist(phase="idle", burns=(*state.record.burns, *certificate))
    note = Note("round.burned", {"round": state.record.round})
    drops: list[Effect] = [DropBlob(READY_BLOB), DropBlob(SUM_BLOB)]
    return [kept, note, *drops, *begin_round(state, now)]


def leave_undecided(state: CoordinatorState, now: float) -> list[Effect]:
    """Neither finished nor burned: try once more with fresh noise, else wait."""
    seen = state.record
    rounds_left = seen.round < state.terms.rounds
    enough = len(set(state.terms.parties) - state.missing()) >= state.terms.quorum
    if not (state.terms.private and seen.uncertified == 0 and rounds_left and enough):
        return stall(state, now)
    effects: list[Effect] = []
    if seen.phase != "burn":
        missing = state.waiting_for()
        state.absent |= state.missing()
        effects = [
            Note(
                "round.aborted",
                {
                    "round": seen.round,
                    "kind": state.terms.kind(state.chain.turn),
                    "code": Code.ROUND_UNDECIDED.label,
                    "phase": seen.phase,
                    "dropouts": missing,
                    "quorum": state.terms.quorum,
                },
            ),
            Aborted(seen.round, Code.ROUND_UNDECIDED, seen.phase, missing),
        ]
        state.record = replace(state.record, aborted=seen.aborted + 1)
    kept = state.persist(phase="idle", uncertified=1)
    return [kept, *effects, *begin_round(state, now)]


def stall(state: CoordinatorState, now: float) -> list[Effect]:
    """A deadline that brought nothing: ask again, and give up after `patience` of them."""
    state.fruitless += 1
    state.set_timers(now)
    if state.patience is not None and state.fruitless > state.patience:
        missing = state.waiting_for()
        undecided = state.record.phase in {"agree", "unmask", "burn"}
        raise AbortedRound(
            Code.ROUND_UNDECIDED if undecided else Code.QUORUM_LOST,
            f"Round {state.record.round} waits in phase {state.record.phase} for "
            f"{', '.join(missing)}; {state.terms.quorum} of {len(state.terms.roster)} "
            "are needed.",
        )
    return resend(state, state.missing())
