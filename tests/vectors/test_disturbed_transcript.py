"""The frozen transcript of a disturbed run, checked by the second implementation and by our code.

It holds what `test_transcript.py`'s undisturbed runs lack: the statistics turn, a dispute with two
reveals and the epoch after it, a burn certificate, and FedAdam's state.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag

from common.crypto.digest import encode
from common.protocol import wire
from common.protocol.codec import dump_record
from common.protocol.terms import Terms
from common.protocol.transcript import (
    Chain,
    advance,
    confirm_tag,
    count_signers,
    link_hashes,
    verify_link,
)
from common.statistics import DEVIATION, MEAN, StatisticsLayout
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import Layout, TensorSpec, state_digest

HERE = Path(__file__).parent
MAX_BYTES = 1 << 24
KINDS = ["statistics", "train", "train", "evaluate"]


def load_file(name: str):
    spec = importlib.util.spec_from_file_location(f"disturbed_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


second = load_file("second")
(SQUEEZED,) = json.loads((HERE / "disturbed.json").read_text())["runs"]
RUN = {**SQUEEZED, "messages": second.expanded(SQUEEZED)}
FAILURES = (
    second.WrongError, InvalidSignature, InvalidTag, ValueError, LookupError, TypeError, struct.error,
    OverflowError,
)  # fmt: skip


def tag_of(text: str) -> str:
    return second.dec_at(bytes.fromhex(text), 9)[0]


TAGS = sorted({tag_of(text) for _, _, text in RUN["messages"]})


def said(kind) -> list[tuple[str, object]]:
    """The sites' statements of a kind, in order, and who sent them."""
    found = []
    for sender, _, text in RUN["messages"]:
        if sender != "coordinator" and tag_of(text) == kind.__name__:
            _, signed = wire.unpack_from_site(bytes.fromhex(text), MAX_BYTES)
            found.append((sender, wire.unpack_body(kind, signed)))
    return found


def shown(kind) -> list:
    """The coordinator's messages of a kind to the first site, in order."""
    return [
        wire.unpack_from_coordinator(bytes.fromhex(text), MAX_BYTES)
        for sender, recipient, text in RUN["messages"]
        if (sender, recipient, tag_of(text)) == ("coordinator", "site-01", kind.__name__)
    ]


def links() -> list[wire.Link]:
    messages = [*shown(wire.RoundStart), *shown(wire.Finished)]
    return list({m.link.header.round: m.link for m in messages if m.link}.values())


def test_a_second_implementation_reproduces_every_recorded_value():
    second.check(RUN)


def test_what_our_code_does_today_passes_the_second_implementation():
    second.check(json.loads(json.dumps(load_file("make_disturbed").record())))


# ---------------------------------------------------------------------- what it holds
def test_the_transcript_holds_what_an_undisturbed_one_lacks():
    assert {"Burn", "BurnRequest", "Dispute", "RevealRequest"} <= set(TAGS)
    assert [link.header.kind for link in links()] == KINDS
    assert [link.header.round for link in links()] == [1, 2, 4, 5], "round 3 is burned"
    assert [len(link.sums) for link in links()] == [1, 1, 2, 1]
    lost = [set(link.heads) - set(link.roots) for link in links()]
    assert lost == [set(), set(), {"site-06"}, set()]
    assert "site-04" not in {site for link in links() for site in link.heads}


def test_the_dispute_reveals_the_keys_of_the_first_epoch_alone():
    first, then = RUN["secrets"]["epochs"]
    for site, dispute in said(wire.Dispute):
        assert dispute.x25519_secret.hex() == first["x25519"][site] != then["x25519"].get(site)
        assert dispute.mlkem_seed.hex() == first["mlkem_seed"][site]
    assert [(s, d.peer) for s, d in said(wire.Dispute)] == [
        ("site-02", "site-04"),
        ("site-04", "site-02"),
    ]
    assert not set(first["mlkem_shared"].values()) & set(then["mlkem_shared"].values())


def test_the_wrong_tag_is_the_cheats_and_every_other_one_is_right():
    first = RUN["derived"]["epochs"][0]
    rt = bytes.fromhex(first["rt"])
    keys = {pair: bytes.fromhex(key) for pair, key in first["pair_keys"].items()}
    wrong = {
        (sender, v)
        for sender, confirm in said(wire.Confirm)
        if confirm.transcript == rt
        for v, tag in confirm.tags.items()
        if confirm_tag(keys[" ".join(sorted([sender, v]))], rt, sender, v) != tag
    }
    assert wrong == {("site-04", "site-02")}


def test_the_three_regimes_of_a_statistic_are_there():
    terms, state = terms_of(), final()
    total = np.frombuffer(links()[0].sums[0], "<i8") / 2**16
    present = 4 * total[6:]
    error = terms.statistics.noise * terms.statistics.sensitivity * np.sqrt(5)
    assert (present[:2] > 12 * error).all()
    assert present[2] < 12 * error
    variance = total[3:6] / present - (total[:3] / present) ** 2
    assert variance[0] > error / present[0]
    assert variance[1] < error / present[1]
    assert state[MEAN][2] == state[DEVIATION][2] == 0.5


def test_both_moments_of_the_server_optimiser_have_moved():
    terms, state = terms_of(), final()
    for slot in ("m", "v"):
        name = f"optimizer/{slot}/layer.weight"
        assert (state[name] != terms.initial[name]).all()


