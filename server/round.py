"""The coordinator's side of a run as a pure state machine: (state, message, now) -> effects.

The coordinator is trusted with availability only. It relays, counts and adds; it keeps one
accumulator per lane, never one vector per hospital. `server.driver` executes the effects and
makes `Persist` durable before any `SendTo`; after a crash the machine goes on in the phase
that was last persisted and asks again, and sites answer duplicates with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from common.crypto import labels
from common.crypto.digest import decode, digest, encode, flat_view, tree_digest
from common.crypto.identity import verify
from common.crypto.mask import Words
from common.errors import AbortedRound, Code, ProtocolError
from common.ports import Entropy
from common.protocol.codec import (
    DIGEST,
    ROUND,
    SITE,
    dump_record,
    load_record,
    mapping,
    record,
    sequence,
    text,
)
from common.protocol.effects import DropBlob, Note, Persist, PutBlob
from common.protocol.terms import METRIC_LANE, Terms
from common.protocol.transcript import (
    Chain,
    advance,
    certified_survivors,
    dump_state,
    head_digest,
    header_hash,
    load_state,
    participants_hash,
    split_planes,
    survivors_hash,
    upload_root,
)
from common.protocol.wire import (
    SIGNED,
    TAG_BYTES,
    Agree,
    Agreements,
    Burn,
    BurnRequest,
    Confirm,
    Dispute,
    EncapsulationUpload,
    Established,
    Finished,
    Head,
    Header,
    Hello,
    Link,
    Participants,
    Ready,
    Receipt,
    Refusal,
    RoundStart,
    RunKey,
    Signed,
    Survivors,
    Table,
    Unmask,
    Upload,
    pack,
    unpack_body,
    unpack_from_site,
)
from common.secagg.masking import Lane, add_packed
from common.secagg.quantise import reduce_
from common.tensors import state_digest
from server.handshake import Opening
from server.unmask import OpenRound, check_unmask, open_sum

RESENDS_PER_PHASE = 4
# Seconds that a site which missed a phase is waited for at the least, once the others are there.
_LEAST_GRACE = 1.0
_READY_BLOB, _SUM_BLOB = "ready", "sums"
# Budget, approval, or the run's end at a site: it will say the same of the next round.
_WITHDRAWS = ("WR-30", "WR-31", Code.RUN_ENDED.label)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds the coordinator waits in each phase."""

    handshake: float = 120.0
    train: float = 3600.0
    upload: float = 600.0
    agree: float = 120.0
    unmask: float = 120.0


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class SendTo:
    """Hand bytes for one site to the transport."""

    site: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Completed:
    """A round ended in an aggregate; `metrics` are the summed words of the model before it."""

    round: int
    turn: int
    kind: str
    cohort: tuple[str, ...]
    survivors: tuple[str, ...]
    bytes_up: int
    metrics: NDArray[np.int64] | None


@dataclass(frozen=True, slots=True)
class Aborted:
    """A round ended without an aggregate."""

    round: int
    code: Code
    phase: str
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunOver:
    """The run is complete: the final chain."""

    chain: Chain


Effect = Persist | PutBlob | DropBlob | SendTo | Note | Completed | Aborted | RunOver


@dataclass(frozen=True, slots=True)
class CoordinatorRecord:
    """What the coordinator must remember across a crash. It holds no secret of any site."""

    study: bytes
    run: bytes
    epoch: int
    members: tuple[str, ...]
    transcript: bytes
    round: int
    phase: str
    version: int
    receipts: dict[str, Signed]
    agreements: dict[str, Signed]
    burns: tuple[Signed, ...]
    aborted: int
    uncertified: int
    convicted: tuple[str, ...]

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("members", sequence(SITE)),
        ("transcript", DIGEST),
        ("round", ROUND),
        ("phase", text(16)),
        ("version", ROUND),
        ("receipts", mapping(SIGNED)),
        ("agreements", mapping(SIGNED)),
        ("burns", sequence(SIGNED, 65536)),
        ("aborted", ROUND),
        ("uncertified", ROUND),
        ("convicted", sequence(SITE)),
    )

    def dump(self) -> bytes:
        """Canonical bytes."""
        return encode(dump_record(self))


_READIES = mapping(record(Ready))


