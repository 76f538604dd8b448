"""What a site may say at any time, and what the end of a phase brings."""

from __future__ import annotations

from dataclasses import replace

from common.crypto.identity import verify
from common.errors import Code, ProtocolError
from common.protocol.effects import Note
from common.protocol.transcript import SPENT
from common.protocol.wire import Hello, Refusal, Signed, unpack_body
from server.round.asking import farewell, resend
from server.round.begin import finish, open_epoch
from server.round.burning import abort, burned, leave_undecided
from server.round.collecting import close_ready, close_uploads
from server.round.effects import Effect, SendTo
from server.round.epochs import handshake_over
from server.round.state import CoordinatorState

# Budget, approval, or the run's end at a site: it will say the same of the next round.
_WITHDRAWS = ("WR-30", "WR-31", Code.RUN_ENDED.label)


def on_hello(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """A site is (again) here: tell it what it needs."""
    hello: Hello = unpack_body(Hello, message)
    valid = verify(state.terms.roster[site], message.signature, Hello.LABEL, message.body)
    if not valid or (hello.study, hello.site) != (state.record.study, site):
        raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The hello of {site} is forged.")
    if site in state.record.convicted:
        return []
    state.absent.discard(site)
    state.withdrawn.discard(site)
    if state.record.phase != "done" and site in state.record.spent:
        # Its cap may have been raised; what it says next is what counts.
        kept = {v: said for v, said in state.record.spent.items() if v != site}
        state.record = replace(state.record, spent=kept)
    if hello.version < state.record.version:
        state.behind.add(site)
    seen = state.record
    if seen.phase == "done":
        return [SendTo(site, farewell(state, with_base=True))]
    if seen.phase == "handshake" and state.opening is not None:
        return _hello_in_handshake(state, site, now)
    if site not in seen.members or hello.epoch != seen.epoch:
        state.expect(site)
        return []
    return resend(state, {site} & state.missing())


def _hello_in_handshake(state: CoordinatorState, site: str, now: float) -> list[Effect]:
    """A site that starts anew has lost its ephemeral keys: the epoch starts anew, too."""
    opening = state.opening
    if opening is None or site in opening.missing_keys():
        return resend(state, {site})
    return open_epoch(state, now, set(opening.members) | {site})


def on_refusal(state: CoordinatorState, site: str, message: Signed, now: float) -> list[Effect]:
    """Write down what a site refused, and go on without it where it concerns this round."""
    refusal: Refusal = unpack_body(Refusal, message)
    valid = verify(state.terms.roster[site], message.signature, Refusal.LABEL, message.body)
    if not valid or (refusal.study, refusal.site) != (state.record.study, site):
        raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The refusal of {site} is forged.")
    seen = state.record
    if refusal.code == Code.BASE_NEEDED.label and seen.phase in {"ready", "done"}:
        if site in state.behind:
            return []
        state.behind.add(site)
        if seen.phase == "done":
            return [SendTo(site, farewell(state, with_base=True))]
        return resend(state, {site})
    fields: dict[str, str | int | tuple[str, ...]] = {
        "site": site,
        "code": refusal.code,
        "round": seen.round,
        "phase": seen.phase,
    }
    note: list[Effect] = [Note("peer.refused", fields)] if _is_code(refusal.code) else []
    note += _accused(state, refusal.culprit, site)
    if refusal.code == Code.HANDSHAKE_INCOMPLETE.label:
        state.expect(site)
    if refusal.code.startswith(_WITHDRAWS):
        state.withdrawn.add(site)
    note += _spent(state, refusal, message)
    if seen.phase in {"ready", "upload"} and refusal.round == seen.round:
        return [*note, *_without(state, site, now)]
    return note


def _spent(state: CoordinatorState, refusal: Refusal, message: Signed) -> list[Effect]:
    """Keep a site's word that its budget is spent; with too many of them the run is over.

    A word about an earlier round does not count: since then the cap may have been raised. A
    round that may still be completed is; the run ends after it.
    """
    seen = state.record
    if refusal.code not in SPENT or refusal.round != seen.round or seen.phase == "done":
        return []
    kept = state.persist(spent={**seen.spent, refusal.site: message})
    if state.exhausted and seen.phase in {"handshake", "burn"}:
        return [kept, *finish(state, Code.BUDGETS_SPENT)]
    return [kept]


def _accused(state: CoordinatorState, culprit: str, accuser: str) -> list[Effect]:
    """Write down who blames whom; a site blamed by more than may conspire is left out.

    A single accuser may lie, so nothing follows from one but the record of it.
    """
    if culprit not in state.terms.roster or culprit == accuser:
        return []
    accusers = state.accusers.setdefault(culprit, set())
    accusers.add(accuser)
    note = Note("peer.refused", {"site": culprit, "code": Code.PEER_ACCUSED.label})
    if len(accusers) <= state.terms.colluders:
        return [note]
    return [note, state.exclude(culprit)]


def _without(state: CoordinatorState, site: str, now: float) -> list[Effect]:
    """Go on without a site that refused this phase."""
    if site not in state.missing():
        return []
    state.declined.add(site)
    if state.still_waiting(now):
        return []
    return phase_over(state, now)


def phase_over(state: CoordinatorState, now: float) -> list[Effect]:
    """Close the phase with what has come."""
    phase = state.record.phase
    if phase == "handshake":
        return handshake_over(state, now)
    if phase == "ready":
        if len(state.ready) >= state.terms.quorum:
            return close_ready(state, now)
        return abort(state, now, Code.QUORUM_LOST)
    if phase == "upload":
        if len(state.record.receipts) >= state.terms.quorum:
            return close_uploads(state, now)
        return abort(state, now, Code.QUORUM_LOST)
    if phase == "burn" and len(state.burns) >= state.terms.quorum:
        return burned(state, now)
    if phase in {"agree", "unmask", "burn"}:
        return leave_undecided(state, now)
    raise AssertionError(f"no deadline in phase {phase}")


def _is_code(label: str) -> bool:
    return any(code.label == label for code in Code)
