"""How a round ends at the hospital: survivors, agreements, a burn, or the end of the run."""

from __future__ import annotations

from typing import Any

from client.round.chain import chain_for, check_run, completion
from client.round.effects import UPLOAD_BLOB, Effect, Final, Send
from client.round.shares import ratcheted, recovery_share, self_share
from client.round.state import SiteState
from common.crypto.identity import verify
from common.errors import Code, ProtocolError
from common.protocol.effects import DropBlob, Note
from common.protocol.transcript import Chain, spent_sites, survivors_hash
from common.protocol.wire import (
    Agree,
    Agreements,
    Burn,
    BurnRequest,
    Ended,
    Finished,
    Receipt,
    Survivors,
    Unmask,
    pack_statement,
    sign,
    unpack_body,
)


def on_survivors(state: SiteState, message: Survivors) -> list[Effect]:
    """Sign, once per round, that these are the survivors."""
    seen = state.record
    if message.round in seen.burned:
        raise ProtocolError(Code.AGREE_AFTER_BURN, f"Round {message.round} was burned here.")
    if message.round != seen.round or seen.stage not in {"uploaded", "agreed", "done"}:
        raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Survivors out of order.")
    roots = _check_receipts(state, message)
    survivors = survivors_hash(seen.participants, roots)
    if seen.stage != "uploaded":
        if survivors != seen.survivors:
            raise ProtocolError(Code.SURVIVORS_EQUIVOCATED, "Another set of survivors was shown.")
        return [Send(seen.sent["agree"])]
    agree = sign(state.key, Agree(seen.study, seen.run, seen.round, state.site, survivors))
    payload = pack_statement(Agree, agree)
    kept = state.persist(
        stage="agreed",
        survivors=survivors,
        survivor_set=tuple(sorted(roots)),
        sent={"agree": payload},
        agreed={**seen.agreed, str(seen.round): survivors},
    )
    note = Note("round.agreed", {"round": seen.round, "uh2": survivors.hex()})
    return [kept, note, Send(payload)]


def _check_receipts(state: SiteState, message: Survivors) -> dict[str, bytes]:
    seen = state.record
    roots: dict[str, bytes] = {}
    for signed in message.receipts:
        receipt: Receipt = unpack_body(Receipt, signed)
        v = receipt.site
        if v not in seen.cohort or v in roots:
            raise ProtocolError(Code.SURVIVORS_UNKNOWN, f"{v} was not a participant.")
        valid = verify(state.terms.roster[v], signed.signature, Receipt.LABEL, signed.body)
        if not valid or receipt.participants != seen.participants:
            raise ProtocolError(
                Code.RECEIPT_SIGNATURE, f"The receipt of {v} is not for these participants."
            )
        roots[v] = receipt.root
    if state.site not in roots:
        raise ProtocolError(Code.SURVIVORS_WITHOUT_ME, "This site is not a survivor.")
    if len(roots) < state.terms.quorum:
        raise ProtocolError(
            Code.SURVIVORS_QUORUM, f"{len(roots)} survivors, {state.terms.quorum} needed."
        )
    return roots


def on_agreements(state: SiteState, message: Agreements) -> list[Effect]:
    """Release the survivors' self shares and the others' recovery shares."""
    seen = state.record
    if message.round != seen.round or seen.stage not in {"agreed", "done"}:
        raise ProtocolError(Code.ROUND_OUT_OF_ORDER, "Agreements out of order.")
    if seen.stage == "done":
        return [Send(seen.sent["unmask"])]
    _check_agreements(state, message)
    unmask = Unmask(
        seen.survivors,
        state.site,
        {v: self_share(seen.shares[v]) for v in seen.survivor_set},
        {v: recovery_share(seen.shares[v]) for v in seen.cohort if v not in seen.survivor_set},
    )
    payload = pack_statement(Unmask, sign(state.key, unmask))
    # The shares received for this round end here.
    kept = state.persist(stage="done", shares={}, sent={**seen.sent, "unmask": payload})
    note = Note("round.unmasked", {"round": seen.round, "uh2": seen.survivors.hex()})
    return [kept, note, Send(payload)]


