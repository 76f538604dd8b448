"""What binds a round: every field of a header counts, and a link stands or falls as a whole."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from common.crypto.identity import SiteKey
from common.errors import Code, ProtocolError
from common.protocol.terms import Terms
from common.protocol.transcript import (
    GENESIS,
    Chain,
    advance,
    commit,
    confirm_tag,
    count_signers,
    dump_state,
    handshake_transcript,
    header_hash,
    link_hashes,
    link_survivors,
    load_state,
    pair_order,
    participants_hash,
    share_commitment,
    split_planes,
    survivors_hash,
    upload_root,
    verify_link,
)
from common.protocol.wire import Agree, Burn, Header, Link, Receipt, sign
from common.secagg.masking import Lane
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import Layout, TensorSpec, state_digest

SITES = ("site-01", "site-02", "site-03", "site-04")
KEYS = {site: SiteKey.from_seed(bytes([i]) * 32) for i, site in enumerate(SITES)}
RUN = bytes([7]) * 32


def d(number: int) -> bytes:
    return bytes([number]) * 32


@pytest.fixture(scope="module")
def terms() -> Terms:
    optimizer = ServerOptimizer(OptimizerSettings(name="fedavgm"))
    layout = Layout((TensorSpec("w", (3,)),))
    return Terms(
        study=d(1), roster={site: KEYS[site].public for site in SITES}, quorum=3,
        weights=dict.fromkeys(SITES, 1.0), layout=layout, ring_bits=24, metric_words=2,
        initial=optimizer.initial({"w": np.zeros(3, np.float32)}), exponents=(12,),
        optimizer=optimizer, turns=2, evaluate_every=1, rounds=9, private=True, burns_tolerated=3,
    )  # fmt: skip


@pytest.fixture
def header(terms: Terms) -> Header:
    return Header(
        terms.study, RUN, d(2), 1, "train", 1, state_digest(terms.initial), GENESIS, terms.lanes(1),
        terms.exponents,
    )  # fmt: skip


def certified(header: Header, survivors=SITES, signers=SITES[:3], **changes) -> Link:
    """A link with a certificate that is right unless `changes` says otherwise."""
    heads = {site: d(10 + i) for i, site in enumerate(SITES)}
    roots = {site: d(20 + i) for i, site in enumerate(SITES) if site in survivors}
    uh2 = survivors_hash(participants_hash(header_hash(header), heads), roots)
    agreements = tuple(
        sign(KEYS[site], Agree(header.study, header.run, header.round, site, uh2))
        for site in signers
    )
    sums = (memoryview(np.array([4096, 0, 2**24 - 4096], "<u4")).cast("B"),)
    return replace(Link(header, heads, roots, agreements, sums), **changes)


# ------------------------------------------------------------------------------- injectivity
HEADER_CHANGES = {
    "study": d(9), "run": d(9), "transcript": d(9), "round": 2, "kind": "evaluate", "turn": 2,
    "state": d(9), "prev": d(9), "lanes": (Lane(0, 24, 4),), "exponents": (13,),
}  # fmt: skip


def test_every_field_of_a_header_changes_its_hash(header):
    assert set(HEADER_CHANGES) == {f.name for f in fields(Header)}
    hashes = {
        header_hash(replace(header, **{name: value})) for name, value in HEADER_CHANGES.items()
    }
    assert len(hashes | {header_hash(header)}) == len(HEADER_CHANGES) + 1


@pytest.mark.parametrize(
    "lanes", [(), (Lane(1, 24, 3),), (Lane(0, 32, 3),), (Lane(0, 24, 3), Lane(1, 64, 2))]
)
def test_number_width_and_count_of_lanes_change_the_header_hash(header, lanes):
    assert header_hash(replace(header, lanes=lanes)) != header_hash(header)


def different(function, base: tuple, *others: tuple) -> bool:
    results = [function(*arguments) for arguments in (base, *others)]
    return len(set(results)) == len(results)


def test_every_input_of_every_hash_counts():
    assert different(
        handshake_transcript, (d(1), d(2), 1, [b"a", b"b"]), (d(3), d(2), 1, [b"a", b"b"]),
        (d(1), d(3), 1, [b"a", b"b"]), (d(1), d(2), 2, [b"a", b"b"]), (d(1), d(2), 1, [b"b", b"a"]),
        (d(1), d(2), 1, [b"ab"]), (d(1), d(2), 1, [b"a", b"b", b""]),
    )  # fmt: skip
    assert different(
        participants_hash, (d(1), {"a": d(2), "b": d(3)}), (d(4), {"a": d(2), "b": d(3)}),
        (d(1), {"a": d(3), "b": d(2)}), (d(1), {"a": d(2)}), (d(1), {"a": d(2), "c": d(3)}),
    )  # fmt: skip
    assert different(
        survivors_hash, (d(1), {"a": d(2)}), (d(2), {"a": d(2)}), (d(1), {"b": d(2)}),
        (d(1), {"a": d(3)}), (d(1), {}),
    )  # fmt: skip
    assert survivors_hash(d(1), {"a": d(2)}) != participants_hash(d(1), {"a": d(2)})
    assert different(
        commit, (d(1), [b"ab"]), (d(2), [b"ab"]), (d(1), [b"a", b"b"]), (d(1), [b"ac"])
    )
    base = ("label", d(1), "a", "b", b"share")
    changed = [("other", *base[1:]), ("label", d(2), *base[2:]), (*base[:2], "c", *base[3:]),
               (*base[:3], "c", base[4]), (*base[:2], "b", "a", base[4]), (*base[:4], b"salt")]  # fmt: skip
    assert different(share_commitment, base, *changed)
    tag = (d(1), d(2), "a", "b")
    assert different(
        confirm_tag, tag, (d(3), *tag[1:]), (d(1), d(3), "a", "b"), (d(1), d(2), "b", "a")
    )


def test_the_order_of_a_mapping_does_not_count():
    assert participants_hash(d(1), {"a": d(2), "b": d(3)}) == participants_hash(
        d(1), {"b": d(3), "a": d(2)}
    )


def test_an_upload_root_binds_number_width_length_order_and_tree():
    one, two = Lane(0, 24, 3), Lane(1, 64, 2)
    base = [(one, d(1)), (two, d(2))]
    others = [
        [(one, d(2)), (two, d(1))], [(two, d(2)), (one, d(1))], [(one, d(1))],
        [(Lane(2, 24, 3), d(1)), (two, d(2))], [(Lane(0, 32, 3), d(1)), (two, d(2))],
        [(Lane(0, 24, 4), d(1)), (two, d(2))],
    ]  # fmt: skip
    assert len({upload_root(lanes) for lanes in [base, *others]}) == 7


def test_planes_are_split_exactly_or_not_at_all():
    lanes = (Lane(0, 24, 3), Lane(1, 64, 2))
    planes = [memoryview(bytes(n)) for n in (6, 3, 16)]
    assert [len(part) for _, part in split_planes(lanes, planes)] == [2, 1]
    for wrong in (
        planes[:2],
        [*planes, planes[0]],
        [planes[1], planes[0], planes[2]],
        [memoryview(bytes(2)), *planes[1:]],
    ):
        with pytest.raises(ProtocolError) as error:
            split_planes(lanes, wrong)
        assert error.value.code is Code.UPLOAD_SHAPE


def test_a_pair_has_one_order():
    assert pair_order("a", "b") == pair_order("b", "a") == ("a", "b")


# --------------------------------------------------------------------------------------- links
def code_of(terms: Terms, link: Link, run: bytes = RUN) -> Code | None:
    try:
        verify_link(terms, run, link)
    except ProtocolError as error:
        return error.code
    return None


def test_a_link_with_a_quorum_of_agreements_is_accepted(terms, header):
    link = certified(header)
    assert verify_link(terms, RUN, link) == link_hashes(link)[0]
    assert link_survivors(link) == SITES


def with_header(header, **changes):
    return certified(replace(header, **changes))


LINK_TABLE = {
    "another study": (lambda h: with_header(h, study=d(9)), Code.ROUND_WRONG_RUN),
    "another run": (lambda h: with_header(h, run=d(9)), Code.ROUND_WRONG_RUN),
    "lanes of another turn": (lambda h: with_header(h, turn=2), Code.LINK_MALFORMED),
    "a lane longer than the model": (lambda h: with_header(h, lanes=(Lane(0, 24, 4),)), Code.LINK_MALFORMED),
    "another ring": (lambda h: with_header(h, lanes=(Lane(0, 32, 3),)), Code.LINK_MALFORMED),
    "another kind": (lambda h: with_header(h, kind="evaluate"), Code.LINK_MALFORMED),
    "too many exponents": (lambda h: with_header(h, exponents=(12, 12)), Code.LINK_MALFORMED),
    "a sum missing": (lambda h: certified(h, sums=()), Code.LINK_MALFORMED),
    "a sum too many": (lambda h: certified(h, sums=(memoryview(b""),) * 2), Code.LINK_MALFORMED),
    "a survivor who did not take part": (lambda h: certified(h, heads={s: d(1) for s in SITES[:3]}), Code.LINK_MALFORMED),
    "a participant who is no party": (lambda h: certified(h, heads={s: d(1) for s in (*SITES, "x")}), Code.LINK_MALFORMED),
    "one signature short": (lambda h: certified(h, signers=SITES[:2]), Code.LINK_QUORUM),
    "one signer counted twice": (lambda h: certified(h, signers=(SITES[0], SITES[1], SITES[1])), Code.LINK_QUORUM),
    "no signature": (lambda h: certified(h, agreements=()), Code.LINK_QUORUM),
    "a signer who is no survivor": (lambda h: certified(h, survivors=SITES[:3], signers=SITES[1:]), Code.LINK_QUORUM),
    "too few survivors": (lambda h: certified(h, survivors=SITES[:2], signers=SITES[:2]), Code.LINK_QUORUM),
    "another root": (lambda h: certified(h, roots={s: d(99) for s in SITES}), Code.LINK_QUORUM),
    "another head": (lambda h: certified(h, heads={s: d(99) for s in SITES}), Code.LINK_QUORUM),
    "another model": (lambda h: replace(certified(h), header=replace(h, state=d(9))), Code.LINK_QUORUM),
    "another predecessor": (lambda h: replace(certified(h), header=replace(h, prev=d(9))), Code.LINK_QUORUM),
    "another round": (lambda h: replace(certified(h), header=replace(h, round=2)), Code.LINK_QUORUM),
    "another grid": (lambda h: replace(certified(h), header=replace(h, exponents=(13,))), Code.LINK_QUORUM),
    "another epoch": (lambda h: replace(certified(h), header=replace(h, transcript=d(9))), Code.LINK_QUORUM),
}  # fmt: skip


@pytest.mark.parametrize("row", LINK_TABLE)
def test_a_link_that_is_altered_anywhere_in_its_certificate_is_refused(terms, header, row):
    make, code = LINK_TABLE[row]
    assert code_of(terms, make(header)) is code


def forged(signed, header):
    return replace(signed, signature=bytes(64))


def test_a_forged_agreement_does_not_count(terms, header):
    link = certified(header)
    bad = replace(
        link.agreements[0],
        signature=bytes([link.agreements[0].signature[0] ^ 1]) + link.agreements[0].signature[1:],
    )
    assert code_of(terms, replace(link, agreements=(bad, *link.agreements[1:]))) is Code.LINK_QUORUM
    stolen = replace(link.agreements[0], signature=link.agreements[1].signature)
    assert (
        code_of(terms, replace(link, agreements=(stolen, *link.agreements[1:]))) is Code.LINK_QUORUM
    )


def test_statements_of_another_kind_or_round_do_not_count(terms, header):
    fields_ = (terms.study, RUN, 1)
    burns = [sign(KEYS[s], Burn(*fields_, s)) for s in SITES]
    assert count_signers(terms, burns, Burn, fields_) == set(SITES)
    assert count_signers(terms, burns, Burn, (terms.study, RUN, 2)) == set()
    agrees = [sign(KEYS[s], Agree(*fields_, s, d(3))) for s in SITES]
    assert count_signers(terms, agrees, Agree, (*fields_, d(4))) == set()
    outsider = sign(SiteKey.from_seed(bytes([99]) * 32), Burn(*fields_, "site-09"))
    impostor = sign(KEYS["site-01"], Burn(*fields_, "site-02"))
    assert count_signers(terms, [outsider, impostor], Burn, fields_) == set()
    with pytest.raises(ProtocolError):
        count_signers(terms, [sign(KEYS["site-01"], Receipt(d(1), "site-01", d(2)))], Burn, fields_)


def test_another_sum_passes_the_certificate_and_is_the_stated_limit_that_the_chain_shows(
    terms, header
):
    link = certified(header)
    other = replace(link, sums=(memoryview(bytes(12)),))
    assert code_of(terms, other) is None
    chain = Chain.genesis(terms, state_digest(terms.initial))
    one, two = (advance(terms, chain, given, state_digest) for given in (link, other))
    assert one.prev != two.prev
    assert one.state_digest != two.state_digest


def test_a_link_continues_one_model_and_one_predecessor_only(terms, header):
    link, chain = certified(header), Chain.genesis(terms, state_digest(terms.initial))
    following = advance(terms, chain, link, state_digest)
    assert (following.version, following.turn, following.prev) == (1, 2, link_hashes(link)[1])
    for wrong in (replace(chain, state_digest=d(9)), replace(chain, prev=d(9))):
        with pytest.raises(ProtocolError) as error:
            advance(terms, wrong, link, state_digest)
        assert error.value.code is Code.LINK_STATE


@pytest.mark.parametrize("size", [0, 8, 11, 13, 16])
def test_a_sum_of_another_length_is_refused(terms, header, size):
    chain = Chain.genesis(terms, state_digest(terms.initial))
    with pytest.raises(ProtocolError) as error:
        advance(terms, chain, certified(header, sums=(memoryview(bytes(size)),)), state_digest)
    assert error.value.code is Code.LINK_MALFORMED


def test_an_evaluation_leaves_the_model_as_it_is(terms, header):
    chain = replace(Chain.genesis(terms, state_digest(terms.initial)), turn=3)
    evaluation = replace(header, kind="evaluate", turn=3, lanes=terms.lanes(3))
    link = certified(evaluation, sums=(memoryview(bytes(16)),))
    assert code_of(terms, link) is None
    following = advance(terms, chain, link, state_digest)
    assert following.state_digest == chain.state_digest
    assert following.prev != chain.prev


def test_a_state_survives_its_bytes_and_a_wrong_length_is_refused(terms):
    data = dump_state(terms, terms.initial)
    assert state_digest(load_state(terms, data)) == state_digest(terms.initial)
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(ProtocolError) as error:
            load_state(terms, wrong)
        assert error.value.code is Code.LINK_MALFORMED


def test_turns_train_then_evaluate_once_and_lanes_follow(terms):
    assert [terms.kind(turn) for turn in (1, 2, 3)] == ["train", "train", "evaluate"]
    widths = [[(lane.lane_id, lane.bits) for lane in terms.lanes(turn)] for turn in (1, 2, 3)]
    assert widths == [[(0, 24)], [(0, 24), (1, 64)], [(1, 64)]]