# ---------------------------------------------------------- control: nothing may be other
@pytest.mark.parametrize("tag", TAGS)
def test_a_flipped_bit_in_any_kind_of_message_is_found(tag):
    indices = [i for i, (_, _, text) in enumerate(RUN["messages"]) if tag_of(text) == tag]
    for attempt in range(4):
        index = indices[attempt * len(indices) // 4]
        sender, recipient, text = RUN["messages"][index]
        data = bytearray.fromhex(text)
        data[(attempt * 7919 + 13) % len(data)] ^= 1 << attempt
        messages = list(RUN["messages"])
        messages[index] = [sender, recipient, data.hex()]
        with pytest.raises(FAILURES):
            second.check({**RUN, "messages": messages})


@pytest.mark.parametrize("tag", ["Dispute", "RevealRequest", "BurnRequest", "Established"])
def test_a_message_that_is_missing_is_found(tag):
    last = max(i for i, (_, _, text) in enumerate(RUN["messages"]) if tag_of(text) == tag)
    messages = [m for i, m in enumerate(RUN["messages"]) if i != last]
    with pytest.raises(FAILURES):
        second.check({**RUN, "messages": messages})


def test_burns_below_the_quorum_are_found():
    burns = [i for i, (_, _, text) in enumerate(RUN["messages"]) if tag_of(text) == "Burn"]
    kept = RUN["terms"]["quorum"] - 1
    messages = [m for i, m in enumerate(RUN["messages"]) if i not in burns[kept:]]
    with pytest.raises(FAILURES):
        second.check({**RUN, "messages": messages})


def leaves_of(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from leaves_of(item, (*path, key))
        elif item is not None:
            yield (*path, key), item


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, str) and value.startswith("0x"):
        return (float.fromhex(value) * 0.5).hex()
    if isinstance(value, str) and value[:1] in "0123456789abcdef":
        middle = len(value) * 7 // 16
        return value[:middle] + f"{int(value[middle], 16) ^ 1:x}" + value[middle + 1 :]
    if isinstance(value, str):
        return value + "x"
    return value * 1.5 if isinstance(value, float) else value + 1


@pytest.mark.parametrize("part", ["terms", "secrets", "inputs", "derived"])
def test_any_other_recorded_value_is_found(part):
    for path, value in leaves_of(RUN[part]):
        altered = copy.deepcopy(RUN[part])
        place = altered
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = changed(value)
        try:
            second.check({**RUN, part: altered})
        except FAILURES:
            continue
        pytest.fail(f"{part} {path} may be changed unseen")


# ------------------------------------------------------------------------------- our code
def terms_of() -> Terms:
    terms = RUN["terms"]
    constants = {name: terms[name] for name in ("learning_rate", "beta1", "beta2", "tau")}
    initial = {
        name: np.frombuffer(bytes.fromhex(data), "<f4").reshape(shape)
        for name, (shape, data) in terms["initial"].items()
    }
    return Terms(
        study=bytes.fromhex(terms["study"]),
        roster={site: bytes.fromhex(key) for site, key in terms["roster"].items()},
        quorum=terms["quorum"],
        weights={site: float.fromhex(weight) for site, weight in terms["weights"].items()},
        layout=Layout(tuple(TensorSpec(name, tuple(shape)) for name, shape in terms["layout"])),
        ring_bits=RUN["bits"], metric_words=terms["metric_words"], initial=initial,
        exponents=tuple(terms["exponents"]),
        optimizer=ServerOptimizer(OptimizerSettings(name="fedadam", **constants)),
        turns=terms["turns"], evaluate_every=1, rounds=terms["turns"] + 14, private=True,
        burns_tolerated=12, statistic_words=3 * terms["features"],
        statistics=StatisticsLayout(terms["features"], float.fromhex(terms["statistics_noise"])),
    )  # fmt: skip


def chains() -> list[Chain]:
    """Where our own code stands after every recorded link."""
    terms = terms_of()
    found = [Chain.genesis(terms, state_digest(terms.initial))]
    for link in links():
        verify_link(terms, link.header.run, link)
        found.append(advance(terms, found[-1], link, state_digest))
    return found


def final():
    return chains()[-1].state


def test_our_chain_follows_the_recorded_links_to_the_recorded_states():
    for link, chain, expected in zip(links(), chains()[1:], RUN["derived"]["rounds"], strict=True):
        uh2, following = link_hashes(link)
        assert (uh2.hex(), following.hex()) == (expected["uh2"], expected["commit"])
        assert (chain.state_digest.hex(), list(chain.exponents)) == (
            expected["state"], expected["exponents"],
        )  # fmt: skip
    assert chains()[-1].state_digest.hex() == RUN["derived"]["final"]


def test_our_code_counts_the_recorded_burns_as_a_certificate():
    terms = terms_of()
    (start,) = (m for m in shown(wire.RoundStart) if m.round == 4)
    expected = (start.study, start.run, 3)
    signers = count_signers(terms, start.burns, wire.Burn, expected)
    assert len(signers) == terms.quorum
    assert not count_signers(terms, start.burns, wire.Burn, (start.study, start.run, 4))
    assert all(not m.burns for m in shown(wire.RoundStart) if m.round != 4)


def test_every_recorded_message_unpacks_and_packs_to_the_same_bytes():
    seen = Counter()
    for sender, _, text in RUN["messages"]:
        payload = bytes.fromhex(text)
        seen[tag_of(text)] += 1
        if sender == "coordinator":
            assert wire.pack(wire.unpack_from_coordinator(payload, MAX_BYTES)) == payload
            continue
        kind, message = wire.unpack_from_site(payload, MAX_BYTES)
        if kind in wire.UPLOADS:
            assert wire.pack(message) == payload
        else:
            assert wire.pack_statement(kind, message) == payload
            assert encode(dump_record(wire.unpack_body(kind, message))) == message.body
    assert set(seen) == set(TAGS)
