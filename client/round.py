"""The hospital's side of a run as a pure state machine: (state, message) -> effects.

No clock, no disk, no network, no torch: `client.daemon` executes the effects in order and
makes `Persist` durable before any `Send`. Two kinds of state: the `SiteRecord`, which is
persisted (sealed), and the `_Secrets` of the current round, which never touch a disk: a site
that crashes between Ready and Upload is a dropout of that round and nothing else.

A failed check raises ProtocolError and changes nothing: the round stays where it was, so a
damaged or hostile message cannot burn it (docs/PROTOCOL.md, "Failure").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from client.handshake import Handshake
from common.crypto import labels
from common.crypto.digest import decode, digest, encode, expand, hkdf_expand, labelled, tree_digest
from common.crypto.identity import SiteKey, verify
from common.crypto.mask import add_streams
from common.crypto.seal import seal, unseal
from common.crypto.share import split
from common.errors import Code, ProtocolError
from common.ports import Entropy, Tensors
from common.protocol.codec import (
    DIGEST,
    ROUND,
    SITE,
    dump_record,
    load_record,
    mapping,
    octets,
    record,
    sequence,
    text,
)
from common.protocol.effects import DropBlob, Note, Persist, PutBlob
from common.protocol.terms import METRIC_LANE, STATISTIC_LANE, UPDATE_LANE, Terms
from common.protocol.transcript import (
    Chain,
    advance,
    commit,
    count_signers,
    head_digest,
    header_hash,
    link_survivors,
    load_state,
    participants_hash,
    share_commitment,
    survivors_hash,
    upload_root,
    verify_link,
)
from common.protocol.wire import (
    PAIR_BYTES,
    SALT_BYTES,
    SHARE_BYTES,
    TAG_BYTES,
    Agree,
    Agreements,
    Burn,
    BurnRequest,
    ConfirmSet,
    EncapsulationSet,
    EncapsulationUpload,
    Finished,
    HandshakeOpen,
    Head,
    Header,
    Hello,
    Link,
    Participants,
    Ready,
    Receipt,
    Refusal,
    RevealRequest,
    RoundStart,
    RunKeys,
    Signed,
    Survivors,
    Table,
    Unmask,
    Upload,
    Witness,
    pack,
    pack_statement,
    sign,
    unpack_body,
    unpack_from_coordinator,
)
from common.secagg.masking import Lane, masked_planes, planes_over, stream_key, stream_keys
from common.secagg.masking import pack as pack_planes
from common.tensors import state_digest

UPLOAD_BLOB = "upload"
# Two attempts on one model without a burn certificate, and only with DP noise (PROTOCOL.md).
UNCERTIFIED_ATTEMPTS = 2
_NO_RUN = bytes(32)
_OPEN_SHARES = 2 * SHARE_BYTES + 2 * SALT_BYTES


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class SendBlob:
    """Send the kept bytes again."""

    name: str


@dataclass(frozen=True, slots=True)
class Send:
    """Hand the bytes to the transport."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Work:
    """Check approval, reserve the budget, count, train and measure; then call `worked`."""

    round: int
    turn: int
    state: Tensors
    trains: bool
    measures: bool
    counts: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Record in the ledger that this round's update is about to leave."""

    round: int


@dataclass(frozen=True, slots=True)
class Final:
    """The run is over and this is the model."""

    chain: Chain


Effect = Persist | PutBlob | SendBlob | DropBlob | Send | Work | Release | Final | Note


# ---------------------------------------------------------------- durable state


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """What a hospital must remember across a crash; sealed at rest.

    Holds pair keys (ratcheted once per round), the shares received for the open round, and
    what was signed. Never: b, e, pair seeds, ephemeral keys, the update, noise, the sample.
    """

    study: bytes
    run: bytes
    epoch: int
    transcript: bytes
    keys: dict[str, bytes]
    ratchet: int
    round: int
    stage: str
    header: bytes
    participants: bytes
    cohort: tuple[str, ...]
    shares: dict[str, bytes]
    survivors: bytes
    survivor_set: tuple[str, ...]
    sent: dict[str, bytes]
    version: int
    prev: bytes
    attempted: bytes
    attempts: tuple[int, ...]
    agreed: dict[str, bytes]
    burned: tuple[int, ...]
    burns: int
    witnessed: dict[str, Witness]
    ended: str
    confirmed: int

    FIELDS: ClassVar[Table] = (
        ("study", DIGEST),
        ("run", DIGEST),
        ("epoch", ROUND),
        ("transcript", DIGEST),
        ("keys", mapping(octets(32, 32))),
        ("ratchet", ROUND),
        ("round", ROUND),
        ("stage", text(16)),
        ("header", DIGEST),
        ("participants", DIGEST),
        ("cohort", sequence(SITE)),
        ("shares", mapping(octets(_OPEN_SHARES, _OPEN_SHARES))),
        ("survivors", DIGEST),
        ("survivor_set", sequence(SITE)),
        ("sent", mapping(octets(1, 2**24), text(16))),
        ("version", ROUND),
        ("prev", DIGEST),
        ("attempted", DIGEST),
        ("attempts", sequence(ROUND, 4096)),
        ("agreed", mapping(DIGEST, text(16), 4096)),
        ("burned", sequence(ROUND, 2**20)),
        ("burns", ROUND),
        ("witnessed", mapping(record(Witness))),
        ("ended", text(16)),
        ("confirmed", ROUND),
    )

    @staticmethod
    def fresh(study: bytes) -> SiteRecord:
        """The record of a site that has not begun."""
        none = bytes(32)
        return SiteRecord(
            study,
            none,
            0,
            none,
            {},
            0,
            0,
            "idle",
            none,
            none,
            (),
            {},
            none,
            (),
            {},
            0,
            none,
            none,
            (),
            {},
            (),
            0,
            {},
            "",
            0,
        )

    def dump(self) -> bytes:
        """Canonical bytes."""
        return encode(dump_record(self))

    @staticmethod
    def load(data: bytes) -> SiteRecord:
        """The record in `data`; a damaged one is a bug or a broken seal, and surfaces."""
        return load_record(SiteRecord, decode(data, max_bytes=2**28, max_items=2**22))


