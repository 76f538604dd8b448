"""The model that a round builds on: every step from the last one to it is checked here."""

from __future__ import annotations

from collections.abc import Sequence

from client.round.effects import Effect
from client.round.state import NO_RUN, SiteState
from common.crypto import labels
from common.crypto.digest import digest
from common.errors import Code, ProtocolError
from common.protocol.effects import Note
from common.protocol.transcript import (
    Chain,
    advance,
    commit,
    count_signers,
    link_survivors,
    load_state,
    rejection,
    verify_link,
)
from common.protocol.wire import Burn, Header, Link, RoundStart, Signed, unpack_body
from common.tensors import state_digest

# Two attempts on one model without a burn certificate, and only with DP noise (PROTOCOL.md).
UNCERTIFIED_ATTEMPTS = 2


def check_run(state: SiteState, study: bytes, run: bytes) -> bytes:
    """The run that a message names: this site's own, or the study's where it has none yet.

    A site that missed every handshake can still swear that it never agreed in a round,
    and can still check the certificate of the final model.
    """
    if study != state.record.study or state.record.run not in {NO_RUN, run}:
        raise ProtocolError(Code.ROUND_WRONG_RUN, "A message names another study or run.")
    return run


def chain_for(
    state: SiteState, run: bytes, link: Link | None, base: memoryview | None
) -> tuple[Chain, bytes]:
    """The chain this round builds on, every step of it checked, and its survivors hash."""
    seen, chain = state.record, state.chain
    if link is None:
        if seen.version:
            raise ProtocolError(Code.LINK_STALE, "A newer model was applied here before.")
        if chain is None or chain.version:
            raise AssertionError("a site that has applied no link stands at the initial model")
        return chain, b""
    at = link.header.round
    if at < seen.version:
        raise ProtocolError(Code.LINK_STALE, f"Round {at} is older than what was applied.")
    survivors = verify_link(state.terms, run, link)
    _check_contradiction(state, link, survivors)
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
        chain = from_base(state, link, base)
    return advance(state.terms, chain, link, state_digest, survivors), survivors


def completion(state: SiteState, link: Link | None, chain: Chain, survivors: bytes) -> list[Effect]:
    """The audit event of a link that is new here."""
    if link is None or chain.prev == state.record.prev:
        return []
    judged = [rejection(link.header.round, chain)] if chain.rejected else []
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
                "quorum": state.terms.quorum,
            },
        ),
        *judged,
    ]


def _check_contradiction(state: SiteState, link: Link, survivors: bytes) -> None:
    signed = state.record.agreed.get(str(link.header.round))
    if signed is not None and signed != survivors:
        raise ProtocolError(Code.LINK_EQUIVOCATION, "A link contradicts this site's agreement.")


def from_base(state: SiteState, link: Link, base: memoryview | None) -> Chain:
    """The certified chain of a link whose base the coordinator serves; its digest is checked."""
    if base is None:
        raise ProtocolError(Code.BASE_NEEDED, "This site needs the certified state.")
    header = link.header
    served = load_state(state.terms, base)
    if state_digest(served) != header.state:
        raise ProtocolError(Code.LINK_STATE, "The state served is not the certified one.")
    return Chain(0, header.turn, served, header.state, header.exponents, header.prev)


def header_of(state: SiteState, message: RoundStart, chain: Chain) -> Header:
    """The header of the round that a start asks for, once its number and kind are the study's."""
    terms, seen = state.terms, state.record
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


def check_retry(state: SiteState, chain: Chain, header: Header, certified: set[int]) -> None:
    """Training the same model again needs proof that the earlier upload was never opened.

    Without it, two aggregates of one model with one hospital's difference reveal that
    hospital's update (PROTOCOL.md, "Burning"). The rounds since the last aggregate that
    this site did not see need that proof, too.
    """
    seen = state.record
    if seen.burns > state.terms.burns_tolerated:
        raise ProtocolError(Code.BURNS_EXHAUSTED, f"{seen.burns} rounds were burned.")
    if header.round in seen.burned:
        raise ProtocolError(Code.AGREE_AFTER_BURN, f"Round {header.round} was burned here.")
    allowed = UNCERTIFIED_ATTEMPTS if state.terms.private else 1
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


def certified(state: SiteState, burns: Sequence[Signed]) -> set[int]:
    """The rounds that a quorum swore never to agree in."""
    by_round: dict[int, list[Signed]] = {}
    for signed in burns:
        burn: Burn = unpack_body(Burn, signed)
        by_round.setdefault(burn.round, []).append(signed)
    seen, quorum = state.record, state.terms.quorum
    return {
        at
        for at, group in by_round.items()
        if len(count_signers(state.terms, group, Burn, (seen.study, seen.run, at))) >= quorum
    }
