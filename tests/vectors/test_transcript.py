"""The frozen transcript, checked by a second implementation and by our own code.

`second.py` knows docs/PROTOCOL.md and nothing of the packages. If a change makes these tests fail,
either the change breaks the protocol, or the protocol has a new version: then its labels change,
PROTOCOL.md says so, and `make_transcript.py` records anew.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from cryptography.exceptions import InvalidSignature, InvalidTag

from common.crypto.digest import encode
from common.protocol import wire
from common.protocol.codec import dump_record
from common.protocol.terms import Terms
from common.protocol.transcript import Chain, advance, head_digest, link_hashes, verify_link
from common.secagg.masking import add_packed
from common.secagg.quantise import reduce_
from common.strategy import OptimizerSettings, ServerOptimizer
from common.tensors import Layout, TensorSpec, state_digest
from server.unmask import OpenRound, check_unmask, open_sum

HERE = Path(__file__).parent
MAX_BYTES = 1 << 24


def load_file(name: str):
    spec = importlib.util.spec_from_file_location(f"transcript_{name}", HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


second = load_file("second")
RUNS = {
    run["bits"]: {**run, "messages": second.expanded(run)}
    for run in json.loads((HERE / "transcript.json").read_text())["runs"]
}
FAILURES = (
    second.WrongError, InvalidSignature, InvalidTag, ValueError, LookupError, TypeError, struct.error,
    OverflowError,
)  # fmt: skip
both = pytest.mark.parametrize("bits", [24, 32])


def tag_of(text: str) -> str:
    return second.dec_at(bytes.fromhex(text), 9)[0]


TAGS = sorted({tag_of(text) for _, _, text in RUNS[24]["messages"]})


# ------------------------------------------------------------- the second implementation
def test_the_second_implementation_shares_no_code_with_the_packages():
    tree = ast.parse((HERE / "second.py").read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    allowed = {"__future__", "fractions", "hashlib", "hmac", "math", "re", "struct"}
    assert {name for name in imported if not name.startswith("cryptography.")} == allowed


@both
def test_a_second_implementation_reproduces_every_recorded_value(bits):
    second.check(RUNS[bits])


@both
def test_what_our_code_does_today_passes_the_second_implementation(bits):
    second.check(json.loads(json.dumps(load_file("make_transcript").record(bits))))


def test_the_transcript_holds_every_kind_of_message_of_an_undisturbed_run():
    kinds = {kind.__name__ for kind in (*wire.FROM_COORDINATOR, *wire.STATEMENTS, *wire.UPLOADS)}
    unusual = {"Burn", "BurnRequest", "Dispute", "Ended", "Refusal", "RevealRequest"}
    assert set(TAGS) == kinds - unusual


@both
def test_the_transcript_has_a_dropout_a_saturated_value_and_two_lanes(bits):
    run = RUNS[bits]
    heads, roots = [m.link.heads for m in links(run)], [m.link.roots for m in links(run)]
    assert [set(h) - set(r) for h, r in zip(heads, roots, strict=True)] == [
        set(),
        {"site-03"},
        set(),
    ]
    peak = max(second.unpack_f32(run["inputs"]["1"]["site-01"]["update"]))
    assert peak * 2.0 ** run["terms"]["exponents"][0] > (2 ** (bits - 1) - 1) // 4
    assert [len(m.link.sums) for m in links(run)] == [1, 2, 1]


# ---------------------------------------------------------- control: nothing may be other
@pytest.mark.parametrize("tag", TAGS)
def test_a_flipped_bit_in_any_kind_of_message_is_found(tag):
    run = RUNS[24]
    indices = [i for i, (_, _, text) in enumerate(run["messages"]) if tag_of(text) == tag]
    for attempt in range(6):
        index = indices[attempt * len(indices) // 6]
        sender, recipient, text = run["messages"][index]
        data = bytearray.fromhex(text)
        at = (attempt * 7919 + 13) % len(data)
        data[at] ^= 1 << attempt
        messages = list(run["messages"])
        messages[index] = [sender, recipient, data.hex()]
        with pytest.raises(FAILURES):
            second.check({**run, "messages": messages})


def leaves_of(value, path=()):
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else None
    )
    if items is None:
        if value is not None:
            yield path, value
        return
    for key, item in items:
        yield from leaves_of(item, (*path, key))


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, str) and value.startswith("0x"):
        return (float.fromhex(value) * 0.5).hex()
    if isinstance(value, str) and value[:1] in "0123456789abcdef":
        # Of an ML-KEM seed only the first half shows in what is sent; of a float, the last bytes.
        middle = len(value) * 7 // 16
        return value[:middle] + f"{int(value[middle], 16) ^ 1:x}" + value[middle + 1 :]
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("part", ["terms", "secrets", "inputs", "derived"])
def test_any_other_recorded_value_is_found(part):
    run = RUNS[32]
    for path, value in leaves_of(run[part]):
        altered = copy.deepcopy(run[part])
        place = altered
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = changed(value)
        try:
            second.check({**run, part: altered})
        except FAILURES:
            continue
        pytest.fail(f"{part} {path} may be changed unseen")


# ------------------------------------------------------------------------------- our code
def links(run):
    found = [
        wire.unpack_from_coordinator(bytes.fromhex(text), MAX_BYTES)
        for sender, recipient, text in run["messages"]
        if sender == "coordinator" and recipient == "site-01"
    ]
    return [m for m in found if isinstance(m, wire.RoundStart | wire.Finished) and m.link]


def terms_of(run) -> Terms:
    terms = run["terms"]
    optimizer = ServerOptimizer(
        OptimizerSettings(
            name="fedavgm", learning_rate=terms["learning_rate"], momentum=terms["momentum"]
        )
    )
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
        ring_bits=run["bits"], metric_words=terms["metric_words"], initial=initial,
        exponents=tuple(terms["exponents"]), optimizer=optimizer, turns=terms["turns"],
        evaluate_every=1, rounds=terms["turns"] + 13, private=True, burns_tolerated=12,
    )  # fmt: skip


@both
def test_every_recorded_message_unpacks_and_packs_to_the_same_bytes(bits):
    for sender, _, text in RUNS[bits]["messages"]:
        payload = bytes.fromhex(text)
        if sender == "coordinator":
            assert wire.pack(wire.unpack_from_coordinator(payload, MAX_BYTES)) == payload
            continue
        kind, message = wire.unpack_from_site(payload, MAX_BYTES)
        if kind in wire.UPLOADS:
            assert wire.pack(message) == payload
        else:
            assert wire.pack_statement(kind, message) == payload
            assert encode(dump_record(wire.unpack_body(kind, message))) == message.body


@both
def test_our_chain_follows_the_recorded_links_to_the_recorded_states(bits):
    run, terms = RUNS[bits], terms_of(RUNS[bits])
    chain = Chain.genesis(terms, state_digest(terms.initial))
    for message, expected in zip(links(run), run["derived"]["rounds"], strict=True):
        verify_link(terms, message.run, message.link)
        uh2, following = link_hashes(message.link)
        assert (uh2.hex(), following.hex()) == (expected["uh2"], expected["commit"])
        chain = advance(terms, chain, message.link, state_digest)
        assert (chain.state_digest.hex(), list(chain.exponents)) == (
            expected["state"], expected["exponents"],
        )  # fmt: skip
    assert chain.state_digest.hex() == run["derived"]["final"]


@both
def test_our_coordinator_opens_the_recorded_sums(bits):
    run, terms = RUNS[bits], terms_of(RUNS[bits])
    said: dict[type, list] = {}
    for sender, _, text in run["messages"]:
        if sender != "coordinator":
            kind, message = wire.unpack_from_site(bytes.fromhex(text), MAX_BYTES)
            said.setdefault(kind, []).append((sender, message))
    for link, expected in zip(links(run), run["derived"]["rounds"], strict=True):
        digests = set(link.link.heads.values())
        ready = {s: m for s, m in said[wire.Ready] if head_digest(m.head) in digests}
        heads = {s: wire.unpack_body(wire.Head, m.head) for s, m in ready.items()}
        lanes, survivors = link.link.header.lanes, tuple(sorted(link.link.roots))
        opened = OpenRound(
            bytes.fromhex(expected["hh"]), bytes.fromhex(expected["uh1"]), terms.parties, heads,
            {s: m.blob for s, m in ready.items()}, survivors, lanes,
        )  # fmt: skip
        uploads = {}
        for site, upload in said[wire.Upload]:
            receipt = wire.unpack_body(wire.Receipt, upload.receipt)
            if receipt.participants == opened.participants and site in survivors:
                uploads[site] = list(upload.planes)
        sums = [lane.zeros() for lane in lanes]
        for planes in uploads.values():
            rest = planes
            for total, lane in zip(sums, lanes, strict=True):
                count = len(lane.plane_bytes)
                add_packed(total, rest[:count], lane.bits)
                rest = rest[count:]
        statements = [wire.unpack_body(wire.Unmask, m) for _, m in said[wire.Unmask]]
        answers = [u for u in statements if u.survivors.hex() == expected["uh2"]]
        for answer in answers:
            check_unmask(opened, answer)
        open_sum(terms, opened, answers, sums)
        for total, lane in zip(sums, lanes, strict=True):
            if lane.bits < 64:
                reduce_(total, lane.bits)
        assert [total.tobytes().hex() for total in sums] == expected["aggregate"]