class CoordinatorRound:
    """The coordinator of one run of one study.

    Args:
        terms: the signed study.
        deadlines: seconds per phase.
        entropy: where the run id comes from.
        patience: fruitless deadlines in a row before `tick` raises AbortedRound; None waits
            for ever. Nothing is lost by raising: the run resumes where it stood.
        record: the last durable record, or None at the first start.
        blob: reads a kept blob; used only here, to resume.
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
    ) -> None:
        self._terms = terms
        self._deadlines = deadlines
        self._patience = patience
        if record is None:
            none = bytes(32)
            self.record = CoordinatorRecord(
                terms.study, entropy.take(32), 0, (), none, 0, "new", 0, {}, {}, (), 0, 0, ()
            )
        else:
            self.record = load_record(
                CoordinatorRecord, decode(record, max_bytes=2**28, max_items=2**22)
            )
        self.chain = Chain.genesis(terms, state_digest(terms.initial))
        self._base = self.chain
        self._link: Link | None = None
        self._opening: Opening | None = None
        self._ready: dict[str, Ready] = {}
        self._heads: dict[str, Head] = {}
        self._sums: list[Words] = []
        self._unmasks: dict[str, Unmask] = {}
        self._known: dict[str, bytes] = {}
        self._accusers: dict[str, set[str]] = {}
        self._burns: dict[str, Signed] = {}
        self._absent: set[str] = set()
        self._joining: set[str] = set()
        self._declined: set[str] = set()
        self._withdrawn: set[str] = set()
        self._behind: set[str] = set()
        self._bytes_up = 0
        self._deadline = 0.0
        self._resend_at = 0.0
        self._began = 0.0
        self._grace_until = math.inf
        self._fruitless = 0
        self._restore(blob)

    def _restore(self, blob: Callable[[str], bytes | None]) -> None:
        """Rebuild what the record's phase needs from the blobs."""
        seen = self.record
        link, base = (blob(name) for name in _chain_blobs(seen.version))
        if seen.version and link is not None and base is not None:
            value = decode(link, max_bytes=self._terms.upload_bytes() * 2, views=True)
            self._link = load_record(Link, value)
            header = self._link.header
            self._base = Chain(
                0,
                header.turn,
                load_state(self._terms, base),
                header.state,
                header.exponents,
                header.prev,
            )
            self.chain = advance(self._terms, self._base, self._link, state_digest)
        if seen.phase in {"upload", "agree", "unmask"}:
            ready = blob(_READY_BLOB)
            if ready is None:
                raise AssertionError("the ready blob is written before its phase is persisted")
            self._ready = _READIES.load(decode(ready, max_bytes=2**30, max_items=2**22))
            self._heads = {v: unpack_body(Head, r.head) for v, r in self._ready.items()}
            self._sums = [lane.zeros() for lane in self._lanes]
        if seen.phase in {"agree", "unmask"}:
            sums = blob(_SUM_BLOB)
            if sums is None:
                raise AssertionError("the sum blob is written before its phase is persisted")
            self._sums = _load_sums(self._lanes, sums)

    # ------------------------------------------------------------ what the run is about now

    @property
    def phase(self) -> str:
        """handshake, ready, upload, agree, unmask, burn or done."""
        return self.record.phase

    def waiting_for(self) -> tuple[str, ...]:
        """The sites whose answer the current phase still needs."""
        return tuple(sorted(self._missing()))

    @property
    def quorum(self) -> int:
        """Q of the study."""
        return self._terms.quorum

    def last_completed(self) -> Completed | None:
        """The last completed round, from its certificate; None before the first."""
        link = self._link
        if link is None:
            return None
        return Completed(
            link.header.round,
            link.header.turn,
            link.header.kind,
            tuple(sorted(link.heads)),
            tuple(sorted(link.roots)),
            0,
            self._metrics(link),
        )

    @property
    def next_wakeup(self) -> float:
        """When `tick` has something to do."""
        return min(self._deadline, self._resend_at, self._grace_until)

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        return self._terms.lanes(self.chain.turn)

    @property
    def _header(self) -> Header:
        seen, chain = self.record, self.chain
        return Header(
            seen.study,
            seen.run,
            seen.transcript,
            seen.round,
            self._terms.kind(chain.turn),
            chain.turn,
            chain.state_digest,
            chain.prev,
            self._lanes,
            chain.exponents,
        )

    def _missing(self) -> set[str]:
        seen = self.record
        if seen.phase == "handshake" and self._opening is not None:
            return self._opening.missing()
        if seen.phase == "ready":
            return set(seen.members) - set(self._ready) - self._declined
        if seen.phase == "upload":
            return set(self._ready) - set(seen.receipts) - self._declined
        if seen.phase == "agree":
            return set(seen.receipts) - set(seen.agreements)
        if seen.phase == "unmask":
            return set(seen.receipts) - set(self._unmasks)
        if seen.phase == "burn":
            return set(self._terms.parties) - set(self._burns)
        return set()

    # ------------------------------------------------------------ entry points

    def start(self, now: float) -> list[Effect]:
        """Begin the run, or go on after a restart."""
        seen = self.record
        if seen.phase == "done":
            return self._finish()
        if seen.phase in {"new", "handshake"}:
            return self._open_epoch(now)
        if seen.phase == "idle":
            return self._begin_round(now)
        note = Note("run.resumed", {"round": seen.round, "kind": self._terms.kind(self.chain.turn)})
        self._set_timers(now)
        return [note, *self._resend(set(self._terms.parties))]

    def handle(self, site: str, payload: bytes, now: float) -> list[Effect]:
        """React to a site's message. Raises ProtocolError, having changed nothing."""
        kind, message = unpack_from_site(payload, self._terms.upload_bytes())
        if site not in self._terms.roster:
            raise ProtocolError(Code.SIGNER_UNKNOWN, f"{site} is not a party of this study.")
        back = site in self._absent and site not in self.record.convicted
        handler = self._HANDLERS[kind]
        effects = handler(self, site, message, now)
        if self.record.phase != "handshake" and site not in self.record.members:
            self._joining.add(site)
        if back:
            self._absent.discard(site)
            note = Note("site.returned", {"site": site, "round": self.record.round})
            effects = [note, *effects]
        return effects

    def tick(self, now: float) -> list[Effect]:
        """Ask again, or close the phase, if its time has come.

        Raises AbortedRound where `patience` deadlines in a row brought nothing.
        """
        if self.record.phase in {"done", "new", "idle"}:
            return []
        if now >= min(self._deadline, self._grace_until):
            return self._phase_over(now)
        if now >= self._resend_at:
            self._resend_at = now + self._phase_seconds() / RESENDS_PER_PHASE
            return self._resend(self._missing())
        return []

    # ------------------------------------------------------------ timers

    def _phase_seconds(self) -> float:
        limits = self._deadlines
        return {
            "handshake": limits.handshake,
            "ready": limits.train,
            "upload": limits.upload,
            "agree": limits.agree,
            "unmask": limits.unmask,
            "burn": limits.agree,
        }[self.record.phase]

    def _set_timers(self, now: float) -> None:
        seconds = self._phase_seconds()
        self._began, self._grace_until = now, math.inf
        self._deadline = now + seconds
        self._resend_at = now + seconds / RESENDS_PER_PHASE

    def _still_waiting(self, now: float) -> bool:
        """Whether the phase stays open: for everybody present, and a little for the absent.

        A site that missed a phase may be back: it gets as long again as the others took, so that
        one dropout does not cost it two rounds, and a dead site does not cost every round a
        whole deadline.
        """
        missing = self._missing()
        if missing - self._absent:
            return True
        if missing and self._grace_until == math.inf:
            self._grace_until = now + max(_LEAST_GRACE, now - self._began)
        return bool(missing) and now < self._grace_until

    def _persist(self, **changes: Any) -> Persist:  # private: named fields of the record
        self.record = replace(self.record, **changes)
        return Persist(self.record.dump())

    def _progress(self) -> None:
        self._fruitless = 0

    def _stall(self, now: float) -> list[Effect]:
        """A deadline that brought nothing: ask again, and give up after `patience` of them."""
        self._fruitless += 1
        self._set_timers(now)
        if self._patience is not None and self._fruitless > self._patience:
            missing = self.waiting_for()
            undecided = self.record.phase in {"agree", "unmask", "burn"}
            raise AbortedRound(
                Code.ROUND_UNDECIDED if undecided else Code.QUORUM_LOST,
                f"Round {self.record.round} waits in phase {self.record.phase} for "
                f"{', '.join(missing)}; {self._terms.quorum} of {len(self._terms.roster)} "
                "are needed.",
            )
        return self._resend(self._missing())

    # ------------------------------------------------------------ handshake

    def _open_epoch(self, now: float, members: set[str] | None = None) -> list[Effect]:
        parties = set(self._terms.parties)
        admitted = parties - self._out
        if len(admitted) < self._terms.quorum:
            convicted = len(parties - set(self.record.convicted)) < self._terms.quorum
            raise AbortedRound(
                Code.DISPUTE_LOST if convicted else Code.QUORUM_LOST,
                f"{', '.join(sorted(self._out))} refused to go on or broke the protocol.",
            )
        chosen = (admitted - self._absent) if members is None else members & admitted
        if len(chosen) < self._terms.quorum:
            chosen = admitted
        epoch = self.record.epoch + 1
        self._opening = Opening(
            self._terms, self.record.study, self.record.run, epoch, tuple(sorted(chosen))
        )
        self._joining.clear()
        first = self.record.phase == "new"
        kept = self._persist(epoch=epoch, phase="handshake", members=(), transcript=bytes(32))
        self._set_timers(now)
        effects: list[Effect] = [kept]
        if first:
            effects.append(
                Note(
                    "run.started",
                    {
                        "run": self.record.run.hex(),
                        "study": self.record.study.hex(),
                        "parties": len(parties),
                        "quorum": self._terms.quorum,
                        "rounds": self._terms.turns,
                        "model": self.chain.state_digest.hex(),
                    },
                )
            )
        return [*effects, *self._resend(chosen)]

    def _on_run_key(self, site: str, message: Signed, _now: float) -> list[Effect]:
        if self._opening is None:
            return []
        return self._forward(self._opening.run_key(site, message))

    def _on_encapsulations(
        self, site: str, message: EncapsulationUpload, _now: float
    ) -> list[Effect]:
        if self._opening is None:
            return []
        return self._forward(self._opening.encapsulations(site, message))

    def _on_confirm(self, site: str, message: Signed, _now: float) -> list[Effect]:
        if self._opening is None:
            return []
        return self._forward(self._opening.confirm(site, message))

    def _on_established(self, site: str, message: Signed, now: float) -> list[Effect]:
        opening = self._opening
        if opening is None or not opening.established(site, message):
            return []
        self._progress()
        self._opening = None
        self._joining -= set(opening.members)
        kept = self._persist(members=opening.members, transcript=opening.transcript, phase="idle")
        note = Note(
            "handshake.completed",
            {
                "transcript": opening.transcript.hex(),
                "present": opening.members,
            },
        )
        return [kept, note, *self._begin_round(now)]

    def _on_dispute(self, site: str, message: Signed, now: float) -> list[Effect]:
        if self._opening is None:
            return []
        culprit, requests = self._opening.dispute(site, message)
        if culprit is None:
            return [SendTo(v, pack(request)) for v, request in requests.items()]
        kept = self._exclude(culprit)
        note = Note(
            "peer.refused",
            {
                "site": culprit,
                "code": Code.DISPUTE_LOST.label,
                "phase": "handshake",
            },
        )
        members = set(self._opening.members) - {culprit}
        return [kept, note, *self._open_epoch(now, members)]

    def _forward(self, messages: Mapping[str, Any]) -> list[Effect]:
        return [SendTo(site, pack(message)) for site, message in messages.items()]

    # ------------------------------------------------------------ a round begins

    def _begin_round(self, now: float) -> list[Effect]:
        if self.chain.turn > self._terms.turns + 1:
            return self._finish()
        # A round that cannot reach the quorum would cost every hospital its budget for
        # nothing: shake hands first with whoever is there.
        members = set(self.record.members)
        few = len(members - self._absent - self._out) < self._terms.quorum
        if few or self._joining or members & set(self.record.convicted):
            return self._open_epoch(now)
        number = self.record.round + 1
        if number > self._terms.rounds:
            raise AbortedRound(
                Code.RUN_STARVED,
                f"{self.record.aborted} rounds were burned; the study allows no round {number}.",
            )
        self._ready, self._heads, self._sums = {}, {}, []
        self._unmasks, self._burns, self._declined = {}, {}, set()
        self._bytes_up = 0
        self._known = {}
        kept = self._persist(round=number, phase="ready", receipts={}, agreements={})
        self._set_timers(now)
        note = Note(
            "round.started",
            {
                "round": number,
                "kind": self._terms.kind(self.chain.turn),
                "header": self._hashed.hex(),
                "model": self.chain.state_digest.hex(),
                "cohort": self.record.members,
            },
        )
        return [kept, note, *self._resend(set(self.record.members))]

    def _round_start(self, *, with_base: bool) -> bytes:
        seen = self.record
        base = memoryview(dump_state(self._terms, self._base.state)) if with_base else None
        return pack(
            RoundStart(
                seen.study,
                seen.run,
                seen.epoch,
                seen.round,
                self._terms.kind(self.chain.turn),
                self._link,
                base,
                seen.burns,
            )
        )

    def _on_ready(self, site: str, message: Ready, now: float) -> list[Effect]:
        seen = self.record
        head: Head = unpack_body(Head, message.head)
        if head.site != site or head.round != seen.round:
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, f"A Ready of {site} is out of order.")
        signature = message.head.signature
        if not verify(self._terms.roster[site], signature, Head.LABEL, message.head.body):
            raise ProtocolError(Code.HEAD_SIGNATURE, f"The head of {site} is forged.")
        known = self._ready.get(site)
        if known is not None and known.head.body != message.head.body:
            raise ProtocolError(
                Code.READY_DUPLICATE, f"{site} sent two different heads.", culprit=site
            )
        if seen.phase != "ready" or known is not None:
            return []
        self._check_ready(site, head, message)
        self._ready[site], self._heads[site] = message, head
        self._absent.discard(site)
        if self._still_waiting(now):
            return []
        return self._close_ready(now)

    def _check_ready(self, site: str, head: Head, message: Ready) -> None:
        if site not in self.record.members or head.header != self._hashed:
            raise ProtocolError(Code.HEAD_MISMATCH, f"{site} is on another round.", culprit=site)
        peers = set(self.record.members) - {site}
        exact = set(head.pairs) == peers and set(message.shares) == peers
        if not exact or digest(labels.BLOB, message.blob) != head.blob:
            raise ProtocolError(Code.HEAD_MISMATCH, f"The Ready of {site} does not fit its head.")
        for v, sealed in message.shares.items():
            promised = head.pairs[v][TAG_BYTES : TAG_BYTES + 32]
            if digest(labels.SEALED_SHARES, sealed) != promised:
                raise ProtocolError(
                    Code.SHARE_UNREADABLE,
                    f"The shares of {site} do not fit its head.",
                    culprit=site,
                )

    def _close_ready(self, now: float) -> list[Effect]:
        """Fix the participants and show them to each other."""
        self._drop_disagreeing()
        if len(self._ready) < self._terms.quorum:
            return self._abort(now, Code.QUORUM_LOST)
        self._progress()
        blob = encode(_READIES.dump(self._ready))
        self._sums = [lane.zeros() for lane in self._lanes]
        absent = sorted(set(self.record.members) - set(self._ready))
        kept = self._persist(phase="upload")
        self._set_timers(now)
        notes = [self._dropped(v, "ready") for v in absent]
        return [PutBlob(_READY_BLOB, (blob,)), kept, *notes, *self._resend(set(self._ready))]

    def _drop_disagreeing(self) -> None:
        """Leave out sites whose pair tags contradict others': masks would not cancel."""
        while True:
            conflicts = dict.fromkeys(self._heads, 0)
            for v, head in self._heads.items():
                for x, other in self._heads.items():
                    if v < x and head.pairs[x][:TAG_BYTES] != other.pairs[v][:TAG_BYTES]:
                        conflicts[v] += 1
                        conflicts[x] += 1
            most = max(conflicts.values(), default=0)
            if most == 0:
                return
            # Nobody can tell who of a pair lies: both go, so a liar leaves with its victim.
            for v in [v for v, count in conflicts.items() if count == most]:
                del self._ready[v], self._heads[v]
                self._joining.add(v)

    def _dropped(self, site: str, phase: str) -> Note:
        self._absent.add(site)
        return Note("site.dropped", {"site": site, "round": self.record.round, "phase": phase})

    # ------------------------------------------------------------ uploads

    @property
    def _hashed(self) -> bytes:
        """The header hash of the round."""
        if "header" not in self._known:
            self._known["header"] = header_hash(self._header)
        return self._known["header"]

    @property
    def _participants(self) -> bytes:
        """The participants hash of the round, fixed once the upload phase began."""
        if "participants" not in self._known:
            heads = {v: head_digest(r.head) for v, r in self._ready.items()}
            self._known["participants"] = participants_hash(self._hashed, heads)
        return self._known["participants"]

    @property
    def _survivors(self) -> bytes:
        """The survivors hash of the round, fixed once the agree phase began."""
        if "survivors" not in self._known:
            self._known["survivors"] = survivors_hash(self._participants, self._roots)
        return self._known["survivors"]

    def _participants_for(self, site: str) -> bytes:
        return pack(
            Participants(
                self.record.round,
                tuple(self._ready[v].head for v in sorted(self._ready)),
                {v: r.shares[site] for v, r in self._ready.items() if v != site},
            )
        )

    def _on_upload(self, site: str, message: Upload, now: float) -> list[Effect]:
        if self.record.phase != "upload" or site in self.record.receipts:
            return []
        if site not in self._ready:
            raise ProtocolError(Code.SIGNER_UNKNOWN, f"{site} is not a participant.")
        receipt: Receipt = unpack_body(Receipt, message.receipt)
        signature = message.receipt.signature
        valid = verify(self._terms.roster[site], signature, Receipt.LABEL, message.receipt.body)
        if not valid or receipt.site != site or receipt.participants != self._participants:
            raise ProtocolError(Code.UPLOAD_SIGNATURE, f"The upload of {site} is not for now.")
        split = split_planes(self._lanes, message.planes)
        trees = [(lane, tree_digest(planes)) for lane, planes in split]
        if upload_root(trees) != receipt.root:
            raise ProtocolError(Code.UPLOAD_DIGEST, f"The upload of {site} was altered.")
        for accumulator, (lane, planes) in zip(self._sums, split, strict=True):
            add_packed(accumulator, planes, lane.bits)
        self._bytes_up += sum(plane.nbytes for plane in message.planes)
        self.record = replace(self.record, receipts={**self.record.receipts, site: message.receipt})
        if self._still_waiting(now):
            return []
        return self._close_uploads(now)

    def _close_uploads(self, now: float) -> list[Effect]:
        """Fix the survivors; the accumulator is durable before anybody hears of them."""
        if len(self.record.receipts) < self._terms.quorum:
            return self._abort(now, Code.QUORUM_LOST)
        self._progress()
        absent = sorted(set(self._ready) - set(self.record.receipts))
        kept = self._persist(phase="agree")
        self._set_timers(now)
        notes = [self._dropped(v, "upload") for v in absent]
        parts = tuple(flat_view(total) for total in self._sums)
        return [PutBlob(_SUM_BLOB, parts), kept, *notes, *self._resend(set(self.record.receipts))]

    # ------------------------------------------------------------ agreements

    @property
    def _roots(self) -> dict[str, bytes]:
        return {v: unpack_body(Receipt, r).root for v, r in self.record.receipts.items()}

    def _on_agree(self, site: str, message: Signed, now: float) -> list[Effect]:
        seen = self.record
        if seen.phase not in {"agree", "unmask"} or site not in seen.receipts:
            return []
        agree: Agree = unpack_body(Agree, message)
        expected = (
            seen.study,
            seen.run,
            seen.round,
            site,
            self._survivors,
        )
        fields = (agree.study, agree.run, agree.round, agree.site, agree.survivors)
        valid = verify(self._terms.roster[site], message.signature, Agree.LABEL, message.body)
        if not valid or fields != expected:
            raise ProtocolError(Code.AGREEMENT_SIGNATURE, f"The agreement of {site} is not valid.")
        if seen.phase == "unmask":
            return [SendTo(site, self._agreements())]
        agreements = {**seen.agreements, site: message}
        if len(agreements) < self._terms.quorum:
            self.record = replace(seen, agreements=agreements)
            return []
        self._progress()
        kept = self._persist(phase="unmask", agreements=agreements)
        self._set_timers(now)
        return [kept, *(SendTo(v, self._agreements()) for v in sorted(agreements))]

    def _agreements(self) -> bytes:
        chosen = sorted(self.record.agreements)[: self._terms.quorum]
        return pack(Agreements(self.record.round, tuple(self.record.agreements[v] for v in chosen)))

    # ------------------------------------------------------------ unmasking

    def _on_unmask(self, site: str, message: Signed, now: float) -> list[Effect]:
        if self.record.phase != "unmask" or site in self._unmasks:
            return []
        unmask: Unmask = unpack_body(Unmask, message)
        opened = self._open_round()
        survivors = self._survivors
        valid = verify(self._terms.roster[site], message.signature, Unmask.LABEL, message.body)
        if not valid or unmask.site != site or unmask.survivors != survivors:
            raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The shares of {site} are not for now.")
        check_unmask(opened, unmask)
        self._unmasks[site] = unmask
        if len(self._unmasks) < self._terms.quorum:
            return []
        return self._complete(now, opened)

    def _open_round(self) -> OpenRound:
        return OpenRound(
            self._hashed,
            self._participants,
            self.record.members,
            self._heads,
            {v: r.blob for v, r in self._ready.items()},
            tuple(sorted(self.record.receipts)),
            self._lanes,
        )

    def _complete(self, now: float, opened: OpenRound) -> list[Effect]:
        answers = [self._unmasks[v] for v in sorted(self._unmasks)]
        sums = self._sums
        try:
            open_sum(self._terms, opened, answers, sums)
        except ProtocolError as error:
            return self._convict(now, error)
        self._progress()
        link = Link(
            self._header,
            {v: head_digest(r.head) for v, r in self._ready.items()},
            self._roots,
            tuple(self.record.agreements[v] for v in sorted(self.record.agreements)),
            tuple(_published(lane, total) for lane, total in zip(self._lanes, sums, strict=True)),
        )
        self._base, self._link = self.chain, link
        survivors = certified_survivors(link)
        self.chain = advance(self._terms, self._base, link, state_digest, survivors)
        seen = self.record
        completed = Completed(
            seen.round,
            link.header.turn,
            link.header.kind,
            tuple(sorted(self._heads)),
            opened.survivors,
            self._bytes_up,
            self._metrics(link),
        )
        note = Note(
            "round.completed",
            {
                "round": seen.round,
                "kind": link.header.kind,
                "uh2": survivors.hex(),
                "commit": self.chain.prev.hex(),
                "model": self.chain.state_digest.hex(),
                "survivors": opened.survivors,
                "dropouts": opened.dropouts,
                "quorum": self._terms.quorum,
                "bytes_up": self._bytes_up,
            },
        )
        # Under this round's own names: until the record says so, the last round's still count.
        link_blob, base_blob = _chain_blobs(seen.round)
        blobs: list[Effect] = [
            PutBlob(base_blob, (dump_state(self._terms, self._base.state),)),
            PutBlob(link_blob, (encode(dump_record(link)),)),
        ]
        old = _chain_blobs(seen.version)
        kept = self._persist(phase="idle", version=seen.round, burns=(), uncertified=0)
        drops: list[Effect] = [DropBlob(name) for name in (_READY_BLOB, _SUM_BLOB, *old)]
        return [*blobs, kept, *drops, note, completed, *self._begin_round(now)]

    def _metrics(self, link: Link) -> NDArray[np.int64] | None:
        for lane, words in zip(link.header.lanes, link.sums, strict=True):
            if lane.lane_id == METRIC_LANE:
                return self._terms.signed_sum(lane, words)
        return None

    def _convict(self, now: float, error: ProtocolError) -> list[Effect]:
        """A dealer's shares are provably wrong: the round stays undecided, the dealer is out."""
        culprit = error.culprit
        if culprit is None:
            raise AssertionError("a sum that does not open names the dealer") from error
        kept = self._exclude(culprit)
        note = Note(
            "peer.refused",
            {
                "site": culprit,
                "code": error.code.label,
                "phase": "unmask",
            },
        )
        return [kept, note, *self._leave_undecided(now)]

    @property
    def _out(self) -> set[str]:
        """Sites without which the run goes on: convicted, or they said that they stop."""
        return self._withdrawn | set(self.record.convicted)

    def _exclude(self, culprit: str) -> Persist:
        """A convicted site takes no further part in this run."""
        self._absent.add(culprit)
        return self._persist(convicted=tuple(sorted({*self.record.convicted, culprit})))

    # ------------------------------------------------------------ when a phase is over

    def _phase_over(self, now: float) -> list[Effect]:
        phase = self.record.phase
        if phase == "handshake":
            return self._handshake_over(now)
        if phase == "ready":
            if len(self._ready) >= self._terms.quorum:
                return self._close_ready(now)
            return self._abort(now, Code.QUORUM_LOST)
        if phase == "upload":
            if len(self.record.receipts) >= self._terms.quorum:
                return self._close_uploads(now)
            return self._abort(now, Code.QUORUM_LOST)
        if phase == "burn" and len(self._burns) >= self._terms.quorum:
            return self._burned(now)
        if phase in {"agree", "unmask", "burn"}:
            return self._leave_undecided(now)
        raise AssertionError(f"no deadline in phase {phase}")

    def _handshake_over(self, now: float) -> list[Effect]:
        opening = self._opening
        if opening is None:
            return self._open_epoch(now)
        missing = opening.missing()
        answered = set(opening.members) - missing
        self._absent |= missing
        if len(answered) >= self._terms.quorum:
            return self._open_epoch(now, answered)
        self._absent.clear()
        self._fruitless += 1
        if self._patience is not None and self._fruitless > self._patience:
            return self._stall(now)
        return self._open_epoch(now, set(self._terms.parties))

    def _abort(self, now: float, code: Code) -> list[Effect]:
        """No agreement can exist yet: collect a quorum's word that none ever will."""
        seen = self.record
        missing = self.waiting_for()
        self._absent |= self._missing()
        phase = seen.phase
        self._burns = {}
        kept = self._persist(phase="burn", aborted=seen.aborted + 1)
        self._set_timers(now)
        note = Note(
            "round.aborted",
            {
                "round": seen.round,
                "kind": self._terms.kind(self.chain.turn),
                "code": code.label,
                "phase": phase,
                "dropouts": missing,
                "quorum": self._terms.quorum,
            },
        )
        aborted = Aborted(seen.round, code, phase, missing)
        return [kept, note, aborted, *self._resend(set(self._terms.parties))]

    def _on_burn(self, site: str, message: Signed, now: float) -> list[Effect]:
        seen = self.record
        if seen.phase != "burn":
            return []
        burn: Burn = unpack_body(Burn, message)
        valid = verify(self._terms.roster[site], message.signature, Burn.LABEL, message.body)
        expected = (seen.study, seen.run, seen.round, site)
        if not valid or (burn.study, burn.run, burn.round, burn.site) != expected:
            raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The burn of {site} is not for now.")
        self._burns[site] = message
        if len(self._burns) < self._terms.quorum:
            return []
        return self._burned(now)

    def _burned(self, now: float) -> list[Effect]:
        self._progress()
        certificate = tuple(self._burns[v] for v in sorted(self._burns))
        kept = self._persist(phase="idle", burns=(*self.record.burns, *certificate))
        note = Note("round.burned", {"round": self.record.round})
        drops: list[Effect] = [DropBlob(_READY_BLOB), DropBlob(_SUM_BLOB)]
        return [kept, note, *drops, *self._begin_round(now)]

    def _leave_undecided(self, now: float) -> list[Effect]:
        """Neither finished nor burned: try once more with fresh noise, else wait."""
        seen = self.record
        rounds_left = seen.round < self._terms.rounds
        enough = len(set(self._terms.parties) - self._missing()) >= self._terms.quorum
        if not (self._terms.private and seen.uncertified == 0 and rounds_left and enough):
            return self._stall(now)
        effects: list[Effect] = []
        if seen.phase != "burn":
            missing = self.waiting_for()
            self._absent |= self._missing()
            effects = [
                Note(
                    "round.aborted",
                    {
                        "round": seen.round,
                        "kind": self._terms.kind(self.chain.turn),
                        "code": Code.ROUND_UNDECIDED.label,
                        "phase": seen.phase,
                        "dropouts": missing,
                        "quorum": self._terms.quorum,
                    },
                ),
                Aborted(seen.round, Code.ROUND_UNDECIDED, seen.phase, missing),
            ]
            self.record = replace(self.record, aborted=seen.aborted + 1)
        kept = self._persist(phase="idle", uncertified=1)
        return [kept, *effects, *self._begin_round(now)]

    # ------------------------------------------------------------ statements at any time

    def _on_hello(self, site: str, message: Signed, now: float) -> list[Effect]:
        hello: Hello = unpack_body(Hello, message)
        valid = verify(self._terms.roster[site], message.signature, Hello.LABEL, message.body)
        if not valid or (hello.study, hello.site) != (self.record.study, site):
            raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The hello of {site} is forged.")
        if site in self.record.convicted:
            return []
        self._absent.discard(site)
        self._withdrawn.discard(site)
        if hello.version < self.record.version:
            self._behind.add(site)
        seen = self.record
        if seen.phase == "done":
            return [SendTo(site, self._finished(with_base=True))]
        if seen.phase == "handshake" and self._opening is not None:
            return self._hello_in_handshake(site, now)
        if site not in seen.members or hello.epoch != seen.epoch:
            self._joining.add(site)
            return []
        return self._resend({site} & self._missing())

    def _hello_in_handshake(self, site: str, now: float) -> list[Effect]:
        """A site that starts anew has lost its ephemeral keys: the epoch starts anew, too."""
        opening = self._opening
        if opening is None or site in opening.missing_keys():
            return self._resend({site})
        return self._open_epoch(now, set(opening.members) | {site})

    def _on_refusal(self, site: str, message: Signed, now: float) -> list[Effect]:
        refusal: Refusal = unpack_body(Refusal, message)
        valid = verify(self._terms.roster[site], message.signature, Refusal.LABEL, message.body)
        if not valid or (refusal.study, refusal.site) != (self.record.study, site):
            raise ProtocolError(Code.MESSAGE_SIGNATURE, f"The refusal of {site} is forged.")
        seen = self.record
        if refusal.code == Code.BASE_NEEDED.label and seen.phase in {"ready", "done"}:
            if site in self._behind:
                return []
            self._behind.add(site)
            if seen.phase == "done":
                return [SendTo(site, self._finished(with_base=True))]
            return self._resend({site})
        fields: dict[str, str | int | tuple[str, ...]] = {
            "site": site,
            "code": refusal.code,
            "round": seen.round,
            "phase": seen.phase,
        }
        note: list[Effect] = [Note("peer.refused", fields)] if _is_code(refusal.code) else []
        note += self._accused(refusal.culprit, site)
        if refusal.code == Code.HANDSHAKE_INCOMPLETE.label:
            self._joining.add(site)
        if refusal.code.startswith(_WITHDRAWS):
            self._withdrawn.add(site)
        if seen.phase in {"ready", "upload"} and refusal.round == seen.round:
            return [*note, *self._without(site, now)]
        return note

    def _accused(self, culprit: str, accuser: str) -> list[Effect]:
        """Write down who blames whom; a site blamed by more than may conspire is left out.

        A single accuser may lie, so nothing follows from one but the record of it.
        """
        if culprit not in self._terms.roster or culprit == accuser:
            return []
        accusers = self._accusers.setdefault(culprit, set())
        accusers.add(accuser)
        note = Note("peer.refused", {"site": culprit, "code": Code.PEER_ACCUSED.label})
        if len(accusers) <= self._terms.colluders:
            return [note]
        return [note, self._exclude(culprit)]

    def _without(self, site: str, now: float) -> list[Effect]:
        """Go on without a site that refused this phase."""
        if site not in self._missing():
            return []
        self._declined.add(site)
        if self._still_waiting(now):
            return []
        return self._phase_over(now)

    def _finish(self) -> list[Effect]:
        kept = self._persist(phase="done")
        note = Note(
            "run.finished",
            {
                "rounds_completed": self.chain.turn - self._terms.first_turn,
                "rounds_aborted": self.record.aborted,
                "model": self.chain.state_digest.hex(),
            },
        )
        farewell = [
            SendTo(v, self._finished(with_base=v in self._behind)) for v in self._terms.parties
        ]
        return [kept, *farewell, note, RunOver(self.chain)]

    def _finished(self, *, with_base: bool) -> bytes:
        base = memoryview(dump_state(self._terms, self._base.state)) if with_base else None
        return pack(Finished(self.record.study, self.record.run, self._link, base))

    # ------------------------------------------------------------ asking (again)

    def _resend(self, sites: set[str]) -> list[Effect]:
        """Ask these sites for what the current phase needs of them."""
        seen = self.record
        ask: Callable[[str], bytes]
        if seen.phase == "handshake":
            opening = self._opening
            return [] if opening is None else self._forward(opening.ask(sites))
        if seen.phase == "ready":
            plain = self._round_start(with_base=False)
            chosen = sites & set(seen.members)
            behind = chosen & self._behind
            based = self._round_start(with_base=True) if behind else plain
            return [SendTo(v, based if v in behind else plain) for v in sorted(chosen)]
        if seen.phase == "upload":
            ask, chosen = self._participants_for, sites & set(self._ready) - set(seen.receipts)
        elif seen.phase == "agree":
            survivors = pack(
                Survivors(seen.round, tuple(seen.receipts[v] for v in sorted(seen.receipts)))
            )
            ask, chosen = (lambda _: survivors), sites & set(seen.receipts) - set(seen.agreements)
        elif seen.phase == "unmask":
            return self._resend_unmask(sites)
        elif seen.phase == "burn":
            request = pack(BurnRequest(seen.study, seen.run, seen.round))
            ask, chosen = (lambda _: request), sites - set(self._burns)
        else:
            return []
        return [SendTo(v, ask(v)) for v in sorted(chosen)]

    def _resend_unmask(self, sites: set[str]) -> list[Effect]:
        """Survivors that never saw the set get it first; they answer with an agreement."""
        seen = self.record
        survivors = pack(
            Survivors(seen.round, tuple(seen.receipts[v] for v in sorted(seen.receipts)))
        )
        agreements = self._agreements()
        chosen = sorted(sites & set(seen.receipts) - set(self._unmasks))
        return [SendTo(v, agreements if v in seen.agreements else survivors) for v in chosen]

    _HANDLERS: ClassVar[
        dict[type[Any], Callable[[CoordinatorRound, str, Any, float], list[Effect]]]
    ] = {
        RunKey: _on_run_key,
        EncapsulationUpload: _on_encapsulations,
        Confirm: _on_confirm,
        Established: _on_established,
        Dispute: _on_dispute,
        Ready: _on_ready,
        Upload: _on_upload,
        Agree: _on_agree,
        Unmask: _on_unmask,
        Burn: _on_burn,
        Hello: _on_hello,
        Refusal: _on_refusal,
    }


def _chain_blobs(version: int) -> tuple[str, str]:
    """Where the link of a completed round and the state it trained from are kept."""
    return f"link-{version}", f"base-{version}"


def _is_code(label: str) -> bool:
    return any(code.label == label for code in Code)


def _published(lane: Lane, total: Words) -> memoryview:
    """A lane's sum as it is published: reduced to the ring."""
    if total.itemsize == 4:  # noqa: PLR2004 - a lane of 24 or 32 bits
        reduce_(total.view(np.uint32), lane.bits)
    return flat_view(total)


def _load_sums(lanes: tuple[Lane, ...], data: bytes) -> list[Words]:
    sums = [lane.zeros() for lane in lanes]
    start = 0
    for total in sums:
        flat_view(total)[:] = data[start : start + total.nbytes]
        start += total.nbytes
    return sums
