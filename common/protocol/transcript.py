"""The hashes that bind a round, as every party computes them (docs/PROTOCOL.md, "Transcript").

handshake transcript rt -> header hash hh -> participants hash uh1 -> survivors hash uh2 -> commit.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.crypto import labels
from common.crypto.digest import digest, expand, flat_view, tree_digest
from common.crypto.identity import verify
from common.errors import Code, ProtocolError
from common.ports import Tensors
from common.protocol.codec import dump_record
from common.protocol.effects import Note
from common.protocol.terms import METRIC_LANE, Terms
from common.protocol.wire import TAG_BYTES, Agree, Burn, Header, Link, Refusal, Signed, unpack_body
from common.secagg.masking import Lane

GENESIS = bytes(32)
# What a site says whose patients' budgets allow no further round of this study.
SPENT = frozenset({Code.BUDGET_EXCEEDED.label, Code.BUDGET_STUDY.label, Code.BUDGET_PLAN.label})


def handshake_transcript(study: bytes, run: bytes, epoch: int, bodies: Iterable[bytes]) -> bytes:
    """rt: the study, the run, the epoch and every member's run key, in order of site."""
    return digest(labels.HANDSHAKE, study, run, epoch, tuple(bodies))


def header_hash(header: Header) -> bytes:
    """hh: everything two sites must agree on for their masks to cancel."""
    return digest(labels.HEADER, *dump_record(header))


def head_digest(head: Signed) -> bytes:
    """The digest of a site's head."""
    return digest(labels.HEAD, head.body)


def participants_hash(header: bytes, heads: Mapping[str, bytes]) -> bytes:
    """uh1: the header hash and the digest of every participant's head."""
    return digest(labels.PARTICIPANTS, header, dict(heads))


def upload_root(lanes: Sequence[tuple[Lane, bytes]]) -> bytes:
    """The root of an upload: number, width, length and tree digest of every lane.

    Guarantee: no plane can be dropped, swapped, resized or moved to another lane.
    """
    return digest(
        labels.ROOT, tuple((lane.lane_id, lane.bits, lane.length, tree) for lane, tree in lanes)
    )


def split_planes(
    lanes: Sequence[Lane], planes: Sequence[memoryview]
) -> list[tuple[Lane, list[memoryview]]]:
    """The planes of an upload by lane. Raises ProtocolError where number or length is wrong."""
    lengths = [length for lane in lanes for length in lane.plane_bytes]
    if [plane.nbytes for plane in planes] != lengths:
        raise ProtocolError(Code.UPLOAD_SHAPE, "An upload's planes are not those of its lanes.")
    remaining = list(planes)
    split: list[tuple[Lane, list[memoryview]]] = []
    for lane in lanes:
        count = len(lane.plane_bytes)
        split.append((lane, remaining[:count]))
        remaining = remaining[count:]
    return split


def survivors_hash(participants: bytes, roots: Mapping[str, bytes]) -> bytes:
    """uh2: the participants hash and every survivor's upload root."""
    return digest(labels.SURVIVORS, participants, dict(roots))


def commit(survivors: bytes, sums: Sequence[memoryview | bytes]) -> bytes:
    """What the next round's `prev` is: the survivors hash and the aggregate itself."""
    return digest(labels.COMMIT, survivors, tuple(tree_digest([part]) for part in sums))


def share_commitment(label: str, header: bytes, dealer: str, holder: str, salted: bytes) -> bytes:
    """A dealer's salted commitment to one share (share then salt)."""
    return digest(label, header, dealer, holder, salted)


def confirm_tag(pair_key: bytes, transcript: bytes, sender: str, receiver: str) -> bytes:
    """What `sender` shows `receiver` to prove that both hold the same pair key."""
    return expand(pair_key, labels.CONFIRM_TAG, transcript, sender, receiver, length=TAG_BYTES)


def state_parts(terms: Terms, state: Tensors) -> Iterator[memoryview]:
    """A state's bytes for a site that is behind: every tensor, little-endian, names sorted."""
    for name in sorted(terms.initial):
        yield flat_view(np.ascontiguousarray(state[name], "<f4"))


def dump_state(terms: Terms, state: Tensors) -> bytes:
    """`state_parts` in one piece."""
    return b"".join(state_parts(terms, state))