def _check_agreements(state: SiteState, message: Agreements) -> None:
    seen = state.record
    signers: set[str] = set()
    for signed in message.agreements:
        agree: Agree = unpack_body(Agree, signed)
        v = agree.site
        if v not in seen.survivor_set or v in signers:
            raise ProtocolError(Code.AGREEMENT_SIGNER, f"{v} is not a survivor.")
        fields = (agree.study, agree.run, agree.round, agree.survivors)
        valid = verify(state.terms.roster[v], signed.signature, Agree.LABEL, signed.body)
        if not valid or fields != (seen.study, seen.run, seen.round, seen.survivors):
            raise ProtocolError(
                Code.AGREEMENT_SIGNATURE, f"The agreement of {v} is not for these survivors."
            )
        signers.add(v)
    if len(signers) < state.terms.quorum:
        raise ProtocolError(
            Code.AGREEMENT_QUORUM, f"{len(signers)} agreements, {state.terms.quorum} needed."
        )


def on_burn(state: SiteState, message: BurnRequest) -> list[Effect]:
    """Swear never to agree in a round, and end it here."""
    run = check_run(state, message.study, message.run)
    seen = state.record
    at = message.round
    if str(at) in seen.agreed:
        raise ProtocolError(Code.BURN_AFTER_AGREE, f"This site agreed in round {at}.")
    if at > state.terms.rounds:
        raise ProtocolError(Code.ROUND_TOO_MANY, f"The study has no round {at}.")
    if at <= seen.version:
        raise ProtocolError(Code.ROUND_REPLAY, f"Round {at} was completed.")
    payload = pack_statement(Burn, sign(state.key, Burn(seen.study, run, at, state.site)))
    if at in seen.burned:
        return [Send(payload)]
    effects: list[Effect] = []
    burned = (*seen.burned, at)
    changes: dict[str, Any] = {"burned": burned, "burns": seen.burns + 1}
    if at == seen.round:
        state.forget()
        changes |= {
            "stage": "burned",
            "shares": {},
            "sent": {},
            "ratchet": at + 1,
            "keys": ratcheted(seen.keys, seen.ratchet, at + 1),
        }
        effects.append(DropBlob(UPLOAD_BLOB))
    kept = state.persist(**changes)
    return [kept, *effects, Note("round.burned", {"round": at}), Send(payload)]


def on_finished(state: SiteState, message: Finished) -> list[Effect]:
    """Check the final model's certificate and keep the model."""
    run = check_run(state, message.study, message.run)
    chain, survivors = chain_for(state, run, message.link, message.base)
    if chain.turn <= state.terms.turns + 1:
        raise ProtocolError(Code.ROUND_KIND, f"The study is not over at turn {chain.turn}.")
    return _over(state, message, chain, survivors)


def on_ended(state: SiteState, message: Ended) -> list[Effect]:
    """Check that no quorum is left, and keep the model of the last completed round."""
    run = check_run(state, message.study, message.run)
    left = len(state.terms.parties) - len(spent_sites(state.terms, message.refusals))
    if left >= state.terms.quorum:
        raise ProtocolError(
            Code.END_UNPROVEN,
            f"{left} hospitals can still take part, {state.terms.quorum} are needed.",
        )
    chain, survivors = chain_for(state, run, message.link, message.base)
    return _over(state, message, chain, survivors, why=Code.BUDGETS_SPENT)


def _over(
    state: SiteState,
    message: Finished | Ended,
    chain: Chain,
    survivors: bytes,
    *,
    why: Code | None = None,
) -> list[Effect]:
    completed = completion(state, message.link, chain, survivors)
    state.chain = chain
    state.forget()
    kept = state.persist(
        run=message.run,
        version=chain.version,
        prev=chain.prev,
        keys={},
        shares={},
        sent={},
        stage="idle",
    )
    verdict = {} if why is None else {"verdict": why.label}
    note = Note("run.finished", {"model": chain.state_digest.hex(), **verdict})
    return [kept, DropBlob(UPLOAD_BLOB), *completed, note, Final(chain)]