@dataclass(slots=True)
class _Secrets:
    """Of the open round, in memory only."""

    header: Header
    header_hash: bytes
    self_secret: bytes
    seeds: dict[str, bytes]
    tags: dict[str, bytes]
    own_shares: bytes
    head: Signed
    ready: bytes
    update: NDArray[np.float32] | None
    words: Mapping[int, NDArray[np.int64] | None]


@dataclass(frozen=True, slots=True)
class Worked:
    """What the work gave: update (d,), metric words (m,), the ledger, statistic words (s,)."""

    update: NDArray[np.float32] | None
    metrics: NDArray[np.int64] | None
    ledger: Witness = field(default_factory=lambda: Witness(0, bytes(32)))
    statistics: NDArray[np.int64] | None = None


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
        self._terms = terms
        self._site = site
        self._key = key
        self._entropy = entropy
        self._ledger_contains = ledger_contains
        self.record = SiteRecord.fresh(terms.study) if record is None else SiteRecord.load(record)
        if self.record.study != terms.study:
            raise ProtocolError(
                Code.RUN_SECOND,
                "This folder's journal belongs to another study.",
                remedy="Give each study its own state folder.",
            )
        self._chain: Chain | None = None
        if self.record.version == 0:
            self._chain = Chain.genesis(terms, state_digest(terms.initial))
        self._handshake: Handshake | None = None
        self._secrets: _Secrets | None = None
        self._pending: tuple[Header, bytes] | None = None
        self._about = 0  # the round that the last message named, 0 where it names none

    # ------------------------------------------------------------ entry points

    def hello(self) -> list[Effect]:
        """Tell the coordinator that this site is here and how far it has come."""
        seen = self.record
        statement = Hello(seen.study, self._site, seen.epoch, seen.round, seen.version)
        return [self._say(statement)]

    def handle(self, payload: bytes) -> list[Effect]:
        """React to a coordinator's message. Raises ProtocolError, having changed nothing."""
        self._about = 0
        message = unpack_from_coordinator(payload, self._terms.upload_bytes())
        self._about = getattr(message, "round", 0)
        if self.record.ended:
            raise ProtocolError(Code.RUN_ENDED, f"This site ended the run ({self.record.ended}).")
        handler = self._HANDLERS[type(message)]
        return handler(self, message)

    def refusal(self, code: Code, culprit: str | None) -> list[Effect]:
        """Tell the coordinator, by code alone, that something about a round was refused."""
        study, at = self.record.study, self._about
        statement = Refusal(study, self._site, at, code.label, culprit or "")
        fields: dict[str, str | int | tuple[str, ...]] = {"code": code.label, "round": at}
        if culprit is not None:
            fields["site"] = culprit
        return [Note("peer.refused", fields), self._say(statement)]

    def decline(self, round_number: int) -> list[Effect]:
        """Sit this round out: approval or budget refused the work."""
        if self._pending is None or self._pending[0].round != round_number:
            return []
        self._forget()
        return [self._persist(stage="idle")]

    def end(self, code: Code) -> list[Effect]:
        """End the run at this hospital for good."""
        self._forget()
        self._handshake = None
        closed = self._persist(
            ended=code.label, keys={}, shares={}, sent={}, stage="idle", cohort=(), survivor_set=()
        )
        return [closed, DropBlob(UPLOAD_BLOB), Note("study.stopped", {"reason": code.label})]

    # ------------------------------------------------------------ handshake

    def _open(self, message: HandshakeOpen) -> list[Effect]:
        seen = self.record
        if message.study != seen.study:
            raise ProtocolError(Code.HANDSHAKE_WRONG_STUDY, "A handshake names another study.")
        if seen.run not in {_NO_RUN, message.run}:
            raise ProtocolError(Code.RUN_SECOND, "A second run of this study was offered.")
        if self._handshake is not None and message.epoch == self._handshake.epoch:
            if message.members != self._handshake.members:
                raise ProtocolError(Code.HANDSHAKE_MEMBERS, "An epoch changed its members.")
            return [self._say_signed(type(self._handshake.run_key), self._handshake.signed)]
        if message.epoch <= seen.epoch:
            raise ProtocolError(Code.HANDSHAKE_STALE, f"Epoch {message.epoch} is over.")
        self._check_members(message.members)
        if self._handshake is not None and message.epoch < self._handshake.confirmed_epoch:
            raise ProtocolError(Code.HANDSHAKE_STALE, f"Epoch {message.epoch} is over.")
        # Nobody signed this message: nothing durable follows from it, and the epoch that is
        # in use stays until every member has confirmed the new one.
        self._handshake = Handshake.open(self._terms, self._site, self._key, self._entropy, message)
        return [self._say_signed(type(self._handshake.run_key), self._handshake.signed)]

    def _check_members(self, members: tuple[str, ...]) -> None:
        distinct = list(members) == sorted(set(members))
        known = set(members) <= set(self._terms.roster) and self._site in members
        if not distinct or not known or len(members) < self._terms.quorum:
            raise ProtocolError(
                Code.HANDSHAKE_MEMBERS,
                f"{len(members)} members do not make a quorum of {self._terms.quorum} "
                f"of the study's {len(self._terms.roster)} parties.",
            )

    def _run_keys(self, message: RunKeys) -> list[Effect]:
        statement, ciphertexts = self._current(message.epoch).encapsulate(message.keys)
        return [Send(pack(EncapsulationUpload(statement, ciphertexts)))]

    def _encapsulations(self, message: EncapsulationSet) -> list[Effect]:
        confirm = self._live(message.transcript).finish(message)
        return [self._say(confirm)]

    def _confirmations(self, message: ConfirmSet) -> list[Effect]:
        handshake = self._live(message.transcript)
        loser = handshake.unconfirmed(message.confirmations)
        if loser is not None:
            reveal = handshake.dispute(loser)
            note = Note("peer.refused", {"site": loser, "code": Code.HANDSHAKE_CONFIRMATION.label})
            return [self._kill_epoch(), note, self._say(reveal)]
        established = handshake.established()
        if self.record.transcript == handshake.transcript:
            return [self._say(established)]
        # The new keys replace the old: a round that was not uploaded yet ends here.
        self._forget()
        stage = "idle" if self.record.stage in {"started", "ready"} else self.record.stage
        kept = self._persist(
            run=handshake.run_key.run,
            epoch=handshake.epoch,
            transcript=handshake.transcript,
            keys=handshake.keys,
            ratchet=0,
            stage=stage,
        )
        note = Note(
            "handshake.completed",
            {
                "transcript": handshake.transcript.hex(),
                "present": handshake.members,
            },
        )
        return [kept, note, self._say(established)]

    def _reveal(self, message: RevealRequest) -> list[Effect]:
        handshake = self._live(message.transcript)
        reveal = handshake.dispute(message.peer)
        return [self._kill_epoch(), self._say(reveal)]

    def _kill_epoch(self) -> Persist:
        # Goes before every reveal: keys that anybody may know must never mask anything.
        self._handshake = None
        return self._persist(keys={}, transcript=bytes(32))

    def _current(self, epoch: int) -> Handshake:
        if self._handshake is None or self._handshake.epoch != epoch:
            raise ProtocolError(Code.HANDSHAKE_STALE, f"Epoch {epoch} is not open here.")
        return self._handshake

    def _live(self, transcript: bytes) -> Handshake:
        if self._handshake is None:
            raise ProtocolError(Code.HANDSHAKE_STALE, "No handshake is open here.")
        if self._handshake.transcript != transcript:
            raise ProtocolError(Code.HANDSHAKE_TRANSCRIPT, "Another handshake transcript.")
        return self._handshake

    # ------------------------------------------------------------ A: start

    def _start(self, message: RoundStart) -> list[Effect]:
        self._check_run(message.study, message.run)
        again = self._again(message)
        if again is not None:
            return again
        self._check_epoch(message.epoch)
        chain, survivors = self._chain_for(message.run, message.link, message.base)
        header = self._header(message, chain)
        self._check_retry(chain, header, self._certified(message.burns))
        completed = self._completed(message.link, chain, survivors)
        self._chain = chain
        self._pending = (header, header_hash(header))
        self._secrets = None
        if self._handshake is not None and self._handshake.epoch == self.record.epoch:
            self._handshake = None  # ephemeral keys go at the first round of the epoch
        forgotten = [r for r in self.record.burned if r > chain.version]
        kept = self._persist(
            round=message.round,
            stage="started",
            header=self._pending[1],
            keys=_ratcheted(self.record.keys, self.record.ratchet, message.round),
            ratchet=message.round,
            participants=bytes(32),
            cohort=(),
            shares={},
            survivors=bytes(32),
            survivor_set=(),
            sent={},
            version=chain.version,
            prev=chain.prev,
            agreed={k: v for k, v in self.record.agreed.items() if int(k) > chain.version},
            burned=tuple(forgotten),
        )
        work = Work(
            message.round,
            chain.turn,
            chain.state,
            trains=header.kind == "train",
            measures=self._terms.measures(chain.turn),
            counts=header.kind == "statistics",
        )
        note = Note(
            "round.started",
            {
                "round": message.round,
                "kind": header.kind,
                "model": chain.state_digest.hex(),
                "header": self._pending[1].hex(),
            },
        )
        return [kept, DropBlob(UPLOAD_BLOB), *completed, note, work]

    def _again(self, message: RoundStart) -> list[Effect] | None:
        """The answer to a repeated RoundStart, or None where the round is new."""
        seen = self.record
        if message.round > seen.round:
            return None
        if message.round < seen.round:
            raise ProtocolError(Code.ROUND_REPLAY, f"Round {message.round} is over.")
        if self._secrets is not None:
            return [Send(self._secrets.ready)]
        if seen.stage in {"uploaded", "agreed", "done"}:
            return []  # a late copy: the coordinator has gone on
        raise ProtocolError(Code.ROUND_REPLAY, f"Round {message.round} was begun before.")

    def _check_run(self, study: bytes, run: bytes) -> bytes:
        """The run that a message names: this site's own, or the study's where it has none yet.

        A site that missed every handshake can still swear that it never agreed in a round,
        and can still check the certificate of the final model.
        """
        if study != self.record.study or self.record.run not in {_NO_RUN, run}:
            raise ProtocolError(Code.ROUND_WRONG_RUN, "A message names another study or run.")
        return run

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.record.epoch or not self.record.keys:
            raise ProtocolError(
                Code.HANDSHAKE_INCOMPLETE, f"Epoch {epoch} is not established at this site."
            )

    def _chain_for(
        self, run: bytes, link: Link | None, base: memoryview | None
    ) -> tuple[Chain, bytes]:
        """The chain this round builds on, every step of it checked, and its survivors hash."""
        seen, chain = self.record, self._chain
        if link is None:
            if seen.version:
                raise ProtocolError(Code.LINK_STALE, "A newer model was applied here before.")
            if chain is None or chain.version:
                raise ProtocolError(Code.LINK_MISSING, "The last round's link is missing.")
            return chain, b""
        at = link.header.round
        if at < seen.version:
            raise ProtocolError(Code.LINK_STALE, f"Round {at} is older than what was applied.")
        survivors = verify_link(self._terms, run, link)
        self._check_contradiction(link, survivors)
        if at == seen.version:
            # The certificate does not cover the aggregate. Once a quorum has shown the same
            # one this site holds on to it; before that, a damaged one can be replaced.
            same = commit(survivors, link.sums) == seen.prev
            if not same and at == seen.confirmed:
                raise ProtocolError(Code.LINK_EQUIVOCATION, f"Another aggregate of round {at}.")
            if same and chain is not None and chain.version == at:
                return chain, survivors
            chain = None
        if chain is None or chain.state_digest != link.header.state:
            chain = self._from_base(link, base)
        return advance(self._terms, chain, link, state_digest, survivors), survivors

    def _completed(self, link: Link | None, chain: Chain, survivors: bytes) -> list[Effect]:
        """The audit event of a link that is new here."""
        if link is None or chain.prev == self.record.prev:
            return []
        return [
            Note(
                "round.completed",
                {
                    "round": link.header.round,
                    "kind": link.header.kind,
                    "uh2": survivors.hex(),
                    "commit": chain.prev.hex(),
                    "model": chain.state_digest.hex(),
                    "survivors": link_survivors(link),
                    "dropouts": tuple(sorted(set(link.heads) - set(link.roots))),
                    "quorum": self._terms.quorum,
                },
            )
        ]

    def _check_contradiction(self, link: Link, survivors: bytes) -> None:
        signed = self.record.agreed.get(str(link.header.round))
        if signed is not None and signed != survivors:
            raise ProtocolError(Code.LINK_EQUIVOCATION, "A link contradicts this site's agreement.")

    def _from_base(self, link: Link, base: memoryview | None) -> Chain:
        if base is None:
            raise ProtocolError(Code.BASE_NEEDED, "This site needs the certified state.")
        header = link.header
        state = load_state(self._terms, base)
        if state_digest(state) != header.state:
            raise ProtocolError(Code.LINK_STATE, "The state served is not the certified one.")
        return Chain(0, header.turn, state, header.state, header.exponents, header.prev)

    def _header(self, message: RoundStart, chain: Chain) -> Header:
        terms, seen = self._terms, self.record
        if message.round > terms.rounds or chain.turn > terms.turns + 1:
            raise ProtocolError(
                Code.ROUND_TOO_MANY, f"The study allows {terms.rounds} rounds, not more."
            )
        if message.kind != terms.kind(chain.turn):
            raise ProtocolError(Code.ROUND_KIND, f"Turn {chain.turn} is not to {message.kind}.")
        return Header(
            seen.study,
            seen.run,
            seen.transcript,
            message.round,
            message.kind,
            chain.turn,
            chain.state_digest,
            chain.prev,
            terms.lanes(chain.turn),
            chain.exponents,
        )

    def _check_retry(self, chain: Chain, header: Header, certified: set[int]) -> None:
        """Training the same model again needs proof that the earlier upload was never opened.

        Without it, two aggregates of one model with one hospital's difference reveal that
        hospital's update (PROTOCOL.md, "Burning"). The rounds since the last aggregate that
        this site did not see need that proof, too.
        """
        seen = self.record
        if seen.burns > self._terms.burns_tolerated:
            raise ProtocolError(Code.BURNS_EXHAUSTED, f"{seen.burns} rounds were burned.")
        if header.round in seen.burned:
            raise ProtocolError(Code.AGREE_AFTER_BURN, f"Round {header.round} was burned here.")
        allowed = UNCERTIFIED_ATTEMPTS if self._terms.private else 1
        attempted = digest(labels.ATTEMPT, header.kind, header.turn, chain.state_digest)
        uncertified = set(seen.attempts) - certified if attempted == seen.attempted else set()
        if len(uncertified) >= allowed:
            raise ProtocolError(
                Code.RETRY_UNCERTIFIED,
                f"Rounds {sorted(uncertified)} used this model and are not certified as burned.",
            )
        skipped = set(range(chain.version + 1, header.round)) - certified
        if len(skipped) >= allowed:
            raise ProtocolError(
                Code.BURN_CERTIFICATE,
                f"Rounds {sorted(skipped)[:8]} were skipped and are not certified as burned.",
            )

    def _certified(self, burns: Sequence[Signed]) -> set[int]:
        """The rounds that a quorum swore never to agree in."""
        by_round: dict[int, list[Signed]] = {}
        for signed in burns:
            burn: Burn = unpack_body(Burn, signed)
            by_round.setdefault(burn.round, []).append(signed)
        seen, quorum = self.record, self._terms.quorum
        return {
            at
            for at, group in by_round.items()
            if len(count_signers(self._terms, group, Burn, (seen.study, seen.run, at))) >= quorum
        }

    # ------------------------------------------------------------ B: ready

    def worked(self, round_number: int, result: Worked) -> list[Effect]:
        """Commit to fresh secrets and share them, once the work is done."""
        if self._pending is None or self._pending[0].round != round_number:
            return []
        header, hashed = self._pending
        terms, site = self._terms, self._site
        peers = sorted(self.record.keys)
        secret, recovery = self._entropy.take(32), self._entropy.take(32)
        purpose = labelled(labels.ROUND_SEED, hashed)
        seeds = {v: hkdf_expand(self.record.keys[v], purpose) for v in peers}
        tags = {v: expand(seeds[v], labels.PAIR_TAG, length=TAG_BYTES) for v in peers}
        blob = seal(
            expand(recovery, labels.BLOB_KEY, hashed, site),
            b"".join(seeds[v] for v in peers),
            hashed,
            site,
        )
        self_commitment = digest(labels.SELF_COMMITMENT, hashed, site, secret)
        recovery_commitment = digest(labels.RECOVERY_COMMITMENT, hashed, site, recovery)
        points = {v: terms.point(v) for v in terms.parties}
        self_shares = split(secret, terms.quorum, tuple(points.values()), self._entropy)
        recovery_shares = split(recovery, terms.quorum, tuple(points.values()), self._entropy)
        salts = self._entropy.take(2 * SALT_BYTES * (len(peers) + 1))
        sealed: dict[str, bytes] = {}
        pairs: dict[str, bytes] = {}
        opened: dict[str, bytes] = {}
        for index, v in enumerate([*peers, site]):
            salt = salts[2 * SALT_BYTES * index : 2 * SALT_BYTES * (index + 1)]
            opened[v] = self_shares[points[v]] + recovery_shares[points[v]] + salt
        for v in peers:
            key = _share_key(
                self.record.keys[v], hashed, site, v, self_commitment, recovery_commitment
            )
            sealed[v] = seal(key, opened[v], hashed, site, v)
            shares_digest = digest(labels.SEALED_SHARES, sealed[v])
            pairs[v] = tags[v] + shares_digest + share_commitments(hashed, site, v, opened[v])
        head = Head(
            hashed,
            header.round,
            site,
            self_commitment,
            recovery_commitment,
            digest(labels.BLOB, blob),
            self._entropy.take(32),
            share_commitments(hashed, site, site, opened[site]),
            pairs,
            result.ledger,
            dict(self.record.witnessed),
        )
        signed = sign(self._key, head)
        ready = pack(Ready(signed, blob, sealed))
        self._secrets = _Secrets(
            header,
            hashed,
            secret,
            seeds,
            tags,
            opened[site],
            signed,
            ready,
            result.update,
            {METRIC_LANE: result.metrics, STATISTIC_LANE: result.statistics},
        )
        self._pending = None
        # Nothing to persist: what is new is in memory only, and a crash now makes a dropout.
        self.record = replace(self.record, stage="ready")
        return [Send(ready)]

    # ------------------------------------------------------------ C, D: participants -> upload

    def _participants(self, message: Participants) -> list[Effect]:
        seen = self.record
        if message.round in seen.burned:
            raise ProtocolError(Code.AGREE_AFTER_BURN, f"Round {message.round} was burned here.")
        if message.round != seen.round or seen.stage not in {"ready", "uploaded", "agreed", "done"}:
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Participants out of order.")
        digests = {self._head_of(head).site: head_digest(head) for head in message.heads}
        participants = participants_hash(seen.header, digests)
        if seen.stage != "ready":
            if participants != seen.participants:
                raise ProtocolError(
                    Code.PARTICIPANTS_EQUIVOCATED, "Another set of participants was shown."
                )
            return [SendBlob(UPLOAD_BLOB)]
        if self._secrets is None:
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "This site crashed in this round.")
        heads = self._check_heads(message)
        shares = self._open_shares(message, heads)
        witnessed = self._check_ledgers(heads)
        return self._mask(participants, heads, shares, witnessed)

    def _head_of(self, signed: Signed) -> Head:
        head: Head = unpack_body(Head, signed)
        return head

    def _check_heads(self, message: Participants) -> dict[str, Head]:
        secrets = self._secrets
        if secrets is None:
            raise AssertionError("participants are checked in the ready stage only")
        heads: dict[str, Head] = {}
        for signed in message.heads:
            head = self._head_of(signed)
            public = self._terms.roster.get(head.site)
            known = head.site == self._site or head.site in self.record.keys
            if public is None or not known or head.site in heads:
                raise ProtocolError(
                    Code.PARTICIPANTS_UNKNOWN, f"{head.site} is no member of this epoch."
                )
            if not verify(public, signed.signature, Head.LABEL, signed.body):
                raise ProtocolError(Code.HEAD_SIGNATURE, f"The head of {head.site} is forged.")
            if head.header != secrets.header_hash or head.round != self.record.round:
                raise ProtocolError(
                    Code.HEAD_MISMATCH,
                    f"{head.site} is on another model or round.",
                    culprit=head.site,
                )
            heads[head.site] = head
        if self._site not in heads:
            raise ProtocolError(Code.PARTICIPANTS_WITHOUT_ME, "This site is not a participant.")
        if len(heads) < self._terms.quorum:
            raise ProtocolError(
                Code.PARTICIPANTS_QUORUM, f"{len(heads)} participants, {self._terms.quorum} needed."
            )
        if not any(signed == secrets.head for signed in message.heads):
            raise ProtocolError(Code.HEAD_ALTERED, "This site's own head was altered.")
        return heads

    def _open_shares(self, message: Participants, heads: Mapping[str, Head]) -> dict[str, bytes]:
        """Decrypt and check every dealer's shares for this site before anything is uploaded."""
        secrets = self._secrets
        if secrets is None:
            raise AssertionError("shares are opened in the ready stage only")
        hashed, site = secrets.header_hash, self._site
        shares = {site: secrets.own_shares}
        for v, head in heads.items():
            if v == site:
                continue
            pair = head.pairs.get(site, b"")
            if pair[:TAG_BYTES] != secrets.tags[v]:
                raise ProtocolError(Code.HEAD_TAG, f"No common seed with {v}.", culprit=v)
            sealed = message.shares.get(v, b"")
            key = _share_key(
                self.record.keys[v],
                hashed,
                v,
                site,
                head.self_commitment,
                head.recovery_commitment,
            )
            if digest(labels.SEALED_SHARES, sealed) != pair[TAG_BYTES : TAG_BYTES + 32]:
                raise ProtocolError(Code.SHARE_UNREADABLE, f"The share of {v} was altered.")
            opened = _opened(key, sealed, hashed, v, site)
            if share_commitments(hashed, v, site, opened) != pair[TAG_BYTES + 32 : PAIR_BYTES]:
                raise ProtocolError(
                    Code.SHARE_COMMITMENT,
                    f"{v} dealt another share than it committed to.",
                    culprit=v,
                )
            shares[v] = opened
        return shares

    def _check_ledgers(self, heads: Mapping[str, Head]) -> dict[str, Witness]:
        """Compare everybody's ledger with what was seen before; raises on a rollback."""
        self._check_own_ledger(heads)
        witnessed = dict(self.record.witnessed)
        for v, head in heads.items():
            if v == self._site:
                continue
            before = witnessed.get(v)
            if before is not None and (
                head.ledger.counter < before.counter
                or (head.ledger.counter == before.counter and head.ledger.head != before.head)
            ):
                raise ProtocolError(
                    Code.LEDGER_ROLLBACK_PEER,
                    f"{v} shows {head.ledger.counter} ledger rows after {before.counter}.",
                    culprit=v,
                )
            witnessed[v] = head.ledger
        return witnessed

    def _check_own_ledger(self, heads: Mapping[str, Head]) -> None:
        """Compare what the others have witnessed with this site's ledger.

        Up to c peers may lie together: they stop this site for the round and are named. More
        than c of them cannot all lie: the ledger was rolled back, and the run ends here.
        """
        said = {
            v: (mine.counter, mine.head)
            for v, head in heads.items()
            if v != self._site and (mine := head.witnessed.get(self._site)) is not None
        }
        # Honest peers have all witnessed the same row: it is looked up once.
        missing = {row for row in set(said.values()) if not self._ledger_contains(*row)}
        accusers = [v for v, row in said.items() if row in missing]
        if not accusers:
            return
        proven = len(accusers) > self._terms.colluders
        raise ProtocolError(
            Code.LEDGER_ROLLBACK,
            f"{', '.join(accusers)} witnessed rows of this site's ledger that are not there.",
            culprit=None if proven else accusers[0],
        )

    def _mask(
        self,
        participants: bytes,
        heads: Mapping[str, Head],
        shares: dict[str, bytes],
        witnessed: dict[str, Witness],
    ) -> list[Effect]:
        secrets = self._secrets
        if secrets is None:
            raise AssertionError("masking happens in the ready stage only")
        peers = [v for v in sorted(heads) if v != self._site]
        seeds = [secrets.seeds[v] for v in peers]
        signs = [1, *(1 if self._site < v else -1 for v in peers)]
        planes: list[Any] = []
        trees: list[tuple[Lane, bytes]] = []
        for lane in secrets.header.lanes:
            keys = [
                stream_key(secrets.self_secret, labels.SELF_STREAM, lane, participants),
                *stream_keys(seeds, labels.PAIR_STREAM, lane, participants),
            ]
            lane_planes, tree = self._masked(lane, secrets, keys, signs)
            planes.extend(lane_planes)
            trees.append((lane, tree))
        root = upload_root(trees)
        receipt = sign(self._key, Receipt(participants, self._site, root))
        upload = Upload(receipt, tuple(memoryview(plane).cast("B") for plane in planes))
        self._secrets = None  # b, the seeds and the update end here
        attempted = self._attempt(secrets.header)
        kept = self._persist(
            stage="uploaded",
            confirmed=self.record.version,
            participants=participants,
            cohort=tuple(sorted(heads)),
            shares=shares,
            witnessed=witnessed,
            attempted=attempted[0],
            attempts=attempted[1],
            # Nothing after the upload needs this round's pair keys: the ratchet ends them here.
            keys=_ratcheted(self.record.keys, self.record.ratchet, self.record.round + 1),
            ratchet=self.record.round + 1,
        )
        payload = pack(upload)
        note = Note(
            "round.uploaded",
            {
                "round": secrets.header.round,
                "kind": secrets.header.kind,
                "uh1": participants.hex(),
                "root": root.hex(),
                "bytes_up": len(payload),
            },
        )
        return [
            PutBlob(UPLOAD_BLOB, (payload,)),
            kept,
            Release(secrets.header.round),
            note,
            Send(payload),
        ]

    def _masked(
        self, lane: Lane, secrets: _Secrets, keys: Sequence[bytes], signs: Sequence[int]
    ) -> tuple[Sequence[Any], bytes]:
        """One lane's masked planes and their tree digest."""
        if lane.lane_id in secrets.words:
            counted = secrets.words[lane.lane_id]
            if counted is None or counted.shape != (lane.length,):
                raise AssertionError("a lane of words has words of the study's length")
            words = counted.view(np.uint64).copy()
            add_streams(words, keys, signs)
            planes = pack_planes(words, lane.bits)
            return planes, tree_digest(planes)
        if lane.lane_id != UPDATE_LANE or secrets.update is None:
            raise AssertionError("a training round has an update")
        weight = np.float32(self._terms.weights[self._site])
        update = secrets.update if weight == 1 else secrets.update * weight
        return masked_planes(
            update,
            exponents=secrets.header.exponents,
            sizes=self._terms.layout.sizes,
            bits=lane.bits,
            parties=len(self._terms.roster),
            keys=keys,
            signs=signs,
            out=planes_over(update, lane.bits),
        )

    def _attempt(self, header: Header) -> tuple[bytes, tuple[int, ...]]:
        seen = self.record
        attempted = digest(labels.ATTEMPT, header.kind, header.turn, header.state)
        earlier = seen.attempts if attempted == seen.attempted else ()
        return attempted, (*earlier, header.round)

    # ------------------------------------------------------------ E, F: survivors -> agree

    def _survivors(self, message: Survivors) -> list[Effect]:
        seen = self.record
        if message.round in seen.burned:
            raise ProtocolError(Code.AGREE_AFTER_BURN, f"Round {message.round} was burned here.")
        if message.round != seen.round or seen.stage not in {"uploaded", "agreed", "done"}:
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Survivors out of order.")
        roots = self._check_receipts(message)
        survivors = survivors_hash(seen.participants, roots)
        if seen.stage != "uploaded":
            if survivors != seen.survivors:
                raise ProtocolError(
                    Code.SURVIVORS_EQUIVOCATED, "Another set of survivors was shown."
                )
            return [Send(seen.sent["agree"])]
        agree = sign(self._key, Agree(seen.study, seen.run, seen.round, self._site, survivors))
        payload = pack_statement(Agree, agree)
        kept = self._persist(
            stage="agreed",
            survivors=survivors,
            survivor_set=tuple(sorted(roots)),
            sent={"agree": payload},
            agreed={**seen.agreed, str(seen.round): survivors},
        )
        note = Note("round.agreed", {"round": seen.round, "uh2": survivors.hex()})
        return [kept, note, Send(payload)]

    def _check_receipts(self, message: Survivors) -> dict[str, bytes]:
        seen = self.record
        roots: dict[str, bytes] = {}
        for signed in message.receipts:
            receipt: Receipt = unpack_body(Receipt, signed)
            v = receipt.site
            if v not in seen.cohort or v in roots:
                raise ProtocolError(Code.SURVIVORS_UNKNOWN, f"{v} was not a participant.")
            valid = verify(self._terms.roster[v], signed.signature, Receipt.LABEL, signed.body)
            if not valid or receipt.participants != seen.participants:
                raise ProtocolError(
                    Code.RECEIPT_SIGNATURE, f"The receipt of {v} is not for these participants."
                )
            roots[v] = receipt.root
        if self._site not in roots:
            raise ProtocolError(Code.SURVIVORS_WITHOUT_ME, "This site is not a survivor.")
        if len(roots) < self._terms.quorum:
            raise ProtocolError(
                Code.SURVIVORS_QUORUM, f"{len(roots)} survivors, {self._terms.quorum} needed."
            )
        return roots

    # ------------------------------------------------------------ G, H: agreements -> unmask

    def _agreements(self, message: Agreements) -> list[Effect]:
        seen = self.record
        if message.round != seen.round or seen.stage not in {"agreed", "done"}:
            raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Agreements out of order.")
        if seen.stage == "done":
            return [Send(seen.sent["unmask"])]
        self._check_agreements(message)
        unmask = Unmask(
            seen.survivors,
            self._site,
            {v: _self_share(seen.shares[v]) for v in seen.survivor_set},
            {v: _recovery_share(seen.shares[v]) for v in seen.cohort if v not in seen.survivor_set},
        )
        payload = pack_statement(Unmask, sign(self._key, unmask))
        # The shares received for this round end here.
        kept = self._persist(stage="done", shares={}, sent={**seen.sent, "unmask": payload})
        note = Note("round.unmasked", {"round": seen.round, "uh2": seen.survivors.hex()})
        return [kept, note, Send(payload)]

    def _check_agreements(self, message: Agreements) -> None:
        seen = self.record
        signers: set[str] = set()
        for signed in message.agreements:
            agree: Agree = unpack_body(Agree, signed)
            v = agree.site
            if v not in seen.survivor_set or v in signers:
                raise ProtocolError(Code.AGREEMENT_SIGNER, f"{v} is not a survivor.")
            fields = (agree.study, agree.run, agree.round, agree.survivors)
            valid = verify(self._terms.roster[v], signed.signature, Agree.LABEL, signed.body)
            if not valid or fields != (seen.study, seen.run, seen.round, seen.survivors):
                raise ProtocolError(
                    Code.AGREEMENT_SIGNATURE, f"The agreement of {v} is not for these survivors."
                )
            signers.add(v)
        if len(signers) < self._terms.quorum:
            raise ProtocolError(
                Code.AGREEMENT_QUORUM, f"{len(signers)} agreements, {self._terms.quorum} needed."
            )

    # ------------------------------------------------------------ burning and the end

    def _burn(self, message: BurnRequest) -> list[Effect]:
        run = self._check_run(message.study, message.run)
        seen = self.record
        at = message.round
        if str(at) in seen.agreed:
            raise ProtocolError(Code.BURN_AFTER_AGREE, f"This site agreed in round {at}.")
        if at > self._terms.rounds:
            raise ProtocolError(Code.ROUND_TOO_MANY, f"The study has no round {at}.")
        if at <= seen.version:
            raise ProtocolError(Code.ROUND_REPLAY, f"Round {at} was completed.")
        payload = pack_statement(Burn, sign(self._key, Burn(seen.study, run, at, self._site)))
        if at in seen.burned:
            return [Send(payload)]
        effects: list[Effect] = []
        burned = (*seen.burned, at)
        changes: dict[str, Any] = {"burned": burned, "burns": seen.burns + 1}
        if at == seen.round:
            self._forget()
            changes |= {
                "stage": "burned",
                "shares": {},
                "sent": {},
                "ratchet": at + 1,
                "keys": _ratcheted(seen.keys, seen.ratchet, at + 1),
            }
            effects.append(DropBlob(UPLOAD_BLOB))
        kept = self._persist(**changes)
        return [kept, *effects, Note("round.burned", {"round": at}), Send(payload)]

    def _finished(self, message: Finished) -> list[Effect]:
        run = self._check_run(message.study, message.run)
        chain, survivors = self._chain_for(run, message.link, message.base)
        if chain.turn <= self._terms.turns + 1:
            raise ProtocolError(Code.ROUND_KIND, f"The study is not over at turn {chain.turn}.")
        completed = self._completed(message.link, chain, survivors)
        self._chain = chain
        self._forget()
        kept = self._persist(
            run=run,
            version=chain.version,
            prev=chain.prev,
            keys={},
            shares={},
            sent={},
            stage="idle",
        )
        note = Note("run.finished", {"model": chain.state_digest.hex()})
        return [kept, DropBlob(UPLOAD_BLOB), *completed, note, Final(chain)]

    # ------------------------------------------------------------ saying and storing

    def _persist(self, **changes: Any) -> Persist:  # private: named fields of SiteRecord
        self.record = replace(self.record, **changes)
        return Persist(self.record.dump())

    def _forget(self) -> None:
        self._secrets = None
        self._pending = None

    def _say(self, statement: Any) -> Send:
        return self._say_signed(type(statement), sign(self._key, statement))

    def _say_signed(self, kind: type[Any], signed: Signed) -> Send:
        return Send(pack_statement(kind, signed))

    _HANDLERS: ClassVar[dict[type[Any], Callable[[SiteRound, Any], list[Effect]]]] = {
        HandshakeOpen: _open,
        RunKeys: _run_keys,
        EncapsulationSet: _encapsulations,
        ConfirmSet: _confirmations,
        RevealRequest: _reveal,
        RoundStart: _start,
        Participants: _participants,
        Survivors: _survivors,
        Agreements: _agreements,
        BurnRequest: _burn,
        Finished: _finished,
    }