def load_state(terms: Terms, data: bytes | memoryview) -> dict[str, NDArray[np.float32]]:
    """The inverse of `dump_state`. Raises ProtocolError where the length is wrong."""
    total = sum(value.size for value in terms.initial.values())
    if len(data) != 4 * total:
        raise ProtocolError(Code.LINK_MALFORMED, "The state served has a wrong length.")
    flat = np.frombuffer(data, "<f4")
    state: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name in sorted(terms.initial):
        like = terms.initial[name]
        state[name] = flat[start : start + like.size].reshape(like.shape)
        start += like.size
    return state


def pair_order(one: str, other: str) -> tuple[str, str]:
    """The pair in order of site id."""
    return (one, other) if one < other else (other, one)


@dataclass(frozen=True)
class Chain:
    """Where a party stands: the model, its exponents, and what the next round builds on.

    `version` is the round number of the last completed round (0 before the first); `turn` is
    the next turn to play, starting at 1, or at 0 where statistics are counted first. `rejected`
    says that the last round's measurement rolled its model back (common.gate).
    """

    version: int
    turn: int
    state: Tensors
    state_digest: bytes
    exponents: tuple[int, ...]
    prev: bytes
    rejected: bool = False

    @staticmethod
    def genesis(terms: Terms, initial_digest: bytes) -> Chain:
        """The chain before the first round: the study's initial weights."""
        return Chain(0, terms.first_turn, terms.initial, initial_digest, terms.exponents, GENESIS)


def link_survivors(link: Link) -> tuple[str, ...]:
    """The survivors of a completed round, sorted."""
    return tuple(sorted(link.roots))


def certified_survivors(link: Link) -> bytes:
    """The survivors hash of a link, from its own fields."""
    participants = participants_hash(header_hash(link.header), link.heads)
    return survivors_hash(participants, link.roots)


def link_hashes(link: Link) -> tuple[bytes, bytes]:
    """(survivors hash, commit) of a link, from its own fields."""
    survivors = certified_survivors(link)
    return survivors, commit(survivors, link.sums)


def count_signers(
    terms: Terms, statements: Iterable[Signed], kind: type[Agree | Burn], expected: tuple[Any, ...]
) -> set[str]:
    """The distinct parties with a valid statement whose fields (without site) are `expected`."""
    signers: set[str] = set()
    for signed in statements:
        statement: Any = unpack_body(kind, signed)
        public = terms.roster.get(statement.site)
        fields = tuple(getattr(statement, name) for name, _ in statement.FIELDS if name != "site")
        if public is None or fields != expected:
            continue
        if verify(public, signed.signature, kind.LABEL, signed.body):
            signers.add(statement.site)
    return signers


def spent_sites(terms: Terms, refusals: Iterable[Signed]) -> set[str]:
    """The distinct parties whose valid refusals say that their privacy budget is spent."""
    spent: set[str] = set()
    for signed in refusals:
        refusal: Refusal = unpack_body(Refusal, signed)
        public = terms.roster.get(refusal.site)
        if public is None or refusal.study != terms.study or refusal.code not in SPENT:
            continue
        if verify(public, signed.signature, Refusal.LABEL, signed.body):
            spent.add(refusal.site)
    return spent


def verify_link(terms: Terms, run: bytes, link: Link) -> bytes:
    """Check a link's certificate; returns its survivors hash. Raises ProtocolError.

    Guarantee: at least Q distinct survivors signed exactly this header, these participants
    and these survivors. The aggregate itself is not covered by the certificate: hospitals
    compare it through the next round's `prev` (docs/PROTOCOL.md, "Honest limits").
    """
    header = link.header
    if header.study != terms.study or header.run != run:
        raise ProtocolError(Code.ROUND_WRONG_RUN, "A link belongs to another study or run.")
    if header.lanes != terms.lanes(header.turn) or header.kind != terms.kind(header.turn):
        raise ProtocolError(Code.LINK_MALFORMED, "A link's lanes are not the study's.")
    if len(link.sums) != len(header.lanes) or len(header.exponents) != len(terms.exponents):
        raise ProtocolError(Code.LINK_MALFORMED, "A link's aggregate has the wrong shape.")
    for lane, words in zip(header.lanes, link.sums, strict=True):
        terms.checked_sum(lane, words)
    if not set(link.roots) <= set(link.heads) or not set(link.heads) <= set(terms.roster):
        raise ProtocolError(Code.LINK_MALFORMED, "A link's survivors are not its participants.")
    survivors = certified_survivors(link)
    expected = (terms.study, run, header.round, survivors)
    signers = count_signers(terms, link.agreements, Agree, expected)
    if len(signers & set(link.roots)) < terms.quorum:
        raise ProtocolError(
            Code.LINK_QUORUM, f"Round {header.round} is certified by fewer than {terms.quorum}."
        )
    return survivors


