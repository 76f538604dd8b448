"""The coordinator's side of a run as a pure state machine: (state, message, now) -> effects.

The coordinator is trusted with availability only. It relays, counts and adds; it keeps one
accumulator per lane, never one vector per hospital. `server.driver` executes the effects and
makes `Persist` durable before any `SendTo`; after a crash the machine goes on in the phase
that was last persisted and asks again, and sites answer duplicates with the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from common.crypto.digest import decode
from common.errors import Code, ProtocolError
from common.ports import Entropy, Tensors
from common.protocol.codec import load_record
from common.protocol.effects import Note
from common.protocol.terms import Terms
from common.protocol.transcript import Chain, advance, load_state, metric_sum
from common.protocol.wire import (
    Agree,
    Burn,
    Confirm,
    Dispute,
    EncapsulationUpload,
    Established,
    Head,
    Hello,
    Ready,
    Refusal,
    RunKey,
    Unmask,
    Upload,
    unpack_body,
    unpack_from_site,
)
from common.tensors import state_digest
from server.round.asking import resend
from server.round.begin import begin_round, finish, open_epoch
from server.round.burning import on_burn
from server.round.collecting import on_ready, on_upload
from server.round.effects import Completed, Effect
from server.round.epochs import (
    on_confirm,
    on_dispute,
    on_encapsulations,
    on_established,
    on_run_key,
)
from server.round.opening import on_agree, on_unmask
from server.round.record import (
    READIES,
    READY_BLOB,
    SUM_BLOB,
    CoordinatorRecord,
    chain_blobs,
    load_sums,
)
from server.round.state import CoordinatorState, Deadlines
from server.round.statements import on_hello, on_refusal, phase_over

# What answers each of the sites' messages.
HANDLERS: dict[type[Any], Callable[[CoordinatorState, str, Any, float], list[Effect]]] = {
    RunKey: on_run_key,
    EncapsulationUpload: on_encapsulations,
    Confirm: on_confirm,
    Established: on_established,
    Dispute: on_dispute,
    Ready: on_ready,
    Upload: on_upload,
    Agree: on_agree,
    Unmask: on_unmask,
    Burn: on_burn,
    Hello: on_hello,
    Refusal: on_refusal,
}


class CoordinatorRound:
    """The coordinator of one run of one study.

    Args:
        terms: the signed study.
        deadlines: seconds per phase.
        entropy: where the run id comes from.
        patience: fruitless deadlines in a row before `tick` raises AbortedRound; None waits
            for ever. Nothing is lost by raising: the run resumes where it stood.
        record: the last durable record, or None at the first start.
        blob: reads a kept blob: to resume, and for messages as large as the model.
        keep: puts a model where it lies until the next round is opened, and gives what reads it.
    """

    def __init__(
        self,
        terms: Terms,
        deadlines: Deadlines,
        entropy: Entropy,
        *,
        patience: int | None,
        record: bytes | None,
        blob: Callable[[str], bytes | None],
        keep: Callable[[Tensors], Tensors] = lambda state: state,
    ) -> None:
        if record is None:
            known = CoordinatorRecord.fresh(terms.study, entropy.take(32))
        else:
            known = load_record(CoordinatorRecord, decode(record, max_bytes=2**28, max_items=2**22))
        self.state = CoordinatorState(
            terms, deadlines, known, patience=patience, blob=blob, keep=keep
        )
        _restore(self.state)

    @property
    def record(self) -> CoordinatorRecord:
        """What the coordinator must remember across a crash."""
        return self.state.record

    @property
    def chain(self) -> Chain:
        """The model so far, and how it came about."""
        return self.state.chain

    @property
    def phase(self) -> str:
        """handshake, ready, upload, agree, unmask, burn or done."""
        return self.state.record.phase

    @property
    def ended(self) -> Code | None:
        """Why the run ended before its last turn, if it did."""
        return next((code for code in Code if code.label == self.state.record.ended), None)

    @property
    def deadline(self) -> float:
        """When the current phase is closed with what has come."""
        return self.state.deadline

    def waiting_for(self) -> tuple[str, ...]:
        """The sites whose answer the current phase still needs."""
        return self.state.waiting_for()

    @property
    def quorum(self) -> int:
        """Q of the study."""
        return self.state.terms.quorum

    def last_completed(self) -> Completed | None:
        """The last completed round, from its certificate; None before the first."""
        link = self.state.link
        if link is None:
            return None
        return Completed(
            link.header.round,
            link.header.turn,
            link.header.kind,
            tuple(sorted(link.heads)),
            tuple(sorted(link.roots)),
            0,
            metric_sum(self.state.terms, link),
            self.state.chain.rejected,
        )

    @property
    def next_wakeup(self) -> float:
        """When `tick` has something to do."""
        return min(self.state.deadline, self.state.resend_at, self.state.grace_until)

    def start(self, now: float) -> list[Effect]:
        """Begin the run, or go on after a restart."""
        seen = self.state.record
        if seen.phase == "done":
            return finish(self.state)
        if seen.phase in {"new", "handshake"}:
            return open_epoch(self.state, now)
        if seen.phase == "idle":
            return begin_round(self.state, now)
        note = Note(
            "run.resumed",
            {"round": seen.round, "kind": self.state.terms.kind(self.state.chain.turn)},
        )
        self.state.set_timers(now)
        return [note, *resend(self.state, set(self.state.terms.parties))]

    def handle(self, site: str, payload: bytes, now: float) -> list[Effect]:
        """React to a site's message. Raises ProtocolError, having changed nothing."""
        kind, message = unpack_from_site(payload, self.state.terms.upload_bytes())
        if site not in self.state.terms.roster:
            raise ProtocolError(Code.SIGNER_UNKNOWN, f"{site} is not a party of this study.")
        back = site in self.state.absent and site not in self.state.record.convicted
        effects = HANDLERS[kind](self.state, site, message, now)
        if self.state.record.phase != "handshake" and site not in self.state.record.members:
            self.state.expect(site)
        if back:
            self.state.absent.discard(site)
            note = Note("site.returned", {"site": site, "round": self.state.record.round})
            effects = [note, *effects]
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Ask again, or close the phase, if its time has come.

        Raises AbortedRound where `patience` deadlines in a row brought nothing.
        """
        if self.state.record.phase in {"done", "new", "idle"}:
            return []
        if now >= min(self.state.deadline, self.state.grace_until):
            return phase_over(self.state, now)
        if now >= self.state.resend_at:
            self.state.ask_again_later(now)
            return resend(self.state, self.state.missing())
        return []


def _restore(state: CoordinatorState) -> None:
    """Rebuild what the record's phase needs from the blobs."""
    seen = state.record
    _restore_chain(state)
    if seen.phase in {"upload", "agree", "unmask"}:
        ready = state.blob(READY_BLOB)
        if ready is None:
            raise AssertionError("the ready blob is written before its phase is persisted")
        state.ready = READIES.load(decode(ready, max_bytes=2**30, max_items=2**22))
        state.heads = {v: unpack_body(Head, r.head) for v, r in state.ready.items()}
        state.sums = [lane.zeros() for lane in state.lanes]
    if seen.phase in {"agree", "unmask"}:
        sums = state.blob(SUM_BLOB)
        if sums is None:
            raise AssertionError("the sum blob is written before its phase is persisted")
        state.sums = load_sums(state.lanes, sums)


def _restore_chain(state: CoordinatorState) -> None:
    """Go from the state that the last completed round started from to the one after it."""
    version = state.record.version
    content = state.blob(chain_blobs(version)[1]) if version else None
    if content is None:
        return
    base = state.keep(load_state(state.terms, content))
    del content  # what follows needs the room
    link = state.link
    if link is not None:
        header = link.header
        before = Chain(0, header.turn, base, header.state, header.exponents, header.prev)
        state.move(advance(state.terms, before, link, state_digest))
