"""What comes next: an epoch's handshake, a round, or the end of the run."""

from __future__ import annotations

from common.errors import AbortedRound, Code
from common.protocol.effects import Note
from server.handshake import Opening
from server.round.asking import farewell, resend, send_model
from server.round.effects import Effect, RunOver
from server.round.state import CoordinatorState


def begin_round(state: CoordinatorState, now: float) -> list[Effect]:
    """Begin the next round, or what has to come before it, or the end."""
    if state.chain.turn > state.terms.turns + 1:
        return finish(state)
    # A round that cannot reach the quorum would cost every hospital its budget for
    # nothing: shake hands first with whoever is there.
    members = set(state.record.members)
    few = len(members - state.absent - state.out) < state.terms.quorum
    if few or state.joining or members & set(state.record.convicted):
        return open_epoch(state, now)
    number = state.record.round + 1
    if number > state.terms.rounds:
        raise AbortedRound(
            Code.RUN_STARVED,
            f"{state.record.aborted} rounds were burned; the study allows no round {number}.",
        )
    state.ready, state.heads, state.sums = {}, {}, []
    state.unmasks, state.burns, state.declined = {}, {}, set()
    state.bytes_up = 0
    state.known = {}
    kept = state.persist(round=number, phase="ready", receipts={}, agreements={})
    state.set_timers(now)
    note = Note(
        "round.started",
        {
            "round": number,
            "kind": state.terms.kind(state.chain.turn),
            "header": state.hashed.hex(),
            "model": state.chain.state_digest.hex(),
            "cohort": state.record.members,
        },
    )
    return [kept, note, *resend(state, set(state.record.members))]


def open_epoch(
    state: CoordinatorState, now: float, members: set[str] | None = None
) -> list[Effect]:
    """Shake hands anew: with `members`, or with whoever is thought to be there."""
    if state.exhausted:
        return finish(state, Code.BUDGETS_SPENT)
    parties = set(state.terms.parties)
    admitted = parties - state.out
    if len(admitted) < state.terms.quorum:
        convicted = len(parties - set(state.record.convicted)) < state.terms.quorum
        raise AbortedRound(
            Code.DISPUTE_LOST if convicted else Code.QUORUM_LOST,
            f"{', '.join(sorted(state.out))} refused to go on or broke the protocol.",
        )
    chosen = (admitted - state.absent) if members is None else members & admitted
    if len(chosen) < state.terms.quorum:
        chosen = admitted
    epoch = state.record.epoch + 1
    state.opening = Opening(
        state.terms, state.record.study, state.record.run, epoch, tuple(sorted(chosen))
    )
    state.joining.clear()
    first = state.record.phase == "new"
    kept = state.persist(epoch=epoch, phase="handshake", members=(), transcript=bytes(32))
    state.set_timers(now)
    effects: list[Effect] = [kept]
    if first:
        effects.append(
            Note(
                "run.started",
                {
                    "run": state.record.run.hex(),
                    "study": state.record.study.hex(),
                    "parties": len(parties),
                    "quorum": state.terms.quorum,
                    "rounds": state.terms.turns,
                    "model": state.chain.state_digest.hex(),
                },
            )
        )
    return [*effects, *resend(state, chosen)]


def finish(state: CoordinatorState, why: Code | None = None) -> list[Effect]:
    """End the run with the model as it stands; `why`, where that is before its last turn."""
    ended = state.record.ended if why is None else why.label
    kept = state.persist(phase="done", ended=ended)
    note = Note(
        "run.finished",
        {
            "rounds_completed": state.chain.turn - state.terms.first_turn,
            "rounds_aborted": state.record.aborted,
            "model": state.chain.state_digest.hex(),
            **({"verdict": ended} if ended else {}),
        },
    )
    goodbyes = send_model(state, state.terms.parties, farewell)
    return [kept, goodbyes, note, RunOver(state.chain)]