# ---------------------------------------------------------------- pure helpers


def share_commitments(header: bytes, dealer: str, holder: str, opened: bytes) -> bytes:
    """The salted commitments to a holder's self share and recovery share, 64 bytes."""
    if len(opened) != _OPEN_SHARES:
        raise ProtocolError(Code.SHARE_UNREADABLE, f"The share of {dealer} has a wrong length.")
    return share_commitment(
        labels.SHARE_SELF, header, dealer, holder, _self_share(opened)
    ) + share_commitment(labels.SHARE_RECOVERY, header, dealer, holder, _recovery_share(opened))


def _opened(key: bytes, sealed: bytes, header: bytes, dealer: str, holder: str) -> bytes:
    """A dealer's shares; it signed the digest of these very bytes, so failing is its fault."""
    try:
        return unseal(key, sealed, header, dealer, holder)
    except ProtocolError:
        raise ProtocolError(
            Code.SHARE_UNREADABLE, f"The share of {dealer} does not open.", culprit=dealer
        ) from None


def _self_share(opened: bytes) -> bytes:
    return opened[:SHARE_BYTES] + opened[2 * SHARE_BYTES : 2 * SHARE_BYTES + SALT_BYTES]


def _recovery_share(opened: bytes) -> bytes:
    return opened[SHARE_BYTES : 2 * SHARE_BYTES] + opened[2 * SHARE_BYTES + SALT_BYTES :]


def _share_key(
    pair: bytes,
    header: bytes,
    dealer: str,
    holder: str,
    self_commitment: bytes,
    recovery_commitment: bytes,
) -> bytes:
    # The commitments are in the key: a rolled-back dealer that deals again uses another key.
    return expand(
        pair, labels.SHARE_KEY, header, dealer, holder, self_commitment, recovery_commitment
    )


def _ratcheted(keys: Mapping[str, bytes], start: int, stop: int) -> dict[str, bytes]:
    """The pair keys moved forward from round index `start` to `stop`; there is no way back."""
    moved = dict(keys)
    for index in range(start, stop):
        purpose = labelled(labels.RATCHET, index)
        moved = {v: hkdf_expand(key, purpose) for v, key in moved.items()}
    return moved
