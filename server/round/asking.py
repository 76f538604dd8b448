"""What the coordinator asks of the sites in each phase, and asks again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from common.protocol.transcript import dump_state
from common.protocol.wire import (
    Agreements,
    BurnRequest,
    Ended,
    Finished,
    Participants,
    RoundStart,
    Survivors,
    pack,
)
from server.round.effects import Effect, SendEach, SendTo
from server.round.record import chain_blobs
from server.round.state import CoordinatorState


def resend(state: CoordinatorState, sites: set[str]) -> list[Effect]:
    """Ask these sites for what the current phase needs of them."""
    seen = state.record
    ask: Callable[[str], bytes]
    if seen.phase == "handshake":
        opening = state.opening
        return [] if opening is None else forward(opening.ask(sites))
    if seen.phase == "ready":
        return [send_model(state, sites & set(seen.members), round_start)]
    if seen.phase == "upload":
        ask = partial(_participants_for, state)
        chosen = sites & set(state.ready) - set(seen.receipts)
    elif seen.phase == "agree":
        survivors = pack(
            Survivors(seen.round, tuple(seen.receipts[v] for v in sorted(seen.receipts)))
        )
        ask, chosen = (lambda _: survivors), sites & set(seen.receipts) - set(seen.agreements)
    elif seen.phase == "unmask":
        return _resend_unmask(state, sites)
    elif seen.phase == "burn":
        request = pack(BurnRequest(seen.study, seen.run, seen.round))
        ask, chosen = (lambda _: request), sites - set(state.burns)
    else:
        return []
    return [SendTo(v, ask(v)) for v in sorted(chosen)]


def _resend_unmask(state: CoordinatorState, sites: set[str]) -> list[Effect]:
    """Survivors that never saw the set get it first; they answer with an agreement."""
    seen = state.record
    survivors = pack(Survivors(seen.round, tuple(seen.receipts[v] for v in sorted(seen.receipts))))
    agreements = released(state)
    chosen = sorted(sites & set(seen.receipts) - set(state.unmasks))
    return [SendTo(v, agreements if v in seen.agreements else survivors) for v in chosen]


def send_model(
    state: CoordinatorState, sites: Iterable[str], make: Callable[..., bytes]
) -> SendEach:
    """Send each of the sites what `make` gives: with the base where the site is behind."""

    def messages() -> Iterator[tuple[str, bytes]]:
        made: dict[bool, bytes] = {}
        for site in sorted(sites):
            behind = site in state.behind
            if behind not in made:
                made[behind] = make(state, with_base=behind)
            yield site, made[behind]

    return SendEach(messages)


def _base(state: CoordinatorState) -> memoryview:
    """The state that the last completed round started from."""
    version = state.record.version
    kept = state.blob(chain_blobs(version)[1]) if version else None
    return memoryview(dump_state(state.terms, state.terms.initial) if kept is None else kept)


def round_start(state: CoordinatorState, *, with_base: bool) -> bytes:
    """The message that begins this round; with the served base for a site that is behind."""
    seen = state.record
    base = _base(state) if with_base else None
    return pack(
        RoundStart(
            seen.study,
            seen.run,
            seen.epoch,
            seen.round,
            state.terms.kind(state.chain.turn),
            state.link,
            base,
            seen.burns,
        )
    )


def _participants_for(state: CoordinatorState, site: str) -> bytes:
    return pack(
        Participants(
            state.record.round,
            tuple(state.ready[v].head for v in sorted(state.ready)),
            {v: r.shares[site] for v, r in state.ready.items() if v != site},
        )
    )


def released(state: CoordinatorState) -> bytes:
    """The quorum's agreements, which release the shares."""
    chosen = sorted(state.record.agreements)[: state.terms.quorum]
    return pack(Agreements(state.record.round, tuple(state.record.agreements[v] for v in chosen)))


def farewell(state: CoordinatorState, *, with_base: bool) -> bytes:
    """The message that ends the run at a site, with the last certificate."""
    seen = state.record
    base = _base(state) if with_base else None
    if seen.ended:
        refusals = tuple(seen.spent[v] for v in sorted(seen.spent))
        return pack(Ended(seen.study, seen.run, state.link, base, refusals))
    return pack(Finished(seen.study, seen.run, state.link, base))


def forward(messages: Mapping[str, Any]) -> list[Effect]:
    """Messages of a handshake, each to its site."""
    return [SendTo(site, pack(message)) for site, message in messages.items()]