def advance(
    terms: Terms, chain: Chain, link: Link, digest_of: Any, survivors: bytes | None = None
) -> Chain:
    """The chain after a verified link, from the chain the link's round started on.

    `survivors` is the link's survivors hash, where the caller has it from `verify_link`.
    Raises ProtocolError where the link does not continue `chain`.
    """
    header = link.header
    if header.state != chain.state_digest or header.prev != chain.prev:
        raise ProtocolError(Code.LINK_STATE, "A link does not continue this site's model.")
    following = commit(survivors or certified_survivors(link), link.sums)
    inputs = (_arithmetic(terms), chain.state_digest, chain.exponents, following, digest_of)
    known = _LAST.get(inputs)
    if known is None:
        known = _moved(terms, chain, link, digest_of, following)
        _LAST.keep(inputs, known, chain.state)
    return known


class _LastChain:
    """The chain computed last in this process, for as long as a party of it stands there.

    The parties of a simulation come to the same chain from the same link: the arithmetic is
    done once, and the model is in memory once. No judgement is shared: a party gets here after
    it has checked its own copy of the certificate and found its own model in the header, and
    what it asks for is named by the digest of its own model and by `commit` of its own bytes,
    which covers the header, the participants, the survivors and every word of the sums. A
    hospital alone in its process computes every chain itself.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[Any, ...], weakref.ref[Chain]] | None = None

    def get(self, inputs: tuple[Any, ...]) -> Chain | None:
        """The chain that these inputs lead to, or None where it is not known."""
        last = self._last
        return last[1]() if last is not None and last[0] == inputs else None

    def keep(self, inputs: tuple[Any, ...], chain: Chain, before: Tensors) -> None:
        """Remember `chain`; of its tensors those that are not in `before` are made read-only."""
        for name, value in chain.state.items():
            if before.get(name) is not value:
                value.flags.writeable = False
        self._last = (inputs, weakref.ref(chain))


_LAST = _LastChain()


def _arithmetic(terms: Terms) -> tuple[Any, ...]:
    """Everything of a study that may decide how a sum becomes the next model.

    All fields, so that a new one is not forgotten; the initial weights are in the state.
    """
    named = (f.name for f in fields(terms) if f.name not in {"initial", "optimizer"})
    return (*(getattr(terms, name) for name in named), terms.optimizer.settings)


def _moved(terms: Terms, chain: Chain, link: Link, digest_of: Any, following: bytes) -> Chain:
    header = link.header
    turn, words = header.turn + 1, metric_sum(terms, link)
    verdict = None if words is None else terms.judge(chain.state, chain.exponents, words)
    base = chain.state if verdict is None else verdict.state
    if verdict is not None and (verdict.rejected or header.kind == "evaluate"):
        # What was trained from a rejected model goes with it.
        known, exponents = digest_of(base), verdict.exponents
        return Chain(header.round, turn, base, known, exponents, following, verdict.rejected)
    if header.kind == "evaluate":
        return Chain(header.round, turn, base, chain.state_digest, chain.exponents, following)
    # The first lane is the round's own; metrics, where a round measures, come after it.
    total = terms.signed_sum(header.lanes[0], link.sums[0])
    if header.kind == "statistics":
        counted = terms.count(chain.state, total, len(link.roots))
        known = digest_of(counted)
        return Chain(header.round, turn, counted, known, chain.exponents, following)
    state, exponents = terms.apply(base, header.exponents, total, link_survivors(link))
    return Chain(header.round, turn, state, digest_of(state), exponents, following)


def rejection(round_number: int, chain: Chain) -> Note:
    """The audit event of a model that the gate rolled back; `chain` is what is left."""
    return Note("model.rejected", {"round": round_number, "model": chain.state_digest.hex()})


def metric_sum(terms: Terms, link: Link) -> NDArray[np.int64] | None:
    """The summed metric words of a completed round, if it measured."""
    for lane, words in zip(link.header.lanes, link.sums, strict=True):
        if lane.lane_id == METRIC_LANE:
            return terms.signed_sum(lane, words)
    return None
