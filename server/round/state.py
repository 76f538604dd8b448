"""The coordinator's state in a run, which the handlers of every phase share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from common.crypto.digest import decode
from common.crypto.mask import Words
from common.ports import Tensors
from common.protocol.codec import load_record
from common.protocol.effects import Note, Persist
from common.protocol.terms import Terms
from common.protocol.transcript import (
    Chain,
    head_digest,
    header_hash,
    participants_hash,
    survivors_hash,
)
from common.protocol.wire import Head, Header, Link, Ready, Receipt, Signed, Unmask, unpack_body
from common.secagg.masking import Lane
from common.tensors import state_digest
from server.handshake import Opening
from server.round.record import CoordinatorRecord, chain_blobs

RESENDS_PER_PHASE = 4
# Seconds that a site which missed a phase is waited for at the least, once the others are there.
_LEAST_GRACE = 1.0


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds the coordinator waits in each phase."""

    handshake: float = 120.0
    train: float = 3600.0
    upload: float = 600.0
    agree: float = 120.0
    unmask: float = 120.0


class CoordinatorState:
    """Where the coordinator stands in one run: what is durable, and what it collects now.

    The last link and the state it starts from are read from their blobs when they are sent: each
    is as large as the model.
    """

    def __init__(
        self,
        terms: Terms,
        deadlines: Deadlines,
        record: CoordinatorRecord,
        *,
        patience: int | None,
        blob: Callable[[str], bytes | None],
        keep: Callable[[Tensors], Tensors],
    ) -> None:
        self.terms = terms
        self.deadlines = deadlines
        self.patience = patience
        self.record = record
        self.blob = blob
        self.keep = keep
        self.chain = Chain.genesis(terms, state_digest(terms.initial))
        self.opening: Opening | None = None
        self.ready: dict[str, Ready] = {}
        self.heads: dict[str, Head] = {}
        self.sums: list[Words] = []
        self.unmasks: dict[str, Unmask] = {}
        self.known: dict[str, bytes] = {}
        self.accusers: dict[str, set[str]] = {}
        self.burns: dict[str, Signed] = {}
        self.absent: set[str] = set()
        self.joining: set[str] = set()
        self.declined: set[str] = set()
        self.withdrawn: set[str] = set()
        self.behind: set[str] = set()
        self.bytes_up = 0
        self.deadline = 0.0
        self.resend_at = 0.0
        self.began = 0.0
        self.grace_until = math.inf
        self.fruitless = 0

    @property
    def link(self) -> Link | None:
        """The certificate and the sums of the last completed round, read anew."""
        version = self.record.version
        content = self.blob(chain_blobs(version)[0]) if version else None
        if content is None:
            return None
        value = decode(content, max_bytes=self.terms.upload_bytes() * 2, views=True)
        found: Link = load_record(Link, value)
        return found

    def move(self, chain: Chain) -> None:
        """Stand at `chain`, its model kept where this process keeps models."""
        kept = self.keep(chain.state)
        self.chain = chain if kept is chain.state else replace(chain, state=kept)

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The lanes of this round's uploads."""
        return self.terms.lanes(self.chain.turn)

    @property
    def header(self) -> Header:
        """What this round is about."""
        seen, chain = self.record, self.chain
        return Header(
            seen.study,
            seen.run,
            seen.transcript,
            seen.round,
            self.terms.kind(chain.turn),
            chain.turn,
            chain.state_digest,
            chain.prev,
            self.lanes,
            chain.exponents,
        )

    @property
    def hashed(self) -> bytes:
        """The header hash of the round."""
        if "header" not in self.known:
            self.known["header"] = header_hash(self.header)
        return self.known["header"]

    @property
    def participants(self) -> bytes:
        """The participants hash of the round, fixed once the upload phase began."""
        if "participants" not in self.known:
            heads = {v: head_digest(r.head) for v, r in self.ready.items()}
            self.known["participants"] = participants_hash(self.hashed, heads)
        return self.known["participants"]

    @property
    def survivors(self) -> bytes:
        """The survivors hash of the round, fixed once the agree phase began."""
        if "survivors" not in self.known:
            self.known["survivors"] = survivors_hash(self.participants, self.roots)
        return self.known["survivors"]

    @property
    def roots(self) -> dict[str, bytes]:
        """The survivors' upload roots."""
        return {v: unpack_body(Receipt, r).root for v, r in self.record.receipts.items()}

    @property
    def out(self) -> set[str]:
        """Sites without which the run goes on: convicted, or they said that they stop."""
        return self.withdrawn | set(self.record.spent) | set(self.record.convicted)

    @property
    def exhausted(self) -> bool:
        """Whether so many budgets are spent that no round can reach the quorum any more."""
        return len(self.terms.parties) - len(self.record.spent) < self.terms.quorum

    def missing(self) -> set[str]:
        """The sites whose answer the current phase still needs."""
        seen = self.record
        if seen.phase == "handshake" and self.opening is not None:
            return self.opening.missing()
        if seen.phase == "ready":
            return set(seen.members) - set(self.ready) - self.declined
        if seen.phase == "upload":
            return set(self.ready) - set(seen.receipts) - self.declined
        if seen.phase == "agree":
            return set(seen.receipts) - set(seen.agreements)
        if seen.phase == "unmask":
            return set(seen.receipts) - set(self.unmasks)
        if seen.phase == "burn":
            return set(self.terms.parties) - set(self.burns)
        return set()

    def waiting_for(self) -> tuple[str, ...]:
        """The sites whose answer the current phase still needs."""
        return tuple(sorted(self.missing()))

    def phase_seconds(self) -> float:
        """How long the current phase may take."""
        limits = self.deadlines
        return {
            "handshake": limits.handshake,
            "ready": limits.train,
            "upload": limits.upload,
            "agree": limits.agree,
            "unmask": limits.unmask,
            "burn": limits.agree,
        }[self.record.phase]

    def set_timers(self, now: float) -> None:
        """Begin to count the current phase's time."""
        seconds = self.phase_seconds()
        self.began, self.grace_until = now, math.inf
        self.deadline = now + seconds
        self.ask_again_later(now)

    def ask_again_later(self, now: float) -> None:
        """Fix when the sites that have not answered are asked again."""
        self.resend_at = now + self.phase_seconds() / RESENDS_PER_PHASE

    def still_waiting(self, now: float) -> bool:
        """Whether the phase stays open: for everybody present, and a little for the absent.

        A site that missed a phase may be back: it gets as long again as the others took, so that
        one dropout does not cost it two rounds, and a dead site does not cost every round a
        whole deadline.
        """
        missing = self.missing()
        if missing - self.absent:
            return True
        if missing and self.grace_until == math.inf:
            self.grace_until = now + max(_LEAST_GRACE, now - self.began)
        return bool(missing) and now < self.grace_until

    def progress(self) -> None:
        """Something came: patience begins anew."""
        self.fruitless = 0

    def persist(self, **changes: Any) -> Persist:  # private: named fields of the record
        """Change named fields of the record; the change is durable once executed."""
        self.record = replace(self.record, **changes)
        return Persist(self.record.dump())

    def expect(self, site: str) -> None:
        """Let a site join by a handshake before the next round; a convicted one never does."""
        if site not in self.record.convicted:
            self.joining.add(site)

    def exclude(self, culprit: str) -> Persist:
        """A convicted site takes no further part in this run."""
        self.absent.add(culprit)
        return self.persist(convicted=tuple(sorted({*self.record.convicted, culprit})))

    def dropped(self, site: str, phase: str) -> Note:
        """A site missed this phase."""
        self.absent.add(site)
        return Note("site.dropped", {"site": site, "round": self.record.round, "phase": phase})
